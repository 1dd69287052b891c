"""A registry file that came from storage, opened as what it is: somebody else's data. Synchronous, one thread.

Buckets have other writers, and SQLite runs what a file says: triggers, views, virtual tables, generated columns. So
such a file is opened read-only and untrusted, nothing but the tables that lamfs itself makes is looked at, and every
statement has an end (https://www.sqlite.org/security.html, "Untrusted SQLite Database Files").
"""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from lamfs.errors import DamagedRegistry, RegistryError
from lamfs.registry import schema
from lamfs.registry.db import SCHEMA_VERSION
from lamfs.registry.origins import PUSHES, Origin, pushes_of
from lamfs.registry.rules import ROW_MAX, TABLES, is_utf8, rule

VALUE_BYTES = 64 << 20
"""Most bytes of one value: the block hashes of a file of 8 TiB."""
SECONDS, BYTES_PER_SECOND = 12.0, 2 << 20
"""How long a file may be worked on: a start, and the time that its size explains."""
_STEP = 20_000
"""Instructions of SQLite's machine between two looks at the clock."""
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROWS = re.compile(r"(NULL|NUMERIC|TEXT|non-\w+) value in ")
"""What SQLite's check says of single rows, which are looked at one by one anyway."""


class Received:
    """An untrusted registry file, attached as ``src`` to the connection that it is to be read through.

    Context manager: detaches it. ``name`` is what errors call it. Raises RegistryError for a file that cannot be a
    registry of lamfs, is damaged, of a newer schema, or takes too long.
    """

    def __init__(self, path: Path, name: str, *, into: Path | None = None) -> None:
        """``into``: the file whose tables are to get the rows; None: nothing is copied."""
        self.name = name
        self._deadline = time.monotonic() + SECONDS + path.stat().st_size / BYTES_PER_SECOND
        self.conn = sqlite3.connect(":memory:" if into is None else f"file:{quote(str(into))}", uri=True)
        try:
            self.conn.isolation_level = None
            self.conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES)
            self.conn.set_progress_handler(self._is_late, _STEP)
            self.conn.create_function("lamfs_utf8", 1, is_utf8, deterministic=True)
            # Text may be anything: what is looked at here is decoded with care.
            self.conn.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
            for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "temp_store=MEMORY"):
                self.conn.execute(f"PRAGMA {pragma}")
            # Immutable: neither locks nor a log that lies beside it.
            self._run("ATTACH ? AS src", (f"file:{quote(str(path))}?mode=ro&immutable=1",))
            self._run("PRAGMA src.mmap_size=0")
            self._run("PRAGMA src.cache_size=-8192")
        except BaseException:
            self.conn.close()
            raise
        if not path.stat().st_size:
            self.conn.close()
            raise self.wrong("it is empty")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.conn.close()

    def _is_late(self) -> int:
        return int(time.monotonic() > self._deadline)

    def _run(self, sql: str, params: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self.conn.execute(sql, params)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self.wrong(error) from error

    def all(self, sql: str, params: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement. Raises RegistryError."""
        try:
            return self._run(sql, params).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self.wrong(error) from error

    def change(self, sql: str, params: tuple[Any, ...] = ()) -> int:
        """Run a statement that changes the tables of ``into``; how many rows. Raises RegistryError."""
        return self._run(sql, params).rowcount

    def wrong(self, error: sqlite3.Error | UnicodeDecodeError | str) -> DamagedRegistry:
        """The error that says that this file is of no use."""
        if isinstance(error, sqlite3.OperationalError) and "interrupted" in str(error):
            return DamagedRegistry(
                f"The registry {self.name} takes too long to read, so it is not used; it is damaged, or was made to be"
                " slow. Restore it from a backup."
            )
        if isinstance(error, UnicodeDecodeError):  # a message of SQLite's that quotes what is in the file
            error = "what it should have as text is none"
        return DamagedRegistry(f"The registry {self.name} is damaged ({error}); restore it from a backup.")

    # -- what it is ---------------------------------------------------------------------------------------------

    def origin(self) -> Origin:
        """What it says of itself; of other tables and rows nothing is looked at. Raises RegistryError."""
        self._compare(schema.tables(1, "meta"))
        meta = dict(
            self.all(
                "SELECT key, value FROM src.meta NOT INDEXED"
                f" WHERE key IN ('slug', 'schema_version', 'fence', '{PUSHES}')"
                " AND typeof(key)='text' AND typeof(value) IN ('text', 'integer')"
                " AND length(CAST(value AS BLOB))<=4000"
            )
        )
        version = meta.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise self.wrong("it does not say which version it has")
        if version > SCHEMA_VERSION:
            raise RegistryError(
                f"The registry {self.name} has schema version {version}, this lamfs knows up to {SCHEMA_VERSION};"
                " install the newer lamfs that wrote it."
            )
        slug = str(meta.get("slug", ""))
        if not _SLUG.fullmatch(slug):
            raise self.wrong("it does not say which instance it belongs to")
        self._compare(schema.tables(version, "storage"))
        right = " AND ".join(rule(name, TABLES["storage"][name]) for name in ("id", "uid", "root"))
        rows = self.all(f"SELECT uid, root FROM src.storage NOT INDEXED WHERE {right} ORDER BY +id LIMIT 1")
        uid, root = rows[0] if rows else (None, None)
        counts = self.all(
            "SELECT max(seq) FROM src.sqlite_sequence NOT INDEXED WHERE name='change' AND typeof(seq)='integer'"
            " AND seq BETWEEN 0 AND ?",
            (ROW_MAX,),
        )
        fence = meta.get("fence")
        fence = fence if isinstance(fence, int) and 0 <= fence <= ROW_MAX else 0
        return Origin(slug, uid, root, version, counts[0][0] or 0, pushes_of(meta.get(PUSHES)), fence)

    def _compare(self, made: dict[str, str]) -> None:
        """Raise RegistryError unless the file has these tables (name and SQL) just as lamfs makes them."""
        marks = ",".join("?" * len(made))
        rows = self.all(
            f"SELECT name, type, substr(sql, 1, 10000) FROM src.sqlite_master WHERE name IN ({marks})", tuple(made)
        )
        found = {name: (kind, _flat(sql)) for name, kind, sql in rows}
        for name, sql in made.items():
            if found.get(name) != ("table", _flat(sql)):
                raise self.wrong(f"its table '{name}' is not as lamfs makes it")

    def check(self, version: int) -> list[str]:
        """Compare its tables with those that lamfs makes in this version, and let SQLite look at their pages.

        Returns a text for each other thing in the file (a trigger, a view …), which nobody looks at. Raises
        RegistryError.
        """
        made = schema.tables(version)
        self._compare(made)
        for name in made:
            for (text,) in self.all(f"PRAGMA src.quick_check({name})"):
                if text != "ok" and not _ROWS.match(str(text)):
                    raise self.wrong(str(text))
        known = schema.names(version)
        others = self.all("SELECT type, substr(name, 1, 100) FROM src.sqlite_master LIMIT 10000")
        return [f"the {kind} '{name}'" for kind, name in others if name not in known]


def _flat(sql: object) -> str:
    """The text of a statement, whatever its white space."""
    return " ".join(str(sql).split())
