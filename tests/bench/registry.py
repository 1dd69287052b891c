"""Registries of a size that would take hours to write through a mount: rows put there by SQL."""

from __future__ import annotations

import sqlite3
import stat
import time
from pathlib import Path

from lamfs.model import ROOT_INO

PER_DIRECTORY = 1000
CHUNK = 50_000


def fill_registry(directory: Path, count: int, per_directory: int = PER_DIRECTORY, *, size: int = 4096) -> None:
    """Add ``count`` artifacts to the registry in an instance's directory, in directories ``big-000000`` and so on.

    They are saved, as far as the registry knows: their objects, of ``size`` bytes, are not in storage. No process may
    have the registry open. A million take half a minute, and 0.7 GB.
    """
    conn = sqlite3.connect(directory / "registry.lndb", isolation_level=None)
    conn.execute("PRAGMA synchronous=OFF")
    conn.execute("BEGIN IMMEDIATE")
    uid, gid = conn.execute("SELECT uid, gid FROM inode WHERE ino=?", (ROOT_INO,)).fetchone()
    (storage,) = conn.execute("SELECT min(id) FROM storage").fetchone()
    (ino,) = conn.execute("SELECT max(ino) FROM inode").fetchone()
    now = time.time_ns()
    times = (now, now, now)
    inodes, dentries, artifacts = [], [], []

    def write() -> None:
        conn.executemany(
            "INSERT INTO inode(ino, mode, uid, gid, nlink, size, atime_ns, mtime_ns, ctime_ns)"
            " VALUES(?,?,?,?,?,?,?,?,?)",
            inodes,
        )
        conn.executemany("INSERT INTO dentry(parent, name, ino) VALUES(?,?,?)", dentries)
        conn.executemany(
            "INSERT INTO artifact(uid, storage_id, key, suffix, size, hash, hash_type, blocks, object_key, etag,"
            " created_at, updated_at, ino) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?)",
            artifacts,
        )
        for rows in (inodes, dentries, artifacts):
            rows.clear()

    folder, folders = 0, 0
    for number in range(count):
        if number % per_directory == 0:
            ino += 1
            folder, folders = ino, folders + 1
            inodes.append((folder, stat.S_IFDIR | 0o755, uid, gid, 2, 0, *times))
            dentries.append((ROOT_INO, f"big-{number // per_directory:06}", folder))
        ino += 1
        name, label = f"sample_{number:07}.csv", f"B{number:019}"
        key = f"big-{number // per_directory:06}/{name}"
        inodes.append((ino, stat.S_IFREG | 0o644, uid, gid, 1, size, *times))
        dentries.append((folder, name, ino))
        place = f".lamindb/{label}.csv"
        artifacts.append(
            (label, storage, key, ".csv", size, f"H{number:021}", "md5", bytes(32), place, "e", now, now, ino)
        )
        if len(inodes) >= CHUNK:
            write()
    write()
    conn.execute("UPDATE inode SET nlink=nlink+? WHERE ino=?", (folders, ROOT_INO))
    conn.execute("COMMIT")
    conn.close()
