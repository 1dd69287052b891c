"""Turning a process into a mover, whether it was forked or started anew. Before it has threads."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys

from lamfs.printable import LogFormatter

NAME = "lamfs-mover"
"""Shown by ps(1) and top(1)."""
_libc = ctypes.CDLL(None)
_M_ARENA_MAX = -8
"""Of mallopt(3)."""


def become_mover() -> None:
    """Leave terminal and session, log warnings to stderr, set the name, and share memory between threads."""
    with contextlib.suppress(PermissionError):  # it is a session leader already
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with open("/proc/self/comm", "w") as comm:
        comm.write(NAME)
    # Python has no stderr if it was closed where the daemon was started. The daemon has put its log there.
    stream = sys.stderr or open(2, "w", buffering=1, closefd=False)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("lamfs").setLevel(logging.NOTSET)
    # By default each thread keeps the memory that it once needed. Not every C library has this option.
    with contextlib.suppress(AttributeError):
        _libc.mallopt(_M_ARENA_MAX, 2)


def give_memory_back() -> None:
    """Return freed memory from the C library to the kernel (malloc_trim(3)), where that works."""
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(0)
