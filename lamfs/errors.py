"""Domain errors. Each carries the errno for the mount. The CLI prints the message as it is.

A message has one or two sentences: the thing, the cause, and the next step. Pure: nothing here does I/O.
"""

from __future__ import annotations

import errno
import os


class LamfsError(Exception):
    """Base of every error that lamfs raises on purpose.

    ``errno``: what a system call on the mount returns for it (a class default, or given per instance).
    """

    errno: int = errno.EIO

    def __init__(self, message: str = "", *, errno: int | None = None) -> None:
        if errno is not None:
            self.errno = errno
        super().__init__(message or os.strerror(self.errno))


class FsError(LamfsError):
    """A POSIX error whose errno says everything: ``FsError(errno.ENOTEMPTY)``."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message, errno=number)


class NotFound(LamfsError):
    """There is no artifact, key, instance or path with that name."""

    errno = errno.ENOENT


class FileMissing(NotFound, FileNotFoundError):  # type: ignore[misc]
    """The file that was to be saved does not exist."""


class AlreadyExists(LamfsError):
    """The name is taken."""

    errno = errno.EEXIST


class InvalidName(LamfsError, ValueError):
    """A key or file name that the registry refuses (encoding, length, ``..``, NUL, reserved prefix)."""

    errno = errno.EINVAL


class InvalidArgument(LamfsError, ValueError):
    """A wrong argument to the Python API or the CLI."""

    errno = errno.EINVAL


class NotSetUp(LamfsError):
    """No instance is connected, nobody is logged in, or a directory that must exist does not."""

    errno = errno.ENOENT


class NotEmpty(LamfsError):
    """The thing still has artifacts or entries, and force was not given."""

    errno = errno.ENOTEMPTY


class RegistryError(LamfsError):
    """The SQLite registry cannot be read or written (damaged, newer schema, disk full)."""

    errno = errno.EIO


class DamagedRegistry(RegistryError):
    """A registry file, here or in storage, is not what was written: empty, cut, older, or of another instance. It is
    never used, and never replaces a good one."""


class Locked(LamfsError):
    """Another machine holds the lease on the instance."""

    errno = errno.EBUSY


class LeaseLost(Locked):
    """This machine held the lease and has lost it: another machine took over."""

    errno = errno.EIO


class TooLarge(LamfsError):
    """A file has more bytes than storage can ever take."""

    errno = errno.EFBIG


class StorageError(LamfsError):
    """Storage answered with an error, or did not answer. ``retryable``: whether trying again can help."""

    errno = errno.EIO
    retryable: bool = False


class StorageUnavailable(StorageError):
    """No answer, a reset connection, a 5xx, a body cut short: worth retrying."""

    retryable = True


class StorageMissing(StorageError):
    """The bucket or the storage folder does not exist."""

    errno = errno.ENOENT


class StorageForbidden(StorageError):
    """Storage refuses these credentials."""

    errno = errno.EACCES


class StorageReadOnly(StorageError):
    """Storage can be read but not written."""

    errno = errno.EROFS


class StorageFull(StorageError):
    """No space, or a quota is used up."""

    errno = errno.ENOSPC
    retryable = True


class ObjectMissing(StorageError):
    """There is no object under that key."""

    errno = errno.EIO


class ObjectChanged(StorageError):
    """The object is not the requested revision (ETag mismatch, HTTP 412)."""

    errno = errno.ESTALE


class PreconditionFailed(StorageError):
    """A conditional write failed: the object exists (``If-None-Match: *``) or has changed (``If-Match``)."""

    errno = errno.EEXIST


class UploadGone(StorageUnavailable):
    """The multipart upload no longer exists: completed, aborted, or removed by the bucket's owner."""


class DamagedData(StorageError):
    """Bytes whose BLAKE3 differs from the one recorded at save."""

    errno = errno.EIO


class TransferDied(LamfsError):
    """The process that moves bytes ended while a job was under way. The job may be tried again."""

    errno = errno.EIO
