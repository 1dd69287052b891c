"""Storage that fails, lies, stalls, or is away, and a full disk: nothing acknowledged is lost, and it is said."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs.model import iso, now_ns
from tests.support.mounts import BUCKET, TEST_SECONDS, MountedInstance, outcome, wait_until
from tests.support.proxy import FaultProxy
from tests.support.servers import SeaweedServer, Server

DATA = b"0123456789abcdef" * 4096


class Faulty:
    """An instance on SeaweedFS behind a proxy that breaks HTTP on demand."""

    def __init__(self, server: Server, proxy: FaultProxy, timeout: int) -> None:
        self.words = [f"timeout={timeout}"]
        self.since = ""
        self.server = server
        self.proxy = proxy
        config = server.config(BUCKET, f"f{os.urandom(4).hex()}/root")
        self.instance = MountedInstance(dataclasses.replace(config, endpoint_url=proxy.url), env=server.env)

    @property
    def path(self) -> Path:
        return self.instance.path

    def errors(self) -> list[dict[str, Any]]:
        """The failures since the test began that ``lamfs status`` shows."""
        return [error for error in self.instance.status()["errors"] if error["at"] >= self.since]

    def check(self) -> None:
        """All is well again: everything drains, and fsck is content."""
        self.proxy.clear()
        self.proxy.heal()
        self.instance.sync()
        assert self.instance.spooled() == []
        assert self.instance.status()["owed_rows"] == 0
        assert self.instance.fsck() == []

    def remount_empty(self) -> None:
        self.instance.fusermount()
        shutil.rmtree(self.instance.cache_dir, ignore_errors=True)
        self.instance.mount(self.words)


@pytest.fixture(scope="module", params=[60])
def faulty_mount(request: pytest.FixtureRequest, seaweed: Server, fuse: None) -> Iterator[Faulty]:
    """A mount with this timeout, for all tests that want one; use ``faulty``."""
    with FaultProxy(seaweed.port) as proxy:
        found = Faulty(seaweed, proxy, request.param)
        with found.instance:
            found.instance.mount(found.words)
            yield found


@pytest.fixture
def faulty(faulty_mount: Faulty) -> Iterator[Faulty]:
    """An empty mount; ``impatient`` tests get one with a timeout of 5 s."""
    found = faulty_mount
    found.instance.extend(TEST_SECONDS)
    found.since = iso(now_ns())
    found.proxy.requests.clear()
    yield found
    found.proxy.clear()
    found.proxy.heal()
    for path in found.path.iterdir():
        path.unlink()
    found.instance.sync()


impatient = pytest.mark.parametrize("faulty_mount", [5], indirect=True)


class Fails:
    """Expects an OSError with this errno."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert isinstance(error, OSError), f"no error, but {errno.errorcode[self.number]} was expected"
        assert error.errno == self.number, error
        return True


def write_and_fsync(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def test_a_storm_of_503_is_weathered(faulty: Faulty) -> None:
    """A few errors are nobody's business: not even fsync sees them."""
    rule = faulty.proxy.add("status", code=503, method="PUT", count=2)
    write_and_fsync(faulty.path / "a", DATA)
    assert rule.hits == 2
    assert faulty.errors() == []
    faulty.check()


def test_resets_and_lost_replies_on_the_way_up(faulty: Faulty) -> None:
    for action in ("reset", "lost_reply"):
        faulty.proxy.add(action, method="PUT", count=2)  # type: ignore[arg-type]
        write_and_fsync(faulty.path / action, DATA)
    faulty.check()
    faulty.remount_empty()
    assert (faulty.path / "reset").read_bytes() == (faulty.path / "lost_reply").read_bytes() == DATA


@impatient
def test_storage_away_close_succeeds_and_fsync_fails(faulty: Faulty) -> None:
    """Nothing is lost, the error is shown, and everything is stored by itself once storage is back."""
    (faulty.path / "old").write_bytes(b"old")
    faulty.instance.sync()
    faulty.proxy.cut()
    (faulty.path / "new").write_bytes(DATA)
    (faulty.path / "old").write_bytes(b"newer")
    with open(faulty.path / "new", "r+b") as file:
        with Fails(errno.EIO):
            os.fsync(file.fileno())
    assert (faulty.path / "new").read_bytes() == DATA
    assert (faulty.path / "old").read_bytes() == b"newer"
    wait_until(lambda: faulty.errors(), "status shows the failure", seconds=30)
    assert faulty.instance.status()["owed"]["put"] == 2
    os.rename(faulty.path / "new", faulty.path / "renamed")
    faulty.proxy.heal()
    wait_until(lambda: faulty.instance.status()["owed_rows"] == 0, "it drains by itself", seconds=60)
    faulty.check()
    faulty.remount_empty()
    assert (faulty.path / "renamed").read_bytes() == DATA
    assert (faulty.path / "old").read_bytes() == b"newer"


def test_one_file_that_stalls_does_not_stop_the_others(faulty: Faulty) -> None:
    (faulty.path / "slow").write_bytes(DATA)
    info = faulty.instance.stored_info("slow")
    faulty.proxy.add("hang", method="PUT", path=info["uid"], count=None)
    (faulty.path / "slow").write_bytes(DATA + b"2")
    for number in range(20):
        write_and_fsync(faulty.path / f"f{number}", b"%d" % number)
    assert (faulty.path / "slow").read_bytes() == DATA + b"2"
    faulty.check()


def test_reads_that_break(faulty: Faulty) -> None:
    """A cut body and a reset are tried again; wrong bytes are never given out: once is mended, always is EIO."""
    for name in ("cut", "reset", "once", "always", "gone"):
        (faulty.path / name).write_bytes(DATA + name.encode())
    faulty.instance.sync()
    uids = {name: faulty.instance.info(name)["uid"] for name in ("cut", "reset", "once", "always", "gone")}
    faulty.remount_empty()
    faulty.proxy.add("truncate", method="GET", path=uids["cut"], count=2)
    faulty.proxy.add("reset", method="GET", path=uids["reset"], after=1000, count=2)
    faulty.proxy.add("corrupt", method="GET", path=uids["once"], at=5, count=1)
    rule = faulty.proxy.add("corrupt", method="GET", path=uids["always"], at=70, count=None)
    for name in ("cut", "reset", "once"):
        assert (faulty.path / name).read_bytes() == DATA + name.encode()
    with Fails(errno.EIO):
        (faulty.path / "always").read_bytes()
    assert rule.hits >= 2
    assert uids["always"] in faulty.instance.log()
    faulty.proxy.clear()
    assert (faulty.path / "always").read_bytes() == DATA + b"always"
    faulty.check()


@impatient
def test_reads_end_in_time(faulty: Faulty) -> None:
    """Storage that swallows a GET: EIO within the mount's timeout, and it works again afterwards."""
    (faulty.path / "a").write_bytes(DATA)
    faulty.instance.sync()
    faulty.remount_empty()
    faulty.proxy.add("hang", method="GET", count=None)
    started = time.monotonic()
    with Fails(errno.EIO):
        (faulty.path / "a").read_bytes()
    assert 4.5 < time.monotonic() - started < 8, "the kernel asks again: all of it together takes the timeout"
    assert faulty.instance.status()["timeouts"] >= 1
    os.stat(faulty.path / "a")
    (faulty.path / "b").write_bytes(b"others go on")
    faulty.proxy.clear()
    assert (faulty.path / "a").read_bytes() == DATA
    faulty.check()


@impatient
def test_an_edit_whose_old_bytes_cannot_be_had(faulty: Faulty) -> None:
    """EIO to the writer, and the artifact is as it was."""
    (faulty.path / "a").write_bytes(DATA)
    faulty.instance.sync()
    faulty.remount_empty()
    faulty.proxy.cut()
    with open(faulty.path / "a", "r+b", buffering=0) as file, Fails(errno.EIO):
        file.write(b"edit")
    faulty.proxy.heal()

    def is_readable() -> bool:
        with contextlib.suppress(OSError):  # what was asked of the cut connection may be given up only now
            assert (faulty.path / "a").read_bytes() == DATA
            return True
        return False

    wait_until(is_readable, "the file can be read again", seconds=10)
    with open(faulty.path / "a", "r+b", buffering=0) as file:
        file.write(b"edit")
    faulty.check()
    assert (faulty.path / "a").read_bytes() == b"edit" + DATA[4:]


def test_credentials_that_are_refused_for_a_while(faulty: Faulty) -> None:
    """EACCES to fsync and to who reads what is not here; both work again by themselves, with nothing lost."""
    (faulty.path / "a").write_bytes(DATA)
    faulty.instance.sync()
    faulty.remount_empty()
    rule = faulty.proxy.add("status", code=400, error="ExpiredToken", count=None)
    with Fails(errno.EACCES):
        write_and_fsync(faulty.path / "b", DATA + b"b")
    with Fails(errno.EACCES):
        (faulty.path / "a").read_bytes()
    assert "ExpiredToken" in faulty.errors()[0]["error"]
    assert rule.hits > 1
    faulty.proxy.clear()
    assert (faulty.path / "a").read_bytes() == DATA
    wait_until(lambda: faulty.instance.status()["owed_rows"] == 0, "it is stored by itself", seconds=20)
    faulty.check()
    faulty.remount_empty()
    assert (faulty.path / "b").read_bytes() == DATA + b"b"


def test_storage_is_away_in_the_middle_of_a_read(faulty: Faulty) -> None:
    """All connections are reset and refused for a second: the reader waits, and gets the right bytes."""
    data = os.urandom(13 << 20)
    (faulty.path / "a").write_bytes(data)
    faulty.instance.sync()
    faulty.remount_empty()
    with open(faulty.path / "a", "rb", buffering=0) as file:
        assert file.read(1000) == data[:1000]
        faulty.proxy.cut()
        back = threading.Timer(1.0, faulty.proxy.heal)
        back.start()
        assert b"".join(iter(lambda: file.read(1 << 20), b"")) == data[1000:]
        back.join()
    faulty.check()


def test_sigterm_with_much_owed(faulty: Faulty) -> None:
    """The daemon stores everything before it ends, however slowly storage takes it: 32 MiB, in scripts/soak 1 GiB."""
    count = 1024 if "LAMFS_SOAK" in os.environ else 32
    faulty.proxy.add("delay", method="PUT", seconds=0.2, count=None)
    data = os.urandom(1 << 20)
    for number in range(count):
        (faulty.path / f"f{number}").write_bytes(b"%d" % number + data)
    assert faulty.instance.status()["owed_bytes"] > count << 19
    faulty.instance.term(timeout=300)
    assert faulty.instance.spooled() == []
    shutil.rmtree(faulty.instance.cache_dir)
    faulty.proxy.clear()
    faulty.instance.mount(faulty.words)
    for number in range(count):
        assert (faulty.path / f"f{number}").read_bytes() == b"%d" % number + data
    faulty.check()


@impatient
def test_reads_of_others_go_on_while_one_stalls(faulty: Faulty) -> None:
    """Of an object that is never sent, and of one with a wrong ETag in each reply; another ETag than its own is never
    taken for the revision."""
    names = ("stalls", "other", "etag", "whole")
    for name in names:
        (faulty.path / name).write_bytes(DATA + name.encode())
    faulty.instance.sync()
    uids = {name: faulty.instance.info(name)["uid"] for name in names}
    faulty.remount_empty()
    faulty.proxy.add("hang", method="GET", path=uids["stalls"], count=None)
    wrong = faulty.proxy.add(
        "reply_header", method="GET", path=uids["etag"], name="ETag", value='"' + "f" * 32 + '"', count=None
    )
    results: list[Any] = []
    reader = threading.Thread(target=lambda: results.append(outcome((faulty.path / "stalls").read_bytes)))
    reader.start()
    wait_until(lambda: any(uids["stalls"] in request.path for request in faulty.proxy.requests), "it stalls")
    started = time.monotonic()
    assert (faulty.path / "other").read_bytes() == DATA + b"other"
    assert time.monotonic() - started < 4
    assert outcome((faulty.path / "etag").read_bytes) in ("ESTALE", "EIO")
    assert wrong.hits >= 1
    reader.join(30)
    assert results == ["EIO"]
    faulty.proxy.clear()
    for name in names:
        assert (faulty.path / name).read_bytes() == DATA + name.encode()
    faulty.check()


def test_the_bucket_is_deleted_and_made_again(faulty: Faulty, seaweed: Server) -> None:
    """What is written meanwhile is stored when there is a bucket again; what was in the old one is an error, no lie."""
    with seaweed.client() as client:
        bucket = f"gone-{os.urandom(4).hex()}"
        client.create_bucket(Bucket=bucket)
        config = dataclasses.replace(seaweed.config(bucket, "root"), endpoint_url=faulty.proxy.url)
        with MountedInstance(config, env=seaweed.env) as instance:
            instance.mount(["timeout=5"])
            (instance.path / "old").write_bytes(DATA)
            (instance.path / "cached").write_bytes(DATA)
            instance.sync()
            instance.remount(empty_cache=True)
            assert (instance.path / "cached").read_bytes() == DATA
            for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
                client.delete_object(Bucket=bucket, Key=entry["Key"])
            client.delete_bucket(Bucket=bucket)
            (instance.path / "new").write_bytes(DATA + b"new")
            with Fails(errno.ENOENT):
                write_and_fsync(instance.path / "newer", DATA)
            assert outcome((instance.path / "old").read_bytes) in ("EIO", "ENOENT")
            assert (instance.path / "new").read_bytes() == DATA + b"new"
            assert (instance.path / "cached").read_bytes() == DATA
            client.create_bucket(Bucket=bucket)
            instance.sync()
            with Fails(errno.EIO):
                (instance.path / "old").read_bytes()
            instance.kill9()
            shutil.rmtree(instance.cache_dir)
            instance.mount()
            assert (instance.path / "new").read_bytes() == DATA + b"new"
            assert (instance.path / "newer").read_bytes() == DATA
            problems = instance.fsck()
            assert len(problems) == 3, problems
            assert all("is gone" in problem for problem in problems)
            assert "registry in storage" in problems[0]
            instance.fusermount()


def test_the_server_is_killed_during_uploads(fuse: None, tmp_path: Path) -> None:
    """kill -9 of SeaweedFS, a few seconds without it, the same data again."""
    with SeaweedServer(tmp_path / "weed") as server:
        server.create_bucket(BUCKET)
        config = server.config(BUCKET, "k/root")
        with MountedInstance(config, env=server.env) as instance:
            instance.mount(["timeout=5"])
            big = os.urandom(40 << 20)
            done = threading.Event()

            def write() -> None:
                for number in range(30):
                    (instance.path / f"f{number}").write_bytes(b"%d" % number * 1000)
                (instance.path / "big").write_bytes(big)
                done.set()

            thread = threading.Thread(target=write)
            thread.start()
            wait_until(lambda: instance.status()["stored_files"] > 3, "uploads have begun", seconds=30)
            server.kill()
            thread.join(60)
            assert done.is_set(), "writers do not wait for storage"
            assert (instance.path / "big").read_bytes() == big
            wait_until(lambda: instance.status()["errors"], "the failure is shown", seconds=60)
            server.restart()
            instance.sync(timeout=90)
            instance.umount()
            shutil.rmtree(instance.cache_dir)
            instance.mount()
            for number in range(30):
                assert (instance.path / f"f{number}").read_bytes() == b"%d" % number * 1000
            assert (instance.path / "big").read_bytes() == big
            assert instance.fsck() == []
            instance.fusermount()


@pytest.fixture
def small_disk(seaweed: Server, seaweed_proxy: FaultProxy, fuse: None) -> Iterator[Faulty]:
    """An instance whose data directory (registry, journal and spool) is a tmpfs of 40 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    found = Faulty(seaweed, seaweed_proxy, 5)
    instance = found.instance
    instance.data_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=700", "tmpfs", instance.data_dir], check=True)
    try:
        with instance:
            instance.mount(found.words)
            yield found
            seaweed_proxy.clear()
            seaweed_proxy.heal()
            if instance.mounted:
                instance.umount()
    finally:
        subprocess.run(["umount", "-l", instance.data_dir], check=False)
        shutil.rmtree(instance.base, ignore_errors=True)


@pytest.fixture
def small_cache(seaweed: Server, fuse: None) -> Iterator[MountedInstance]:
    """An instance on S3 whose cache directory is a tmpfs of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    config = seaweed.config(BUCKET, f"c{os.urandom(4).hex()}/root")
    instance = MountedInstance(config, env=seaweed.env)
    instance.cache_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", instance.cache_dir], check=True)
    try:
        with instance:
            instance.mount(["timeout=30"])
            yield instance
    finally:
        subprocess.run(["umount", "-l", instance.cache_dir], check=False)
        shutil.rmtree(instance.base, ignore_errors=True)


def test_a_full_cache_disk(small_cache: MountedInstance) -> None:
    """More bytes than it holds are read, whoever has it open; with no room at all reading fails, and lives on."""
    instance = small_cache
    data = {f"f{number}": os.urandom(7 << 20) for number in range(6)}
    for name, content in data.items():
        (instance.path / name).write_bytes(content)
    instance.sync()
    for name, content in data.items():
        assert (instance.path / name).read_bytes() == content
    with open(instance.path / "f0", "rb") as held, open(instance.path / "f1", "rb") as second:
        assert held.read() == data["f0"]
        assert second.read() == data["f1"]
        assert (instance.path / "f2").read_bytes() == data["f2"]
        (instance.path / "new").write_bytes(DATA)
    instance.sync()
    for name, content in data.items():
        assert (instance.path / name).read_bytes() == content
    assert instance.fsck() == []


@pytest.fixture
def small_registry(fuse: None) -> Iterator[MountedInstance]:
    """An instance on a local folder, with its spool in there; the registry alone is on a tmpfs of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    instance = MountedInstance()
    instance.data_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", instance.data_dir], check=True)
    try:
        with instance:
            instance.mount()
            yield instance
    finally:
        subprocess.run(["umount", "-l", instance.data_dir], check=False)
        shutil.rmtree(instance.base, ignore_errors=True)


def test_a_full_disk_of_the_registry(small_registry: MountedInstance) -> None:
    """ENOSPC for what cannot be noted, nothing acknowledged is lost, also by a kill; all is well when there is room."""
    instance = small_registry
    (instance.path / "old").write_bytes(DATA)
    instance.sync()
    with open(instance.data_dir / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(1 << 16))
    kept = {"old": DATA}
    results = []
    for number in range(400):
        data = b"%d" % number * 1000
        results.append(outcome(lambda path=instance.path / f"f{number}", data=data: path.write_bytes(data)))
        if results[-1] == len(data):
            kept[f"f{number}"] = data
    assert "ENOSPC" in results
    assert (instance.path / "old").read_bytes() == DATA
    os.unlink(instance.data_dir / "filler")
    (instance.path / "later").write_bytes(DATA)
    kept["later"] = DATA
    instance.kill9()
    instance.mount()
    instance.sync()
    for name, data in kept.items():
        assert (instance.path / name).read_bytes() == data, name
    assert instance.spooled() == []
    assert instance.fsck() == []


def test_a_full_spool(small_disk: Faulty) -> None:
    """ENOSPC to the writer; what was acknowledged before stays, and is stored when storage is back."""
    faulty = small_disk
    (faulty.path / "stored").write_bytes(b"stored")
    faulty.instance.sync()
    faulty.proxy.cut()
    kept: dict[str, bytes] = {}
    refused = None
    for number in range(60):
        data = os.urandom(1_000_000)
        try:
            (faulty.path / f"f{number}").write_bytes(data)
        except OSError as error:
            refused = error.errno
            break
        kept[f"f{number}"] = data
    assert refused == errno.ENOSPC
    assert len(kept) > 4
    with contextlib.suppress(OSError):
        (faulty.path / f"f{len(kept)}").unlink()
    for name, data in kept.items():
        assert (faulty.path / name).read_bytes() == data
    faulty.proxy.heal()
    wait_until(lambda: faulty.instance.status()["owed_rows"] == 0, "it drains by itself", seconds=60)
    (faulty.path / "again").write_bytes(DATA)
    assert (faulty.path / "stored").read_bytes() == b"stored"
    faulty.check()
    for name, data in kept.items():
        assert (faulty.path / name).read_bytes() == data


def test_killed_with_a_full_spool(small_disk: Faulty) -> None:
    """The next mount starts on the full disk, and drains it."""
    faulty = small_disk
    faulty.proxy.cut()
    kept: dict[str, bytes] = {}
    with contextlib.suppress(OSError):
        for number in range(60):
            data = os.urandom(1_000_000)
            (faulty.path / f"f{number}").write_bytes(data)
            kept[f"f{number}"] = data
    faulty.instance.kill9()
    faulty.proxy.heal()
    faulty.instance.mount(faulty.words)
    faulty.check()
    for name, data in kept.items():
        assert (faulty.path / name).read_bytes() == data
