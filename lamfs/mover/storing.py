"""Storing small files in the mover: the farther storage is, the more at a time. Any thread."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

from lamfs import copying
from lamfs.errors import LamfsError, ObjectChanged, ObjectMissing, StorageUnavailable
from lamfs.mover import jobs
from lamfs.storage.base import ObjectMeta, ObjectStat, ObjectStore

DISTANT = 0.01
"""Seconds. When storage has never stored a small file faster than this, it is latency that costs time: ..."""
THREADS = 32
"""... so many files are sent at a time. To a near storage each job sends its files one by one."""

Twin = tuple[str, str, int]
"""Key, ETag and size in bytes of an object."""
File = tuple[str, str, Twin | None, ObjectMeta | None]
"""Path, key, an object that has the same bytes, and the metadata to store with it."""


class SmallFiles:
    """Stores small files, and knows how far storage is."""

    def __init__(self, threads: int = THREADS) -> None:
        """``threads``: 0 for a caller that may be interrupted, and must not leave any behind."""
        self._threads = ThreadPoolExecutor(threads, "small") if threads else None
        self._quickest = math.inf

    def put_many(
        self,
        store: ObjectStore,
        files: list[File],
        stop: Callable[[], None] = lambda: None,
        stored: Callable[[], None] = lambda: None,
    ) -> list[ObjectStat | LamfsError]:
        """Store files. Returns the object or the error of each.

        ``stop`` raises when nobody waits any more; ``stored`` is called after each file that storage has accepted.
        """
        failed: StorageUnavailable | None = None

        def put(file: File) -> ObjectStat | LamfsError:
            nonlocal failed
            stop()
            path, key, twin, meta = file
            try:
                if failed is not None:  # the others would wait in vain too
                    raise jobs.again(failed)
                found = self._put(store, path, key, twin, meta)
                stored()
                return found
            except (LamfsError, OSError, EOFError) as problem:
                error = jobs.translate(problem, copying.shown(f"storing {path} as '{key}'"))
                if isinstance(error, StorageUnavailable):
                    failed = error
                return error

        outcomes = [put(file) for file in files[:1]]
        if self._threads is None or self._quickest < DISTANT:
            return outcomes + [put(file) for file in files[1:]]
        begun = [self._threads.submit(put, file) for file in files[1:]]
        wait(begun)  # whatever happens to one of them: all have ended before the answer
        return outcomes + [future.result() for future in begun]

    def _put(self, store: ObjectStore, path: str, key: str, twin: Twin | None, meta: ObjectMeta | None) -> ObjectStat:
        """Store a new file, or copy the object within storage that has its bytes, if there is one."""
        began = time.monotonic()
        found: ObjectStat | None = None
        if twin is not None:
            with contextlib.suppress(ObjectMissing, ObjectChanged):
                found = store.copy(twin[0], key, etag=twin[1], size=twin[2], meta=meta, if_none_match=True)
        if found is None:
            found = store.put_file(key, path, meta=meta, if_none_match=True)
        self._quickest = min(self._quickest, time.monotonic() - began)
        return found
