"""Large files on their way to S3: killed, cut off, deleted meanwhile, and never in the way of small ones."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import BUCKET, TEST_SECONDS, MountedInstance, children, wait_until
from tests.support.proxy import FaultProxy
from tests.support.servers import Server
from tests.support.transfer import make_bytes

MIB = 1 << 20


def big(seed: int) -> bytes:
    """Five parts of 16 MiB or less; each test has its own, for equal bytes are copied within storage."""
    return make_bytes(MIB, seed) * 66


class Behind:
    """An instance on SeaweedFS behind a proxy that sees each part."""

    def __init__(self, server: Server, proxy: FaultProxy) -> None:
        self.server = server
        self.proxy = proxy
        self.prefix = f"u{os.urandom(4).hex()}/root"
        config = server.config(BUCKET, self.prefix)
        self.instance = MountedInstance(dataclasses.replace(config, endpoint_url=proxy.url), env=server.env)

    def parts(self) -> Counter[int]:
        """How often each part came."""
        found = (re.search(r"partNumber=(\d+)", head.path) for head in self.proxy.requests if head.method == "PUT")
        return Counter(int(match[1]) for match in found if match)

    def recorded(self) -> int:
        """How many parts the registry knows."""
        with self.instance.registry() as registry:
            rows = registry.db.one("SELECT count(*) FROM part")
        assert rows is not None
        return int(rows[0])

    def uploads_left(self) -> list[str]:
        with self.server.client() as client:
            found = client.list_multipart_uploads(Bucket=BUCKET, Prefix=self.prefix)
        return [upload["Key"] for upload in found.get("Uploads", ())]

    def check(self, **files: bytes) -> None:
        """Everything is stored, these files are there, and storage holds nothing else."""
        self.proxy.clear()
        self.instance.sync()
        assert self.uploads_left() == []
        assert self.recorded() == 0
        assert self.instance.spooled() == []
        assert self.instance.fsck() == []
        for name, data in files.items():
            assert (self.instance.path / name).read_bytes() == data


def mover_of(pid: int) -> int:
    """The moving process of a daemon."""
    commands = {child: Path(f"/proc/{child}/comm").read_text() for child in children(pid)}
    return next(child for child, command in commands.items() if command == "lamfs-mover\n")


@pytest.fixture(scope="module")
def module_behind(seaweed: Server, fuse: None) -> Iterator[Behind]:
    """One mount for all tests of this file."""
    with FaultProxy(seaweed.port) as proxy:
        found = Behind(seaweed, proxy)
        with found.instance:
            found.instance.mount()
            yield found
            proxy.clear()


@pytest.fixture
def behind(module_behind: Behind) -> Iterator[Behind]:
    """The mount, empty; nothing is left of it."""
    module_behind.instance.extend(TEST_SECONDS)
    module_behind.proxy.requests.clear()
    yield module_behind
    module_behind.proxy.clear()
    module_behind.proxy.heal()
    for path in module_behind.instance.path.iterdir():
        path.unlink()
    module_behind.instance.sync()
    assert module_behind.uploads_left() == []


def test_a_killed_upload_goes_on_where_it_was(behind: Behind) -> None:
    """kill -9 of mover, then of everything: each part is sent once, but for the one that was under way."""
    stuck = behind.proxy.add("hang", path="partNumber=4", count=None)
    (behind.instance.path / "big").write_bytes(big(1))
    wait_until(lambda: behind.recorded() == 4 and stuck.hits == 1, "all parts but one are stored", seconds=30)
    os.kill(mover_of(behind.instance.pid), signal.SIGKILL)
    wait_until(lambda: stuck.hits == 2, "the next try has sent the part again", seconds=30)
    behind.instance.kill9()
    behind.proxy.clear()
    behind.instance.mount()
    behind.check(big=big(1))
    assert behind.parts() == {1: 1, 2: 1, 3: 1, 4: 3, 5: 1}


def test_a_part_that_fails_is_all_that_is_sent_again(behind: Behind) -> None:
    refused = behind.proxy.add("status", code=403, error="AccessDenied", path="partNumber=2")
    (behind.instance.path / "big").write_bytes(big(2))
    wait_until(lambda: refused.hits == 1, "a part is refused", seconds=30)
    behind.check(big=big(2))
    assert behind.parts() == {1: 1, 2: 2, 3: 1, 4: 1, 5: 1}


def test_a_file_that_is_deleted_while_it_is_uploaded(behind: Behind) -> None:
    stuck = behind.proxy.add("hang", path="partNumber=3", count=None)
    (behind.instance.path / "big").write_bytes(big(3))
    wait_until(lambda: behind.recorded() == 4 and stuck.hits == 1, "all parts but one are stored", seconds=30)
    assert len(behind.uploads_left()) == 1
    (behind.instance.path / "big").unlink()
    behind.check()
    assert list(behind.instance.path.iterdir()) == []


def test_huge_files_do_not_hold_up_small_ones(behind: Behind) -> None:
    """While the parts of ten huge files do not come through, 50 small files are stored."""
    stuck = behind.proxy.add("hang", path="partNumber=", count=None)
    for number in range(10):
        with open(behind.instance.path / f"huge{number}", "wb") as file:
            file.truncate(1 << 30)
            file.write(b"%d" % number)
    wait_until(lambda: stuck.hits >= 8, "parts are under way", seconds=30)
    started = time.monotonic()
    for number in range(50):
        (behind.instance.path / f"small{number}").write_bytes(b"%d" % number)
    wait_until(lambda: behind.instance.status()["owed_rows"] == 10, "the small files are stored", seconds=30)
    assert time.monotonic() - started < 10
    for path in behind.instance.path.glob("huge*"):
        path.unlink()
    behind.check()


def test_a_file_is_sent_while_it_is_written(behind: Behind) -> None:
    """kill -9 of the mover, then of everything, in the middle of writing: what storage has is not sent again."""
    data = make_bytes(MIB, 9) * 130
    with contextlib.suppress(OSError):
        with open(behind.instance.path / "growing", "wb", buffering=0) as file:
            for at in range(100):
                file.write(data[at * MIB : (at + 1) * MIB])
            wait_until(lambda: behind.recorded() == 5, "full parts are stored", seconds=30)
            os.kill(mover_of(behind.instance.pid), signal.SIGKILL)
            for at in range(100, 130):
                file.write(data[at * MIB : (at + 1) * MIB])
            behind.instance.kill9()
    behind.instance.mount()
    behind.check(growing=data)
    assert {part: behind.parts()[part] for part in range(1, 6)} == dict.fromkeys(range(1, 6), 1)


def test_who_comes_next_without_a_mount_leaves_no_upload(behind: Behind) -> None:
    """A mount and a command are killed in the middle of an upload: the next command ends both, and aborts theirs."""
    instance = behind.instance
    stuck = behind.proxy.add("hang", path="partNumber=4", count=None)
    (instance.path / "big").write_bytes(big(6))
    wait_until(lambda: behind.recorded() == 4 and stuck.hits == 1, "all parts but one are stored", seconds=30)
    instance.kill9()
    own = instance.base / "own"
    own.write_bytes(big(7))
    saving = subprocess.Popen(
        [sys.executable, "-m", "lamfs", "save", str(own), "--key", "own"],
        env=instance.env,
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: stuck.hits == 2, "the command is uploading too", seconds=30)
    finally:
        saving.kill()
        saving.wait()
    assert len(behind.uploads_left()) == 2
    behind.proxy.clear()
    instance.cli("fsck", "--repair", check=False)
    assert behind.uploads_left() == []
    instance.mount()
    behind.check(big=big(6))
    assert not (instance.path / "own").exists()
