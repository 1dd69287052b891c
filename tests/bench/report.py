"""The report: Markdown to read, JSON to compute with."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.bench import targets
from tests.bench.bench import Bench, Row
from tests.bench.targets import ratio

# Metrics that only explain: no ratio is given for them.
EXPLAIN = ("requests", "CPU", "p50", "p99")


def machine() -> str:
    """What ran it."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    total = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    memory = f"{int(total[1]) / (1 << 20):.0f} GiB" if total else "?"
    cpu = model[1] if model else platform.machine()
    return f"{os.cpu_count()} cores ({cpu}), {memory}, Linux {platform.release()}, Python {platform.python_version()}"


def cell(values: list[float] | None) -> str:
    """Median (least to most)."""
    if not values:
        return "-"
    median = statistics.median(values)
    digits = 0 if median >= 1000 else 1 if median >= 100 else 2 if median >= 1 else 3
    least, most = min(values), max(values)
    text = f"{median:,.{digits}f}"
    return text if least == most else f"{text} ({least:,.{digits}f}–{most:,.{digits}f})"


def markdown(bench: Bench, rows: list[Row], versions: dict[str, str | None], repetitions: int, command: str) -> str:
    """The whole report."""
    lines = [
        "# lamfs beside other mounts",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; pyfuse3 {version('pyfuse3')}; S3 server {bench.server_name}"
        f"{f', every request delayed by {bench.delay * 1000:.0f} ms' if bench.delay else ''}.",
        "",
        "Versions: " + ", ".join(f"{name} {found}" for name, found in versions.items() if found) + ".",
    ]
    if missing := [name for name, found in versions.items() if not found]:
        lines.append(f"Not installed and so skipped: {', '.join(missing)}.")
    lines += [
        f"Median of {repetitions} interleaved repetitions (least–most). Ratio: lamfs by the best peer.",
        "",
        f"    {command}",
    ]
    names = [name for name, found in versions.items() if found]
    for row in rows:
        found = {metric: values for (number, metric), values in bench.results.items() if number == row.number}
        if not found:
            continue
        used = [name for name in (*names, "boto3") if any(name in values for values in found.values())]
        said = " ".join((row.measure.__doc__ or "").split())
        lines += ["", f"## {row.number}. {row.title}", "", said, "", f"| | {' | '.join(used)} | ratio |"]
        lines.append("|---|" + "---|" * (len(used) + 1))
        for metric, values in found.items():
            against = None if any(word in metric for word in EXPLAIN) else ratio(values)
            shown = f"**{against[0]:.2f}** ({against[1]})" if against else ""
            lines.append(f"| {metric} | {' | '.join(cell(values.get(name)) for name in used)} | {shown} |")
    lines += targets.section(bench)
    if bench.failures:
        lines += ["", "## Failed", "", *(f"- {text}" for text in bench.failures)]
    return "\n".join(lines) + "\n"


def as_json(bench: Bench, versions: dict[str, str | None], command: str) -> str:
    """All numbers."""
    results = [
        {"row": number, "metric": metric, "values": values, "ratio": (found := ratio(values)) and found[0]}
        for (number, metric), values in bench.results.items()
    ]
    data = {
        "machine": machine(),
        "server": bench.server_name,
        "delay": bench.delay,
        "versions": versions,
        "command": command,
        "results": results,
        "failures": bench.failures,
    }
    return json.dumps(data, indent=1)
