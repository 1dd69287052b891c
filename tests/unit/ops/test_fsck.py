"""Every kind of damage is found, and what needs no decision is mended."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs import config
from lamfs.errors import StorageError, StorageForbidden
from lamfs.hashing import hash_block
from lamfs.keys import spool_name
from lamfs.model import ROOT_INO, ArtifactRecord
from lamfs.ops import artifacts, damage, fsck, mounts, recover, scrub, setup, strays
from lamfs.ops.instance import Instance
from lamfs.registry import process_id
from lamfs.registry.entries import save_payload
from lamfs.spool import SpoolFolder
from lamfs.storage import open_store
from lamfs.storage.base import ObjectStat, ObjectStore, UnfinishedUpload
from lamfs.storage.local import LocalStore
from lamfs.storage.root import check_object_key
from tests.support.ops import machine, make_spool, write_spool
from tests.support.timed import timed


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


def copy_object(instance: Instance, record: ArtifactRecord) -> None:
    path = object_path(instance, record)
    shutil.copy2(path, path.with_name("new"))
    os.rename(path.with_name("new"), path)


def stray_object(instance: Instance, record: ArtifactRecord) -> None:
    instance.store.put_bytes(".lamindb/0123456789abcdefABCD.csv", b"leaked")


def stray_spool(instance: Instance, record: ArtifactRecord) -> None:
    write_spool(instance, spool_name(0x12), "left")


def damage_object(instance: Instance, record: ArtifactRecord) -> None:
    with object_path(instance, record).open("r+b") as file:
        file.write(b"X")


UNREPAIRED = {
    "gone": (remove_object, r"the object .* of 'd/a.txt' is gone"),
    "short": (shorten_object, r"has 4 bytes, not 10: it is damaged, its bytes are not those of revision 1; put .*back"),
    "damaged": (
        damage_object,
        r"is damaged: its bytes are not those of revision 1; put .* or give the file its content",
    ),
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
    "copied object": (copy_object, "of 'd/a.txt' (was replaced by a copy with|is another one with) the same bytes"),
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
    assert any(re.search(text, problem) for problem in report.problems), report.problems
    report = fsck.check(instance, repair=True)
    assert report.problems == []
    assert any(re.search(text, problem) for problem in report.repaired)
    assert fsck.check(instance, data=True).problems == []
    assert artifacts.cache(instance, record).read_text() == "some bytes"


@pytest.mark.parametrize("works", [True, False])
def test_bytes_that_are_owed_outlive_the_name_of_their_file(
    instance: Instance, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """A damaged registry has lost the entry of a file that was closed and not stored; storage may be out of reach."""
    registry = instance.registry
    ino = timed(registry).names.create(1, "a.csv", 0o100644, 0, 0).ino
    src = spool_name(ino)
    path = write_spool(instance, src, "mine")
    timed(registry).journal.begin_put(ino, src)
    registry.tree.update(ino, size=4)
    timed(registry).journal.ready_put(ino)
    registry.db.execute("DELETE FROM dentry WHERE ino=?", (ino,))
    assert any(f"inode {ino} has no name" in text for text in fsck.check(instance).problems)
    with monkeypatch.context() as patch:
        if not works:
            patch.setattr(LocalStore, "put_file", broken)
        report = fsck.check(instance, repair=True)
    place = f"lost+found/inode {ino}"
    assert any(place in text for text in report.repaired), report
    assert path.exists() != works
    assert fsck.check(instance, repair=True, data=True).clean
    record = registry.artifacts.by_key(place)
    assert record is not None
    assert artifacts.cache(instance, record).read_text() == "mine"
    assert not any("links" in text for text in report.repaired if f"inode {ino} " in text)


def broken(*args: object, **kwargs: object) -> str:
    raise StorageForbidden("The bucket takes nothing.")


def test_a_directory_that_has_lost_its_name_keeps_what_is_in_it(instance: Instance, record: ArtifactRecord) -> None:
    registry = instance.registry
    folder = registry.tree.parent(record.ino or 0)
    registry.db.execute("DELETE FROM dentry WHERE ino=?", (folder,))
    assert not fsck.check(instance).clean
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    found = registry.artifacts.by_key(f"lost+found/inode {folder}/a.txt")
    assert found is not None
    assert found.uid == record.uid
    assert fsck.check(instance, repair=True, data=True).repaired == []


def test_a_new_file_that_a_power_cut_has_shortened_is_named(instance: Instance) -> None:
    registry = instance.registry
    ino = timed(registry).names.create(1, "a.csv", 0o100644, 0, 0).ino
    src = spool_name(ino)
    write_spool(instance, src, "half")
    timed(registry).journal.begin_put(ino, src)
    registry.tree.update(ino, size=8)
    timed(registry).journal.ready_put(ino)
    registry.db.execute("UPDATE journal SET owner='another-boot:1:1'")
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    assert any("'a.csv' has only 4 of its 8 bytes: the machine went down" in text for text in report.notes)
    record = registry.artifacts.by_key("a.csv")
    assert record is not None
    assert record.size == 4


def test_damaged_bytes_that_are_kept_are_not_called_lost(instance: Instance, record: ArtifactRecord) -> None:
    registry = instance.registry
    assert record.ino is not None
    src = spool_name(record.ino)
    path = write_spool(instance, src, "newer")
    timed(registry).journal.begin_put(record.ino, src)
    timed(registry).journal.ready_put(record.ino)
    entry = registry.journal.put_of(record.ino)
    assert entry is not None
    registry.seals.add(entry, 5, hash_block(b"newer"))
    path.write_text("neweR")
    report = fsck.check(instance, repair=True)
    assert any("what is left of them is 'lost+found/a (damaged).txt'" in text for text in report.repaired)
    assert not any("was missing" in text for text in report.notes)
    assert registry.rescue.lost() == []


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

    def count(path: Path, data: dict[str, Any], **how: bool) -> None:
        written.append(path.name)
        write(path, data, **how)

    monkeypatch.setattr(config, "write_json", count)
    assert len([line for line in fsck.check(instance).problems if "is gone" in line]) == 5
    assert written == ["damage.json"]
    assert len(damage.known(instance)) == 5


ODD_KEYS = ["a\0b", "/etc/passwd", "../../x", "a/../b", "", "x" * 5000, "\x1b[2J/../x", ".lamindb/../y"]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_an_artifact_whose_object_can_have_no_such_name(
    instance: Instance, record: ArtifactRecord, tmp_path: Path, key: str
) -> None:
    """It is one problem with its name, and the rest is checked."""
    path = tmp_path / "b.txt"
    path.write_text("others")
    other = artifacts.save(instance, path, key="b.txt")
    remove_object(instance, other)
    statement = "UPDATE revision SET object_key=:key WHERE id=(SELECT revision_id FROM artifact WHERE uid=:uid)"
    instance.registry.db.execute(statement, {"key": key, "uid": record.uid})
    for repair in (False, True):
        report = fsck.check(instance, repair=repair, data=True)
        said = report.repaired if repair else report.problems
        wrong = [text for text in said if "'d/a.txt'" in text and "no artifact references" not in text]
        assert len(wrong) == 1
        assert fsck.NO_NAME in wrong[0]
        assert "is that revision" in wrong[0], "its object is known by what it says"
        assert any("'b.txt' is gone" in text for text in report.problems)
    assert artifacts.cache(instance, record).read_text() == "some bytes"


def test_scrub_goes_on_behind_what_it_cannot_ask_for(instance: Instance, record: ArtifactRecord) -> None:
    instance.registry.artifacts.set_object(record.uid, "../x", record.revision.etag)
    result = scrub.run(instance, set())
    assert len(result.unread) == 1
    assert "'d/a.txt'" in result.unread[0]


class OddStore:
    """A bucket in which others have stored, and begun to upload, what lamfs would not."""

    kind = "s3"
    on_disk = imports_files = False

    def __init__(self, store: ObjectStore, keys: list[str]) -> None:
        self._store = store
        self._keys = keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def meta(self, key: str) -> None:
        return None

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        yield from self._store.list(prefix)
        yield from (ObjectStat(key, 1, "e", 0) for key in self._keys)

    def uploads(self) -> Iterator[UnfinishedUpload]:
        return (UnfinishedUpload(key, "id", 0) for key in self._keys)

    def abort_upload(self, key: str, upload_id: str) -> None:
        check_object_key(key, as_path=False)


def test_odd_objects_and_uploads_of_others(instance: Instance, record: ArtifactRecord) -> None:
    keys = ["a\0b", "/x", "../x", "\x1b[2J/..", "plain\nkey", ".lamindb/0123456789abcdefABCD\n"]
    store = OddStore(open_store(instance.settings.storage), keys)
    with Instance(instance.settings, store=store) as odd:  # type: ignore[arg-type]
        for purge in (False, True):
            report = fsck.check(odd, purge=purge)
            named = [text for text in report.notes if "has a name that lamfs gives no object" in text]
            assert len(named) == 4
            others = [text for text in report.notes if "is no artifact's" in text]
            assert len(others) == 2
            assert all("upload" in text for text in report.problems)
        assert sum("cannot be aborted" in text for text in report.problems) == 4
        assert len(report.repaired) == 2


def test_stray_spool_files_look_through_all_artifacts_once(
    instance: Instance, record: ArtifactRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a registry was restored they are many, and so may artifacts be."""
    looked = 0
    artifacts_of = type(instance.registry.artifacts)
    sizes = artifacts_of.sizes

    def counted(self: Any) -> set[int]:
        nonlocal looked
        looked += 1
        return sizes(self)

    monkeypatch.setattr(artifacts_of, "sizes", counted)
    for number in range(3):
        write_spool(instance, spool_name(0x12 + number), f"left {number}")
    write_spool(instance, spool_name(0x22), "some bytes")
    with make_spool(instance) as spool:
        kinds = [stray.kind for stray in strays.look(instance.registry, instance.store, spool)]
    assert sorted(kinds, key=str) == [strays.Kind.DOUBLE] + 3 * [strays.Kind.STRAY]
    assert looked == 1


def test_a_copy_that_a_kill_has_left_is_not_kept(instance: Instance) -> None:
    """A file that was being stored was to go on in a copy of what was to stay of it. A copy with other bytes is one in
    which it went on."""
    inode, src = timed(instance.registry).names.create_file(ROOT_INO, "b.txt", 0o100644, os.getuid(), os.getgid())
    write_spool(instance, src, "some bytes")
    cut, changed, longer = (spool_name(inode.ino) for _ in range(3))
    for name, text in ((cut, "some"), (changed, "same"), (longer, "some bytes more")):
        write_spool(instance, name, text)
    with make_spool(instance) as spool:
        kinds = {stray.src: stray.kind for stray in strays.look(instance.registry, instance.store, spool)}
    assert kinds == {cut: strays.Kind.DOUBLE, changed: strays.Kind.STRAY, longer: strays.Kind.STRAY}


def test_a_scratch_name_whose_bytes_are_in_the_spool(instance: Instance) -> None:
    """The registry was restored, and has the name alone."""
    registry = instance.registry
    inode, src = timed(registry).names.create_file(ROOT_INO, ".z.swp", 0o100640, os.getuid(), os.getgid())
    registry.tree.update(inode.ino, size=3)
    registry.db.execute("DELETE FROM journal WHERE ino=?", (inode.ino,))
    registry.db.execute("DELETE FROM spent")
    write_spool(instance, src, "abc")
    lines = [text for text in fsck.check(instance).notes if "'.z.swp' is a scratch name" in text]
    assert len(lines) == 1
    assert "its 3 bytes are not on this machine" in lines[0]
    # So it was left by the mount that came first.
    with make_spool(instance) as spool:
        strays.settle(registry, instance.store, spool, instance.settings.directory)
    recover.finish_puts(instance)
    kept = f"lost+found/kept z (spool {src}).swp"
    problems = fsck.check(instance).problems
    assert any(f"they are '{kept}'; 'lamfs fsck --repair'" in text for text in problems)
    report = fsck.check(instance, repair=True)
    assert report.clean
    assert f"tree: '.z.swp' had lost its bytes, and has those of '{kept}' again" in report.repaired
    record = registry.artifacts.by_key(".z.swp")
    assert record is not None
    assert artifacts.cache(instance, record).read_text() == "abc"
    again = registry.tree.resolve(".z.swp")
    assert again is not None
    assert again.mode == 0o100640
    assert fsck.check(instance).notes == []
    assert fsck.check(instance).clean


def test_the_bytes_of_an_artifact_in_the_trash_are_kept_all_the_same(
    instance: Instance, record: ArtifactRecord
) -> None:
    """The trash is emptied, and nobody would know that something else had them."""
    artifacts.trash(instance, record)
    write_spool(instance, spool_name(0x22), "some bytes")
    with make_spool(instance) as spool:
        (stray,) = strays.settle(instance.registry, instance.store, spool, instance.settings.directory)
    assert stray.kind is strays.Kind.STRAY
    assert stray.key is not None
    assert instance.registry.tree.resolve(stray.key) is not None


def test_a_stray_that_cannot_be_looked_at_hinders_no_other(
    instance: Instance, record: ArtifactRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [spool_name(0x22), spool_name(0x23)]
    for name in names:
        write_spool(instance, name, f"only {name}")
    status = SpoolFolder.stat

    def fails(self: SpoolFolder, name: str) -> os.stat_result:
        if name == names[0]:
            raise StorageError("It is not what it was.")
        return status(self, name)

    monkeypatch.setattr(SpoolFolder, "stat", fails)
    report = fsck.check(instance, repair=True)
    assert any(names[0] in text and "stays there" in text for text in report.problems)
    assert any(names[1] in text and "it is 'lost+found/" in text for text in report.repaired)
    with make_spool(instance) as spool:
        assert names[0] in spool.names()


def test_what_is_said_of_work_that_was_left_can_be_done(
    instance: Instance, record: ArtifactRecord, tmp_path: Path
) -> None:
    """By the mount that lives, by the next mount, or not before the machine that has the lock lets it go."""
    timed(instance.registry).journal.add_move(record.uid)
    instance.registry.db.execute("UPDATE owed SET owner='x:1:1'")
    left = f"journal: the move of {record.uid} was left "
    assert fsck.check(instance).problems == [f"{left}by a process that is gone; mount, or 'lamfs fsck --repair'"]
    instance.release_lease()
    with machine(tmp_path / "two"):
        setup.login("bob")
        setup.connect(instance.settings.storage.root)
    (problem,) = fsck.check(instance).problems
    assert problem.startswith(f"{left}by a process that is gone; as soon as bob on ")
    assert problem.endswith(", who has the lock, has given it back, or it has run out: mount, or 'lamfs fsck --repair'")
    config.make_directory(instance.settings.mounts_dir)
    live = mounts.MountRecord(os.getpid(), process_id() or "", "/mnt/here", instance.settings.slug, "/none", 1)
    mounts.write(instance.settings.mounts_dir, live)
    report = fsck.check(instance)
    assert report.problems == []
    assert f"{left}to the mount at /mnt/here, which does it" in report.notes
    payload = json.dumps(save_payload(record, base=None, mode=0o644))
    instance.registry.db.execute(
        "INSERT INTO journal(op, state, uid, object_key, created_at, owner, payload)"
        " VALUES('save', 'open', ?, 'x', 1, 'x:1:1', ?)",
        (record.uid, payload),
    )
    assert any(text.endswith("'lamfs fsck --repair' does it") for text in fsck.check(instance).problems)
