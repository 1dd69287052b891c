"""Saves that keep the old content beside the file: the artifact stays with the name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance


def create_anew(path: Path, backup: Path, data: bytes) -> None:
    """Move the old file aside, create the new one (emacs, nano)."""
    os.rename(path, backup)
    path.write_bytes(data)


def rename_in(path: Path, backup: Path, data: bytes) -> None:
    """Write a temporary file, move the old one aside, move the new one in (``sed -i.bak``, perl)."""
    temporary = path.with_name("sedXYZ")
    temporary.write_bytes(data)
    os.rename(path, backup)
    os.rename(temporary, path)


def create_and_close_late(path: Path, backup: Path, data: bytes) -> None:
    """The new file is synced before it is closed."""
    os.rename(path, backup)
    with open(path, "wb", buffering=0) as file:
        file.write(data[:3])
        os.fsync(file.fileno())
        file.write(data[3:])


def link_and_rename_over(path: Path, backup: Path, data: bytes) -> None:
    """Give the old file another name, rename the new one over its first (perl, GLib)."""
    temporary = path.with_name("XXABCDEF")
    temporary.write_bytes(data)
    backup.unlink(missing_ok=True)
    os.link(path, backup)
    os.rename(temporary, path)


SAVES = (create_anew, rename_in, create_and_close_late, link_and_rename_over)


@pytest.mark.parametrize("save", SAVES)
def test_the_artifact_stays_with_the_name(
    each_mount: MountedInstance, each_dir: Path, save: Callable[[Path, Path, bytes], None]
) -> None:
    path, backup = each_dir / "notes.txt", each_dir / "notes.txt.bak"
    path.write_bytes(b"version 0")
    key = f"{each_dir.name}/notes.txt"
    before = each_mount.stored_info(key)
    for turn in range(1, 4):
        with open(path, "rb") as old:
            save(path, backup, b"version %d" % turn)
            assert old.read() == b"version %d" % (turn - 1)
        assert path.read_bytes() == b"version %d" % turn
        assert backup.read_bytes() == b"version %d" % (turn - 1)
        after = each_mount.stored_info(key)
        assert (after["uid"], after["created_at"]) == (before["uid"], before["created_at"])
        assert each_mount.stored_info(f"{key}.bak")["uid"] != before["uid"]
    each_mount.remount(empty_cache=True)
    assert path.read_bytes() == b"version 3"
    assert backup.read_bytes() == b"version 2"
    assert each_mount.fsck() == []


def test_what_is_saved_twice_before_anything_is_stored(each_mount: MountedInstance, each_dir: Path) -> None:
    path, backup = each_dir / "x", each_dir / "x~"
    path.write_bytes(b"0")
    for turn in range(1, 20):
        create_anew(path, backup, b"%d" % turn)
    each_mount.sync()
    each_mount.remount(empty_cache=True)
    assert path.read_bytes() == b"19"
    assert backup.read_bytes() == b"18"
    assert each_mount.fsck() == []


def test_a_save_by_exchange(each_mount: MountedInstance, each_dir: Path) -> None:
    """Write a temporary file, exchange it with the old one, remove that."""
    path, temporary = each_dir / "x.csv", each_dir / "tmp"
    path.write_bytes(b"old")
    uid = each_mount.stored_info(f"{each_dir.name}/x.csv")["uid"]
    temporary.write_bytes(b"new")
    from tests.mount.test_posix_names import RENAME_EXCHANGE, rename2

    rename2(temporary, path, RENAME_EXCHANGE)
    assert temporary.read_bytes() == b"old"
    os.unlink(temporary)
    after = each_mount.stored_info(f"{each_dir.name}/x.csv")
    assert after["uid"] == uid
    assert path.read_bytes() == b"new"
    assert os.listdir(each_dir) == ["x.csv"]
    assert each_mount.fsck() == []
