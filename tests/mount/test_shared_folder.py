"""Two machines on one storage folder, real mounts: what waits in the spool of one survives the other."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs.model import StorageConfig
from tests.mount.test_lost_spool import hold_uploads, instance_status
from tests.mount.test_two_machines import Machine
from tests.support.mounts import MountedInstance, checked

pytestmark = pytest.mark.usefixtures("fuse")
LARGE = os.urandom(3 << 20)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Machine]:
    with checked(Machine(StorageConfig(str(tmp_path / "store")), {})) as found:
        MountedInstance.init(found)
        yield found


@pytest.fixture
def other(one: Machine) -> Iterator[Machine]:
    with checked(Machine(one.storage, {})) as found:
        found.expect_log("the spool of another machine")
        yield found


def heard(instance: MountedInstance, *words: str) -> str:
    """All that a command says."""
    done = instance.cli(*words)
    return done.stdout + done.stderr


def report(instance: MountedInstance, *words: str) -> dict[str, Any]:
    """What ``lamfs fsck`` says."""
    found: dict[str, Any] = json.loads(instance.cli("fsck", "--json", *words, check=False).stdout)
    return found


def test_nothing_is_lost_when_another_machine_takes_over(one: Machine, other: Machine) -> None:
    one.mount()
    (one.path / "both.txt").write_text("known to both")
    one.umount()
    one.cli("close")  # from now on the lock is the mount's, and runs out when that is dead
    one.env["LAMFS_INSTANCE"] = one.slug
    one.mount()
    hold_uploads(one)
    (one.path / "both.txt").write_text("written by the first")
    (one.path / "new").mkdir()
    (one.path / "new/large.bin").write_bytes(LARGE)
    one.kill9()
    waiting = {path.name: path.read_bytes() for path in one.spool.iterdir()}
    assert set(waiting.values()) == {b"written by the first", LARGE}

    said = f"{one.spool}, has 2 files ({len(LARGE) + 20} bytes, the oldest of "
    other.connect()
    assert said in heard(other, "connect", one.storage.root)
    other.mount()
    assert (other.path / "both.txt").read_text() == "known to both"
    (other.path / "both.txt").write_text("written by the second")
    (other.path / "theirs.txt").write_text("of the second")
    assert other.spool != one.spool
    assert said in "".join(instance_status(other)["spools"])
    other.umount()
    assert said in "".join(report(other)["notes"])
    repaired = report(other, "--repair", "--purge-orphans")
    assert (repaired["problems"], repaired["repaired"]) == ([], [])
    assert said in heard(other, "connect", "--restore", other.slug)
    assert {path.name: path.read_bytes() for path in one.spool.iterdir()} == waiting
    other.cli("close")

    one.expect_log(
        "files? not stored yet",
        "what was not stored of .* is .lost.found/",
        "has taken .* over and gone on",
        "not brought back: .both.txt.",
    )
    one.mount()
    assert (one.path / "theirs.txt").read_text() == "of the second"
    one.sync()
    found = {path.read_bytes() for path in one.path.rglob("*") if path.is_file()}
    assert {b"written by the first", b"of the second", LARGE} <= found
    one.umount()
    assert one.spooled() == []
    assert one.fsck() == []
    assert not [note for note in report(one)["notes"] if note.startswith("spool: ")]


def test_two_mounts_of_one_machine_share_the_spool(one: Machine, tmp_path: Path) -> None:
    one.mount()
    (one.path / ".DS_Store").write_text("is in the spool, and nowhere else")
    second = tmp_path / "second"
    second.mkdir()
    one.cli("mount", str(second))
    try:
        assert (second / ".DS_Store").read_text() == "is in the spool, and nowhere else"
        assert [path.name for path in one.spool.parent.iterdir() if path.is_dir()] == [one.spool.name]
        one.cli("umount", str(second))
    finally:
        subprocess.run(["fusermount3", "-uz", str(second)], check=False, capture_output=True, timeout=10)
    assert len(one.spooled()) == 1
    (one.path / ".DS_Store").unlink()
