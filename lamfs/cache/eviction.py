"""Keeping a cache directory within its limit, and its disk from filling up. The trio loop only.

What was used longest ago goes first. Small files and complete ones are unlinked whole: a program that got the path of a
complete file (``artifact.cache()``) keeps what it has open, and never sees a hole. Larger incomplete files lose regions
by hole punching, even while they are being read, so a file larger than the limit passes through.

Nobody may read a hole as data. For other processes, see holes.py. In this process blocks are marked absent before they
are punched, and blocks that are waited for or must stay are skipped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Set
from pathlib import Path

import trio

from lamfs.cache import holes, sparse
from lamfs.cache.bits import REGION_BLOCKS
from lamfs.cache.blockfile import BlockFile
from lamfs.cache.index import CachedFile, CacheIndex
from lamfs.cache.states import ABSENT
from lamfs.model import BLOCK_SIZE

log = logging.getLogger(__name__)

FLOOR_BYTES, FLOOR_SHARE = 10 << 30, 0.05
"""What the cache leaves free of its disk by default: this share, but no more than so many bytes."""


class Evictor:
    """Evicts from one cache directory.

    ``find`` returns the files that are open here at a path; ``unlink`` removes one that nobody uses here.
    """

    def __init__(
        self,
        index: CacheIndex,
        cache_dir: Path,
        *,
        free_bytes: int | None,
        find: Callable[[str], list[BlockFile]],
        unlink: Callable[[str], None],
    ) -> None:
        self._index = index
        self._dir = cache_dir
        self._free = free_bytes
        self._find = find
        self._unlink = unlink

    def shortage(self) -> int:
        """Bytes that are missing from what should be free on the cache's disk. 0 or less: enough is free."""
        if self._free == 0:
            return 0
        try:
            disk = os.statvfs(self._dir)
        except OSError:  # there is no cache directory yet
            return 0
        floor = self._free
        if floor is None:
            floor = min(FLOOR_BYTES, int(disk.f_blocks * disk.f_frsize * FLOOR_SHARE))
        return floor - disk.f_bavail * disk.f_frsize

    async def down_to(self, limit: int) -> None:
        """Evict the least recently used until the cache has ``limit`` bytes or less, or everything left is in use."""
        asked = 64
        total = self._index.total_bytes()
        while total > max(limit, 0):
            found = self._index.evictable(asked)
            for row, region in found:
                if total <= limit:
                    return
                total -= self.evict(row, region, total - limit)
                await trio.lowlevel.checkpoint()
            if len(found) < asked:
                return
            total = self._index.total_bytes()
            asked *= 4

    def evict(self, row: CachedFile, region: int, enough: int) -> int:
        """Evict a file, or a region until ``enough`` bytes are freed, as CacheIndex.evictable names it.

        Returns the bytes that were freed: 0 when it is in use.
        """
        used = [file for file in self._find(row.path) if file.refs]
        if region < 0:
            if used:
                return 0
            self._unlink(row.path)
            return row.bytes
        if used:
            file = next((file for file in used if file.ino == row.ino and sparse.tag(file.revision) == row.etag), None)
            if file is None:
                return 0
            first = region * REGION_BLOCKS
            keep = {block for block in range(first, first + REGION_BLOCKS) if file.is_needed(block)}
            return self._punch(row, region, file.fd(), enough, keep, file)
        try:
            fd = os.open(self._dir / row.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            self._unlink(row.path)
            return row.bytes
        try:
            if sparse.ino_of(os.fstat(fd)) != row.ino:
                return 0
            freed = self._punch(row, region, fd, enough, set(), None)
        finally:
            os.close(fd)
        left = self._index.row(row.path)
        if left is not None and left.ino == row.ino and left.bytes == 0 and not left.complete:
            self._unlink(row.path)
        return freed

    def _punch(self, row: CachedFile, region: int, fd: int, enough: int, keep: Set[int], file: BlockFile | None) -> int:
        """Punch a region under the exclusive lock. The index forgets it first, for later openers."""
        if not holes.work(fd):  # then the whole file goes, when nobody uses it
            if file is None:
                self._unlink(row.path)
            return row.bytes if file is None else 0
        if not holes.have_alone(fd):
            return 0  # another process reads the file, and will evict from it itself
        freed = 0
        try:
            for block, size in self._index.evict(row, region, enough, keep).items():
                if file is not None:
                    file.lost(block, ABSENT)
                holes.punch(fd, block * BLOCK_SIZE, min(BLOCK_SIZE, row.size - block * BLOCK_SIZE))
                freed += size
        except OSError as error:
            log.warning("No holes could be punched into the cache file %s: %s.", row.path, error)
        finally:
            holes.share(fd)
        return freed
