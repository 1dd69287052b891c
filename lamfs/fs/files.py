"""Regular files: open, read, write, truncate, flush, fsync, release. Loop only.

Reads and writes of bytes that are on the local disk do not wait for anything. What a return code means is DESIGN §3:
``flush`` (close) acknowledges into spool and journal, ``fsync`` waits for storage and registry.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from lamfs.errors import FsError, LamfsError, StorageError
from lamfs.fs.context import Context
from lamfs.fs.neighbours import Neighbours
from lamfs.fs.spooling import Spooling, touch
from lamfs.fs.state import FileState, Handle, Spool, open_spool
from lamfs.fs.waits import Caller
from lamfs.keys import check_name
from lamfs.model import Inode, now_ns
from lamfs.registry import damaged_blocks
from lamfs.transfer import streaming
from lamfs.transfer.durable import sync_file

MAX_SIZE = (1 << 63) - 1
SYNC_TASKS = 64
"""Files that the fsync of a directory waits for at a time; as many can be stored at once."""
T = TypeVar("T")
AGAIN_SECONDS = 1.0
"""When a read fails, the kernel asks once or twice more for the same bytes, at once."""


class Files:
    """Operations on the content of regular files of one mount."""

    def __init__(self, context: Context, spooling: Spooling) -> None:
        self._c = context
        self._counted = context.stats.counters
        self._spooling = spooling
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1
        self._neighbours = Neighbours(context.registry, context.cache, context.stats.counters)

    # -- opening ------------------------------------------------------------------------------------------------

    async def open(self, fino: int, flags: int, *, privileged: bool = True, pid: int = 0) -> int:
        """Open an existing file; returns the handle. Raises FsError: ESTALE, EROFS, EISDIR, ELOOP.

        Who is not ``privileged`` takes the set-user-ID and set-group-ID bits away by O_TRUNC; of other changes of the
        content the kernel sees to that. ``pid``: the thread that opens it.
        """
        # O_TRUNC cuts the file also when it is opened for reading; the kernel has checked that it may be written.
        writable = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if writable and self._c.policy.read_only:
            raise FsError(errno.EROFS)
        state = self._state(fino, emptied=bool(flags & os.O_TRUNC))
        state.handles += 1
        state.writers += writable
        try:
            if flags & os.O_TRUNC:
                await self._truncate(state, 0, Caller(pid))
                if not privileged:
                    self._drop_set_ids(state)
        except BaseException:
            self._let_go(state, writable)
            raise
        return self._handle(state, flags, writable, pid)

    def _drop_set_ids(self, state: FileState) -> None:
        mode = state.inode.mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            mode &= ~stat.S_ISGID
        if mode != state.inode.mode:
            state.inode.mode = mode
            if state.ino not in self._c.nodes.ghosts:
                self._c.registry.names.set_attributes(state.ino, mode=mode)
            self._c.kernel.attributes(state.fino)

    def keeps_pages(self, handle: int) -> bool:
        """As FileSystem.keeps_pages."""
        opened = self.handles[handle]
        return opened.writable or not self._c.atimes.is_due(opened.state.inode)

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, uid: int, gid: int, *, pid: int = 0
    ) -> tuple[int, int, Inode]:
        """Make and open a regular file; returns handle, FUSE inode and attributes, one lookup counted."""
        context = self._c
        text = check_name(name)
        backup = context.backups.kept(context.nodes.ino(parent), text)
        try:
            inode, src = context.registry.names.create_file(
                context.nodes.ino(parent),
                text,
                stat.S_IFREG | stat.S_IMODE(mode),
                uid,
                gid,
                key_is_virtual=not context.policy.real_keys,
                backup=backup,
            )
        except FsError as error:
            if error.errno == errno.EEXIST and not flags & os.O_EXCL:
                # Somebody else made it, and the kernel does not know yet: ESTALE makes it look, and open what is there.
                raise FsError(errno.ESTALE) from None
            raise
        try:
            spool = self._spooling.new_spool(inode.ino, src)
        except OSError:
            # With a kept backup, the artifact goes back to that.
            place = context.backups.place(backup) if backup is not None else None
            context.registry.names.unlink(context.nodes.ino(parent), text, left=lambda _: place)
            raise
        state = FileState(inode.ino, inode.ino, inode, spool=spool, journaled=True, dirty=True)
        if backup is not None:
            context.backups.handed(backup)
            artifact = context.registry.artifacts.by_ino(inode.ino)
            # What it replaces: bytes that are closed as they were are nothing new.
            state.revision = artifact.revision if artifact is not None else None
        context.states[inode.ino] = state
        context.nodes.looked_up(inode.ino, inode.revision)
        state.handles = 1
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        state.writers = int(writable)
        return self._handle(state, flags, writable, pid), inode.ino, inode

    def make_file(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> tuple[int, Inode]:
        """mknod(2) of a regular file: an empty artifact, acknowledged at once."""
        handle, fino, inode = self.create(parent, name, mode, os.O_WRONLY, uid, gid)
        self._acknowledge(self.handles[handle].state)
        self.release(handle)
        return fino, inode

    def _handle(self, state: FileState, flags: int, writable: bool, pid: int) -> int:
        number = self._next_handle
        self._next_handle += 1
        may_read = flags & os.O_ACCMODE != os.O_WRONLY
        self.handles[number] = Handle(state, may_read, writable, self._c.cache.reader(), opener=pid)
        return number

    def _state(self, fino: int, *, emptied: bool = False) -> FileState:
        """The shared state of an open file, made from what registry and journal know when it is not open yet.

        ``emptied``: its present content is not needed, so a file that lost its name since the kernel looked it up can
        be opened, as on a local disk. Otherwise that is ESTALE, upon which the kernel looks the name up again, once.
        """
        context = self._c
        state = context.states.get(fino)
        if state is not None:
            return state
        inode = context.inode(fino)
        if stat.S_ISDIR(inode.mode):
            raise FsError(errno.EISDIR)
        if not stat.S_ISREG(inode.mode):
            raise FsError(errno.ELOOP)
        if not context.nodes.is_current(fino) or (inode.ino in context.nodes.ghosts and not emptied):
            raise FsError(errno.ESTALE)
        unlinked = inode.nlink == 0 and inode.ino in context.nodes.unlinked
        if inode.nlink == 0 and not unlinked:
            # Somebody else deleted it, and the kernel does not know yet: it looks the name up again, instead of writing
            # into a file that nobody can find. (Who has it open here shares the state above.)
            raise FsError(errno.ESTALE)
        state = FileState(inode.ino, fino, inode, private=unlinked)
        artifact = context.registry.artifacts.by_ino(inode.ino)
        if artifact is not None:
            state.revision = artifact.revision
        owed = context.registry.journal.put_of(inode.ino)
        if owed is not None and owed.src is not None:
            state.spool = open_spool(context.spool, owed.src, context.store, owed.object_key)
            self._spooling.overlays.open(state.spool, owed, state.revision)
            state.spool.damaged = damaged_blocks(owed)
            mine = owed.owner == context.registry.journal.owner
            taken = not context.spool.exists(owed.src)
            state.frozen = not mine or taken or context.uploader.is_uploading(inode.ino, owed.src)
            inode.size = os.fstat(state.spool.fd).st_size
        elif artifact is None and inode.size and not emptied and not unlinked:
            raise FsError(
                errno.EIO, f"'{self._name(inode.ino)}' is not stored; the machine that wrote it has its bytes"
            )
        self._spooling.keep_stored(state)
        if state.spool is None:
            now = context.registry.tree.get(inode.ino)
            if now is not None and now.revision != inode.revision:
                # It was replaced between the look at its size and the look at its content.
                raise FsError(errno.ESTALE)
        context.states[fino] = state
        return state

    # -- bytes --------------------------------------------------------------------------------------------------

    def read_now(self, handle: int, offset: int, size: int) -> bytes | None:
        """Bytes that are on the local disk and checked, without waiting; None when ``read`` has to be awaited."""
        opened = self.handles[handle]
        state = opened.state
        if not state.accessed:
            state.accessed = True
            self._c.atimes.read(state.inode)
            if state.revision is not None:
                self._neighbours.read(state.ino, state.revision)
        counted = self._counted
        spool = state.spool
        if spool is not None:
            if spool.missing:
                return None
            if spool.damaged:
                spool.check(offset, size)
            counted.spool_reads += 1
            data = os.pread(spool.fd, size, offset)
            counted.read_bytes += len(data)
            return data
        base = state.base
        if base is None:
            return None if state.revision is not None else b""
        found = base.read_now(offset, size)
        if found is not None:
            counted.hits += 1
            counted.read_bytes += len(found)
            if found and base.todo:
                opened.reader.note(base, offset, len(found))
        return found

    async def read(self, handle: int, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes at ``offset``; fewer only at the end of the file."""
        data = self.read_now(handle, offset, size)
        if data is not None:
            return data
        opened = self.handles[handle]
        state, reader = opened.state, opened.reader
        if self._spooling.verify_small(state, offset) and (data := self.read_now(handle, offset, size)) is not None:
            return data
        base = state.base
        waits = base is None or not base.holds(offset, size)
        if waits and reader.is_new():
            self._neighbours.missed(state.ino)
        now = began = trio.current_time()
        if opened.failed is not None and now - opened.failed[0] <= AGAIN_SECONDS:
            began = opened.failed[1]  # all tries together must not take longer than one may
        seconds = began + self._c.policy.timeout - now
        if seconds <= 0:
            raise FsError(errno.EIO)

        async def stored() -> bytes:
            if state.spool is not None:
                state.spool.check(offset, size)
                return await self._spooling.overlays.read(state, offset, size, reader)
            return await self._spooling.read_stored(state, offset, size, reader)

        try:
            data = await self._wait(stored, state, self._caller(opened), seconds)
        except (StorageError, FsError):
            opened.failed = trio.current_time(), began
            raise
        if waits:
            self._counted.misses += 1
        else:
            self._counted.hits += 1
        self._counted.read_bytes += len(data)
        return data

    def _caller(self, opened: Handle) -> Caller:
        """Who waits when a call through a handle does."""
        fino = opened.state.fino

        def rivals() -> list[int]:
            return [each.opener for each in self.handles.values() if each.state.fino == fino and each is not opened]

        return Caller(opened.opener, fino, rivals)

    async def _wait(
        self, work: Callable[[], Awaitable[T]], state: FileState, caller: Caller, seconds: float | None = None
    ) -> T:
        """The result of what needs storage. Raises FsError: EIO when it takes too long, EINTR."""
        return await self._c.waits.bounded(
            work, self._c.policy.timeout if seconds is None else seconds, caller, lambda: self._name(state.ino)
        )

    def _name(self, ino: int) -> str:
        return self._c.registry.tree.path(ino) or f"inode {ino}"

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        """Write all of ``data``; returns its length. Raises OSError (ENOSPC …), StorageError (content unreachable)."""
        state = self.handles[handle].state
        spool = state.spool
        if spool is None or spool.missing or not state.writable_now():
            spool = await self._prepare(state, self._caller(self.handles[handle]), write=(offset, len(data)))
        state.dirty = True  # the journal says "open" by now: the next close has to acknowledge, also with a full disk
        room = self._spooling.room
        if not room.take(len(data)):
            # It has an end of its own, which moves on as long as storage takes something.
            await self._wait(lambda: room.wait(len(data)), state, self._caller(self.handles[handle]), math.inf)
            if state.spool is not spool or spool.missing or not state.writable_now():  # stored, cut … meanwhile
                spool = await self._prepare(state, self._caller(self.handles[handle]), write=(offset, len(data)))
                state.dirty = True
        inode = state.inode
        try:
            done = spool.write(offset, data)
        except OSError as error:
            inode.size = os.fstat(spool.fd).st_size
            if error.errno == errno.EFBIG:
                raise FsError(errno.EFBIG) from None  # the caller's mistake: not worth a line in the log
            raise
        inode.size = max(inode.size, offset + done)
        self._spooling.overlays.wrote(state, spool, offset, done)
        if inode.size > streaming.START and not state.private:
            self._c.uploader.written(state.ino, spool.name, offset, done, inode.size)
        inode.mtime_ns = inode.ctime_ns = now_ns()
        state.accessed = False
        self._counted.writes += 1
        self._counted.write_bytes += done
        return done

    async def _prepare(
        self, state: FileState, caller: Caller, keep: int | None = None, write: tuple[int, int] | None = None
    ) -> Spool:
        return await self._wait(lambda: self._spooling.prepare_write(state, keep, write), state, caller)

    async def _truncate(self, state: FileState, size: int, caller: Caller) -> None:
        if size > MAX_SIZE:
            raise FsError(errno.EFBIG)
        spool = await self._prepare(state, caller, keep=size)
        state.dirty = True
        os.ftruncate(spool.fd, size)
        self._spooling.overlays.cut(state, size)
        self._c.uploader.cut(state.ino, size)
        state.inode.size = size
        touch(state)

    async def truncate(self, fino: int, size: int, *, pid: int = 0) -> None:
        """truncate(2), ftruncate(2) by thread ``pid``: as if the file were opened, cut and closed."""
        if self._c.policy.read_only:
            raise FsError(errno.EROFS)
        state = self._state(fino)
        state.handles += 1
        state.writers += 1
        try:
            await self._truncate(state, size, Caller(pid))
            if state.writers == 1 and not state.private:
                self._acknowledge(state)
        finally:
            self._let_go(state, True)

    # -- acknowledging ------------------------------------------------------------------------------------------

    def _acknowledge(self, state: FileState, *, tell: bool = False) -> None:
        """Journal what was written. When another mount has written the file since, that counts, and what was written
        here is lost: with ``tell`` FsError(ESTALE)."""
        if state.private or not (state.dirty or state.journaled):
            return  # a write that failed has left a row, too
        if self._spooling.acknowledge(state, own=True):
            return
        if not self._spooling.is_overtaken(state):
            self._spooling.acknowledge(state)
        elif tell:
            raise FsError(errno.ESTALE, "the file was replaced by somebody else while it was open")

    async def flush(self, handle: int) -> None:
        """close(2): bytes and intent are in spool and journal; with ``-o close=storage`` in storage too."""
        opened = self.handles[handle]
        state = opened.state
        if not opened.writable or not state.dirty:
            return
        self._acknowledge(state, tell=True)
        if self._c.policy.close_stores:
            await self.store(state.ino, self._caller(opened))

    async def fsync(self, handle: int) -> None:
        """fsync(2): in storage and in the registry; with ``-o fsync=spool`` on the local disk only.

        Raises the error of the try it made when storage refuses or is away; the upload stays owed.
        """
        opened = self.handles[handle]
        state = opened.state
        self._acknowledge(state, tell=True)
        if state.private:
            return
        if self._c.policy.fsync_stores:
            await self.store(state.ino, self._caller(opened))
        elif state.spool is not None:
            await sync_file(self._c.spool, os.dup(state.spool.fd))
        await self._c.uploader.durable()

    async def store(self, ino: int, caller: Caller | None = None) -> None:
        """Wait until what is owed for an inode now is in storage.

        Raises FsError: EIO when it takes too long, EINTR when the caller is told to stop.
        """
        entry = self._c.registry.journal.put_of(ino)
        if entry is None:
            return
        if entry.state == "scratch":
            await sync_file(self._c.spool, self._c.spool.open(str(entry.src), os.O_RDONLY))
            return

        async def settle() -> None:
            if entry.owner == self._c.registry.journal.owner:
                await self._c.uploader.settle(ino, entry.id, entry.gen)
            else:
                # Another mount has it in hand.
                while self._c.registry.journal.put_of(ino) is not None:
                    await trio.sleep(0.05)

        await self._c.waits.bounded(settle, self._c.policy.timeout, caller or Caller(), lambda: self._name(ino))

    def acknowledge_all(self) -> None:
        """Journal everything that open handles have written so far."""
        for state in list(self._c.states.values()):
            self._acknowledge(state)

    async def sync_below(self, directory: int, *, pid: int = 0) -> None:
        """fsync(2) of a directory by thread ``pid``: everything below it is in storage and in the registry."""
        self.acknowledge_all()
        tree, journal = self._c.registry.tree, self._c.registry.journal
        error: LamfsError | None = None
        below = (ino for ino in journal.owed_inodes() if tree.is_below(ino, directory))

        async def store() -> None:
            nonlocal error
            for ino in below:
                try:
                    await self.store(ino, Caller(pid))
                except LamfsError as problem:
                    error = problem
                if error is not None:
                    return  # the rest is stored all the same, and nobody is told so

        if self._c.policy.fsync_stores:
            async with trio.open_nursery() as nursery:
                for _ in range(SYNC_TASKS):
                    nursery.start_soon(store)
        if error is not None:
            raise error
        await self._c.uploader.durable()

    # -- closing ------------------------------------------------------------------------------------------------

    def release(self, handle: int) -> None:
        """The last descriptor of an open file description is gone."""
        opened = self.handles.pop(handle)
        opened.reader.close()
        self._let_go(opened.state, opened.writable)

    def _let_go(self, state: FileState, writable: bool) -> None:
        state.handles -= 1
        if writable:
            state.writers -= 1
        if state.handles:
            if writable and not state.writers:
                self._c.uploader.notify(state.ino)
            return
        self._acknowledge(state)
        self._c.states.pop(state.fino, None)
        self._spooling.give_up(state)
        if writable:
            self._c.uploader.notify(state.ino)
