"""Partial spools: spool files that hold only the blocks that were written. The stored revision has the others. Loop
only.

So changing a little of a large artifact in a bucket does not fetch all of it, and waits for nothing. A write within a
block is recorded as a range of the block. The rest of the block stays the base's until the uploader fetches it. A block
is fetched before a write only if it was written in many places, or the write goes over the end of the file. The blocks
and ranges that are present are recorded in the registry for the next mount (registry/partial_spools.py), and in the
Spool while it is open.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

import trio

from lamfs import copying
from lamfs.cache.blocks import BlockFile
from lamfs.errors import FsError, StorageError
from lamfs.fs.context import Context
from lamfs.fs.state import FileState, Spool
from lamfs.hashing import MD5_MAX
from lamfs.model import BLOCK_SIZE, Revision
from lamfs.mover import beats
from lamfs.prefetch.patterns import Reader
from lamfs.registry import Ranges, add_range, base_id, is_based_on, lacks_some, missing_blocks, unwritten
from lamfs.registry.entries import Put

ABOVE = MD5_MAX
"""Only files of more bytes become partial spools: the hash of a smaller one needs all of its bytes at each change."""
BATCH = 8
"""Most blocks that are fetched at a time."""
WRITES = 64
"""Writes to a block that are recorded as ranges. The block is fetched before the next one."""
AHEAD = 6
"""Blocks that are being fetched at a time while the uploader waits for them."""

Reading = Callable[[FileState, int, int, Reader | None], Awaitable[bytes]]
"""Reads bytes of the stored revision of a file, for a handle's reader, from whichever object has them now."""


class PartialSpools:
    """Reads, fills and cuts the partial spools of one mount's open files."""

    def __init__(self, context: Context, read_stored: Reading) -> None:
        self._c = context
        self._read_stored = read_stored

    # -- making -------------------------------------------------------------------------------------------------

    def can_start(self, state: FileState, want: int) -> bool:
        """Whether a file whose first ``want`` bytes are needed may be written as a partial spool."""
        return self._c.store.parts is not None and want > ABOVE and state.revision is not None

    def start(self, spool: Spool, base: Revision) -> None:
        """Make an empty spool file a partial spool of a whole revision. The caller cuts it once the needed blocks are
        here."""
        os.ftruncate(spool.fd, base.size)
        spool.missing = missing_blocks((), base.size, base.size)

    def open(self, spool: Spool, owed: Put, base: Revision | None) -> None:
        """Set what a pending spool file lacks, if it is a partial spool. Raises FsError(EIO) if its base is gone."""
        if owed.base is None:
            return
        if base is None or not is_based_on(owed, base.content):
            raise FsError(errno.EIO, "the revision that was changed is not there any more")
        size = os.fstat(spool.fd).st_size
        known = self._c.registry.partial_spools
        spool.missing = missing_blocks(known.present(spool.name), base.size, size)
        spool.ranges = {block: found for block, found in known.ranges(spool.name).items() if block in spool.missing}

    def known_of(self, state: FileState) -> tuple[str | None, Collection[int], Mapping[int, Ranges]]:
        """What the registry has to know of a spool file: its base, which blocks it has, and which ranges of others.
        No base, and nothing else, when it lacks nothing."""
        spool = state.spool
        assert spool is not None
        if not spool.missing or state.revision is None:
            return None, (), {}
        blocks = range(-(-state.revision.size // BLOCK_SIZE))
        return base_id(state.revision.content), set(blocks).difference(spool.missing), spool.ranges

    def is_sound(self, state: FileState) -> bool:
        """Whether the base is the artifact's present content, and no other process is working on it. Otherwise the file
        must be completed before it is journaled."""
        assert state.spool is not None
        if not state.spool.missing:
            return True
        journal = self._c.registry.journal
        artifact = self._c.registry.artifacts.by_ino(state.ino)
        owed = journal.put_of(state.ino)
        return (
            artifact is not None
            and state.revision is not None
            and artifact.revision.content.same_bytes(state.revision.content)
            and (owed is None or owed.owner == journal.owner)
            and not journal.saves(artifact.uid)
        )

    # -- reading ------------------------------------------------------------------------------------------------

    async def read(self, state: FileState, offset: int, size: int, reader: Reader | None = None) -> bytes:
        """Up to ``size`` bytes at ``offset``, from the spool file and the base. Raises like reading the base."""
        parts: list[bytes] = []
        size = min(size, state.inode.size - offset)
        while size > 0:
            spool = state.spool
            if spool is None:
                parts.append(await self._read_stored(state, offset, size, reader))
                break
            block = offset // BLOCK_SIZE
            lacking, end = _piece(spool, offset, offset + size)
            length = end - offset
            if lacking:
                try:
                    data = await self._read_stored(state, offset, length, reader)
                except (FsError, StorageError):
                    if state.spool is spool and block in spool.missing:
                        raise
                    continue  # the block was fetched meanwhile, and then the base was replaced
            else:
                data = os.pread(spool.fd, length, offset)
            parts.append(data)
            offset, size = offset + len(data), size - len(data)
            if not data:
                break
        return b"".join(parts)

    # -- filling ------------------------------------------------------------------------------------------------

    def lacks(self, state: FileState, offset: int, size: int) -> list[int]:
        """The blocks that must be fetched before ``size`` bytes at ``offset`` may be written."""
        spool = state.spool
        assert spool is not None
        if not spool.missing or not size:
            return []
        touched = spool.missing.intersection(range(offset // BLOCK_SIZE, (offset + size - 1) // BLOCK_SIZE + 1))
        if self._c.policy.fsync_stores:
            touched = {block for block in touched if spool.writes[block] >= WRITES}
        return sorted(touched | self._tail(state, spool, offset + size))

    def wrote(self, state: FileState, spool: Spool, offset: int, size: int) -> None:
        """``size`` bytes were just written to the spool file. Nothing may be awaited between the write and this call:
        an upload writes the base's bytes wherever no range is recorded."""
        if not spool.missing:
            return
        written: dict[int, tuple[int, int]] = {}
        for block in range(offset // BLOCK_SIZE, (offset + size - 1) // BLOCK_SIZE + 1):
            if block in spool.missing:
                start = block * BLOCK_SIZE
                written[block] = max(offset - start, 0), min(offset + size - start, BLOCK_SIZE)
                spool.writes[block] += 1
        self._add(state, spool, written)

    def _add(self, state: FileState, spool: Spool, written: dict[int, tuple[int, int]]) -> None:
        found: dict[int, Ranges] = {}
        for block, (start, end) in written.items():
            ranges = add_range(spool.ranges.get(block, ()), start, end)
            if ranges != spool.ranges.get(block):
                found[block] = spool.ranges[block] = ranges
        if found and self._is_noted(state, spool):
            self._c.registry.partial_spools.add_ranges(spool.name, found)

    def edges(self, state: FileState, size: int) -> list[int]:
        """The blocks that must be fetched before the file may be cut or extended to ``size`` bytes."""
        spool = state.spool
        assert spool is not None
        cut = {size // BLOCK_SIZE} if size % BLOCK_SIZE and size < state.inode.size else set()
        return sorted((spool.missing & cut) | self._tail(state, spool, size))

    def _tail(self, state: FileState, spool: Spool, size: int) -> set[int]:
        """The last block, if it is incomplete and the file grows to ``size``: zeros will follow its bytes.

        If the base has nothing there, the zeros are recorded as a range, and the block need not be fetched.
        """
        block, end = divmod(state.inode.size, BLOCK_SIZE)
        if not end or size <= state.inode.size or block not in spool.missing:
            return set()
        assert state.revision is not None
        if not self._c.policy.fsync_stores or state.inode.size < state.revision.size:
            return {block}
        self._add(state, spool, {block: (end, BLOCK_SIZE)})
        return set()

    async def bring_in(self, state: FileState, blocks: Iterable[int]) -> None:
        """Copy blocks of the base into the spool file. Raises storage errors, OSError; FsError(ESTALE).

        The blocks are durable before the registry records them: a power cut must not leave zeros in their place.
        """
        written: list[tuple[Spool, int]] = []
        for block in blocks:
            spool = state.spool
            if spool is None or block not in spool.missing:
                continue
            offset = block * BLOCK_SIZE
            assert state.revision is not None
            length = min(BLOCK_SIZE, state.revision.size - offset)
            if lacks_some(spool.ranges.get(block, ()), length):
                data = await self._read_stored(state, offset, length, None)
                if state.spool is not spool or block not in spool.missing:
                    continue  # the file went on without this spool file, or another task was faster
                if len(data) != length:
                    raise FsError(errno.EIO, "the stored revision is shorter than it should be")
                data = data[: max(state.inode.size - offset, 0)]
                for place, piece in unwritten(offset, data, spool.ranges.get(block, ())):
                    spool.write(place, piece)
            written.append((spool, block))
        if not written:
            return
        await _sync(written[-1][0].fd)
        for spool, block in written:
            if state.spool is spool and block in spool.missing:
                self._have(state, spool, [block])

    def cut(self, state: FileState, size: int) -> None:
        """The file was cut to ``size`` bytes: what was beyond does not belong to the base any more."""
        spool = state.spool
        assert spool is not None
        gone = [block for block in spool.missing if block * BLOCK_SIZE >= size]
        if gone:
            self._have(state, spool, gone)

    def _have(self, state: FileState, spool: Spool, blocks: list[int]) -> None:
        if self._is_noted(state, spool):
            self._c.registry.partial_spools.add(spool.name, blocks)
        _has(spool, blocks)

    def _is_noted(self, state: FileState, spool: Spool) -> bool:
        """Whether the registry records the blocks of the spool file: only while the file has a put row."""
        owed = None if state.is_deleted() else self._c.registry.journal.put_of(state.ino)
        return owed is not None and owed.src == spool.name

    async def complete(self, state: FileState) -> None:
        """Fetch all blocks: then the file does not need its base any more."""
        while state.spool is not None and state.spool.missing:
            await self.bring_in(state, sorted(state.spool.missing)[:BATCH])

    # -- for the uploader ---------------------------------------------------------------------------------------

    async def fill(self, src: str, base: Revision, blocks: Iterable[int], state: FileState | None) -> None:
        """Copy blocks of the base into spool file ``src``, which is frozen, so that nobody writes to it meanwhile.

        ``state``: the open file that shows it. Raises storage errors, OSError.
        """
        fd = self._c.spool.open(src, os.O_RDWR)
        file: BlockFile | None = None
        try:
            size = os.fstat(fd).st_size
            file = self._c.cache.open(base)
            wanted = sorted(blocks)
            ranges = self._c.registry.partial_spools.ranges(src)
            for first in range(0, len(wanted), BATCH):
                batch = wanted[first : first + BATCH]
                for at, block in enumerate(batch, first):
                    for soon in wanted[at : at + AHEAD]:
                        if lacks_some(ranges.get(soon, ()), size - soon * BLOCK_SIZE):
                            file.ask(soon)
                    offset, known = block * BLOCK_SIZE, ranges.get(block, ())
                    if lacks_some(known, size - offset):
                        data = await file.read(offset, min(BLOCK_SIZE, size - offset))
                        for place, piece in unwritten(offset, data, known):
                            copying.write_full(fd, piece, place)
                await _sync(fd)
                self._c.registry.partial_spools.add(src, batch)
                if state is not None and state.spool is not None and state.spool.name == src:
                    _has(state.spool, batch)
        finally:
            os.close(fd)
            if file is not None:
                file.close()


def _has(spool: Spool, blocks: Iterable[int]) -> None:
    """The spool file has all of these blocks now."""
    for block in blocks:
        spool.missing.discard(block)
        spool.ranges.pop(block, None)
        spool.writes.pop(block, None)


def _piece(spool: Spool, offset: int, stop: int) -> tuple[bool, int]:
    """Whether the spool file lacks the bytes from ``offset`` on, and the end of that stretch, ``stop`` at most."""
    block = offset // BLOCK_SIZE
    lacking = block in spool.missing
    ranges = spool.ranges.get(block)
    if lacking and ranges:
        start = block * BLOCK_SIZE
        for first, last in ranges:
            if offset < start + first:
                return True, min(start + first, stop)
            if offset < start + last:
                return False, min(start + last, stop)
        return True, min(start + BLOCK_SIZE, stop)
    block += 1
    while block * BLOCK_SIZE < stop and (block in spool.missing) == lacking and block not in spool.ranges:
        block += 1
    return lacking, min(block * BLOCK_SIZE, stop)


async def _sync(fd: int) -> None:
    """fdatasync(2) of an open file, in a thread. The descriptor may be closed meanwhile."""
    own = os.dup(fd)

    def work() -> None:
        try:
            os.fdatasync(own)
        finally:
            os.close(own)

    with beats.paused():
        await trio.to_thread.run_sync(work)
