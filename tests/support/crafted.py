"""Registries that an attacker has crafted: wrong rows, code that SQLite runs, and damaged files.

``Good`` is an instance with files that are never changed (``KEPT``), files to be mutated, and a copy of both registry
and objects for every example. A mutation is a function that changes the registry file; ``str(mutation)`` names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamfs.model import StorageConfig, instance_id
from lamfs.ops import artifacts, setup
from lamfs.ops.instance import Instance
from lamfs.registry import schema
from lamfs.registry.db import SCHEMA_VERSION
from lamfs.storage import open_store
from tests.support.ops import machine

SLUG = "ada/one"
REGISTRY = f"{instance_id(SLUG).hex}.lndb"
KEPT = {f"kept/{number}.txt": f"kept {number}\n".encode() * 50 for number in range(3)}
VICTIMS = {f"d{number % 4}/{number}.txt": f"victim {number}\n".encode() for number in range(24)}


class Utf8(bytes):
    """Bytes that become a value of type text."""


class Many(NamedTuple):
    """A long value with a short name."""

    unit: str | bytes
    times: int


def whole(value: Any) -> Any:
    """A value as it is written to the registry."""
    return value.unit * value.times if isinstance(value, Many) else value


def values(secret: str) -> list[Any]:
    """Values for a column. ``secret``: an absolute path of a file that nothing may reach. It is the first value."""
    up = "../" * 12 + secret.lstrip("/")
    return [
        secret, None, 0, 1, 2, -1, 7, 1 << 31, 1 << 47, (1 << 63) - 1, -(1 << 63), 1.5, 1e300, float("inf"), "", b"",
        "x", "0", "-1", "NaN", "Infinity", "1e300", ".", "..", "/", "//", "a/b", "a/../../b", up, f"/{up}",
        f"file://{secret}", f"d0/{up}", ".lamindb", ".lamfs/stats", ".lamindb/_tmp/x", f".lamindb/_spool/x/{up}",
        ".lamindb/_exclusion/x", REGISTRY, f"./{REGISTRY}", f"x/../{REGISTRY}", "/etc/passwd", "3-aaaaaaaaaaaa",
        f"3-{up}", "a\0b", f"{secret}\0.txt", "a\nb", "a\r\nX-Evil: 1", "\x1b[31m\x1b]0;title\x07", "\u202eevil",
        "\u0085",
        Utf8(b"\xff\xfe"), Utf8(b"\xed\xb2\xa0"), Utf8(b"a\0b"), b"\xff\0", secret.encode(), "n" * 255, "n" * 256,
        "é" * 300,
        Many("A", (1 << 20) + 1), Many(b"\0", 3 << 20), Many("[", 100_000), Many('{"a":', 50_000),
        f'{{"base": "5:{secret}"}}',
        f'{{"upload_id": "{up}"}}', '{"size": 1e999}', "u" * 20, "0" * 22, bytes(32), bytes(64), "--help",
        "-rf", "%s%n{0}",
        "$(touch x)", "'; DROP TABLE artifact; --", "s3://elsewhere/x", "http://127.0.0.1:1/", "put", "save", "delete",
        "move", "abort", "scratch", "ready", "held", 33188, 16877, 41471, 0o140755, 0o104777, 0o60777,
    ]  # fmt: skip


def columns() -> list[tuple[str, str]]:
    """Every column of every table of the present schema."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        schema.apply(conn)
        tables = [*schema.tables(SCHEMA_VERSION), "sqlite_sequence", "_sqlite_migrations"]
        return [(table, row[1]) for table in tables for row in conn.execute(f"PRAGMA table_info({table})")]


# -- the file as SQLite's tables --------------------------------------------------------------------------------------


@contextlib.contextmanager
def loosened(path: Path, *, stale: bool = False) -> Iterator[sqlite3.Connection]:
    """A registry without constraints, types, indexes and triggers, for the time of the block: anything can be written.

    ``stale``: the indexes stay as they were, whatever the rows contain afterwards.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        kept = conn.execute("SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master").fetchall()
        infos = {
            row[1]: (conn.execute(f"PRAGMA table_info('{row[1]}')").fetchall(), row[4])
            for row in kept
            if row[0] == "table"
        }
        conn.execute("PRAGMA writable_schema=ON")
        conn.execute("DELETE FROM sqlite_master WHERE type<>'table'")
        for name, (info, sql) in infos.items():
            if name.startswith("sqlite_"):
                continue
            keys = [row[1] for row in sorted((row for row in info if row[5]), key=lambda row: row[5])]
            names = ", ".join(f"{row[1]} INTEGER PRIMARY KEY" if _is_rowid(row, sql) else row[1] for row in info)
            without = "WITHOUT ROWID" in sql
            key = f", PRIMARY KEY({', '.join(keys)})) WITHOUT ROWID" if without else ")"
            conn.execute("UPDATE sqlite_master SET sql=? WHERE name=?", (f"CREATE TABLE {name}({names}{key}", name))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
        conn.execute("BEGIN")
        yield conn
        conn.execute("COMMIT")
        conn.execute("PRAGMA writable_schema=ON")
        conn.execute("DELETE FROM sqlite_master")
        conn.executemany("INSERT INTO sqlite_master(type, name, tbl_name, rootpage, sql) VALUES(?,?,?,?,?)", kept)
    if not stale:
        with contextlib.closing(sqlite3.connect(path)) as conn:
            for kind, name, *_ in kept:
                if kind == "index":
                    with contextlib.suppress(sqlite3.Error):  # the rows may violate the index
                        conn.execute(f"REINDEX {name}")


def _is_rowid(row: tuple[Any, ...], sql: str) -> bool:
    return bool(row[5]) and row[2] == "INTEGER" and "INTEGER PRIMARY KEY" in sql


# -- mutations of rows ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """Another value in one column of one row. ``turn`` chooses the row."""

    table: str
    column: str
    value: Any
    turn: int

    def __str__(self) -> str:
        return f"{self.table}.{self.column} of row {self.turn} = {self.value!r}"

    def apply(self, conn: sqlite3.Connection) -> None:
        """Change the value, if SQLite accepts it in this column at all."""
        rows = _victims(conn, self.table)
        if not rows:
            return
        where, params = rows[self.turn % len(rows)]
        mark = "CAST(? AS TEXT)" if isinstance(self.value, Utf8) else "?"
        with contextlib.suppress(sqlite3.IntegrityError):  # a row id, or a key of a table that is a row id
            conn.execute(f"UPDATE {self.table} SET {self.column}={mark} WHERE {where}", (whole(self.value), *params))


def _victims(conn: sqlite3.Connection, table: str) -> list[tuple[str, tuple[Any, ...]]]:
    """Conditions for the rows of a table that can be changed without harm to the kept files and the two directories."""
    info = conn.execute(f"PRAGMA table_info('{table}')").fetchall()
    sql = str(conn.execute("SELECT sql FROM sqlite_master WHERE name=?", (table,)).fetchone()[0])
    keys = [row[1] for row in info if row[5]] if "WITHOUT ROWID" in sql else ["rowid"]
    kept = "SELECT ino FROM temp.kept"
    spared = {
        "inode": f"ino NOT IN ({kept})", "dentry": f"ino NOT IN ({kept})", "artifact": f"ino NOT IN ({kept})",
        "revision": f"id NOT IN (SELECT revision_id FROM artifact WHERE ino IN ({kept}))",
        "meta": "key NOT IN ('slug', 'schema_version')",
    }.get(table, "1")  # fmt: skip
    found = conn.execute(f"SELECT {', '.join(keys)} FROM {table} WHERE {spared} ORDER BY 1").fetchall()
    return [(" AND ".join(f"{key} IS ?" for key in keys), row) for row in found]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row that exists twice, is deleted, or has another row's value in a column."""

    table: str
    how: str
    column: str
    turn: int

    def __str__(self) -> str:
        return f"{self.table}: row {self.turn} {self.how} ({self.column})"

    def apply(self, conn: sqlite3.Connection) -> None:
        """Change the row, if SQLite can."""
        rows = _victims(conn, self.table)
        if len(rows) < 2:
            return
        (where, params), (other, others) = rows[self.turn % len(rows)], rows[(self.turn + 1) % len(rows)]
        with contextlib.suppress(sqlite3.IntegrityError):
            if self.how == "deleted":
                conn.execute(f"DELETE FROM {self.table} WHERE {where}", params)
            elif self.how == "twice":
                names = [row[1] for row in conn.execute(f"PRAGMA table_info('{self.table}')") if not row[5]]
                chosen = ", ".join(names)
                if names:
                    conn.execute(
                        f"INSERT INTO {self.table}({chosen}) SELECT {chosen} FROM {self.table} WHERE {where}", params
                    )
            else:
                conn.execute(
                    f"UPDATE {self.table} SET {self.column}=(SELECT {self.column} FROM {self.table} WHERE {other})"
                    f" WHERE {where}",
                    (*others, *params),
                )


HOWS = ("deleted", "twice", "swapped")


@dataclasses.dataclass(frozen=True)
class Owed:
    """A row of what is owed, and an inode that says where its bytes are."""

    op: Any
    machine: Any
    src: Any
    object_key: Any
    payload: Any
    turn: int

    def __str__(self) -> str:
        return "owed: " + ", ".join(repr(value)[:60] for value in dataclasses.astuple(self))

    def apply(self, conn: sqlite3.Connection) -> None:
        """Add the row."""
        found = conn.execute(
            "SELECT ino, uid FROM artifact WHERE ino NOT IN (SELECT ino FROM temp.kept) ORDER BY id"
        ).fetchall()
        ino, uid = found[self.turn % len(found)] if found else (3, "u" * 20)
        owner = (None, "x:1:1", "nobody", "\x1b[31m")[self.turn % 4]
        row = (self.op, whole(self.object_key))
        marks = ", ".join("CAST(? AS TEXT)" if isinstance(value, Utf8) else "?" for value in row)
        conn.execute(
            "INSERT INTO owed(uid, owner, payload, attempts, next_at, created_at, op, object_key)"
            f" VALUES(?, ?, ?, 0, 0, 1, {marks})",
            (uid, owner, whole(self.payload), *row),
        )
        mark = "CAST(? AS TEXT)" if isinstance(self.src, Utf8) else "?"
        conn.execute(
            f"UPDATE inode SET pending=? || ':' || {mark} || ':' || ? WHERE ino=?",
            (self.machine, whole(self.src), uid, ino),
        )


OPS = ("put", "save", "move", "delete", "abort", "evil", None)
MACHINES = ("0" * 12, "a" * 12, "evil", "../..", "", None)


def mutate_rows(path: Path, mutations: Sequence[Cell | Row | Owed], *, stale: bool) -> None:
    """Apply mutations of rows to a registry that ``Good.registry`` has made."""
    with loosened(path, stale=stale) as conn:
        conn.execute("CREATE TEMP TABLE kept(ino)")
        conn.execute(
            "INSERT INTO temp.kept SELECT ino FROM artifact WHERE key LIKE 'kept/%' UNION SELECT ino FROM dentry"
            " WHERE name='kept' UNION VALUES(1), (2)"
        )
        for mutation in mutations:
            mutation.apply(conn)


# -- mutations of what SQLite runs ------------------------------------------------------------------------------------

_ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n)"
_PUT = "INSERT INTO owed(op, object_key, created_at) VALUES('delete', '{secret}', 1)"
_EVENTS = [(table, event) for table in ("owed", "inode", "dentry", "artifact") for event in ("INSERT", "DELETE")]

BESIDE = {
    "triggers that put rows back": ";".join(
        f"CREATE TRIGGER evil_{table}_{event} AFTER {event} ON {table} BEGIN {_PUT}; END" for table, event in _EVENTS
    ),
    "a trigger that takes for ever": "CREATE TRIGGER evil AFTER UPDATE ON inode BEGIN DELETE FROM owed WHERE id IN"
    " (SELECT count(*) FROM inode a, inode b, inode c, inode d, inode e, inode f, inode g); END",
    "trigger in place of a view": f"CREATE VIEW evil AS {_ENDLESS} SELECT x FROM n;"
    f"CREATE TRIGGER evil_t INSTEAD OF INSERT ON evil BEGIN {_PUT}; END",
    "virtual tables": "CREATE VIRTUAL TABLE evil USING fts5(x); CREATE VIRTUAL TABLE evil_r USING rtree(id, a, b);"
    "INSERT INTO evil VALUES('x')",
    "expression indexes": "CREATE INDEX evil ON artifact(hex(zeroblob(100000)));"
    "CREATE INDEX evil2 ON inode(ino) WHERE abs(ino) > 0; CREATE INDEX evil3 ON dentry(name COLLATE NOCASE)",
    "generated columns": "CREATE TABLE evil(a, b AS (abs(-9223372036854775808)), c GENERATED ALWAYS AS (a||b) STORED)",
    "names of lamfs's own temporary tables": "CREATE TABLE me(uid, gid); INSERT INTO me VALUES(0, 0);"
    'CREATE TABLE main_artifact(x); CREATE TABLE "temp.me"(x); CREATE VIEW src AS SELECT 1;'
    "CREATE TRIGGER spool_done2 AFTER DELETE ON owed BEGIN DELETE FROM artifact; END",
    "a trigger of lamfs's name": "CREATE TRIGGER spool_done AFTER DELETE ON owed BEGIN DELETE FROM artifact; "
    "INSERT INTO owed(op, object_key, created_at) VALUES('delete', '{secret}', 1); END",
    "tables of a work database": "CREATE TABLE journal(id INTEGER PRIMARY KEY, op, state, ino, uid, object_key, src,"
    " gen, attempts, error, next_at, created_at, owner, payload); INSERT INTO journal VALUES(1, 'put', 'ready', 3, 'u',"
    " NULL, '{secret}', 0, 0, NULL, 0, 1, NULL, '{}'); CREATE TABLE claim(object_key); CREATE TABLE spent(src)",
    "an index of lamfs's name": "DROP INDEX dentry_name; CREATE INDEX dentry_name ON artifact(lower(key));"
    "DROP INDEX artifact_hash; CREATE INDEX artifact_hash ON dentry(name)",
    "statistics": "ANALYZE; UPDATE sqlite_stat1 SET stat='999999999999 99999999999 unordered sz=1 noskipscan'",
    "very many tables": ";".join(f"CREATE TABLE t{number}(x)" for number in range(3000)),
}
"""Added beside the tables. Such a registry is taken over without them. ``{secret}`` is a path."""

INSTEAD = {
    "an endless view": f"CREATE VIEW {{table}} AS {_ENDLESS} SELECT x AS id, x AS key, x AS value FROM n",
    "a view of itself": "CREATE VIEW {table} AS SELECT * FROM {table}",
    "a slow view": "CREATE VIEW {table} AS SELECT a.name AS key, 1 AS value FROM"
    " sqlite_master a, sqlite_master b, sqlite_master c, sqlite_master d, sqlite_master e, sqlite_master f",
    "a virtual table": "CREATE VIRTUAL TABLE {table} USING fts5(key, value)",
    "generated columns": "CREATE TABLE {table}(key TEXT, value AS (hex(zeroblob(400000000))))",
    "other columns": "CREATE TABLE {table}(x)",
    "nothing": "",
}
"""In place of one of lamfs's own tables. Such a registry is refused."""


def run_sql(path: Path, sql: str) -> None:
    """Change a registry by SQL."""
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.executescript(sql)


def instead(path: Path, table: str, sql: str) -> None:
    """Replace a table by something else."""
    with contextlib.closing(sqlite3.connect(path)) as conn:
        for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall():
            conn.execute(f"DROP TRIGGER {name}")
        conn.execute(f"DROP TABLE {table}")
        conn.executescript(sql.format(table=table))


# -- mutations of the file --------------------------------------------------------------------------------------------


def flip_bytes(path: Path, random: random.Random) -> None:
    """Change bytes in a few places; one in three of them in the header and the first page."""
    data = bytearray(path.read_bytes())
    for _ in range(random.choice([1, 3, 20, 200])):
        end = 4096 if random.random() < 1 / 3 else len(data)
        data[random.randrange(min(end, len(data)))] = random.randrange(256)
    path.write_bytes(data)


def swap_pages(path: Path, random: random.Random) -> None:
    """Swap pages, but not the first one."""
    data = path.read_bytes()
    pages = [data[begin : begin + 4096] for begin in range(0, len(data), 4096)]
    for _ in range(random.choice([1, 2, 8])):
        one, two = random.randrange(1, len(pages)), random.randrange(1, len(pages))
        pages[one], pages[two] = pages[two], pages[one]
    path.write_bytes(b"".join(pages))


def cut(path: Path, random: random.Random) -> None:
    """Keep only the beginning of the file, in some cases whole pages."""
    data = path.read_bytes()
    path.write_bytes(
        data[: random.choice([1, 99, 100, 4096, 4096 * random.randrange(1, 9), random.randrange(len(data))])]
    )


def empty(path: Path, random: random.Random) -> None:
    """Empty the file."""
    path.write_bytes(b"")


def noise(path: Path, random: random.Random) -> None:
    """Replace the file by a header and noise."""
    path.write_bytes(b"SQLite format 3\0" + random.randbytes(random.choice([84, 4080, 100_000])))


def sparse(path: Path, random: random.Random) -> None:
    """One TiB, with nothing but the registry on the disk."""
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def newer(path: Path, random: random.Random) -> None:
    """A schema version that does not exist yet."""
    run_sql(
        path, f"UPDATE meta SET value={random.choice([SCHEMA_VERSION + 1, 99, 1 << 62])} WHERE key='schema_version'"
    )


def of_another(path: Path, random: random.Random) -> None:
    """The registry of another instance."""
    run_sql(path, f"UPDATE meta SET value='{random.choice(['ada/two', 'eve/one', '../x', ''])}' WHERE key='slug'")


FILES: list[Callable[[Path, random.Random], None]] = [
    flip_bytes, swap_pages, cut, empty, noise, sparse, newer, of_another,
]  # fmt: skip


def of_version(path: Path, version: int) -> None:
    """The same rows in a registry of an older version, as far as that version has their tables and columns."""
    new = path.with_suffix(".old")
    with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as conn:
        schema.apply(conn, version)
        for kind, name in conn.execute("SELECT type, name FROM sqlite_master WHERE type='trigger'").fetchall():
            del kind
            conn.execute(f"DROP TRIGGER {name}")
        conn.execute("ATTACH ? AS now", (str(path),))
        for table in schema.tables(version):
            names = [row[1] for row in conn.execute(f"PRAGMA main.table_info({table})")]
            there = {row[1]: "t" for row in conn.execute(f"PRAGMA now.table_info({table})")}
            source = f"now.{table} t"
            if table == "artifact":  # older versions had the columns of the revision in it
                source += " JOIN now.revision r ON r.id=t.revision_id"
                there = {row[1]: "r" for row in conn.execute("PRAGMA now.table_info(revision)")} | there
            chosen = [name for name in names if name in there]
            values = ", ".join(f"{there[name]}.{name}" for name in chosen)
            if chosen:
                conn.execute(f"INSERT OR REPLACE INTO main.{table}({', '.join(chosen)}) SELECT {values} FROM {source}")
        conn.execute("UPDATE main.meta SET value=? WHERE key='schema_version'", (version,))
        conn.execute("DETACH now")
    with contextlib.closing(sqlite3.connect(new)) as conn:
        for sql in (row[0] for row in _triggers(version)):
            conn.execute(sql)
        conn.commit()
    new.replace(path)


def _triggers(version: int) -> list[tuple[str]]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        schema.apply(conn, version)
        return conn.execute("SELECT sql FROM sqlite_master WHERE type='trigger'").fetchall()


# -- the instance that is crafted -------------------------------------------------------------------------------------


class Good:
    """A good instance, made once in a folder. Every example gets a copy of its storage. One thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        with machine(folder / "ada"):
            setup.login("ada")
            setup.init(str(self.store), "one")
            with Instance.open(SLUG) as opened:
                for key, data in {**KEPT, **VICTIMS}.items():
                    (folder / "file").write_bytes(data)
                    artifacts.save(opened, folder / "file", key=key)
                real = folder / "file"
                real.write_bytes(b"its object has its name\n")
                artifacts.save(opened, real, key="real/name.txt", virtual=False)
            setup.close(SLUG)
        _some_of_everything(self.store / REGISTRY)

    def put_into(self, where: StorageConfig, change: Callable[[Path], object]) -> None:
        """Put a copy into an empty storage: the objects, and the registry after a change."""
        if where.root.startswith("/"):
            Path(where.root).mkdir(mode=0o700)
        crafted = self.folder / "crafted.lndb"
        shutil.copyfile(self.store / REGISTRY, crafted)
        with contextlib.closing(open_store(where)) as store:
            etags = []
            for path in self.store.rglob("*"):
                key = str(path.relative_to(self.store))
                if path.is_file() and not key.startswith(".lamindb/_") and key != REGISTRY:
                    etags.append((store.put_bytes(key, path.read_bytes()).etag, key))
            with contextlib.closing(sqlite3.connect(crafted)) as conn:
                conn.executemany("UPDATE revision SET etag=? WHERE object_key=?", etags)
                conn.commit()
            change(crafted)
            store.put_file(REGISTRY, str(crafted))


def _some_of_everything(path: Path) -> None:
    """Insert good rows into tables that have none."""
    with contextlib.closing(sqlite3.connect(path)) as conn:
        ids = conn.execute("SELECT id, ino FROM artifact WHERE key NOT LIKE 'kept/%'").fetchall()
        for turn, (identity, ino) in enumerate(ids[:6]):
            number = f"{turn:04d}"
            conn.execute("INSERT INTO user VALUES(NULL, ?, ?, 'a@b', 'A', 1)", (f"user{number}", f"user{turn}"))
            conn.execute(
                "INSERT INTO transform VALUES(NULL, ?, 'n', 'k', 'script', 1, 1, 1)",
                (f"transform{number}"[:16].ljust(16, "0"),),
            )
            conn.execute(
                "INSERT INTO run VALUES(NULL, ?, (SELECT max(id) FROM transform), 1, 1, 2)",
                (f"run{number}".ljust(20, "0"),),
            )
            conn.execute("INSERT INTO xattr VALUES(?, 'user.x', x'00')", (ino,))
            conn.execute("INSERT INTO leaf VALUES(?, 0, ?)", (identity, bytes(16)))
            conn.execute("INSERT INTO rekey VALUES(NULL, ?, ?)", (f"old{turn}", f"new{turn}"))
            conn.execute("INSERT INTO change VALUES(NULL, 'x', 'k', ?, 1, 'n')", (ino,))
            conn.execute("INSERT INTO meta VALUES(?, 1)", (f"retained:.lamindb/r{turn}",))
            conn.execute(
                "INSERT INTO inode(mode, uid, gid, nlink, atime_ns, mtime_ns, ctime_ns) VALUES(41471, 0, 0, 1, 1, 1, 1)"
            )
            (link,) = conn.execute("SELECT max(ino) FROM inode").fetchone()
            conn.execute("INSERT INTO symlink VALUES(?, x'612e747874')", (link,))
            conn.execute("INSERT INTO dentry(parent, name, ino) VALUES(1, ?, ?)", (f"link{turn}", link))
            conn.execute(
                "INSERT INTO owed(op, object_key, created_at, payload) VALUES('delete', ?, 1, ?)",
                (f".lamindb/gone{turn}", '{"etag": "e"}'),
            )
            conn.execute("UPDATE inode SET pending=? WHERE ino=?", (f"{'a' * 12}:{ino:x}-{'b' * 12}:{'u' * 20}", ino))
        conn.commit()
