"""The clock of tests that wait for nothing but time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import trio
import trio.testing

from lamfs.work import uploader
from tests.support.clock import run_jumping


@pytest.mark.usefixtures("jumping_clock")
async def test_time_passes_when_nobody_can_run() -> None:
    began = time.monotonic()
    seen = []
    with trio.fail_after(3600.5):
        for _ in range(60):
            await trio.sleep(60)
            seen.append(await trio.to_thread.run_sync(threading.current_thread))
    assert time.monotonic() - began < 3600
    assert set(seen) == {threading.current_thread()}


async def test_elsewhere_it_is_the_real_one() -> None:
    assert not isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)


def test_what_is_to_be_tried_again_is_due_when_the_clock_has_jumped_that_far() -> None:
    seen: list[int] = []

    async def main() -> None:
        for _ in range(2):
            seen.append(uploader.now_ns())
            await trio.sleep(3600)

    run_jumping(main)
    assert (seen[1] - seen[0]) / 1e9 >= 3600
    assert seen[1] > time.time_ns()


def test_no_unit_test_really_sleeps() -> None:
    """What is waited for sets an event, or is looked at until a deadline; time itself is that of the jumping clock."""
    jumps = ("jumping_clock", "run_jumping", "make_box", "MockClock", "_no_time_passes")
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        text = path.read_text()
        assert "time.sleep" + "(" not in text, path
        if "trio.sleep" + "(" in text:
            asked = text + (path.parent / "conftest.py").read_text() if (path.parent / "conftest.py").exists() else text
            assert any(word in asked for word in jumps), path
