"""The table for the README, out of the JSON of one or more reports."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from tests.bench.targets import MET, TARGETS, number_of, ratio

Results = dict[tuple[str, str], dict[str, list[float]]]

COLUMNS = {
    "lamfs": "lamfs",
    "juicefs": "JuiceFS",
    "juicefs-wb": "JuiceFS `--writeback`",
    "rclone": "rclone",
    "s3fs": "s3fs",
    "lamindb": "LaminDB",
    "local": "local disk",
    "passthrough": "passthrough",
}
ALSO = [
    ("2", r"first MiB \[ms\]"),
    ("5", r"100 cold, total \[s\]"),
    ("6", r"read cold in random order \[s\]"),
    ("8", r"(untar, in S3|git status, again) \[s\]"),
    ("13", r"(to close|in S3) \[s\]"),
    ("14", r".*, moved \[MiB\]"),
    ("15", r".* \[s\]"),
    ("API", r"cache, .* \[ms\]"),
]
"""Rows and metrics that no target is for, and that are shown all the same."""


MEMORY = "memory [MiB]"


def short(value: float) -> str:
    """Two or three digits that count."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def lines(reports: list[Path]) -> list[str]:
    """One table for the mounts, one for the Python API. Where reports have the same figure, the later one counts."""
    found: dict[tuple[float, str, str], dict[str, list[float]]] = {}
    for report in reports:
        data = json.loads(report.read_text())
        for result in data["results"]:
            found[data["delay"], result["row"], result["metric"]] = result["values"]
    mounts = {key: values for key, values in found.items() if key[1] != "API"}
    return [*_table(mounts), "", *_table({key: values for key, values in found.items() if key not in mounts})]


def _table(found: dict[tuple[float, str, str], dict[str, list[float]]]) -> list[str]:
    """Sorted by row, then by delay; only the systems that take part."""
    shown = []
    for key in sorted(found, key=lambda key: (_place(key[1], key[2]), key[0])):
        wanted = _wanted(key, found)
        if wanted is not None:
            shown.append((key, found[key], wanted))
    systems = [name for name in COLUMNS if any(name in values for _, values, _ in shown)]
    head = ["row", "", *(COLUMNS[name] for name in systems), "lamfs : best other", "target"]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (delay, row, metric), values, (against, target) in shown:
        text = metric
        if metric == MEMORY:
            row, text = "12", f"memory after row {row} [MiB]"
        text += f", {delay * 1000:.0f} ms delay" if delay else ""
        cells = [short(statistics.median(values[name])) if values.get(name) else "" for name in systems]
        table.append(f"| {row} | {text} | {' | '.join(cells)} | {against} | {target} |")
    return table


def _place(row: str, metric: str) -> tuple[int, int]:
    """Where a figure comes in the table: what memory was taken in a row is row 12."""
    number = int(row) if row.isdigit() else 99
    return (12, number) if metric == MEMORY else (number, 0)


def _wanted(
    key: tuple[float, str, str], found: dict[tuple[float, str, str], dict[str, list[float]]]
) -> tuple[str, str] | None:
    """What a line says of the best of the others, and of its targets; None: it is not for the table."""
    delay, row, metric = key
    best = ratio(found[key])
    against = "" if best is None else f"{best[0]:.2f}"
    same: Results = {(row, other[2]): values for other, values in found.items() if other[:2] == key[:2]}
    said = []
    for target in TARGETS:
        fits = re.fullmatch(target.row, row) and re.fullmatch(target.metric, metric)
        number = number_of(target, row, metric, same) if fits and (delay or not target.delayed) else None
        if number is None:
            continue
        held = {"local": "local disk", "": ""}.get(target.against, target.against.removeprefix("= "))
        note = f"≤ {target.limit:.3g}" + (f" of {held}" if held and held not in ("the best peer", "lamindb") else "")
        said.append(f"{note}: {MET[number <= target.limit]}" + (f" ({number:.2f})" if held != "the best peer" else ""))
    if not said and not any(row == also and re.fullmatch(pattern, metric) for also, pattern in ALSO):
        return None
    return against, "; ".join(said)
