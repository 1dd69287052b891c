"""Saves: a user's own file becomes the content of an artifact, new or not. Steps that do no I/O themselves (worker.py).

The order is as in steps.py: object first, registry row second, stale object last. The row that announces a save
contains the whole new artifact. So after the process has died, another one can finish or undo the save (``finish``).

A save finds objects of others at its target just as a put does (conflicts.py). But the artifact still gets the bytes of
the save, and what was there becomes a file of ``lost+found``.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import replace

from lamfs.errors import (
    AlreadyExists,
    InvalidName,
    LamfsError,
    NotFound,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageUnavailable,
)
from lamfs.keys import is_private, object_key_for
from lamfs.model import ArtifactRecord, ContentHash, Revision, now_ns
from lamfs.processes import uptime
from lamfs.registry import Provenance, Registry
from lamfs.registry.entries import Save
from lamfs.storage.base import ObjectStat, ObjectStore, check_size
from lamfs.work import twins, unknown
from lamfs.work.conflicts import Conflicts, object_at
from lamfs.work.guard import Guard, Permit
from lamfs.work.multipart import Multipart
from lamfs.work.source import TRIES as READS
from lamfs.work.source import Source, being_written, check_file
from lamfs.work.worker import Progress, Waits, Worker

log = logging.getLogger("lamfs.saves")

TRIES = 8
"""Tries after which an object that somebody else keeps changing is an error."""


class Saves:
    """Does one save at a time, for any number of threads with a registry each.

    ``active``: journal rows of the saves that this process is working on; nobody else in it may finish them.
    ``announcing``: held from the announcement of a save until it is active.
    """

    def __init__(
        self,
        registry: Registry,
        store: ObjectStore,
        worker: Worker,
        waits: Waits,
        permit: Permit,
        parts: Multipart,
        origin: Provenance,
        active: set[int],
        announcing: AbstractContextManager[object],
    ) -> None:
        self._registry = registry
        self._store = store
        self._worker = worker
        self._waits = waits
        self._permit = permit
        self._multipart = parts
        self._origin = origin
        self._conflicts = Conflicts(registry, store, worker, waits, origin)
        self._active = active
        self._announcing = announcing

    async def save(self, record: ArtifactRecord, source: Source, progress: Progress | None = None) -> ArtifactRecord:
        """Store the file, and make it the content of the artifact. Returns the new record.

        Raises AlreadyExists (the key was taken meanwhile), NotFound (the artifact was deleted for good),
        InvalidArgument (the file is gone or being written), PreconditionFailed (somebody else writes the object all the
        time), and storage errors. After an error the old revision is whole.
        """
        overtaken: PreconditionFailed | None = None
        written = 0
        for _ in range(TRIES):
            record.revision = Revision(await source.rehash(self._worker) or record.revision.content, "", "")
            check_size(self._store, record.size, str(source.path))
            self._refuse_taken(record)
            try:
                saved = await self._try(replace(record), source, progress, overtaken is not None)
            except PreconditionFailed as error:
                overtaken = error  # the next try looks at the new object, and keeps it
                continue
            if saved is not None:
                return saved
            written += 1
            if written == READS:
                break
        raise overtaken if overtaken is not None and written < READS else being_written(source.path)

    async def _try(
        self, record: ArtifactRecord, source: Source, progress: Progress | None, overtaken: bool
    ) -> ArtifactRecord | None:
        """One try of ``save``. None if the file was written while it was sent. ``overtaken``: the last try found
        somebody else's object."""
        registry, commits = self._registry, self._registry.commits
        if registry.artifacts.by_uid(record.uid) is not None:
            await self._permit(True)  # other machines may use the bytes that are replaced
        mode = source.mode
        looked_at, looked = await self._keep_both(record, overtaken)
        foreign = await self._foreign(record)
        with self._announcing:
            entry_id, object_key, before, was_claimed = commits.announce_save(
                record, now=now_ns(), foreign=foreign, mode=mode
            )
            self._active.add(entry_id)
        seen = None if before is None or before.revision != looked_at else looked
        guard = Guard(
            registry, self._store, self._worker, self._permit, None, before, object_key, seen, self._conflicts.is_own,
            was_claimed,
        )  # fmt: skip
        record.revision = Revision(record.revision.content, object_key, "")
        try:
            await self._waits.durable()
            etag = await self._send(record, source, guard, progress)
            if etag is not None:
                return commits.save(entry_id, record, etag, mode=mode, uid=os.getuid(), gid=os.getgid(), now=now_ns())
        except LamfsError as error:
            # Nothing of this save can be in storage then, only what somebody else has stored.
            refused = isinstance(error, PreconditionFailed) and not guard.was_claimed
            saved = await self._resolve(entry_id, refused=refused)
            if saved is not None:
                return saved  # the bytes are there: only the reply was lost
            if refused:
                registry.journal.said(object_key)
            if not source.temporary:
                check_file(source.path)  # raises a better error if the file is gone
            raise
        except BaseException:  # interrupted: leave no half of it
            await self._resolve(entry_id)
            raise
        finally:
            self._active.discard(entry_id)
        await self._resolve(entry_id)
        return None

    async def _send(
        self, record: ArtifactRecord, source: Source, guard: Guard, progress: Progress | None
    ) -> str | None:
        """Bring the bytes to the object: copied if storage has them, else sent. Returns its ETag. None: the file was
        written meanwhile, and the content of the object is not known."""
        target, meta = record.revision.object_key, self._registry.commits.save_meta(record)
        copied = await twins.copy_twin(
            self._registry, self._worker, record.revision.content, target, meta, guard.look
        )  # fmt: skip
        if copied is not None:
            return copied
        over = await guard.ready()
        stat = await self._worker.put(
            str(source.path), target, consume=source.temporary, progress=progress, meta=meta, over=over
        )
        return None if source.changed() else stat.etag

    async def _keep_both(self, record: ArtifactRecord, overtaken: bool) -> tuple[Revision | None, float | None]:
        """Keep what somebody else has stored in the artifact's object, or at the save's target, as a file of
        ``lost+found``. Below ``.lamindb/`` there is nothing to keep, unless the save was ``overtaken`` there.

        Returns the artifact's revision, and when (uptime) storage confirmed that it is at the save's target. Raises
        ObjectChanged if the object cannot be kept now, and storage errors.
        """
        registry = self._registry
        for _ in range(TRIES):
            before, target = registry.artifacts.by_uid(record.uid), registry.commits.save_target(record)
            at = None if before is None else before.revision.object_key
            found, looked, is_there = None, uptime(), False
            for key in dict.fromkeys(key for key in (at, target) if key is not None):
                if is_private(key) and not overtaken:
                    continue
                found, is_there = await self._conflicts.find(None, before, key)
                if found is not None:
                    break
            if found is None:
                return None if before is None else before.revision, looked if is_there else None
            await self._keep(found, before)
        raise StorageUnavailable(f"The object {self._store.url(target)} changes all the time; try again.")

    async def _keep(self, found: ObjectStat, artifact: ArtifactRecord | None) -> None:
        """Make the object ``found`` a file of ``lost+found``. Does nothing if that is not needed any more."""
        registry, url = self._registry, self._store.url(found.key)
        try:
            meta = await self._worker.meta(found.key)
            content = await self._conflicts.hash(found)
        except ObjectMissing:
            return
        instead = artifact if artifact is not None and artifact.revision.object_key == found.key else None
        place = unknown.keep(registry, self._origin.user_id, found, meta, content, instead)
        if place is not None:
            name = "nobody's" if instead is None else f"not what was saved of '{instead.place}'"
            log.warning("The object %s was %s; it is '%s' now.", url, name, place)
            return
        now = None if instead is None else registry.artifacts.by_uid(instead.uid)
        if now is not None and instead is not None and now.revision == instead.revision:
            raise ObjectChanged(f"Somebody else has changed the object {url}, or is writing its file; try again later.")

    async def _foreign(self, record: ArtifactRecord) -> str | None:
        """ETag of lamfs's own object at the artifact's real key, if no artifact has it. Objects of others were kept."""
        home, registry = object_key_for(record.uid, record.suffix, record.key, record.key_is_virtual), self._registry
        if is_private(home) or registry.artifacts.with_object(home) is not None:
            return None
        if not registry.journal.is_claimed(home):
            return None
        found = await object_at(self._worker, home)
        return None if found is None else found.etag

    def _refuse_taken(self, record: ArtifactRecord) -> None:
        """Before any bytes are sent: refuse a key that another artifact has. Raises AlreadyExists."""
        if record.key is None or self._registry.artifacts.by_uid(record.uid) is not None:
            return
        if self._registry.tree.resolve(record.key) is not None:
            raise AlreadyExists(f"The key '{record.key}' was taken meanwhile; choose another, or save the file again.")

    # -- interrupted saves ----------------------------------------------------------------------------------------

    async def _resolve(self, entry_id: int, *, refused: bool = False) -> ArtifactRecord | None:
        """After a failed step: finish the save if its bytes are in storage, else undo it. None: undone, or still
        pending."""
        entry = self._registry.journal.get(entry_id)
        if not isinstance(entry, Save):
            return None
        try:
            return await self.finish(entry, refused=refused)
        except LamfsError as error:
            log.debug("save %d stays owed: %s", entry_id, error)
            return None

    async def finish(self, entry: Save, *, refused: bool = False) -> ArtifactRecord | None:
        """Finish an interrupted save if its bytes are in storage. Else undo it and return None. Raises storage errors.

        ``refused``: storage refused it because something else was there. That object stays.
        """
        registry = self._registry
        record = entry.record
        await self._permit(True)
        now = registry.artifacts.by_uid(record.uid)
        base = None if now is None else (now.revision.object_key, now.revision.etag)
        await self._multipart.abort_unknown(entry.object_key)
        etag = None
        if base == entry.base:  # it replaces only what it set out to replace: later changes win
            etag = await self._find_bytes(entry.object_key, record.revision.content)
        if etag is not None:
            try:
                return registry.commits.save(
                    entry.id, record, etag, mode=entry.mode, uid=os.getuid(), gid=os.getgid(), now=now_ns()
                )
            except (AlreadyExists, NotFound, InvalidName) as error:
                log.warning("the interrupted save of '%s' is undone: %s", record.key or record.uid, error)
        delete = not refused and await self._is_left_over(entry, entry.object_key)
        registry.commits.abandon_save(entry.id, entry.object_key, now=now_ns(), delete=delete)
        return None

    async def _is_left_over(self, entry: Save, object_key: str) -> bool:
        """Whether the object may come from a save that did not become an artifact. An object that was there before, and
        was no artifact's, does not, unless the save overwrote it."""
        if not is_private(object_key):
            # Other programs also store objects at such keys: only the metadata shows that this one is the artifact's.
            with suppress(ObjectMissing):
                said, found = await self._worker.meta(object_key), await self._worker.head(object_key)
                return said is not None and said.uid == entry.uid and found.etag != entry.foreign
            return False
        return True

    async def _find_bytes(self, object_key: str, content: ContentHash) -> str | None:
        """ETag of an object if it contains exactly these bytes; reads all of it. None: it does not."""
        for _ in range(TRIES):
            found = await object_at(self._worker, object_key)
            if found is None or found.size != content.size:
                return None
            with suppress(ObjectChanged, ObjectMissing):
                held = await self._conflicts.hash(found)
                return found.etag if held.same_bytes(content) else None
        raise StorageUnavailable(f"The object {self._store.url(object_key)} changes all the time; try again.")
