"""``lamfs mount``, ``umount``, ``sync`` and ``status`` on real mounts, and paths in mounts as names of artifacts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, is_alive, outcome, wait_until
from tests.support.servers import Server

pytestmark = pytest.mark.usefixtures("fuse")


@pytest.fixture
def held(local_mount: MountedInstance) -> Iterator[subprocess.Popen[str]]:
    """A process whose working directory is the mount."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        cwd=local_mount.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.communicate("")


def status(instance: MountedInstance) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(instance.cli("status", "--json").stdout)
    return found


def test_a_mount_without_the_working_copy_says_how_to_get_it(instance: MountedInstance) -> None:
    instance.cli("close")
    shutil.rmtree(instance.directory)
    refused = instance.cli("mount", "--instance", instance.slug, str(instance.path), check=False)
    assert refused.returncode == 1
    assert f"run 'lamfs connect {instance.slug}'" in refused.stderr
    instance.cli("connect", instance.slug)
    instance.mount()


def test_mount_says_where_and_how_to_unmount(instance: MountedInstance) -> None:
    said = instance.cli("mount", str(instance.path)).stdout
    pid = instance.record().pid
    assert said.splitlines() == [
        f"{instance.slug} is mounted at {instance.path} (pid {pid}).",
        f"Unmount it with: lamfs umount {instance.path}",
    ]
    again = instance.cli("mount", str(instance.path), check=False)
    assert again.returncode == 1
    assert again.stderr == f"lamfs: {instance.slug} is mounted at {instance.path} already (pid {pid}).\n"
    assert instance.cli("umount", str(instance.path)).stdout == f"{instance.path} is unmounted.\n"
    assert not instance.mounted
    assert not is_alive(pid)
    gone = instance.cli("umount", str(instance.path), check=False)
    assert gone.returncode == 1
    assert "Nothing is mounted" in gone.stderr


def test_mount_for_who_has_closed_its_descriptors_and_names_its_folders_from_where_it_is(
    local_instance: MountedInstance,
) -> None:
    instance = local_instance
    folders = {f"LAMFS_{name}_DIR": name.lower() for name in ("CONFIG", "DATA", "CACHE")}
    command = f"exec {sys.executable} -m lamfs mount mnt <&- >&- 2>&-"
    subprocess.run(["bash", "-c", command], cwd=instance.base, env=instance.env | folders, timeout=60, check=True)
    instance.pid = instance.record().pid
    assert instance.record().socket.startswith(str(instance.data_dir))
    assert [os.readlink(f"/proc/{instance.pid}/fd/{number}") for number in (0, 1, 2)] == [
        "/dev/null",
        "/dev/null",
        str(instance.directory / "mount.log"),
    ]


def test_ctrl_c_before_the_mount_is_there_is_no_error(local_instance: MountedInstance) -> None:
    said = local_instance.python(
        "import sys\n"
        "from unittest import mock\n"
        "from lamfs.cli import main\n"
        "with mock.patch('lamfs.daemon.first.FirstMover.begin', side_effect=KeyboardInterrupt):\n"
        "    try:\n"
        "        main(['mount', '--foreground', sys.argv[1]])\n"
        "    except SystemExit as end:\n"
        "        print(end.code)\n",
        str(local_instance.path),
    )
    assert said == "130\n"


def test_without_an_instance_the_default_one_is_made(tmp_path: Path) -> None:
    with MountedInstance(name="unused") as instance:
        env = {
            "LAMFS_CONFIG_DIR": str(instance.base / "config2"),
            "USER": "somebody",
            "LOGNAME": "somebody",
        }
        said = instance.cli("mount", str(instance.path / "new" / "place"), env=env).stdout
        try:
            storage = instance.data_dir / "storage"
            assert said.startswith(
                f"There was no instance yet: made somebody/default, with its storage in {storage}.\n"
            )
            place = instance.path / "new" / "place"
            (place / "a.txt").write_text("a")
            assert instance.cli("info", str(place / "a.txt"), env=env).stdout.startswith("uid ")
        finally:
            instance.cli("umount", str(instance.path / "new" / "place"), env=env)
        again = instance.cli("mount", str(instance.path / "new" / "place"), env=env).stdout
        assert again.startswith("somebody/default is mounted at")
        instance.cli("umount", str(instance.path / "new" / "place"), env=env)


@pytest.mark.parametrize("what", ["a file in it", "a file", "inside a mount"])
def test_a_place_that_is_not_free_is_refused(instance: MountedInstance, what: str) -> None:
    place = instance.base / "place"
    if what == "a file":
        place.touch()
        said = "not a directory"
    elif what == "a file in it":
        place.mkdir()
        (place / "file").touch()
        said = "not empty"
    else:
        instance.mount()
        place = instance.path / "inner"
        said = "inside the lamfs mount"
    done = instance.cli("mount", str(place), check=False)
    assert done.returncode == 1
    assert said in done.stderr


def test_read_only_and_words_reach_the_daemon(instance: MountedInstance) -> None:
    said = instance.cli("mount", "--read-only", "-o", "umask=077,noatime", "-o", "uploads=2", str(instance.path)).stdout
    assert " read-only (pid " in said
    mount = status(instance)["mounts"][0]
    assert mount["read_only"] is True
    with pytest.raises(OSError, match="Read-only"):
        (instance.path / "x").touch()
    assert instance.path.stat().st_mode & 0o077 == 0
    assert "read-only" in instance.cli("status").stdout
    instance.cli("umount", str(instance.path))


def test_in_the_foreground_it_ends_with_the_mount(instance: MountedInstance) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lamfs", "mount", "--foreground", str(instance.path)],
        env=instance.env,
        cwd="/",
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: status(instance)["mounts"], "the mount answers", seconds=30, every=0.2)
        assert status(instance)["mounts"][0]["pid"] == process.pid
        (instance.path / "a").write_text("a")
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, log
    assert "mounted" in log
    assert not instance.mounted
    assert instance.cli("ls").stdout == "a\n"


def test_what_is_in_the_mount_is_named_by_its_path(mount: MountedInstance) -> None:
    folder = mount.path / "sub"
    folder.mkdir()
    (folder / "a.csv").write_text("1,2\n")
    mount.cli("sync", str(folder))
    path = str(folder / "a.csv")
    uid = json.loads(mount.cli("info", path, "--json").stdout)["uid"]
    assert (
        mount.run([sys.executable, "-m", "lamfs", "info", "a.csv"], cwd="sub").stdout.splitlines()[0].split()[1] == uid
    )
    assert mount.cli("ls", str(mount.path)).stdout == mount.cli("ls", str(folder)).stdout == "sub/a.csv\n"
    cached = mount.cli("cache", path).stdout.strip()
    assert Path(cached).read_text() == "1,2\n"
    (mount.base / "b.csv").write_text("3,4\n")
    mount.cli("replace", path, str(mount.base / "b.csv"))
    wait_until(lambda: (folder / "a.csv").read_text() == "3,4\n", "the mount shows what was replaced")
    mount.cli("delete", path)
    wait_until(lambda: not (folder / "a.csv").exists(), "the mount shows what was deleted")
    mount.cli("restore", path)
    wait_until(lambda: (folder / "a.csv").exists(), "the mount shows what was restored")
    assert (folder / "a.csv").read_text() == "3,4\n"
    mount.cli("save", str(mount.base / "b.csv"), "--key", "saved/b.csv")
    wait_until(lambda: (mount.path / "saved" / "b.csv").exists(), "the mount shows what was saved")
    assert mount.fsck() == []


def test_a_path_in_a_mount_decides_the_instance(local_mount: MountedInstance) -> None:
    (local_mount.path / "a.csv").write_text("1")
    local_mount.cli("init", "--storage", str(local_mount.base / "other"), "--name", "other")
    local_mount.cli("sync")
    assert local_mount.cli("ls").stdout == ""
    assert local_mount.cli("ls", str(local_mount.path)).stdout == "a.csv\n"
    assert "a.csv" in local_mount.cli("info", str(local_mount.path / "a.csv")).stdout


def test_a_mount_that_is_in_use_stays_and_says_by_whom(
    local_mount: MountedInstance, held: subprocess.Popen[str]
) -> None:
    done = local_mount.cli("umount", str(local_mount.path), check=False)
    assert done.returncode == 1
    assert f"(pid {held.pid}: {local_mount.path})" in done.stderr
    assert "--force" in done.stderr
    assert local_mount.mounted


def test_force_unmounts_what_is_in_use(local_mount: MountedInstance, held: subprocess.Popen[str]) -> None:
    """And the daemon ends, although the process goes on."""
    pid = local_mount.pid
    done = local_mount.cli("umount", "--force", str(local_mount.path))
    assert not local_mount.mounted
    assert f"(pid {held.pid}: {local_mount.path})" in done.stderr
    assert not is_alive(pid)
    assert outcome(lambda: os.listdir(f"/proc/{held.pid}/cwd")) == "ENOTCONN"


def test_unmounting_from_inside_works(local_mount: MountedInstance) -> None:
    """The command's own working directory does not keep the mount busy."""
    done = local_mount.run([sys.executable, "-m", "lamfs", "umount", "."], check=False)
    assert done.returncode == 0, done.stderr
    assert not local_mount.mounted


def test_after_kill_9_umount_and_mount_clear_away_what_is_left(instance: MountedInstance) -> None:
    for command in (["umount"], ["umount", "--force"], ["mount"]):
        instance.mount()
        instance.kill9(detach=False)
        assert instance.mounted
        assert status(instance)["mounts"] == []
        assert "No mount is alive" in instance.cli("sync").stdout
        done = instance.cli(*command, str(instance.path))
        assert "had lost its daemon" in done.stdout + done.stderr
        assert instance.mounted == (command == ["mount"])
    assert (instance.path / ".").is_dir()


def test_status_of_a_mount(local_mount: MountedInstance) -> None:
    (local_mount.path / "a").write_bytes(b"x" * 1000)
    local_mount.cli("sync")
    found = status(local_mount)
    assert len(found["mounts"]) == 1
    mount = found["mounts"][0]
    assert (mount["slug"], mount["mountpoint"], mount["pid"]) == (
        local_mount.slug,
        str(local_mount.path),
        local_mount.pid,
    )
    assert mount["answers"] is True
    assert mount["owed"] == {}
    assert mount["errors"] == []
    assert found["instances"][0]["mounted"] is True
    lines = local_mount.cli("status").stdout.splitlines()
    assert lines[0].startswith(f"{local_mount.slug} at {local_mount.path} (pid {local_mount.pid}, since ")
    assert "  owed     nothing" in lines


def test_a_mounted_instance_is_neither_closed_nor_deleted(local_mount: MountedInstance) -> None:
    for words in (["close"], ["delete-instance", local_mount.slug, "--force"]):
        done = local_mount.cli(*words, check=False)
        assert done.returncode == 1
        assert f"lamfs umount {local_mount.path}" in done.stderr


def test_storage_that_is_away_keeps_the_mount_unless_forced(s3_mount: MountedInstance, seaweed: Server) -> None:
    """Nothing closed is lost: it waits, is said to wait, and is stored by the next mount."""
    s3_mount.expect_log("could not", "did not answer", "still to be stored", "told to end now")
    seaweed.kill()
    try:
        (s3_mount.path / "a").write_text("precious")
        for words in (["sync", "--timeout", "1"], ["umount", "--timeout", "1"]):
            done = s3_mount.cli(*words, str(s3_mount.path), check=False)
            assert done.returncode == 1
            assert "still owes storage 1 step (8 B)" in done.stderr
            assert s3_mount.mounted
        assert status(s3_mount)["mounts"][0]["owed"] == {"put": 1}
        forced = s3_mount.cli("umount", "--force", "--timeout", "1", str(s3_mount.path))
        assert not s3_mount.mounted
        assert "waits in the spool: nothing is lost" in forced.stderr
        assert not is_alive(s3_mount.pid)
        left = status(s3_mount)["instances"][0]
        assert left["owed"] == {"put": 1}
        assert left["busy"] == []
        assert "1 put (8 B); the next mount does it" in s3_mount.cli("status").stdout
    finally:
        seaweed.restart()
    s3_mount.mount()
    s3_mount.cli("sync")
    assert s3_mount.info("a")["pending"] is False
    assert (s3_mount.path / "a").read_text() == "precious"
