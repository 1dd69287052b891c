"""How much may be written to the spool: a disk that it shares with the registry must never be full. Loop only.

A registry that cannot commit could not strike off what is stored, so the spool would never become empty again, and
not even the next mount could start. So writers get ENOSPC while there is still room for the registry.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

RESERVE = 8 << 20
"""Bytes of the disk that are left to the registry: its write-ahead log (4 MiB) and what it grows while it drains."""
STEP = 64 << 20
"""At most so many bytes are written between two looks at the disk."""


class Room:
    """Room on the disk of the spool, counted down between two looks at it."""

    def __init__(self, spool_dir: Path, registry_path: Path) -> None:
        self._spool_dir = spool_dir
        self._registry_path = registry_path
        self._left = 0
        self._shared: bool | None = None

    def take(self, size: int) -> None:
        """``size`` bytes are about to be written. Raises OSError(ENOSPC)."""
        if size < self._left:
            self._left -= size
            return
        if self._shared is None:
            self._shared = os.stat(self._spool_dir).st_dev == os.stat(self._registry_path).st_dev
        if not self._shared:
            self._left = STEP
            return
        disk = os.statvfs(self._spool_dir)
        free = disk.f_bavail * disk.f_frsize - RESERVE - size
        if free < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Others write to the disk too: look again long before it is full.
        self._left = min(free // 4, STEP)
