"""What the kernel has forgotten is forgotten by the daemon too, and its memory comes back."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lamfs.model import ROOT_INO
from tests.support.mounts import MountedInstance, wait_until

ENTRIES = 20_000
SOAK = int(os.environ.get("LAMFS_SOAK", "1"))


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make the kernel forget")
def test_memory_comes_back_after_many_lookups(local_instance: MountedInstance) -> None:
    """Five rounds of 20,000 lookups each; with LAMFS_SOAK=10, a million."""
    with local_instance.registry() as registry, registry.db.transaction():
        for number in range(ENTRIES):
            registry.names.create(ROOT_INO, f"directory {number}", stat.S_IFDIR | 0o755, 0, 0)
    local_instance.mount()
    local_instance.extend(100.0 * SOAK)
    sizes = []
    for _ in range(5 * SOAK):
        with os.scandir(local_instance.path) as entries:
            assert sum(entry.stat().st_nlink for entry in entries) == 2 * ENTRIES
        assert local_instance.status()["inodes"] >= ENTRIES // 2
        Path("/proc/sys/vm/drop_caches").write_text("2")
        wait_until(lambda: local_instance.status()["inodes"] < 100, "the daemon has forgotten them")
        sizes.append(resident(local_instance.pid))
    assert max(sizes[1:]) < sizes[0] + (8 << 20), [size >> 20 for size in sizes]
