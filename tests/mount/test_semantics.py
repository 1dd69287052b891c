"""What lamfs/docs/SEMANTICS.md promises and no other test executes: calls that lamfs never sees, and other mounts."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import BUCKET, MountedInstance, outcome, wait_until
from tests.support.proxy import FaultProxy
from tests.support.servers import Server
from tests.support.syscalls import libc

OLD = 1_000_000_000 * 10**9


def uid_and_key(mount: MountedInstance, path: Path) -> tuple[str, str]:
    record = mount.stored_info(path.relative_to(mount.path).as_posix())
    return record["uid"], record["key"]


def test_fallocate_is_refused_and_no_hole_is_found(shared: Path) -> None:
    with open(shared / "f", "w+b") as file:
        os.truncate(file.fileno(), 1 << 20)
        assert libc.fallocate(file.fileno(), 0, ctypes.c_long(0), ctypes.c_long(4096)) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 1 << 20
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_a_synchronous_write_is_stored(shared: Path, shared_mount: MountedInstance, flag: int) -> None:
    fd = os.open(shared / "f", os.O_CREAT | os.O_WRONLY | flag)
    for content in (b"one", b"one and two"):
        os.pwrite(fd, content, 0)
        with shared_mount.registry() as registry:
            record = registry.artifacts.by_key(f"{shared.name}/f")
            assert record is not None
            assert (Path(shared_mount.storage.root) / record.revision.object_key).read_bytes() == content
    os.close(fd)


def test_the_key_of_hard_links_is_the_oldest_name(shared: Path, shared_mount: MountedInstance) -> None:
    (shared / "b").write_bytes(b"content")
    os.link(shared / "b", shared / "a")
    os.link(shared / "b", shared / "c")
    uid, key = uid_and_key(shared_mount, shared / "c")
    assert key == f"{shared.name}/b"
    os.unlink(shared / "b")
    for name in ("a", "c"):
        assert uid_and_key(shared_mount, shared / name) == (uid, f"{shared.name}/a")


def test_inodes_in_use_are_the_artifacts(shared: Path, shared_mount: MountedInstance) -> None:
    (shared / "d").mkdir()
    for number in range(3):
        (shared / "d" / f"f{number}").write_bytes(b"%d" % number)
    shared_mount.sync()
    with shared_mount.registry() as registry:
        count = registry.artifacts.count()
    assert count >= 3

    def used() -> bool:
        space = os.statvfs(shared)
        return space.f_files - space.f_ffree == count

    wait_until(used, "the new artifacts are counted")


@pytest.fixture
def beside(shared: Path, shared_mount: MountedInstance) -> Iterator[Path]:
    """The same directory in a second mount."""
    other = shared_mount.base / "beside"
    other.mkdir(exist_ok=True)
    shared_mount.cli("mount", str(other))
    try:
        yield other / shared.name
    finally:
        shared_mount.cli("umount", str(other))


def test_locks_do_not_reach_another_mount(shared: Path, beside: Path) -> None:
    (shared / "f").write_bytes(b"content")
    wait_until(lambda: (beside / "f").exists(), "the other mount has it")
    with open(shared / "f", "r+b") as one, open(beside / "f", "r+b") as two, open(shared / "f", "r+b") as three:
        fcntl.flock(one, fcntl.LOCK_EX)
        assert outcome(lambda: fcntl.flock(three, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EAGAIN"
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_another_mount_sees_a_new_time_of_access_with_the_next_change(
    shared: Path, shared_mount: MountedInstance, beside: Path
) -> None:
    (shared / "f").write_bytes(b"content")
    os.utime(shared / "f", ns=(OLD, OLD))
    wait_until(lambda: (beside / "f").exists() and (beside / "f").stat().st_atime_ns == OLD, "it has the old time")
    (shared / "f").read_bytes()
    new = (shared / "f").stat().st_atime_ns
    assert new > OLD

    def is_noted() -> bool:
        with shared_mount.registry() as registry:
            inode = registry.tree.resolve(f"{shared.name}/f")
            return inode is not None and inode.atime_ns == new

    wait_until(is_noted, "the registry has the new time", seconds=60)
    (shared / "f").chmod(0o600)
    wait_until(lambda: (beside / "f").stat().st_mode & 0o777 == 0o600, "it has the new mode")
    assert (beside / "f").stat().st_atime_ns == new


@pytest.fixture(scope="module")
def away_mount(seaweed: Server, fuse: None) -> Iterator[tuple[MountedInstance, FaultProxy]]:
    """A mount of a bucket behind a proxy that can cut it off."""
    with FaultProxy(seaweed.port) as proxy:
        config = dataclasses.replace(seaweed.config(BUCKET, f"s{os.urandom(4).hex()}/root"), endpoint_url=proxy.url)
        with MountedInstance(config, env=seaweed.env) as instance:
            instance.mount()
            yield instance, proxy


def test_names_and_attributes_need_no_storage(away_mount: tuple[MountedInstance, FaultProxy]) -> None:
    instance, proxy = away_mount
    top = instance.path / "names"
    (top / "d").mkdir(parents=True)
    (top / "d/f").write_bytes(b"content")
    instance.sync()
    proxy.cut()
    try:
        (top / "e").mkdir()
        os.symlink("nowhere", top / "link")
        os.link(top / "d/f", top / "hard")
        os.rename(top / "d/f", top / "e/g")
        os.rename(top / "d", top / "moved")
        (top / "e/g").chmod(0o600)
        os.utime(top / "e/g", ns=(OLD, OLD))
        found = (top / "e/g").stat()
        assert (found.st_size, found.st_nlink, found.st_mtime_ns) == (7, 2, OLD)
        assert sorted(os.listdir(top)) == ["e", "hard", "link", "moved"]
        os.unlink(top / "e/g")
        os.rmdir(top / "e")
    finally:
        proxy.heal()
    instance.sync()
    assert (top / "hard").read_bytes() == b"content"


def test_sync_and_syncfs_do_not_wait_for_storage(away_mount: tuple[MountedInstance, FaultProxy]) -> None:
    instance, proxy = away_mount
    proxy.cut()
    try:
        (instance.path / "waits").write_bytes(b"content")
        os.sync()
        fd = os.open(instance.path, os.O_RDONLY)
        assert libc.syncfs(fd) == 0
        os.close(fd)
        assert instance.status()["owed_rows"] >= 1
    finally:
        proxy.heal()
    instance.sync()
    assert instance.status()["owed_rows"] == 0
