"""What commands leave behind when they are ended, and what fsck does with objects that the registry does not know."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lamfs.cli import main
from lamfs.model import StorageConfig
from lamfs.ops.instance import Instance
from lamfs.storage import open_store
from tests.component.cli.test_s3 import options
from tests.support.commands import ROOT, lamfs, quick, quick_json
from tests.support.mounts import wait_until
from tests.support.ops import make_orphan

MIB = 1 << 20

SLOW = """
import sys, time
from pathlib import Path
from lamfs import copying
from lamfs.storage.s3.direct import Direct
from lamfs.cli import main

begun = Path(sys.argv.pop(1))
copy, send_part = copying._copy_in_kernel, Direct.send_part

def slow_copy(*args):
    done = copy(*args)
    begun.touch()
    time.sleep(60)
    return done

def slow_send(*args):
    found = send_part(*args)
    begun.touch()
    time.sleep(1)
    return found

copying._copy_in_kernel, Direct.send_part = slow_copy, slow_send
main(prog_name="lamfs")
"""


def large_file(folder: Path, size: int) -> Path:
    path = folder / "large.bin"
    with path.open("wb") as stream:
        for _ in range(size // MIB):
            stream.write(os.urandom(MIB))
    return path


def ended_by(number: int, tmp_path: Path, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a command that gets a signal while it stores bytes."""
    begun = tmp_path / "begun"
    begun.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(begun), *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        wait_until(begun.exists, "bytes are being stored", seconds=60)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, said


def report_of(*words: str) -> dict[str, Any]:
    """What ``lamfs fsck --json`` says, whether or not it finds problems."""
    done = CliRunner().invoke(main, ["fsck", "--json", *words])
    assert done.exit_code in (0, 1), done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["clean"] == (done.exit_code == 0)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The storage folder of the current instance."""
    quick("login", "testuser1")
    quick("init", "--storage", tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_ended_save_leaves_nothing_in_a_folder(root: Path, tmp_path: Path, number: int) -> None:
    source = large_file(tmp_path, 16 * MIB)
    code, said = ended_by(number, tmp_path, "save", str(source), "--key", "large.bin")
    assert code == 128 + number, said
    assert len(said.splitlines()) == 1, said
    assert not (root / ".lamindb").exists() or not list(root.glob(".lamindb/_tmp/*"))
    assert quick("fsck").splitlines()[-1].startswith("testuser1/store: clean (0 artifacts, 0 objects")
    quick("save", source, "--key", "large.bin")


def test_what_a_killed_save_leaves_in_a_folder_is_named_and_removed(root: Path, tmp_path: Path) -> None:
    source = large_file(tmp_path, 16 * MIB)
    code, _ = ended_by(signal.SIGKILL, tmp_path, "save", str(source), "--key", "large.bin")
    assert code == -signal.SIGKILL
    (left,) = root.glob(".lamindb/_tmp/*")
    assert left.stat().st_size == 16 * MIB
    report = report_of()
    assert any(left.name in text and f"({16 * MIB} bytes)" in text for text in report["repaired"])
    assert not left.exists()
    assert len(report["problems"]) == 1, "the journal's row of the save, which a repair finishes"
    assert report_of("--repair")["clean"]
    assert report_of()["repaired"] == []


def test_an_ended_save_leaves_nothing_in_a_bucket(seaweed_config: StorageConfig, tmp_path: Path) -> None:
    config = seaweed_config
    quick("login", "testuser1")
    quick("init", "--storage", config.root, "--name", "on-s3", *options(config))
    source = large_file(tmp_path, 80 * MIB)
    store = open_store(config)
    try:
        code, said = ended_by(signal.SIGTERM, tmp_path, "save", str(source), "--key", "large.bin")
        assert code == 143, said
        assert list(store.uploads()) == []
        assert "clean (0 artifacts, 0 objects" in quick("fsck")
        code, _ = ended_by(signal.SIGKILL, tmp_path, "save", str(source), "--key", "large.bin")
        assert code == -signal.SIGKILL
        assert len(list(store.uploads())) == 1
        quick("fsck", code=1)
        assert "clean" in quick("fsck", "--repair"), "of a dead process of this machine, known to the journal"
        assert list(store.uploads()) == []
    finally:
        store.close()


def test_objects_that_no_registry_knows_in_a_bucket(seaweed_config: StorageConfig, tmp_path: Path) -> None:
    """An upload of nobody and an object of nobody: named, the object kept, and nothing deleted by a repair."""
    config = seaweed_config
    quick("login", "testuser1")
    quick("init", "--storage", config.root, "--name", "on-s3", *options(config))
    source = large_file(tmp_path, 70 * MIB)
    uid = quick("save", source, "--key", "d/äpfel.tar.gz").split()[0]
    store = open_store(config)
    try:
        said = store.meta(f".lamindb/{uid}.tar.gz")
        assert said is not None
        assert (said.uid, said.key, said.revision) == (uid, "d/äpfel.tar.gz", 1)
        with Instance.open() as instance:
            record = make_orphan(instance.registry, uid)
        parts = store.parts
        assert parts is not None
        parts.begin_upload(".lamindb/0123456789abcdefABCD.bin")
        text = report_of()["problems"]
        assert any(uid in line and "was 'd/äpfel.tar.gz'" in line and f"sha1-fl:{record.hash}" in line for line in text)
        assert report_of("--purge-orphans")["repaired"] == [], "it is not old"
        report = quick_json("fsck", "--repair")
        assert report["clean"]
        assert quick("ls", "lost+found").split() == ["lost+found/äpfel.tar.gz"]
        info = quick_json("info", "lost+found/äpfel.tar.gz")
        assert (info["uid"], info["hash"]) == (uid, record.hash)
        path = Path(lamfs("cache", "lost+found/äpfel.tar.gz").strip())
        assert path.read_bytes() == source.read_bytes()
        assert len(list(store.uploads())) == 1
        assert quick_json("fsck", "--data")["clean"]
    finally:
        store.close()


def test_only_what_is_old_is_purged(root: Path, tmp_path: Path) -> None:
    source = large_file(tmp_path, MIB)
    keys = []
    for name, days in (("old", 31), ("young", 1)):
        uid = quick("save", source, "--key", f"{name}.bin").split()[0]
        with Instance.open() as instance:
            make_orphan(instance.registry, uid)
        keys.append(root / f".lamindb/{uid}.bin")
        moment = time.time() - days * 24 * 3600
        os.utime(keys[-1], (moment, moment))
    quick("fsck", "--purge-orphans", code=1)
    assert [key.exists() for key in keys] == [False, True]
    assert "is 'lost+found/young.bin' now" in quick("fsck", "--repair")
    assert keys[1].exists()
