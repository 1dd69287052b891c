"""What a registry that was put aside says of spool files. Synchronous; any thread; opens the file to read only.

Such a registry may be damaged: what can be read of it is taken, and nothing in it is believed further than a name goes.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lamfs.keys import is_spool_name
from lamfs.model import ARTIFACT_UID_LEN, BASE62, ROOT_INO
from lamfs.registry import workdb
from lamfs.registry.replay import pending

DEPTH = 256
"""Most parts of a key that are followed."""
ROWS = 1_000_000
"""Most rows that are read."""


class Told(NamedTuple):
    """What a registry says of a spool file: the key of its file, the uid of its artifact, whether it lies over a stored
    revision, which has what is missing in it, how many bytes its file has (0: not known), and the object that it was
    to become."""

    key: str | None
    uid: str | None
    partial: bool
    size: int = 0
    object_key: str | None = None


def puts(path: Path) -> dict[str, Told]:
    """Of the registry at ``path``, what it says of each spool file that it owes; as much as can be read."""
    found: dict[str, Told] = {}
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_open(path)) as conn:
        for ino, text in _rows(conn, "SELECT ino, pending FROM inode WHERE pending IS NOT NULL LIMIT ?"):
            said = pending(text)
            if said is not None:
                found[said.src] = Told(_key(conn, ino), _uid(said.uid), False)
        # Up to version 13 the journal is in the registry itself.
        with contextlib.suppress(sqlite3.Error), workdb.attached(conn, path):
            puts = "SELECT src, ino, uid, payload FROM journal WHERE op='put' AND src IS NOT NULL LIMIT ?"
            for src, ino, uid, payload in _rows(conn, puts):
                if is_spool_name(src):
                    found[src] = Told(_key(conn, ino), _uid(uid), isinstance(payload, str) and '"base"' in payload)
    return found


def _rows(conn: sqlite3.Connection, query: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a query, as far as they can be read."""
    with contextlib.suppress(sqlite3.Error):
        yield from conn.execute(query, (ROWS,))


def _open(path: Path) -> sqlite3.Connection:
    # Its log is read too, which takes a file for shared memory beside it: so not "immutable".
    conn = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)
    conn.execute("PRAGMA query_only=ON")
    conn.execute("PRAGMA trusted_schema=OFF")
    return conn


def _uid(uid: object) -> str | None:
    return uid if isinstance(uid, str) and len(uid) == ARTIFACT_UID_LEN and set(uid) <= set(BASE62) else None


def _key(conn: sqlite3.Connection, ino: object) -> str | None:
    parts: list[str] = []
    with contextlib.suppress(sqlite3.Error):
        while ino != ROOT_INO:
            row = conn.execute("SELECT parent, name FROM dentry WHERE ino=? ORDER BY id LIMIT 1", (ino,)).fetchone()
            if row is None or not isinstance(row[1], str) or len(parts) > DEPTH:
                return None
            ino = row[0]
            parts.append(row[1])
        return "/".join(reversed(parts))
    return None
