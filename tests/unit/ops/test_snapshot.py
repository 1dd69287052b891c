"""What may take the place of the registry's copy in storage, and that it is written on that condition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamfs.errors import DamagedRegistry, Locked, StorageUnavailable
from lamfs.model import StorageConfig
from lamfs.ops import kept, setup, snapshot, written
from lamfs.ops.instance import Instance
from lamfs.ops.snapshot import Found, Known, Own, Verdict, decide
from lamfs.registry.origins import Origin, pushes_of
from lamfs.storage import open_store
from lamfs.storage.base import ObjectStat
from tests.support.ops import machine
from tests.support.timed import timed

UID, OTHER = "a" * 12, "b" * 12
ONE, TWO, THREE = "1" * 16, "2" * 16, "3" * 16
OWN = Own(UID, 100, (TWO, ONE))


def stored(etag: str) -> ObjectStat:
    return ObjectStat("x.lndb", 10, etag, 0)


def found(etag: str, changes: int, *pushes: str, uid: str = UID) -> Found:
    return Found(stored(etag), Origin("a/b", uid, None, 12, changes, pushes))


def copy(changes: int, push: str, uid: str = UID, at: int = 0) -> kept.Copy:
    return kept.Copy(kept.name_of(changes, uid, push), changes, uid, push, ObjectStat("", 1, "e", at))


DAMAGED = Found(stored("x"), None, DamagedRegistry("damaged"))


@pytest.mark.parametrize(
    ("known", "there", "copies", "verdict"),
    [
        (Known(), None, (), Verdict.FIRST),
        (Known("e", "m", 90, TWO), None, (), Verdict.GONE),
        (Known(), None, (copy(90, TWO),), Verdict.GONE),
        (Known(), None, (copy(500, THREE, OTHER),), Verdict.FIRST),
        (Known("e", "m", 90, TWO), None, (copy(95, THREE), copy(90, TWO)), Verdict.NEWER),
        (Known("e", "m", 90, TWO), None, (copy(90, TWO), copy(150, THREE)), Verdict.NEWER),
        (Known("e", "m", 90, TWO), DAMAGED, (copy(90, TWO),), Verdict.DAMAGED),
        (Known("e", "m", 90, TWO), DAMAGED, (), Verdict.DAMAGED),
        (Known("e", "m", 90, TWO), DAMAGED, (copy(95, THREE),), Verdict.NEWER),
        (Known("e", "m", 90, TWO), found("e", 90, TWO, ONE), (), Verdict.NEXT),
        (Known("e", "m", 190, TWO), found("e", 190, TWO, ONE), (), Verdict.NEWER),
        (Known("e", "m", 90, TWO), found("f", 90, TWO, ONE), (), Verdict.NEXT),
        (Known("e", "m", 90, TWO), found("f", 50, ONE), (), Verdict.NEXT),
        (Known("e", "m", 90, TWO), found("f", 95, THREE, TWO), (), Verdict.NEWER),
        (Known("e", "m", 90, TWO), found("f", 110, TWO), (), Verdict.NEWER),
        (Known("e", "m", 90, TWO), found("f", 50, ONE, uid=OTHER), (), Verdict.OTHER),
        (Known("e", "m", 90, TWO), found("f", 90), (), Verdict.NEXT),
        (Known("e", "m", 90, TWO), found("f", 91), (), Verdict.NEWER),
        (Known("e", "m"), found("f", 50), (), Verdict.NEWER),
        (Known("e", "m"), found("e", 50), (), Verdict.NEXT),
    ],
)
def test_decide(known: Known, there: Found | None, copies: tuple[kept.Copy, ...], verdict: Verdict) -> None:
    assert decide(OWN, known, there, copies) is verdict


@pytest.mark.parametrize("value", [None, 5, "x", "{}", "[5]", '["short"]', "[" * 10_000, f'["{"G" * 16}"]'])
def test_pushes_that_are_not_as_lamfs_writes_them_are_none(value: object) -> None:
    assert pushes_of(value) == ()


def change(instance: Instance, name: str) -> None:
    timed(instance.registry).names.ensure_directory(name, 0, 0)


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    setup.login("ada")
    return setup.init(str(tmp_path / "store"), "one")


class Racing:
    """A store in which something happens before, or instead of the reply to, each put_file."""

    def __init__(self, store: Any, before: Callable[[], None] | None = None, lost: int = 0) -> None:
        self._store, self._before, self.lost = store, before, lost
        self.puts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_file(self, key: str, path: str, **how: Any) -> Any:
        self.puts += 1
        if self._before is not None:
            before, self._before = self._before, None
            before()
        if self.lost:
            self.lost -= 1
            how["consume"] = False
            self._store.put_file(key, path, **how)
            return self._store.put_file(key, path, **how)  # tried again, as a client does: it finds its own
        return self._store.put_file(key, path, **how)


def test_whoever_comes_between_look_and_write_is_not_written_over(settings: Any, tmp_path: Path) -> None:
    def other() -> None:
        """Another machine, which has the lease by then."""
        with machine(tmp_path / "two"):
            with Instance(settings) as here:
                here.store.delete([here.lease().key])
            setup.connect(settings.storage.root)
            with Instance(settings) as there:
                change(there, "theirs")
                assert snapshot.push(there)

    with Instance(settings, store=Racing(open_store(settings.storage), other)) as instance:  # type: ignore[arg-type]
        change(instance, "ours")
        with pytest.raises(Locked, match="has changes that this machine's does not have"):
            snapshot.push(instance)
        assert instance.registry.tree.resolve("ours") is not None
    with machine(tmp_path / "two"), Instance(settings) as there:
        change(there, "more")
        assert snapshot.push(there), "and theirs goes on"


def test_a_push_whose_reply_was_lost_is_done(settings: Any) -> None:
    store = Racing(open_store(settings.storage), lost=1)
    with Instance(settings, store=store) as instance:  # type: ignore[arg-type]
        change(instance, "ours")
        assert snapshot.push(instance)
        assert store.puts == 1
        assert not snapshot.push(instance)


def test_a_push_that_failed_is_done_by_the_next(settings: Any) -> None:
    def away() -> None:
        raise StorageUnavailable("away")

    with Instance(settings, store=Racing(open_store(settings.storage), away)) as instance:  # type: ignore[arg-type]
        change(instance, "ours")
        with pytest.raises(StorageUnavailable):
            snapshot.push(instance)
        assert snapshot.push(instance)


def test_a_kill_after_the_copy_is_stored_is_no_change_of_another_machine(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with Instance(settings) as instance:
        change(instance, "ours")
        with monkeypatch.context() as patch:
            patch.setattr(snapshot, "_remember", die)
            with pytest.raises(KeyboardInterrupt):
                snapshot.push(instance)
        change(instance, "more")
        snapshot.catch_up(instance)
        assert instance.registry.tree.resolve("more") is not None
        assert snapshot.push(instance)


def test_what_a_program_notes_is_believed_until_the_machine_starts_anew(settings: Any) -> None:
    """A power cut may take commits that were not synced: then the working copy is not older than it must be."""
    with Instance(settings) as instance:
        change(instance, "ours")
        number = instance.registry.changes.last()
    known = written.read(settings)
    assert known is not None
    assert known.synced < known.changes == number == known.least
    assert known._replace(owner="another-boot:1:1").least == known.synced


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"uid": 5}', '{"uid": "x", "synced": "y", "changes": 1}', "\0"])
def test_a_note_that_is_damaged_says_nothing(settings: Any, text: str) -> None:
    written.path(settings).write_text(text)
    with Instance(settings) as instance:
        change(instance, "ours")
    assert written.read(settings) is not None


def test_kept_copies_are_those_of_names_that_lamfs_gives(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    store = open_store(StorageConfig(str(tmp_path / "s")))
    id_ = setup.instance_id("a/b")
    for name in ("x.lndb", "../evil.lndb", f"{5:020d}-{UID}-{ONE}"):
        with pytest.raises(ValueError, match="not the name of a kept copy"):
            kept.key(id_, name)
    store.put_bytes(f"{kept.PREFIX}{id_.hex}/something", b"x")
    store.put_bytes(kept.key(id_, kept.name_of(5, UID, ONE)), b"x")
    assert [each.changes for each in kept.copies(store, id_)] == [5]
    assert kept.instances(store) == [id_]
