"""A power cut on a real disk: all that the file system had written to its device by then, and nothing else.

Registry, journal and spool are on an ext4 in an image file that writes nothing by itself for minutes. A copy of the
image is what a machine finds that loses its power at that moment: the next mount works on the copy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.model import StorageConfig
from tests.support.mounts import BUCKET, MountedInstance, wait_until
from tests.support.servers import Server

V1, V2 = b"first" * 50_000, b"second, and longer" * 20_000


class Disk:
    """An ext4 in a file, mounted at ``path``."""

    def __init__(self, image: Path, path: Path) -> None:
        self.image, self.path = image, path
        path.mkdir()
        with open(image, "wb") as file:
            file.truncate(96 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-E", "root_owner", image], check=True, timeout=30)
        self.mount()
        path.chmod(0o700)

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop,commit=600", self.image, self.path], check=True, timeout=30)

    def unmount(self) -> None:
        # The last of the killed processes may still be letting go of its files.
        command = ["umount", self.path]
        wait_until(lambda: subprocess.run(command, check=False, timeout=30).returncode == 0, "the disk is free")

    def remember(self) -> Path:
        """A copy of what is on the device now."""
        copy = self.image.with_suffix(".copy")
        subprocess.run(["cp", "--sparse=always", self.image, copy], check=True, timeout=30)
        return copy

    def lose_power(self, copy: Path) -> None:
        self.unmount()
        os.replace(copy, self.image)
        self.mount()


@pytest.fixture(params=["local", "s3"])
def on_disk(request: pytest.FixtureRequest, fuse: None, tmp_path: Path) -> Iterator[tuple[MountedInstance, Disk]]:
    """An instance whose data directory, and storage if that is a folder, are on such a disk."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")
    if request.param == "local":
        instance = MountedInstance()
        instance.storage = StorageConfig(str(instance.data_dir / "store"))
    else:
        server: Server = request.getfixturevalue("seaweed")
        instance = MountedInstance(server.config(BUCKET, f"p{os.urandom(4).hex()}/root"), env=server.env)
    disk = Disk(tmp_path / "image", instance.data_dir)
    try:
        with instance:
            yield instance, disk
    finally:
        subprocess.run(["umount", "-l", disk.path], check=False, timeout=30)
        shutil.rmtree(instance.base, ignore_errors=True)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def test_what_fsync_acknowledged_survives_a_power_cut(on_disk: tuple[MountedInstance, Disk]) -> None:
    instance, disk = on_disk
    instance.mount()
    for name in ("kept", "replaced", "edited", "renamed"):
        (instance.path / name).write_bytes(V1)
        fsync(instance.path / name)
    (instance.path / "replaced").write_bytes(V2)
    (instance.path / "new").write_bytes(V2)
    with open(instance.path / "edited", "r+b", buffering=0) as edited:
        edited.write(V2[:1000])
        (instance.path / "temporary").write_bytes(V2)
        os.rename(instance.path / "temporary", instance.path / "renamed")
        (instance.path / "last").write_bytes(V2)
        fsync(instance.path / "last")
        copy = disk.remember()
        with contextlib.suppress(OSError):
            instance.kill9()
            edited.close()
    disk.lose_power(copy)
    with instance.registry() as registry:  # the machine was started again
        for table in ("journal", "owed"):
            registry.db.execute(f"UPDATE {table} SET owner='another boot' || substr(owner, instr(owner, ':'))")
    shutil.rmtree(instance.cache_dir, ignore_errors=True)
    instance.mount()
    found = {path.name: path.read_bytes() for path in instance.path.iterdir()}
    instance.sync()
    assert {path.name: path.read_bytes() for path in instance.path.iterdir()} == found
    assert found["kept"] == V1
    assert found["last"] == V2
    for name, allowed in {
        "replaced": (V1, V2),
        "renamed": (V1, V2),
        "edited": (V1, V2[:1000] + V1[1000:]),
        "new": (V2, None),
        "temporary": (V2, None),
    }.items():
        assert found.pop(name, None) in allowed, name
    assert instance.spooled() == []
    assert instance.fsck() == []
    instance.fusermount()
