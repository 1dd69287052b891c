"""What CLI, API and recovery do without a mount is crashed at every step: saves, and the puts, moves and deletes that a
dead mount has left. Who comes next, a mount or another command, finds all that was acknowledged, and nothing is left
over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lamfs.errors import ObjectChanged, ObjectMissing
from lamfs.ops import artifacts
from lamfs.registry import Registry
from tests.support.fsbox import Box, User
from tests.unit.fs import test_crashes as mounted
from tests.unit.fs.conftest import MakeBox

V1, V2, V3 = b"one" * 50, b"two, which is longer" * 30, b"three"


class Program:
    """Saves files as a program does. ``tree``: the bytes that each key must have; ``maybe``: another tree that is as
    good, because the call that makes the difference did not return; ``theirs``: bytes that somebody else has stored;
    ``overwritten``: keys of artifacts whose bytes were lost by that."""

    def __init__(self, box: Box, virtual: bool) -> None:
        self.box, self.virtual = box, virtual
        self.tree: dict[str, bytes] = {}
        self.maybe: dict[str, bytes] | None = None
        self.theirs: list[bytes] = []
        self.overwritten: set[str] = set()
        self.instance: Any = None

    def _becomes(self, tree: dict[str, bytes], call: Callable[[], object]) -> None:
        self.maybe = tree
        call()
        self.tree, self.maybe = tree, None

    def save(self, key: str, data: bytes) -> None:
        path = self.box.base / "source"
        path.write_bytes(data)
        self._becomes(
            {**self.tree, key: data}, lambda: artifacts.save(self.instance, path, key=key, virtual=self.virtual)
        )

    def replace(self, key: str, data: bytes, suffix: str) -> None:
        """By a file of another suffix, so that the key becomes another one."""
        path = self.box.base / f"source{suffix}"
        path.write_bytes(data)
        tree = {name: was for name, was in self.tree.items() if name != key}
        tree[key.rpartition(".")[0] + suffix] = data
        self._becomes(tree, lambda: artifacts.replace(self.instance, self._uid(key), path))

    def purge(self, key: str) -> None:
        tree = {name: was for name, was in self.tree.items() if name != key}
        record = artifacts.by_uid(self.instance, self._uid(key))
        self._becomes(tree, lambda: artifacts.purge(self.instance, record))

    def write_past(self, key: str, data: bytes) -> None:
        """Somebody else writes the object of an artifact, or that of a key that none has."""
        record = self.instance.registry.artifacts.by_key(key)
        if record is not None:
            self.overwritten.add(key)
        path = self.box.base / "theirs"
        path.write_bytes(data)
        self.box.store.put_file(record.revision.object_key if record is not None else key, str(path))
        self.theirs.append(data)

    def _uid(self, key: str) -> str:
        found = self.instance.registry.artifacts.by_key(key)
        assert found is not None, key
        return str(found.uid)


def first(program: Program) -> None:
    program.save("d/a.csv", V1)


def again(program: Program) -> None:
    program.save("a.csv", V1)
    program.save("a.csv", V2)
    program.save("a.csv", V1)


def other_suffix(program: Program) -> None:
    program.save("a.csv", V1)
    program.replace("a.csv", V2, ".txt")
    program.save("a.csv", V3)


def twin(program: Program) -> None:
    """The bytes are in storage already."""
    program.save("a.csv", V1)
    program.save("b.csv", V1)
    program.save("b.csv", V2)
    program.save("a.csv", V2)


def delete(program: Program) -> None:
    program.save("a.csv", V1)
    program.purge("a.csv")
    program.save("a.csv", V2)


def over_others(program: Program) -> None:
    """What somebody else has stored there is kept."""
    program.write_past("a.csv", b"somebody's")
    program.save("a.csv", V1)
    program.write_past("a.csv", b"somebody's, later")
    program.save("a.csv", V2)


SAVES = [first, again, other_suffix, twin, delete, over_others]
WHO = ["command", "mount"]


def found_by(box: Box, who: str) -> tuple[dict[str, bytes | None], list[str]]:
    """What who comes next finds, by key, when it has done what was owed (None: not the bytes of the artifact); and what
    is wrong then."""
    found: dict[str, bytes | None] = {}
    problems: list[str] = []

    def read(registry: Registry) -> None:
        for record in registry.artifacts.filter():
            found[record.key or ""] = None
            with contextlib.suppress(ObjectMissing, ObjectChanged):
                found[record.key or ""] = box.store.get(record.revision.object_key, etag=record.revision.etag)
        problems.extend(box.problems(registry))

    async def look(user: User) -> None:
        await user.sync()
        read(user.fs.context.registry)

    if who == "mount":
        box.run(look, User())
    else:
        box.finish_alone()
        box.run_alone(lambda instance: read(instance.registry))
    return found, problems


def check(box: Box, program: Program, who: str) -> None:
    found, problems = found_by(box, who)
    kept = [data for key, data in found.items() if key.startswith("lost+found/")]
    tree = {key: data for key, data in found.items() if not key.startswith("lost+found/")}
    for key in [key for key, data in tree.items() if data is None]:
        assert key in program.overwritten  # somebody else, and its bytes were nowhere else
        tree[key] = program.tree[key]
        problems = [text for text in problems if not text.startswith(f"object of {key} ")]
    assert tree in (program.tree, program.maybe)
    for data in program.theirs:
        if data in kept:
            kept.remove(data)
        else:  # nothing has been saved where it is
            (key,) = [item.key for item in box.store.list() if box.store.get(item.key) == data]
            problems = [text for text in problems if text != f"object {key} is nobody's"]
    assert kept == []
    # What was kept may stay where it is in storage.
    assert [text for text in problems if not (text.startswith("object of lost+found/") and " is at " in text)] == []


PLACES = [("s3", True), ("local", False), ("s3", False), ("local", True)]


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(("kind", "virtual"), PLACES if "LAMFS_SOAK" in os.environ else PLACES[:2])
@pytest.mark.parametrize("scenario", SAVES, ids=lambda scenario: scenario.__name__)
def test_saves_are_crashed_at_every_step(
    scenario: Callable[[Program], None], kind: str, virtual: bool, who: str, make_box: MakeBox
) -> None:
    crash_at = 0
    while True:
        box = make_box(kind)
        program = Program(box, virtual)

        def work(instance: Any, program: Program = program) -> None:
            program.instance = instance
            scenario(program)

        crashed = box.run_alone(work, crash_at=crash_at)
        steps = box.steps
        try:
            check(box, program, who)
        except BaseException as error:
            error.add_note(f"crashed at step {crash_at}: {steps}")
            raise
        if not crashed and crash_at:
            return
        crash_at += 1


LEFT = [
    mounted.create, mounted.overwrite, mounted.editor, mounted.swap_and_write, mounted.rename_during_upload,
    mounted.unlink_during_overwrite, mounted.random_writes, mounted.links, mounted.many,
]  # fmt: skip


@pytest.mark.parametrize(("kind", "real_keys"), [("s3", False), ("local", True)])
@pytest.mark.parametrize("scenario", LEFT, ids=lambda scenario: scenario.__name__)
def test_what_a_dead_mount_has_left_is_done_by_a_command_that_is_crashed(
    scenario: Callable[[User], Awaitable[None]], kind: str, real_keys: bool, make_box: MakeBox
) -> None:
    """The mount is crashed at every step, and the command that finishes its work at one of its own, another each time.
    A second command finishes it."""
    crash_at, then = 0, 0
    while True:
        crash_at += 1
        box, user = make_box(kind, real_keys=real_keys), User()
        crashed = box.run(scenario, user, crash_at=crash_at)
        steps = box.steps
        then = then + 1 if box.finish_alone(crash_at=then + 1) else 0
        again = box.steps
        try:
            box.finish_alone()
            box.check(user)
        except BaseException as error:
            error.add_note(f"crashed at step {crash_at}: {steps}, and at {len(again)}: {again}")
            raise
        if not crashed:
            return
