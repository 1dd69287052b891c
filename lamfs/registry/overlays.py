"""Spool files that are overlays: they hold the blocks that were written, the stored revision has the others.

Synchronous; the Database's thread. The put row of such a file has the identity of that revision in its payload
(``base``). A block is in the spool file when it has a row here; it gets it after its old bytes were copied there and
before new ones are written. The rows go with the put row's ``src`` (by triggers).
"""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3

from lamfs.model import BLOCK_SIZE, ContentHash, JournalEntry
from lamfs.registry.db import Database


def base_id(content: ContentHash) -> str:
    """A short name of a revision's bytes, for the payload of a put."""
    return f"{content.size}:{blake3(content.blocks).hexdigest()}"


def is_based_on(entry: JournalEntry, content: ContentHash) -> bool:
    """Whether the spool file of a put lies over these bytes."""
    return entry.payload.get("base") == base_id(content)


def missing_blocks(present: Iterable[int], base_size: int, size: int) -> set[int]:
    """Blocks that an overlay of ``size`` bytes lacks: those of the base, ``base_size`` bytes, that are not present."""
    return set(range(-(-min(base_size, size) // BLOCK_SIZE))).difference(present)


class Overlays:
    """Which blocks are present in the overlays of one Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def present(self, src: str) -> set[int]:
        """The blocks that are in spool file ``src``."""
        return {block for (block,) in self._db.all("SELECT block FROM overlay WHERE src=?", (src,))}

    def add(self, src: str, blocks: Iterable[int]) -> None:
        """These blocks are in spool file ``src`` now, or are cut off."""
        with self._db.transaction() as conn:
            conn.executemany("INSERT OR IGNORE INTO overlay VALUES(?,?)", [(src, block) for block in blocks])
