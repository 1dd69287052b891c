"""Somebody else has changed an object that a file is about to be stored over: both are kept. The trio loop only.

What is in storage then becomes the content of the artifact; what was written here becomes a file beside it, ``name
(conflict <date>)``. It is looked for before a put writes to the object; where an earlier try of the same put may have
written it, the object has to show that (claims.py).
"""

from __future__ import annotations

import errno
import os

from lamfs.errors import ObjectChanged, ObjectMissing, StorageError
from lamfs.hashing import hash_fd
from lamfs.keys import spool_name
from lamfs.model import ArtifactRecord, ContentHash, JournalEntry, Revision
from lamfs.registry import Conflict, Provenance, Registry
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ANYTHING, NOTHING, ObjectStat, ObjectStore, Over
from lamfs.transfer import claims
from lamfs.transfer.process import path_of
from lamfs.transfer.worker import Worker

PIECE = 64 << 20
"""Bytes of an object that are fetched at a time."""


async def look(worker: Worker, key: str) -> tuple[ObjectStat | None, Over]:
    """The object at ``key``, None if there is none, and what replaces it alone. A link is none: what is stored replaces
    it, and not what it leads to; behind a linked folder that is refused by itself. Raises other storage errors."""
    try:
        found = await worker.head(key)
    except StorageError as error:
        if isinstance(error, ObjectMissing):
            return None, NOTHING
        if error.errno == errno.ELOOP:
            return None, ANYTHING
        raise
    return found, Over(found.etag)


async def object_at(worker: Worker, key: str) -> ObjectStat | None:
    """The object at ``key``, as ``look`` sees it."""
    return (await look(worker, key))[0]


async def is_own(registry: Registry, worker: Worker, found: ObjectStat) -> bool:
    """Whether the object that was found is lamfs's own work, though no artifact's row says so (claims.py). Raises
    storage errors."""
    if not registry.journal.is_claimed(found.key):
        return False
    said = None if claims.is_private(found.key) else await worker.meta(found.key)
    return claims.is_said(registry, found, said)


class Conflicts:
    """Finds and settles conflicts of puts."""

    def __init__(
        self, registry: Registry, store: ObjectStore, worker: Worker, spool: SpoolFolder, origin: Provenance
    ) -> None:
        self._registry = registry
        self._store = store
        self._worker = worker
        self._spool = spool
        self._origin = origin

    async def find(
        self, entry: JournalEntry, artifact: ArtifactRecord | None, target: str
    ) -> tuple[ObjectStat | None, bool]:
        """What is at ``target`` if that is neither the artifact's revision nor lamfs's own; None: nothing to keep. And
        whether storage has said that it is the artifact's revision."""
        claimed = self._registry.journal.is_claimed(target)
        if claimed and claims.is_private(target):
            return None, False
        virtual = artifact.key_is_virtual if artifact is not None else bool(entry.payload.get("key_is_virtual", True))
        own = virtual or self._registry.artifacts.with_object(target) is not None
        if own and artifact is None:
            return None, False  # a name that lamfs has just made
        found = await object_at(self._worker, target)
        if found is None:
            return None, False
        if artifact is not None and artifact.revision == Revision(artifact.revision.content, target, found.etag):
            return None, True
        return (None if claimed and await self.is_own(found, entry) else found), False

    async def is_own(self, found: ObjectStat, entry: JournalEntry) -> bool:
        """As is_own below; also when the object has the bytes of the put ``entry``."""
        registry = self._registry
        if await is_own(registry, self._worker, found):
            return True
        if not registry.journal.is_claimed(found.key) or not claims.may_have_bytes(registry, found, entry):
            return False
        assert entry.ino is not None
        return claims.has_bytes(registry, await self._hash(found, entry.ino), entry)

    async def settle(self, entry: JournalEntry, found: ObjectStat) -> Conflict | None:
        """Make the object's bytes the artifact's content, and the put's file one beside it. One transaction.

        None when the put has come to its end meanwhile. Raises ObjectChanged when the object changes again, storage
        errors, OSError.
        """
        assert entry.ino is not None
        content = await self._hash(found, entry.ino)
        return self._registry.commits.conflict(entry.id, content, found.key, found.etag, self._origin)

    async def _hash(self, found: ObjectStat, ino: int) -> ContentHash:
        local = self._store.open_local(found.key)
        if local is not None:
            content = await hash_opened(self._worker, local)
            if (await self._worker.head(found.key)).etag != found.etag:
                name = self._store.url(found.key)
                raise ObjectChanged(f"The object {name} is being written by somebody else; it is tried again.")
            return content
        name = spool_name(ino)
        path = self._spool.draft_path(name)
        fd = self._spool.open_draft(name)
        try:
            os.ftruncate(fd, found.size)
            for offset in range(0, found.size, PIECE):
                length = min(PIECE, found.size - offset)
                await self._worker.fetch(
                    found.key, etag=found.etag, offset=offset, length=length, path=path, digest=None
                )
            return await self._worker.hash(path) if found.size else hash_fd(fd, 0)
        finally:
            os.close(fd)
            self._spool.drop_draft(name)


async def hash_opened(worker: Worker, fd: int) -> ContentHash:
    """Hash a file that is open here, and close it."""
    try:
        return await worker.hash(path_of(fd))
    finally:
        os.close(fd)
