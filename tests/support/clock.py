"""Time for tests of async code that uses neither threads nor real I/O: it advances when no task can run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from lamfs import model
from lamfs.fs import context, follow
from lamfs.work import moves, uploader


async def _run_sync(work: Callable[..., Any], *args: Any, **_: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return work(*args)


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an async test: trio's autojump clock. Threads would not stop it, so the loop does the work of threads."""
    monkeypatch.setattr(trio.to_thread, "run_sync", _run_sync)


@contextlib.contextmanager
def jumping(clock: trio.testing.MockClock) -> Iterator[None]:
    """As the fixture, for a synchronous test, which runs trio itself with this clock. The journal's times follow the
    clock: a row that is to be tried again in a minute is due when the clock has jumped that far.
    """

    def now_ns() -> int:
        return model.now_ns() + int(clock.current_time() * 1e9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", _run_sync)
        for module in (context, follow, moves, uploader):
            patch.setattr(module, "now_ns", now_ns)
        yield


def run_jumping(main: Callable[..., Any], *args: Any) -> Any:
    """trio.run with the autojump clock."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    with jumping(clock):
        return trio.run(main, *args, clock=clock)


def _run(main: Callable[..., Any], *args: Any, clock: trio.abc.Clock | None = None, **options: Any) -> Any:
    return trio.run(main, *args, clock=clock or trio.testing.MockClock(autojump_threshold=0), **options)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest-trio finds a clock only among a test's own arguments, not if a folder or module requests it."""
    for item in items:
        asks = "jumping_clock" in getattr(item, "fixturenames", ())
        if asks and inspect.iscoroutinefunction(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.trio(run=_run), append=False)
