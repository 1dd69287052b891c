"""The block cache against a fake mover: what is fetched, when, how often, and what is believed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from lamfs.cache import blockfile
from lamfs.cache import blocks as blocks_module
from lamfs.cache.blocks import BlockCache
from lamfs.cache.index import CacheIndex
from lamfs.errors import (
    DamagedData,
    InvalidName,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    StorageFull,
    StorageUnavailable,
    TransferDied,
)
from lamfs.model import BLOCK_SIZE, Revision
from lamfs.prefetch.scheduler import Prefetcher
from lamfs.storage.base import StorageConfig
from lamfs.storage.local import LocalStore
from tests.support.transfer import FakeMover, FakeStore, content_of, make_bytes, open_fds, until

FOLDER = "bucket/prefix"


class Rig:
    """A store, a mover and a cache directory; caches are started on it as mounts would be."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = FakeStore()
        self.mover = FakeMover(self.store)
        self.dir = tmp_path / "cache"

    @contextlib.asynccontextmanager
    async def mount(self, *, limit: int = 1 << 40, prefetch: int = 0) -> AsyncIterator[BlockCache]:
        index = CacheIndex(self.dir)
        cache = BlockCache(self.store, self.mover, index, self.dir, limit_bytes=limit)  # type: ignore[arg-type]
        Prefetcher(cache, blocks=prefetch)
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            yield cache
            nursery.cancel_scope.cancel()
        index.close()

    def path(self, key: str) -> Path:
        return self.dir / FOLDER / key


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


SIZES = [0, 1, 5, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 77]


@pytest.mark.parametrize("size", SIZES)
async def test_every_byte_of_every_size(rig: Rig, size: int) -> None:
    data = make_bytes(size)
    revision = rig.store.put("k", data)
    edges = sorted({0, 1, size // 2, max(size - 1, 0), size, size + 5, BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE - 3})
    async with rig.mount() as cache:
        file = cache.open(revision)
        for offset in edges:
            for length in (0, 1, 6, BLOCK_SIZE, size + 10):
                assert await file.read(offset, length) == data[offset : offset + length]
                assert file.read_now(offset, length) == data[offset : offset + length]
        fd = await file.fill()
        assert os.pread(fd, size + 1, 0) == data
        assert file.fd() == fd
        file.close()
    assert all(count == 1 for count in rig.store.gets.values())
    assert len(rig.store.gets) == revision.block_count()
    assert rig.path("k").read_bytes() == data
    assert rig.path("k").stat().st_mode & 0o777 == 0o600
    assert rig.path("").stat().st_mode & 0o777 == 0o700
    row = CacheIndex(rig.dir).row(f"{FOLDER}/k")
    assert row is not None
    assert row.complete
    assert row.mtime_ns == rig.path("k").stat().st_mtime_ns


async def test_only_the_blocks_that_are_read_are_fetched(rig: Rig) -> None:
    data = make_bytes(4 * BLOCK_SIZE)
    revision = rig.store.put("k", data)
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert file.read_now(0, 10) is None
        assert await file.read(2 * BLOCK_SIZE - 5, 10) == data[2 * BLOCK_SIZE - 5 : 2 * BLOCK_SIZE + 5]
        assert sorted(rig.mover.fetches) == [("k", 1), ("k", 2)]
        assert file.read_now(BLOCK_SIZE, 2 * BLOCK_SIZE) == data[BLOCK_SIZE : 3 * BLOCK_SIZE]
        assert file.read_now(BLOCK_SIZE - 1, 2) is None
        assert file.read_now(3 * BLOCK_SIZE - 1, 2) is None
        stats = cache.stats()
        assert (stats["misses"], stats["fetched_bytes"], stats["damaged"]) == (2, 2 * BLOCK_SIZE, 0)
        assert stats["cached_bytes"] == 2 * BLOCK_SIZE
        assert stats["hits"] == 2
        file.close()


async def test_several_readers_of_one_block_cause_one_get(rig: Rig) -> None:
    data = make_bytes(2 * BLOCK_SIZE)
    revision = rig.store.put("k", data)
    rig.mover.gate = trio.Event()
    got: list[bytes] = []
    async with rig.mount() as cache:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def first() -> None:
                with scope:
                    file = cache.open(revision)
                    try:
                        await file.read(0, 10)
                        raise AssertionError("it should have been cancelled")
                    finally:
                        file.close()

            async def other(offset: int) -> None:
                file = cache.open(revision)
                got.append(await file.read(offset, 10))
                file.close()

            nursery.start_soon(first)
            await until(lambda: rig.mover.fetching == 1)
            for number in range(5):
                nursery.start_soon(other, number * 100)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not got
            rig.mover.gate.set()
    assert sorted(got) == sorted(data[number * 100 : number * 100 + 10] for number in range(5))
    assert rig.mover.fetches == [("k", 0)]


async def test_a_cancelled_only_reader_still_leaves_the_block(rig: Rig) -> None:
    revision = rig.store.put("k", make_bytes(BLOCK_SIZE))
    rig.mover.gate = trio.Event()
    async with rig.mount() as cache:
        file = cache.open(revision)
        with trio.move_on_after(0.01):
            await file.read(0, 10)
        file.close()
        rig.mover.gate.set()
        await until(lambda: cache.stats()["cached_bytes"] == BLOCK_SIZE)
        file = cache.open(revision)
        assert file.read_now(0, 10) is not None
        file.close()


async def test_a_failure_reaches_all_who_wait_and_the_next_read_tries_again(rig: Rig) -> None:
    data = make_bytes(BLOCK_SIZE)
    revision = rig.store.put("k", data)
    rig.mover.gate = trio.Event()
    rig.mover.failures = [StorageUnavailable("no answer")]
    caught: list[BaseException] = []
    async with rig.mount() as cache:
        file = cache.open(revision)

        async def reader() -> None:
            with pytest.raises(StorageUnavailable, match="no answer") as info:
                await file.read(0, 10)
            caught.append(info.value)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            rig.mover.gate.set()
        assert len({id(error) for error in caught}) == 3
        assert await file.read(0, 10) == data[:10]
        assert rig.mover.fetches == [("k", 0)] * 2
        file.close()


async def test_who_comes_late_does_not_share_an_old_failure(rig: Rig) -> None:
    """What was on its way before has tried for as long as it may; by now storage may be well again."""
    data = make_bytes(BLOCK_SIZE)
    revision = rig.store.put("k", data)
    rig.mover.gate = trio.Event()
    rig.mover.failures = [StorageUnavailable("no answer")]
    async with rig.mount() as cache:
        file = cache.open(revision)

        async def fails() -> None:
            with pytest.raises(StorageUnavailable, match="no answer"):
                await file.read(0, 10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            await trio.sleep(blockfile.OLD_SECONDS * 1.01)
            nursery.start_soon(file.read, 0, 10)
            await trio.testing.wait_all_tasks_blocked()
            rig.mover.gate.set()
        assert file.read_now(0, 10) == data[:10]
        assert rig.mover.fetches == [("k", 0)] * 2
        file.close()


async def test_a_dying_mover_is_tried_again(rig: Rig) -> None:
    data = make_bytes(100)
    revision = rig.store.put("k", data)
    rig.mover.failures = [TransferDied("once"), TransferDied("twice")]
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert await file.read(0, 100) == data
        file.close()
        revision = rig.store.put("k2", data)
        rig.mover.failures = [TransferDied(str(number)) for number in range(3)]
        file = cache.open(revision)
        with pytest.raises(TransferDied):
            await file.read(0, 100)
        file.close()


async def test_readers_are_told_when_the_cache_stops(rig: Rig) -> None:
    revision = rig.store.put("k", make_bytes(100))
    rig.mover.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        async with rig.mount() as cache:
            file = cache.open(revision)

            async def reader() -> None:
                with pytest.raises(TransferDied):
                    await file.read(0, 10)

            nursery.start_soon(reader)
            await until(lambda: rig.mover.fetching == 1)
    with pytest.raises(TransferDied):
        await file.read(0, 10)
    file.close()


# ---- what is believed


async def test_a_remount_starts_warm_and_verifies_once(rig: Rig) -> None:
    data = make_bytes(3 * BLOCK_SIZE + 5)
    revision = rig.store.put("k", data)
    async with rig.mount() as cache:
        file = cache.open(revision)
        await file.read(0, 1)
        await file.read(3 * BLOCK_SIZE, 1)
        file.close()
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert file.read_now(0, 10) is None, "not verified by this process yet"
        assert await file.read(0, 10) == data[:10]
        assert await file.read(0, len(data)) == data
        assert file.read_now(0, len(data)) == data
        file.close()
        file = cache.open(revision)
        assert file.read_now(0, len(data)) == data, "still verified after it was closed and opened"
        file.close()
    assert rig.mover.fetches[:2] == [("k", 0), ("k", 3)]
    assert sorted(rig.mover.fetches[2:]) == [("k", 1), ("k", 2)]
    assert [block for _, block in rig.mover.verifies] == [0], "block 3 is small enough to be verified in place"


@pytest.mark.parametrize("size", [500, BLOCK_SIZE + 500])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
async def test_damage_on_disk_is_found_and_fetched_again(
    rig: Rig, size: int, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_bytes(size)
    revision = rig.store.put("k", data)
    async with rig.mount() as cache:
        file = cache.open(revision)
        await file.fill()
        file.close()
    with rig.path("k").open("r+b") as stream:
        if damage == "flip":
            stream.seek(size - 3)
            stream.write(bytes([data[size - 3] ^ 1]))
        else:
            stream.truncate(size - 100 if damage == "cut" else size + 100)
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert await file.read(0, size) == data
        assert file.read_now(0, size) == data
        file.close()
        assert cache.stats()["damaged"] == (damage == "flip")
    if damage == "flip":
        assert "damaged" in caplog.text
    assert rig.path("k").read_bytes() == data
    row = CacheIndex(rig.dir).row(f"{FOLDER}/k")
    assert row is not None
    assert row.mtime_ns == rig.path("k").stat().st_mtime_ns


async def test_a_cache_file_that_is_cut_while_open(rig: Rig) -> None:
    data = make_bytes(2 * BLOCK_SIZE)
    revision = rig.store.put("k", data)
    async with rig.mount() as cache:
        file = cache.open(revision)
        await file.fill()
        os.truncate(rig.path("k"), BLOCK_SIZE + 10)
        assert file.read_now(BLOCK_SIZE, 100) is None
        assert await file.read(0, len(data)) == data
        assert file.read_now(BLOCK_SIZE, 100) == data[BLOCK_SIZE : BLOCK_SIZE + 100]
        os.truncate(rig.path("k"), 10)
        assert os.pread(await file.fill(), len(data), 0) == data
        file.close()


async def test_damage_in_storage_is_an_error_and_a_loud_line(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    data = make_bytes(2 * BLOCK_SIZE)
    revision = rig.store.put("dir/k", data)
    rig.store.objects["dir/k"] = (revision.etag, data[:-1] + b"?")
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert await file.read(0, 10) == data[:10]
        for _ in range(2):
            with pytest.raises(DamagedData) as info:
                await file.read(BLOCK_SIZE, 10)
            assert info.value.errno == errno.EIO
        assert file.read_now(BLOCK_SIZE, 10) is None
        file.close()
        assert cache.stats()["damaged"] == 2
    lines = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == 2
    for part in ("s3://bucket/prefix/dir/k", "Block 1", revision.etag):
        assert part in lines[0].getMessage()


async def test_an_object_that_changed_is_not_spliced(rig: Rig) -> None:
    old = rig.store.put("k", make_bytes(2 * BLOCK_SIZE, 1))
    async with rig.mount() as cache:
        file = cache.open(old)
        await file.read(0, 10)
        rig.store.put("k", make_bytes(2 * BLOCK_SIZE, 2))
        with pytest.raises(ObjectChanged):
            await file.read(BLOCK_SIZE, 10)
        del rig.store.objects["k"]
        with pytest.raises(ObjectMissing):
            await file.read(BLOCK_SIZE, 10)
        assert file.read_now(0, 10) is not None
        file.close()


async def test_a_new_revision_is_a_new_file_and_the_old_one_stays_readable(rig: Rig) -> None:
    first, second = make_bytes(BLOCK_SIZE + 5, 1), make_bytes(BLOCK_SIZE + 9, 2)
    old = rig.store.put("k", first)
    async with rig.mount() as cache:
        reader = cache.open(old)
        await reader.fill()
        ino = rig.path("k").stat().st_ino
        mtime = rig.path("k").stat().st_mtime_ns + 10**15
        os.utime(rig.path("k"), ns=(mtime, mtime))  # as if the clock had gone back since
        new = rig.store.put("k", second)
        file = cache.open(new)
        await file.fill()
        assert reader.read_now(0, len(first)) == first
        assert file.read_now(0, len(second)) == second
        assert rig.path("k").read_bytes() == second
        assert rig.path("k").stat().st_ino != ino
        assert rig.path("k").stat().st_mtime_ns >= mtime
        reader.close()
        file.close()
        reader = cache.open(new)
        assert reader.read_now(0, 5) == second[:5]
        reader.close()


async def test_equal_etag_with_other_content_is_another_file(rig: Rig) -> None:
    one = rig.store.put("k", b"one")
    two = Revision(content_of(b"two"), "k", one.etag)
    for still_open in (True, False):
        rig.store.objects["k"] = (one.etag, b"one")
        async with rig.mount() as cache:
            file = cache.open(one)
            assert await file.read(0, 3) == b"one"
            if not still_open:
                file.close()
            rig.store.objects["k"] = (one.etag, b"two")
            other = cache.open(two)
            assert await other.read(0, 3) == b"two"
            if still_open:
                assert await file.read(0, 3) == b"one"
                file.close()
            other.close()


# ---- filling


async def test_filling_a_file_leaves_the_mover_room(rig: Rig) -> None:
    data = make_bytes(9 * BLOCK_SIZE + 1)
    revision = rig.store.put("k", data)
    async with rig.mount() as cache:
        file = cache.open(revision)
        fd = await file.fill()
        assert os.pread(fd, len(data), 0) == data
        assert 2 <= rig.mover.most_fetching <= 4
        file.close()


# ---- descriptors and space


async def test_many_small_files_need_few_descriptors_and_verify_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "IDLE_FILES", 20)
    revisions = [rig.store.put(f"d{number % 7}/k{number}", b"%d" % number) for number in range(400)]
    async with rig.mount() as cache:
        before = open_fds()
        for number, revision in enumerate(revisions):
            file = cache.open(revision)
            assert await file.read(0, 100) == b"%d" % number
            file.close()
            assert open_fds() <= before + 22
        for number, revision in enumerate(revisions):
            file = cache.open(revision)
            assert file.read_now(0, 100) == b"%d" % number, "what was verified is remembered"
            file.close()
        rig.path("d3/k3").write_bytes(b"?")
        file = cache.open(revisions[3])
        assert await file.read(0, 100) == b"3", "but not when somebody wrote to the file"
        file.close()
        assert cache.stats()["damaged"] == 1
    assert open_fds() <= before


async def test_out_of_descriptors(rig: Rig) -> None:
    revisions = [rig.store.put(f"k{number}", b"%d" % number) for number in range(50)]
    async with rig.mount() as cache:
        for revision in revisions[:40]:
            file = cache.open(revision)
            await file.read(0, 9)
            file.close()
        old = resource.getrlimit(resource.RLIMIT_NOFILE)
        hold: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_fds() + 3, old[1]))
            with contextlib.suppress(OSError):
                while True:
                    hold.append(os.open("/", os.O_RDONLY))
            file = cache.open(revisions[45])  # idle files make room
            assert file.read_now(0, 9) is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, old)
            for fd in hold:
                os.close(fd)
        assert await file.read(0, 9) == b"45"
        file.close()
        assert rig.path("k0").read_bytes() == b"0"


async def test_eviction_takes_the_least_recently_used_that_nobody_uses(rig: Rig) -> None:
    data = make_bytes(1000)
    async with rig.mount(limit=3500) as cache:
        used = cache.open(rig.store.put("a/used", data))
        await used.fill()
        for name in ("a/b/old", "a/middle", "new"):
            file = cache.open(rig.store.put(name, data))
            await file.fill()
            file.close()
            cache._flush()
        await until(lambda: cache.stats()["cached_bytes"] <= 3500)
        assert not rig.path("a/b").exists(), "also the folder that became empty"
        assert rig.path("a/middle").exists()
        assert rig.path("new").exists()
        assert used.read_now(0, 1000) == data
        assert rig.path("a/used").exists()
        used.close()
        file = cache.open(rig.store.put("a/b/old", data))
        assert file.read_now(0, 10) is None
        assert await file.read(0, 1000) == data
        file.close()


async def test_a_full_cache_disk_makes_room_and_tries_again(rig: Rig) -> None:
    data = make_bytes(1000)
    async with rig.mount() as cache:
        other = cache.open(rig.store.put("other", data))
        await other.fill()
        other.close()
        file = cache.open(rig.store.put("k", data))
        rig.mover.failures = [StorageFull("no space")]
        assert await file.read(0, 1000) == data
        assert not rig.path("other").exists()
        rig.mover.failures = [StorageFull("no space"), StorageFull("no space")]
        full = cache.open(rig.store.put("k2", data))
        assert await full.read(0, 10) == data[:10], "by way of memory"
        assert full.read_now(0, 10) is None
        with pytest.raises(StorageFull):
            await full.fill()
        full.close()
        file.close()


async def test_the_cache_may_be_deleted_at_any_moment(rig: Rig) -> None:
    data = make_bytes(2 * BLOCK_SIZE)
    revision = rig.store.put("d/k", data)

    def delete() -> None:
        shutil.rmtree(rig.dir)

    async with rig.mount() as cache:
        file = cache.open(revision)
        await file.read(0, 10)
        delete()
        assert await file.read(0, len(data)) == data
        file.close()
        delete() if rig.dir.exists() else None
        file = cache.open(rig.store.put("d/k2", data))
        delete()
        assert await file.read(0, len(data)) == data
        file.close()
        cache.drop("d/k")
        cache.drop("d/k2")
        file = cache.open(revision)
        assert await file.read(0, len(data)) == data
        assert rig.path("d/k").read_bytes() == data
        file.close()
        assert cache.stats()["cached_bytes"] == len(data)


async def test_a_cache_directory_that_cannot_be_used_is_an_error(rig: Rig) -> None:
    revision = rig.store.put("k", b"abc")
    rig.dir.write_bytes(b"a file where the directory should be")
    async with rig.mount() as cache:
        with pytest.raises(StorageError, match="cache file"):
            cache.open(revision)
        rig.dir.unlink()
        file = cache.open(revision)
        assert await file.read(0, 3) == b"abc"
        file.close()


async def test_keys_that_are_in_each_others_way(rig: Rig) -> None:
    async with rig.mount() as cache:
        for keys in (("a", "a/b"), ("c/d/e", "c")):
            for key in keys:
                file = cache.open(rig.store.put(key, key.encode()))
                assert await file.read(0, 9) == key.encode()
                file.close()
            assert rig.path(keys[1]).read_bytes() == keys[1].encode()
        assert {row.path for row, _ in CacheIndex(rig.dir).evictable(9)} == {f"{FOLDER}/a/b", f"{FOLDER}/c"}
        for key in ("../x", "a/../../x", "a//b", "."):
            with pytest.raises(InvalidName):
                cache.open(rig.store.put(key, b""))


async def test_strays_of_a_lost_index_are_swept(rig: Rig) -> None:
    async with rig.mount() as cache:
        file = cache.open(rig.store.put("old", b"abc"))
        await file.fill()
        file.close()
    for name, mode in (("stray", 0o600), ("young", 0o600), ("theirs", 0o644)):
        rig.path(name).write_bytes(b"abc")
        rig.path(name).chmod(mode)
    # SQLite's last connection removes the log by its name, and that must not be the new index's.
    await until(lambda: not (rig.dir / "index.db-wal").exists())
    (rig.dir / "index.db").unlink()
    index = CacheIndex(rig.dir)
    real = os.lstat

    def aged(path: str) -> os.stat_result:
        found = list(real(path))
        if not path.endswith("young"):
            found[9] -= 3600
        return os.stat_result(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamfs.cache.sparse.os.lstat", aged)
        async with rig.mount():
            await until(lambda: index.swept(FOLDER))
    assert sorted(os.listdir(rig.path(""))) == ["theirs", "young"]


# ---- adopt and drop


async def test_an_imported_spool_file_is_the_cache_file(rig: Rig, tmp_path: Path) -> None:
    first, data = make_bytes(100, 1), make_bytes(BLOCK_SIZE + 100, 2)
    spool = tmp_path / "spool"
    async with rig.mount() as cache:
        reader = cache.open(rig.store.put("d/k", first))
        await reader.fill()
        mtime = rig.path("d/k").stat().st_mtime_ns
        spool.write_bytes(data)
        os.utime(spool, ns=(1, 1))
        revision = rig.store.put("d/k", data)
        fetched = len(rig.mover.fetches)
        with spool.open("r+b") as stream:
            assert cache.import_file(stream.fileno(), str(spool), revision)
        assert not spool.exists()
        file = cache.open(revision)
        assert file.read_now(0, len(data)) == data
        assert reader.read_now(0, 100) == first
        assert rig.path("d/k").stat().st_mtime_ns >= mtime
        assert rig.path("d/k").stat().st_mode & 0o777 == 0o600
        assert len(rig.mover.fetches) == fetched
        assert cache.stats()["cached_bytes"] == len(data)
        file.close()
        reader.close()
    async with rig.mount() as cache:
        file = cache.open(revision)
        assert await file.read(0, len(data)) == data
        assert len(rig.mover.fetches) == fetched
        file.close()


async def test_importing_over_a_file_that_is_being_read(rig: Rig, tmp_path: Path) -> None:
    data = make_bytes(2 * BLOCK_SIZE)
    revision = rig.store.put("k", data)
    spool = tmp_path / "spool"
    spool.write_bytes(data)
    async with rig.mount() as cache:
        reader = cache.open(revision)
        await reader.read(0, 10)
        with spool.open("r+b") as stream:
            assert cache.import_file(stream.fileno(), str(spool), revision)
        assert await reader.read(0, len(data)) == data
        reader.close()
        file = cache.open(revision)
        assert file.read_now(0, len(data)) == data
        file.close()


async def test_what_cannot_be_imported_stays(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = rig.store.put("k", b"abc")
    spool, other = tmp_path / "spool", tmp_path / "other"
    spool.write_bytes(b"abc")
    other.write_bytes(b"abc")

    def rename(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    async with rig.mount() as cache:
        with spool.open("r+b") as stream:
            assert not cache.import_file(stream.fileno(), str(other), revision)
            assert not cache.import_file(stream.fileno(), str(tmp_path / "nowhere"), revision)
            assert not cache.import_file(stream.fileno(), str(spool), rig.store.put("k2", b"longer"))
            with monkeypatch.context() as patch:
                patch.setattr("os.rename", rename)
                assert not cache.import_file(stream.fileno(), str(spool), revision)
            assert spool.read_bytes() == b"abc"
            assert not rig.path("k").exists()
            assert cache.stats()["cached_bytes"] == 0
            assert cache.import_file(stream.fileno(), str(spool), revision)


async def test_dropping_an_object_keeps_its_readers(rig: Rig) -> None:
    data = make_bytes(2 * BLOCK_SIZE)
    revision = rig.store.put("k", data)
    async with rig.mount() as cache:
        reader = cache.open(revision)
        await reader.read(0, 10)
        cache.drop("k")
        assert not rig.path("k").exists()
        assert cache.stats()["cached_bytes"] == 0
        assert await reader.read(0, len(data)) == data
        assert cache.stats()["cached_bytes"] == 0
        file = cache.open(revision)
        assert file is not reader
        assert await file.read(0, 10) == data[:10]
        reader.close()
        assert file.read_now(0, 10) == data[:10]
        file.close()
        cache.drop("k")
        cache.drop("never-there")
        assert not rig.path("k").exists()


# ---- local storage


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    (tmp_path / "root").mkdir()
    return LocalStore(StorageConfig(str(tmp_path / "root")))


@contextlib.asynccontextmanager
async def local_cache(local: LocalStore, tmp_path: Path) -> AsyncIterator[tuple[BlockCache, FakeMover]]:
    mover = FakeMover()
    cache = BlockCache(local, mover, CacheIndex(tmp_path / "cache"), tmp_path / "cache", limit_bytes=1 << 30)
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        yield cache, mover
        nursery.cancel_scope.cancel()


def put_local(local: LocalStore, key: str, data: bytes) -> Revision:
    return Revision(content_of(data), key, local.put_bytes(key, data).etag)


@pytest.mark.parametrize("size", SIZES)
async def test_local_files_are_read_in_place_and_verified_once(local: LocalStore, tmp_path: Path, size: int) -> None:
    data = make_bytes(size)
    revision = put_local(local, "d/k", data)
    async with local_cache(local, tmp_path) as (cache, mover):
        file = cache.open(revision)
        assert await file.read(0, size + 1, whole=True) == data
        assert file.read_now(0, size) == data
        assert os.fstat(await file.fill()).st_ino == os.stat(f"{local.root}/d/k").st_ino
        assert len({block for _, block in mover.verifies}) == len(mover.verifies)
        file.close()
        assert not cache.import_file(file.fd(), f"{local.root}/d/k", revision)
    assert not mover.fetches
    assert not (tmp_path / "cache" / local.cache_name).exists()


async def test_a_replaced_local_file_stays_readable_and_is_then_stale(local: LocalStore, tmp_path: Path) -> None:
    first = make_bytes(BLOCK_SIZE + 1, 1)
    old = put_local(local, "k", first)
    async with local_cache(local, tmp_path) as (cache, _):
        reader = cache.open(old)
        await reader.read(0, 10)
        new = put_local(local, "k", b"new")
        assert await reader.read(0, len(first)) == first
        file = cache.open(new)
        assert await file.read(0, 10) == b"new"
        file.close()
        again = cache.open(old)
        assert again is reader
        again.close()
        reader.close()
        cache.drop("k")
        with pytest.raises(ObjectChanged):
            cache.open(old)
        local.delete(["k"])
        cache.drop("k")
        with pytest.raises(ObjectMissing):
            cache.open(new)


@pytest.mark.parametrize("size", [1000, BLOCK_SIZE])
@pytest.mark.parametrize(("keep_times", "expected"), [(True, DamagedData), (False, ObjectChanged)])
async def test_wrong_bytes_in_a_local_file(
    local: LocalStore,
    tmp_path: Path,
    size: int,
    keep_times: bool,
    expected: type[StorageError],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = make_bytes(size)
    revision = put_local(local, "k", data)
    path = f"{local.root}/k"
    before = os.stat(path)
    async with local_cache(local, tmp_path) as (cache, _):
        file = cache.open(revision)
        with open(path, "r+b") as stream:
            stream.write(bytes([data[0] ^ 1]))
        if keep_times:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(expected):
            await file.read(0, 10)
        assert file.read_now(0, 10) is None
        file.close()
        assert cache.stats()["damaged"] == 1
    assert (f"{local.root}/k" in caplog.text and revision.etag in caplog.text) == keep_times


async def test_reading_by_chance(rig: Rig) -> None:
    """Many tasks, many revisions, random reads, closes, drops and deletions: every byte is right."""
    import random

    random_ = random.Random(7)
    sizes = [random_.choice([0, 10, BLOCK_SIZE, 2 * BLOCK_SIZE + 9, 5 * BLOCK_SIZE]) for _ in range(12)]
    bodies = {f"k{number}": make_bytes(size, number) for number, size in enumerate(sizes)}
    revisions = {key: rig.store.put(key, data) for key, data in bodies.items()}
    actions: list[Callable[[], object]] = []
    async with rig.mount(prefetch=4, limit=20 * BLOCK_SIZE) as cache:
        actions += [lambda: cache.drop("k3"), lambda: shutil.rmtree(rig.dir, ignore_errors=True)]

        async def worker() -> None:
            for _ in range(25):
                key = random_.choice(list(bodies))
                data = bodies[key]
                file = cache.open(revisions[key])
                try:
                    for _ in range(4):
                        offset, length = random_.randrange(len(data) + 1), random_.choice([1, 4096, 1 << 20])
                        with trio.move_on_after(random_.choice([0.0, 10.0])):
                            got = file.read_now(offset, length)
                            if got is None:
                                got = await file.read(offset, length, whole=random_.random() < 0.5)
                            assert got == data[offset : offset + length]
                finally:
                    file.close()
                if random_.random() < 0.05:
                    random_.choice(actions)()

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(worker)
        await trio.testing.wait_all_tasks_blocked()
        assert all(file.refs == 0 for etags in cache._files.values() for file in etags.values())
