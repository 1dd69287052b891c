"""Local files as storage uses them: OSError becomes a domain error (the one seam), and files become durable.

Plain functions without state, for any thread.
"""

from __future__ import annotations

import errno
import os

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
"""Errors of a network or FUSE file system below the folder while its server is away."""


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
    """The domain error for an OSError on a file outside of the storage that is to be stored."""
    number = error.errno or errno.EIO
    return StorageError(
        f"The file '{path}' that was to be stored cannot be read: {os.strerror(number)}; check that it is there and"
        " readable.",
        errno=number,
    )


def write_fetched(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite fetched bytes into a file of the cache. Raises StorageFull or StorageError."""
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


def sync(fd: int) -> None:
    """Make a file's bytes durable, as fsync(2) does, with a sign of life (signs.py) for each piece. Raises OSError."""
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
    """As fsync_folder. A file system that cannot do it (EINVAL) is assumed to do it by itself."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
