"""How the steps of storage work wait in a mount: implements Waits (worker.py) in the daemon's trio loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import trio

from lamfs.errors import LamfsError
from lamfs.registry import Registry
from lamfs.spool import SpoolFolder
from lamfs.work.durable import LogSync, beside, sync_file

T = TypeVar("T")
U = TypeVar("U")


class LoopWaits:
    """Waits of one mount. Owns which inodes' work can be abandoned. Loop only."""

    def __init__(self, registry: Registry, spool: SpoolFolder) -> None:
        self._spool = spool
        self._abandonable: dict[int, trio.CancelScope] = {}
        self.durable = LogSync(registry.db)

    async def pause(self, seconds: float) -> None:
        """Waits.pause."""
        await trio.sleep(seconds)

    async def sync_file(self, fd: int) -> None:
        """Waits.sync_file."""
        await sync_file(self._spool, fd)

    async def beside(self, work: Callable[[], Awaitable[T]], other: Callable[[], Awaitable[None]]) -> T:
        """Waits.beside: at the same time."""
        return await beside(work, other)

    async def unless_abandoned(self, ino: int, work: Callable[[], Awaitable[T]]) -> T | None:
        """Waits.unless_abandoned."""
        with trio.CancelScope() as scope:
            self._abandonable[ino] = scope
            try:
                return await work()
            finally:
                if self._abandonable.get(ino) is scope:  # the file's next put may have begun
                    del self._abandonable[ino]
        return None

    def abandon(self, ino: int) -> None:
        """The inode is gone: cancel the work that only it needs."""
        scope = self._abandonable.get(ino)
        if scope is not None:
            scope.cancel()

    def may_abandon(self, ino: int) -> bool:
        """Whether such work is under way for an inode."""
        return ino in self._abandonable

    async def each(
        self,
        items: Iterable[T],
        send: Callable[[T], Coroutine[Any, Any, U]],
        done: Callable[[T, U], None],
        at_once: int,
    ) -> None:
        """Waits.each: ``at_once`` tasks."""
        error: LamfsError | None = None
        todo = list(items)

        async def work(queue: Iterator[T]) -> None:
            nonlocal error
            for item in queue:
                try:
                    done(item, await send(item))
                except LamfsError as problem:
                    error = error or problem
                if error is not None:
                    return

        queue = iter(todo)
        async with trio.open_nursery() as nursery:
            for _ in range(min(at_once, len(todo))):
                nursery.start_soon(work, queue)
        if error is not None:
            raise error
