"""A daemon that died: its mount point takes no writes, it is said, and what was written into the folder is moved in."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from lamfs.model import now_ns
from tests.support.mounts import ROOT, MountedInstance, children, is_alive, outcome, wait_until

pytestmark = pytest.mark.usefixtures("fuse")


def status(instance: MountedInstance) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(instance.cli("status", "--json").stdout)
    return found


def test_nothing_can_be_written_where_a_daemon_died(local_mount: MountedInstance) -> None:
    (local_mount.path / "kept").write_text("kept")
    os.kill(local_mount.pid, signal.SIGKILL)  # the daemon alone, as the kernel does when memory is short
    wait_until(lambda: outcome(lambda: os.listdir(local_mount.path)) == "ENOTCONN", "the mount says that it is dead")
    assert outcome(lambda: (local_mount.path / "lost.csv").write_text("x")) == "ENOTCONN"
    wait_until(lambda: not is_alive(local_mount.pid), "the daemon is gone")
    assert local_mount.mounted, "nobody takes the mount away: then the folder below would take what is written"
    assert "had lost its daemon" in local_mount.cli("mount", str(local_mount.path)).stderr
    local_mount.pid = local_mount.record().pid
    assert (local_mount.path / "kept").read_text() == "kept"
    assert os.listdir(local_mount.path) == ["kept"]


def test_a_foreground_daemon_that_is_killed_leaves_a_dead_mount_too(local_instance: MountedInstance) -> None:
    instance = local_instance
    command = [sys.executable, "-m", "lamfs", "mount", "--foreground", str(instance.path)]
    with subprocess.Popen(command, env=instance.env, cwd="/", stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: (instance.path / ".lamfs").exists(), "the mount is there", seconds=60, every=0.1)
        finally:
            process.kill()
    assert outcome(lambda: os.listdir(instance.path)) == "ENOTCONN"
    assert "had lost its daemon" in instance.cli("umount", str(instance.path)).stdout
    assert os.listdir(instance.path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_that_ask_for_the_end_leave_the_empty_folder(
    local_mount: MountedInstance, number: signal.Signals
) -> None:
    (local_mount.path / "a").write_text("a")
    pid = local_mount.pid
    os.kill(pid, number)
    wait_until(lambda: not is_alive(pid), "the daemon has ended", seconds=30)
    assert not local_mount.mounted
    assert os.listdir(local_mount.path) == []
    assert status(local_mount)["dead"] == []
    assert local_mount.cli("ls").stdout == "a\n"


def test_an_unexpected_error_leaves_a_dead_mount(local_instance: MountedInstance) -> None:
    """As a kill does: an empty folder would take what programs go on writing."""
    instance = local_instance
    instance.expect_log("unexpected error", "ended with an unexpected error")
    hook = instance.base / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import lamfs.fs.follow as follow, trio\n"
        "real = follow.Follower.run\n"
        "async def run(self):\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        nursery.start_soon(real, self)\n"
        "        while not __import__('os').path.exists(__file__ + '.fail'):\n"
        "            await trio.sleep(0.05)\n"
        "        raise RuntimeError('a bug')\n"
        "follow.Follower.run = run\n"
    )
    instance.mount(env={"PYTHONPATH": f"{hook}:{ROOT}"})
    pid = instance.pid
    (hook / "sitecustomize.py.fail").touch()
    wait_until(lambda: not is_alive(pid), "the daemon has ended", seconds=30)
    assert outcome(lambda: os.listdir(instance.path)) == "ENOTCONN"
    assert [dead["pid"] for dead in status(instance)["dead"]] == [pid]
    instance.cli("umount", str(instance.path))


def test_status_says_that_a_daemon_died_and_when_and_what_is_next(local_mount: MountedInstance) -> None:
    fd = os.open(local_mount.path / "open.csv", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x" * 2048)
    before = now_ns()
    pid = local_mount.pid
    # Its sign of life comes by itself.
    record = local_mount.directory / "mounts" / f"{pid}.json"
    os.utime(record, ns=(1, 1))
    wait_until(lambda: record.stat().st_mtime_ns > 1, "a sign of life", seconds=20)
    assert record.stat().st_mtime_ns >= before - 10**9
    local_mount.kill9(detach=False)
    assert outcome(lambda: os.close(fd)) == "ENOTCONN"
    seen = record.stat().st_mtime_ns
    [dead] = status(local_mount)["dead"]
    assert (dead["pid"], dead["mountpoint"], dead["slug"]) == (pid, str(local_mount.path), local_mount.slug)
    assert abs(datetime.fromisoformat(dead["last_seen"]).timestamp() - seen / 1e9) < 1
    assert dead["in_tree"] is True
    said = local_mount.cli("status").stdout
    assert f"its daemon (pid {pid}, " in said
    assert "DIED; it was last alive at" in said
    assert f"'lamfs mount --instance {local_mount.slug} {local_mount.path}' mounts it again" in said
    assert "1 put; the next mount does it" in said
    told = local_mount.cli("info", str(local_mount.path / "open.csv"), check=False)
    assert told.returncode == 1
    assert f"The mount at {local_mount.path}, in which" in told.stderr
    assert f"has lost its daemon; 'lamfs mount --instance {local_mount.slug} {local_mount.path}'" in told.stderr
    local_mount.cli("umount", str(local_mount.path))
    assert status(local_mount)["dead"] == []
    local_mount.mount()
    assert (local_mount.path / "open.csv").stat().st_size == 2048
    assert "taking over 1 step of storage work" in (local_mount.directory / "mount.log").read_text()


def test_a_dead_mount_that_is_not_in_the_tree_any_more_is_said_and_cleared(local_mount: MountedInstance) -> None:
    """As after a power cut: then the folder is an ordinary one."""
    local_mount.kill9()
    (local_mount.path / "lost.csv").write_text("x")
    said = local_mount.cli("status").stdout
    assert "the folder itself has got 1 entry" in said
    assert f"--adopt {local_mount.path}' mounts it again (and moves these into it)" in said
    assert "nothing is mounted there now" in local_mount.cli("umount", str(local_mount.path)).stdout
    assert status(local_mount)["dead"] == []
    assert local_mount.cli("umount", str(local_mount.path), check=False).returncode == 1
    (local_mount.path / "lost.csv").unlink()


# -- what was written into the folder ---------------------------------------------------------------------------------


def adopt(instance: MountedInstance, **options: Any) -> subprocess.CompletedProcess[str]:
    """``lamfs mount --adopt``."""
    done = instance.cli("mount", "--adopt", str(instance.path), **options)
    instance.pid = instance.record().pid
    return done


def test_files_that_were_written_meanwhile_are_moved_in(mount: MountedInstance) -> None:
    (mount.path / "both.csv").write_text("in the mount")
    (mount.path / "same.csv").write_text("the same")
    (mount.path / "sub").mkdir()
    (mount.path / "file").write_text("a file")
    (mount.path / "link").symlink_to("both.csv")
    mount.sync()
    mount.kill9()
    folder = mount.path
    (folder / "lost.csv").write_text("precious")
    os.chmod(folder / "lost.csv", 0o640)
    os.utime(folder / "lost.csv", ns=(10**18, 10**18 + 7))
    (folder / "both.csv").write_text("in the folder")
    (folder / "same.csv").write_text("the same")
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / "large").write_bytes(os.urandom(5 << 20))
    large = (folder / "sub" / "deep" / "large").read_bytes()
    os.chmod(folder / "sub" / "deep", 0o710)
    os.utime(folder / "sub" / "deep", ns=(10**18, 10**18 + 9))
    (folder / "file").mkdir()
    (folder / "file" / "below").write_text("below")
    (folder / "link").symlink_to("/nowhere")
    (folder / "other").symlink_to("lost.csv")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    refused = mount.cli("mount", str(mount.path), check=False)
    assert refused.returncode == 1
    assert "--adopt" in refused.stderr
    before = {path.name for path in folder.iterdir()}
    hidden = os.open(folder, os.O_RDONLY)
    done = adopt(mount)
    assert "Moved 7 files" in done.stdout
    assert "'pipe' is a named pipe, and stays" in done.stderr
    assert "'socket' is a socket, and stays" in done.stderr
    assert before > set(os.listdir(hidden)) == {"pipe", "socket"}
    assert (folder / "lost.csv").read_text() == "precious"
    info = (folder / "lost.csv").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_mtime_ns) == (0o640, 10**18 + 7)
    assert (folder / "both.csv").read_text() == "in the mount"
    [conflict] = folder.glob("both (conflict *).csv")
    assert conflict.read_text() == "in the folder"
    assert conflict.name in done.stderr
    assert not list(folder.glob("same (*"))
    assert (folder / "sub" / "deep" / "large").read_bytes() == large
    info = (folder / "sub" / "deep").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_mtime_ns) == (0o710, 10**18 + 9)
    assert (folder / "file").read_text() == "a file"
    assert [path.read_text() for path in folder.glob("file (conflict *)/below")] == ["below"]
    assert os.readlink(folder / "link") == "both.csv"
    assert [os.readlink(path) for path in folder.glob("link (conflict *)")] == ["/nowhere"]
    assert os.readlink(folder / "other") == "lost.csv"
    assert mount.info("lost.csv")["pending"] is False, "it is in storage before its source goes"
    assert not [name for name in os.listdir(folder) if name.endswith("lamfs-adopt")]
    for name in ("pipe", "socket"):
        os.unlink(name, dir_fd=hidden)
    os.close(hidden)
    mount.umount()
    assert os.listdir(folder) == []
    assert mount.fsck() == []


def test_a_file_that_is_still_written_stays_and_a_reserved_name_gets_another(local_instance: MountedInstance) -> None:
    instance = local_instance
    folder = instance.path
    (folder / ".lamfs").write_text("reserved")
    (folder / "fine").write_text("fine")
    with (folder / "growing.log").open("w") as log:
        log.write("one\n")
        log.flush()
        hidden = os.open(folder, os.O_RDONLY)
        done = adopt(instance, check=False)
        assert done.returncode == 1
        assert "'growing.log' could not be moved: a program has it open for writing" in done.stderr
        [reserved] = folder.glob(".lamfs (conflict *)")
        assert reserved.read_text() == "reserved"
        assert "hidden by the mount. Nothing is lost" in done.stderr
        assert os.listdir(hidden) == ["growing.log"]
        os.close(hidden)
        assert (folder / "fine").read_text() == "fine"
        instance.umount()
    adopt(instance)
    assert (folder / "growing.log").read_text() == "one\n"


def test_when_storage_takes_nothing_the_files_stay(local_instance: MountedInstance) -> None:
    instance = local_instance
    instance.expect_log("could not", "fsync: The disk is full of sand")
    for number in range(30):
        (instance.path / f"f{number:02}").write_text(f"{number}")
    hidden = os.open(instance.path, os.O_RDONLY)
    hook = instance.base / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "from lamfs.work.steps import Steps\n"
        "from lamfs.errors import StorageUnavailable\n"
        "async def put(self, entry, upload):\n"
        "    raise StorageUnavailable('The disk is full of sand.')\n"
        "Steps.put = put\n"
    )
    done = adopt(instance, check=False, env={"PYTHONPATH": f"{hook}:{ROOT}"})
    assert done.returncode == 1
    assert "could not be moved: storage does not take it" in done.stderr
    assert "30 in all. Nothing is lost" in done.stderr
    assert len(os.listdir(hidden)) == 30
    os.close(hidden)
    instance.kill9()
    adopt(instance)
    assert {path.name: path.read_text() for path in instance.path.iterdir()} == {f"f{n:02}": str(n) for n in range(30)}
    instance.umount()
    assert os.listdir(instance.path) == []


def test_adopt_goes_with_neither_read_only_nor_foreground(local_instance: MountedInstance) -> None:
    for words in (["--read-only"], ["-o", "ro"], ["--foreground"]):
        done = local_instance.cli("mount", "--adopt", *words, str(local_instance.path), check=False)
        assert done.returncode == 2
        assert "--adopt does not go with" in done.stderr
        assert not local_instance.mounted


@pytest.mark.parametrize("round", range(3))
def test_a_command_that_is_killed_while_it_moves_loses_nothing(local_instance: MountedInstance, round: int) -> None:
    instance = local_instance
    instance.expect_log("")
    wanted = {}
    for number in range(120):
        path = instance.path / f"d{number % 5}" / f"f{number}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(20_000 + number))
        wanted[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    hidden = os.open(instance.path, os.O_RDONLY)
    command = [sys.executable, "-m", "lamfs", "mount", "--adopt", str(instance.path)]
    with subprocess.Popen(
        command, env=instance.env, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as p:

        def begun() -> bool:
            left = sum(len(os.listdir(f"/proc/self/fd/{hidden}/d{n}")) for n in range(5) if _there(hidden, f"d{n}"))
            return left <= 120 - 10 * (round + 1)

        wait_until(begun, "some are moved", seconds=60, every=0.002)
        p.kill()
    os.close(hidden)
    instance.pid = instance.record().pid
    if round == 2:
        instance.kill9()
    else:
        instance.umount()
    adopt(instance)
    found = {str(path.relative_to(instance.path)): path.read_bytes() for path in instance.path.rglob("*.bin")}
    assert found == wanted
    instance.umount()
    assert os.listdir(instance.path) == []
    assert instance.fsck() == []


def _there(folder: int, name: str) -> bool:
    return Path(f"/proc/self/fd/{folder}/{name}").is_dir()


def test_killing_the_daemon_while_files_move_in_loses_nothing(local_instance: MountedInstance) -> None:
    instance = local_instance
    instance.expect_log("")
    wanted = {}
    for number in range(200):
        path = instance.path / f"f{number}.bin"
        path.write_bytes(os.urandom(30_000 + number))
        wanted[path.name] = path.read_bytes()
    hidden = os.open(instance.path, os.O_RDONLY)
    command = [sys.executable, "-m", "lamfs", "mount", "--adopt", str(instance.path)]
    with subprocess.Popen(command, env=instance.env, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as p:
        wait_until(lambda: len(os.listdir(hidden)) < 170, "some are moved", seconds=60, every=0.002)
        instance.pid = instance.record().pid
        movers = children(instance.pid)
        os.kill(instance.pid, signal.SIGKILL)
        _, said = p.communicate(timeout=60)
    wait_until(lambda: not any(map(is_alive, movers)), "the moving process has ended")
    assert p.returncode == 1
    assert b"Nothing is lost" in said
    os.close(hidden)
    adopt(instance)
    found = {path.name: path.read_bytes() for path in instance.path.glob("*.bin")}
    assert {name: found.get(name) for name in wanted} == wanted
    instance.umount()
    assert os.listdir(instance.path) == []
