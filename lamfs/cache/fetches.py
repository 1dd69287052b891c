"""Fetching blocks and leaves, and verifying those that are in the file. The trio loop only.

Each block, or run of leaves, is fetched by one task in the cache's own nursery, whoever asked for it first. So several
readers cause one GET, and cancelling one reader does not affect the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from lamfs.cache import sparse
from lamfs.cache.bits import leaf_bytes, leaf_mask
from lamfs.cache.blockfile import BlockFile
from lamfs.cache.index import CacheIndex
from lamfs.cache.moving import BlockMover, persist
from lamfs.cache.states import ABSENT, PRESENT, Fetch, Leaves
from lamfs.errors import DamagedData, LamfsError, ObjectChanged, StorageError, StorageFull, TransferDied
from lamfs.model import BLOCK_SIZE, LEAF_HASH, LEAF_SIZE, Revision
from lamfs.mover import beats, jobs
from lamfs.storage.base import ObjectStore
from lamfs.storage.local import etag_of

log = logging.getLogger(__name__)

STRETCH = 2
"""Blocks that one request prefetches, at most. A stretch ends at a multiple of it, whichever block was asked for.

One connection to a distant server is slow: longer stretches would leave too few connections in use.
"""
ASIDE_JOBS = 4
"""Reads at a time that bypass a full cache, each in its own memory."""
FULL_SECONDS = 5.0
"""Seconds for which the cache's disk counts as full after it was and nothing could be evicted."""

LeafHashes = Callable[[Revision, int], bytes | None]
"""The stored leaf hashes of one block of a revision."""


class Prefetch(Protocol):
    """The prefetcher, as the cache sees it."""

    def random_miss(self, file: BlockFile) -> bool:
        """A random read has to fetch leaves. True: it should fetch its whole block."""

    def ended(self) -> None:
        """A prefetch has ended, well or not."""

    def stop(self) -> None:
        """The cache has stopped."""


class NoPrefetch:
    """Nothing is prefetched."""

    def random_miss(self, file: BlockFile) -> bool:
        """As Prefetch."""
        return False

    def ended(self) -> None:
        """As Prefetch."""

    def stop(self) -> None:
        """As Prefetch."""


class Fetches:
    """All fetches in flight of one BlockCache, which runs the nursery."""

    def __init__(
        self,
        store: ObjectStore,
        mover: BlockMover,
        index: CacheIndex,
        *,
        seal_bytes: int,
        leaves: LeafHashes | None,
        unref: Callable[[BlockFile], None],
        make_room: Callable[[], Awaitable[None]],
        grown: Callable[[int], None],
    ) -> None:
        self.unref = unref
        """Drops one reference of a BlockFile."""
        self.tight = False
        """The cache's disk is filling up, and nothing more can be evicted: only fetch what a reader waits for."""
        self.nursery: trio.Nursery | None = None
        """Where fetches run; None when the cache does not run."""
        self.misses = self.fetched = self.damaged = 0
        self.on_storage_damage: Callable[[Revision, int], None] = self._log_damage
        """Called with each block of an object that is not what was saved. It writes the log line."""
        self._store = store
        self._mover = mover
        self._index = index
        self._seal_bytes = seal_bytes
        self._leaves = leaves
        self._full_until = 0.0
        self._aside = trio.CapacityLimiter(ASIDE_JOBS)
        self._make_room = make_room
        self.grown = grown
        """Called with numbers of bytes that were added to the cache."""
        self.prefetch: Prefetch = NoPrefetch()
        """Set by the prefetcher of this cache."""

    def stop(self) -> None:
        """The nursery has ended."""
        self.nursery = None
        self.prefetch.stop()

    def start(self, file: BlockFile, block: int, prefetch: bool = False) -> Fetch:
        """The fetch of a block; started if there is none. Cancelling a waiting reader does not cancel it."""
        fetch = file.fetches.get(block)
        if fetch is None:
            if self.nursery is None:
                raise TransferDied("The block cache is not running: the mount is being ended.")
            fetch = file.fetches[block] = Fetch(prefetch)
            file.refs += 1
            self.nursery.start_soon(self._run_block, file, block, fetch)
        return fetch

    def leaf_hashes(self, file: BlockFile, block: int) -> bytes | None:
        """The concatenated leaf hashes of a block; None when they are not known."""
        if self._leaves is None or file.revision.size <= LEAF_SIZE:
            return None
        try:
            return self._leaves(file.revision, block)
        except LamfsError as error:
            log.warning("The leaf hashes of '%s' cannot be read: %s", file.revision.object_key, error)
            return None

    def start_leaves(self, file: BlockFile, block: int, first: int, last: int, prefetch: bool = False) -> Fetch:
        """Fetch leaves ``first`` to ``last`` of an absent block, whose hashes are known. As start."""
        if self.nursery is None:
            raise TransferDied("The block cache is not running: the mount is being ended.")
        if not prefetch and self.prefetch.random_miss(file):
            return self.start(file, block)
        fetch = Fetch(prefetch, leaf_mask(file.revision.size, block, first, last))
        file.leaves.setdefault(block, Leaves(0)).fetches.append(fetch)
        file.refs += 1
        self.nursery.start_soon(self._run_leaves, file, block, first, fetch)
        return fetch

    def failure(self, fetch: Fetch) -> LamfsError:
        """A new exception for the error of a fetch: one exception object must not be raised in several tasks."""
        error = fetch.error
        assert error is not None
        return jobs.again(error)

    def start_stretch(self, file: BlockFile, block: int) -> None:
        """Prefetch a block and what one request can fetch with it. Counts as one prefetch."""
        blocks = _stretch(file, block)
        if len(blocks) == 1 or trio.current_time() < self._full_until:
            self.start(file, block, prefetch=True)
            return
        assert self.nursery is not None
        fetches = {number: Fetch(number == blocks[-1], unasked=True) for number in blocks}
        file.fetches.update(fetches)
        file.refs += len(fetches)
        self.nursery.start_soon(self._run_stretch, self.nursery, file, fetches)

    def ended(self, fetch: Fetch) -> None:
        """A fetch has ended: wake those who wait for it. The place of a prefetch is free again."""
        fetch.done.set()
        if fetch.prefetch:
            self.prefetch.ended()

    async def _run_block(self, file: BlockFile, block: int, fetch: Fetch) -> None:
        """Fetch a block, and end its fetch."""
        try:
            with beats.doing(file.beat), fetch.caught(f"block {block} of '{file.revision.object_key}'"):
                await self._bring(file, block)
        finally:
            self._finish(file, block, fetch)

    def _finish(self, file: BlockFile, block: int, fetch: Fetch) -> None:
        """The fetch of a block has ended."""
        del file.fetches[block]
        self.unref(file)
        self.ended(fetch)

    async def _run_stretch(self, nursery: trio.Nursery, file: BlockFile, fetches: dict[int, Fetch]) -> None:
        """Fetch consecutive blocks with one request. The fetch of each ends when it has arrived.

        When bytes are wrong, the disk is full or the mover dies, the blocks that are left are fetched one by one.
        """
        revision = file.revision
        left = list(fetches)
        error: LamfsError | None = None

        def came(count: int) -> None:
            for block in left[:count]:
                self.misses += 1
                with fetches[block].caught(f"block {block} of '{revision.object_key}'"):
                    self._block_came(file, block)
                self._finish(file, block, fetches[block])
            del left[:count]

        try:
            with beats.doing(file.beat):
                await self._mover.fetch_stretch(
                    revision.object_key,
                    etag=revision.etag,
                    offset=left[0] * BLOCK_SIZE,
                    blocks=[(file.span(block)[1], revision.content.block(block)) for block in left],
                    path=f"/proc/{os.getpid()}/fd/{file.fd()}",
                    came=came,
                )
        except (DamagedData, StorageFull, TransferDied) as problem:
            log.debug("Blocks of '%s' are brought one by one: %s", revision.object_key, problem)
        except LamfsError as problem:
            error = problem
        finally:
            for block in left:
                if error is None:
                    nursery.start_soon(self._run_block, file, block, fetches[block])
                else:
                    self.misses += 1
                    fetches[block].error = error
                    self._finish(file, block, fetches[block])

    async def _run_leaves(self, file: BlockFile, block: int, first: int, fetch: Fetch) -> None:
        came = False
        try:
            with beats.doing(file.beat), fetch.caught(f"leaves of block {block} of '{file.revision.object_key}'"):
                came = await self._bring_leaves(file, block, first, fetch.mask)
                if not came:
                    # Either the bytes or the leaf hashes are wrong: the block's own hash decides.
                    whole = self.start(file, block)
                    await whole.done.wait()
                    fetch.error = whole.error
        finally:
            leaves = file.leaves.get(block)
            if leaves is not None and fetch in leaves.fetches:
                leaves.fetches.remove(fetch)
            self.unref(file)
            self.ended(fetch)
        try:  # serve the waiting readers first, then tell the index
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
        finally:
            if came and file.path is not None and file.fd() >= 0 and file.has_leaves(block, fetch.mask):
                self._index.mark_leaves(file.path, sparse.tag(file.revision), block, fetch.mask, ino=file.ino)
                self._came(file, leaf_bytes(file.revision.size, block, fetch.mask))

    async def _bring_leaves(self, file: BlockFile, block: int, first: int, mask: int) -> bool:
        """Fetch a run of leaves. False: they do not match their hashes."""
        revision = file.revision
        hashes = self.leaf_hashes(file, block)
        if hashes is None:  # the artifact has just been deleted or replaced
            return False
        length = leaf_bytes(revision.size, block, mask)
        wanted = hashes[first * LEAF_HASH : (first + mask.bit_count()) * LEAF_HASH]
        path = f"/proc/{os.getpid()}/fd/{file.fd()}"
        self.misses += 1
        try:
            await self._fetch(revision, block * BLOCK_SIZE + first * LEAF_SIZE, length, path, None, wanted)
        except DamagedData:
            return False
        self.fetched += length
        file.came(block, mask)
        return True

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
        self._block_came(file, block)

    def _block_came(self, file: BlockFile, block: int) -> None:
        """A block has arrived, and it is right."""
        revision, length = file.revision, file.span(block)[1]
        self.fetched += length
        file.verified(block)
        assert file.path is not None
        if len(file.state) == 1 and revision.size <= self._seal_bytes:
            mtime = os.fstat(file.fd()).st_mtime_ns
            if self._index.complete_all([(file.path, sparse.tag(revision), file.ino, mtime)]):  # one transaction
                self.grown(length)
                return
        self._index.mark(file.path, sparse.tag(revision), (block,), ino=file.ino)
        self._came(file, length)

    def _came(self, file: BlockFile, length: int) -> None:
        """Bytes were added to a file. One larger than the cache is not sealed, so that its regions can be evicted."""
        assert file.path is not None
        if file.whole() and file.revision.size <= self._seal_bytes:
            sparse.seal(self._index, file.path, file.revision, file.fd())
        self.grown(length)

    async def aside(self, file: BlockFile, offset: int, size: int) -> bytes:
        """Verified bytes by way of memory, when the cache's disk is full. Raises as BlockFile.read."""
        revision = file.revision
        async with self._aside:
            fd = os.memfd_create("lamfs-aside", os.MFD_CLOEXEC)
            try:
                path = f"/proc/{os.getpid()}/fd/{fd}"
                for block, mask in file.masks(offset, offset + size):
                    await self._fetch_aside(file, block, mask, path)
                return os.pread(fd, size, offset)
            finally:
                os.close(fd)
                self.grown(0)
                log.debug("%d bytes of '%s' passed the full cache by.", size, revision.object_key)

    async def _fetch_aside(self, file: BlockFile, block: int, mask: int, path: str) -> None:
        revision = file.revision
        hashes = self.leaf_hashes(file, block)
        start, length = file.span(block)
        self.misses += 1
        if hashes is not None:
            first = (mask & -mask).bit_length() - 1
            part = leaf_bytes(revision.size, block, mask)
            wanted = hashes[first * LEAF_HASH : mask.bit_length() * LEAF_HASH]
            try:
                await self._give(revision, start + first * LEAF_SIZE, part, path, None, wanted)
                self.fetched += part
                return
            except DamagedData:
                pass  # the block's own hash decides
        await self._give(revision, start, length, path, revision.content.block(block), None)
        self.fetched += length

    async def graft(self, file: BlockFile, block: int, donor: int) -> None:
        """Copy a block from another open cache file (descriptor ``donor``), if that has the right bytes."""
        offset, length = file.span(block)
        digest = file.revision.content.block(block)
        ours, theirs = (f"/proc/{os.getpid()}/fd/{fd}" for fd in (file.fd(), donor))
        with file.pinned(range(block, block + 1)):  # leaves that arrived before are not punched while it is written
            if not await self._mover.graft(theirs, ours, offset=offset, length=length, digest=digest):
                return
            file.verified(block)
        assert file.path is not None
        self._index.mark(file.path, sparse.tag(file.revision), (block,), ino=file.ino)
        self._came(file, length)

    async def _verify(self, file: BlockFile, path: str, offset: int, length: int, digest: bytes) -> bool:
        try:
            return await persist(lambda: self._mover.verify(path, offset=offset, length=length, digest=digest))
        except StorageError as error:
            if file.path is None:
                raise
            log.warning("The cache file %s cannot be read: %s", file.path, error)
            return False

    async def _fetch(
        self,
        revision: Revision,
        offset: int,
        length: int,
        path: str,
        digest: bytes | None,
        leaves: bytes | None = None,
    ) -> None:
        if trio.current_time() < self._full_until:
            raise StorageFull("The cache's disk is full.")
        try:
            await self._give(revision, offset, length, path, digest, leaves)
        except StorageFull:  # the cache's disk is full
            await self._make_room()
            try:
                await self._give(revision, offset, length, path, digest, leaves)
            except StorageFull:
                self._full_until = trio.current_time() + FULL_SECONDS
                raise

    async def _give(
        self, revision: Revision, offset: int, length: int, path: str, digest: bytes | None, leaves: bytes | None
    ) -> None:
        """Give the mover a fetch job."""
        await persist(
            lambda: self._mover.fetch(
                revision.object_key,
                etag=revision.etag,
                offset=offset,
                length=length,
                path=path,
                digest=digest,
                leaves=leaves,
            )
        )

    def _log_damage(self, revision: Revision, block: int) -> None:
        url = self._store.url(revision.object_key)
        log.error("Block %d of the object %s (ETag %s) is damaged in storage.", block, url, revision.etag)

    def _storage_damage(self, file: BlockFile, block: int) -> StorageError:
        """A block of a local storage's file is wrong: somebody wrote to the file, or it rotted."""
        url, etag = self._store.url(file.revision.object_key), file.revision.etag
        if etag_of(os.fstat(file.fd())) != etag:
            return ObjectChanged(f"The object {url} was changed in place; look the artifact up again.")
        self.on_storage_damage(file.revision, block)
        return DamagedData(
            f"The object {url} (ETag {etag}) is damaged in block {block}: its bytes are not what was saved. Restore "
            "the file from a backup or replace the artifact."
        )


def _stretch(file: BlockFile, block: int) -> range:
    """A block, and those behind it that one request can fetch too."""
    end = block + 1
    last = min(end + -end % STRETCH, len(file.state))
    while end < last and file.state[block] == file.state[end] == ABSENT and end not in file.fetches:
        end += 1
    return range(block, end)
