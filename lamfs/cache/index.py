"""What the block cache holds: one SQLite file, ``<cache_dir>/index.db``, shared by mounts, API and CLI. Synchronous.

One instance belongs to one thread. Everything in the index may be lost: a miss costs a fetch, never data. So a damaged
or newer index is deleted and recreated, a call does nothing when the disk is busy or full, and no method raises.

A row says which blocks of which file (path *and* inode number) hold which revision, and which 64 KiB leaves of
incomplete blocks. Bytes are always verified before use, whatever the row says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from lamfs.cache.bits import REGION_BLOCKS, full_bitmap, leaf_bytes, leaf_mask
from lamfs.cache.tables import BUSY_SECONDS, WRITING, prepare, transaction
from lamfs.model import BLOCK_SIZE

log = logging.getLogger(__name__)

NAME = "index.db"
TEMPORARY = ".lamfs-"
"""Prefix of a temporary file's name; processes.mark follows."""

_PASSING = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM})
_ALL = (1 << 64) - 1

T = TypeVar("T")


class CachedFile(NamedTuple):
    """One row: ``path`` relative to the cache directory, ``size`` of the object, ``bytes`` present.

    ``mtime_ns``: of the file when it became complete; None before. ``floor_ns``: the least mtime it may show then.
    """

    path: str
    etag: str
    ino: int
    size: int
    bitmap: bytes
    bytes: int
    mtime_ns: int | None
    floor_ns: int

    @property
    def complete(self) -> bool:
        """Whether all blocks are marked present and the file was sealed."""
        return self.mtime_ns is not None


class CacheIndex:
    """The index of one cache directory. One thread; several processes. Never raises for what the cache may lose."""

    def __init__(self, cache_dir: Path) -> None:
        self.path = cache_dir / NAME
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] = (0, 0)

    def close(self) -> None:
        """Close the database; the next call opens it again."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    # ---- reading

    def row(self, path: str) -> CachedFile | None:
        """The row of a file (relative path), or None."""

        def work(db: sqlite3.Connection) -> CachedFile | None:
            found = db.execute(
                "SELECT etag, ino, size, bitmap, bytes, mtime_ns, floor_ns FROM file WHERE path = ?",
                (os.fsencode(path),),
            ).fetchone()
            return CachedFile(path, *found) if found else None

        return self._do(work, None)

    def present(self, path: str, etag: str, *, ino: int | None = None) -> bytes | None:
        """Bitmap of the blocks of revision ``etag`` that the file holds; None when nothing is known of it.

        With ``ino``, only if the row is of that inode: another process may have made the file anew.
        """
        row = self.row(path)
        if row is None or row.etag != etag or (ino is not None and row.ino != ino):
            return None
        return row.bitmap

    def partial(self, path: str) -> dict[int, int]:
        """The leaves that are there of incomplete blocks, by block: leaf i is bit i."""

        def work(db: sqlite3.Connection) -> dict[int, int]:
            rows = db.execute("SELECT block, leaves FROM partial WHERE path = ?", (os.fsencode(path),))
            return {block: leaves & _ALL for block, leaves in rows}

        return self._do(work, {})

    def complete_of(self, wanted: Mapping[str, str]) -> set[str]:
        """Those of the paths that are complete files of the wanted revision (ETag)."""
        paths = [os.fsencode(path) for path in wanted]

        def work(db: sqlite3.Connection) -> set[str]:
            rows = db.execute(
                f"SELECT path, etag FROM file WHERE path IN ({','.join('?' * len(paths))}) AND mtime_ns IS NOT NULL",
                paths,
            )
            return {path for path, etag in ((os.fsdecode(row[0]), row[1]) for row in rows) if wanted[path] == etag}

        return self._do(work, set())

    def total_bytes(self) -> int:
        """Bytes of all blocks and leaves present in all files."""

        def work(db: sqlite3.Connection) -> int:
            return int(db.execute("SELECT bytes FROM total").fetchone()[0])

        return self._do(work, 0)

    def evictable(self, count: int) -> list[tuple[CachedFile, int]]:
        """The ``count`` files, or regions of larger incomplete files, that were used longest ago, oldest first.

        The second value is the number of the region; -1: the whole file.
        """
        columns = "f.path, etag, ino, size, bitmap, bytes, mtime_ns, floor_ns"

        def work(db: sqlite3.Connection) -> list[tuple[CachedFile, int]]:
            files = db.execute(
                f"SELECT {columns}, -1, f.used FROM file f WHERE size <= ? OR mtime_ns IS NOT NULL OR NOT EXISTS"
                " (SELECT 1 FROM region r WHERE r.path = f.path) ORDER BY f.used LIMIT ?",
                (REGION_BLOCKS * BLOCK_SIZE, count),
            )
            regions = db.execute(
                f"SELECT {columns}, region, r.used FROM region r JOIN file f ON f.path = r.path"
                " WHERE mtime_ns IS NULL ORDER BY r.used LIMIT ?",
                (count,),
            )
            rows = sorted([*files.fetchall(), *regions.fetchall()], key=lambda row: (row[9], row[8]))[:count]
            return [(CachedFile(os.fsdecode(row[0]), *row[1:8]), row[8]) for row in rows]

        return self._do(work, [])

    # ---- writing

    def reset(self, path: str, etag: str, size: int, *, ino: int = 0, floor_ns: int = 0, full: bool = False) -> None:
        """Start a row for a new file: no blocks present (or all, with ``full``). Replaces what was known of the path.

        ``floor_ns``: the mtime of the file it replaces.
        """
        blocks = (size + BLOCK_SIZE - 1) // BLOCK_SIZE
        bitmap = full_bitmap(blocks) if full else None

        def work(db: sqlite3.Connection) -> None:
            with transaction(db):
                _reset(db, path, etag, size, ino, floor_ns, bitmap)

        self._do(work, None)

    def reset_all(self, files: Sequence[tuple[str, str, int, int]]) -> None:
        """As reset, for many new files: (path, etag, size, inode) of each."""

        def work(db: sqlite3.Connection) -> None:
            with transaction(db):
                for path, etag, size, ino in files:
                    _reset(db, path, etag, size, ino, 0, None)

        self._do(work, None)

    def mark(self, path: str, etag: str, blocks: Iterable[int], *, ino: int = 0) -> None:
        """These blocks have been written. Does nothing when the row is of another revision or inode."""
        name = os.fsencode(path)

        def work(db: sqlite3.Connection) -> None:
            with transaction(db):
                found = db.execute(
                    "SELECT bitmap, bytes, size FROM file WHERE path = ? AND etag = ? AND ino = ?", (name, etag, ino)
                ).fetchone()
                if found is None:
                    return
                bitmap, total, size = bytearray(found[0]), found[1], found[2]
                for block in blocks:
                    _use_region(db, name, size, block)
                    byte, bit = block >> 3, 1 << (block & 7)
                    if block * BLOCK_SIZE < size and not bitmap[byte] & bit:
                        bitmap[byte] |= bit
                        total += min(BLOCK_SIZE, size - block * BLOCK_SIZE)
                        total -= leaf_bytes(size, block, _drop_partial(db, name, block))
                db.execute("UPDATE file SET bitmap = ?, bytes = ? WHERE path = ?", (bytes(bitmap), total, name))

        self._do(work, None)

    def mark_leaves(self, path: str, etag: str, block: int, mask: int, *, ino: int = 0) -> None:
        """Leaves of a block have been written; with all of them it is complete. Does nothing when mark would not."""
        name = os.fsencode(path)

        def work(db: sqlite3.Connection) -> None:
            with transaction(db):
                found = db.execute(
                    "SELECT bitmap, bytes, size FROM file WHERE path = ? AND etag = ? AND ino = ?", (name, etag, ino)
                ).fetchone()
                if found is None or found[0][block >> 3] >> (block & 7) & 1:
                    return
                bitmap, total, size = bytearray(found[0]), found[1], found[2]
                _use_region(db, name, size, block)
                before = _drop_partial(db, name, block)
                now = before | mask
                if now == leaf_mask(size, block):
                    bitmap[block >> 3] |= 1 << (block & 7)
                else:
                    signed = now - (1 << 64) if now >> 63 else now
                    db.execute("INSERT INTO partial VALUES (?, ?, ?)", (name, block, signed))
                total += leaf_bytes(size, block, now) - leaf_bytes(size, block, before)
                db.execute("UPDATE file SET bitmap = ?, bytes = ? WHERE path = ?", (bytes(bitmap), total, name))

        self._do(work, None)

    def complete(self, path: str, etag: str, mtime_ns: int, *, ino: int = 0) -> None:
        """All blocks are written. ``mtime_ns`` is the file's now: while it stays, nobody else wrote to it."""

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE file SET mtime_ns = ? WHERE path = ? AND etag = ? AND ino = ?",
                (mtime_ns, os.fsencode(path), etag, ino),
            )

        self._do(work, None)

    def complete_all(self, files: Sequence[tuple[str, str, int, int]]) -> set[str]:
        """All blocks of some files have been written: (path, etag, inode, mtime_ns) of each. As mark and complete.

        Returns the files that are complete now. A file whose predecessor had a later mtime is only marked.
        """

        def work(db: sqlite3.Connection) -> set[str]:
            done: set[str] = set()
            with transaction(db):
                for path, etag, ino, mtime_ns in files:
                    name = os.fsencode(path)
                    found = db.execute(
                        "SELECT size, floor_ns FROM file WHERE path = ? AND etag = ? AND ino = ?", (name, etag, ino)
                    ).fetchone()
                    if found is not None:
                        size, floor = found
                        db.execute("DELETE FROM partial WHERE path = ?", (name,))
                        db.execute(
                            "UPDATE file SET bitmap = ?, bytes = size, mtime_ns = ? WHERE path = ?",
                            (full_bitmap(-(-size // BLOCK_SIZE)), mtime_ns if mtime_ns >= floor else None, name),
                        )
                        if mtime_ns >= floor:
                            done.add(path)
            return done

        return self._do(work, set())

    def touch(self, paths: str | Mapping[str, int]) -> None:
        """A file was used now, or several files each at its time (nanoseconds since the epoch)."""
        used = {paths: time.time_ns()} if isinstance(paths, str) else paths

        def work(db: sqlite3.Connection) -> None:
            with transaction(db):
                db.executemany(
                    "UPDATE file SET used = ? WHERE path = ?", [(ns, os.fsencode(path)) for path, ns in used.items()]
                )

        self._do(work, None)

    def touch_regions(self, path: str, regions: Iterable[int], used_ns: int) -> None:
        """Regions of a file were used at a time (nanoseconds since the epoch)."""
        rows = [(used_ns, os.fsencode(path), region) for region in regions]

        def work(db: sqlite3.Connection) -> None:
            with transaction(db):
                db.executemany("UPDATE region SET used = ? WHERE path = ? AND region = ?", rows)

        self._do(work, None)

    def evict(self, row: CachedFile, region: int, enough: int, keep: Container[int] = ()) -> dict[int, int]:
        """A region's blocks are about to be punched, without those to ``keep``, until ``enough`` bytes are freed.

        Returns the blocks and the bytes of each that were there. Returns nothing when the file has become complete, or
        another one, since the row was read.
        """
        name = os.fsencode(row.path)

        def work(db: sqlite3.Connection) -> dict[int, int]:
            with transaction(db):
                found = db.execute(
                    "SELECT bitmap, bytes FROM file WHERE path = ? AND etag = ? AND ino = ? AND mtime_ns IS NULL",
                    (name, row.etag, row.ino),
                ).fetchone()
                if found is None:
                    return {}
                bitmap, total = bytearray(found[0]), found[1]
                blocks: dict[int, int] = {}
                left = False
                count = (row.size + BLOCK_SIZE - 1) // BLOCK_SIZE
                for block in range(region * REGION_BLOCKS, min((region + 1) * REGION_BLOCKS, count)):
                    if block in keep or sum(blocks.values()) >= enough:
                        left = True
                        continue
                    mask = _drop_partial(db, name, block)
                    if bitmap[block >> 3] >> (block & 7) & 1:
                        bitmap[block >> 3] ^= 1 << (block & 7)
                        mask = leaf_mask(row.size, block)
                    if mask:
                        blocks[block] = leaf_bytes(row.size, block, mask)
                total -= sum(blocks.values())
                db.execute("UPDATE file SET bitmap = ?, bytes = ? WHERE path = ?", (bytes(bitmap), total, name))
                if not left:
                    db.execute("DELETE FROM region WHERE path = ? AND region = ?", (name, region))
                return blocks

        return self._do(work, {})

    def forget(self, path: str) -> None:
        """The file is gone."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM file WHERE path = ?", (os.fsencode(path),))

        self._do(work, None)

    def forget_below(self, folder: str) -> None:
        """A folder and all files in it are gone."""
        start = os.fsencode(folder) + b"/"

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM file WHERE path >= ? AND path < ?", (start, start[:-1] + b"0"))  # "0" follows "/"

        self._do(work, None)

    def temporaries(self) -> list[bytes]:
        """Paths of files that are, or were, temporary. Reads all rows."""

        def work(db: sqlite3.Connection) -> list[bytes]:
            rows = db.execute("SELECT path FROM file WHERE instr(path, ?)", (b"/" + TEMPORARY.encode(),))
            return [row[0] for row in rows]

        return self._do(work, [])

    def swept(self, folder: str, *, done: bool = False) -> bool:
        """Whether this index knows all files below a folder: the strays of a lost index were removed.

        With ``done`` they have just been removed.
        """

        def work(db: sqlite3.Connection) -> bool:
            if done:
                db.execute("INSERT OR IGNORE INTO swept VALUES (?)", (os.fsencode(folder),))
            return db.execute("SELECT * FROM swept WHERE folder = ?", (os.fsencode(folder),)).fetchone() is not None

        return self._do(work, True)

    # ---- the database

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All writes inside the context are one transaction. If something goes wrong, some of them are lost."""
        with WRITING:
            self._do(lambda db: db.execute("BEGIN IMMEDIATE"), None)
            try:
                yield
            finally:
                self._do(lambda db: db.execute("COMMIT") if db.in_transaction else None, None)

    def _do(self, work: Callable[[sqlite3.Connection], T], default: T) -> T:
        for _ in range(3):
            try:
                return work(self._connection())
            except sqlite3.Error as error:
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
                # A generator may be closed in another thread than its own: then this is not its connection.
                if code & 0xFF in _PASSING or isinstance(error, sqlite3.ProgrammingError):
                    log.debug("The cache index is not updated: %s.", error)
                    return default
                moved = code == sqlite3.SQLITE_READONLY_DBMOVED or not self.path.exists()
                self._discard(error, delete=not moved)
            except OSError as error:  # there is no cache directory, and none can be made
                log.debug("There is no cache index: %s.", error)
                self.close()
                return default
        return default

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None:
            try:
                stat = os.stat(self.path)
                if (stat.st_dev, stat.st_ino) == self._file:
                    return self._db
            except FileNotFoundError:
                pass
            self.close()  # deleted under us, perhaps with the whole cache
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite would use the umask. Only for a new file: if another thread's connection has the file open, closing a
        # second descriptor drops its locks (fcntl(2)), and the next connection that closes deletes the log under it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            prepare(db)
            stat = os.stat(self.path)
        except BaseException:
            db.close()
            raise
        self._db, self._file = db, (stat.st_dev, stat.st_ino)
        return db

    def _discard(self, error: sqlite3.Error, *, delete: bool) -> None:
        self.close()
        if not delete:
            return
        log.warning("The cache index %s is unusable (%s); making a new one.", self.path, error)
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(OSError):
                os.unlink(f"{self.path}{suffix}")


def _reset(
    db: sqlite3.Connection, path: str, etag: str, size: int, ino: int, floor_ns: int, bitmap: bytes | None
) -> None:
    """A new row; ``bitmap`` None: no block is there."""
    name = os.fsencode(path)
    old = db.execute("SELECT mtime_ns, floor_ns FROM file WHERE path = ?", (name,)).fetchone()
    if old is not None:
        floor_ns = max(floor_ns, old[0] or 0, old[1])
        db.execute("DELETE FROM file WHERE path = ?", (name,))
    blocks, there = (bytes((-(-size // BLOCK_SIZE) + 7) // 8), 0) if bitmap is None else (bitmap, size)
    row = (name, etag, ino, size, blocks, there, time.time_ns(), floor_ns)
    db.execute("INSERT INTO file VALUES (?, ?, ?, ?, ?, ?, ?, NULL, ?)", row)


def _use_region(db: sqlite3.Connection, name: bytes, size: int, block: int) -> None:
    """The region of a block is used now, if the file has several regions."""
    if size > REGION_BLOCKS * BLOCK_SIZE:
        db.execute("INSERT OR REPLACE INTO region VALUES (?, ?, ?)", (name, block // REGION_BLOCKS, time.time_ns()))


def _drop_partial(db: sqlite3.Connection, name: bytes, block: int) -> int:
    """Forget which leaves of a block are there. Returns which they were."""
    found = db.execute("SELECT leaves FROM partial WHERE path = ? AND block = ?", (name, block)).fetchone()
    if found is None:
        return 0
    db.execute("DELETE FROM partial WHERE path = ? AND block = ?", (name, block))
    return int(found[0]) & _ALL
