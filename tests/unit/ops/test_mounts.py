"""Records of mounts, paths inside of them, and the client of the control socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError
from lamfs.model import StorageConfig
from lamfs.ops import mounts
from lamfs.registry import process_id


@pytest.fixture
def settings(tmp_path: Path) -> InstanceSettings:
    return InstanceSettings("a/b", StorageConfig(str(tmp_path / "store")))


def record_of(settings: InstanceSettings, mountpoint: str, pid: int | None = None) -> mounts.MountRecord:
    pid = pid or os.getpid()
    owner = process_id(pid)
    assert owner is not None
    path = str(settings.mounts_dir / f"{pid}.sock")
    return mounts.MountRecord(pid, owner, mountpoint, settings.slug, path, 1)


def test_dead_mounts_are_known_until_they_are_buried(settings: InstanceSettings) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        other = record_of(settings, "/mnt/b", child.pid)
        mounts.write(settings.mounts_dir, other)
        (settings.mounts_dir / f"{child.pid}.sock").write_text("")
        mine = record_of(settings, "/mnt/a")
        mounts.write(settings.mounts_dir, mine)
        (settings.mounts_dir / "1.json").write_text("{}")
        assert {record.pid for record in mounts.live(settings)} == {mine.pid, other.pid}
        assert {record.pid for record in mounts.all_live()} == {mine.pid, other.pid}
        assert mounts.all_dead() == []
        os.utime(settings.mounts_dir / f"{child.pid}.json", ns=(5, 5))
        child.communicate(b"\n")
        assert mounts.wait_gone(other, timeout=10)
    assert mounts.live(settings) == [mine]
    assert mounts.all_dead() == [(other, 5)]
    mounts.bury(mounts.all_dead()[0])
    assert mounts.all_dead() == []
    assert sorted(path.name for path in settings.mounts_dir.iterdir() if path.name != "1.json") == [f"{mine.pid}.json"]
    assert not mounts.wait_gone(mine, timeout=0.05)


def test_paths_in_a_mount(settings: InstanceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = tmp_path / "mnt" / "data"
    point.mkdir(parents=True)
    (tmp_path / "link").symlink_to(point)
    (tmp_path / "chain").symlink_to("link/sub")
    (tmp_path / "loop").symlink_to("loop")
    mounts.write(settings.mounts_dir, record_of(settings, str(point)))

    def key(path: object) -> str | None:
        found = mounts.find_by_path(str(path))
        return found[1] if found else None

    looked: list[str] = []
    real = os.lstat

    def lstat(path: object, **kwargs: object) -> os.stat_result:
        looked.append(str(path))
        return real(path, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(mounts.os, "lstat", lstat)
    assert key(point) == ""
    assert key(point / "a/b.csv") == "a/b.csv"
    assert key(f"{point}/a/../b.csv") == "b.csv"
    assert key(tmp_path / "link/a.csv") == "a.csv"
    assert key(tmp_path / "chain/a.csv") == "sub/a.csv"
    assert key(tmp_path / "mnt/database") is None
    assert key(tmp_path / "loop/a.csv") is None
    assert key(tmp_path / "missing/deep") is None
    monkeypatch.chdir(tmp_path)
    assert key("mnt/data/a.csv") == "a.csv"
    assert not [path for path in looked if path.startswith(f"{point}/")], "a hung mount would hang this"


@contextlib.contextmanager
def daemon(
    record: mounts.MountRecord, replies: list[bytes], *, hold: bool = False
) -> Iterator[list[dict[str, object]]]:
    """Answers one command with these bytes and hangs up (or, with ``hold``, never)."""
    Path(record.socket).parent.mkdir(parents=True, exist_ok=True)
    got: list[dict[str, object]] = []
    over = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        with mounts.socket_address(record.socket) as address:
            server.bind(address)
        server.listen()

        def serve() -> None:
            channel, _ = server.accept()
            with channel:
                got.append(json.loads(channel.makefile("rb").readline()))
                for reply in replies:
                    channel.sendall(reply)
                if hold:
                    over.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        yield got
        over.set()
        thread.join()


def test_a_command_its_progress_and_its_reply(settings: InstanceSettings) -> None:
    record = record_of(settings, "/mnt/a")
    seen: list[dict[str, object]] = []
    replies = [b'{"progress": {"owed": 2, "by', b'tes": 5}}\n{"progress": {"owed": 0}}\n{"ok": true, "x": 1}\n']
    with daemon(record, replies) as got:
        reply = mounts.request(record, {"cmd": "sync"}, timeout=10, on_progress=seen.append)
    assert got == [{"cmd": "sync"}]
    assert reply == {"ok": True, "x": 1}
    assert seen == [{"owed": 2, "bytes": 5}, {"owed": 0}]


def test_the_daemons_own_sentence_is_what_is_raised(settings: InstanceSettings) -> None:
    record = record_of(settings, "/mnt/a")
    with daemon(record, [b'{"error": "The bucket is gone.", "errno": 2}\n']):
        with pytest.raises(LamfsError, match=r"^The bucket is gone\.$") as caught:
            mounts.request(record, {"cmd": "sync"}, timeout=10)
    assert caught.value.errno == 2


@pytest.mark.parametrize("replies", [[], [b"no JSON\n"], [b"[1]\n"], [b'{"progress": {}}\n']])
def test_a_daemon_that_answers_nonsense_or_hangs_up(settings: InstanceSettings, replies: list[bytes]) -> None:
    record = record_of(settings, "/mnt/a")
    with daemon(record, replies):
        with pytest.raises(mounts.MountSilent, match="/mnt/a"):
            mounts.request(record, {"cmd": "status"}, timeout=10)


def test_a_daemon_that_is_silent_or_gone(settings: InstanceSettings) -> None:
    record = record_of(settings, "/mnt/a")
    with pytest.raises(mounts.MountSilent, match="does not answer"):
        mounts.request(record, {"cmd": "status"}, timeout=5)
    mounts.write(settings.mounts_dir, record)
    with daemon(record, [], hold=True):
        with pytest.raises(mounts.MountSilent, match="does not answer"):
            mounts.request(record, {"cmd": "status"}, timeout=0.05)
    mounts.poke(settings)  # never raises


def test_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    owner = process_id()
    assert owner is not None
    record = mounts.MountRecord(os.getpid(), owner, "/mnt/a", "a/b", str(folder / "1.sock"), 1)
    with daemon(record, [b'{"ok": true}\n']):
        assert mounts.request(record, {"cmd": "poke"}, timeout=10) == {"ok": True}
