"""Moves files that were written into a mount point's own folder, while nothing was mounted there, into the mount.

Each file is copied through the mount, under the same path. The source is removed when the copy is in storage (fsync)
and was read back with the same bytes. So a crash at any point loses nothing: the source is there, or its copy is. The
next run finds the copy and removes the source. A name that the mount has already stays as it is; the new file gets a
conflict name beside it. Links are moved, not followed. Plain functions with threads of their own; blocking.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from lamfs.beneath import DIRECTORY
from lamfs.keys import conflict_name

WORKERS = 8
"""Files of one directory that are moved at a time: each waits for storage."""
CHUNK = 1 << 20
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_RENAME_NOREPLACE = 1


class _NotStored(OSError):
    """Storage does not take a copy, so it will not take others either."""


@dataclass(slots=True)
class Moved:
    """The outcome. Names are relative to the folder; ``bytes`` of regular files."""

    files: int = 0
    bytes: int = 0
    beside: list[tuple[str, str]] = field(default_factory=list)
    """Names that the mount had already, and the names that the files got instead."""
    special: list[tuple[str, str]] = field(default_factory=list)
    """Entries that are neither file, link nor directory stay in the folder: name, and what they are."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """Entries that stay in the folder because of an error: name, and error."""
    bare: int = 0
    """Files whose extended attributes the mount does not take."""


def move_in(folder: int, mountpoint: str, progress: Callable[[int], None] = lambda _: None) -> Moved:
    """Move the contents of ``folder``, a descriptor that was opened before the mount, into the mount above it.

    ``progress`` gets copied bytes, from any thread. Raises OSError when the mount cannot be used.
    """
    with contextlib.suppress(ValueError):  # not in the main thread: then nobody hears the signal
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent when another process wants to break a file lease
    top = os.open(mountpoint, DIRECTORY)
    try:
        if os.fstat(top).st_dev == os.fstat(folder).st_dev:
            raise OSError(errno.ENOTCONN, "nothing is mounted there", mountpoint)
        move = _Move(os.fstat(folder).st_dev, progress)
        with ThreadPoolExecutor(WORKERS) as pool:
            move.directory(folder, top, "", pool)
        return move.moved
    finally:
        os.close(top)


class _Move:
    """One run. Its threads share ``moved``."""

    def __init__(self, device: int, progress: Callable[[int], None]) -> None:
        self.moved = Moved()
        self._device = device
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped: str | None = None

    def directory(self, source: int, target: int, place: str, pool: ThreadPoolExecutor) -> None:
        """Move the contents of a directory: first its files, then its directories."""
        found = [(name, os.lstat(name, dir_fd=source)) for name in sorted(os.listdir(source))]
        folders = [(name, info) for name, info in found if stat.S_ISDIR(info.st_mode)]
        others = [(name, info) for name, info in found if not stat.S_ISDIR(info.st_mode)]
        for future in [pool.submit(self._try, self._file, source, target, place, *each) for each in others]:
            future.result()
        for name, info in folders:
            self._try(partial(self._folder, pool), source, target, place, name, info)
        if others:
            os.fsync(source)

    def _try(self, work: Callable[..., None], source: int, target: int, place: str, name: str, info: object) -> None:
        path = f"{place}{name}"
        try:
            if self._stopped is None:
                work(source, target, place, name, info)
                return
            problem = self._stopped
        except OSError as error:
            problem = error.strerror or str(error)
            if isinstance(error, _NotStored) or error.errno == errno.ENOTCONN:
                self._stopped = problem
        except ValueError as error:
            problem = str(error)  # a name that the registry does not take
        with self._lock:
            self.moved.failed.append((path, problem))

    def _folder(
        self, pool: ThreadPoolExecutor, source: int, target: int, place: str, name: str, info: os.stat_result
    ) -> None:
        if info.st_dev != self._device:
            raise OSError(errno.EXDEV, "another file system is mounted there")
        inner = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=source)
        try:
            there, made = self._make(target, place, name)
            new = os.open(there, DIRECTORY | os.O_NOFOLLOW, dir_fd=target)
            try:
                if made:
                    _dress(new, info, spare=0o700)
                self.directory(inner, new, f"{place}{name}/", pool)
                if os.listdir(inner):
                    return  # what stays in it has been noted
                if made:
                    _dress(new, info)
            finally:
                os.close(new)
            os.rmdir(name, dir_fd=source)
        finally:
            os.close(inner)

    def _make(self, target: int, place: str, name: str) -> tuple[str, bool]:
        """A directory of this name in the mount, or beside another entry with the name. Returns the name, and whether
        it is new."""
        for there in _names(name):
            try:
                os.mkdir(there, 0o700, dir_fd=target)
            except FileExistsError:
                if stat.S_ISDIR(os.lstat(there, dir_fd=target).st_mode):
                    return there, False
            else:
                self._note_name(place, name, there)
                return there, True
        raise AssertionError

    def _file(self, source: int, target: int, place: str, name: str, info: os.stat_result) -> None:
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFLNK:
            self._link(source, target, place, name, info)
        elif kind == stat.S_IFREG:
            self._regular(source, target, place, name)
        else:
            with self._lock:
                self.moved.special.append((f"{place}{name}", KINDS.get(kind, "no file")))

    def _link(self, source: int, target: int, place: str, name: str, info: os.stat_result) -> None:
        to = os.readlink(name, dir_fd=source)
        for there in _names(name):
            try:
                os.symlink(to, there, dir_fd=target)
            except FileExistsError:
                with contextlib.suppress(OSError):
                    if os.readlink(there, dir_fd=target) == to:
                        break
            else:
                with contextlib.suppress(PermissionError):
                    os.chown(there, info.st_uid, info.st_gid, dir_fd=target, follow_symlinks=False)
                os.utime(there, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=target, follow_symlinks=False)
                self._note_name(place, name, there)
                break
        _store(target)
        os.unlink(name, dir_fd=source)
        with self._lock:
            self.moved.files += 1

    def _regular(self, source: int, target: int, place: str, name: str) -> None:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        try:
            info = os.fstat(fd)
            _refuse_open(fd)
            # The same name each time: the next try overwrites what a crash has left.
            temp = f".{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}.lamfs-adopt"
            there = self._find_same(fd, info, target, name)
            if there is None:
                there = self._copy(fd, info, target, temp, name)
                self._note_name(place, name, there)
            now = os.fstat(fd)
            if (now.st_size, now.st_mtime_ns) != (info.st_size, info.st_mtime_ns):
                raise OSError(errno.EBUSY, "it was changed while it was copied")
            _refuse_open(fd)
            os.unlink(name, dir_fd=source)
        finally:
            os.close(fd)
        with self._lock:
            self.moved.files += 1
            self.moved.bytes += info.st_size

    def _find_same(self, fd: int, info: os.stat_result, target: int, name: str) -> str | None:
        """The durable file of this name in the mount, if it has the same bytes: an interrupted run has left it."""
        try:
            new = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=target)
        except OSError:
            return None
        try:
            found = os.fstat(new)
            if not stat.S_ISREG(found.st_mode) or found.st_size != info.st_size:
                return None
            _store(new)
            return name if _digest(new) == _digest(fd) else None
        finally:
            os.close(new)

    def _copy(self, fd: int, info: os.stat_result, target: int, temp: str, name: str) -> str:
        """Copy a file into the mount, and wait until storage has it. Returns the name that it got."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        new = os.open(temp, flags, 0o600, dir_fd=target)
        try:
            digest = hashlib.blake2b()
            offset = 0
            while data := os.pread(fd, CHUNK, offset):
                digest.update(data)
                view = memoryview(data)
                while view:
                    view = view[os.write(new, view) :]
                offset += len(data)
                self._progress(len(data))
            if not _copy_attributes(fd, new):
                with self._lock:
                    self.moved.bare += 1
            there = _rename_beside(target, temp, name)
            _store(new)
        except BaseException:
            os.close(new)
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=target)
            raise
        os.close(new)
        new = os.open(there, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target)
        try:
            # After the last write, which would change the times.
            _dress(new, info)
            os.posix_fadvise(new, 0, 0, os.POSIX_FADV_DONTNEED)
            if _digest(new) != digest.digest():
                raise OSError(errno.EBADMSG, "its copy in the mount does not have the same bytes")
        finally:
            os.close(new)
        return there

    def _note_name(self, place: str, name: str, there: str) -> None:
        if there != name:
            with self._lock:
                self.moved.beside.append((f"{place}{name}", f"{place}{there}"))


def _names(name: str) -> Iterator[str]:
    """Yields the name, and then names to try when it is taken, without end."""
    yield name
    at = datetime.now().strftime("%Y-%m-%d %H.%M.%S")
    yield conflict_name(name, at)
    for count in itertools.count(2):
        yield conflict_name(name, f"{at} {count}")


def _rename_beside(target: int, temp: str, name: str) -> str:
    """Rename to the first free name, without replacing anything. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for there in _names(name):
        if not libc.renameat2(target, os.fsencode(temp), target, os.fsencode(there), _RENAME_NOREPLACE):
            return there
        number = ctypes.get_errno()
        if number != errno.EEXIST:
            raise OSError(number, os.strerror(number))
    raise AssertionError


def _store(fd: int) -> None:
    """Return when a file of the mount is in storage. Raises OSError."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno == errno.EIO:
            raise _NotStored(errno.EIO, "storage does not take it; 'lamfs status' tells more") from error
        raise


def _refuse_open(fd: int) -> None:
    """Raise OSError (EBUSY) when another process may still write to a file: those bytes would be lost with it."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise OSError(errno.EBUSY, "a program has it open for writing") from None
        return  # a file system without leases, or another user's file
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _digest(fd: int) -> bytes:
    digest = hashlib.blake2b()
    offset = 0
    while data := os.pread(fd, CHUNK, offset):
        digest.update(data)
        offset += len(data)
    return digest.digest()


def _dress(fd: int, info: os.stat_result, *, spare: int = 0) -> None:
    """Copy owner (where permitted), mode (with ``spare`` bits more) and times."""
    with contextlib.suppress(PermissionError):
        os.fchown(fd, info.st_uid, info.st_gid)
    os.fchmod(fd, stat.S_IMODE(info.st_mode) | spare)
    os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))


def _copy_attributes(fd: int, new: int) -> bool:
    """Copy the user's extended attributes. Returns False when the mount does not take all of them."""
    kept = True
    try:
        names = [name for name in os.listxattr(fd) if name.startswith("user.")]
    except OSError:
        return True
    for name in names:
        try:
            os.setxattr(new, name, os.getxattr(fd, name))
        except OSError:
            kept = False
    return kept
