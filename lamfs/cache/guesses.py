"""Bringing small files, and the beginnings of larger ones, that nobody has asked for yet. The trio loop only.

One task and two transactions of the index serve a whole batch: of what a small file costs, storage's answer would be
the least. A file on its way is an open BlockFile with a flight, as if it had been read: whoever reads it meanwhile
waits for that flight, and it is verified and recorded as any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from lamfs.cache import sparse
from lamfs.cache.blockfile import BlockFile
from lamfs.cache.index import CacheIndex
from lamfs.cache.moving import ATTEMPTS, BlockMover
from lamfs.cache.states import ABSENT, Flight
from lamfs.errors import DamagedData, LamfsError, TransferDied
from lamfs.model import BLOCK_SIZE, Revision
from lamfs.mover import beats, jobs
from lamfs.storage.base import ObjectStore

log = logging.getLogger(__name__)

LARGE_FILE = 1 << 30
"""Bytes up to which files are brought on a guess: of those of more than a block, this first one."""
FULL_SHIFT = 6
"""What is brought on a guess into a full cache, and was not read yet, is at most this part of it: a 64th."""
BATCH = 6
"""Files for which it is worth to begin a batch: fewer wait until others have landed."""
Failed = Callable[[Revision], None]
"""Told of a guess that came to nothing."""


class SmallFileFetcher(Protocol):
    """What Guesses need of the cache's Flights."""

    nursery: trio.Nursery | None
    tight: bool
    misses: int
    fetched: int
    damaged: int
    on_storage_damage: Callable[[Revision, int], None]
    release: Callable[[BlockFile], None]

    grown: Callable[[int], None]

    def start(self, file: BlockFile, block: int, prefetch: bool = False) -> Flight:
        """Bring a block."""

    def ended(self, flight: Flight) -> None:
        """A flight has landed."""

    def pump(self) -> None:
        """Begin what can be."""


class Guesses:
    """The small files that are to be brought, and the batches on their way. Belongs to one BlockCache."""

    def __init__(
        self,
        owner: SmallFileFetcher,
        store: ObjectStore,
        mover: BlockMover,
        index: CacheIndex,
        cache_dir: Path,
        *,
        limit_bytes: int,
        insert: Callable[[BlockFile], None],
        open_file: Callable[[Revision], BlockFile],
        is_open: Callable[[Revision], bool],
    ) -> None:
        self._owner = owner
        self._store = store
        self._mover = mover
        self._index = index
        self._dir = cache_dir
        self._limit = limit_bytes
        self._insert = insert
        self._open = open_file
        self._is_open = is_open
        self._queue: deque[tuple[Revision, Failed]] = deque()

    def __len__(self) -> int:
        """Files that wait for their batch."""
        return len(self._queue)

    def clear(self) -> None:
        """Forget those that have not begun."""
        self._queue.clear()

    def room(self) -> int:
        """Bytes for which there is room: the rest of the cache and, where it is full, a small part of it."""
        return max(self._limit - self._index.total_bytes(), self._limit >> FULL_SHIFT)

    def bring(self, revisions: Sequence[Revision], failed: Failed) -> list[Revision]:
        """Bring files before anybody reads them, when there is capacity to spare. Returns those that are not here yet;
        ``failed`` is told of those that do not come."""
        if self._owner.nursery is None or self._owner.tight:
            return []
        wanted = {}
        for revision in revisions:
            if 0 < revision.size <= LARGE_FILE and not self._is_open(revision):
                wanted[sparse.relative_path(self._store, revision.object_key)] = revision
        if wanted:
            for path in self._index.complete_of({path: sparse.tag(revision) for path, revision in wanted.items()}):
                del wanted[path]
        self._queue.extend((revision, failed) for revision in wanted.values())
        self._owner.pump()
        return list(wanted.values())

    def start(self, room: int) -> int:
        """Begin a batch of at most ``room`` files, if that is worth it; returns how many flights there are now more."""
        nursery = self._owner.nursery
        if nursery is None or nursery.cancel_scope.cancel_called:
            return 0
        while self._queue and room >= min(len(self._queue), BATCH):
            chosen = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
            begun = sum(self._begin(*guess) for guess in chosen if guess[0].size > BLOCK_SIZE)
            batch = _Batch(self._owner, self._index, self._make(chosen))
            if batch.files:
                nursery.start_soon(batch.run, self._mover)
            if batch.files or begun:
                return len(batch.files) + begun
        return 0

    def _begin(self, revision: Revision, failed: Failed) -> int:
        """Bring the first block of a larger file; how many flights that takes."""
        try:
            file = self._open(revision)
        except LamfsError:
            failed(revision)
            return 0
        with contextlib.closing(file):
            if file.homeless or file.state[0] != ABSENT or file.flights:
                return 0
            self._owner.start(file, 0, prefetch=True)
            return 1

    def _make(self, chosen: Sequence[tuple[Revision, Failed]]) -> list[tuple[BlockFile, Failed]]:
        """Empty cache files, each with a flight."""
        made: list[tuple[BlockFile, Failed]] = []
        parents: set[str] = set()
        for revision, failed in chosen:
            if revision.size > BLOCK_SIZE or self._is_open(revision):  # somebody was faster
                continue
            path = sparse.relative_path(self._store, revision.object_key)
            parent = os.path.dirname(path)
            if parent not in parents:
                parents.add(parent)
                try:
                    sparse.make_parents(self._index, self._dir, path)
                except OSError as error:
                    log.debug("There is no place for %s: %s", path, error)
            opened = sparse.make_fresh(self._dir, path, revision)
            if opened is None:  # another revision is there, or blocks of this one: reading it will tell
                failed(revision)
                continue
            file = BlockFile(self._owner, revision, opened[0], opened[1], path, bytearray(1))  # type: ignore[arg-type]
            self._insert(file)
            file.refs += 1
            file.flights[0] = Flight(prefetch=True)
            made.append((file, failed))
        rows = [(str(file.path), sparse.tag(file.revision), file.revision.size, file.ino) for file, _ in made]
        self._index.reset_all(rows)
        return made


class _Batch:
    """Some files on their way."""

    def __init__(self, owner: SmallFileFetcher, index: CacheIndex, files: list[tuple[BlockFile, Failed]]) -> None:
        self.files = files
        self._owner = owner
        self._index = index
        self._left = dict(files)
        """Those that have not landed."""
        self._again: list[tuple[BlockFile, Failed]] = []
        self._came: list[tuple[str, str, int, int]] = []

    async def run(self, mover: BlockMover) -> None:
        """Bring them; errors are for who waits for a file by then."""
        self._owner.misses += len(self.files)
        try:
            for _ in range(ATTEMPTS):
                given, self._again = self._again or self.files, []
                with beats.doing(beats.Beat(*(file.beat for file, _ in given))):
                    await mover.fetch_files([_job(file) for file, _ in given], partial(self._landed, given))
                if not self._again:
                    break
        except TransferDied as error:
            log.debug("Nothing is read ahead: %s", error)
        finally:
            gone = TransferDied("The process that moves bytes has ended, or the mount is being ended.")
            for file, failed in list(self._left.items()):
                self._end(file, failed, gone)
            if self._came:
                self._index.complete_all(self._came)

    def _landed(self, given: list[tuple[BlockFile, Failed]], number: int, error: LamfsError | None) -> None:
        if isinstance(error, TransferDied):
            self._again.append(given[number])
        else:
            self._end(*given[number], error)

    def _end(self, file: BlockFile, failed: Failed, error: LamfsError | None) -> None:
        owner, revision = self._owner, file.revision
        del self._left[file]
        flight = file.flights.pop(0)
        if error is None:
            file.verified(0)
            owner.fetched += revision.size
            owner.grown(revision.size)
            self._came.append((str(file.path), sparse.tag(revision), file.ino, os.fstat(file.fd()).st_mtime_ns))
        else:
            flight.error = error
            if isinstance(error, DamagedData):
                owner.damaged += 1
                owner.on_storage_damage(revision, 0)
            failed(revision)
        owner.release(file)
        owner.ended(flight)


def _job(file: BlockFile) -> jobs.WholeFile:
    revision, path = file.revision, f"/proc/{os.getpid()}/fd/{file.fd()}"
    return jobs.WholeFile(revision.object_key, revision.etag, revision.size, path, revision.content.block(0))
