"""Puts of processes that are gone, and artifacts that only another registry knows."""

from __future__ import annotations

import contextlib
import dataclasses

from lamfs.keys import spool_name
from lamfs.model import new_uid
from lamfs.registry import Displaced, User, base_id
from lamfs.registry.entries import Put
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands, content_of

GONE = "gone:1"
"""A process that is no more."""


def left_put(registry: Registry, hands: Hands, path: str = "a") -> Put:
    """The put of a file that its process has not stored."""
    ino = hands.create(path)
    registry.db.execute("UPDATE journal SET owner=? WHERE ino=?", (GONE, ino))
    entry = registry.journal.put_of(ino)
    assert entry is not None
    return entry


def test_only_one_process_decides_about_a_put(registry: Registry, hands: Hands) -> None:
    entry = left_put(registry, hands)
    with registry.upkeep.deciding(entry) as is_ours:
        assert is_ours
        registry.journal.take([entry])
    with registry.upkeep.deciding(entry) as is_ours:
        assert not is_ours, "it has an owner by now"


def test_a_decision_that_fails_leaves_the_row_to_others(registry: Registry, hands: Hands) -> None:
    entry = left_put(registry, hands)
    with contextlib.suppress(OSError), registry.upkeep.deciding(entry):
        registry.journal.take([entry])
        raise OSError("the disk")
    assert registry.journal.get_put(entry.id) == entry


def test_a_put_that_is_struck_off_leaves_the_stored_content(registry: Registry, hands: Hands) -> None:
    record = hands.save("a", b"stored")
    assert record.ino is not None
    registry.journal.begin_put(record.ino, "no spool file")
    registry.tree.update(record.ino, size=99)
    entry = registry.journal.put_of(record.ino)
    assert entry is not None
    assert registry.upkeep.strike_off(entry)
    assert registry.journal.entries() == []
    inode = registry.tree.get(record.ino)
    assert inode is not None
    assert inode.size == 6
    assert [lost.key for lost in registry.rescue.lost()] == ["a"]
    assert not registry.upkeep.strike_off(entry), "it is not there any more"


def test_a_put_of_a_file_that_is_gone_owes_its_object_unless_that_is_doubted(registry: Registry, hands: Hands) -> None:
    for doubted in (False, True):
        entry = left_put(registry, hands, f"file-{doubted}")
        registry.journal.set_target(entry.id, registry.commits.put_target(entry))
        if doubted:
            registry.journal.doubt_claims()
        now = registry.journal.get_put(entry.id)
        assert now is not None
        before = hands.deletes()
        registry.commits.abandon_put(now)
        assert registry.journal.get_put(entry.id) is None
        assert hands.deletes() == before + ([] if doubted else [now.object_key])
        hands.unlink(f"file-{doubted}")


def test_an_appended_end_that_is_lost_is_cut_before_the_commit(registry: Registry, hands: Hands) -> None:
    """The revision ends within a block, and what was appended there has not reached the disk."""
    record = hands.save("a", b"stored")
    assert record.ino is not None
    src = spool_name(record.ino)
    registry.journal.begin_put(record.ino, src, base=base_id(content_of(b"stored")))
    registry.partial_spools.add_ranges(src, {0: ((6, 10),)})
    registry.tree.update(record.ino, size=10)
    entry = registry.journal.put_of(record.ino)
    assert entry is not None
    cuts: list[tuple[int, bool]] = []
    lost = registry.upkeep.keep_durable(
        entry, now=5, cut=lambda size: cuts.append((size, registry.db.conn.in_transaction))
    )
    assert cuts == [(6, True)]
    assert [(each.key, each.size, each.left, each.at) for each in lost] == [("a", 10, 6, 5)]
    assert registry.rescue.lost() == lost
    inode = registry.tree.get(record.ino)
    assert inode is not None
    assert inode.size == 6
    stale = dataclasses.replace(entry, gen=entry.gen + 1)
    assert registry.upkeep.keep_durable(stale, now=6, cut=lambda size: cuts.append((size, True))) == []
    assert len(cuts) == 1


def test_an_artifact_comes_back_with_its_author_and_its_object(registry: Registry, hands: Hands) -> None:
    """The object has the bytes of this artifact again, and the one here is displaced."""
    here = hands.save("here", b"theirs")
    object_key = here.revision.object_key
    record = dataclasses.replace(
        here,
        id=None,
        uid=new_uid(),
        key="lost+found/x",
        revision=dataclasses.replace(here.revision, content=content_of(b"mine"), etag="mine"),
        created_by_id=None,
        ino=None,
        used=(),
    )
    author = User(41, "abcdefgh", "ann", None, "Ann")
    elsewhere = f".lamindb/{here.uid}.other"
    registry.upkeep.bring_back(record, author=author, displaced=Displaced(here, elsewhere), uid=1, gid=2)
    found = registry.artifacts.by_uid(record.uid)
    assert found is not None
    assert (found.key, found.revision.object_key, found.revision.etag) == ("lost+found/x", object_key, "mine")
    user = registry.people.user(found.created_by_id)
    assert user is not None
    assert user.handle == "ann"
    displaced = registry.artifacts.by_uid(here.uid)
    assert displaced is not None
    assert displaced.revision.object_key == elsewhere
