"""The pattern in which one open handle reads, and what it will read next. The trio loop only; one Reader per handle.

A reader sorts its requests into runs of requests near each other. A run that keeps growing forwards or backwards is a
sequence: its next blocks are wished for, more of them the longer it grows. Runs of equal length at equal distances are
a stride. Everything else is random, and fetches only what is read.

The kernel sends the requests of one sequence (its readahead, or page faults of a mapping) in odd order, and mixes those
of several threads. So a run accepts requests that come a little early or late, and a reader has several runs.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from lamfs.cache.bits import leaf_mask
from lamfs.cache.blockfile import BlockFile
from lamfs.cache.states import VERIFIED
from lamfs.model import BLOCK_SIZE, LEAF_SIZE
from lamfs.prefetch import settings

_IN_BLOCK = BLOCK_SIZE - 1


class Wishes(Protocol):
    """What a Reader needs of the Prefetcher."""

    blocks: int
    """The widest window."""

    def wished(self, reader: Reader) -> None:
        """The reader has wishes."""


class Run:
    """Requests near each other: bytes ``low`` to ``high``, and how many were added above and below."""

    __slots__ = ("at", "down", "high", "low", "up", "window")

    def __init__(self, offset: int, end: int) -> None:
        self.low, self.high = offset, end
        self.up = self.down = 0
        self.window = 0
        """Blocks to have ahead; 0 until the run is a sequence."""
        self.at = -1
        """The block at which the window was last moved."""

    def accepts(self, offset: int, end: int) -> bool:
        """Whether a request belongs to the run; if so, the run grows."""
        near = settings.RUN_NEAR
        if self.window and self.up >= self.down:
            if not self.high - near <= offset <= self.high + near:
                return False
        elif not self.low - near <= offset <= (self.low if self.window else self.high) + near:
            return False
        if end > self.high:
            self.up += end - max(self.high, offset)
            self.high = end
        if offset < self.low:
            self.down += min(self.low, end) - offset
            self.low = offset
        return True


class Reader:
    """One open handle's reads, and its wishes: what it will read next. close() takes them back."""

    __slots__ = ("_distance", "_equal", "_runs", "_wishlist", "wishes")

    def __init__(self, wishlist: Wishes) -> None:
        self._wishlist = wishlist
        self._runs: list[Run] = []
        """The last used one comes first."""
        self._distance = 0
        """Bytes between the starts of the last two runs."""
        self._equal = 0
        """How many runs have followed each other at this distance."""
        self.wishes: deque[tuple[BlockFile, int, int]] = deque()
        """Blocks to fetch when there is capacity: file, number, and a mask of leaves (0: the whole block)."""

    def is_new(self) -> bool:
        """Whether nothing has been read through it yet."""
        return not self._runs

    def note(self, file: BlockFile, offset: int, size: int) -> bool:
        """A request was made: wish for what comes next. Returns whether the request is part of a sequence."""
        end = offset + size
        runs = self._runs
        for run in runs:
            if run.accepts(offset, end):
                if run is not runs[0]:
                    runs.remove(run)
                    runs.insert(0, run)
                break
        else:
            run = self._jumped(file, offset, end)
            if offset >= LEAF_SIZE:
                return False
            # Most files that are read from their start are read to their end: fetch the rest of the block too.
            rest = leaf_mask(file.revision.size, 0, (end - 1) // LEAF_SIZE + 1)
            if rest:
                self._wish(file, 0, rest)
            return False
        if not run.window:
            if max(run.up, run.down) < settings.RUN_SURE and not (run.low < LEAF_SIZE and run.up > run.down):
                return False
            run.window = 1
        self._go_on(file, run)
        return True

    async def read(self, file: BlockFile, offset: int, size: int) -> bytes:
        """As BlockFile.read; sequences are read in whole blocks, everything else by leaf."""
        return await file.read(offset, size, whole=self.note(file, offset, size))

    def close(self) -> None:
        """The handle is closed: drop its wishes."""
        self.wishes.clear()

    def _jumped(self, file: BlockFile, offset: int, end: int) -> Run:
        """A run begins: drop the wishes of the ones before. Perhaps it is the next one of a stride."""
        self.wishes.clear()
        runs = self._runs
        for run in runs:
            run.at = -1
        if runs:
            before = runs[0]
            distance = offset - before.low
            self._equal = self._equal + 1 if distance == self._distance else 1
            self._distance = distance
            if self._equal >= settings.STRIDE_RUNS - 1:
                self._stride(file, offset, max(end - offset, before.high - before.low))
        run = Run(offset, end)
        runs.insert(0, run)
        del runs[settings.RUNS :]
        return run

    def _stride(self, file: BlockFile, offset: int, length: int) -> None:
        """Wish for the next runs of a stride: twice as many as have been right, within reason."""
        if length > BLOCK_SIZE:
            return
        for number in range(1, min(2 * self._equal, 2 * self._wishlist.blocks) + 1):
            start = offset + number * self._distance
            stop = min(start + length, file.revision.size)
            if start < 0 or start >= stop:
                return
            for block in range(start // BLOCK_SIZE, (stop - 1) // BLOCK_SIZE + 1):
                first = max(start - block * BLOCK_SIZE, 0) // LEAF_SIZE
                last = min(stop - 1 - block * BLOCK_SIZE, _IN_BLOCK) // LEAF_SIZE
                self._wish(file, block, leaf_mask(file.revision.size, block, first, last))

    def _go_on(self, file: BlockFile, run: Run) -> None:
        """A sequence reached a block. If it is a new one, double the window and wish for what it covers."""
        limit = self._wishlist.blocks
        forwards = run.up >= run.down
        block = (run.high - 1 if forwards else run.low) // BLOCK_SIZE
        if block == run.at or not limit:
            return
        run.at = block
        run.window = min(2 * run.window, limit)
        wanted = {wish[1] for wish in self.wishes if wish[0] is file}
        for number in range(1, run.window + 1):
            ahead = block + number if forwards else block - number
            if not 0 <= ahead < len(file.state):
                break
            if file.state[ahead] != VERIFIED and ahead not in wanted:
                self._wish(file, ahead, 0)

    def _wish(self, file: BlockFile, block: int, mask: int) -> None:
        if self._wishlist.blocks and file.state[block] != VERIFIED:
            self.wishes.append((file, block, mask))
            self._wishlist.wished(self)
