"""What /proc says of a process: whether it is told to stop, and what it holds."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from lamfs import mountinfo
from lamfs.errors import FsError
from lamfs.fs import signals
from lamfs.fs.counters import Counters
from lamfs.fs.waits import LONG_SECONDS, Caller, Waits
from tests.support.mounts import wait_until
from tests.support.transfer import until

PREPARE = """
import signal, sys
signal.signal(signal.SIGALRM, lambda *a: None)
signal.signal(signal.SIGINT, lambda *a: None)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print(flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def stopped_process() -> Iterator[int]:
    """A process that does not run: signals stay pending, as while it waits for a file system."""
    with subprocess.Popen([sys.executable, "-c", PREPARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            wait_until(
                lambda: "\nState:\tT" in Path(f"/proc/{process.pid}/status").read_text(), "the process has stopped"
            )
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGINT, True),  # caught, but a person wants it to stop
        (signal.SIGQUIT, True),
        (signal.SIGUSR1, True),  # not caught: ends it
        (signal.SIGALRM, False),  # caught
        (signal.SIGHUP, False),  # ignored
        (signal.SIGTERM, False),  # blocked
        (signal.SIGCHLD, False),
        (signal.SIGWINCH, False),
        (signal.SIGTSTP, False),
    ],
)
def test_which_signals_ask_a_process_to_stop(number: signal.Signals, told: bool) -> None:
    with stopped_process() as pid:
        assert not signals.told_to_stop(pid)
        os.kill(pid, number)
        assert signals.told_to_stop(pid) == told
        assert (pid in signals.all_told_to_stop()) == told
    assert not signals.told_to_stop(pid)


def test_what_a_process_holds_and_where_it_comes_from(tmp_path: Path) -> None:
    point = tmp_path
    while not os.path.ismount(point):
        point = point.parent
    mount = signals.find_mount(str(point))
    assert mount is not None
    with open(tmp_path / "f", "w") as file, stopped_process() as child:
        ino = os.fstat(file.fileno()).st_ino
        assert signals.holds(os.getpid(), mount, ino)
        assert not signals.holds(os.getpid(), mount._replace(number=0), ino)
        assert not signals.holds(child, mount, ino)
        assert signals.holders(mount, ino) == [os.getpid()]
        assert signals.descends(child, os.getpid())
        assert not signals.descends(os.getpid(), child)
        assert signals.process_of(child) == child
    assert not signals.holds(os.getpid(), mount, ino)
    assert signals.process_of(child) is None
    assert signals.find_mount("/no/such/mount") is None


@pytest.mark.usefixtures("jumping_clock")
async def test_nothing_is_looked_up_for_waits_that_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(signals, "all_told_to_stop", lambda: looks.append(1) or [])
    waiting = Waits(Counters())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.run, "/nowhere")
        for _ in range(60):
            await waiting.bounded(lambda: trio.sleep(LONG_SECONDS * 0.99), 10.0, Caller(), str)
        assert not looks
        await waiting.bounded(lambda: until(lambda: bool(looks)), 10.0, Caller(), str)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("jumping_clock")
async def test_who_is_told_to_stop_begins_no_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel asks for the rest of an interrupted readahead: none of it is waited for. Others pay nothing for it."""
    told = {7}
    asked: list[int] = []
    monkeypatch.setattr(signals, "all_told_to_stop", lambda: list(told))
    monkeypatch.setattr(signals, "process_of", lambda pid: pid)
    monkeypatch.setattr(signals, "told_to_stop", lambda pid: asked.append(pid) or pid in told)
    waiting = Waits(Counters())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.run, "/nowhere")
        for _ in range(3):
            with pytest.raises(FsError) as info:
                await waiting.bounded(trio.sleep_forever, 10.0, Caller(7), str)
            assert info.value.errno == errno.EINTR
        assert asked == [7, 7], "the first is found by the look at all"
        await waiting.bounded(trio.lowlevel.checkpoint, 10.0, Caller(8), str)
        told.clear()
        await waiting.bounded(trio.lowlevel.checkpoint, 10.0, Caller(7), str)
        assert asked == [7, 7, 7]
        nursery.cancel_scope.cancel()


def test_a_mount_whose_path_is_not_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    there = mountinfo.Mounted("/mnt/é ü", "fuse.lamfs", "lamfs:a/b", "0:300", 41)
    monkeypatch.setattr(mountinfo, "table", lambda: [there])
    assert signals.find_mount("/mnt/é ü") == signals.Mount(41, "00:12c")
