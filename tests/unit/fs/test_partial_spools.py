"""Partial spools: a large artifact that is changed a little, crashed at any step; what is fetched and what is sent."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from lamfs import hashing
from lamfs.errors import StorageUnavailable
from lamfs.fs import partial
from lamfs.model import BLOCK_SIZE
from lamfs.ops import recover
from lamfs.registry import Registry
from lamfs.work import patches
from tests.support.fsbox import Box, Crash, User
from tests.unit.fs.conftest import MakeBox

MIB = 1 << 20
EVERY = 1 if "LAMFS_SOAK" in os.environ else 12
BIG = random.Random(1).randbytes(5 * BLOCK_SIZE + 3 * MIB)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than 1 MiB are large: their hash is over the first and the last of it."""
    monkeypatch.setattr(partial, "ABOVE", MIB)
    monkeypatch.setattr(partial, "WRITES", 4)
    monkeypatch.setattr(hashing, "MD5_MAX", MIB)
    monkeypatch.setattr(patches, "MD5_MAX", MIB)


async def store_big(user: User) -> None:
    await user.write_file("big.bin", BIG)
    await user.sync()


async def patch(user: User) -> None:
    """Across the border of two blocks; then once more."""
    await store_big(user)
    for offset in (2 * BLOCK_SIZE - 50, 4 * BLOCK_SIZE + 7):
        opened = await user.open("big.bin")
        await user.pwrite(opened, b"patched" * 20, offset)
        await user.pread(opened)
        await user.close(opened)
        await user.sync()


async def patch_during_upload(user: User) -> None:
    """The upload of a changed file is under way when it is changed again, by another handle."""
    await store_big(user)
    user.mover.hold = "complete_upload"
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"one", 9 * MIB)
    await user.close(opened)
    await user.mover.held.wait()
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"two", 17 * MIB)
    await user.pread(opened)
    await user.close(opened)
    user.mover.release.set()
    await user.sync()
    opened = await user.open("big.bin", os.O_RDONLY)
    await user.pread(opened)
    await user.close(opened)


async def grown_during_upload(user: User) -> None:
    """The upload of a file that has grown is under way when what is new in it is written again."""
    await store_big(user)
    user.mover.hold = "complete_upload"
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"one", len(BIG) + 2 * BLOCK_SIZE)
    await user.close(opened)
    await user.mover.held.wait()
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"two", len(BIG) + 2 * BLOCK_SIZE)
    await user.close(opened)
    user.mover.release.set()
    await user.sync()
    opened = await user.open("big.bin", os.O_RDONLY)
    await user.pread(opened)
    await user.close(opened)


async def stored_while_it_is_copied(user: User) -> None:
    """A write during an upload needs a copy of the spool file; when that is made, the upload has ended."""
    await store_big(user)
    mover, uploader = user.mover, user.fs.context.uploader
    mover.hold = "complete_upload"
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"one", 9 * MIB)
    await user.close(opened)
    await mover.held.wait()
    clone = mover.clone

    async def slow(src: str, dst: str) -> None:
        await clone(src, dst)
        mover.release.set()
        while uploader.puts.uploads:
            await trio.lowlevel.checkpoint()

    mover.clone = slow  # type: ignore[method-assign]
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"two", 17 * MIB)
    await user.close(opened)
    mover.clone = clone  # type: ignore[method-assign]
    await user.sync()
    assert user.fs.context.spool.names() == []


async def cut_and_grow(user: User) -> None:
    await store_big(user)
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"tail", len(BIG) + 3 * MIB)
    await user.close(opened)
    opened = await user.open("big.bin")
    await user.ftruncate(opened, 3 * BLOCK_SIZE - 5)
    await user.ftruncate(opened, 4 * BLOCK_SIZE + 5)
    await user.pread(opened)
    await user.close(opened)
    await user.sync()
    opened = await user.open("big.bin")
    await user.ftruncate(opened, 4 * BLOCK_SIZE + 9)
    await user.close(opened)
    await user.rename("big.bin", "other.bin")
    await user.sync()


async def pieces_of_a_block(user: User) -> None:
    """Many small writes to one block, over each other, at both its ends, over the end of the file, and cuts."""
    await store_big(user)
    opened = await user.open("big.bin")
    start = 2 * BLOCK_SIZE
    for offset in (start + 5000, start + 5007, start - 3, start + BLOCK_SIZE - 4, len(BIG) - 2, len(BIG) + 900):
        await user.pwrite(opened, b"patched", offset)
        await user.pread(opened)
    await user.close(opened)
    opened = await user.open("big.bin")
    await user.ftruncate(opened, len(BIG) + 2 * BLOCK_SIZE)
    await user.pwrite(opened, bytes(BLOCK_SIZE), BLOCK_SIZE)
    await user.ftruncate(opened, start + 5005)
    await user.ftruncate(opened, start + 5020)
    await user.pread(opened)
    await user.close(opened)
    await user.sync()
    opened = await user.open("big.bin")
    for number in range(5):
        await user.pwrite(opened, b"again", BLOCK_SIZE + 9 * number)
    await user.pread(opened)
    await user.close(opened)
    await user.sync()


async def the_same_block_during_upload(user: User) -> None:
    """The upload of a changed block waits for the rest of it when that block is changed again; then it is stored, but
    the registry is not told before the second change is closed."""
    await store_big(user)
    mover = user.mover
    user.fs.context.cache.drop(user.revision("big.bin").object_key)
    fetch, asked, go = mover.fetch, trio.Event(), trio.Event()

    async def slow(*args: Any, **options: Any) -> None:
        asked.set()
        await go.wait()
        await fetch(*args, **options)

    mover.fetch = slow  # type: ignore[method-assign]
    mover.hold = "complete_upload"
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"one", 9 * MIB)
    await user.close(opened)
    await asked.wait()
    opened = await user.open("big.bin")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(user.pwrite, opened, b"two", 9 * MIB + 100)
        await trio.testing.wait_all_tasks_blocked()
        go.set()
    await user.close(opened)
    await mover.held.wait()
    mover.release.set()
    await user.sync()


async def unlink_while_open(user: User) -> None:
    """The base goes while somebody still reads and writes the changed file."""
    await store_big(user)
    opened = await user.open("big.bin")
    await user.pwrite(opened, b"patched", 9 * MIB)
    await user.write_file("new.bin", b"another one")
    await user.rename("new.bin", "big.bin")
    await user.sync()
    await user.pread(opened)
    await user.pwrite(opened, b"patched", 17 * MIB)
    await user.pread(opened)
    await user.close(opened)
    await user.sync()


async def written_by_an_open_handle(user: User) -> None:
    """fsync stores, and the handle goes on writing."""
    await store_big(user)
    opened = await user.open("big.bin")
    for number in range(3):
        await user.pwrite(opened, b"patched", (3 + 6 * number) * MIB)
        await user.fsync(opened)
        await user.pread(opened)
    await user.close(opened)
    await user.sync()


SCENARIOS = [
    patch,
    patch_during_upload,
    grown_during_upload,
    stored_while_it_is_copied,
    cut_and_grow,
    pieces_of_a_block,
    the_same_block_during_upload,
    unlink_while_open,
    written_by_an_open_handle,
]


@pytest.mark.no_cover
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_crash_at_many_steps(scenario: object, make_box: MakeBox) -> None:
    """Crashed at any step, the next mount has everything that was acknowledged."""
    box: Box = make_box("s3")
    user = User()
    box.run(scenario, user)  # type: ignore[arg-type]
    steps = box.steps
    box.check(user)
    first = random.Random(len(steps)).randrange(EVERY)
    # storage has the change, and the registry does not know: what was changed since lies over neither
    hardest = min((at for at, step in enumerate(steps, 1) if step == "after complete_upload"), default=1)
    for crash_at in sorted({*range(first + 1, len(steps) + 1, EVERY), hardest, hardest + 1}):
        box, user = make_box("s3"), User()
        box.run(scenario, user, crash_at=crash_at)  # type: ignore[arg-type]
        done = list(box.steps)
        try:
            box.check(user)
        except BaseException as error:
            error.add_note(f"crashed at step {crash_at}: {done}")
            raise


@pytest.mark.parametrize(
    ("offset", "fetched"),
    [(9 * MIB, 2), (MIB - 4, 3), (len(BIG) - MIB, 1)],
    ids=["neither end", "the first MiB", "the last MiB"],
)
def test_what_the_hash_does_not_see_is_not_fetched_for_it(make_box: MakeBox, offset: int, fetched: int) -> None:
    """LaminDB's hash is over both ends. When these stay as they are it is what it was; the change is stored all the
    same. Else the other blocks of the end that changes are fetched, and of the last MiB if the first has changed."""
    fetches: list[str] = []

    def count(op: str, key: str) -> None:
        if op == "fetch":
            fetches.append(key)

    async def scenario(user: User) -> None:
        await store_big(user)
        artifacts = user.fs.context.registry.artifacts
        before = artifacts.by_uid(user.uid("big.bin"))
        assert before is not None
        user.fs.context.cache.drop(before.revision.object_key)
        user.mover.failing = count  # type: ignore[assignment]
        opened = await user.open("big.bin")
        await user.pwrite(opened, b"patched", offset)
        await user.close(opened)
        await user.sync()
        after = artifacts.by_uid(before.uid)
        assert after is not None
        assert (after.revision.content.hash == before.revision.content.hash) == (offset == 9 * MIB)
        (box.base / "stored").write_bytes(box.store.get(after.revision.object_key))
        whole = hashing.hash_file(box.base / "stored")
        assert (whole, whole.head) == (after.revision.content, after.revision.content.head)
        assert not after.revision.content.same_bytes(before.revision.content)

    box, user = make_box("s3"), User()
    box.run(scenario, user)
    assert len(fetches) == fetched
    box.check(user)


def test_changes_wait_for_nothing(make_box: MakeBox) -> None:
    """Storage is away: what is not cached is changed, appended to, and closed. What is written whole is not fetched."""
    fetches: list[int] = []

    def away(op: str, key: str) -> StorageUnavailable | None:
        return StorageUnavailable("away") if op == "fetch" else None

    def count(op: str, key: str) -> None:
        if op == "fetch":
            fetches.append(1)

    async def scenario(user: User) -> None:
        await store_big(user)
        user.fs.context.cache.drop(user.revision("big.bin").object_key)
        user.mover.failing = away
        opened = await user.open("big.bin")
        await user.pwrite(opened, b"patched" * 1000, 9 * MIB + 5)
        await user.pwrite(opened, b"patched", len(BIG))
        await user.pwrite(opened, bytes(BLOCK_SIZE), 3 * BLOCK_SIZE)
        await user.close(opened)
        user.mover.failing = count  # type: ignore[assignment]
        await user.sync()

    box, user = make_box("s3"), User()
    box.run(scenario, user)
    assert len(fetches) == 3  # the rest of blocks 2 and 5, and 4, which is too short to be copied; not block 3
    box.check(user)


def test_a_cut_that_fails_has_cut_nothing(make_box: MakeBox) -> None:
    """The block that the cut goes through cannot be fetched: the file stays as it is, and nothing stays behind."""

    def empty_cache() -> None:
        for found in box.store.list():
            user.fs.context.cache.drop(found.key)

    async def scenario(user: User) -> None:
        await store_big(user)
        empty_cache()
        opened, reader = await user.open("big.bin"), await user.open("big.bin", os.O_RDONLY)
        user.mover.failing = lambda op, key: StorageUnavailable("away") if op == "fetch" else None
        with pytest.raises(StorageUnavailable):
            await user.fs.files.truncate(user.find("big.bin"), 3 * BLOCK_SIZE - 5)
        user.mover.failing = lambda op, key: None
        await user.pread(reader)
        await user.pwrite(opened, b"patched", 9)
        await user.close(opened)
        await user.close(reader)
        await user.sync()
        empty_cache()
        opened = await user.open("big.bin")
        user.mover.failing = lambda op, key: StorageUnavailable("away") if op == "fetch" else None
        with pytest.raises(StorageUnavailable):
            await user.fs.files.truncate(user.find("big.bin"), 3 * BLOCK_SIZE - 5)
        user.mover.failing = lambda op, key: None
        await user.close(opened)
        await user.sync()
        assert os.listdir(box.spool) == []

    box, user = make_box("s3"), User()
    box.run(scenario, user)
    box.check(user)


def test_what_was_written_counts_when_the_disk_has_lost_the_notes_of_it(
    make_box: MakeBox, caplog: pytest.LogCaptureFixture
) -> None:
    """The mount was killed, and the end of the work database's log is gone: the bytes are in the spool all the same."""

    async def change_and_die(user: User) -> None:
        await store_big(user)
        user.mover.failing = lambda op, key: StorageUnavailable("away")
        opened = await user.open("big.bin")
        for offset in (9 * MIB + 5, 2 * BLOCK_SIZE - 50, 3 * BLOCK_SIZE + 100):
            await user.pwrite(opened, b"patched\0with zeros" * 400, offset)
        await user.close(opened)
        raise Crash("killed")

    async def store(user: User) -> None:
        await user.sync()

    box, user = make_box("s3"), User()
    box.run(change_and_die, user)
    registry = Registry(box.base / "registry.lndb")
    (put,) = registry.journal.puts()
    kept = list(registry.partial_spools.ranges(put.src).items())[:1]
    registry.db.execute("DELETE FROM partial_spool")
    registry.partial_spools.add_ranges(put.src, dict(kept))
    registry.close()
    box.run(store, user)
    box.check(user)
    assert "'big.bin'" in caplog.text
    assert "count as written" in caplog.text


def test_finished_without_a_mount(make_box: MakeBox) -> None:
    """The mount died when storage had the change and before the registry knew of it, and a notebook finishes it."""

    async def change_and_die(user: User) -> None:
        await store_big(user)
        user.mover.hold = "complete_upload"
        opened = await user.open("big.bin")
        await user.pwrite(opened, b"patched", 9 * MIB)
        await user.ftruncate(opened, len(BIG) - BLOCK_SIZE)
        await user.close(opened)
        await user.mover.held.wait()
        raise Crash("killed")

    box, user = make_box("s3"), User()
    box.run(change_and_die, user)
    registry = Registry(box.base / "registry.lndb")
    settings = SimpleNamespace(spool_place=box.spool_place, mounts_dir=box.base / "mounts")
    instance = SimpleNamespace(
        registry=registry, store=box.store, settings=settings, user=lambda: None, prove=lambda: None
    )
    assert recover.finish_puts(instance, strict=True) == 1  # type: ignore[arg-type]
    recover.run_owed(instance, strict=True)  # type: ignore[arg-type]
    assert box.problems(registry) == []
    registry.close()
    box.check(user)
