"""One revision's bytes as a local file that fills block by block: which blocks may be read, and reading them.

The trio loop only; all readers of a revision in the process share one BlockFile. Bytes are given out only from blocks
that this process has verified.
"""

from __future__ import annotations

import os
from collections import deque
from os import pread
from typing import Protocol

import trio

from lamfs.errors import LamfsError, StorageError
from lamfs.hashing import hash_block
from lamfs.model import BLOCK_SIZE, Revision

ABSENT, PRESENT, VERIFIED = 0, 1, 2
"""States of a block: not in the file; said to be in the file by the index; checked by this process."""

FILL_WINDOW = 4
"""Blocks that fill() and reads over many blocks bring at a time: most of the mover's readers stay for others."""

SMALL = 64 << 10
"""Blocks up to this many bytes are verified right here: hashing them takes less time than a job's way and back."""

_SHIFT = BLOCK_SIZE.bit_length() - 1


class Flight:
    """One block on its way; every reader that wants the block waits for the same one."""

    __slots__ = ("error", "landed", "prefetch")

    def __init__(self, prefetch: bool) -> None:
        self.prefetch = prefetch
        self.landed = trio.Event()
        self.error: LamfsError | None = None


class Owner(Protocol):
    """What a BlockFile needs of its cache."""

    prefetch_blocks: int

    def start(self, file: BlockFile, block: int) -> Flight:
        """The flight of a block, started if there is none."""

    def prefetch(self, file: BlockFile, block: int) -> None:
        """Bring a block when there is capacity to spare."""

    def release(self, file: BlockFile) -> None:
        """Drop one reference."""

    def failure(self, flight: Flight) -> LamfsError:
        """A fresh exception for the error of a flight."""


class BlockFile:
    """An open (sparse) file of one revision. Made by BlockCache.open; close() gives the reference back."""

    __slots__ = (
        "_ahead",
        "_fd",
        "_next",
        "_owner",
        "_ready",
        "_size",
        "_todo",
        "_trigger",
        "_window",
        "flights",
        "hits",
        "ino",
        "path",
        "refs",
        "revision",
        "state",
    )

    def __init__(self, owner: Owner, revision: Revision, fd: int, ino: int, path: str | None, state: bytearray) -> None:
        self.revision = revision
        self.path = path
        """Relative path in the cache; None for the file of a local storage itself."""
        self.ino = ino
        self.state = state
        """ABSENT, PRESENT or VERIFIED per block. (A local storage's blocks are never ABSENT.)"""
        self.refs = 0
        """Users and flights. The cache closes the file some time after the last is gone."""
        self.hits = 0
        self.flights: dict[int, Flight] = {}
        self._owner = owner
        self._fd = fd
        self._size = revision.size
        # What read_now may give out: 1 for verified blocks, but for the one that extends the prefetch when reached.
        self._ready = bytearray(state.replace(b"\x01", b"\x00").replace(b"\x02", b"\x01"))
        self._todo = len(state) - state.count(VERIFIED)
        self._trigger = -1
        self._next = 0
        self._ahead = 0
        self._window = 1

    def fd(self) -> int:
        """Descriptor of the (sparse) file. The BlockFile owns it."""
        return self._fd

    def close(self) -> None:
        """Drop the reference. The object is not used by this holder afterwards."""
        self._owner.release(self)

    # ---- reading

    def read_now(self, offset: int, size: int) -> bytes | None:
        """The bytes at once, cut at the end of the file, when every block they touch is verified; else None.

        None is also the answer now and then at the start of a block, so that read() can go on prefetching.
        """
        left = self._size - offset
        if size >= left:
            if left <= 0:
                return b""
            size = left
        first = offset >> _SHIFT
        last = (offset + size - 1) >> _SHIFT
        if first == last:
            if not self._ready[first]:
                return None
        elif self._ready.find(0, first, last + 1) >= 0:
            return None
        try:
            data = pread(self._fd, size, offset)
        except OSError:  # a bad sector: read() brings the block again
            return None
        if len(data) != size:  # somebody truncated the cache file
            return None
        self.hits += 1
        return data

    async def read(self, offset: int, size: int, *, sequential: bool = False) -> bytes:
        """The bytes, cut at the end of the file; missing blocks are brought, each once for all who want it.

        ``sequential`` brings following blocks in the background, more of them the longer the sequence goes on.
        Raises ObjectChanged, ObjectMissing, DamagedData, StorageUnavailable, TransferDied. No checkpoint when nothing
        is missing.
        """
        size = min(size, self._size - offset)
        if size <= 0:
            return b""
        first, last = offset >> _SHIFT, (offset + size - 1) >> _SHIFT
        for _ in range(3):
            await self._bring(first, last, sequential)
            data = self.read_now(offset, size)
            if data is not None:
                return data
            self._distrust(first, last)
        raise StorageError(
            f"The local file of '{self.revision.object_key}' is cut or unreadable again and again; check the disk."
        )

    async def fill(self) -> int:
        """Bring and verify all blocks; returns the descriptor of the complete file. Raises as read."""
        if os.fstat(self._fd).st_size != self._size:  # somebody cut the cache file
            self._distrust(0, len(self.state) - 1)
        if self._todo:
            await self._bring(0, len(self.state) - 1, False)
        return self._fd

    async def _bring(self, first: int, last: int, sequential: bool) -> None:
        waiting: deque[Flight] = deque()
        for block in range(first, last + 1):
            while self.state[block] != VERIFIED and not self._verify_small(block):
                if len(waiting) >= FILL_WINDOW:
                    await self._wait(waiting.popleft())
                    continue  # somebody else may have brought it meanwhile
                waiting.append(self._owner.start(self, block))
                break
        if sequential:
            self._read_ahead(first, last)
        while waiting:
            await self._wait(waiting.popleft())
        if self._trigger >= 0 and first <= self._trigger <= last:
            self._trigger = -1
        for block in range(first, last + 1):
            self._ready[block] = self.state[block] == VERIFIED

    async def _wait(self, flight: Flight) -> None:
        await flight.landed.wait()
        if flight.error is not None:
            raise self._owner.failure(flight)

    def _verify_small(self, block: int) -> bool:
        """Verify a small block that is here without asking the mover; False when that cannot be said."""
        if self.state[block] != PRESENT or block in self.flights:
            return False
        offset, length = self.span(block)
        if length > SMALL:
            return False
        try:
            data = pread(self._fd, length, offset)
        except OSError:
            return False
        if len(data) != length or hash_block(data) != self.revision.content.block(block):
            return False  # the flight finds the same, and says so
        self.verified(block)
        return True

    def _read_ahead(self, first: int, last: int) -> None:
        """A sequential reader is at blocks first..last: bring the next ones, once for each block it enters."""
        if not self._todo:
            return
        if not self._next - 1 <= first <= self._ahead:  # a new sequence
            self._window, self._ahead = 1, last + 1
        elif last < self._next:
            return
        limit = self._owner.prefetch_blocks
        self._next = last + 1
        end = min(last + 1 + min(self._window, limit), len(self.state))
        for block in range(max(self._ahead, last + 1), end):
            if self.state[block] != VERIFIED:
                self._owner.prefetch(self, block)
        self._ahead = max(self._ahead, end)
        self._window = min(2 * self._window, max(limit, 1))
        if limit and last + 1 < len(self.state):
            self._set_trigger(last + 1)

    def _set_trigger(self, block: int) -> None:
        old, self._trigger = self._trigger, block
        if old >= 0:
            self._ready[old] = self.state[old] == VERIFIED
        self._ready[block] = 0

    # ---- what the cache tells

    def span(self, block: int) -> tuple[int, int]:
        """Offset and length of a block in bytes."""
        offset = block * BLOCK_SIZE
        return offset, min(BLOCK_SIZE, self._size - offset)

    def verified(self, block: int) -> None:
        """The block's bytes are in the file, and they are right."""
        if self.state[block] != VERIFIED:
            self.state[block] = VERIFIED
            self._todo -= 1
        self._ready[block] = block != self._trigger

    def lost(self, block: int, state: int = ABSENT) -> None:
        """The block's bytes are not what they should be (``state`` PRESENT: not known to be)."""
        if self.state[block] == VERIFIED:
            self._todo += 1
        self.state[block] = state
        self._ready[block] = 0

    def _distrust(self, first: int, last: int) -> None:
        for block in range(first, last + 1):
            if block not in self.flights:
                self.lost(block, PRESENT)

    def holds(self, offset: int, size: int) -> bool:
        """Whether no block of the range is absent: it can be read without storage."""
        return self.state.find(ABSENT, offset >> _SHIFT, (offset + size - 1 >> _SHIFT) + 1) < 0

    def whole(self) -> bool:
        """Whether no block is absent."""
        return self.state.find(ABSENT) < 0

    def shut(self) -> int:
        """Give up the descriptor: the caller closes it. Reads fail from now on."""
        fd, self._fd = self._fd, -1
        return fd

    def identity(self) -> tuple[int, int]:
        """(inode, ctime in ns) of the open file."""
        found = os.fstat(self._fd)
        return found.st_ino, found.st_ctime_ns
