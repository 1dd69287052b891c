"""Rows that do not agree with each other are found; what needs no decision is repaired, and mounts hear of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from lamfs.registry import Flaw
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands


def flaws(registry: Registry, *, repair: bool = False, mounted: bool = False) -> list[Flaw]:
    return registry.consistency.check_tree(repair=repair, is_mounted=lambda: mounted)


def test_a_sound_registry_has_no_flaws(registry: Registry, hands: Hands) -> None:
    hands.mkdir("d")
    hands.save("d/a", b"1")
    assert flaws(registry) == []
    assert registry.consistency.check_file() == ([], [])


def test_wrong_link_counts_are_corrected_in_the_log_too(registry: Registry, hands: Hands) -> None:
    ino = hands.create("a")
    registry.tree.update(ino, nlink=9)
    assert flaws(registry) == [Flaw(f"inode {ino} counts 9 links and has 1")]
    before = registry.changes.last()
    assert flaws(registry, repair=True) == [Flaw(f"inode {ino} counts 9 links and has 1", mended=True)]
    changes, _ = registry.changes.since(before)
    assert [(change.kind, change.ino) for change in changes] == [("attr", ino)]
    assert flaws(registry) == []


def test_a_file_without_a_name_stays_while_a_mount_may_have_it_open(registry: Registry, hands: Hands) -> None:
    ino = hands.create("a")
    registry.db.execute("DELETE FROM dentry WHERE ino=?", (ino,))
    registry.tree.update(ino, nlink=0)
    assert flaws(registry, repair=True, mounted=True) == []
    assert registry.tree.get(ino) is not None
    assert flaws(registry, repair=True) == [Flaw(f"inode {ino} has no name and is no artifact's", mended=True)]
    assert registry.tree.get(ino) is None
    assert registry.journal.put_of(ino) is None


def test_mounts_are_asked_for_inside_of_the_transaction(registry: Registry) -> None:
    """One that starts later cannot have a file open that is removed."""
    seen = []

    def is_mounted() -> bool:
        seen.append(registry.db.conn.in_transaction)
        return False

    registry.consistency.check_tree(repair=True, is_mounted=is_mounted)
    assert seen == [True]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("UPDATE dentry SET ino=99 WHERE name='d'", "entry 'd' of directory 1 names inode 99, which does not exist"),
        (
            "UPDATE dentry SET parent=99 WHERE name='d'",
            "entry 'd' (inode {d}) is in directory 99, which does not exist",
        ),
        ("INSERT INTO dentry(parent, name, ino) VALUES(1, 'e', {d})", "directory inode {d} has 2 names"),
        ("UPDATE dentry SET parent={d} WHERE name='d'", "'d' (inode {d}) cannot be reached from the root"),
        ("UPDATE artifact SET ino=99", "has inode 99, which does not exist or is no regular file"),
        ("UPDATE artifact SET visibility=-1", "is in the trash but has the entry 'a'"),
        ("DELETE FROM dentry WHERE name='a'", "is shown but has no entry"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: str, sentence: str) -> None:
    with contextlib.closing(Registry(tmp_path / "damaged.lndb", create=True)) as damaged:
        damaged.people.ensure_storage("s3://bucket/prefix", "s3")
        hands = Hands(damaged)
        directory = hands.mkdir("d")
        hands.save("a", b"1")
        damaged.db.execute(damage.format(d=directory))
        found = [flaw.sentence for flaw in flaws(damaged)]
    assert any(sentence.format(d=directory) in text for text in found), found
