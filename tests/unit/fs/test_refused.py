"""What is said of what storage refuses for good."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from lamfs.cli import status
from lamfs.daemon.control import ControlServer
from lamfs.errors import LamfsError
from lamfs.fs.numbers import collect
from lamfs.model import ROOT_INO
from lamfs.registry import Registry
from lamfs.storage import base
from lamfs.work import refused
from tests.support.clock import run_jumping
from tests.support.fsbox import User
from tests.support.timed import timed
from tests.unit.fs.conftest import MakeBox


@pytest.mark.parametrize(
    ("others", "more"),
    [
        (0, ""),
        (1, " The same is true of 'b'."),
        (2, " The same is true of 'b' and 'c'."),
        (3, " The same is true of 'b', 'c' and 'd'."),
        (4, " The same is true of 'b', 'c', 'd' and one more file."),
        (5, " The same is true of 'b', 'c', 'd' and 2 more files."),
    ],
)
def test_a_sentence_about_files_that_are_too_large(tmp_path: Any, others: int, more: str) -> None:
    registry = Registry(tmp_path / "r.lndb", create=True)
    for name in "abcdef"[: others + 1]:
        inode, _ = timed(registry).names.create_file(ROOT_INO, name, 0o100644, 0, 0)
        timed(registry).journal.ready_put(inode.ino)
        entry = registry.journal.put_of(inode.ino)
        assert entry is not None
        registry.journal.refuse(entry.id, f"'{name}' is too large; cut it.")
    said = refused.sentence(registry, registry.journal.refused())
    registry.close()
    assert said == f"'a' is too large; cut it. Until then it is not stored, and stays in the spool.{more}"


def test_sync_says_what_is_too_large_and_what_else_is_refused(tmp_path: Any) -> None:
    async def sync_all(progress: Any) -> list[str]:
        return [f"delete object{number}: refused" for number in range(7)]

    fs: Any = SimpleNamespace(sync_all=sync_all, refused=lambda: "'a' is too large.")
    nobody: Any = None

    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        stream: Any = theirs
        await ControlServer(tmp_path / "s", fs, nobody, nobody)._answer(stream, b'{"cmd": "sync"}')
        reply = json.loads(await ours.receive_some())
        assert reply["error"].startswith("'a' is too large. Storage also refuses for good, and no bytes are lost")
        assert "delete object4: refused; and 2 more" in reply["error"]

    run_jumping(main)


def test_status_shows_what_is_not_tried_again(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(user: User) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(base, "LARGEST_OBJECT", 99_999)
            await user.write_file("a", b"x" * 100_000)
            await user.fs.context.uploader.drain()
        numbers = collect(user.fs.context)
        assert numbers["retrying"] == 1
        (line,) = status._retry_lines(numbers)
        assert line.startswith("  refused  put a, not tried again: 'a' has ")
        await user.unlink("a")

    make_box("s3").run(scenario, User())


def test_status_forgets_an_object_that_is_there_again(make_box: MakeBox, tmp_path: Any) -> None:
    """It was gone when somebody read it; later it is what the registry knows, and nobody reads it again."""
    box = make_box("local")
    nobody: Any = None

    async def shown(user: User) -> list[str]:
        ours, theirs = trio.testing.memory_stream_pair()
        stream: Any = theirs
        await ControlServer(tmp_path / "s", user.fs, nobody, nobody)._answer(stream, b'{"cmd": "status"}')
        return [found["key"] for found in json.loads(await ours.receive_some())["status"]["storage_changed"]]

    async def scenario(user: User) -> None:
        await user.write_file("a", b"some bytes")
        await user.sync()
        path = box.store.url(user.revision("a").object_key)
        os.rename(path, f"{path}.aside")
        with pytest.raises(LamfsError):
            await user.read("a")
        assert await shown(user) == ["a"]
        os.rename(f"{path}.aside", path)
        assert await shown(user) == []
        assert await user.read("a") == b"some bytes"

    box.run(scenario, User())
