"""Replay: what a crash between the commits of the two files has left apart, brought together. The Database's thread.

A transaction over registry and work database is atomic in each file. SQLite commits the registry first, and a power cut
may set either of them back (workdb.py). Each half says enough to redo the other one:

- The inode says which spool file of this machine has its bytes, and the journal has no put of it: it is owed again.
- A put is of an inode that says something else: the registry decides. It was stored, or deleted, or is another file's
  by now; or the registry is older than the put. The row goes, and its spool file is looked at as any that nothing owes
  (ops/strays.py): bytes that storage has go, others become files of ``lost+found``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from lamfs.keys import is_spool_name
from lamfs.registry.db import Database

log = logging.getLogger("lamfs.recover")


class Pending(NamedTuple):
    """Where the bytes of an inode are that are not stored yet. ``uid``: of the artifact that they will be."""

    machine: str
    src: str
    uid: str


def pending(text: object) -> Pending | None:
    """What ``inode.pending`` says; None: nothing, or nothing that lamfs writes."""
    parts = text.split(":") if isinstance(text, str) else []
    return Pending(*parts) if len(parts) == 3 and is_spool_name(parts[1]) else None


class Replay:
    """Brings the two halves of one Database together."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, ino: int) -> Pending | None:
        """Which machine has bytes of an inode that are not stored."""
        row = self._db.one("SELECT pending FROM inode WHERE ino=?", (ino,))
        return None if row is None else pending(row[0])

    def is_needed(self) -> bool:
        """Whether the two halves differ in what this machine has."""
        return bool(self._unowed() or self._unsaid())

    def run(self, has_all: Callable[[int, str], bool], now: int) -> int:
        """Make the journal follow the registry, in one transaction; how many rows it has changed.

        ``has_all(ino, src)``: whether a spool file is there, and has all bytes of its file. ``now``: ns since the
        epoch. Inside of the transaction nobody is between two commits: what is apart then was left by a crash.
        """
        count = 0
        with self._db.transaction():
            for row, ino, src in self._unsaid():
                count += 1
                self._follow(row, ino, src)
            for ino, src, uid, stored in self._unowed():
                count += 1
                if stored and not has_all(ino, src):
                    # It was stored once more, or lacks what nobody knows of: the file is as it was stored.
                    self._db.execute("UPDATE inode SET pending=NULL WHERE ino=?", (ino,))
                    log.warning("the spool file %s of inode %d is not what is missing there", src, ino)
                    continue
                self._db.execute("DELETE FROM spent WHERE src=?", (src,))
                self._db.execute(
                    "INSERT INTO journal(op, state, ino, uid, src, created_at) VALUES('put','open',?,?,?,?)",
                    (ino, uid, src, now),
                )
                log.warning("the spool file %s of inode %d is owed again", src, ino)
        return count

    def _follow(self, row: int, ino: int | None, src: str | None) -> None:
        """A put whose inode does not say so: it is of the inode that does, or of none."""
        found = self._db.one(
            "SELECT ino, pending FROM inode WHERE pending IS NOT NULL AND substr(pending, 1, ?)=? LIMIT 1",
            (len(self._mine) + len(src or ""), f"{self._mine}{src or ''}"),
        )
        said = None if found is None or src is None else pending(found[1])
        if found is not None and said is not None and said.src == src:
            self._db.execute("UPDATE journal SET ino=NULL WHERE op='put' AND ino=? AND id<>?", (found[0], row))
            self._db.execute("UPDATE journal SET ino=?, uid=? WHERE id=?", (found[0], said.uid, row))
            log.warning("the spool file %s is of inode %d, not of %s", src, found[0], ino)
            return
        stored = self._db.one(
            "SELECT 1 FROM journal j JOIN revision r ON r.object_key=j.object_key JOIN artifact a ON a.revision_id=r.id"
            " WHERE j.id=? AND a.ino=j.ino AND a.key_is_virtual",
            (row,),
        )
        self._db.execute("DELETE FROM journal WHERE id=?", (row,))
        if stored is None:
            self._db.execute("DELETE FROM spent WHERE src=?", (src,))
        log.warning("the spool file %s is owed no more: %s", src, "it is stored" if stored else "its file is not known")

    @property
    def _mine(self) -> str:
        return f"{self._db.machine}:"

    def _unsaid(self) -> list[tuple[int, int | None, str | None]]:
        """Puts whose inode is not waiting for them: row, inode, spool file."""
        return self._db.all(
            "SELECT j.id, j.ino, j.src FROM journal j LEFT JOIN inode i ON i.ino=j.ino"
            " WHERE j.op='put' AND i.pending IS NOT (? || j.src || ':' || coalesce(j.uid, '')) ORDER BY j.id",
            (self._mine,),
        )

    def _unowed(self) -> list[tuple[int, str, str, bool]]:
        """Inodes that wait for a spool file of this machine which no put has: inode, spool file, uid, and whether it
        has a stored revision."""
        rows = self._db.all(
            "SELECT i.ino, i.pending, a.id IS NOT NULL FROM inode i LEFT JOIN artifact a ON a.ino=i.ino"
            " WHERE i.pending IS NOT NULL AND NOT EXISTS (SELECT 1 FROM journal j WHERE j.op='put' AND j.ino=i.ino)"
            " ORDER BY i.ino"
        )
        found = ((ino, pending(text), bool(stored)) for ino, text, stored in rows)
        return [
            (ino, said.src, said.uid, stored)
            for ino, said, stored in found
            if said is not None and said.machine == self._db.machine
        ]
