"""Random calls on a few names, with failing storage and crashes in between, against a model.

LAMFS_SOAK: how many times as many seeds as usual.
"""

from __future__ import annotations

import os
import random

import pytest
import trio

from lamfs.errors import LamfsError, StorageUnavailable
from tests.support.fsbox import Box, User
from tests.unit.fs.conftest import MakeBox

SEEDS = 12 * int(os.environ.get("LAMFS_SOAK", "1"))
NAMES = ["a", "b.csv", "c.tar.gz", "d"]


class Driver:
    """Does random calls. Every choice comes from ``rng``, so that a seed repeats a run but for the uploader's pace."""

    def __init__(self, rng: random.Random, calls: int) -> None:
        self.rng = rng
        self.calls = calls
        self.done: list[str] = []

    def path(self) -> str:
        depth = self.rng.choice([1, 1, 1, 2, 2, 3])
        return "/".join(self.rng.choice(NAMES) for _ in range(depth))

    def data(self) -> bytes:
        # Few different contents, so that equal bytes come back often.
        return bytes([self.rng.choice(b"xyz")]) * self.rng.choice([0, 1, 10, 5000])

    def some_file(self, user: User) -> str | None:
        files = [path for path, node in user.tree.items() if node is not None]
        return self.rng.choice(files) if files else None

    async def __call__(self, user: User) -> None:
        rng = self.rng
        user.mover.late = rng.random() < 0.5

        def failing(op: str, key: str) -> LamfsError | None:
            return StorageUnavailable("not now") if rng.random() < 0.1 else None

        user.mover.failing = failing
        for _ in range(self.calls):
            await self.one(user)
            await trio.sleep(rng.choice([0, 0, 0, 0.001, 0.01]))
        user.mover.failing = lambda op, key: None
        await user.compare()

    async def one(self, user: User) -> None:
        rng = self.rng
        call = rng.choice(
            ["write_file"] * 4
            + ["rename"] * 5
            + ["unlink", "unlink", "mkdir", "mkdir", "rmdir", "link", "compare", "fsync"]
            + ["create", "open", "pwrite", "pwrite", "pwrite", "truncate", "close", "close", "pread", "sync"]
        )
        handle = rng.choice(user.handles) if user.handles else None
        path, other = self.path(), self.path()
        self.done.append(f"{call} {path} {other} {handle.number if handle else ''}")
        try:
            if call == "write_file":
                if path not in user.tree or user.tree[path] is not None:
                    await user.write_file(path, self.data())
            elif call == "rename":
                old = rng.choice(list(user.tree)) if user.tree else None
                if old is not None:
                    self.done[-1] += f" {old}"
                    await user.rename(old, other)
            elif call == "unlink":
                found = self.some_file(user)
                if found is not None:
                    await user.unlink(found)
            elif call == "mkdir":
                await user.mkdir(path)
            elif call == "rmdir":
                await user.rmdir(path)
            elif call == "link":
                found = self.some_file(user)
                if found is not None:
                    await user.link(found, other)
            elif call == "create":
                if path not in user.tree and len(user.handles) < 6:
                    await user.create(path)
            elif call == "open":
                found = self.some_file(user)
                if found is not None and len(user.handles) < 6:
                    await user.open(found, rng.choice([os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC]))
            elif call == "compare":
                await user.compare()
            elif call == "sync":
                await user.sync()
            elif handle is None:
                pass
            elif call == "pwrite" and handle.writable:
                await user.pwrite(handle, self.data(), rng.choice([0, 3, 5000]))
            elif call == "truncate" and handle.writable:
                await user.ftruncate(handle, rng.choice([0, 1, 10, 6000]))
            elif call == "fsync":
                await user.fsync(handle)
            elif call == "close":
                await user.close(handle)
            elif call == "pread":
                await user.pread(handle)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except LamfsError as error:
            self.done[-1] += f" -> {error}"


@pytest.mark.no_cover
@pytest.mark.parametrize("real_keys", [False, True], ids=["virtual", "real"])
@pytest.mark.parametrize("kind", ["s3", "local"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_lives(seed: int, kind: str, real_keys: bool, make_box: MakeBox) -> None:
    """Several lives of one instance, most of which end in a crash."""
    rng = random.Random(f"{seed} {kind} {real_keys}")
    box: Box = make_box(kind, real_keys=real_keys)
    user = User()
    done: list[str] = []
    try:
        for _ in range(3):
            driver = Driver(rng, rng.choice([5, 15, 40]))
            crashed = box.run(driver, user, crash_at=rng.choice([0, rng.randint(1, 400), rng.randint(1, 60)]))
            done += [*driver.done, "crash" if crashed else "end", *[f"    {step}" for step in box.steps[-3:]]]
            if rng.random() < 0.6:
                done.append("check")
                box.check(user)
            else:
                box.run(lambda user: user.compare(), user)
        box.check(user)
    except BaseException as error:
        error.add_note("\n".join(done))
        raise
