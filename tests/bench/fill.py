"""Very many files at once, written straight into the tables of a registry, or of JuiceFS, that nobody has open.

The files have no bytes in storage: they are there to be listed, looked at and renamed. A million take half a minute.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from pathlib import Path

from lamfs.model import ROOT_INO

SIZE = 4096
"""Bytes of each file, for who asks."""


def names(count: int) -> list[str]:
    """Names of the files in a directory: sample_000000.csv …"""
    return [f"sample_{number:06}.csv" for number in range(count)]


def directories(count: int, per_directory: int | None) -> list[tuple[str, int]]:
    """Directories below the top one, and how many files are in each; None: all are in the top one itself."""
    if per_directory is None:
        return []
    sizes = [min(per_directory, count - start) for start in range(0, count, per_directory)]
    return [(f"d{number:04}", size) for number, size in enumerate(sizes)]


def fill_registry(instance_dir: Path, count: int, per_directory: int | None = 1000, *, folder: str = "filled") -> None:
    """``count`` artifacts below ``folder``, a new directory in the root of an instance's registry."""
    now, owner = time.time_ns(), (os.getuid(), os.getgid())
    db = sqlite3.connect(instance_dir / "registry.lndb", isolation_level=None)
    db.execute("PRAGMA synchronous=OFF")
    db.execute("BEGIN IMMEDIATE")

    def inode(mode: int, nlink: int, size: int) -> int:
        cursor = db.execute(
            "INSERT INTO inode(mode, uid, gid, nlink, size, atime_ns, mtime_ns, ctime_ns) VALUES(?,?,?,?,?,?,?,?)",
            (mode, *owner, nlink, size, now, now, now),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def entry(parent: int, name: str, ino: int) -> None:
        db.execute("INSERT INTO dentry(parent, name, ino) VALUES(?,?,?)", (parent, name, ino))

    def files(parent: int, key: str, number: int) -> None:
        for name in names(number):
            ino = inode(stat.S_IFREG | 0o644, 1, SIZE)
            entry(parent, name, ino)
            uid = f"fill{ino:016}"
            db.execute(
                "INSERT INTO artifact(id, uid, storage_id, key, suffix, created_at, updated_at, ino, revision_id)"
                " VALUES(?, ?, 1, ?, '.csv', ?, ?, ?, ?)",
                (ino, uid, f"{key}/{name}", now, now, ino, ino),
            )
            db.execute(
                "INSERT INTO revision(id, artifact_id, number, size, hash, hash_type, blocks, object_key, etag,"
                " created_at) VALUES(?, ?, 1, ?, ?, 'md5', ?, ?, ?, ?)",
                (ino, ino, SIZE, f"{ino:022}", ino.to_bytes(32), f".lamindb/{uid}.csv", f"{ino:x}", now),
            )

    below = directories(count, per_directory)
    top = inode(stat.S_IFDIR | 0o755, 2 + len(below), 0)
    entry(ROOT_INO, folder, top)
    db.execute("UPDATE inode SET nlink=nlink+1 WHERE ino=?", (ROOT_INO,))
    if not below:
        files(top, folder, count)
    for name, number in below:
        ino = inode(stat.S_IFDIR | 0o755, 2, 0)
        entry(top, name, ino)
        files(ino, f"{folder}/{name}", number)
    db.execute("COMMIT")
    db.close()


def fill_juicefs(meta: Path, count: int, per_directory: int | None = 1000, *, folder: str = "filled") -> None:
    """The same in JuiceFS's SQLite metadata (the tables of 1.4): files of zeros, without chunks."""
    now = time.time_ns() // 1000
    db = sqlite3.connect(meta, isolation_level=None)
    db.execute("PRAGMA synchronous=OFF")
    db.execute("BEGIN IMMEDIATE")
    following = int(db.execute("SELECT value FROM jfs_counter WHERE name='nextInode'").fetchone()[0])
    first = following

    def node(parent: int, name: str, *, directories: int | None = None) -> int:
        nonlocal following
        ino, following = following, following + 1
        kind, mode, nlink, length = (1, 0o644, 1, SIZE) if directories is None else (2, 0o755, 2 + directories, 4096)
        db.execute(
            "INSERT INTO jfs_node(inode, type, flags, mode, uid, gid, atime, mtime, ctime, nlink, length, rdev, parent,"
            " access_acl_id, default_acl_id, tier_id) VALUES(?,?,0,?,?,?,?,?,?,?,?,0,?,0,0,0)",
            (ino, kind, mode, os.getuid(), os.getgid(), now, now, now, nlink, length, parent),
        )
        db.execute(
            "INSERT INTO jfs_edge(parent, name, inode, type) VALUES(?,?,?,?)", (parent, name.encode(), ino, kind)
        )
        return ino

    def files(parent: int, number: int) -> None:
        for name in names(number):
            node(parent, name)
        holds(parent, files=number)

    def holds(ino: int, *, files: int = 0, directories: int = 0) -> None:
        db.execute(
            "INSERT INTO jfs_dir_stats(inode, data_length, used_space, used_inodes) VALUES(?,?,?,?)"
            " ON CONFLICT(inode) DO UPDATE SET data_length=data_length+excluded.data_length,"
            " used_space=used_space+excluded.used_space, used_inodes=used_inodes+excluded.used_inodes",
            (ino, files * SIZE, (files + directories) * 4096, files + directories),
        )

    below = directories(count, per_directory)
    top = node(1, folder, directories=len(below))
    holds(1, directories=1)
    db.execute("UPDATE jfs_node SET nlink=nlink+1 WHERE inode=1")
    if below:
        holds(top, directories=len(below))
        for name, number in below:
            files(node(top, name, directories=0), number)
    else:
        files(top, count)
    for counter, more in (("nextInode", following - first), ("totalInodes", following - first),
                          ("usedSpace", (following - first) * 4096)):  # fmt: skip
        db.execute("UPDATE jfs_counter SET value=value+? WHERE name=?", (more, counter))
    db.execute("COMMIT")
    db.close()
