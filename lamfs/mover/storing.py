"""Storing small files in the moving process: the more at a time, the further storage is. Any thread."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from lamfs import copying
from lamfs.errors import LamfsError, ObjectChanged, ObjectMissing, StorageUnavailable
from lamfs.mover import jobs
from lamfs.storage.base import ObjectMeta, ObjectStat, ObjectStore

DISTANT = 0.01
"""Seconds. Storage that has never taken a small file sooner than that is waited for, not worked for: ..."""
THREADS = 32
"""... so many files at a time are on their way to it. To a near one each job sends one after the other."""

Twin = tuple[str, str, int]
"""Key, ETag and size in bytes of an object."""
File = tuple[str, str, Twin | None, list[Any] | None]
"""Path, key, an object that has the same bytes, and what the object is to say of itself (jobs.pack_meta)."""


class SmallFiles:
    """Knows how far storage is."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "small")
        self._quickest = math.inf

    def put_many(
        self,
        store: ObjectStore,
        files: list[File],
        stop: Callable[[], None],
        stored: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Store files; of each its packed object or error. ``stop`` raises when nobody waits any more; ``stored`` is
        called behind each that storage has taken."""
        failed: StorageUnavailable | None = None

        def put(file: File) -> Any:
            nonlocal failed
            stop()
            path, key, twin, meta = file
            try:
                if failed is not None:  # the others would have to wait for nothing, too
                    raise jobs.again(failed)
                found = jobs.pack_stat(self._put(store, path, key, twin, jobs.unpack_meta(meta)))
                stored()
                return found
            except (LamfsError, OSError, EOFError) as problem:
                error = jobs.translate(problem, copying.shown(f"storing {path} as '{key}'"))
                if isinstance(error, StorageUnavailable):
                    failed = error
                return jobs.pack_error(error)

        outcomes = [put(file) for file in files[:1]]
        if self._quickest < DISTANT:
            return outcomes + [put(file) for file in files[1:]]
        begun = [self._threads.submit(put, file) for file in files[1:]]
        wait(begun)  # whatever becomes of one of them: with the answer, all have ended
        return outcomes + [future.result() for future in begun]

    def _put(self, store: ObjectStore, path: str, key: str, twin: Twin | None, meta: ObjectMeta | None) -> ObjectStat:
        """Store a new file, or copy within storage the object that has its bytes, if that is there."""
        began = time.monotonic()
        found: ObjectStat | None = None
        if twin is not None:
            with contextlib.suppress(ObjectMissing, ObjectChanged):
                found = store.copy(twin[0], key, etag=twin[1], size=twin[2], meta=meta, if_none_match=True)
        if found is None:
            found = store.put_file(key, path, meta=meta, if_none_match=True)
        self._quickest = min(self._quickest, time.monotonic() - began)
        return found
