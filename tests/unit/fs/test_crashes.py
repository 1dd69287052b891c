"""Every scenario is crashed at every step: what was acknowledged is there, and nothing is left over."""

from __future__ import annotations

import os

import pytest
import trio

from lamfs.errors import StorageUnavailable
from tests.support.fsbox import Box, User
from tests.unit.fs.conftest import MakeBox

V1, V2, V3 = b"one" * 50, b"two, which is longer" * 30, b"three"


async def create(user: User) -> None:
    await user.write_file("a.csv", V1)
    await user.sync()


async def create_empty(user: User) -> None:
    await user.write_file("empty", b"")
    await user.sync()


async def overwrite(user: User) -> None:
    await user.write_file("a.csv", V1)
    await user.sync()
    await user.write_file("a.csv", V2)
    await user.sync()


async def overwrite_and_back(user: User) -> None:
    """The bytes of the first revision come back while those of the second are on their way."""
    await user.write_file("a.csv", V1)
    await user.sync()
    user.mover.hold = "put"
    await user.write_file("a.csv", V2)
    await user.mover.held.wait()
    await user.write_file("a.csv", V1)
    user.mover.release.set()
    await user.sync()


async def restore_backup(user: User) -> None:
    """A file with the bytes of the first revision is renamed over the artifact while the second is on its way."""
    await user.write_file("a.csv", V1)
    await user.sync()
    user.mover.hold = "put"
    await user.write_file("a.csv", V2)
    await user.mover.held.wait()
    await user.write_file("backup", V1)
    await user.rename("backup", "a.csv")
    user.mover.release.set()
    await user.sync()


async def restore_stored_backup(user: User) -> None:
    """The same, and the backup is an artifact of its own."""
    await user.write_file("a.csv", V1)
    await user.write_file("backup", V1)
    await user.sync()
    user.mover.hold = "put"
    await user.write_file("a.csv", V2)
    await user.mover.held.wait()
    await user.rename("backup", "a.csv")
    user.mover.release.set()
    await user.sync()


async def editor(user: User) -> None:
    """vim, sed -i, rsync: a temporary file renamed over the artifact, twice."""
    await user.write_file("a.csv", V1)
    await user.sync()
    for data in (V2, V3):
        await user.write_file("a.csv.tmp", data)
        await user.rename("a.csv.tmp", "a.csv")
    await user.sync()


async def editor_before_upload(user: User) -> None:
    """The same over a file whose own upload is under way."""
    user.mover.hold = "put"
    await user.write_file("a.csv", V1)
    await user.mover.held.wait()
    await user.write_file("a.csv.tmp", V2)
    await user.rename("a.csv.tmp", "a.csv")
    user.mover.release.set()
    await user.sync()


async def editor_stored(user: User) -> None:
    """Both are artifacts when one is renamed over the other."""
    await user.write_file("a.csv", V1)
    await user.write_file("b.txt", V2)
    await user.sync()
    await user.rename("b.txt", "a.csv")
    await user.write_file("b.txt", V3)
    await user.sync()


async def editor_with_backup(user: User) -> None:
    """emacs: the artifact is renamed to a backup, and written anew."""
    await user.write_file("a.csv", V1)
    await user.sync()
    await user.rename("a.csv", "a.csv~")
    await user.write_file("a.csv", V2)
    await user.sync()
    await user.rename("a.csv", "a.csv~")
    await user.write_file("a.csv", V3)
    await user.sync()


async def swap(user: User) -> None:
    await user.write_file("a", V1)
    await user.write_file("b", V2)
    await user.sync()
    await user.rename("a", "t")
    await user.rename("b", "a")
    await user.rename("t", "b")
    await user.sync()


async def swap_and_write(user: User) -> None:
    await user.write_file("a", V1)
    await user.write_file("b", V2)
    await user.sync()
    await user.rename("a", "t")
    await user.rename("b", "a")
    await user.rename("t", "b")
    await user.write_file("a", V3)
    await user.write_file("t", V1)
    await user.sync()


async def rename_during_upload(user: User) -> None:
    user.mover.hold = "put"
    await user.write_file("a.csv", V1)
    await user.mover.held.wait()
    await user.rename("a.csv", "b.txt")
    await user.write_file("a.csv", V2)
    user.mover.release.set()
    await user.sync()


async def unlink_during_upload(user: User) -> None:
    user.mover.hold = "put"
    await user.write_file("a.csv", V1)
    await user.mover.held.wait()
    await user.unlink("a.csv")
    user.mover.release.set()
    await user.sync()


async def unlink_during_overwrite(user: User) -> None:
    await user.write_file("a.csv", V1)
    await user.sync()
    user.mover.hold = "put"
    await user.write_file("a.csv", V2)
    await user.mover.held.wait()
    await user.unlink("a.csv")
    user.mover.release.set()
    await user.sync()


async def unlink_open(user: User) -> None:
    """An open file of an artifact is written, removed, written again, closed."""
    await user.write_file("a.csv", V1)
    await user.sync()
    opened = await user.open("a.csv")
    await user.pwrite(opened, V2, 0)
    await user.unlink("a.csv")
    await user.pwrite(opened, V3, 7)
    await user.pread(opened)
    await user.close(opened)
    await user.sync()


async def remove_and_write_again(user: User) -> None:
    await user.write_file("a", V1)
    await user.sync()
    await user.unlink("a")
    await user.write_file("a", V2)
    await user.sync()


async def file_becomes_directory(user: User) -> None:
    await user.write_file("a", V1)
    await user.sync()
    await user.unlink("a")
    await user.mkdir("a")
    await user.write_file("a/b", V2)
    await user.sync()


async def file_moves_into_directory_of_its_name(user: User) -> None:
    await user.write_file("a", V1)
    await user.sync()
    await user.rename("a", "t")
    await user.mkdir("a")
    await user.rename("t", "a/a")
    await user.write_file("a/b", V2)
    await user.sync()


async def random_writes(user: User) -> None:
    opened = await user.create("a.bin")
    await user.pwrite(opened, V1, 10)
    await user.fsync(opened)
    await user.pwrite(opened, V2, 3)
    await user.ftruncate(opened, 40)
    await user.fsync(opened)
    other = await user.open("a.bin")
    await user.pwrite(other, V3, 100)
    await user.close(opened)
    await user.ftruncate(other, 20)
    await user.pread(other)
    await user.close(other)
    await user.sync()


async def write_during_upload(user: User) -> None:
    """The upload reads what was closed, while others write on."""
    user.mover.hold = "put"
    await user.write_file("a.csv", V1)
    await user.mover.held.wait()
    opened = await user.open("a.csv")
    await user.pread(opened)
    await user.pwrite(opened, V3, 5)
    user.mover.release.set()
    await trio.sleep(0.01)
    await user.pread(opened)
    await user.pwrite(opened, V2, 200)
    await user.close(opened)
    await user.sync()


async def truncate_during_upload(user: User) -> None:
    user.mover.hold = "put"
    await user.write_file("a.csv", V2)
    await user.mover.held.wait()
    await user.write_file("a.csv", V3)
    user.mover.release.set()
    await user.sync()


async def directories(user: User) -> None:
    await user.mkdir("d")
    await user.mkdir("d/e")
    for name in ("d/a", "d/e/b", "d0", "d!"):
        await user.write_file(name, name.encode())
    await user.sync()
    await user.rename("d", "f")
    await user.write_file("f/e/b", V2)
    await user.mkdir("d")
    await user.write_file("d/a", V3)
    await user.sync()


async def links(user: User) -> None:
    await user.write_file("a", V1)
    await user.link("a", "b")
    await user.sync()
    await user.write_file("b", V2)
    await user.unlink("a")
    await user.write_file("c", V3)
    await user.link("c", "d")
    await user.rename("c", "b")
    await user.sync()


async def many(user: User) -> None:
    """Small files are stored in one batch, while one is written again, one renamed, and one removed."""
    user.fs.context.uploader._limit = 1
    user.mover.hold = "put"
    for number in range(4):
        await user.write_file(f"f{number}", b"%d" % number * 10)
    await user.mover.held.wait()
    await user.write_file("f1", V2)
    await user.rename("f2", "g2")
    await user.unlink("f3")
    user.mover.release.set()
    await user.sync()


async def late_failure(user: User) -> None:
    """The object is written, and the reply is lost; then the old bytes come back."""
    await user.write_file("a", V1)
    await user.sync()
    user.mover.late = True
    user.mover.failing = lambda op, key: StorageUnavailable("lost reply") if op == "put" else None
    await user.write_file("a", V2)
    opened = await user.open("a", os.O_RDWR)
    with pytest.raises(StorageUnavailable):
        await user.fs.fsync(opened.number)
    await user.pread(opened)
    await user.pwrite(opened, V1, 0)
    await user.ftruncate(opened, len(V1))
    user.mover.failing = lambda op, key: None
    await user.close(opened)
    await user.sync()


SCENARIOS = [
    create, create_empty, overwrite, overwrite_and_back, restore_backup, restore_stored_backup, editor,
    editor_before_upload, editor_stored, editor_with_backup, swap, swap_and_write, rename_during_upload,
    unlink_during_upload, unlink_during_overwrite, unlink_open, remove_and_write_again, file_becomes_directory,
    file_moves_into_directory_of_its_name, random_writes, write_during_upload, truncate_during_upload, directories,
    links, many, late_failure,
]  # fmt: skip


PLACES = [("s3", False), ("local", True), ("s3", True), ("local", False)]


@pytest.mark.no_cover
@pytest.mark.parametrize(("kind", "real_keys"), PLACES if "LAMFS_SOAK" in os.environ else PLACES[:2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_crash_at_every_step(scenario: object, kind: str, real_keys: bool, make_box: MakeBox) -> None:
    """Crashed at any step, the next mount has everything that was acknowledged, and no more."""
    box: Box = make_box(kind, real_keys=real_keys)
    user = User()
    box.run(scenario, user)  # type: ignore[arg-type]
    steps = box.steps
    box.check(user)
    for crash_at in range(1, len(steps) + 20):
        box, user = make_box(kind, real_keys=real_keys), User()
        crashed = box.run(scenario, user, crash_at=crash_at)  # type: ignore[arg-type]
        done = list(box.steps)
        try:
            box.check(user)
        except BaseException as error:
            error.add_note(f"crashed at step {crash_at}: {done}")
            raise
        if not crashed:
            return
