"""Holes in cache files, and the locks that make punching them safe. Plain functions on descriptors, any thread.

A punched block reads as zeros, so nobody may believe that it is there. A process that has a cache file of more than one
region open holds a shared lock on it, for as long as the descriptor is open. Only a process that gets the exclusive
lock punches.

The locks belong to the open file description (fcntl(2), F_OFD_SETLK). Unlike flock's, they can be upgraded and
downgraded without being released in between. Unlike fcntl's own, they do not end when the process closes another
descriptor. On a file system without them, no holes are punched.
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
"""Seconds to wait for another process that punches holes while this one opens the file."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def share(fd: int) -> bool:
    """Get the shared lock, or downgrade the exclusive one to it. False: another process keeps punching."""
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
    """Get the exclusive lock, or upgrade the shared one to it. False, and nothing changed, if others have a lock."""
    try:
        _lock(fd, fcntl.F_WRLCK)
    except OSError:
        return False
    return True


def let_go(fd: int) -> None:
    """Release the lock before the descriptor is closed, which may take a while."""
    with contextlib.suppress(OSError):
        _lock(fd, fcntl.F_UNLCK)


def work(fd: int) -> bool:
    """Whether holes can be punched into a file. Tries it behind the file's end, where nothing is."""
    try:
        punch(fd, os.fstat(fd).st_size, 1 << 20)
    except OSError:
        return False
    return True


def punch(fd: int, offset: int, length: int) -> None:
    """Free the disk space of a range, which then reads as zeros. Raises OSError (EOPNOTSUPP …)."""
    if _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _lock(fd: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
