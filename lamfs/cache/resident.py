"""Whether bytes of a file are in the kernel's memory: mincore(2). Plain function, any thread."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

_FAILED = ctypes.c_void_p(-1).value
_ODD = bytes(number & 1 for number in range(256))
"""Only the lowest bit of mincore's answer for a page has a meaning."""


def is_resident(fd: int, offset: int, length: int) -> bool:
    """Whether all pages of a range, which starts at a page, are in memory. False when the kernel does not tell.

    It does not tell about files of another user.
    """
    if not length:
        return True
    libc = _libc()
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address in (None, _FAILED):
        return False
    try:
        pages = -(-length // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        if libc.mincore(address, length, found) != 0:
            return False
        return bytes(found).translate(_ODD).count(1) == pages
    finally:
        libc.munmap(address, length)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
