"""What readers of the core doubted: each test is one doubt that was right once."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from typing import Any, cast

import pytest
import trio
import trio.testing

from lamfs.errors import DamagedRegistry, FsError, LamfsError, TransferDied
from lamfs.fs.filesystem import FileSystem
from lamfs.fs.follow import Follower
from lamfs.fs.nodes import NodeTable
from lamfs.fs.state import Phase
from lamfs.keys import DRAFT, spool_name
from lamfs.model import BLOCK_SIZE, ROOT_INO, Inode
from lamfs.registry import Registry
from tests.support.clock import run_jumping
from tests.support.timed import timed
from tests.unit.fs.conftest import MakeBox


async def make(fs: FileSystem, name: bytes, data: bytes) -> int:
    """A stored file; its inode."""
    handle, fino, _ = fs.files.create(ROOT_INO, name, 0o644, os.O_RDWR, 0, 0)
    await fs.files.write(handle, 0, data)
    await fs.flush(handle)
    fs.release(handle)
    await fs.sync_all()
    return fino


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_writing_after_the_artifact_was_deleted_for_good_ends(make_box: MakeBox, kind: str) -> None:
    """The put of an inode that is gone is struck off: it neither starts over for ever, nor leaves an object."""
    box = make_box(kind)

    async def main() -> None:
        async with box.living() as fs:
            fino = await make(fs, b"f", b"one")
            handle = await fs.open(fino, os.O_RDWR)
            other = Registry(box.base / "registry.lndb")
            record = other.artifacts.by_ino(fino)
            assert record is not None
            timed(other).names.purge(record.uid, storage=False)
            other.close()
            await fs.files.write(handle, 0, b"two")
            await fs.flush(handle)
            fs.release(handle)
            with trio.fail_after(10):
                await fs.sync_all()
            assert fs.context.registry.journal.entries() == []
            assert [stat.key for stat in box.store.list()] == [record.revision.object_key]
            assert list(box.spool.iterdir()) == []

    run_jumping(main)


def test_a_queued_put_that_another_mount_took_over_is_left_to_it(make_box: MakeBox) -> None:
    """Mount A has read the row; then mount B writes the file: A must not read B's spool file, which B still writes."""
    box = make_box("s3")

    async def main() -> None:
        async with box.living() as fs:
            handle, fino, _ = fs.files.create(ROOT_INO, b"f", 0o644, os.O_RDWR, 0, 0)
            await fs.files.write(handle, 0, b"mine")
            await fs.flush(handle)
            fs.release(handle)
            registry, uploader = fs.context.registry, fs.context.uploader
            queued = registry.journal.put_of(fino)
            assert queued is not None
            uploader._queue.append(queued)
            me, registry.journal.owner = registry.journal.owner, "boot:1:1"
            theirs = spool_name(fino)
            (box.spool / theirs).write_bytes(b"half of what th")
            timed(registry).journal.begin_put(fino, theirs)
            timed(registry).journal.ready_put(fino)
            registry.journal.owner = me
            uploader.notify()
            await trio.sleep(60)
            left = registry.journal.put_of(fino)
            assert left is not None
            assert (left.src, left.owner) == (theirs, "boot:1:1")
            assert list(box.store.list()) == []

    run_jumping(main)


def test_a_write_outlives_the_moving_process(make_box: MakeBox) -> None:
    """It dies while it copies the spool file that the write needs: the copy is made by the next one."""
    box = make_box("s3")

    async def main() -> None:
        async with box.living() as fs:
            fino = await make(fs, b"f", b"x" * (BLOCK_SIZE + 1))
            mover: Any = fs.context.mover
            clone = mover.clone
            tries: list[str] = []

            async def dying(src: str, dst: str) -> None:
                tries.append(dst)
                await clone(src, dst)
                if len(tries) < 3:
                    raise TransferDied("killed")

            mover.clone = dying
            handle = await fs.open(fino, os.O_RDWR)
            await fs.files.write(handle, 0, b"y")
            assert len(tries) == 3
            assert os.listdir(box.spool) == [os.path.basename(path).removesuffix(DRAFT) for path in tries[2:]]
            await fs.flush(handle)
            fs.release(handle)

    run_jumping(main)


def test_fsync_outlives_the_moving_process(make_box: MakeBox) -> None:
    """It dies while it stores the file: that is no refusal of the storage."""
    box = make_box("s3")

    async def main() -> None:
        async with box.living() as fs:
            mover: Any = fs.context.mover
            tries: list[str] = []

            def failing(op: str, key: str) -> LamfsError | None:
                tries.append(op)
                return TransferDied("killed") if len(tries) < 3 else None

            mover.failing = failing
            handle, _, _ = fs.files.create(ROOT_INO, b"f", 0o644, os.O_RDWR, 0, 0)
            await fs.files.write(handle, 0, b"y")
            await fs.fsync(handle)
            assert tries == ["put"] * 3
            assert len(list(box.store.list())) == 1
            fs.release(handle)

    run_jumping(main)


def test_a_file_whose_next_upload_has_begun_stays_frozen(make_box: MakeBox) -> None:
    """An upload still syncs the registry's log when the next one of its file begins: its end is not that one's."""
    box = make_box("s3")

    async def main() -> None:
        async with box.living() as fs:
            uploader, mover = fs.context.uploader, cast(Any, fs.context.mover)
            durable, blocked, synced = uploader._waits.durable, trio.Event(), trio.Event()

            async def slow() -> None:
                if fs.context.registry.journal.put_of(fino) is None:  # stored, and the row struck off
                    blocked.set()
                    await synced.wait()
                await durable()

            uploader._waits.durable = slow  # type: ignore[assignment]
            handle, fino, _ = fs.files.create(ROOT_INO, b"f", 0o644, os.O_RDWR, 0, 0)
            await fs.files.write(handle, 0, b"one")
            await fs.flush(handle)
            fs.release(handle)
            await blocked.wait()
            mover.hold = "put"
            handle = await fs.open(fino, os.O_RDWR)
            await fs.files.write(handle, 0, b"two")
            await fs.flush(handle)
            fs.release(handle)
            await mover.held.wait()
            assert len(uploader.puts.uploads) == 2
            synced.set()
            while len(uploader.puts.uploads) == 2:
                await trio.sleep(0.001)
            handle = await fs.open(fino, os.O_RDWR)
            assert fs.files.handles[handle].state.phase is Phase.FROZEN
            fs.release(handle)
            mover.release.set()

    run_jumping(main)


@pytest.mark.parametrize("stored", [False, True])
def test_who_was_overtaken_by_another_mount_is_told_so(make_box: MakeBox, stored: bool) -> None:
    """It has the file open and has written to it when another mount writes it, closes it, and perhaps stores it."""
    box = make_box("s3")

    async def main() -> None:
        async with box.living() as fs:
            handle, fino, _ = fs.files.create(ROOT_INO, b"f", 0o644, os.O_RDWR, 0, 0)
            await fs.files.write(handle, 0, b"mine, and longer")
            registry = fs.context.registry
            me, registry.journal.owner = registry.journal.owner, "boot:1:1"
            timed(registry).journal.begin_put(fino, "theirs")
            timed(registry).journal.ready_put(fino)
            registry.tree.update(fino, size=6)
            theirs = registry.journal.put_of(fino)
            assert theirs is not None
            if stored:
                registry.journal.done(theirs.id)
            registry.journal.owner = me
            with pytest.raises(FsError) as caught:
                await fs.files.fsync(handle)
            assert caught.value.errno == errno.ESTALE
            with pytest.raises(FsError):
                await fs.flush(handle)
            fs.release(handle)
            inode = registry.tree.get(fino)
            assert inode is not None
            assert inode.size == 6
            assert registry.journal.put_of(fino) == (None if stored else theirs)

    run_jumping(main)


def test_a_forgotten_alias_does_not_make_the_old_number_the_newest_again() -> None:
    nodes = NodeTable()
    nodes._lookups[7] = 1
    assert nodes.supersede(7) == 7
    alias = nodes.fino(7)
    nodes._lookups[alias] = 1
    assert nodes.forget(alias, 1)
    assert not nodes.is_current(7)
    assert nodes.fino(7) == alias
    assert nodes.ino(alias) == 7
    nodes.ghosts[7] = Inode(7, 0o100644, 0, 0, 0, 0, 0, 0, 0)
    nodes._lookups[alias] = 1
    nodes.forget(7, 1)
    assert 7 in nodes.ghosts, "it is open under its other number"
    nodes.forget(alias, 1)
    assert nodes.fino(7) == 7
    assert not nodes.ghosts
    assert (nodes._alias, nodes._current, nodes._kin) == ({}, {}, {})


def test_a_read_only_mount_takes_over_no_work(make_box: MakeBox) -> None:
    """It never does it, and as long as it lives nobody else would."""
    box = make_box("s3")

    async def main() -> None:
        async with box.living() as fs:
            registry = fs.context.registry
            me, registry.journal.owner = registry.journal.owner, "boot:1:1"
            timed(registry).journal.add_delete(".lamindb/gone")
            registry.journal.owner = me
            follower = Follower(fs.context)
            fs.context.policy.read_only = True
            follower._adopt()
            assert [entry.owner for entry in registry.journal.entries()] == ["boot:1:1"]
            fs.context.policy.read_only = False
            follower._adopt()
            assert [entry.owner for entry in registry.journal.entries()] == [me]

    run_jumping(main)


def test_damage_of_the_registry_is_a_sentence_in_the_log(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was a traceback, ten times a second."""
    box = make_box("local")

    def trim() -> None:
        raise DamagedRegistry("The work database is damaged; here is what helps.")

    async def main() -> None:
        async with box.living() as fs:
            monkeypatch.setattr(fs.context.registry.changes, "trim", trim)
            with trio.move_on_after(1):
                await Follower(fs.context).run()

    run_jumping(main)
    said = [record for record in caplog.records if "could not follow" in record.getMessage()]
    assert said
    assert all("here is what helps" in record.getMessage() and not record.exc_info for record in said)


def test_a_mount_mends_what_another_one_left_between_two_commits(make_box: MakeBox) -> None:
    """The other one was killed when it had named a new file in the registry, and not yet journaled its put."""
    box = make_box("s3")

    async def main() -> None:
        async with box.living() as fs:
            registry = fs.context.registry
            other = Registry(box.base / "registry.lndb")
            other.journal.owner = "boot:1:1"
            made, src = timed(other).names.create_file(1, "half", 0o100644, 0, 0)
            other.close()
            with contextlib.closing(sqlite3.connect(box.base / "work.db")) as conn, conn:
                for table in ("journal", "spent"):
                    conn.execute(f"DELETE FROM {table} WHERE src=?", (src,))
                conn.execute("UPDATE sqlite_sequence SET seq=seq-2 WHERE name='puts'")
            assert registry.journal.put_of(made.ino) is None
            Follower(fs.context)._adopt()
            with trio.fail_after(10):
                await fs.sync_all()
            assert registry.artifacts.by_key("half") is not None
            assert registry.journal.entries() == []

    run_jumping(main)


def test_whether_a_real_key_is_wanted_is_asked_of_an_index(make_box: MakeBox) -> None:
    box = make_box("s3")
    registry = Registry(box.base / "registry.lndb")
    statements: list[str] = []
    registry.db.conn.set_trace_callback(statements.append)
    registry.artifacts._is_wanted("a/b")
    registry.db.conn.set_trace_callback(None)
    asked = [statement for statement in statements if "FROM artifact" in statement]
    assert asked
    plan = registry.db.all(f"EXPLAIN QUERY PLAN {asked[-1]}")
    assert not [row for row in plan if row[3].startswith("SCAN artifact")], plan
    registry.close()
