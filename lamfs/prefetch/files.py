"""Files that nobody has opened yet, in the order in which they are prefetched. The trio loop only.

A small file is fetched whole, many of them in one batch (lamfs.cache.batch). Of a larger one the first block is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from lamfs.cache.batch import Failed
from lamfs.cache.blocks import BlockCache
from lamfs.cache.states import ABSENT
from lamfs.errors import LamfsError
from lamfs.model import BLOCK_SIZE, Revision
from lamfs.prefetch import settings


class FileQueue:
    """The queue of one Prefetcher. ``pump`` starts what can be started."""

    def __init__(self, cache: BlockCache, pump: Callable[[], None]) -> None:
        self._cache = cache
        self._pump = pump
        self._queue: deque[tuple[Revision, Failed]] = deque()

    def clear(self) -> None:
        """Forget the files that have not started."""
        self._queue.clear()

    def budget(self) -> int:
        """Bytes that prefetched files may use: the rest of the cache or, when it is full, a small part of it."""
        return self._cache.spare_bytes()

    def add(self, revisions: Sequence[Revision], failed: Failed) -> list[Revision]:
        """Prefetch files when there is capacity to spare.

        Returns those that are not cached yet. ``failed`` is called with each of them that cannot be fetched.
        """
        fetches = self._cache.fetches
        if fetches.nursery is None or fetches.tight:
            return []
        small = [revision for revision in revisions if 0 < revision.size <= settings.LARGEST_FILE]
        wanted = self._cache.uncached(small)
        self._queue.extend((revision, failed) for revision in wanted)
        self._pump()
        return wanted

    def start(self, most: int) -> int:
        """Start a batch of at most ``most`` files, if it is worth one. Returns the number of fetches it started."""
        nursery = self._cache.fetches.nursery
        if nursery is None or nursery.cancel_scope.cancel_called:
            return 0
        while self._queue and most >= min(len(self._queue), settings.BATCH_FILES):
            chosen = [self._queue.popleft() for _ in range(min(most, len(self._queue)))]
            started = sum(self._start_first_block(*each) for each in chosen if each[0].size > BLOCK_SIZE)
            started += self._cache.start_batch([each for each in chosen if each[0].size <= BLOCK_SIZE])
            if started:
                return started
        return 0

    def _start_first_block(self, revision: Revision, failed: Failed) -> int:
        """Fetch the first block of a larger file. Returns the number of fetches that takes."""
        try:
            file = self._cache.open(revision)
        except LamfsError:
            failed(revision)
            return 0
        with contextlib.closing(file):
            if file.homeless or file.state[0] != ABSENT or file.fetches:
                return 0
            self._cache.fetches.start(file, 0, prefetch=True)
            return 1
