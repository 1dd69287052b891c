"""How pyfuse3's workers wait for the kernel's next request, at less cost than with trio alone. The loop's thread only.

pyfuse3's workers pass a trio.Lock around, and the one that has it waits in trio for the session's descriptor: two task
switches, an epoll_ctl and one or two epoll_wait for every request. Here the worker that has just answered takes the
lock again without a switch, and sleeps in one poll(2), on the session's descriptor and on trio's own epoll descriptor.
So it wakes for the kernel's next request as well as for anything that another task waits for.

Other tasks wait at most a bounded time. A worker sleeps by itself only when no other task could run (trio's instruments
count those that could). The loop goes through trio's scheduler as soon as the kernel has no further request, and at
least every ``TURN`` seconds; there cancellation, timeouts and other tasks work as always.

``pyfuse3.trio`` is the module global that pyfuse3.asyncio.enable() replaces too. This depends on how pyfuse3 3.5.0
waits. With another version, or with LAMFS_LOOP=trio in the environment, pyfuse3 is left as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyfuse3
import trio
import trio.lowlevel
from trio.abc import Instrument

log = logging.getLogger("lamfs.fuse")

KNOWN = "3.5.0"
"""The version of pyfuse3 that this was written for."""
TURN, SHORT_TURN = 0.002, 0.0005
"""Seconds for which requests are answered without a look at what other tasks wait for, at most; the second value when
another task is known to be ready."""
POLL_MS = 2
ENVIRONMENT = "LAMFS_LOOP"


class Turns(Instrument):
    """Counts the tasks that could run, and records when trio's scheduler last polled."""

    def __init__(self) -> None:
        self.runnable = 0
        self.began = 0.0

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """One more could run."""
        self.runnable += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """It runs."""
        self.runnable -= 1

    def before_io_wait(self, timeout: float) -> None:
        """trio sleeps only when no task could run: correct what was counted before this instrument existed."""
        if timeout > 0:
            self.runnable = 0

    def after_io_wait(self, timeout: float) -> None:
        """All tasks that could run do so from here on, and then trio polls again."""
        self.began = time.monotonic()


class _Done:
    """An awaitable that does not wait."""

    __slots__ = ()

    def __await__(self) -> Iterator[Any]:
        return iter(())


_DONE = _Done()


class ReadLock:
    """A lock whose release does not hand it over: the task that releases it may take it again before a waiter has run.

    A waiter is woken all the same. When it runs, it takes the lock if the last holder now waits for something else;
    otherwise it waits on.
    """

    def __init__(self) -> None:
        self._held = False
        self._lot = trio.lowlevel.ParkingLot()
        self.roused = 0
        """Tasks that were woken and have not run since: 0 or 1."""

    def __aenter__(self) -> Any:
        if self._held:
            return self._wait()
        self._held = True
        return _DONE

    async def _wait(self) -> None:
        while self._held:
            await self._lot.park()
            self.roused = 0
        self._held = True

    def __aexit__(self, *exception: object) -> Any:
        self._held = False
        if not self.roused:
            self.roused = len(self._lot.unpark())
        return _DONE

    @property
    def is_awaited(self) -> bool:
        """Whether a task waits for it, or has just been woken."""
        return bool(self.roused or self._lot)


class Waiting:
    """What pyfuse3 gets instead of trio. ``events`` is trio's epoll descriptor."""

    def __init__(self, turns: Turns, events: int) -> None:
        self._turns = turns
        self._events = events
        self._lock = ReadLock()
        self._fd = -1
        self._soon = select.poll()
        self._next = select.poll()

    def namespace(self) -> SimpleNamespace:
        """The names of trio that pyfuse3 uses."""
        lowlevel = SimpleNamespace(
            current_task=trio.lowlevel.current_task,
            current_trio_token=trio.lowlevel.current_trio_token,
            notify_closing=trio.lowlevel.notify_closing,
            wait_readable=self.wait_readable,
        )
        return SimpleNamespace(
            Lock=lambda: self._lock,
            ClosedResourceError=trio.ClosedResourceError,
            open_nursery=trio.open_nursery,
            lowlevel=lowlevel,
        )

    async def wait_readable(self, fd: int) -> None:
        """Return when the session's descriptor is readable. The caller has the lock.

        Has a checkpoint only now and then. Raises ClosedResourceError as trio does.
        """
        lock = self._lock
        # Without a spare worker pyfuse3 starts one with each request, which needs the loop.
        age = time.monotonic() - self._turns.began
        if age < TURN and lock.is_awaited:
            if fd != self._fd:
                self._watch(fd)
            if self._turns.runnable > lock.roused:
                if age < SHORT_TURN and self._soon.poll(0):
                    return
            else:
                for ready, _ in self._next.poll(POLL_MS):
                    if ready == fd:
                        return
        await trio.lowlevel.wait_readable(fd)

    def _watch(self, fd: int) -> None:
        self._fd = fd
        self._soon, self._next = select.poll(), select.poll()
        self._soon.register(fd, select.POLLIN)
        self._next.register(fd, select.POLLIN)
        self._next.register(self._events, select.POLLIN)


@contextlib.contextmanager
def quick_loop() -> Iterator[bool]:
    """Inside the context, in a trio task, pyfuse3 waits in this way. Yields whether it does."""
    events = _events()
    if events is None or pyfuse3.__version__ != KNOWN or os.environ.get(ENVIRONMENT) == "trio":
        log.info("requests are awaited by trio itself")
        yield False
        return
    turns = Turns()
    trio.lowlevel.add_instrument(turns)
    setattr(pyfuse3, "trio", Waiting(turns, events).namespace())  # noqa: B010
    try:
        yield True
    finally:
        setattr(pyfuse3, "trio", trio)  # noqa: B010
        trio.lowlevel.remove_instrument(turns)


def _events() -> int | None:
    """The descriptor on which trio waits for everything; None when that is not known."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        epoll: Any = GLOBAL_RUN_CONTEXT.runner.io_manager._epoll  # type: ignore[attr-defined, unused-ignore]
        return int(epoll.fileno())
    except (ImportError, AttributeError):
        return None
