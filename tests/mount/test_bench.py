"""scripts/bench runs, mounts, measures and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="the benchmark drops the page cache, which only root can")
def test_a_tiny_run_writes_both_reports(tmp_path: Path) -> None:
    words = ["--scale", "tiny", "--repetitions", "1", "--systems", "lamfs,local", "--rows", "2,6"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", *words, "--output", str(tmp_path / "report")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["failures"] == []
    values = {(result["row"], result["metric"]): result["values"] for result in found["results"]}
    for metric in (("2", "total [s]"), ("6", "create, to close [s]"), ("6", "read cold in the order of ls [s]")):
        assert set(values[metric]) == {"lamfs", "local"}, metric
        assert all(len(times) == 1 and 0 < times[0] < 100 for times in values[metric].values()), metric
    assert values["6", "read cold in the order of ls, requests [n]"]["lamfs"][0] <= 60
    text = (tmp_path / "report.md").read_text()
    assert "| total [s] | " in text
    assert "## Targets" in text
