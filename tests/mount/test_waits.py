"""Storage that stalls: who waits for it can be stopped, and nobody else waits."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import BUCKET, MountedInstance, wait_until
from tests.support.proxy import FaultProxy, Rule
from tests.support.servers import Server

DATA = b"0123456789abcdef" * 8192
STALLED = 14
"""More than the requests that were once made of storage at a time."""
SOON = 20.0
"""Seconds within which a program that is told to stop has to end, on a busy machine. Storage is waited for longer."""


class Stalled:
    """A mount on S3 none of whose files is cached but ``cached``; the objects of ``f0`` … are never sent."""

    def __init__(self, instance: MountedInstance, proxy: FaultProxy, rules: list[Rule]) -> None:
        self.instance = instance
        self.proxy = proxy
        self.rules = rules
        self.path = instance.path
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str | Path, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [os.fspath(word) for word in command], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.started.append(process)
        seen = 0

        def stays() -> bool:
            nonlocal seen
            seen = seen + 1 if waits(process.pid) else 0
            return seen > 20  # looks: not just a call that is answered at once

        wait_until(stays, f"{command} waits for storage")
        return process

    def python(self, code: str, name: str) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, "-c", f"import os, sys\npath = sys.argv[1]\n{code}", self.path / name)


def waits(pid: int) -> bool:
    """Whether a process waits for the file system."""
    return Path(f"/proc/{pid}/wchan").read_text().startswith(("request_wait", "folio_wait", "fuse_"))


def ends(process: subprocess.Popen[bytes], number: int) -> tuple[int, str]:
    """Send a signal; exit code and stderr of a process that has to end soon."""
    process.send_signal(number)
    _, problems = process.communicate(timeout=SOON)
    return process.returncode, problems.decode()


@pytest.fixture(scope="module")
def module_stalled(seaweed: Server, fuse: None) -> Iterator[Stalled]:
    with FaultProxy(seaweed.port) as proxy:
        config = dataclasses.replace(seaweed.config(BUCKET, f"w{os.urandom(4).hex()}/root"), endpoint_url=proxy.url)
        with MountedInstance(config, env=seaweed.env) as instance:
            instance.mount()
            for number in range(STALLED):
                (instance.path / f"f{number}").write_bytes(DATA)
            for name in ("cached", "early", "other", "moved"):
                (instance.path / name).write_bytes(DATA)
            instance.sync()
            uids = [str(instance.info(f"f{number}")["uid"]) for number in range(STALLED)]
            instance.fusermount()
            shutil.rmtree(instance.cache_dir)
            instance.mount()
            assert (instance.path / "cached").read_bytes() == DATA
            yield Stalled(instance, proxy, [proxy.add("hang", path=uid, count=None) for uid in uids])


@pytest.fixture
def stalled(module_stalled: Stalled) -> Iterator[Stalled]:
    yield module_stalled
    for process in module_stalled.started:
        process.kill()
        process.communicate()
    module_stalled.started.clear()


def test_a_program_that_is_interrupted_ends_and_the_mount_goes_on(stalled: Stalled) -> None:
    """Ctrl-C of a reader, a writer, and one that waits in fsync, which catch it; and of one that does not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        assert ends(stalled.start("cat", stalled.path / "f0"), number)[0] == -number
    for code, name in (
        ("open(path, 'rb').read()", "f0"),
        ("os.pwrite(os.open(path, os.O_RDWR), b'x', 5)", "f1"),
        ("os.truncate(path, 5)", "f2"),
        ("fd = os.open(path, os.O_RDWR | os.O_TRUNC); os.write(fd, b'x'); os.fsync(fd)", "f3"),
    ):
        returned, problems = ends(stalled.python(code, name), signal.SIGINT)
        assert returned == -signal.SIGINT, problems
        assert "KeyboardInterrupt" in problems
    assert os.stat(stalled.path / "f2").st_size == len(DATA)
    assert (stalled.path / "f3").read_bytes() == b"x"
    assert (stalled.path / "cached").read_bytes() == DATA
    assert stalled.instance.status()["io_errors"] == 0


def test_only_who_is_told_to_stop_is_interrupted(stalled: Stalled) -> None:
    """Not another reader of the file, nor one whose timer goes off, nor one that ignores Ctrl-C; a child is."""
    other = stalled.start("cat", stalled.path / "f4")
    alarmed = stalled.python(
        "import signal\nsignal.signal(signal.SIGALRM, lambda *a: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)\nopen(path, 'rb').read()",
        "f4",
    )
    deaf = stalled.python("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nopen(path, 'rb').read()", "f4")
    deaf.send_signal(signal.SIGINT)
    with open(stalled.path / "f5", "rb") as file:
        child = stalled.start(sys.executable, "-c", "import sys; sys.stdin.buffer.read()", stdin=file.fileno())
        returned, problems = ends(child, signal.SIGINT)
    assert returned == -signal.SIGINT
    assert "KeyboardInterrupt" in problems
    again = stalled.start("dd", f"if={stalled.path / 'f4'}", "of=/dev/null", "iflag=direct")
    assert ends(again, signal.SIGINT)[0] == -signal.SIGINT
    assert all(process.poll() is None for process in (other, alarmed, deaf))
    assert waits(other.pid)
    assert waits(alarmed.pid)


def test_what_the_dead_have_asked_for_is_given_up(stalled: Stalled) -> None:
    """The kernel has few requests for reading ahead: they must not be held by who has been killed."""
    for number in range(4, STALLED):
        assert ends(stalled.start("cat", stalled.path / f"f{number}"), signal.SIGKILL)[0] == -signal.SIGKILL
        assert ends(stalled.start("cat", stalled.path / f"f{number}"), signal.SIGINT)[0] == -signal.SIGINT
    wait_until(lambda: stalled.instance.status()["open_files"] == 0, "their handles are gone", seconds=SOON)
    assert (stalled.path / "early").read_bytes() == DATA


def test_other_files_are_read_while_many_stall(stalled: Stalled) -> None:
    for number in range(4, STALLED):
        stalled.start("cat", stalled.path / f"f{number}")
    wait_until(lambda: all(rule.hits for rule in stalled.rules[4:]), "all have been asked for")
    began = time.monotonic()
    assert (stalled.path / "other").read_bytes() == DATA
    assert (stalled.path / "cached").read_bytes() == DATA
    assert "f5" in os.listdir(stalled.path)
    os.rename(stalled.path / "moved", stalled.path / "renamed")
    (stalled.path / "new").write_bytes(b"new")
    assert time.monotonic() - began < SOON
    stalled.proxy.clear()
    for process in stalled.started:
        process.communicate(timeout=60)
        assert process.returncode == 0
    stalled.instance.sync()
