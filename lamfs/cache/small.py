"""Many small files into the cache at once, for the API and the CLI. Synchronous; one thread, and those of its pool.

A file of one block costs a request, and otherwise transactions of the index and turns of Python's threads: here the
rows of many are written together, and a thread gets some files at a time. Only what is simple is done here: nothing may
be at a file's path yet. The rest is for lamfs.cache.files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamfs import copying
from lamfs.cache import sparse
from lamfs.cache.index import CacheIndex
from lamfs.errors import LamfsError, StorageUnavailable
from lamfs.hashing import hash_block
from lamfs.model import Revision
from lamfs.pool import Pool
from lamfs.storage.base import ObjectStore, Progress

log = logging.getLogger(__name__)

LARGEST = 256 << 10
"""Bytes. What is larger is worth a transaction of its own."""
_GROUP = 4
"""Most files that a thread gets at a time, ..."""
_ROWS = 64
"""... and rows that are written together."""

Outcome = tuple[int, bool | StorageUnavailable | None]


@dataclass(slots=True, eq=False)
class _File:
    """One that is on its way, by its place among the revisions; ``mtime_ns`` is 0 until it is there.

    ``fds``: its descriptor, for who takes it out of the list. As long as it is open no other file can have the same
    inode number, so it is closed when the row is written.
    """

    number: int
    revision: Revision
    path: str
    ino: int
    fds: list[int]
    mtime_ns: int = 0
    error: StorageUnavailable | None = None

    def close(self) -> None:
        """Unless somebody has taken the descriptor."""
        while self.fds:
            with contextlib.suppress(IndexError):
                os.close(self.fds.pop())


class SmallFetcher:
    """Makes cache files of revisions of 1 to LARGEST bytes by the threads of a pool; for one thread, once."""

    def __init__(self, store: ObjectStore, index: CacheIndex, cache_dir: Path, pool: Pool) -> None:
        self._store = store
        self._index = index
        self._dir = cache_dir
        self._pool = pool
        self._failures = 0
        self._ended = False
        self._ready: list[Outcome] = []
        self._came: list[_File] = []
        self._begun: set[_File] = set()

    def fetch(self, revisions: Sequence[Revision], progress: Progress | None = None) -> Generator[Outcome, None, None]:
        """Give the number of each revision as it is done, with what became of it: True: its file is complete and
        verified now; False: it was so before; StorageUnavailable; None: cache_file has to see to it.

        ``progress`` gets the sizes of those that have come, from this thread. When the caller stops, these stay; to be
        closed in the thread that has begun it. When as many as there are threads have failed, one after the other, none
        is tried any more.
        """
        groups = self._groups(revisions, max(1, min(_GROUP, len(revisions) // (2 * self._pool.threads))))
        try:
            # What has begun may go on when the caller stops: it fills files that are known as empty.
            with contextlib.closing(self._pool.unordered(self._bring, groups, abandon=True)) as done:
                for group, future in done:
                    future.result()
                    for file in group:
                        if file.mtime_ns:
                            self._came.append(file)
                        else:
                            self._end(file, file.error)
                    if len(self._came) >= _ROWS:
                        self._note(progress)
                    while self._ready:
                        yield self._ready.pop()
        finally:
            self._note(progress)
            self._ended = True
            for file in self._begun:
                file.close()
        yield from self._ready

    def _groups(self, revisions: Sequence[Revision], size: int) -> Iterator[list[_File]]:
        """Empty files with rows, ``size`` at a time. What has a file already is ready."""
        for start in range(0, len(revisions), _ROWS):
            made = self._make(start, revisions[start : start + _ROWS])
            yield from (made[first : first + size] for first in range(0, len(made), size))

    def _make(self, start: int, revisions: Sequence[Revision]) -> list[_File]:
        parents: set[str] = set()
        sealed: dict[str, int] = {}
        made: list[_File] = []
        for number, revision in enumerate(revisions, start):
            try:
                path = sparse.relative_path(self._store, revision.object_key)
                if sparse.is_sealed(self._index, self._dir, path, revision):
                    sealed[path] = time.time_ns()
                    self._ready.append((number, False))
                    continue
                if os.path.dirname(path) not in parents:
                    sparse.make_parents(self._index, self._dir, path)
                    parents.add(os.path.dirname(path))
                opened = sparse.make_fresh(self._dir, path, revision)
            except (LamfsError, OSError) as error:
                log.debug("There is no place for %s: %s", revision.object_key, error)
                opened = None
            if opened is None:
                self._ready.append((number, None))
                continue
            made.append(_File(number, revision, path, opened[1], [opened[0]]))
            self._begun.add(made[-1])
        if sealed:
            self._index.touch(sealed)
        self._index.reset_all([(file.path, sparse.tag(file.revision), file.revision.size, file.ino) for file in made])
        return made

    def _bring(self, group: list[_File]) -> None:
        """Fetch, check and write some files. In a thread of the pool."""
        for file in group:
            if self._failures >= self._pool.threads:
                return
            try:
                self._bring_one(file)
            except StorageUnavailable as error:
                file.error = error
                self._failures += 1
            except (LamfsError, OSError) as error:
                log.debug("%s did not come: %s", file.path, error)
            else:
                self._failures = 0

    def _bring_one(self, file: _File) -> None:
        revision = file.revision
        data = self._store.get(revision.object_key, length=revision.size, etag=revision.etag)
        if len(data) != revision.size or hash_block(data) != revision.content.block(0):
            return  # cache_file looks again, and says so
        try:
            fd = file.fds.pop()
        except IndexError:  # nobody waits for it any more
            return
        try:
            copying.write_full(fd, data, 0)
            file.mtime_ns = os.fstat(fd).st_mtime_ns
        finally:
            file.fds.append(fd)
            if self._ended:  # who closes what is open may have been here before
                file.close()

    def _end(self, file: _File, outcome: bool | StorageUnavailable | None) -> None:
        file.close()
        self._begun.discard(file)
        self._ready.append((file.number, outcome))

    def _note(self, progress: Progress | None) -> None:
        """Write the rows of what has come."""
        came, self._came = self._came, []
        rows = [(file.path, sparse.tag(file.revision), file.ino, file.mtime_ns) for file in came]
        complete = self._index.complete_all(rows) if rows else set()
        for file in came:
            # Unless somebody has made it anew, or deleted it.
            there = file.path in complete and self._is_at_its_place(file)
            self._end(file, True if there else None)
            if there and progress is not None:
                progress(file.revision.size)

    def _is_at_its_place(self, file: _File) -> bool:
        try:
            found = os.lstat(os.path.join(self._dir, file.path))
        except OSError:
            return False
        return sparse.ino_of(found) == file.ino and found.st_mtime_ns == file.mtime_ns
