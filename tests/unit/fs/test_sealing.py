"""What is sent of a closed file is sealed before: a disk that changes the file after a crash is found out. And what was
sent, and is not in the registry after a power cut, is not lost with its spool file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamfs import hashing
from lamfs.errors import StorageError, StorageUnavailable
from lamfs.fs import partial
from lamfs.model import BLOCK_SIZE
from lamfs.registry import Registry, Seal
from lamfs.registry.seals import UNKNOWN
from lamfs.work import multipart, patches, sealing, steps
from tests.support.fsbox import Box, User
from tests.support.timed import timed
from tests.support.transfer import make_bytes, until
from tests.unit.fs.conftest import MakeBox

SMALL, WHOLE = b"small" * 100, make_bytes(100_000, 1)
"""One that goes in a batch, and one that is sent alone."""
PARTS = make_bytes(3 * BLOCK_SIZE + 17, 2)
"""Four parts, hashed as they are sent."""
NEVER = 3600.0


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one block, one at a time; and nothing is sealed but by what sends it."""
    for name in ("MULTIPART_ABOVE", "PART_SIZE", "MIN_PART"):
        monkeypatch.setattr(multipart, name, BLOCK_SIZE)
    monkeypatch.setattr(multipart, "WINDOW", 1)
    for module in (hashing, steps, patches):
        monkeypatch.setattr(module, "MD5_MAX", BLOCK_SIZE - 5)
    monkeypatch.setattr(partial, "ABOVE", BLOCK_SIZE)
    monkeypatch.setattr(sealing, "AFTER", NEVER)


def seal_of(registry: Registry) -> Seal:
    (entry,) = [entry for entry in registry.journal.entries() if entry.op == "put"]
    seal = registry.seals.of(entry.src or "")
    assert seal is not None
    return seal


def crashed(make_box: MakeBox, scenario: Any, step: str, number: int = -1) -> tuple[Box, Path]:
    """A box that was crashed at one of the steps of this name, and the spool file that it has."""
    box = make_box("s3")
    box.run(scenario, User())
    at = [count for count, name in enumerate(box.steps, 1) if name == step][number]
    box = make_box("s3")
    box.boot = "another boot"
    assert box.run(scenario, User(), crash_at=at)
    (path,) = box.spool.iterdir()
    return box, path


def is_refused(box: Box, path: Path, at: int) -> None:
    """A byte of the spool file is changed: the next life finds that out, and stores nothing."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    before = dict(box.store.objects)

    async def look(user: User) -> None:
        ino = user.fs.context.registry.tree.resolve("a.bin")
        assert ino is not None
        with pytest.raises(StorageError, match=f"is not what was written .block {at // BLOCK_SIZE}\\)"):
            await user.fs.files.store(ino.ino)

    box.run(look, User())
    assert box.store.objects == before


def writing(data: bytes) -> Any:
    async def write(user: User) -> None:
        await user.write_file("a.bin", data)
        await user.sync()

    return write


async def patching(user: User) -> None:
    """A block, and a piece of another, of a stored file."""
    await user.write_file("a.bin", PARTS)
    await user.sync()
    opened = await user.open("a.bin")
    await user.pwrite(opened, make_bytes(BLOCK_SIZE, 3), 0)
    await user.pwrite(opened, b"piece", 2 * BLOCK_SIZE + 7)
    await user.close(opened)
    await user.sync()


@pytest.mark.parametrize(
    ("scenario", "step"),
    [
        (writing(SMALL), "before put"),
        (writing(WHOLE), "before put"),
        (writing(PARTS), "before complete_upload"),
        (patching, "before complete_upload"),
    ],
    ids=["batch", "alone", "parts", "overlay"],
)
def test_bytes_are_sealed_before_they_become_an_object(make_box: MakeBox, scenario: Any, step: str) -> None:
    box, path = crashed(make_box, scenario, step)
    with contextlib.closing(Registry(box.base / "registry.lndb")) as registry:
        seal = seal_of(registry)
        assert seal.size == path.stat().st_size
        assert UNKNOWN not in seal.blocks
    is_refused(box, path, 2 * BLOCK_SIZE + 8 if scenario is patching else 3)


def test_a_part_is_sealed_before_it_is_sent(make_box: MakeBox) -> None:
    box, path = crashed(make_box, writing(PARTS), "before send_part", 1)
    with contextlib.closing(Registry(box.base / "registry.lndb")) as registry:
        seal = seal_of(registry)
        assert [seal.knows(number) for number in range(4)] == [True, True, False, False]
        # What no part of was sent is sealed by the next mount.
        assert registry.seals.unsealed(registry.journal.entries()[0].owner or "") != []
    is_refused(box, path, 3)


@pytest.mark.parametrize(("sent", "known"), [(1, None), (2, [True, True, True, False])])
def test_parts_of_very_large_files_are_sealed_some_at_a_time(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch, sent: int, known: list[bool] | None
) -> None:
    monkeypatch.setattr(multipart, "SEALED", BLOCK_SIZE)
    box, path = crashed(make_box, writing(PARTS), "before send_part", sent)
    with contextlib.closing(Registry(box.base / "registry.lndb")) as registry:
        seal = registry.seals.of(path.name)
        assert (None if seal is None else [seal.knows(number) for number in range(4)]) == known


def test_what_waits_for_its_upload_is_sealed_meanwhile(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage does not answer to the beginning of the upload: nothing of the file was hashed for it."""
    monkeypatch.setattr(sealing, "AFTER", 0.01)
    monkeypatch.setattr(sealing, "UPLOAD", 0.01)
    monkeypatch.setattr(sealing, "PIECE", 2 * BLOCK_SIZE)
    box = make_box("s3")

    async def scenario(user: User) -> None:
        registry = user.fs.context.registry
        user.mover.hold = "begin_upload"
        await user.write_file("a.bin", PARTS)
        await user.mover.held.wait()
        (entry,) = registry.journal.entries()
        await until(lambda: (seal := registry.seals.of(entry.src or "")) is not None and UNKNOWN not in seal.blocks)
        assert user.mover.hashed == [2 * BLOCK_SIZE, 0]
        user.mover.release.set()
        await user.sync()

    user = User()
    box.run(scenario, user)
    box.check(user)


# -- what was sent, and whose row is lost -----------------------------------------------------------------------------


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3])


@pytest.mark.parametrize("lose", [Path.unlink, shortened])
@pytest.mark.parametrize("data", [SMALL, WHOLE])
def test_an_object_that_storage_has_taken_is_the_file(
    make_box: MakeBox, data: bytes, lose: Callable[[Path], None]
) -> None:
    """The power goes after the put, before the registry says so on the disk; the disk has lost the spool file too."""
    box, path = crashed(make_box, writing(data), "after put")
    lose(path)

    async def look(user: User) -> None:
        assert await user.actual() == {"a.bin": data}
        await user.sync()
        assert user.fs.context.registry.rescue.lost() == []
        assert box.problems(user.fs.context.registry) == []

    box.run(look, User())


async def twice(user: User) -> None:
    """The answer to the first put is lost; the file is written again, with other bytes."""
    user.mover.late = True
    user.mover.failing = lambda op, key: StorageUnavailable("the answer is lost") if op == "put" else None
    await user.write_file("a.bin", WHOLE)
    await until(lambda: user.fs.context.uploader.failed_tries > 0)
    await user.write_file("a.bin", WHOLE[::-1])
    timed(user.fs.context.registry).people.ensure_storage("s3://other", "s3")  # a commit: where the power goes


def test_an_object_of_older_bytes_is_better_than_none_and_said(make_box: MakeBox) -> None:
    box, path = crashed(make_box, twice, "commit")
    assert path.read_bytes() == WHOLE[::-1]
    shortened(path)

    async def look(user: User) -> None:
        assert await user.actual() == {"a.bin": WHOLE}
        (lost,) = user.fs.context.registry.rescue.lost()
        assert (lost.key, lost.size, lost.stored) == ("a.bin", len(WHOLE), True)
        assert box.problems(user.fs.context.registry) == []

    box.run(look, User())


def test_what_may_be_in_storage_is_not_written_over(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage cannot be asked: what is left of the spool file becomes another object."""
    box, path = crashed(make_box, writing(WHOLE), "after put")
    shortened(path)
    ((key, _),) = box.store.objects.items()

    async def look(user: User) -> None:
        monkeypatch.undo()
        await user.sync()
        assert await user.actual() == {"a.bin": WHOLE[:3]}

    def away(key: str) -> Any:
        raise StorageUnavailable("away")

    monkeypatch.setattr(box.store, "meta", away)
    box.run(look, User())
    assert box.store.objects[key] == WHOLE
    assert sorted(box.store.objects.values()) == sorted([WHOLE, WHOLE[:3]])


def test_an_object_that_says_to_be_anothers_is_not_taken(make_box: MakeBox) -> None:
    box, path = crashed(make_box, writing(WHOLE), "after put")
    path.unlink()
    ((key, meta),) = box.store.metas.items()
    box.store.metas[key] = dataclasses.replace(meta, uid="x" * 20)

    async def look(user: User) -> None:
        assert await user.actual() == {}
        (lost,) = user.fs.context.registry.rescue.lost()
        assert (lost.key, lost.stored) == ("a.bin", False)
        await user.sync()

    box.run(look, User())
    assert box.store.objects == {key: WHOLE}, "an orphan is left to fsck"
