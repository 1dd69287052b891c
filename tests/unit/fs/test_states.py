"""The table of what may happen to an open file (lamfs/fs/state.py): all of it happens, and nothing else does.

The real file system and the real steps of an upload drive it; only the moment at which an upload begins and ends is
chosen here.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
import trio

from lamfs.errors import FsError, LamfsError, StorageUnavailable
from lamfs.fs import state as module
from lamfs.fs.filesystem import FileSystem
from lamfs.fs.follow import Follower
from lamfs.fs.state import (
    FROZEN,
    FROZEN_OPEN,
    PRIVATE,
    SPOOLED,
    STALE,
    STORED,
    TRANSITIONS,
    WRITING,
    Event,
    FileState,
    IllegalEvent,
    Phase,
)
from lamfs.fuse.operations import fuse_error
from lamfs.keys import spool_name
from lamfs.model import BLOCK_SIZE, ROOT_INO
from lamfs.registry.entries import Put
from tests.support.fsbox import Box
from tests.support.timed import timed
from tests.unit.fs.conftest import MakeBox

Situation = tuple[object, ...]
Step = tuple[Phase, Event, Phase]
ALL: set[Step] = {(before, event, after) for event, row in TRANSITIONS.items() for before, after in row.items()}
SPOOL_NEEDED = {SPOOLED, WRITING, FROZEN, FROZEN_OPEN, PRIVATE}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """What happens to open files, in order; each phase is seen to have the spool file that it needs."""
    steps: list[Step] = []
    become = FileState.become

    def noted(state: FileState, event: Event) -> None:
        before = state.phase
        become(state, event)
        steps.append((before, event, state.phase))
        assert state.phase not in SPOOL_NEEDED or state.spool is not None
        assert state.phase is not STORED or state.spool is None

    monkeypatch.setattr(FileState, "become", noted)
    return steps


class File:
    """One file of a mount whose uploads begin and end when this says so. What can be done with it answers False when it
    cannot be done now."""

    def __init__(self, fs: FileSystem, name: str) -> None:
        self.fs, self.name = fs, name
        self.context = fs.context
        self.mover: Any = fs.context.mover
        self.handle, self.fino, inode = fs.files.create(ROOT_INO, name.encode(), 0o644, os.O_RDWR, 0, 0)
        self.ino = inode.ino
        self.opened, self.named = True, True
        self.entry: Put | None = None
        self.state = fs.files.handles[self.handle].state
        self.written = 0

    def may_write(self) -> bool:
        return self.opened and self.fs.files.handles[self.handle].writable

    async def write(self) -> bool:
        if not self.may_write():
            return False
        self.written += 1
        await self.fs.files.write(self.handle, 0, b"%d of %s" % (self.written, self.name.encode()))
        return True

    async def flush(self) -> bool:
        if self.may_write():
            await self.fs.flush(self.handle)
        return self.may_write()

    async def release(self) -> bool:
        if not self.opened:
            return False
        self.opened = False
        self.fs.release(self.handle)
        return True

    async def open(self, flags: int = os.O_RDWR) -> bool:
        """As the kernel: by its name, or by what is known of that."""
        if self.opened:
            return False
        found = self.fs.lookup(ROOT_INO, self.name.encode())
        self.fino = found[0] if found is not None else self.fino
        self.handle = await self.fs.open(self.fino, flags)
        self.state, self.opened = self.fs.files.handles[self.handle].state, True
        assert found is None or not self.state.is_deleted()
        return True

    async def leave_to_a_reader(self) -> bool:
        """Who wrote it is gone without a word (it had mapped the file), but somebody still reads it."""
        if not self.may_write():
            return False
        reader = await self.fs.open(self.state.fino, os.O_RDONLY)
        self.fs.release(self.handle)
        self.handle = reader
        return True

    async def begin(self) -> bool:
        """An upload begins, as it does also for an open row when somebody waits for it."""
        entry = self.context.registry.journal.put_of(self.ino)
        if self.entry is not None or entry is None:
            return False
        self.entry = entry
        self.context.uploader.puts.begin(entry)
        return True

    async def finish(self, failing: Callable[[str, str], LamfsError | None] | None = None) -> bool:
        """The upload ends: well, if ``failing`` does not say otherwise and nobody else has newer bytes by now."""
        if self.entry is None:
            return False
        entry, self.entry = self.entry, None
        self.mover.failing = failing or (lambda op, key: None)
        try:
            await self.context.uploader.puts.one([entry])
        except IllegalEvent:
            raise
        except LamfsError:
            pass
        return True

    async def fail(self) -> bool:
        """The upload ends with an error, although storage has the object."""
        self.mover.late = True
        done = await self.finish(lambda op, key: StorageUnavailable("no answer"))
        self.mover.late = False
        return done

    async def conflict(self) -> bool:
        """Another program has stored something of its own under the file's key meanwhile."""
        store = self.mover._box.store
        if self.entry is None or store.kind == "local" or not self.named:
            return False
        store.objects[self.name] = b"theirs"
        return await self.finish()

    async def finish_too_late(self) -> bool:
        """The upload ends when another program has deleted the file."""
        return self.named and await self.finish(lambda op, key: self._unlink_elsewhere())

    async def unlink(self) -> bool:
        if not self.named:
            return False
        self.named = False
        self.fs.lookup(ROOT_INO, self.name.encode())  # the kernel does that before
        timed(self.fs).names.unlink(ROOT_INO, self.name.encode())
        return True

    async def unlink_elsewhere(self) -> bool:
        """Another program deletes it; this mount does not know yet."""
        found = self.named
        self._unlink_elsewhere()
        return found

    def _unlink_elsewhere(self) -> None:
        if self.named:
            self.named = False
            timed(self.context.registry).names.unlink(ROOT_INO, self.name, left=lambda _: None, is_copy=lambda _: False)

    async def restore(self) -> bool:
        """Another program takes it out of the trash."""
        artifact = self.context.registry.artifacts.by_ino(self.ino)
        if self.named or artifact is None:
            return False
        timed(self.context.registry).names.restore(artifact.uid)
        self.named = True
        return True

    async def replace(self) -> bool:
        """Another mount takes over what is owed, and makes an empty revision of its own."""
        registry = self.context.registry
        inode = registry.tree.get(self.ino)
        if inode is None or not self.named:
            return False
        me, registry.journal.owner = registry.journal.owner, "another"
        timed(registry).journal.begin_put(self.ino, spool_name(self.ino))
        timed(registry).journal.drop_put(self.ino)
        registry.journal.owner = me
        inode.size = 0
        registry.tree.rewritten(inode)
        Follower(self.context)._new_revision(self.ino)
        return True

    def situation(self) -> Situation:
        """What can make a difference to what happens next."""
        state, registry = self.state, self.context.registry
        owed = registry.journal.put_of(self.ino)
        inode = registry.tree.get(self.ino)
        known = inode and inode.nlink, self.named, registry.artifacts.has_ino(self.ino), owed and owed.state
        under_way = self.entry and (owed and owed.gen == self.entry.gen)
        if not self.opened:
            return *known, self.entry is not None, under_way
        src = state.spool and state.spool.name
        here = owed and owed.src == src, self.entry and self.entry.src == src
        return *known, under_way, *here, state.phase, state.dirty, state.writers

    def check(self) -> None:
        """What may be written is nothing that is stored just now, nor that may be stored any time."""
        state = self.state
        assert state.writable_now == (state.phase in (WRITING, PRIVATE))
        if not self.opened or state.spool is None:
            return
        owed = self.context.registry.journal.put_of(self.ino)
        row = owed.state if owed is not None and owed.src == state.spool.name else None
        if state.writable_now:
            assert not self.context.uploader.is_uploading(self.ino, state.spool.name)
            assert row in (None, "open")
        # Else nobody would acknowledge it at the last close.
        assert row != "open" or state.is_open_in_journal() or state.is_deleted()


Action = Callable[[File], Awaitable[bool]]
ACTIONS: list[Action] = [
    File.write,
    File.flush,
    File.release,
    File.open,
    File.leave_to_a_reader,
    File.begin,
    File.finish,
    File.fail,
    File.finish_too_late,
    File.conflict,
    File.unlink,
    File.unlink_elsewhere,
    File.restore,
    File.replace,
]


@contextlib.asynccontextmanager
async def mounted(box: Box) -> AsyncIterator[FileSystem]:
    async with box.living() as fs:
        fs.context.uploader._limit = 0  # it begins nothing by itself
        yield fs


async def explore(box: Box) -> None:
    """Do everything that can be done with a file, in each situation into which that can bring it."""
    numbers = itertools.count()
    ways: deque[tuple[Action, ...]] = deque([()])
    known: set[Situation] = set()
    async with mounted(box) as fs:
        while ways:
            way = ways.popleft()
            file: File | None = None
            for last in ACTIONS:
                if file is None:
                    file = File(fs, f"f{next(numbers)}")
                    for action in way:
                        with contextlib.suppress(FsError):
                            await action(file)
                try:
                    if not await last(file):
                        continue
                except FsError as error:
                    if error.errno != errno.ESTALE:
                        story = ", ".join(cast(Any, action).__name__ for action in (*way, last))
                        raise AssertionError(f"in the end of {story}") from error
                file.check()
                if file.situation() not in known:
                    known.add(file.situation())
                    ways.append((*way, last))
                with contextlib.suppress(FsError):
                    await file.release()
                await file.finish()
                file = None


def test_what_happens_to_open_files_is_what_the_table_says(make_box: MakeBox, seen: list[Step]) -> None:
    trio.run(explore, make_box("s3", real_keys=True))
    trio.run(explore, make_box("local"))
    assert set(seen) == ALL


def test_the_module_shows_its_table() -> None:
    """What a reader finds in the docstring is what is checked."""
    shown = re.sub(r",\s+", ", ", str(module.__doc__))
    for event, row in TRANSITIONS.items():
        assert re.search(
            rf"^    {event} +{', '.join(f'{before} -> {after}' for before, after in row.items())}$", shown, re.M
        )
    assert shown.count(" -> ") == len(ALL)
    assert set(re.findall(r"^([A-Z_]+) {2,}", shown, re.M)) == set(Phase)


def test_what_cannot_happen_is_an_error_of_one_call(make_box: MakeBox, caplog: pytest.LogCaptureFixture) -> None:
    """The call gets EIO and the log a sentence with the phase. The file keeps its phase, and the mount goes on."""

    async def main() -> None:
        async with mounted(make_box("s3")) as fs:
            file = File(fs, "f")
            for phase in Phase:
                file.state._enter(phase)
                for event in Event:
                    if phase in TRANSITIONS[event]:
                        continue
                    with pytest.raises(IllegalEvent) as caught:
                        file.state.become(event)
                    assert fuse_error(caught.value, "write").errno == errno.EIO
                    assert {str(phase), str(event)} <= set(re.findall(r"\w+", caplog.messages[-1]))
                    assert file.state.phase is phase
            file.state._enter(WRITING)
            await file.write()
            await file.flush()

    trio.run(main)
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_a_file_that_is_back_from_the_trash_is_not_the_deleted_one(make_box: MakeBox) -> None:
    """Who still has it open as it was deleted must not take what others write to it by its name."""

    async def main() -> None:
        async with make_box("s3").living() as fs:
            artifacts, names = fs.context.registry.artifacts, timed(fs.context.registry).names
            old, fino, _ = fs.files.create(ROOT_INO, b"f", 0o644, os.O_RDWR, 0, 0)
            await fs.files.write(old, 0, b"first")
            await fs.flush(old)
            await fs.sync_all()
            timed(fs).names.unlink(ROOT_INO, b"f")
            await fs.files.write(old, 0, b"FIRST")
            artifact = artifacts.by_ino(fino)
            assert artifact is not None
            names.restore(artifact.uid)
            found = fs.lookup(ROOT_INO, b"f")
            assert found is not None
            assert found[1].nlink == 1
            new = await fs.open(found[0], os.O_RDWR)
            assert await fs.read(new, 0, 10) == b"first"
            await fs.files.write(new, 0, b"second")
            await fs.flush(new)
            fs.release(new)
            assert await fs.read(old, 0, 10) == b"FIRST"
            with pytest.raises(FsError) as caught:
                await fs.files.write(old, 0, b"x")
            assert caught.value.errno == errno.ESTALE
            await fs.flush(old)  # nothing that anybody misses is lost
            await fs.sync_all()
            fs.release(old)
            artifact = artifacts.by_ino(fino)
            assert artifact is not None
            store = fs.context.store
            assert store.get(artifact.revision.object_key) == b"second"

    trio.run(main)


def test_what_the_trash_is_owed_is_not_written_any_more(make_box: MakeBox) -> None:
    """A deleted file that the kernel still knows (by /proc/self/fd, say) is opened before its upload has begun."""

    async def main() -> None:
        async with mounted(make_box("s3")) as fs:
            file = File(fs, "f")
            await file.write()
            await file.begin()
            await file.finish()
            await file.write()
            await file.release()
            timed(fs).names.unlink(ROOT_INO, b"f")
            owed = fs.context.registry.journal.put_of(file.ino)
            assert owed is not None
            handle = await fs.open(file.fino, os.O_RDWR)
            await fs.files.write(handle, 0, b"for this handle")
            with fs.context.spool.opened(str(owed.src), os.O_RDONLY) as fd:
                assert os.pread(fd, 100, 0) == b"2 of f"
            assert await fs.read(handle, 0, 100) == b"for this handle"
            fs.release(handle)

    trio.run(main)


def test_a_spool_file_taken_over_is_removed_after_the_last_close(make_box: MakeBox) -> None:
    """It was opened when another mount had it to store, which died: this one stores it, and has to remove it."""

    async def main() -> None:
        async with mounted(make_box("s3")) as fs:
            journal, file = fs.context.registry.journal, File(fs, "f")
            await file.write()
            await file.release()
            me, journal.owner = journal.owner, "another"
            await file.open()
            assert file.state.phase is FROZEN
            journal.owner = me
            await file.begin()
            await file.finish()
            await file.release()
            assert list(fs.context.spool.names()) == []

    trio.run(main)


@pytest.mark.parametrize("what", [File.replace, File.unlink, File.fail])
def test_a_copy_that_is_made_while_something_happens(make_box: MakeBox, what: Action) -> None:
    """The next write needs it, or not, by then; no spool file is left without need."""

    async def main() -> None:
        async with mounted(make_box("s3")) as fs:
            file = File(fs, "f")
            await fs.files.write(file.handle, BLOCK_SIZE, b"end")
            await file.flush()
            await file.begin()
            clone = file.mover.clone

            async def slow(source: str, target: str) -> None:
                await clone(source, target)
                assert await what(file)

            file.mover.clone = slow
            if what is File.replace:
                with pytest.raises(FsError) as caught:
                    await file.write()
                assert caught.value.errno == errno.ESTALE
            else:
                await file.write()
            assert file.state.phase is {File.replace: STALE, File.unlink: PRIVATE, File.fail: WRITING}[what]
            assert await fs.read(file.handle, BLOCK_SIZE, 10) == b"end"
            await file.finish()
            await file.release()
            assert len(list(fs.context.spool.names())) == (what is File.fail)

    trio.run(main)
