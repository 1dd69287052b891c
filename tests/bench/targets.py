"""What lamfs is compared with, what it has to reach, and the section of the report that says whether it did."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

from tests.bench.bench import Bench

SYSTEMS = ("juicefs", "juicefs-wb", "rclone", "s3fs", "lamindb")
"""Those that lamfs is compared with."""
PEERS = "the best peer"
MET = {True: "yes", False: "**no**", None: "not measured"}


@dataclass(frozen=True)
class Target:
    """At most ``limit`` for every metric of a row that ``metric``, a pattern, matches in full.

    ``against``: what lamfs's number is divided by: PEERS, the name of one system, another metric of lamfs in the same
    row after ``= ``, or nothing. ``delayed``: only when requests are delayed.
    """

    row: str
    metric: str
    against: str
    limit: float
    delayed: bool = False


TARGETS = [
    Target("1", r"to close \[s\]", PEERS, 0.6),
    Target("1", r"in S3 \[s\]", PEERS, 0.8),
    Target("2", r"total \[s\]", PEERS, 0.7),
    # 70 % of the speed of plain boto3.
    Target("2", r"total \[s\]", "= boto3: ranged GETs by 8 threads [s]", 1 / 0.7),
    Target("3", r"total \[s\]", PEERS, 0.7),
    Target("4", r"total \[s\]", "local", 1.5),
    Target("5", r"100 cold, round trips a read", "", 1.2, delayed=True),
    Target("5", r"100 cold, fetched a read \[KiB\]", "", 128, delayed=True),
    Target("5", r"1000 cold, total \[s\]", PEERS, 0.8, delayed=True),
    Target("6", r"create, to close \[s\]", PEERS, 0.8),
    Target("6", r"create, in S3 \[s\]", PEERS, 1.0),
    Target("6", r"read cold in the order of ls \[s\]", PEERS, 0.1, delayed=True),
    Target("7", r"ls -l of 10,000, (cold|warm) \[s\]", PEERS, 0.8),
    # As much for each entry, give or take a quarter, of ten times as many.
    Target("7", r"ls -l of 100,000, cold \[s\]", "= ls -l of 10,000, cold [s]", 12.5),
    Target("7", r"ls -l of 100,000, warm \[s\]", "= ls -l of 10,000, warm [s]", 12.5),
    Target("8", r"(untar|git clone|git status) \[s\]", PEERS, 0.8),
    Target("8", r"rm -rf .* \[s\]", PEERS, 0.8),
    Target("10", r"(1,000|100,000) files \[ms\]", "juicefs", 1.0),
    Target("11", r"11,000 files \[s\]", PEERS, 0.5),
    Target("11", r"1,000,000 files, nothing else \[s\]", "= 10,000 files, nothing else [s]", 2.0),
    Target("[0-9]+", r"memory \[MiB\]", PEERS, 1.0),
    Target("14", r".*, (to close|in S3) \[s\]", PEERS, 0.3),
    Target("API", r"(save|replace|rename|delete), .* \[ms\]", "lamindb", 0.5),
]


def ratio(found: dict[str, list[float]]) -> tuple[float, str] | None:
    """lamfs by the best peer, and which that is."""
    peers = {name: statistics.median(found[name]) for name in SYSTEMS if found.get(name)}
    if not peers or not found.get("lamfs"):
        return None
    best = min(peers, key=lambda name: peers[name])
    return statistics.median(found["lamfs"]) / max(peers[best], 1e-9), best


def reached(target: Target, bench: Bench) -> list[tuple[str, str, float | None]]:
    """(row, metric, number) of each metric that a target is for; one line without a number when there is none."""
    found: list[tuple[str, str, float | None]] = []
    for row, metric in bench.results:
        fits = re.fullmatch(target.row, row) and re.fullmatch(target.metric, metric)
        if fits and (bench.delay or not target.delayed):
            number = number_of(target, row, metric, bench.results)
            if number is not None:
                found.append((row, metric, number))
    return found or [(target.row, re.sub(r"\\(.)", r"\1", target.metric).replace("|", r"\|"), None)]


def number_of(
    target: Target, row: str, metric: str, results: dict[tuple[str, str], dict[str, list[float]]]
) -> float | None:
    """lamfs's median by what it is held against; None when one of the two is missing."""
    values = results[row, metric]
    if target.against == PEERS:
        best = ratio(values)
        return best[0] if best is not None else None
    lamfs = values.get("lamfs")
    if not lamfs:
        return None
    other = [1.0]
    if target.against.startswith("= "):
        other = results.get((row, target.against[2:]), {}).get("lamfs", [])
    elif target.against:
        other = values.get(target.against, [])
    return statistics.median(lamfs) / max(statistics.median(other), 1e-9) if other else None


def section(bench: Bench) -> list[str]:
    """The lines of the report."""
    lines = ["", "## Targets", "", "| row | metric | against | at most | is | met |", "|---|---|---|---|---|---|"]
    for target in TARGETS:
        for row, metric, number in reached(target, bench):
            met = MET[None if number is None else number <= target.limit]
            against = target.against.removeprefix("= ") + (", requests delayed" if target.delayed else "")
            shown = "" if number is None else f"{number:.2f}"
            lines.append(f"| {row} | {metric} | {against.removeprefix(', ')} | {target.limit:.4g} | {shown} | {met} |")
    return lines
