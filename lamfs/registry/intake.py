"""Taking over a registry that came from storage: rows of its known tables that are right go into a fresh file.

Synchronous, one thread. A row that breaks a rule (rules.py) is left out, or loses what is wrong with it, and is a
Finding. What has lost its place by that is attached in ``lost+found`` (lostfound.py). All else is used.

The work of other machines stays theirs. Their puts and saves need a spool that is elsewhere: a registry has nothing of
these, and a file shows the revision that is stored. (In one of an older version such rows are left out.) Their owed
deletes and moves are taken over: these need storage alone. But a copy may be older than what is in storage, and an
object key may have been used anew since: so of the deletes only those that say which object they mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from lamfs.config import machine_mark
from lamfs.model import storage_id
from lamfs.registry import schema
from lamfs.registry.db import WORK_SPLIT, Database, translated
from lamfs.registry.lostfound import Finding, reattach
from lamfs.registry.origins import PUSHES, Origin
from lamfs.registry.received import Received
from lamfs.registry.rules import INO_GIVEN, RETAINED_KEY, REVISIONS, ROW_MAX, Column, rule, tables
from lamfs.registry.workdb import FIRST_OWED

SHOWN = 1000
"""Most findings that are kept; of more only their number."""


class Place(NamedTuple):
    """Where the registry is used from now on: kind (``local``, ``s3``) and root of the storage it was found in."""

    kind: str
    root: str


class Taken(NamedTuple):
    """What came of it. ``findings``: the first SHOWN; ``total``: how many there are."""

    origin: Origin
    findings: list[Finding]
    total: int


def look(path: Path, name: str) -> Origin:
    """What an untrusted registry file says of itself. ``name``: what errors call it. Raises RegistryError."""
    with Received(path, name) as received:
        return received.origin()


def check(path: Path, name: str) -> Origin:
    """As ``look``, and that it can be taken: every page of its tables is whole. Raises RegistryError."""
    with Received(path, name) as received:
        origin = received.origin()
        received.check(origin.version)
        return origin


def take(path: Path, name: str, fresh: Path, place: Place, *, now: int, spare_uid: str) -> Taken:
    """Make ``fresh``, a new file of mode 0600, with the rows of the untrusted registry at ``path``.

    ``now``: for what has no time of its own, in nanoseconds since the epoch; ``spare_uid``: of the storage, if no row
    of it is right.

    Raises RegistryError when the file is damaged, newer than this program, or cannot be a registry.
    """
    with Received(path, name) as received:
        origin = received.origin()
        others = received.check(origin.version)
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    with translated(fresh), contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as made:
        made.execute("PRAGMA synchronous=OFF")  # it is synced when it is whole
        made.execute("PRAGMA temp_store=MEMORY")
        made.execute("BEGIN")
        schema.apply(made, origin.version)
        made.execute("INSERT OR REPLACE INTO meta(key, value) VALUES('schema_version', ?)", (origin.version,))
        made.execute("COMMIT")
    with Received(path, name, into=fresh) as received:
        intake = _Intake(received, origin, place, now, spare_uid)
        for other in others:
            intake.found("registry", other, "it is not of lamfs, and was left out")
        intake.run()
    db = Database(fresh, work=False)  # which brings it to the present version
    try:
        with db.transaction():
            db.execute(
                "INSERT OR REPLACE INTO meta(key, value) SELECT 'uid', uid FROM storage UNION ALL"
                " SELECT 'root', root FROM storage"
            )
            db.execute("DELETE FROM owed WHERE op='delete' AND coalesce(json_type(payload, '$.etag'), '')<>'text'")
            for finding in reattach(db, now, intake.unnamed, intake.unread):
                intake.add(finding)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.close()
    return Taken(origin, intake.findings, intake.count)


class _Intake:
    """Copies the rows of one received registry. ``unnamed``: inodes whose entry was left out; ``unread``: those whose
    artifact was."""

    def __init__(self, received: Received, origin: Origin, place: Place, now: int, spare_uid: str) -> None:
        self._src = received
        self._origin = origin
        self._place = place
        self._now = now
        self._spare_uid = spare_uid
        self._tables = tables(place.kind, origin.version)
        self.findings: list[Finding] = []
        self.count = 0
        self.unnamed: set[int] = set()
        self.unread: set[int] = set()

    def found(self, table: str, row: str, what: str) -> None:
        """Note what is wrong with a row."""
        self.add(Finding(table, row, what))

    def add(self, finding: Finding) -> None:
        """Note a finding."""
        self.count += 1
        if len(self.findings) < SHOWN:
            self.findings.append(finding)

    def run(self) -> None:
        """Copy everything, in one transaction."""
        change = self._src.change
        change("PRAGMA main.synchronous=OFF")  # the file is synced when it is whole
        change("BEGIN")
        change("CREATE TEMP TABLE me(uid INTEGER, gid INTEGER)")
        change("INSERT INTO temp.me VALUES(?, ?)", (os.getuid(), os.getgid()))
        for table in ("dentry", "inode"):
            change(f"DELETE FROM main.{table}")  # the two directories that every new registry has
        for table, columns in self._tables.items():
            present = {row[1] for row in self._src.all(f"PRAGMA main.table_info({table})")}
            if present:
                self._copy(table, [name for name in columns if name in present])
        if self._origin.version >= REVISIONS:
            self._revisions()
        self._meta()
        self._storage(self._place)
        self._not_stored()
        self._references()
        self._renumber()
        self._sequences()
        change("COMMIT")

    # -- rows ---------------------------------------------------------------------------------------------------

    def _copy(self, table: str, names: list[str]) -> None:
        columns = self._tables[table]
        # Not by an index: what that says of a row may be another thing.
        source = f"src.{table} NOT INDEXED"
        whose = "1" if table != "journal" else "coalesce(op IN ('move', 'delete'), 0)"
        values, right = names, whose
        wrong = self._name_wrong(table, names, source, whose)
        if wrong:
            values = [_value(name, columns[name]) for name in names]
            needed = [rule(name, columns[name]) for name in names if columns[name].instead is None]
            right = " AND ".join([whose, *needed])
        copied = self._src.change(
            f"INSERT OR IGNORE INTO main.{table}({', '.join(names)}) SELECT {', '.join(values)} FROM {source}"
            f" WHERE {right}"
        )
        twins = self._src.all(f"SELECT count(*) FROM {source} WHERE {right}")[0][0] - copied
        if twins > 0:
            self.found(table, f"{twins} rows", "other rows have the same key, so these were left out")
        if (wrong or twins) and table == "dentry":
            self._left_out_names(right)
        if (wrong or twins) and table == "artifact":
            self._twins(names, values, right)
            self.unread.update(
                row[0]
                for row in self._src.all(
                    "SELECT ino FROM src.artifact NOT INDEXED WHERE typeof(ino)='integer'"
                    " AND ino NOT IN (SELECT ino FROM main.artifact)"
                )
            )

    def _name_wrong(self, table: str, names: list[str], source: str, whose: str) -> int:
        """Note the rows of a table that break a rule; how many there are."""
        columns = self._tables[table]
        rules = [rule(name, columns[name]) for name in names]
        where = f"{whose} AND NOT ({' AND '.join(rules)})"
        shown = ", ".join(f"substr(CAST({name} AS TEXT), 1, 60)" for name in names[:4])
        rows = self._src.all(f"SELECT {', '.join(rules)}, {shown} FROM {source} WHERE {where} LIMIT ?", (SHOWN,))
        for row in rows:
            bad = [name for name, ok in zip(names, row, strict=False) if not ok]
            lost = any(columns[name].instead is None for name in bad)
            done = "the row was left out" if lost else "that was not taken"
            what = f"its {' and '.join(bad)} cannot be right, so {done}"
            self.found(table, _row(names, row[len(names) :]), what)
        if len(rows) < SHOWN:
            return len(rows)
        count = int(self._src.all(f"SELECT count(*) FROM {source} WHERE {where}")[0][0])
        self.count += count - len(rows)
        return count

    def _left_out_names(self, right: str) -> None:
        """Inodes that an entry named which was left out."""
        rows = self._src.all(
            f"SELECT ino FROM src.dentry NOT INDEXED WHERE typeof(ino)='integer' AND NOT ({right})"
            " UNION SELECT d.ino FROM src.dentry d NOT INDEXED WHERE typeof(d.ino)='integer'"
            " AND d.ino NOT IN (SELECT ino FROM main.dentry)"
        )
        self.unnamed.update(row[0] for row in rows)

    def _twins(self, names: list[str], values: list[str], right: str) -> None:
        """Artifacts that another row kept out because of its key or inode, and not of its uid: without these, then."""
        without = {"id": "NULL", "key": "NULL", "ino": "-id"}
        chosen = [without.get(name, value) for name, value in zip(names, values, strict=True)]
        self._src.change(
            f"INSERT OR IGNORE INTO main.artifact({', '.join(names)}) SELECT {', '.join(chosen)}"
            f" FROM src.artifact NOT INDEXED WHERE {right} AND uid NOT IN (SELECT uid FROM main.artifact)"
        )

    def _revisions(self) -> None:
        """An artifact has a revision, and a revision is one artifact's. An artifact whose revision was left out has no
        content, and is left out too; so is all but the first of those that name the same one."""
        change = self._src.change
        change(
            "CREATE TEMP TABLE of_revision AS SELECT min(a.id) AS id, r.id AS revision_id FROM main.artifact a"
            " JOIN main.revision r ON r.id=a.revision_id GROUP BY r.id"
        )
        without = "FROM main.artifact WHERE id NOT IN (SELECT id FROM temp.of_revision)"
        for uid, ino in self._src.all(f"SELECT uid, ino {without} ORDER BY id"):
            self.unread.add(ino)
            self.found("artifact", f"'{uid}'", "it has no revision that is right, so it was left out")
        change(f"DELETE {without}")
        change("CREATE INDEX temp.of_it ON of_revision(revision_id)")
        change(
            "UPDATE main.revision SET artifact_id="
            "coalesce((SELECT id FROM temp.of_revision o WHERE o.revision_id=revision.id), 0)"
        )
        change("DELETE FROM main.revision WHERE artifact_id=0")

    # -- the small things ---------------------------------------------------------------------------------------

    def _meta(self) -> None:
        change = self._src.change
        change("INSERT OR REPLACE INTO main.meta(key, value) VALUES('slug', ?)", (self._origin.slug,))
        pushes = json.dumps(self._origin.pushes)
        change("INSERT OR REPLACE INTO main.meta(key, value) VALUES(?, ?)", (PUSHES, pushes))
        change(
            "INSERT OR IGNORE INTO main.meta(key, value) SELECT key, 1 FROM src.meta NOT INDEXED"
            f" WHERE coalesce({RETAINED_KEY.format('key')}, 0)"
        )

    def _storage(self, place: Place) -> None:
        """There is one storage, and it is where this registry was found."""
        change = self._src.change
        if not self._src.all("SELECT 1 FROM main.storage"):
            self.found("storage", "the storage", "no row of it is right, so it has a new one")
            change(
                "INSERT INTO main.storage(id, uid, uuid, root, type, created_at) VALUES(1, ?, '', '', '', ?)",
                (self._spare_uid, self._now),
            )
        change(
            "UPDATE main.storage SET root=?, uuid=?, type=? WHERE id=(SELECT min(id) FROM main.storage)",
            (place.root, storage_id(place.root).hex, place.kind),
        )
        missing = "SELECT uid FROM main.artifact WHERE storage_id<>(SELECT min(id) FROM main.storage)"
        for (uid,) in self._src.all(f"{missing} LIMIT {SHOWN}"):
            self.found("artifact", f"'{uid}'", "it names another storage, and is looked for in this one")
        change("DELETE FROM main.storage WHERE id<>(SELECT min(id) FROM main.storage)")
        change("UPDATE main.artifact SET storage_id=(SELECT min(id) FROM main.storage)")

    def _references(self) -> None:
        """References to rows that are not there say nothing. What cannot be without is left out."""
        change = self._src.change
        change("DELETE FROM main.run WHERE transform_id NOT IN (SELECT id FROM main.transform)")
        for table, column, other in (
            ("transform", "created_by_id", "user"), ("run", "created_by_id", "user"),
            ("artifact", "created_by_id", "user"), ("artifact", "run_id", "run"),
            ("artifact", "transform_id", "transform"), ("revision", "created_by_id", "user"),
            ("revision", "run_id", "run"),
        ):  # fmt: skip
            columns = [row[1] for row in self._src.all(f"PRAGMA main.table_info({table})")]
            if not columns:
                continue
            named = "uid" if "uid" in columns else "object_key"
            where = f"{column} IS NOT NULL AND {column} NOT IN (SELECT id FROM main.{other})"
            for (name,) in self._src.all(f"SELECT {named} FROM main.{table} WHERE {where} LIMIT {SHOWN}"):
                self.found(table, f"'{name}'", f"its {column} names no {other} that is there, and was not taken")
            change(f"UPDATE main.{table} SET {column}=NULL WHERE {where}")
        change("DELETE FROM main.symlink WHERE ino NOT IN (SELECT ino FROM main.inode)")
        change("DELETE FROM main.xattr WHERE ino NOT IN (SELECT ino FROM main.inode)")
        if self._src.all("PRAGMA main.table_info(leaf)"):
            change("DELETE FROM main.leaf WHERE artifact_id NOT IN (SELECT id FROM main.artifact)")

    def _not_stored(self) -> None:
        """What another machine has still to store is on that machine: here a file shows what is stored of it. One that
        is not stored at all keeps its name: what reads it is told that its bytes are elsewhere."""
        change = self._src.change
        row = " JOIN main.revision r ON r.id=a.revision_id" if self._origin.version >= REVISIONS else ""
        stored = f"(SELECT size FROM main.artifact a{row} WHERE a.ino=inode.ino)"
        blocks = ", blocks=NULL" if self._origin.version >= 2 else ""
        change(f"UPDATE main.inode SET size={stored}, revision=revision+1{blocks} WHERE size<>{stored}")
        if self._origin.version >= WORK_SPLIT:
            # What this machine has is in its own work database, and nobody else says which of its files is whose.
            change("UPDATE main.inode SET pending=NULL WHERE substr(pending, 1, 13)=?", (f"{machine_mark()}:",))

    def _renumber(self) -> None:
        """Inode numbers near the highest would leave none for files to come: what has them gets others."""
        self._src.change("CREATE TEMP TABLE renumbered(old INTEGER PRIMARY KEY, new INTEGER)")
        self._src.change(
            "INSERT INTO temp.renumbered SELECT ino, row_number() OVER (ORDER BY ino)"
            " + (SELECT coalesce(max(ino), 0) FROM main.inode WHERE ino<=?1) FROM main.inode WHERE ino>?1",
            (INO_GIVEN,),
        )
        changed = dict(self._src.all("SELECT old, new FROM temp.renumbered"))
        if not changed:
            return
        self.found("inode", f"{len(changed)} rows", "their numbers are near the highest, so they have got others")
        for table, column in (
            ("inode", "ino"), ("dentry", "ino"), ("dentry", "parent"), ("symlink", "ino"), ("xattr", "ino"),
            ("artifact", "ino"),
        ):  # fmt: skip
            self._src.change(
                f"UPDATE main.{table} SET {column}=(SELECT new FROM temp.renumbered WHERE old={column})"
                f" WHERE {column} IN (SELECT old FROM temp.renumbered)"
            )
        for numbers in (self.unnamed, self.unread):
            moved = {number for number in numbers if number in changed}
            numbers -= moved
            numbers |= {changed[number] for number in moved}

    def _sequences(self) -> None:
        """Numbers that were given out are not given out again, by whomever."""
        for table, column in (
            ("inode", "ino"),
            ("dentry", "id"),
            ("journal", "id"),
            ("owed", "id"),
            ("change", "seq"),
            ("rekey", "id"),
        ):
            if not self._src.all("SELECT 1 FROM main.sqlite_master WHERE name=?", (table,)):
                continue
            (most,) = self._src.all(f"SELECT coalesce(max({column}), 0) FROM main.{table}")[0]
            rows = self._src.all(
                "SELECT max(seq) FROM src.sqlite_sequence NOT INDEXED WHERE name=? AND typeof(seq)='integer'"
                " AND seq BETWEEN 0 AND ?",
                (table, INO_GIVEN if table == "inode" else ROW_MAX),
            )
            given = max(most, rows[0][0] or 0, FIRST_OWED if table == "owed" else 0)
            self._src.change("DELETE FROM main.sqlite_sequence WHERE name=?", (table,))
            self._src.change("INSERT INTO main.sqlite_sequence(name, seq) VALUES(?, ?)", (table, given))


def _value(name: str, column: Column) -> str:
    """What is copied of a column."""
    return name if column.instead is None else f"CASE WHEN {rule(name, column)} THEN {name} ELSE {column.instead} END"


def _row(names: list[str], values: tuple[Any, ...]) -> str:
    """A row, for people."""
    return ", ".join(f"{name} '{value}'" for name, value in zip(names, values, strict=False) if value is not None)
