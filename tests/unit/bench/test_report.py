"""The report of the benchmark: medians, ratios, targets, what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import report, table, targets
from tests.bench.bench import Bench, Numbers, Row, Scale
from tests.bench.systems import System
from tests.bench.targets import Target, ratio


def measure(bench: Bench, system: System) -> Numbers:
    """Until the last byte
    is there."""
    return {}


ROWS = [Row("1", "write 1 GiB", measure), Row("5", "random reads", measure), Row("9", "not run", measure)]
VERSIONS = {"lamfs": "abc", "juicefs": "1.4.2", "rclone": "1.75", "s3fs": None, "local": "ext4"}


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(Scale(large=1 << 20), 0.0, "seaweedfs", [])
    bench.results = {
        ("1", "to close [s]"): {"lamfs": [2.0, 9.0, 1.0], "juicefs": [4.0], "rclone": [10.0, 16.0], "local": [0.5]},
        ("1", "daemon CPU [s]"): {"lamfs": [1.0], "juicefs": [2.0]},
        ("1", "in S3 [s]"): {"lamfs": [1234.5]},
        ("5", "100 cold, round trips a read"): {"lamfs": [1.1]},
    }
    yield bench
    bench.base.rmdir()


def test_the_ratio_is_of_medians_to_the_best_peer() -> None:
    assert ratio({"lamfs": [1.0, 2.0, 30.0], "rclone": [8.0], "juicefs": [4.0, 5.0], "local": [0.1]}) == (
        2.0 / 4.5,
        "juicefs",
    )
    assert ratio({"lamfs": [1.0], "local": [0.1]}) is None
    assert ratio({"juicefs": [1.0]}) is None


def test_a_cell_is_the_median_and_its_range() -> None:
    assert report.cell([2.0, 9.0, 1.0]) == "2.00 (1.00–9.00)"
    assert report.cell([0.5]) == "0.500"
    assert report.cell([1234.5]) == "1,234"
    assert report.cell([]) == "-"


def test_the_report(bench: Bench) -> None:
    bench.failures = ["row 1, rclone: TimeoutError: late"]
    text = report.markdown(bench, ROWS, VERSIONS, 3, "scripts/bench --rows 1,5")
    assert "| to close [s] | 2.00 (1.00–9.00) | 4.00 | 13.00 (10.00–16.00) | 0.500 | **0.50** (juicefs) |" in text
    assert "| daemon CPU [s] | 1.00 | 2.00 | - | - |  |" in text
    assert "| | lamfs | juicefs | rclone | local | ratio |" in text
    assert "Not installed and so skipped: s3fs." in text
    assert "## 1. write 1 GiB\n\nUntil the last byte is there.\n" in text
    assert "not run" not in text
    assert "- row 1, rclone: TimeoutError: late" in text
    assert "    scripts/bench --rows 1,5\n" in text
    found = json.loads(report.as_json(bench, VERSIONS, "scripts/bench"))
    assert found["results"][0]["values"]["lamfs"] == [2.0, 9.0, 1.0]
    assert [result["ratio"] for result in found["results"]] == [0.5, 0.5, None, None]


def test_targets(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        Target("1", r"to close \[s\]", targets.PEERS, 0.6),
        Target("1", r"to close \[s\]", "local", 1.5),
        Target("1", r"to close \[s\]", "= in S3 [s]", 0.5),
        Target("1", r"in S3 \[s\]", targets.PEERS, 0.8),
        Target("5", r"100 cold, round trips a read", "", 1.2, delayed=True),
        Target("14", r"(one|two) \[s\]", targets.PEERS, 0.3),
    ]
    monkeypatch.setattr(targets, "TARGETS", wanted)
    lines = targets.section(bench)[4:]
    assert lines[1:] == [
        "| 1 | to close [s] | the best peer | 0.6 | 0.50 | yes |",
        "| 1 | to close [s] | local | 1.5 | 4.00 | **no** |",
        "| 1 | to close [s] | in S3 [s] | 0.5 | 0.00 | yes |",
        "| 1 | in S3 [s] | the best peer | 0.8 |  | not measured |",
        "| 5 | 100 cold, round trips a read | requests delayed | 1.2 |  | not measured |",
        r"| 14 | (one\|two) [s] | the best peer | 0.3 |  | not measured |",
    ]
    bench.delay = 0.02
    assert targets.section(bench)[-2] == "| 5 | 100 cold, round trips a read | requests delayed | 1.2 | 1.10 | yes |"


def test_the_table_is_of_all_reports_and_sorted_by_row(bench: Bench, tmp_path: Path) -> None:
    plain, delayed = tmp_path / "plain.json", tmp_path / "delayed.json"
    bench.results["API", "save, one [ms]"] = {"lamfs": [1.0], "lamindb": [4.0]}
    bench.results["1", "memory [MiB]"] = {"lamfs": [40.0], "juicefs": [80.0]}
    plain.write_text(report.as_json(bench, VERSIONS, ""))
    bench.delay, bench.results = 0.02, {("5", "100 cold, round trips a read"): {"lamfs": [1.3], "juicefs": [1.3]}}
    delayed.write_text(report.as_json(bench, VERSIONS, ""))
    assert table.lines([delayed, plain]) == [
        "| row |  | lamfs | JuiceFS | rclone | local disk | lamfs : best other | target |",
        "|---|---|---|---|---|---|---|---|",
        "| 1 | to close [s] | 2.00 | 4.00 | 13.0 | 0.500 | 0.50 | ≤ 0.6: yes |",
        "| 5 | 100 cold, round trips a read, 20 ms delay | 1.30 | 1.30 |  |  | 1.00 | ≤ 1.2: **no** (1.30) |",
        "| 12 | memory after row 1 [MiB] | 40.0 | 80.0 |  |  | 0.50 | ≤ 1: yes |",
        "",
        "| row |  | lamfs | LaminDB | lamfs : best other | target |",
        "|---|---|---|---|---|---|",
        "| API | save, one [ms] | 1.00 | 4.00 | 0.25 | ≤ 0.5: yes (0.25) |",
    ]
