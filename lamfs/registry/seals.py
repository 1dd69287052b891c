"""Seals: the hashes that the blocks of a closed spool file had, so that what a disk changes later is seen before it is
stored. Synchronous; the Database's thread.

A seal is of one generation of a put; triggers break it when the file is opened for writing again, or its row goes. What
is known of a block stays: whoever hashes the file first says what was written. Nothing of a closed file is sent before
that is noted, so the bytes of one generation are never sent twice as two contents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from lamfs.model import BLOCK_SIZE, ContentHash
from lamfs.registry.db import Database
from lamfs.registry.entries import Put

UNKNOWN = bytes(32)
"""In place of the hash of a block that nobody has hashed yet, or of which the spool file has not all
(partial_spools.py)."""


class Seal(NamedTuple):
    """Bytes of a spool file, and the BLAKE3 of its 4 MiB blocks, 32 bytes each, one after the other."""

    size: int
    blocks: bytes

    @property
    def is_whole(self) -> bool:
        """Whether the hashes of all blocks are known."""
        return UNKNOWN not in self.blocks

    def knows(self, number: int, count: int = 1) -> bool:
        """Whether the hashes of ``count`` blocks from ``number`` on are known."""
        return all(self.blocks[32 * at : 32 * at + 32] != UNKNOWN for at in range(number, number + count))

    def broken(self, content: ContentHash) -> list[int]:
        """Numbers of the blocks that are not what they were; all that only one of the two has."""
        count = max(len(self.blocks), len(content.blocks)) // 32
        wrong = [
            number
            for number in range(count)
            if (was := self.blocks[32 * number : 32 * number + 32]) != UNKNOWN and was != content.block(number)
        ]
        return wrong or ([max(count - 1, 0)] if self.size != content.size else [])


class Seals:
    """The seals of one Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, src: str) -> Seal | None:
        """The seal of spool file ``src``."""
        row = self._db.one("SELECT size, blocks FROM seal WHERE src=?", (src,))
        return None if row is None else Seal(row[0], bytes(row[1]))

    def add(self, entry: Put, size: int, blocks: bytes, first: int = 0) -> None:
        """The spool file of a put has ``size`` bytes, and its blocks from number ``first`` on had these hashes.

        Not noted when it was opened for writing since; what is known already stays.
        """
        current = "FROM journal WHERE id=? AND op='put' AND src=? AND gen=? AND state IN ('ready', 'scratch')"
        which = (entry.id, entry.src, entry.gen)
        start, end = 32 * first, 32 * first + len(blocks)
        insert = f"INSERT OR IGNORE INTO seal(src, size, blocks) SELECT src, ?, ? {current}"
        after = bytes(max(32 * -(-size // BLOCK_SIZE) - end, 0))
        if not start and not after and self._db.execute(insert, (size, blocks, *which)).rowcount:
            return  # one statement for each small file
        with self._db.transaction():
            old = self.of(entry.src or "")
            if old is None:
                self._db.execute(insert, (size, bytes(start) + blocks + after, *which))
            elif old.size == size and (more := _joined(old.blocks[start:end], blocks)) != old.blocks[start:end]:
                self._db.execute(
                    f"UPDATE seal SET blocks=? WHERE src=? AND EXISTS (SELECT 1 {current})",
                    (old.blocks[:start] + more + old.blocks[end:], entry.src, *which),
                )

    def complete(self, entry: Put, content: ContentHash, known: Seal | None) -> None:
        """The spool file of a put has ``content``: add the hashes that ``known``, its seal, lacks."""
        if known is None or not known.is_whole:
            self.add(entry, content.size, content.blocks)

    def forget(self, src: str) -> None:
        """What is in spool file ``src`` now is what there is, whatever was written."""
        self._db.execute("DELETE FROM seal WHERE src=?", (src,))

    def set_damaged(self, entry_id: int, blocks: Iterable[int]) -> None:
        """These blocks of a put's spool file are not what was written (none: all are)."""
        found = sorted(blocks)
        self._db.execute(
            "UPDATE journal SET payload=CASE WHEN ?1='[]' THEN json_remove(payload, '$.damaged')"
            " ELSE json_set(payload, '$.damaged', json(?1)) END WHERE id=?2",
            (json.dumps(found), entry_id),
        )

    def unsealed(self, owner: str) -> list[tuple[int, str]]:
        """Inode and spool file of the closed files of a process of which some block has no hash yet."""
        return [
            (row[0], row[1])
            for row in self._db.all(
                "SELECT ino, src FROM journal j WHERE op='put' AND owner=? AND state='ready' AND src IS NOT NULL"
                " AND NOT EXISTS (SELECT 1 FROM seal s WHERE s.src=j.src AND NOT instr(s.blocks, ?))",
                (owner, UNKNOWN),
            )
        ]


def _joined(known: bytes, blocks: bytes) -> bytes:
    """``known``, and what ``blocks`` have where that knows nothing."""
    pairs = ((known[at : at + 32], blocks[at : at + 32]) for at in range(0, len(known), 32))
    return b"".join(new if old == UNKNOWN else old for old, new in pairs)
