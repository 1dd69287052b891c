"""Waiting for storage on behalf of a program: with a time limit, and only until the program is told to stop.

The limit is the mount's timeout, counted from the last progress. Loop only; a thread looks at /proc while a call waits.
Calls that do not wait for storage never come here.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import trio

from lamfs.errors import FsError
from lamfs.fs import signals
from lamfs.fs.counters import Counters

log = logging.getLogger("lamfs.fs")

LOOK_SECONDS = 0.25
"""Seconds between two looks for signals while a call waits."""
LONG_SECONDS = 0.1
"""Seconds that a wait must last before signals are looked for."""
STOPPED_SECONDS = 10.0
"""Seconds after the end of a thread's call in which no new wait of it starts while it is still told to stop."""
SHARE = 10
"""Finding the processes that have a file open takes at most a tenth of a thread's time, however many there are."""

T = TypeVar("T")


class Caller(NamedTuple):
    """The caller that waits: the thread ``pid`` that made the call, or that opened the file (0: not known).

    In the second case ``fino`` is the file: other processes may have inherited its descriptor. ``rivals``: threads that
    have opened the same file themselves.
    """

    pid: int = 0
    fino: int = 0
    rivals: Callable[[], Iterable[int]] = tuple


@dataclass(slots=True, eq=False)
class _Wait:
    caller: Caller
    scope: trio.CancelScope
    since: float
    seconds: float
    progress: Callable[[], object] | None
    seen: object = None
    interrupted: bool = False

    def interrupt(self) -> None:
        self.interrupted = True
        self.scope.cancel()

    def look(self) -> None:
        """If there was progress since the last look, the time limit starts again."""
        if self.progress is not None and not self.interrupted and (now := self.progress()) != self.seen:
            self.seen = now
            self.scope.deadline = trio.current_time() + self.seconds


class Waits:
    """All calls of one mount that wait for storage."""

    def __init__(self, counters: Counters) -> None:
        self._counted = counters
        self._waiting: set[_Wait] = set()
        self._begun = trio.Event()
        self._stopped: dict[int, float] = {}
        """Time at which a call of this thread was last ended: the kernel asks again after an interrupted readahead."""

    def _is_stopped(self, pid: int) -> bool:
        """Whether a thread whose call was ended is still told to stop."""
        at = self._stopped.get(pid)
        return at is not None and trio.current_time() - at < STOPPED_SECONDS and signals.told_to_stop(pid)

    def _was_stopped(self, pid: int) -> None:
        now = trio.current_time()
        self._stopped = {other: at for other, at in self._stopped.items() if now - at < STOPPED_SECONDS}
        self._stopped[pid] = now

    async def bounded(
        self,
        work: Callable[[], Awaitable[T]],
        seconds: float,
        caller: Caller,
        what: Callable[[], str],
        progress: Callable[[], object] | None = None,
    ) -> T:
        """The result of ``work``. ``what`` names the file for an error. ``progress`` changes when there was progress.

        Raises FsError: EIO if there is no progress for ``seconds``, EINTR if the caller is told to stop meanwhile.
        """
        with trio.CancelScope(deadline=trio.current_time() + seconds) as scope:
            wait = _Wait(caller, scope, trio.current_time(), seconds, progress)
            wait.seen = None if progress is None else progress()
            if self._is_stopped(caller.pid):
                wait.interrupt()
            self._waiting.add(wait)
            self._begun.set()
            try:
                return await work()
            finally:
                self._waiting.discard(wait)
                if not self._waiting:
                    self._begun = trio.Event()
        if wait.interrupted:
            if caller.pid:
                self._was_stopped(caller.pid)
            raise FsError(errno.EINTR)
        self._counted.timeouts += 1
        raise FsError(errno.EIO, f"'{what()}': storage did not answer in time.")

    async def run(self, mountpoint: str, *, shared: bool = False) -> None:
        """Look for progress and signals while a call waits, until cancelled. ``shared``: others may use the mount."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.follow)
            nursery.start_soon(self._look_for_signals, mountpoint, shared)

    async def follow(self) -> None:
        """Look for progress while a call waits, until cancelled."""
        while True:
            if not self._waiting:
                await self._begun.wait()
            for wait in list(self._waiting):
                wait.look()
            shortest = min((wait.seconds for wait in self._waiting), default=LOOK_SECONDS)
            await trio.sleep(min(LOOK_SECONDS, max(shortest / 8, 0.01)))

    async def _look_for_signals(self, mountpoint: str, shared: bool) -> None:
        mount = signals.find_mount(mountpoint)
        sees_all = os.geteuid() == 0 or not shared
        next_search = 0.0
        while True:
            if not self._waiting:
                await self._begun.wait()
            began = trio.current_time()
            # Most waits end before anybody loses patience: nothing is looked up for those.
            if not any(began - wait.since >= LONG_SECONDS for wait in self._waiting):
                await trio.sleep(LONG_SECONDS)
                continue
            waiting = [(wait, wait.caller, list(wait.caller.rivals())) for wait in self._waiting]
            search = sees_all and began >= next_search
            look = _Look(mount, [(caller, rivals) for _, caller, rivals in waiting], search)
            try:
                interrupted = await trio.to_thread.run_sync(look.interrupted, abandon_on_cancel=True)
            except OSError as error:
                log.warning("could not look for signals: %s", error)
            else:
                for wait, *_ in itertools.compress(waiting, interrupted):
                    wait.interrupt()
            if look.searched:
                next_search = trio.current_time() + SHARE * look.searched
            await trio.sleep(LOOK_SECONDS)


class _Look:
    """One look at /proc, in a thread: which callers, given with their rivals, are told to stop or gone."""

    def __init__(self, mount: signals.Mount | None, callers: list[tuple[Caller, list[int]]], search: bool) -> None:
        self.searched = 0.0
        """Seconds spent on finding the processes that have files open."""
        self._mount = mount
        self._callers = callers
        self._search = search
        self._told: list[int] = []

    def interrupted(self) -> list[bool]:
        """For each caller, whether its call should end."""
        self._told = signals.all_told_to_stop()
        return [self._is_over(caller, rivals) for caller, rivals in self._callers]

    def _is_over(self, caller: Caller, rivals: list[int]) -> bool:
        opener = signals.process_of(caller.pid) if caller.pid else None
        if any(self._is(pid, caller, opener, rivals) for pid in self._told):
            return True
        # The kernel lets a reader die but keeps its request, which would block one of the few that the kernel allows.
        gone = caller.pid and opener is None and caller.fino and self._mount is not None and self._search
        return bool(gone) and self._nobody_else(caller, rivals)

    def _is(self, pid: int, caller: Caller, opener: int | None, rivals: list[int]) -> bool:
        """Whether a process that is told to stop is the one that waits.

        It is, if it made the call or opened the file. Otherwise it must have the file open and must have inherited it:
        it has not opened the file itself, and descends from the process that did, if that still lives.
        """
        if pid == opener:
            return True
        if not caller.fino or self._mount is None or not signals.holds(pid, self._mount, caller.fino):
            return False
        if any(signals.process_of(rival) == pid for rival in rivals):
            return False
        return opener is None or signals.descends(pid, opener)

    def _nobody_else(self, caller: Caller, rivals: list[int]) -> bool:
        """Whether all processes that have the file open have opened it themselves."""
        assert self._mount is not None
        began = time.monotonic()
        found = set(signals.holders(self._mount, caller.fino))
        self.searched += time.monotonic() - began
        return found <= {signals.process_of(rival) for rival in rivals}
