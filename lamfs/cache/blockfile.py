"""One revision's bytes as a local file that fills by blocks and leaves. The trio loop only.

All readers of a revision in the process share one BlockFile. It gives out bytes only from blocks, or leaves of blocks,
that this process has verified. A random read fetches or verifies only the leaves that it needs.

Pages in the kernel's memory are as they were when they were verified. Pages that are not there come from the disk,
which may have lost them: then whole leaves are read and hashed again. No page may get into memory without that, so the
kernel's own readahead is off for these files. What the kernel is asked to read ahead is recorded (``_ahead``) and
hashed when it is read.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from os import RWF_NOWAIT, pread, preadv
from typing import Protocol

import trio

from lamfs.cache.bits import REGION_BLOCKS, leaf_mask
from lamfs.cache.resident import is_resident
from lamfs.cache.states import ABSENT, PRESENT, VERIFIED, Fetch, Leaves
from lamfs.errors import LamfsError, StorageError, StorageFull, StorageUnavailable
from lamfs.hashing import hash_block, hash_leaf, hash_leaves
from lamfs.model import BLOCK_SIZE, LEAF_HASH, LEAF_SIZE, Revision
from lamfs.mover.beats import Beat

OLD_SECONDS = 0.5
"""Seconds. A read that comes this much later than a fetch began does not accept its failure, but tries again."""
FILL_WINDOW = 4
"""Blocks that fill() and large reads fetch at a time. Most of the mover's readers stay free for others."""

SMALL = 64 << 10
"""Bytes. A smaller block is verified right here: hashing it takes less time than a job's round trip."""

AHEAD = 2 << 20
"""Bytes that the kernel is asked to read ahead when a read continues the last one ..."""
NEAR = 256 << 10
"""... or is this close to its end: the kernel's requests come in odd order."""

FEW_LEAVES = 16
"""Reads of up to so many leaves of a block fetch and verify only these. The kernel asks for 1 MiB at most."""

_SHIFT = BLOCK_SIZE.bit_length() - 1
_LEAF_SHIFT = LEAF_SIZE.bit_length() - 1
_IN_BLOCK = BLOCK_SIZE - 1
_REGION_SHIFT = REGION_BLOCKS.bit_length() - 1


class BlockSource(Protocol):
    """What a BlockFile needs of the cache: see Fetches."""

    def leaf_hashes(self, file: BlockFile, block: int) -> bytes | None:
        """The concatenated leaf hashes of a block; None when they are not known."""

    def start_leaves(self, file: BlockFile, block: int, first: int, last: int) -> Fetch:
        """Fetch leaves ``first`` to ``last`` of a block."""

    def start(self, file: BlockFile, block: int) -> Fetch:
        """The fetch of a block. Starts one if there is none."""

    def unref(self, file: BlockFile) -> None:
        """Drop one reference."""

    def failure(self, fetch: Fetch) -> LamfsError:
        """A new exception for the error of a fetch."""

    async def aside(self, file: BlockFile, offset: int, size: int) -> bytes:
        """Verified bytes straight from storage, without keeping them in the cache."""


class BlockFile:
    """An open (sparse) file of one revision. BlockCache.open makes it; close() drops the reference."""

    __slots__ = (
        "_ahead",
        "_ahead_end",
        "_cold_end",
        "_fd",
        "_ready",
        "_size",
        "_source",
        "beat",
        "fetches",
        "hits",
        "homeless",
        "ino",
        "kept",
        "leaf_misses",
        "leaves",
        "path",
        "pins",
        "recent",
        "refs",
        "revision",
        "state",
        "todo",
    )

    def __init__(
        self,
        source: BlockSource,
        revision: Revision,
        fd: int,
        ino: int,
        path: str | None,
        state: bytearray,
        partial: dict[int, int] | None = None,
    ) -> None:
        self.revision = revision
        self.path = path
        """Relative path in the cache; None for the file of a local storage itself."""
        self.ino = ino
        self.state = state
        """ABSENT, PRESENT or VERIFIED per block. (A local storage's blocks are never ABSENT.)"""
        self.refs = 0
        """Users and fetches. The cache closes the file some time after the last one is gone."""
        self.hits = 0
        self.beat = Beat()
        """Progress of fetching its bytes."""
        self.fetches: dict[int, Fetch] = {}
        """Whole blocks in flight."""
        self.leaves = {block: Leaves(mask) for block, mask in (partial or {}).items() if state[block] == ABSENT}
        self.leaf_misses = (0, 0.0)
        """How many random reads had to fetch leaves, and since when (trio's clock). The prefetcher counts them."""
        self.homeless = False
        """There was no space for a cache file: nothing is kept."""
        self.pins: dict[int, int] = {}
        """How many reads wait for a block, or are about to read it."""
        self.kept: set[int] = set()
        """Blocks that must stay until the last user is gone."""
        self.recent = bytearray((len(state) >> _REGION_SHIFT) + 1)
        """Regions that were read since the cache last looked."""
        self._source = source
        self._fd = fd
        self._ahead: dict[int, int] = {}
        """Leaves (a mask per block) that are in memory, or may be soon, and have not been hashed since."""
        self._cold_end = -NEAR
        """Where the last read from the disk ended."""
        self._ahead_end = 0
        """Where the range that the kernel was asked to read ahead ends."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._size = revision.size
        self._ready = bytearray(state.replace(b"\x01", b"\x00").replace(b"\x02", b"\x01"))  # 1 for verified blocks
        self.todo = len(state) - state.count(VERIFIED)
        """Blocks that are not verified."""

    def fd(self) -> int:
        """Descriptor of the (sparse) file. The BlockFile owns it."""
        return self._fd

    def ref(self) -> None:
        """Take another reference; drop it with ``close``. For a caller that waits while its own may be dropped."""
        self.refs += 1

    def close(self) -> None:
        """Drop the reference. The caller does not use the object afterwards."""
        self._source.unref(self)

    # ---- reading

    def read_now(self, offset: int, size: int) -> bytes | None:
        """The bytes, cut at the file's end, if all that they touch is verified; else None. Never waits."""
        left = self._size - offset
        if size >= left:
            if left <= 0:
                return b""
            size = left
        first = offset >> _SHIFT
        last = (offset + size - 1) >> _SHIFT
        if first == last:
            if not self._ready[first] and not self._has_verified(offset, size):
                return None
        elif self._ready.find(0, first, last + 1) >= 0 and not self._has_verified(offset, size):
            return None
        data = bytearray(size)
        try:
            known = not self._ahead or not self._is_ahead(offset, size)
            count = preadv(self._fd, [data], offset, RWF_NOWAIT) if known else 0
        except OSError:  # nothing is in memory, or the file system cannot tell
            count = 0
        if count != size:
            found = self._from_disk(offset, size)
            if found is None:  # read() fetches the block again
                return None
            data = found
        self.hits += 1
        self.recent[first >> _REGION_SHIFT] = 1
        return data  # type: ignore[return-value]  # nobody changes it

    def _is_ahead(self, offset: int, size: int) -> bool:
        return any(self._ahead.get(block, 0) & mask for block, mask in self.masks(offset, offset + size))

    def _from_disk(self, offset: int, size: int) -> bytearray | None:
        """Verified bytes that are not all in memory, hashed again. None: they are wrong, or unreadable."""
        found = bytearray()
        end = offset + size
        for block, mask in self.masks(offset, end):
            start, length = self.span(block)
            hashes = self._source.leaf_hashes(self, block)
            first = (mask & -mask).bit_length() - 1
            low, high = first << _LEAF_SHIFT, min(mask.bit_length() << _LEAF_SHIFT, length)
            data = self._disk(start + low, high - low) if hashes is not None else b""
            if hashes is None or hash_leaves(data) != hashes[first * LEAF_HASH : mask.bit_length() * LEAF_HASH]:
                low, data = 0, self._disk(start, length)
                if hash_block(data) != self.revision.content.block(block):
                    self._distrust(block, block)
                    return None
                mask = leaf_mask(self._size, block)
            if block in self._ahead:
                left = self._ahead[block] & ~mask
                if left:
                    self._ahead[block] = left
                else:
                    del self._ahead[block]
            place = start + low
            with memoryview(data) as view:
                found += view[max(offset - place, 0) : end - place]
        if self._cold_end - NEAR <= offset <= self._cold_end + NEAR:
            self._look_ahead(end)
        self._cold_end = end
        return found

    def _disk(self, offset: int, length: int) -> bytes:
        try:
            return pread(self._fd, length, offset)
        except OSError:  # a bad sector
            return b""

    def _look_ahead(self, end: int) -> None:
        """Ask the kernel to read ahead, once half of what it was asked for before is read."""
        known = self._ahead_end if end <= self._ahead_end <= end + AHEAD else end
        if known > end + AHEAD // 2:
            return
        first, stop = -(-known // LEAF_SIZE) * LEAF_SIZE, min(end + AHEAD, self._size)
        if first >= stop:
            return
        self._ahead_end = stop = min(-(-stop // LEAF_SIZE) * LEAF_SIZE, self._size)
        for block, mask in self.masks(first, stop):
            self._ahead[block] = self._ahead.get(block, 0) | mask
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, first, stop - first, os.POSIX_FADV_WILLNEED)

    def _forget_lost(self, first: int, last: int) -> None:
        """Blocks whose pages have left the memory must be verified again."""
        for block in range(first, last + 1):
            if self.state[block] != VERIFIED or block in self.fetches:
                continue
            if block in self._ahead or not is_resident(self._fd, *self.span(block)):
                self._ahead.pop(block, None)
                self.lost(block, PRESENT)

    async def read(self, offset: int, size: int, *, whole: bool = False) -> bytes:
        """The bytes, cut at the end of the file. What is missing is fetched, once for all readers.

        ``whole``: fetch whole blocks, because what is around will be read too. Else a small read fetches leaves, if
        their hashes are known. Raises ObjectChanged, ObjectMissing, DamagedData, StorageUnavailable, TransferDied. Has
        no checkpoint when nothing is missing.
        """
        size = min(size, self._size - offset)
        if size <= 0:
            return b""
        if self.homeless:
            return await self._source.aside(self, offset, size)
        blocks = range(offset >> _SHIFT, ((offset + size - 1) >> _SHIFT) + 1)
        self._pin(blocks, 1)
        try:
            for _ in range(3):
                await self._bring(offset, offset + size, whole)
                data = self.read_now(offset, size)
                if data is not None:
                    return data
                self._distrust(blocks[0], blocks[-1])
        except StorageFull:  # the cache's disk is full, and nothing can be evicted
            return await self._source.aside(self, offset, size)
        finally:
            self._pin(blocks, -1)
        raise StorageError(
            f"The local file of '{self.revision.object_key}' is cut or unreadable again and again; check the disk."
        )

    @contextlib.contextmanager
    def pinned(self, blocks: range) -> Iterator[None]:
        """Blocks are not evicted inside the context."""
        self._pin(blocks, 1)
        try:
            yield
        finally:
            self._pin(blocks, -1)

    def _pin(self, blocks: range, by: int) -> None:
        for block in blocks:
            count = self.pins.get(block, 0) + by
            if count:
                self.pins[block] = count
            else:
                del self.pins[block]

    def is_needed(self, block: int) -> bool:
        """Whether a block must not be evicted now: it is in flight, waited for, or must stay."""
        leaves = self.leaves.get(block)
        in_flight = block in self.fetches or (leaves is not None and bool(leaves.fetches))
        return in_flight or block in self.pins or block in self.kept

    def ask(self, block: int) -> None:
        """Start to fetch a block that will be read soon. Errors are left to the read. Raises TransferDied."""
        if self.state[block] != VERIFIED and not self.homeless:
            self._source.start(self, block)

    async def fill(self) -> int:
        """Fetch and verify all blocks. Returns the descriptor of the complete file. Raises as read, and StorageFull.

        The blocks stay until the last user of the file is gone.
        """
        if self.homeless:
            raise StorageFull(f"There is no room in the cache for '{self.revision.object_key}'; make room on its disk.")
        self.kept.update(range(len(self.state)))
        if os.fstat(self._fd).st_size != self._size:  # somebody cut the cache file
            self._distrust(0, len(self.state) - 1)
        self._forget_lost(0, len(self.state) - 1)
        if self.todo:
            await self._bring(0, self._size, True)
        return self._fd

    async def _bring(self, offset: int, end: int, whole: bool) -> None:
        """Fetch and verify what bytes ``offset`` to ``end`` touch."""
        asked = trio.current_time()
        waiting: deque[tuple[int, int, bool, Fetch]] = deque()
        for block, mask in self.masks(offset, end):
            if self.state[block] == VERIFIED:
                continue
            while len(waiting) >= FILL_WINDOW:
                await self._await_oldest(waiting, asked)
            entire = whole or mask.bit_count() > FEW_LEAVES
            fetch = self._want(block, mask, entire)
            if fetch is not None:
                waiting.append((block, mask, entire, fetch))
        while waiting:
            await self._await_oldest(waiting, asked)

    async def _await_oldest(self, waiting: deque[tuple[int, int, bool, Fetch]], asked: float) -> None:
        """Wait for the oldest fetch. If it did not bring all that is wanted of its block, start or join another one.

        A fetch that was in flight before this read began (``asked``) may have failed after its full time. This read has
        not waited yet, and storage may be back: it tries again.
        """
        block, mask, entire, fetch = waiting.popleft()
        await fetch.done.wait()
        if fetch.error is not None:
            old = fetch.unasked or fetch.began < asked - OLD_SECONDS
            if not (old and isinstance(fetch.error, StorageUnavailable)):
                raise self._source.failure(fetch)
        more = self._want(block, mask, entire)
        if more is not None:
            waiting.append((block, mask, entire, more))

    def masks(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """The blocks that bytes ``offset`` to ``end`` touch, and the leaves of each."""
        first, last = offset >> _SHIFT, (min(end, self._size) - 1) >> _SHIFT
        for block in range(first, last + 1):
            start = (offset & _IN_BLOCK) >> _LEAF_SHIFT if block == first else 0
            stop = ((min(end, self._size) - 1) & _IN_BLOCK) >> _LEAF_SHIFT if block == last else 63
            yield block, leaf_mask(self._size, block, start, stop)

    def _want(self, block: int, mask: int, entire: bool) -> Fetch | None:
        """The fetch to wait for before leaves of a block can be read; None: now. ``entire``: prefer the whole block."""
        if self.verify_small(block):
            return None
        fetch = self.fetches.get(block)
        if fetch is not None:
            return fetch
        leaves = self.leaves.get(block)
        if entire:
            missing = mask if leaves is None else mask & ~leaves.verified
            if leaves is None or missing & ~leaves.in_flight():
                return self._source.start(self, block)
            return next((fetch for fetch in leaves.fetches if fetch.mask & missing), None)
        hashes = self._source.leaf_hashes(self, block)
        if hashes is None:
            return self._source.start(self, block)
        if leaves is None:
            leaves = self.leaves[block] = Leaves(leaf_mask(self._size, block) if self.state[block] == PRESENT else 0)
        self._check_leaves(block, leaves, mask, hashes)
        missing = mask & ~leaves.verified
        if not missing:
            return None
        if self.state[block] == PRESENT:  # a leaf is wrong: the fetch finds the same and reports it
            return self._source.start(self, block)
        run = self.missing(block, missing)
        if run is None:
            return next(fetch for fetch in leaves.fetches if fetch.mask & missing)
        return self._source.start_leaves(self, block, *run)

    def missing(self, block: int, mask: int) -> tuple[int, int] | None:
        """First and last of a run of leaves of an absent block that have to be fetched for ``mask``; None: none have
        to.

        The run covers all missing leaves of ``mask``, or the first of them when others between are in flight.
        """
        leaves = self.leaves.get(block)
        in_flight = 0 if leaves is None else leaves.in_flight()
        free = mask & ~in_flight if leaves is None else mask & ~in_flight & ~leaves.present
        if not free:
            return None
        first, last = (free & -free).bit_length() - 1, free.bit_length() - 1
        if leaf_mask(self._size, block, first, last) & in_flight:
            last = first + (~(free >> first) & -~(free >> first)).bit_length() - 2
        return first, last

    def _check_leaves(self, block: int, leaves: Leaves, mask: int, hashes: bytes) -> None:
        """Verify those of the leaves that are in the file, right here: it takes some 20 microseconds each."""
        unsure = mask & leaves.present & ~leaves.verified
        while unsure:
            bit = unsure & -unsure
            unsure ^= bit
            leaf = bit.bit_length() - 1
            offset = (block << _SHIFT) + (leaf << _LEAF_SHIFT)
            try:
                data = pread(self._fd, min(LEAF_SIZE, self._size - offset), offset)
            except OSError:  # a bad sector
                data = b""
            if hash_leaf(data) == hashes[leaf * LEAF_HASH : (leaf + 1) * LEAF_HASH]:
                leaves.verified |= bit
            elif self.state[block] == PRESENT:
                return
            else:
                leaves.present ^= bit  # torn: as if it had never arrived
        if leaves.verified == leaf_mask(self._size, block):
            self.verified(block)

    def _has_verified(self, offset: int, size: int) -> bool:
        for block, mask in self.masks(offset, offset + size):
            if self.state[block] != VERIFIED:
                leaves = self.leaves.get(block)
                if leaves is None or mask & ~leaves.verified:
                    return False
        return True

    def verify_small(self, block: int) -> bool:
        """Verify a small block in the file without the mover. False: it is wrong, or cannot be decided here."""
        if block >= len(self.state) or self.state[block] != PRESENT or block in self.fetches:
            return block < len(self.state) and self.state[block] == VERIFIED
        offset, length = self.span(block)
        if length > SMALL:
            return False
        try:
            data = pread(self._fd, length, offset)
        except OSError:
            return False
        if len(data) != length or hash_block(data) != self.revision.content.block(block):
            return False  # the fetch finds the same and reports it
        self.verified(block)
        return True

    # ---- what the cache tells

    def span(self, block: int) -> tuple[int, int]:
        """Offset and length of a block in bytes."""
        offset = block * BLOCK_SIZE
        return offset, min(BLOCK_SIZE, self._size - offset)

    def verified(self, block: int) -> None:
        """The block's bytes are in the file, and they are right."""
        if self.state[block] != VERIFIED:
            self.state[block] = VERIFIED
            self.todo -= 1
            self.leaves.pop(block, None)
        self._ready[block] = 1

    def came(self, block: int, mask: int) -> None:
        """Leaves of a block are in the file, and they are right."""
        leaves = self.leaves.get(block)
        if self.state[block] == VERIFIED or leaves is None:
            return
        leaves.present |= mask
        leaves.verified |= mask
        full = leaf_mask(self._size, block)
        if leaves.verified == full:
            self.verified(block)
        elif leaves.present == full:
            self.state[block] = PRESENT

    def has_leaves(self, block: int, mask: int) -> bool:
        """Whether these leaves are in the file, and right."""
        leaves = self.leaves.get(block)
        return self.state[block] == VERIFIED or (leaves is not None and not mask & ~leaves.verified)

    def lost(self, block: int, state: int = ABSENT) -> None:
        """The block's bytes are wrong or, with ``state`` PRESENT, not known to be right."""
        if self.state[block] == VERIFIED:
            self.todo += 1
        self.state[block] = state
        self._ready[block] = 0
        self.leaves.pop(block, None)

    def _distrust(self, first: int, last: int) -> None:
        for block in range(first, last + 1):
            leaves = self.leaves.get(block)
            if self.state[block] == ABSENT:
                if leaves is not None:
                    leaves.verified = 0
            elif block not in self.fetches:
                self.lost(block, PRESENT)

    def has(self, offset: int, size: int) -> bool:
        """Whether no block of the range is absent, so that it can be read without storage."""
        return self.state.find(ABSENT, offset >> _SHIFT, (offset + size - 1 >> _SHIFT) + 1) < 0

    def whole(self) -> bool:
        """Whether no block is absent."""
        return self.state.find(ABSENT) < 0

    def shut(self) -> int:
        """Return the descriptor, which the caller has to close. Later reads fail."""
        fd, self._fd = self._fd, -1
        return fd

    def identity(self) -> tuple[int, int]:
        """(inode, ctime in ns) of the open file."""
        found = os.fstat(self._fd)
        return found.st_ino, found.st_ctime_ns
