"""Blocks that one request prefetches together: each ends when it has come, and what fails is left to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from lamfs.cache.blocks import BlockCache, BlockFile
from lamfs.errors import DamagedData, LamfsError, StorageFull, StorageUnavailable, TransferDied
from lamfs.model import BLOCK_SIZE
from tests.support.transfer import FakeMover, FakeStore, make_bytes
from tests.unit.cache.test_leaves import Rig, prefetcher_of

DATA = make_bytes(3 * BLOCK_SIZE + 5)


class StepMover(FakeMover):
    """Of a stretch, ``whole`` blocks come; then it fails with ``error``, or waits for ``step``."""

    def __init__(self, store: FakeStore) -> None:
        super().__init__(store)
        self.whole = 1
        self.error: LamfsError | None = None
        self.step = trio.Event()

    async def fetch_stretch(self, key, *, etag, offset, blocks, path, came):  # type: ignore[no-untyped-def]
        self.stretches.append((key, offset // BLOCK_SIZE, len(blocks)))
        for number, (length, digest) in enumerate(blocks):
            if number >= self.whole:
                if self.error is not None:
                    raise self.error
                await self.step.wait()
            await self.fetch(key, etag=etag, offset=offset, length=length, path=path, digest=digest)
            came(1)
            offset += length


class StepRig(Rig):
    """With such a mover."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self.mover: StepMover = StepMover(self.store)


@pytest.fixture
def rig(tmp_path: Path) -> StepRig:
    return StepRig(tmp_path)


def wish(cache: BlockCache, file: BlockFile, *blocks: int) -> None:
    reader = prefetcher_of(cache).reader()
    reader.wishes.extend((file, block, 0) for block in blocks)
    prefetcher_of(cache).wished(reader)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_a_stretch_ends_where_the_next_begins(rig: StepRig) -> None:
    revision = rig.put("k", DATA)
    rig.mover.whole = 2
    async with rig.mount(prefetch=4) as cache:
        file = cache.open(revision)
        wish(cache, file, 1, 2, 3)
        await quiet()
        assert (rig.mover.stretches, sorted(rig.mover.fetches)) == ([("k", 2, 2)], [("k", 1), ("k", 2), ("k", 3)])
        wish(cache, file, 0)  # the other one is here
        await quiet()
        assert len(rig.mover.stretches) == 1
        assert file.read_now(0, len(DATA)) == DATA
        stats = cache.stats()
        assert (stats["misses"], stats["fetched_bytes"], stats["cached_bytes"]) == (4, len(DATA), len(DATA))
        file.close()
    assert rig.path("k").read_bytes() == DATA


async def test_a_block_is_read_while_the_next_is_on_its_way(rig: StepRig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount(prefetch=4) as cache:
        file = cache.open(revision)
        wish(cache, file, 0)
        await quiet()
        assert file.read_now(0, BLOCK_SIZE) == DATA[:BLOCK_SIZE]
        assert file.read_now(BLOCK_SIZE, 1) is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read, BLOCK_SIZE, BLOCK_SIZE)
            await quiet()
            assert rig.mover.fetches == [("k", 0)]
            rig.mover.step.set()
        assert file.read_now(0, 2 * BLOCK_SIZE) == DATA[: 2 * BLOCK_SIZE]
        assert rig.mover.fetches == [("k", 0), ("k", 1)]
        file.close()


@pytest.mark.parametrize("error", [DamagedData("wrong"), StorageFull("full"), TransferDied("died")])
@pytest.mark.parametrize("whole", [0, 1])
async def test_what_fails_is_brought_by_itself(rig: StepRig, error: LamfsError, whole: int) -> None:
    revision = rig.put("k", DATA)
    rig.mover.whole, rig.mover.error = whole, error
    async with rig.mount(prefetch=4) as cache:
        file = cache.open(revision)
        wish(cache, file, 0)
        await quiet()
        assert sorted(rig.mover.fetches) == [("k", 0), ("k", 1)]
        assert file.read_now(0, 2 * BLOCK_SIZE) == DATA[: 2 * BLOCK_SIZE]
        assert (cache.stats()["misses"], cache.stats()["damaged"], prefetcher_of(cache).in_flight) == (2, 0, 0)
        file.close()


async def test_damage_in_storage_is_found_in_its_block(rig: StepRig) -> None:
    revision = rig.put("k", DATA)
    etag, data = rig.store.objects["k"]
    rig.store.objects["k"] = (etag, data[: BLOCK_SIZE + 7] + b"?" + data[BLOCK_SIZE + 8 :])
    told: list[int] = []
    rig.mover.whole = 2
    async with rig.mount(prefetch=4) as cache:
        cache.on_storage_damage = lambda _, block: told.append(block)
        file = cache.open(revision)
        wish(cache, file, 0)
        await quiet()
        assert told == [1]
        assert file.read_now(0, BLOCK_SIZE) == DATA[:BLOCK_SIZE]
        with pytest.raises(DamagedData):
            await file.read(BLOCK_SIZE, 1, whole=True)
        file.close()


async def test_storage_that_is_away_is_not_asked_again_for_each_block(rig: StepRig) -> None:
    revision = rig.put("k", DATA)
    rig.mover.whole, rig.mover.error = 0, StorageUnavailable("away")
    async with rig.mount(prefetch=4) as cache:
        file = cache.open(revision)
        wish(cache, file, 0)
        await quiet()
        assert not rig.mover.fetches
        assert not file.fetches
        assert prefetcher_of(cache).in_flight == 0
        wish(cache, file, 0)
        wanted = await file.read(0, 1, whole=True)
        assert wanted == DATA[:1], "but when somebody wants it"
        assert len(rig.mover.fetches) == 1
        file.close()


async def test_the_end_of_the_cache_is_the_end_of_its_stretches(rig: StepRig) -> None:
    revision = rig.put("k", DATA)
    errors: list[LamfsError] = []

    async def read(file: BlockFile) -> None:
        try:
            await file.read(BLOCK_SIZE, 1, whole=True)
        except LamfsError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        async with rig.mount(prefetch=4) as cache:
            file = cache.open(revision)
            wish(cache, file, 0)
            nursery.start_soon(read, file)
            await quiet()
            assert list(file.fetches) == [1]
    assert [type(error) for error in errors] == [TransferDied]
    assert not file.fetches
