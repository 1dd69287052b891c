"""Small new files are stored many at a time. In the daemon's trio loop.

One transaction announces their objects, and one sync makes that durable. One job of the mover sends them, one after the
other. One transaction records where they are. Files that are not new, or that need to ask storage first, are left to
Steps.put, one row at a time.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from lamfs.errors import InvalidName, LamfsError, PreconditionFailed, StorageError
from lamfs.hashing import hash_fd
from lamfs.model import ContentHash, now_ns
from lamfs.registry import Committed, NewObject, Provenance, Registry, Stored
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder
from lamfs.work.worker import Worker

if TYPE_CHECKING:
    from lamfs.registry.verbs import CommitVerbs


SMALL = 64 << 10
"""Bytes up to which a file is hashed in the loop: a tenth of a millisecond."""
FILES = 16
"""Most files of one batch. They are sent one after the other, so each is under way as long as all of them."""


class Batches:
    """Stores batches of small new files. Loop only. ``busy``: the objects that anyone in this process is writing."""

    def __init__(
        self,
        registry: Registry,
        worker: Worker,
        spool: SpoolFolder,
        origin: Provenance,
        *,
        busy: set[str],
        durable: Callable[[], Awaitable[None]],
    ) -> None:
        self._registry = registry
        self._commits: CommitVerbs = registry.commits
        self._worker = worker
        self._spool = spool
        self._origin = origin
        self._busy = busy
        self._durable = durable

    async def put(self, entries: list[Put]) -> dict[int, Committed | LamfsError]:
        """Store the spool files of put rows. Returns the outcome of each, by the row's id.

        A row without an outcome has to be stored by itself: nothing was done for it. Raises RegistryError.
        """
        files = self._announce(entries)
        outcomes: dict[int, Committed | LamfsError] = {}
        if not files:
            return outcomes
        targets = {file.object_key for file in files}
        self._busy |= targets
        try:
            await self._durable()
            sent = await self._worker.put_many(
                [(self._spool.path(file.entry.src), file.object_key, file.twin, file.meta) for file in files]
            )
            stored: list[Stored] = []
            for file, found in zip(files, sent, strict=True):
                if isinstance(found, PreconditionFailed):
                    continue  # the object exists already: Steps.put finds out whose it is
                if isinstance(found, LamfsError):
                    outcomes[file.entry.id] = found
                else:
                    stored.append(Stored(file.entry, file.content, file.object_key, found.etag))
            outcomes |= self._commits.put_many(stored, self._origin, now=now_ns())
            await self._durable()
        finally:
            self._busy -= targets
        return outcomes

    def _announce(self, entries: list[Put]) -> list[NewObject]:
        """Choose the object of each file that may be stored in a batch. Record it, and the bytes that it gets."""
        small = [(entry, content) for entry in entries if (content := self._hash(entry)) is not None]
        return self._commits.announce_many(small, self._busy) if small else []

    def _hash(self, entry: Put) -> ContentHash | None:
        """The content of the file of a row, if it is small and new; else None."""
        if entry.base is not None or not entry.key_is_virtual:
            return None  # only storage knows whether somebody else has put something at a real key
        try:
            with self._spool.opened(entry.src, os.O_RDONLY) as fd:
                size = os.fstat(fd).st_size
                if size > SMALL or self._registry.artifacts.has_ino(entry.ino):
                    return None
                return hash_fd(fd, size)
        except (InvalidName, StorageError, OSError, EOFError):
            return None
