"""The SQLite connection of one thread to one registry: pragmas, transactions, durability.

The work database of this machine (workdb.py) is attached to it, and its transactions are over both files.

A Database belongs to the thread that made it. Any number of threads and processes may have one open on the same file:
WAL lets readers and one writer go on together, and writers wait for each other (``BUSY_TIMEOUT``) instead of failing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lamfs.errors import DamagedRegistry, LamfsError, NotSetUp, RegistryError
from lamfs.registry import workdb
from lamfs.registry.workdb import BUSY_TIMEOUT

SCHEMA_VERSION = 14
WORK_SPLIT = 14
"""Version from which on this machine's work is in a file of its own (workdb.py), and the registry has what others may
do too."""

LOG_PAGES = 1000
"""Pages (of 4 KiB) in the write-ahead log from which on a commit folds it into the file itself: SQLite's default."""

_OF_COMMITS = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
"""What SQLite says of a statement outside of a transaction when perhaps its commit has failed."""
_LACKS = re.compile("no such (table|column|function|index)|malformed ")
"""What SQLite says of a file that lacks what every registry has."""

Params = Sequence[Any] | dict[str, Any]


class Database:
    """One connection. Not thread-safe; every thread opens its own.

    Raises RegistryError for anything SQLite says: disk full, a schema newer than this program, and DamagedRegistry for
    a file that is no registry: an empty one never becomes one.
    """

    def __init__(self, path: Path, *, create: bool = False, name: str | None = None, work: bool = True) -> None:
        """``create``: make the file and its tables where they are missing. ``name``: the instance, for messages.
        ``work``: attach the work database; without it, nothing of this machine's work can be asked or noted."""
        self.path = path
        self.name = name
        if not create:
            _check_file(path, name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Created by us first, so that it is never readable by others for a moment.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._depth = 0
        self._is_apart = False
        self.mend: Callable[[], None] | None = None
        """Called before the next transaction when a commit has failed, for it may have got into one of the two files:
        to bring them together."""
        with self._translated():
            self.conn = sqlite3.connect(
                f"file:{quote(os.fsencode(path))}?mode=rw",
                uri=True,
                timeout=BUSY_TIMEOUT,
                isolation_level=None,
                cached_statements=512,
            )
            try:
                workdb.begin_wal(self.conn)
                self.conn.execute("PRAGMA synchronous=NORMAL")
                self.conn.execute("PRAGMA temp_store=MEMORY")
                self.conn.execute("PRAGMA cache_size=-32768")
                self._migrate(create, work)
                self.machine = workdb.attach(self.conn, path) if work else ""
                self._before = self.conn.total_changes
            except OSError as error:
                self.conn.close()
                raise RegistryError(
                    f"The work database {workdb.work_path(path)} of the registry could not be used: {error.strerror}.",
                    errno=error.errno,
                ) from error
            except BaseException:
                self.conn.close()
                raise

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        return translated(self.path, self.name)

    def damaged(self, what: str) -> DamagedRegistry:
        """The error that says what is wrong with this file."""
        return damaged(self.path, what, self.name)

    def _migrate(self, create: bool, work: bool) -> None:
        version = self._version()
        if version == SCHEMA_VERSION:
            return
        if not version and not create:
            raise self.damaged("it does not say which version it has")
        if version > SCHEMA_VERSION:
            raise RegistryError(
                f"The registry {self.path} has schema version {version}, this lamfs knows up to {SCHEMA_VERSION};"
                " install the newer lamfs that wrote it."
            )
        # Two processes may arrive here together: the migrations run under one write lock, and look again inside it.
        if version and version < WORK_SPLIT - 1:
            with self.transaction():
                self._bring_to(WORK_SPLIT - 1)
        with self.transaction():
            before = self._version()
            # Of a registry that came from storage there is no work of this machine.
            has_work = work and 0 < before < WORK_SPLIT
            left = workdb.split(self.path) if has_work else None
            self._bring_to(SCHEMA_VERSION)
            if left is not None:
                left.note(self.conn)

    def _bring_to(self, version: int) -> None:
        """Run the migrations up to a version that are still to run."""
        # Imported only now: sqlite-utils imports pandas where that is installed, which takes half a second.
        from lamfs.registry import schema

        if self._version() < version:
            schema.apply(self.conn, version)
            self.conn.execute(
                "INSERT INTO meta(key, value) VALUES('schema_version', ?)"
                " ON CONFLICT(key) DO UPDATE SET value=excluded.value",
                (version,),
            )

    def _version(self) -> int:
        has = self.conn.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone()
        if has is None:
            return 0
        row = self.conn.execute("SELECT value FROM meta WHERE key='schema_version'").fetchone()
        version = row[0] if row else 0
        if not isinstance(version, int) or version < 0:
            raise self.damaged("it does not say which version it has")
        return version

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write transaction (BEGIN IMMEDIATE … COMMIT); joins the one that is open already, if any.

        Any exception rolls everything back. sqlite3's own exceptions come out as RegistryError.
        """
        if self._depth:
            self._depth += 1
            try:
                yield self.conn
            finally:
                self._depth -= 1
            return
        if self._is_apart and self.mend is not None:
            self._is_apart = False
            try:
                self.mend()
            except BaseException:
                self._is_apart = True
                raise
        with self._translated():
            self.conn.execute("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield self.conn
        except BaseException as error:
            self._depth = 0
            if self.conn.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # of a damaged file there may be nothing to go back to
                    self.conn.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error | UnicodeDecodeError):
                raise registry_error(self.path, error, self.name) from error
            raise
        self._depth = 0
        with self._translated():
            try:
                self.conn.execute("COMMIT")
            except sqlite3.Error:
                self._is_apart = True
                if self.conn.in_transaction:
                    self.conn.execute("ROLLBACK")
                raise

    def execute(self, sql: str, params: Params = ()) -> sqlite3.Cursor:
        """Run one statement; outside of ``transaction()`` it commits by itself."""
        try:
            return self.conn.execute(sql, params)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if not self.conn.in_transaction and getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_COMMITS:
                self._is_apart = True
            raise registry_error(self.path, error, self.name) from error

    def one(self, sql: str, params: Params = ()) -> tuple[Any, ...] | None:
        """First row, or None."""
        # A page is read when its rows are asked for: that fails here, not in execute.
        try:
            row: tuple[Any, ...] | None = self.conn.execute(sql, params).fetchone()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise registry_error(self.path, error, self.name) from error
        return row

    def all(self, sql: str, params: Params = ()) -> list[tuple[Any, ...]]:
        """All rows."""
        try:
            return self.conn.execute(sql, params).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise registry_error(self.path, error, self.name) from error

    def rows(self, sql: str, params: Params = ()) -> Iterator[tuple[Any, ...]]:
        """The rows one by one, as they are asked for: the statement runs until the iterator is at its end, or gone."""
        cursor = self.execute(sql, params)
        try:
            yield from cursor
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise registry_error(self.path, error, self.name) from error
        finally:
            cursor.close()

    def check_values(self) -> None:
        """Raise DamagedRegistry when a value cannot be what was written: of no use to whoever has read it.

        For who met something that cannot be; it reads the whole file.
        """
        what = workdb.flaw(self.path)
        if what is not None:
            raise damaged_work(self.path, what, self.name)
        for (text,) in self.all("PRAGMA main.quick_check(1)"):
            if text != "ok":
                raise self.damaged(str(text))
        if self.one("SELECT 1 FROM owed WHERE NOT json_valid(payload) LIMIT 1") is not None:
            raise self.damaged("a row of what it owes is not as it was written")

    def data_version(self) -> int:
        """A number that changes when another connection has changed the registry (SQLite documentation, PRAGMA
        data_version)."""
        row = self.one("PRAGMA main.data_version")
        assert row is not None
        return int(row[0])

    def work_version(self) -> int:
        """As ``data_version``, of the work database."""
        row = self.one("PRAGMA work.data_version")
        assert row is not None
        return int(row[0])

    def changes(self) -> int:
        """Rows that this connection has changed since it was opened."""
        return self.conn.total_changes - self._before

    def log_pages(self, count: int) -> None:
        """From how many pages in the log on a commit folds it into the file itself, which takes two syncs."""
        self.execute(f"PRAGMA wal_autocheckpoint={count:d}")

    def snapshot(self, target: Path) -> None:
        """Write a consistent, compact copy of the registry, and of no work of this machine, to ``target`` (a new file,
        mode 0600)."""
        target.unlink(missing_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self.execute("VACUUM main INTO ?", (str(target),))

    def get_meta(self, key: str, default: Any = None) -> Any:
        """Value of one row of the meta table."""
        row = self.one("SELECT value FROM meta WHERE key=?", (key,))
        return default if row is None else row[0]

    def set_meta(self, key: str, value: Any) -> None:
        """Set one row of the meta table."""
        self.execute(
            "INSERT INTO meta(key, value) VALUES(?, ?) ON CONFLICT(key) DO UPDATE SET value=excluded.value",
            (key, value),
        )

    def close(self) -> None:
        """Close the connection; the last one to close folds the write-ahead log into the file."""
        self.conn.close()


def _check_file(path: Path, name: str | None) -> None:
    """Before SQLite has it: what is empty would be a new registry to it, and the log beside it would go.

    Raises NotSetUp, DamagedRegistry.
    """
    try:
        # Not opened: a close would drop the locks that SQLite may have on it in this process.
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise NotSetUp(f"There is no registry at {path}; run 'lamfs init' or 'lamfs connect' first.") from None
    except OSError as error:
        raise RegistryError(f"The registry {path} cannot be read: {error.strerror}.", errno=error.errno) from error
    if not size:
        raise damaged(path, "it is empty", name)


def damaged(path: Path, what: str, name: str | None = None) -> DamagedRegistry:
    """The error that says what is wrong with the file at ``path``, and the way back. ``name``: the instance; None: of
    the way back another one tells, or somebody is on it."""
    if name is None:
        return DamagedRegistry(f"The registry {path} is damaged ({what}).")
    return DamagedRegistry(
        f"The registry {path} is damaged ({what}); 'lamfs connect {name} --restore' takes the copy in storage, and puts"
        " this one aside."
    )


def damaged_work(path: Path, what: str, name: str | None = None) -> DamagedRegistry:
    """As ``damaged``, of the work database of the registry at ``path``."""
    text = f"The work database {workdb.work_path(path)} is damaged ({what})"
    return DamagedRegistry(f"{text}{'' if name is None else '; ' + mends_work(name)}.")


def mends_work(name: str) -> str:
    """What a person can do about the damaged work database of the instance ``name``, in words."""
    return (
        f"'lamfs fsck --repair --instance {name}' puts it aside, and makes it anew from the registry, which says what"
        " is not stored yet"
    )


def registry_error(path: Path, error: sqlite3.Error | UnicodeDecodeError, name: str | None = None) -> LamfsError:
    """The one seam at which sqlite3's exceptions become lamfs's. A message of SQLite's that quotes a damaged file is
    not always text, which is UnicodeDecodeError."""
    if isinstance(error, UnicodeDecodeError):
        return damaged(path, "what it should have as text is none", name)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return RegistryError(f"The disk that holds the registry {path} is full; free some space.", errno=errno.ENOSPC)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or _LACKS.match(str(error)):
        what = _work_flaw(path)
        if what is not None:
            return damaged_work(path, what, name)
        return damaged(path, str(error), name)
    if code == sqlite3.SQLITE_BUSY:
        return RegistryError(
            f"The registry {path} was held by another process for more than {BUSY_TIMEOUT:.0f} s; try again.",
            errno=errno.EBUSY,
        )
    return RegistryError(f"The registry {path} could not be used: {error}.")


_flaws: dict[tuple[Path, int], str] = {}
"""What ``_work_flaw`` has found, by registry and inode of its work database: a daemon may meet it again and again."""


def _work_flaw(path: Path) -> str | None:
    """What is damaged in the work database, if the registry itself is whole. If that is not, it comes first: from it
    the other one is made anew."""
    try:
        key = path, os.stat(workdb.work_path(path)).st_ino
    except OSError:
        return None
    if key not in _flaws:
        what = workdb.flaw(path)
        if what is None or not is_whole(path):
            return None
        _flaws[key] = what
    return _flaws[key]


def is_whole(path: Path) -> bool:
    """Whether SQLite finds no damage in the registry itself, whatever its work database is like. It reads the whole
    file."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as conn:
            conn.execute("SELECT 1 FROM meta").fetchone()  # an empty file is whole to SQLite
            return bool(conn.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.Error:
        return False


@contextlib.contextmanager
def translated(path: Path, name: str | None = None) -> Iterator[None]:
    """Turn sqlite3's exceptions into RegistryError."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise registry_error(path, error, name) from error


def _files(path: Path, *, timeout: float) -> Iterator[sqlite3.Connection]:
    """A connection to the registry's file alone, then one to its work database's alone, each for one step of a loop.
    ``timeout``: seconds that they wait for others. Raises RegistryError."""
    _check_file(path, None)
    for each in filter(Path.exists, (path, workdb.work_path(path))):
        with translated(path):
            uri = f"file:{quote(os.fsencode(each))}?mode=rw"
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)) as conn:
                conn.execute("PRAGMA synchronous=NORMAL")
                yield conn


def fold_log(path: Path) -> None:
    """Write what is in the log at ``path`` into the registry's file, as far as no reader is in the way. Any thread.

    Writers go on meanwhile; once all is folded the next one begins the log anew. Raises RegistryError.
    """
    for conn in _files(path, timeout=0):
        with translated(path):
            conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


def begin_log(path: Path) -> None:
    """See that the logs of the registry at ``path`` and of its work database are begun. Any thread.

    SQLite syncs the first page of a new log in the commit that begins it (SQLite source, walFrames: ``syncHeader``). A
    commit that changes nothing does that here, so that the first program that writes does not wait for it. Raises
    RegistryError.
    """
    for conn in _files(path, timeout=1):
        with translated(path):
            # Writing what is there already would change no page.
            conn.execute("BEGIN IMMEDIATE")
            conn.execute("INSERT INTO meta(key, value) VALUES('', NULL)")
            conn.execute("DELETE FROM meta WHERE key=''")
            conn.execute("COMMIT")


def sync_log(path: Path) -> None:
    """Return when all commits to the registry at ``path`` so far survive a power cut. Any thread, takes no lock.

    With ``synchronous=NORMAL`` a commit is in the write-ahead log, unsynced; one fdatasync of that file makes all of
    them durable. A checkpoint that empties the log has synced the database file before (SQLite, "Write-Ahead
    Logging"). SQLite keeps its POSIX locks on other files, so closing this descriptor drops none of them.
    Raises RegistryError.
    """
    # In the order in which SQLite commits: what a power cut leaves is a registry that knows more (replay.py).
    for each in filter(Path.exists, (path, workdb.work_path(path))):
        try:
            _sync_log(each)
        except OSError as error:
            raise RegistryError(
                f"The registry {each} could not be written to disk: {error}.", errno=error.errno
            ) from error


def _sync_log(path: Path) -> None:
    try:
        fd = os.open(f"{path}-wal", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
