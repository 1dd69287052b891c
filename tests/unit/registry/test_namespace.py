"""Names and artifacts together: rename rules, keys, the trash."""

from __future__ import annotations

import errno
import itertools
from typing import Any

import pytest

from lamfs.errors import AlreadyExists, FsError, InvalidArgument, InvalidName, NotFound
from lamfs.model import AUTO_INO, ROOT_INO, SHOWN, TRASH
from lamfs.registry import Backup, Provenance, artifacts
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands, content_of


class _Refused:
    """Expects an FsError with this errno."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert isinstance(error, FsError), error
        assert error.errno == self.number, errno.errorcode[error.errno]
        return True


def test_rename_over_an_artifact_keeps_its_uid_and_description(hands: Hands, registry: Registry) -> None:
    kept = hands.save("b.csv", b"old")
    registry.artifacts.update(kept.uid, description="the good one")
    gone = hands.save("t.tmp", b"new")
    hands.rename("t.tmp", "b.csv")
    now = hands.record("b.csv")
    assert (now.uid, now.description, now.key) == (kept.uid, "the good one", "b.csv")
    assert now.revision.content == content_of(b"new")
    assert now.revision.object_key == gone.revision.object_key
    assert registry.artifacts.by_uid(gone.uid) is None
    assert hands.moves() == [kept.uid]
    assert hands.run_moves() == [(gone.revision.object_key, f".lamindb/{kept.uid}.2.csv")]
    assert set(hands.deletes()) == {gone.revision.object_key, kept.revision.object_key}


def test_rename_of_equal_bytes_over_an_artifact_keeps_its_revision(hands: Hands) -> None:
    kept = hands.save("b.csv", b"same")
    gone = hands.save("t.tmp", b"same")
    hands.rename("t.tmp", "b.csv")
    assert hands.record("b.csv").revision == kept.revision
    assert hands.deletes() == [gone.revision.object_key]
    assert hands.moves() == []


def test_equal_bytes_do_not_count_when_the_artifact_is_being_overwritten(hands: Hands, registry: Registry) -> None:
    """Its object may hold other bytes by now."""
    kept = hands.save("b.csv", b"same")
    gone = hands.save("t.tmp", b"same")
    hands.rewrite("b.csv")
    put = registry.journal.put_of(hands.ino("b.csv"))
    assert put is not None
    registry.journal.set_target(put.id, kept.revision.object_key)
    hands.rename("t.tmp", "b.csv")
    assert hands.record("b.csv").uid == kept.uid
    assert hands.record("b.csv").revision.object_key == gone.revision.object_key
    assert hands.moves() == [kept.uid]


def test_rename_of_a_file_not_yet_stored_over_an_artifact(hands: Hands, registry: Registry) -> None:
    kept = hands.save("b.csv", b"old")
    ino = hands.create("t.tmp")
    hands.rename("t.tmp", "b.csv")
    put = registry.journal.put_of(ino)
    assert put is not None
    assert put.uid == kept.uid
    stored = hands.store(ino, b"new")
    assert stored is not None
    assert (stored.uid, stored.key) == (kept.uid, "b.csv")
    assert stored.revision.object_key == f".lamindb/{kept.uid}.2.csv"
    assert hands.deletes() == [kept.revision.object_key]


def test_rename_over_a_file_not_yet_stored_hands_on_the_uid(hands: Hands, registry: Registry) -> None:
    first = registry.journal.put_of(hands.create("b.csv"))
    ino = hands.create("t.tmp")
    hands.rename("t.tmp", "b.csv")
    assert first is not None
    stored = hands.store(ino, b"new")
    assert stored is not None
    assert stored.uid == first.uid
    assert len(registry.journal.entries()) == 0


def test_rename_over_one_of_two_names_leaves_the_artifact_at_the_other(hands: Hands) -> None:
    linked = hands.save("a", b"linked")
    hands.link("a", "b")
    other = hands.save("c", b"other")
    hands.rename("c", "a")
    assert hands.record("b").uid == linked.uid
    assert hands.record("b").key == "b"
    assert hands.record("a").uid == other.uid
    assert hands.record("a").key == "a"


def test_rename_between_two_names_of_one_file_does_nothing(hands: Hands, registry: Registry) -> None:
    hands.save("a", b"x")
    hands.link("a", "b")
    hands.rename("a", "b")
    assert hands.ino("a") == hands.ino("b")
    assert hands.record("a").key == "a"


def test_key_and_suffix_follow_the_name(hands: Hands) -> None:
    record = hands.save("a.tar.gz", b"x")
    hands.mkdir("d")
    hands.rename("a.tar.gz", "d/b.csv")
    now = hands.record("d/b.csv")
    assert (now.uid, now.key, now.suffix) == (record.uid, "d/b.csv", ".csv")
    assert hands.run_moves() == [(f".lamindb/{record.uid}.tar.gz", f".lamindb/{record.uid}.csv")]


@pytest.mark.parametrize("odd", ["a", "a%", "a_b", "a'b", "[a]*?", "ä", "a b", "\U0001f40d", 'a"b', "a\\b", "A", "0"])
def test_directory_rename_rewrites_exactly_the_keys_below(odd: str, hands: Hands) -> None:
    """Neither LIKE's wildcards nor siblings that begin alike are touched."""
    siblings = [f"{odd}0", f"{odd}!", f"{odd}.x", odd.swapcase() + "~", "axb"]
    for folder in (odd, *siblings):
        hands.mkdir(folder)
        hands.save(f"{folder}/f", folder.encode())
    hands.mkdir(f"{odd}/sub")
    hands.save(f"{odd}/sub/g", b"deep")
    hands.save(f"{odd}.csv", b"beside")
    hands.rename(odd, "new")
    assert hands.record("new/f").key == "new/f"
    assert hands.record("new/sub/g").key == "new/sub/g"
    for folder in siblings:
        assert hands.record(f"{folder}/f").key == f"{folder}/f"
    assert hands.record(f"{odd}.csv").key == f"{odd}.csv"
    hands.rename("new", f"{odd}0/{odd}")
    assert hands.record(f"{odd}0/{odd}/sub/g").key == f"{odd}0/{odd}/sub/g"


def test_directory_rename_with_real_keys_owes_one_move_each(hands: Hands) -> None:
    hands.mkdir("d")
    real = [hands.save(f"d/{n}", str(n).encode(), virtual=False) for n in range(3)]
    virtual = hands.save("d/v", b"v")
    hands.rename("d", "e")
    assert sorted(hands.moves()) == sorted(record.uid for record in real)
    assert sorted(hands.run_moves()) == [(f"d/{n}", f"e/{n}") for n in range(3)]
    assert hands.record("e/v").revision == virtual.revision
    assert sorted(hands.deletes()) == ["d/0", "d/1", "d/2"]


def test_a_cycle_of_real_keys_comes_apart(hands: Hands) -> None:
    first, second = hands.save("a", b"1", virtual=False), hands.save("b", b"2", virtual=False)
    hands.rename("a", "t")
    hands.rename("b", "a")
    hands.rename("t", "b")
    hands.run_moves()
    assert hands.record("b").uid == first.uid
    assert hands.record("a").uid == second.uid
    assert hands.record("a").revision.object_key == "a"
    assert hands.record("b").revision.object_key == "b"
    assert not {"a", "b"} & set(hands.deletes())


def test_a_longer_cycle_and_a_file_that_becomes_a_folder(hands: Hands) -> None:
    names = ["a", "b", "c", "d"]
    uids = {name: hands.save(name, name.encode(), virtual=False).uid for name in names}
    hands.rename("a", "t")
    for new, old in itertools.pairwise(names):
        hands.rename(old, new)
    hands.rename("t", "d")
    hands.run_moves()
    assert [hands.record(name).uid for name in "dabc"] == [uids[name] for name in "abcd"]
    hands.rename("a", "t")
    hands.mkdir("a")
    hands.rename("t", "a/a")
    hands.run_moves()
    assert hands.record("a/a").revision.object_key == "a/a"


def test_two_in_the_trash_under_one_real_key(hands: Hands) -> None:
    """Neither waits for the other's place."""
    for data in (b"1", b"2", b"3"):
        hands.save("a", data, virtual=False)
        hands.unlink("a")
        hands.run_moves()
    last = hands.save("a", b"4", virtual=False)
    hands.run_moves()
    assert hands.record("a").revision.object_key == "a"
    assert hands.record("a").uid == last.uid


def test_new_bytes_do_not_go_where_others_are(hands: Hands, registry: Registry) -> None:
    """A put never writes over an object that another artifact, or another put, still needs."""
    hands.save("a", b"1", virtual=False)
    hands.rename("a", "b")
    ino = hands.create("a", virtual=False)
    put = registry.journal.put_of(ino)
    assert put is not None
    assert registry.commits.put_target(put) == f".lamindb/{put.uid}"
    hands.run_moves()
    registry.journal.set_target(put.id, "a")
    hands.rename("a", "c")
    other = registry.journal.put_of(hands.create("a", virtual=False))
    assert other is not None
    assert registry.commits.put_target(other) != "a"


def test_unlink_goes_to_the_trash_and_comes_back(hands: Hands, registry: Registry) -> None:
    hands.mkdir("d")
    record = hands.save("d/a.csv", b"x")
    hands.unlink("d/a.csv")
    registry.names.rmdir(ROOT_INO, "d")
    trashed = registry.artifacts.trashed("d/a.csv")
    assert trashed is not None
    assert (trashed.uid, trashed.visibility) == (record.uid, TRASH)
    assert hands.deletes() == []
    back = registry.names.restore(record.uid)
    assert (back.key, back.visibility) == ("d/a.csv", SHOWN)
    assert hands.record("d/a.csv").uid == record.uid


def test_restore_to_a_taken_name(hands: Hands, registry: Registry) -> None:
    record = hands.save("a", b"1")
    hands.unlink("a")
    hands.save("a", b"2")
    with pytest.raises(AlreadyExists):
        registry.names.restore(record.uid)
    assert registry.names.restore(record.uid, "b/c").key == "b/c"
    with pytest.raises(NotFound):
        registry.names.restore("nobody")


def test_restore_below_a_file(hands: Hands, registry: Registry) -> None:
    hands.mkdir("d")
    record = hands.save("d/a", b"1")
    hands.unlink("d/a")
    registry.names.rmdir(ROOT_INO, "d")
    hands.save("d", b"2")
    with pytest.raises(InvalidName):
        registry.names.restore(record.uid)
    found = registry.artifacts.by_uid(record.uid)
    assert found is not None
    assert found.visibility == TRASH


def test_purge_deletes_the_object_afterwards(hands: Hands, registry: Registry) -> None:
    record = hands.save("a", b"1")
    hands.rewrite("a")
    registry.names.purge(record.uid)
    assert registry.artifacts.by_uid(record.uid) is None
    assert hands.deletes() == [record.revision.object_key]
    kept = hands.save("b", b"2")
    registry.names.purge(kept.uid, storage=False)
    assert kept.revision.object_key not in hands.deletes()
    assert registry.names.is_retained(kept.revision.object_key)
    assert not registry.names.is_retained(record.revision.object_key)


def test_an_edit_is_whole_or_nothing(hands: Hands, registry: Registry) -> None:
    one, two = hands.save("a", b"1"), hands.save("b", b"2")
    before = registry.changes.last()
    with pytest.raises(AlreadyExists, match="'a' cannot get the key 'b': another file has it"):
        registry.names.edit_artifact(one.uid, key="b", description="new", run_id=None, transform_id=None)
    assert registry.artifacts.by_uid(one.uid) == one
    assert registry.changes.last() == before
    registry.names.edit_artifact(two.uid, key="d/c", description="new", run_id=None, transform_id=None)
    found = hands.record("d/c")
    assert (found.uid, found.description) == (two.uid, "new")
    changes, _ = registry.changes.since(before)
    assert changes[-1].kind == "record"


def test_an_artifact_in_the_trash_is_not_renamed(hands: Hands, registry: Registry) -> None:
    record = hands.save("a", b"1")
    registry.names.trash(record.uid)
    with pytest.raises(InvalidArgument, match="is in the trash; restore it as 'b'"):
        registry.names.rename_artifact(record.uid, "b")


def test_unlink_of_a_file_never_stored_owes_the_object_it_may_have_made(hands: Hands, registry: Registry) -> None:
    ino = hands.create("a")
    put = registry.journal.put_of(ino)
    assert put is not None
    registry.journal.set_target(put.id, "some/object")
    hands.unlink("a")
    assert hands.deletes() == ["some/object"]
    assert registry.tree.get(ino) is None


def test_auto_managed_artifacts_get_a_key_by_moving_out(hands: Hands, registry: Registry) -> None:
    record = hands.save("a.csv", b"1")
    hands.unlink("a.csv")
    registry.artifacts.update(record.uid, key=None)
    registry.names.restore(record.uid)
    name = f"{record.uid}.csv"
    assert registry.tree.lookup(AUTO_INO, name) is not None
    with _Refused(errno.EPERM):
        hands.save(".lamindb/x", b"2")
    with _Refused(errno.EPERM):
        hands.rename(f".lamindb/{name}", ".lamindb/y")
    hands.rename(f".lamindb/{name}", "b.txt")
    assert hands.record("b.txt").key == "b.txt"
    assert hands.record("b.txt").uid == record.uid


def test_refusals(hands: Hands, registry: Registry) -> None:
    hands.mkdir("d")
    hands.mkdir("d/e")
    hands.save("f", b"")
    with _Refused(errno.EEXIST):
        hands.mkdir("d")
    with _Refused(errno.EEXIST):
        hands.rename("f", "d", noreplace=True)
    with _Refused(errno.EISDIR):
        hands.rename("f", "d")
    with _Refused(errno.ENOTDIR):
        hands.rename("d", "f")
    with _Refused(errno.EINVAL):
        hands.rename("d", "d/e/x")
    hands.mkdir("g")
    with _Refused(errno.ENOTEMPTY):
        hands.rename("g", "d")
    with _Refused(errno.ENOTEMPTY):
        registry.names.rmdir(ROOT_INO, "d")
    with _Refused(errno.EISDIR):
        hands.unlink("d")
    with _Refused(errno.ENOTDIR):
        registry.names.rmdir(ROOT_INO, "f")
    with _Refused(errno.ENOTDIR):
        hands.create("f/x")
    with _Refused(errno.EPERM):
        hands.link("d", "h")
    with _Refused(errno.EEXIST):
        hands.link("f", "d")
    with _Refused(errno.EBUSY):
        hands.rename(".lamindb", "x")
    with _Refused(errno.EPERM):
        hands.mkdir(".lamfs")
    with _Refused(errno.ENOENT):
        hands.rename("nothing", "x")
    with _Refused(errno.ENOTEMPTY):
        hands.rename("g", "d")
    hands.rename("g", "d/e")
    assert registry.tree.resolve("g") is None


def test_a_failed_step_leaves_nothing_behind(hands: Hands, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename is one transaction: an error in the middle undoes all of it."""
    hands.save("a", b"1")
    hands.save("b", b"2")
    before = registry.db.all("SELECT * FROM artifact") + registry.db.all("SELECT * FROM dentry")

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "the disk")

    monkeypatch.setattr(registry.tree, "move_entry", broken)
    with pytest.raises(OSError, match="the disk"):
        hands.rename("a", "b")
    assert registry.db.all("SELECT * FROM artifact") + registry.db.all("SELECT * FROM dentry") == before


@pytest.mark.parametrize("virtual", [True, False])
def test_exchanged_files_take_their_artifacts_along(hands: Hands, registry: Registry, virtual: bool) -> None:
    one = hands.save("a.csv", b"1", virtual=virtual)
    hands.mkdir("d")
    two = hands.save("d/b.txt", b"2", virtual=virtual)
    registry.names.exchange(*hands.at("a.csv"), *hands.at("d/b.txt"))
    assert (hands.record("a.csv").uid, hands.record("d/b.txt").uid) == (two.uid, one.uid)
    assert (hands.record("a.csv").key, hands.record("d/b.txt").suffix) == ("a.csv", ".txt")
    hands.run_moves()
    for path in ("a.csv", "d/b.txt"):
        assert registry.commits.is_home(hands.record(path).uid)


def test_exchanged_directories_take_all_keys_below_along(hands: Hands, registry: Registry) -> None:
    hands.mkdir("d")
    hands.mkdir("d/sub")
    hands.mkdir("e")
    one, two = hands.save("d/sub/a", b"1", virtual=False), hands.save("e/b", b"2", virtual=False)
    three = hands.save("f", b"3")
    registry.names.exchange(*hands.at("d/sub"), *hands.at("e"))
    registry.names.exchange(*hands.at("e"), *hands.at("f"))
    assert {uid: registry.artifacts.by_uid(uid).key for uid in (one.uid, two.uid, three.uid)} == {  # type: ignore[union-attr]
        one.uid: "f/a",
        two.uid: "d/sub/b",
        three.uid: "e",
    }
    hands.run_moves()
    assert registry.commits.is_home(one.uid)
    assert registry.commits.is_home(two.uid)


def test_a_directory_and_what_is_inside_of_it_are_not_exchanged(hands: Hands, registry: Registry) -> None:
    hands.mkdir("d")
    hands.save("d/a", b"1")
    for one, two in (("d", "d/a"), ("d/a", "d")):
        with _Refused(errno.EINVAL):
            registry.names.exchange(*hands.at(one), *hands.at(two))
    with _Refused(errno.ENOENT):
        registry.names.exchange(*hands.at("d"), *hands.at("none"))
    with _Refused(errno.EBUSY):
        registry.names.exchange(*hands.at("d"), *hands.at(".lamindb"))


def test_a_renamed_entry_keeps_its_place_in_its_directory(hands: Hands, registry: Registry) -> None:
    for name in "abc":
        hands.create(name)
    hands.rename("b", "x")
    names = [entry.name for entry in registry.tree.entries(ROOT_INO) if entry.inode.ino != AUTO_INO]
    assert names == ["a", "x", "c"]


def _aside(hands: Hands, registry: Registry, old: str, new: str) -> Backup:
    renamed = registry.names.rename(*hands.at(old), *hands.at(new))
    return Backup(renamed.inode.ino, renamed.ended)


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("older", [False, True], ids=["first", "over an older backup"])
@pytest.mark.parametrize("how", ["created", "renamed"])
def test_a_kept_backup_leaves_the_artifact_to_the_new_file(
    hands: Hands, registry: Registry, virtual: bool, older: bool, how: str
) -> None:
    kept = hands.save("x.csv", b"old", virtual=virtual)
    registry.artifacts.update(kept.uid, description="the good one")
    if older:
        hands.save("x.csv~", b"older", virtual=virtual)
    temporary = hands.save("tmp", b"new", virtual=virtual) if how == "renamed" else None
    backup = _aside(hands, registry, "x.csv", "x.csv~")
    if temporary is not None:
        assert registry.names.rename(*hands.at("tmp"), *hands.at("x.csv"), backup=backup).kept
        assert registry.artifacts.by_uid(temporary.uid) is None
    else:
        inode, _ = registry.names.create_file(*hands.at("x.csv"), 0o100644, 1, 1, key_is_virtual=virtual, backup=backup)
        assert hands.record("x.csv").revision.content == content_of(b"old"), "until the new content is stored"
        registry.journal.ready_put(inode.ino)
        hands.store(inode.ino, b"new")
    now, copy = hands.record("x.csv"), hands.record("x.csv~")
    assert (now.uid, now.key, now.description, now.created_at) == (kept.uid, "x.csv", "the good one", kept.created_at)
    assert now.revision.content == content_of(b"new")
    assert (copy.key, copy.description, copy.revision.content) == ("x.csv~", None, content_of(b"old"))
    assert registry.artifacts.count() == 2
    hands.run_moves()
    for path in ("x.csv", "x.csv~"):
        assert registry.commits.is_home(hands.record(path).uid)
    living = {hands.record(path).revision.object_key for path in ("x.csv", "x.csv~")}
    assert len(living) == 2


def test_a_kept_backup_of_what_is_not_stored_yet_leaves_the_announced_uid(hands: Hands, registry: Registry) -> None:
    old = hands.create("x")
    announced = registry.journal.put_of(old)
    assert announced is not None
    backup = _aside(hands, registry, "x", "x~")
    inode, _ = registry.names.create_file(*hands.at("x"), 0o100644, 1, 1, backup=backup)
    registry.journal.ready_put(inode.ino)
    copy, now = hands.store(old, b"old"), hands.store(inode.ino, b"new")
    assert copy is not None
    assert now is not None
    assert (now.uid, now.key, copy.key) == (announced.uid, "x", "x~")
    assert copy.uid != announced.uid


def test_the_copy_of_a_kept_backup_goes_for_good(hands: Hands, registry: Registry) -> None:
    hands.save("x", b"old")
    backup = _aside(hands, registry, "x", "x~")
    inode, _ = registry.names.create_file(*hands.at("x"), 0o100644, 1, 1, backup=backup)
    registry.journal.ready_put(inode.ino)
    hands.store(inode.ino, b"new")
    copy = hands.record("x~")
    registry.names.unlink(*hands.at("x~"), is_copy=lambda ino: ino == backup.ino)
    assert registry.artifacts.by_uid(copy.uid) is None
    assert copy.revision.object_key in hands.deletes()
    assert registry.artifacts.count(trash=True) == 0


def test_what_became_scratch_while_it_was_taken_into_storage_is_an_artifact(hands: Hands, registry: Registry) -> None:
    registry.names._identity.scratch = lambda key: key.endswith("~")
    ino = hands.create("x")
    entry = registry.journal.put_of(ino)
    assert entry is not None
    target = registry.commits.put_target(entry)
    registry.journal.set_target(entry.id, target)
    hands.rename("x", "x~")
    waiting = registry.journal.put_of(ino)
    assert waiting is not None
    assert waiting.state == "scratch"
    done = registry.commits.put(ino, entry.gen, content_of(b"1"), target, "e", Provenance(), taken=entry.src)
    assert done.current
    assert registry.journal.put_of(ino) is None
    assert hands.record("x~").uid == entry.uid


def test_the_rename_of_a_large_directory_takes_one_row_and_keys_follow(
    registry: Registry, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "FEW", 3)

    def raw_keys() -> list[str]:
        return [row[0] for row in registry.db.all("SELECT key FROM artifact ORDER BY key")]

    registry.names.create(ROOT_INO, "a", 0o40755, 1, 1)
    for number in range(5):
        hands.store(hands.create(f"a/{number}"), b"%d" % number)
    registry.names.rename(ROOT_INO, "a", ROOT_INO, "b")
    registry.names.rename(ROOT_INO, "b", ROOT_INO, "c")
    assert raw_keys() == [f"a/{number}" for number in range(5)]
    found = registry.artifacts.by_ino(hands.ino("c/3"))
    assert found is not None
    assert found.key == "c/3"
    assert registry.artifacts.settle(2)
    assert raw_keys() == ["a/2", "a/3", "a/4", "b/0", "b/1"]
    for key in ("c/0", "c/4"):
        found = registry.artifacts.by_ino(hands.ino(key))
        assert found is not None
        assert found.key == key
    # What is thrown away goes with the key that it had; and where one was is room for a new file.
    registry.names.unlink(*hands.at("c/3"))
    found = registry.artifacts.trashed("c/3")
    assert found is not None
    registry.names.create(ROOT_INO, "a", 0o40755, 1, 1)
    hands.store(hands.create("a/4"), b"new")
    assert raw_keys() == ["a/4", *(f"c/{number}" for number in range(5))]
    assert found.uid == "".join(row[0] for row in registry.db.all("SELECT uid FROM artifact WHERE key='c/3'"))
    assert not registry.artifacts.settle(2)


def test_keys_that_are_given_elsewhere_do_not_wait_for_those_below_a_renamed_directory(
    registry: Registry, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount answers nobody meanwhile, and with a million artifacts that would take seconds."""
    monkeypatch.setattr(artifacts, "FEW", 0)
    registry.names.create(ROOT_INO, "a", 0o40755, 1, 1)
    for key in ("a/1", "a/2", "a/3", "x"):
        hands.store(hands.create(key), key.encode())

    def waiting() -> int:
        return sum(key is not None and key.startswith("a/") for (key,) in registry.db.all("SELECT key FROM artifact"))

    registry.names.rename(ROOT_INO, "a", ROOT_INO, "b")
    hands.store(hands.create("y"), b"y")
    registry.names.rename(ROOT_INO, "x", ROOT_INO, "z")
    assert waiting() == 3
    registry.names.unlink(*hands.at("b/1"))
    assert registry.artifacts.trashed("b/1") is not None
    registry.names.rename(*hands.at("b/2"), ROOT_INO, "2")
    assert waiting() == 1
    registry.names.create(ROOT_INO, "a", 0o40755, 1, 1)
    registry.names.rename(ROOT_INO, "2", *(hands.ino("a"), "2"))
    assert waiting() == 1
    assert not registry.artifacts.settle()
    assert {record.key for record in registry.artifacts.filter()} == {"a/2", "b/3", "y", "z"}


def test_who_asks_by_key_lets_others_write_while_keys_follow(
    registry: Registry, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have to let a million follow: the mount is not to stand still meanwhile."""
    monkeypatch.setattr(artifacts, "FEW", 0)
    monkeypatch.setattr(artifacts, "STEP", 2)
    registry.names.create(ROOT_INO, "a", 0o40755, 1, 1)
    for number in range(5):
        hands.store(hands.create(f"a/{number}"), b"%d" % number)
    registry.names.rename(ROOT_INO, "a", ROOT_INO, "b")
    other, made = Registry(registry.path), []

    def meanwhile(_: float) -> None:
        made.append(other.names.create(ROOT_INO, f"d{len(made)}", 0o40755, 1, 1))
        shown = [other.artifacts.by_ino(hands.ino(f"b/{number}")) for number in range(5)]
        assert [record and record.key for record in shown] == [f"b/{number}" for number in range(5)]

    monkeypatch.setattr(registry.artifacts, "_pause", meanwhile)
    found = registry.artifacts.by_key("b/4")
    assert found is not None
    assert len(made) == 2
    other.close()


def test_real_keys_below_a_renamed_directory_follow_at_once(
    registry: Registry, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "FEW", 0)
    registry.names.create(ROOT_INO, "a", 0o40755, 1, 1)
    hands.store(hands.create("a/virtual"), b"1")
    hands.store(hands.create("a/real", virtual=False), b"2")
    registry.names.rename(ROOT_INO, "a", ROOT_INO, "b")
    assert registry.db.one("SELECT 1 FROM rekey") is None
    assert [entry.op for entry in registry.journal.entries()] == ["move"]
