"""Cache files on disk: their paths; making, opening, sealing and removing them. Synchronous, any thread.

A cache file is a sparse file of the object's size at ``<cache_dir>/<cache_name>/<object_key>``. Another revision is
always another inode at the same path, so a reader that has the old one open keeps reading it. Nothing here assumes that
the cache directory still exists: it may be deleted at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from lamfs.cache import holes
from lamfs.cache.bits import REGION_BLOCKS, unpack_bitmap
from lamfs.cache.index import CacheIndex
from lamfs.errors import InvalidName, StorageError, StorageFull
from lamfs.hashing import hash_leaf
from lamfs.model import BLOCK_SIZE, LEAF_SIZE, Revision
from lamfs.storage.base import ObjectStore

_STRANGE = frozenset({"", ".", ".."})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM})
_READ_WRITE = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(slots=True)
class Opened:
    """An open cache file. The caller owns ``fd``.

    ``present`` has one byte (0 or 1) per block, ``partial`` the leaves of other blocks as CacheIndex.partial.
    """

    fd: int
    ino: int
    present: bytearray
    partial: dict[int, int]


def ino_of(found: os.stat_result) -> int:
    """Inode number as SQLite can hold it (some file systems use all 64 bits)."""
    return found.st_ino & 0x7FFF_FFFF_FFFF_FFFF


def tag(revision: Revision) -> str:
    """The index's name for a revision: its ETag and a hash of its block hashes.

    An ETag is whatever a server says. Two servers may have buckets of the same name, and so share paths here. A file of
    one of them must not pass as complete for the registry of the other.
    """
    return f"{revision.etag} {_hash_of(revision.content.blocks)}"


@functools.lru_cache(maxsize=8)
def _hash_of(blocks: bytes) -> str:
    """The hash of block hashes. It is needed for each block that arrives, and a file of 1 TiB has 8 MiB of them."""
    return hash_leaf(blocks).hex()


def relative_path(store: ObjectStore, object_key: str) -> str:
    """Path of an object's cache file relative to the cache directory. Raises InvalidName if the key leads outside."""
    if not _STRANGE.isdisjoint(object_key.split("/")):
        raise InvalidName(f"The object key '{object_key}' cannot be a file path; rename the object.")
    return f"{store.cache_name}/{object_key}"


def open_file(index: CacheIndex, cache_dir: Path, path: str, revision: Revision) -> Opened:
    """Open the cache file of a revision, or make a new one in place of whatever else is at its path.

    Raises StorageFull or StorageError (with the errno) when the cache directory cannot be used.
    """
    full = cache_dir / path
    blocks = revision.block_count()
    try:
        fd = os.open(full, _READ_WRITE)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise cache_error(error, full) from error
        fd = -1
    if fd >= 0:
        if not _shared(fd, revision):  # another process keeps punching holes
            os.close(fd)
            return make_file(index, cache_dir, path, revision)
        found = os.fstat(fd)
        bitmap = index.present(path, tag(revision), ino=ino_of(found))
        if bitmap is not None and stat.S_ISREG(found.st_mode) and found.st_size == revision.size:
            present = unpack_bitmap(bitmap, blocks)
            some = revision.size > LEAF_SIZE and present.find(0) >= 0
            return Opened(fd, ino_of(found), present, index.partial(path) if some else {})
        os.close(fd)
    return make_file(index, cache_dir, path, revision)


def open_old(index: CacheIndex, cache_dir: Path, path: str) -> Opened | None:
    """The cache file at a path, of whatever revision. None: there is none that the index knows."""
    row = index.row(path)
    if row is None:
        return None
    try:
        fd = os.open(cache_dir / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    if ino_of(os.fstat(fd)) != row.ino:
        os.close(fd)
        return None
    return Opened(fd, row.ino, unpack_bitmap(row.bitmap, (row.size + BLOCK_SIZE - 1) // BLOCK_SIZE), {})


def make_file(index: CacheIndex, cache_dir: Path, path: str, revision: Revision) -> Opened:
    """Make a new, empty cache file for a revision. Unlinks what is at the path. Raises as open_file."""
    full = cache_dir / path
    floor = 0
    try:
        for last in (False, False, False, True):
            try:
                floor = max(floor, os.lstat(full).st_mtime_ns)
                clear_way(index, cache_dir, path)
            except (FileNotFoundError, NotADirectoryError):
                pass
            make_parents(index, cache_dir, path)
            try:
                fd = os.open(full, _READ_WRITE | os.O_CREAT | os.O_EXCL, 0o600)
                break
            except (FileExistsError, FileNotFoundError):
                if last:  # somebody makes the same file, or deletes the directory, each time
                    raise
        try:
            _shared(fd, revision)
            os.ftruncate(fd, revision.size)
            ino = ino_of(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise cache_error(error, full) from error
    index.reset(path, tag(revision), revision.size, ino=ino, floor_ns=floor)
    if revision.size == 0:
        seal(index, path, revision, fd)
    return Opened(fd, ino, bytearray(revision.block_count()), {})


def make_fresh(cache_dir: Path, path: str, revision: Revision) -> tuple[int, int] | None:
    """Make the cache file of a small revision where nothing is yet. Returns its descriptor and inode number.

    None: it cannot be made. The caller writes its row (CacheIndex.reset_all).
    """
    try:
        fd = os.open(os.path.join(cache_dir, path), _READ_WRITE | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        os.ftruncate(fd, revision.size)
        return fd, ino_of(os.fstat(fd))
    except OSError:
        os.close(fd)
        return None


def _shared(fd: int, revision: Revision) -> bool:
    """Keep other processes from punching holes into a file that is open here."""
    return revision.size <= REGION_BLOCKS * BLOCK_SIZE or holes.share(fd)


def clear_way(index: CacheIndex, cache_dir: Path, path: str) -> None:
    """Remove whatever is at a path of the cache: a file, a stray link, or a folder of former longer keys."""
    full = cache_dir / path
    try:
        os.unlink(full)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(full, ignore_errors=True)
        index.forget_below(path)


def make_way(index: CacheIndex, cache_dir: Path, path: str) -> int:
    """Before a file is renamed to a path of the cache: remove a folder that is there. Raises OSError.

    Returns the mtime in ns of what is or was there; 0: nothing.
    """
    try:
        there = os.lstat(os.path.join(cache_dir, path))
    except FileNotFoundError:
        return 0
    if stat.S_ISDIR(there.st_mode):
        clear_way(index, cache_dir, path)
    return there.st_mtime_ns


def make_parents(index: CacheIndex, cache_dir: Path, path: str) -> None:
    """Make the folders above a path, mode 0700. Removes a cache file where a folder must be. Raises OSError."""
    if os.path.isdir(os.path.dirname(os.path.join(cache_dir, path))):
        return
    folder = cache_dir
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in path.split("/")[:-1]:
        folder = folder / name
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if folder.is_dir():
                continue
            with contextlib.suppress(FileNotFoundError):
                folder.unlink()
            index.forget(str(folder.relative_to(cache_dir)))
            folder.mkdir(mode=0o700, exist_ok=True)


def seal(index: CacheIndex, path: str, revision: Revision, fd: int) -> None:
    """All blocks are written and marked: give the file an mtime not older than its predecessor's, and record it."""
    row = index.row(path)
    found = os.fstat(fd)
    if row is None or row.etag != tag(revision) or row.ino != ino_of(found):
        return
    mtime = found.st_mtime_ns
    if mtime < row.floor_ns:  # the clock went back
        os.utime(fd, ns=(found.st_atime_ns, row.floor_ns))
        mtime = os.fstat(fd).st_mtime_ns
    if row.mtime_ns != mtime:
        index.complete(path, tag(revision), mtime, ino=row.ino)


def is_sealed(index: CacheIndex, cache_dir: Path, path: str, revision: Revision) -> bool:
    """Whether the file at the path is the complete, untouched file of this revision."""
    row = index.row(path)
    if row is None or row.mtime_ns is None or row.etag != tag(revision) or row.size != revision.size:
        return False
    try:
        found = os.lstat(os.path.join(cache_dir, path))
    except OSError:
        return False
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_size == revision.size
        and found.st_mtime_ns == row.mtime_ns
        and ino_of(found) == row.ino
    )


def remove(index: CacheIndex, cache_dir: Path, path: str) -> int:
    """Delete a cache file, its row, and folders that become empty. Returns the bytes of disk that it used."""
    full = cache_dir / path
    freed = 0
    try:
        freed = os.lstat(full).st_blocks * 512
        os.unlink(full)
    except OSError:
        pass  # gone, or a folder by now
    index.forget(path)
    folder = os.path.dirname(path)
    while folder:
        try:
            os.rmdir(cache_dir / folder)
        except OSError:
            break
        folder = os.path.dirname(folder)
    return freed


def sweep(index: CacheIndex, cache_dir: Path, folder: str) -> int:
    """Remove files below a folder of the cache that have no row, as a lost index leaves them.

    Touches only what lamfs makes: regular files of this user with mode 0600, older than a minute (a younger one may be
    about to get its row). Returns how many were removed. Walks the folder, so call it in a thread.
    """
    removed = 0
    young = time.time() - 60
    for where, _, names in os.walk(cache_dir / folder):
        for name in names:
            full = os.path.join(where, name)
            try:
                found = os.lstat(full)
            except OSError:
                continue
            ours = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600 and found.st_uid == os.geteuid()
            if ours and found.st_ctime < young and index.row(os.path.relpath(full, cache_dir)) is None:
                with contextlib.suppress(OSError):
                    os.unlink(full)
                    removed += 1
    return removed


def cache_error(error: OSError, path: os.PathLike[str] | str) -> StorageError:
    """The cache's error for an OSError on one of its files."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"There is no space for the cache file {path}; make room, or move the cache directory.")
    return StorageError(
        f"The cache file {path} cannot be used: {error.strerror}; check the cache directory's owner and mode.",
        errno=error.errno,
    )
