"""Fetching many small files into the cache at once, for the API and the CLI. Synchronous; one thread and its pool's.

A file of one block costs a request, transactions of the index, and turns of Python's threads. Here the rows of many
files are written together, and a thread gets several files at a time. Only the simple case is handled: nothing is at
the file's path yet. lamfs.cache.files does the rest.
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
"""Bytes. A larger file is worth a transaction of its own."""
_GROUP = 4
"""Files that a thread gets at a time, at most, ..."""
_ROWS = 64
"""... and rows that are written together."""

Outcome = tuple[int, bool | StorageUnavailable | None]


@dataclass(slots=True, eq=False)
class _File:
    """A file in flight. ``number``: its place among the revisions; ``mtime_ns``: 0 until it is complete.

    ``fds``: its descriptor. The code that removes it from the list has to close it, and only when the row is written:
    while it is open, no other file can get the same inode number.
    """

    number: int
    revision: Revision
    path: str
    ino: int
    fds: list[int]
    mtime_ns: int = 0
    error: StorageUnavailable | None = None

    def close(self) -> None:
        """Close the descriptor, unless somebody has removed it from the list."""
        while self.fds:
            with contextlib.suppress(IndexError):
                os.close(self.fds.pop())


class SmallFetcher:
    """Makes cache files of revisions of 1 to LARGEST bytes with the threads of a pool. Used by one thread, once."""

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
        """Yield the number of each revision when it is done, and its outcome.

        True: the file is complete and verified now. False: it already was. StorageUnavailable: it failed. None: the
        caller must use cache_file.

        ``progress`` is called in this thread with the sizes of the files that arrived. The caller may stop early:
        complete files stay. Close the generator in the thread that started it. When as many files in a row have failed
        as there are threads, no more are tried.
        """
        groups = self._groups(revisions, max(1, min(_GROUP, len(revisions) // (2 * self._pool.threads))))
        try:
            # Running jobs may go on when the caller stops: they fill files that the index knows to be empty.
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
        """Empty files with rows, ``size`` at a time. A revision that has a file already is done."""
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
        """Fetch, check and write some files. Runs in a thread of the pool."""
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
            return  # cache_file tries again, and reports the error
        try:
            fd = file.fds.pop()
        except IndexError:  # nobody waits for it any more
            return
        try:
            copying.write_full(fd, data, 0)
            file.mtime_ns = os.fstat(fd).st_mtime_ns
        finally:
            file.fds.append(fd)
            if self._ended:  # the thread that closes open files may have passed already
                file.close()

    def _end(self, file: _File, outcome: bool | StorageUnavailable | None) -> None:
        file.close()
        self._begun.discard(file)
        self._ready.append((file.number, outcome))

    def _note(self, progress: Progress | None) -> None:
        """Write the rows of the files that arrived."""
        came, self._came = self._came, []
        rows = [(file.path, sparse.tag(file.revision), file.ino, file.mtime_ns) for file in came]
        complete = self._index.complete_all(rows) if rows else set()
        for file in came:
            # Unless somebody has replaced or deleted it.
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
