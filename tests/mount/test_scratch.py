"""Scratch names: normal files to programs, and no artifacts until they are renamed to another name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from lamfs.model import ROOT_INO
from lamfs.registry import Registry
from tests.support.mounts import MountedInstance, outcome, wait_until

NAMES = [".x.swp", ".x.csv.swo", ".#x", ".~lock.x.ods#", ".DS_Store", "._x", ".nfs000123"]


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
    each_mount.sync()
    below = f"{each_dir.name}/"
    assert {key for key in artifacts(each_mount) if key.startswith(below)} == {f"{below}kept"}
    assert each_mount.status()["owed"] == {}
    for _ in range(2):
        for name in NAMES:
            assert (each_dir / name).read_bytes() == name.encode() + b" and more"
        assert each_mount.fsck() == []
        each_mount.remount(empty_cache=True)
    for name in NAMES:
        os.unlink(each_dir / name)
    assert each_mount.spooled() == []
    each_mount.sync()
    assert {key for key in artifacts(each_mount) if key.startswith(below)} == {f"{below}kept"}


def test_a_rename_off_the_list_makes_an_artifact(each_mount: MountedInstance, each_dir: Path) -> None:
    below = f"{each_dir.name}/"
    (each_dir / "._a").write_bytes(b"a")
    (each_dir / "._d").mkdir()
    (each_dir / "._d/._b").write_bytes(b"b")
    (each_dir / ".c.swp").write_bytes(b"c")
    each_mount.remount()
    os.rename(each_dir / "._a", each_dir / "a")
    os.rename(each_dir / "._d", each_dir / "d")
    os.rename(each_dir / "d/._b", each_dir / "d/b")
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
    os.rename(each_dir / "x", each_dir / "._x")
    (each_dir / "._x").write_bytes(b"precious, changed")
    assert each_mount.stored_info(f"{each_dir.name}/._x")["uid"] == uid
    each_mount.remount(empty_cache=True)
    assert (each_dir / "._x").read_bytes() == b"precious, changed"


@pytest.mark.parametrize("stored", [False, True])
def test_what_kill_9_leaves_of_a_scratch_file(local_mount: MountedInstance, stored: bool) -> None:
    path = local_mount.path / ".x.swp"
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
    for name in ("._x", "y.tmp", "z.tmp"):
        (local_mount.path / name).write_bytes(name.encode())
        if name == "y.tmp":
            local_mount.sync()
    assert "y.tmp" in artifacts(local_mount)
    assert "._x" not in artifacts(local_mount)
    local_mount.cli("scratch", "--add", "*.tmp", "--remove", "._*")
    local_mount.remount()
    (local_mount.path / "new.tmp").write_bytes(b"new")
    local_mount.sync()
    assert artifacts(local_mount) == {"._x", "y.tmp", "z.tmp"}
    local_mount.remount(empty_cache=True)
    assert {path.name: path.read_bytes() for path in local_mount.path.iterdir()} == {
        "._x": b"._x", "y.tmp": b"y.tmp", "z.tmp": b"z.tmp", "new.tmp": b"new"
    }  # fmt: skip
    assert local_mount.fsck() == []


def test_names_that_people_give_are_artifacts(each_mount: MountedInstance, each_dir: Path) -> None:
    """A backup, a chunk of an array by vim's number, whatever is in a directory with an odd name."""
    names = ["x~", "4913", "c/4913/0", "gene~/a", ".Trash-1000/b", "._d/c", ".x.swp.d/d"]
    for name in names:
        (each_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (each_dir / name).write_bytes(name.encode())
    each_mount.sync()
    below = f"{each_dir.name}/"
    assert {key for key in artifacts(each_mount) if key.startswith(below)} == {below + name for name in names}
    each_mount.remount(empty_cache=True)
    assert [(each_dir / name).read_bytes() for name in names] == [name.encode() for name in names]


def test_an_empty_probe_waits_to_be_stored(each_mount: MountedInstance, each_dir: Path) -> None:
    """vim removes it at once, and nothing of it goes to the trash; one that stays is stored as any file."""
    probe = each_dir / "4913"
    probe.touch()
    (each_dir / "after").touch()
    with each_mount.registry() as registry:
        wait_until(lambda: registry.artifacts.by_key(f"{each_dir.name}/after"), "the file after it is stored")
        assert registry.artifacts.by_key(f"{each_dir.name}/4913") is None
    probe.unlink()
    each_mount.sync()
    assert f"{each_dir.name}/4913" not in artifacts(each_mount)
    probe.touch()
    each_mount.sync()
    assert f"{each_dir.name}/4913" in artifacts(each_mount)


def test_scratch_files_with_bytes_are_named(local_mount: MountedInstance) -> None:
    assert "scratch" not in local_mount.cli("status").stdout
    (local_mount.path / ".x.swp").write_bytes(b"12345")
    (local_mount.path / "._empty").touch()
    assert "on this machine only, 5 B: .x.swp" in local_mount.cli("status").stdout
    left = local_mount.cli("umount", local_mount.path)
    assert "'.x.swp' is on this machine only, with 5 bytes" in left.stderr
    assert "._empty" not in left.stderr
    assert "on this machine only, 5 B: .x.swp" in local_mount.cli("status").stdout
    local_mount.mount()  # which takes over a file, but no work: the mount before has ended in good order
    assert (local_mount.path / ".x.swp").read_bytes() == b"12345"
    assert "taking over" not in (local_mount.directory / "mount.log").read_text()
    local_mount.cli("umount", local_mount.path)
    assert "'.x.swp' is on this machine only, with 5 bytes" in local_mount.cli("close").stdout


def test_another_machine_keeps_the_names_and_their_bytes_come_back(local_mount: MountedInstance) -> None:
    (local_mount.path / "c/4913").mkdir(parents=True)
    (local_mount.path / "c/4913/0").write_bytes(b"a chunk")
    (local_mount.path / "._x").write_bytes(b"only here")
    local_mount.cli("umount", local_mount.path)
    local_mount.cli("close")
    elsewhere = {
        **local_mount.env,
        **{name: f"{local_mount.env[name]}2" for name in ("LAMFS_CONFIG_DIR", "LAMFS_DATA_DIR", "LAMFS_CACHE_DIR")},
    }
    another = local_mount.base / "another"
    another.write_bytes(b"from elsewhere")
    local_mount.cli("connect", local_mount.storage.root, env=elsewhere)
    local_mount.cli("save", another, "--key", "another", env=elsewhere)
    with contextlib.closing(
        Registry(Path(elsewhere["LAMFS_DATA_DIR"]) / local_mount.directory.name / "registry.lndb")
    ) as seen:
        assert seen.tree.lookup(ROOT_INO, "._x") is not None
        assert seen.artifacts.by_key("c/4913/0") is not None
    local_mount.cli("close", env=elsewhere)
    local_mount.cli("connect", local_mount.slug)
    local_mount.mount()
    names = ("another", "c/4913/0", "._x")
    assert [(local_mount.path / name).read_bytes() for name in names] == [b"from elsewhere", b"a chunk", b"only here"]
