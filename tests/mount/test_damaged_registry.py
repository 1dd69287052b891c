"""Mounts of instances whose registry is damaged, here or in storage."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from lamfs.ops import kept
from lamfs.storage import open_store
from tests.mount.test_lost_spool import hold_uploads
from tests.support.mounts import MountedInstance


@pytest.fixture(autouse=True)
def _credentials(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself looks into the storage, too."""
    if request.node.callspec.params["instance"] == "s3":
        for name, value in request.getfixturevalue("seaweed").env.items():
            monkeypatch.setenv(name, value)


def filled(instance: MountedInstance) -> Path:
    """Mounted with a file, and unmounted; its working copy."""
    instance.mount()
    (instance.path / "a.csv").write_bytes(b"first")
    instance.umount()
    return instance.directory / "registry.lndb"


def objects(instance: MountedInstance) -> dict[str, str]:
    store = open_store(instance.storage)
    try:
        return {each.key: each.etag for each in store.list()}
    finally:
        store.close()


@pytest.mark.parametrize("damage", ["empty", "cut", "gone"])
def test_a_mount_refuses_a_damaged_working_copy(instance: MountedInstance, damage: str) -> None:
    """An empty file once was mounted as an empty tree, and unmounting it replaced the good registry in storage."""
    path = filled(instance)
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size // 2)
    before = objects(instance)
    instance.expect_log("registry.lndb is (damaged|gone)")
    for words in ([], ["--read-only"]):
        done = instance.cli("mount", str(instance.path), *words, check=False)
        assert done.returncode == 1, done.stdout
        assert str(path) in done.stderr
        assert f"'lamfs connect {instance.slug} --restore'" in done.stderr
        assert "Traceback" not in done.stderr
        assert not instance.mounted
    assert objects(instance) == before
    instance.cli("connect", instance.slug, "--restore")
    instance.mount()
    assert (instance.path / "a.csv").read_bytes() == b"first"
    instance.umount()
    assert instance.fsck() == []


@pytest.mark.parametrize("damage", ["empty", "gone"])
def test_unmounting_mends_the_copy_in_storage_and_keeps_the_last_ones(instance: MountedInstance, damage: str) -> None:
    filled(instance)
    key = f"{instance.directory.name}.lndb"
    store = open_store(instance.storage)
    store.put_bytes(key, b"") if damage == "empty" else store.delete([key])
    instance.mount()
    (instance.path / "b.csv").write_bytes(b"second")
    instance.expect_log("this machine's is stored there again")
    instance.umount()
    assert "this machine's is stored there again" in instance.log()
    assert store.head(key).size > 4096
    assert any(name.startswith(f"{kept.PREFIX}{instance.directory.name}/") for name in objects(instance))
    store.close()
    assert instance.fsck() == []


def test_umount_says_that_the_registry_could_not_be_stored(instance: MountedInstance) -> None:
    """What another machine has put there stays; the daemon alone knew that, and umount said that all was well."""
    filled(instance)
    key = f"{instance.directory.name}.lndb"
    store = open_store(instance.storage)
    instance.mount()
    (instance.path / "b.csv").write_bytes(b"second")
    theirs = instance.base / "theirs"
    theirs.write_bytes(store.get(key))
    with contextlib.closing(sqlite3.connect(theirs)) as db, db:
        db.execute("UPDATE storage SET uid='YYYYYYYYYYYY'")
    store.put_bytes(key, theirs.read_bytes())
    instance.expect_log("is of another instance than")
    done = instance.cli("umount", str(instance.path), check=False)
    assert done.returncode == 1
    assert f"{instance.path} is unmounted, but the registry was not stored: The registry " in done.stderr
    assert "is of another instance than" in done.stderr
    assert not instance.mounted
    store.close()


def ruin_page(work: Path, name: str) -> None:
    """Overwrite the first page of a table of a work database."""
    with contextlib.closing(sqlite3.connect(work)) as conn:
        (number,) = conn.execute("SELECT rootpage FROM sqlite_master WHERE name=?", (name,)).fetchone()
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(work, "r+b") as file:
        file.seek((number - 1) * 4096)
        file.write(b"\xa5" * 4096)


def test_what_a_damaged_work_database_owed_is_stored_after_the_repair(instance: MountedInstance) -> None:
    filled(instance)
    instance.mount()
    hold_uploads(instance)
    (instance.path / "a.csv").write_bytes(b"second")
    (instance.path / "b.csv").write_bytes(b"only here")
    (instance.path / ".notes.swp").write_bytes(b"scratch")
    instance.kill9()
    work = instance.directory / "work.db"
    ruin_page(work, "journal")
    instance.expect_log("work.db is damaged")
    done = instance.cli("mount", str(instance.path), check=False)
    assert done.returncode == 1, done.stdout
    assert f"The work database {work} is damaged (" in done.stderr
    assert f"'lamfs fsck --repair --instance {instance.slug}'" in done.stderr
    assert "--restore" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not instance.mounted
    instance.cli("fsck", "--repair", "--instance", instance.slug)
    instance.mount()
    found = {path.name: path.read_bytes() for path in instance.path.iterdir() if path.is_file()}
    assert found == {"a.csv": b"second", "b.csv": b"only here", ".notes.swp": b"scratch"}
    instance.umount()
    assert instance.fsck() == []
