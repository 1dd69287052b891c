"""Opening what lies below a folder, and nothing outside of it: component by component, following no links.

A folder that others have filled (a shared disk, an unpacked archive) may hold links to anywhere. The folder itself is
the user's choice, and links on the way to it are followed. Plain functions, any thread, blocking. All raise OSError:
ELOOP for a link, ENOTDIR for what is no directory, and what open(2) and mkdir(2) say.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def directory(root: str | os.PathLike[str], parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """Descriptor of the directory at ``parts`` below ``root``, for the time of the block.

    With ``make`` missing directories are made (mode 0700), never the root.
    """
    fd = open_directory(root, parts, make=make)
    try:
        yield fd
    finally:
        os.close(fd)


def open_directory(root: str | os.PathLike[str], parts: Sequence[str], *, make: bool = False) -> int:
    """As ``directory``; the descriptor is the caller's to close."""
    fd = os.open(root, DIRECTORY)
    try:
        for part in parts:
            inner = _enter(fd, part, make)
            os.close(fd)
            fd = inner
    except BaseException:
        os.close(fd)
        raise
    return fd


def _enter(fd: int, part: str, make: bool) -> int:
    check_part(part)
    try:
        return os.open(part, DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    except FileNotFoundError:
        if not make:
            raise
    except NotADirectoryError:
        refuse_link(part, fd)
        raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(part, 0o700, dir_fd=fd)
    return os.open(part, DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)


def open_file(fd: int, name: str, flags: int, mode: int = 0o600) -> int:
    """Open the file ``name`` in directory ``fd``. A link is ELOOP, whatever it leads to."""
    check_part(name)
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=fd)


def refuse_link(name: str, fd: int) -> None:
    """Raise ELOOP when ``name`` in directory ``fd`` is a link: open(2) says ENOTDIR of it when it wants a directory."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, "it is a link, and links are not followed here", name)


def check_part(part: str) -> None:
    """Raise OSError(EINVAL) for what is not the name of one entry of a directory."""
    if part in ("", ".", "..") or "/" in part or "\0" in part:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), part)
