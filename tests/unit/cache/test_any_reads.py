"""Any pattern of reads, evictions, damage and remounts against plain bytes: every byte that is given out is right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lamfs.cache import blockfile, eviction, fetches, sparse
from lamfs.cache import blocks as blocks_module
from lamfs.cache import index as index_module
from lamfs.cache.files import cache_file
from lamfs.cache.index import CacheIndex
from lamfs.errors import StorageFull, StorageUnavailable
from lamfs.model import BLOCK_SIZE
from lamfs.prefetch import settings as limits
from tests.support.transfer import make_bytes
from tests.unit.cache.test_leaves import Rig, prefetcher_of

SIZE = 5 * BLOCK_SIZE + 70_000
DATA = make_bytes(SIZE)
OFFSETS = st.one_of(
    st.integers(0, SIZE), st.integers(0, SIZE // BLOCK_SIZE).map(lambda block: block * BLOCK_SIZE), st.just(-1)
)
"""-1: where the handle has come to."""
STEPS = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 2), OFFSETS, st.sampled_from([1, 4096, 131_072, 1 << 20, 3 << 20])),
    st.tuples(st.just("run"), st.integers(0, 2), OFFSETS, st.sampled_from([65_536, 262_144])),
    st.tuples(st.just("evict"), st.integers(0, 6), st.just(0), st.just(0)),
    st.tuples(st.just("damage"), st.integers(0, SIZE - 1), st.just(0), st.just(0)),
    st.tuples(st.sampled_from(["reopen", "other", "full", "away", "fill", "remount", "api"]), *[st.just(0)] * 3),
)


@settings(deadline=None, max_examples=40)
@given(steps=st.lists(STEPS, min_size=2, max_size=14))
def test_every_byte_is_right(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks_module, eviction, index_module, sparse):
            patch.setattr(module, "REGION_BLOCKS", 2)
        patch.setattr(blockfile, "_REGION_SHIFT", 1)
        patch.setattr(limits, "WHOLE_MISSES", 6)
        patch.setattr(fetches, "FULL_SECONDS", 0.0)
        rig = Rig(tmp_path_factory.mktemp("patterns"))
        rig.put("k", DATA)
        left = list(steps)
        while left:
            trio.run(mounted, rig, left)


async def mounted(rig: Rig, steps: list[tuple[str, int, int, int]]) -> None:
    """One mount, until a step ends it."""
    revision = rig.revisions["k"]
    async with rig.mount(prefetch=3) as cache, rig.mount() as neighbour:
        file = cache.open(revision)
        readers = [prefetcher_of(cache).reader() for _ in range(3)]
        at = [0, 0, 0]

        async def read(who: int, offset: int, size: int) -> None:
            offset = at[who] if offset < 0 else offset
            got = file.read_now(offset, size)
            if got is None:
                got = await readers[who].read(file, offset, size)
            elif got and file.todo:
                readers[who].note(file, offset, len(got))
            assert got == DATA[offset : offset + size]
            at[who] = offset + len(got)

        while steps:
            what, number, offset, size = steps.pop(0)
            if what == "read":
                await read(number, offset, size)
            elif what == "run":
                await read(number, offset, size)
                for _ in range(6):
                    await read(number, -1, size)
            elif what == "evict":
                await trio.testing.wait_all_tasks_blocked()
                cache._flush()
                await cache._evictor.down_to(number * BLOCK_SIZE)
                row = cache._index.row(f"{rig.store.cache_name}/k")
                whole = row is not None and row.complete
                assert cache.stats()["cached_bytes"] <= number * BLOCK_SIZE or file.kept or whole
            elif what == "damage":
                # A file is sealed when it is complete: what somebody changes between that and the last look at a block
                # is sealed too.
                await trio.testing.wait_all_tasks_blocked()
                cache._flush()
                if rig.path("k").exists():
                    with rig.path("k").open("r+b") as stream:
                        stream.seek(number)
                        stream.write(bytes([DATA[number] ^ 1]))
                    break  # by now the process may have verified it: another one reads on
            elif what == "reopen":
                file.close()
                file = cache.open(revision)
            elif what == "other":
                other = neighbour.open(revision)
                assert await other.read(BLOCK_SIZE - 5, 10) == DATA[BLOCK_SIZE - 5 : BLOCK_SIZE + 5]
                other.close()
                await neighbour._evictor.down_to(0)
            elif what == "full":
                rig.mover.failures = [StorageFull("no space")] * 2
            elif what == "away":
                rig.mover.failures = [StorageUnavailable("no answer")]
                try:
                    await file.read(SIZE - 5, 5)
                except StorageUnavailable:
                    pass
                rig.mover.failures = []  # the end may have been there, and another read would meet it
            elif what == "fill":
                rig.mover.failures = []
                assert os.pread(await file.fill(), SIZE, 0) == DATA
            elif what == "api":
                path: Path = cache_file(rig.store, CacheIndex(rig.dir), rig.dir, revision)  # type: ignore[arg-type]
                assert path.read_bytes() == DATA
            elif what == "remount":
                break
        await trio.testing.wait_all_tasks_blocked()
        rig.mover.failures = []
        file.close()
