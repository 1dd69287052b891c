"""What a reader's pattern makes the cache fetch: sequences, strides, chance, several readers, handles that close."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from lamfs.cache.blocks import BlockCache, BlockFile
from lamfs.cache.fetches import NoPrefetch
from lamfs.errors import StorageUnavailable
from lamfs.model import BLOCK_SIZE, LEAF_SIZE
from lamfs.prefetch import settings
from lamfs.prefetch.patterns import Reader
from tests.support.transfer import make_bytes, until
from tests.unit.cache.test_leaves import Rig, prefetcher_of

KIB = 1 << 10
MIB = 1 << 20
DATA = make_bytes(16 * BLOCK_SIZE)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


class Handle:
    """An open handle, as lamfs.fs.files reads through one."""

    def __init__(self, cache: BlockCache, file: BlockFile, data: bytes = DATA) -> None:
        self.file, self.data = file, data
        self.reader: Reader = prefetcher_of(cache).reader()

    async def read(self, offset: int, size: int = 128 * KIB) -> None:
        got = self.file.read_now(offset, size)
        if got is None:
            got = await self.reader.read(self.file, offset, size)
        elif got and self.file.todo:
            self.reader.note(self.file, offset, len(got))
        assert got == self.data[offset : offset + size]


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


def blocks(rig: Rig) -> list[int]:
    """Blocks of which something was fetched."""
    return sorted({offset // BLOCK_SIZE for offset, _ in rig.mover.ranges})


async def test_the_first_read_fetches_little_and_the_rest_of_the_block_follows(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount(prefetch=8) as cache:
        handle = Handle(cache, cache.open(revision))
        await handle.read(0)
        await quiet()
        assert sorted(rig.mover.ranges) == [(0, 128 * KIB), (128 * KIB, BLOCK_SIZE - 128 * KIB)]
        assert handle.file.read_now(0, BLOCK_SIZE) is not None
        handle.file.close()


async def test_the_window_of_a_sequence_grows(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    ahead = []
    async with rig.mount(prefetch=4) as cache:
        handle = Handle(cache, cache.open(revision))
        for offset in range(0, len(DATA), 128 * KIB):
            await handle.read(offset)
            await quiet()
            if offset % BLOCK_SIZE == 128 * KIB:
                ahead.append(max(blocks(rig)) - offset // BLOCK_SIZE)
        handle.file.close()
    assert ahead[:6] == [3, 4, 5, 4, 5, 4], "an even block brings the next"
    assert sum(length for _, length in rig.mover.ranges) == len(DATA), "each byte once"
    assert len(rig.mover.ranges) == 17


@pytest.mark.parametrize("direction", ["forwards", "backwards", "shuffled", "from the middle"])
async def test_sequences_of_every_kind_are_read_in_blocks(rig: Rig, direction: str) -> None:
    revision = rig.put("k", DATA)
    start = 5 * BLOCK_SIZE + 3 * LEAF_SIZE if direction == "from the middle" else 0
    offsets = list(range(start, len(DATA), 128 * KIB))
    if direction == "backwards":
        offsets.reverse()
    if direction == "shuffled":  # as the kernel's readahead and page faults come: each MiB in any order
        chance = random.Random(3)
        offsets = [at for mib in range(0, len(DATA), MIB) for at in chance.sample(range(mib, mib + MIB, 128 * KIB), 8)]
    async with rig.mount(prefetch=8) as cache:
        handle = Handle(cache, cache.open(revision))
        for offset in offsets:
            await handle.read(offset)
            await quiet()
        handle.file.close()
    small = [entry for entry in rig.mover.ranges if entry[1] < BLOCK_SIZE]
    assert len(small) <= 12, "leaves at the beginning alone"
    assert sum(length for _, length in rig.mover.ranges) <= len(DATA) - start + BLOCK_SIZE


async def test_small_gaps_are_forgiven(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount(prefetch=8) as cache:
        handle = Handle(cache, cache.open(revision))
        for offset in range(0, 8 * BLOCK_SIZE, 300 * KIB):
            await handle.read(offset)
            await quiet()
        handle.file.close()
    assert len(rig.mover.ranges) <= 20


async def test_random_reads_bring_what_they_need(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    chance = random.Random(1)
    async with rig.mount(prefetch=8) as cache:
        handle = Handle(cache, cache.open(revision))
        for _ in range(25):
            await handle.read(chance.randrange(LEAF_SIZE // 4096, len(DATA) // 4096) * 4096, 4096)
            await quiet()
        handle.file.close()
    assert all(length <= 2 * LEAF_SIZE for _, length in rig.mover.ranges)
    assert len(rig.mover.ranges) <= 25


async def test_page_faults_at_random_bring_what_the_kernel_asks_for(rig: Rig) -> None:
    """A fault in a mapping is answered with a MiB around it, in requests of 128 KiB."""
    revision = rig.put("k", DATA)
    async with rig.mount(prefetch=8) as cache:
        handle = Handle(cache, cache.open(revision))
        for start in (9 * MIB, 41 * MIB, 22 * MIB):
            for offset in range(start, start + MIB, 128 * KIB):
                await handle.read(offset)
                await quiet()
        handle.file.close()
    assert sum(length for _, length in rig.mover.ranges) == 3 * MIB


@pytest.mark.parametrize("step", [5 * MIB + 1000, -(3 * MIB)])
async def test_strides_are_foreseen(rig: Rig, step: int) -> None:
    revision = rig.put("k", DATA)
    start = 100 * KIB if step > 0 else len(DATA) - 200 * KIB
    offsets = range(start, len(DATA) - 50_000, step) if step > 0 else range(start, 0, step)
    late = []
    async with rig.mount(prefetch=8) as cache:
        handle = Handle(cache, cache.open(revision))
        for offset in offsets:
            late.append(handle.file.read_now(offset, 40_000) is None)
            await handle.read(offset, 40_000)
            await quiet()
        handle.file.close()
    assert late[:3] == [True] * 3
    assert not any(late[3:])
    assert sum(length for _, length in rig.mover.ranges) <= 3 * LEAF_SIZE * len(offsets)


async def test_two_threads_on_one_handle_are_two_sequences(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount(prefetch=2) as cache:
        handle = Handle(cache, cache.open(revision))
        for offset in range(0, 6 * BLOCK_SIZE, 128 * KIB):
            await handle.read(offset)
            await handle.read(8 * BLOCK_SIZE + offset)
            await quiet()
        handle.file.close()
    assert len(rig.mover.ranges) <= 30


async def test_prefetch_has_one_budget_and_handles_take_turns(rig: Rig) -> None:
    """A reader with many wishes does not keep another one waiting; nobody who reads waits behind any of them."""
    revisions = [rig.put(f"k{number}", make_bytes(16 * BLOCK_SIZE, number)) for number in range(3)]
    async with rig.mount(prefetch=8) as cache:
        handles = [Handle(cache, cache.open(rev), make_bytes(16 * BLOCK_SIZE, n)) for n, rev in enumerate(revisions)]
        rig.mover.gate = trio.Event()
        for handle in handles:
            for block in range(14):
                handle.reader.wishes.append((handle.file, block, 0))
        prefetcher_of(cache)._wishing.extend(handle.reader for handle in handles[:2])
        prefetcher_of(cache).wished(handles[2].reader)
        await quiet()
        assert sorted(rig.mover.stretches) == [
            (f"k{number}", 2 * pair, 2) for number in range(3) for pair in range(settings.JOBS_OF_FILE)
        ]
        assert rig.mover.fetching == settings.JOBS
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handles[2].file.read, 15 * BLOCK_SIZE, 5)
            await until(lambda: rig.mover.fetching == settings.JOBS + 1)
            assert rig.mover.fetches[-1] == ("k2", 15), "a read does not queue behind prefetches"
            rig.mover.gate.set()
        await quiet()
        assert rig.mover.most_fetching == settings.JOBS + 1
        for handle in handles:
            handle.file.close()


@pytest.mark.parametrize("how", ["seek", "close"])
async def test_wishes_end_with_a_seek_and_with_the_handle(rig: Rig, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "JOBS", 6)
    revision = rig.put("k", DATA)
    async with rig.mount(prefetch=8) as cache:
        handle = Handle(cache, cache.open(revision))
        other = cache.open(revision)
        await handle.read(0)
        await quiet()
        rig.mover.gate = trio.Event()
        for block in range(1, 15):
            handle.reader.wishes.append((handle.file, block, 0))
        prefetcher_of(cache).wished(handle.reader)
        await quiet()
        begun = len(rig.mover.ranges) + len(rig.mover.stretches)
        async with trio.open_nursery() as nursery:
            if how == "close":
                handle.reader.close()
            else:
                nursery.start_soon(handle.read, 15 * BLOCK_SIZE, 4096)
                await quiet()
                begun += 1
            rig.mover.gate.set()
        await quiet()
        assert len(rig.mover.ranges) == begun, "the second blocks of stretches, and no new ones"
        other.close()
        handle.file.close()


async def test_errors_of_prefetch_are_left_to_the_real_read(rig: Rig) -> None:
    revision = rig.put("k", DATA)
    async with rig.mount(prefetch=4) as cache:
        handle = Handle(cache, cache.open(revision))
        await handle.read(0)
        await quiet()
        rig.mover.failures = [StorageUnavailable("no answer")] * 2
        await handle.read(128 * KIB)
        await quiet()
        assert not rig.mover.failures
        await handle.read(BLOCK_SIZE)
        handle.file.close()


async def test_a_cache_prefetches_only_for_a_prefetcher(rig: Rig) -> None:
    """Whole blocks are read, and nothing ahead of them, until a Prefetcher is made for the cache."""
    revision = rig.put("k", DATA)
    async with rig.mount(prefetch=8) as cache:
        prefetcher, cache.fetches.prefetch = prefetcher_of(cache), NoPrefetch()
        file = cache.open(revision)
        for offset in range(0, 2 * BLOCK_SIZE, 128 * KIB):
            await file.read(offset, 128 * KIB, whole=True)
            await quiet()
        assert blocks(rig) == [0, 1]
        cache.fetches.prefetch = prefetcher
        reader = prefetcher.reader()
        for offset in range(2 * BLOCK_SIZE, 3 * BLOCK_SIZE, 128 * KIB):
            await reader.read(file, offset, 128 * KIB)
            await quiet()
        assert max(blocks(rig)) > 3
        assert prefetcher.in_flight == 0
        file.close()
