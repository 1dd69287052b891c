"""Spool files that are partial spools: they hold the blocks that were written, the stored revision has the others.

Synchronous; the Database's thread. The put row of such a file has the identity of that revision in its payload
(``base``). A block is in the spool file when it has a row here without ranges; it gets that after its old bytes were
copied there. A block with ``ranges`` has been written only there; the rest is still the revision's. ``durable``: those
of its ranges that survive a power cut. The rows go with the put row's ``src`` (by triggers).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from blake3 import blake3

from lamfs.model import BLOCK_SIZE, ContentHash
from lamfs.registry.db import Database
from lamfs.registry.entries import Put


def base_id(content: ContentHash) -> str:
    """A short name of a revision's bytes, for the payload of a put."""
    return f"{content.size}:{blake3(content.blocks).hexdigest()}"


def is_based_on(entry: Put, content: ContentHash) -> bool:
    """Whether the spool file of a put lies over these bytes."""
    return entry.base == base_id(content)


def missing_blocks(present: Iterable[int], base_size: int, size: int) -> set[int]:
    """Blocks that a partial spool of ``size`` bytes lacks: those of the base, ``base_size`` bytes, that are not
    present."""
    return set(range(-(-min(base_size, size) // BLOCK_SIZE))).difference(present)


Ranges = tuple[tuple[int, int], ...]
"""Written bytes of a block: start and end, from its beginning, in order and without touching one another."""


def add_range(ranges: Ranges, start: int, end: int) -> Ranges:
    """``ranges`` with these bytes too."""
    apart = [each for each in ranges if each[1] < start or end < each[0]]
    joined = [each for each in ranges if not (each[1] < start or end < each[0])]
    whole = min([start, *(each[0] for each in joined)]), max([end, *(each[1] for each in joined)])
    return tuple(sorted([*apart, whole]))


def _gaps(ranges: Ranges, length: int) -> Iterator[tuple[int, int]]:
    """Start and end of what of a block of ``length`` bytes is not written."""
    at = 0
    for start, end in ranges:
        if at < min(start, length):
            yield at, min(start, length)
        at = end
    if at < length:
        yield at, length


def lacks_some(ranges: Ranges, length: int) -> bool:
    """Whether a block of ``length`` bytes (or more than a block has) has not been written as a whole."""
    return next(_gaps(ranges, min(length, BLOCK_SIZE)), None) is not None


def unwritten(offset: int, data: bytes, ranges: Ranges) -> Iterator[tuple[int, memoryview]]:
    """Of the bytes of a block of the revision, which is at ``offset`` of the file, those that belong between what was
    written: place in the file, and bytes."""
    view = memoryview(data)
    for start, end in _gaps(ranges, len(view)):
        yield offset + start, view[start:end]


def without(ranges: Iterable[tuple[int, int]], taken: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of ``ranges`` is not in ``taken``; both are in order."""
    out = tuple(taken)
    for start, end in ranges:
        at = start
        for first, last in out:
            if at < min(first, end):
                yield at, min(first, end)
            at = max(at, last)
        if at < end:
            yield at, end


class PartialSpools:
    """Which blocks are present in the partial spools of one Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def present(self, src: str) -> set[int]:
        """The blocks that are in spool file ``src``, all of each."""
        rows = self._db.all("SELECT block FROM partial_spool WHERE src=? AND ranges IS NULL", (src,))
        return {block for (block,) in rows}

    def ranges(self, src: str) -> dict[int, Ranges]:
        """Which bytes of its other blocks are in spool file ``src``."""
        rows = self._db.all("SELECT block, ranges FROM partial_spool WHERE src=? AND ranges IS NOT NULL", (src,))
        return {block: tuple((start, end) for start, end in json.loads(text)) for block, text in rows}

    def add(self, src: str, blocks: Iterable[int]) -> None:
        """These blocks are in spool file ``src`` now, or are cut off."""
        with self._db.transaction() as conn:
            conn.executemany(
                "INSERT OR REPLACE INTO partial_spool VALUES(?,?,NULL,NULL)", [(src, block) for block in blocks]
            )

    def add_ranges(self, src: str, ranges: Mapping[int, Ranges]) -> None:
        """Of these blocks these bytes are in spool file ``src`` now."""
        rows = [(src, block, json.dumps(found)) for block, found in ranges.items()]
        with self._db.transaction() as conn:
            conn.executemany(
                "INSERT INTO partial_spool(src, block, ranges) VALUES(?,?,?)"
                " ON CONFLICT(src, block) DO UPDATE SET ranges=excluded.ranges",
                rows,
            )

    def synced(self, src: str, ranges: Mapping[int, Ranges]) -> None:
        """These ranges, which were there before the last sync of spool file ``src`` began, are durable."""
        rows = [(json.dumps(found), src, block) for block, found in ranges.items()]
        with self._db.transaction() as conn:
            conn.executemany("UPDATE partial_spool SET durable=? WHERE src=? AND block=? AND ranges IS NOT NULL", rows)

    def keep_durable(self, src: str) -> list[tuple[int, int]]:
        """The power was cut: of ranges only those that are durable are in ``src``. Start and end, in the file, of what
        is lost: in order, and without touching one another; the last block's may go on behind the file's end."""
        lost: list[tuple[int, int]] = []
        with self._db.transaction() as conn:
            rows = conn.execute(
                "SELECT block, ranges, durable FROM partial_spool WHERE src=? AND ranges IS NOT NULL"
                " AND ranges IS NOT durable ORDER BY block",
                (src,),
            ).fetchall()
            for block, written, durable in rows:
                for start, end in without(json.loads(written), json.loads(durable or "[]")):
                    start, end = start + block * BLOCK_SIZE, end + block * BLOCK_SIZE
                    if lost and lost[-1][1] == start:
                        lost[-1] = lost[-1][0], end
                    else:
                        lost.append((start, end))
            conn.execute("DELETE FROM partial_spool WHERE src=? AND ranges IS NOT NULL AND durable IS NULL", (src,))
            conn.execute("UPDATE partial_spool SET ranges=durable WHERE src=? AND ranges IS NOT NULL", (src,))
        return lost
