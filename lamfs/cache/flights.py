"""Bringing blocks: verifying what is here, fetching what is not, prefetching ahead. The trio loop only.

Each block on its way is one task in the cache's own nursery, whoever asked for it first: several readers cause one GET,
and a reader that is cancelled takes nothing from the others.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from lamfs.cache import sparse
from lamfs.cache.blockfile import ABSENT, PRESENT, VERIFIED, BlockFile, Flight
from lamfs.cache.index import CacheIndex
from lamfs.errors import DamagedData, LamfsError, ObjectChanged, StorageError, StorageFull, TransferDied
from lamfs.model import Revision
from lamfs.storage.base import ObjectStore
from lamfs.storage.local import etag_of
from lamfs.transfer import jobs

log = logging.getLogger(__name__)

PREFETCH_JOBS = 18
"""Prefetches at a time, of all files: of the mover's 32 readers some are always left for somebody who waits."""
PREFETCH_OF_FILE = 6
"""Of one file: when it stalls, others are still prefetched."""
PREFETCH_QUEUE = 256
"""Blocks that may wait for prefetching; the oldest wish is dropped."""
ATTEMPTS = 3
"""How often a job is given when the moving process dies during it."""

T = TypeVar("T")


class BlockMover(Protocol):
    """What the cache wants of lamfs.transfer.client.Mover."""

    async def fetch(self, key: str, *, etag: str, offset: int, length: int, path: str, digest: bytes | None) -> None:
        """Mover.fetch."""

    async def verify(self, path: str, *, offset: int, length: int, digest: bytes) -> bool:
        """Mover.verify."""


class Flights:
    """All blocks on their way, and the wishes for prefetching. Belongs to one BlockCache, which runs the nursery."""

    def __init__(
        self,
        store: ObjectStore,
        mover: BlockMover,
        index: CacheIndex,
        *,
        prefetch_blocks: int,
        release: Callable[[BlockFile], None],
        make_room: Callable[[], Awaitable[None]],
        grown: Callable[[], None],
    ) -> None:
        self.prefetch_blocks = prefetch_blocks
        """The widest prefetch window of a sequential reader."""
        self.release = release
        """Drops one reference of a BlockFile."""
        self.nursery: trio.Nursery | None = None
        """Where flights run; None when the cache does not run."""
        self.misses = self.fetched = self.damaged = 0
        self.on_storage_damage: Callable[[Revision, int], None] = self._log_damage
        """Told of each block of an object that is not what was saved: it writes the log line."""
        self._store = store
        self._mover = mover
        self._index = index
        self._make_room = make_room
        self._grown = grown
        self._wishes: deque[tuple[BlockFile, int]] = deque(maxlen=PREFETCH_QUEUE)
        self._prefetching = 0

    def stop(self) -> None:
        """The nursery has ended: forget all wishes."""
        self.nursery = None
        self._wishes.clear()

    def start(self, file: BlockFile, block: int, prefetch: bool = False) -> Flight:
        """The flight of a block, in the cache's own nursery: who waits for it may be cancelled, the flight is not."""
        flight = file.flights.get(block)
        if flight is None:
            if self.nursery is None:
                raise TransferDied("The block cache is not running: the mount is being ended.")
            flight = file.flights[block] = Flight(prefetch)
            file.refs += 1
            self.nursery.start_soon(self._fly, file, block, flight)
        return flight

    def failure(self, flight: Flight) -> LamfsError:
        """The error of a flight as a fresh exception: one object must not be raised in several tasks."""
        error = flight.error
        assert error is not None
        return jobs.again(error)

    def prefetch(self, file: BlockFile, block: int) -> None:
        """Bring a block when there is capacity to spare; its errors are left to who really reads it."""
        self._wishes.append((file, block))
        self._pump()

    def _pump(self) -> None:
        for _ in range(len(self._wishes)):
            if self._prefetching >= PREFETCH_JOBS or self.nursery is None:
                return
            file, block = self._wishes.popleft()
            if file.refs and file.state[block] != VERIFIED and block not in file.flights:
                if sum(flight.prefetch for flight in file.flights.values()) >= PREFETCH_OF_FILE:
                    self._wishes.append((file, block))
                    continue
                self._prefetching += 1
                self.start(file, block, prefetch=True)

    async def _fly(self, file: BlockFile, block: int, flight: Flight) -> None:
        try:
            await self._bring(file, block)
        except LamfsError as error:
            flight.error = error
        except trio.Cancelled:
            flight.error = TransferDied("The read was given up: the mount is being ended.")
            raise
        except Exception as error:
            log.exception("Bringing block %d of '%s' failed.", block, file.revision.object_key)
            flight.error = StorageError(f"Reading '{file.revision.object_key}' failed: {error}; see the mount's log.")
        finally:
            del file.flights[block]
            flight.landed.set()
            if flight.prefetch:
                self._prefetching -= 1
                self._pump()
            self.release(file)

    async def _bring(self, file: BlockFile, block: int) -> None:
        revision = file.revision
        offset, length = file.span(block)
        digest = revision.content.block(block)
        path = f"/proc/{os.getpid()}/fd/{file.fd()}"
        if file.state[block] == PRESENT:
            if await self._verify(file, path, offset, length, digest):
                file.verified(block)
                return
            self.damaged += 1
            if file.path is None:
                raise self._storage_damage(file, block)
            log.warning(
                "The cache's block %d of '%s' (ETag %s) is damaged; fetching it again.",
                block,
                revision.object_key,
                revision.etag,
            )
            file.lost(block, ABSENT)
        self.misses += 1
        try:
            await self._fetch(revision, offset, length, path, digest)
        except DamagedData:
            self.damaged += 1
            self.on_storage_damage(revision, block)
            raise
        self.fetched += length
        file.verified(block)
        assert file.path is not None
        self._index.mark(file.path, revision.etag, (block,), ino=file.ino)
        if file.whole():
            sparse.seal(self._index, file.path, revision, file.fd())
        self._grown()

    async def _verify(self, file: BlockFile, path: str, offset: int, length: int, digest: bytes) -> bool:
        try:
            return await _persist(lambda: self._mover.verify(path, offset=offset, length=length, digest=digest))
        except StorageError as error:
            if file.path is None:
                raise
            log.warning("The cache file %s cannot be read: %s", file.path, error)
            return False

    async def _fetch(self, revision: Revision, offset: int, length: int, path: str, digest: bytes) -> None:
        async def fetch() -> None:
            await self._mover.fetch(
                revision.object_key, etag=revision.etag, offset=offset, length=length, path=path, digest=digest
            )

        try:
            await _persist(fetch)
        except StorageFull:  # of the cache's disk
            await self._make_room()
            await _persist(fetch)

    def _log_damage(self, revision: Revision, block: int) -> None:
        url = self._store.url(revision.object_key)
        log.error("Block %d of the object %s (ETag %s) is damaged in storage.", block, url, revision.etag)

    def _storage_damage(self, file: BlockFile, block: int) -> StorageError:
        """A block of a local storage's file is wrong: because somebody wrote to the file, or because it rotted."""
        url, etag = self._store.url(file.revision.object_key), file.revision.etag
        if etag_of(os.fstat(file.fd())) != etag:
            return ObjectChanged(f"The object {url} was changed in place; look the artifact up again.")
        self.on_storage_damage(file.revision, block)
        return DamagedData(
            f"The object {url} (ETag {etag}) is damaged in block {block}: its bytes are not what was saved. Restore "
            "the file from a backup or replace the artifact."
        )


async def _persist(job: Callable[[], Awaitable[T]]) -> T:
    """Give a job again when the moving process dies during it. Raises TransferDied after ATTEMPTS."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await job()
        except TransferDied as error:
            log.warning("%s", error)
    return await job()
