"""Local files as storage handles them: OSError into domain errors (the one seam), and copying whole files.

Plain functions without state, for any thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable

from lamfs import copying
from lamfs.errors import (
    LamfsError,
    ObjectMissing,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
)
from lamfs.storage.signs import sign

FICLONE = 0x40049409
"""ioctl of linux/fs.h: share the extents of another file (btrfs, XFS, bcachefs)."""

COPY_CHUNK = 4 << 20
"""Bytes per copy_file_range or read, so that progress shows."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})
_GONE_AWAY = frozenset(
    {
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    }
)
"""What a network or FUSE file system below the folder answers while its server is away."""

_NO_RANGE_COPY = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF, errno.ETXTBSY, errno.EIO}
)
"""copy_file_range refuses: another kind of file system, an old kernel, a seccomp filter, or procfs. An EIO that is
real comes again from the plain read."""


def storage_error(error: OSError, name: str, root: str) -> LamfsError:
    """The domain error for an OSError on ``name`` (a path) in the storage folder ``root``."""
    number = error.errno or errno.EIO
    cause = os.strerror(number)
    if number in _FULL:
        return StorageFull(
            f"No space is left for '{name}' in the storage {root} ({cause}); free some space or raise the quota.",
            errno=number,
        )
    if number == errno.EROFS:
        return StorageReadOnly(f"The storage {root} is read-only, so '{name}' cannot be written; remount it writable.")
    if number in _FORBIDDEN:
        return StorageForbidden(
            f"'{name}' in the storage {root} is refused ({cause}); check owner and permissions of the folder."
        )
    if number in _GONE_AWAY:
        return StorageUnavailable(
            f"The file system of the storage {root} does not answer for '{name}' ({cause}); check its server or mount."
        )
    if number == errno.ENOENT:
        return ObjectMissing(f"There is no object '{name}' in the storage {root}; it was deleted or never stored.")
    if number == errno.ENAMETOOLONG:
        return StorageError(f"The name '{name}' is too long for the file system of {root}; shorten it.", errno=number)
    if number == errno.ELOOP:
        link = error.filename if isinstance(error.filename, str) else name
        refused = "" if link == name else f" and '{name}' is refused"
        return StorageError(
            f"'{link}' in the storage {root} is a link{refused}: lamfs follows no links below a storage, because they"
            " may lead to any file of yours; put the file or folder itself there.",
            errno=number,
        )
    if number in (errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
        return StorageError(
            f"'{name}' cannot be stored in {root}: a file and a folder would share a name ({cause}); rename one.",
            errno=number,
        )
    return StorageError(
        f"'{name}' in the storage {root} failed: {cause}; look at the disk and the kernel log.", errno=number
    )


def source_error(error: OSError, path: str) -> LamfsError:
    """The domain error for an OSError on a file outside of the storage that was to be stored."""
    number = error.errno or errno.EIO
    return StorageError(
        f"The file '{path}' that was to be stored cannot be read: {os.strerror(number)}; check that it is there and"
        " readable.",
        errno=number,
    )


def write_fetched(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite bytes that came from storage into a file of the cache. Raises StorageFull or StorageError."""
    try:
        copying.write_full(fd, data, offset)
    except OSError as error:
        number = error.errno or errno.EIO
        if number in _FULL:
            raise StorageFull(
                f"No space is left for fetched data ({os.strerror(number)}); free space where the cache is, or"
                " lower its limit.",
                errno=number,
            ) from error
        raise StorageError(
            f"Fetched data cannot be written to the cache: {os.strerror(number)}; look at the cache directory.",
            errno=number,
        ) from error


def copy_contents(source: int, target: int, size: int, progress: Callable[[int], None] | None = None) -> None:
    """Make the empty file ``target`` hold the first ``size`` bytes of ``source`` (both open descriptors).

    Shares extents where the file system can, else copies inside the kernel, else through this process; holes stay
    holes. ``progress`` gets byte counts that add up to ``size``. Moves the file offset of ``source``. Raises OSError,
    and EOFError when the source is shorter than ``size``.
    """
    if os.fstat(source).st_size == size and _clone(source, target):
        if progress is not None and size:
            progress(size)
        return
    os.ftruncate(target, size)
    position = 0
    in_kernel = True
    while position < size:
        start, end = _next_extent(source, position, size)
        if progress is not None and start > position:
            progress(start - position)
        position = start
        while position < end:
            want = min(COPY_CHUNK, end - position)
            done = _copy_in_kernel(source, target, position, want) if in_kernel else 0
            if done == 0:
                in_kernel = False
                done = _copy_through(source, target, position, want)
            position += done
            sign()
            if progress is not None:
                progress(done)


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in _FULL:
            raise
        return False
    return True


def _next_extent(fd: int, position: int, size: int) -> tuple[int, int]:
    """Bounds of the next data at or after ``position``; ``(size, size)`` when only a hole follows."""
    try:
        start = os.lseek(fd, position, os.SEEK_DATA)
        end = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO and os.fstat(fd).st_size >= size:
            return size, size
        return position, size  # no such seek here, or the file is shorter: the copy finds out
    return min(start, size), min(end, size)


def _copy_in_kernel(source: int, target: int, position: int, want: int) -> int:
    try:
        return os.copy_file_range(source, target, want, position, position)
    except OSError as error:
        if error.errno not in _NO_RANGE_COPY:
            raise
        return 0


def _copy_through(source: int, target: int, position: int, want: int) -> int:
    data = os.pread(source, want, position)
    if not data:
        raise EOFError(f"the file ended at byte {position}")
    copying.write_full(target, data, position)
    return len(data)


def sync(fd: int) -> None:
    """Make a file's bytes durable, as fsync(2) does, with a sign (signs.py) for each piece. Raises OSError."""
    copying.write_out(fd, sign)
    os.fsync(fd)


def fsync_folder(path: str) -> None:
    """Make the entries of a folder durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync_directory(fd)
    finally:
        os.close(fd)


def fsync_directory(fd: int) -> None:
    """As fsync_folder. File systems that cannot (EINVAL) are taken as doing it by themselves."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
