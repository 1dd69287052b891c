"""The registry's tables, and the migrations that make them. Run by Database under its write lock; owns no state.

Times are nanoseconds since the epoch. ``artifact.ino`` is 1:1 with a regular file's inode; trashed artifacts keep their
inode row with ``nlink`` 0 and no entry. Names are TEXT: they were checked to be UTF-8 before they came here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
import stat
import time

from sqlite_utils import Database, Migrations

from lamfs.model import AUTO_INO, ROOT_INO
from lamfs.registry.workdb import FIRST_OWED, IS_OWED

migrations = Migrations("lamfs")

_TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE user(
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, handle TEXT NOT NULL UNIQUE, email TEXT, name TEXT,
    created_at INTEGER NOT NULL);
CREATE TABLE storage(
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, uuid TEXT NOT NULL UNIQUE, root TEXT NOT NULL UNIQUE,
    type TEXT NOT NULL, region TEXT, created_at INTEGER NOT NULL);
CREATE TABLE transform(
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, name TEXT NOT NULL, key TEXT, type TEXT NOT NULL,
    created_by_id INTEGER REFERENCES user(id), created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL);
CREATE INDEX transform_key ON transform(key);
CREATE TABLE run(
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, transform_id INTEGER NOT NULL REFERENCES transform(id),
    created_by_id INTEGER REFERENCES user(id), started_at INTEGER NOT NULL, finished_at INTEGER);
CREATE TABLE inode(
    ino INTEGER PRIMARY KEY AUTOINCREMENT, mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    nlink INTEGER NOT NULL, size INTEGER NOT NULL DEFAULT 0, atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL, rdev INTEGER NOT NULL DEFAULT 0, revision INTEGER NOT NULL DEFAULT 0);
CREATE TABLE dentry(
    id INTEGER PRIMARY KEY AUTOINCREMENT, parent INTEGER NOT NULL, name TEXT NOT NULL, ino INTEGER NOT NULL);
CREATE UNIQUE INDEX dentry_name ON dentry(parent, name);
CREATE INDEX dentry_order ON dentry(parent, id);
CREATE INDEX dentry_ino ON dentry(ino, id);
CREATE TABLE symlink(ino INTEGER PRIMARY KEY, target BLOB NOT NULL);
CREATE TABLE xattr(ino INTEGER NOT NULL, name TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY(ino, name))
    WITHOUT ROWID;
CREATE TABLE artifact(
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, storage_id INTEGER NOT NULL REFERENCES storage(id),
    key TEXT, suffix TEXT NOT NULL, description TEXT, accessor TEXT,
    size INTEGER NOT NULL, hash TEXT NOT NULL, hash_type TEXT NOT NULL, blocks BLOB NOT NULL,
    object_key TEXT NOT NULL, etag TEXT NOT NULL,
    visibility INTEGER NOT NULL DEFAULT 1, key_is_virtual INTEGER NOT NULL DEFAULT 1,
    created_by_id INTEGER REFERENCES user(id), run_id INTEGER REFERENCES run(id),
    transform_id INTEGER REFERENCES transform(id),
    created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, ino INTEGER NOT NULL UNIQUE);
CREATE UNIQUE INDEX artifact_key ON artifact(key) WHERE visibility > -1 AND key IS NOT NULL;
CREATE INDEX artifact_hash ON artifact(hash);
CREATE INDEX artifact_object ON artifact(object_key);
CREATE INDEX artifact_trash ON artifact(updated_at) WHERE visibility = -1;
CREATE TABLE journal(
    id INTEGER PRIMARY KEY AUTOINCREMENT, op TEXT NOT NULL, state TEXT NOT NULL, ino INTEGER, uid TEXT,
    object_key TEXT, src TEXT, gen INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, error TEXT,
    next_at INTEGER NOT NULL DEFAULT 0, created_at INTEGER NOT NULL, owner TEXT, payload TEXT NOT NULL DEFAULT '{}');
CREATE UNIQUE INDEX journal_put ON journal(ino) WHERE op = 'put';
CREATE UNIQUE INDEX journal_move ON journal(uid) WHERE op = 'move';
CREATE INDEX journal_object ON journal(object_key);
CREATE INDEX journal_due ON journal(owner, state, next_at, id);
CREATE TABLE change(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, origin TEXT NOT NULL, kind TEXT NOT NULL, ino INTEGER NOT NULL,
    parent INTEGER, name TEXT);
"""


@migrations()
def initial(db: Database) -> None:
    """Version 1: everything."""
    for statement in _TABLES.split(";\n"):
        if statement.strip():
            db.execute(statement)
    now = time.time_ns()
    for ino, mode in ((ROOT_INO, 0o755), (AUTO_INO, 0o755)):
        db.execute(
            "INSERT INTO inode(ino, mode, uid, gid, nlink, atime_ns, mtime_ns, ctime_ns) VALUES(?,?,?,?,?,?,?,?)",
            [ino, stat.S_IFDIR | mode, os.getuid(), os.getgid(), 2 if ino == AUTO_INO else 3, now, now, now],
        )
    db.execute("INSERT INTO dentry(parent, name, ino) VALUES(?, '.lamindb', ?)", [ROOT_INO, AUTO_INO])


@migrations()
def blocks(db: Database) -> None:
    """Version 2: how much of a sparse file is there. NULL: all of it."""
    db.execute("ALTER TABLE inode ADD COLUMN blocks INTEGER")


@migrations()
def leaves(db: Database) -> None:
    """Version 3: hashes of the 64 KiB leaves of blocks. ``hashes``: 8 bytes of the block's own, then the leaves'."""
    db.execute(
        "CREATE TABLE leaf(artifact_id INTEGER NOT NULL, block INTEGER NOT NULL, hashes BLOB NOT NULL,"
        " PRIMARY KEY(artifact_id, block))"
    )


_OVERLAY = (
    "CREATE TABLE overlay(src TEXT NOT NULL, block INTEGER NOT NULL, PRIMARY KEY(src, block)) WITHOUT ROWID",
    "CREATE TRIGGER overlay_done AFTER DELETE ON journal WHEN old.src IS NOT NULL"
    " BEGIN DELETE FROM overlay WHERE src = old.src; END",
    "CREATE TRIGGER overlay_left AFTER UPDATE OF src ON journal WHEN old.src IS NOT NULL AND new.src IS NOT old.src"
    " BEGIN DELETE FROM overlay WHERE src = old.src; END",
)


@migrations()
def overlay(db: Database) -> None:
    """Version 4: the blocks that are in a spool file which holds only some of its file's; see partial_spools.py."""
    for statement in _OVERLAY:
        db.execute(statement)


_UPLOADS = (
    """CREATE TABLE upload(
        journal_id INTEGER PRIMARY KEY, object_key TEXT NOT NULL, upload_id TEXT, completed INTEGER NOT NULL DEFAULT 0)
    """,
    "CREATE INDEX upload_object ON upload(object_key)",
    """CREATE TABLE part(
        journal_id INTEGER NOT NULL, number INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
        blocks BLOB NOT NULL, etag TEXT NOT NULL, PRIMARY KEY(journal_id, number)) WITHOUT ROWID""",
    """CREATE TRIGGER upload_parts AFTER DELETE ON upload BEGIN
        DELETE FROM part WHERE journal_id=OLD.journal_id;
    END""",
    """CREATE TRIGGER upload_abandoned AFTER DELETE ON journal BEGIN
        INSERT INTO journal(op, state, object_key, created_at, owner, payload)
            SELECT 'abort', 'ready', object_key, OLD.created_at, OLD.owner, json_object('upload_id', upload_id)
            FROM upload WHERE journal_id=OLD.id AND NOT completed;
        DELETE FROM upload WHERE journal_id=OLD.id;
    END""",
)


@migrations()
def uploads(db: Database) -> None:
    """Version 5: what storage has of an unfinished multipart upload. A trigger owes its abortion when the journal row
    it belongs to goes, whoever strikes that off and why."""
    for statement in _UPLOADS:
        db.execute(statement)


_STREAMS = (
    "CREATE INDEX artifact_large ON artifact(size) WHERE size > 67108864",
    """CREATE TRIGGER upload_scratch AFTER UPDATE OF state ON journal WHEN NEW.state='scratch' BEGIN
        INSERT INTO journal(op, state, object_key, created_at, owner, payload)
            SELECT 'abort', 'ready', object_key, NEW.created_at, NEW.owner, json_object('upload_id', upload_id)
            FROM upload WHERE journal_id=NEW.id AND NOT completed;
        DELETE FROM upload WHERE journal_id=NEW.id;
    END""",
)


@migrations()
def streams(db: Database) -> None:
    """Version 6: large files by size; and what was sent of a file that has become scratch is needed no more."""
    for statement in _STREAMS:
        db.execute(statement)


@migrations()
def unsaid(db: Database) -> None:
    """Version 7: objects that lamfs may have written without an artifact's row saying so: not somebody else's work.
    And puts by their spool file: closing a file asks whether it is owed."""
    db.execute("CREATE TABLE unsaid(object_key TEXT PRIMARY KEY) WITHOUT ROWID")
    db.execute("CREATE INDEX journal_src ON journal(src) WHERE op='put'")


@migrations()
def renames(db: Database) -> None:
    """Version 8: directories that have other names while the keys below them are still to follow (Artifacts.rekey).
    And real keys, since those cannot wait: there are objects to be moved."""
    db.execute("CREATE TABLE rekey(id INTEGER PRIMARY KEY AUTOINCREMENT, old TEXT NOT NULL, new TEXT NOT NULL)")
    db.execute("CREATE INDEX artifact_real ON artifact(key) WHERE key_is_virtual=0 AND visibility>-1")


@migrations()
def heads(db: Database) -> None:
    """Version 9: ContentHash.head, which spares who changes the end of a large file the first 50 MiB of it."""
    db.execute("ALTER TABLE artifact ADD COLUMN head BLOB")


@migrations()
def ranges(db: Database) -> None:
    """Version 10: the bytes of a block that are in such a file when not all of it is; see partial_spools.py."""
    db.execute("ALTER TABLE overlay ADD COLUMN ranges TEXT")
    db.execute("ALTER TABLE overlay ADD COLUMN durable TEXT")


@migrations()
def identity(db: Database) -> None:
    """Version 11: which instance this is, by a row that is compared wherever registry and storage meet; and out with
    what no version of lamfs has made. A registry that an older lamfs fetched was taken as it came.

    The root of its storage is a row of its own from now on. It is not that of the storage table, where older versions
    left the place that a folder had when the instance was made: the first change writes it down.
    """
    known = names(10)
    for kind, name in db.execute("SELECT type, name FROM sqlite_master WHERE type IN ('trigger', 'view')").fetchall():
        if name not in known:
            quoted = name.replace('"', '""')
            db.execute(f'DROP {kind} "{quoted}"')
    for (src,) in db.execute("SELECT src FROM journal WHERE src IS NOT NULL").fetchall():
        if not isinstance(src, str) or not re.fullmatch(r"[0-9a-f]{1,16}-[0-9a-f]{12}", src):
            db.execute("DELETE FROM journal WHERE src=?", [src])
    db.execute("INSERT OR IGNORE INTO meta(key, value) SELECT 'uid', uid FROM storage ORDER BY id LIMIT 1")


_SPOOL = (
    "CREATE TABLE spent(src TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TRIGGER spent_done AFTER DELETE ON journal WHEN old.src IS NOT NULL"
    " BEGIN INSERT OR IGNORE INTO spent VALUES(old.src); END",
    "CREATE TRIGGER spent_left AFTER UPDATE OF src ON journal WHEN old.src IS NOT NULL AND new.src IS NOT old.src"
    " BEGIN INSERT OR IGNORE INTO spent VALUES(old.src); END",
    "CREATE TABLE seal(src TEXT PRIMARY KEY, size INTEGER NOT NULL, blocks BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TRIGGER seal_done AFTER DELETE ON journal WHEN old.src IS NOT NULL"
    " BEGIN DELETE FROM seal WHERE src = old.src; END",
    "CREATE TRIGGER seal_left AFTER UPDATE OF src ON journal WHEN old.src IS NOT NULL AND new.src IS NOT old.src"
    " BEGIN DELETE FROM seal WHERE src = old.src; END",
    "CREATE TRIGGER seal_broken AFTER UPDATE OF state ON journal WHEN new.state = 'open' AND new.src IS NOT NULL"
    " BEGIN DELETE FROM seal WHERE src = new.src; END",
)


@migrations()
def spool_files(db: Database) -> None:
    """Version 12: spool files that are owed to nobody any more (journal.py), noted by whatever strikes their row off;
    and the hashes that those which wait have had since they were closed (seals.py). And the numbers of revisions."""
    for statement in _SPOOL:
        db.execute(statement)
    # The number of an artifact's revision, which its object says too. What was there before is a first.
    db.execute("ALTER TABLE artifact ADD COLUMN number INTEGER NOT NULL DEFAULT 1")


_REVISIONS = (
    """CREATE TABLE revision(
        id INTEGER PRIMARY KEY, artifact_id INTEGER NOT NULL, number INTEGER NOT NULL,
        size INTEGER NOT NULL, hash TEXT NOT NULL, hash_type TEXT NOT NULL, blocks BLOB NOT NULL, head BLOB,
        object_key TEXT NOT NULL, etag TEXT NOT NULL, created_at INTEGER NOT NULL,
        created_by_id INTEGER REFERENCES user(id), run_id INTEGER REFERENCES run(id))
    """,
    "INSERT INTO revision(artifact_id, number, size, hash, hash_type, blocks, head, object_key, etag, created_at,"
    " created_by_id, run_id) SELECT id, number, size, hash, hash_type, blocks, head, object_key, etag, updated_at,"
    " created_by_id, run_id FROM artifact ORDER BY id",
    """CREATE TABLE artifact_now(
        id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, storage_id INTEGER NOT NULL REFERENCES storage(id),
        key TEXT, suffix TEXT NOT NULL, description TEXT, accessor TEXT,
        visibility INTEGER NOT NULL DEFAULT 1, key_is_virtual INTEGER NOT NULL DEFAULT 1,
        created_by_id INTEGER REFERENCES user(id), run_id INTEGER REFERENCES run(id),
        transform_id INTEGER REFERENCES transform(id),
        created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, ino INTEGER NOT NULL UNIQUE,
        revision_id INTEGER NOT NULL, used TEXT)
    """,
    # Which names an artifact has used is not known: of what was written before, those that it may have.
    "INSERT INTO artifact_now SELECT a.id, a.uid, a.storage_id, a.key, a.suffix, a.description, a.accessor,"
    " a.visibility, a.key_is_virtual, a.created_by_id, a.run_id, a.transform_id, a.created_at, a.updated_at, a.ino,"
    " r.id, CASE WHEN a.number=1 AND a.object_key IN ('.lamindb/'||a.uid||a.suffix, a.key) THEN NULL"
    " ELSE json_array(a.suffix) END FROM artifact a JOIN revision r ON r.artifact_id=a.id ORDER BY a.id",
    "DROP TABLE artifact",
    "ALTER TABLE artifact_now RENAME TO artifact",
    "CREATE UNIQUE INDEX artifact_key ON artifact(key) WHERE visibility > -1 AND key IS NOT NULL",
    "CREATE INDEX artifact_trash ON artifact(updated_at) WHERE visibility = -1",
    "CREATE INDEX artifact_real ON artifact(key) WHERE key_is_virtual=0 AND visibility>-1",
    "CREATE INDEX revision_hash ON revision(hash)",
    "CREATE INDEX revision_object ON revision(object_key)",
    "CREATE INDEX revision_large ON revision(size) WHERE size > 67108864",
)


@migrations()
def revisions(db: Database) -> None:
    """Version 13: a revision has a row of its own, and an artifact refers to the one that it has now. ``used``: JSON
    list, ArtifactRecord.used."""
    for statement in _REVISIONS:
        db.execute(statement)


_OWED = (
    """CREATE TABLE owed(
        id INTEGER PRIMARY KEY AUTOINCREMENT, op TEXT NOT NULL, uid TEXT, object_key TEXT,
        attempts INTEGER NOT NULL DEFAULT 0, error TEXT, next_at INTEGER NOT NULL DEFAULT 0,
        created_at INTEGER NOT NULL, owner TEXT, payload TEXT NOT NULL DEFAULT '{}')""",
    "CREATE UNIQUE INDEX owed_move ON owed(uid) WHERE op='move'",
    "CREATE INDEX owed_object ON owed(object_key)",
    "CREATE INDEX owed_due ON owed(owner, next_at, id)",
    f"INSERT INTO sqlite_sequence(name, seq) VALUES('owed', {FIRST_OWED})",
    "INSERT INTO owed(op, uid, object_key, attempts, error, next_at, created_at, owner, payload)"
    " SELECT op, uid, object_key, attempts, error, next_at, created_at, owner, payload FROM journal"
    f" WHERE coalesce({IS_OWED}, 0) ORDER BY id",
    *(f"DROP TABLE {name}" for name in ("upload", "part", "overlay", "seal", "spent", "unsaid", "journal")),
    # How often inode.pending has changed by this machine's work; see workdb.py.
    "INSERT INTO sqlite_sequence(name, seq) VALUES('puts', 0)",
    "ALTER TABLE inode ADD COLUMN pending TEXT",
)


@migrations()
def work_split(db: Database) -> None:
    """Version 14: the work of one machine has left (workdb.split has copied it before). What is owed and any machine
    may do stays, and each inode says which machine has its bytes while they are not stored: ``pending``,
    ``machine:spool file:artifact uid``."""
    for statement in _OWED:
        db.execute(statement)


def apply(conn: sqlite3.Connection, version: int | None = None) -> None:
    """Bring the tables of a connection, inside of its write transaction, to a version; None: db.SCHEMA_VERSION."""
    order = [migration.name for migration in migrations._migrations]
    after = order[version] if version is not None and version < len(order) else None
    migrations.apply(Database(conn, recursive_triggers=False, execute_plugins=False), stop_before=after)


@functools.cache
def _made(version: int) -> tuple[tuple[str, str, str], ...]:
    """Type, name and SQL of everything that the migrations up to a version make."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        apply(conn, version)
        rows = conn.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_master").fetchall()
    return tuple((str(kind), str(name), str(sql)) for kind, name, sql in rows)


def tables(version: int, only: str | None = None) -> dict[str, str]:
    """SQL of lamfs's own tables in a version (of one of them), by name; SQLite's and sqlite-utils' are left out."""
    return {
        name: sql
        for kind, name, sql in _made(version)
        if kind == "table" and not name.startswith(("sqlite_", "_sqlite_")) and only in (None, name)
    }


def names(version: int) -> frozenset[str]:
    """Names of all tables, indexes and triggers that a registry of a version has."""
    return frozenset(name for _, name, _ in _made(version))
