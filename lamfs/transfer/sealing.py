"""Seals spool files (registry/seals.py) that wait for their upload, soon after they were closed. Loop only.

What is stored at once needs none: the hash that its upload takes is the first one. Large files are hashed by the moving
process, piece by piece, so that nothing waits for it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

import trio

from lamfs.errors import LamfsError
from lamfs.hashing import hash_block, zero_block
from lamfs.model import BLOCK_SIZE, JournalEntry
from lamfs.registry import Registry
from lamfs.registry.seals import UNKNOWN, Seal
from lamfs.spool import SpoolFolder
from lamfs.transfer.client import Mover

log = logging.getLogger("lamfs.uploader")

AFTER = 0.2
"""Seconds after a close; the upload of a file that need not wait begins sooner."""
SMALL = 64 << 10
"""Bytes up to which a file is hashed in the loop: a tenth of a millisecond."""
PAUSE = 9
"""So many times what it took is waited after each file: programs that make many have the loop for themselves."""
PIECE = 64 << 20
"""Bytes that are hashed by one job."""


class Sealing:
    """Owns which files are to be sealed. ``busy(ino, src)``: whether a spool file is being uploaded."""

    def __init__(self, registry: Registry, mover: Mover, spool: SpoolFolder, busy: Callable[[int, str], bool]) -> None:
        self._registry = registry
        self._mover = mover
        self._spool = spool
        self._busy = busy
        self._asked: dict[int, float] = {}
        self._work = trio.Event()

    def closed(self, ino: int) -> None:
        """A file was closed, or could not be stored."""
        self._asked[ino] = trio.current_time() + AFTER
        self._work.set()

    async def run(self) -> None:
        """Seal until cancelled, first what an earlier process has left."""
        try:
            for ino, _ in self._registry.seals.unsealed(self._registry.journal.owner):
                self.closed(ino)
        except LamfsError as error:
            log.warning("could not look which spool files have no hashes yet: %s", error)
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._asked:
                ino, at = next(iter(self._asked.items()))
                await trio.sleep(max(at - trio.current_time(), 0))
                if self._asked.get(ino, at) > at:
                    self._asked[ino] = self._asked.pop(ino)  # it was closed again: its turn comes later
                    continue
                self._asked.pop(ino, None)
                began = trio.current_time()
                try:
                    await self._seal(ino)
                except (LamfsError, OSError, EOFError) as error:
                    log.info("the spool file of inode %d has no hashes yet: %s", ino, error)
                await trio.sleep(PAUSE * (trio.current_time() - began))

    async def _seal(self, ino: int) -> None:
        entry = self._waiting(ino)
        if entry is None or entry.src is None or self._registry.seals.of(entry.src) is not None:
            return
        missing: set[int] = set()
        with self._spool.opened(entry.src, os.O_RDONLY) as fd:
            size = os.fstat(fd).st_size
            if "base" in entry.payload:
                present = self._registry.overlays.present(entry.src)
                missing = set(range(-(-size // BLOCK_SIZE))) - present
            blocks = bytearray()
            if size <= SMALL:
                blocks += hash_block(os.pread(fd, size, 0)) if size else b""
                if missing:
                    return
            else:
                for offset in range(0, size, PIECE):
                    length = min(PIECE, size - offset)
                    blocks += await self._hash(entry.src, fd, offset, length)
                    now = self._waiting(ino)
                    if now is None or (now.src, now.gen) != (entry.src, entry.gen):
                        return
        for block in missing:
            blocks[32 * block : 32 * block + 32] = UNKNOWN
        self._registry.seals.add(entry, Seal(size, bytes(blocks)))

    async def _hash(self, src: str, fd: int, offset: int, length: int) -> bytes:
        if length % BLOCK_SIZE == 0 and not _has_data(fd, offset, length):
            await trio.sleep(0)
            return zero_block() * (length // BLOCK_SIZE)
        return (await self._mover.hash_range(self._spool.path(src), offset, length)).blocks

    def _waiting(self, ino: int) -> JournalEntry | None:
        """The put of a file that is closed and waits."""
        entry = self._registry.journal.put_of(ino)
        if entry is None or entry.state != "ready" or entry.owner != self._registry.journal.owner:
            return None
        return None if entry.src is None or self._busy(ino, entry.src) else entry


def _has_data(fd: int, offset: int, length: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) < offset + length
    except OSError as error:
        return error.errno != errno.ENXIO
