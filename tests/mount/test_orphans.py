"""Objects of a mount say whose they are; those that its registry does not know come back as files of lost+found."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lamfs.config import machine_token
from lamfs.model import ObjectMeta
from lamfs.storage import open_store
from lamfs.storage.base import ObjectStore
from tests.support.mounts import MountedInstance
from tests.support.ops import make_orphan

MIB = 1 << 20


def said_of(mount: MountedInstance, store: ObjectStore) -> dict[str, ObjectMeta | None]:
    """What the object of each file says."""
    with mount.registry() as registry:
        return {
            record.key or record.uid: store.meta(record.revision.object_key) for record in registry.artifacts.filter()
        }


def test_whatever_a_mount_stores_says_what_it_is(mount: MountedInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in mount.env if name.startswith("AWS_")]:
        monkeypatch.setenv(name, mount.env[name])
    path = mount.path
    (path / "d").mkdir()
    (path / "d/ä 1.csv").write_bytes(b"one")
    (path / "twin.csv").write_bytes(b"one")
    large = os.urandom(70 * MIB)
    (path / "large.bin").write_bytes(large)
    mount.sync()
    (path / "d/ä 1.csv").write_bytes(b"two")
    mount.sync()
    (path / "d").rename(path / "e")
    with (path / "large.bin").open("r+b") as stream:
        stream.write(b"changed")
    mount.sync()
    store = open_store(mount.storage)
    try:
        said = said_of(mount, store)
        with mount.registry() as registry:
            for record in registry.artifacts.filter():
                key = record.key or ""
                found = said[key]
                assert found is not None, key
                assert found.uid == record.uid
                assert found.revision == record.number
                assert found.key == key.replace("e/", "d/"), "its key when it was stored"
                # Of what is sent in parts it was not known when that began.
                whole = f"{record.revision.content.hash_type}:{record.hash}"
                assert found.hash == (None if key == "large.bin" and store.kind == "s3" else whole)
            numbers = {record.key: record.number for record in registry.artifacts.filter()}
        assert numbers == {"e/ä 1.csv": 2, "twin.csv": 1, "large.bin": 2}
    finally:
        store.close()


def test_what_a_mount_does_not_know_appears_in_it(mount: MountedInstance) -> None:
    (mount.path / "new.csv").write_bytes(b"the newest file")
    mount.sync()
    with mount.registry() as registry:
        record = registry.artifacts.by_key("new.csv")
        assert record is not None
        make_orphan(registry, record.uid)
    mount.cli("fsck", "--repair")
    found = mount.path / "lost+found/new.csv"
    assert found.read_bytes() == b"the newest file"
    found.rename(mount.path / "back.csv")
    mount.remount(empty_cache=True)
    assert (mount.path / "back.csv").read_bytes() == b"the newest file"
    mount.cli("fsck", "--data")


def test_a_mount_removes_what_dead_processes_left(local_instance: MountedInstance) -> None:
    folder = Path(local_instance.storage.root) / ".lamindb/_tmp"
    folder.mkdir(parents=True, exist_ok=True)
    token = local_instance.python("from lamfs import config; print(config.machine_mark())").strip()
    assert token != machine_token()[:12]
    left = folder / f"{token}-deadbeef-1-1-1-00000000"
    left.write_bytes(bytes(MIB))
    other = folder / f"{'0' * 12}-deadbeef-1-1-1-00000000"
    other.write_bytes(b"x")
    local_instance.mount()
    assert not left.exists()
    assert other.exists()
    assert str(left) in local_instance.log()
    assert "removed 1 temporary files of processes that are gone: 1048576 bytes" in local_instance.log()


def test_a_later_revision_than_the_registry_knows(
    mount: MountedInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A read that finds it says what to do; after that, and in a mount that lives, the bytes can be read."""
    for name in [name for name in mount.env if name.startswith("AWS_")]:
        monkeypatch.setenv(name, mount.env[name])
    path = mount.path / "a.csv"
    path.write_bytes(b"one")
    mount.sync()
    mount.remount(empty_cache=True)
    uid, key = mount.info("a.csv")["uid"], "a.csv"
    (tmp_path / "later").write_bytes(b"two, and longer")
    store = open_store(mount.storage)
    try:
        with mount.registry() as registry:
            record = registry.artifacts.by_uid(uid)
        assert record is not None
        meta = ObjectMeta(uid, key, 2, None)
        store.put_file(record.revision.object_key, str(tmp_path / "later"), meta=meta)
    finally:
        store.close()
    mount.expect_log(r"is not what the registry knows.*'lamfs fsck --repair' makes that readable")
    with pytest.raises(OSError) as caught:
        path.read_bytes()
    assert caught.value.errno in (errno.ESTALE, errno.EIO)
    (changed,) = mount.status()["storage_changed"]
    assert (changed["key"], changed["uid"]) == (key, uid)
    assert "OBJECT CHANGED" in mount.cli("status").stdout
    assert "'a.csv'" in mount.cli("fsck", "--repair").stdout
    assert path.read_bytes() == b"two, and longer"
    assert path.stat().st_size == 15
    assert mount.status()["storage_changed"] == []
    mount.cli("fsck", "--data")
    with path.open("ab") as stream:
        stream.write(b"!")
    mount.remount(empty_cache=True)
    assert path.read_bytes() == b"two, and longer!"


def test_an_object_that_is_gone_and_comes_back(
    mount: MountedInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No repair makes it readable: what does is said, and is true."""
    for name in [name for name in mount.env if name.startswith("AWS_")]:
        monkeypatch.setenv(name, mount.env[name])
    path = mount.path / "a.csv"
    path.write_bytes(b"one")
    mount.sync()
    mount.remount(empty_cache=True)
    store = open_store(mount.storage)
    try:
        with mount.registry() as registry:
            record = registry.artifacts.by_uid(mount.info("a.csv")["uid"])
        assert record is not None
        store.delete([record.revision.object_key])
        mount.expect_log(r"is gone, so it cannot be read: restore the object from a backup")
        mount.expect_log("(?i)there is no (such )?object")
        with pytest.raises(OSError) as caught:
            path.read_bytes()
        assert caught.value.errno in (errno.ESTALE, errno.EIO)
        assert "is gone, so it cannot be read: restore" in mount.cli("status").stdout
        assert "is gone" in mount.cli("fsck", "--repair", check=False).stdout
        (tmp_path / "backup").write_bytes(b"one")
        store.put_file(record.revision.object_key, str(tmp_path / "backup"))
    finally:
        store.close()
    mount.cli("fsck", "--repair")
    assert path.read_bytes() == b"one"
