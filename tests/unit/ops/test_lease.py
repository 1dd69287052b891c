"""Whose the lease is when a mount has died, and when what this machine noted of it is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from lamfs import config
from lamfs.daemon.lease import Keeper
from lamfs.errors import LeaseLost
from lamfs.ops import artifacts, held, lock, setup
from lamfs.ops.instance import Instance
from tests.support.ops import machine

SLUG = "ada/one"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The storage of an instance that nobody has locked."""
    root = tmp_path / "store"
    setup.login("ada")
    setup.init(str(root), "one")
    setup.close(SLUG)
    return root


class StoreMover:
    """The jobs of the Mover that a lease needs, done at once."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        async def job(*args: Any, **how: Any) -> Any:
            return getattr(self._store, name)(*args, **how)

        return job


def test_a_command_after_a_mount_that_died_keeps_the_lease(root: Path, tmp_path: Path) -> None:
    """The mount held it for a minute; what the command changed is this machine's until 'lamfs close'."""
    (tmp_path / "file").write_text("x")
    with Instance.open(SLUG) as opened:
        opened.hold_for_mount()
        state = opened.lease().peek()
        assert state is not None
        assert state.seconds == lock.MOUNT_SECONDS
        artifacts.save(opened, tmp_path / "file", key="a.txt")
        state = opened.lease().peek()
        assert state is not None
        assert state.seconds == lock.LEASE_SECONDS


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_mount_knows_its_lease_without_the_note(root: Path, tmp_path: Path, overtaken: bool) -> None:
    """The note did not survive a power cut, and storage was away when the mount began."""
    with Instance.open(SLUG) as opened:
        opened.hold_for_mount()
    held.forget(config.load_instance(SLUG).directory)
    if overtaken:
        with Instance.open(SLUG) as opened:
            opened.release_lease()
        with machine(tmp_path / "two"):
            setup.login("bob")
            setup.connect(str(root))

    lost: list[LeaseLost] = []

    async def begin() -> None:
        with Instance.open(SLUG) as opened:
            mover: Any = StoreMover(opened.store)
            keeper = Keeper(opened, mover, lost.append, lambda: None)
            if overtaken:
                with pytest.raises(LeaseLost, match="bob"):
                    await keeper.look()
            else:
                await keeper.look()

    trio.run(begin)
    assert bool(lost) == overtaken
