"""What a program waits for: as long as storing goes on, however long that takes; its own directory's entries; and no
file that storage can never take."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import BUCKET, TEST_SECONDS, MountedInstance, children, wait_until
from tests.support.proxy import FaultProxy
from tests.support.servers import Server

MIB = 1 << 20
TIMEOUT = 4.0
LARGE = 112 * MIB
SLOW = 2 * MIB
"""Bytes a second of one request: a part of 16 MiB takes twice the timeout."""


@contextlib.contextmanager
def behind_proxy(server: Server, *words: str) -> Iterator[tuple[MountedInstance, FaultProxy]]:
    """A mount whose storage is behind a proxy."""
    with FaultProxy(server.port) as proxy:
        config = server.config(BUCKET, f"p{os.urandom(4).hex()}/root")
        instance = MountedInstance(dataclasses.replace(config, endpoint_url=proxy.url), env=server.env)
        with instance:
            instance.mount([f"timeout={TIMEOUT:g}", *words])
            yield instance, proxy
            proxy.clear()
            instance.sync()


def write(path: Path, data: bytes, *, sync: bool = True) -> float:
    """Write a file and, with ``sync``, fsync it; how long that fsync took."""
    with open(path, "wb", buffering=0) as file:
        for at in range(0, len(data), MIB):
            file.write(data[at : at + MIB])
        began = time.monotonic()
        if sync:
            os.fsync(file.fileno())
        return time.monotonic() - began


def test_fsync_waits_as_long_as_a_slow_line_takes(seaweed: Server, fuse: None) -> None:
    with behind_proxy(seaweed) as (mount, proxy):
        proxy.add("slow", method="PUT", rate=SLOW, count=None)
        data = os.urandom(LARGE)
        assert write(mount.path / "large", data) > TIMEOUT
        assert mount.info("large")["size"] == LARGE
        # with small ones beside it, one of which is waited for
        for number in range(20):
            write(mount.path / f"small{number}", data[: 40_000 + number], sync=False)
        write(mount.path / "small", b"small")
        proxy.clear()


def test_close_waits_as_long_as_a_slow_line_takes(seaweed: Server, fuse: None) -> None:
    with behind_proxy(seaweed, "close=storage") as (mount, proxy):
        proxy.add("slow", method="PUT", rate=SLOW, count=None)
        began = time.monotonic()
        write(mount.path / "large", os.urandom(LARGE), sync=False)
        assert time.monotonic() - began > TIMEOUT
        assert mount.info("large")["size"] == LARGE


def test_a_read_waits_as_long_as_a_slow_line_takes(seaweed: Server, fuse: None) -> None:
    data = os.urandom(4 * MIB)
    with behind_proxy(seaweed) as (mount, proxy):
        write(mount.path / "a", data)
        mount.remount(empty_cache=True)
        proxy.add("slow", method="GET", rate=MIB // 2, count=None)
        with open(mount.path / "a", "rb", buffering=0) as file:
            began = time.monotonic()
            assert file.readall() == data
        assert time.monotonic() - began > TIMEOUT


def test_fsync_fails_when_storing_has_stood_still_for_the_timeout(seaweed: Server, fuse: None) -> None:
    with behind_proxy(seaweed) as (mount, proxy):
        mount.expect_log("could not put")
        proxy.add("hang", method="PUT", count=None)
        began = time.monotonic()
        with pytest.raises(OSError, match=r"[Ee]rror|large") as found:
            write(mount.path / "large", os.urandom(LARGE))
        assert found.value.errno == errno.EIO
        assert time.monotonic() - began < 5 * TIMEOUT + 10


def mover_of(mount: MountedInstance) -> int:
    """The process that moves bytes."""
    (found,) = [pid for pid in children(mount.pid) if Path(f"/proc/{pid}/comm").read_text() == "lamfs-mover\n"]
    return found


class Stutter:
    """Lets a process run a small part of the time only, until it is stopped for good or let go."""

    def __init__(self, pid: int, *, run: float, rest: float) -> None:
        self._pid, self._run, self._rest = pid, run, rest
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while not self._over.is_set():
            os.kill(self._pid, signal.SIGSTOP)
            self._over.wait(self._rest)
            os.kill(self._pid, signal.SIGCONT)
            self._over.wait(self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        os.kill(self._pid, signal.SIGCONT)


def test_fsync_to_a_folder_waits_as_long_as_hashing_and_copying_go_on(local_instance: MountedInstance) -> None:
    """The process that moves bytes gets a tenth of the time."""
    timeout = 3.0
    local_instance.mount([f"timeout={timeout:g}"])
    local_instance.extend(2 * TEST_SECONDS)
    mover = mover_of(local_instance)
    with Stutter(mover, run=0.05, rest=0.95):
        with open(local_instance.path / "large", "wb", buffering=0) as file:
            for _ in range(5):
                file.write(os.urandom(LARGE))
            began = time.monotonic()
            os.fsync(file.fileno())  # another handle may write on: the object is a copy
            assert time.monotonic() - began > timeout
    assert local_instance.info("large")["size"] == 5 * LARGE


def test_fsync_to_a_folder_fails_when_nothing_goes_on(local_instance: MountedInstance) -> None:
    local_instance.expect_log("storage did not answer in time")
    local_instance.mount(["timeout=2"])
    mover = mover_of(local_instance)
    os.kill(mover, signal.SIGSTOP)
    try:
        with pytest.raises(OSError, match=r"[Ee]rror|large") as found:
            write(local_instance.path / "large", os.urandom(LARGE))
        assert found.value.errno == errno.EIO
    finally:
        os.kill(mover, signal.SIGCONT)
    local_instance.sync()


def test_fsync_of_a_directory_is_its_entries_and_sync_what_is_below(seaweed: Server, fuse: None) -> None:
    with behind_proxy(seaweed) as (mount, proxy):
        (mount.path / "d" / "deep").mkdir(parents=True)
        proxy.add("hang", method="PUT", count=None)
        for number in range(20):
            write(mount.path / "d" / "deep" / f"f{number}", b"%d" % number, sync=False)
        directory = os.open(mount.path / "d", os.O_RDONLY)
        began = time.monotonic()
        os.fsync(directory)
        assert time.monotonic() - began < TIMEOUT
        os.close(directory)
        assert mount.status()["owed_rows"] > 0
        done = mount.cli("sync", str(mount.path / "d"), "--timeout", "0.5", check=False)
        assert done.returncode == 1
        proxy.clear()
        mount.expect_log("could not put")
        mount.cli("sync", str(mount.path / "d" / "deep"), timeout=60)
        with mount.registry() as registry:
            for number in range(20):
                assert registry.artifacts.by_key(f"d/deep/f{number}") is not None
        mount.cli("sync", str(mount.path / "nosuch"), check=False)


def test_sync_of_a_path_does_not_wait_for_what_is_elsewhere(seaweed: Server, fuse: None) -> None:
    with behind_proxy(seaweed) as (mount, proxy):
        mount.expect_log("could not put")
        for name in ("here", "there"):
            (mount.path / name).mkdir()
        write(mount.path / "there" / "stuck.bin", os.urandom(70_000), sync=False)
        uid = mount.info("there/stuck.bin")["uid"]
        proxy.add("hang", method="PUT", path=uid, count=None)
        write(mount.path / "here" / "a", b"a" * 70_000, sync=False)
        done = mount.cli("sync", str(mount.path / "here"), timeout=60)
        assert "here: everything is stored" in done.stdout + done.stderr
        with mount.registry() as registry:
            assert registry.artifacts.by_key("here/a") is not None


TIB = 1 << 40


def test_a_file_that_a_bucket_never_takes_is_refused(s3_mount: MountedInstance, tmp_path: Path) -> None:
    path = s3_mount.path / "a"
    path.write_bytes(b"a")
    done = s3_mount.run(["truncate", "-s", "6T", "a"], check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    with open(path, "r+b", buffering=0) as file:
        for offset in (5 * TIB, 6 * TIB):
            with pytest.raises(OSError, match=r"[Ee]rror|large") as found:
                os.pwrite(file.fileno(), b"more", offset)
            assert found.value.errno == errno.EFBIG
        with pytest.raises(OSError, match=r"[Ee]rror|large") as found:
            os.ftruncate(file.fileno(), 5 * TIB + 1)
        assert found.value.errno == errno.EFBIG
        with pytest.raises(OSError, match="large"):
            os.posix_fallocate(file.fileno(), 5 * TIB, 4096)
    assert path.read_bytes() == b"a"

    huge = tmp_path / "huge"
    with open(huge, "wb") as file:
        file.truncate(6 * TIB)
    began = time.monotonic()
    done = s3_mount.cli("save", str(huge), "--key", "huge", check=False)
    assert done.returncode == 1
    assert "more than a bucket takes of one file (5 TiB)" in done.stderr
    assert time.monotonic() - began < 30
    s3_mount.umount()


def test_what_an_older_lamfs_left_and_storage_never_takes_is_named(s3_mount: MountedInstance) -> None:
    """It stays owed, is not tried again and again, and neither sync nor umount waits for it."""
    s3_mount.expect_log("could not put huge")
    (s3_mount.path / "huge").write_bytes(b"")
    s3_mount.sync()
    with open(s3_mount.path / "huge", "r+b") as file:
        file.write(b"x")
        file.flush()
        (spool,) = s3_mount.spooled()
        os.truncate(s3_mount.directory / "spool" / spool, 6 * TIB)
    done = s3_mount.cli("sync", check=False, timeout=60)
    assert done.returncode == 1
    assert "'huge' has 6 TiB, more than a bucket takes of one file (5 TiB)" in done.stderr
    done = s3_mount.cli("umount", str(s3_mount.path), check=False, timeout=60)
    assert done.returncode == 1
    assert "'huge' has 6 TiB" in done.stderr
    assert s3_mount.mounted
    wait_until(lambda: s3_mount.status()["owed_rows"] == 0, "nothing else is owed")
    with open(s3_mount.path / "huge", "r+b") as file:
        file.truncate(1)
    s3_mount.sync()
    assert s3_mount.info("huge")["size"] == 1
    s3_mount.umount()
