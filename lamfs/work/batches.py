"""Small new files are stored many at a time. In the daemon's trio loop.

One transaction announces their objects, and one sync makes that durable. One job of the mover sends them, one after the
other. One transaction records where they are. Files that are not new, or that need to ask storage first, are left to
Steps.put, one row at a time.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lamfs.errors import InvalidName, LamfsError, PreconditionFailed, StorageError
from lamfs.hashing import hash_fd
from lamfs.model import ContentHash, ObjectMeta, Revision
from lamfs.registry import Committed, Provenance, Registry
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder
from lamfs.work import damage
from lamfs.work.worker import Worker

SMALL = 64 << 10
"""Bytes up to which a file is hashed in the loop: a tenth of a millisecond."""
FILES = 16
"""Most files of one batch. They are sent one after the other, so each is under way as long as all of them."""


@dataclass(slots=True)
class _Small:
    """One file of a batch: its row, its spool file, its content, its object key, another object with its bytes, and the
    metadata of its object."""

    entry: Put
    path: str
    content: ContentHash
    target: str
    twin: Revision | None
    meta: ObjectMeta


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
        targets = {file.target for file in files}
        self._busy |= targets
        try:
            await self._durable()
            stored = await self._worker.put_many([(file.path, file.target, file.twin, file.meta) for file in files])
            with self._registry.db.transaction():
                for file, found in zip(files, stored, strict=True):
                    entry = file.entry
                    if isinstance(found, PreconditionFailed):
                        continue  # the object exists already: Steps.put finds out whose it is
                    if isinstance(found, LamfsError):
                        outcomes[entry.id] = found
                        continue
                    outcomes[entry.id] = self._registry.commits.put(
                        entry.ino, entry.gen, file.content, file.target, found.etag, self._origin, row=entry.id
                    )
            await self._durable()
        finally:
            self._busy -= targets
        return outcomes

    def _announce(self, entries: list[Put]) -> list[_Small]:
        """Choose the object of each file that may be stored in a batch. Record it, and the bytes that it gets."""
        files: list[_Small] = []
        targets: set[str] = set()
        with self._registry.db.transaction():
            for entry in entries:
                file = self._look_at(entry)
                if file is None or file.target in targets:
                    continue
                if not self._registry.journal.claim_target(entry.id, file.target):
                    continue
                files.append(file)
                targets.add(file.target)
        return files

    def _look_at(self, entry: Put) -> _Small | None:
        """The file of a row, if it is small and new; else None."""
        registry = self._registry
        if entry.base is not None or not entry.key_is_virtual:
            return None  # only storage knows whether somebody else has put something at a real key
        try:
            with self._spool.opened(entry.src, os.O_RDONLY) as fd:
                size = os.fstat(fd).st_size
                if size > SMALL or registry.artifacts.has_ino(entry.ino):
                    return None
                content = hash_fd(fd, size)
        except (InvalidName, StorageError, OSError, EOFError):
            return None
        target, meta = registry.commits.new_object(entry, content)
        if target in self._busy or entry.object_key not in (None, target):
            return None
        if not damage.seal(registry, entry, content):
            return None
        twins = registry.artifacts.same_content(content, 1)
        twin = twins[0].revision if twins else None
        return _Small(entry, self._spool.path(entry.src), content, target, twin, meta)
