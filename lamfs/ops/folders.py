"""Finds the files of a folder that is to be saved, by one rule for Python and the command line. Synchronous."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from lamfs.errors import InvalidArgument, LamfsError

Leave = Callable[[str, str], None]
"""Gets each path that is left out, and the reason."""


def files_below(
    folder: str | os.PathLike[str],
    *,
    follow_links: bool = False,
    left_out: Leave,
    failed: Callable[[LamfsError], None] | None = None,
) -> Iterator[tuple[Path, str]]:
    """Yields each regular file below a folder, in order: its path, and its path relative to ``folder``.

    ``left_out`` gets everything else: a link (unless ``follow_links``), a link that leads nowhere or to a folder above
    it, a device, a FIFO, a socket. ``failed`` gets the error of each path that cannot be read, and the walk goes on.
    Without ``failed`` that error is raised: InvalidArgument, with the errno of the system call.
    """
    yield from _walk(os.fspath(folder), "", follow_links, left_out, failed or _raise, ())


def unreadable(path: str | os.PathLike[str]) -> InvalidArgument | None:
    """Why a file cannot be read; None: it can be opened."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return _unreadable(os.fspath(path), error)
    return None


def _raise(error: LamfsError) -> None:
    raise error


def _walk(
    folder: str,
    relative: str,
    follow: bool,
    left_out: Leave,
    failed: Callable[[LamfsError], None],
    above: tuple[tuple[int, int], ...],
) -> Iterator[tuple[Path, str]]:
    try:
        here = os.stat(folder)
        names = sorted(os.listdir(folder))
    except OSError as error:
        failed(_unreadable(folder, error))
        return
    above = (*above, (here.st_dev, here.st_ino))
    for name in names:
        path, below = os.path.join(folder, name), f"{relative}{name}"
        try:
            found = os.lstat(path)
            is_link = stat.S_ISLNK(found.st_mode)
            if is_link and not follow:
                left_out(path, "a link")
                continue
            if is_link:
                try:
                    found = os.stat(path)
                except FileNotFoundError:
                    left_out(path, "a link that leads nowhere")
                    continue
        except OSError as error:
            failed(_unreadable(path, error))
            continue
        if stat.S_ISREG(found.st_mode):
            yield Path(path), below
        elif not stat.S_ISDIR(found.st_mode):
            left_out(path, "not a regular file")
        elif (found.st_dev, found.st_ino) in above:
            left_out(path, "a link to a folder that it is in")
        else:
            yield from _walk(path, f"{below}/", follow, left_out, failed, above)


def _unreadable(path: str, error: OSError) -> InvalidArgument:
    return InvalidArgument(
        f"{path} cannot be read ({os.strerror(error.errno or 0)}), so what is in it is not saved; look at its"
        " permissions, or leave it out.",
        errno=error.errno,
    )
