"""The work database: this machine's own work on a registry, in a file beside it. Synchronous; any thread.

``registry.lndb`` has what other machines may see. ``work.db`` has what is this machine's alone: the journal of puts,
saves and aborts, which blocks a partial spool file has, multipart uploads, the hashes of spool files. It never goes to
storage. Every connection to the registry attaches it under the name ``work``.

SQLite makes a transaction over two files atomic in each of them, not in both (https://www.sqlite.org/lang_attach.html,
"if the journal_mode is WAL"). It commits the registry first. So the registry says, for each inode whose bytes are not
stored, which spool file of which machine has them (``inode.pending``), and a crash between the two commits is mended
from that (registry/replay.py).

The two files are a pair: a random id is in both. One that belongs to another registry is put aside, never used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from lamfs import config
from lamfs.errors import RegistryError
from lamfs.registry.entries import COLUMNS

log = logging.getLogger("lamfs.registry")

REGISTRY_NAME = "registry.lndb"
"""Name of a working copy. Its work database is ``work.db``; that of another registry ``X.lndb`` is ``X.work.db``."""
PAIR = "work"
"""Key of the registry's meta table: the id of the work database that belongs to it."""
VERSION = 1
BUSY_TIMEOUT = 30.0
"""Seconds a writer waits for another process's transaction."""
CACHE_KIB = 512
"""Most memory for its pages: what is pending is looked at in order of its rows, the newest or the oldest ones."""
FIRST_OWED = 1 << 40
"""Ids of rows that the registry itself owes (moves, deletes) are higher, so that no two rows have one id."""
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_RENAMED = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)
"""What SQLite says of a file that is renamed while it opens it."""
_SIDES = ("", "-wal", "-shm", "-journal")
_MACHINE = re.compile("[0-9a-z-]{12}")

# What several triggers do. A row that goes, or becomes scratch, needs its upload no more.
_ABANDON = """INSERT INTO journal(op, state, object_key, created_at, owner, payload)
            SELECT 'abort', 'ready', object_key, {0}.created_at, {0}.owner, json_object('upload_id', upload_id)
            FROM upload WHERE journal_id={0}.id AND NOT completed;
        DELETE FROM upload WHERE journal_id={0}.id;"""
_SPEND = """DELETE FROM partial_spool WHERE src=old.src;
        DELETE FROM seal WHERE src=old.src;
        INSERT OR IGNORE INTO spent VALUES(old.src, old.object_key, json_remove(old.payload, '$.base', '$.damaged'));"""
_COUNT = "UPDATE sqlite_sequence SET seq=seq+1 WHERE name='puts';"

_TABLES = (
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    """CREATE TABLE journal(
        id INTEGER PRIMARY KEY AUTOINCREMENT, op TEXT NOT NULL, state TEXT NOT NULL, ino INTEGER, uid TEXT,
        object_key TEXT, src TEXT, gen INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, error TEXT,
        next_at INTEGER NOT NULL DEFAULT 0, created_at INTEGER NOT NULL, owner TEXT,
        payload TEXT NOT NULL DEFAULT '{}')""",
    "CREATE UNIQUE INDEX journal_put ON journal(ino) WHERE op='put'",
    "CREATE INDEX journal_src ON journal(src) WHERE op='put'",
    "CREATE INDEX journal_object ON journal(object_key)",
    "CREATE INDEX journal_due ON journal(owner, state, next_at, id)",
    # Objects that this machine may have written without an artifact's row saying so.
    "CREATE TABLE claim(object_key TEXT PRIMARY KEY) WITHOUT ROWID",
    # The blocks that are in a partial spool file; see partial_spools.py.
    """CREATE TABLE partial_spool(src TEXT NOT NULL, block INTEGER NOT NULL, ranges TEXT, durable TEXT,
        PRIMARY KEY(src, block)) WITHOUT ROWID""",
    # ``object_key``, ``payload``: of the row that had it. A power cut may set the registry back to before it was
    # stored. Then the spool file may be that object by now.
    "CREATE TABLE spent(src TEXT PRIMARY KEY, object_key TEXT, payload TEXT) WITHOUT ROWID",
    "CREATE TABLE seal(src TEXT PRIMARY KEY, size INTEGER NOT NULL, blocks BLOB NOT NULL) WITHOUT ROWID",
    """CREATE TABLE upload(
        journal_id INTEGER PRIMARY KEY, object_key TEXT NOT NULL, upload_id TEXT, completed INTEGER NOT NULL DEFAULT 0)
    """,
    "CREATE INDEX upload_object ON upload(object_key)",
    """CREATE TABLE part(
        journal_id INTEGER NOT NULL, number INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
        blocks BLOB NOT NULL, etag TEXT NOT NULL, PRIMARY KEY(journal_id, number)) WITHOUT ROWID""",
    "CREATE TRIGGER upload_parts AFTER DELETE ON upload BEGIN DELETE FROM part WHERE journal_id=OLD.journal_id; END",
    f"""CREATE TRIGGER upload_abandoned AFTER DELETE ON journal BEGIN
        {_ABANDON.format("OLD")}
    END""",
    f"""CREATE TRIGGER upload_scratch AFTER UPDATE OF state ON journal WHEN NEW.state='scratch' BEGIN
        {_ABANDON.format("NEW")}
    END""",
    # How often a put has come, changed or gone. The registry counts too (_HERE), so it is known which file is ahead.
    # The count is in a page that an insert writes anyway.
    "INSERT INTO sqlite_sequence(name, seq) VALUES('puts', 0)",
    f"""CREATE TRIGGER put_new AFTER INSERT ON journal WHEN new.op='put' BEGIN
        {_COUNT}
    END""",
    f"""CREATE TRIGGER put_changed AFTER UPDATE OF op, ino, uid, src ON journal WHEN old.op='put' BEGIN
        {_COUNT}
    END""",
    f"""CREATE TRIGGER put_done AFTER DELETE ON journal WHEN old.op='put' BEGIN
        {_COUNT}
    END""",
    # What is known of a spool file ends with the row that names it, whoever strikes that off and why.
    f"""CREATE TRIGGER spool_done AFTER DELETE ON journal WHEN old.src IS NOT NULL BEGIN
        {_SPEND}
    END""",
    f"""CREATE TRIGGER spool_left AFTER UPDATE OF src ON journal WHEN old.src IS NOT NULL AND new.src IS NOT old.src
    BEGIN
        {_SPEND}
    END""",
    """CREATE TRIGGER seal_broken AFTER UPDATE OF state ON journal WHEN new.state='open' AND new.src IS NOT NULL
        BEGIN DELETE FROM seal WHERE src=new.src; END""",
)

_HERE = (
    # Everything that is owed, whichever of the two files has it.
    f"""CREATE TEMP VIEW all_work AS
        SELECT {COLUMNS} FROM work.journal
        UNION ALL
        SELECT id, op, 'ready', NULL, uid, object_key, NULL, 0, attempts, error, next_at, created_at, owner, payload
            FROM main.owed""",
    # Which machine has the bytes of an inode, and where (replay.Pending). Both files count these changes.
    f"""CREATE TEMP TRIGGER pending_new AFTER INSERT ON work.journal WHEN new.op='put' BEGIN
        UPDATE inode SET pending='{{0}}:'||new.src||':'||coalesce(new.uid, '') WHERE ino=new.ino;
        {_COUNT}
    END""",
    f"""CREATE TEMP TRIGGER pending_changed AFTER UPDATE OF op, ino, uid, src ON work.journal WHEN old.op='put' BEGIN
        UPDATE inode SET pending=NULL WHERE ino=old.ino AND (new.op<>'put' OR new.ino IS NOT old.ino);
        UPDATE inode SET pending='{{0}}:'||new.src||':'||coalesce(new.uid, '') WHERE new.op='put' AND ino=new.ino;
        {_COUNT}
    END""",
    f"""CREATE TEMP TRIGGER pending_done AFTER DELETE ON work.journal WHEN old.op='put' BEGIN
        UPDATE inode SET pending=NULL WHERE ino=old.ino;
        {_COUNT}
    END""",
)

# Table in the registry up to version 13, table here, columns.
_MOVED = (
    ("journal", "journal", COLUMNS),
    ("unsaid", "claim", "object_key"),
    ("overlay", "partial_spool", "src, block, ranges, durable"),
    ("spent", "spent", "src"),
    ("seal", "seal", "src, size, blocks"),
    ("upload", "upload", "journal_id, object_key, upload_id, completed"),
    ("part", "part", "journal_id, number, offset, length, blocks, etag"),
)  # fmt: skip
IS_OWED = "(op='move' OR op='delete' AND state='ready')"
"""Of a journal row, as SQL: it needs storage alone."""


# -- files ----------------------------------------------------------------------------------------------------------


def work_path(registry: Path) -> Path:
    """Where the work database of a registry is."""
    return registry.with_name("work.db") if registry.name == REGISTRY_NAME else registry.with_suffix(".work.db")


def remove(registry: Path) -> None:
    """Remove a registry with its work database and the logs of both, as far as they are there."""
    for path in (registry, work_path(registry)):
        for side in _SIDES:
            Path(f"{path}{side}").unlink(missing_ok=True)


def rename_work(old: Path, new: Path) -> None:
    """The work database of the registry ``old`` becomes that of the registry ``new``. Nobody has it open."""
    _rename(work_path(old), work_path(new))


def _rename(old: Path, new: Path) -> None:
    for side in _SIDES[1:]:
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{old}{side}", f"{new}{side}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(old, new)


# -- opening --------------------------------------------------------------------------------------------------------


def attach(conn: sqlite3.Connection, registry: Path) -> str:
    """Attach the work database of a registry as ``work``; made when there is none. Returns this machine's name.

    Raises sqlite3.Error, RegistryError (a newer lamfs made it), and OSError.
    """
    path = work_path(registry)
    for last in (False, False, True):
        try:
            if _is_attached(conn, path):
                if _belongs(conn):
                    break
                conn.execute("DETACH work")
        except sqlite3.OperationalError as error:  # another process may be putting it aside just now
            with contextlib.suppress(sqlite3.Error):
                conn.execute("DETACH work")
            if last or getattr(error, "sqlite_errorcode", 0) & 0xFF not in _RENAMED:
                raise
        if last:
            raise RegistryError(
                f"The work database {path} belongs to another registry than {registry}, and cannot be put aside; move"
                " it away, and try again: the next mount looks into the spool for what is not stored yet."
            )
        _replace(registry, path)
    begin_wal(conn, "work")
    conn.execute("PRAGMA work.synchronous=NORMAL")
    conn.execute(f"PRAGMA work.cache_size=-{CACHE_KIB}")
    row = conn.execute("SELECT value FROM work.meta WHERE key='machine'").fetchone()
    machine = str(row[0]) if row is not None and _MACHINE.fullmatch(str(row[0])) else config.machine_mark()
    for statement in _HERE:
        conn.execute(statement.format(machine))
    return machine


def begin_wal(conn: sqlite3.Connection, schema: str = "main") -> None:
    """Let a database have a write-ahead log. It waits for others like every statement does, up to BUSY_TIMEOUT.

    SQLite does not wait here: to give a new file a log it makes a read lock a write lock, and two connections that do
    so would wait for each other (https://www.sqlite.org/c3ref/busy_handler.html). Raises sqlite3.Error.
    """
    until = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            conn.execute(f"PRAGMA {schema}.journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
        time.sleep((1 + secrets.randbelow(10)) / 1000)  # two that collide do not meet again


def _is_attached(conn: sqlite3.Connection, path: Path) -> bool:
    """Attach the file at ``path``, with its tables; False when it is missing, empty or damaged, and nothing is
    attached."""
    if not path.exists() or not path.stat().st_size:
        return False
    try:
        conn.execute("ATTACH ? AS work", (f"file:{quote(os.fsencode(path))}?mode=rw",))
        version = int(conn.execute("PRAGMA work.user_version").fetchone()[0])
        if not version:  # another process makes it just now, or it is none
            conn.execute("DETACH work")
            return False
        conn.execute("SELECT count(*) FROM work.meta").fetchone()
    except sqlite3.DatabaseError as error:
        with contextlib.suppress(sqlite3.Error):
            conn.execute("DETACH work")
        if _is_damage(error):
            log.error("the work database %s is damaged (%s)", path, error)
            return False
        raise
    if version > VERSION:
        raise RegistryError(
            f"The work database {path} has version {version}, this lamfs knows up to {VERSION}; install the newer"
            " lamfs that wrote it."
        )
    return True


def _is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE or "no such table" in str(error)


def _make(path: Path) -> None:
    """Make a work database with its tables, unless it has them. The caller holds the registry's write lock: nobody
    renames it meanwhile."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)) as conn:
        begin_wal(conn)
        conn.execute("BEGIN IMMEDIATE")
        if not conn.execute("PRAGMA user_version").fetchone()[0]:
            for statement in _TABLES:
                conn.execute(statement)
            conn.execute("INSERT INTO meta VALUES('machine', ?)", (config.machine_mark(),))
            conn.execute(f"PRAGMA user_version={VERSION}")
        conn.execute("COMMIT")


_PAIRS = f"SELECT (SELECT value FROM main.meta WHERE key='{PAIR}'), (SELECT value FROM work.meta WHERE key='registry')"


def _belongs(conn: sqlite3.Connection) -> bool:
    """Whether the work database that is attached is this registry's. A new one becomes it."""
    registry, work = conn.execute(_PAIRS).fetchone()
    if registry is not None and registry == work:
        return True
    if work is not None:
        return False
    conn.execute("BEGIN IMMEDIATE")
    try:
        registry, work = conn.execute(_PAIRS).fetchone()
        if work is None:
            work = registry or secrets.token_hex(8)
            if registry is None:
                conn.execute("INSERT INTO main.meta(key, value) VALUES(?, ?)", (PAIR, work))
                registry = work
            conn.execute("INSERT INTO work.meta VALUES('registry', ?)", (work,))
        conn.execute("COMMIT")
    except BaseException:
        if conn.in_transaction:
            conn.execute("ROLLBACK")
        raise
    return bool(registry == work)


def _replace(registry: Path, path: Path) -> None:
    """See that there is a work database at ``path`` which is this registry's, or nobody's yet. One that is damaged or
    another registry's is put aside. The one that belongs to this registry comes back, if it is beside it: a crash while
    a working copy was replaced leaves them like that. Else a new one is made."""
    with contextlib.closing(sqlite3.connect(registry, timeout=BUSY_TIMEOUT, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")  # of two processes that come here one does it
        row = lock.execute("SELECT value FROM meta WHERE key=?", (PAIR,)).fetchone()
        wanted = None if row is None else row[0]
        if path.exists() and path.stat().st_size:
            found = _pair_of(path)
            if found == "" or (found is not None and found == wanted):
                return
            kept = _aside(path)
            _rename(path, kept)
            log.warning("the work database %s was put aside as %s, for it is not this registry's", path, kept.name)
        for other in sorted(path.parent.glob("*.work.db")) if wanted is not None else ():
            with contextlib.suppress(sqlite3.Error):
                if _pair_of(other) == wanted:
                    _rename(other, path)
                    return
        _make(path)


def _aside(path: Path) -> Path:
    """A new name for a work database that is put aside."""
    word = path.name.removesuffix(".db")
    return path.with_name(time.strftime(f"{word}.%Y%m%dT%H%M%S.{secrets.token_hex(2)}.work.db"))


def _pair_of(path: Path) -> str | None:
    """Id of the registry that a work database belongs to; ``""``: of none yet; None: it is damaged.

    Raises sqlite3.Error when that cannot be told.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as conn:
            row = conn.execute("SELECT value FROM meta WHERE key='registry'").fetchone()
            return "" if row is None else str(row[0])
    except sqlite3.Error as error:
        if _is_damage(error):
            return None
        raise


# -- damage ---------------------------------------------------------------------------------------------------------


def flaw(registry: Path, *, thorough: bool = False) -> str | None:
    """What is damaged in the work database of a registry, in SQLite's words; None: nothing that is found, or it is not
    there, or cannot be read now. It reads the whole file. ``thorough``: the indices too.

    SQLite reports damage without saying which of the two files has it.
    """
    path = work_path(registry)
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as conn:
            conn.execute("BEGIN")  # all is of one moment
            text = str(conn.execute(f"PRAGMA {'integrity' if thorough else 'quick'}_check(1)").fetchone()[0])
            if text != "ok":
                return text.splitlines()[-1]
            for _, table, _ in _MOVED:
                conn.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()
            if conn.execute("SELECT 1 FROM journal WHERE NOT json_valid(payload) LIMIT 1").fetchone() is not None:
                return "a row of its journal is not as it was written"
    except sqlite3.Error as error:
        return str(error) if _is_damage(error) else None
    return None


def make_anew(registry: Path) -> Path:
    """Put the work database of a registry aside, and make a new one, while nobody has the registry open. Returns where
    the old one is.

    What is not stored is owed again by Replay.run. The registry gets another pair id, so that the old one is never
    taken back. Raises sqlite3.Error and OSError.
    """
    path = work_path(registry)
    kept = _aside(path)
    with contextlib.closing(sqlite3.connect(registry, timeout=BUSY_TIMEOUT, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        lock.execute("DELETE FROM meta WHERE key=?", (PAIR,))
        _rename(path, kept)
        _make(path)
        lock.execute("COMMIT")
    return kept


# -- registries of older versions -----------------------------------------------------------------------------------


class Split(NamedTuple):
    """What a registry is to say of the work that has left it: ``pair``, the id of its work database; ``puts``, how many
    changes of puts that has counted; ``pending``, what ``inode.pending`` is to be, with the inode."""

    pair: str
    puts: int
    pending: list[tuple[str, int]]

    def note(self, conn: sqlite3.Connection) -> None:
        """Write it into the registry, in the transaction that drops the old tables: a power cut keeps both or none."""
        conn.execute("INSERT OR REPLACE INTO meta(key, value) VALUES(?, ?)", (PAIR, self.pair))
        conn.execute("UPDATE sqlite_sequence SET seq=? WHERE name='puts'", (self.puts,))
        conn.executemany("UPDATE inode SET pending=? WHERE ino=?", self.pending)


def split(registry: Path) -> Split:
    """Copy this machine's work out of a registry of version 13 into a new work database, durably.

    The caller holds the registry's write lock, and drops the old tables afterwards: after a crash between the two
    it is done once more.
    """
    path = work_path(registry)
    if path.exists():  # an earlier try's, or of a registry that is gone
        _rename(path, path.with_name(f"{path.name.removesuffix('.db')}.{secrets.token_hex(4)}.work.db"))
    _make(path)
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)) as conn:
        conn.execute("ATTACH ? AS old", (f"file:{quote(os.fsencode(registry))}?mode=ro",))
        conn.execute("BEGIN IMMEDIATE")
        for table, now, columns in _MOVED:
            keep = f" WHERE NOT coalesce({IS_OWED}, 0)" if table == "journal" else ""
            conn.execute(f"INSERT INTO main.{now}({columns}) SELECT {columns} FROM old.{table}{keep}")
        rows = conn.execute("SELECT seq FROM old.sqlite_sequence WHERE name='journal'").fetchall()
        conn.execute("DELETE FROM main.sqlite_sequence WHERE name='journal'")
        conn.executemany("INSERT INTO main.sqlite_sequence(name, seq) VALUES('journal', ?)", rows)
        machine = conn.execute("SELECT value FROM main.meta WHERE key='machine'").fetchone()[0]
        found = conn.execute(
            "SELECT ?||':'||src||':'||coalesce(uid, ''), ino FROM main.journal WHERE op='put' AND src IS NOT NULL",
            (machine,),
        ).fetchall()
        pair = secrets.token_hex(8)
        conn.execute("INSERT INTO main.meta VALUES('registry', ?)", (pair,))
        count = conn.execute("SELECT seq FROM main.sqlite_sequence WHERE name='puts'").fetchone()[0]
        conn.execute("COMMIT")
        conn.execute("PRAGMA main.wal_checkpoint(TRUNCATE)")
    for each in (path, path.parent):
        fd = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return Split(pair, count, found)


@contextlib.contextmanager
def attached(conn: sqlite3.Connection, registry: Path) -> Iterator[bool]:
    """Attach the work database of a registry to a connection that only reads, as ``work``; whether there is one."""
    path = work_path(registry)
    if not path.exists():
        yield False
        return
    conn.execute("ATTACH ? AS work", (f"{path.absolute().as_uri()}?mode=ro",))
    try:
        yield True
    finally:
        conn.execute("DETACH work")
