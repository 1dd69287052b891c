"""A power cut sets the registry back, and not the work database, after a file was renamed into a storage folder."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from lamfs.config import InstanceSettings
from lamfs.keys import spool_name
from lamfs.ops import adoption, alone, artifacts, recover, setup, strays, working_copy, written
from lamfs.ops.instance import Instance
from lamfs.registry import Provenance, Registry, schema, workdb
from lamfs.registry.db import WORK_SPLIT
from lamfs.spool import SpoolFolder
from lamfs.storage import open_store
from lamfs.work.direct import finish
from lamfs.work.steps import Upload
from tests.support.timed import timed
from tests.unit.registry.conftest import content_of


@pytest.fixture
def settings(tmp_path: Path) -> InstanceSettings:
    return setup.init(str(tmp_path / "store"), "a")


def write(opened: Instance, spool: SpoolFolder, name: str, data: bytes, *, virtual: bool) -> int:
    """A file is written and closed; its inode."""
    registry = timed(opened.registry)
    inode = registry.tree.resolve(name)
    if inode is None:
        made, src = registry.names.create_file(1, name, 0o100644, 0, 0, key_is_virtual=virtual)
        ino = made.ino
    else:
        ino, src = inode.ino, spool_name(inode.ino)
        registry.journal.begin_put(ino, src, key_is_virtual=virtual)
    Path(spool.path(src)).write_bytes(data)
    registry.db.execute("UPDATE inode SET size=? WHERE ino=?", (len(data), ino))
    registry.journal.ready_put(ino)
    registry.db.execute("UPDATE journal SET owner='another:1:1' WHERE src=?", (src,))
    return ino


def store(opened: Instance, spool: SpoolFolder) -> bool:
    """Store the one put there is; whether its spool file was renamed into the folder."""
    timed(opened.registry).journal.adopt(("put",))
    (entry,) = opened.registry.journal.puts()
    steps, _ = alone.puts(opened, spool)
    _, consumed = finish(steps.put(entry, Upload(entry)))
    return consumed


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("names", [("a.txt",), ("a.txt", "a.txt")], ids=["new", "rewritten"])
def test_it_is_stored_all_the_same(settings: InstanceSettings, names: tuple[str, ...], virtual: bool) -> None:
    path = settings.registry_path
    with Instance.open(settings.slug) as opened, SpoolFolder.make(*settings.spool_place) as spool:
        for at, name in enumerate(names):
            write(opened, spool, name, b"text %d" % at, virtual=virtual)
            opened.registry.db.execute("PRAGMA main.wal_checkpoint(TRUNCATE)")
            shutil.copy(path, f"{path}.before")
            consumed = store(opened, spool)
            assert consumed
    written.forget(settings)  # a process that ends like that notes nothing
    shutil.move(f"{path}.before", path)
    with Instance.open(settings.slug) as opened, SpoolFolder.make(*settings.spool_place) as spool:
        assert opened.registry.replay.is_needed()
        adoption.adopt_puts(opened.registry, opened.store, spool)
        recover.finish_all(opened)
        assert opened.registry.journal.puts() == []
        found = artifacts.cache(opened, artifacts.find(opened, "a.txt"))
        assert found.read_bytes() == b"text %d" % (len(names) - 1)
        assert opened.registry.rescue.lost() == []


def test_what_is_still_in_the_spool_is_not_deleted_when_the_registry_is_replaced(
    settings: InstanceSettings, tmp_path: Path
) -> None:
    """The copy in storage knows nothing of the file, nor does the one that was set back know that it is stored."""
    path, fresh = settings.registry_path, settings.directory / ".fresh.lndb"
    with Instance.open(settings.slug) as opened, SpoolFolder.make(*settings.spool_place) as spool:
        opened.registry.db.snapshot(fresh)
        with contextlib.closing(sqlite3.connect(fresh)) as conn:
            conn.execute("DELETE FROM meta WHERE key=?", (workdb.PAIR,))
            conn.commit()
        ino = write(opened, spool, "a.txt", b"text", virtual=True)
        opened.registry.db.execute("PRAGMA main.wal_checkpoint(TRUNCATE)")
        shutil.copy(path, f"{path}.before")
        (entry,) = opened.registry.journal.puts()
        content = content_of(b"text")
        timed(opened.registry).commits.put(ino, entry.gen, content, "elsewhere", "etag", Provenance())
    written.forget(settings)
    shutil.move(f"{path}.before", path)
    working_copy.replace(settings, fresh, open_store(settings.storage), word="registry")
    with Instance.open(settings.slug) as opened, SpoolFolder.make(*settings.spool_place) as spool:
        strays.settle(opened.registry, opened.store, spool, settings.directory)
        (put,) = opened.registry.journal.puts()
        assert Path(spool.path(put.src)).read_bytes() == b"text"


def test_asking_whose_a_working_copy_is_keeps_what_an_older_lamfs_left_in_it(settings: InstanceSettings) -> None:
    path = settings.registry_path
    workdb.remove(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        schema.apply(conn, WORK_SPLIT - 1)
        conn.execute("INSERT INTO meta VALUES('schema_version', ?), ('uid', 'abc')", (WORK_SPLIT - 1,))
        conn.execute(
            "INSERT INTO journal(op, state, ino, uid, src, created_at) VALUES('put','ready',3,?,'3-aaaaaaaaaaaa',1)",
            ("u" * 20,),
        )
    assert working_copy.uid(settings) == "abc"
    with contextlib.closing(Registry(path)) as registry:
        assert [put.src for put in registry.journal.puts()] == ["3-aaaaaaaaaaaa"]
