"""``lost+found`` of a registry in use: the folder, free names, and files made of spool files."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.keys import spool_name
from lamfs.model import ROOT_INO
from lamfs.registry import Lost, rescue
from lamfs.scratch import DEFAULT, matcher
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """As conftest's, with scratch names."""
    made = Registry(tmp_path / "r.lndb", create=True, scratch=matcher(DEFAULT))
    made.people.ensure_storage("s3://bucket/prefix", "s3")
    yield made
    made.close()


def test_folder_is_made_once_private_and_logged(registry: Registry) -> None:
    before = registry.changes.last()
    folder = registry.rescue.folder()
    inode = registry.tree.get(folder)
    assert inode is not None
    assert inode.mode == stat.S_IFDIR | 0o700
    assert registry.tree.path(folder) == "lost+found"
    assert registry.rescue.folder() == folder
    changes, _ = registry.changes.since(before)
    assert [(change.kind, change.name) for change in changes] == [("entry", "lost+found")]


def test_folder_has_another_name_where_a_file_is(registry: Registry) -> None:
    registry.names.create_file(ROOT_INO, "lost+found", 0o600, 0, 0)
    assert registry.tree.path(registry.rescue.folder()) == "lost+found.2"


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("a.csv", "a.csv"),
        ("a/b", "a_b"),
        ("", "kept"),
        ("..", "kept"),
        ("a\0b", "ab"),
        (".a.swp", "kept a.swp"),
        ("4913", "4913"),
        (".#a", "kept a"),
        ("ä" * 200, "ä" * 127),
    ],
)
def test_free_name_is_one_that_a_file_may_have_and_no_scratch(registry: Registry, wanted: str, name: str) -> None:
    assert registry.rescue.free_name(wanted) == name


def test_free_name_counts(registry: Registry) -> None:
    folder = registry.rescue.folder()
    for expected in ("a.tar.gz", "a.2.tar.gz", "a.3.tar.gz"):
        name = registry.rescue.free_name("a.tar.gz")
        assert name == expected
        registry.names.create_file(folder, name, 0o600, 0, 0)


def test_kept_file_is_a_file_whose_put_is_owed(registry: Registry) -> None:
    src, before = spool_name(77), registry.changes.last()
    key = registry.rescue.keep_file("x.csv", src=src, size=5, mtime_ns=7, artifact_uid="u" * 20)
    assert key == "lost+found/x.csv"
    inode = registry.tree.resolve(key)
    assert inode is not None
    assert (inode.size, inode.mtime_ns, stat.S_IMODE(inode.mode), inode.nlink) == (5, 7, 0o600, 1)
    owed = registry.journal.put_of(inode.ino)
    assert owed is not None
    assert (owed.src, owed.state, owed.gen, owed.uid, owed.owner) == (
        src, "ready", 1, "u" * 20, registry.journal.owner,
    )  # fmt: skip
    changes, _ = registry.changes.since(before)
    assert [change.name for change in changes] == ["lost+found", "x.csv"]


def test_kept_file_does_not_take_the_uid_of_an_artifact(registry: Registry, hands: Hands) -> None:
    record = hands.store(hands.create("a"), b"x")
    assert record is not None
    key = registry.rescue.keep_file("a", src=spool_name(9), size=1, mtime_ns=1, artifact_uid=record.uid)
    inode = registry.tree.resolve(key)
    assert inode is not None
    owed = registry.journal.put_of(inode.ino)
    assert owed is not None
    assert owed.uid != record.uid


def test_what_is_given_up_leaves_the_object_that_it_may_be_in(registry: Registry, hands: Hands) -> None:
    """Storage may have taken it, and the registry has lost that: it is the only copy then."""
    ino = hands.create("a")
    entry = registry.journal.put_of(ino)
    assert entry is not None
    registry.journal.set_target(entry.id, registry.commits.put_target(entry))
    lost = registry.rescue.give_up(entry.id)
    assert lost is not None
    assert not lost.stored
    assert registry.tree.resolve("a") is None
    assert registry.journal.entries() == []


def test_losses_are_remembered_in_order_and_the_last_of_them(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescue, "LOST", 12)
    whole = Lost("a", "u", 7, True, 1, ranges=((4, 6), (9, 14)))
    for number in range(20):
        registry.rescue.note_lost(whole._replace(at=number))
    registry.rescue.note_lost(Lost("b", "", 9, False, 20, left=4))
    known = registry.rescue.lost()
    assert [one.at for one in known] == list(range(9, 21))
    assert known[0] == whole._replace(at=9)
    assert known[-1] == Lost("b", "", 9, False, 20, left=4)
    registry.rescue.forget_lost()
    assert registry.rescue.lost() == []
    registry.rescue.note_lost(whole)
    assert registry.rescue.lost() == [whole]


def test_what_an_older_version_has_noted_is_lost_too(registry: Registry) -> None:
    registry.db.set_meta("lost", '[["a", "u", 7, true, 1], ["b", "", 9, false, 2, 4]]')
    registry.rescue.note_lost(Lost("c", "", 1, False, 3))
    assert [(one.key, one.left) for one in registry.rescue.lost()] == [("a", None), ("b", 4), ("c", None)]
    registry.rescue.forget_lost()
    assert registry.rescue.lost() == []


def test_a_loss_is_noted_without_reading_the_others(registry: Registry) -> None:
    loss, ticks = Lost("a", "u", 7, True, 1), 0

    def tick() -> int:
        nonlocal ticks
        ticks += 1
        return 0

    def steps() -> int:
        nonlocal ticks
        ticks = 0
        registry.rescue.note_lost(loss)
        return ticks

    registry.db.conn.set_progress_handler(tick, 1)
    try:
        few = steps()
        with registry.db.transaction():
            for _ in range(2000):
                registry.rescue.note_lost(loss)
        assert steps() < 2 * few
    finally:
        registry.db.conn.set_progress_handler(None, 0)
    size = registry.db.one("SELECT max(length(value)) FROM meta")
    assert size is not None
    assert size[0] < 1000


def test_only_what_leads_somewhere_is_named_again(registry: Registry, hands: Hands) -> None:
    full, empty, owed = hands.mkdir("full"), hands.mkdir("empty"), hands.create("full/owed")
    unread = hands.create("unread")
    registry.journal.drop_put(unread)
    for ino in (full, empty, unread):
        registry.db.execute("DELETE FROM dentry WHERE ino=?", (ino,))
    assert registry.rescue.name_nameless() == [(full, f"lost+found/inode {full}")]
    assert registry.tree.path(owed) == f"lost+found/inode {full}/owed"
    assert registry.rescue.name_nameless() == []
    registry.consistency.check_tree(repair=True, is_mounted=lambda: False)
    assert registry.tree.get(empty) is None


def test_a_scratch_name_gets_its_bytes_back_with_its_mode(registry: Registry, hands: Hands) -> None:
    ino = hands.create(".a.swp")
    registry.journal.drop_put(ino)
    registry.tree.update(ino, size=3, mode=stat.S_IFREG | 0o640)
    (scratch,) = registry.names.unread_scratch()
    assert not registry.rescue.give_back("kept", scratch), "there is no such file"
    key = registry.rescue.keep_file("kept", src=spool_name(ino), size=3, mtime_ns=1)
    kept = registry.tree.resolve(key)
    assert kept is not None
    assert registry.rescue.give_back("kept", scratch)
    found = registry.tree.resolve(".a.swp")
    assert found is not None
    assert (found.ino, stat.S_IMODE(found.mode)) == (kept.ino, 0o640)
    assert registry.tree.resolve(key) is None
    assert not registry.rescue.give_back("kept", scratch), "it is done already"


def test_objects_that_a_revision_or_the_journal_names(registry: Registry, hands: Hands) -> None:
    record = hands.save("a", b"1")
    registry.journal.add_delete("stale")
    assert {record.revision.object_key, "stale"} <= registry.rescue.named_objects()
