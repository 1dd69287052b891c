"""Two machines, one instance, real mounts: whoever loses the lease stops writing, and keeps everything he has."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from lamfs.model import StorageConfig, instance_id
from lamfs.storage import open_store
from lamfs.storage.base import ObjectStore
from lamfs.storage.local import LocalStore
from tests.support.mounts import BUCKET, OWNER, ROOT, MountedInstance, checked, children, is_alive, outcome, wait_until
from tests.support.proxy import FaultProxy
from tests.support.servers import Server

pytestmark = pytest.mark.usefixtures("fuse")
LEASES = f"{ROOT}/tests/support/leases:{ROOT}"
SHORT = {"PYTHONPATH": LEASES, "LAMFS_TEST_LEASE": "3:0.5"}

HOLDER = """
import errno, os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
os.write(fd, b"before")
print("open", flush=True)
sys.stdin.readline()
def outcome(call, *args):
    try:
        call(fd, *args)
    except OSError as error:
        return errno.errorcode[error.errno]
print(outcome(os.write, b"after"), outcome(os.fsync))
"""


class Machine(MountedInstance):
    """A machine that knows no instance yet. Its mounts' leases hold 3 s."""

    def __init__(self, storage: StorageConfig, env: dict[str, str]) -> None:
        super().__init__(storage, env={**env, **SHORT})

    def init(self) -> None:
        self.cli("login", OWNER)

    def connect(self) -> None:
        """``lamfs connect``, as soon as the other machine's lease has run out."""
        options = ["--endpoint-url", self.storage.endpoint_url or "", "--path-style", "--region", "us-east-1"]
        words = ["connect", self.storage.root, *(options if self.storage.endpoint_url else [])]
        wait_until(lambda: self.cli(*words, check=False).returncode == 0, "the lock is free", seconds=30, every=0.2)

    def suspend(self) -> None:
        """The laptop's lid is closed: daemon and mover stand still, a moment after the lease was renewed.

        Not in the middle of that: they would keep the storage's own lock (storage/folder.py), and others wait for it.
        """
        with mock.patch.dict(os.environ, self.env), contextlib.closing(open_store(self.storage)) as store:
            before = self._lock_etag(store)
            wait_until(lambda: self._lock_etag(store) != before, "the lease is renewed", seconds=30, every=0.005)
            with store._folder.locked() if isinstance(store, LocalStore) else contextlib.nullcontext():
                self._signal(signal.SIGSTOP)

    def _lock_etag(self, store: ObjectStore) -> str:
        return store.head(f".lamindb/_exclusion/{instance_id(self.slug).hex}").etag

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in (self.pid, *children(self.pid)):
            os.kill(pid, number)

    def saves(self, key: str, text: str) -> None:
        """``lamfs save`` of a file."""
        path = self.base / "file"
        path.write_text(text)
        self.cli("save", "--key", key, str(path))

    def keys(self) -> set[str]:
        """Keys that ``lamfs ls`` shows."""
        return {record["key"] for record in json.loads(self.cli("ls", "--json").stdout)}


@pytest.fixture(params=["local", "s3"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines; the first has made the instance, mounted it once, and stored its registry."""
    env: dict[str, str] = {}
    storage = StorageConfig(str(tmp_path / "store"))
    if request.param == "s3":
        server: Server = request.getfixturevalue("seaweed")
        storage, env = server.config(BUCKET, f"m{os.urandom(4).hex()}/root"), server.env
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(checked(Machine(storage, env))) for _ in range(2))
        MountedInstance.init(one)
        one.mount()
        (one.path / "common.txt").write_text("both know it")
        one.umount()
        yield one, other


def is_lost(machine: Machine) -> bool:
    return "has lost the lock" in machine.status()["notice"]


def test_a_machine_that_slept_stops_writing_and_keeps_what_it_has(two: tuple[Machine, Machine]) -> None:
    one, other = two
    one.mount()
    (one.path / "d").mkdir()
    (one.path / "d" / "mine.txt").write_text("stored, and known to nobody else")
    one.sync()
    stored = one.info("d/mine.txt")
    # Not this process: each child that it starts would close the file, and wait for the daemon that stands still.
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, one.path / "open.txt"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    one.suspend()
    other.connect()
    assert other.keys() == {"common.txt"}
    other.saves("theirs.txt", "of the other machine")
    other.mount()

    one.wake()
    one.expect_log("has lost the lock", "could not .*has lost the lock")
    wait_until(lambda: is_lost(one), "the mount has noticed")
    assert holder.communicate("go on\n", timeout=20)[0] == "EROFS EIO\n"
    assert outcome(lambda: (one.path / "new.txt").write_text("x")) == "EROFS"
    assert outcome(lambda: os.rename(one.path / "common.txt", one.path / "other.txt")) == "EROFS"
    assert (one.path / "d" / "mine.txt").read_text() == "stored, and known to nobody else"
    assert one.status()["read_only"]
    assert "has lost the lock" in one.cli("status").stdout
    # Its commands are stopped as well, also the one that the other machine would feel.
    refused = one.cli("delete", "--permanent", "--yes", "common.txt", check=False)
    assert refused.returncode == 1
    assert "which has it mounted" in refused.stderr
    one.fusermount()
    refused = one.cli("close", check=False)
    assert refused.returncode == 1
    refused = one.cli("mount", str(one.path), check=False)
    assert refused.returncode == 1
    assert "which has it mounted" in refused.stderr
    one.expect_log("which has it mounted")

    assert (other.path / "common.txt").read_text() == "both know it"
    (other.path / "later.txt").write_text("after the take-over")
    other.umount()
    other.cli("close")

    one.expect_log("another machine has taken .* over and gone on", "brought back: 'd/mine.txt'", r"lost\+found")
    other.expect_log(r"lost\+found")  # of a storage folder both have the same spool
    one.mount()
    assert (one.path / "theirs.txt").read_text() == "of the other machine"
    assert (one.path / "later.txt").read_text() == "after the take-over"
    (found,) = (one.path / "lost+found").rglob("mine.txt")
    assert found.read_text() == "stored, and known to nobody else"
    assert one.info(str(found.relative_to(one.path)))["uid"] == stored["uid"]
    told = one.cli("status").stdout
    assert "KEPT" in told
    assert "1 artifact was brought back" in told
    # What was only in the spool is on this machine still, under whatever name.
    places = [one.path / "lost+found", one.base, Path(one.storage.root) / ".lamindb"]
    files = [path for place in places if place.is_dir() for path in place.rglob("*") if path.is_file()]
    assert any(path.stat().st_size == 6 and path.read_bytes() == b"before" for path in files)
    one.umount()
    assert one.fsck() == []
    one.cli("close")


def test_a_mount_that_has_lost_the_lock_is_unmounted_as_any_other(two: tuple[Machine, Machine]) -> None:
    """That is no failure, though something is owed: it stays on this machine, which is said once."""
    one, other = two
    one.mount()
    command = [sys.executable, "-c", HOLDER, one.path / "open.txt"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        one.suspend()
        other.connect()
        other.saves("theirs.txt", "of the other machine")
        one.wake()
        one.expect_log("has lost the lock", "could not .*has lost the lock")
        wait_until(lambda: is_lost(one), "the mount has noticed")
        assert holder.communicate("go on\n", timeout=20)[0] == "EROFS EIO\n"
    assert one.status()["owed"] == {"put": 1}
    assert "mount again" not in one.status()["notice"]
    done = one.cli("umount", str(one.path), check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("has lost the lock") == 1
    assert "what only this machine has stays here" in said
    # (Where it takes long, it says what it waits for.)
    assert not [line for line in said.splitlines() if "--force" in line and "ends the daemon all the same" not in line]
    assert done.stdout == f"{one.path} is unmounted.\n"
    assert not one.mounted
    other.cli("close")
    one.expect_log("another machine has taken .* over and gone on", r"lost\+found")
    other.expect_log(r"lost\+found")  # of a storage folder both have the same spool
    one.mount()
    (found,) = (one.path / "lost+found").rglob("open*")
    assert found.read_bytes() == b"before"
    one.umount()
    one.cli("close")


def test_a_mount_renews_its_lease_and_one_that_died_is_taken_over(two: tuple[Machine, Machine]) -> None:
    one, other = two
    one.mount()
    store = open_store(one.storage)
    key = f".lamindb/_exclusion/{one.directory.name}"
    with contextlib.closing(store), pytest.MonkeyPatch.context() as patch:
        for name, value in one.env.items():
            patch.setenv(name, value)
        first = json.loads(store.get(key))

        def renewed() -> int:
            now = json.loads(store.get(key))
            assert now["fence"] == first["fence"], "the number stays while the same machine renews"
            return now["token"] != first["token"]

        for _ in range(4):
            wait_until(renewed, "the lease is renewed")
            first = json.loads(store.get(key))
        refused = other.cli("connect", one.storage.root, check=False, env=_options(one))
        assert refused.returncode == 1
        one.kill9()
        other.connect()
        now = json.loads(store.get(key))
        assert now["fence"] == first["fence"] + 1
        assert now["seconds"] == 24 * 3600, "a machine that does not mount holds it until 'lamfs close'"
        other.cli("close")
        released = json.loads(store.get(key))
        assert (released["machine"], released["fence"]) == ("", now["fence"])
    one.mount()
    assert (one.path / "common.txt").read_text() == "both know it"


def _options(machine: Machine) -> dict[str, str]:
    endpoint = machine.storage.endpoint_url
    return {} if endpoint is None else {"AWS_ENDPOINT_URL": endpoint}


def test_a_mount_gives_back_the_lease_that_it_took(two: tuple[Machine, Machine]) -> None:
    """'close' ended what 'init' had said; so no other machine waits for the mount that came after."""
    one, other = two
    one.cli("close")
    one.cli("mount", str(one.path), "--instance", one.slug)
    one.pid = one.record().pid
    (one.path / "more.txt").write_text("more")
    one.umount()
    other.connect()
    assert other.keys() == {"common.txt", "more.txt"}
    # A registry that another machine has overtaken is shown, but not without a word; JSON stays clean.
    other.saves("newest.txt", "x")
    other.cli("close")
    (one.directory / "freshness.json").unlink(missing_ok=True)
    shown = one.cli("ls", "--json", "--instance", one.slug)
    assert "another machine has stored a newer one" in shown.stderr
    assert "newest.txt" not in shown.stdout
    assert json.loads(shown.stdout)
    # A read-only mount takes it.
    one.cli("mount", "--read-only", str(one.path), "--instance", one.slug)
    one.pid = one.record().pid
    assert (one.path / "newest.txt").read_text() == "x"
    assert outcome(lambda: (one.path / "y").write_text("y")) == errno.errorcode[errno.EROFS]


def test_a_mount_without_a_storage_that_can_be_written_to(seaweed: Server) -> None:
    """Files that wait in the spool are there, and are stored once storage takes them."""
    with FaultProxy(seaweed.port) as proxy:
        config = seaweed.config(BUCKET, f"m{os.urandom(4).hex()}/root", timeout=4.0)
        storage = dataclasses.replace(config, endpoint_url=proxy.url)
        with MountedInstance(storage, env={**seaweed.env, **SHORT}) as one:
            one.mount()
            (one.path / "stored.txt").write_text("in storage")
            one.sync()
            refused = proxy.add("status", method="PUT", code=403, error="AccessDenied", count=None)
            (one.path / "waits.txt").write_text("in the spool")
            wait_until(lambda: refused.hits > 0, "storage refuses")
            one.kill9()
            done = one.cli("mount", str(one.path))
            one.pid = one.record().pid
            assert "the mount is read-only until storage can be written to: 1 file is not stored yet" in done.stderr
            assert (one.path / "waits.txt").read_text() == "in the spool"
            assert (one.path / "stored.txt").read_text() == "in storage"
            assert outcome(lambda: (one.path / "new.txt").write_text("x")) == "EROFS"
            assert "read-only until storage can be written to" in one.cli("status").stdout
            proxy.clear()
            wait_until(lambda: not one.status()["notice"], "storage takes writes again", seconds=20)
            (one.path / "new.txt").write_text("x")
            one.sync()
            assert one.spooled() == []

            one.kill9()
            proxy.cut()
            done = one.cli("mount", str(one.path))
            one.pid = one.record().pid
            assert "what is written waits in the spool" in done.stderr
            (one.path / "offline.txt").write_text("written while storage was away")
            assert (one.path / "offline.txt").read_text() == "written while storage was away"
            assert "offline.txt" in os.listdir(one.path)
            assert one.status()["notice"]
            proxy.heal()
            wait_until(lambda: not one.status()["notice"], "storage is back", seconds=20)
            one.sync()
            assert one.spooled() == []
            one.umount()
            assert one.fsck() == []


def test_a_mount_that_loses_the_lease_while_it_stores_the_last_files_leaves_the_tree(seaweed: Server) -> None:
    """Told to end (SIGTERM), it does, though it may store nothing any more; what waits stays in the spool."""
    prefix = f"m{os.urandom(4).hex()}/root"
    with FaultProxy(seaweed.port) as proxy:
        direct = seaweed.config(BUCKET, prefix, timeout=4.0)
        storage = dataclasses.replace(direct, endpoint_url=proxy.url)
        with (
            MountedInstance(storage, env={**seaweed.env, **SHORT}) as one,
            checked(Machine(direct, seaweed.env)) as other,
        ):
            one.mount()
            (one.path / "stored.txt").write_text("in storage")
            one.sync()
            refused = proxy.add("status", method="PUT", path=".txt", count=None)
            (one.path / "waits.txt").write_text("in the spool")
            os.kill(one.pid, signal.SIGTERM)
            wait_until(lambda: "storing what is owed, then unmounting" in one.log(), "the mount is ending")
            before = refused.hits
            wait_until(lambda: refused.hits > before + 2, "it tries to store the file", seconds=30)
            proxy.cut()
            other.connect()
            proxy.clear()
            proxy.heal()
            wait_until(lambda: not is_alive(one.pid), "the daemon has ended", seconds=30)
            assert not os.path.ismount(one.path)
            assert os.listdir(one.path) == []
            assert "has lost the lock" in one.log()
            other.cli("close")
            one.mount()
            assert [found.read_text() for found in one.path.rglob("waits.txt")] == ["in the spool"]
            one.umount()
