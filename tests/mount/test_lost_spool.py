"""Spool files that the registry does not know, that are missing, or that their disk has changed, through real mounts.

Files wait in the spool while the moving process is stopped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, children, wait_until


def hold_uploads(instance: MountedInstance) -> int:
    """Stop the moving process: nothing is stored from now on."""
    (mover,) = [pid for pid in children(instance.pid) if Path(f"/proc/{pid}/comm").read_text() == "lamfs-mover\n"]
    os.kill(mover, signal.SIGSTOP)
    return mover


@contextlib.contextmanager
def held(path: Path, flags: int) -> Iterator[int]:
    """A descriptor whose mount may die before it is closed."""
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def spool_file(instance: MountedInstance, data: bytes) -> Path:
    """The spool file with these bytes."""
    (found,) = [path for path in instance.spool.iterdir() if path.read_bytes() == data]
    return found


def instance_status(instance: MountedInstance) -> dict[str, Any]:
    """What ``lamfs status`` says of the instance."""
    (found,) = json.loads(instance.cli("status", "--json").stdout)["instances"]
    assert isinstance(found, dict)
    return found


def lose_log(instance: MountedInstance) -> None:
    """The registry goes back to what was in its file: its log is damaged from the first page on."""
    Path(f"{instance.directory}/registry.lndb-wal").write_bytes(b"")
    Path(f"{instance.directory}/registry.lndb-shm").unlink(missing_ok=True)


def test_bytes_that_the_registry_does_not_know_are_in_lost_and_found(instance: MountedInstance) -> None:
    instance.expect_log("was owed to nobody", "that the journal did not know")
    instance.mount()
    hold_uploads(instance)
    (instance.path / "a.csv").write_bytes(b"somebody's only copy")
    (instance.path / "gone.csv").write_bytes(b"deleted")
    (instance.path / "gone.csv").unlink()
    instance.kill9()
    lose_log(instance)
    instance.mount()
    found = {path.read_bytes() for path in (instance.path / "lost+found").iterdir()}
    assert b"somebody's only copy" in found
    assert instance_status(instance)["found"] == {"folder": "lost+found", "entries": len(found)}
    assert "'lost+found' of" in instance.cli("status").stdout
    instance.sync()
    instance.umount()
    assert instance.spooled() == []
    assert instance.fsck() == []


def test_what_a_killed_daemon_leaves_is_not_found(instance: MountedInstance) -> None:
    """Deleted while open, deleted closed, stored: nothing of it floods lost+found."""
    instance.mount()
    (instance.path / "stored").write_bytes(b"stored")
    instance.sync()
    hold_uploads(instance)
    new = os.O_WRONLY | os.O_CREAT
    with held(instance.path / "open", new) as file, held(instance.path / "stored", os.O_RDWR) as other:
        os.write(file, b"deleted while open")
        os.write(other, b"half")
        (instance.path / "open").unlink()
        (instance.path / "closed").write_bytes(b"deleted when closed")
        (instance.path / "closed").unlink()
        (instance.path / "empty").touch()
        instance.kill9()
    instance.mount()
    assert sorted(path.name for path in instance.path.iterdir()) == ["empty", "stored"]
    instance.sync()
    assert instance.spooled() == []


def test_a_spool_file_that_is_missing_at_a_mount(instance: MountedInstance) -> None:
    instance.expect_log("is as it was stored last", "is gone: its spool file")
    instance.mount()
    (instance.path / "old").write_bytes(b"one")
    instance.sync()
    hold_uploads(instance)
    (instance.path / "old").write_bytes(b"two, missing")
    (instance.path / "new").write_bytes(b"never stored")
    files = [spool_file(instance, b"two, missing"), spool_file(instance, b"never stored")]
    instance.kill9()
    for path in files:
        path.unlink()
    instance.mount()
    assert (instance.path / "old").read_bytes() == b"one"
    assert not (instance.path / "new").exists()
    lost = instance_status(instance)["lost"]
    assert any("'old'" in text and "as it was stored last" in text for text in lost)
    assert any("'new'" in text and "it is gone" in text for text in lost)
    instance.umount()
    assert instance.fsck() == []


def test_a_spool_file_that_goes_missing_while_mounted(instance: MountedInstance) -> None:
    # The upload may have begun before: then its first try finds no file to send.
    instance.expect_log("was missing", "could not put .* cannot be read", "the spool file of 'old' cannot be used")
    instance.mount()
    (instance.path / "old").write_bytes(b"one")
    instance.sync()
    mover = hold_uploads(instance)
    (instance.path / "old").write_bytes(b"two, missing")
    (instance.path / "new").write_bytes(b"never stored")
    with open(instance.path / "open", "wb", buffering=0) as file:
        file.write(b"still open")
        for data in (b"two, missing", b"never stored", b"still open"):
            spool_file(instance, data).unlink()
        os.kill(mover, signal.SIGCONT)
        os.fsync(file.fileno())
        file.write(b", and written")
    wait_until(lambda: not (instance.path / "new").exists(), "the file that is lost is gone")

    def is_old() -> bool:
        try:
            return (instance.path / "old").read_bytes() == b"one"
        except OSError:
            return False

    wait_until(is_old, "the stored revision is back")
    assert (instance.path / "open").read_bytes() == b"still open, and written"
    assert len(instance_status(instance)["lost"]) == 2
    instance.umount()
    instance.mount()
    assert (instance.path / "open").read_bytes() == b"still open, and written"


def sealed(instance: MountedInstance) -> set[str]:
    """The spool files whose hashes are known."""
    with instance.registry() as registry:
        return {row[0] for row in registry.db.all("SELECT src FROM seal")}


LARGE = bytes(range(256)) * 1024


@pytest.mark.parametrize("data", [b"a small file that waits", LARGE], ids=["small", "large"])
def test_a_byte_that_the_disk_changes_is_not_stored(instance: MountedInstance, data: bytes) -> None:
    instance.expect_log("is not what was written")
    instance.mount()
    (instance.path / "a.bin").write_bytes(b"stored")
    instance.sync()
    # What somebody may still write to waits.
    new = os.O_WRONLY | os.O_CREAT
    with held(instance.path / "a.bin", new), held(instance.path / "b.bin", new):
        (instance.path / "a.bin").write_bytes(data)
        (instance.path / "b.bin").write_bytes(data[::-1])
        files = [spool_file(instance, data), spool_file(instance, data[::-1])]
        wait_until(lambda: sealed(instance) >= {path.name for path in files}, "what waits has hashes")
        instance.kill9()
    for path in files:
        changed = bytearray(path.read_bytes())
        changed[3] ^= 1
        path.write_bytes(changed)
    instance.mount()

    def refused(name: str) -> bool:
        try:
            (instance.path / name).read_bytes()
        except OSError as error:
            return error.errno == errno.EIO
        return False

    for name in ("a.bin", "b.bin"):
        wait_until(lambda name=name: refused(name), "its block is not read any more")  # type: ignore[misc]
    fd = os.open(instance.path / "a.bin", os.O_RDWR)
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(fd)
    with pytest.raises(OSError, match="Input/output"):
        os.pwrite(fd, b"x", 10)
    os.close(fd)
    assert "is not what was written" in instance.cli("status").stdout
    # Written again, it is stored; of the other one is kept what is left.
    (instance.path / "a.bin").write_bytes(b"again")
    assert (instance.path / "a.bin").read_bytes() == b"again"
    instance.kill9()
    report = json.loads(instance.cli("fsck", "--repair", "--json", check=False).stdout)
    assert any("'b.bin'" in text for text in report["repaired"]), report
    assert instance.fsck() == []
    instance.mount()
    assert (instance.path / "a.bin").read_bytes() == b"again"
    assert not (instance.path / "b.bin").exists()
    (found,) = (instance.path / "lost+found").iterdir()
    assert found.name == "b (damaged).bin"
    assert len(found.read_bytes()) == len(data)
