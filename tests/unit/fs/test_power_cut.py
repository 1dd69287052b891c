"""A power cut at every step: of registry and spool only what was synced is left, or a disk's own choice of the rest.

Two disks, the worst there are. ``lazy`` has written nothing but what it was told to sync, so the registry goes back to
the last fdatasync of its log. ``eager`` has written the whole log, but of spool files only what was synced: a row says
that a file was closed whose bytes are gone. Two more are lazy with one of the two databases only. Storage has kept
everything. What sync or fsync had acknowledged is there
in either case, and nothing is left over.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from lamfs import hashing
from lamfs.errors import StorageUnavailable
from lamfs.fs import partial
from lamfs.registry import Registry
from lamfs.work import patches
from lamfs.work.durable import sync_file
from tests.support.fsbox import Box, Crash, Open, User
from tests.unit.fs import test_crashes as crashes
from tests.unit.fs.conftest import MakeBox

Scenario = Callable[[User], Awaitable[None]]
MIB = 1 << 20
DATABASES = ("registry.lndb", "work.db")
LARGE = random.Random(5).randbytes(6 * MIB)


class Disk:
    """Records what is synced while it is in use. Files are known by inode, so a rename takes its bytes along."""

    def __init__(self) -> None:
        self.synced: dict[int, bytes] = {}
        self.logs: dict[str, bytes] = {}
        # Of two syncs of a file in two threads the later one counts.
        self._lock = threading.Lock()

    def sync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(path):
            return
        with self._lock:
            data = Path(path).read_bytes()
            name = os.path.basename(path).removesuffix("-wal")
            if name in DATABASES:
                self.logs[name] = data
            else:
                self.synced[os.fstat(fd).st_ino] = data


class Witness(User):
    """A user who remembers every state of the tree since the last one that was acknowledged for good."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[dict[str, set[bytes | None]]] = [{}]

    def look(self) -> None:
        for tree in (self.tree, self.maybe):
            if tree is not None:
                self.history.append(
                    {path: {None} if node is None else {node.data, *node.since} for path, node in tree.items()}
                )

    async def sync(self) -> None:
        await super().sync()
        self.history.clear()
        self.look()

    async def fsync(self, opened: Open) -> None:
        await super().fsync(opened)
        for path, node in self.tree.items():
            if node is opened.node:
                for tree in self.history:
                    tree[path] = {node.data}

    def wrong(self, actual: dict[str, bytes | None]) -> list[str]:
        """What is there and never was, or is not there and always was."""
        found = []
        for path in {*actual, *(path for tree in self.history for path in tree)}:
            may = set().union(*(tree.get(path, set()) for tree in self.history))
            if path in actual and actual[path] not in may:
                found.append(f"{path} holds {(actual[path] or b'')[:40]!r}")
            if path not in actual and all(path in tree for tree in self.history):
                found.append(f"{path} is gone")
        return found


class PowerBox:
    """A Box whose machine loses its power when it crashes."""

    def __init__(self, box: Box, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.box, self.kind = box, disk
        box.boot = "another boot"
        self.disk = Disk()
        monkeypatch.setattr(os, "fsync", self.disk.sync)
        monkeypatch.setattr(os, "fdatasync", self.disk.sync)

    def run(self, scenario: Scenario, user: Witness, crash_at: int) -> bool:
        box = self.box
        databases = [box.base / name for name in DATABASES]
        before = {path.name: path.read_bytes() for path in databases}
        logs: dict[str, bytes] = {}
        step = box.step

        def watched(name: str) -> None:
            user.look()
            for path in databases:
                wal = Path(f"{path}-wal")
                logs[path.name] = wal.read_bytes() if wal.exists() else b""
            if name == "between the commits" and box.rewind is not None:
                logs["work.db"] = box.rewind.get("work.db-wal", b"")
            step(name)

        box.step = watched  # type: ignore[method-assign]
        try:
            crashed = box.run(scenario, user, crash_at=crash_at)
        finally:
            box.step = step  # type: ignore[method-assign]
        if crashed:
            for path in databases:
                path.write_bytes(before[path.name])
                lazy = self.kind in ("lazy", f"lazy {path.name}")
                kept = self.disk.logs.get(path.name) if lazy else logs.get(path.name)
                Path(f"{path}-shm").unlink(missing_ok=True)
                Path(f"{path}-wal").write_bytes(kept or b"")
            self.lose_the_spool()
        return crashed

    def lose_the_spool(self) -> None:
        for path in list(self.box.spool.iterdir()):
            data = self.disk.synced.get(path.stat().st_ino)
            if data is not None:
                path.write_bytes(data)
            elif self.kind != "eager":
                path.unlink()
            else:
                path.write_bytes(b"")

    def survives(self, scenario: Scenario, crash_at: int) -> bool:
        """Run a scenario, cut at a step, and check. Whether it came to that step."""
        user = Witness()
        crashed = self.run(scenario, user, crash_at)
        done = list(self.box.steps)
        try:
            self.check(user)
        except BaseException as error:
            error.add_note(f"cut at step {crash_at}: {done}")
            raise
        return crashed

    def without_found(self, tree: dict[str, bytes | None]) -> dict[str, bytes | None]:
        """A tree without ``lost+found``: a registry that went back knows nothing of spool files that are newer."""
        found = [path for path in tree if path.startswith("lost+found")]
        assert not found or self.kind != "eager"
        return {path: data for path, data in tree.items() if path not in found}

    def check(self, user: Witness) -> None:
        """As Box.check; the tree may be any that the user has seen since the last acknowledgement."""
        shutil.rmtree(self.box.cache_dir, ignore_errors=True)
        problems: list[str] = []

        async def look(again: User) -> None:
            problems.extend(user.wrong(self.without_found(await again.actual())))
            await again.sync()
            problems.extend(user.wrong(self.without_found(await again.actual())))
            problems.extend(self.box.problems(again.fs.context.registry))

        self.box.run(look, User())
        if self.kind == f"lazy {DATABASES[0]}":
            # The work database says that a put is done, of whose revision the registry knows nothing: fsck finds that.
            problems = [problem for problem in problems if not problem.endswith("is nobody's")]
        assert not problems, problems


async def replaced_twice(user: User) -> None:
    """Stored, replaced and stored, closed once more: the last close is the only thing that may be lost."""
    for data in (crashes.V1, crashes.V2, crashes.V3):
        await user.write_file("a.csv", data)
        await user.write_file("b", data[:3])
        if data is not crashes.V3:
            await user.sync()
    await trio.sleep(0.01)


async def synced_one_by_one(user: User) -> None:
    """fsync of one file makes the log durable, with rows of others whose bytes are not."""
    await user.write_file("other", crashes.V1)
    await user.sync()
    await user.write_file("other", crashes.V2)
    await user.write_file("new", crashes.V2)
    opened = await user.create("a")
    await user.pwrite(opened, crashes.V1, 0)
    await user.fsync(opened)
    await user.write_file("other", crashes.V3)
    await user.pwrite(opened, crashes.V2, 10)
    await user.fsync(opened)
    await user.pwrite(opened, crashes.V3, 0)
    await user.close(opened)
    await user.rename("new", "renamed")


async def cut_and_not_closed(user: User) -> None:
    """A file that was stored is emptied and written anew, and the power goes before it is closed."""
    await user.write_file("a", crashes.V2)
    await user.sync()
    opened = await user.open("a", os.O_RDWR | os.O_TRUNC)
    await user.pwrite(opened, crashes.V3, 0)
    other = await user.create("b")
    await user.pwrite(other, crashes.V1, 0)
    await user.fsync(other)
    await user.close(opened)
    await user.close(other)


OWN: list[Scenario] = [replaced_twice, synced_one_by_one, cut_and_not_closed]
SCENARIOS: list[Scenario] = [
    *OWN, crashes.editor, crashes.swap_and_write, crashes.unlink_during_overwrite, crashes.write_during_upload,
    crashes.directories, crashes.late_failure,
]  # fmt: skip
DISKS = ["lazy", "eager", *(f"lazy {name}" for name in DATABASES)]
PLACES = [("s3", False), ("local", True)]


def is_in(scenario: Scenario, disk: str, place: tuple[str, bool]) -> bool:
    """Whether a case is in scripts/test; scripts/soak has them all."""
    if scenario in OWN:
        return place == PLACES[0]
    if disk not in ("lazy", "eager"):
        return scenario is crashes.write_during_upload and place == PLACES[0]
    return (disk, place) in (("lazy", PLACES[0]), ("eager", PLACES[1]))


CASES = [
    pytest.param(scenario, disk, *place, id=f"{scenario.__name__}-{disk}-{place[0]}")
    for scenario in SCENARIOS
    for disk in DISKS
    for place in PLACES
    if "LAMFS_SOAK" in os.environ or is_in(scenario, disk, place)
]


@pytest.fixture
def make_power(make_box: MakeBox) -> Iterator[Callable[..., PowerBox]]:
    with pytest.MonkeyPatch.context() as patch:
        yield lambda kind, disk, **options: PowerBox(make_box(kind, **options), disk, patch)


@pytest.mark.no_cover
@pytest.mark.parametrize(("scenario", "disk", "kind", "real_keys"), CASES)
def test_power_cut_at_every_step(
    scenario: Scenario, disk: str, kind: str, real_keys: bool, make_power: Callable[..., PowerBox]
) -> None:
    """What was acknowledged for good is there, the rest is of some moment since, and nothing is left over."""
    for crash_at in range(1, 500):
        if not make_power(kind, disk, real_keys=real_keys).survives(scenario, crash_at):
            return


async def changed_in_places(user: User) -> None:
    """A large artifact is changed in place, closed, appended to, closed, and stored; then changed once more."""
    await user.write_file("big", LARGE)
    await user.sync()
    for offset in (4 * MIB - 3, 4 * MIB + 70, len(LARGE), 0):
        opened = await user.open("big")
        await user.pwrite(opened, b"patched", offset)
        await user.close(opened)
        await trio.sleep(0.01)
    await user.sync()
    opened = await user.open("big")
    await user.pwrite(opened, b"again", 4 * MIB + 100)
    await user.close(opened)
    await trio.sleep(0.03)
    await user.pread(await user.open("big", os.O_RDONLY))


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((partial, "ABOVE"), (hashing, "MD5_MAX"), (patches, "MD5_MAX")):
        monkeypatch.setattr(module, name, MIB)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("disk", ["lazy", "eager"])
def test_changed_places_are_durable_soon(disk: str, make_power: Callable[..., PowerBox]) -> None:
    """Storage is away, so what was closed stays as ranges of blocks; a machine that is shut down has it."""

    async def scenario(user: Witness) -> None:
        await user.write_file("big", LARGE)
        await user.sync()
        user.fs.context.cache.drop(user.revision("big").object_key)
        user.mover.failing = lambda op, key: StorageUnavailable("away")
        for offset in (4 * MIB - 3, len(LARGE)):
            opened = await user.open("big")
            await user.pwrite(opened, b"patched", offset)
            await user.close(opened)
        await user.fs.context.uploader.range_sync.finish()
        await user.fs.context.uploader.durable()
        user.history.clear()
        user.look()
        raise Crash("the power goes")

    power, user = make_power("s3", disk), Witness()
    assert power.run(scenario, user, 0)  # type: ignore[arg-type]
    power.check(user)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("disk", ["lazy", "eager"])
@pytest.mark.parametrize("before", [b"", b"durable"])
@pytest.mark.parametrize("apart", [0, 5 * MIB])
def test_an_append_that_was_not_noted_as_durable(
    disk: str, before: bytes, apart: int, make_power: Callable[..., PowerBox]
) -> None:
    """The disk has its bytes and the log, which another file's fsync has synced: the size is that of what is kept."""

    async def append(user: User, data: bytes, offset: int) -> None:
        opened = await user.open("big")
        await user.pwrite(opened, data, offset)
        await user.close(opened)

    async def scenario(user: Witness) -> None:
        await user.write_file("big", LARGE)
        await user.sync()
        uploader = user.fs.context.uploader
        await user.open("big")  # so nothing is stored
        if before:
            await append(user, before, len(LARGE))
            await uploader.range_sync.finish()
            user.history.clear()
            user.look()
        uploader.range_sync.ask = lambda src: None  # type: ignore[method-assign]
        await append(user, b"patched", len(LARGE) + len(before) + apart)
        await append(user, b"patched", 100)
        entry = user.fs.context.registry.journal.entries()[0]
        spool = user.fs.context.spool
        await sync_file(spool, spool.open(str(entry.src), os.O_RDONLY))
        await uploader.durable()
        raise Crash("the power goes")

    power, user = make_power("s3", disk), Witness()
    assert power.run(scenario, user, 0)  # type: ignore[arg-type]
    power.check(user)
    with contextlib.closing(Registry(power.box.base / "registry.lndb")) as registry:
        lost = registry.rescue.lost()
    assert {one.key for one in lost} == {"big"}
    assert [one.ranges[0] for one in lost if one.ranges] == [(100, 107)]
    assert "are lost (bytes 100-106" in lost[0].sentence
    cut = [(one.left, one.size) for one in lost if one.left is not None]
    whole = len(LARGE) + len(before) + apart + len(b"patched")
    assert cut == ([] if before else [(len(LARGE), whole)])


@pytest.mark.no_cover
@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("disk", ["lazy", "eager"])
def test_ranges_of_a_large_artifact(disk: str, make_power: Callable[..., PowerBox]) -> None:
    """What was closed and noted as a range of a block is there, or the block is as it was: never zeros."""
    crashed, step = True, 1 if "LAMFS_SOAK" in os.environ else 4
    crash_at = random.Random(disk).randrange(step) + 1
    while crashed:
        crashed = make_power("s3", disk).survives(changed_in_places, crash_at)
        crash_at += step


@pytest.mark.parametrize("disk", ["lazy", "eager"])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_fsync_to_the_spool_survives_too(kind: str, disk: str, make_power: Callable[..., PowerBox]) -> None:
    """-o fsync=spool: the bytes are in a synced spool file, and the row that owes them is in the synced log."""

    async def scenario(user: User) -> None:
        opened: Any = await user.create("a")
        await user.pwrite(opened, crashes.V1, 0)
        await user.fsync(opened)
        await user.pwrite(opened, crashes.V2, 0)
        await user.fsync(opened)
        await trio.sleep(0.02)
        await user.close(opened)
        await user.sync()

    for crash_at in range(1, 200):
        power, user = make_power(kind, disk), Witness()
        power.box.policy.fsync_stores = False
        crashed = power.run(scenario, user, crash_at)
        try:
            power.check(user)
        except BaseException as error:
            error.add_note(f"cut at step {crash_at}: {power.box.steps}")
            raise
        if not crashed:
            return
