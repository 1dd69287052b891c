"""What reads through a mount fetch from a bucket, what outlives the daemon, a file that is larger than the cache."""

from __future__ import annotations

import hashlib
import os
import random

from tests.support.mounts import MountedInstance, wait_until

MIB = 1 << 20


def read_at(path: os.PathLike[str], offsets: list[int]) -> list[bytes]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return [os.pread(fd, 4096, offset) for offset in offsets]
    finally:
        os.close(fd)


def test_random_reads_fetch_leaves_that_outlive_the_daemon(s3_mount: MountedInstance) -> None:
    data = os.urandom(24 * MIB)
    (s3_mount.path / "k").write_bytes(data)
    s3_mount.sync()
    s3_mount.remount(empty_cache=True)
    chance = random.Random(4)
    offsets = [chance.randrange(64, len(data) // 4096) * 4096 for _ in range(20)]
    expected = [data[offset : offset + 4096] for offset in offsets]
    assert read_at(s3_mount.path / "k", offsets) == expected
    cache = s3_mount.status()["cache"]
    assert cache["misses"] <= len(offsets)
    assert cache["fetched_bytes"] <= len(offsets) * 128 * 1024
    s3_mount.kill9()
    s3_mount.mount()
    assert read_at(s3_mount.path / "k", offsets) == expected
    assert s3_mount.status()["cache"]["misses"] == 0
    assert (s3_mount.path / "k").read_bytes() == data


def test_a_file_larger_than_the_cache_is_read_from_end_to_end(s3_mount: MountedInstance) -> None:
    data = os.urandom(8 * MIB)
    whole = hashlib.sha256()
    with (s3_mount.path / "big").open("wb") as stream:
        for number in range(11):
            piece = number.to_bytes(8, "big") + data[8:]
            stream.write(piece)
            whole.update(piece)
    s3_mount.sync()
    s3_mount.remount(["cache_limit=32M"], empty_cache=True)
    with (s3_mount.path / "big").open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").digest() == whole.digest()
        wait_until(lambda: s3_mount.status()["cache"]["cached_bytes"] <= 32 * MIB, "the cache is within its limit")
        [file] = [path for path in s3_mount.cache_dir.rglob("*") if path.is_file() and path.stat().st_size == 88 * MIB]
        assert file.stat().st_blocks * 512 <= 33 * MIB
        stream.seek(0)
        assert stream.read(100) == (0).to_bytes(8, "big") + data[8:100]


def test_a_directory_of_small_files_is_fetched_ahead_of_its_reader(s3_mount: MountedInstance) -> None:
    contents = {f"d/{folder}/f{number}": os.urandom(3000) for folder in "ab" for number in range(25)}
    for path, data in contents.items():
        (s3_mount.path / path).parent.mkdir(parents=True, exist_ok=True)
        (s3_mount.path / path).write_bytes(data)
    s3_mount.sync()
    s3_mount.remount(empty_cache=True)
    got = s3_mount.run(["sh", "-c", "tar cf - d | tar xOf - | sha256sum"]).stdout.split()[0]
    assert got == hashlib.sha256(b"".join(contents.values())).hexdigest()
    cache = s3_mount.status()["cache"]
    assert cache["prefetched_used"] == cache["prefetched_files"] >= 40
    assert cache["misses"] == len(contents)
    s3_mount.kill9()
    s3_mount.mount()
    assert all((s3_mount.path / path).read_bytes() == data for path, data in contents.items())
    assert s3_mount.status()["cache"]["misses"] == 0
