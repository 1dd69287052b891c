"""The tables of the cache's index, and preparing a connection. Synchronous; the connection's thread."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SCHEMA = 2
BUSY_SECONDS = 2.0
"""Seconds that a call may wait for another process's transaction. These take well under a millisecond."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

WRITING = threading.RLock()
"""Held while writing. Without it, threads of one process would wait for each other in SQLite's busy handler, which
sleeps for longer and longer."""

_TABLES = """
CREATE TABLE IF NOT EXISTS file (
    path BLOB PRIMARY KEY,
    etag TEXT NOT NULL,
    ino INTEGER NOT NULL,
    size INTEGER NOT NULL,
    bitmap BLOB NOT NULL,
    bytes INTEGER NOT NULL,
    used INTEGER NOT NULL,
    mtime_ns INTEGER,
    floor_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS file_used ON file (used);
CREATE TABLE IF NOT EXISTS partial (
    path BLOB NOT NULL, block INTEGER NOT NULL, leaves INTEGER NOT NULL, PRIMARY KEY (path, block)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS region (
    path BLOB NOT NULL, region INTEGER NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (path, region)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS region_used ON region (used);
CREATE TABLE IF NOT EXISTS swept (folder BLOB PRIMARY KEY);
CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS total (bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
CREATE TRIGGER IF NOT EXISTS file_added AFTER INSERT ON file BEGIN UPDATE total SET bytes = bytes + new.bytes; END;
CREATE TRIGGER IF NOT EXISTS file_gone AFTER DELETE ON file BEGIN UPDATE total SET bytes = bytes - old.bytes; END;
CREATE TRIGGER IF NOT EXISTS file_parts AFTER DELETE ON file BEGIN DELETE FROM partial WHERE path = old.path; END;
CREATE TRIGGER IF NOT EXISTS file_regions AFTER DELETE ON file BEGIN DELETE FROM region WHERE path = old.path; END;
CREATE TRIGGER IF NOT EXISTS file_grown AFTER UPDATE OF bytes ON file
    BEGIN UPDATE total SET bytes = bytes + new.bytes - old.bytes; END;
"""


def prepare(db: sqlite3.Connection) -> None:
    """Prepare a connection, and make the tables of a new index. Raises sqlite3.Error when the file is unusable."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in (0, 1, SCHEMA):
        raise sqlite3.DatabaseError(f"its schema is {version}, this lamfs knows {SCHEMA}")
    db.execute("PRAGMA synchronous = OFF")  # losing the last marks in a power cut costs a fetch
    if version != SCHEMA:
        _make_tables(db)
    _trust_this_boot_only(db)


def _make_tables(db: sqlite3.Connection) -> None:
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")  # ignores the busy timeout while another process does the same
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
    with transaction(db):  # only adds what version 1 lacks
        for statement in _TABLES.split(";\n"):  # not executescript, which commits first
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA}")


def _trust_this_boot_only(db: sqlite3.Connection) -> None:
    """Files that were complete before a reboot may not have reached the disk: their blocks are checked again."""
    boot = BOOT_ID.read_text().strip()
    if db.execute("SELECT 1 FROM boot WHERE id = ?", (boot,)).fetchone() is not None:
        return
    with transaction(db):
        db.execute("UPDATE file SET floor_ns = max(floor_ns, mtime_ns), mtime_ns = NULL WHERE mtime_ns IS NOT NULL")
        db.execute("DELETE FROM boot")
        db.execute("INSERT INTO boot VALUES (?)", (boot,))


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One write transaction, rolled back by any exception; inside an open one, a part of it."""
    if db.in_transaction:
        yield
        return
    with WRITING:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
