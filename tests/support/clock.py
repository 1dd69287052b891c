"""Time for tests of async code that neither use threads nor wait for I/O: it passes when nobody can run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an async test: trio's autojump clock. No thread would stop it, so what threads are for, the loop does."""

    async def run_sync(work: Callable[..., Any], *args: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return work(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


def _run(main: Callable[..., Any], *args: Any, clock: trio.abc.Clock | None = None, **options: Any) -> Any:
    return trio.run(main, *args, clock=clock or trio.testing.MockClock(autojump_threshold=0), **options)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest-trio sees a clock among a test's own arguments only, not where a folder or module asks for it."""
    for item in items:
        asks = "jumping_clock" in getattr(item, "fixturenames", ())
        if asks and inspect.iscoroutinefunction(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.trio(run=_run), append=False)
