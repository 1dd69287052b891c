"""Somebody else has changed an object that a file is about to be stored over: both are kept. The trio loop only.

What is in storage then becomes the content of the artifact; what was written here becomes a file beside it, ``name
(conflict <date>)``. It is looked for before a put writes to the object; where an earlier try of the same put may have
written it, the object has to show that (claims.py).

An object that says it is the very revision that the registry knows, and has other bytes, is nobody's revision but
damage: the put goes on, and the damaged bytes become a file of ``lost+found``.
"""

from __future__ import annotations

import errno
import logging
import os

from lamfs.errors import ObjectChanged, ObjectMissing, StorageError
from lamfs.hashing import hash_fd
from lamfs.keys import is_private, name_with, root_path, spool_name
from lamfs.model import AUTO_KEY_PREFIX, ArtifactRecord, ContentHash, JournalEntry, Revision, iso, new_uid, now_ns
from lamfs.mover.process import path_of
from lamfs.registry import Conflict, Provenance, Registry
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ANYTHING, NOTHING, ObjectStat, ObjectStore, Over
from lamfs.work import claims
from lamfs.work.worker import Worker

log = logging.getLogger("lamfs.conflicts")

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
    said = None if is_private(found.key) else await worker.meta(found.key)
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
        """What is at the real key ``target`` if that is neither the artifact's revision nor lamfs's own; None: nothing
        to keep. And whether storage has said that it is the artifact's revision."""
        found = await object_at(self._worker, target)
        if found is None:
            return None, False
        if artifact is not None and artifact.revision == Revision(artifact.revision.content, target, found.etag):
            return None, True
        return (None if await self.is_own(found, entry) else found), False

    async def is_own(self, found: ObjectStat, entry: JournalEntry) -> bool:
        """As is_own below; also when the object has the bytes of the put ``entry``."""
        registry = self._registry
        if await is_own(registry, self._worker, found):
            return True
        if not registry.journal.is_claimed(found.key) or not claims.may_have_bytes(registry, found, entry):
            return False
        assert entry.ino is not None
        return claims.has_bytes(registry, await self.hash(found, entry.ino), entry)

    async def settle(self, entry: JournalEntry, found: ObjectStat) -> Conflict | str | None:
        """Make the object's bytes the artifact's content, and the put's file one beside it. One transaction.

        If they are damaged bytes of what was stored, they become a file of ``lost+found`` instead, whose key is
        returned: the put can go on, to another object. None when the put has come to its end meanwhile. Raises
        ObjectChanged when the object changes again, storage errors, OSError.
        """
        assert entry.ino is not None
        content = await self.hash(found, entry.ino)
        artifact = self._registry.artifacts.by_ino(entry.ino)
        if artifact is not None and await self._is_damage(artifact, found, content):
            return self._keep_damage(entry, artifact, found, content)
        return self._registry.commits.conflict(entry.id, content, found.key, found.etag, self._origin)

    async def _is_damage(self, artifact: ArtifactRecord, found: ObjectStat, content: ContentHash) -> bool:
        """Whether an object says that it is the artifact's revision, and has other bytes."""
        if artifact.revision.object_key != found.key or content.same_bytes(artifact.revision.content):
            return False
        said = await self._worker.meta(found.key)
        return said is not None and said.is_revision_of(artifact.meta)

    def _keep_damage(
        self, entry: JournalEntry, artifact: ArtifactRecord, found: ObjectStat, content: ContentHash
    ) -> str | None:
        if entry.object_key == found.key:
            self._registry.journal.unclaim(entry.id, found.key)
            entry.object_key = None
        name = name_with(root_path(artifact.place)[1], f"revision {artifact.number}")
        record = ArtifactRecord(
            uid=new_uid(), key=None, suffix="", revision=Revision(content, found.key, found.etag),
            created_by_id=self._origin.user_id, created_at=now_ns(), updated_at=now_ns(), number=artifact.number,
            description=f"was {artifact.place}, revision {artifact.number}, of the artifact {artifact.uid}, found"
            f" {iso(now_ns())[:10]}; its bytes are not those that were stored ({artifact.meta.hash})",
        )  # fmt: skip
        elsewhere = f"{AUTO_KEY_PREFIX}{artifact.uid}.{new_uid(6)}{artifact.suffix}"
        place = self._registry.rescue.keep_object(
            (name, name_with(name, artifact.uid)), record, mtime_ns=found.mtime_ns, instead=(artifact, elsewhere)
        )
        if place is not None:
            log.warning(
                "The object %s of '%s' (uid %s) was damaged: its bytes were not those of revision %d. They are '%s'"
                " now; the new content of the file takes their place.",
                self._store.url(found.key), artifact.place, artifact.uid, artifact.number, place,
            )  # fmt: skip
        return place

    async def hash(self, found: ObjectStat, ino: int) -> ContentHash:
        """The hashes of an object's bytes, all of which are read. ``ino`` names the file into which they are fetched.

        Raises ObjectChanged, storage errors, OSError.
        """
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
