"""What readers of the core doubted, on real mounts: each test is one doubt that was right once."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from lamfs.model import ROOT_INO
from tests.support.mounts import MountedInstance, wait_until
from tests.support.timed import timed


def test_what_the_kernel_forgets_does_not_come_back_old(local_mount: MountedInstance, tmp_path: Path) -> None:
    """One program keeps the old revision open while the kernel drops the inode of the new one."""
    path, new = local_mount.path / "f.txt", tmp_path / "new.txt"
    path.write_bytes(b"old")
    new.write_bytes(b"new and longer")
    local_mount.sync()
    with path.open("rb", buffering=0) as old:
        local_mount.cli("replace", "f.txt", str(new))
        wait_until(lambda: path.read_bytes() == b"new and longer", "the new revision shows")
        number = path.stat().st_ino
        try:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        except PermissionError:
            return
        assert path.read_bytes() == b"new and longer"
        assert os.stat(path).st_size == 14
        assert path.stat().st_ino == number
        assert old.read() == b"old"
    assert path.read_bytes() == b"new and longer"


def test_times_that_do_not_fit_become_the_nearest(local_mount: MountedInstance) -> None:
    path = local_mount.path / "f"
    path.write_bytes(b"x")
    for year_10000, kept in ((253_402_300_800, (1 << 63) - 1), (-(1 << 40), -(1 << 63) + 1)):
        os.utime(path, (year_10000, year_10000))
        assert path.stat().st_mtime_ns == kept
    os.utime(path, ns=(-1, -1))
    assert path.stat().st_mtime_ns == -1


def test_renaming_while_reading_a_directory_comes_to_an_end(local_mount: MountedInstance) -> None:
    folder = local_mount.path / "d"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}").write_bytes(b"")
    seen = []
    with os.scandir(folder) as scan:
        for entry in scan:
            assert len(seen) < 100
            seen.append(entry.name)
            os.rename(entry.path, f"{entry.path}x")
    assert sorted(seen) == sorted(f"{number}" for number in range(30))
    assert sorted(os.listdir(folder)) == sorted(f"{number}x" for number in range(30))
    with os.scandir(folder) as scan:
        (folder / "new").write_bytes(b"")
        assert len(list(scan)) >= 30
    fd = os.open(folder, os.O_RDONLY)
    try:
        assert len(os.listdir(fd)) == 31
        (folder / "newer").write_bytes(b"")
        assert len(os.listdir(fd)) == 32, "a rewound directory shows what is there now"
        os.fsync(fd)
    finally:
        os.close(fd)


def test_opening_a_name_that_somebody_else_has_just_made_or_deleted(local_mount: MountedInstance) -> None:
    """The follower needs a moment; meanwhile what the kernel has cached must not decide."""
    top = local_mount.path
    for name in ("made", "linked"):
        assert not (top / name).exists()
    kept = top / "kept"
    kept.write_bytes(b"there")
    local_mount.sync()
    with local_mount.registry() as registry:
        timed(registry).names.rename(ROOT_INO, "kept", ROOT_INO, "made")
        fd = os.open(top / "made", os.O_RDWR | os.O_CREAT, 0o644)
        assert os.read(fd, 10) == b"there"
        os.close(fd)
        ino = (top / "made").stat().st_ino
        timed(registry).names.link(ino, ROOT_INO, "linked")
        with pytest.raises(FileExistsError):
            os.open(top / "linked", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)

        gone = top / "gone"
        gone.write_bytes(b"first")
        local_mount.sync()
        assert gone.stat().st_size == 5
        record = registry.artifacts.by_key("gone")
        assert record is not None
        timed(registry).names.trash(record.uid)
        gone.write_bytes(b"second")
        wait_until(gone.exists, "the file is there")
        assert gone.read_bytes() == b"second"
    local_mount.sync()
    assert gone.read_bytes() == b"second"
    assert local_mount.info("gone")["uid"] != record.uid


def test_a_mount_that_has_lost_the_lease_leaves_storage_alone(local_mount: MountedInstance) -> None:
    """A machine that slept for days: another one works with the instance, and its registry must not be written over."""
    (local_mount.path / "f").write_bytes(b"one")
    local_mount.sync()
    root, name = Path(local_mount.storage.root), local_mount.directory.name
    lock, snapshot = root / ".lamindb/_exclusion" / name, root / f"{name}.lndb"
    lock.write_text(json.dumps(json.loads(lock.read_bytes()) | {"machine": "another", "host": "elsewhere"}))
    snapshot.write_bytes(b"the other machine's registry")
    local_mount.expect_log(r"has lost the lock of .* \(testuser1 on elsewhere has it now\)")
    local_mount.fusermount()
    assert snapshot.read_bytes() == b"the other machine's registry"
    assert "has lost the lock" in local_mount.log()


def test_fsync_of_a_file_that_is_deleted_meanwhile_comes_to_an_end(local_mount: MountedInstance) -> None:
    """Nothing is owed any more, so nobody would ever say that it is stored."""
    folder = local_mount.path / "d"
    folder.mkdir()
    for number in range(60):
        path = folder / f"{number}"
        descriptors = [os.open(path, os.O_CREAT | os.O_RDWR), os.open(folder, os.O_RDONLY)]
        os.write(descriptors[0], b"x" * 100)
        threads = [threading.Thread(target=os.fsync, args=(fd,), daemon=True) for fd in descriptors]
        for thread in threads:
            thread.start()
        os.unlink(path)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), f"the fsync of file {number} hangs"
        for fd in descriptors:
            os.close(fd)
