"""What this machine has still to store, carried from one working copy of a registry to the next. Synchronous.

A working copy is replaced when another machine has gone on, or when a person wants the registry in storage. The spool
is here all the same, and so is the work on it.
"""

from __future__ import annotations

import stat

from lamfs.registry.db import Database

_COLUMNS = "op, state, ino, uid, object_key, src, gen, attempts, error, next_at, created_at, owner, payload"


def carry_over(old: Database, new: Database) -> int:
    """Owe in ``new`` the puts that are owed in ``old``, of files that both know. Both are registries of one instance.

    Returns how many puts were left behind: ``new`` does not know their files, or another one by that inode number.
    """
    left = 0
    with new.transaction():
        rows = old.all(f"SELECT id, {_COLUMNS} FROM journal WHERE op='put' AND src IS NOT NULL ORDER BY id")
        for id_, *columns in rows:
            ino, src = columns[2], columns[5]
            if not _same_file(old, new, ino):
                left += 1
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
    return left


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
    for table, key, was, now in (("overlay", "src", src, src), ("upload", "journal_id", old_id, new_id),
                                 ("part", "journal_id", old_id, new_id)):  # fmt: skip
        names = [row[1] for row in new.all(f"PRAGMA table_info({table})")]
        marks = ",".join("?" * len(names))
        at = names.index(key)
        for row in old.all(f"SELECT {', '.join(names)} FROM {table} WHERE {key}=?", (was,)):
            new.execute(
                f"INSERT OR REPLACE INTO {table}({', '.join(names)}) VALUES({marks})", (*row[:at], now, *row[at + 1 :])
            )
