"""Opening what is below a folder, and nothing outside of it: component by component, without following links.

A folder that others have filled (a shared disk, an unpacked archive) may contain links to anywhere. The folder itself
is the user's choice, and links on the path to it are followed. Plain functions, any thread, blocking. All raise
OSError: ELOOP for a link, ENOTDIR for anything else that is not a directory, and the errors of open(2) and mkdir(2).
For a directory on the path, ``filename`` is its path below the root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
THROUGH = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
"""For a directory on the path: needs only search permission, and asks the file system to open nothing."""
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""Errors of link(2) on file systems without hard links."""


@contextlib.contextmanager
def directory(root: str | os.PathLike[str], parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """Descriptor of the directory at ``parts`` below ``root``, for the time of the block.

    With ``make`` missing directories are made (mode 0700), but never the root.
    """
    fd = open_directory(root, parts, make=make)
    try:
        yield fd
    finally:
        os.close(fd)


def open_directory(
    root: str | os.PathLike[str], parts: Sequence[str], *, make: bool = False, flags: int = DIRECTORY
) -> int:
    """As ``directory``; the caller closes the descriptor. ``flags``: DIRECTORY, or THROUGH."""
    fd = os.open(root, THROUGH if parts else flags)
    last = len(parts) - 1
    for depth, part in enumerate(parts):
        try:
            inner = _enter(fd, part, flags if depth == last else THROUGH, make)
        except OSError as error:
            error.filename = "/".join(parts[: depth + 1])
            raise
        finally:
            os.close(fd)
        fd = inner
    return fd


def _enter(fd: int, part: str, flags: int, make: bool) -> int:
    check_part(part)
    while True:
        try:
            return os.open(part, flags | os.O_NOFOLLOW, dir_fd=fd)
        except FileNotFoundError:
            if not make:
                raise
        except NotADirectoryError:
            refuse_link(part, fd)
            raise
        make = False
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o700, dir_fd=fd)


def open_file(fd: int, name: str, flags: int, mode: int = 0o600) -> int:
    """Open the file ``name`` in directory ``fd``. A link is ELOOP, whatever its target."""
    check_part(name)
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=fd)


def refuse_link(name: str, fd: int) -> None:
    """Raise ELOOP if ``name`` in directory ``fd`` is a link. (open(2) reports ENOTDIR if it expects a directory.)"""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, "it is a link, and links are not followed here", name)


def check_part(part: str) -> None:
    """Raise OSError(EINVAL) unless ``part`` can be the name of one entry of a directory."""
    if part in ("", ".", "..") or "/" in part or "\0" in part:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), part)
