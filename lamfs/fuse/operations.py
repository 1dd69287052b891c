"""The kernel's requests: call the file system, build the reply, translate the error. Nothing else; pyfuse3's loop.

pyfuse3 ends the mount on any exception but FUSEError, so every handler is wrapped: domain errors and OSErrors become
their errno, anything unexpected is EIO with a traceback in the log, and the mount lives on.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from lamfs.errors import LamfsError
from lamfs.fs.filesystem import Changes, FileSystem
from lamfs.fs.nodes import CONTROL_BASE
from lamfs.model import Inode

log = logging.getLogger("lamfs.fuse")

P = ParamSpec("P")
R = TypeVar("R")
LONG = 86_400.0
"""Seconds for which the kernel may keep entries and attributes: long, because invalidation is exact."""


def fuse_error(problem: BaseException, what: str) -> FUSEError:
    """The one seam at which errors become errnos."""
    if isinstance(problem, LamfsError):
        if problem.errno == errno.EIO:
            log.error("%s: %s", what, problem)
        return FUSEError(problem.errno)
    if isinstance(problem, OSError) and problem.errno:
        log.warning("%s: %s", what, problem)
        return FUSEError(problem.errno)
    log.error("unexpected error in %s", what, exc_info=problem)
    return FUSEError(errno.EIO)


def guarded(
    handler: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Wrap a handler so that it raises nothing but FUSEError (and cancellation at the end of the mount)."""

    @functools.wraps(handler)
    async def wrapper(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except (FUSEError, trio.Cancelled):
            raise
        except Exception as problem:
            raise self.failed(problem, handler.__name__) from problem

    return wrapper


def new_entry(timeout: float) -> EntryAttributes:
    """A reply's entry with what is the same for all inodes. The kernel may rely on it for ``timeout`` seconds."""
    entry = EntryAttributes()  # generation 0, st_blksize 4096
    entry.entry_timeout = timeout
    entry.attr_timeout = timeout
    return entry


class Shown:
    """How attributes are shown: the mount's overrides of owner and mode."""

    def __init__(self, uid: int | None, gid: int | None, umask: int | None) -> None:
        self.uid = uid
        self.gid = gid
        self.mask = ~umask if umask is not None else -1

    def attributes(self, fino: int, inode: Inode, timeout: float = LONG) -> EntryAttributes:
        """The kernel's form of an inode."""
        return self.fill(new_entry(timeout), fino, inode)

    def fill(self, entry: EntryAttributes, fino: int, inode: Inode) -> EntryAttributes:
        """Write an inode into the kernel's form. Blocks are 512 bytes, as always in st_blocks."""
        entry.st_ino = fino
        entry.st_mode = inode.mode & self.mask
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid if self.uid is None else self.uid
        entry.st_gid = inode.gid if self.gid is None else self.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        entry.st_blocks = inode.blocks if inode.blocks is not None else (inode.size + 4095 >> 12) << 3
        entry.st_atime_ns = inode.atime_ns
        entry.st_mtime_ns = inode.mtime_ns
        entry.st_ctime_ns = inode.ctime_ns
        return entry


class Operations(pyfuse3.Operations):
    """pyfuse3's handlers over one FileSystem."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, fs: FileSystem, shown: Shown, *, xattr: bool) -> None:
        super().__init__()
        self._fs = fs
        self._shown = shown
        self._as_is = Shown(None, None, None)
        self._xattr = xattr

    def failed(self, problem: Exception, what: str) -> FUSEError:
        """The answer to a failed call. Counts EIO."""
        error = fuse_error(problem, what)
        if error.errno == errno.EIO:
            self._fs.context.stats.counters.io_errors += 1
        return error

    def _entry(self, found: tuple[int, Inode]) -> EntryAttributes:
        fino, inode = found
        if fino < CONTROL_BASE:
            return self._shown.attributes(fino, inode)
        return self._control_shown(fino).attributes(fino, inode, 0.0)

    def _control_shown(self, fino: int) -> Shown:
        """A control file is shown like what it describes. But the mount's numbers belong to the user that mounted,
        whatever owner everything else is shown with."""
        return self._shown if self._fs.control.describes(fino) else self._as_is

    # -- names --------------------------------------------------------------------------------------------------

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        found = self._fs.lookup(parent_inode, name)
        if found is None:
            if parent_inode >= CONTROL_BASE:
                raise FUSEError(errno.ENOENT)
            # A negative entry: the kernel may remember that there is nothing.
            negative = EntryAttributes()
            negative.st_ino = 0
            negative.entry_timeout = LONG
            return negative
        return self._entry(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        try:
            self._fs.forget(list(inode_list))
        except Exception:
            log.exception("unexpected error in forget")

    @guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        self._refuse_control(parent_inode)
        mode = pyfuse_dir(mode & ~ctx.umask)
        return self._entry(self._fs.names.make(parent_inode, name, mode, ctx.uid, ctx.gid))

    @guarded
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        self._refuse_control(parent_inode)
        mode &= ~ctx.umask
        if is_regular(mode):
            return self._entry(self._fs.files.make_file(parent_inode, name, mode, ctx.uid, ctx.gid))
        return self._entry(self._fs.names.make(parent_inode, name, mode, ctx.uid, ctx.gid, rdev=rdev))

    @guarded
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        self._refuse_control(parent_inode)
        return self._entry(self._fs.names.make(parent_inode, name, SYMLINK_MODE, ctx.uid, ctx.gid, target=target))

    @guarded
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self._fs.names.readlink(inode)

    @guarded
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        self._refuse_control(inode, new_parent_inode)
        return self._entry(self._fs.names.link(inode, new_parent_inode, new_name))

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._refuse_control(parent_inode)
        self._fs.names.unlink(parent_inode, name)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._refuse_control(parent_inode)
        self._fs.names.rmdir(parent_inode, name)

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        self._refuse_control(parent_inode_old, parent_inode_new)
        self._fs.names.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    def _refuse_control(self, *inodes: int) -> None:
        if any(inode >= CONTROL_BASE for inode in inodes):
            raise FUSEError(errno.EPERM)
        if self._fs.context.policy.read_only:
            raise FUSEError(errno.EROFS)

    # -- attributes ---------------------------------------------------------------------------------------------

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry((inode, self._fs.getattr(inode)))

    @guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if (fields.update_uid and self._shown.uid not in (None, attr.st_uid)) or (
            fields.update_gid and self._shown.gid not in (None, attr.st_gid)
        ):
            raise FUSEError(errno.EPERM)
        changes = Changes(
            mode=attr.st_mode if fields.update_mode else None,
            # An owner that comes from a mount option is not the file's own: setting it changes nothing.
            uid=attr.st_uid if fields.update_uid and self._shown.uid is None else None,
            gid=attr.st_gid if fields.update_gid and self._shown.gid is None else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._entry((inode, await self._fs.setattr(inode, changes, pid=ctx.pid)))

    @guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self._fs.statfs()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = space.block
        data.f_blocks = space.blocks
        data.f_bfree = data.f_bavail = space.free
        data.f_files = space.files
        data.f_ffree = data.f_favail = space.files_free
        data.f_namemax = 255
        return data

    # -- directories --------------------------------------------------------------------------------------------

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._fs.opendir(inode)

    @guarded
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        # Up to some hundred entries per request: the reply is copied from one form, which is refilled for each.
        fs, fill, reply = self._fs, self._shown.fill, pyfuse3.readdir_reply
        lasting, fleeting = new_entry(LONG), new_entry(0.0)
        for cookie, name, fino, inode in fs.readdir(fh, start_id):
            if fino < CONTROL_BASE:
                entry = fill(lasting, fino, inode)
            else:
                entry = self._control_shown(fino).fill(fleeting, fino, inode)
            if not reply(token, name, entry, cookie):
                return
            fs.entry_taken(name, fino, inode)

    @guarded
    async def releasedir(self, fh: int) -> None:
        self._fs.releasedir(fh)

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._fs.fsyncdir(fh)

    # -- files --------------------------------------------------------------------------------------------------

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        self._refuse_control(parent_inode)
        handle, fino, inode = self._fs.files.create(
            parent_inode, name, mode & ~ctx.umask, flags, ctx.uid, ctx.gid, pid=ctx.pid
        )
        return FileInfo(fh=handle, keep_cache=True), self._entry((fino, inode))

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        handle = await self._fs.open(inode, flags, privileged=ctx.uid == 0, pid=ctx.pid)
        control = inode >= CONTROL_BASE
        return FileInfo(fh=handle, keep_cache=not control and self._fs.keeps_pages(handle), direct_io=control)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        # The most frequent handler: no wrapper, and no await for what is on the local disk.
        try:
            data = self._fs.read_now(fh, off, size)
            return data if data is not None else await self._fs.read(fh, off, size)
        except Exception as problem:
            raise self.failed(problem, "read") from problem

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            return await self._fs.files.write(fh, off, buf)
        except Exception as problem:
            raise self.failed(problem, "write") from problem

    @guarded
    async def flush(self, fh: int) -> None:
        await self._fs.flush(fh)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._fs.fsync(fh)

    @guarded
    async def release(self, fh: int) -> None:
        self._fs.release(fh)

    @guarded
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        # default_permissions: the kernel decides by mode and owner, and does not ask.
        return True

    # -- extended attributes ------------------------------------------------------------------------------------

    def _need_xattr(self, inode: int) -> None:
        # ENOSYS tells the kernel never to ask again in this mount, which makes every write faster.
        if not self._xattr:
            raise FUSEError(errno.ENOSYS)
        if inode >= CONTROL_BASE:
            raise FUSEError(errno.EOPNOTSUPP)

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        self._need_xattr(inode)
        return self._fs.xattrs.get(inode, name)

    @guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        self._need_xattr(inode)
        return self._fs.xattrs.names(inode, trusted=ctx.uid == 0)

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        self._need_xattr(inode)
        self._refuse_control(inode)
        self._fs.xattrs.set(inode, name, value)

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self._need_xattr(inode)
        self._refuse_control(inode)
        self._fs.xattrs.remove(inode, name)


SYMLINK_MODE = 0o120777


def pyfuse_dir(mode: int) -> int:
    """Mode of a new directory."""
    return 0o040000 | (mode & 0o7777)


def is_regular(mode: int) -> bool:
    """Whether a mknod mode means a regular file."""
    return mode & 0o170000 in (0, 0o100000)


class Kernel:
    """Tells the kernel what to forget, in its own thread, since that may wait for the kernel."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[int](float("inf"))

    def entry(self, parent: int, name: str) -> None:
        """Forget an entry."""
        pyfuse3.invalidate_entry_async(parent, name.encode(), ignore_enoent=True)

    def attributes(self, fino: int) -> None:
        """Forget the attributes of an inode."""
        self._send.send_nowait(fino)

    async def run(self) -> None:
        """Hand invalidations of attributes to a thread, all that are queued at a time, until cancelled."""
        async for fino in self._receive:
            finos = {fino}  # a directory comes as often as it has new entries
            with contextlib.suppress(trio.WouldBlock):
                while True:
                    finos.add(self._receive.receive_nowait())
            await trio.to_thread.run_sync(_invalidate, finos, abandon_on_cancel=True)


def _invalidate(finos: set[int]) -> None:
    for fino in finos:
        try:
            pyfuse3.invalidate_inode(fino, attr_only=True)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the kernel has forgotten it already
                log.warning("could not invalidate inode %d: %s", fino, error)
