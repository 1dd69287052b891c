"""Taking over a put whose spool file is gone: the registry was set back, and knows less than storage has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamfs.errors import StorageUnavailable
from lamfs.model import ContentHash
from lamfs.ops import adoption, artifacts, recover, setup
from lamfs.ops.instance import Instance
from lamfs.processes import process_id
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore
from lamfs.storage.local import LocalStore
from lamfs.work import direct
from tests.support.timed import timed


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    with Instance.open(setup.init(str(tmp_path / "store"), "a").slug) as opened:
        yield opened


def read(opened: Instance) -> str:
    return artifacts.cache(opened, artifacts.find(opened, "a.txt")).read_text()


def begin(opened: Instance, *, here: bool = True) -> Put:
    """A new file ``a.txt`` as the registry has it before its first close. ``here``: by a process of this boot."""
    registry = opened.registry
    inode, src = timed(registry).names.create_file(1, "a.txt", 0o100644, 0, 0)
    boot = (registry.journal.owner or "").partition(":")[0] if here else "another"
    registry.db.execute("UPDATE journal SET owner=? WHERE src=?", (f"{boot}:1:1", src))
    entry = registry.journal.put_of(inode.ino)
    assert entry is not None
    assert entry.state == "open"
    return entry


def store_it(opened: Instance, entry: Put, path: Path, text: str) -> str:
    """The object that the close of the file has become."""
    path.write_text(text)
    target = opened.registry.commits.put_target(entry)
    meta = opened.registry.commits.put_meta(entry, None)
    opened.store.put_file(target, str(path), meta=meta)
    return target


def take_over(opened: Instance) -> None:
    with SpoolFolder.make(*opened.settings.spool_place) as spool:
        adoption.adopt_puts(opened.registry, opened.store, spool)
    recover.finish_all(opened)


@pytest.mark.parametrize("here", [True, False], ids=["same boot", "after a power cut"])
def test_what_is_in_storage_already_is_not_written_over(instance: Instance, tmp_path: Path, here: bool) -> None:
    entry = begin(instance, here=here)
    store_it(instance, entry, tmp_path / "a", "all of it")
    take_over(instance)
    assert instance.registry.journal.entries() == []
    assert read(instance) == "all of it"


def test_a_new_file_without_bytes_is_an_empty_one(instance: Instance) -> None:
    begin(instance)
    take_over(instance)
    assert read(instance) == ""


def test_while_storage_is_away_it_becomes_another_object(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tell then whether there is one."""
    entry = begin(instance)
    target = store_it(instance, entry, tmp_path / "a", "all of it")

    def away(*_: object) -> None:
        raise StorageUnavailable("The storage does not answer.")

    with monkeypatch.context() as patched, SpoolFolder.make(*instance.settings.spool_place) as spool:
        patched.setattr(LocalStore, "meta", away)
        adoption.adopt_puts(instance.registry, instance.store, spool)
    recover.finish_all(instance)
    assert read(instance) == ""
    assert (tmp_path / "store" / target).read_text() == "all of it"


def hook_hash(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """Something happens while an object is hashed."""
    hash_object = direct.hash_object

    def hashed(store: ObjectStore, object_key: str) -> tuple[ContentHash, str]:
        meanwhile()
        return hash_object(store, object_key)

    monkeypatch.setattr(direct, "hash_object", hashed)


def test_the_registry_can_be_written_while_an_object_is_read(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_it(instance, begin(instance), tmp_path / "a", "all of it")
    other = Registry(instance.settings.registry_path)
    other.db.execute("PRAGMA busy_timeout=0")
    hook_hash(monkeypatch, lambda: other.db.set_meta("written", 1))
    take_over(instance)
    assert other.db.get_meta("written") == 1
    other.close()
    assert read(instance) == "all of it"


def test_what_another_process_has_taken_over_meanwhile_is_left_to_it(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = begin(instance)
    store_it(instance, entry, tmp_path / "a", "all of it")
    other = Registry(instance.settings.registry_path)
    other.journal.owner = process_id(os.getppid()) or ""
    hook_hash(monkeypatch, lambda: other.journal.adopt() and None)
    with SpoolFolder.make(*instance.settings.spool_place) as spool:
        assert adoption.adopt_puts(instance.registry, instance.store, spool) == []
    assert [(row.id, row.owner) for row in other.journal.entries()] == [(entry.id, other.journal.owner)]
    other.close()


def test_a_file_that_has_other_content_meanwhile_is_looked_at_again(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = begin(instance)
    store_it(instance, entry, tmp_path / "a", "all of it")
    assert entry.ino is not None
    ino, looks = entry.ino, 0

    def meanwhile() -> None:
        nonlocal looks
        looks += 1
        instance.registry.tree.update(ino, size=5)  # so what is in the object is perhaps not all of it

    hook_hash(monkeypatch, meanwhile)
    take_over(instance)
    assert looks == 2
    (lost,) = instance.registry.rescue.lost()
    assert (lost.key, lost.size) == ("a.txt", 5)


@pytest.mark.parametrize("here", [True, False], ids=["same boot", "after a power cut"])
def test_a_crash_while_an_object_is_read_changes_nothing(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """Who owed the row says whether the machine went down, so it is the owner until that was decided."""
    entry = begin(instance, here=here)
    store_it(instance, entry, tmp_path / "a", "all of it")

    def crash() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, SpoolFolder.make(*instance.settings.spool_place) as spool:
        hook_hash(patched, crash)
        with pytest.raises(KeyboardInterrupt):
            adoption.adopt_puts(instance.registry, instance.store, spool)
    assert instance.registry.journal.entries() == [entry]
    take_over(instance)
    assert read(instance) == "all of it"
