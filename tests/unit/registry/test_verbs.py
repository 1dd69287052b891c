"""The verbs that join journal, tree and change log: one transaction each, and the same again by the same arguments."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import FsError
from lamfs.model import DESCRIPTION_XATTR, ROOT_INO, Revision
from lamfs.registry import Backup, Provenance, Stored
from lamfs.registry import attributes as attributes_module
from lamfs.registry.entries import Put
from lamfs.registry.verbs import Verbs
from lamfs.registry.writes import SpoolInfo
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands, content_of

GONE = "00000000-0000-0000-0000-000000000000:1:1"
"""A process of another boot."""


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "twin" / "r.lndb", create=True)
    registry.people.ensure_storage("/s", "local")
    yield registry
    registry.close()


def kinds(registry: Registry, since: int) -> list[tuple[str, int]]:
    """What the change log says since then."""
    return [(change.kind, change.ino) for change in registry.changes.since(since)[0]]


def put_of(registry: Registry, ino: int) -> Put:
    found = registry.journal.put_of(ino)
    assert found is not None
    return found


def fail(*_: object, **__: object) -> None:
    raise FsError(errno.EIO)


# -- the same arguments, the same registry ---------------------------------------------------------------------------


def play(registry: Verbs) -> None:
    """A day of a registry, told with all its times and uids."""
    names = registry.names
    folder = names.create(ROOT_INO, "d", 0o040755, 1, 2, now=10)
    for number, name in enumerate(("a.csv", "b.csv", "c.csv")):
        inode, _ = names.create_file(
            folder.ino, name, 0o100644, 1, 2, now=20 + number, artifact_uid=f"{number}" * 20, token=f"{number:012x}"
        )
        acknowledged = registry.writes.acknowledge(inode)
        assert acknowledged is not None
        registry.commits.put(
            inode.ino, acknowledged.gen, content_of(name.encode()), f"o{number}", f"e{number}", Provenance(), now=30
        )
    names.create(ROOT_INO, "link", 0o120777, 1, 2, now=40, target=b"d")
    second = names.link(inode.ino, ROOT_INO, "second", now=50)
    registry.attributes.set_xattr(second.ino, "user.x", b"1", now=60)
    registry.attributes.describe(second.ino, "what it is", now=70)
    names.rename(folder.ino, "a.csv", folder.ino, "b.csv", now=80)
    names.exchange(ROOT_INO, "second", ROOT_INO, "link", now=90)
    names.unlink(folder.ino, "b.csv", now=100)
    names.restore("1" * 20, "e/f.csv", now=110)
    names.trash("2" * 20, now=120)
    registry.people.ensure_user("u" * 8, "me", None, None, now=130)
    transform = registry.people.ensure_transform("t", None, "script", None, uid="t" * 16, now=140)
    run = registry.people.start_run(transform.id, None, uid="r" * 20, now=150)
    registry.people.finish_run(run.id, now=160)


def test_the_same_verbs_with_the_same_arguments_make_the_same_registry(registry: Registry, twin: Registry) -> None:
    play(registry)
    play(twin)
    for table in ("inode", "dentry", "artifact", "revision", "symlink", "xattr", "user", "transform", "run"):
        known = "WHERE atime_ns<1000" if table == "inode" else ""  # the two fixed directories are as old as the file
        rows = registry.db.all(f"SELECT * FROM {table} {known} ORDER BY 1, 2")
        assert rows == twin.db.all(f"SELECT * FROM {table} {known} ORDER BY 1, 2"), table
        assert rows, table
    found = registry.db.all("SELECT kind, ino, parent, name FROM change ORDER BY seq")
    assert found == twin.db.all("SELECT kind, ino, parent, name FROM change ORDER BY seq")


def test_times_and_uids_are_those_that_were_said(registry: Registry) -> None:
    inode, src = registry.names.create_file(
        ROOT_INO, "a", 0o100644, 1, 1, now=123, artifact_uid="A" * 20, token="0123456789ab"
    )
    assert (inode.atime_ns, inode.mtime_ns, inode.ctime_ns) == (123, 123, 123)
    assert src == f"{inode.ino:x}-0123456789ab"
    assert put_of(registry, inode.ino).uid == "A" * 20


def test_a_backup_becomes_the_new_artifact_that_was_said(registry: Registry, hands: Hands) -> None:
    before = hands.save("a", b"1")
    renamed = registry.names.rename(ROOT_INO, "a", ROOT_INO, "a~", now=5)
    backup = Backup(renamed.inode.ino, renamed.ended)
    inode, _ = registry.names.create_file(
        ROOT_INO, "a", 0o100644, 1, 1, now=77, artifact_uid="B" * 20, token="0" * 12, backup=backup
    )
    copy = registry.artifacts.by_ino(renamed.inode.ino)
    assert copy is not None
    assert (copy.uid, copy.created_at) == ("B" * 20, 77)
    heir = registry.artifacts.by_ino(inode.ino)
    assert heir is not None
    assert heir.uid == before.uid


# -- attributes ------------------------------------------------------------------------------------------------------


def test_access_times_are_no_change_for_others(registry: Registry) -> None:
    one, two = (registry.names.create(ROOT_INO, name, 0o040755, 1, 1) for name in "ab")
    last = registry.changes.last()
    registry.attributes.set_atimes({one.ino: 11, two.ino: 22})
    assert [inode and inode.atime_ns for inode in map(registry.tree.get, (one.ino, two.ino))] == [11, 22]
    assert registry.changes.last() == last


def test_an_extended_attribute_changes_ctime_and_is_logged(registry: Registry) -> None:
    ino, last = registry.names.create(ROOT_INO, "d", 0o040755, 1, 1).ino, registry.changes.last()
    registry.attributes.set_xattr(ino, "user.x", b"1", now=99)
    inode = registry.tree.get(ino)
    assert inode is not None
    assert inode.ctime_ns == 99
    assert kinds(registry, last) == [("attr", ino)]
    registry.attributes.remove_xattr(ino, "user.x", now=100)
    assert registry.tree.xattrs(ino) == {}
    assert kinds(registry, last) == [("attr", ino)] * 2
    with pytest.raises(FsError) as error:
        registry.attributes.remove_xattr(ino, "user.x", now=101)
    assert error.value.errno == errno.ENODATA


def test_a_full_list_of_attributes_takes_no_more(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    ino = registry.names.create(ROOT_INO, "d", 0o040755, 1, 1).ino
    monkeypatch.setattr(attributes_module, "LIST_MAX", 14)
    registry.attributes.set_xattr(ino, "user.x", b"1", now=1)
    registry.attributes.set_xattr(ino, "user.y", b"1", now=1)
    registry.attributes.set_xattr(ino, "user.x", b"2", now=1)
    with pytest.raises(FsError) as error:
        registry.attributes.set_xattr(ino, "user.z", b"1", now=1)
    assert error.value.errno == errno.ENOSPC
    assert registry.tree.xattrs(ino) == {"user.x": 1, "user.y": 1}


def test_a_description_waits_for_the_artifact(registry: Registry, hands: Hands) -> None:
    ino, last = hands.create("a"), registry.changes.last()
    registry.attributes.describe(ino, "first", now=1)
    assert registry.tree.xattr(ino, DESCRIPTION_XATTR) == b"first"
    record = hands.store(ino, b"1")
    assert record is not None
    assert record.description == "first"
    registry.attributes.describe(ino, "", now=8)
    record = registry.artifacts.by_ino(ino)
    assert record is not None
    assert (record.description, record.updated_at) == (None, 8)
    assert kinds(registry, last) == [("record", ino), ("content", ino), ("record", ino)]


# -- writes ----------------------------------------------------------------------------------------------------------


def revision_of(registry: Registry, ino: int) -> int:
    inode = registry.tree.get(ino)
    assert inode is not None
    return inode.revision


def test_what_is_written_to_a_file_that_is_gone_is_nobodys(registry: Registry, hands: Hands) -> None:
    ino = hands.create("a")
    hands.unlink("a")
    begun = registry.writes.begin_put(ino, "5-0123456789ab", key_is_virtual=True, seen=0, mine=None)
    assert begun.is_gone
    assert registry.journal.is_spent("5-0123456789ab")
    assert registry.journal.put_of(ino) is None


def test_a_spent_name_is_not_owed_again(registry: Registry, hands: Hands) -> None:
    ino = hands.create("a")
    src = put_of(registry, ino).src
    hands.store(ino, b"1")
    assert registry.journal.is_spent(src)
    begun = registry.writes.begin_put(ino, src, key_is_virtual=True, seen=revision_of(registry, ino), mine=src)
    assert begun.is_spent
    assert registry.journal.put_of(ino) is None
    begun = registry.writes.begin_put(ino, "another", key_is_virtual=True, seen=revision_of(registry, ino), mine=src)
    assert (begun.is_spent, begun.replaced) == (False, None)
    assert put_of(registry, ino).src == "another"


def test_a_put_and_what_its_partial_spool_has_are_begun_together(
    registry: Registry, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = hands.save("a", b"1")
    assert record.ino is not None
    seen = revision_of(registry, record.ino)
    with monkeypatch.context() as patch:
        patch.setattr(registry.partial_spools, "add_ranges", fail)
        with pytest.raises(FsError):
            registry.writes.begin_put(
                record.ino, "p", key_is_virtual=True, seen=seen, mine=None, base="b", blocks=[1], ranges={}
            )
    assert registry.journal.put_of(record.ino) is None
    registry.writes.begin_put(
        record.ino, "p", key_is_virtual=True, seen=seen, mine=None, base="b", blocks=[1], ranges={2: ((3, 4),)}
    )
    assert put_of(registry, record.ino).base == "b"
    assert (registry.partial_spools.present("p"), registry.partial_spools.ranges("p")) == ({1}, {2: ((3, 4),)})


def test_acknowledging_says_size_times_and_the_new_revision(registry: Registry) -> None:
    inode, src = registry.names.create_file(ROOT_INO, "a", 0o100644, 1, 1)
    inode.size, inode.mtime_ns = 7, 70
    last = registry.changes.last()
    done = registry.writes.acknowledge(inode, src=src, columns={"mode": 0o100600})
    assert done == (1, 1)
    now = registry.tree.get(inode.ino)
    assert now is not None
    assert (now.size, now.mtime_ns, now.mode, now.revision) == (7, 70, 0o100600, 1)
    assert kinds(registry, last) == [("content", inode.ino)]
    assert put_of(registry, inode.ino).state == "ready"


def test_what_is_owed_by_another_spool_file_is_not_acknowledged(registry: Registry) -> None:
    inode, _ = registry.names.create_file(ROOT_INO, "a", 0o100644, 1, 1)
    inode.size, last = 7, registry.changes.last()
    assert registry.writes.acknowledge(inode, src="another") is None
    now = registry.tree.get(inode.ino)
    assert now is not None
    assert (now.size, now.revision, registry.changes.last()) == (0, 0, last)


def test_an_empty_probe_settles_longer_and_only_until_it_was_stored(registry: Registry) -> None:
    inode, _ = registry.names.create_file(ROOT_INO, "a", 0o100644, 1, 1)
    probe, _ = registry.names.create_file(ROOT_INO, "4913", 0o100644, 1, 1)
    assert registry.names.is_probe(probe.ino)
    assert not registry.names.is_probe(inode.ino)
    registry.writes.acknowledge(probe, settle=0.0, probe_settle=1e6)
    registry.writes.acknowledge(inode, settle=0.0, probe_settle=1e6)
    assert put_of(registry, probe.ino).next_at > put_of(registry, inode.ino).next_at + 10**14
    registry.writes.acknowledge(probe, settle=0.0)
    assert put_of(registry, probe.ino).next_at < put_of(registry, inode.ino).next_at + 10**14


def test_what_a_dead_mount_was_writing_counts_as_closed(registry: Registry, hands: Hands) -> None:
    inode, _ = registry.names.create_file(ROOT_INO, "a", 0o100644, 1, 1)
    closed = hands.create("b")
    registry.db.execute("UPDATE journal SET owner=?", (GONE,))
    left, last = registry.journal.left(("put",)), registry.changes.last()
    row = put_of(registry, inode.ino).id
    taken = registry.writes.take_over(left, {row: SpoolInfo(9, 90, 8)})
    assert taken.closed == [inode.ino]
    assert [entry.id for entry in taken.rows] == [entry.id for entry in left]
    now = registry.tree.get(inode.ino)
    assert now is not None
    assert (now.size, now.mtime_ns, now.blocks, now.revision) == (9, 90, 8, 1)
    assert [put_of(registry, ino).state for ino in (inode.ino, closed)] == ["ready", "ready"]
    assert put_of(registry, inode.ino).owner == registry.journal.owner
    assert kinds(registry, last) == [("content", inode.ino)]


def test_what_somebody_else_has_taken_over_meanwhile_stays_its(registry: Registry) -> None:
    inode, _ = registry.names.create_file(ROOT_INO, "a", 0o100644, 1, 1)
    registry.db.execute("UPDATE journal SET owner=?", (GONE,))
    left = registry.journal.left(("put",))
    other = Registry(registry.path)
    other.journal.owner = f"{registry.journal.owner}0"
    other.journal.take(left)
    taken = registry.writes.take_over(left, {left[0].id: SpoolInfo(9, 90, 8)})
    assert taken == ([], [])
    assert put_of(registry, inode.ino).state == "open"
    now = registry.tree.get(inode.ino)
    assert now is not None
    assert now.size == 0
    other.close()


def test_a_put_that_was_taken_over_is_closed_with_what_its_file_has(registry: Registry) -> None:
    inode, _ = registry.names.create_file(ROOT_INO, "a", 0o100644, 1, 1)
    last = registry.changes.last()
    registry.writes.close_left(put_of(registry, inode.ino), SpoolInfo(5, 50, 8))
    now = registry.tree.get(inode.ino)
    assert now is not None
    assert (now.size, now.mtime_ns) == (5, 50)
    assert put_of(registry, inode.ino).state == "ready"
    assert kinds(registry, last) == [("content", inode.ino)]


# -- commits ---------------------------------------------------------------------------------------------------------


def test_many_puts_are_one_transaction(registry: Registry, hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    inos = [hands.create(name) for name in "abc"]
    files = [(put_of(registry, ino), content_of(b"%d" % ino)) for ino in inos]
    announced = registry.commits.announce_many(files, set())
    assert [file.entry.ino for file in announced] == inos
    assert [put_of(registry, ino).object_key for ino in inos] == [file.object_key for file in announced]
    stored = [Stored(file.entry, file.content, file.object_key, "e") for file in announced]
    with monkeypatch.context() as patch:
        count = iter(range(9))
        told = registry.changes.content
        patch.setattr(registry.changes, "content", lambda ino: fail() if next(count) == 2 else told(ino))
        with pytest.raises(FsError):
            registry.commits.put_many(stored, Provenance(), now=4)
    assert registry.artifacts.count() == 0
    outcomes = registry.commits.put_many(stored, Provenance(), now=4)
    assert sorted(outcomes) == [file.entry.id for file in announced]
    records = [registry.artifacts.by_ino(ino) for ino in inos]
    assert [record and record.created_at for record in records] == [4, 4, 4]


def test_what_cannot_be_stored_with_others_is_left_out(registry: Registry, hands: Hands) -> None:
    inos = [hands.create(name) for name in "abcd"]
    same = content_of(b"same")
    hands.save("twin", b"same")
    busy, elsewhere, damaged, sound = (put_of(registry, ino) for ino in inos)
    elsewhere.object_key = "elsewhere"
    damaged.damaged = frozenset({0})
    place = registry.commits.put_target(busy)
    found = registry.commits.announce_many([(each, same) for each in (busy, elsewhere, damaged, sound)], {place})
    assert [file.entry.ino for file in found] == [sound.ino]
    assert isinstance(found[0].twin, Revision)
    assert [put_of(registry, ino).object_key for ino in inos[:3]] == [None, None, None]


def test_a_target_that_was_made_with_other_bytes_is_owed_its_deletion(registry: Registry, hands: Hands) -> None:
    ino = hands.create("a")
    entry = put_of(registry, ino)
    target = registry.commits.put_target(entry)
    registry.journal.claim_target(entry.id, target)
    registry.commits.give_up_target(entry.id, target, "theirs")
    assert put_of(registry, ino).object_key is None
    assert registry.journal.owes_delete(target, "theirs")


def test_objects_that_are_gone_are_owed_no_more(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("x", "y"):
        registry.journal.add_delete(key)
    ids = [entry.id for entry in registry.journal.entries()]
    done = registry.journal.done
    with monkeypatch.context() as patch:
        patch.setattr(registry.journal, "done", lambda row: fail() if row == ids[1] else done(row))
        with pytest.raises(FsError):
            registry.commits.deleted(ids)
    assert [entry.id for entry in registry.journal.entries()] == ids
    registry.commits.deleted(ids)
    assert registry.journal.entries() == []


def test_a_save_is_told_what_it_replaces_and_whether_the_object_was_claimed(registry: Registry, hands: Hands) -> None:
    record = hands.save("a", b"1", virtual=False)
    announced = registry.commits.announce_save(record)
    assert announced.before is not None
    assert announced.before.revision == record.revision
    assert (announced.object_key, announced.was_claimed) == ("a", False)
    registry.commits.abandon_save(announced.entry_id, announced.object_key, delete=False)
    again = registry.commits.announce_save(record)
    assert again.was_claimed  # the first one may have written it
