"""A large artifact in a bucket that is changed a little, through a real mount: what moves, and what a crash leaves."""

from __future__ import annotations

import os
import random
import shutil

from tests.support.mounts import MountedInstance

MIB = 1 << 20
SIZE = 120 * MIB + 12_345


def test_a_large_artifact_is_changed_in_place(s3_mount: MountedInstance) -> None:
    """Few blocks are fetched for a change in its middle and at its end; every byte is right, also after kill -9."""
    expected = bytearray(random.Random(7).randbytes(SIZE))
    file = s3_mount.path / "big.bin"
    file.write_bytes(expected)
    s3_mount.sync()
    s3_mount.remount(empty_cache=True)

    def patch(offset: int, data: bytes) -> None:
        with open(file, "r+b", buffering=0) as stream:
            stream.seek(offset)
            stream.write(data)
        expected[offset : offset + len(data)] = data

    patch(60 * MIB - 100, os.urandom(200))
    assert s3_mount.status()["cache"]["fetched_bytes"] <= 8 * MIB  # the two blocks of it
    with open(file, "rb") as stream:
        stream.seek(59 * MIB)
        assert stream.read(2 * MIB) == expected[59 * MIB : 61 * MIB]
    s3_mount.kill9()
    shutil.rmtree(s3_mount.cache_dir)
    s3_mount.mount()
    s3_mount.sync()
    assert s3_mount.status()["cache"]["fetched_bytes"] <= 8 * MIB  # not the 50 MiB at both ends that its hash is over
    assert file.read_bytes() == expected
    patch(SIZE, os.urandom(MIB))
    os.truncate(file, SIZE + 5 * MIB)
    expected.extend(bytes(4 * MIB))
    s3_mount.sync()
    assert file.read_bytes() == expected
    s3_mount.remount(empty_cache=True)
    assert file.read_bytes() == expected
    assert s3_mount.fsck() == []
