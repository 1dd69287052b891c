"""Spool files of open files: copy on write, acknowledging, and what follows an upload.

Loop only. Implements the uploader's FileHooks. A spool file is never written while an upload reads it: it is frozen,
and the next write goes to a copy (a reflink if the disk supports that).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import TypeVar

import trio

from lamfs.cache.blocks import BlockFile
from lamfs.errors import FsError, LamfsError, ObjectChanged, ObjectMissing, StorageError, TransferDied
from lamfs.fs.backpressure import BackPressure
from lamfs.fs.context import Context
from lamfs.fs.partial import PartialSpools
from lamfs.fs.state import SPOOLED, Event, FileState, Spool
from lamfs.keys import spool_name
from lamfs.model import BLOCK_SIZE, Revision, new_uid, now_ns
from lamfs.prefetch.patterns import Reader
from lamfs.registry import Conflict, Lost
from lamfs.scratch import PROBE_SECONDS
from lamfs.work.uploader import SETTLE

log = logging.getLogger("lamfs.fs")

RELOOKS = 400
RELOOK_PAUSE = 0.05
"""Seconds between two looks at a revision that is being replaced."""
T = TypeVar("T")


class Spooling:
    """Makes, freezes and gives up the spool files of one mount's open files."""

    def __init__(self, context: Context) -> None:
        self._c = context
        policy = context.policy
        self.back_pressure = BackPressure(
            context.spool,
            context.registry.path,
            context.uploader,
            limit=policy.spool_limit,
            floor=policy.spool_free,
            timeout=policy.timeout,
            waits=not context.store.imports_files,
            make_room=context.cache.make_room,
        )
        self.partials = PartialSpools(context, self.read_stored)

    # -- stored content -----------------------------------------------------------------------------------------

    async def read_stored(self, state: FileState, offset: int, size: int, reader: Reader | None = None) -> bytes:
        """Bytes of the stored revision. Raises FsError(ESTALE) if that revision no longer exists, else StorageError."""

        async def read(base: BlockFile | None) -> bytes:
            if base is None:
                return b""
            return await (base.read(offset, size) if reader is None else reader.read(base, offset, size))

        return await self._from_base(state, read)

    async def fill_stored(self, state: FileState) -> int:
        """Descriptor of a complete local file with the stored revision. It belongs to the cache."""

        async def fill(base: BlockFile | None) -> int:
            assert base is not None
            return await base.fill()

        return await self._from_base(state, fill)

    async def _from_base(self, state: FileState, what: Callable[[BlockFile | None], Awaitable[T]]) -> T:
        """Run ``what`` with ``state.base`` open. If the object is not the revision any more, look the artifact up
        again."""
        for _ in range(RELOOKS):
            before = state.revision
            try:
                self.open_stored(state)
                base = state.base
                if base is None:
                    return await what(None)
                base.ref()  # the file may go on with another revision meanwhile
                try:
                    return await what(base)
                finally:
                    base.close()
            except (ObjectChanged, ObjectMissing) as error:
                if state.revision is not before:
                    continue
                state.drop_base()
                record = self._c.registry.artifacts.by_ino(state.ino)
                if record is None or before is None or not _serves(state, before, record.revision):
                    raise FsError(errno.ESTALE) from error
                if record.revision == before:
                    if not self._c.registry.journal.holds(before.object_key):
                        self._c.stats.changed(self._c.store, record, gone=isinstance(error, ObjectMissing))
                        raise
                    # Somebody has stored new bytes there, and is about to commit that to the registry.
                    await trio.sleep(RELOOK_PAUSE)
                    continue
                # The same bytes are in another object now.
                state.revision = record.revision
        raise FsError(errno.ESTALE)

    def open_stored(self, state: FileState) -> None:
        """Open the stored revision, so that this file keeps it. Raises ObjectChanged or ObjectMissing."""
        if state.base is None and state.revision is not None:
            state.base = self._c.cache.open(state.revision)

    def keep_stored(self, state: FileState) -> None:
        """As open_stored, if that keeps the bytes whatever happens: in a local folder the descriptor does, and so does
        an open cache file."""
        if state.spool is None and (self._c.store.on_disk or self._c.cache.is_open(state.revision)):
            with contextlib.suppress(StorageError):
                self.open_stored(state)

    def verify_small(self, state: FileState, offset: int) -> bool:
        """Open the stored revision, and verify what is read at ``offset`` if that takes no time. Returns whether it
        did."""
        if state.base is None and state.spool is None:
            with contextlib.suppress(StorageError):  # the read will report it
                self.open_stored(state)
        return state.base is not None and state.base.verify_small(offset // BLOCK_SIZE)

    # -- writing ------------------------------------------------------------------------------------------------

    async def prepare_write(
        self, state: FileState, keep: int | None = None, write: tuple[int, int] | None = None
    ) -> Spool:
        """Make sure that the file has a spool that may be written at ``write`` (offset and length in bytes), or cut or
        extended to ``keep`` bytes. Content beyond ``keep`` bytes is not needed then.

        Raises StorageError if the present content cannot be fetched, OSError if the spool's disk is full.
        """
        async with state.lock:
            while True:
                if state.is_stale():
                    raise FsError(errno.ESTALE, "the file was replaced by somebody else while it was open")
                spool = state.spool
                if spool is not None and spool.damaged:
                    if keep != 0:
                        raise FsError(errno.EIO, f"the spool file {spool.name} is not what was written")
                    spool.damaged = set()  # none of it is needed
                if spool is None:
                    await self._make_spool(state, keep)
                elif state.phase is SPOOLED:
                    if spool.inherited:
                        # No base has these blocks until the revision that is being stored has become the base.
                        await self.partials.bring_in(state, sorted(spool.ranges))
                        spool.inherited = bool(spool.ranges)
                    elif self.partials.is_sound(state):
                        self._begin_put(state, spool.name)
                    else:
                        await self.partials.complete(state)
                elif not state.writable_now:
                    await self._copy_spool(state, keep)
                elif lacking := (
                    self.partials.lacks(state, *write) if write is not None else self.partials.edges(state, keep or 0)
                ):
                    await self.partials.bring_in(state, lacking)
                else:
                    return spool

    def _is_nobodys(self, ino: int, name: str) -> bool:
        """Whether a spool file of this mount is neither needed by a put (perhaps another file's, after a conflict) nor
        read by the uploader, which removes it afterwards."""
        journal, owed = self._c.registry.journal, self._c.registry.journal.put_of(ino)
        mine = owed is not None and owed.src == name
        return not (mine or self._c.uploader.is_uploading(ino, name) or journal.owes_file(name))

    def _begin_put(self, state: FileState, src: str) -> None:
        """Journal that a spool file is about to be written. Raises FsError(ESTALE) if the file has another revision by
        now than the open one, or another mount is writing it."""
        base, blocks, ranges = self.partials.known_of(state)
        try:
            while True:
                begun = self._c.verbs.writes.begin_put(
                    state.ino,
                    src,
                    now=now_ns(),
                    artifact_uid=new_uid(),
                    key_is_virtual=not self._c.policy.real_keys,
                    seen=state.seen,
                    mine=state.owed,
                    base=base,
                    blocks=blocks,
                    ranges=ranges,
                )
                if not begun.is_spent:
                    break
                old, src = src, spool_name(state.ino)
                self._rename_spool(state, src)
        except FileNotFoundError:
            self._c.renew(state.ino)
            raise FsError(errno.ESTALE, f"the spool file {old} is gone") from None
        except FsError:
            self._c.renew(state.ino)
            raise
        if begun.is_gone:
            state.become(Event.UNLINK)  # somebody else has deleted it for good: as on a local disk
            return
        state.become(Event.JOURNAL)
        state.owed = src
        # If an upload reads the earlier spool file, it removes it afterwards. Otherwise nobody else would.
        if begun.replaced is not None and not self._c.uploader.is_uploading(state.ino, begun.replaced):
            self._c.spool.unlink(begun.replaced)

    def _rename_spool(self, state: FileState, name: str) -> None:
        """The spool file of an open file was stored, and is to be written again. It gets another name, because the old
        one is recorded as not needed. Raises FileNotFoundError if it is gone because of another mount's bytes.
        """
        assert state.spool is not None
        self._c.spool.rename(state.spool.name, name)
        state.spool.name = name

    def new_spool(self, ino: int, name: str | None = None) -> Spool:
        """An empty spool file. Raises OSError(ENOSPC)."""
        self.back_pressure.check()
        name = name or spool_name(ino)
        return Spool(self._c.spool.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL), name)

    async def _make_spool(self, state: FileState, keep: int | None) -> None:
        size = state.revision.size if state.revision is not None else 0
        want = size if keep is None else min(keep, size)
        if want <= BLOCK_SIZE:
            data = await self.read_stored(state, 0, want) if want else b""
            spool = self._filled_spool(state, data)
        elif self.partials.can_start(state, want):
            assert state.revision is not None
            spool = self.new_spool(state.ino, self._new_name(state))
            self.partials.start(spool, state.revision)
        else:
            spool = await self._clone(state, f"/proc/{os.getpid()}/fd/{await self.fill_stored(state)}")
        self._go_on_in(state, spool)

    def _go_on_in(self, state: FileState, spool: Spool) -> None:
        """Let an open file go on in a spool file that was made for it, if it still needs one. In the meantime an upload
        may have ended and left the old one usable, or somebody else may have replaced the file."""
        if state.is_stale() or state.phase is SPOOLED or state.writable_now:
            spool.close()
            self._c.spool.unlink(spool.name)
            return
        old = state.spool
        if old is not None:
            state.drop_spool()
            if old.own and self._is_nobodys(state.ino, old.name):
                self._c.spool.unlink(old.name)
        state.spool = spool
        state.become(Event.MAKE)
        if not spool.missing:
            state.drop_base()

    def _new_name(self, state: FileState) -> str:
        """The name of a new spool file. What is written to a deleted file is not needed after a crash."""
        name = spool_name(state.ino)
        if state.is_deleted():
            self._c.registry.journal.spend(name)
        return name

    def _filled_spool(self, state: FileState, data: bytes, size: int | None = None) -> Spool:
        """A spool file of ``size`` bytes (None: only of ``data``) that begins with ``data``. Raises OSError."""
        self.back_pressure.check()
        name = self._new_name(state)
        spool = Spool(self._c.spool.open_draft(name), name)
        try:
            if data:
                spool.write(0, data)
            if size is not None and size > len(data):
                os.ftruncate(spool.fd, size)
            self._c.spool.finish_draft(name)
        except OSError:
            spool.close()
            self._c.spool.drop_draft(name)
            raise
        return spool

    async def _copy_spool(self, state: FileState, keep: int | None) -> None:
        """The spool is frozen: go on in a copy of it."""
        old = state.spool
        assert old is not None
        size = state.inode.size
        want = size if keep is None else min(keep, size)
        # taken before the copy: blocks that are fetched meanwhile may not be in the copy
        missing, ranges = set(old.missing), dict(old.ranges)
        if not want or (want <= BLOCK_SIZE and not missing):
            data = os.pread(old.fd, want, 0) if want else b""
            spool = self._filled_spool(state, data, want)
        else:
            # The upload may end meanwhile and close the old spool: hold the file by our own descriptor.
            held = os.dup(old.fd)
            try:
                spool = await self._clone(state, f"/proc/{os.getpid()}/fd/{held}")
            finally:
                os.close(held)
            spool.missing, spool.ranges, spool.inherited = missing, ranges, bool(ranges)
        self._go_on_in(state, spool)

    async def _clone(self, state: FileState, source: str) -> Spool:
        for last in (False, False, True):
            name = self._new_name(state)
            try:
                await self._c.mover.clone(source, self._c.spool.draft_path(name))
                self._c.spool.finish_draft(name)
                return Spool(self._c.spool.open(name, os.O_RDWR), name)
            except BaseException as error:
                self._c.spool.drop_draft(name)
                if last or not isinstance(error, TransferDied):
                    raise
        raise AssertionError

    def is_gone(self, state: FileState) -> bool:
        """Whether somebody else has deleted a file that is open here: then its written bytes are not needed."""
        inode = self._c.registry.tree.get(state.ino)
        return inode is None or inode.nlink == 0

    def acknowledge(self, state: FileState) -> bool:
        """Journal that the bytes written so far have to be stored. One transaction. False, with nothing changed, if
        this mount does not have to store them any more."""
        src = state.spool.name if state.spool is not None and not state.is_stale() else None
        if src is None:
            return False
        probe_settle = PROBE_SECONDS if state.revision is None else None
        gen = self._c.owe(state, src=src, settle=SETTLE, probe_settle=probe_settle)
        if not gen:
            return False
        state.gen = gen
        self._c.nodes.revised(state.fino)
        state.unsaved.clear()
        state.dirty = False
        state.become(Event.ACKNOWLEDGE)
        if state.spool is not None and state.spool.ranges:
            self._c.uploader.range_sync.ask(state.spool.name)
        self._c.uploader.notify(state.ino)
        return True

    # -- the uploader's hooks -----------------------------------------------------------------------------------

    def has_writers(self, ino: int) -> bool:
        """Whether a handle may still write to the inode."""
        state = self._c.state_of(ino)
        return state is not None and state.writers > 0

    def freeze(self, ino: int, src: str) -> None:
        """An upload reads ``src`` from now on."""
        state = self._showing(ino, src)
        if state is not None and state.spool is not None:
            state.spool.own = True  # was another mount's, which is dead: this mount has taken over its work
            state.become(Event.FREEZE)

    def thaw(self, ino: int, src: str) -> None:
        """The upload of ``src`` did not become the current content: it may be written again."""
        state = self._showing(ino, src)
        # A file that was renamed into a local storage is an object now, although the commit has failed.
        if state is not None and not state.is_deleted() and self._c.spool.exists(src):
            state.become(Event.THAW)

    def _showing(self, ino: int, src: str) -> FileState | None:
        """The open file whose content is in spool file ``src``, unless somebody else has replaced it."""
        state = self._c.state_of(ino)
        if state is None or state.spool is None or state.spool.name != src or state.is_stale():
            return None
        return state

    def rebased(self, ino: int, revision: Revision) -> None:
        """A partial spool was stored while its file went on in a copy: the new revision has what the copy lacks."""
        state = self._c.state_of(ino)
        if state is not None and state.spool is not None and state.spool.missing:
            state.revision = revision
            state.drop_base()

    def conflicted(self, ino: int, conflict: Conflict) -> None:
        """What was written to an inode is another file now. Its open handles keep what they have, for reading only."""
        state = self._c.state_of(ino)
        if state is not None:
            state.become(Event.REPLACE)
            state.dirty = False
        self._c.renew(ino)
        self._c.kernel.entry(conflict.parent, conflict.name)
        self._c.kernel.attributes(conflict.parent)

    def damaged(self, ino: int, src: str, blocks: Collection[int]) -> None:
        """These blocks of the spool file ``src`` differ from what was written: they are not read, nor written over."""
        state = self._c.state_of(ino)
        if state is not None and state.spool is not None and state.spool.name == src:
            state.spool.damaged = set(blocks)
            self._c.kernel.attributes(state.fino)

    async def revive(self, ino: int, src: str) -> bool:
        """The frozen spool file ``src`` has lost its name: if it is open, a copy gets the name."""
        state = self._c.state_of(ino)
        if state is None or state.spool is None or state.spool.name != src:
            return False
        held = os.dup(state.spool.fd)
        try:
            await self._c.mover.clone(f"/proc/{os.getpid()}/fd/{held}", self._c.spool.draft_path(src))
            self._c.spool.finish_draft(src)
        except BaseException:
            self._c.spool.drop_draft(src)
            raise
        finally:
            os.close(held)
        if state.spool is not None and state.spool.name == src:
            with self._c.spool.opened(src, os.O_RDWR) as fd:
                os.dup2(fd, state.spool.fd, inheritable=False)
        return True

    def lost(self, ino: int, lost: Lost) -> None:
        """What was written to a file that is not open is lost."""
        for parent, name in lost.names:
            self._c.kernel.entry(parent, name)
            self._c.kernel.attributes(parent)
        self._c.renew(ino)

    async def fill(self, ino: int, src: str, base: Revision, blocks: Iterable[int]) -> None:
        """Copy blocks of the base into the partial spool ``src``, which is frozen."""
        await self.partials.fill(src, base, blocks, self._c.state_of(ino))

    def stored(
        self, ino: int, src: str, revision: Revision | None, consumed: bool, missing: Collection[int] = ()
    ) -> None:
        """``src`` was stored and is not needed any more: open handles go on with the stored revision."""
        state = self._showing(ino, src)
        if state is not None:
            if revision is not None:
                state.revision = revision
                state.drop_base()
            if state.is_deleted() or revision is None:
                # Only its handles know it. A consumed file is the stored object now, so it must not change.
                if not consumed:
                    state.become(Event.FREE)
                    self._c.spool.unlink(src)
                elif not state.is_deleted():
                    state.become(Event.UNLINK)
                return
            if state.writers and not consumed:
                state.become(Event.THAW)
                return
        if not consumed and not (revision is not None and self._import(src, revision, missing)):
            self._c.spool.unlink(src)
        if state is not None:
            state.drop_spool()
            state.become(Event.STORE)

    def storing_many(self) -> contextlib.AbstractContextManager[None]:
        """Context for several calls of ``stored``."""
        return self._c.cache.importing()

    def _import(self, src: str, revision: Revision, missing: Collection[int] = ()) -> bool:
        """Let a stored spool file become the cache's copy of its object."""
        try:
            fd = self._c.spool.open(src, os.O_RDWR)
        except (OSError, LamfsError):
            return False
        try:
            return self._c.cache.import_file(fd, self._c.spool.path(src), revision, missing)
        except (OSError, LamfsError) as error:
            log.warning("could not keep %s in the cache: %s", revision.object_key, error)
            return False
        finally:
            os.close(fd)

    def gone(self, object_key: str) -> None:
        """The object was deleted: drop what the cache has of it. Open handles keep it."""
        self._c.cache.drop(object_key)

    async def pin(self, object_key: str, *, but: int | None = None) -> None:
        """The object is about to go: fetch what open handles of its revision have not read yet.

        ``but``: an inode whose partial spool of that revision is being stored.
        """
        if self._c.store.on_disk:
            return  # their descriptors keep the old file
        for state in list(self._c.states.values()):
            if state.revision is not None and state.revision.object_key == object_key:
                try:
                    if state.spool is None:
                        await self.fill_stored(state)
                    elif state.spool.missing and state.ino != but:
                        async with state.lock:
                            await self.partials.complete(state)
                except (StorageError, FsError) as error:
                    log.warning("open handles of %s may lose their old revision: %s", object_key, error)

    def give_up(self, state: FileState) -> None:
        """The last handle is gone: close everything, and remove or keep the spool file as the journal requires."""
        spool = state.spool
        if spool is not None and not spool.own:
            state.drop_spool()  # another mount's, which removes it itself
        elif spool is not None:
            if self._is_nobodys(state.ino, spool.name):
                whole = state.phase is SPOOLED and not state.dirty and state.owed == spool.name
                revision = state.revision
                if not (whole and revision is not None and self._import(spool.name, revision, spool.missing)):
                    self._c.spool.unlink(spool.name)
            state.drop_spool()
        state.drop_base()


def _serves(state: FileState, before: Revision, now: Revision) -> bool:
    """Whether revision ``now`` has the bytes that an open file still needs of ``before``, with which it was opened."""
    if now.content.same_bytes(before.content):
        return True
    missing = state.spool.missing if state.spool is not None else None
    return bool(missing) and all(now.content.block(block) == before.content.block(block) for block in missing or ())


def touch(state: FileState) -> None:
    """Mark the content of a file as changed now."""
    state.inode.mtime_ns = state.inode.ctime_ns = now_ns()
    state.dirty = True
    state.accessed = False
