"""What is fetched ahead of a program that goes through directories, against a fake mover; and what is not."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import trio

from lamfs.cache.blocks import BlockCache
from lamfs.cache.index import CacheIndex
from lamfs.errors import DamagedData, ObjectMissing, StorageUnavailable, TransferDied
from lamfs.fs.counters import Counters
from lamfs.model import BLOCK_SIZE
from lamfs.prefetch import settings
from lamfs.prefetch.directories import DirectoryPrefetch
from lamfs.prefetch.scheduler import Prefetcher
from lamfs.registry import Provenance, Registry
from tests.support.timed import timed
from tests.support.transfer import FakeMover, FakeStore
from tests.unit.registry.conftest import Hands

pytestmark = pytest.mark.usefixtures("jumping_clock")

KIB = 1 << 10


class Rig:
    """A registry of stored files, a store, a mover and a cache; ``read`` does what lamfs.fs.files does."""

    def __init__(self, base: Path) -> None:
        self.dir = base / "cache"
        self.store = FakeStore()
        self.mover = FakeMover(self.store)
        self.registry = Registry(base / "registry.lndb", create=True)
        timed(self.registry).people.ensure_storage("s3://bucket/prefix", "s3")
        self.hands = Hands(self.registry)
        self.counted = Counters()
        self.missed: list[str] = []
        self.data: dict[str, bytes] = {}

    def put(self, paths: Iterable[str], size: int = 100) -> list[str]:
        """Store files, in this order; their paths."""
        made = list(paths)
        for path in made:
            self.data[path] = path.encode().ljust(size, b".")
            ino = self.hands.create(path)
            entry = self.registry.journal.put_of(ino)
            assert entry is not None
            target = self.registry.commits.put_target(entry)
            self.registry.journal.set_target(entry.id, target)
            stored = self.store.put(target, self.data[path])
            timed(self.registry).commits.put(ino, entry.gen, stored.content, target, stored.etag, Provenance())
        return made

    @contextlib.asynccontextmanager
    async def mount(self, *, limit: int = 1 << 40) -> AsyncIterator[None]:
        index = CacheIndex(self.dir)
        self.cache = BlockCache(self.store, self.mover, index, self.dir, limit_bytes=limit)  # type: ignore[arg-type]
        self.directories = DirectoryPrefetch(self.registry, Prefetcher(self.cache).files, self.counted)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.cache.run)
            yield
            nursery.cancel_scope.cancel()
        index.close()

    async def read(self, path: str) -> None:
        record = self.hands.record(path)
        assert record.ino is not None
        file = self.cache.open(record.revision)
        try:
            self.directories.read(record.ino, record.revision)
            data = file.read_now(0, 1 << 20)
            if data is None:
                if not file.has(0, 1):
                    self.directories.missed(record.ino)
                    self.missed.append(path)
                data = await file.read(0, 1 << 20)
            assert data == self.data[path][: 1 << 20]
        finally:
            file.close()

    async def read_all(self, paths: Iterable[str]) -> None:
        """Each is read when what was fetched ahead until then is there."""
        for path in paths:
            await self.read(path)
            await trio.testing.wait_all_tasks_blocked()

    def fetched(self) -> list[str]:
        """Object keys that were fetched, each as often as it was."""
        return [key for key, _ in self.mover.fetches]

    def waste(self) -> int:
        """Files that were fetched and not read."""
        return self.counted.prefetched_files - self.counted.prefetched_used


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def shuffled(paths: Iterable[str], seed: int = 3) -> list[str]:
    found = list(paths)
    random.Random(seed).shuffle(found)
    return found


NAMES = [f"f{number:03d}" for number in range(200)]


@pytest.mark.parametrize("order", ["name", "readdir"])
async def test_a_directory_is_fetched_ahead_in_either_order(rig: Rig, order: str) -> None:
    paths = rig.put(shuffled(NAMES))
    async with rig.mount():
        await rig.read_all(sorted(paths) if order == "name" else paths)
    assert rig.missed == (sorted(paths) if order == "name" else paths)[:3]
    assert len(rig.fetched()) == len(set(rig.fetched())) == len(paths)
    assert (rig.counted.prefetched_files, rig.counted.prefetched_used, rig.counted.prefetched_wasted) == (197, 197, 0)


async def test_what_was_fetched_ahead_is_recorded_as_what_was_read(rig: Rig) -> None:
    paths = rig.put(NAMES[:20])
    async with rig.mount():
        await rig.read_all(paths[:6])
    for path in paths[:8]:
        record = rig.hands.record(path)
        row = CacheIndex(rig.dir).row(f"bucket/prefix/{record.revision.object_key}")
        file = rig.dir / "bucket/prefix" / record.revision.object_key
        assert row is not None
        assert row.complete
        assert (row.bytes, row.mtime_ns, row.ino) == (100, file.stat().st_mtime_ns, file.stat().st_ino)
        assert file.read_bytes() == rig.data[path]
        assert file.stat().st_mode & 0o777 == 0o600
    before = len(rig.fetched())
    async with rig.mount():
        await rig.read_all(paths[:8])
    assert len(rig.fetched()) == before
    assert CacheIndex(rig.dir).total_bytes() == 100 * before


async def test_some_files_in_no_order_are_not_fetched_ahead(rig: Rig) -> None:
    paths = shuffled(rig.put(NAMES))
    async with rig.mount():
        await rig.read_all(paths[: settings.SCATTER_MISSES - 1])
    assert rig.waste() <= 5


async def read_until_swept(rig: Rig, paths: list[str]) -> int:
    """Read until the rest of the directory is brought; how many were read."""
    for number, path in enumerate(paths):
        before = rig.waste()
        await rig.read_all([path])
        if any(each.begun for each in rig.directories._scattered.values()):
            assert 0 < rig.waste() - before <= settings.SCATTER_STEP
            return number + 1
        assert rig.waste() <= 5
    return len(paths)


async def test_many_files_in_no_order_bring_the_others_bit_by_bit(rig: Rig) -> None:
    paths = shuffled(rig.put(NAMES))
    async with rig.mount():
        read = await read_until_swept(rig, paths)
        assert settings.SCATTER_MISSES <= read <= settings.SCATTER_MISSES + 10
        await rig.read_all(paths[read:])
        assert rig.waste() == rig.directories._scattered_bytes == 0
    assert len(rig.missed) <= read + 15
    assert len(rig.fetched()) == len(set(rig.fetched())) == len(paths)


async def test_a_part_of_a_large_directory_brings_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SCATTER_PART", 2)
    paths = shuffled(rig.put([*NAMES, "other"]))
    paths.remove("other")
    async with rig.mount():
        read = await read_until_swept(rig, paths)
        assert len(paths) // 2 <= read < len(paths)
        await trio.sleep(settings.SCATTER_IDLE + 1)
        await rig.read("other")
        assert rig.directories._scattered_bytes == 0
    assert rig.counted.prefetched_wasted >= 1


async def test_several_threads_read_in_turn(rig: Rig) -> None:
    paths = rig.put(NAMES)
    chance = random.Random(1)
    mixed = [path for at in range(0, 200, 4) for path in chance.sample(paths[at : at + 4], 4)]
    async with rig.mount():
        await rig.read_all(mixed)
    assert len(rig.missed) <= 6
    assert rig.waste() <= 4


async def test_a_program_that_stops_wastes_no_more_than_it_used(rig: Rig) -> None:
    paths = rig.put([*NAMES, "z"])
    async with rig.mount():
        await rig.read_all(paths[:10])
        assert 0 < rig.waste() <= 12
        assert rig.counted.prefetched_wasted == 0
        await trio.sleep(settings.ORDER_IDLE + 1)
        await rig.read("z")
        assert rig.counted.prefetched_wasted == rig.waste()
        assert rig.directories._ordered_bytes == 0


async def test_who_skips_files_gets_fewer_ahead(rig: Rig) -> None:
    paths = rig.put(NAMES)
    async with rig.mount():
        await rig.read_all(paths[:12])
        await rig.read_all(paths[12::6])
    assert rig.waste() <= 40
    assert rig.directories._ordered_bytes <= 100 * settings.ORDER_WINDOW


async def test_the_window_grows_and_is_bounded(rig: Rig) -> None:
    paths = rig.put(NAMES)
    ahead = []
    async with rig.mount():
        for path in paths[:120]:
            await rig.read_all([path])
            ahead.append(rig.waste())
    assert ahead[1] == 0
    assert 4 <= ahead[2] <= 6
    assert max(ahead) <= settings.ORDER_WINDOW + 1
    assert max(ahead) >= settings.ORDER_WINDOW // 2


async def test_subdirectories(rig: Rig) -> None:
    """Depth first, as find and tar go; beyond the directory that was gone through nothing is fetched."""
    for folder in ("before", "top", "z-after"):
        rig.hands.mkdir(folder)
    rig.put(f"z-after/{name}" for name in NAMES[:9])
    paths = []
    for number in range(6):
        rig.hands.mkdir(f"top/{number}")
        rig.hands.mkdir(f"top/{number}/in")
        for folder in (f"top/{number}", f"top/{number}/in"):
            paths += rig.put(f"{folder}/{name}" for name in NAMES[:9])
    async with rig.mount():
        await rig.read_all(paths)
    assert len(rig.missed) <= 6
    assert len(rig.fetched()) == len(paths)


async def test_one_directory_is_not_left_unless_the_program_does(rig: Rig) -> None:
    for folder in ("a", "a/in", "b"):
        rig.hands.mkdir(folder)
    rig.put(f"a/in/{name}" for name in NAMES[:20])
    rig.put(f"b/{name}" for name in NAMES[:20])
    paths = rig.put(f"a/{name}" for name in NAMES[:20])
    async with rig.mount():
        await rig.read_all(paths)
    assert len(rig.fetched()) == len(paths)


async def test_who_reads_a_file_on_its_way_waits_for_it(rig: Rig) -> None:
    paths = rig.put(NAMES[:20])
    async with rig.mount():
        await rig.read_all(paths[:2])
        rig.mover.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.read, paths[2])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(rig.read, paths[3])
            await trio.testing.wait_all_tasks_blocked()
            assert rig.mover.fetching == len(rig.fetched()) - 2
            rig.mover.gate.set()
    assert len(rig.fetched()) == len(set(rig.fetched()))


async def test_errors_are_left_to_who_really_reads(rig: Rig) -> None:
    """Who waits for a file on its way tries himself when it does not come: it may have been tried for long."""
    paths = rig.put(NAMES[:40])
    async with rig.mount():
        await rig.read_all(paths[:2])
        rig.mover.gate = trio.Event()

        async def fail() -> None:
            with pytest.raises(StorageUnavailable):
                await rig.read(paths[2])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await trio.testing.wait_all_tasks_blocked()
            assert rig.mover.fetching >= 5
            nursery.start_soon(rig.read, paths[3])
            await trio.testing.wait_all_tasks_blocked()
            rig.mover.failures = [StorageUnavailable("away") for _ in range(rig.mover.fetching)]
            rig.mover.gate.set()
        assert rig.counted.prefetched_used == 1
        assert rig.counted.prefetched_wasted + 1 == rig.counted.prefetched_files > 1
        assert rig.directories._ordered_bytes == 0
        await rig.read_all(paths[2:])
    assert len(rig.missed) <= 10


async def test_a_batch_that_ends_leaves_alone_what_others_bring_meanwhile(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of a batch does not come, and is read while the others are still on their way."""
    paths = rig.put(NAMES[:40])
    late = rig.hands.record(paths[4]).revision.object_key
    fetch, gate, refused = rig.mover.fetch, trio.Event(), []

    async def fetching(key: str, **what: Any) -> None:
        if key == late and not refused:
            refused.append(key)
            raise ObjectMissing("not there yet")
        await fetch(key, **what)
        if key == late:
            await gate.wait()

    monkeypatch.setattr(rig.mover, "fetch", fetching)
    async with rig.mount():
        await rig.read_all(paths[:2])
        rig.mover.gate = others = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.read, paths[2])
            await trio.testing.wait_all_tasks_blocked()
            assert refused
            nursery.start_soon(rig.read, paths[4])
            await trio.testing.wait_all_tasks_blocked()
            others.set()
            await trio.testing.wait_all_tasks_blocked()
            gate.set()


async def test_the_moving_process_dies(rig: Rig) -> None:
    paths = rig.put(NAMES[:20])
    async with rig.mount():
        await rig.read_all(paths[:3])
        rig.mover.failures = [TransferDied("gone")] * 3
        await rig.read_all(paths[3:])
    assert rig.missed == paths[:3]
    assert rig.counted.prefetched_wasted == 0


async def test_damage_is_told_and_not_believed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    paths = rig.put(NAMES[:20])
    key = rig.hands.record(paths[5]).revision.object_key
    etag, good = rig.store.objects[key]
    rig.store.objects[key] = (etag, good[::-1])
    async with rig.mount():
        await rig.read_all(paths[:5])
        assert "damaged in storage" in caplog.text
        with pytest.raises(DamagedData):
            await rig.read(paths[5])
        rig.store.objects[key] = (etag, good)
        await rig.read_all(paths[5:])


async def test_of_larger_files_the_first_block_is_fetched(rig: Rig) -> None:
    paths = [*rig.put(NAMES[:10]), *rig.put(["f010", "f011"], 2 * BLOCK_SIZE + 1), *rig.put(NAMES[12:20])]
    async with rig.mount():
        await rig.read_all(paths[:10])
        keys = [rig.hands.record(path).revision.object_key for path in paths[10:12]]
        assert [fetch for fetch in rig.mover.fetches if fetch[0] in keys] == [(key, 0) for key in keys]
        for path in paths[10:12]:
            with contextlib.closing(rig.cache.open(rig.hands.record(path).revision)) as file:
                assert file.read_now(0, BLOCK_SIZE) == rig.data[path][:BLOCK_SIZE]
        before = rig.counted.prefetched_used
        await rig.read_all(paths[10:])
        assert rig.counted.prefetched_used == before + 10
    assert len(rig.missed) == 3


async def test_no_more_is_fetched_ahead_than_there_is_room_for(rig: Rig) -> None:
    paths = rig.put(NAMES, 16 * KIB)
    ahead = []
    async with rig.mount(limit=64 * 32 * KIB):
        for path in paths:
            await rig.read_all([path])
            ahead.append(rig.directories._ordered_bytes)
    assert max(ahead[:20]) > 32 * KIB
    assert 0 < max(ahead[150:]) <= 32 * KIB  # it is full by then
    assert len(rig.fetched()) == len(paths)


async def test_files_that_are_cached_are_not_fetched_again(rig: Rig) -> None:
    paths = rig.put(NAMES[:60])
    async with rig.mount():
        await rig.read_all(paths[20:40:2])
        rig.missed.clear()
    async with rig.mount():
        await rig.read_all(paths)
    assert len(rig.fetched()) == len(set(rig.fetched())) == len(paths)


async def test_a_file_left_in_the_way_is_left_to_its_reader(rig: Rig) -> None:
    paths = rig.put(NAMES[:10])
    key = rig.hands.record(paths[4]).revision.object_key
    stray = rig.dir / "bucket/prefix" / key
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    async with rig.mount():
        await rig.read_all(paths)
    assert paths[4] in rig.missed
    assert os.stat(stray).st_size == 100
