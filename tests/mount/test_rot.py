"""A byte that rots on the disk after it was verified is not given out, however long the mount has lived."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance

MIB = 1 << 20
SIZE = 9 * MIB + 123
ROTTEN = 5 * MIB + 17


def forget(path: Path) -> None:
    """Have the kernel forget what it has in memory of a file that is clean."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def rot(path: Path, offset: int, *, keep_times: bool = True) -> None:
    """Change one byte on the disk, and nothing that stat(2) shows, as a disk does."""
    found = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    forget(path)


def drop(fd: int) -> None:
    """The kernel asks lamfs again."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def read_in(fd: int, piece: int) -> bytes:
    return b"".join(os.pread(fd, piece, at) for at in range(0, SIZE, piece))


@pytest.mark.parametrize("piece", [MIB, 4096])
def test_in_the_cache_it_is_fetched_again(s3_mount: MountedInstance, piece: int) -> None:
    s3_mount.expect_log("is damaged; fetching it again")
    data = os.urandom(SIZE)
    (s3_mount.path / "a").write_bytes(data)
    s3_mount.sync()
    (cached,) = [path for path in s3_mount.cache_dir.rglob("*") if path.is_file() and path.stat().st_size == SIZE]
    with open(s3_mount.path / "a", "rb", buffering=0) as file:
        assert read_in(file.fileno(), piece) == data
        drop(file.fileno())
        rot(cached, ROTTEN)
        for _ in range(2):
            assert read_in(file.fileno(), piece) == data
            drop(file.fileno())
            forget(cached)
    assert s3_mount.status()["cache"]["damaged"] == 1


def test_around_what_is_read_nothing_comes_to_memory_unseen(s3_mount: MountedInstance) -> None:
    """The kernel's readahead would bring the rotten byte, and it would count as verified."""
    s3_mount.expect_log("is damaged; fetching it again")
    data = os.urandom(SIZE)
    (s3_mount.path / "a").write_bytes(data)
    s3_mount.sync()
    (cached,) = [path for path in s3_mount.cache_dir.rglob("*") if path.is_file() and path.stat().st_size == SIZE]
    with open(s3_mount.path / "a", "rb", buffering=0) as file:
        assert read_in(file.fileno(), MIB) == data
        for before in (4096, 65536, 200_000, 2 * MIB):
            drop(file.fileno())
            rot(cached, ROTTEN)
            start = ROTTEN - before
            for at in range(max(start - 4 * 131072, 0), start, 131072):
                os.pread(file.fileno(), min(131072, start - at), at)
            assert os.pread(file.fileno(), 2 * before, start) == data[start : start + 2 * before]


def test_a_write_into_the_file_does_not_carry_it_along(s3_mount: MountedInstance) -> None:
    """The part of a file that a program has not changed is taken over from the cache."""
    s3_mount.expect_log("is damaged; fetching it again")
    data = os.urandom(SIZE)
    (s3_mount.path / "a").write_bytes(data)
    s3_mount.sync()
    (cached,) = [path for path in s3_mount.cache_dir.rglob("*") if path.is_file() and path.stat().st_size == SIZE]
    assert (s3_mount.path / "a").read_bytes() == data
    rot(cached, ROTTEN)
    with open(s3_mount.path / "a", "r+b", buffering=0) as file:
        file.write(b"new")
    s3_mount.sync()
    assert (s3_mount.path / "a").read_bytes() == b"new" + data[3:]
    assert s3_mount.fsck() == []


def test_in_a_storage_folder_it_is_an_error(local_mount: MountedInstance) -> None:
    local_mount.expect_log("STORAGE DAMAGE", "damaged in block")
    data = os.urandom(SIZE)
    (local_mount.path / "a").write_bytes(data)
    local_mount.sync()
    stored = Path(local_mount.info("a")["storage_path"])
    with open(local_mount.path / "a", "rb", buffering=0) as file:
        assert read_in(file.fileno(), MIB) == data
        drop(file.fileno())
        rot(stored, ROTTEN)
        assert os.pread(file.fileno(), 4096, 0) == data[:4096]
        with pytest.raises(OSError, match="error") as found:
            os.pread(file.fileno(), 4096, ROTTEN)
        assert found.value.errno == errno.EIO
