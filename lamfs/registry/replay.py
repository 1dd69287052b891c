"""Replay: what a crash between the commits of the two files has left apart, brought together. The Database's thread.

A transaction over registry and work database is atomic in each file. SQLite commits the registry first, and a power cut
may set either of them back (workdb.py). Each half says enough to redo the other one:

- The inode says which spool file of this machine has its bytes, and the journal has no put of it: it is owed again.
- A put is of an inode that says something else. Both files count these changes, so it is known which one is ahead. If
  the registry is, its decision counts: what was put is stored, or deleted, or is another file's. If the work database
  is, its put counts as long as there is the inode.

A spool file that loses its row is looked at as any that nothing owes (ops/strays.py), unless the registry is ahead, and
does not wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from lamfs.keys import is_spool_name
from lamfs.processes import of_another_boot
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database

NOBODY = "replayed:0:0"
"""Owner of a put that is owed again: a process that is gone, and perhaps ran before the machine went down."""

_COUNT = "SELECT seq FROM {}.sqlite_sequence WHERE name='puts'"

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

    def __init__(self, db: Database, changes: ChangeLog) -> None:
        self._db = db
        self._changes = changes
        self._is_watching = False

    def of(self, ino: int) -> Pending | None:
        """Which machine has bytes of an inode that are not stored."""
        row = self._db.one("SELECT pending FROM inode WHERE ino=?", (ino,))
        return None if row is None else pending(row[0])

    def is_needed(self) -> bool:
        """Whether the two halves differ."""
        return self._lead() != 0

    def _lead(self) -> int:
        """How many changes of puts the registry is ahead; negative: behind."""
        row = self._db.one(f"SELECT ({_COUNT.format('main')}), ({_COUNT.format('work')})")
        assert row is not None
        return int(row[0]) - int(row[1])

    def watch(self) -> None:
        """From now on ``undo`` is of use, unless something is apart that another process has left: ``run`` knows more
        about that."""
        self._is_watching = self._lead() == 0

    def undo(self) -> None:
        """This process's last commit has reached the registry, and not the work database: the disk was full. It has
        failed, so nothing of it was acknowledged. A put that comes of it is as old as the epoch."""
        if self._is_watching and self._lead() > 0:
            # A put over a stored revision ends: nobody has written into its spool file. And no uid is taken: the
            # registry is ahead.
            self.run(lambda src: 1, lambda src: True, spare_uid=lambda: "", now=0)

    def run(
        self,
        size: Callable[[str], int | None],
        may_lack: Callable[[str], bool],
        *,
        spare_uid: Callable[[], str],
        now: int,
    ) -> int:
        """Make the two halves agree, in one transaction; how many rows have changed.

        ``size(src)``: bytes of a spool file; None: it is not there. ``may_lack(src)``: whether it may have only some
        blocks of its file. ``spare_uid()``: a new uid of an artifact. ``now``: ns since the epoch. Inside of the
        transaction nobody is between two commits: what is apart then was left by a crash.
        """
        count = 0
        with self._db.transaction():
            lead = self._lead()
            if not lead:
                return 0
            for row, ino, src, owner in self._unsaid():
                count += 1
                self._agree(row, ino, src, size, spare_uid, registry_first=lead > 0, killed=not of_another_boot(owner))
            for ino, src, uid, stored in self._unowed():
                count += 1
                # The object that the spool file was to become, and perhaps is: of a put that the journal knows is done.
                known = self._db.one("SELECT object_key, payload FROM spent WHERE src=?", (src,)) or (None, None)
                self._db.execute("DELETE FROM spent WHERE src=?", (src,))
                if stored and size(src) and may_lack(src):
                    # Which blocks it has, nobody knows any more: the file is as it was stored.
                    self._db.execute(
                        "UPDATE inode SET pending=NULL, blocks=NULL, revision=revision+1, size=(SELECT r.size"
                        " FROM artifact a JOIN revision r ON r.id=a.revision_id WHERE a.ino=inode.ino) WHERE ino=?",
                        (ino,),
                    )
                    self._changes.content(ino)
                    log.warning("of the spool file %s of inode %d nobody knows which blocks it has", src, ino)
                    continue
                self._db.execute(
                    "INSERT INTO journal(op, state, ino, uid, src, created_at, owner, object_key, payload)"
                    " VALUES('put','open',?,?,?,?,?,?,coalesce(?, '{}'))",
                    (ino, uid, src, now, NOBODY, *known),
                )
                log.info("the spool file %s of inode %d is owed again", src, ino)
            both = f"max(({_COUNT.format('main')}), ({_COUNT.format('work')}))"
            for schema in ("main", "work"):
                self._db.execute(f"UPDATE {schema}.sqlite_sequence SET seq={both} WHERE name='puts'")
        self._is_watching = True
        return count

    def _agree(
        self,
        row: int,
        ino: int | None,
        src: str,
        size: Callable[[str], int | None],
        spare_uid: Callable[[], str],
        *,
        registry_first: bool,
        killed: bool,
    ) -> None:
        """A put whose inode says something else. ``killed``: its process was, and the machine went on: then of the
        registry's last transaction the other half is missing, and no more."""
        other = self._inode_of(src)
        if other is not None and registry_first:
            self._db.execute("UPDATE journal SET ino=NULL WHERE op='put' AND ino=? AND id<>?", (other[0], row))
            self._db.execute("UPDATE journal SET ino=?, uid=? WHERE id=?", (other[0], other[1].uid, row))
            log.info("the spool file %s is of inode %d, not of %s", src, other[0], ino)
            return
        there = None if ino is None else self._db.one("SELECT pending FROM inode WHERE ino=?", (ino,))
        said = None if there is None else pending(there[0])
        if said is not None and said.machine == self._db.machine and said.src == src:
            self._db.execute("UPDATE journal SET uid=? WHERE id=?", (said.uid, row))
            log.info("the spool file %s of inode %s is to become artifact %s", src, ino, said.uid)
            return
        if said is not None and said.machine == self._db.machine:
            # It was about to go on in another spool file. If the process was killed, nothing of that was acknowledged,
            # as far as the disk has kept the work database's log.
            if registry_first and not killed and (size(said.src) or 0) >= (size(src) or 0):
                self._db.execute("UPDATE journal SET src=?, state='open' WHERE id=?", (said.src, row))
                self._db.execute("DELETE FROM spent WHERE src IN (?, ?)", (src, said.src))
                log.info("inode %s goes on in the spool file %s, and not in %s", ino, said.src, src)
                return
            # The other spool file is not spent all the same: a log that has lost more than one transaction looks the
            # same, and then it has bytes that were acknowledged. What is in it tells (ops/strays.py).
            self._own_uid(row, ino, spare_uid())  # the inode follows
            log.info("inode %s goes on in the spool file %s, and not in %s", ino, src, said.src)
            return
        if there is not None and not registry_first:
            self._own_uid(row, ino, spare_uid())
            log.info("inode %s has bytes in the spool file %s", ino, src)
            return
        # What a try of it may have left in storage goes, as when a put is struck off.
        self._db.execute(
            "INSERT INTO owed(op, object_key, created_at)"
            " SELECT 'delete', object_key, created_at FROM journal j WHERE id=? AND object_key IS NOT NULL"
            " AND payload->>'$.doubted' IS NULL"
            " AND NOT EXISTS (SELECT 1 FROM revision r WHERE r.object_key=j.object_key)",
            (row,),
        )
        self._db.execute("DELETE FROM journal WHERE id=?", (row,))
        if there is not None:
            self._db.execute("UPDATE inode SET pending=? WHERE ino=?", (there[0], ino))  # perhaps another machine's
        if not (registry_first and killed):
            self._db.execute("DELETE FROM spent WHERE src=?", (src,))
        log.info("the spool file %s of inode %s is owed no more", src, ino)

    def _own_uid(self, row: int, ino: int | None, spare_uid: str) -> None:
        """A put counts whose registry is older: it is for the artifact that its file has there. A uid that another file
        has, which was to be replaced by this one, stays that file's."""
        self._db.execute(
            "UPDATE journal SET uid=coalesce((SELECT uid FROM artifact WHERE ino=?1),"
            " CASE WHEN EXISTS (SELECT 1 FROM artifact a WHERE a.uid=journal.uid) THEN ?2 ELSE uid END) WHERE id=?3",
            (ino, spare_uid, row),
        )

    def _inode_of(self, src: str) -> tuple[int, Pending] | None:
        """The inode that says its bytes are in a spool file of this machine."""
        mine = f"{self._mine}{src}:"
        row = self._db.one(
            "SELECT ino, pending FROM inode WHERE pending IS NOT NULL AND substr(pending, 1, ?)=? LIMIT 1",
            (len(mine), mine),
        )
        said = None if row is None else pending(row[1])
        return None if row is None or said is None else (int(row[0]), said)

    @property
    def _mine(self) -> str:
        return f"{self._db.machine}:"

    def _unsaid(self) -> list[tuple[int, int | None, str, str | None]]:
        """Puts whose inode is not waiting for them: row, inode, spool file and owner."""
        return self._db.all(
            "SELECT j.id, j.ino, coalesce(j.src, ''), j.owner"
            " FROM journal j LEFT JOIN inode i ON i.ino=j.ino"
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
