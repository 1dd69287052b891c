"""Scratch names: normal files to programs, and no artifacts until they are renamed to another name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance, outcome

NAMES = [
    ".x.swp", ".x.csv.swo", "4913", "x~", ".#x", ".~lock.x.ods#", ".DS_Store", "._x", ".nfs000123", ".Trash-1000",
]  # fmt: skip


def artifacts(mounted: MountedInstance) -> set[str]:
    """Keys of all artifacts, trash included."""
    with mounted.registry() as registry:
        return {record.key or record.uid for record in registry.artifacts.filter(visibility=None)}


def test_scratch_files_are_files_and_no_artifacts(each_mount: MountedInstance, each_dir: Path) -> None:
    for name in NAMES:
        (each_dir / name).write_bytes(name.encode())
        with open(each_dir / name, "ab") as file:
            file.write(b" and more")
            os.fsync(file.fileno())
    (each_dir / "kept").write_bytes(b"an artifact")
    directory = each_dir / ".Trash-0/files"
    directory.mkdir(parents=True)
    (directory / "thrown away").write_bytes(b"below")
    each_mount.sync()
    below = f"{each_dir.name}/"
    assert {key for key in artifacts(each_mount) if key.startswith(below)} == {f"{below}kept"}
    assert each_mount.status()["owed"] == {}
    for _ in range(2):
        for name in NAMES:
            assert (each_dir / name).read_bytes() == name.encode() + b" and more"
        assert (directory / "thrown away").read_bytes() == b"below"
        assert each_mount.fsck() == []
        each_mount.remount(empty_cache=True)
    for name in NAMES:
        os.unlink(each_dir / name)
    assert len(each_mount.spooled()) == 1
    each_mount.sync()
    assert {key for key in artifacts(each_mount) if key.startswith(below)} == {f"{below}kept"}


def test_a_rename_off_the_list_makes_an_artifact(each_mount: MountedInstance, each_dir: Path) -> None:
    below = f"{each_dir.name}/"
    (each_dir / "a~").write_bytes(b"a")
    (each_dir / ".Trash-0").mkdir()
    (each_dir / ".Trash-0/b").write_bytes(b"b")
    (each_dir / ".c.swp").write_bytes(b"c")
    each_mount.remount()
    os.rename(each_dir / "a~", each_dir / "a")
    os.rename(each_dir / ".Trash-0", each_dir / "d")
    os.link(each_dir / ".c.swp", each_dir / "c")
    os.unlink(each_dir / ".c.swp")
    each_mount.sync()
    found = {key for key in artifacts(each_mount) if key.startswith(below)}
    assert found == {f"{below}a", f"{below}d/b", f"{below}c"}
    each_mount.remount(empty_cache=True)
    assert [(each_dir / name).read_bytes() for name in ("a", "d/b", "c")] == [b"a", b"b", b"c"]
    assert each_mount.fsck() == []


def test_a_save_through_a_scratch_name_keeps_the_artifact(each_mount: MountedInstance, each_dir: Path) -> None:
    (each_dir / "x").write_bytes(b"old")
    uid = each_mount.stored_info(f"{each_dir.name}/x")["uid"]
    (each_dir / ".x.swx").write_bytes(b"new")
    os.rename(each_dir / ".x.swx", each_dir / "x")
    info = each_mount.stored_info(f"{each_dir.name}/x")
    assert (info["uid"], info["size"]) == (uid, 3)
    assert (each_dir / "x").read_bytes() == b"new"


def test_an_artifact_that_gets_a_scratch_name_is_not_lost(each_mount: MountedInstance, each_dir: Path) -> None:
    """Its bytes are in storage, and stay there."""
    (each_dir / "x").write_bytes(b"precious")
    uid = each_mount.stored_info(f"{each_dir.name}/x")["uid"]
    os.rename(each_dir / "x", each_dir / "x~")
    (each_dir / "x~").write_bytes(b"precious, changed")
    assert each_mount.stored_info(f"{each_dir.name}/x~")["uid"] == uid
    each_mount.remount(empty_cache=True)
    assert (each_dir / "x~").read_bytes() == b"precious, changed"


@pytest.mark.parametrize("stored", [False, True])
def test_what_kill_9_leaves_of_a_scratch_file(local_mount: MountedInstance, stored: bool) -> None:
    path = local_mount.path / "x~"
    if stored:
        path.write_bytes(b"closed")
        local_mount.kill9()
    else:
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"closed")
        local_mount.kill9()
        assert outcome(lambda: os.close(fd)) == "ENOTCONN"
    local_mount.mount()
    assert path.read_bytes() == b"closed"
    local_mount.sync()
    assert artifacts(local_mount) == set()


def test_the_list_counts_from_the_next_mount_on(local_mount: MountedInstance) -> None:
    for name in ("x~", "y.tmp", "z.tmp"):
        (local_mount.path / name).write_bytes(name.encode())
        if name == "y.tmp":
            local_mount.sync()
    assert artifacts(local_mount) == {"y.tmp"}
    local_mount.cli("scratch", "--add", "*.tmp", "--remove", "*~")
    local_mount.remount()
    (local_mount.path / "new.tmp").write_bytes(b"new")
    local_mount.sync()
    assert artifacts(local_mount) == {"x~", "y.tmp", "z.tmp"}
    local_mount.remount(empty_cache=True)
    assert {path.name: path.read_bytes() for path in local_mount.path.iterdir()} == {
        "x~": b"x~", "y.tmp": b"y.tmp", "z.tmp": b"z.tmp", "new.tmp": b"new"
    }  # fmt: skip
    assert local_mount.fsck() == []
