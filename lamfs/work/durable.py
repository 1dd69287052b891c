"""What has to survive a power cut before the next step: the registry's log, a spool file. Loop only.

Commits go to the registry's write-ahead log, which is not synced at each commit. Changes in storage are permanent. So
the row that announces a change is made durable before it. The row that records it is made durable before a file is
deleted that would be needed without the row.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from lamfs.errors import LamfsError, RegistryError
from lamfs.mover import beats
from lamfs.registry import LOG_PAGES, Registry, begin_log, fold_log, sync_log
from lamfs.registry.db import Database
from lamfs.spool import SpoolFolder

log = logging.getLogger("lamfs.uploader")

T = TypeVar("T")

LOOK = 0.1
"""Seconds between two checks of how much was committed."""
CHANGES = 500
"""Changed rows after which the log is folded: about 2 MiB of it."""
ROOMY = 1 << 30
"""Free bytes on the registry's disk above which the log may become larger."""


class LogSync:
    """``await durable()`` returns when every commit before the call is durable. All waiting callers share one sync.
    There is no sync if nobody has committed anything since the last one.

    Must not be called while a statement of ``db`` is being read: that hides the commits of others. Raises
    RegistryError.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._lock = trio.Lock()
        self._asked = self._done = 0
        self._synced: tuple[int, int, int] | None = None

    async def __call__(self) -> None:
        self._asked = mine = self._asked + 1
        async with self._lock:
            if self._done >= mine:
                return  # a sync that began after the call has ended meanwhile
            covered = self._asked
            now = self._db.changes(), self._db.data_version(), self._db.work_version()
            if now != self._synced or self._db.conn.in_transaction:  # its commit will not change the numbers
                self._synced = None
                with beats.paused():
                    await trio.to_thread.run_sync(sync_log, self._db.path)
                if not self._db.conn.in_transaction:
                    self._synced = now
            self._done = covered


class Folding:
    """Folds the registry's log into its file in a thread, so that no request waits for the two syncs which that takes.

    A commit still folds it itself if the log grows faster: when it has four times the usual number of pages, or the
    usual number if the disk has little space left.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    async def run(self) -> None:
        """Begin the log, and fold it when it has grown, until cancelled."""
        try:
            await trio.to_thread.run_sync(begin_log, self._db.path)
        except RegistryError as error:
            log.info("the registry's log is not begun: %s", error)
        seen, roomy = self._db.changes(), False
        while True:
            if roomy != self._is_roomy():
                roomy = not roomy
                self._db.log_pages(4 * LOG_PAGES if roomy else LOG_PAGES)
            await trio.sleep(LOOK)
            now = self._db.changes()
            if now - seen >= CHANGES:
                seen = now
                try:
                    await trio.to_thread.run_sync(fold_log, self._db.path)
                except RegistryError as error:
                    log.info("the registry's log is not folded: %s", error)

    def _is_roomy(self) -> bool:
        try:
            disk = os.statvfs(self._db.path.parent)
        except OSError:  # the next commit will report it
            return False
        return disk.f_bavail * disk.f_frsize > ROOMY


class RangeSync:
    """Makes ranges of partial spools (registry/partial_spools.py) durable soon after they were acknowledged, so that
    they survive a shutdown or a power cut a moment later. Loop only."""

    def __init__(self, registry: Registry, spool: SpoolFolder) -> None:
        self._registry = registry
        self._spool = spool
        self._asked: set[str] = set()
        self._work = trio.Event()
        self._lock = trio.Lock()

    def ask(self, src: str) -> None:
        """Request that the present ranges of spool file ``src`` are made durable."""
        self._asked.add(src)
        self._work.set()

    async def run(self) -> None:
        """Do what was requested, until cancelled."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            await self.finish()

    async def finish(self) -> None:
        """Return when all that was requested is done, or has failed."""
        async with self._lock:
            while self._asked:
                src = self._asked.pop()
                try:
                    ranges = self._registry.partial_spools.ranges(src)
                    if ranges:
                        await sync_file(self._spool, self._spool.open(src, os.O_RDONLY))
                        self._registry.partial_spools.synced(src, ranges)
                except FileNotFoundError:
                    pass  # it was stored meanwhile
                except (OSError, LamfsError) as error:
                    log.warning("what was written to the spool file %s may not survive a power cut: %s", src, error)


async def sync_file(spool: SpoolFolder, fd: int) -> None:
    """Return when a spool file, and its name, are durable. Closes ``fd``, its descriptor. Raises OSError."""

    def work() -> None:
        os.fdatasync(fd)
        spool.sync()

    try:
        with beats.paused():
            await trio.to_thread.run_sync(work)
    finally:
        os.close(fd)


async def beside(work: Callable[[], Awaitable[T]], other: Callable[[], Awaitable[None]]) -> T:
    """Run ``work`` and ``other`` at the same time. Returns the result of ``work``. Raises what either of them
    raises."""
    errors: list[Exception] = []

    async def do_other() -> None:
        try:
            await other()
        except Exception as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(do_other)
        try:
            result = await work()
        except Exception as error:
            errors.insert(0, error)
    if errors:
        raise errors[0]
    return result
