"""Large files go up in parts: crashed at every step, changed, renamed, deleted meanwhile, and nothing is left over."""

from __future__ import annotations

import os

import pytest

from lamfs.errors import InvalidArgument, StorageUnavailable
from lamfs.keys import spool_name
from lamfs.model import BLOCK_SIZE
from lamfs.work import multipart
from lamfs.work.multipart import Segment, plan
from tests.support.fsbox import Box, User
from tests.support.timed import timed
from tests.support.transfer import make_bytes
from tests.unit.fs.conftest import MakeBox

MIB = 1 << 20
BIG = make_bytes(3 * BLOCK_SIZE + 17, 1)
"""Four parts, with the sizes of ``small_parts``."""
TWO, OTHER = BIG[: BLOCK_SIZE + 17], bytes(BLOCK_SIZE) + BIG[BLOCK_SIZE : BLOCK_SIZE + 17]
"""Two parts, of which the second is the same."""
CHANGED = BIG[:BLOCK_SIZE] + bytes(BLOCK_SIZE) + BIG[2 * BLOCK_SIZE :]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one block, so that little data makes several; one at a time, so that crashes come between them."""
    monkeypatch.setattr(multipart, "MULTIPART_ABOVE", BLOCK_SIZE)
    monkeypatch.setattr(multipart, "PART_SIZE", BLOCK_SIZE)
    monkeypatch.setattr(multipart, "MIN_PART", BLOCK_SIZE)
    monkeypatch.setattr(multipart, "WINDOW", 1)


async def create(user: User) -> None:
    await user.write_file("a.bin", TWO)
    await user.sync()


async def overwrite_during_upload(user: User) -> None:
    user.mover.hold = "send_part"
    await user.write_file("a.bin", TWO)
    await user.mover.held.wait()
    await user.write_file("a.bin", OTHER)
    user.mover.release.set()
    await user.sync()


async def unlink_during_upload(user: User) -> None:
    user.mover.hold = "send_part"
    await user.write_file("a.bin", TWO)
    await user.mover.held.wait()
    await user.unlink("a.bin")
    user.mover.release.set()
    await user.sync()


async def unlink_while_it_begins(user: User) -> None:
    user.mover.hold = "begin_upload"
    await user.write_file("a.bin", TWO)
    await user.mover.held.wait()
    await user.unlink("a.bin")
    user.mover.release.set()
    await user.sync()


async def small_after_a_failure(user: User) -> None:
    """What was to be a large file is a small one, under another suffix, when it is tried again."""
    user.mover.failing = lambda op, key: StorageUnavailable("away") if op == "complete_upload" else None
    await user.write_file("a.bin", TWO)
    opened = await user.open("a.bin")
    with pytest.raises(StorageUnavailable):
        await user.fs.fsync(opened.number)
    await user.close(opened)
    await user.rename("a.bin", "a.txt")
    await user.write_file("a.txt", b"small")
    user.mover.failing = lambda op, key: None
    await user.sync()


SCENARIOS = [create, unlink_during_upload, small_after_a_failure, unlink_while_it_begins, overwrite_during_upload]


@pytest.mark.no_cover
@pytest.mark.parametrize("scenario", SCENARIOS[: None if "LAMFS_SOAK" in os.environ else 3], ids=lambda it: it.__name__)
def test_crash_at_every_step(scenario: object, make_box: MakeBox) -> None:
    """Crashed at any step, the next mount has everything that was acknowledged; no upload, part or record is left."""
    box, user = make_box("s3"), User()
    box.run(scenario, user)  # type: ignore[arg-type]
    steps = box.steps
    box.check(user)
    for crash_at in range(1, len(steps) + 1):
        box, user = make_box("s3"), User()
        box.run(scenario, user, crash_at=crash_at)  # type: ignore[arg-type]
        done = list(box.steps)
        try:
            box.check(user)
        except BaseException as error:
            error.add_note(f"crashed at step {crash_at}: {done}")
            raise


def crash_before(box: Box, user: User, job: str, data: bytes = BIG) -> None:
    """Write a file, and die when ``job`` is about to be done for the first time."""

    async def scenario(user: User) -> None:
        await user.write_file("a.bin", data)
        await user.sync()

    step = box.step

    def watched(name: str) -> None:
        if name == f"before {job}":
            box.crash_at = len(box.steps) + 1
        step(name)

    box.step = watched  # type: ignore[method-assign]
    assert box.run(scenario, user)
    box.step = step  # type: ignore[method-assign]


def test_only_what_storage_lacks_is_sent_again(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()
    crash_before(box, user, "complete_upload")
    assert box.store.sent == [1, 2, 3, 4]
    del next(iter(box.store.unfinished.values()))[1][3]
    box.check(user)
    assert box.store.sent == [1, 2, 3, 4, 3]


def test_only_the_parts_with_other_bytes_are_sent_again(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()
    crash_before(box, user, "complete_upload")

    async def change(user: User) -> None:
        opened = await user.open("a.bin")
        await user.pwrite(opened, b"x", BLOCK_SIZE + 5)
        await user.close(opened)

    box.failing = lambda op, key: StorageUnavailable("away") if op in ("list_parts", "send_part") else None
    box.run(change, user)
    box.failing = lambda op, key: None
    box.check(user)
    assert box.store.sent == [1, 2, 3, 4, 2]


def test_an_upload_that_was_completed_is_not_done_again(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        user.mover.late = True
        user.mover.failing = lambda op, key: StorageUnavailable("lost") if op == "complete_upload" else None
        await user.write_file("a.bin", BIG)
        opened = await user.open("a.bin")
        with pytest.raises(StorageUnavailable):
            await user.fs.fsync(opened.number)
        user.mover.failing = lambda op, key: None
        await user.close(opened)
        await user.sync()

    box.run(scenario, user)
    assert box.store.sent == [1, 2, 3, 4]
    box.check(user)


def test_an_upload_that_is_gone_begins_anew(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()
    crash_before(box, user, "complete_upload")
    box.store.unfinished.clear()
    box.check(user)
    assert box.store.sent == [1, 2, 3, 4] * 2


def test_an_upload_whose_id_was_lost_is_aborted(make_box: MakeBox) -> None:
    box, user = make_box("s3"), User()

    async def scenario(user: User) -> None:
        user.mover.late = True
        user.mover.failing = lambda op, key: StorageUnavailable("lost") if op == "begin_upload" else None
        await user.write_file("a.bin", BIG)
        opened = await user.open("a.bin")
        with pytest.raises(StorageUnavailable):
            await user.fs.fsync(opened.number)
        assert len(box.store.unfinished) == 1
        await user.close(opened)
        await user.unlink("a.bin")
        await user.sync()

    box.run(scenario, user)
    box.check(user)
    assert box.store.begun == 1


async def _pieces(box: Box, user: User) -> None:
    """An object of the changed middle of a file, and of the rest of another object."""
    await user.write_file("a.bin", BIG)
    await user.sync()
    record = user.fs.context.registry.artifacts.by_key("a.bin")
    assert record is not None
    assert record.ino is not None
    source = (record.revision.object_key, record.revision.etag)
    changed = box.base / "changed"
    changed.write_bytes(CHANGED)
    registry = user.fs.context.registry
    store = multipart.Multipart(registry, user.mover, user.fs.context.uploader._waits)  # type: ignore[arg-type]
    timed(registry).journal.begin_put(record.ino, spool_name(record.ino))
    entry = registry.journal.put_of(record.ino)
    assert entry is not None
    content = await user.mover.hash(str(changed))
    segments = [
        Segment(0, BLOCK_SIZE, source),
        Segment(BLOCK_SIZE, BLOCK_SIZE),
        Segment(2 * BLOCK_SIZE, len(BIG) - 2 * BLOCK_SIZE, source),
    ]
    moved: list[int] = []
    before = len(box.store.sent)
    etag = await store.store(entry, content, str(changed), "elsewhere", segments, moved.append)
    assert box.store.get("elsewhere", etag=etag) == CHANGED
    assert sum(moved) == len(CHANGED)
    assert box.store.sent[before:] == [1, 2, 3]
    registry.journal.done(entry.id)


def test_an_object_of_pieces(make_box: MakeBox) -> None:
    box = make_box("s3")
    box.run(lambda user: _pieces(box, user), User())


def test_parts_fit_what_storage_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for size in (65 * MIB, 1 << 30, 5 << 40):
        parts = plan([Segment(0, size)])
        assert sum(part.length for part in parts) == size
        assert len(parts) <= multipart.MAX_PARTS
        assert all(part.length >= multipart.MIN_PART and part.offset % BLOCK_SIZE == 0 for part in parts[:-1])
        assert max(part.length for part in parts) <= 5 << 30
    assert plan([Segment(0, 5 << 40)])[:1500] == plan([Segment(0, 6 << 40)])[:1500]
    source = ("key", "etag")
    assert len(plan([Segment(0, 8 * MIB), Segment(8 * MIB, 5 << 40, source)])) <= multipart.MAX_PARTS
    parts = plan([Segment(0, 20 * MIB), Segment(20 * MIB, 1 << 30, source), Segment((1 << 30) + 20 * MIB, 1)])
    assert [(part.length, part.source) for part in parts] == [
        (20 * MIB, None),
        *[(128 * MIB, source)] * 8,
        (1, None),
    ]
    for bad in ([Segment(4 * MIB, 1)], [Segment(0, 4 * MIB), Segment(4 * MIB, 1)], [Segment(0, 9 * MIB)] * 2):
        with pytest.raises(InvalidArgument):
            plan(bad)
    with pytest.raises(InvalidArgument):
        plan([Segment(8 * MIB * at, 8 * MIB) for at in range(10_001)])
