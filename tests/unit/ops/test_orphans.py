"""Objects that no artifact references: never deleted by a repair, kept as files of lost+found, said what they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lamfs.config import data_dir
from lamfs.model import ArtifactRecord, ObjectMeta
from lamfs.ops import artifacts, drafts, fsck, orphans, setup, temporaries
from lamfs.ops.instance import Instance
from lamfs.processes import state_of
from lamfs.storage.base import ObjectStat
from tests.support.ops import BadStore, make_orphan
from tests.support.timed import timed

DAY = 24 * 3600
UID = "0123456789abcdefABCD"


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    with Instance.open(setup.init(str(tmp_path / "store"), "a").slug) as opened:
        yield opened


def save(instance: Instance, tmp_path: Path, text: str, key: str, virtual: bool = True) -> ArtifactRecord:
    path = tmp_path / "source"
    path.write_text(text)
    return artifacts.save(instance, path, key=key, virtual=virtual)


def forget(instance: Instance, *records: ArtifactRecord) -> None:
    """What an old copy of the registry does not know."""
    for record in records:
        make_orphan(instance.registry, record.uid)


def age(instance: Instance, key: str, days: float) -> None:
    path = Path(instance.settings.storage.root) / key
    moment = path.stat().st_mtime - days * DAY
    os.utime(path, (moment, moment))


def objects(instance: Instance) -> dict[str, bytes]:
    found = [item.key for item in instance.store.list() if item.key != instance.settings.snapshot_key]
    return {key: instance.store.get(key) for key in found if not key.startswith(".lamindb/_")}


def kept(instance: Instance) -> dict[str, ArtifactRecord]:
    return {record.key or "": record for record in instance.registry.artifacts.filter(key__startswith="lost+found/")}


def test_every_save_says_what_it_is(instance: Instance, tmp_path: Path) -> None:
    first = save(instance, tmp_path, "one", "d/ä 1.csv")
    assert instance.store.meta(first.revision.object_key) == ObjectMeta(first.uid, "d/ä 1.csv", 1, f"md5:{first.hash}")
    second = save(instance, tmp_path, "two", "d/ä 1.csv")
    third = save(instance, tmp_path, "two", "twin.csv")
    real = save(instance, tmp_path, "real", "real/x.csv", virtual=False)
    for record, number in ((second, 2), (third, 1), (real, 1)):
        said = instance.store.meta(record.revision.object_key)
        assert said == ObjectMeta(record.uid, record.key, number, f"md5:{record.hash}")
        assert record.number == number
    again = artifacts.replace(instance, second.uid, tmp_path / "source")
    assert instance.store.meta(again.revision.object_key) == again.meta
    assert again.number == 3


def test_a_moved_object_says_its_new_key(instance: Instance, tmp_path: Path) -> None:
    record = save(instance, tmp_path, "real", "real/x.csv", virtual=False)
    timed(instance.registry).names.rename_artifact(record.uid, "other/y.csv")
    artifacts.recover.run_owed(instance, strict=True)
    said = instance.store.meta("other/y.csv")
    assert said == ObjectMeta(record.uid, "other/y.csv", 1, f"md5:{record.hash}")


def test_a_repair_keeps_what_the_registry_does_not_know(instance: Instance, tmp_path: Path) -> None:
    """After a take-over from an old registry copy these are the newest files."""
    virtual = save(instance, tmp_path, "virtual", "d/new.csv")
    real = save(instance, tmp_path, "real", "real/x.csv", virtual=False)
    forget(instance, virtual, real)
    before = objects(instance)
    report = fsck.check(instance)
    for record, key in ((virtual, "d/new.csv"), (real, "real/x.csv")):
        line = next(text for text in report.problems if record.revision.object_key in text)
        for part in (f"was '{key}'", "revision 1", record.uid, f"md5:{record.hash}", f"{record.size} bytes"):
            assert part in line
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    assert objects(instance) == before, "where they are, and nothing is copied"
    found = kept(instance)
    assert sorted(found) == ["lost+found/new.csv", "lost+found/x.csv"]
    for key, was in (("lost+found/new.csv", virtual), ("lost+found/x.csv", real)):
        now = found[key]
        assert (now.uid, now.number, now.revision.content) == (was.uid, 1, was.revision.content)
        assert now.revision.object_key == was.revision.object_key
        assert f"was {was.key}, revision 1, found 2" in (now.description or "")
        assert artifacts.cache(instance, now).read_bytes() == before[was.revision.object_key]
        assert any(f"it is '{key}' now" in text for text in report.repaired)
    assert fsck.check(instance, repair=True, data=True).repaired == []


def test_another_revision_of_what_is_there(instance: Instance, tmp_path: Path) -> None:
    now = save(instance, tmp_path, "two", "d/a.tar.gz")
    meta = ObjectMeta(now.uid, "d/a.tar.gz", 7, "md5:" + "x" * 22)
    (tmp_path / "newer").write_text("newer")
    instance.store.put_file(f".lamindb/{now.uid}.abc123.tar.gz", str(tmp_path / "newer"), meta=meta)
    report = fsck.check(instance, repair=True)
    assert report.clean
    record = kept(instance)["lost+found/a (revision 7).tar.gz"]
    assert record.uid != now.uid
    assert record.number == 7
    assert f"of the artifact {now.uid}" in (record.description or "")
    assert "its bytes are not those that were stored" in (record.description or ""), "its hash is another one"
    assert artifacts.cache(instance, now).read_text() == "two"
    assert artifacts.cache(instance, record).read_text() == "newer"


def test_names_that_are_taken(instance: Instance, tmp_path: Path) -> None:
    records = [save(instance, tmp_path, f"{number}", f"{number}/a.csv") for number in range(3)]
    forget(instance, *records)
    assert fsck.check(instance, repair=True).clean
    found = kept(instance)
    assert len(found) == 3
    assert "lost+found/a.csv" in found
    others = {key for key in found if key != "lost+found/a.csv"}
    assert others <= {f"lost+found/a ({record.uid}).csv" for record in records}


def test_without_metadata_the_key_tells_the_uid(instance: Instance) -> None:
    instance.store.put_bytes(f".lamindb/{UID}.csv", b"left")
    report = fsck.check(instance, repair=True)
    assert report.clean
    record = kept(instance)[f"lost+found/{UID}.csv"]
    assert record.uid == UID
    assert artifacts.cache(instance, record).read_bytes() == b"left"


@pytest.mark.parametrize("key", ["../../evil", "a/../../b", "x" * 255, "\x1b[2Jx", "4913", "a\nb", ".lamfs"])
def test_what_metadata_say_names_nothing_else(instance: Instance, tmp_path: Path, key: str) -> None:
    path = tmp_path / "f"
    path.write_text("bytes")
    instance.store.put_file(f".lamindb/{UID}.bin", str(path))
    value = f"{UID} 1 - ={key}".encode()
    os.setxattr(Path(instance.settings.storage.root) / f".lamindb/{UID}.bin", "user.lamfs", value)
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    (found,) = kept(instance)
    assert found.count("/") == 1
    assert fsck.check(instance, data=True).clean


def test_only_purging_deletes_and_only_what_is_old(instance: Instance, tmp_path: Path) -> None:
    for name, days in (("old", 31), ("young", 29), ("retained", 400)):
        record = save(instance, tmp_path, name, f"{name}.csv")
        key = record.revision.object_key
        if name == "retained":
            artifacts.purge(instance, record, storage=False)
        else:
            forget(instance, record)
        age(instance, key, days)
    foreign = Path(instance.settings.storage.root) / "foreign.txt"
    foreign.write_text("others'")
    age(instance, "foreign.txt", 400)
    report = fsck.check(instance, purge=True)
    assert next(text for text in report.repaired if "deleted" in text).count("was 'old.csv'") == 1
    assert any("'young.csv'" in text and "younger than 30 days" in text for text in report.problems)
    assert sorted(objects(instance).values()) == [b"others'", b"retained", b"young"]
    report = fsck.check(instance, purge=True, repair=True)
    assert report.clean
    assert list(kept(instance)) == ["lost+found/young.csv"]


def test_nothing_is_purged_where_others_store_too(instance: Instance, tmp_path: Path) -> None:
    forget(instance, record := save(instance, tmp_path, "old", "old.csv"))
    age(instance, record.revision.object_key, 400)
    instance.store.put_bytes("0" * 32 + ".lndb", b"another instance's registry")
    for purge, repair in ((True, False), (False, True)):
        report = fsck.check(instance, purge=purge, repair=repair)
        assert any(record.revision.object_key in text for text in report.notes)
        assert instance.store.get(record.revision.object_key) == b"old"
    assert kept(instance) == {}


def test_what_was_written_meanwhile_is_not_purged(instance: Instance, tmp_path: Path) -> None:
    forget(instance, record := save(instance, tmp_path, "old", "old.csv"))
    key = record.revision.object_key
    age(instance, key, 31)
    found = orphans.find(instance, list(instance.store.list()), shared=False, jobs=2).orphans
    assert [orphan.item.key for orphan in found] == [key]
    instance.store.put_bytes(key, b"new")
    assert orphans.purge(instance, found) == []
    age(instance, key, 31)
    found = orphans.find(instance, list(instance.store.list()), shared=False, jobs=2).orphans
    assert orphans.keep(instance, found[0]) is not None
    assert orphans.purge(instance, found) == [], "it is an artifact by now"
    assert instance.store.get(key) == b"new"


def test_what_was_kept_gives_way(instance: Instance, tmp_path: Path) -> None:
    """A new file with the real key of an object that is in lost+found."""
    forget(instance, save(instance, tmp_path, "old", "real/x.csv", virtual=False))
    assert fsck.check(instance, repair=True).clean
    new = save(instance, tmp_path, "new", "real/x.csv", virtual=False)
    for _ in range(3):
        artifacts.recover.run_owed(instance, strict=True)
    assert instance.registry.journal.owed() == {}
    current = instance.registry.artifacts.by_uid(new.uid)
    assert current is not None
    assert current.revision.object_key == "real/x.csv"
    assert instance.store.get("real/x.csv") == b"new"
    assert artifacts.cache(instance, kept(instance)["lost+found/x.csv"]).read_bytes() == b"old"
    assert fsck.check(instance, data=True).clean


def test_an_interrupted_save_deletes_no_object_of_others(instance: Instance, tmp_path: Path) -> None:
    """Another program stores something at a real key while a save to it is under way, and dies."""
    path = tmp_path / "source"
    path.write_text("ours")
    draft = drafts.draft_new(instance, path, key="real/x.csv", virtual=False)
    timed(instance.registry).commits.announce_save(draft.record)
    instance.registry.db.execute("UPDATE journal SET owner='boot:0:1'")
    instance.store.put_bytes("real/x.csv", b"theirs")
    artifacts.recover.finish_all(instance)
    assert instance.registry.journal.owed() == {}
    assert instance.store.get("real/x.csv") == b"theirs"


def test_an_interrupt_leaves_nothing_half_done(instance: Instance, tmp_path: Path) -> None:
    class Interrupted(BadStore):
        def put_file(self, key: str, path: str, **kwargs: object) -> None:
            raise KeyboardInterrupt

    path = tmp_path / "source"
    path.write_text("bytes")
    with Instance(instance.settings, store=Interrupted(instance.store)) as opened:  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            artifacts.save(opened, path, key="a.csv")
        assert opened.registry.journal.owed() == {}
    assert fsck.check(instance).clean


# -- temporaries ------------------------------------------------------------------------------------------------------


def test_temporaries_of_dead_processes_are_removed_and_named(instance: Instance, tmp_path: Path) -> None:
    from lamfs import config

    machine = config.machine_mark()
    dead, other = f"{machine}-deadbeef-1-1-1-00000000", "0" * 12 + "-deadbeef-1-1-1-00000000"
    folder = Path(instance.settings.storage.root) / ".lamindb/_tmp"
    folder.mkdir(parents=True, exist_ok=True)
    spots = [folder / dead, instance.settings.directory / f".push-{dead}.lndb", data_dir() / f"tmp/{dead}-x.parquet"]
    spots[2].parent.mkdir(exist_ok=True)
    living = folder / config.temporary_name()
    for path in (*spots, living, folder / other, folder / "oldform"):
        path.write_bytes(b"x" * 1000)
    report = fsck.check(instance)
    assert report.clean
    for path in spots:
        assert not path.exists()
        assert any(str(path) in text and "1000 bytes" in text for text in report.repaired)
    assert living.exists()
    for name in (other, "oldform"):
        assert (folder / name).exists()
        assert any(name in text and "0 min ago" in text for text in report.notes)
        os.utime(folder / name, (1e9, 1e9))
    fsck.check(instance)
    assert [path.name for path in folder.iterdir()] == [living.name]
    assert instance.store.parts is None


def test_what_a_lock_was_compared_with_is_removed(instance: Instance) -> None:
    """A process that was killed while it asked the storage what time it is has left it."""
    from lamfs import config

    dead, other = f"{config.machine_mark()}-deadbeef-1-1-1-00000000", "0" * 12 + "-deadbeef-1-1-1-00000000"
    instance.hold()
    lease = instance.lease()
    put = instance.store.put_bytes

    def killed(key: str, data: bytes, **how: Any) -> ObjectStat:
        put(key, data, **how)
        made.append(key)
        raise KeyboardInterrupt

    made: list[str] = []
    found = lease._read()
    assert found is not None
    lease._store = SimpleNamespace(put_bytes=killed, delete=lambda keys: None)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        lease._age(found)
    own, _, mark = made[0].rpartition(".")
    assert own == lease.key
    assert state_of(mark, config.machine_mark()) == "alive"
    names = [f"{lease.key}.{dead}", f"{lease.key}.{other}", f"{lease.key}.0123abcd", f"{lease.key}x", made[0]]
    for name in names:
        put(name, b"What time is it?")
    swept = temporaries.sweep(instance)
    (removed,) = swept.removed
    assert dead in removed
    assert instance.lease().peek() is not None
    folder = Path(instance.settings.storage.root)
    assert sorted(name for name in names if (folder / name).exists()) == sorted(names[1:])
    for name in names[1:]:
        os.utime(folder / name, (1e9, 1e9))
    temporaries.sweep(instance)
    assert sorted(name for name in names if (folder / name).exists()) == sorted(names[3:])


def test_a_dead_copy_in_the_cache_is_removed(instance: Instance, tmp_path: Path) -> None:
    from lamfs import config
    from lamfs.cache.index import TEMPORARY

    index, folder = instance.cache_index, instance.cache_dir
    name = f"d/{TEMPORARY}{config.machine_mark()}-deadbeef-1-1-1-00000000"
    (folder / "d").mkdir()
    (folder / name).write_bytes(b"x")
    index.reset(name, "e", 1, full=True)
    assert index.temporaries() == [name.encode()]
    report = fsck.check(instance)
    assert any(name in text for text in report.repaired)
    assert not (folder / name).exists()
    assert index.temporaries() == []
