"""The journal: storage work that is owed. Synchronous; the Database's thread.

Every step on storage is written here, in the transaction that decides it, before it runs; a crash at any point leaves
a row that the next mount (or the next command, when its process is gone) finishes.

The rows are in two tables of two files. ``owed``, in the registry, has what needs storage alone: moves and deletions.
They are written with the names and revisions that make them necessary, and any machine may do them. ``journal``, in the
work database (workdb.py), has what is this machine's: puts, saves, drops and aborts, and held deletions. The view
``all_work`` is both.

Operations:

``put``     the bytes of inode ``ino`` are in spool file ``src`` and have to become the content of its artifact. One row
            per inode, however often it is written: ``gen`` counts the closes. State ``open`` while a handle may still
            write and nothing was acknowledged, ``ready`` once it was; ``scratch`` instead when the file has a scratch
            name: then its bytes stay in the spool; ``refused`` when storage can never take it: it is
            owed, and not tried again before it is written again.
``save``    the Python API or CLI is storing a user's own file under ``object_key``; ``payload`` is the artifact row as
            it shall become. Finished or undone by whoever finds its process dead.
``move``    the object of artifact ``uid`` has to go to where its key and suffix say.
``delete``  nothing needs ``object_key`` any more. ``payload["etag"]`` says which object is meant, where that is known:
            another one that is there by then stays (storage/stale.py). Without it, it is what a piece of this machine's
            work may have left half done. State ``held`` while a living process may still be writing the object for a
            put that another process has taken over: then that process has to come to its end first.
``drop``    spool file ``src`` is owed no more: another process has newer bytes of its file, or has deleted that. Only
            the process that wrote it (``owner``) removes it, or whoever takes its work over when it is dead.
``abort``   the multipart upload ``payload["upload_id"]`` of ``object_key`` is needed no more; without an id every
            upload of that key which no row knows. Made when the row that the upload belonged to goes (see uploads.py).

A row whose payload has ``doubted`` was written before another machine may have had the lease: what is in its object may
be that one's. So a put's claim is no proof any more that the put has written it, and a delete that does not say which
object it means deletes nothing. Nor does an ETag alone say it, for equal bytes have the same one in a bucket: the
object has to be one that nothing needs by what it says of itself, too (work/stale.py).

``owner`` is the process that works on the row; rows of dead processes are taken over. A put is also taken from a
living one, when its bytes are acknowledged and another process begins to write the file: see begin_put.

A spool file of a row that goes is *spent*: in the same transaction a trigger notes its name, and whoever comes next
removes the file if a crash has left it. A spool file that is neither owed nor spent is somebody's bytes of which the
registry knows nothing: the registry is older than it is. So a name that is spent is never owed again.

``now``: the present time, in nanoseconds since the epoch.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

from lamfs.errors import FsError
from lamfs.model import ArtifactRecord, Revision
from lamfs.processes import is_alive
from lamfs.registry.db import Database
from lamfs.registry.entries import COLUMNS, Drop, Owed, Put, entry
from lamfs.registry.workdb import FIRST_OWED

URGENT = -1
"""``next_at`` of a row for which another process waits."""


T = TypeVar("T", bound=Owed)


class Dropped(NamedTuple):
    """A put that was struck off. ``src``: the spool file's name that is free now; ``object_key``: the object that may
    have been written for it already, and whose deletion nobody owes yet; ``doubted``: it may be another machine's."""

    src: str | None = None
    object_key: str | None = None
    doubted: bool = False

    def meant(self, revision: Revision) -> str | None:
        """The ETag by which the object of a revision is to be deleted; None: whatever is there, for the put may have
        written over it."""
        return None if self.object_key == revision.object_key and not self.doubted else revision.etag


class Journal:
    """Reads and writes the journal of one Database. ``owner`` names the process that writes through this object."""

    def __init__(self, db: Database, owner: str) -> None:
        self._db = db
        self.owner = owner

    def disown(self) -> None:
        """Leave what this process owes to whoever comes next."""
        with self._db.transaction():
            for table in ("journal", "owed"):
                self._db.execute(f"UPDATE {table} SET owner=NULL WHERE owner=?", (self.owner,))

    def begin_first_put(
        self,
        ino: int,
        src: str,
        *,
        now: int,
        artifact_uid: str,
        key_is_virtual: bool = True,
    ) -> None:
        """As begin_put, of an inode that was made in the same transaction: nobody knows anything of it."""
        self._db.execute(
            "INSERT INTO journal(op, state, ino, uid, src, created_at, owner, payload)"
            " VALUES('put','open',?,?,?,?,?,?)",
            (ino, artifact_uid, src, now, self.owner, json.dumps({"key_is_virtual": key_is_virtual})),
        )

    def begin_put(
        self,
        ino: int,
        src: str,
        *,
        now: int,
        artifact_uid: str,
        key_is_virtual: bool = True,
        base: str | None = None,
        seen: int | None = None,
        mine: str | None = None,
    ) -> str | None:
        """Note that ``ino`` is being written into spool file ``src``. An earlier row keeps its uid and generation, but
        opens again, so that an upload under way does not strike it off. ``artifact_uid``: of the artifact that comes of
        it, if there is neither that nor an earlier row. ``base``: the revision over which ``src`` is a partial spool
        (partial_spools.py). Returns the name of the earlier spool file, when it is this process's to remove.

        ``seen``: the revision of the inode from which what is written goes on (None: whatever there is); ``mine``: the
        spool file of this process that holds it, if it is not stored. Raises FsError(ESTALE), and nothing has changed,
        when the inode has another revision by now, or another process is writing the next one.
        """
        with self._db.transaction():
            before = self.put_of(ino)
            if seen is not None and not self._goes_on(ino, before, seen, mine):
                raise FsError(errno.ESTALE, "the file was replaced by somebody else while it was open")
            payload: dict[str, object] = {"key_is_virtual": key_is_virtual}
            uid, gen, free = artifact_uid, 0, None
            if before is not None and self._leave_to_owner(before, now):
                uid, gen, payload = before.uid or uid, before.gen, {"key_is_virtual": before.key_is_virtual}
            elif before is not None and before.src != src:
                free = before.src
            self._db.execute(
                "INSERT INTO journal(op, state, ino, uid, src, gen, created_at, owner, payload)"
                " VALUES('put','open',?,?,?,?,?,?,?)"
                " ON CONFLICT(ino) WHERE op='put' DO UPDATE SET state='open', src=excluded.src, owner=excluded.owner,"
                " payload=json_remove(payload, '$.damaged')",
                (ino, uid, src, gen, now, self.owner, json.dumps(payload)),
            )
            self.set_base(ino, base)
            return free

    def _goes_on(self, ino: int, before: Put | None, seen: int, mine: str | None) -> bool:
        """Whether revision ``seen`` of an inode may be followed by one of this process."""
        if before is not None and before.owner == self.owner and mine is not None and before.src == mine:
            return True  # whatever the Python API has saved meanwhile: these bytes are stored over it
        if before is not None and before.state == "open" and before.owner != self.owner:
            return False
        row = self._db.one("SELECT revision FROM inode WHERE ino=?", (ino,))
        return row is not None and row[0] == seen

    def set_base(self, ino: int, base: str | None) -> None:
        """The spool file of an inode's put lies over another revision, or over none."""
        self._db.execute(
            "UPDATE journal SET payload=CASE WHEN ?1 IS NULL THEN json_remove(payload, '$.base')"
            " ELSE json_set(payload, '$.base', ?1) END WHERE op='put' AND ino=?2",
            (base, ino),
        )

    def is_claimed(self, object_key: str) -> bool:
        """Whether lamfs may have written this object without an artifact's row saying so, or is about to. What is there
        may be somebody else's all the same, unless nobody else uses such names (claims.is_private)."""
        return (
            self._db.one(
                "SELECT 1 FROM all_work WHERE object_key=?1 AND payload->>'$.doubted' IS NULL"
                " UNION ALL SELECT 1 FROM claim WHERE object_key=?1 LIMIT 1",
                (object_key,),
            )
            is not None
        )

    def owes_delete(self, object_key: str, etag: str) -> bool:
        """Whether this very object is owed its deletion."""
        return (
            self._db.one(
                "SELECT 1 FROM owed WHERE op='delete' AND object_key=? AND payload->>'$.etag'=?", (object_key, etag)
            )
            is not None
        )

    def doubt_claims(self) -> None:
        """Another machine may have had the lease meanwhile: what is in objects that this one was to write, or to delete
        whatever they are, may be its."""
        with self._db.transaction():
            self._db.execute("DELETE FROM claim")
            for table in ("journal", "owed"):
                self._db.execute(
                    f"UPDATE {table} SET payload=json_set(payload, '$.doubted', 1)"
                    " WHERE op IN ('put', 'delete') AND object_key IS NOT NULL"
                )

    def announced(self, object_key: str) -> None:
        """The object is about to be written."""
        self._db.execute("INSERT OR IGNORE INTO claim VALUES(?)", (object_key,))

    def said(self, object_key: str) -> None:
        """An artifact's row says what is in the object."""
        self._db.execute("DELETE FROM claim WHERE object_key=?", (object_key,))

    def owes_file(self, src: str) -> bool:
        """Whether spool file ``src`` is owed, of whatever inode."""
        return self._db.one("SELECT 1 FROM journal WHERE op='put' AND src=?", (src,)) is not None

    def is_spent(self, src: str) -> bool:
        """Whether spool file ``src`` was owed once, and is not any more."""
        return self._db.one("SELECT 1 FROM spent WHERE src=?", (src,)) is not None

    def spend(self, src: str) -> None:
        """Spool file ``src`` is owed to nobody, and never will be."""
        self._db.execute("INSERT OR IGNORE INTO spent(src) VALUES(?)", (src,))

    def spent(self) -> set[str]:
        """Spool files that were owed once and are not any more, as far as nobody has seen that they are gone."""
        return {row[0] for row in self._db.all("SELECT src FROM spent")}

    def forget_spent(self, left: Iterable[str]) -> None:
        """Of all spool files only these are still there."""
        if self._db.one("SELECT 1 FROM spent LIMIT 1") is not None:
            self._db.execute(
                "DELETE FROM spent WHERE src NOT IN (SELECT value FROM json_each(?))", (json.dumps(list(left)),)
            )

    def saves(self, uid: str | None = None) -> bool:
        """Whether the Python API or the CLI is storing new bytes for an artifact (None: for any)."""
        # By owner and state, which there is an index for: what mounts owe may be very much.
        return any(
            self._db.one(
                "SELECT 1 FROM journal WHERE owner IS ?1 AND state='open' AND op='save' AND (?2 IS NULL OR uid=?2)"
                " LIMIT 1",
                (owner, uid),
            )
            is not None
            for owner in self._owners()
        )

    def _leave_to_owner(self, put: Put, now: int) -> bool:
        """A put of another living process is taken from it. What that has begun with it ends by itself: the row becomes
        the removal of its spool file, and of the object that it may be writing a ``held`` deletion. Whether that was
        so."""
        if put.owner == self.owner or not is_alive(put.owner):
            return False
        if put.object_key is None:
            self._db.execute("UPDATE journal SET op='drop', state='ready', next_at=0, ino=NULL WHERE id=?", (put.id,))
            return True
        self._db.execute("UPDATE journal SET op='delete', state='held', ino=NULL, src=NULL WHERE id=?", (put.id,))
        if put.src is not None:
            self._db.execute(
                "INSERT INTO journal(op, state, src, created_at, owner) VALUES('drop','ready',?,?,?)",
                (put.src, now, put.owner),
            )
        return True

    def release(self, busy: Iterable[int]) -> None:
        """This process has come to the end of all work but that on the rows ``busy``: what it held may be deleted."""
        rows = self._db.all("SELECT id FROM journal WHERE owner=? AND state='held'", (self.owner,))
        under_way = set(busy)
        for (entry_id,) in rows:
            if entry_id not in under_way:
                self._db.execute("UPDATE journal SET state='ready', next_at=0 WHERE id=?", (entry_id,))

    def ready_put(
        self, ino: int, *, now: int, settle: float = 0.0, scratch: bool = False, src: str | None = None
    ) -> int:
        """The bytes of ``ino`` are acknowledged: count one more generation and return it (0: there is no such row).

        Its upload may start ``settle`` seconds after ``now``; never, as long as it is ``scratch``. ``src``: only if
        they are in this spool file, and this process's to store.
        """
        row = self._db.one(
            "UPDATE journal SET state=?1, gen=gen+1, next_at=?2 WHERE op='put' AND ino=?3"
            " AND (?4 IS NULL OR src=?4 AND owner=?5) RETURNING gen",
            ("scratch" if scratch else "ready", now + int(settle * 1e9), ino, src, self.owner),
        )
        return int(row[0]) if row else 0

    def set_scratch(self, ino: int, scratch: bool) -> None:
        """The acknowledged bytes of ``ino`` have to be stored, or have not to be (``scratch``) after all."""
        self._db.execute(
            "UPDATE journal SET state=?, next_at=0 WHERE op='put' AND ino=? AND state=?",
            (*(("scratch", ino, "ready") if scratch else ("ready", ino, "scratch")),),
        )

    def set_target(self, entry_id: int, object_key: str | None) -> None:
        """Note, before it is written, the object that a put is about to make."""
        if object_key is not None:
            self.announced(object_key)
        self._db.execute(
            "UPDATE journal SET object_key=?, payload=json_remove(payload, '$.doubted') WHERE id=?",
            (object_key, entry_id),
        )

    def start_over(self, entry_id: int, uid: str) -> None:
        """What a put owes becomes the artifact ``uid`` instead, in another object than an earlier try may have made."""
        self._db.execute("UPDATE journal SET uid=?, object_key=NULL WHERE id=?", (uid, entry_id))

    def claim_target(self, entry_id: int, object_key: str) -> bool:
        """As set_target, of a put of this process; False, and nothing noted, when another one has taken it over."""
        with self._db.transaction():
            mine = self._db.execute(
                "UPDATE journal SET object_key=?, payload=json_remove(payload, '$.doubted')"
                " WHERE id=? AND op='put' AND owner=?",
                (object_key, entry_id, self.owner),
            )
            if mine.rowcount:
                self.announced(object_key)
            return mine.rowcount > 0

    def unclaim(self, entry_id: int, object_key: str) -> None:
        """Undo claim_target: nothing was written to the object."""
        with self._db.transaction():
            self.set_target(entry_id, None)
            self.said(object_key)

    def urge(self, entry_id: int) -> None:
        """Somebody waits for a put of another process: its file is stored although it may still be written there."""
        self._db.execute("UPDATE journal SET next_at=? WHERE id=? AND state='ready'", (URGENT, entry_id))

    def urged(self) -> list[int]:
        """Rows of this process for which another one waits."""
        rows = self._db.all("SELECT id FROM journal WHERE owner=? AND state='ready' AND next_at<0", (self.owner,))
        return [row[0] for row in rows]

    def put_of(self, ino: int) -> Put | None:
        """The put row of an inode."""
        row = self._db.one(f"SELECT {COLUMNS} FROM journal WHERE op='put' AND ino=?", (ino,))
        return None if row is None else _as(Put, entry(row))

    def get(self, entry_id: int) -> Owed | None:
        """One row by id."""
        row = self._db.one(f"SELECT {COLUMNS} FROM all_work WHERE id=?", (entry_id,))
        return entry(row) if row else None

    def get_put(self, entry_id: int) -> Put | None:
        """One row by id, if it is a put."""
        found = self.get(entry_id)
        return found if isinstance(found, Put) else None

    def add_delete(
        self,
        object_key: str,
        etag: str | None = None,
        *,
        now: int,
        copy_of: str | None = None,
        uid: str | None = None,
    ) -> None:
        """Owe the deletion of an object that no artifact has any more.

        ``etag``: the object that is meant, so that another one stays that is there by then. None: whatever is there,
        as also where lamfs may have written since without an artifact's row saying so. That is this machine's to do:
        nobody else knows what it may have left there, and intake.py leaves such a row out. ``copy_of``: uid of the
        artifact whose object is about to be copied there. ``uid``: of the artifact that had it.
        """
        if self._db.one("SELECT 1 FROM claim WHERE object_key=?", (object_key,)) is not None:
            etag = None
        known = {"etag": etag, "copy_of": copy_of, "uid": uid}
        payload = {name: value for name, value in known.items() if value is not None}
        self._db.execute(
            "INSERT INTO owed(op, object_key, created_at, owner, payload) VALUES('delete',?,?,?,?)",
            (object_key, now, self.owner, json.dumps(payload)),
        )

    def add_move(self, uid: str, *, now: int) -> None:
        """Owe the relocation of an artifact's object; at most one row per artifact."""
        self._db.execute(
            "INSERT INTO owed(op, uid, created_at, owner) VALUES('move',?,?,?)"
            " ON CONFLICT(uid) WHERE op='move' DO NOTHING",
            (uid, now, self.owner),
        )

    def drop_move(self, uid: str) -> None:
        """The object of an artifact has to go nowhere any more."""
        self._db.execute("DELETE FROM owed WHERE op='move' AND uid=?", (uid,))

    def add_save(self, uid: str, object_key: str, payload: dict[str, Any], *, now: int) -> int:
        """Announce that the bytes described by ``payload`` are about to be stored under ``object_key``."""
        self.announced(object_key)
        cursor = self._db.execute(
            "INSERT INTO journal(op, state, uid, object_key, created_at, owner, payload)"
            " VALUES('save','open',?,?,?,?,?)",
            (uid, object_key, now, self.owner, json.dumps(payload)),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def done(self, entry_id: int) -> None:
        """Strike a row off."""
        self._db.execute(f"DELETE FROM {_table(entry_id)} WHERE id=?", (entry_id,))

    def drop_put(self, ino: int, *, now: int) -> Dropped:
        """Strike the put of an inode off."""
        found = self.put_of(ino)
        if found is None:
            return Dropped()
        if self._leave_to_owner(found, now):
            return Dropped()
        self.done(found.id)
        return Dropped(found.src, found.object_key, found.doubted)

    def failed(self, entry_id: int, error: str, retry_at: int) -> None:
        """Note a failure and when (ns) to try again."""
        self._db.execute(
            f"UPDATE {_table(entry_id)} SET attempts=attempts+1, error=?, next_at=? WHERE id=?",
            (error, retry_at, entry_id),
        )

    def refuse(self, entry_id: int, error: str) -> None:
        """Storage can never take what a put row owes: do not try again."""
        self._db.execute(
            "UPDATE journal SET attempts=attempts+1, error=?, state='refused' WHERE id=? AND state='ready'",
            (error, entry_id),
        )

    def refused(self) -> list[Put]:
        """What this process owes and storage can never take."""
        rows = self._db.all(
            f"SELECT {COLUMNS} FROM journal WHERE owner=? AND state='refused' ORDER BY id", (self.owner,)
        )
        return [_as(Put, entry(row)) for row in rows]

    def postpone(self, entry_id: int, until: int) -> None:
        """Do not try a row before ``until``, in nanoseconds since the epoch (0: at once)."""
        self._db.execute(f"UPDATE {_table(entry_id)} SET next_at=? WHERE id=?", (until, entry_id))

    def went_on(self, entry_id: int, count: int) -> None:
        """A put that takes long has gone on, for whoever waits for it in another process: ``beat`` in its payload is
        another number than before."""
        self._db.execute("UPDATE journal SET payload=json_set(payload, '$.beat', ?) WHERE id=?", (count, entry_id))

    def ready(self, limit: int = 256, *, now: int, skip: Iterable[int] = ()) -> list[Owed]:
        """Work of this process that may start by ``now``, longest due first; ``skip`` are ids under way already."""
        busy = set(skip)
        rows = self._db.all(
            f"SELECT {COLUMNS} FROM all_work WHERE owner=? AND state='ready' AND next_at<=?"
            " ORDER BY next_at, id LIMIT ?",
            (self.owner, now, limit + len(busy)),
        )
        return [entry(row) for row in rows if row[0] not in busy][:limit]

    def next_at(self, *, skip: Iterable[int] = ()) -> int | None:
        """When (ns) the next row of this process, not among ``skip``, may be tried; None when nothing is owed."""
        busy = set(skip)
        rows = self._db.all(
            "SELECT id, next_at FROM all_work WHERE owner=? AND state IN ('ready', 'held')"
            " ORDER BY next_at, id LIMIT ?",
            (self.owner, len(busy) + 1),
        )
        return next((next_at for entry_id, next_at in rows if entry_id not in busy), None)

    def owed_by_me(self) -> tuple[int, int]:
        """Rows of this process that are ready, and the bytes of the files that are to be put."""
        row = self._db.one(
            "SELECT count(*), coalesce(sum(CASE j.op WHEN 'put' THEN i.size END), 0)"
            " FROM all_work j LEFT JOIN inode i ON i.ino=j.ino WHERE j.owner=? AND j.state='ready'",
            (self.owner,),
        )
        assert row is not None
        return int(row[0]), int(row[1])

    def owes_bytes(self) -> bool:
        """Whether this process has acknowledged bytes that are not stored yet."""
        return (
            self._db.one("SELECT 1 FROM journal WHERE owner=? AND state='ready' AND op='put' LIMIT 1", (self.owner,))
            is not None
        )

    def owed_bytes(self) -> int:
        """Bytes of the files that are owed, whoever owes them; what is scratch is not owed."""
        row = self._db.one(
            "SELECT coalesce(sum(i.size), 0) FROM journal j JOIN inode i ON i.ino=j.ino"
            " WHERE j.op='put' AND j.state<>'scratch'"
        )
        return int(row[0]) if row else 0

    def owed_inodes(self) -> list[int]:
        """Inodes whose acknowledged bytes are not stored yet, whoever stores them."""
        return [row[0] for row in self._db.all("SELECT ino FROM journal WHERE op='put' AND state='ready' ORDER BY id")]

    def scratch_files(self) -> list[tuple[int, int]]:
        """Inode number and size in bytes of each file that is scratch, and holds bytes, on this machine."""
        return self._db.all(
            "SELECT j.ino, i.size FROM journal j JOIN inode i ON i.ino=j.ino"
            " WHERE j.op='put' AND j.state='scratch' AND i.size>0 ORDER BY j.id"
        )

    def entries(self) -> list[Owed]:
        """Everything owed by anybody, oldest first."""
        return [entry(row) for row in self._db.all(f"SELECT {COLUMNS} FROM all_work ORDER BY id")]

    def puts(self) -> list[Put]:
        """The puts that anybody owes, oldest first."""
        rows = self._db.all(f"SELECT {COLUMNS} FROM journal WHERE op='put' ORDER BY id")
        return [_as(Put, entry(row)) for row in rows]

    def mine(self, kind: type[T]) -> list[T]:
        """What this process owes of a kind, oldest first."""
        rows = self._db.all(f"SELECT {COLUMNS} FROM all_work WHERE owner=? AND op=? ORDER BY id", (self.owner, kind.op))
        return [_as(kind, entry(row)) for row in rows]

    def failing(self, limit: int) -> tuple[int, list[Owed]]:
        """How many rows have failed and wait for another try, or are not tried again (``refused``); the first ``limit``
        of them, next to come first, those that are refused last."""
        which = "FROM all_work WHERE attempts>0 AND state IN ('ready', 'refused')"
        row = self._db.one(f"SELECT count(*) {which}")
        rows = self._db.all(f"SELECT {COLUMNS} {which} ORDER BY state, next_at, id LIMIT ?", (limit,))
        return int(row[0]) if row else 0, [entry(row) for row in rows]

    def owed(self) -> dict[str, int]:
        """Number of rows per operation; what is scratch is not owed, nor is a removal from the spool."""
        return dict(self._db.all("SELECT op, count(*) FROM all_work WHERE state<>'scratch' AND op<>'drop' GROUP BY op"))

    def retry_now(self) -> None:
        """Forget backoffs: what waits to be tried again may be tried at once."""
        for table in ("journal", "owed"):
            self._db.execute(f"UPDATE {table} SET next_at=0 WHERE next_at>0")

    def adopt(self, ops: Iterable[str] = ("put", "move", "delete", "abort", "drop")) -> list[Owed]:
        """Take over the rows of processes that are gone. Returns them as they were."""
        left = self.left(ops)
        return self.take(left) if left else []

    def left_puts(self) -> list[Put]:
        """The puts of processes that are gone, oldest first."""
        return [found for found in self.left(("put",)) if isinstance(found, Put)]

    def left(self, ops: Iterable[str]) -> list[Owed]:
        """What processes that are gone owe of these operations, oldest first."""
        wanted = set(ops)
        gone = [owner for owner in self._owners() if owner != self.owner and not is_alive(owner)] if wanted else []
        found: list[Owed] = []
        for owner in gone:
            rows = self._db.all(f"SELECT {COLUMNS} FROM all_work WHERE owner IS ?", (owner,))
            found += [row for row in map(entry, rows) if row.op in wanted]
        return sorted(found, key=lambda row: row.id)

    def take(self, entries: Iterable[T]) -> list[T]:
        """Take over rows of ``left``. Returns those that nobody else has taken or changed since, as they were."""
        with self._db.transaction():
            return [found for found in entries if self._take(found)]

    def _take(self, found: Owed) -> bool:
        if found.id > FIRST_OWED:
            taken = self._db.execute(
                "UPDATE owed SET owner=?, next_at=0 WHERE id=? AND op=? AND owner IS ?",
                (self.owner, found.id, found.op, found.owner),
            )
            return taken.rowcount > 0
        src = found.src if isinstance(found, Put | Drop) else ""
        gen = found.gen if isinstance(found, Put) else None
        taken = self._db.execute(
            "UPDATE journal SET owner=?1, next_at=0, state=replace(state, 'held', 'ready')"
            " WHERE id=?2 AND op=?3 AND owner IS ?4 AND coalesce(src, '')=?5 AND (?6 IS NULL OR gen=?6)",
            (self.owner, found.id, found.op, found.owner, src, gen),
        )
        return taken.rowcount > 0

    def _owners(self) -> list[str | None]:
        """Who owes anything. One step in an index for each of them, however much it is."""
        found: dict[str | None, None] = {}
        for table in ("journal", "owed"):
            if self._db.one(f"SELECT 1 FROM {table} WHERE owner IS NULL LIMIT 1") is not None:
                found[None] = None
            last: str | None = ""
            while last is not None:
                row = self._db.one(f"SELECT min(owner) FROM {table} WHERE owner>?", (last,))
                last = None if row is None else row[0]
                found |= {} if last is None else {last: None}
        return list(found)

    def holds(self, object_key: str) -> bool:
        """Whether a row is about to write, or is writing, or has written this object.

        A put counts until its row is struck off: on a local storage the object may be the only copy of its bytes.
        """
        return (
            self._db.one(
                "SELECT 1 FROM journal WHERE object_key=? AND (op IN ('save', 'put') OR state='held')", (object_key,)
            )
            is not None
        )

    def is_written(self, artifact: ArtifactRecord, object_key: str) -> bool:
        """Whether an artifact, or an object that may be its, is being written, or has bytes that are to be stored."""
        return (
            (artifact.ino is not None and self.put_of(artifact.ino) is not None)
            or self.saves(artifact.uid)
            or self.holds(artifact.revision.object_key)
            or self.holds(object_key)
        )

    def claimed(self, object_key: str, uid: str, entry_id: int | None, *, moves: bool = True) -> bool:
        """Whether storage work of somebody else may be under way on this object (row ``entry_id`` is one's own).

        Anybody's save or put to it; another living process's delete of it; and with ``moves`` another living
        process's relocation of artifact ``uid``, wherever to.
        """
        rows = self._db.all(
            "SELECT op, owner FROM all_work WHERE id IS NOT ?1 AND"
            " (object_key=?2 AND op IN ('save', 'put', 'delete') OR ?3 AND op='move' AND uid=?4)",
            (entry_id, object_key, moves, uid),
        )
        return any(op in ("save", "put") or (owner != self.owner and is_alive(owner)) for op, owner in rows)

    def is_free(self, object_key: str, entry_id: int | None) -> bool:
        """Whether no revision is in this object, and no storage work but row ``entry_id`` has to do with it: nobody is
        to write or delete what is, or may be, there."""
        return (
            self._db.one(
                "SELECT 1 FROM revision WHERE object_key=?1 UNION ALL SELECT 1 FROM all_work WHERE object_key=?1"
                " AND op IN ('save', 'put', 'delete') AND id IS NOT ?2 LIMIT 1",
                (object_key, entry_id),
            )
            is None
        )

    def drop_delete(self, object_key: str) -> bool:
        """The object is about to be written anew: strike its deletion off. Whether one was owed."""
        with self._db.transaction():
            dropped = [
                self._db.execute(f"DELETE FROM {which} AND object_key=?", (object_key,)).rowcount
                for which in ("owed WHERE op='delete'", "journal WHERE op='delete' AND state<>'held'")
            ]
            return any(dropped)

    def owes_any_delete(self, object_key: str) -> bool:
        """Whether what is there, or was, is owed its deletion by whoever may do it now."""
        return (
            self._db.one(
                "SELECT 1 FROM all_work WHERE op='delete' AND state='ready' AND object_key=? LIMIT 1", (object_key,)
            )
            is not None
        )

    def names(self, object_key: str) -> bool:
        """Whether any row has to do with this object."""
        return self._db.one("SELECT 1 FROM all_work WHERE object_key=? LIMIT 1", (object_key,)) is not None


def _table(entry_id: int) -> str:
    """The table that has a row."""
    return "owed" if entry_id > FIRST_OWED else "journal"


def _as(kind: type[T], found: Owed) -> T:
    """A row of which the query has said what it is."""
    assert isinstance(found, kind)
    return found
