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
from lamfs.storage.base import ObjectStat, ObjectStore
from lamfs.transfer import claims
from lamfs.transfer.client import Mover
from lamfs.transfer.process import path_of

PIECE = 64 << 20
"""Bytes of an object that are fetched at a time."""


async def object_at(mover: Mover, key: str) -> ObjectStat | None:
    """The object at ``key``; None: there is none. A link is none: what is stored replaces it, and not what it leads to;
    behind a linked folder that is refused by itself. Raises other storage errors."""
    try:
        return await mover.head(key)
    except StorageError as error:
        if isinstance(error, ObjectMissing) or error.errno == errno.ELOOP:
            return None
        raise


class Conflicts:
    """Finds and settles conflicts of puts."""

    def __init__(
        self, registry: Registry, store: ObjectStore, mover: Mover, spool: SpoolFolder, origin: Provenance
    ) -> None:
        self._registry = registry
        self._store = store
        self._mover = mover
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
        found = await object_at(self._mover, target)
        if found is None:
            return None, False
        if artifact is not None and artifact.revision == Revision(artifact.revision.content, target, found.etag):
            return None, True
        return (None if claimed and await self.is_own(found, entry) else found), False

    async def is_own(self, found: ObjectStat, entry: JournalEntry | None = None) -> bool:
        """Whether the object that was found is lamfs's own work, though no artifact's row says so (claims.py).

        ``entry``: the put that may have stored it. Raises storage errors."""
        registry = self._registry
        if not registry.journal.is_claimed(found.key):
            return False
        said = None if claims.is_private(found.key) else await self._mover.meta(found.key)
        if claims.is_said(registry, found, said):
            return True
        if entry is None or entry.ino is None or not claims.may_have_bytes(registry, found, entry):
            return False
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
            content = await hash_opened(self._mover, local)
            if (await self._mover.head(found.key)).etag != found.etag:
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
                await self._mover.fetch(
                    found.key, etag=found.etag, offset=offset, length=length, path=path, digest=None
                )
            return await self._mover.hash(path) if found.size else hash_fd(fd, 0)
        finally:
            os.close(fd)
            self._spool.drop_draft(name)


async def hash_opened(mover: Mover, fd: int) -> ContentHash:
    """Hash a file that is open here, and close it."""
    try:
        return await mover.hash(path_of(fd))
    finally:
        os.close(fd)
