"""A mount and ``lamfs cache`` on one cache at the same time: filled, evicted, replaced under each other's hands."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.mounts import MountedInstance, wait_until
from tests.support.transfer import make_bytes

MIB = 1 << 20


@contextmanager
def meanwhile(work: Any) -> Iterator[list[BaseException]]:
    """Run ``work(stop)`` again and again in a thread; what it raised is raised at the end."""
    stop, errors = threading.Event(), []

    def run() -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join(60)
    if errors:
        raise errors[0]


def direct_hash(path: Path) -> str:
    """MD5 of a file that is read past the kernel's page cache."""
    digest = hashlib.md5()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, MIB) as buffer:
            offset = 0
            while count := os.preadv(fd, [buffer], offset):
                digest.update(buffer[:count])
                offset += count
    finally:
        os.close(fd)
    return digest.hexdigest()


def held_by_daemon(mount: MountedInstance) -> list[str]:
    """Cache files that are deleted and still take room, because the daemon has them open."""
    found = []
    for link in Path(f"/proc/{mount.pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(str(mount.cache_dir)) and target.endswith("(deleted)"):
            found.append(target)
    return found


def cached_files(mount: MountedInstance) -> int:
    return sum(1 for path in mount.cache_dir.rglob("*") if path.is_file() and not path.name.startswith("index.db"))


def test_filled_and_evicted_while_programs_read_and_write(s3_mount: MountedInstance) -> None:
    mount = s3_mount
    folder = mount.path / "d"
    folder.mkdir()
    data = make_bytes(9 * MIB + 5)
    (folder / "big").write_bytes(data)
    for number in range(5):
        (folder / f"{number}.txt").write_bytes(b"%d" % number)
    # what is not stored yet is stored first
    assert mount.cli("cache", str(folder)).stdout.startswith("6 files (9.0 MiB) in the cache, ")
    mount.cli("cache", "--evict", "d/**")
    assert cached_files(mount) == 0

    hashes: set[str] = set()
    with meanwhile(lambda: hashes.add(direct_hash(folder / "big"))):
        for words in (
            ["cache", str(folder)],
            ["cache", "--evict", "d/big"],
            ["cache", "d/*"],
            ["cache", "--evict", "d"],
        ):
            mount.cli(*words)
    assert hashes == {hashlib.md5(data).hexdigest()}
    mount.cli("cache", "--evict", str(mount.path))
    wait_until(lambda: not held_by_daemon(mount), "the space of evicted files is free")

    versions = iter(range(10_000))

    def write() -> None:
        (folder / "w").write_bytes(b"%06d\n" % next(versions) * 1000)
        mount.sync()

    write()
    loop = (
        "import lamfs as ln\n"
        "seen = set()\n"
        "while len(seen) < 3:\n"
        "    lines = set(ln.Artifact.get(key='d/w').cache().read_text().splitlines())\n"
        "    assert len(lines) <= 1, lines\n"  # none: between open and write
        "    seen |= lines\n"
    )
    with meanwhile(write):
        mount.python(loop)
    last = (folder / "w").read_bytes()
    assert Path(mount.cli("cache", "d/w").stdout.strip()).read_bytes() == last
    assert mount.fsck() == []
