"""Eviction by regions: what goes first, what never goes, and that nobody ever reads a hole for data."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from lamfs.cache import blockfile, eviction, holes, sparse
from lamfs.cache import blocks as blocks_module
from lamfs.cache import index as index_module
from lamfs.cache.blocks import BlockCache, BlockFile
from lamfs.cache.files import cache_file
from lamfs.cache.index import CacheIndex
from lamfs.cache.states import ABSENT
from lamfs.errors import StorageFull
from lamfs.fs.state import Spool
from lamfs.model import BLOCK_SIZE, LEAF_SIZE
from lamfs.prefetch.patterns import Reader
from tests.support.transfer import make_bytes, until
from tests.unit.cache.test_leaves import Rig, prefetcher_of

REGION = 2 * BLOCK_SIZE
BIG = make_bytes(8 * BLOCK_SIZE + 3)
"""Four regions and a little."""


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """With small regions, so that there are several in little."""
    for module in (blocks_module, eviction, index_module, sparse):
        monkeypatch.setattr(module, "REGION_BLOCKS", 2)
    monkeypatch.setattr(blockfile, "_REGION_SHIFT", 1)
    return Rig(tmp_path)


def disk_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


async def evict(cache: BlockCache, limit: int) -> None:
    await trio.testing.wait_all_tasks_blocked()
    cache._flush()
    await cache._evictor.down_to(limit)


async def read(file: BlockFile, reader: Reader, offset: int) -> None:
    """A MiB, as lamfs.fs.files reads."""
    got = file.read_now(offset, 1 << 20)
    if got is None:
        got = await reader.read(file, offset, 1 << 20)
    elif file.todo:
        reader.note(file, offset, len(got))
    assert got == BIG[offset : offset + (1 << 20)]


async def read_all(cache: BlockCache, rig: Rig, key: str = "k", *, upto: int = len(BIG)) -> None:
    file = cache.open(rig.revisions[key])
    reader = prefetcher_of(cache).reader()
    for offset in range(0, upto, 1 << 20):
        await read(file, reader, offset)
    file.close()


async def test_the_region_used_longest_ago_goes_first(rig: Rig) -> None:
    rig.put("k", BIG)
    async with rig.mount() as cache:
        await read_all(cache, rig, upto=3 * REGION)
        file = cache.open(rig.revisions["k"])
        file.read_now(5, 5)  # the first region is the younger one now
        await evict(cache, 2 * REGION)
        assert cache.stats()["cached_bytes"] == 2 * REGION
        assert file.read_now(REGION + 5, 5) is None
        assert disk_bytes(rig.path("k")) <= 2 * REGION + (1 << 20)
        assert await file.read(REGION + 5, 5) == BIG[REGION + 5 :][:5]
        assert file.read_now(5, 5) == BIG[5:10]
        await evict(cache, 2 * REGION)
        assert cache.stats()["cached_bytes"] <= 2 * REGION
        assert file.read_now(2 * REGION + 5, 5) is None
        assert file.read_now(2 * REGION + BLOCK_SIZE, 5) is not None, "no more than needed"
        file.close()
    assert os.stat(rig.path("k")).st_size == len(BIG)


async def test_a_file_larger_than_the_limit_passes_through(rig: Rig) -> None:
    rig.put("k", BIG)
    worst = 0
    async with rig.mount(limit=2 * REGION, prefetch=2) as cache:
        file = cache.open(rig.revisions["k"])
        reader = prefetcher_of(cache).reader()
        for offset in range(0, len(BIG), 1 << 20):
            await read(file, reader, offset)
            if offset % BLOCK_SIZE == 0:
                await until(lambda: cache.stats()["cached_bytes"] <= 2 * REGION)
                await trio.testing.wait_all_tasks_blocked(0.01)
                worst = max(worst, disk_bytes(rig.path("k")))
        file.close()
        row = cache._index.row(f"{rig.store.cache_name}/k")
        assert row is not None
        assert not row.complete
    assert worst <= 2 * REGION + 2 * BLOCK_SIZE + (1 << 20), "what is evicted gives its space back"
    assert len(rig.mover.ranges) <= len(BIG) // BLOCK_SIZE + 2, "nothing was fetched twice"


async def test_what_is_needed_stays(rig: Rig) -> None:
    rig.put("k", BIG)
    async with rig.mount() as cache:
        file = cache.open(rig.revisions["k"])
        for block in (0, 1, 3, 6):
            await file.read(block * BLOCK_SIZE, BLOCK_SIZE)
        file.kept.update((0, 1, 6))
        rig.mover.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read, 4 * BLOCK_SIZE, 5)
            nursery.start_soon(file.read, 5 * BLOCK_SIZE, 2 << 20)
            await until(lambda: rig.mover.fetching == 2)
            await evict(cache, 0)
            rig.mover.gate.set()
        assert file.read_now(0, 2 * BLOCK_SIZE) == BIG[: 2 * BLOCK_SIZE], "somebody was promised these"
        assert file.read_now(3 * BLOCK_SIZE, 5) is None
        assert file.read_now(4 * BLOCK_SIZE, 5) == BIG[4 * BLOCK_SIZE :][:5], "these were on their way"
        assert file.read_now(5 * BLOCK_SIZE, 5) == BIG[5 * BLOCK_SIZE :][:5]
        file.close()
        await evict(cache, 0)
        assert not rig.path("k").exists(), "nothing is left of a file that nobody uses"
        assert cache.stats()["cached_bytes"] == 0


async def test_a_complete_file_goes_whole_and_who_has_it_open_keeps_it(rig: Rig) -> None:
    rig.put("k", BIG)
    async with rig.mount() as cache:
        path = cache_file(rig.store, CacheIndex(rig.dir), rig.dir, rig.revisions["k"])  # type: ignore[arg-type]
        file = cache.open(rig.revisions["k"])
        await evict(cache, 0)
        assert path.read_bytes() == BIG, "in use here"
        with path.open("rb") as stream:
            file.close()
            await evict(cache, 0)
            assert not path.exists()
            assert stream.read() == BIG


HOLDER = """
import sys, time
from lamfs.cache import holes
stream = open(sys.argv[1], "r+b")
assert holes.share(stream.fileno())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("used_here", [True, False])
async def test_no_holes_in_a_file_that_another_process_has_open(rig: Rig, used_here: bool) -> None:
    rig.put("k", BIG)
    async with rig.mount() as cache:
        await read_all(cache, rig, upto=REGION)
        file = cache.open(rig.revisions["k"])
        await file.read(0, 10)
        if not used_here:
            file.close()
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(rig.path("k"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdin is not None
            assert other.stdout.readline() == b"held\n"
            await evict(cache, 0)
            assert rig.path("k").read_bytes()[:REGION] == BIG[:REGION]
            assert cache.stats()["cached_bytes"] >= REGION
            other.stdin.close()
            other.wait(10)
        await evict(cache, 0)
        assert cache.stats()["cached_bytes"] == 0
        if used_here:
            assert await file.read(0, 10) == BIG[:10]
            file.close()


async def test_two_mounts_on_one_cache(rig: Rig) -> None:
    """What the one evicted the other does not take for data, though it had verified it."""
    rig.put("k", BIG)
    async with rig.mount() as one, rig.mount() as two:
        await read_all(one, rig, upto=REGION)
        await read_all(two, rig, upto=REGION)
        file = one.open(rig.revisions["k"])
        assert file.read_now(0, 10) == BIG[:10], "verified before it was closed"
        await evict(two, 0)
        assert file.read_now(0, 10) == BIG[:10], "open there: not evicted here"
        file.close()
        await evict(two, 0)
        file = one.open(rig.revisions["k"])
        assert file.state[0] == ABSENT
        assert await file.read(0, 10) == BIG[:10]
        file.close()


async def test_where_holes_cannot_be_punched_files_go_whole(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(holes, "punch", refuse)
    rig.put("k", BIG)
    async with rig.mount() as cache:
        file = cache.open(rig.revisions["k"])
        await file.read(0, 10)
        await evict(cache, 0)
        assert file.read_now(0, 10) == BIG[:10]
        file.close()
        await evict(cache, 0)
        assert not rig.path("k").exists()


async def test_the_floor_of_free_space(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_bytes(3 * BLOCK_SIZE)
    for key in ("a", "b"):
        rig.put(key, data)
    async with rig.mount(prefetch=4) as cache:
        for key in ("a", "b"):
            file = cache.open(rig.revisions[key])
            await file.read(0, BLOCK_SIZE)
            file.close()
            cache._flush()
        monkeypatch.setattr(cache._evictor, "shortage", lambda: cache._index.total_bytes() - BLOCK_SIZE)
        cache._work.set()
        await until(lambda: not rig.path("a").exists())
        assert rig.path("b").exists(), "no more than needed"
        assert not cache.fetches.tight
        monkeypatch.setattr(cache._evictor, "shortage", lambda: 5)
        cache._work.set()
        await until(lambda: cache.fetches.tight)
        fetched = len(rig.mover.fetches)
        file = cache.open(rig.revisions["a"])
        reader = prefetcher_of(cache).reader()
        for number in range(4):
            assert await reader.read(file, number * LEAF_SIZE, 10) == data[number * LEAF_SIZE :][:10]
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert len(rig.mover.fetches) - fetched <= 4, "nothing ahead of the reader"
        file.close()
        await until(lambda: cache.stats()["cached_bytes"] == 0)


def test_the_default_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk(blocks: int, free: int) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, blocks, free, free, 0, 0, 0, 0, 255))

    def shortage(free_bytes: int | None, blocks: int, free: int) -> int:
        monkeypatch.setattr(os, "statvfs", lambda path: disk(blocks, free))
        return eviction.Evictor(
            CacheIndex(tmp_path), tmp_path, free_bytes=free_bytes, find=lambda path: [], unlink=lambda path: None
        ).shortage()

    gib = 1 << 30
    assert shortage(None, 100 * gib // 4096, gib // 4096) == pytest.approx(4 * gib, abs=4096)
    assert shortage(None, 1000 * gib // 4096, 9 * gib // 4096) == gib
    assert shortage(3 * gib, 100 * gib // 4096, gib // 4096) == 2 * gib
    assert shortage(0, 100 * gib // 4096, 0) == 0


async def test_a_cache_that_can_hold_nothing_still_reads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_bytes(2 * BLOCK_SIZE + 7)
    revision = rig.put("dir/k", data)

    def full(*arguments: object) -> None:
        raise StorageFull("no space")

    async with rig.mount(prefetch=4) as cache:
        with monkeypatch.context() as patch:
            patch.setattr("lamfs.cache.sparse.open_file", full)
            file = cache.open(revision)
        reader = prefetcher_of(cache).reader()
        for offset, size in ((0, 10), (LEAF_SIZE, 10), (BLOCK_SIZE - 5, 10), (2 * BLOCK_SIZE, 100)):
            assert await reader.read(file, offset, size) == data[offset : offset + size]
        assert await file.read(0, len(data)) == data
        with pytest.raises(StorageFull):
            await file.fill()
        file.close()
        file = cache.open(revision)
        assert await file.read(0, 10) == data[:10]
        assert file.read_now(0, 10) == data[:10], "there was room again"
        file.close()


async def test_a_block_that_is_grafted_is_not_punched(rig: Rig, tmp_path: Path) -> None:
    """Leaves of it were read, which the index knows; they are evicted when the block has just been written."""
    rig.put("k", BIG)
    spool = tmp_path / "spool"
    written = trio.Event()
    evicted = trio.Event()

    async def graft(src: str, dst: str, *, offset: int, length: int, digest: bytes) -> bool:
        if offset != BLOCK_SIZE:
            return False
        with open(dst, "r+b") as file:
            os.pwrite(file.fileno(), BIG[offset : offset + length], offset)
        written.set()
        await evicted.wait()
        return True

    async with rig.mount() as cache:
        await read_all(cache, rig)
        rig.mover.graft = graft  # type: ignore[attr-defined]
        new = b"new" + BIG[3:]
        revision = rig.put("k", new)
        with open(spool, "w+b") as stream:
            stream.write(new[:BLOCK_SIZE])
            stream.truncate(len(new))
            stream.flush()
            assert cache.import_file(stream.fileno(), str(spool), revision, range(1, revision.block_count()))
        file = cache.open(revision)
        assert await file.read(BLOCK_SIZE + 5, 5) == new[BLOCK_SIZE + 5 :][:5]
        await written.wait()
        await evict(cache, 0)
        evicted.set()
        await until(lambda: file.has(BLOCK_SIZE, 1))
        right = await file.read(0, len(new)) == new
        assert right
        file.close()


async def test_a_spool_file_that_another_mount_has_open_gets_no_holes(rig: Rig, tmp_path: Path) -> None:
    """It shows what is written here, until that is stored and the spool file becomes a cache file, not all of it."""
    revision = rig.put("k", BIG)
    path = tmp_path / "spool"
    path.write_bytes(BIG[:BLOCK_SIZE])
    os.truncate(path, len(BIG))
    theirs = Spool(os.open(path, os.O_RDWR), path.name)
    async with rig.mount() as cache:
        with open(path, "r+b") as stream:
            assert cache.import_file(stream.fileno(), str(path), revision, range(1, revision.block_count()))
        await evict(cache, 0)
        assert os.pread(theirs.fd, 9, 0) == BIG[:9]
        theirs.close()
        await evict(cache, 0)
        assert cache.stats()["cached_bytes"] == 0
