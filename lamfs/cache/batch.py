"""Fetching many small files with one job of the mover, before anybody reads them. The trio loop only.

One task and two transactions of the index serve a whole batch; else storage's answer would be the smallest part of what
a small file costs. A file in flight is an open BlockFile with a fetch, as if it were being read: a read that comes
meanwhile waits for that fetch, and the file is verified and recorded like any other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lamfs.cache import sparse
from lamfs.cache.blockfile import BlockFile
from lamfs.cache.fetches import Fetches
from lamfs.cache.index import CacheIndex
from lamfs.cache.moving import ATTEMPTS, BlockMover
from lamfs.cache.states import Fetch
from lamfs.errors import DamagedData, LamfsError, TransferDied
from lamfs.model import Revision
from lamfs.mover import beats, jobs
from lamfs.storage.base import ObjectStore

log = logging.getLogger(__name__)

Failed = Callable[[Revision], None]
"""Called with a file that cannot be fetched ahead."""


def make_files(
    fetches: Fetches,
    store: ObjectStore,
    index: CacheIndex,
    cache_dir: Path,
    chosen: Sequence[tuple[Revision, Failed]],
    insert: Callable[[BlockFile], None],
) -> list[tuple[BlockFile, Failed]]:
    """Empty cache files for revisions of one block, each with a fetch; ``insert`` shows them to readers."""
    made: list[tuple[BlockFile, Failed]] = []
    parents: set[str] = set()
    for revision, failed in chosen:
        path = sparse.relative_path(store, revision.object_key)
        parent = os.path.dirname(path)
        if parent not in parents:
            parents.add(parent)
            try:
                sparse.make_parents(index, cache_dir, path)
            except OSError as error:
                log.debug("There is no place for %s: %s", path, error)
        opened = sparse.make_fresh(cache_dir, path, revision)
        if opened is None:  # another revision is there, or blocks of this one: reading it will tell
            failed(revision)
            continue
        file = BlockFile(fetches, revision, opened[0], opened[1], path, bytearray(1))
        insert(file)
        file.refs += 1
        file.fetches[0] = Fetch(prefetch=True)
        made.append((file, failed))
    index.reset_all([(str(file.path), sparse.tag(file.revision), file.revision.size, file.ino) for file, _ in made])
    return made


class Batch:
    """Some files in flight, as `make_files` has made them."""

    def __init__(self, fetches: Fetches, index: CacheIndex, files: list[tuple[BlockFile, Failed]]) -> None:
        self._fetches = fetches
        self._index = index
        self._files = files
        self._left = dict(files)
        """Files that have not ended."""
        self._again: list[tuple[BlockFile, Failed]] = []
        self._came: list[tuple[str, str, int, int]] = []

    async def run(self, mover: BlockMover) -> None:
        """Fetch them. A reader that waits for a file gets its error."""
        self._fetches.misses += len(self._files)
        try:
            for _ in range(ATTEMPTS):
                given, self._again = self._again or self._files, []
                with beats.doing(beats.Beat(*(file.beat for file, _ in given))):
                    await mover.fetch_files([_job(file) for file, _ in given], partial(self._arrived, given))
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

    def _arrived(self, given: list[tuple[BlockFile, Failed]], number: int, error: LamfsError | None) -> None:
        if isinstance(error, TransferDied):
            self._again.append(given[number])
        else:
            self._end(*given[number], error)

    def _end(self, file: BlockFile, failed: Failed, error: LamfsError | None) -> None:
        fetches, revision = self._fetches, file.revision
        del self._left[file]
        fetch = file.fetches.pop(0)
        if error is None:
            file.verified(0)
            fetches.fetched += revision.size
            fetches.grown(revision.size)
            self._came.append((str(file.path), sparse.tag(revision), file.ino, os.fstat(file.fd()).st_mtime_ns))
        else:
            fetch.error = error
            if isinstance(error, DamagedData):
                fetches.damaged += 1
                fetches.on_storage_damage(revision, 0)
            failed(revision)
        fetches.unref(file)
        fetches.ended(fetch)


def _job(file: BlockFile) -> jobs.WholeFile:
    revision, path = file.revision, f"/proc/{os.getpid()}/fd/{file.fd()}"
    return jobs.WholeFile(revision.object_key, revision.etag, revision.size, path, revision.content.block(0))
