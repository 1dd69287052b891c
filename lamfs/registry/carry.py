"""What this machine has still to store, carried from one working copy of a registry to the next. Synchronous.

A working copy is replaced when another machine has gone on, or when a person wants the registry in storage. The spool
is here all the same, and so is the work on it.
"""

from __future__ import annotations

import json
import stat
from typing import Any

from lamfs.model import ContentHash
from lamfs.registry.artifacts import NOW
from lamfs.registry.aside import Told
from lamfs.registry.db import Database
from lamfs.registry.entries import COLUMNS
from lamfs.registry.partial_spools import base_id
from lamfs.registry.tree import Tree

_OWED_COLUMNS = "op, uid, object_key, attempts, error, next_at, created_at, owner, payload"
_COLUMNS = COLUMNS.removeprefix("id, ")


def carry_over(old: Database, new: Database, *, apart: bool = False) -> dict[str, Told]:
    """Owe in ``new`` what is owed in ``old``: the puts of files that both know, saves, and the deletion of objects that
    ``new`` does not need. Both are registries of one instance.

    Returns the spool files of puts that were left behind, and whose they are: ``new`` does not know their files, or
    another one by that inode number, or their artifact has other bytes than those over which they were written.
    ``apart``: another machine has gone on with ``new``, so what it has stored since is not replaced either.
    """
    left: dict[str, Told] = {}
    with new.transaction():
        new.execute("DELETE FROM spent")
        new.execute("DELETE FROM seal")
        rows = old.all(f"SELECT id, {_COLUMNS} FROM journal WHERE op='put' AND src IS NOT NULL ORDER BY id")
        for id_, *columns in rows:
            ino, uid, object_key, src = columns[2:6]
            payload = json.loads(columns[12])
            has_row = new.one("SELECT 1 FROM journal WHERE op='put' AND src=?", (src,)) is not None
            known = _same_file(old, new, ino) and not (apart and _is_rewritten(old, new, ino))
            if has_row or not known or not _same_base(new, ino, payload):
                if not has_row:
                    inode = Tree(old).get(ino)
                    size = 0 if inode is None else inode.size
                    stored = old.one("SELECT uid FROM artifact WHERE ino=?", (ino,))
                    whose = uid if stored is None else stored[0]
                    left[src] = Told(Tree(old).path(ino), whose, "base" in payload, size, object_key)
                continue
            marks = ",".join("?" * len(columns))
            cursor = new.execute(f"INSERT INTO journal({_COLUMNS}) VALUES({marks})", columns)
            assert cursor.lastrowid is not None
            _take_along(old, new, id_, cursor.lastrowid, src)
            attributes = old.one("SELECT size, mtime_ns, ctime_ns, blocks FROM inode WHERE ino=?", (ino,))
            if attributes is not None:
                new.execute(
                    "UPDATE inode SET size=?, mtime_ns=?, ctime_ns=?, blocks=?, revision=revision+1 WHERE ino=?",
                    (*attributes, ino),
                )
        _carry_saves(old, new)
        _carry_deletes(old, new)
        for (src,) in old.all("SELECT src FROM spent"):
            if src not in left and new.one("SELECT 1 FROM journal WHERE op='put' AND src=?", (src,)) is None:
                new.execute("INSERT OR IGNORE INTO spent(src) VALUES(?)", (src,))
        # What the new one has of earlier work of this machine is behind: the journal above is all that there is.
        new.execute(
            "UPDATE inode SET pending=NULL WHERE pending IS NOT NULL AND substr(pending, 1, ?)=?"
            " AND NOT EXISTS (SELECT 1 FROM journal j WHERE j.op='put' AND j.ino=inode.ino)",
            (len(old.machine) + 1, f"{old.machine}:"),
        )
        for row in old.all("SELECT src, size, blocks FROM seal"):
            if new.one("SELECT 1 FROM journal WHERE op='put' AND src=? AND state<>'open'", row[:1]) is not None:
                new.execute("INSERT OR IGNORE INTO seal VALUES(?,?,?)", row)
    return left


def _is_rewritten(old: Database, new: Database, ino: int) -> bool:
    """Whether the artifact of a file has another revision in ``new``."""
    query = f"SELECT r.size, r.hash, r.blocks, r.object_key, r.etag FROM {NOW} WHERE a.ino=?"
    return old.one(query, (ino,)) != new.one(query, (ino,))


def _same_base(new: Database, ino: int, payload: dict[str, Any]) -> bool:
    """Whether a spool file lies over nothing, or over what its artifact has in ``new``."""
    if "base" not in payload:
        return True
    row = new.one(f"SELECT r.size, r.hash, r.hash_type, r.blocks FROM {NOW} WHERE a.ino=?", (ino,))
    return row is not None and payload["base"] == base_id(ContentHash(row[0], row[1], row[2], bytes(row[3])))


def _carry_saves(old: Database, new: Database) -> None:
    """Saves of processes that are gone: whoever comes next finishes or undoes them (recover.finish_saves)."""
    for columns in old.all(f"SELECT {_COLUMNS} FROM journal WHERE op='save' AND object_key IS NOT NULL ORDER BY id"):
        uid, object_key, payload = columns[3], columns[4], json.loads(columns[12])
        if new.one("SELECT 1 FROM journal WHERE op='save' AND uid IS ? AND object_key=?", (uid, object_key)):
            continue
        for name, table in (("created_by_id", "user"), ("run_id", "run"), ("transform_id", "transform")):
            if not _same_row(old, new, table, payload.get(name)):
                payload[name] = None
        if not _same_row(old, new, "storage", payload.get("storage_id")):
            continue
        marks = ",".join("?" * len(columns))
        new.execute(f"INSERT INTO journal({_COLUMNS}) VALUES({marks})", (*columns[:12], json.dumps(payload)))
    for (object_key,) in old.all("SELECT object_key FROM claim"):
        new.execute("INSERT OR IGNORE INTO claim VALUES(?)", (object_key,))


def _same_row(old: Database, new: Database, table: str, id_: object) -> bool:
    """Whether both know the same user, run … by a number."""
    if id_ is None:
        return True
    query = f'SELECT uid FROM "{table}" WHERE id=?'
    one, two = old.one(query, (id_,)), new.one(query, (id_,))
    return one is not None and one == two


def _carry_deletes(old: Database, new: Database) -> None:
    """Objects that are to go, unless something in ``new`` may need them; and uploads that are needed no more. Not those
    of which nobody knows any more which object was meant: work that ``new`` knows nothing of may have used the key
    anew."""
    for table, columns, which in (
        ("owed", _OWED_COLUMNS, "op='delete' AND object_key IS NOT NULL AND json_type(payload, '$.etag')='text'"),
        ("journal", _COLUMNS, "op='abort' AND object_key IS NOT NULL AND json_type(payload, '$.upload_id')='text'"),
    ):
        for object_key, *row in old.all(f"SELECT object_key, {columns} FROM {table} WHERE {which} ORDER BY id"):
            needed = new.one(
                "SELECT 1 FROM revision WHERE object_key=?1 UNION ALL SELECT 1 FROM all_work WHERE object_key=?1"
                " LIMIT 1",
                (object_key,),
            )
            if needed is None or table == "journal":
                marks = ",".join("?" * len(row))
                new.execute(f"INSERT INTO {table}({columns}) VALUES({marks})", row)


def _same_file(old: Database, new: Database, ino: int) -> bool:
    """Whether both registries mean the same file by an inode number: it has one artifact, or none and one name.

    Numbers that a machine gave out after its last push may have been given out by another one, too.
    """
    mode = new.one("SELECT mode FROM inode WHERE ino=?", (ino,))
    if mode is None or not stat.S_ISREG(mode[0]) or new.one("SELECT 1 FROM journal WHERE op='put' AND ino=?", (ino,)):
        return False
    query = (
        "SELECT (SELECT uid FROM artifact WHERE ino=?1),"
        " (SELECT parent || '/' || name FROM dentry WHERE ino=?1 ORDER BY id LIMIT 1)"
    )
    one, two = old.one(query, (ino,)), new.one(query, (ino,))
    assert one is not None
    assert two is not None
    return one[0] == two[0] and (one[0] is not None or (one[1] is not None and one[1] == two[1]))


def _take_along(old: Database, new: Database, old_id: int, new_id: int, src: str) -> None:
    """The blocks that a partial spool file has, and the parts that storage has."""
    for table, key, was, now in (("partial_spool", "src", src, src), ("upload", "journal_id", old_id, new_id),
                                 ("part", "journal_id", old_id, new_id)):  # fmt: skip
        names = [row[1] for row in new.all(f"PRAGMA table_info({table})")]
        marks = ",".join("?" * len(names))
        at = names.index(key)
        for row in old.all(f"SELECT {', '.join(names)} FROM {table} WHERE {key}=?", (was,)):
            new.execute(
                f"INSERT OR REPLACE INTO {table}({', '.join(names)}) VALUES({marks})", (*row[:at], now, *row[at + 1 :])
            )
