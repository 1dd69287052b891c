"""Parts of a large file go to storage while it is written; what is written into them later is sent again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from lamfs import hashing
from lamfs.fs.filesystem import FileSystem
from lamfs.model import BLOCK_SIZE
from lamfs.work import multipart, steps, streaming
from tests.support.fsbox import Box, Open, User
from tests.support.transfer import make_bytes, until
from tests.unit.fs.conftest import MakeBox

BIG = make_bytes(4 * BLOCK_SIZE + 17, 3)
"""Five parts, of which three are sent before it is closed."""
FULL = [1, 2, 3, 4, 5]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one block, so that little data makes several."""
    monkeypatch.setattr(multipart, "MULTIPART_ABOVE", BLOCK_SIZE)
    monkeypatch.setattr(multipart, "PART_SIZE", BLOCK_SIZE)
    monkeypatch.setattr(multipart, "MIN_PART", BLOCK_SIZE)
    monkeypatch.setattr(streaming, "START", BLOCK_SIZE)
    monkeypatch.setattr(streaming, "BEHIND", BLOCK_SIZE)
    monkeypatch.setattr(streaming, "WAIT", 0.0)
    monkeypatch.setattr(hashing, "MD5_MAX", BLOCK_SIZE - 5)
    monkeypatch.setattr(steps, "MD5_MAX", BLOCK_SIZE - 5)


async def append(user: User, opened: Open, data: bytes) -> None:
    start = len(opened.node.data)
    for at in range(0, len(data), BLOCK_SIZE):
        await user.pwrite(opened, data[at : at + BLOCK_SIZE], start + at)


async def begin(box: Box, user: User, name: str = "a.bin", data: bytes = BIG) -> Open:
    """A file that is still open, and of which all but the last two parts are in storage."""
    opened = await user.create(name)
    await append(user, opened, data)
    await until(lambda: sorted(box.store.sent) == list(range(1, len(data) // BLOCK_SIZE)))
    return opened


def check_content(fs: FileSystem, key: str, data: bytes, folder: Path) -> None:
    """The artifact has the hashes that one pass over the whole file gives."""
    record = fs.context.registry.artifacts.by_key(key)
    assert record is not None
    (folder / "whole").write_bytes(data)
    whole = hashing.hash_file(folder / "whole")
    assert record.revision.content == whole
    for block, leaves in whole.leaves.items():
        assert fs.context.registry.artifacts.leaves(record.revision, block) == leaves


def test_parts_are_sent_and_hashed_once(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user)
        await user.close(opened)
        await user.sync()
        assert sorted(box.store.sent) == FULL
        assert sorted(user.mover.hashed) == [16777216 - BLOCK_SIZE, 16777216]  # those that were not sent before
        check_content(user.fs, "a.bin", BIG, box.base)

    box.run(scenario, user)
    box.check(user)


def test_a_part_that_is_written_into_is_sent_again(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user)
        await user.pwrite(opened, b"header", 7)
        await user.close(opened)
        await user.sync()
        assert sorted(box.store.sent) == [1, *FULL]
        assert sorted(user.mover.hashed) == [0, 16777216 - BLOCK_SIZE, 16777216]
        check_content(user.fs, "a.bin", BIG[:7] + b"header" + BIG[13:], box.base)

    box.run(scenario, user)
    box.check(user)


def test_a_part_that_is_written_into_while_it_is_sent(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        user.mover.hold = "send_part"
        opened = await user.create("a.bin")
        await append(user, opened, BIG)
        await user.mover.held.wait()
        held = box.store.sent[0]
        await user.pwrite(opened, b"changed", (held - 1) * BLOCK_SIZE + 100)
        user.mover.release.set()
        await user.close(opened)
        await user.sync()
        assert box.store.sent.count(held) == 2

    box.run(scenario, user)
    box.check(user)


def test_a_file_that_is_cut_and_grows_again(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user)
        await user.ftruncate(opened, BLOCK_SIZE + 3)
        await append(user, opened, BIG[: 2 * BLOCK_SIZE])
        await user.close(opened)
        await user.sync()
        assert box.store.sent.count(1) == 1
        check_content(user.fs, "a.bin", BIG[: BLOCK_SIZE + 3] + BIG[: 2 * BLOCK_SIZE], box.base)

    box.run(scenario, user)
    box.check(user)


@pytest.mark.parametrize("size", [0, 10, BLOCK_SIZE + 1])
def test_a_file_that_is_cut_for_good(make_box: MakeBox, size: int) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user)
        await user.ftruncate(opened, size)
        await user.close(opened)
        await user.sync()

    box.run(scenario, user)
    box.check(user)


def test_a_file_that_is_written_all_over(make_box: MakeBox) -> None:
    """Who writes at random is not sent early any more, and loses nothing."""
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user, data=BIG + BIG[:BLOCK_SIZE])
        for at in range(0, 5 * BLOCK_SIZE, BLOCK_SIZE // 2):
            await user.pwrite(opened, b"everywhere", at + 9)
        await user.close(opened)
        await user.sync()

    box.run(scenario, user)
    box.check(user)


def test_a_file_that_is_deleted_while_it_is_written(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user)
        await user.unlink("a.bin")
        await append(user, opened, BIG)
        await user.pread(opened)
        await user.close(opened)
        await user.sync()
        assert box.store.unfinished == {}

    box.run(scenario, user)
    box.check(user)


def test_a_file_that_gets_another_suffix_before_it_is_closed(make_box: MakeBox) -> None:
    """Its object is another one then: what was sent is dropped."""
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user)
        await user.rename("a.bin", "a.csv")
        await user.close(opened)
        await user.sync()
        assert sorted(box.store.sent) == sorted([1, 2, 3, *FULL])

    box.run(scenario, user)
    box.check(user)


def test_a_file_that_is_renamed_over_an_artifact(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        await user.write_file("b.bin", b"old")
        await user.sync()
        opened = await begin(box, user)
        await user.rename("a.bin", "b.bin")
        await user.close(opened)
        await user.sync()

    box.run(scenario, user)
    box.check(user)


def test_the_same_bytes_again(make_box: MakeBox) -> None:
    """What the artifact has already is not completed, and what was sent of it is dropped."""
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        await user.write_file("a.bin", BIG)
        await user.sync()
        before = list(box.store.objects.items())
        box.store.sent.clear()
        opened = await user.open("a.bin", os.O_RDWR | os.O_TRUNC)
        await append(user, opened, BIG)
        await until(lambda: sorted(box.store.sent) == [1, 2, 3])
        await user.close(opened)
        await user.sync()
        assert list(box.store.objects.items()) == before
        assert sorted(box.store.sent) == [1, 2, 3]

    box.run(scenario, user)
    box.check(user)


def test_a_file_that_is_written_on_after_fsync(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user)
        await user.fsync(opened)
        await append(user, opened, BIG)
        await user.fsync(opened)
        await append(user, opened, BIG[:BLOCK_SIZE])
        await user.close(opened)
        await user.sync()

    box.run(scenario, user)
    box.check(user)


def test_a_file_that_is_written_while_it_is_stored(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await begin(box, user)
        user.mover.hold = "send_part"
        await user.close(opened)
        await user.mover.held.wait()
        opened = await user.open("a.bin")
        await append(user, opened, BIG)
        user.mover.release.set()
        await user.close(opened)
        await user.sync()

    box.run(scenario, user)
    box.check(user)


@pytest.mark.parametrize("name", [".hidden", "a.tmp~"])
def test_files_that_are_to_be_renamed_are_not_sent_early(
    make_box: MakeBox, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        user.fs.context.registry.names._identity.scratch = lambda key: key.endswith("~")
        opened = await user.create(name)
        await append(user, opened, BIG)
        await trio.testing.wait_all_tasks_blocked()
        assert box.store.begun == 0
        await user.rename(name, "a.bin")
        await user.close(opened)
        await user.sync()

    box.run(scenario, user)
    box.check(user)


@pytest.mark.parametrize("step", ["begin_upload", "send_part", "late"])
def test_a_crash_while_it_is_written(make_box: MakeBox, step: str) -> None:
    """The next mount sends what storage lacks, after a look at what has become of the rest."""
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        opened = await user.create("a.bin")
        box.crash_at = 0
        await append(user, opened, BIG)
        if step == "late":
            await until(lambda: sorted(box.store.sent) == [1, 2, 3])
            await trio.testing.wait_all_tasks_blocked()
            await user.pwrite(opened, b"header", BLOCK_SIZE + 7)
            box.crash_at = len(box.steps) + 1
            await user.close(opened)
        else:
            user.mover.hold = step
            await user.mover.held.wait()
            box.crash_at = len(box.steps) + 1
            await user.close(opened)

    assert box.run(scenario, user)
    box.check(user)
    if step == "late":
        assert sorted(box.store.sent) == [1, 2, 2, 3, 4, 5]
