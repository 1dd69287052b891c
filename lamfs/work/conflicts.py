"""Conflicts: somebody else has changed an object that a file is about to replace. Both contents are kept.

Steps that do no I/O themselves (worker.py). Puts and saves (saves.py) find conflicts in the same way; ``settle`` is for
puts.

The content in storage becomes the content of the artifact. What was written here becomes a file beside it, ``name
(conflict <date>)``. A put looks for a conflict before it writes to the object. Where an earlier try of the same put may
have written the object, the object has to prove that (claims.py).

An object whose metadata names the very revision that the registry knows, but which has other bytes, is damaged. The put
goes on, and the damaged bytes become a file of ``lost+found``.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import replace

from lamfs.errors import ObjectMissing, StorageError
from lamfs.keys import is_private
from lamfs.model import ArtifactRecord, ContentHash, Revision, new_uid, now_ns
from lamfs.registry import Conflict, Provenance, Registry
from lamfs.registry.entries import Put
from lamfs.storage.base import ANYTHING, NOTHING, ObjectStat, ObjectStore, Over
from lamfs.work import claims, reading, unknown
from lamfs.work.worker import Waits, Worker

log = logging.getLogger("lamfs.conflicts")


async def look(worker: Worker, key: str) -> tuple[ObjectStat | None, Over]:
    """The object at ``key``, None if there is none, and the condition under which it may be replaced.

    A link counts as no object: the new object replaces the link, not its target. Writing behind a linked folder is
    refused elsewhere. Raises other storage errors.
    """
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
    """Whether the object that was found is lamfs's own, though no artifact's row names it (claims.py). Raises storage
    errors."""
    if not registry.journal.is_claimed(found.key):
        return False
    said = None if is_private(found.key) else await worker.meta(found.key)
    return claims.is_said(registry, found, said)


class Conflicts:
    """Finds conflicts, and resolves those of puts."""

    def __init__(
        self, registry: Registry, store: ObjectStore, worker: Worker, waits: Waits, origin: Provenance
    ) -> None:
        self._registry = registry
        self._store = store
        self._worker = worker
        self._waits = waits
        self._origin = origin

    async def find(
        self, entry: Put | None, artifact: ArtifactRecord | None, target: str
    ) -> tuple[ObjectStat | None, bool]:
        """The object at ``target``, if it is neither the artifact's revision nor lamfs's own; None: nothing to keep.
        The bool tells whether storage confirmed that it is the artifact's revision.

        ``artifact``: the one that is about to be written there, None for a new one. ``entry``: the put that writes it;
        None: a save. Raises storage errors.
        """
        found = await object_at(self._worker, target)
        if found is None:
            return None, False
        if artifact is not None and artifact.revision == Revision(artifact.revision.content, target, found.etag):
            return None, True
        return (None if await self.is_own(found, entry) else found), False

    async def is_own(self, found: ObjectStat, entry: Put | None) -> bool:
        """As is_own above; also true if the object has the bytes of the put ``entry``."""
        registry = self._registry
        if await is_own(registry, self._worker, found):
            return True
        if entry is None or not registry.journal.is_claimed(found.key):
            return False
        if not claims.may_have_bytes(registry, found, entry):
            return False
        return claims.has_bytes(registry, await self.hash(found), entry)

    async def settle(self, entry: Put, found: ObjectStat) -> Conflict | str | None:
        """Make the object's bytes the artifact's content, and the put's file a file beside it. One transaction.

        If the bytes are a damaged revision, they become a file of ``lost+found`` instead, and its key is returned: the
        put can go on, to another object. None if the put has ended meanwhile. Raises ObjectChanged if the object
        changes again, storage errors, OSError.
        """
        content = await self.hash(found)
        artifact = self._registry.artifacts.by_ino(entry.ino)
        if artifact is not None and artifact.revision.object_key == found.key:
            said = None if content.same_bytes(artifact.revision.content) else await self._worker.meta(found.key)
            if said is not None and said.is_revision_of(artifact.meta):
                return self._keep_damage(entry, artifact, found, content)
        return self._registry.commits.conflict(
            entry.id, content, found.key, found.etag, self._origin, now=now_ns(), copy_uid=new_uid()
        )

    def _keep_damage(self, entry: Put, artifact: ArtifactRecord, found: ObjectStat, content: ContentHash) -> str | None:
        """Keep an object whose metadata names the artifact's revision, but whose bytes differ."""
        if entry.object_key == found.key:
            self._registry.journal.unclaim(entry.id, found.key)
            entry.object_key = None
        said = replace(artifact.meta, key=artifact.place)
        place = unknown.keep(self._registry, self._origin.user_id, found, said, content, artifact)
        if place is not None:
            log.warning(
                "The object %s of '%s' (uid %s) was damaged: its bytes were not those of revision %d. They are '%s'"
                " now; the new content of the file takes their place.",
                self._store.url(found.key), artifact.place, artifact.uid, artifact.number, place,
            )  # fmt: skip
        return place

    async def hash(self, found: ObjectStat) -> ContentHash:
        """The hash of an object. Raises like reading.hash_object."""
        return await reading.hash_object(self._worker, self._waits, self._store, found)
