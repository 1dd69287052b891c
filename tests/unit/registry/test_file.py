"""What a registry says of itself: instance, lease, pushes; its log, and copies of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lamfs.config import UserSettings
from lamfs.registry.origins import About
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands

ROOT = "s3://bucket/prefix"


def test_a_new_registry_is_whole_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new.lndb"
    with contextlib.closing(Registry(path, create=True)) as registry:
        user = UserSettings(handle="ann", email="ann@x.org", uid="abcdefgh", name=None)
        registry.file.set_up("ann/one", root=ROOT, kind="s3", region="eu-1", user=user)
        assert Path(f"{path}-wal").stat().st_size == 0, "a copy of the file alone has everything"
        storage = registry.people.storage(1)
        assert storage is not None
        assert (storage.root, storage.type, storage.region) == (ROOT, "s3", "eu-1")
        assert registry.file.about() == About("ann/one", storage.uid, ROOT)
        assert registry.people.user_by_handle("ann") is not None
        registry.file.move_to("s3://elsewhere")
        assert registry.file.about().root == "s3://elsewhere"


def test_what_a_registry_does_not_say_or_says_in_no_words_is_unknown(registry: Registry) -> None:
    assert registry.file.about() == About(None, None, None)
    registry.db.set_meta("slug", 7)
    registry.db.set_meta("fence", "x")
    assert registry.file.about().slug is None
    assert registry.file.fence() is None
    assert registry.file.source() is None


def test_a_new_lease_doubts_what_was_claimed_before_it(registry: Registry, hands: Hands) -> None:
    ino = hands.create("a")
    entry = registry.journal.put_of(ino)
    assert entry is not None
    registry.journal.set_target(entry.id, registry.commits.put_target(entry))
    registry.file.begin_lease(7)
    after = registry.journal.put_of(ino)
    assert after is not None
    assert after.doubted
    assert registry.file.fence() == 7


def test_the_mark_follows_every_change_that_is_worth_a_push(registry: Registry, hands: Hands) -> None:
    marks = [registry.file.mark()]
    hands.mkdir("d")
    marks.append(registry.file.mark())
    user = registry.people.ensure_user("abcdefgh", "ann", None, None)
    marks.append(registry.file.mark())
    transform = registry.people.ensure_transform("t", None, "script", user.id)
    marks.append(registry.file.mark())
    registry.people.start_run(transform.id, user.id)
    marks.append(registry.file.mark())
    assert len(set(marks)) == len(marks)
    registry.file.made_of("etag")
    assert registry.file.mark() == marks[-1]
    assert registry.file.source() == "etag"


def test_a_copy_is_the_push_of_its_name(registry: Registry, hands: Hands, tmp_path: Path) -> None:
    hands.mkdir("d")
    registry.file.add_pushes(["0" * 16])
    registry.file.copy_to(tmp_path / "copy.lndb", push="1" * 16)
    hands.mkdir("e")
    with contextlib.closing(Registry(tmp_path / "copy.lndb")) as copy:
        assert copy.file.pushes() == ("1" * 16, "0" * 16)
        assert copy.tree.resolve("d") is not None
        assert copy.tree.resolve("e") is None
        assert not copy.file.is_changed()
    assert registry.file.is_changed()


def test_a_successor_counts_on_from_what_it_replaces(registry: Registry) -> None:
    registry.file.supersede(["0" * 16, "1" * 16], 1000)
    assert registry.file.pushes() == ("0" * 16, "1" * 16)
    assert registry.changes.last() == 1000
    registry.file.supersede([], 10)
    assert registry.changes.last() == 1000
