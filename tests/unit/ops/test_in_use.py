"""A working copy stays where it is while somebody has it open, and those who only look are in nobody's way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from lamfs import config
from lamfs.cli import main, status, sync
from lamfs.config import InstanceSettings
from lamfs.errors import Locked
from lamfs.ops import in_use, losses, scratch_files, setup
from lamfs.ops.instance import Instance
from lamfs.registry import Registry
from tests.support.commands import quick

SLUG = "ada/one"


@pytest.fixture
def settings(tmp_path: Path) -> InstanceSettings:
    quick("login", "ada")
    return setup.init(str(tmp_path / "store"), "one")


def is_free(settings: InstanceSettings) -> bool:
    """Whether a program could replace the working copy now."""
    try:
        os.close(in_use.take(settings, fcntl.LOCK_EX, 0.0))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def replacing(settings: InstanceSettings) -> Iterator[None]:
    """A program replaces the working copy inside the block."""
    fd = in_use.take(settings, fcntl.LOCK_EX, 0.0)
    try:
        yield
    finally:
        os.close(fd)


LOOKS: dict[str, Callable[[InstanceSettings], object]] = {
    "status": lambda settings: status.look_into(settings, mounted=False),
    "sync": lambda settings: sync.left_behind(set()),
    "losses": lambda settings: losses.known(settings.slug),
    "scratch files": scratch_files.known,
}


@pytest.mark.parametrize("look", LOOKS)
def test_nobody_replaces_a_registry_while_somebody_looks_into_it(
    settings: InstanceSettings, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    """SQLite would have folded the log of one registry into the other one."""
    seen: list[bool] = []
    close = Registry.close

    def closed(registry: Registry) -> None:
        seen.append(is_free(settings))
        close(registry)

    monkeypatch.setattr(Registry, "close", closed)
    LOOKS[look](settings)
    assert seen == [False]
    assert is_free(settings)


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_shares_with_a_mount(settings: InstanceSettings, monkeypatch: pytest.MonkeyPatch, look: str) -> None:
    monkeypatch.setattr(in_use, "LOOK_SECONDS", 0.0)
    with Instance.open(settings.slug) as other:
        _ = other.registry
        assert "being replaced" not in str(LOOKS[look](settings))


def test_a_look_says_that_the_registry_is_being_replaced(
    settings: InstanceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_use, "LOOK_SECONDS", 0.0)
    sentence = f"Another program is replacing the registry of '{SLUG}' on this machine"
    with replacing(settings):
        done = CliRunner().invoke(main, ["status", "--json"])
        assert done.exit_code == 0
        (entry,) = json.loads(done.stdout)["instances"]
        assert sentence in entry["error"]
        assert sentence in quick("sync", code=1)
        assert losses.known(SLUG) == []
        assert scratch_files.known(settings) == []


def test_a_look_waits_until_the_registry_is_replaced(
    settings: InstanceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as other:
        other.enter_context(replacing(settings))
        monkeypatch.setattr(in_use.time, "sleep", lambda seconds: other.close())
        assert "error" not in status.look_into(settings, mounted=False)


def test_who_replaces_the_registry_waits_for_a_look(
    settings: InstanceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as other, Instance(settings) as instance:
        other.enter_context(in_use.looking(settings))
        monkeypatch.setattr(in_use.time, "sleep", lambda seconds: other.close())
        with instance.alone("replaced"):
            assert not is_free(settings)


def test_who_replaces_the_registry_does_not_wait_for_one_that_stays(
    settings: InstanceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_use, "ALONE_SECONDS", 0.05)
    with Instance.open(SLUG) as other, Instance(settings) as instance:
        _ = other.registry
        with pytest.raises(Locked, match="in use by another program"), instance.alone("replaced"):
            pass


def test_storage_is_asked_when_the_registry_is_closed(
    settings: InstanceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage folder may be on a server that does not answer."""
    free: list[bool] = []
    monkeypatch.setattr(status, "other_spools", lambda settings, owed: [str(free.append(is_free(settings)))])
    assert status.look_into(settings, mounted=False)["spools"] == ["None"]
    assert free == [True]


def test_nothing_is_made_for_an_instance_that_is_gone(settings: InstanceSettings) -> None:
    setup.delete(SLUG)
    assert scratch_files.known(settings) == []
    assert not settings.directory.exists()


LOOKING = """
import sys
from lamfs import config
from lamfs.cli import status
from lamfs.ops import in_use

in_use.LOOK_SECONDS = 60.0
settings = config.load_instance(sys.argv[1])
print("ready", flush=True)
while not sys.stdin.closed and sys.stdin.readline():
    found = status.look_into(settings, mounted=False)
    print(found.get("error", "looked"), flush=True)
"""


def test_looks_of_another_process_while_the_registry_is_restored(
    settings: InstanceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_use, "ALONE_SECONDS", 60.0)
    quick("close")
    quick("connect", SLUG)
    root = Path(__file__).resolve().parents[3]
    looker = subprocess.Popen(
        [sys.executable, "-c", LOOKING, SLUG], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert looker.stdin is not None
    assert looker.stdout is not None
    try:
        assert looker.stdout.readline() == "ready\n"
        for _ in range(5):
            looker.stdin.write("\n" * 5)
            looker.stdin.flush()
            quick("connect", SLUG, "--restore")
            assert [looker.stdout.readline() for _ in range(5)] == ["looked\n"] * 5
    finally:
        looker.communicate(timeout=60)
    assert config.load_instance(SLUG) == settings
    assert "clean" in quick("fsck")
