"""An object is read and hashed by the loop and by a thread alike, and little of it is on the disk at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from lamfs import hashing
from lamfs.errors import ObjectChanged, ObjectMissing
from lamfs.hashing import MD5_MAX
from lamfs.model import BLOCK_SIZE, ContentHash
from lamfs.work import direct, reading
from lamfs.work.direct import DirectWorker
from lamfs.work.loop import LoopWaits
from tests.support.fsbox import MemoryStore

LARGE = 2 * MD5_MAX + 5 * BLOCK_SIZE + 7


def by_thread(store: MemoryStore) -> ContentHash:
    return direct.hash_object(store, "a")[0]  # type: ignore[arg-type]


def by_loop(store: MemoryStore) -> ContentHash:
    waits: Any = object.__new__(LoopWaits)  # which needs nothing of its own for this

    async def work() -> ContentHash:
        found = store.head("a")
        return await reading.hash_object(DirectWorker(store), waits, store, found)  # type: ignore[arg-type]

    return trio.run(work)


@pytest.mark.parametrize("read", [by_thread, by_loop])
@pytest.mark.parametrize("size", [0, 5, BLOCK_SIZE + 3, MD5_MAX, LARGE])
def test_an_object_has_the_hash_of_a_file_with_its_bytes(tmp_path: Path, read: Any, size: int) -> None:
    data = (b"0123456789abcde" * (size // 15 + 1))[:size]
    (tmp_path / "file").write_bytes(data)
    assert read(MemoryStore(objects={"a": data})) == hashing.hash_file(tmp_path / "file")


def test_no_more_than_its_ends_and_what_is_on_its_way_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    files, most, lock, temporary = 0, 0, threading.Lock(), reading._temporary

    @contextlib.contextmanager
    def counted() -> Iterator[Any]:
        nonlocal files, most
        with lock:
            files += 1
            most = max(most, files)
        with temporary() as file:
            yield file
        with lock:
            files -= 1

    monkeypatch.setattr(reading, "_temporary", counted)
    by_thread(MemoryStore(objects={"a": bytes(LARGE)}))
    assert files == 0
    assert 2 <= most <= 1 + reading.READERS


def test_an_object_that_changes_while_it_is_read_is_said_to() -> None:
    store = MemoryStore(objects={"a": b"one"})
    found = store.head("a")
    store.objects["a"] = b"two"
    with pytest.raises(ObjectChanged):
        direct.finish(reading.hash_object(DirectWorker(store), direct.DirectWaits(), store, found))  # type: ignore[arg-type]
    del store.objects["a"]
    with pytest.raises(ObjectMissing):
        direct.hash_object(store, "a")  # type: ignore[arg-type]
