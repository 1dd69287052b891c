"""The clock of tests that wait for nothing but time."""

from __future__ import annotations

import threading
import time

import pytest
import trio


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
    began = time.monotonic()
    await trio.sleep(0.01)
    assert time.monotonic() - began >= 0.01
