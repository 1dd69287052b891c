"""A large file and very many small ones, in and out of a real mount, on a local folder and on S3."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance, s3_instance
from tests.support.servers import Server

GIB = 1 << 30
LIMIT = 300
"""Seconds a test here may take; they are long on a machine that does other work too."""
SECONDS = LIMIT - 10.0


def pseudo_random(size: int) -> Iterator[bytes]:
    """``size`` bytes that no two blocks of share, cheaply."""
    base = bytearray(random.Random(11).randbytes(1 << 20))
    for number in range(size >> 20):
        base[:8] = number.to_bytes(8, "little")
        yield bytes(base)


def checksum(path: Path) -> str:
    digest = hashlib.blake2b()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(4 << 20)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


@pytest.mark.timeout(LIMIT)
def test_a_gibibyte_in_and_out(instance: MountedInstance) -> None:
    """Identical by checksum, when it is copied out after a remount with an empty cache."""
    instance.extend(SECONDS)
    source = instance.base / "source"
    with open(source, "wb") as file:
        file.writelines(pseudo_random(GIB))
    wanted = checksum(source)
    instance.mount()
    instance.run(["cp", source, "large"], timeout=SECONDS)
    instance.sync(timeout=SECONDS)
    record = instance.info("large")
    assert (record["size"], record["hash_type"]) == (GIB, "sha1-fl")
    source.unlink()
    instance.remount(empty_cache=True)
    assert (instance.path / "large").stat().st_size == GIB
    instance.run(["cp", "large", instance.base / "out"], timeout=SECONDS)
    assert checksum(instance.base / "out") == wanted
    (instance.base / "out").unlink()
    if instance.storage.root.startswith("/"):
        change_in_the_middle(instance)
    instance.umount()
    assert instance.fsck() == []
    assert instance.spooled() == []


def change_in_the_middle(instance: MountedInstance) -> None:
    """A change to which sha1-fl is blind is a new content all the same."""
    record = instance.info("large")
    with open(instance.path / "large", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"changed", GIB // 2)
    after = instance.stored_info("large")
    assert (after["uid"], after["hash"]) == (record["uid"], record["hash"])
    assert after["updated_at"] > record["updated_at"]
    instance.remount(empty_cache=True)
    with open(instance.path / "large", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 9, GIB // 2 - 1)[1:8] == b"changed"


def plant(folder: Path, count: int) -> None:
    """``count`` small files in directories of a hundred."""
    rng = random.Random(12)
    for number in range(count):
        below = folder / f"{number // 1000}" / f"{number // 100}"
        if number % 100 == 0:
            below.mkdir(parents=True)
        (below / f"{number}.txt").write_bytes(b"%d\n" % number + rng.randbytes(rng.randrange(2000)))


def unpack_compare_remove(instance: MountedInstance, count: int) -> None:
    instance.extend(SECONDS)
    original = instance.base / "original"
    original.mkdir()
    plant(original, count)
    instance.run(["tar", "-cf", instance.base / "all.tar", "-C", instance.base, "original"], cwd="/")
    instance.mount()
    instance.run(["tar", "-xf", instance.base / "all.tar"], timeout=SECONDS)
    instance.run(["diff", "-r", original, "original"], timeout=SECONDS)
    instance.sync(timeout=SECONDS)
    with instance.registry() as registry:
        assert registry.artifacts.count() == count
    instance.remount(empty_cache=True)
    instance.run(["diff", "-r", original, "original"], timeout=SECONDS)
    # One step, whatever is in it.
    instance.run(["mv", "original", "renamed"])
    with instance.registry() as registry:
        assert registry.artifacts.by_key("renamed/0/0/0.txt") is not None
    instance.run(["rm", "-rf", "renamed"], timeout=SECONDS)
    assert os.listdir(instance.path) == []
    instance.umount()
    assert instance.fsck(timeout=SECONDS) == []
    assert instance.spooled() == []
    with instance.registry() as registry:
        assert not any(registry.journal.owed().values())


@pytest.mark.timeout(LIMIT)
def test_ten_thousand_small_files_on_a_local_folder(local_instance: MountedInstance) -> None:
    unpack_compare_remove(local_instance, 10_000)


@pytest.mark.timeout(LIMIT)
def test_a_thousand_small_files_on_s3(seaweed: Server, fuse: None) -> None:
    with s3_instance(seaweed) as instance:
        unpack_compare_remove(instance, 1_000)
