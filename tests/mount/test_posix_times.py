"""Which call marks which time, of the file and of its directory: as on a disk (POSIX.1-2024, relatime)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mount.test_posix_names import RENAME_EXCHANGE, Same, rename2
from tests.support.mounts import MountedInstance, outcome

OLD = 10**18
"""September 2001: long before anything a test does."""


def age(*paths: Path) -> None:
    """Set atime and mtime back, atime before mtime."""
    for path in paths:
        os.utime(path, ns=(OLD, OLD + 5), follow_symlinks=False)


def marked(path: Path, call: Callable[[], Any], *others: Path) -> dict[str, str]:
    """Which times a call marks: of ``path`` as ``file``, of its directory, and of others by their names."""
    watched = {"file": path, "directory": path.parent, **{str(other.name): other for other in others}}
    before = {}
    for name, place in watched.items():
        if os.path.lexists(place):
            age(place)
            before[name] = os.lstat(place)
    call()
    found = {}
    for name, old in before.items():
        place = watched[name]
        if not os.path.lexists(place):
            continue
        new = os.lstat(place)
        found[name] = "".join(
            letter
            for letter, field in (("a", "st_atime_ns"), ("m", "st_mtime_ns"), ("c", "st_ctime_ns"))
            if getattr(new, field) != getattr(old, field)
        )
    return found


def write(path: Path, data: bytes, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    os.write(fd, data)
    os.close(fd)


def mapped(path: Path) -> None:
    import mmap

    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[0:1] = b"m"
        memory.flush()


CALLS: dict[str, Callable[[Path], Any]] = {
    "read": lambda p: p.read_bytes(),
    "read nothing": lambda p: os.close(os.open(p, os.O_RDONLY)),
    "write": lambda p: write(p, b"x"),
    "append": lambda p: write(p, b"x", os.O_APPEND),
    "open to empty": lambda p: os.close(os.open(p, os.O_WRONLY | os.O_TRUNC)),
    "truncate up": lambda p: os.truncate(p, 100_000),
    "truncate down": lambda p: os.truncate(p, 1),
    "open with O_CREAT": lambda p: os.close(os.open(p, os.O_WRONLY | os.O_CREAT)),
    "mmap": mapped,
    "chmod": lambda p: p.chmod(0o600),
    "chown": lambda p: os.chown(p, 1, 1),
    "chown to nobody else": lambda p: os.chown(p, -1, -1),
    "utime": lambda p: os.utime(p, ns=(OLD, OLD + 5)),
    "touch": lambda p: os.utime(p),
    "link": lambda p: os.link(p, p.with_name("hard")),
    "unlink": lambda p: os.unlink(p),
    "unlink one of two": lambda p: (os.link(p, p.with_name("hard")), os.unlink(p.with_name("hard"))),
    "rename": lambda p: os.rename(p, p.with_name("new")),
    "rename over it": lambda p: os.rename(p.with_name("other"), p),
    "exchange": lambda p: rename2(p.with_name("other"), p, RENAME_EXCHANGE),
    "create": lambda p: p.with_name("made").touch(),
    "mkdir": lambda p: p.with_name("made").mkdir(),
    "symlink": lambda p: p.with_name("made").symlink_to("x"),
    "mkfifo": lambda p: os.mkfifo(p.with_name("made")),
    "stat": lambda p: p.stat(),
    "failed rename": lambda p: outcome(lambda: os.rename(p.with_name("none"), p)),
    "failed link": lambda p: outcome(lambda: os.link(p.with_name("other"), p)),
    "failed unlink": lambda p: outcome(lambda: os.unlink(p.with_name("none"))),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("size", [10, 20_000], ids=["small", "pages"])
def test_a_call_marks_the_times_that_it_marks_on_a_disk(same: Same, name: str, size: int) -> None:
    def run(where: Path) -> Any:
        path, other = where / "file", where / "other"
        path.write_bytes(b"x" * size)
        other.write_bytes(b"other")
        return marked(path, lambda: CALLS[name](path), other)

    same(run)


def test_times_of_directories_and_links(same: Same) -> None:
    def run(where: Path) -> Any:
        (where / "d" / "in").mkdir(parents=True)
        (where / "e").mkdir()
        (where / "link").symlink_to("d")
        results = [
            marked(where / "d", lambda: os.listdir(where / "d")),
            marked(where / "d", lambda: os.listdir(where / "d")),
            marked(where / "link", lambda: os.readlink(where / "link")),
            marked(where / "d", lambda: os.rename(where / "d" / "in", where / "e" / "in"), where / "e"),
            marked(where / "e", lambda: os.rmdir(where / "e" / "in")),
            marked(where / "e", lambda: os.rename(where / "d", where / "e")),
            marked(where / "e", lambda: os.rmdir(where / "e")),
        ]
        return results

    same(run)


def test_a_file_is_marked_once_after_each_change(same: Same) -> None:
    """relatime: not again before it was changed, or a day has gone by."""

    def run(where: Path) -> Any:
        path = where / "f"
        path.write_bytes(b"x" * 9000)
        results = []
        for _ in range(2):
            first = path.stat().st_atime_ns
            path.read_bytes()
            second = path.stat().st_atime_ns
            path.read_bytes()
            third = path.stat().st_atime_ns
            results.append((second > first, third == second))
            with open(path, "r+b") as file:
                file.write(b"changed")
        os.utime(path, ns=(OLD, OLD - 5))
        path.read_bytes()
        return results, path.stat().st_atime_ns > OLD

    assert same(run) == ([(True, True), (True, True)], True)


@pytest.mark.parametrize("when", [-(10**18), -1, 0, 1, 2**31 * 10**9, 2**32 * 10**9 + 7, 9 * 10**18, -(9 * 10**18)])
def test_any_time_is_kept_to_the_nanosecond(same: Same, shared: Path, when: int) -> None:
    def run(where: Path) -> Any:
        path = where / "f"
        path.touch()
        (where / "d").mkdir()
        (where / "link").symlink_to("f")
        for place in (path, where / "d", where / "link"):
            os.utime(place, ns=(when, when + 1), follow_symlinks=False)
        found = [os.lstat(place) for place in (path, where / "d", where / "link")]
        return [(info.st_atime_ns, info.st_mtime_ns) for info in found]

    # A disk need not keep what is before 1901 or after 2446; lamfs keeps 1677 to 2262.
    on_disk = -(2**31) * 10**9 <= when <= 2**33 * 10**9
    assert (same(run) if on_disk else run(shared)) == [(when, when + 1)] * 3


def test_times_of_access_outlive_the_mount(local_mount: MountedInstance) -> None:
    path = local_mount.path / "f"
    path.write_bytes(b"x")
    age(path)
    path.read_bytes()
    before = path.stat().st_atime_ns
    assert before > OLD
    local_mount.remount()
    assert path.stat().st_atime_ns == before
    local_mount.remount(["noatime"])
    age(path)
    path.read_bytes()
    assert stat.S_ISREG(path.stat().st_mode)
    assert path.stat().st_atime_ns == OLD
