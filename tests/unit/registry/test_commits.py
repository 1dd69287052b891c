"""What storage has done becomes what the registry says: generations, files that are gone meanwhile, takeovers."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import FsError, NotSetUp
from lamfs.keys import root_path
from lamfs.registry import Provenance, is_alive, process_id
from lamfs.registry.changes import KEEP
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands, content_of


def test_a_put_makes_an_artifact_of_a_file(hands: Hands, registry: Registry) -> None:
    ino = hands.create("a.csv")
    put = registry.journal.put_of(ino)
    record = hands.store(ino, b"bytes")
    assert put is not None
    assert record is not None
    assert (record.uid, record.key, record.suffix, record.size) == (put.uid, "a.csv", ".csv", 5)
    assert record.revision.object_key == f".lamindb/{record.uid}.csv"
    assert registry.journal.entries() == []


def test_bytes_written_during_the_upload_stay_owed(hands: Hands, registry: Registry) -> None:
    ino = hands.create("a")
    put = registry.journal.put_of(ino)
    assert put is not None
    registry.journal.ready_put(ino)
    done = registry.commits.put(ino, put.gen, content_of(b"1"), "o", "e", Provenance())
    assert not done.current
    assert done.record is not None
    still = registry.journal.put_of(ino)
    assert still is not None
    assert (still.gen, still.state) == (put.gen + 1, "ready")
    stored = hands.store(ino, b"22")
    assert stored is not None
    assert stored.size == 2
    assert hands.deletes() == ["o"]


def test_a_file_that_is_open_again_stays_owed(hands: Hands, registry: Registry) -> None:
    ino = hands.create("a")
    put = registry.journal.put_of(ino)
    assert put is not None
    registry.journal.begin_put(ino, "new-spool")
    target = registry.commits.put_target(put)
    assert not registry.commits.put(ino, put.gen, content_of(b"1"), target, "e", Provenance()).current
    registry.tree.update(ino, size=1)
    again = registry.journal.put_of(ino)
    assert again is not None
    assert (again.state, again.src, again.uid) == ("open", "new-spool", put.uid)
    registry.journal.ready_put(ino)
    assert not registry.commits.put_unneeded(ino, put.gen).current
    assert registry.commits.put_unneeded(ino, put.gen + 1).current
    assert registry.journal.entries() == []


def test_a_file_deleted_during_its_upload_owes_the_object(hands: Hands, registry: Registry) -> None:
    ino = hands.create("a")
    hands.unlink("a")
    done = registry.commits.put(ino, 1, content_of(b"1"), "o", "e", Provenance())
    assert done.record is None
    assert hands.deletes() == ["o"]


def test_an_object_in_use_is_not_owed_its_deletion(hands: Hands, registry: Registry) -> None:
    record = hands.save("a", b"1")
    ino = hands.create("b")
    hands.unlink("b")
    registry.commits.put(ino, 1, content_of(b"1"), record.revision.object_key, "e", Provenance())
    assert hands.deletes() == []


def test_each_revision_has_an_object_of_its_own(hands: Hands, registry: Registry) -> None:
    """Without a number where the artifact has not used the name yet, else with the revision's."""
    record = hands.save("a.csv", b"1")
    keys = [record.revision.object_key]
    for name, data in (("a.csv", b"2"), ("a.txt", b"3"), ("a.txt", b"4"), ("a.csv", b"5"), ("a.txt", b"6")):
        hands.rewrite(root_path(record.key or "")[1])
        if name != record.key:
            hands.rename(record.key or "", name)
        stored = hands.store(hands.ino(name), data)
        assert stored is not None
        record = stored
        keys.append(record.revision.object_key)
    names = [key.removeprefix(f".lamindb/{record.uid}") for key in keys]
    assert names == [".csv", ".2.csv", ".txt", ".4.txt", ".5.csv", ".6.txt"]
    assert hands.deletes() == keys[:-1]
    assert record.number == 6
    rows = registry.db.all("SELECT number, object_key FROM revision")
    assert rows == [(6, record.revision.object_key)]


def test_an_object_whose_deletion_is_owed_is_not_written_anew(hands: Hands, registry: Registry) -> None:
    record = hands.save("a.csv", b"1")
    registry.journal.add_delete(f".lamindb/{record.uid}.2.csv")
    hands.rewrite("a.csv")
    again = hands.store(hands.ino("a.csv"), b"2")
    assert again is not None
    assert again.revision.object_key == f".lamindb/{record.uid}.3.csv"
    assert again.number == 2


def test_what_an_earlier_try_has_begun_goes_on_there(hands: Hands, registry: Registry) -> None:
    hands.save("a.csv", b"1")
    hands.rewrite("a.csv")
    entry = registry.journal.put_of(hands.ino("a.csv"))
    assert entry is not None
    target = registry.commits.put_target(entry)
    assert registry.journal.claim_target(entry.id, target)
    again = registry.journal.put_of(hands.ino("a.csv"))
    assert again is not None
    assert registry.commits.put_target(again) == target
    hands.rename("a.csv", "a.txt")
    assert registry.commits.put_target(again).endswith(".txt")


def test_a_move_that_is_overtaken_owes_its_copy(hands: Hands, registry: Registry) -> None:
    hands.save("a.csv", b"1")
    hands.rename("a.csv", "a.txt")
    (move,) = [entry for entry in registry.journal.entries() if entry.op == "move"]
    plan = registry.commits.move_plan(move.uid or "")
    assert plan is not None
    before, target = plan
    registry.commits.begin_move(before.uid, target)
    hands.rewrite("a.txt")
    hands.rename("a.txt", "a.bin")
    hands.store(hands.ino("a.bin"), b"2")
    assert not registry.commits.moved(move.id, before, target, "e")
    assert target in hands.deletes()


def test_rows_of_dead_processes_are_taken_over(hands: Hands, registry: Registry, tmp_path: Path) -> None:
    mine, theirs = hands.create("mine"), hands.create("theirs")
    dead, alive = "boot:0:1", process_id(1)
    registry.db.execute("UPDATE journal SET owner=? WHERE ino=?", (dead, theirs))
    other = hands.create("alive")
    registry.db.execute("UPDATE journal SET owner=? WHERE ino=?", (alive, other))
    assert [entry.ino for entry in registry.journal.ready()] == [mine]
    assert [entry.ino for entry in registry.journal.adopt()] == [theirs]
    assert sorted(entry.ino or 0 for entry in registry.journal.ready()) == sorted([mine, theirs])
    assert registry.journal.adopt() == []


def test_only_a_process_that_lives_is_alive() -> None:
    me = process_id()
    assert me is not None
    assert is_alive(me)
    boot, pid, started = me.split(":")
    for other in (None, "", "nonsense", f"{boot}:{pid}:{int(started) + 1}", f"x:{pid}:{started}", f"{boot}:0:1"):
        assert not is_alive(other)


def test_claims_keep_the_work_of_others_apart(hands: Hands, registry: Registry) -> None:
    journal = registry.journal
    ino = hands.create("a")
    put = journal.put_of(ino)
    assert put is not None
    journal.set_target(put.id, "o")
    assert journal.holds("o")
    assert journal.claimed("o", "other", None)
    assert not journal.claimed("o", "other", put.id)
    journal.add_delete("d")
    assert not journal.claimed("d", "other", None)
    registry.db.execute("UPDATE owed SET owner=? WHERE object_key='d'", (process_id(1),))
    assert journal.claimed("d", "other", None)
    assert journal.drop_delete("d")
    assert not journal.drop_delete("d")


def test_the_change_log_says_what_was_lost(hands: Hands, registry: Registry) -> None:
    changes = registry.changes
    start = changes.last()
    hands.save("a", b"1")
    rows, lost = changes.since(start)
    assert not lost
    assert {row.kind for row in rows} == {"entry", "content"}
    assert {row.origin for row in rows} == {registry.origin}
    assert changes.since(changes.last()) == ([], False)
    registry.db.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<?)"
        " INSERT INTO change(origin, kind, ino) SELECT 'x', 'attr', i FROM n",
        (KEEP + 10,),
    )
    changes.trim()
    assert changes.since(start)[1]
    registry.db.execute("DELETE FROM change")
    assert changes.since(start) == ([], True)
    assert not changes.since(changes.last())[1]


def test_a_registry_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotSetUp):
        Registry(tmp_path / "nothing.lndb")


@pytest.fixture
def other(registry: Registry) -> Iterator[Registry]:
    """The same registry, as another living process has it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    registry.journal.owner = process_id(process.pid) or ""
    yield Registry(registry.path)
    process.communicate(b"\n")


@pytest.mark.parametrize("stored_first", [False, True])
def test_an_upload_that_another_process_has_overtaken_does_not_share_its_object(
    hands: Hands, registry: Registry, other: Registry, stored_first: bool
) -> None:
    """``registry`` is at work on a put, ``other`` writes the file again: neither object is written by both."""
    ino = hands.create("a")
    old = registry.journal.put_of(ino)
    assert old is not None
    target = registry.commits.put_target(old)
    registry.journal.set_target(old.id, target)
    theirs = Hands(other)
    theirs.rewrite("a")
    new = other.journal.put_of(ino)
    assert new is not None
    assert (new.uid, new.gen) == (old.uid, old.gen + 1)
    assert other.commits.put_target(new) != target
    assert other.journal.holds(target)
    record = theirs.store(ino, b"new") if stored_first else None
    assert not registry.commits.put(ino, old.gen, content_of(b"old"), target, "e", Provenance(), row=old.id).current
    record = record or theirs.store(ino, b"new")
    assert record is not None
    assert theirs.record("a").revision.content == content_of(b"new")
    # Its spool file is its own to remove.
    (drop,) = registry.journal.ready()
    assert (drop.op, drop.src) == ("drop", old.src)
    registry.journal.done(drop.id)
    registry.journal.release([old.id])
    assert registry.journal.ready() == []
    registry.journal.release([])
    assert [entry.object_key for entry in registry.journal.ready()] == [target]
    other.close()


def test_an_upload_of_what_another_process_deletes_is_deleted_by_who_makes_it(
    hands: Hands, registry: Registry, other: Registry
) -> None:
    ino = hands.create("a")
    old = registry.journal.put_of(ino)
    assert old is not None
    registry.journal.set_target(old.id, "o")
    Hands(other).unlink("a")
    assert [(entry.op, entry.src) for entry in registry.journal.ready()] == [("drop", old.src)]
    assert registry.commits.put(ino, old.gen, content_of(b"old"), "o", "e", Provenance(), row=old.id).record is None
    registry.journal.release([])
    assert {entry.object_key for entry in registry.journal.ready() if entry.op == "delete"} == {"o"}
    other.close()


def test_the_registry_decides_whose_write_follows_which_revision(
    hands: Hands, registry: Registry, other: Registry
) -> None:
    ino = hands.create("a")
    first = registry.journal.put_of(ino)
    seen = registry.tree.get(ino)
    assert first is not None
    assert seen is not None
    # The other one goes on from what was acknowledged; nothing is removed by it.
    assert other.journal.begin_put(ino, "theirs", seen=seen.revision) is None
    assert [(entry.op, entry.src) for entry in registry.journal.ready()] == [("drop", first.src)]
    # Now it writes: nobody else begins, and what this process had is not its to acknowledge any more.
    with pytest.raises(FsError) as caught:
        registry.journal.begin_put(ino, "again", seen=seen.revision, mine=first.src)
    assert caught.value.errno == errno.ESTALE
    assert registry.journal.ready_put(ino, src=first.src) == 0
    assert not registry.journal.claim_target(first.id, "o")
    assert other.journal.ready_put(ino, src="theirs") == first.gen + 1
    other.tree.rewritten(seen)
    with pytest.raises(FsError):
        registry.journal.begin_put(ino, "again", seen=seen.revision)
    assert registry.journal.begin_put(ino, "again", seen=seen.revision + 1) is None
    other.close()


def test_what_a_dead_process_held_is_deleted_by_who_comes_next(
    hands: Hands, registry: Registry, other: Registry
) -> None:
    ino = hands.create("a")
    old = registry.journal.put_of(ino)
    assert old is not None
    registry.journal.set_target(old.id, "o")
    Hands(other).rewrite("a")
    other.db.execute("UPDATE journal SET owner='boot:1:1' WHERE id=?", (old.id,))
    assert [entry.id for entry in other.journal.adopt()] == [old.id]
    assert "o" in [entry.object_key for entry in other.journal.ready()]
    other.close()
