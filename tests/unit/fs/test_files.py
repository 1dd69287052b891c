"""Open files: spool, uploads, errors and old revisions, one rule at a time."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from lamfs.errors import FsError, LamfsError, RegistryError, StorageUnavailable, TooLarge
from lamfs.fs import backpressure
from lamfs.fs.filesystem import Changes
from lamfs.fs.state import Spool
from lamfs.model import ROOT_INO
from lamfs.registry import Committed, Registry
from lamfs.registry.entries import Put
from lamfs.storage import base
from tests.support.fsbox import Box, User
from tests.support.timed import timed
from tests.unit.fs.conftest import MakeBox

Scenario = Callable[[User], Awaitable[None]]


@pytest.fixture(params=["s3", "local"])
def box(request: pytest.FixtureRequest, make_box: MakeBox) -> Box:
    return make_box(request.param)


def run(box: Box, scenario: Scenario) -> User:
    """Do a scenario to its end, and look at everything afterwards."""
    user = User()
    assert not box.run(scenario, user)
    box.check(user)
    return user


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.005)


def test_an_upload_reads_what_was_closed(box: Box) -> None:
    """A write during the upload goes to a copy; then both revisions are stored, the later one last."""

    async def scenario(user: User) -> None:
        user.mover.hold = "put"
        await user.write_file("a", b"first" * 1000)
        await user.mover.held.wait()
        objects = [stat for stat in box.store.list() if stat.size == 5000]
        assert len(objects) == 1
        opened = await user.open("a")
        await user.pwrite(opened, b"SECOND", 0)
        assert box.store.get(objects[0].key) == b"first" * 1000
        await user.pread(opened)
        user.mover.release.set()
        await user.close(opened)
        await user.sync()

    run(box, scenario)


def test_a_stored_spool_file_that_another_mount_has_ended_is_not_written(make_box: MakeBox) -> None:
    """The handle goes on with it after fsync; when it is gone, the writer is told as when the file was replaced."""

    async def scenario(user: User) -> None:
        files, context = user.fs.files, user.fs.context
        number, fino, _ = files.create(ROOT_INO, b"a", 0o644, os.O_RDWR, 0, 0)
        await files.write(number, 0, b"stored")
        await files.fsync(number)
        state = context.states[fino]
        assert state.spool is not None
        assert context.registry.journal.is_spent(state.spool.name)
        context.spool.unlink(state.spool.name, missing_ok=False)
        with pytest.raises(FsError) as refused:
            await files.write(number, 0, b"newer")
        assert refused.value.errno == errno.ESTALE
        assert context.registry.journal.put_of(state.ino) is None
        files.release(number)

    assert not make_box("s3").run(scenario, User())


def test_fsync_reports_a_failed_upload_and_close_does_not(box: Box) -> None:
    async def scenario(user: User) -> None:
        user.mover.failing = lambda op, key: StorageUnavailable("storage is away") if op == "put" else None
        await user.write_file("a", b"x")
        opened = await user.open("a")
        with pytest.raises(StorageUnavailable, match="away"):
            await user.fsync(opened)
        await user.pread(opened)
        failures = user.fs.context.uploader.failures
        assert "away" in failures[-1].error
        assert "a" in failures[-1].what
        user.mover.failing = lambda op, key: None
        await user.fsync(opened)
        assert user.uid("a")
        await user.close(opened)

    run(box, scenario)


def test_it_is_tried_again_without_being_asked(box: Box) -> None:
    async def scenario(user: User) -> None:
        tries = 0

        def failing(op: str, key: str) -> StorageUnavailable | None:
            nonlocal tries
            tries += 1
            return StorageUnavailable("not yet") if tries < 4 else None

        user.mover.failing = failing
        await user.write_file("a", b"x")
        await until(lambda: user.fs.context.registry.artifacts.count() == 1)
        assert tries == 4

    run(box, scenario)


@pytest.mark.parametrize("jump", [-86_400, 3600])
def test_a_clock_that_is_set_postpones_nothing(box: Box, jump: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for its next try, and what was closed just before, when the clock goes back a day or on an hour."""
    set_by = 0
    clock, clock_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: clock() + set_by)
    monkeypatch.setattr(time, "time_ns", lambda: clock_ns() + set_by * 10**9)

    async def scenario(user: User) -> None:
        nonlocal set_by
        user.mover.failing = lambda op, key: StorageUnavailable("not yet")
        await user.write_file("a", b"x")
        await until(lambda: user.fs.context.uploader.failures)
        user.mover.failing = lambda op, key: None
        await user.write_file("b", b"y")
        set_by = jump
        await until(lambda: user.fs.context.registry.artifacts.count() == 2)

    run(box, scenario)


def test_many_open_files_do_not_keep_one_from_fsync(box: Box) -> None:
    """Files that are closed and still open elsewhere wait for their writers; the fsync of another does not."""

    async def scenario(user: User) -> None:
        for number in range(300):
            opened = await user.create(f"f{number}")
            await user.pwrite(opened, b"x", 0)
            await user.fs.flush(opened.number)
            opened.node.acknowledged()
        last = await user.create("last")
        await user.pwrite(last, b"y", 0)
        with trio.fail_after(5):
            await user.fsync(last)
        assert user.fs.context.registry.artifacts.count() == 1
        for opened in list(user.handles):
            await user.close(opened)
        await user.sync()

    run(box, scenario)


def test_sync_of_a_directory_of_many_files_waits_for_some_at_a_time(box: Box) -> None:
    """A hundred thousand files must not be as many tasks; all of them are stored when it returns."""

    async def scenario(user: User) -> None:
        user.mover.hold = "put"
        await user.write_file("first", b"x")
        await user.mover.held.wait()
        for number in range(300):
            await user.write_file(f"f{number}", b"%d" % number)
        left: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(user.fs.files.sync_below, ROOT_INO, lambda *owed: left.append(owed))
            await until(lambda: left)
            assert trio.lowlevel.current_statistics().tasks_living < 150
            user.mover.release.set()
        assert user.fs.context.registry.artifacts.count() == 301
        assert left[0][0] > 250

    run(box, scenario)


def test_fsync_of_a_directory_does_not_wait_for_its_files(box: Box) -> None:
    async def scenario(user: User) -> None:
        user.mover.hold = "put"
        await user.write_file("a", b"x" * 100_000)
        await user.mover.held.wait()
        directory = user.fs.opendir(ROOT_INO)
        with trio.fail_after(5):
            await user.fs.fsyncdir(directory)
        user.fs.releasedir(directory)
        user.mover.release.set()

    run(box, scenario)


def test_what_storage_never_takes_is_owed_and_not_tried_again(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is written again."""

    async def scenario(user: User) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(base, "LARGEST_OBJECT", 99_999)
            await user.write_file("a", b"x" * 100_000)
            await user.fs.context.uploader.drain()
            (entry,) = user.fs.context.registry.journal.refused()
            assert entry.attempts == 1
            assert "more than a bucket takes" in (user.fs.refused() or "")
            with pytest.raises(TooLarge, match="more than a bucket takes"):
                await user.fs.files.store(entry.ino or 0)
            with pytest.raises(TooLarge, match="more than a bucket takes"):
                await user.fs.files.sync_below(ROOT_INO, lambda *owed: None)
        opened = await user.open("a")
        await user.pwrite(opened, b"y", 0)
        await user.close(opened)
        await user.sync()
        assert user.fs.refused() is None

    run(make_box("s3"), scenario)


def test_a_full_disk_is_told_to_the_writer_only(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier bytes stay, what was closed before is stored, and the file can be written again later."""

    async def scenario(user: User) -> None:
        await user.write_file("a", b"acknowledged")
        opened = await user.open("a")
        await user.pwrite(opened, b"A", 0)
        with monkeypatch.context() as patch:

            def full(self: Spool, offset: int, data: bytes) -> int:
                raise OSError(errno.ENOSPC, "full")

            patch.setattr(Spool, "write", full)
            with pytest.raises(OSError, match="full"):
                await user.fs.files.write(opened.number, 100, b"more")
        await user.close(opened)
        await user.sync()
        assert user.fs.context.registry.journal.entries() == []
        assert await user.read("a") == b"Acknowledged"
        await user.write_file("a", b"again")

    run(box, scenario)


def test_an_edit_that_fails_on_a_full_disk_is_no_edit(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write to a stored file fails: its row is not left open."""

    async def scenario(user: User) -> None:
        await user.write_file("a", b"stored")
        await user.sync()
        opened = await user.open("a")
        with monkeypatch.context() as patch:
            patch.setattr(backpressure, "RESERVE", 1 << 60)
            user.fs.spooling.back_pressure._left = 0
            if os.stat(box.spool).st_dev == os.stat(box.base).st_dev:
                with pytest.raises(OSError, match="space"):
                    await user.fs.files.write(opened.number, 0, b"x")
                with pytest.raises(OSError, match="space"):
                    user.fs.files.create(1, b"new", 0o644, os.O_RDWR, 0, 0)
        await user.close(opened)
        assert await user.read("a") == b"stored"
        await user.sync()

    run(box, scenario)


def test_a_registry_that_cannot_note_a_failure_ends_nothing(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(user: User) -> None:
        journal = user.fs.context.registry.journal
        failed = journal.failed
        noted = 0

        def full(*_: object) -> None:
            nonlocal noted
            noted += 1
            raise RegistryError("The disk is full.", errno=errno.ENOSPC)

        monkeypatch.setattr("lamfs.work.uploader.RETRY_UNNOTED", 0.01)
        journal.failed = full  # type: ignore[method-assign]
        user.mover.failing = lambda op, key: StorageUnavailable("away")
        await user.write_file("a", b"x")
        await until(lambda: noted > 2)
        journal.failed = failed  # type: ignore[method-assign]
        user.mover.failing = lambda op, key: None
        await user.sync()
        assert user.fs.context.registry.artifacts.count() == 1

    run(box, scenario)


def test_what_was_written_before_unlink_goes_to_the_trash(box: Box) -> None:
    async def scenario(user: User) -> None:
        await user.write_file("a", b"stored")
        await user.sync()
        uid = user.uid("a")
        opened = await user.open("a")
        await user.pwrite(opened, b"EDIT", 0)
        await user.unlink("a")
        await user.pwrite(opened, b"LATER", 0)
        await user.pread(opened)
        await user.close(opened)
        await user.sync()
        registry = user.fs.context.registry
        assert registry.journal.entries() == []
        trashed = registry.artifacts.by_uid(uid)
        assert trashed is not None
        assert box.store.get(trashed.revision.object_key) == b"EDITed"

    run(box, scenario)


def noted_size(registry: Registry, ino: int) -> int:
    """The bytes that a file has as the tree says."""
    noted = registry.tree.get(ino)
    assert noted is not None
    return noted.size


def test_the_trash_has_the_size_that_a_file_had_last(box: Box) -> None:
    """Also when that is what was stored last, and nothing is to be stored."""

    async def scenario(user: User) -> None:
        registry = user.fs.context.registry
        await user.write_file("a", b"")
        await user.sync()
        uid, ino = user.uid("a"), user.find("a")
        user.mover.failing = lambda op, key: StorageUnavailable("away")
        await user.write_file("a", b"x")
        opened = await user.open("a", os.O_RDONLY | os.O_TRUNC)
        assert noted_size(registry, ino) == 1
        await user.unlink("a")
        assert noted_size(registry, ino) == 0, "acknowledged with the name"
        await user.close(opened)
        user.mover.failing = lambda op, key: None
        await user.sync()
        trashed = registry.artifacts.by_uid(uid)
        assert trashed is not None
        assert (trashed.size, trashed.visibility) == (0, -1)

    run(box, scenario)


def test_bytes_that_are_stored_already_have_their_size(box: Box) -> None:
    """Whoever noted another one before."""

    async def scenario(user: User) -> None:
        registry = user.fs.context.registry
        await user.write_file("a", b"old")
        await user.sync()
        user.mover.failing = lambda op, key: StorageUnavailable("away")
        await user.write_file("a", b"longer")
        await user.write_file("a", b"old")
        ino = user.find("a")
        registry.tree.update(ino, size=6)
        user.mover.failing = lambda op, key: None
        await user.sync()
        assert noted_size(registry, ino) == 3

    run(box, scenario)


def test_the_bytes_of_the_trash_survive_who_had_them_open(box: Box) -> None:
    """Opened in the moment between the rename into a local storage and the commit, removed, closed."""

    async def scenario(user: User) -> None:
        await user.write_file("a", b"first")
        await user.sync()
        uid = user.uid("a")
        user.mover.hold = "put"
        await user.write_file("a", b"second")
        await user.mover.held.wait()
        opened = await user.open("a", os.O_RDONLY)
        await user.pread(opened)
        await user.unlink("a")
        user.mover.release.set()
        await until(lambda: not user.fs.context.registry.journal.entries())
        await user.pread(opened)
        await user.close(opened)
        trashed = user.fs.context.registry.artifacts.by_uid(uid)
        assert trashed is not None
        assert box.store.get(trashed.revision.object_key, etag=trashed.revision.etag) == b"second"

    run(box, scenario)


def test_an_object_is_never_written_in_place(make_box: MakeBox) -> None:
    """A spool file was renamed into the folder, and the mover died before it said so: a write goes to a copy."""
    box = make_box("local")

    async def scenario(user: User) -> None:
        opened = await user.create("a")
        await user.pwrite(opened, b"first", 0)
        reader = await user.open("a", os.O_RDONLY)
        await user.close(opened)
        user.mover.late = True
        user.mover.failing = lambda op, key: StorageUnavailable("died") if op == "put" else None
        await until(lambda: user.fs.context.uploader.failures)
        user.mover.failing = lambda op, key: None
        (stored,) = [stat for stat in box.store.list() if stat.size == 5]
        inode = os.stat(box.store.url(stored.key)).st_ino
        writer = await user.open("a")
        await user.pwrite(writer, b"WRITE", 0)
        for state in user.fs.context.states.values():
            assert state.spool is None or os.fstat(state.spool.fd).st_ino != inode
        await user.pread(reader)
        await user.close(writer)
        await user.close(reader)
        await user.sync()

    run(box, scenario)


def test_a_close_while_the_file_is_taken_loses_nothing(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written again between the decision to upload and the upload, closed before the file is renamed into the folder:
    the row counts one generation more than was stored, of the same file."""
    box = make_box("local")

    async def scenario(user: User) -> None:
        spooling, steps = user.fs.spooling, user.fs.context.uploader._steps
        freeze, hash_ = spooling.freeze, steps._hash
        opened = await user.create("a")
        await user.pwrite(opened, b"first", 0)

        def late_write(ino: int, src: str) -> None:
            monkeypatch.setattr(spooling, "freeze", freeze)
            state = user.fs.context.states[opened.fino]
            assert state.spool is not None
            spooling._begin_put(state, src)
            with opened.node.becoming(b"FIRST"):
                state.spool.write(0, b"FIRST")
            state.dirty = True
            freeze(ino, src)

        async def late_close(path: str, *base: Any) -> object:
            content = await hash_(path, *base)
            monkeypatch.setattr(steps, "_hash", hash_)
            await user.close(opened)
            return content

        monkeypatch.setattr(spooling, "freeze", late_write)
        monkeypatch.setattr(steps, "_hash", late_close)
        with trio.fail_after(5):
            await user.fs.sync_all()
        assert user.fs.context.registry.journal.entries() == []

    run(box, scenario)


def test_open_handles_keep_the_revision_they_opened(make_box: MakeBox) -> None:
    """The object is replaced and deleted under a reader who has not read it yet."""
    box = make_box("s3")

    async def write(user: User) -> None:
        await user.write_file("a.csv", b"old" * 100)
        await user.sync()

    user = User()
    box.run(write, user)

    async def read(user: User) -> None:
        import shutil

        shutil.rmtree(Path(box.cache_dir), ignore_errors=True)
        reader = await user.open("a.csv", os.O_RDONLY)
        await user.write_file("t.txt", b"new")
        await user.sync()
        await user.rename("t.txt", "a.csv")
        await user.sync()
        assert await user.fs.read(reader.number, 0, 1000) == b"old" * 100
        assert await user.read("a.csv") == b"new"
        await user.close(reader)

    box.run(read, user)
    box.check(user)


def test_a_new_file_whose_maker_died_at_once_is_empty(box: Box) -> None:
    """The name is in the registry, and the spool file was not made any more."""

    async def scenario(user: User) -> None:
        timed(user.fs.context.registry).names.create_file(1, "a", 0o100644, 0, 0)

    user = User()
    box.run(scenario, user)
    from tests.support.fsbox import Node

    user.tree["a"] = Node()
    box.check(user)


def test_attributes_of_a_file_that_is_being_written_are_saved_when_it_is_closed(box: Box) -> None:
    """As tar and cp -a set them: mode, owner and times one by one. Once nothing is to be acknowledged, at once."""

    async def scenario(user: User) -> None:
        registry, fs = user.fs.context.registry, user.fs
        opened = await user.create("a")
        await user.pwrite(opened, b"x" * 100, 0)
        fino = user.find("a")
        changes = registry.db.one("SELECT max(seq) FROM change")
        for step in (Changes(mode=0o640), Changes(uid=11, gid=12), Changes(atime_ns=13, mtime_ns=14)):
            shown = await fs.setattr(fino, step)
        assert registry.db.one("SELECT max(seq) FROM change") == changes
        assert fs.getattr(fino) == shown
        assert (shown.mode, shown.uid, shown.gid, shown.atime_ns, shown.mtime_ns) == (0o100640, 11, 12, 13, 14)
        await user.close(opened)
        saved = registry.tree.get(fino)
        assert saved is not None
        assert (saved.mode, saved.uid, saved.gid, saved.atime_ns, saved.mtime_ns) == (0o100640, 11, 12, 13, 14)
        assert saved.ctime_ns == shown.ctime_ns
        opened = await user.open("a")
        await fs.setattr(fino, Changes(mode=0o600))
        saved = registry.tree.get(fino)
        assert saved is not None
        assert saved.mode == 0o100600
        await user.close(opened)
        await user.sync()
        saved = registry.tree.get(fino)
        assert saved is not None
        assert saved.mode == 0o100600

    run(box, scenario)


def test_who_waits_for_a_version_is_not_told_of_the_one_before(make_box: MakeBox) -> None:
    """A version is stored that somebody waits for, and while that is made durable the next one is waited for."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        waits = user.fs.context.uploader._waits
        durable, calls = waits.durable, 0
        stored, release = trio.Event(), trio.Event()

        async def slow() -> None:
            nonlocal calls
            calls += 1
            if calls == 2:  # the registry says where the first version is, and nobody has been told
                stored.set()
                await release.wait()
            await durable()

        waits.durable = slow  # type: ignore[assignment]

        async def second() -> None:
            await user.fsync(two)
            assert list(box.store.objects.values())[-1] == b"second"

        one = await user.create("f")
        two = await user.open("f")
        await user.pwrite(one, b"first.", 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(user.fsync, one)
            await stored.wait()
            await user.pwrite(two, b"second", 0)
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            release.set()
        await user.close(one)
        await user.close(two)

    run(box, scenario)


def test_a_directory_is_read_from_where_another_handle_was(make_box: MakeBox) -> None:
    async def scenario(user: User) -> None:
        for name in ("a", "b", "c"):
            await user.write_file(name, name.encode())
        first = user.fs.opendir(ROOT_INO)
        found = [(cookie, name) for cookie, name, _, _ in user.fs.readdir(first, 0)]
        second = user.fs.opendir(ROOT_INO)
        assert [(cookie, name) for cookie, name, _, _ in user.fs.readdir(second, found[2][0])] == found[3:]

    run(make_box("local"), scenario)


def test_a_changed_file_is_stored_by_itself_at_once(make_box: MakeBox) -> None:
    """Only new files are stored in batches: the next version of one takes no turn there first."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        batches = user.fs.context.uploader._steps.batches
        put, turns = batches.put, 0

        async def count(entries: list[Put]) -> dict[int, Committed | LamfsError]:
            nonlocal turns
            turns += 1
            return await put(entries)

        batches.put = count  # type: ignore[method-assign]
        handle = await user.create("f")
        for number in range(3):
            await user.pwrite(handle, b"%d" % number, 0)
            await user.fsync(handle)
            assert list(box.store.objects.values())[-1] == b"%d" % number
        assert turns == 1
        await user.close(handle)

    run(box, scenario)


def test_a_file_that_only_another_machine_has(box: Box) -> None:
    """It was not stored when the registry was taken over: it is not empty, and can be replaced and removed."""

    async def scenario(user: User) -> None:
        fs = user.fs
        registry = fs.context.registry
        for name in ("a", "b"):
            inode = timed(registry).names.create(ROOT_INO, name, stat.S_IFREG | 0o644, 0, 0)
            registry.tree.update(inode.ino, size=100)
        found = fs.lookup(ROOT_INO, b"a")
        assert found is not None
        assert found[1].size == 100
        for flags in (os.O_RDONLY, os.O_RDWR):
            with pytest.raises(LamfsError, match="the machine that wrote it has it") as caught:
                await fs.open(found[0], flags)
            assert caught.value.errno == errno.EIO
        handle = await fs.open(found[0], os.O_RDWR | os.O_TRUNC)
        await fs.files.write(handle, 0, b"new")
        await fs.flush(handle)
        fs.release(handle)
        await fs.sync_all()
        assert await user.read("a") == b"new"
        timed(fs).names.unlink(ROOT_INO, b"b")
        assert fs.lookup(ROOT_INO, b"b") is None

    assert not box.run(scenario, User())
