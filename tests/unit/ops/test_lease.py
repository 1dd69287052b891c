"""Whose the lease is when a mount has died, and when what this machine noted of it is gone."""

from __future__ import annotations

import contextlib
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from lamfs import config
from lamfs.cli import main
from lamfs.daemon.lease import Keeper, hand_back, renewed
from lamfs.errors import LamfsError, LeaseLost, StorageUnavailable
from lamfs.ops import artifacts, held, lock, setup, snapshot
from lamfs.ops.instance import Instance
from tests.support.mounts import wait_until
from tests.support.ops import BadStore, machine

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


def _keeper(opened: Instance, lost: list[LeaseLost], store: Any = None) -> Keeper:
    mover: Any = StoreMover(store or opened.store)
    return Keeper(opened, mover, lost.append, lambda: None)


def test_a_command_that_takes_the_lease_first_does_not_end_the_mount(root: Path, tmp_path: Path) -> None:
    """Storage was away when the mount began, with a lease that was given back; then a command was quicker."""
    (tmp_path / "file").write_text("x")
    lost: list[LeaseLost] = []

    async def begin() -> None:
        with Instance.open(SLUG) as opened:
            keeper = _keeper(opened, lost)
            with Instance.open(SLUG) as other:
                artifacts.save(other, tmp_path / "file", key="a.txt")
            await keeper.look()
            await keeper.permit(fresh=True)

    trio.run(begin)
    assert not lost


@pytest.mark.parametrize("left", [None, b"", b'{"handle": "al'])
def test_a_lock_that_is_gone_or_cut_off_is_taken_again_if_nobody_has_used_it(root: Path, left: bytes | None) -> None:
    """The moving process was killed while it wrote the lock; then a put asks whether it may replace an object."""
    lost: list[LeaseLost] = []

    async def begin() -> None:
        with Instance.open(SLUG) as opened:
            opened.hold_for_mount()
            keeper = _keeper(opened, lost)
            await keeper.look()
            key = opened.lease().key
            if left is None:
                opened.store.delete([key])
            else:
                opened.store.put_bytes(key, left)
            keeper._asked = float("-inf")
            await keeper.permit(fresh=True)
            state = opened.lease().peek()
            assert state is not None
            assert state.machine == config.machine_token()

    trio.run(begin)
    assert not lost


def test_a_mount_whose_storage_goes_away_while_it_takes_the_lease_takes_it_later(root: Path) -> None:
    lost: list[LeaseLost] = []

    async def begin() -> None:
        with Instance.open(SLUG) as opened:
            store = BadStore(opened.store)
            keeper = _keeper(opened, lost, store)
            key = opened.settings.snapshot_key
            head, failed = store.head, []

            def fail_once(asked: str) -> Any:
                if asked == key and not failed:
                    failed.append(asked)
                    raise StorageUnavailable("The storage is away; try again.")
                return head(asked)

            store.head = fail_once  # type: ignore[method-assign]
            with pytest.raises(StorageUnavailable):
                await keeper.look()
            assert failed
            await keeper.look()

    trio.run(begin)
    assert not lost


def test_a_command_that_fails_does_not_give_back_the_lease_that_the_machine_had(root: Path) -> None:
    """A mount of this machine may live by it."""
    with Instance.open(SLUG) as mounted:
        mounted.hold_for_mount()
        held.forget(mounted.settings.directory)  # as a full disk does
        store: Any = BadStore(mounted.store)
        key, head = mounted.settings.snapshot_key, store.head

        def fail(asked: str) -> Any:
            if asked == key:
                raise StorageUnavailable("The storage is away; try again.")
            return head(asked)

        store.head = fail
        with Instance(mounted.settings, store=store) as other, pytest.raises(StorageUnavailable):
            other.hold()
        state = mounted.lease().peek()
    assert state is not None
    assert state.machine == config.machine_token()


def test_a_renewal_that_cannot_be_noted_leaves_no_note_of_a_longer_lease(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands would believe it for an hour, and the lease holds for a minute."""
    lost: list[LeaseLost] = []

    async def begin() -> None:
        with Instance.open(SLUG) as opened:
            opened.hold()
            with monkeypatch.context() as disk:
                disk.setattr(config, "write_json", _full)
                await _keeper(opened, lost).look()
            assert held.read(opened.settings.directory) is None
            assert held.is_long(opened.settings.directory)

    trio.run(begin)


def _full(*_: object, **__: object) -> None:
    raise LamfsError("No space left on device.")


def test_threads_of_a_program_go_on_with_the_registry_that_one_of_them_has_taken(root: Path, tmp_path: Path) -> None:
    """Else what another thread saves is in a registry that was put aside, and nowhere else."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "more").write_text("y")
    with Instance.open(SLUG) as opened, ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: opened.registry.artifacts.count()).result() == 0
        with machine(tmp_path / "two"):
            setup.login("bob")
            setup.connect(str(root))
            with Instance.open(SLUG) as theirs:
                artifacts.save(theirs, tmp_path / "file", key="theirs.txt")
            setup.close(SLUG)
        opened.hold()
        assert opened.registry.artifacts.count() == 1
        thread.submit(artifacts.save, opened, tmp_path / "more", key="ours.txt").result()
        thread.submit(opened.close_thread).result()
        assert {one.key for one in opened.registry.artifacts.filter()} == {"theirs.txt", "ours.txt"}


def test_what_is_saved_while_another_registry_is_fetched_is_not_put_aside(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "more").write_text("y")
    with machine(tmp_path / "two"):
        setup.login("bob")
        setup.connect(str(root))
        with Instance.open(SLUG) as theirs:
            artifacts.save(theirs, tmp_path / "file", key="theirs.txt")
        setup.close(SLUG)
    fetch = snapshot.fetch

    def slow_fetch(instance: Instance, key: str, path: Path) -> Any:
        with monkeypatch.context() as before, Instance.open(SLUG) as other:
            before.setattr(Instance, "hold", lambda _: None)  # it had looked at the lease before
            artifacts.save(other, tmp_path / "more", key="ours.txt")
        return fetch(instance, key, path)

    with monkeypatch.context() as slow, Instance.open(SLUG) as opened:
        slow.setattr(snapshot, "fetch", slow_fetch)
        opened.hold_for_mount()
        keys = {one.key.rpartition("/")[2] for one in opened.registry.artifacts.filter() if one.key is not None}
        assert keys == {"theirs.txt", "ours.txt"}


def seconds_of(opened: Instance) -> float:
    state = opened.lease().peek()
    assert state is not None
    return state.seconds


def test_a_mount_whose_last_push_fails_holds_the_lease_for_a_minute(root: Path) -> None:
    with Instance.open(SLUG) as opened:
        opened.hold_for_mount()
        with contextlib.suppress(StorageUnavailable), renewed(opened):
            assert seconds_of(opened) == lock.MOUNT_SECONDS
            raise StorageUnavailable("The registry cannot be stored.")
        assert seconds_of(opened) == lock.MOUNT_SECONDS


def test_the_lease_is_renewed_while_the_last_push_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "MOUNT_LOOK", 0.01)
    with Instance.open(SLUG) as opened:
        opened.hold_for_mount()
        with renewed(opened):
            tokens = set()

            def look() -> bool:
                state = opened.lease().peek()
                assert state is not None
                assert state.seconds == lock.MOUNT_SECONDS
                tokens.add(state.token)
                return len(tokens) > 2

            wait_until(look, "it was renewed twice")
        hand_back(opened)
        assert opened.lease().peek() is None
        assert held.read(opened.settings.directory) is None
        with machine(root.parent / "two"):
            setup.connect(str(root))


def test_nothing_is_pushed_when_another_machine_has_the_lease_in_the_end(root: Path) -> None:
    with Instance.open(SLUG) as opened:
        opened.hold_for_mount()
        note = held.read(opened.settings.directory)
        assert note is not None
        opened.lease().release()
        with machine(root.parent / "two"):
            setup.connect(str(root))
        with pytest.raises(LeaseLost), renewed(opened):
            raise AssertionError("the registry is pushed")


def test_a_registry_of_a_later_lease_is_taken_by_the_command_that_is_named(root: Path, tmp_path: Path) -> None:
    """The lock was set back, so this machine has it, and another one has stored its registry under a later number."""
    (tmp_path / "file").write_text("x")
    with machine(tmp_path / "two"):
        setup.connect(str(root))
        with Instance.open(SLUG) as opened:
            opened.release_lease()
            opened.registry.file.begin_lease(40)
            artifacts.save(opened, tmp_path / "file", key="theirs.txt")
            snapshot.push(opened)
    (root / ".lamindb" / "_exclusion" / config.load_instance(SLUG).id.hex).unlink()
    with Instance.open(SLUG) as opened:
        opened.take_lease(catch_up=False)
        note = held.read(opened.settings.directory)
        assert note is not None
        assert note.fence < 40
        opened.registry.file.begin_lease(note.fence)
    with Instance.open(SLUG) as opened:
        artifacts.save(opened, tmp_path / "file", key="ours.txt")
        with pytest.raises(LeaseLost) as refused:
            snapshot.push(opened)
        command = re.search(r"'lamfs (connect .*?)'", str(refused.value))
    assert command is not None
    result = CliRunner().invoke(main, shlex.split(command[1]))
    assert result.exit_code == 0, result.output
    with Instance.open(SLUG) as opened:
        assert [record.key for record in opened.registry.artifacts.filter()] == ["theirs.txt"]
        artifacts.save(opened, tmp_path / "file", key="ours.txt")
        assert snapshot.push(opened)
