"""Seals spool files (registry/seals.py) that wait for their upload, soon after they were closed. Loop only.

A file that is uploaded at once is sealed by its upload, which hashes it before it sends it (steps.py, batches.py,
multipart.py). Sealing does not wait long for an upload that is slow, or waits for storage. Large files are hashed by
the moving process, piece by piece, so that nothing waits for it.
"""

from __future__ import annotations

import errno
import heapq
import logging
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import trio

from lamfs.errors import LamfsError
from lamfs.hashing import hash_block, zero_block
from lamfs.model import BLOCK_SIZE
from lamfs.mover.client import Mover
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.registry.seals import UNKNOWN
from lamfs.spool import SpoolFolder

log = logging.getLogger("lamfs.uploader")

AFTER = 2.0
"""Seconds after a close. The upload of a file that need not wait begins sooner. A program that makes a thousand files
in a second delays its uploads until it has finished (debounce.py), and has the loop for itself."""
UPLOAD = 2.0
"""Seconds that a running upload has to hash the file by itself."""
SMALL = 64 << 10
"""Bytes up to which a file is hashed in the loop: a tenth of a millisecond."""
PAUSE = 9
"""Pause after each file, as a multiple of the time it took: programs that make many files have the loop for
themselves."""
LONGEST = 1.0
"""Seconds of such a pause at most."""
UPLOAD_PAUSE = 3
"""The same, after each piece of a file that is being uploaded."""
PIECE = 64 << 20
"""Bytes hashed by one job."""
NOTES = 256
"""Most times that the hashes of a file are recorded: each time writes all of them."""


class _Turn(NamedTuple):
    """When a file is due. ``late``: seal it then even if it is being uploaded."""

    at: float
    ino: int
    late: bool


class Sealing:
    """Owns which files are to be sealed.

    ``busy(ino, src)``: whether a spool file is being uploaded. ``hashing(ino)``: whether its upload is hashing the
    whole file.
    """

    def __init__(
        self,
        registry: Registry,
        mover: Mover,
        spool: SpoolFolder,
        busy: Callable[[int, str], bool],
        hashing: Callable[[int], bool],
    ) -> None:
        self._registry = registry
        self._mover = mover
        self._spool = spool
        self._busy = busy
        self._hashing = hashing
        self._asked: dict[int, _Turn] = {}
        self._turns: list[_Turn] = []
        """A heap of present and former values of ``_asked``."""
        self._work = trio.Event()

    def closed(self, ino: int) -> None:
        """A file was closed, or could not be stored."""
        self._ask(ino, AFTER, late=False)

    def _ask(self, ino: int, seconds: float, *, late: bool) -> None:
        turn = self._asked[ino] = _Turn(trio.current_time() + seconds, ino, late)
        heapq.heappush(self._turns, turn)
        if self._turns[0] is turn:
            self._work.set()

    async def run(self) -> None:
        """Seal files until cancelled, first those that an earlier process has left."""
        try:
            for ino, _ in self._registry.seals.unsealed(self._registry.journal.owner):
                self.closed(ino)
        except LamfsError as error:
            log.warning("could not look which spool files have no hashes yet: %s", error)
        while True:
            turn = await self._next()
            began = trio.current_time()
            try:
                await self._seal(turn)
            except (LamfsError, OSError, EOFError) as error:
                log.info("the spool file of inode %d has no hashes yet: %s", turn.ino, error)
            await trio.sleep(min(PAUSE * (trio.current_time() - began), LONGEST))

    async def _next(self) -> _Turn:
        """Wait until a file is due."""
        while True:
            while self._turns and self._asked.get(self._turns[0].ino) is not self._turns[0]:
                heapq.heappop(self._turns)  # it was closed again: its turn comes later
            if self._turns and self._turns[0].at <= trio.current_time():
                turn = heapq.heappop(self._turns)
                del self._asked[turn.ino]
                return turn
            self._work = trio.Event()
            with trio.move_on_at(self._turns[0].at if self._turns else math.inf):
                await self._work.wait()

    async def _seal(self, turn: _Turn) -> None:
        entry = self._waiting(turn.ino)
        if entry is None or entry.src is None:
            return
        seals = self._registry.seals
        seal = seals.of(entry.src)
        if seal is not None and seal.is_whole:
            return
        if self._busy(turn.ino, entry.src) and (not turn.late or self._hashing(turn.ino)):
            self._ask(turn.ino, UPLOAD, late=True)
            return
        missing: set[int] = set()
        with self._spool.opened(entry.src, os.O_RDONLY) as fd:
            size = os.fstat(fd).st_size
            if entry.base is not None:
                present = self._registry.partial_spools.present(entry.src)
                missing = set(range(-(-size // BLOCK_SIZE))) - present
            if size <= SMALL:
                if not missing:
                    seals.add(entry, size, hash_block(os.pread(fd, size, 0)) if size else b"")
                return
            # An upload begins at the other end. Skip what it has hashed meanwhile.
            stretch = max(size // NOTES // PIECE, 1) * PIECE
            for start in range((size - 1) // stretch * stretch, -1, -stretch):
                end = min(start + stretch, size)
                first, count = start // BLOCK_SIZE, -(-(end - start) // BLOCK_SIZE)
                seal = seals.of(entry.src)
                if seal is not None and seal.knows(first, count):
                    continue
                blocks = bytearray()
                for offset in range(start, end, PIECE):
                    began = trio.current_time()
                    blocks += await self._hash(entry.src, fd, offset, min(PIECE, end - offset))
                    now = self._waiting(turn.ino)
                    if now is None or (now.src, now.gen) != (entry.src, entry.gen):
                        return
                    if self._busy(turn.ino, entry.src):
                        await trio.sleep(UPLOAD_PAUSE * (trio.current_time() - began))
                for block in missing.intersection(range(first, first + count)):
                    blocks[32 * (block - first) : 32 * (block - first) + 32] = UNKNOWN
                seals.add(entry, size, bytes(blocks), first)

    async def _hash(self, src: str, fd: int, offset: int, length: int) -> bytes:
        if length % BLOCK_SIZE == 0 and not _has_data(fd, offset, length):
            await trio.sleep(0)
            return zero_block() * (length // BLOCK_SIZE)
        return (await self._mover.hash_range(self._spool.path(src), offset, length)).blocks

    def _waiting(self, ino: int) -> Put | None:
        """The put of a file that is closed but not stored."""
        entry = self._registry.journal.put_of(ino)
        if entry is None or entry.state != "ready" or entry.owner != self._registry.journal.owner:
            return None
        return entry


def _has_data(fd: int, offset: int, length: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) < offset + length
    except OSError as error:
        return error.errno != errno.ENXIO
