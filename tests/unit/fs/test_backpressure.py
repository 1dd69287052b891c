"""The spool's limit: writers wait for the uploader, and fail only when nothing can make room."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from lamfs.errors import FsError, StorageUnavailable
from lamfs.fs import backpressure
from tests.support.fsbox import Box, User
from tests.unit.fs.conftest import MakeBox

MIB = 1 << 20


async def write_files(user: User, count: int) -> None:
    for number in range(count):
        await user.write_file(f"f{number}", os.urandom(MIB // 4))


def limited(make_box: MakeBox, limit: int, kind: str = "s3") -> Box:
    box = make_box(kind)
    box.policy.spool_limit = limit
    box.policy.spool_free = 0
    return box


def test_writers_wait_for_the_uploader_at_the_limit(make_box: MakeBox) -> None:
    """While storage is away nobody writes beyond the limit; when it is back, the writer goes on by itself."""
    box = limited(make_box, MIB)
    peak = 0

    async def scenario(user: User) -> None:
        nonlocal peak
        user.mover.failing = lambda op, key: StorageUnavailable("away") if op == "put" else None
        waiting = user.fs.spooling.back_pressure
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_files, user, 16)
            with trio.fail_after(5):
                while not waiting.waiting:
                    await trio.sleep(0.01)
            peak = user.fs.context.spool.allocated()
            user.mover.failing = lambda op, key: None
        await user.sync()
        await user.compare()

    user = User()
    box.run(scenario, user)
    assert MIB // 2 < peak <= 1.25 * MIB
    box.check(user)


def test_who_waits_for_absent_storage_gets_eio_in_the_end(make_box: MakeBox) -> None:
    """Nothing that was acknowledged is lost by it."""
    box = limited(make_box, MIB)
    box.policy.timeout = 0.5

    async def scenario(user: User) -> None:
        user.mover.failing = lambda op, key: StorageUnavailable("away") if op == "put" else None
        with pytest.raises(FsError) as caught:
            await write_files(user, 16)
        assert caught.value.errno == errno.EIO
        for opened in list(user.handles):
            await user.close(opened)
        user.mover.failing = lambda op, key: None
        await user.sync()
        await user.compare()

    user = User()
    box.run(scenario, user)
    box.check(user)


def test_a_file_larger_than_the_limit_can_be_written(make_box: MakeBox) -> None:
    """There is nothing to wait for: it cannot be stored before it is closed."""
    box = limited(make_box, MIB)

    async def scenario(user: User) -> None:
        opened = await user.create("big")
        for number in range(24):
            await user.pwrite(opened, os.urandom(MIB // 4), number * MIB // 4)
        await user.close(opened)
        await user.sync()
        await user.compare()

    user = User()
    box.run(scenario, user)
    box.check(user)


def test_a_full_disk_is_enospc_only_when_nothing_drains(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    box = limited(make_box, 1 << 30)

    async def scenario(user: User) -> None:
        await user.write_file("old", b"x" * 100)
        await user.sync()
        user.mover.hold = "put"
        await user.write_file("owed", b"y" * 100)
        await user.mover.held.wait()
        opened = await user.create("new")
        monkeypatch.setattr(backpressure, "RESERVE", 1 << 60)
        user.fs.spooling.back_pressure._left = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(user.pwrite, opened, b"z" * 100, 0)
            with trio.fail_after(5):
                while not user.fs.spooling.back_pressure.waiting:
                    await trio.sleep(0.01)
            monkeypatch.undo()
            user.mover.release.set()
        await user.close(opened)
        await user.sync()
        await user.compare()

    user = User()
    box.run(scenario, user)
    box.check(user)
