"""A mount of a storage folder in which somebody has put links: what they lead to is not shown, and never written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance

SECRET = b"the secret\n"


def objects(mount: MountedInstance) -> list[Path]:
    """Files of artifacts in the storage folder."""
    return [path for path in Path(mount.storage.root, ".lamindb").glob("*.txt") if path.is_file()]


def test_what_a_link_leads_to_is_not_shown_and_not_written(local_mount: MountedInstance) -> None:
    (local_mount.path / "secret.txt").write_bytes(SECRET)
    local_mount.sync()
    [stored] = objects(local_mount)
    (local_mount.path / "other.txt").write_bytes(b"other\n")
    local_mount.umount()
    # The very bytes that the registry names, so that nothing but the link is wrong.
    outside = local_mount.base / "outside"
    stored.rename(outside)
    stored.symlink_to(outside)
    before = outside.stat()
    local_mount.mount()
    name = local_mount.path / "secret.txt"
    fd = os.open(name, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="symbolic links") as caught:
            os.pread(fd, 100, 0)
        assert caught.value.errno == errno.ELOOP
        with pytest.raises(OSError, match="symbolic links") as caught:
            os.pwrite(fd, b"more", 3)
        assert caught.value.errno == errno.ELOOP
    finally:
        os.close(fd)
    assert (local_mount.path / "other.txt").read_bytes() == b"other\n"
    assert sorted(os.listdir(local_mount.path)) == ["other.txt", "secret.txt"]
    name.write_bytes(b"mine again\n")  # the link is replaced, and not written through
    local_mount.sync()
    assert name.read_bytes() == b"mine again\n"
    name.rename(local_mount.path / "moved.txt")
    local_mount.sync()
    (local_mount.path / "moved.txt").unlink()
    local_mount.sync()
    after = outside.stat()
    assert outside.read_bytes() == SECRET
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)
