"""What is prefetched next, and how much at a time. The trio loop only.

First come the wishes of open handles, then files that nobody has opened, then the rest of files that random reads have
mostly fetched. Nothing is prefetched while the cache's disk fills up. Errors are left to the read that needs the bytes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import trio

from lamfs.cache.blockfile import BlockFile
from lamfs.cache.blocks import BlockCache
from lamfs.cache.states import ABSENT, VERIFIED
from lamfs.prefetch import settings
from lamfs.prefetch.files import FileQueue
from lamfs.prefetch.patterns import Reader


@dataclass(slots=True)
class _Rest:
    """The rest of a file: ``missing`` blocks at ``began`` (trio's clock)."""

    began: float
    missing: int
    at: int = 0
    """The first block that was not asked for yet."""

    def seconds(self, state: bytearray) -> float:
        """How long the rest takes at the speed so far; ``state`` of each block."""
        left = state.count(ABSENT)
        arrived = self.missing - left
        return left * (trio.current_time() - self.began) / arrived if arrived > 0 else math.inf


class Prefetcher:
    """Everything that one BlockCache prefetches.

    ``blocks``: the widest window of a sequential reader; 0: nothing is prefetched. A request that brings two blocks
    may bring one more.
    """

    def __init__(self, cache: BlockCache, *, blocks: int = 8) -> None:
        self.blocks = blocks
        self.files = FileQueue(cache, self.pump) if blocks and not cache.is_local else None
        """Files that nobody has opened; None: they are not prefetched."""
        self.in_flight = 0
        self._cache = cache
        self._fetches = cache.fetches
        self._wishing: deque[Reader] = deque()
        """Readers that have wishes, each once: they take turns."""
        self._rest: dict[BlockFile, _Rest] = {}
        """Files of which all is wanted."""
        cache.fetches.prefetch = self

    def reader(self) -> Reader:
        """For an open handle: its reads go through it."""
        return Reader(self)

    def stop(self) -> None:
        """The cache has stopped: forget everything."""
        self._wishing.clear()
        self._rest.clear()
        if self.files is not None:
            self.files.clear()

    def wished(self, reader: Reader) -> None:
        """A reader has wishes."""
        if reader not in self._wishing:
            self._wishing.append(reader)
        self.pump()

    def random_miss(self, file: BlockFile) -> bool:
        """A random read has to fetch leaves. True: it should fetch its whole block.

        After enough of them the rest of the file is prefetched in whole blocks, which takes fewer requests.
        """
        now = trio.current_time()
        count, since = file.leaf_misses
        if now - since > settings.WHOLE_SECONDS:
            count, since = 0, now
        file.leaf_misses = (count + 1, since)
        size = file.revision.size
        enough = max(settings.WHOLE_MISSES, size // settings.WHOLE_BYTES_PER_MISS)
        if count + 1 >= enough and self.blocks and size <= self._cache.limit_bytes:
            if file not in self._rest:
                self._rest[file] = _Rest(now, file.state.count(ABSENT))
            self.pump()
        return file in self._rest and self._rest[file].seconds(file.state) < settings.WHOLE_SOON

    def ended(self) -> None:
        """A prefetch has ended: start another one."""
        self.in_flight -= 1
        self.pump()

    def pump(self) -> None:
        """Start prefetches while there is capacity to spare."""
        fetches = self._fetches
        while self.in_flight < settings.JOBS and fetches.nursery is not None and not fetches.tight:
            wish = self._next_wish()
            if wish is None and self.files is not None:
                started = self.files.start(settings.JOBS - self.in_flight)
                self.in_flight += started
                if started:
                    continue
            wish = wish or self._next_of_rest()
            if wish is None:
                return
            file, block, mask = wish
            if not file.refs or file.homeless or file.state[block] == VERIFIED or block in file.fetches:
                continue
            if mask and fetches.leaf_hashes(file, block) is not None:
                run = file.missing(block, mask) if file.state[block] == ABSENT else None
                if run is None:
                    continue
                fetches.start_leaves(file, block, *run, prefetch=True)
            else:
                fetches.start_stretch(file, block)
            self.in_flight += 1

    def _next_wish(self) -> tuple[BlockFile, int, int] | None:
        for _ in range(len(self._wishing)):
            reader = self._wishing.popleft()
            if reader.wishes:
                wish = None if _is_busy(reader.wishes[0][0]) else reader.wishes.popleft()
                if reader.wishes:
                    self._wishing.append(reader)
                if wish is not None:
                    return wish
        return None

    def _next_of_rest(self) -> tuple[BlockFile, int, int] | None:
        for file, rest in list(self._rest.items()):
            block = file.state.find(ABSENT, rest.at)
            if _is_busy(file):
                continue
            if block >= 0 and file.refs > len(file.fetches):  # somebody beside the fetches still has it open
                rest.at = block + 1
                return file, block, 0
            del self._rest[file]
            file.leaf_misses = (0, 0.0)
        return None


def _is_busy(file: BlockFile) -> bool:
    """Whether as much of a file is being prefetched as may be."""
    leaves = sum(fetch.prefetch for found in file.leaves.values() for fetch in found.fetches)
    return sum(fetch.prefetch for fetch in file.fetches.values()) + leaves >= settings.JOBS_OF_FILE
