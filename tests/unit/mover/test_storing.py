"""Small files on their way to storage that is near, far, or away."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from lamfs.errors import InvalidArgument, LamfsError, ObjectMissing, StorageError, StorageUnavailable
from lamfs.mover import storing
from lamfs.mover.storing import File, SmallFiles
from lamfs.storage.base import ObjectStat

FILES: list[File] = [(f"/spool/{number}", f"k{number}", None, None) for number in range(8)]


class Store:
    """Takes a file when ``together`` are on their way at a time, or when nobody else is to come."""

    def __init__(self, together: int = 1, away: frozenset[str] = frozenset()) -> None:
        self.together = threading.Barrier(together)
        self.away = away
        self.asked: list[str] = []

    def put_file(self, key: str, path: str, *, if_none_match: bool, meta: Any = None) -> ObjectStat:
        self.asked.append(key)
        if key in self.away:
            raise StorageUnavailable(f"{key}: no answer")
        if key != "k0":
            self.together.wait(10)
        return ObjectStat(key, len(path), "e-" + key, 0)

    def copy(self, src: str, dst: str, *, etag: str, size: int, if_none_match: bool, meta: Any = None) -> ObjectStat:
        if src == "gone":
            raise ObjectMissing("it is gone")
        return ObjectStat(dst, size, f"copy of {src} {etag}", 0)


def stat_of(found: ObjectStat | LamfsError) -> ObjectStat:
    assert isinstance(found, ObjectStat), found
    return found


def put(small: SmallFiles, store: Any, files: list[File] = FILES, stop: Any = lambda: None) -> list[Any]:
    return small.put_many(store, files, stop)


def test_storage_that_is_near_gets_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "DISTANT", 1e9)
    store = Store()
    found = [stat_of(each) for each in put(SmallFiles(), store)]
    assert [stat.etag for stat in found] == [f"e-k{number}" for number in range(8)]
    assert store.asked == [f"k{number}" for number in range(8)]


def test_storage_that_is_far_gets_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first, which tells how far it is."""
    monkeypatch.setattr(storing, "DISTANT", 0.0)
    found = [stat_of(each) for each in put(SmallFiles(), Store(together=7))]
    assert [stat.key for stat in found] == [f"k{number}" for number in range(8)], "in the order of the files"


@pytest.mark.parametrize("distant", [0.0, 1e9])
def test_the_error_of_one_is_not_that_of_another(monkeypatch: pytest.MonkeyPatch, distant: float) -> None:
    monkeypatch.setattr(storing, "DISTANT", distant)
    files: list[File] = [
        ("/a", "k0", None, None),
        ("/b", "k1", ("gone", "e", 1), None),
        ("/c", "k2", ("there", "e2", 3), None),
    ]
    found = put(SmallFiles(), Store(), files)
    assert [stat_of(each).etag for each in found] == ["e-k0", "e-k1", "copy of there e2"]


def test_when_storage_is_away_the_others_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(away=frozenset({"k2"}))
    monkeypatch.setattr(storing, "DISTANT", 1e9)
    found = put(SmallFiles(), store)
    assert store.asked == ["k0", "k1", "k2"]
    assert [stat_of(each).key for each in found[:2]] == ["k0", "k1"]
    errors = found[2:]
    assert all(isinstance(error, StorageUnavailable) for error in errors)
    assert len(errors) == 6


@pytest.mark.parametrize("distant", [0.0, 1e9])
def test_nobody_waits_any_more(monkeypatch: pytest.MonkeyPatch, distant: float) -> None:
    monkeypatch.setattr(storing, "DISTANT", distant)
    store = Store()

    def stop() -> None:
        if store.asked:
            raise InvalidArgument("enough")

    with pytest.raises(InvalidArgument, match="enough"):
        put(SmallFiles(), store, FILES[:2], stop)
    assert store.asked == ["k0"]


def test_all_have_ended_when_one_fails_as_nobody_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told so may store them again, and what came late would be stored over that."""
    monkeypatch.setattr(storing, "DISTANT", 0.0)
    goes_on = threading.Event()
    stored: list[str] = []

    class Odd(Store):
        def put_file(self, key: str, path: str, *, if_none_match: bool, meta: Any = None) -> ObjectStat:
            if key == "k1":
                goes_on.set()
                raise RuntimeError("odd")
            if key == "k2":
                assert goes_on.wait(10)
            stored.append(key)
            return ObjectStat(key, 0, "e", 0)

    with pytest.raises(RuntimeError, match="odd"):
        put(SmallFiles(), Odd(), FILES[:4])
    assert sorted(stored) == ["k0", "k2", "k3"]


def test_a_spool_file_that_is_gone_is_its_own_error(tmp_path: Path) -> None:
    class Reads(Store):
        def put_file(self, key: str, path: str, *, if_none_match: bool, meta: Any = None) -> ObjectStat:
            return ObjectStat(key, len(Path(path).read_bytes()), "e", 0)

    (tmp_path / "b").write_bytes(b"b")
    first, second = put(
        SmallFiles(), Reads(), [(str(tmp_path / "a"), "k0", None, None), (str(tmp_path / "b"), "k1", None, None)]
    )
    assert isinstance(first, StorageError)
    assert "storing" in str(first)
    assert stat_of(second).size == 1
