"""Every kind of damage is found, and what needs no decision is mended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs import config
from lamfs.keys import spool_name
from lamfs.model import ArtifactRecord
from lamfs.ops import artifacts, damage, fsck, setup
from lamfs.ops.instance import Instance
from tests.support.ops import write_spool


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    slug = setup.init(str(tmp_path / "store"), "a").slug
    with Instance.open(slug) as opened:
        yield opened


@pytest.fixture
def record(instance: Instance, tmp_path: Path) -> ArtifactRecord:
    path = tmp_path / "a.txt"
    path.write_text("some bytes")
    return artifacts.save(instance, path, key="d/a.txt")


def sql(text: str, *, constraints: bool = True) -> Callable[[Instance, ArtifactRecord], None]:
    def damage(instance: Instance, record: ArtifactRecord) -> None:
        db = instance.registry.db
        if not constraints:
            db.execute("PRAGMA foreign_keys=OFF")
        db.execute(text, {"ino": record.ino, "uid": record.uid})

    return damage


def object_path(instance: Instance, record: ArtifactRecord) -> Path:
    return Path(instance.settings.storage.root) / record.revision.object_key


def remove_object(instance: Instance, record: ArtifactRecord) -> None:
    object_path(instance, record).unlink()


def shorten_object(instance: Instance, record: ArtifactRecord) -> None:
    object_path(instance, record).write_text("some")


def replace_object(instance: Instance, record: ArtifactRecord) -> None:
    path = object_path(instance, record)
    path.with_name("new").write_text("same bytes")
    os.rename(path.with_name("new"), path)


def stray_object(instance: Instance, record: ArtifactRecord) -> None:
    instance.store.put_bytes(".lamindb/0123456789abcdefABCD.csv", b"leaked")


def stray_spool(instance: Instance, record: ArtifactRecord) -> None:
    write_spool(instance, spool_name(0x12), "left")


UNREPAIRED = {
    "gone": (remove_object, r"the object .* of 'd/a.txt' is gone"),
    "short": (shorten_object, r"has 4 bytes, not 10"),
    "other": (replace_object, r"was replaced by something else"),
    "dangling entry": (sql("INSERT INTO dentry(parent, name, ino) VALUES(1, 'x', 999)"), "inode 999, which does not"),
    "entry in nowhere": (sql("INSERT INTO dentry(parent, name, ino) VALUES(998, 'x', :ino)"), "directory 998"),
    "no entry": (sql("DELETE FROM dentry WHERE ino=:ino"), "is shown but has no entry"),
    "wrong key": (sql("UPDATE artifact SET key='elsewhere.txt' WHERE uid=:uid"), "but is at 'd/a.txt'"),
    "wrong suffix": (sql("UPDATE artifact SET suffix='.csv' WHERE uid=:uid"), "has the suffix '.csv'"),
    "wrong size": (sql("UPDATE inode SET size=3 WHERE ino=:ino"), "shows 3 bytes and has 10"),
    "trash with entry": (sql("UPDATE artifact SET visibility=-1 WHERE uid=:uid"), "is in the trash but has the entry"),
    "no inode": (sql("UPDATE artifact SET ino=997 WHERE uid=:uid"), "has inode 997, which does not exist"),
    "bad reference": (
        sql("UPDATE artifact SET run_id=55 WHERE uid=:uid", constraints=False),
        "registry: a row of table artifact",
    ),
    "loop": (
        sql("UPDATE dentry SET parent=(SELECT ino FROM dentry WHERE name='d') WHERE name='d'"),
        "cannot be reached from the root",
    ),
}
REPAIRED = {
    "stray object": (stray_object, "no artifact references"),
    "stray spool": (stray_spool, "nothing owes the file"),
    "links": (sql("UPDATE inode SET nlink=7 WHERE ino=:ino"), "counts 7 links and has 1"),
    "directory links": (sql("UPDATE inode SET nlink=9 WHERE ino=1"), "inode 1 counts 9 links"),
    "orphan": (
        sql("INSERT INTO inode(ino,mode,uid,gid,nlink,atime_ns,mtime_ns,ctime_ns) VALUES(996,33188,0,0,0,0,0,0)"),
        "inode 996 has no name",
    ),
}


def test_a_clean_instance(instance: Instance, record: ArtifactRecord) -> None:
    artifacts.trash(instance, record)
    report = fsck.check(instance, data=True)
    assert (report.problems, report.notes, report.artifacts, report.objects) == ([], [], 1, 1)
    assert fsck.check(instance, repair=True).repaired == []


@pytest.mark.parametrize("name", UNREPAIRED)
def test_damage_that_needs_a_decision(instance: Instance, record: ArtifactRecord, name: str) -> None:
    damage, text = UNREPAIRED[name]
    damage(instance, record)
    for repair in (False, True):
        report = fsck.check(instance, repair=repair)
        assert not report.clean
        with pytest.raises(AssertionError, match=text):
            raise AssertionError("\n".join(report.problems))


@pytest.mark.parametrize("name", REPAIRED)
def test_damage_that_is_mended(instance: Instance, record: ArtifactRecord, name: str) -> None:
    damage, text = REPAIRED[name]
    damage(instance, record)
    report = fsck.check(instance)
    assert any(text in problem for problem in report.problems), report.problems
    report = fsck.check(instance, repair=True)
    assert report.problems == []
    assert any(text in problem for problem in report.repaired)
    assert fsck.check(instance, data=True).problems == []
    assert artifacts.cache(instance, record).read_text() == "some bytes"


def test_bit_rot_is_found_by_reading(instance: Instance, record: ArtifactRecord) -> None:
    path = object_path(instance, record)
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(3)
        stream.write(b"X")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fsck.check(instance).clean
    report = fsck.check(instance, data=True)
    assert len(report.problems) == 1
    assert "block 0" in report.problems[0]


def test_what_somebody_wanted_to_keep_is_kept(instance: Instance, record: ArtifactRecord) -> None:
    artifacts.purge(instance, record, storage=False)
    (Path(instance.settings.storage.root) / "foreign.txt").write_text("x")
    report = fsck.check(instance, repair=True)
    assert (report.problems, report.repaired) == ([], [])
    assert len(report.notes) == 2
    assert object_path(instance, record).exists()


def test_a_damaged_file_is_said(instance: Instance, record: ArtifactRecord) -> None:
    settings = instance.settings
    for n in range(300):  # more than one page
        instance.registry.db.set_meta(f"filler {n}", "x" * 100)
    instance.close()
    with settings.registry_path.open("r+b") as stream:
        size = stream.seek(0, 2)
        for page in range(8192, size, 4096):
            stream.seek(page)
            stream.write(b"\xff" * 600)
    with Instance(settings) as opened:
        report = fsck.check(opened)
        assert any("--restore" in problem for problem in report.problems)


def test_much_damage_is_written_down_once(instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(str(number))
        remove_object(instance, artifacts.save(instance, tmp_path / f"{number}.txt", key=f"{number}.txt"))
    written = []
    write = config.write_json

    def count(path: Path, data: dict[str, Any]) -> None:
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(config, "write_json", count)
    assert len([line for line in fsck.check(instance).problems if "is gone" in line]) == 5
    assert written == ["damage.json"]
    assert len(damage.known(instance)) == 5
