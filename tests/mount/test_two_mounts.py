"""Two mounts of one instance on one machine write one file: the registry decides whose write follows which revision.

Random interleavings, one system call after the other, against a model: a write, close or fsync may fail with ESTALE,
but what a close or fsync has acknowledged is there until a write that was based on it is acknowledged, and no
revision is made of another one's bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance, checked, children, is_alive, outcome, wait_until

RUNS = 300
CALLS = 14


@dataclass
class Pair:
    """An instance that is mounted twice."""

    instance: MountedInstance
    other: Path

    @property
    def paths(self) -> tuple[Path, Path]:
        return self.instance.path, self.other

    def sync(self) -> None:
        self.instance.cli("sync", str(self.instance.path))
        self.instance.cli("sync", str(self.other))


@contextlib.contextmanager
def mounted_beside(instance: MountedInstance) -> Iterator[Path]:
    """The instance's second mount; whatever becomes of the test, it is detached."""
    other = instance.base / "other"
    other.mkdir()
    instance.cli("mount", str(other))
    try:
        yield other
    finally:
        subprocess.run(["fusermount3", "-uz", str(other)], check=False, capture_output=True, timeout=10)


@pytest.fixture(scope="module")
def module_pair(fuse: None) -> Iterator[Pair]:
    with checked(MountedInstance()) as instance:
        instance.mount()
        with mounted_beside(instance) as other:
            yield Pair(instance, other)
            instance.cli("umount", str(other))


@pytest.fixture
def beside(local_mount: MountedInstance) -> Iterator[Path]:
    """A second mount of ``local_mount``."""
    with mounted_beside(local_mount) as other:
        yield other


@pytest.fixture
def pair(module_pair: Pair) -> Iterator[Pair]:
    module_pair.instance.extend(110)
    yield module_pair
    module_pair.instance.check_log()


@dataclass
class Opened:
    """A handle: what its program believes the file to hold, and whether that is still another file's.

    ``revision``: how many revisions were acknowledged when the content was looked at; ``lost``: a call failed.
    """

    fd: int
    file: int
    revision: int
    data: bytes
    dirty: bool = False
    lost: bool = False


class Play:
    """One random interleaving on one name."""

    def __init__(self, pair: Pair, name: str, seed: int) -> None:
        self.paths = [path / name for path in pair.paths]
        self.random = random.Random(seed)
        self.handles: list[list[Opened]] = [[], []]
        self.said: list[str] = []
        self.file, self.revision, self.data = 1, 0, b"begin"
        self.writing: int | None = None
        self.paths[0].write_bytes(self.data)
        self.seed = seed

    def fail(self, text: str) -> None:
        pytest.fail(f"seed {self.seed}: {text}\n" + "\n".join(self.said))

    def attempt(self, what: str, call: object) -> bool:
        """Whether a call succeeded. It may fail with ESTALE only."""
        assert callable(call)
        try:
            call()
        except OSError as error:
            self.said.append(f"{what}: {errno.errorcode[error.errno or 0]}")
            if error.errno not in (errno.ESTALE, errno.ENOENT):
                self.fail(f"{what} failed with {error}")
            return False
        self.said.append(what)
        return True

    def acknowledged(self, side: int, handle: Opened) -> None:
        """A close or fsync returned 0."""
        if not handle.dirty or handle.file != self.file:
            return
        if handle.lost:
            handle.dirty = False
            return
        if handle.revision != self.revision:
            self.fail(f"a write based on revision {handle.revision} was acknowledged after {self.revision}")
        self.revision += 1
        self.data = handle.data
        for mine in self.handles[side]:
            if mine.file == self.file and mine.data == handle.data and not mine.lost:
                mine.revision = self.revision
        handle.revision, handle.dirty = self.revision, False

    def step(self) -> None:
        side = self.random.randrange(2)
        mount, path, handles = "AB"[side], self.paths[side], self.handles[side]
        if not handles:
            found: list[int] = []
            if self.attempt(f"{mount} open", lambda: found.append(os.open(path, os.O_RDWR))):
                data = os.pread(found[0], 1 << 16, 0)
                handles.append(Opened(found[0], self.file, self.revision, data))
                dirty = any(h.dirty for h in self.handles[1 - side])
                if not dirty and data != self.data:
                    self.fail(f"{mount} reads {data!r}, not {self.data!r}")
            return
        handle = handles[0]
        kind = self.random.choice(["write", "write", "append", "cut", "fsync", "close", "close", "replace", "unlink"])
        if kind in ("write", "append", "cut"):
            self.change(side, handle, kind)
        elif kind == "fsync":
            if self.attempt(f"{mount} fsync", lambda: os.fsync(handle.fd)):
                self.acknowledged(side, handle)
            else:
                handle.lost = True
        elif kind == "close":
            handles.remove(handle)
            if self.attempt(f"{mount} close", lambda: os.close(handle.fd)):
                self.acknowledged(side, handle)
        elif self.random.random() < 0.4:
            self.renew(side, kind)

    def change(self, side: int, handle: Opened, kind: str) -> None:
        mount, text = "AB"[side], f"<{self.random.randrange(1 << 30):x}>".encode()
        if kind == "write":
            at = self.random.randrange(len(handle.data) + 1)
            new = handle.data[:at] + text + handle.data[at + len(text) :]
            done = self.attempt(f"{mount} write", lambda: os.pwrite(handle.fd, text, at))
        elif kind == "append":
            new = handle.data + text
            done = self.attempt(f"{mount} append", lambda: os.pwrite(handle.fd, text, len(handle.data)))
        else:
            size = self.random.randrange(len(handle.data) + 1)
            new = handle.data[:size]
            done = self.attempt(f"{mount} cut", lambda: os.ftruncate(handle.fd, size))
        if not done:
            handle.lost = True
        elif not handle.lost:
            handle.data, handle.dirty = new, True

    def renew(self, side: int, kind: str) -> None:
        """The name gets another file."""
        mount, path = "AB"[side], self.paths[side]
        new = f"new {self.random.randrange(1 << 30):x}".encode()
        beside = path.with_name(path.name + ".new")
        if kind == "unlink":
            if not self.attempt(f"{mount} unlink", path.unlink):
                return
            self.attempt(f"{mount} create", lambda: path.write_bytes(new))
        else:
            beside.write_bytes(new)
            self.attempt(f"{mount} rename over", lambda: os.rename(beside, path))
        self.file, self.revision, self.data = self.file + 1, 0, new

    def end(self) -> None:
        for side in (0, 1):
            for handle in self.handles[side]:
                if self.attempt(f"{'AB'[side]} close", lambda h=handle: os.close(h.fd)):
                    self.acknowledged(side, handle)
            self.handles[side] = []
        for mount, path in zip("AB", self.paths, strict=True):
            data = path.read_bytes()
            if data != self.data:
                self.fail(f"in the end {mount} reads {data!r}, not {self.data!r}")


def test_random_interleavings_on_one_file(pair: Pair) -> None:
    plays = [Play(pair, f"file {seed}", seed) for seed in range(RUNS)]
    for play in plays:
        for _ in range(CALLS):
            play.step()
        play.end()
    pair.sync()
    for play in plays:
        play.end()
    assert pair.instance.spooled() == []
    assert any("ESTALE" in line for play in plays for line in play.said)


APPEND = r"""
import os, sys
path, word = sys.argv[1:]
for number in range(80):
    line = f"{word} {number}\n".encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)
    except OSError as error:
        assert error.errno == 116, error
        continue
    sys.stdout.write(line.decode())
"""


def test_two_processes_append_lines(pair: Pair) -> None:
    """Each line of which open, write and close succeeded is there, once and whole; the others failed with ESTALE."""
    pair.paths[0].joinpath("log").write_bytes(b"")
    processes = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(path / "log"), mount], stdout=subprocess.PIPE, text=True)
        for mount, path in zip("AB", pair.paths, strict=True)
    ]
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    pair.sync()
    for path in pair.paths:
        lines = (path / "log").read_text().splitlines()
        assert sorted(lines) == sorted(said[0] + said[1])
    assert said[0]
    assert said[1]


@pytest.mark.parametrize("acknowledged", [False, True])
def test_the_other_mount_goes_on_when_a_daemon_is_killed(
    local_mount: MountedInstance, beside: Path, acknowledged: bool
) -> None:
    """A file that a killed daemon was writing counts as closed; the other mount reads, writes and stores it."""
    other = beside
    (other / "file").write_bytes(b"begin")
    fd = os.open(local_mount.path / "file", os.O_RDWR)
    os.pwrite(fd, b"other", 0)
    if acknowledged:
        os.close(os.dup(fd))
        os.pwrite(fd, b"again", 0)
    theirs = os.open(other / "file", os.O_RDWR)
    with pytest.raises(OSError, match="Stale"):
        os.pwrite(theirs, b"!", 0)
    os.close(theirs)
    for pid in (local_mount.pid, *children(local_mount.pid)):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(local_mount.pid), "the daemon has ended")
    with contextlib.suppress(OSError):
        os.close(fd)
    subprocess.run(["fusermount3", "-uz", str(local_mount.path)], check=False, capture_output=True, timeout=10)
    content = b"again" if acknowledged else b"other"
    wait_until(lambda: (other / "file").read_bytes() == content, "what was written shows")

    def append() -> bool:
        with open(other / "file", "ab", buffering=0) as file:
            return outcome(lambda: file.write(b" and more")) == 9

    wait_until(append, "the other mount writes")
    fd = os.open(other / "file", os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    assert (other / "file").read_bytes() == content + b" and more"
    local_mount.cli("umount", "--force", str(other))
    assert local_mount.spooled() == []
    assert local_mount.fsck() == []


def test_a_forced_unmount_ends_both_daemons(local_mount: MountedInstance, beside: Path) -> None:
    """The order of calls after which both mounts once owed a file that was gone."""
    other = beside
    (local_mount.path / "file").write_bytes(b"begin")
    wait_until(lambda: outcome((other / "file").read_bytes) == b"begin", "the file shows")
    one, two = (os.open(path / "file", os.O_RDWR) for path in (local_mount.path, other))
    os.pwrite(two, b"two", 0)
    with pytest.raises(OSError, match="Stale"):
        os.pwrite(one, b"one", 0)
    os.close(two)
    os.close(one)
    assert (local_mount.path / "file").read_bytes() == (other / "file").read_bytes() == b"twoin"
    local_mount.cli("umount", "--force", str(other))
    local_mount.cli("umount", "--force", str(local_mount.path))
    wait_until(lambda: not is_alive(local_mount.pid), "the daemon has ended", seconds=30)
    assert local_mount.spooled() == []
    assert local_mount.fsck() == []
