"""Random reads by leaf against a fake mover: what is fetched, what is believed, what is remembered."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lamfs.cache import fetches
from lamfs.cache.bits import leaf_bytes, leaf_mask
from lamfs.cache.blocks import BlockCache
from lamfs.cache.files import cache_file
from lamfs.cache.index import CacheIndex
from lamfs.errors import DamagedData, TransferDied
from lamfs.hashing import hash_leaves
from lamfs.model import BLOCK_SIZE, LEAF_SIZE, Revision
from lamfs.prefetch import settings as limits
from lamfs.prefetch.scheduler import Prefetcher
from tests.support.transfer import FakeMover, FakeStore, make_bytes, until

SIZE = 2 * BLOCK_SIZE + 3 * LEAF_SIZE + 100
DATA = make_bytes(SIZE)


@functools.lru_cache(maxsize=64)
def leaves_of(data: bytes, block: int) -> bytes:
    return hash_leaves(data[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE])


class Rig:
    """A store whose leaf hashes are known, and a mover; caches are started on it as mounts would be."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = FakeStore()
        self.mover = FakeMover(self.store)
        self.dir = tmp_path / "cache"
        self.asked: list[int] = []
        self.hashes: dict[str, bytes] = {}
        self.revisions: dict[str, Revision] = {}

    def put(self, key: str, data: bytes) -> Revision:
        self.hashes[key] = data
        self.revisions[key] = self.store.put(key, data)
        return self.revisions[key]

    def leaves(self, revision: Revision, block: int) -> bytes | None:
        self.asked.append(block)
        data = self.hashes.get(revision.object_key)
        return None if data is None else leaves_of(data, block)

    @contextlib.asynccontextmanager
    async def mount(self, *, prefetch: int = 0, limit: int = 1 << 40) -> AsyncIterator[BlockCache]:
        index = CacheIndex(self.dir)
        cache = BlockCache(
            self.store,  # type: ignore[arg-type]
            self.mover,
            index,
            self.dir,
            limit_bytes=limit,
            leaves=self.leaves,
        )
        Prefetcher(cache, blocks=prefetch)
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            yield cache
            nursery.cancel_scope.cancel()
        index.close()

    def path(self, key: str) -> Path:
        return self.dir / self.store.cache_name / key


def prefetcher_of(cache: BlockCache) -> Prefetcher:
    """The one that Rig.mount has made for a cache."""
    found = cache.fetches.prefetch
    assert isinstance(found, Prefetcher)
    return found


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_a_random_read_fetches_the_leaves_that_it_needs(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount() as cache:
        file = cache.open(revision)
        for offset, size, fetched in (
            (BLOCK_SIZE + 5 * LEAF_SIZE + 9, 4096, (BLOCK_SIZE + 5 * LEAF_SIZE, LEAF_SIZE)),
            (BLOCK_SIZE + 5 * LEAF_SIZE, LEAF_SIZE, None),
            (2 * LEAF_SIZE - 1, 2, (LEAF_SIZE, 2 * LEAF_SIZE)),
            (SIZE - 10, 4096, (2 * BLOCK_SIZE + 3 * LEAF_SIZE, 100)),
            (4 * LEAF_SIZE, 1 << 20, (4 * LEAF_SIZE, 1 << 20)),
        ):
            before = len(rig.mover.ranges)
            assert await file.read(offset, size) == DATA[offset : offset + size]
            assert rig.mover.ranges[before:] == ([] if fetched is None else [fetched])
            assert file.read_now(offset, size) == DATA[offset : offset + size]
        assert file.read_now(6 * LEAF_SIZE + BLOCK_SIZE, 1) is None
        assert await file.read(BLOCK_SIZE - 9, 18) == DATA[BLOCK_SIZE - 9 : BLOCK_SIZE + 9], "over the edge of a block"
        assert sorted(rig.mover.ranges[-2:]) == [(BLOCK_SIZE - LEAF_SIZE, LEAF_SIZE), (BLOCK_SIZE, LEAF_SIZE)]
        await trio.testing.wait_all_tasks_blocked()
        assert cache.stats()["cached_bytes"] == sum(length for _, length in rig.mover.ranges)
        assert cache.stats()["fetched_bytes"] == cache.stats()["cached_bytes"]
        before = len(rig.mover.ranges)
        assert await file.read(0, SIZE) == DATA
        assert sorted(rig.mover.ranges[before:]) == [
            (0, BLOCK_SIZE), (BLOCK_SIZE, BLOCK_SIZE), (2 * BLOCK_SIZE, 3 * LEAF_SIZE),
        ]  # fmt: skip
        await trio.testing.wait_all_tasks_blocked()
        assert cache.stats()["cached_bytes"] == SIZE
        file.close()
    assert rig.path("k").read_bytes() == DATA


async def test_leaves_outlive_the_process_and_are_verified_again(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount() as cache:
        file = cache.open(revision)
        for leaf in (3, 63):
            await file.read(leaf * LEAF_SIZE, 10)
        file.close()
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert cache.stats()["cached_bytes"] == 2 * LEAF_SIZE
        assert file.read_now(3 * LEAF_SIZE, 10) is None, "not verified by this process yet"
        for leaf in (3, 63):
            assert await file.read(leaf * LEAF_SIZE, 10) == DATA[leaf * LEAF_SIZE :][:10]
        assert len(rig.mover.fetches) == 2
        file.close()
    with rig.path("k").open("r+b") as stream:
        stream.seek(3 * LEAF_SIZE + 100)
        stream.write(bytes([DATA[3 * LEAF_SIZE + 100] ^ 1]))
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert await file.read(3 * LEAF_SIZE + 90, 20) == DATA[3 * LEAF_SIZE + 90 :][:20]
        assert rig.mover.ranges[2:] == [(3 * LEAF_SIZE, LEAF_SIZE)], "a torn leaf is a miss"
        assert cache.stats()["cached_bytes"] == 2 * LEAF_SIZE
        file.close()


async def test_a_random_read_of_a_block_that_is_there_verifies_leaves_right_here(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount() as cache:
        file = cache.open(revision)
        await file.fill()
        file.close()
    with rig.path("k").open("r+b") as stream:
        stream.write(b"\0")
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert await file.read(2 * LEAF_SIZE, 10) == DATA[2 * LEAF_SIZE :][:10]
        assert (len(rig.mover.fetches), rig.mover.verifies) == (3, [])
        assert file.read_now(0, 1) is None
        assert await file.read(0, 10) == DATA[:10], "damage: the block is verified as a whole, and fetched"
        assert len(rig.mover.fetches) == 4
        assert cache.stats()["damaged"] == 1
        for offset in range(BLOCK_SIZE, 2 * BLOCK_SIZE, 1 << 20):
            await file.read(offset, 1 << 20)
        assert file.read_now(BLOCK_SIZE, BLOCK_SIZE) == DATA[BLOCK_SIZE : 2 * BLOCK_SIZE]
        assert len(rig.mover.fetches) == 4
        file.close()


async def test_several_readers_of_one_leaf_cause_one_get(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    rig.mover.gate = trio.Event()
    async with rig.mount() as cache:
        file = cache.open(revision)
        async with trio.open_nursery() as nursery:

            async def reader(offset: int, size: int = 10) -> None:
                assert await file.read(offset, size) == DATA[offset : offset + size]

            for number in range(4):
                nursery.start_soon(reader, 5 * LEAF_SIZE + number * 100)
            nursery.start_soon(reader, 4 * LEAF_SIZE, 3 * LEAF_SIZE)
            nursery.start_soon(reader, BLOCK_SIZE, 2 << 20)
            nursery.start_soon(reader, BLOCK_SIZE + 100)
            await trio.testing.wait_all_tasks_blocked()
            rig.mover.gate.set()
        file.close()
    assert (BLOCK_SIZE, BLOCK_SIZE) in rig.mover.ranges, "many leaves: the block"
    fetched = [leaf for offset, length in rig.mover.ranges for leaf in range(offset, offset + length, LEAF_SIZE)]
    assert sorted(leaf for leaf in fetched if leaf < BLOCK_SIZE) == [4 * LEAF_SIZE, 5 * LEAF_SIZE, 6 * LEAF_SIZE]


async def test_a_block_that_is_on_its_way_is_waited_for(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    rig.mover.gate = trio.Event()
    async with rig.mount() as cache:
        file = cache.open(revision)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read, 0, BLOCK_SIZE)
            await until(lambda: rig.mover.fetching == 1)
            nursery.start_soon(file.read, 5 * LEAF_SIZE, 10)
            await trio.testing.wait_all_tasks_blocked()
            rig.mover.gate.set()
        assert rig.mover.ranges == [(0, BLOCK_SIZE)]
        file.close()


async def test_leaves_make_a_block_and_blocks_a_file(rig: Rig) -> None:
    data = make_bytes(BLOCK_SIZE + LEAF_SIZE + 5)
    revision = rig.put("k", data)
    async with rig.mount() as cache:
        file = cache.open(revision)
        for offset in (*range(BLOCK_SIZE - (1 << 20), -1, -(1 << 20)), BLOCK_SIZE + LEAF_SIZE, BLOCK_SIZE):
            await file.read(offset, 1 << 20 if offset < BLOCK_SIZE else 1)
        assert file.read_now(0, len(data)) == data
        assert not file.leaves
        file.close()
    row = CacheIndex(rig.dir).row(f"{rig.store.cache_name}/k")
    assert row is not None
    assert row.complete
    assert row.bytes == len(data)
    assert cache_file(rig.store, CacheIndex(rig.dir), rig.dir, revision).read_bytes() == data  # type: ignore[arg-type]
    assert len(rig.mover.fetches) == 6


async def test_a_file_with_some_leaves_is_completed_by_the_api(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount() as cache:
        file = cache.open(revision)
        await file.read(5, 5)
        cache_file(rig.store, CacheIndex(rig.dir), rig.dir, revision)  # type: ignore[arg-type]
        assert await file.read(LEAF_SIZE, 10) == DATA[LEAF_SIZE:][:10]
        await trio.testing.wait_all_tasks_blocked()
        assert cache.stats()["cached_bytes"] == SIZE
        file.close()
    assert rig.path("k").read_bytes() == DATA


async def test_damage_in_storage_is_an_error(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    revision = rig.put("k", DATA)
    rig.store.objects["k"] = (revision.etag, b"?" + DATA[1:])
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert await file.read(LEAF_SIZE, 10) == DATA[LEAF_SIZE:][:10]
        for _ in range(2):
            with pytest.raises(DamagedData), trio.fail_after(5):
                await file.read(0, 10)
        assert file.read_now(0, 10) is None
        file.close()
    assert "Block 0" in caplog.text


async def test_wrong_or_missing_leaf_hashes_cost_a_block(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    rig.hashes["k"] = make_bytes(SIZE, 2)
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert await file.read(LEAF_SIZE, 10) == DATA[LEAF_SIZE:][:10]
        assert rig.mover.ranges == [(LEAF_SIZE, LEAF_SIZE), (0, BLOCK_SIZE)]
        del rig.hashes["k"]
        assert await file.read(BLOCK_SIZE, 10) == DATA[BLOCK_SIZE:][:10]
        assert rig.mover.ranges[2:] == [(BLOCK_SIZE, BLOCK_SIZE)]
        file.close()


async def test_readers_of_leaves_are_told_when_the_cache_stops(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    rig.mover.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        async with rig.mount() as cache:
            file = cache.open(revision)

            async def reader() -> None:
                with pytest.raises(TransferDied):
                    await file.read(0, 10)

            nursery.start_soon(reader)
            await until(lambda: rig.mover.fetching == 1)
    file.close()


async def test_dense_random_reading_brings_the_rest(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WHOLE_MISSES", 3)
    monkeypatch.setattr(limits, "WHOLE_BYTES_PER_MISS", BLOCK_SIZE)
    data = make_bytes(6 * BLOCK_SIZE)
    revision = rig.put("k", data)
    async with rig.mount(prefetch=8) as cache:
        file = cache.open(revision)
        for number in range(5):  # as many as it has blocks are enough
            await file.read(3 * LEAF_SIZE * number, 10)
        await trio.testing.wait_all_tasks_blocked()
        assert len(rig.mover.fetches) == 5
        await file.read(BLOCK_SIZE, 10)
        await trio.testing.wait_all_tasks_blocked()
        assert file.read_now(0, len(data)) == data
        assert rig.mover.most_fetching <= limits.JOBS + 1
        assert sum(length == BLOCK_SIZE for _, length in rig.mover.ranges) == 6
        file.close()


@pytest.mark.parametrize(("soon", "length"), [(1e9, BLOCK_SIZE), (0.0, LEAF_SIZE)])
async def test_while_the_rest_is_brought_quickly_reads_bring_their_blocks(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, soon: float, length: int
) -> None:
    monkeypatch.setattr(limits, "WHOLE_MISSES", 2)
    monkeypatch.setattr(limits, "WHOLE_BYTES_PER_MISS", 1 << 40)
    monkeypatch.setattr(limits, "WHOLE_SOON", soon)
    monkeypatch.setattr(limits, "JOBS_OF_FILE", 1)
    monkeypatch.setattr(fetches, "STRETCH", 1)
    data = make_bytes(12 * BLOCK_SIZE)
    revision = rig.put("k", data)
    async with rig.mount(prefetch=8) as cache:
        file = cache.open(revision)
        await file.read(9 * BLOCK_SIZE, 10)
        rig.mover.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read, 10 * BLOCK_SIZE, 10)
            await until(lambda: rig.mover.fetching == 2)
            assert sorted(rig.mover.ranges)[:1] == [(0, BLOCK_SIZE)]  # the first of the rest, which goes no further
            monkeypatch.setattr(limits, "JOBS_OF_FILE", 0)
            rig.mover.gate.set()
        at = 11 * BLOCK_SIZE
        assert await file.read(at + 3 * LEAF_SIZE, 10) == data[at + 3 * LEAF_SIZE :][:10]
        assert rig.mover.ranges[-1][1] == length
        assert len(rig.mover.ranges) == 4
        file.close()


async def test_the_rest_of_a_file_is_not_brought_after_its_close(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WHOLE_MISSES", 3)
    monkeypatch.setattr(limits, "WHOLE_BYTES_PER_MISS", 1 << 40)
    monkeypatch.setattr(limits, "JOBS", 2)
    data = make_bytes(12 * BLOCK_SIZE)
    revision = rig.put("k", data)
    async with rig.mount(prefetch=8) as cache:
        file = cache.open(revision)
        for number in range(2):
            await file.read(3 * LEAF_SIZE * number, 10)
        await trio.testing.wait_all_tasks_blocked()
        assert len(rig.mover.fetches) == 2
        rig.mover.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read, 2 * BLOCK_SIZE, 10)
            await until(lambda: rig.mover.fetching == 3)
            rig.mover.gate.set()
            file.close()
        await trio.testing.wait_all_tasks_blocked()
        # What was on its way, and what began between the answer and the close; not all twelve.
        assert sum(length == BLOCK_SIZE for _, length in rig.mover.ranges) <= 6


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from([1, LEAF_SIZE, LEAF_SIZE + 1, BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE + 1, SIZE]),
    marks=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 63), st.integers(0, 63), st.booleans()), max_size=20),
)
def test_the_index_counts_bytes_once(
    tmp_path_factory: pytest.TempPathFactory, size: int, marks: list[tuple[int, int, int, bool]]
) -> None:
    index = CacheIndex(tmp_path_factory.mktemp("index"))
    index.reset("k", "e", size)
    blocks = -(-size // BLOCK_SIZE)
    have: set[int] = set()  # leaves, counted through the file
    for block, first, last, whole in marks:
        mask = leaf_mask(size, block, first, last) if block < blocks else 0
        if whole and block < blocks:
            index.mark("k", "e", [block])
            mask = leaf_mask(size, block)
        elif mask:
            index.mark_leaves("k", "e", block, mask)
        have |= {64 * block + leaf for leaf in range(64) if mask >> leaf & 1}
        assert leaf_bytes(size, block, mask) == sum(
            min(LEAF_SIZE, size - number * LEAF_SIZE)
            for number in range(64 * block, 64 * block + 64)
            if mask >> number % 64 & 1
        )
    assert index.total_bytes() == sum(min(LEAF_SIZE, size - number * LEAF_SIZE) for number in have)
    bitmap = index.present("k", "e")
    assert bitmap is not None
    known = {block: leaf_mask(size, block) for block in range(blocks) if bitmap[block >> 3] >> (block & 7) & 1}
    known |= index.partial("k")
    assert {64 * block + leaf for block, mask in known.items() for leaf in range(64) if mask >> leaf & 1} == have
    index.forget("k")
    assert index.partial("k") == {}
    assert index.total_bytes() == 0
    index.close()
    os.unlink(index.path)
