"""``fsck`` says what is wrong with the registry's copy in storage, and stores this machine's again where it may."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamfs import config
from lamfs.config import InstanceSettings
from lamfs.errors import ObjectChanged, StorageUnavailable
from lamfs.ops import artifacts, fsck, mounts, setup, snapshot, stored_registry
from lamfs.ops.instance import Instance
from lamfs.ops.mounts import MountRecord
from lamfs.registry import process_id
from tests.support.ops import BadStore, machine

SLUG = "ada/default"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The copy in storage, of an instance with an artifact, that this machine has stored twice."""
    setup.login("ada")
    settings = setup.init(str(tmp_path / "store"), "default")
    path = tmp_path / "store" / settings.snapshot_key
    (tmp_path / "first.lndb").write_bytes(path.read_bytes())
    save(tmp_path, "a.txt")
    with Instance.open(SLUG) as opened:
        snapshot.push(opened)
    return path


def save(tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text(key)
    with Instance.open(SLUG) as opened:
        artifacts.save(opened, tmp_path / "file", key=key)


def check(**how: bool) -> fsck.Report:
    with Instance.open(SLUG) as opened:
        return fsck.check(opened, **how)


def remove(place: Path, tmp_path: Path) -> None:
    place.unlink()


def cut(place: Path, tmp_path: Path) -> None:
    os.truncate(place, 3000)


def empty(place: Path, tmp_path: Path) -> None:
    os.truncate(place, 0)


def rot(place: Path, tmp_path: Path) -> None:
    """A page changes on the disk, and nothing tells of it."""
    with sqlite3.connect(place) as conn:
        (root,) = conn.execute("SELECT rootpage FROM sqlite_master WHERE name='dentry'").fetchone()
        (size,) = conn.execute("PRAGMA page_size").fetchone()
    conn.close()
    status = place.stat()
    with place.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * 64)
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))


def set_back(place: Path, tmp_path: Path) -> None:
    place.write_bytes((tmp_path / "first.lndb").read_bytes())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (remove, r"is gone, so no other machine can connect"),
        (cut, r"is damaged"),
        (empty, r"is damaged"),
        (rot, r"is damaged"),
        (set_back, r"is older than what this machine has stored: it has seen \d+ changes, and \d+ were stored"),
    ],
)
def test_what_this_machine_can_store_again(
    place: Path, tmp_path: Path, harm: Callable[[Path, Path], None], words: str
) -> None:
    assert check().problems == []
    harm(place, tmp_path)
    (problem,) = check().problems
    assert str(place) in problem
    assert problem.endswith("'lamfs close' or 'lamfs fsck --repair' stores this machine's there again")
    assert re.search(words, problem)
    report = check(repair=True)
    assert report.problems == []
    assert [text for text in report.repaired if text.startswith("registry in storage: ")] != []
    assert check(data=True).problems == []
    with machine(tmp_path / "two"):
        with Instance(InstanceSettings(SLUG, config.StorageConfig(str(place.parent)))) as opened:
            assert snapshot.origin(opened, place.name).changes > 0
    setup.close(SLUG)
    with machine(tmp_path / "three"):
        setup.connect(str(place.parent))
        with Instance.open(SLUG) as opened:
            assert [record.key for record in opened.registry.artifacts.filter()] == ["a.txt"]


def test_while_it_is_mounted_the_mount_stores_it(place: Path) -> None:
    place.unlink()
    settings = config.load_instance(SLUG)
    config.make_directory(settings.mounts_dir)
    mounts.write(
        settings.mounts_dir, MountRecord(os.getpid(), process_id() or "", "/mnt", SLUG, "/none", 1, False, "", 0)
    )
    (problem,) = check(repair=True).problems
    assert problem.endswith("the next 'lamfs umount' stores this machine's there again")
    assert not place.exists()


def test_that_of_another_instance_is_not_replaced(place: Path, tmp_path: Path) -> None:
    with machine(tmp_path / "elsewhere"):
        setup.login("ada")
        setup.init(str(tmp_path / "other"), "default")
    theirs = (tmp_path / "other" / place.name).read_bytes()
    place.write_bytes(theirs)
    (problem,) = check().problems
    assert f"{place} is of another instance than '{SLUG}' on this machine; move it away" in problem
    assert any("another instance" in text for text in check(repair=True).problems)
    assert place.read_bytes() == theirs


@pytest.mark.parametrize("both", [False, True])
def test_that_of_a_machine_that_has_gone_on(place: Path, tmp_path: Path, both: bool) -> None:
    if both:
        save(tmp_path, "ours.txt")
    with Instance.open(SLUG) as opened:
        opened.release_lease()
    with machine(tmp_path / "two"):
        setup.connect(str(place.parent))
        save(tmp_path, "theirs.txt")
        setup.close(SLUG)
    theirs = place.read_bytes()
    report = check()
    said = [text for text in (report.problems if both else report.notes) if text.startswith("registry in storage: ")]
    (text,) = said
    assert ("has some of its own" if both else "has nothing of its own") in text
    assert f"'lamfs connect {SLUG} --restore'" in text
    assert [text for text in report.problems if text.startswith("registry in storage: ")] == (said if both else [])
    assert place.read_bytes() == theirs


def test_a_copy_that_is_replaced_meanwhile_is_no_problem(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*_: object) -> None:
        raise ObjectChanged("changed")

    monkeypatch.setattr(snapshot, "fetch", changed)
    report = check()
    assert report.problems == []
    (note,) = report.notes
    assert "is being replaced at this moment" in note


def test_a_push_that_fails_does_not_make_this_machine_forget_what_it_has_stored(place: Path, tmp_path: Path) -> None:
    """Else a registry that has nothing of its own would be said to have, and kept beside that of another machine."""
    cut(place, tmp_path)
    with Instance.open(SLUG) as opened:
        before = snapshot.known_etag(opened)
        bad: Any = BadStore(opened.store, put_file=["fail"])
        with Instance(opened.settings, store=bad) as failing, pytest.raises(StorageUnavailable):
            stored_registry.mend(failing)
        assert snapshot.known_etag(opened) == before is not None
        assert not snapshot.is_ahead(opened)
        assert stored_registry.mend(opened)
        assert stored_registry.look(opened) is None
