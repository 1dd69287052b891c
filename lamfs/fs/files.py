"""Regular files: open, read, write, truncate, flush, fsync, release. Loop only.

Reads and writes of bytes on the local disk never wait. docs/SEMANTICS.md explains what a return code means: ``flush``
(close) acknowledges into spool and journal, ``fsync`` waits for storage and registry.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import trio

from lamfs.errors import FsError, LamfsError, StorageError
from lamfs.fs.context import Context
from lamfs.fs.spooling import Spooling, touch
from lamfs.fs.state import DELETED, STORED, WRITING, Event, FileState, Handle, Spool, open_spool
from lamfs.fs.waits import Caller
from lamfs.keys import check_name, spool_token
from lamfs.model import Inode, new_uid, now_ns
from lamfs.mover import beats
from lamfs.prefetch.directories import DirectoryPrefetch
from lamfs.registry.entries import Put
from lamfs.storage.base import largest
from lamfs.work import streaming
from lamfs.work.durable import sync_file

SYNC_TASKS = 64
"""Files that are waited for at a time when everything below a directory has to be stored. So many can be stored at
once."""
LOOK_SECONDS = 1.0
"""Seconds between two looks at how much of that is left."""
RETRY_SECONDS = 0.5
"""Seconds between two tries of a file that could not be stored."""
OTHERS_LOOK = 0.05
"""Seconds between two looks at what another mount has to store."""
T = TypeVar("T")
AGAIN_SECONDS = 1.0
"""Seconds: after a failed read, the kernel asks once or twice more for the same bytes, at once."""


class Files:
    """Operations on the content of regular files of one mount."""

    def __init__(self, context: Context, spooling: Spooling) -> None:
        self._c = context
        self._counted = context.stats.counters
        self._spooling = spooling
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1
        self._largest = largest(context.store)
        self._directories = DirectoryPrefetch(context.registry, context.prefetcher.files, context.stats.counters)

    # -- opening ------------------------------------------------------------------------------------------------

    async def open(self, fino: int, flags: int, *, privileged: bool = True, pid: int = 0) -> int:
        """Open an existing file. Returns the handle. Raises FsError: ESTALE, EROFS, EISDIR, ELOOP.

        With O_TRUNC a caller that is not ``privileged`` clears the set-user-ID and set-group-ID bits. For other changes
        of the content the kernel does that. ``pid``: the thread that opens it.
        """
        # O_TRUNC also cuts a file that is opened for reading. The kernel has checked that it may be written.
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
                self._c.verbs.attributes.set_attributes(state.ino, mode=mode)
            self._c.kernel.attributes(state.fino)

    def keeps_pages(self, handle: int) -> bool:
        """As FileSystem.keeps_pages."""
        opened = self.handles[handle]
        return opened.writable or not self._c.atimes.is_due(opened.state.inode)

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, uid: int, gid: int, *, pid: int = 0
    ) -> tuple[int, int, Inode]:
        """Make and open a regular file. Returns handle, FUSE inode and attributes. Counts one lookup."""
        context = self._c
        text = check_name(name)
        backup = context.backups.kept(context.nodes.ino(parent), text)
        try:
            inode, src = context.verbs.names.create_file(
                context.nodes.ino(parent),
                text,
                stat.S_IFREG | stat.S_IMODE(mode),
                uid,
                gid,
                now=now_ns(),
                artifact_uid=new_uid(),
                token=spool_token(),
                key_is_virtual=not context.policy.real_keys,
                backup=backup,
            )
        except FsError as error:
            if error.errno == errno.EEXIST and not flags & os.O_EXCL:
                # Somebody else made it, and the kernel does not know yet: ESTALE makes the kernel look again and open
                # it.
                raise FsError(errno.ESTALE) from None
            raise
        try:
            spool = self._spooling.new_spool(inode.ino, src)
        except OSError:
            # If a backup was kept, the artifact goes back to it.
            place = context.backups.place(backup) if backup is not None else None
            context.verbs.names.unlink(context.nodes.ino(parent), text, now=now_ns(), left=lambda _: place)
            raise
        state = FileState(inode.ino, inode.ino, inode, WRITING, spool=spool, dirty=True, owed=src)
        if backup is not None:
            context.backups.handed(backup)
            artifact = context.registry.artifacts.by_ino(inode.ino)
            # The content that this file replaces: if it is closed with the same bytes, nothing has to be stored.
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
        self.handles[number] = Handle(state, may_read, writable, self._c.prefetcher.reader(), opener=pid)
        return number

    def _state(self, fino: int, *, emptied: bool = False) -> FileState:
        """The shared state of an open file. Made from registry and journal if the file is not open yet.

        ``emptied``: its present content is not needed. So a file that lost its name since the kernel looked it up can
        be opened, as on a local disk. Otherwise that is ESTALE, and the kernel looks the name up again, once.
        """
        context = self._c
        state = context.states.get(fino)
        if state is not None:
            if not self._is_outdated(state):
                return state
            context.renew(state.ino)
            raise FsError(errno.ESTALE)
        inode = context.inode(fino)
        if stat.S_ISDIR(inode.mode):
            raise FsError(errno.EISDIR)
        if not stat.S_ISREG(inode.mode):
            raise FsError(errno.ELOOP)
        if not context.nodes.is_current(fino) or (inode.ino in context.nodes.ghosts and not emptied):
            raise FsError(errno.ESTALE)
        unlinked = inode.nlink == 0 and inode.ino in context.nodes.unlinked
        if inode.nlink == 0 and not unlinked:
            # Somebody else deleted it, and the kernel does not know yet. ESTALE makes it look the name up again,
            # instead of writing into a file that nobody can find. (Open handles here share the state above.)
            raise FsError(errno.ESTALE)
        state = FileState(inode.ino, fino, inode, DELETED if unlinked else STORED, seen=inode.revision)
        while not self._open_owed(state, owed := context.registry.journal.put_of(inode.ino)):
            state.drop_spool()
            if context.registry.journal.put_of(inode.ino) == owed:
                raise FsError(errno.EIO, f"the spool file of '{self._name(inode.ino)}' cannot be used")
        artifact = state.revision
        if state.spool is not None:
            inode.size = os.fstat(state.spool.fd).st_size
        elif artifact is None and inode.size and not emptied and not unlinked:
            raise FsError(
                errno.EIO, f"'{self._name(inode.ino)}' is not stored; the machine that wrote it has its bytes"
            )
        self._spooling.keep_stored(state)
        if state.spool is None or not state.spool.own:
            now = context.registry.tree.get(inode.ino)
            if now is not None and now.revision != inode.revision:
                # It was replaced between reading its size and reading its content.
                self._spooling.give_up(state)
                raise FsError(errno.ESTALE)
        context.states[fino] = state
        return state

    def _open_owed(self, state: FileState, owed: Put | None) -> bool:
        """Open what there is of a file besides its stored revision. False if that is not possible: another mount may
        have stored it meanwhile."""
        context = self._c
        # Read after the row: if the row is removed meanwhile, this is what the put has become.
        artifact = context.registry.artifacts.by_ino(state.ino)
        state.revision = artifact.revision if artifact is not None else None
        if owed is None:
            return True
        try:
            state.spool = open_spool(context.spool, owed.src, context.store, owed.object_key)
            self._spooling.partials.open(state.spool, owed, state.revision)
            state.spool.damaged = set(owed.damaged)
        except FsError:
            return False
        mine = state.spool.own = owed.owner == context.registry.journal.owner
        state.owed = owed.src if mine else None
        taken = not context.spool.exists(owed.src)
        state.become(Event.FIND)
        if not mine or taken or context.uploader.is_uploading(state.ino, owed.src):
            state.become(Event.FREEZE)
        return True

    def _is_replaced(self, state: FileState) -> bool:
        """As _is_outdated, also if that is known already. False for a deleted file."""
        return (state.is_stale() or self._is_outdated(state)) and not self._spooling.is_gone(state)

    def _is_outdated(self, state: FileState) -> bool:
        """Whether somebody else has made a newer revision than the one that is open here."""
        if state.is_stale() or state.is_deleted() or state.dirty or state.ino in self._c.nodes.ghosts:
            return False
        now = self._c.registry.tree.get(state.ino)
        if now is None or now.revision == state.seen:
            return False
        owed = self._c.registry.journal.put_of(state.ino)
        return not self._c.owes(state, owed)

    # -- bytes --------------------------------------------------------------------------------------------------

    def read_now(self, handle: int, offset: int, size: int) -> bytes | None:
        """Bytes that are on the local disk and verified, without waiting. None: ``read`` has to be awaited."""
        opened = self.handles[handle]
        state = opened.state
        if not state.accessed:
            state.accessed = True
            self._c.atimes.read(state.inode)
            if state.revision is not None:
                self._directories.read(state.ino, state.revision)
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
        """Up to ``size`` bytes at ``offset``. Fewer only at the end of the file."""
        data = self.read_now(handle, offset, size)
        if data is not None:
            return data
        opened = self.handles[handle]
        state, reader = opened.state, opened.reader
        if self._spooling.verify_small(state, offset) and (data := self.read_now(handle, offset, size)) is not None:
            return data
        base = state.base
        waits = base is None or not base.has(offset, size)
        if waits and reader.is_new():
            self._directories.missed(state.ino)
        now = began = trio.current_time()
        if opened.failed is not None and now - opened.failed[0] <= AGAIN_SECONDS:
            began = opened.failed[1]  # all tries together must not take longer than one may
        seconds = began + self._c.policy.timeout - now
        if seconds <= 0:
            raise FsError(errno.EIO)

        async def stored() -> bytes:
            if state.spool is not None:
                state.spool.check(offset, size)
                return await self._spooling.partials.read(state, offset, size, reader)
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
        """Who waits during a call through a handle."""
        fino = opened.state.fino

        def rivals() -> list[int]:
            return [each.opener for each in self.handles.values() if each.state.fino == fino and each is not opened]

        return Caller(opened.opener, fino, rivals)

    async def _wait(
        self, work: Callable[[], Awaitable[T]], state: FileState, caller: Caller, seconds: float | None = None
    ) -> T:
        """The result of work that needs storage. Raises FsError: EIO if it makes no progress for too long, EINTR."""

        def progress() -> object:
            return state.beat.value(), None if state.base is None else state.base.beat.value()

        with beats.doing(state.beat):
            return await self._c.waits.bounded(
                work,
                self._c.policy.timeout if seconds is None else seconds,
                caller,
                lambda: self._name(state.ino),
                progress,
            )

    def _name(self, ino: int) -> str:
        return self._c.registry.tree.path(ino) or f"inode {ino}"

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        """Write ``data``, up to the largest file that storage takes. Returns the number of bytes. Raises OSError
        (ENOSPC …), StorageError (content unreachable), FsError (EFBIG; EROFS: the lease was lost since the file was
        opened)."""
        if self._c.policy.read_only:
            raise FsError(errno.EROFS)
        state = self.handles[handle].state
        if offset + len(data) > self._largest:
            if offset >= self._largest:
                raise FsError(errno.EFBIG)
            data = data[: self._largest - offset]
        spool = state.spool
        if spool is None or spool.missing or not state.writable_now:
            spool = await self._prepare(state, self._caller(self.handles[handle]), write=(offset, len(data)))
        state.dirty = True  # the journal's row is open by now: the next close has to acknowledge, also with a full disk
        back_pressure = self._spooling.back_pressure
        if not back_pressure.admit(len(data)):
            # This wait has its own limit, which moves on as long as storage takes something.
            await self._wait(lambda: back_pressure.wait(len(data)), state, self._caller(self.handles[handle]), math.inf)
            if state.spool is not spool or spool.missing or not state.writable_now:  # stored, cut … meanwhile
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
        self._spooling.partials.wrote(state, spool, offset, done)
        if inode.size > streaming.START and not state.is_deleted():
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
        if size > self._largest:
            raise FsError(errno.EFBIG)
        spool = await self._prepare(state, caller, keep=size)
        state.dirty = True
        os.ftruncate(spool.fd, size)
        self._spooling.partials.cut(state, size)
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
            if state.writers == 1 and not state.is_deleted():
                self._acknowledge(state)
        finally:
            self._let_go(state, True)

    # -- acknowledging ------------------------------------------------------------------------------------------

    def _acknowledge(self, state: FileState, *, tell: bool = False) -> None:
        """Journal what was written. If somebody else has replaced the file, this mount cannot store that any more, and
        it is lost: with ``tell`` raises FsError(ESTALE)."""
        if state.is_deleted() or not (state.dirty or state.is_open_in_journal()):
            return  # a failed write has left an open row too
        if self._spooling.acknowledge(state):
            return
        if self._spooling.is_gone(state):
            state.become(Event.UNLINK)  # its written bytes are not needed
            state.dirty = False
        elif tell:
            raise FsError(errno.ESTALE, "the file was replaced by somebody else while it was open")

    async def flush(self, handle: int) -> None:
        """close(2): bytes and intent are in spool and journal. With ``-o close=storage`` the bytes are in storage
        too."""
        opened = self.handles[handle]
        state = opened.state
        if not opened.writable or not state.dirty:
            return
        self._acknowledge(state, tell=True)
        if self._c.policy.close_stores:
            await self.store(state.ino, self._caller(opened))

    async def fsync(self, handle: int) -> None:
        """fsync(2): in storage and in the registry. With ``-o fsync=spool`` only on the local disk.

        Raises the error of the failed try if storage refuses or is away. The upload stays pending.
        """
        opened = self.handles[handle]
        state = opened.state
        self._acknowledge(state, tell=True)
        if state.is_deleted():
            return
        if opened.writable and self._is_replaced(state):
            raise FsError(errno.ESTALE, "the file was replaced by somebody else while it was open")
        if self._c.policy.fsync_stores:
            await self.store(state.ino, self._caller(opened))
        elif state.spool is not None:
            await sync_file(self._c.spool, os.dup(state.spool.fd))
        await self._c.uploader.durable()

    async def store(self, ino: int, caller: Caller | None = None) -> None:
        """Wait until the bytes of an inode that are pending now are in storage.

        Raises FsError: EIO if storing makes no progress for too long, EINTR if the caller is told to stop, ESTALE if
        another mount rewrites the file.
        """
        entry = self._c.registry.journal.put_of(ino)
        if entry is None:
            return
        self._c.uploader.check_refused(ino)
        if entry.state == "scratch":
            await sync_file(self._c.spool, self._c.spool.open(entry.src, os.O_RDONLY))
            return

        async def stored() -> None:
            journal, now = self._c.registry.journal, entry
            while now.owner != journal.owner:  # another mount works on it
                self._c.uploader.check_refused(ino)
                if now.state == "open":
                    if not now.gen:
                        return  # nothing of it is acknowledged
                    raise FsError(errno.ESTALE, "another mount is writing the file")
                if now.next_at >= 0:
                    journal.urge(now.id)
                await trio.sleep(OTHERS_LOOK)
                later = journal.put_of(ino)
                if later is None:
                    return
                now = later
            await self._c.uploader.wait_stored(ino, now.id, now.gen)

        await self._c.waits.bounded(
            stored,
            self._c.policy.timeout,
            caller or Caller(),
            lambda: self._name(ino),
            lambda: self._c.uploader.progress(ino),
        )

    def acknowledge_all(self) -> None:
        """Journal everything that open handles have written so far."""
        for state in list(self._c.states.values()):
            self._acknowledge(state)

    async def sync_below(self, top: int, progress: Callable[[int, int], None]) -> None:
        """Return when everything written so far to a file, or below a directory, is in storage and in the registry.

        Waits through failures, and tries each again. Calls ``progress(files, bytes)`` now and then. Raises TooLarge for
        a file that storage can never take, once all others are stored.
        """
        self.acknowledge_all()
        while owed := self._owed_below(top):
            progress(len(owed), sum(size for _, size in owed))
            left = iter(owed)
            with trio.move_on_after(LOOK_SECONDS):
                async with trio.open_nursery() as nursery:
                    for _ in range(min(SYNC_TASKS, len(owed))):
                        nursery.start_soon(self._store_each, left)
        for entry in self._c.registry.journal.refused():
            if entry.ino == top or self._c.registry.tree.is_below(entry.ino, top):
                self._c.uploader.check_refused(entry.ino)
        await self._c.uploader.durable()

    def _owed_below(self, top: int) -> list[tuple[int, int]]:
        """Files at or below an inode that are not stored yet, with their bytes."""
        tree = self._c.registry.tree
        below = [ino for ino in self._c.registry.journal.owed_inodes() if ino == top or tree.is_below(ino, top)]
        return [(ino, inode.size) for ino in below if (inode := tree.get(ino)) is not None]

    async def _store_each(self, files: Iterator[tuple[int, int]]) -> None:
        for ino, _ in files:
            try:
                await self.store(ino)
            except LamfsError:
                await trio.sleep(RETRY_SECONDS)  # the uploader has logged the error

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
