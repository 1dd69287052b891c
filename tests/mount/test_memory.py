"""How much memory a mount takes, and that what the kernel has forgotten is forgotten by the daemon too.

The figures that README.md promises, with LAMFS_SOAK larger ones of everything.
"""

from __future__ import annotations

import os
import random
import re
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.hashing import hash_block
from lamfs.model import BLOCK_SIZE, ROOT_INO, ContentHash
from lamfs.registry import Provenance
from lamfs.storage.local import etag_of
from tests.support.mounts import MountedInstance, children, wait_until
from tests.support.timed import timed

ENTRIES = 20_000
SOAK = int(os.environ.get("LAMFS_SOAK", "0"))
MIB = 1 << 20
HUGE = 100 << 30
SLACK = 2 * MIB
"""What Python's allocator takes in advance."""
README = Path(__file__).resolve().parents[2] / "README.md"


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def most_resident(pid: int) -> int:
    """The most that it has been."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def mover_of(instance: MountedInstance) -> int:
    """Pid of the moving process."""
    return next(pid for pid in children(instance.pid) if Path(f"/proc/{pid}/comm").read_text() == "lamfs-mover\n")


def promised(words: str) -> float:
    """The number before some words of README's text about memory."""
    found = re.search(rf"([\d.]+) {words}", " ".join(README.read_text().split()))
    assert found is not None, words
    return float(found[1])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make the kernel forget")
def test_memory_comes_back_after_many_lookups(local_instance: MountedInstance) -> None:
    """Five rounds of 20,000 lookups each; with LAMFS_SOAK=10, a million."""
    with local_instance.registry() as registry, registry.db.transaction():
        for number in range(ENTRIES):
            timed(registry).names.create(ROOT_INO, f"directory {number}", stat.S_IFDIR | 0o755, 0, 0)
    local_instance.mount()
    local_instance.extend(100.0 * max(SOAK, 1))
    sizes = []
    for _ in range(5 * max(SOAK, 1)):
        with os.scandir(local_instance.path) as entries:
            assert sum(entry.stat().st_nlink for entry in entries) == 2 * ENTRIES
        assert local_instance.status()["inodes"] >= ENTRIES // 2
        Path("/proc/sys/vm/drop_caches").write_text("2")
        wait_until(lambda: local_instance.status()["inodes"] < 100, "the daemon has forgotten them")
        sizes.append(resident(local_instance.pid))
    assert max(sizes[1:]) < sizes[0] + (8 << 20), [size >> 20 for size in sizes]


@pytest.fixture
def many_descriptors() -> Iterator[int]:
    """As many descriptors as this process may have; how many."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def fill(instance: MountedInstance, *, files: int, entries: int) -> None:
    """``open/0`` … are empty artifacts, ``many/0`` … symlinks, ``huge`` is an artifact of HUGE zero bytes: by hand,
    since storing them takes long."""
    store = Path(instance.storage.root)
    zeros = hash_block(bytes(BLOCK_SIZE))
    with instance.registry() as registry, registry.db.transaction():

        def make(parent: int, name: str, size: int) -> None:
            inode, _ = timed(registry).names.create_file(parent, name, stat.S_IFREG | 0o644, 0, 0)
            gen = timed(registry).journal.ready_put(inode.ino)
            entry = registry.journal.put_of(inode.ino)
            assert entry is not None
            key = registry.commits.put_target(entry)
            path = store / key
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.truncate(size)
            content = ContentHash(size, "0" * 22, "md5", zeros * (size // BLOCK_SIZE))
            timed(registry).commits.put(inode.ino, gen, content, key, etag_of(path.stat()), Provenance())

        many = timed(registry).names.create(ROOT_INO, "many", stat.S_IFDIR | 0o755, 0, 0)
        opened = timed(registry).names.create(ROOT_INO, "open", stat.S_IFDIR | 0o755, 0, 0)
        for number in range(entries):
            timed(registry).names.create(many.ino, f"{number:06}", stat.S_IFLNK | 0o777, 0, 0, target=b"x")
        for number in range(files):
            make(opened.ino, str(number), 0)
        make(ROOT_INO, "huge", HUGE)


def test_memory_stays_in_bounds(local_instance: MountedInstance, many_descriptors: int) -> None:
    """Thousands of open files, a directory of very many entries, a very large file: no more than README says."""
    instance = local_instance
    files, entries, read = 2000, 20_000, 256 * MIB
    if SOAK:
        files, entries, read = min(10_000, many_descriptors - 1000), 100_000, HUGE
        instance.extend(1000.0)
    fill(instance, files=files, entries=entries)
    instance.mount()
    mover = mover_of(instance)
    before = resident(instance.pid)
    handles = [os.open(instance.path / "open" / str(number), os.O_RDONLY) for number in range(files)]
    assert instance.status()["open_files"] == files
    cost = resident(instance.pid) - before
    assert cost < promised("KiB for each open file") * 1024 * files + SLACK
    for fd in handles:
        os.close(fd)
    before = resident(instance.pid)
    with os.scandir(instance.path / "many") as found:
        assert sum(entry.stat(follow_symlinks=False).st_nlink for entry in found) == entries
    cost = resident(instance.pid) - before
    assert cost < promised("KiB for each file that the kernel remembers") * 1024 * entries + SLACK
    before = most_resident(instance.pid)
    zeros = bytes(MIB)
    with open(instance.path / "huge", "rb", buffering=0) as file:
        for _ in range(read // MIB):
            assert file.read(MIB) == zeros
        for _ in range(20):
            assert os.pread(file.fileno(), 10, random.randrange(HUGE - 10)) == bytes(10)
    for _ in range(50):
        with open(instance.path / "huge", "rb", buffering=0) as file:
            assert file.read(10) == bytes(10)
    cost = most_resident(instance.pid) - before
    assert cost < promised("KiB for each GiB of a file in use") * 1024 * (HUGE >> 30) + SLACK
    assert most_resident(mover) < promised("MiB, the process that moves bytes") * MIB


def test_memory_of_uploads_and_downloads(s3_mount: MountedInstance) -> None:
    """Large files at once, one of them in parts, there and back."""
    instance = s3_mount
    sizes = [70 * MIB, *[20 * MIB] * (3 + 5 * SOAK)]
    data = random.Random(1).randbytes(max(sizes))
    for number, size in enumerate(sizes):
        (instance.path / str(number)).write_bytes(b"%d" % number + data[:size])
    instance.sync()
    uploading = most_resident(mover_of(instance))
    instance.remount(empty_cache=True)
    for number, size in enumerate(sizes):
        assert (instance.path / str(number)).read_bytes() == b"%d" % number + data[:size]
    assert most_resident(instance.pid) < promised("MiB, the daemon") * MIB
    assert max(uploading, most_resident(mover_of(instance))) < promised("MiB, the process that moves bytes") * MIB
