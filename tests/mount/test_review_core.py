"""What readers of the core doubted, on real mounts: each test is one doubt that was right once."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.mounts import MountedInstance, wait_until


def test_what_the_kernel_forgets_does_not_come_back_old(local_mount: MountedInstance, tmp_path: Path) -> None:
    """One program keeps the old revision open while the kernel drops the inode of the new one."""
    path, new = local_mount.path / "f.txt", tmp_path / "new.txt"
    path.write_bytes(b"old")
    new.write_bytes(b"new and longer")
    local_mount.sync()
    with path.open("rb", buffering=0) as old:
        local_mount.cli("replace", "f.txt", str(new))
        wait_until(lambda: path.read_bytes() == b"new and longer", "the new revision shows")
        number = path.stat().st_ino
        try:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        except PermissionError:
            return
        assert path.read_bytes() == b"new and longer"
        assert os.stat(path).st_size == 14
        assert path.stat().st_ino == number
        assert old.read() == b"old"
    assert path.read_bytes() == b"new and longer"
