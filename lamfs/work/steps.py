"""The steps of storage work: put and drop. In the daemon's trio loop, called only by the uploader.

The Mover moves bytes. Rows are read and removed through the Registry of the loop's thread. The order is always: object
first, registry row second, stale object last (docs/ARCHITECTURE.md). It survives a power cut: the log is synced before
storage is changed, and before a spool file is removed whose row is gone. Owns which objects are being written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from lamfs.errors import (
    InvalidArgument,
    InvalidName,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from lamfs.hashing import MD5_MAX, hash_fd
from lamfs.keys import check_spool_name, is_private
from lamfs.model import BLOCK_SIZE, ArtifactRecord, ContentHash, Revision, now_ns
from lamfs.processes import uptime
from lamfs.registry import Committed, Conflict, Lost, Provenance, Registry, is_based_on, missing_blocks
from lamfs.registry.entries import Drop, Owed, Put
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStat, ObjectStore, check_size
from lamfs.storage.local import etag_of
from lamfs.work import batches, claims, damage, multipart, patches, twins
from lamfs.work.batches import Batches
from lamfs.work.conflicts import Conflicts, object_at
from lamfs.work.guard import Guard, Permit, anybody
from lamfs.work.multipart import Multipart, Segment
from lamfs.work.reading import hash_opened
from lamfs.work.worker import Waits, Worker

log = logging.getLogger("lamfs.uploader")


class FileHooks(Protocol):
    """What the uploader needs of the open files. Implemented by the file system, called in the loop."""

    def has_writers(self, ino: int) -> bool:
        """Whether a handle may still write to the inode."""

    def freeze(self, ino: int, src: str) -> None:
        """The spool file ``src`` is being read for an upload: it must not be written from now on."""

    def thaw(self, ino: int, src: str) -> None:
        """The upload of ``src`` has ended without becoming the current content."""

    def stored(
        self, ino: int, src: str, revision: Revision | None, consumed: bool, missing: Collection[int] = ()
    ) -> None:
        """Spool file ``src`` was stored as ``revision``, and its put is done (None: the file is gone).

        ``missing``: the blocks that were never in it, if it is a partial spool.
        """

    def storing_many(self) -> AbstractContextManager[None]:
        """Context for several calls of ``stored`` without an await in between."""

    def rebased(self, ino: int, revision: Revision) -> None:
        """A partial spool was stored as ``revision``, while its file was written further in a copy of it."""

    def conflicted(self, ino: int, conflict: Conflict) -> None:
        """Somebody else has changed the object of an inode. What was written to the inode is another file now."""

    def damaged(self, ino: int, src: str, blocks: Collection[int]) -> None:
        """These blocks of the spool file ``src`` differ from what was written."""

    async def revive(self, ino: int, src: str) -> bool:
        """The spool file ``src`` has lost its name. If it is open here, make a file of that name with its bytes."""

    def lost(self, ino: int, lost: Lost) -> None:
        """What was last written to a file is lost."""

    async def fill(self, ino: int, src: str, base: Revision, blocks: Iterable[int]) -> None:
        """Copy these blocks of the stored revision ``base`` into the partial spool ``src``, which is frozen."""

    async def pin(self, object_key: str, *, but: int | None = None) -> None:
        """The object is about to be replaced or deleted: fetch what open handles still need of it.

        ``but``: the inode whose partial spool replaces it.
        """

    def gone(self, object_key: str) -> None:
        """The object was deleted, and no revision will have its key."""


@dataclass(slots=True)
class Upload:
    """One upload under way: its journal row, and its progress in bytes."""

    entry: Put
    size: int = 0
    done: int = 0
    missing: set[int] = field(default_factory=set)
    """Blocks that the spool file lacks, as a partial spool of the stored revision."""
    known: dict[int, ContentHash] = field(default_factory=dict)
    """Hashes of the parts that were sent while the file was written, by number."""

    def moved(self, count: int) -> None:
        """Storage has ``count`` more bytes than before (fewer, if it has lost some)."""
        self.done += count


class Steps:
    """Does one row of the journal at a time, any number of rows at once. Loop only."""

    def __init__(
        self,
        registry: Registry,
        store: ObjectStore,
        worker: Worker,
        waits: Waits,
        spool: SpoolFolder,
        origin: Provenance,
        parts: Multipart,
        busy: set[str],
        permit: Permit = anybody,
        *,
        hash_first: bool = False,
    ) -> None:
        self._registry = registry
        self._store = store
        self._permit = permit
        self._hash_first = hash_first
        self._worker = worker
        self._waits = waits
        self._multipart = parts
        self._spool = spool
        self._origin = origin
        self._busy_objects = busy
        self._conflicts = Conflicts(registry, store, worker, waits, origin)
        self.batches = Batches(
            registry, worker, spool, origin, busy=self._busy_objects, durable=lambda: waits.durable()
        )
        self.hooks: FileHooks | None = None

    async def put(self, entry: Put, upload: Upload) -> tuple[Committed, bool]:
        """Store the spool file of a put row. Returns the outcome, and whether the file was renamed into storage."""
        while (done := await self._put(entry, upload)) is None:
            pass
        return done

    async def _put(self, entry: Put, upload: Upload) -> tuple[Committed, bool] | None:
        """One try of ``put``. None if an obstacle is gone now: the caller can try again at once."""
        assert self.hooks is not None
        registry, ino, src = self._registry, entry.ino, entry.src
        if not self._spool.exists(entry.src):
            ended = await self._find_stored(entry)
            if ended is not None:
                return ended, True
        path = self._spool.path(entry.src)
        check_size(self._store, self._spool.stat(entry.src).st_size, what(registry, entry))
        base = self._base(entry)
        if base is not None:
            present = registry.partial_spools.present(entry.src)
            size = self._spool.stat(entry.src).st_size
            upload.missing = missing_blocks(present, base.size, size)
            changed = upload.missing & registry.partial_spools.ranges(entry.src).keys()
            needed = patches.needed(size, upload.missing - changed, base.content)
            await self._fill(entry, upload, base, needed | changed)
        artifact = registry.artifacts.by_ino(ino)
        upload.size = self._spool.stat(entry.src).st_size
        content: ContentHash | None = None
        if not self._is_hashed_as_sent(upload.size, base, artifact):
            content = await self._waits.unless_abandoned(
                ino, lambda: self._hash(src, base.content if base is not None else None, upload)
            )
            if content is None:
                raise StorageError("The file was deleted while it was hashed.")
            upload.size = content.size
            artifact = registry.artifacts.by_ino(ino)
        if content is not None:
            self._compare(entry, content)
        if content is not None and artifact is not None and content.same_bytes(artifact.revision.content):
            unneeded = await self._unneeded(entry, artifact.revision)
            if unneeded is not None:
                return unneeded, False
        target = registry.commits.put_target(entry)
        while target in self._busy_objects:
            await self._waits.pause(0.01)
            target = registry.commits.put_target(entry)
        self._busy_objects.add(target)
        try:
            artifact = registry.artifacts.by_ino(ino)  # as it is now: nobody else here works on the object
            replaces = artifact is not None and artifact.revision.object_key == target
            earlier = entry.object_key if entry.object_key != target else None
            if entry.doubted or (earlier and registry.artifacts.with_object(earlier) is not None):
                earlier = None  # it may be another machine's by now, or an artifact has it
            if earlier is not None:
                # An earlier try may have written elsewhere, before the file was renamed.
                registry.journal.add_delete(earlier, now=now_ns())
            if artifact is not None:
                await self._permit(True)
            looked = uptime()
            if is_private(target):
                found, is_there = None, False
            elif (replaces or earlier is not None) and not self._store.on_disk:
                # The old bytes will soon be nowhere else, so the new ones must be durable first. (A local folder syncs
                # them itself before it replaces the old ones.)
                found, is_there = await self._waits.beside(
                    lambda: self._conflicts.find(entry, artifact, target),
                    lambda: self._waits.sync_file(self._spool.open(src, os.O_RDONLY)),
                )
            else:
                found, is_there = await self._conflicts.find(entry, artifact, target)
            if found is not None:
                await self._keep_both(entry, upload, base, found)
                return None
            seen = looked if is_there else None
            guard = Guard(
                registry, self._store, self._worker, self._permit, entry, artifact, target, seen,
                self._conflicts.is_own, registry.journal.is_claimed(target),
            )  # fmt: skip
            if not registry.journal.claim_target(entry.id, target):
                raise StorageError("Another mount has newer bytes of the file.")
            if replaces:
                await self.hooks.pin(target, but=ino if base is not None else None)
            await self._waits.durable()
            try:
                with guard:
                    if content is None:
                        consumed = False
                        etag, content = await self._multipart.store_unhashed(
                            entry, upload.size, path, target, upload.known, upload.moved,
                            lambda found: self._compare_for_good(entry, found), guard.ready,
                        )  # fmt: skip
                    else:
                        etag, consumed = await self._send(content, path, target, upload, base, guard)
            except PreconditionFailed:
                if not is_private(target):
                    raise
                committed = await self._taken(entry, upload, base, target, content, ours=guard.was_claimed)
                return None if committed is None else (committed, False)
            taken = entry.src if consumed else None
            committed = registry.commits.put(
                ino, entry.gen, content, target, etag, self._origin, now=now_ns(), taken=taken, row=entry.id
            )
            if not consumed:
                await self._waits.durable()
        finally:
            self._busy_objects.discard(target)
        return committed, consumed

    async def _taken(
        self,
        entry: Put,
        upload: Upload,
        base: Revision | None,
        target: str,
        content: ContentHash | None,
        *,
        ours: bool,
    ) -> Committed | None:
        """An object exists already under a name that no revision has had.

        If it has the put's bytes, the put stored it, and only the answer was lost. With other bytes it was made by an
        earlier try (``ours``), and is deleted; or by another machine, and is kept. None: the put can be tried again,
        with another name.

        Raises ObjectChanged if it cannot, storage errors.
        """
        found = await object_at(self._worker, target)
        if found is None:
            raise ObjectChanged(f"The object {self._store.url(target)} was there, and is gone; it is tried again.")
        there = await self._conflicts.hash(found)
        if content is None:
            content = await self._hash(entry.src, None, upload)
        if there.same_bytes(content):
            return self._registry.commits.put(
                entry.ino, entry.gen, content, target, found.etag, self._origin, now=now_ns(), row=entry.id
            )
        if not ours:
            await self._keep_both(entry, upload, base, found)
            return None
        self._registry.commits.give_up_target(entry.id, target, found.etag, now=now_ns())
        entry.object_key = None
        return None

    def _compare(self, entry: Put, content: ContentHash) -> None:
        """Check that a spool file has the bytes with which it was closed. Raises StorageError."""
        blocks = damage.compare(self._registry, entry, content)
        if blocks is None:
            return
        assert self.hooks is not None
        self.hooks.damaged(entry.ino, entry.src, blocks)
        if blocks:
            raise damage.error(what(self._registry, entry), self._spool.shown(entry.src), blocks)

    async def _compare_for_good(self, entry: Put, content: ContentHash) -> None:
        """As _compare; then what is known of the file survives a power cut."""
        self._compare(entry, content)
        await self._waits.durable()

    async def _keep_both(self, entry: Put, upload: Upload, base: Revision | None, found: ObjectStat) -> None:
        """Somebody else has changed the object: give the file's bytes a name beside it, and raise ObjectChanged.
        Returns if the object is only damaged: the damaged bytes are out of the way then."""
        assert self.hooks is not None
        name = what(self._registry, entry)
        if base is not None:
            await self.hooks.pin(base.object_key)
            await self._fill(entry, upload, base, set(upload.missing))
            self._registry.journal.set_base(entry.ino, None)
            entry.base = None
        conflict = await self._conflicts.settle(entry, found)
        if conflict is None:
            raise ObjectChanged(f"'{name}' was deleted or written while it was stored.")
        if isinstance(conflict, str):
            return
        self.hooks.conflicted(entry.ino, conflict)
        place = self._registry.tree.path(conflict.ino) or conflict.name
        raise ObjectChanged(
            f"Somebody else has changed the object {self._store.url(found.key)}: that is '{name}' now, and what was"
            f" written here is kept as '{place}'."
        )

    def _is_hashed_as_sent(self, size: int, base: Revision | None, artifact: ArtifactRecord | None) -> bool:
        """Whether a file is so large that it is read only once, to be hashed and sent part by part.

        A file that may have the bytes of an artifact is hashed first: then it may not have to be sent.
        """
        if self._hash_first or self._store.parts is None or base is not None:
            return False
        if size <= multipart.MULTIPART_ABOVE or size <= MD5_MAX:
            return False
        return (artifact is None or artifact.size != size) and not self._registry.artifacts.has_large(size)

    def size_of(self, entry: Put) -> int:
        """Bytes of a put's spool file. If it is missing: more than a small file has, so that the put looks at it
        closely."""
        try:
            return self._spool.stat(check_spool_name(entry.src)).st_size
        except (OSError, InvalidName, StorageError):
            return batches.SMALL + 1

    def _base(self, entry: Put) -> Revision | None:
        """The stored revision on which a partial spool is based. Raises StorageError if it is gone."""
        if entry.base is None:
            return None
        artifact = self._registry.artifacts.by_ino(entry.ino)
        if artifact is None or not is_based_on(entry, artifact.revision.content):
            raise StorageError(
                f"The revision of '{what(self._registry, entry)}' that was changed is not there any more, so what was"
                f" written cannot be stored; it is in the spool file {entry.src}."
            )
        return artifact.revision

    async def _fill(self, entry: Put, upload: Upload, base: Revision, blocks: set[int]) -> None:
        assert self.hooks is not None
        if not blocks:
            return
        try:
            await self.hooks.fill(entry.ino, entry.src, base, blocks)
        except (ObjectChanged, ObjectMissing):
            # After a crash between storing an earlier partial spool and committing it, the object is newer than the
            # base. It still has the blocks that this one lacks, as each block's hash proves. Once they are here,
            # nothing else is needed from the base.
            blocks = set(upload.missing)
            found = await self._worker.head(base.object_key)
            newer = Revision(base.content, base.object_key, found.etag)
            await self.hooks.fill(entry.ino, entry.src, newer, blocks)
        upload.missing -= blocks

    async def _hash(self, src: str, base: ContentHash | None, upload: Upload) -> ContentHash:
        """Hash a spool file. A small one is hashed here, which takes less time than to ask the moving process.

        The missing blocks have the hashes of ``base``, and LaminDB's hash may be that of ``base`` too.
        """
        size, path = self._spool.stat(src).st_size, self._spool.path(src)
        if size <= batches.SMALL:
            try:
                with self._spool.opened(src, os.O_RDONLY) as fd:
                    return hash_fd(fd, os.fstat(fd).st_size)
            except EOFError as error:
                raise StorageError("The file became shorter while it was hashed; it is tried again.") from error
        bulk = size > multipart.MULTIPART_ABOVE
        if base is None:
            return await self._worker.hash(path, bulk=bulk)
        known = {block: base.block(block) for block in upload.missing}
        head, ends = patches.known(size, upload.missing, base)
        return await self._worker.hash(path, bulk=bulk, known=known, head=head, ends=ends)

    async def _unneeded(self, entry: Put, revision: Revision) -> Committed | None:
        """The artifact has these bytes already: remove the row, if storage has them too.

        A put that was superseded, or that died before it was committed, may have put other bytes into the object.
        """
        key = revision.object_key
        while key in self._busy_objects:
            await self._waits.pause(0.01)
        self._busy_objects.add(key)
        try:
            stat = await self._worker.head(key)
            now = self._registry.artifacts.by_ino(entry.ino)
            if stat.etag != revision.etag or now is None or now.revision != revision:
                return None
            return self._registry.commits.put_unneeded(entry.ino, entry.gen, now=now_ns(), row=entry.id)
        except ObjectMissing:
            return None
        finally:
            self._busy_objects.discard(key)

    async def _send(
        self, content: ContentHash, path: str, target: str, upload: Upload, base: Revision | None, guard: Guard
    ) -> tuple[str, bool]:
        """Bring the bytes to ``target``: renamed into a local folder, copied if storage has them, else uploaded."""
        assert self.hooks is not None
        entry = upload.entry
        meta = self._registry.commits.put_meta(entry, content)
        if self._store.imports_files:
            consume = not self.hooks.has_writers(entry.ino)
            over = await guard.ready()
            stat = await self._worker.put(path, target, consume=consume, progress=upload.moved, meta=meta, over=over)
            # A file that cannot be renamed is copied: after a crash it may have another name too.
            return stat.etag, consume and not self._spool.exists(check_spool_name(entry.src))
        copied = await twins.copy_twin(self._registry, self._worker, content, target, meta, guard.look)
        if copied is not None:
            return copied, False

        if base is not None:
            segments = await self._patched(content, upload, base)
            if any(segment.source for segment in segments):
                try:
                    etag = await self._multipart.store(
                        entry, content, path, target, segments, upload.moved, guard.ready
                    )
                    return etag, False
                except (StorageUnavailable, PreconditionFailed):
                    raise
                except (StorageError, InvalidArgument) as error:  # also more ranges than an upload may have parts
                    log.info("ranges cannot be copied in storage, so all of '%s' is sent: %s", target, error)
            await self._fill(entry, upload, base, set(upload.missing))
        if content.size > multipart.MULTIPART_ABOVE:
            segments = [Segment(0, content.size)]
            return await self._multipart.store(entry, content, path, target, segments, upload.moved, guard.ready), False
        over = await guard.ready()
        return (await self._worker.put(path, target, progress=upload.moved, meta=meta, over=over)).etag, False

    async def _patched(self, content: ContentHash, upload: Upload, base: Revision) -> list[Segment]:
        """The parts of a partial spool: what is sent, fetched first if need be, and what is copied from its base."""
        found = []
        for sent, offset, length in patches.segments(content, base.content):
            if sent:
                blocks = set(range(offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)))
                await self._fill(upload.entry, upload, base, blocks & upload.missing)
            found.append(Segment(offset, length, None if sent else (base.object_key, base.etag)))
        return found

    async def _find_stored(self, entry: Put) -> Committed | None:
        """The spool file is gone: it was renamed into storage before a crash, or something removed it.

        If it is open here, the open handle still has its bytes, and the file is made again (None). Else the file gets
        its last stored content.
        """
        key, local = entry.object_key, None
        with suppress(ObjectMissing):
            local = self._store.open_local(key) if key is not None else None
        if key is None or local is None:
            if self._registry.artifacts.by_ino(entry.ino) is None and self._registry.tree.get(entry.ino) is None:
                return self._registry.commits.put_unneeded(entry.ino, entry.gen, now=now_ns())
            return await self._miss(entry)
        etag = etag_of(os.fstat(local))
        artifact = self._registry.artifacts.by_ino(entry.ino)
        if artifact is not None and (artifact.revision.object_key, artifact.revision.etag) == (key, etag):
            os.close(local)
            return await self._miss(entry)  # the artifact had this before
        content = await hash_opened(self._worker, local)
        said = None if is_private(key) else await self._worker.meta(key)
        if not claims.is_put(self._registry, key, said, content, entry):
            return await self._miss(entry)  # somebody else has stored something there
        return self._registry.commits.put(
            entry.ino, entry.gen, content, key, etag, self._origin, now=now_ns(), taken=entry.src
        )

    async def _miss(self, entry: Put) -> Committed | None:
        """The spool file cannot be found: see _find_stored."""
        assert self.hooks is not None
        if await self.hooks.revive(entry.ino, entry.src):
            log.warning(
                "The spool file %s of '%s' was missing, and was made again of what is open.", entry.src,
                what(self._registry, entry),
            )  # fmt: skip
            return None
        lost = self._registry.rescue.give_up(entry.id, now=now_ns())
        if lost is not None:
            log.error("%s (%s)", lost.sentence, entry.src)
            self.hooks.lost(entry.ino, lost)
        return Committed(None, current=True)

    async def drop(self, entry: Drop) -> None:
        """Remove a spool file of this process that another process has made superfluous. Open handles keep it."""
        with suppress(InvalidName):
            self._spool.unlink(check_spool_name(entry.src))
        self._registry.journal.done(entry.id)


def what(registry: Registry, entry: Owed) -> str:
    """The name of a journal row for people: the key of its file, if it has one."""
    key = registry.tree.path(entry.ino) if isinstance(entry, Put) else None
    return entry.about if key is None else key
