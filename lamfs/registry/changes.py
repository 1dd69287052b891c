"""The change log: what changed in the tree, in the transaction that changed it. Synchronous; the Database's thread.

A mount follows it to invalidate the kernel's caches. Rows carry their origin, one random id per Registry object, so
that a mount can skip its own changes.

Kinds: ``entry`` (an entry ``name`` of directory ``parent`` came, went or has another inode), ``attr`` (mode, owner,
times or size of ``ino``), ``content`` (bytes of ``ino``), ``record`` (description, visibility … of its artifact).
"""

from __future__ import annotations

from typing import NamedTuple

from lamfs.registry.db import Database

KEEP = 200_000
"""Rows kept. A follower that is further behind has to drop everything it cached."""


class Change(NamedTuple):
    """One row of the log."""

    seq: int
    origin: str
    kind: str
    ino: int
    parent: int | None
    name: str | None


class ChangeLog:
    """Appends to and reads the log of one Database."""

    def __init__(self, db: Database, origin: str) -> None:
        self._db = db
        self.origin = origin

    def entry(self, parent: int, name: str, ino: int) -> None:
        """An entry came, went or has another inode."""
        self._append("entry", ino, parent, name)

    def attr(self, ino: int) -> None:
        """Attributes changed."""
        self._append("attr", ino, None, None)

    def content(self, ino: int) -> None:
        """Bytes changed."""
        self._append("content", ino, None, None)

    def record(self, ino: int) -> None:
        """The artifact's record changed, but neither its bytes nor its name."""
        self._append("record", ino, None, None)

    def _append(self, kind: str, ino: int, parent: int | None, name: str | None) -> None:
        self._db.execute(
            "INSERT INTO change(origin, kind, ino, parent, name) VALUES(?,?,?,?,?)",
            (self.origin, kind, ino, parent, name),
        )

    def last(self) -> int:
        """The number of the newest row ever written; 0 if there is none."""
        row = self._db.one("SELECT seq FROM sqlite_sequence WHERE name='change'")
        return int(row[0]) if row else 0

    def reach(self, seq: int) -> None:
        """Continue counting from ``seq``, if the newest row has a lower number."""
        if self.last() < seq:
            self._db.execute("DELETE FROM sqlite_sequence WHERE name='change'")
            self._db.execute("INSERT INTO sqlite_sequence(name, seq) VALUES('change', ?)", (seq,))

    def since(self, seq: int, limit: int = 10_000) -> tuple[list[Change], bool]:
        """Rows after ``seq`` in order, and whether rows between were trimmed already (then drop all caches)."""
        last = self.last()  # before the rows: a row that comes between the two statements is not lost
        rows = self._db.all(
            "SELECT seq, origin, kind, ino, parent, name FROM change WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)
        )
        lost = rows[0][0] != seq + 1 if rows else last > seq
        return [Change(*row) for row in rows], lost

    def trim(self) -> None:
        """Drop rows that no follower can need any more, and rows of ``claim`` for objects that nothing refers to."""
        with self._db.transaction():
            self._db.execute("DELETE FROM change WHERE seq < ?", (self.last() - KEEP,))
            self._db.execute(
                "DELETE FROM claim WHERE NOT EXISTS (SELECT 1 FROM revision r WHERE r.object_key=claim.object_key)"
                " AND NOT EXISTS (SELECT 1 FROM all_work w WHERE w.object_key=claim.object_key)"
            )
