"""Small new files are stored many at a time, after whoever makes them."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import trio

from lamfs.errors import LamfsError, StorageError, StorageUnavailable
from lamfs.model import ROOT_INO
from lamfs.work import debounce
from tests.support.clock import run_jumping
from tests.support.fsbox import Box, User
from tests.unit.fs.conftest import MakeBox

FILES = 48


def live(box: Box, scenario: Any) -> None:
    """Run ``scenario(user)`` on a file system, and compare everything with the model afterwards."""
    user = User()
    box.run(scenario, user)
    box.check(user)


async def make(user: User, count: int = FILES) -> None:
    for number in range(count):
        await user.write_file(f"f{number}", b"%d" % number * 100)


def test_a_batch_is_two_transactions(make_box: MakeBox) -> None:
    """48 files are six batches of eight jobs: the announcements, and what became of them, are one transaction each."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        await make(user)
        user.fs.context.uploader._hurry += 1
        begun = len(box.steps)
        await user.sync()
        steps = box.steps[begun:]
        assert steps.count("after put") == FILES
        assert steps.count("commit") <= 2 * 8 + 4

    live(box, scenario)


def test_a_file_of_a_batch_is_looked_at_once(make_box: MakeBox) -> None:
    """Its key and its artifact are looked up once to announce the object, and once to commit it; its seal is looked up
    once, and noted once."""
    box = make_box("s3")
    statements: list[str] = []

    async def scenario(user: User) -> None:
        await make(user)
        user.fs.context.uploader._hurry += 1
        user.fs.context.registry.db.conn.set_trace_callback(statements.append)
        await user.sync()
        user.fs.context.registry.db.conn.set_trace_callback(None)

    live(box, scenario)
    asked = [text for text in statements if not text.startswith("--")]  # not what triggers do
    for words, most in (("FROM dentry WHERE ino", 2), (" seal", 2), ("FROM artifact WHERE ino", 3)):
        count = sum(words in text for text in asked)
        assert count <= most * FILES, (words, count)


def test_equal_bytes_are_copied_and_replaced_files_are_stored_alone(make_box: MakeBox) -> None:
    """What is in storage is copied there, and an artifact that is replaced keeps its uid."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        await make(user, 3)
        await user.sync()
        uids = {record.key: record.uid for record in user.fs.context.registry.artifacts.filter()}
        await user.write_file("f0", b"new")
        await user.write_file("copy", b"1" * 100)
        await user.write_file("f9", b"another")
        await user.sync()
        assert box.steps.count("after copy") == 1
        now = {record.key: record.uid for record in user.fs.context.registry.artifacts.filter()}
        assert now.items() >= uids.items()

    live(box, scenario)


def test_one_that_fails_does_not_keep_the_others_from_being_stored(make_box: MakeBox) -> None:
    box = make_box("s3")

    async def scenario(user: User) -> None:
        uploader = user.fs.context.uploader
        uploader._limit = 1
        tries: list[str] = []

        def failing(op: str, key: str) -> LamfsError | None:
            tries.append(key)
            return StorageError("refused") if key in tries[1:2] and tries.count(key) < 3 else None

        user.mover.failing = failing
        await make(user, 5)
        await user.sync()
        assert len(set(tries[:5])) == 5
        assert sorted(tries.count(key) for key in set(tries)) == [1, 1, 1, 1, 3]
        assert uploader.failed_tries == 2
        assert not uploader.puts.alone

    live(box, scenario)


def test_an_outage_leaves_batches_whole(make_box: MakeBox) -> None:
    """What could not be stored because storage was away is stored in batches again."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        user.mover.failing = lambda op, key: StorageUnavailable("away")
        await make(user, 20)
        uploader = user.fs.context.uploader
        with trio.move_on_after(0.3):
            await user.fs.sync_all()
        with trio.fail_after(10):
            while uploader.failed_tries < 20 or uploader.puts.uploads:  # what is under way is nobody's yet
                await trio.sleep(0.001)
        assert not uploader.puts.alone
        user.mover.failing = lambda op, key: None
        await user.sync()

    live(box, scenario)


def test_who_waits_for_one_file_does_not_wait_for_others(make_box: MakeBox) -> None:
    box = make_box("s3")

    async def scenario(user: User) -> None:
        user.fs.context.uploader._limit = 1
        await make(user, 4)
        opened = await user.create("urgent")
        await user.pwrite(opened, b"urgent", 0)
        await user.fsync(opened)
        assert len(box.store.objects) == 1
        await user.close(opened)

    live(box, scenario)


def test_uploads_wait_while_many_files_are_made(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for those that somebody waits for."""
    monkeypatch.setattr(debounce, "QUIET", 600.0)
    monkeypatch.setattr(debounce, "WAIT", 600.0)
    box = make_box("s3")

    async def scenario(user: User) -> None:
        puts = user.fs.context.uploader.puts
        await make(user)
        await trio.sleep(50)
        assert puts.stored_files == 0
        opened = await user.create("urgent")
        await user.pwrite(opened, b"urgent", 0)
        await user.fsync(opened)
        assert puts.stored_files == 1
        await user.close(opened)
        await trio.sleep(50)
        assert puts.stored_files == 1
        await user.sync()
        assert puts.stored_files == FILES + 1

    live(box, scenario)


def test_uploads_wait_while_new_files_are_opened(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debounce, "QUIET", 0.5)
    box = make_box("s3")

    async def scenario(user: User) -> None:
        puts = user.fs.context.uploader.puts
        await make(user)
        until = trio.current_time() + 0.8
        while trio.current_time() < until:
            await user.close(await user.open("f1", os.O_RDONLY))
            await trio.sleep(0.01)
        user.fs.releasedir(user.fs.opendir(ROOT_INO))
        await trio.sleep(0.1)
        assert puts.stored_files == 0
        with trio.fail_after(10):
            while puts.stored_files < FILES:
                await trio.sleep(0.01)

    live(box, scenario)


def test_files_that_are_opened_make_uploads_wait_after_many_were_made_only() -> None:
    async def main() -> None:
        burst = debounce.Debounce()
        inodes = itertools.count(1)
        for _ in range(debounce.MANY - 1):
            burst.closed(next(inodes))
            burst.opened()
        assert burst.pause() == 0.0
        burst.closed(next(inodes))
        waited = 0.0
        while burst.pause():
            await trio.sleep(debounce.QUIET / 2)
            waited += debounce.QUIET / 2
            burst.opened()
        assert waited == pytest.approx(debounce.WAIT, abs=debounce.QUIET)
        await trio.sleep(debounce.QUIET * 1.01)
        burst.opened()
        assert burst.pause() == 0.0

    run_jumping(main)


def test_how_long_uploads_wait() -> None:
    """As long as files are closed one after the other, and for WAIT at most; then again once all are stored."""

    async def main() -> None:
        burst = debounce.Debounce()
        inodes = itertools.count(1)
        for _ in range(debounce.MANY - 1):
            burst.closed(next(inodes))
        burst.closed(debounce.MANY - 1)  # the last one again
        assert burst.pause() == 0.0
        burst.closed(next(inodes))
        assert 0.0 < burst.pause() <= debounce.QUIET
        waited = 0.0
        while burst.pause():
            await trio.sleep(debounce.QUIET / 2)
            waited += debounce.QUIET / 2
            burst.closed(next(inodes))
        assert waited == pytest.approx(debounce.WAIT, abs=debounce.QUIET)
        burst.closed(next(inodes))
        assert burst.pause() == 0.0
        burst.drained()
        assert burst.pause() > 0.0
        await trio.sleep(debounce.QUIET * 1.01)
        assert burst.pause() == 0.0
        burst.closed(next(inodes))
        assert burst.pause() == 0.0

    run_jumping(main)


def test_what_is_written_before_a_put_has_its_turn_is_not_in_it(make_box: MakeBox) -> None:
    """A put begins when the loop comes to it: who writes the file in between writes the next version."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        uploader = user.fs.context.uploader
        guard, opened = uploader._guard, []

        async def late(job: Any, entries: Any) -> None:
            if not opened:
                opened.append(await user.open("f"))
                await user.pwrite(opened[0], b"half", 0)
            await guard(job, entries)

        uploader._guard = late  # type: ignore[method-assign]
        await user.write_file("f", b"whole")
        while not uploader.puts.stored_files:
            await trio.sleep(0.01)
        assert list(box.store.objects.values()) == [b"whole"]
        await user.pwrite(opened[0], b"the other whole", 0)
        await user.close(opened[0])
        await user.sync()
        assert list(box.store.objects.values()) == [b"the other whole"]

    live(box, scenario)
