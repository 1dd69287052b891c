"""A user's own file that becomes the content of an artifact. It may change, or disappear, at any time."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from lamfs.errors import FileMissing, InvalidArgument, StorageError
from lamfs.model import ContentHash
from lamfs.work.reading import hash_opened
from lamfs.work.worker import Worker

TRIES = 3
"""Times that a file which is being written is read."""

Stamp = tuple[int, ...]
"""Changes when a file is written: size, times, inode and device."""


@dataclass(slots=True)
class Source:
    """The file at ``path``. ``stamp``: its stamp_of when it was hashed. ``temporary``: the file is lamfs's own, and may
    be renamed into storage."""

    path: Path
    stamp: Stamp
    temporary: bool = False

    @property
    def mode(self) -> int:
        """The permissions for the artifact's file. Raises like check_file."""
        return 0o644 if self.temporary else check_file(self.path).stat().st_mode & 0o777

    async def rehash(self, worker: Worker) -> ContentHash | None:
        """The hash of the file now; None: it was not written since it was hashed. Raises like check_file and
        hash_stable."""
        check_file(self.path)
        if stamp_of(self.path) == self.stamp:
            return None
        content, self.stamp = await hash_stable(worker, self.path)
        return content

    def changed(self) -> bool:
        """Whether the file was written since it was hashed. False for a temporary file, which may have been renamed.
        Raises InvalidArgument if the file is gone."""
        try:
            return not self.temporary and stamp_of(self.path) != self.stamp
        except OSError as error:
            raise _unreadable(self.path, error, error.errno) from error


def check_file(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a regular file. Raises FileMissing, InvalidArgument."""
    source = Path(os.path.abspath(os.path.expanduser(path)))
    try:
        mode = source.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileMissing(f"There is no file {source}; check the path.") from None
    except OSError as error:
        raise _unreadable(source, error, error.errno) from error
    if stat.S_ISDIR(mode):
        raise InvalidArgument(
            f"{source} is a directory; Artifact.from_dir(path, key=…) makes one artifact of each file in it."
        )
    if not stat.S_ISREG(mode):
        raise InvalidArgument(f"{source} is no regular file; only regular files become artifacts.")
    return source


async def hash_stable(worker: Worker, path: Path) -> tuple[ContentHash, Stamp]:
    """Hash a file that is not being written. Returns the hash and the file's stamp, the same before and after.

    Raises InvalidArgument if it changes all the time, or cannot be read.
    """
    for _ in range(TRIES):
        try:
            before = stamp_of(path)
            content = await hash_opened(worker, os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # also behind a link
            if stamp_of(path) == before:
                return content, before
        except OSError as error:
            raise _unreadable(path, error, error.errno) from error
        except StorageError as error:
            if isinstance(error.__cause__, EOFError):
                continue  # it became shorter
            raise _unreadable(path, error.__cause__ or error, error.errno) from error
    raise being_written(path)


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file. Raises OSError."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def being_written(path: Path) -> InvalidArgument:
    """The error for a file that changes all the time."""
    return InvalidArgument(f"The file {path} is being written; save it when that is done.")


def _unreadable(path: Path, why: BaseException, number: int | None) -> InvalidArgument:
    return InvalidArgument(f"The file {path} cannot be read: {str(why).rstrip('.')}.", errno=number)
