"""Taking over a put whose spool file is gone: the registry was set back, and knows less than storage has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import StorageUnavailable
from lamfs.model import JournalEntry
from lamfs.ops import adoption, artifacts, recover, setup
from lamfs.ops.instance import Instance
from lamfs.spool import SpoolFolder
from lamfs.storage.local import LocalStore


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    with Instance.open(setup.init(str(tmp_path / "store"), "a").slug) as opened:
        yield opened


def read(opened: Instance) -> str:
    return artifacts.cache(opened, artifacts.find(opened, "a.txt")).read_text()


def begin(opened: Instance, *, here: bool = True) -> JournalEntry:
    """A new file ``a.txt`` as the registry has it before its first close. ``here``: by a process of this boot."""
    registry = opened.registry
    inode, src = registry.names.create_file(1, "a.txt", 0o100644, 0, 0)
    boot = (registry.journal.owner or "").partition(":")[0] if here else "another"
    registry.db.execute("UPDATE journal SET owner=? WHERE src=?", (f"{boot}:1:1", src))
    entry = registry.journal.put_of(inode.ino)
    assert entry is not None
    assert entry.state == "open"
    return entry


def store_it(opened: Instance, entry: JournalEntry, path: Path, text: str) -> str:
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
