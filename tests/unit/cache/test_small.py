"""Many small files into the cache at once: what becomes of each, and what is left when it ends early."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.cache import small, sparse
from lamfs.cache.files import cache_file
from lamfs.cache.index import CacheIndex
from lamfs.cache.small import LARGEST, SmallFetcher
from lamfs.errors import StorageUnavailable
from lamfs.model import Revision
from lamfs.pool import Pool
from tests.support.mounts import wait_until
from tests.support.transfer import FakeStore, make_bytes, open_fds

Outcomes = dict[int, bool | StorageUnavailable | None]


class Rig:
    """Storage, a cache directory, an index, and threads."""

    def __init__(self, folder: Path, pool: Pool) -> None:
        self.dir = folder / "cache"
        self.index = CacheIndex(self.dir)
        self.store = FakeStore()
        self.pool = pool
        self.told: list[int] = []

    def put(self, count: int) -> list[Revision]:
        return [self.store.put(f"d{number % 3}/{number}", make_bytes(number + 1)) for number in range(count)]

    def files(self) -> SmallFetcher:
        return SmallFetcher(self.store, self.index, self.dir, self.pool)  # type: ignore[arg-type]

    def fetch(self, revisions: list[Revision]) -> Outcomes:
        self.index.total_bytes()  # opens it
        before = open_fds()
        outcomes = dict(self.files().fetch(revisions, self.told.append))
        # Threads that end, of pytest's too, close theirs a moment later; SQLite keeps one of another connection's.
        wait_until(lambda: open_fds() <= before + 3, "nothing stays open")
        return outcomes

    def path(self, revision: Revision) -> str:
        return sparse.relative_path(self.store, revision.object_key)  # type: ignore[arg-type]

    def sealed(self, revision: Revision) -> bool:
        return sparse.is_sealed(self.index, self.dir, self.path(revision), revision)

    def check(self, revision: Revision) -> None:
        assert self.sealed(revision)
        assert (self.dir / self.path(revision)).read_bytes() == self.store.objects[revision.object_key][1]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Pool(4, "test") as pool:
        yield Rig(tmp_path, pool)


@pytest.mark.parametrize("count", [0, 1, 7, 3 * small._ROWS + 5])
def test_all_of_them_once(rig: Rig, count: int) -> None:
    revisions = rig.put(count)
    assert rig.fetch(revisions) == dict.fromkeys(range(count), True)
    assert sorted(rig.told) == [revision.size for revision in revisions]
    for revision in revisions:
        rig.check(revision)
    assert rig.index.total_bytes() == sum(revision.size for revision in revisions)
    asked = len(rig.store.gets)
    assert rig.fetch(revisions) == dict.fromkeys(range(count), False)
    assert len(rig.store.gets) == asked
    assert sorted(rig.told) == [revision.size for revision in revisions]


def test_the_largest(rig: Rig) -> None:
    revision = rig.store.put("k", make_bytes(LARGEST))
    assert rig.fetch([revision]) == {0: True}
    rig.check(revision)


def test_what_is_not_simple_is_left_to_others(rig: Rig) -> None:
    revisions = rig.put(5)
    # an earlier revision is at its place
    cache_file(rig.store, rig.index, rig.dir, revisions[0])  # type: ignore[arg-type]
    revisions[0] = rig.store.put(revisions[0].object_key, b"newer")
    # the object has wrong bytes, is another one, or is gone
    rig.store.objects[revisions[1].object_key] = (revisions[1].etag, b"??")
    rig.store.put(revisions[2].object_key, b"more")
    del rig.store.objects[revisions[3].object_key]
    assert rig.fetch(revisions) == {0: None, 1: None, 2: None, 3: None, 4: True}
    assert [rig.sealed(revision) for revision in revisions] == [False, False, False, False, True]
    cache_file(rig.store, rig.index, rig.dir, revisions[0])  # type: ignore[arg-type]
    rig.check(revisions[0])
    # bytes that are right after all find the empty file
    rig.store.objects[revisions[1].object_key] = (revisions[1].etag, make_bytes(2))
    assert rig.fetch(revisions[1:2]) == {0: None}
    cache_file(rig.store, rig.index, rig.dir, revisions[1])  # type: ignore[arg-type]
    rig.check(revisions[1])


def test_a_file_that_somebody_makes_anew_meanwhile(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    [revision] = rig.put(1)
    get = rig.store.get

    def meanwhile(*args: object, **options: object) -> bytes:
        other = CacheIndex(rig.dir)
        os.close(sparse.make_file(other, rig.dir, rig.path(revision), revision).fd)
        other.close()
        return get(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.store, "get", meanwhile)
    assert rig.fetch([revision]) == {0: None}
    assert (rig.dir / rig.path(revision)).read_bytes() == bytes(revision.size)
    assert not rig.sealed(revision)


def test_a_cache_that_is_deleted_meanwhile(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    [revision] = rig.put(1)
    get = rig.store.get

    def meanwhile(*args: object, **options: object) -> bytes:
        shutil.rmtree(rig.dir)
        return get(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.store, "get", meanwhile)
    assert rig.fetch([revision]) == {0: None}
    monkeypatch.undo()
    assert rig.fetch([revision]) == {0: True}
    rig.check(revision)


def test_storage_that_does_not_answer_is_asked_no_more(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not tried is left to others, with their own patience."""
    revisions = rig.put(100)
    asked: list[str] = []

    def silent(key: str, **options: object) -> bytes:
        asked.append(key)
        raise StorageUnavailable("no answer")

    monkeypatch.setattr(rig.store, "get", silent)
    outcomes = rig.fetch(revisions)
    assert len(outcomes) == 100
    assert rig.pool.threads <= len(asked) < 2 * rig.pool.threads
    errors = [each for each in outcomes.values() if each is not None]
    assert len(errors) == len(asked)
    assert all(isinstance(each, StorageUnavailable) and str(each) == "no answer" for each in errors)
    assert rig.told == []


def test_an_object_that_storage_cannot_read_is_the_error_of_one(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    revisions = rig.put(100)
    get = rig.store.get

    def some(key: str, **options: object) -> bytes:
        if int(key.split("/")[1]) % 7 == 0:
            raise StorageUnavailable(f"cannot read {key}")
        return get(key, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.store, "get", some)
    outcomes = rig.fetch(revisions)
    for number, revision in enumerate(revisions):
        if number % 7 == 0:
            assert isinstance(outcomes[number], StorageUnavailable)
        else:
            assert outcomes[number] is True
            rig.check(revision)


def test_one_that_is_evicted_meanwhile_is_the_only_one_to_be_looked_at(rig: Rig) -> None:
    """... and has not been told of; another file at its place is not taken for it, whatever its inode number."""
    revisions = rig.put(10)
    files = rig.files()
    bring = files._bring_one
    other = Rig(rig.dir.parent, rig.pool)

    def meanwhile(file: small._File) -> None:
        bring(file)
        if file.number == 3:
            index = CacheIndex(rig.dir)
            sparse.remove(index, rig.dir, file.path)
            os.close(sparse.make_file(index, rig.dir, file.path, file.revision).fd)
            index.close()

    files._bring_one = meanwhile  # type: ignore[method-assign]
    outcomes = dict(files.fetch(revisions, rig.told.append))
    assert outcomes == {number: None if number == 3 else True for number in range(10)}
    assert sorted(rig.told) == [revision.size for number, revision in enumerate(revisions) if number != 3]
    row = other.index.row(rig.path(revisions[3]))
    assert row is not None
    assert (row.bytes, row.complete) == (0, False)


def test_what_has_come_stays_when_the_caller_stops(rig: Rig) -> None:
    revisions = rig.put(200)
    before = open_fds()
    outcomes = rig.files().fetch(revisions)
    number, outcome = next(outcomes)
    assert outcome is True
    outcomes.close()
    wait_until(lambda: open_fds() <= before + 3, "only the index stays open")
    rig.check(revisions[number])
    known = [revision for revision in revisions if rig.sealed(revision)]
    assert len(known) >= small._ROWS
    assert rig.index.total_bytes() == sum(revision.size for revision in known)


def test_a_generator_that_is_ended_in_another_thread_leaves_the_index_alone(rig: Rig) -> None:
    revisions = rig.put(200)
    outcomes = rig.files().fetch(revisions)
    number, _ = next(outcomes)
    thread = threading.Thread(target=outcomes.close)
    thread.start()
    thread.join()
    rig.check(revisions[number])
