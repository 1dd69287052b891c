"""Objects that hold what an old registry does not know: named, made readable by a repair, and never deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs import hashing
from lamfs.errors import ObjectChanged, StorageForbidden
from lamfs.model import BLOCK_SIZE, ArtifactRecord, ObjectMeta
from lamfs.ops import artifacts, damage, fsck, recover, setup
from lamfs.ops.instance import Instance
from lamfs.registry.entries import Delete
from lamfs.registry.partial_spools import base_id
from lamfs.storage import local
from lamfs.storage.base import ObjectStat
from lamfs.work import guard, unknown
from lamfs.work.conflicts import Conflicts
from tests.support.ops import make_spool, write_spool
from tests.support.timed import timed

UID = "0123456789abcdefABCD"


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    with Instance.open(setup.init(str(tmp_path / "store"), "a").slug) as opened:
        yield opened


class Past:
    """What an old copy of the registry says, while storage has the work that came after."""

    def __init__(self, instance: Instance, tmp_path: Path) -> None:
        self.instance = instance
        self._tmp = tmp_path

    def save(self, text: str, key: str, virtual: bool = True) -> ArtifactRecord:
        path = self._tmp / "source"
        path.write_text(text)
        return artifacts.save(self.instance, path, key=key, virtual=virtual)

    def put(self, text: str, object_key: str, meta: ObjectMeta | None) -> None:
        """Store an object of which the registry knows nothing."""
        path = self._tmp / "unknown"
        path.write_text(text)
        self.instance.store.put_file(object_key, str(path), meta=meta)

    def forget(self, record: ArtifactRecord, work: Callable[[], ArtifactRecord]) -> ArtifactRecord:
        """Change an artifact, and have the registry say of it what it said before. Returns what was forgotten."""
        db = self.instance.registry.db
        done = work()
        content = record.revision.content
        db.execute(
            "UPDATE revision SET size=?, hash=?, blocks=?, object_key=?, etag=?, number=?"
            " WHERE id=(SELECT revision_id FROM artifact WHERE uid=?)",
            (content.size, content.hash, content.blocks, record.revision.object_key, record.revision.etag,
             record.number, record.uid),
        )  # fmt: skip
        db.execute("UPDATE inode SET size=? WHERE ino=?", (content.size, record.ino))
        return done

    def read(self, key: str) -> str:
        record = self.instance.registry.artifacts.by_key(key)
        assert record is not None, key
        return artifacts.cache(self.instance, record).read_text()

    def both(self, key: str, theirs: str, ours: str) -> None:
        """Somebody else's bytes have the name, ours the one beside it."""
        assert self.read(key) == theirs
        (beside,) = [found for found in self.keys() if "(conflict " in found]
        assert beside.startswith(key.rpartition(".")[0])
        assert self.read(beside) == ours

    def keys(self) -> list[str]:
        return sorted(record.key or "" for record in self.instance.registry.artifacts.filter())

    def objects(self) -> list[bytes]:
        store = self.instance.store
        found = [item.key for item in store.list() if item.key != self.instance.settings.snapshot_key]
        return sorted(store.get(key) for key in found if not key.startswith(".lamindb/_"))


@pytest.fixture
def past(instance: Instance, tmp_path: Path) -> Past:
    return Past(instance, tmp_path)


@pytest.mark.parametrize("virtual", [True, False])
def test_a_later_revision_becomes_the_content(instance: Instance, past: Past, virtual: bool) -> None:
    """What an old copy of the registry knows was replaced in place: the newest acknowledged bytes are there."""
    first = past.save("one", "d/a.csv", virtual)
    second = past.forget(first, lambda: past.save("two, longer", "d/a.csv", virtual))
    assert (second.revision.object_key == first.revision.object_key) is not virtual
    now = instance.registry.artifacts.by_uid(first.uid)
    assert now is not None
    assert now.number == 1
    report = fsck.check(instance)
    (line,) = [text for text in report.problems if first.revision.object_key in text]
    for part in (
        "is gone" if virtual else "has 11 bytes, not 3",
        "a later revision",
        "revision 2",
        f"md5:{second.hash}",
        "was 'd/a.csv'",
    ):
        assert part in line
    assert "'lamfs fsck --repair' makes that its content" in line
    assert any("--repair" in one.sentence for one in damage.known(instance)), "status shows it"
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    assert any("the 3 bytes of revision 1 are in storage no more" in text for text in report.repaired)
    assert past.read("d/a.csv") == "two, longer"
    record = instance.registry.artifacts.by_uid(first.uid)
    assert record is not None
    assert (record.number, record.revision) == (2, second.revision)
    assert record.ino is not None
    inode = instance.registry.tree.get(record.ino)
    assert inode is not None
    assert inode.size == 11
    assert inode.mtime_ns == instance.store.head(second.revision.object_key).mtime_ns
    assert fsck.check(instance, data=True).clean
    assert damage.known(instance) == []
    assert past.save("three", "d/a.csv", virtual).number == 3


def test_a_later_revision_beside_the_one_that_is_known(instance: Instance, past: Past) -> None:
    """The other machine had not deleted what it replaced."""
    first = past.save("one", "a.csv")
    past.put("two, longer", f".lamindb/{first.uid}.2.csv", ObjectMeta(first.uid, "a.csv", 2, None))
    (line,) = [text for text in fsck.check(instance).problems if "no artifact references" not in text]
    assert "is of an earlier revision than one that is in storage" in line
    assert "'lamfs fsck --repair' makes that its content" in line
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    assert past.read("a.csv") == "two, longer"
    recover.run_owed(instance, strict=True)
    assert past.objects() == [b"two, longer"]
    assert fsck.check(instance, data=True).clean
    assert damage.known(instance) == []


def test_a_revision_of_the_same_size(instance: Instance, past: Past) -> None:
    first = past.save("one", "a.csv", False)
    past.forget(first, lambda: past.save("two", "a.csv", False))
    assert any(damage.REPLACED in text and "a later revision" in text for text in fsck.check(instance).problems)
    assert fsck.check(instance, repair=True).clean
    assert past.read("a.csv") == "two"
    assert instance.registry.artifacts.by_uid(first.uid) is not None


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("nothing", "a.csv"),
        ("another artifact", "theirs.csv"),
        ("an older one", "a (revision 1).csv"),
        ("other bytes", "a (revision 7).csv"),
    ],
)
def test_what_does_not_fit_is_kept_and_not_guessed(instance: Instance, past: Past, what: str, name: str) -> None:
    past.save("one", "d/a.csv")
    record = past.save("two", "d/a.csv")
    metas = {
        "nothing": None,
        "another artifact": ObjectMeta(UID, "d/theirs.csv", 5, None),
        "an older one": ObjectMeta(record.uid, "d/a.csv", 1, None),
        "other bytes": ObjectMeta(record.uid, "d/a.csv", 7, "md5:" + "x" * 22),
    }
    past.put("what is that", record.revision.object_key, metas[what])
    assert any("12 bytes, not 3" in text for text in fsck.check(instance).problems)
    report = fsck.check(instance, repair=True)
    place = f"lost+found/{name}"
    assert any(f"that is '{place}' now" in text for text in report.repaired), report
    assert past.read(place) == "what is that"
    assert past.keys() == ["d/a.csv", place]
    kept = instance.registry.artifacts.by_key(place)
    assert kept is not None
    assert kept.revision.object_key == record.revision.object_key, "where it is in storage"
    assert (kept.uid == UID) == (what == "another artifact")
    if what == "other bytes":
        assert "its bytes are not those that were stored" in (kept.description or "")
    (line,) = [text for text in fsck.check(instance, repair=True).problems if record.uid in text]
    assert "is gone" in line
    assert past.objects() == [b"what is that"]
    # The name can be used on: what was found stays.
    assert past.save("three", "d/a.csv").uid == record.uid
    assert fsck.check(instance, repair=True, data=True).clean
    assert past.read(place) == "what is that"
    assert past.read("d/a.csv") == "three"


def test_without_a_hash_the_number_counts(instance: Instance, past: Past) -> None:
    """Objects that were sent in parts say no hash."""
    record = past.save("one", "a.csv")
    past.put("in parts", record.revision.object_key, ObjectMeta(record.uid, "a.csv", 2, None))
    assert fsck.check(instance, repair=True).clean
    assert past.read("a.csv") == "in parts"


def test_a_later_revision_that_has_moved(instance: Instance, past: Past) -> None:
    """Its object is under another key by now, and the one that the registry knows is gone."""
    record = past.save("one", "a.csv")
    path = Path(instance.settings.storage.root)
    text = "elsewhere"
    past.put(text, f".lamindb/{record.uid}.txt", ObjectMeta(record.uid, "a.txt", 3, None))
    past.put("older", f".lamindb/{record.uid}.old.txt", ObjectMeta(record.uid, "a.txt", 2, None))
    (path / record.revision.object_key).unlink()
    said = f"is gone; at {path}/.lamindb/{record.uid}.txt is a later revision"
    assert any(said in text for text in fsck.check(instance).problems)
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    assert past.read("a.csv") == text
    assert past.read("lost+found/a (revision 2).txt") == "older"
    assert past.keys() == ["a.csv", "lost+found/a (revision 2).txt"]


def test_damage_of_the_revision_itself_stays_damage(instance: Instance, past: Past) -> None:
    record = past.save("some bytes", "a.csv")
    (Path(instance.settings.storage.root) / record.revision.object_key).write_text("some")
    for repair in (False, True):
        (line,) = fsck.check(instance, repair=repair).problems
        assert "has 4 bytes, not 10: it is damaged, its bytes are not those of revision 1; put" in line
    assert past.keys() == ["a.csv"]


def test_where_others_store_too_nothing_is_taken_that_may_be_theirs(instance: Instance, past: Past) -> None:
    mine, theirs = past.save("one", "a.csv"), past.save("one", "real/b.csv", virtual=False)
    instance.store.put_bytes("0" * 32 + ".lndb", b"another instance's registry")
    past.put("two", mine.revision.object_key, ObjectMeta(mine.uid, "a.csv", 2, None))
    past.put("theirs", theirs.revision.object_key, ObjectMeta(UID, "real/b.csv", 1, None))
    report = fsck.check(instance, repair=True)
    assert len(report.problems) == 1
    assert past.read("a.csv") == "two"
    assert past.keys() == ["a.csv", "real/b.csv"]


# -- writing over it --------------------------------------------------------------------------------------------------


def test_a_save_does_not_write_over_what_is_unknown(instance: Instance, past: Past) -> None:
    first = past.save("one", "a.csv")
    past.forget(first, lambda: past.save("two", "a.csv"))
    past.save("three", "a.csv")
    assert past.read("a.csv") == "three"
    assert past.read("lost+found/a (revision 2).csv") == "two"
    assert fsck.check(instance, repair=True, data=True).clean


def test_recovery_does_not_write_over_what_is_unknown(instance: Instance, past: Past) -> None:
    """The spool of a machine that was taken over and comes back, and an object that was stored meanwhile."""
    record = past.save("one", "a.csv")
    past.forget(record, lambda: past.save("two", "a.csv"))
    assert record.ino is not None
    journal = timed(instance.registry).journal
    src = f"{record.ino:x}-0123456789ab"
    write_spool(instance, src, "three")
    journal.begin_put(record.ino, src)
    journal.ready_put(record.ino)
    assert recover.finish_puts(instance, strict=True) == 1
    past.both("a.csv", "two", "three")
    assert fsck.check(instance, repair=True, data=True).clean


def owe(instance: Instance, ino: int, text: str, *, virtual: bool = True, base: str | None = None) -> None:
    """What a mount that is gone had closed, and not stored."""
    registry = instance.registry
    src = f"{ino:x}-0123456789ab"
    write_spool(instance, src, text)
    timed(registry).journal.begin_put(ino, src, key_is_virtual=virtual, base=base)
    registry.tree.update(ino, size=len(text))
    timed(registry).journal.ready_put(ino)


def test_recovery_does_not_write_a_new_file_over_what_somebody_else_has_stored(instance: Instance, past: Past) -> None:
    """A real key: the object may be any program's."""
    past.put("somebody's", "a.csv", None)
    inode = timed(instance.registry).names.create(1, "a.csv", 0o100644, 0, 0)
    owe(instance, inode.ino, "mine", virtual=False)
    assert recover.finish_puts(instance, strict=True) == 1
    recover.run_owed(instance, strict=True)
    assert instance.store.get("a.csv") == b"somebody's"
    past.both("a.csv", "somebody's", "mine")
    assert fsck.check(instance, repair=True, data=True).clean


def test_a_claim_of_a_dead_process_does_not_make_what_is_there_its_own(instance: Instance, past: Past) -> None:
    """It died between the note that it writes the object and the object; then another program stored something."""
    registry = instance.registry
    inode = timed(registry).names.create(1, "a.csv", 0o100644, 0, 0)
    owe(instance, inode.ino, "mine", virtual=False)
    entry = registry.journal.put_of(inode.ino)
    assert entry is not None
    registry.journal.set_target(entry.id, "a.csv")
    past.put("somebody's", "a.csv", None)
    assert recover.finish_puts(instance, strict=True) == 1
    past.both("a.csv", "somebody's", "mine")


def test_a_spool_file_that_is_gone_is_not_what_somebody_else_has_stored(instance: Instance, past: Past) -> None:
    """The put was about to be renamed to its key. What is there says of nothing that it is that."""
    registry = instance.registry
    for name, meta in (("a.csv", None), ("b.csv", ObjectMeta(UID, "b.csv", 1, None))):
        inode = timed(registry).names.create(1, name, 0o100644, 0, 0)
        owe(instance, inode.ino, "mine", virtual=False)
        entry = registry.journal.put_of(inode.ino)
        assert entry is not None
        assert entry.src is not None
        registry.journal.set_target(entry.id, name)
        with make_spool(instance) as spool:
            spool.unlink(entry.src)
        past.put("what is there", name, meta)
    recover.finish_puts(instance)
    assert registry.artifacts.by_key("a.csv") is None
    assert past.read("b.csv") == "what is there"
    assert instance.store.get("a.csv") == b"what is there"


def test_a_claim_of_a_dead_move_does_not_make_what_is_there_its_own(instance: Instance, past: Past) -> None:
    record = past.save("mine", "a.csv", virtual=False)
    timed(instance.registry).names.rename(1, "a.csv", 1, "b.csv")
    timed(instance.registry).commits.begin_move(record.uid, "b.csv")  # and the process died
    past.put("somebody's", "b.csv", None)
    recover.run_owed(instance, strict=True)
    assert instance.store.get("b.csv") == b"somebody's"
    assert past.read("b.csv") == "mine"


def test_recovery_does_not_write_over_what_is_where_an_artifact_is_going(instance: Instance, past: Past) -> None:
    """Another machine's revision has the name that the next one of this registry gets."""
    record = past.save("one", "a.csv")
    past.put("two", f".lamindb/{record.uid}.2.csv", ObjectMeta(record.uid, "a.csv", 2, None))
    assert record.ino is not None
    owe(instance, record.ino, "three")
    assert recover.finish_puts(instance, strict=True) == 1
    past.both("a.csv", "two", "three")
    recover.run_owed(instance, strict=True)
    assert fsck.check(instance, repair=True, data=True).clean


def test_recovery_does_not_write_a_partial_spool_over_what_is_unknown(instance: Instance, past: Past) -> None:
    """Nothing of the revision below is needed any more: so both are kept as anything else is."""
    record = past.save("one", "a.csv")
    past.forget(record, lambda: past.save("two", "a.csv"))
    assert record.ino is not None
    owe(instance, record.ino, "three", base=base_id(record.revision.content))
    instance.registry.partial_spools.add(f"{record.ino:x}-0123456789ab", [0])
    assert recover.finish_puts(instance, strict=True) == 1
    past.both("a.csv", "two", "three")
    assert fsck.check(instance, repair=True, data=True).clean


def test_what_cannot_be_kept_now_is_not_written_over(instance: Instance, past: Past) -> None:
    record = past.save("one", "a.csv", False)
    past.forget(record, lambda: past.save("two", "a.csv", False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unknown, "keep", lambda *args: None)  # somebody else is at work there
        with pytest.raises(ObjectChanged, match="try again later"):
            past.save("four", "a.csv", False)
    assert b"two" in past.objects()
    past.save("four", "a.csv", False)
    assert past.read("lost+found/a (revision 2).csv") == "two"


def test_what_is_being_written_is_left_alone(instance: Instance, past: Past) -> None:
    record = past.save("one", "a.csv")
    past.put("two", record.revision.object_key, ObjectMeta(record.uid, "a.csv", 2, None))
    assert record.ino is not None
    journal = timed(instance.registry).journal
    journal.begin_put(record.ino, f"{record.ino:x}-0123456789ab", base="the revision over which it lies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover, "finish_all", lambda *args, **kwargs: None)
        report = fsck.check(instance, repair=True)
    assert any("the file is being written, try again later" in text for text in report.problems), report
    assert past.keys() == ["a.csv"]


# -- deletes and moves of an old registry -----------------------------------------------------------------------------


def test_an_old_delete_does_not_hit_what_was_stored_since(instance: Instance, past: Past) -> None:
    """Deletions that an old registry owes: the object under that key is another one by now."""
    old = past.save("old", "old.csv")
    timed(instance.registry).names.purge(old.uid)
    key = old.revision.object_key
    (owed,) = instance.registry.journal.mine(Delete)
    assert (owed.etag, owed.uid) == (old.revision.etag, old.uid)
    past.put("used anew", key, ObjectMeta(old.uid, "old.csv", 2, None))
    recover.run_owed(instance, strict=True)
    assert instance.registry.journal.entries() == []
    assert instance.store.get(key) == b"used anew"
    assert fsck.check(instance, repair=True).clean
    assert past.read("lost+found/old.csv") == "used anew"


def test_an_object_that_storage_shows_to_nobody_keeps_no_other_one(
    instance: Instance, past: Past, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is looked at before it is deleted: one of which that is forbidden stays owed by itself."""
    records = [past.save(name, f"{name}.csv") for name in ("one", "two", "three")]
    journal = timed(instance.registry).journal
    for record in records:
        instance.registry.db.execute("DELETE FROM artifact WHERE uid=?", (record.uid,))
        journal.add_delete(record.revision.object_key, record.revision.etag)
    hidden = records[1].revision.object_key
    store = type(instance.store)
    head = store.head

    def forbidden(self: Any, key: str) -> ObjectStat:
        if key == hidden:
            raise StorageForbidden(f"You may not look at '{key}'.")
        return head(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(store, "head", forbidden)
        recover.run_owed(instance)
        assert [entry.object_key for entry in journal.mine(Delete)] == [hidden]
        with pytest.raises(StorageForbidden):
            recover.run_owed(instance, strict=True)
    assert past.objects() == [b"two"]
    recover.run_owed(instance, strict=True)
    assert past.objects() == []


def test_a_delete_of_what_is_there_is_done(instance: Instance, past: Past) -> None:
    records = [past.save(f"{number}", f"{number}.csv") for number in range(3)]
    for record in records:
        timed(instance.registry).names.purge(record.uid)
    recover.run_owed(instance, strict=True)
    assert past.objects() == []
    assert instance.registry.journal.entries() == []


@pytest.mark.parametrize("source_is_there", [True, False])
def test_an_old_move_does_not_hit_what_was_stored_since(instance: Instance, past: Past, source_is_there: bool) -> None:
    """A move that an old registry owes was done, and the object went on at its new place."""
    record = past.save("one", "a.csv", virtual=False)
    timed(instance.registry).names.rename_artifact(record.uid, "b.csv")
    later = ObjectMeta(record.uid, "b.csv", 2, None)
    past.put("two", "b.csv", later)
    if not source_is_there:
        (Path(instance.settings.storage.root) / "a.csv").unlink()
    instance.registry.db.execute("DELETE FROM claim")
    timed(instance.registry).journal.add_move(record.uid)
    recover.run_owed(instance)
    assert instance.store.get("b.csv") == b"two"
    assert instance.registry.journal.entries() == []
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    assert past.read("b.csv") == "two"


@pytest.mark.parametrize("ops", [("move", "delete"), ("delete",)])
def test_a_move_that_was_done_before_the_registry_lost_its_last_changes(
    instance: Instance, past: Past, ops: tuple[str, ...]
) -> None:
    """Its copy is all that is left: the deletion that was owed until the move was noted does not hit it, and what is to
    be moved is not looked for for ever."""
    record = past.save("one", "a.csv")
    timed(instance.registry).names.rename_artifact(record.uid, "a.txt")
    recover.run_owed(instance, strict=True)
    now = instance.registry.artifacts.by_uid(record.uid)
    assert now is not None
    assert now.revision.object_key != record.revision.object_key
    assert instance.store.get(now.revision.object_key) == b"one"
    instance.registry.db.execute(
        "UPDATE revision SET object_key=?, etag=? WHERE id=(SELECT revision_id FROM artifact WHERE uid=?)",
        (record.revision.object_key, record.revision.etag, record.uid),
    )
    timed(instance.registry).journal.add_move(record.uid)
    timed(instance.registry).commits.begin_move(record.uid, now.revision.object_key)
    recover.run_owed(instance, ops=ops, strict=True)
    assert instance.store.get(now.revision.object_key) == b"one"
    recover.run_owed(instance, strict=True)
    assert instance.registry.journal.entries() == []
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    assert past.read("a.txt") == "one"


def _kept(instance: Instance, past: Past, text: str) -> None:
    """What somebody else has stored can be read in lost+found."""
    records = instance.registry.artifacts.filter(key__startswith="lost+found/")
    assert text in [past.read(record.key or "") for record in records]


@pytest.mark.parametrize("changed", [False, True])
def test_a_save_at_a_real_key_keeps_what_somebody_else_has_stored_there(
    instance: Instance, past: Past, changed: bool
) -> None:
    past.put("somebody's", "a.csv", None)
    if changed:  # a move gave up, for something unknown was at its place
        record = past.save("mine", "b.csv", virtual=False)
        timed(instance.registry).names.rename(1, "b.csv", 1, "a.csv")
        recover.run_owed(instance)
        assert instance.registry.artifacts.by_uid(record.uid).revision.object_key == "b.csv"  # type: ignore[union-attr]
    past.save("mine, newer", "a.csv", virtual=False)
    assert past.read("a.csv") == "mine, newer"
    assert instance.store.get("a.csv") == b"mine, newer"
    _kept(instance, past, "somebody's")
    assert instance.registry.journal.entries() == []


def _inode(instance: Instance, key: str) -> int:
    found = instance.registry.tree.resolve(key)
    return (found or timed(instance.registry).names.create(1, key, 0o100644, 0, 0)).ino


class Late:
    """A store to which somebody else writes an object just before ours is written there, or just before that is looked
    at for the last time."""

    def __init__(self, past: Past, when: str) -> None:
        self._past, self._when, self._store = past, when, past.instance.store
        self.armed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_file(self, key: str, path: str, **how: Any) -> Any:
        if self.armed and self._when == "put":
            self._foreign()
        return self._store.put_file(key, path, **how)

    def head(self, key: str) -> Any:
        if self.armed and self._when == "look":
            self._foreign()
        return self._store.head(key)

    def copy(self, src: str, dst: str, **how: Any) -> Any:
        if self.armed and self._when == "copy":
            self._foreign(dst)
        return self._store.copy(src, dst, **how)

    def _foreign(self, key: str = "a.csv") -> None:
        self.armed = False
        path = Path(self._store.url(key))
        path.unlink(missing_ok=True)
        path.write_text("somebody's")


@pytest.mark.parametrize("when", ["look", "put"])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("how", ["save", "recovery"])
def test_what_is_stored_while_ours_is_on_its_way_stays(
    instance: Instance, past: Past, monkeypatch: pytest.MonkeyPatch, how: str, new: bool, when: str
) -> None:
    """Between the look at an object and its replacement somebody else stores something there."""
    if not new:
        past.save("first", "a.csv", virtual=False)
    late = Late(past, when)
    other = Instance(instance.settings, store=late)  # type: ignore[arg-type]
    find, looks = Conflicts.find, 0

    async def found(*args: Any, **how: Any) -> Any:
        nonlocal looks
        answer = await find(*args, **how)
        looks += 1
        late.armed = looks == 1
        return answer

    monkeypatch.setattr(Conflicts, "find", found)
    monkeypatch.setattr(guard, "LOOKED_SECONDS", -1.0)
    if how == "save":
        source = Path(instance.store.url("")).parent / "source2"
        source.write_text("mine, newer")
        artifacts.save(other, source, key="a.csv", virtual=False)  # looks again by itself
        assert looks > 1
        assert past.read("a.csv") == "mine, newer"
        _kept(instance, past, "somebody's")
        assert instance.registry.journal.entries() == []
    else:
        owe(instance, _inode(instance, "a.csv"), "mine, newer", virtual=False)
        recover.finish_puts(other)
        (entry,) = instance.registry.journal.entries()
        assert entry.error is not None
        assert not instance.registry.journal.is_claimed("a.csv")
        assert instance.store.get("a.csv") == b"somebody's"
        recover.finish_all(instance)
        past.both("a.csv", "somebody's", "mine, newer")


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("what", ["renamed and back", "deleted, and saved anew"])
def test_an_old_delete_does_not_hit_the_same_bytes_that_came_back(
    instance: Instance, past: Past, monkeypatch: pytest.MonkeyPatch, what: str, virtual: bool
) -> None:
    """An old registry owes the deletion of an object by its ETag. Since then the same bytes were stored there again,
    and what the registry knows instead is gone."""
    monkeypatch.setattr(local, "etag_of", lambda status: f"{status.st_size:x}")
    registry = instance.registry
    record = past.save("one", "a.csv", virtual)
    at = record.revision.object_key
    if what == "renamed and back":
        timed(instance.registry).names.rename_artifact(record.uid, "a.txt")
        recover.run_owed(instance, ops=("move",), strict=True)
        past.put("one", at, ObjectMeta(record.uid, "a.csv", 1, None))
        now = registry.artifacts.by_uid(record.uid)
        assert now is not None
        assert now.revision.object_key != at
        Path(instance.store.url(now.revision.object_key)).unlink()
    else:
        timed(registry).names.purge(record.uid)
        at = "a.csv"
        if virtual:
            timed(registry).journal.add_delete(at, record.revision.etag, uid=record.uid)
        past.put("one", at, ObjectMeta(UID, "a.csv", 1, None))
    registry.journal.doubt_claims()  # another machine has taken over
    recover.run_owed(instance, strict=True)
    assert instance.store.get(at) == b"one"
    assert registry.journal.entries() == []
    report = fsck.check(instance, repair=True)
    assert report.clean, report.problems
    assert b"one" in past.objects()


def test_an_old_delete_of_what_nothing_needs_is_done(instance: Instance, past: Past) -> None:
    one, two = past.save("one", "a.csv"), past.save("two", "b.csv", virtual=False)
    three = past.save("three", "c.csv")
    timed(instance.registry).names.rename_artifact(three.uid, "c.txt")
    recover.run_owed(instance, ops=("move",), strict=True)
    for record in (one, two):
        timed(instance.registry).names.purge(record.uid)
    instance.registry.journal.doubt_claims()
    recover.run_owed(instance, strict=True)
    assert past.objects() == [b"three"]


def test_a_move_of_recovery_does_not_replace_what_comes_to_its_place(instance: Instance, past: Past) -> None:
    past.save("mine", "a.csv", virtual=False)
    timed(instance.registry).names.rename(1, "a.csv", 1, "b.csv")
    late = Late(past, "copy")
    late.armed = True
    recover.run_owed(Instance(instance.settings, store=late))  # type: ignore[arg-type]
    assert not late.armed
    recover.run_owed(instance, strict=True)
    assert instance.store.get("b.csv") == b"somebody's"
    assert past.read("b.csv") == "mine"
    assert instance.registry.journal.entries() == []


def test_equal_blocks_do_not_make_an_object_ones_own_where_others_are_not_known(instance: Instance, past: Past) -> None:
    """A put had hashed, and sent, the first part of a large file; then another program stored one of the same size."""
    registry = instance.registry
    ino = _inode(instance, "a.csv")
    mine, theirs = "x" * (BLOCK_SIZE + 4), "x" * BLOCK_SIZE + "else"
    owe(instance, ino, mine, virtual=False)
    entry = registry.journal.put_of(ino)
    assert entry is not None
    registry.seals.add(entry, len(mine), hashing.hash_block(mine[:BLOCK_SIZE].encode()))
    registry.journal.set_target(entry.id, "a.csv")
    past.put(theirs, "a.csv", None)
    assert recover.finish_puts(instance, strict=True) == 1
    past.both("a.csv", theirs, mine)


def test_what_a_put_that_was_given_up_may_have_stored_is_not_replaced(instance: Instance, past: Past) -> None:
    """Its spool file is gone, so what is in storage is the only copy. Then a new file gets the key."""
    registry = instance.registry
    ino = _inode(instance, "a.csv")
    owe(instance, ino, "stored, and not noted", virtual=False)
    entry = registry.journal.put_of(ino)
    assert entry is not None
    assert entry.uid is not None
    registry.journal.set_target(entry.id, "a.csv")
    past.put("stored, and not noted", "a.csv", ObjectMeta(entry.uid, "a.csv", 1, None))
    assert timed(registry).rescue.give_up(entry.id) is not None
    past.save("new", "a.csv", virtual=False)
    assert past.read("a.csv") == "new"
    _kept(instance, past, "stored, and not noted")
