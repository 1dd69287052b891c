"""Ways in which the two files may come apart that look harmless."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import RegistryError
from lamfs.keys import spool_name
from lamfs.processes import boot_id
from lamfs.registry import intake, schema, workdb
from lamfs.registry.db import WORK_SPLIT
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands
from tests.unit.registry.test_workdb import make, opened, puts


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.lndb"


def old_registry(path: Path) -> None:
    """A registry of version 13 with a put."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        schema.apply(conn, WORK_SPLIT - 1)
        conn.execute("INSERT INTO meta VALUES('schema_version', ?), ('slug', 'ada/one')", (WORK_SPLIT - 1,))
        conn.execute(
            "INSERT INTO inode(ino, mode, uid, gid, nlink, size, atime_ns, mtime_ns, ctime_ns)"
            " VALUES(3,33188,0,0,1,3,1,1,1)"
        )
        conn.execute("INSERT INTO dentry(parent, name, ino) VALUES(1, 'a', 3)")
        conn.execute(
            "INSERT INTO journal(op, state, ino, uid, src, created_at) VALUES('put','ready',3,?,'3-aaaaaaaaaaaa',1)",
            ("u" * 20,),
        )


def test_a_registry_that_was_just_split_needs_no_replay(path: Path) -> None:
    old_registry(path)
    with opened(path) as registry:
        assert not registry.replay.is_needed()


def test_a_registry_that_was_just_split_and_loses_its_work_database_owes_it_again(path: Path) -> None:
    old_registry(path)
    with opened(path):
        pass
    for side in ("", "-wal", "-shm"):
        Path(f"{workdb.work_path(path)}{side}").unlink(missing_ok=True)
    with opened(path) as registry:
        assert registry.replay.is_needed()
        registry.replay.run(lambda src: 3, lambda src: False, spare_uid=lambda: "s" * 20, now=1)
    assert puts(path) == ["a"]


def test_a_power_cut_between_the_split_and_the_first_transaction_leaves_a_pair(path: Path) -> None:
    """The split is on disk in both files. Of what came next, only the work database's part is."""
    old_registry(path)
    with opened(path, work=True):
        pass
    # As it was after the split: what the connection did next with it is gone.
    first = path.with_name("first")
    first.mkdir()
    old_registry(first / path.name)
    attach = workdb.attach
    workdb.attach = lambda conn, registry: ""  # type: ignore[assignment]
    try:
        with opened(first / path.name):
            pass
    finally:
        workdb.attach = attach
    shutil.copy(first / path.name, first / "kept.lndb")
    with opened(first / path.name):
        pass
    shutil.copy(first / "kept.lndb", first / path.name)
    assert puts(first / path.name) == ["a"]


def test_the_ids_of_what_the_registry_owes_are_high_whoever_it_came_from(path: Path, tmp_path: Path) -> None:
    with opened(path, create=True) as registry:
        registry.people.ensure_storage("s3://bucket/prefix", "s3")
        registry.db.execute("INSERT OR REPLACE INTO meta VALUES('slug', 'ada/one'), ('uid', 'u')")
        registry.db.execute("DELETE FROM sqlite_sequence WHERE name='owed'")
        registry.db.snapshot(tmp_path / "copy.lndb")
    fresh = tmp_path / ".fresh.lndb"
    intake.take(
        tmp_path / "copy.lndb", "copy", fresh, intake.Place("s3", "s3://bucket/prefix"), now=1, spare_uid="s" * 20
    )
    with opened(fresh) as registry:
        registry.journal.add_delete("object", "etag")
        (entry,) = registry.journal.entries()
        assert entry.id > workdb.FIRST_OWED


@contextlib.contextmanager
def full(registry: Registry) -> Iterator[None]:
    """The disk has room for the registry's log, which is short, and not for the work database's."""
    registry.db.log_pages(0)
    for at in range(200):
        registry.journal.spend(f"{at:x}-aaaaaaaaaaaa")
    registry.db.execute("PRAGMA main.wal_checkpoint(TRUNCATE)")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = Path(f"{workdb.work_path(registry.path)}-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_commit_that_fails_in_the_second_file_is_mended_by_the_next_transaction(path: Path) -> None:
    with opened(path, create=True) as registry:
        registry.people.ensure_storage("s3://bucket/prefix", "s3")
        hands = Hands(registry)
        stored = hands.save("stored", b"abc")
        assert stored.ino is not None
        waits = hands.create("waits")
        (put,) = registry.journal.puts()
        with full(registry):
            with pytest.raises(RegistryError):
                hands.rewrite("waits")
            assert registry.replay.is_needed()
            with pytest.raises(RegistryError):
                hands.mkdir("folder")  # it cannot be mended yet, so nothing goes on
            assert registry.tree.resolve("folder") is None
        hands.mkdir("folder")
        assert not registry.replay.is_needed()
        assert registry.journal.puts() == [put]
        assert registry.replay.of(waits) == (registry.db.machine, put.src, put.uid)
        with full(registry), pytest.raises(RegistryError):
            hands.rewrite("stored")
        hands.mkdir("another")
        assert registry.journal.puts() == [put]
        assert registry.replay.of(stored.ino) is None
        with full(registry), pytest.raises(RegistryError):
            hands.store(waits, b"abcd")
        hands.store(waits, b"abcd")
        assert not registry.replay.is_needed()
        assert registry.journal.puts() == []


def test_a_work_database_that_another_process_is_just_making_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(path, "a")
    work = workdb.work_path(path)
    work.unlink()
    came = threading.Event()
    replace = workdb._replace

    def coming(registry: Path, at: Path) -> None:
        came.set()
        replace(registry, at)

    monkeypatch.setattr(workdb, "_replace", coming)
    failed: list[BaseException] = []

    def open_it() -> None:
        try:
            Registry(path).close()
        except BaseException as error:
            failed.append(error)

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        with contextlib.closing(sqlite3.connect(work)) as conn:
            conn.execute("PRAGMA journal_mode=WAL")
        thread = threading.Thread(target=open_it)
        thread.start()
        assert came.wait(30)
        workdb._make(work)
    thread.join(30)
    assert failed == []
    assert [file.name for file in path.parent.glob("*.work.db")] == []
    with opened(path) as registry:
        assert registry.replay.is_needed()


def test_a_work_database_that_cannot_be_read_now_is_not_put_aside(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path, "a")
    connect = sqlite3.connect

    def busy(database: object, *args: object, **options: object) -> sqlite3.Connection:
        if "work.db" in str(database):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, *args, **options)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patched:
        patched.setattr(workdb.sqlite3, "connect", busy)
        with pytest.raises(sqlite3.OperationalError):
            workdb._replace(path, workdb.work_path(path))
    assert puts(path) == ["a"]
    assert not list(path.parent.glob("*.work.db"))


def test_a_work_database_that_cannot_be_renamed_is_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_registry(path)
    workdb.work_path(path).write_bytes(b"of an earlier try")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(workdb, "_rename", refuse)
        with pytest.raises(RegistryError, match=r"work database .* could not be used: Permission denied"):
            Registry(path)
    assert puts(path) == ["a"]


def test_a_partial_spool_file_that_was_stored_is_not_deleted_when_the_registry_was_set_back(path: Path) -> None:
    with opened(path, create=True) as registry:
        registry.people.ensure_storage("s3://bucket/prefix", "s3")
        hands = Hands(registry)
        hands.save("a", b"old")
        hands.rewrite("a")
        (put,) = registry.journal.puts()
        registry.db.execute("PRAGMA main.wal_checkpoint(TRUNCATE)")
        shutil.copy(path, path.with_name("before"))
        hands.store(put.ino, b"new")
        assert registry.journal.is_spent(put.src)
    shutil.move(path.with_name("before"), path)
    with opened(path) as registry:
        registry.replay.run(lambda src: 3, lambda src: True, spare_uid=lambda: "s" * 20, now=1)
        assert not registry.replay.is_needed()
        assert registry.journal.puts() == []
        assert not registry.journal.is_spent(put.src)  # so it comes to lost+found


def test_a_spool_file_that_only_the_registry_knows_is_not_spent(path: Path) -> None:
    """A kill between the two commits leaves a copy without new bytes in it. So does the disk that loses the end of the
    work database's log, and then later writes are in the copy: what is in it has to tell."""
    with opened(path, create=True) as registry:
        registry.people.ensure_storage("s3://bucket/prefix", "s3")
        hands = Hands(registry)
        ino = hands.save("a", b"old").ino
        assert ino is not None
        hands.rewrite("a")
        (put,) = registry.journal.puts()
        registry.db.execute("UPDATE journal SET owner=?", (f"{boot_id()}:1:1",))
        registry.db.execute("PRAGMA work.wal_checkpoint(TRUNCATE)")
        shutil.copy(workdb.work_path(path), path.with_name("before"))
        src = spool_name(ino)
        registry.journal.begin_put(ino, src)
    for side in ("-wal", "-shm"):
        Path(f"{workdb.work_path(path)}{side}").unlink(missing_ok=True)
    shutil.move(path.with_name("before"), workdb.work_path(path))
    with opened(path) as registry:
        assert registry.replay.is_needed()
        registry.replay.run(lambda src: 3, lambda src: True, spare_uid=lambda: "s" * 20, now=1)
        assert [each.src for each in registry.journal.puts()] == [put.src]
        assert not registry.journal.is_spent(src)


def test_what_somebody_else_has_left_apart_is_not_mended_on_the_way(path: Path) -> None:
    """Which of it was acknowledged, and what is in the spool, only the next mount knows."""
    with opened(path, create=True) as registry:
        registry.people.ensure_storage("s3://bucket/prefix", "s3")
        hands = Hands(registry)
        ino = hands.save("stored", b"abc").ino
        assert ino is not None
        hands.rewrite("stored")
        (put,) = registry.journal.puts()
    workdb.work_path(path).unlink()
    with opened(path) as registry:
        with full(registry), pytest.raises(RegistryError):
            Hands(registry).create("new")
        Hands(registry).mkdir("folder")
        assert registry.replay.of(ino) == (registry.db.machine, put.src, put.uid)
