"""``lamfs umount``: it says what it waits for and how to give up, and with ``--force`` the daemon ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import ROOT, MountedInstance, children, is_alive, wait_until

pytestmark = pytest.mark.usefixtures("fuse")

FEW_SECONDS = 15.0
"""In which a daemon that is forced to end has ended, on a machine that is busy."""


def status(instance: MountedInstance) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(instance.cli("status", "--json").stdout)
    return found


@contextlib.contextmanager
def umount(instance: MountedInstance, *words: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """``lamfs umount`` under way, and the file with what it says on stderr."""
    said = instance.base / "said"
    command = [sys.executable, "-m", "lamfs", "umount", *words, str(instance.path)]
    with said.open("w") as stderr, subprocess.Popen(command, env=instance.env, cwd="/", stderr=stderr, text=True) as p:
        try:
            yield p, said
        finally:
            if p.poll() is None:
                p.kill()


@contextlib.contextmanager
def container(instance: MountedInstance) -> Iterator[int]:
    """A process in a mount namespace of its own, which has a copy of the mount; its pid."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, and unshare(1)")
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 600"]
    with subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def test_who_has_the_mount_in_another_namespace_is_named(local_mount: MountedInstance) -> None:
    (local_mount.path / "a").write_text("a")
    pid = local_mount.pid
    with container(local_mount) as holder:
        with umount(local_mount) as (process, said):
            wait_until(lambda: "another mount namespace" in said.read_text(), "it says why it waits", seconds=40)
            text = said.read_text()
            assert f"sleep (pid {holder}: {local_mount.path})" in text
            assert f"nsenter -t {holder} -m umount {local_mount.path}" in text
            assert f"'lamfs umount --force {local_mount.path}' ends the daemon" in text
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        assert not local_mount.mounted
        assert is_alive(pid)
        assert "unmounted from" in local_mount.cli("status").stdout
        again = local_mount.cli("umount", "--timeout", "1", str(local_mount.path), check=False)
        assert again.returncode == 1
        assert f"sleep (pid {holder}" in again.stderr
        forced = local_mount.cli("umount", "--force", "--timeout", "5", str(local_mount.path))
        assert f"has left the tree already, but its daemon (pid {pid}) lives on" in forced.stderr
        assert not is_alive(pid)
    assert status(local_mount)["mounts"] == status(local_mount)["dead"] == []
    assert local_mount.cli("ls").stdout == "a\n"
    assert local_mount.fsck() == []


def test_force_ends_the_daemon_that_a_container_keeps_and_leaves_a_new_mount_alone(
    local_mount: MountedInstance,
) -> None:
    first = local_mount.pid
    with container(local_mount):
        with umount(local_mount) as (process, said):
            wait_until(lambda: "another mount namespace" in said.read_text(), "it says why it waits", seconds=40)
            local_mount.mount()
            assert is_alive(first)
            os.kill(first, signal.SIGTERM)
            assert process.wait(60) == 0
        assert not is_alive(first)
        assert local_mount.mounted
        (local_mount.path / "b").write_text("b")
        with container(local_mount):
            forced = local_mount.cli("umount", "--force", "--timeout", "5", str(local_mount.path))
            assert "is unmounted" in forced.stdout
            assert not is_alive(local_mount.pid)
    assert local_mount.cli("ls").stdout == "b\n"


def test_an_open_file_of_a_mount_that_has_left_the_tree_is_named(local_mount: MountedInstance) -> None:
    pid = local_mount.pid
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; f = open('held', 'w'); print(flush=True); sys.stdin.read()"],
        cwd=local_mount.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        subprocess.run(["fusermount3", "-uz", str(local_mount.path)], check=True, timeout=10)
        done = local_mount.cli("umount", "--timeout", "1", str(local_mount.path), check=False)
        assert done.returncode == 1
        assert f"(pid {process.pid}: " in done.stderr
        assert "still uses a file of the mount" in done.stderr
        assert is_alive(pid)
        with umount(local_mount) as (waiting, said):
            wait_until(lambda: "still uses" in said.read_text(), "it says why it waits", seconds=40)
            process.stdin.close()
            assert waiting.wait(60) == 0
    assert not is_alive(pid)


# -- storage that refuses ---------------------------------------------------------------------------------------------


@pytest.fixture
def linked(local_instance: MountedInstance) -> MountedInstance:
    """A mount that owes the move of a real key, whose folder in storage is a link by now."""
    instance = local_instance
    instance.expect_log("could not", "told to end now", "refuses this for good", "still to be stored", "does not end")
    instance.mount(["real_keys"])
    (instance.path / "keys").mkdir()
    (instance.path / "keys" / "a.csv").write_text("precious")
    instance.sync()
    keys = Path(instance.storage.root) / "keys"
    keys.rename(instance.base / "elsewhere")
    keys.symlink_to(instance.base / "elsewhere")
    (instance.path / "keys" / "a.csv").rename(instance.path / "keys" / "b.csv")
    return instance


def test_a_move_that_storage_refuses_for_good_keeps_no_daemon(linked: MountedInstance) -> None:
    pid = linked.pid
    done = linked.cli("umount", str(linked.path))
    assert "Storage refuses for good: move " in done.stderr
    assert "left in the journal, and tried again by the next mount; no bytes are lost" in done.stderr
    assert not is_alive(pid)
    assert not linked.mounted
    assert "1 move, 1 delete; the next mount does it" in linked.cli("status").stdout
    # Once storage is right again, the next mount does it.
    keys = Path(linked.storage.root) / "keys"
    keys.unlink()
    (linked.base / "elsewhere").rename(keys)
    linked.mount(["real_keys"])
    linked.sync()
    assert (keys / "b.csv").read_text() == "precious"
    assert (linked.path / "keys" / "b.csv").read_text() == "precious"
    linked.umount()
    assert linked.fsck() == []


def test_forced_with_a_move_that_storage_refuses_it_ends_soon(linked: MountedInstance) -> None:
    pid = linked.pid
    movers = children(pid)
    began = time.monotonic()
    linked.cli("umount", "--force", "--timeout", "2", str(linked.path))
    assert not is_alive(pid)
    assert not any(map(is_alive, movers))
    assert time.monotonic() - began < 2 + FEW_SECONDS
    assert "1 move, 1 delete; the next mount does it" in linked.cli("status").stdout


def test_a_deletion_that_is_refused_holds_up_no_other(local_instance: MountedInstance) -> None:
    """Many are deleted in one request: those that fail together are tried one by one."""
    instance = local_instance
    instance.expect_log("could not", "refuses this for good", "still to be stored")
    instance.python(
        "import sys\n"
        "from pathlib import Path\n"
        "from lamfs.registry import Registry\n"
        "registry = Registry(Path(sys.argv[1]))\n"
        "for key in ['good/0', 'bad/1', 'good/2', 'bad/3', 'good/4']:\n"
        "    registry.journal.add_delete(key, now=1)\n"
        "registry.close()\n",
        str(instance.directory / "registry.lndb"),
    )
    hook = instance.base / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "from lamfs.mover.client import Mover\n"
        "from lamfs.errors import StorageForbidden\n"
        "async def delete(self, meant):\n"
        "    if any('bad' in key for key in meant):\n"
        "        raise StorageForbidden('These credentials may not delete there.')\n"
        "    return []\n"
        "Mover.delete = delete\n"
    )
    instance.mount(env={"PYTHONPATH": f"{hook}:{ROOT}"})
    pid = instance.pid
    done = instance.cli("umount", str(instance.path))
    assert not is_alive(pid)
    refused = [line for line in done.stderr.splitlines() if line.startswith("Storage refuses for good: ")]
    assert sorted(refused) == [
        f"Storage refuses for good: delete bad/{number}: These credentials may not delete there." for number in (1, 3)
    ]
    with instance.registry() as registry:
        assert [entry.object_key for entry in registry.journal.entries()] == ["bad/1", "bad/3"]


REFUSING = (
    "from lamfs.work.steps import Steps\n"
    "from lamfs.errors import StorageError\n"
    "async def put(self, entry, upload):\n"
    "    raise StorageError('The server takes no file of this size.')\n"
    "Steps.put = put\n"
)


@pytest.fixture
def refusing(local_instance: MountedInstance) -> MountedInstance:
    """A mount whose storage takes no file, and one file that is closed."""
    instance = local_instance
    instance.expect_log("could not", "told to end now", "still to be stored")
    hook = instance.base / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(REFUSING)
    instance.mount(env={"PYTHONPATH": f"{hook}:{ROOT}"})
    (instance.path / "a.bin").write_bytes(bytes(2048))
    return instance


def test_a_file_that_storage_refuses_is_said_with_the_way_out(refusing: MountedInstance) -> None:
    instance = refusing
    with umount(instance) as (process, said):
        wait_until(lambda: "Still to store: 1 put (2.0 KiB)" in said.read_text(), "it says what is left", seconds=40)
        wait_until(lambda: "takes no file of this size" in said.read_text(), "it says why", seconds=40)
        text = said.read_text()
        assert "put a.bin: The server takes no file of this size. Trying again." in text
        assert f"'lamfs umount --force {instance.path}' leaves them in the spool: nothing is lost" in text
        assert process.poll() is None, "bytes that are nowhere else keep it"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert instance.mounted
    pid = instance.pid
    forced = instance.cli("umount", "--force", "--timeout", "1", str(instance.path))
    assert "waits in the spool: nothing is lost, and the next mount stores it" in forced.stderr
    assert not is_alive(pid)
    assert not instance.mounted
    instance.mount()
    instance.sync()
    assert (instance.path / "a.bin").read_bytes() == bytes(2048)
    instance.umount()
    assert instance.fsck() == []


@pytest.mark.parametrize("stopped", ["daemon", "mover", "both"])
def test_force_ends_what_does_not_answer(local_mount: MountedInstance, stopped: str) -> None:
    instance = local_mount
    instance.expect_log("told to end now", "does not end", "could not", "ended")
    (instance.path / "stored").write_text("stored")
    instance.sync()
    pid, movers = instance.pid, children(instance.pid)
    targets = {"daemon": [pid], "mover": movers, "both": [pid, *movers]}[stopped]
    for target in movers if stopped != "daemon" else ():
        os.kill(target, signal.SIGSTOP)
    (instance.path / "owed").write_text("owed")
    for target in targets:
        os.kill(target, signal.SIGSTOP)
    began = time.monotonic()
    done = instance.cli("umount", "--force", "--timeout", "2", str(instance.path))
    assert time.monotonic() - began < 2 + FEW_SECONDS + 5
    assert not instance.mounted
    assert not is_alive(pid)
    assert not any(map(is_alive, movers))
    assert ("was killed" in done.stderr) == (stopped != "mover")
    assert status(instance)["dead"] == []
    instance.mount()
    assert {path.name: path.read_text() for path in instance.path.iterdir()} == {"stored": "stored", "owed": "owed"}
