"""Back-pressure: writers slow down near the spool's limit, then wait for the uploader. Loop only.

The disk that the spool shares with the registry must never be full. A registry that cannot commit cannot remove the
rows of stored files: the spool would never drain, and not even the next mount could start. So writers get ENOSPC while
the registry still has space, but only if neither the uploader nor the cache can free any.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from lamfs.errors import FsError
from lamfs.spool import SpoolFolder
from lamfs.work.uploader import Uploader

RESERVE = 8 << 20
"""Bytes of the disk that are left to the registry: its log (4 MiB) and its growth while the spool drains."""
STEP = 64 << 20
"""Bytes that are written between two looks at disk and spool, at most."""
SOFT = 0.75
"""Share of the limit above which writers are slowed down."""
SLOW = 0.25
"""Seconds that a writer waits at each step just below the limit. Farther from it the wait is shorter."""
LOOK = 0.1
"""Seconds between two looks while a writer waits."""
FLOOR = (1 << 30, 0.02)
"""Without a setting: bytes, and share of the disk. Writers leave the smaller of the two free."""


class BackPressure:
    """Bytes that may be written to the spool, counted down between two looks at it.

    ``limit``: bytes in the spool. ``floor``: bytes of its disk that stay free (None: see FLOOR). Both apply only while
    the uploader can drain the spool. If storage is a folder on the same disk it cannot, and only ENOSPC is left.
    ``make_room`` evicts some of the cache; it returns False if nothing is left to evict.
    """

    def __init__(
        self,
        spool: SpoolFolder,
        registry_path: Path,
        uploader: Uploader,
        *,
        limit: int,
        floor: int | None,
        timeout: float,
        waits: bool,
        make_room: Callable[[], Awaitable[bool]],
    ) -> None:
        self._spool = spool
        self._registry_path = registry_path
        self._uploader = uploader
        self._limit = limit
        self._floor = floor
        self._timeout = timeout
        self._waits = waits
        self._make_room = make_room
        self._step = max(min(STEP, limit // 64), 1 << 16) if waits else STEP
        self._left = 0
        self._shared: bool | None = None
        self.waiting = 0
        """Writers that are waiting now."""

    def admit(self, size: int) -> bool:
        """Whether ``size`` bytes may be written now. False: await ``wait`` first."""
        if size < self._left:
            self._left -= size
            return True
        return False

    def check(self) -> None:
        """Raise OSError(ENOSPC) if the disk is full."""
        if self._free() < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def wait(self, size: int) -> None:
        """Return when ``size`` bytes may be written.

        Raises OSError(ENOSPC) when the disk is full and nothing can be freed; FsError(EIO) when storage fails and has
        accepted nothing for the mount's timeout while the spool was at its limit.
        """
        deadline, seen = trio.current_time() + self._timeout, self._progress()
        known = self._uploader.fresh.value()
        failed = self._uploader.failed_tries  # on a slow link a part may take longer than the timeout
        waiting = False
        try:
            while True:
                free = self._free() - size
                share = await self._share(size, free)
                drains = self._waits and self._uploader.can_drain()
                if free >= 0 and (share < 1.0 or not drains):
                    # Others write to the disk too: look again long before it is full.
                    self._left = min(free // 4, self._step)
                    if drains and share > SOFT:
                        await trio.sleep(SLOW * (share - SOFT) / (1 - SOFT))
                    return
                if free < 0 and await self._make_room():
                    continue
                if not drains:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                now = self._progress()
                fresh = self._uploader.fresh.value()
                if now > seen or fresh != known:
                    # Bytes that are sent again were counted before. During a retry nothing else counts as progress.
                    known = fresh
                    deadline, seen = trio.current_time() + self._timeout, now
                elif trio.current_time() > deadline and self._uploader.failed_tries > failed:
                    used = await trio.to_thread.run_sync(self._spool.allocated)
                    if free < 0 or used + size < self._limit:  # the disk is full, not the spool
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    raise FsError(errno.EIO, "the spool is at its limit, and storage takes nothing")
                if not waiting:
                    waiting = True
                    self.waiting += 1
                await trio.sleep(LOOK)
        finally:
            self.waiting -= waiting

    def _progress(self) -> tuple[int, int]:
        uploader = self._uploader
        return uploader.puts.stored_files, sum(upload.done for upload in uploader.puts.uploads.values())

    def _free(self) -> int:
        """Bytes of the disk that may be used."""
        if self._shared is None:
            self._shared = self._spool.device() == os.stat(self._registry_path).st_dev
        disk = self._spool.disk()
        return disk.f_bavail * disk.f_frsize - (RESERVE if self._shared else 0)

    async def _share(self, size: int, free: int) -> float:
        """How full the spool is: 1.0 at its limit, or when the disk has no more than the floor left."""
        if not self._waits:
            return 0.0
        used = await trio.to_thread.run_sync(self._spool.allocated) + size
        disk = self._spool.disk()
        floor = min(FLOOR[0], int(FLOOR[1] * disk.f_blocks * disk.f_frsize)) if self._floor is None else self._floor
        return max(used / max(self._limit, 1), used / max(used + free - floor, 1))
