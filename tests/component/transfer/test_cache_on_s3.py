"""Mover, block cache and cache files together, on a real S3 server."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lamfs.cache.blocks import BlockCache
from lamfs.cache.files import cache_file
from lamfs.cache.index import CacheIndex
from lamfs.errors import DamagedData, ObjectChanged, StorageUnavailable
from lamfs.model import BLOCK_SIZE, LEAF_SIZE, ContentHash, Revision
from lamfs.mover.client import Mover
from lamfs.prefetch.scheduler import Prefetcher
from lamfs.storage import open_store
from lamfs.storage.base import ObjectStore, StorageConfig
from tests.support.servers import SeaweedServer
from tests.support.transfer import content_of, make_bytes, open_fds, running_mover


@dataclass
class Rig:
    store: ObjectStore
    mover: Mover
    cache: BlockCache
    dir: Path
    spool: Path
    known: dict[str, ContentHash]

    async def put(self, key: str, data: bytes) -> Revision:
        self.spool.write_bytes(data)
        with self.spool.open("rb") as stream:
            path = f"/proc/{os.getpid()}/fd/{stream.fileno()}"
            content = await self.mover.hash(path)
            assert content.blocks == content_of(data).blocks
            self.known[key] = content
            return Revision(content, key, (await self.mover.put(path, key)).etag)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SeaweedServer]:  # type: ignore[misc]
    with SeaweedServer(tmp_path_factory.mktemp("weed")) as server:
        server.create_bucket("cachetest")
        yield server  # type: ignore[misc]


@pytest.fixture
def config(server: SeaweedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StorageConfig:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server.config("cachetest", tmp_path.name)


@pytest.fixture
async def rig(config: StorageConfig, tmp_path: Path) -> AsyncIterator[Rig]:
    store = open_store(config)
    known: dict[str, ContentHash] = {}

    def leaves(revision: Revision, block: int) -> bytes | None:
        content = known.get(revision.object_key)
        same = content is not None and content.block(block) == revision.content.block(block)
        return content.leaves.get(block) if content is not None and same else None

    async with running_mover(config) as mover:
        cache = BlockCache(store, mover, CacheIndex(tmp_path / "c"), tmp_path / "c", limit_bytes=1 << 40, leaves=leaves)
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            yield Rig(store, mover, cache, tmp_path / "c", tmp_path / "spool", known)
            nursery.cancel_scope.cancel()
    store.close()


async def test_a_file_read_in_every_manner(rig: Rig) -> None:
    data = make_bytes(6 * BLOCK_SIZE + 1234)
    revision = await rig.put("a/ä b.bin", data)
    file = rig.cache.open(revision)
    reader = Prefetcher(rig.cache).reader()
    for offset in range(0, len(data), 256 << 10):
        assert await reader.read(file, offset, 256 << 10) == data[offset : offset + (256 << 10)]
    file.close()
    rig.cache.drop("a/ä b.bin")
    file = rig.cache.open(revision)
    for _ in range(50):
        offset, size = random.randrange(len(data)), random.choice([1, 4096, 300_000])
        assert await file.read(offset, size) == data[offset : offset + size]
    await file.fill()
    file.close()
    path = cache_file(rig.store, CacheIndex(rig.dir), rig.dir, revision)
    assert path.read_bytes() == data


async def test_a_put_becomes_the_cache_file_and_a_replace_keeps_readers_whole(rig: Rig) -> None:
    first, second = make_bytes(3 * BLOCK_SIZE, 1), make_bytes(2 * BLOCK_SIZE + 7, 2)
    old = await rig.put("k", first)
    reader = rig.cache.open(old)
    await reader.read(0, 10)
    new = await rig.put("k", second)
    with rig.spool.open("r+b") as stream:
        assert rig.cache.import_file(stream.fileno(), str(rig.spool), new)
    file = rig.cache.open(new)
    assert file.read_now(0, len(second)) == second
    assert reader.read_now(0, 10) == first[:10]
    with pytest.raises(ObjectChanged):
        await reader.read(BLOCK_SIZE, 10)
    reader.close()
    file.close()


async def test_wrong_bytes_with_the_right_etag(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    data = make_bytes(BLOCK_SIZE + 5)
    stored = await rig.put("k", data)
    lie = Revision(content_of(data[:-1] + b"?"), "k", stored.etag)
    file = rig.cache.open(lie)
    assert await file.read(0, 10) == data[:10]
    with pytest.raises(DamagedData):
        await file.read(BLOCK_SIZE, 5)
    assert rig.store.url("k") in caplog.text
    with pytest.raises(DamagedData):
        cache_file(rig.store, CacheIndex(rig.dir), rig.dir, lie)
    file.close()


async def test_leaves_from_a_real_server(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    data = make_bytes(2 * BLOCK_SIZE + 70_000)
    revision = await rig.put("k", data)
    file = rig.cache.open(revision)
    offsets = [3 * LEAF_SIZE + 1, BLOCK_SIZE + 9 * LEAF_SIZE, 2 * BLOCK_SIZE + LEAF_SIZE]
    for offset in offsets:
        assert await file.read(offset, 4000) == data[offset : offset + 4000]
    assert rig.cache.stats()["fetched_bytes"] == 2 * LEAF_SIZE + 70_000 - LEAF_SIZE
    other = dict(rig.known["k"].leaves)
    other[0] = bytes(len(other[0]))
    rig.known["k"] = dataclasses.replace(rig.known["k"], leaves=other)
    assert await file.read(5, 5) == data[5:10], "wrong leaf hashes: the block's own hash decides"
    assert file.read_now(0, BLOCK_SIZE) == data[:BLOCK_SIZE]
    file.close()


async def test_many_small_files(rig: Rig) -> None:
    bodies = {f"d{number % 5}/k{number}": b"%d" % number for number in range(100)}
    revisions: dict[str, Revision] = {}

    async def put(key: str) -> None:
        stat = await rig.mover.put_bytes(key, bodies[key])
        revisions[key] = Revision(content_of(bodies[key]), key, stat.etag)

    async def read(key: str) -> None:
        file = rig.cache.open(revisions[key])
        assert await file.read(0, 100) == bodies[key]
        file.close()

    before = open_fds()
    for job in (put, read, read):
        async with trio.open_nursery() as nursery:
            for key in bodies:
                nursery.start_soon(job, key)
    assert rig.cache.stats()["misses"] == 100
    assert open_fds() <= before + 256


async def test_the_mover_is_killed_while_blocks_are_fetched(rig: Rig) -> None:
    data = make_bytes(20 * BLOCK_SIZE)
    revision = await rig.put("k", data)
    file = rig.cache.open(revision)
    async with trio.open_nursery() as nursery:

        async def kill() -> None:
            for _ in range(2):
                before = rig.cache.stats()["fetched_bytes"]
                while rig.cache.stats()["fetched_bytes"] <= before + BLOCK_SIZE:
                    await trio.sleep(0.002)
                pid = rig.mover.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                while rig.mover.pid in (None, pid):
                    await trio.sleep(0.002)

        nursery.start_soon(kill)
        with trio.fail_after(40):
            fd = await file.fill()
    assert rig.mover.restarts == 2
    assert os.pread(fd, len(data), 0) == data
    file.close()


async def test_no_server(config: StorageConfig, tmp_path: Path, server: SeaweedServer) -> None:
    data = make_bytes(100)
    away = dataclasses.replace(config, endpoint_url="http://127.0.0.1:9", timeout=2.0)
    store = open_store(away)
    async with running_mover(away) as mover:
        cache = BlockCache(store, mover, CacheIndex(tmp_path / "c"), tmp_path / "c", limit_bytes=1 << 40)
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            file = cache.open(Revision(content_of(data), "k", "etag"))
            with pytest.raises(StorageUnavailable), trio.fail_after(30):
                await file.read(0, 10)
            file.close()
            nursery.cancel_scope.cancel()
    store.close()
