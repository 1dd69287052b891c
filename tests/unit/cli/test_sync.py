"""Waiting for a mount, against a control socket that says what a daemon would."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lamfs import config, mountinfo
from lamfs.cli import main, sync
from lamfs.model import StorageConfig, iso, now_ns
from lamfs.mountinfo import Mounted
from lamfs.ops import mounts, setup
from lamfs.ops.instance import Instance
from lamfs.registry import Lost, Registry, process_id
from tests.support.ops import write_spool
from tests.support.timed import timed

Answer = Callable[[dict[str, Any]], list[dict[str, Any]] | None]


class Daemon:
    """Answers on a control socket: ``answer`` gives the lines for a command, None for no word at all."""

    def __init__(self, folder: Path, answer: Answer) -> None:
        self._answer = answer
        self.settings = config.InstanceSettings("a/b", StorageConfig(str(folder / "store")))
        config.save_instance(self.settings)
        self.settings.mounts_dir.mkdir(parents=True, mode=0o700)
        path = self.settings.mounts_dir / f"{os.getpid()}.sock"
        self.record = mounts.MountRecord(
            os.getpid(), process_id() or "", str(folder / "mnt"), "a/b", str(path), now_ns()
        )
        mounts.write(self.settings.mounts_dir, self.record)
        self._listener = socket.socket(socket.AF_UNIX)
        with mounts.socket_address(path) as address:
            self._listener.bind(address)
        self._listener.listen()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(channel)
            thread = threading.Thread(target=self._serve, args=(channel,))
            thread.start()
            self._threads.append(thread)

    def _serve(self, channel: socket.socket) -> None:
        with channel.makefile("rb") as lines:
            for line in lines:
                replies = self._answer(json.loads(line))
                for reply in replies or ():
                    channel.sendall(json.dumps(reply).encode() + b"\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for channel in self._open:
            channel.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for channel in self._open:
            channel.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[[Answer], Daemon]]:
    made: list[Daemon] = []

    def make(answer: Answer) -> Daemon:
        made.append(Daemon(tmp_path, answer))
        return made[0]

    yield make
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "LOOK_SECONDS", 0.05)


def status(**fields: Any) -> list[dict[str, Any]]:
    return [{"ok": True, "status": {"owed": {}, "errors": [], **fields}}]


def test_sync_waits_for_the_word_of_the_daemon(daemon) -> None:
    made = daemon(lambda command: [{"progress": {"owed": 2, "bytes": 5}}, {"ok": True}])
    result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{made.record.mountpoint}: everything is stored.\n"
    assert CliRunner().invoke(main, ["sync", f"{made.record.mountpoint}/some/key"]).exit_code == 0


def test_sync_names_what_is_lost(daemon) -> None:
    made = daemon(lambda command: [{"ok": True}])
    with contextlib.closing(Registry(made.settings.registry_path, create=True)) as registry:
        registry.db.set_meta("slug", "a/b")
        registry.db.set_meta("uid", "x")
        registry.rescue.note_lost(Lost("a.bin", "", 7, True, 1, ranges=((100, 107),)))
    result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 0
    assert "LOST: of what was written to 'a.bin' last, 7 bytes are lost (bytes 100-106)" in result.stderr


def test_the_error_of_the_daemon_is_told(daemon) -> None:
    daemon(lambda command: [{"error": "The bucket is gone."}])
    result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 1
    assert result.stderr == "lamfs: The bucket is gone.\n"


def test_when_the_time_is_up_it_says_what_is_owed_and_why(daemon) -> None:
    failures = [{"at": iso(now_ns() - 3_600_000_000_000), "what": "put old", "error": "long ago."}]

    def answer(command: dict[str, Any]) -> list[dict[str, Any]]:
        if command["cmd"] == "sync":
            # What goes wrong from now on, twice the same.
            failures.extend(2 * [{"at": iso(now_ns() + 1_000_000), "what": "put a", "error": "No answer."}])
            return [{"progress": {"owed": 3, "bytes": 2048}}]
        return status(errors=failures, owed={"put": 2, "delete": 1}, owed_bytes=2048)

    made = daemon(answer)
    result = CliRunner().invoke(main, ["sync", "--timeout", "0.4"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "put a: No answer. Trying again.",
        "Still to store: 2 puts (2.0 KiB), 1 delete. Ctrl-C stops waiting, not the mount.",
        f"lamfs: {made.record.mountpoint} still owes storage 3 steps (2.0 KiB) after 0.4 s.",
    ]


def test_a_daemon_that_hangs_up_is_no_success(daemon) -> None:
    made = daemon(lambda command: None)
    waiting = threading.Timer(0.3, lambda: [each.shutdown(socket.SHUT_RDWR) for each in made._open])
    made._answer = lambda command: status() if command["cmd"] == "status" else waiting.start()  # type: ignore[func-returns-value]
    result = CliRunner().invoke(main, ["sync"])
    waiting.join()
    assert result.exit_code == 1
    assert "hung up before it had answered" in result.stderr or "does not answer" in result.stderr


def test_a_daemon_that_answers_nothing_does_not_hold_up_the_user(daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "ANSWER_SECONDS", 0.1)
    made = daemon(lambda command: None)
    result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 1
    assert f"The mount at {made.record.mountpoint}" in result.stderr
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 0
    assert "does not answer" in shown.stdout


def test_status_shows_what_the_daemon_says(daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    at = iso(now_ns())
    made = daemon(
        lambda command: status(
            started_at=at,
            owed={"put": 2, "delete": 1},
            owed_bytes=3 << 20,
            uploading=[{"key": "a/b\n.csv", "size": 200, "done": 50}],
            cache={"hits": 4, "misses": 1, "fetched_bytes": 1024, "damaged": 0},
            errors=[{"at": at, "what": "put x", "error": "No."}] * 3,
            open_files=2,
        )
    )
    monkeypatch.setattr(mountinfo, "table", lambda: [Mounted(made.record.mountpoint, "fuse.lamfs", "lamfs:a/b")])
    lines = CliRunner().invoke(main, ["status"]).stdout.splitlines()
    assert lines[0].startswith(f"a/b at {made.record.mountpoint} (pid {os.getpid()}, since ")
    assert "  owed     2 puts (3.0 MiB), 1 delete" in lines
    assert r"  storing  a/b\n.csv: 25 % of 200 B" in lines
    assert "  blocks   4 from the cache, 1 fetched (1.0 KiB)" in lines
    assert len([line for line in lines if line.endswith("put x: No.")]) == 1
    data = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)
    assert data["mounts"][0]["owed"] == {"put": 2, "delete": 1}
    assert data["mounts"][0]["answers"] is True
    assert data["mounts"][0]["detached"] is False
    monkeypatch.setattr(mountinfo, "table", list)
    lines = CliRunner().invoke(main, ["status"]).stdout.splitlines()
    assert lines[0].startswith(f"a/b unmounted from {made.record.mountpoint} (pid {os.getpid()}, since ")
    assert lines[0].endswith("its daemon ends when its files are closed and everything is stored")
    assert data["instances"] == [
        {"slug": "a/b", "storage": made.settings.storage.root, "current": False, "mounted": True}
    ]


def owe(slug: str) -> None:
    with Instance.open(slug) as opened:
        inode, src = timed(opened.registry).names.create_file(1, "a.txt", 0o100644, 0, 0)
        timed(opened.registry).journal.ready_put(inode.ino)
        opened.registry.db.execute("UPDATE journal SET owner='x:1:1'")
        write_spool(opened, src, "only here")


def test_what_a_dead_mount_owes_is_not_called_stored(tmp_path: Path) -> None:
    settings = setup.init(str(tmp_path / "store"), "one", say=lambda _: None)
    clean = CliRunner().invoke(main, ["sync"])
    assert (clean.exit_code, clean.stdout) == (0, "No mount is alive, and nothing waits to be stored.\n")
    owe(settings.slug)
    result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 1
    assert f"{settings.slug} is not mounted, and owes storage 1 put" in result.stderr
    assert f"'lamfs mount --instance {settings.slug}' stores it" in result.stderr
    # Where it was mounted is where it is mounted again.
    config.make_directory(settings.mounts_dir)
    mounts.write(settings.mounts_dir, mounts.MountRecord(1, "x:1:1", "/some/where", settings.slug, "/none", 1))
    assert f"'lamfs mount --instance {settings.slug} /some/where'" in CliRunner().invoke(main, ["sync"]).stderr
    assert "owes storage" not in CliRunner().invoke(main, ["close", settings.slug]).stderr
    assert CliRunner().invoke(main, ["sync"]).exit_code == 0


def test_a_living_mount_does_not_hide_what_another_instance_owes(daemon, tmp_path: Path) -> None:
    made = daemon(lambda command: [{"ok": True}])
    settings = setup.init(str(tmp_path / "other"), "one", say=lambda _: None)
    owe(settings.slug)
    result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 1
    assert result.stdout == f"{made.record.mountpoint}: everything is stored.\n"
    assert settings.slug in result.stderr


@pytest.mark.parametrize(
    ("owed", "size", "text"),
    [
        ({}, 0, "nothing"),
        ({"put": 1}, 0, "1 put"),
        ({"delete": 2, "put": 2, "move": 1, "save": 1}, 1024, "2 puts (1.0 KiB), 1 save, 1 move, 2 deletes"),
    ],
)
def test_what_is_owed_in_words(owed: dict[str, int], size: int, text: str) -> None:
    assert sync.owed_words(owed, size) == text
