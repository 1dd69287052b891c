"""The file system of one mount, FUSE-free: what fuse/operations.py and tests call. Loop only.

Joins names, files, control files and extended attributes behind one interface. It adds what belongs to none of them:
attributes, directory handles, forget, statfs. Inodes here are FUSE inode numbers.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lamfs.errors import FsError, NotFound
from lamfs.fs.context import Context
from lamfs.fs.control import NAME as CONTROL_NAME
from lamfs.fs.control import Control
from lamfs.fs.files import Files
from lamfs.fs.names import Names
from lamfs.fs.nodes import CONTROL_BASE
from lamfs.fs.spooling import Spooling
from lamfs.fs.xattrs import Xattrs
from lamfs.model import ROOT_INO, Inode, now_ns
from lamfs.work import refused

PIB = 1 << 50
COUNT_SHARE = 50
"""statfs counts the artifacts again after so many times the time that counting took."""
MAX_NS = (1 << 63) - 1
WITH_CONTENT = ("mtime_ns", "ctime_ns")
"""Attributes that are always saved when written bytes are acknowledged."""


@dataclass(slots=True)
class Changes:
    """What setattr changes; None leaves a field alone. Times in nanoseconds since the epoch."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Space(NamedTuple):
    """statvfs(3) of the mount, in blocks of ``block`` bytes."""

    block: int
    blocks: int
    free: int
    files: int
    files_free: int


@dataclass(slots=True)
class Scan:
    """An open directory. Entries newer than ``last`` are not shown.

    So a program that renames or makes files while it reads the directory comes to an end.
    """

    directory: int
    last: int = 0


class FileSystem:
    """Everything a kernel asks of one mount."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.spooling = Spooling(context)
        self.names = Names(context)
        self.files = Files(context, self.spooling)
        self.control = Control(context)
        self.xattrs = Xattrs(context)
        self._scans: dict[int, Scan] = {}
        self._next_scan = 1
        context.uploader.attach(self.spooling)
        self._counted = (0, 0)
        self._count_again = 0.0

    # -- inodes -------------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> tuple[int, Inode] | None:
        """Inode and attributes of an entry, one lookup counted; None when there is none."""
        if parent >= CONTROL_BASE:
            return self.control.lookup(parent, name)
        if parent == ROOT_INO and name == CONTROL_NAME:
            return self.control.top()
        return self.names.lookup(parent, name)

    def forget(self, forgotten: list[tuple[int, int]]) -> None:
        """The kernel forgets ``count`` lookups of each inode."""
        for fino, count in forgotten:
            if fino < CONTROL_BASE:
                self.context.nodes.forget(fino, count)

    def getattr(self, fino: int) -> Inode:
        """Attributes. Raises FsError(ESTALE)."""
        if fino >= CONTROL_BASE:
            return self.control.attributes(fino)
        return self.context.inode(fino)

    async def setattr(self, fino: int, changes: Changes, *, pid: int = 0) -> Inode:
        """chmod, chown, utimensat, truncate by thread ``pid``. Raises FsError, OSError (ENOSPC)."""
        if fino >= CONTROL_BASE:
            raise FsError(errno.EPERM)
        if self.context.policy.read_only:
            raise FsError(errno.EROFS)
        if changes.size is not None:
            await self.files.truncate(fino, changes.size, pid=pid)
        inode = self.context.inode(fino)
        columns: dict[str, int] = {}
        if changes.mode is not None:
            columns["mode"] = (inode.mode & ~0o7777) | (changes.mode & 0o7777)
        for name in ("uid", "gid", "atime_ns", "mtime_ns"):
            value = getattr(changes, name)
            if value is not None:
                # A time that cannot be stored becomes the nearest one that can (1677 to 2262), as on Linux.
                columns[name] = max(-MAX_NS, min(value, MAX_NS))
        if columns or changes.size is None:
            # No change at all is chown(2) with neither owner nor group: Linux updates ctime for that.
            columns["ctime_ns"] = now_ns()
            ino = self.context.nodes.ino(fino)
            if changes.atime_ns is not None:
                self.context.atimes.forget(ino)
            state = self.context.states.get(fino)
            if state is not None and state.will_be_acknowledged():
                state.unsaved |= {name: value for name, value in columns.items() if name not in WITH_CONTENT}
            elif ino not in self.context.nodes.ghosts:
                self.context.verbs.attributes.set_attributes(ino, **columns)
            if state is not None:
                state.accessed = False
            for target in {id(i): i for i in (inode, state.inode if state else inode)}.values():
                for name, value in columns.items():
                    setattr(target, name, value)
        return self.context.inode(fino)

    # -- directories --------------------------------------------------------------------------------------------

    def opendir(self, directory: int) -> int:
        """A handle for reading a directory."""
        number = self._next_scan
        self._next_scan += 1
        self._scans[number] = Scan(directory)
        self.context.uploader.opened()
        return number

    def readdir(self, handle: int, cookie: int) -> Iterator[tuple[int, bytes, int, Inode]]:
        """As ``entries``, of what was there when reading began or was rewound (cookie 0)."""
        scan = self._scans[handle]
        if cookie == 0 or not scan.last:  # seekdir(3) may come before all reading
            scan.last = self.context.registry.tree.newest_cookie()
            if scan.directory < CONTROL_BASE:
                self.context.atimes.read(self.context.inode(scan.directory))
        return self.entries(scan.directory, cookie, scan.last)

    def releasedir(self, handle: int) -> None:
        """The directory is closed."""
        self._scans.pop(handle, None)

    async def fsyncdir(self, handle: int) -> None:
        """fsync(2) of a directory: changes of its entries are durable, in order. Its files have their own fsync."""
        if self._scans[handle].directory < CONTROL_BASE:
            await self.context.uploader.durable()

    def entries(self, directory: int, cookie: int, last: int | None = None) -> Iterator[tuple[int, bytes, int, Inode]]:
        """(cookie, name, inode, attributes) of what follows ``cookie`` in a directory. Counts no lookups.

        ``last``: the registry's cookie of the newest entry to return.
        """
        if directory >= CONTROL_BASE:
            return self.control.entries(directory, cookie)
        return self.names.entries(directory, cookie, last)

    def entry_taken(self, name: bytes, fino: int, inode: Inode) -> None:
        """The kernel has got an entry of ``entries``: that counts as a lookup, but not for ``.`` and ``..``."""
        if fino < CONTROL_BASE and name not in (b".", b".."):
            self.context.nodes.looked_up(fino, inode.revision)

    # -- handles ------------------------------------------------------------------------------------------------

    async def open(self, fino: int, flags: int, *, privileged: bool = True, pid: int = 0) -> int:
        """Open a file. Returns the handle. ``privileged`` and ``pid`` as in Files.open."""
        if fino >= CONTROL_BASE:
            return self.control.open(fino, flags)
        self.context.uploader.opened()
        return await self.files.open(fino, flags, privileged=privileged, pid=pid)

    def keeps_pages(self, handle: int) -> bool:
        """Whether the kernel may keep the file's pages across this open.

        Not when reading them should update the access time: then the first read must come here.
        """
        return self.files.keeps_pages(handle)

    async def read(self, handle: int, offset: int, size: int) -> bytes:
        """Read from a handle."""
        if handle >= CONTROL_BASE:
            return self.control.read(handle, offset, size)
        return await self.files.read(handle, offset, size)

    def read_now(self, handle: int, offset: int, size: int) -> bytes | None:
        """Read what is here already, without waiting. None: await ``read``."""
        if handle >= CONTROL_BASE:
            return self.control.read(handle, offset, size)
        return self.files.read_now(handle, offset, size)

    async def flush(self, handle: int) -> None:
        """close(2) of one descriptor."""
        if handle < CONTROL_BASE:
            await self.files.flush(handle)

    async def fsync(self, handle: int) -> None:
        """fsync(2), fdatasync(2)."""
        if handle < CONTROL_BASE:
            await self.files.fsync(handle)

    def release(self, handle: int) -> None:
        """The last descriptor is closed."""
        if handle >= CONTROL_BASE:
            self.control.release(handle)
        else:
            self.files.release(handle)

    async def sync_all(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Everything written so far is in storage and in the registry. As Uploader.drain.

        Nothing is pending afterwards but what ``refused`` says, and what is returned.
        """
        self.files.acknowledge_all()
        return await self.context.uploader.drain(progress)

    async def sync_below(self, key: str, progress: Callable[[int, int], None]) -> None:
        """As Files.sync_below, by key. Raises NotFound."""
        found = self.context.registry.tree.resolve(key)
        if found is None:
            raise NotFound(f"There is no '{key}' in this mount.")
        await self.files.sync_below(found.ino, progress)

    def refused(self) -> str | None:
        """A sentence about files that storage can never take; None: there are none."""
        found = self.context.registry.journal.refused()
        return refused.sentence(self.context.registry, found) if found else None

    # -- the whole ----------------------------------------------------------------------------------------------

    def statfs(self) -> Space:
        """Size and free space of the storage: the disk of a local folder; a bucket has no end, so 1 PiB is free."""
        files, used = self._totals()
        if self.context.store.on_disk:
            info = os.statvfs(self.context.store.config.root)
            return Space(info.f_frsize, info.f_blocks, info.f_bavail, files + info.f_favail, info.f_favail)
        used = (used + 4095) // 4096
        return Space(4096, used + PIB // 4096, PIB // 4096, files + (1 << 32), 1 << 32)

    def _totals(self) -> tuple[int, int]:
        """Number of artifacts and their bytes. Counting many takes long, so it is done seldom."""
        if time.monotonic() >= self._count_again:
            begin = time.monotonic()
            artifacts = self.context.registry.artifacts
            self._counted = artifacts.count(), artifacts.total_bytes()
            self._count_again = begin + COUNT_SHARE * (time.monotonic() - begin)
        return self._counted
