"""Mount points are known from mountinfo alone, and prepared with care."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lamfs import mountinfo
from lamfs.cli import mountpoints
from lamfs.errors import AlreadyExists, InvalidArgument, NotEmpty, NotSetUp
from lamfs.mountinfo import Mounted
from lamfs.ops.mounts import MountRecord

TABLE = (
    b"25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    b"30 25 0:40 / /home/a\\040b/m\\011x rw,nosuid shared:9 master:2 - fuse.lamfs lamfs:a/b rw,user_id=0\n"
    b"31 25 0:41 / /srv/\\303\\274 rw - fuse.sshfs host: rw\n"
    b"32 25 0:42 / /mnt rw - tmpfs tmpfs rw\n"
    b"33 32 0:43 / /mnt rw - fuse.lamfs lamfs:c/d rw\n"
)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Mounted]:
    (tmp_path / "mountinfo").write_bytes(TABLE)
    found = mountinfo.table(str(tmp_path / "mountinfo"))
    monkeypatch.setattr(mountinfo, "table", lambda: found)
    return found


def test_mountinfo_is_read_with_its_escapes_and_optional_fields(table: list[Mounted]) -> None:
    assert [(entry.path, entry.fstype, entry.is_lamfs) for entry in table] == [
        ("/", "ext4", False),
        ("/home/a b/m\tx", "fuse.lamfs", True),
        ("/srv/ü", "fuse.sshfs", False),
        ("/mnt", "tmpfs", False),
        ("/mnt", "fuse.lamfs", True),
    ]


def test_the_topmost_mount_counts(table: list[Mounted]) -> None:
    found = mountinfo.at("/mnt")
    assert found is not None
    assert found.source == "lamfs:c/d"
    assert mountinfo.at("/mnt/x") is None


def test_nothing_is_mounted_inside_a_mount(table: list[Mounted]) -> None:
    with pytest.raises(AlreadyExists, match="inside the lamfs mount"):
        mountpoints.prepare("/home/a b/m\tx/inner")


@pytest.mark.parametrize("variable", ["LAMFS_CONFIG_DIR", "LAMFS_DATA_DIR", "LAMFS_CACHE_DIR"])
def test_nothing_is_mounted_among_the_files_of_lamfs(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "own"))
    for path in (tmp_path / "own", tmp_path / "own" / "deep" / "er"):
        with pytest.raises(InvalidArgument, match="mount elsewhere"):
            mountpoints.prepare(str(path))
    mountpoints.prepare(str(tmp_path / "owner"))


def test_a_place_that_cannot_be_made_is_named(table: list[Mounted]) -> None:
    with pytest.raises(NotSetUp, match=r"The mount point /proc/none/x cannot be made \(No such file or directory\)"):
        mountpoints.prepare("/proc/none/x")


def test_an_empty_path_is_no_mount_point() -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        mountpoints.absolute("")


def record(pid: int, mountpoint: str) -> MountRecord:
    return MountRecord(pid, f"boot:{pid}:1", mountpoint, "a/b", "/socket", pid)


def test_a_daemon_that_lives_on_without_its_mount_is_told_from_the_one_that_is_there(table: list[Mounted]) -> None:
    records = [record(1, "/mnt"), record(2, "/mnt"), record(3, "/left"), record(4, "/srv/ü")]
    assert mountpoints.detached(records) == {1, 3, 4}


def test_the_real_table_has_proc() -> None:
    found = mountinfo.at("/proc")
    assert found is not None
    assert found.fstype == "proc"


def test_symlinks_are_followed_but_not_into_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "last").symlink_to("real/inner")
    assert mountpoints.absolute(f"{tmp_path}/link/m") == f"{tmp_path}/real/m"
    assert mountpoints.absolute(f"{tmp_path}/last") == f"{tmp_path}/real/inner"
    # A link where a mount is said to be stays as it is: it is not looked at.
    monkeypatch.setattr(mountinfo, "table", lambda: [Mounted(f"{tmp_path}/last", "fuse.lamfs", "lamfs:a/b")])
    assert mountpoints.absolute(f"{tmp_path}/last") == f"{tmp_path}/last"
    monkeypatch.chdir(tmp_path / "real")
    assert mountpoints.absolute("../link") == f"{tmp_path}/real"


def test_a_missing_mountpoint_is_made_for_the_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    mountpoints.prepare(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    mountpoints.prepare(str(path))


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotEmpty, match="is not empty"):
        mountpoints.prepare(str(tmp_path))
    assert (tmp_path / "file").exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotSetUp, match="not a directory"):
        mountpoints.prepare(str(tmp_path / "file"))


def test_who_holds_a_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "beside-it").mkdir()
    inside, beside = tmp_path / "in", tmp_path / "in-the-same-prefix"
    inside.mkdir()
    beside.mkdir()
    (inside / "file").touch()
    code = "import sys\nheld = open(sys.argv[1]) if len(sys.argv) > 1 else None\nprint(flush=True)\nsys.stdin.read()"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for words, cwd in (([], inside), ([str(inside / "file")], "/"), ([], beside))
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        found = {holder.pid: holder.path for holder in mountpoints.holders(str(inside))}
        assert found == {started[0].pid: str(inside), started[1].pid: str(inside / "file")}
    finally:
        for process in started:
            process.communicate("")


def test_this_process_is_no_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert os.getpid() not in [holder.pid for holder in mountpoints.holders(str(tmp_path))]


def test_a_missing_fusermount3_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotSetUp, match="install the package fuse3"):
        mountpoints.unmount("/nowhere")
