"""Holes in cache files, and the locks that make punching them safe. Plain functions on descriptors, any thread.

A block that is punched reads as zeros, so nobody else may believe that it is there. Whoever has a cache file of more
than a region open holds a shared lock on it, for as long as the descriptor is open; only who has it alone punches. The
locks are those of the open file description (fcntl(2), F_OFD_SETLK): unlike flock's they can be exchanged for one
another without being let go in between, and unlike fcntl's own they do not end when the process closes another
descriptor. A file system without them has no holes punched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import time

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, len (0: to the end), pid
_HELD = frozenset({errno.EAGAIN, errno.EACCES})
WAIT_SECONDS = 0.05
"""How long another process may take to punch a few holes while this one opens the file."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def share(fd: int) -> bool:
    """Take the shared lock, or exchange the exclusive one for it. False when another process is punching for long."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            _lock(fd, fcntl.F_RDLCK)
            return True
        except OSError as error:
            if error.errno not in _HELD:
                return True  # no locks here: then nobody gets the exclusive one either
            if time.monotonic() > end:
                return False
            time.sleep(0.001)


def have_alone(fd: int) -> bool:
    """Take the exclusive lock, or exchange the shared one for it; False, and nothing changed, if others have a lock."""
    try:
        _lock(fd, fcntl.F_WRLCK)
    except OSError:
        return False
    return True


def let_go(fd: int) -> None:
    """Give the lock up before the descriptor is closed, which may take a while."""
    with contextlib.suppress(OSError):
        _lock(fd, fcntl.F_UNLCK)


def work(fd: int) -> bool:
    """Whether holes can be punched into a file: tries it behind its end, where nothing is."""
    try:
        punch(fd, os.fstat(fd).st_size, 1 << 20)
    except OSError:
        return False
    return True


def punch(fd: int, offset: int, length: int) -> None:
    """Give the disk space of a range back; it reads as zeros then. Raises OSError (EOPNOTSUPP …)."""
    if _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _lock(fd: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
