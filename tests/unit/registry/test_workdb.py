"""Registry and work database: two files that belong together, and what is done when they do not."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import DamagedRegistry, RegistryError
from lamfs.registry import schema, workdb
from lamfs.registry.db import SCHEMA_VERSION, WORK_SPLIT, is_whole
from lamfs.registry.entries import Abort, Delete, Move, Put
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.lndb"


@contextlib.contextmanager
def opened(path: Path, *, create: bool = False, work: bool = True) -> Iterator[Registry]:
    registry = Registry(path, create=create, work=work)
    try:
        yield registry
    finally:
        registry.close()


def make(path: Path, *names: str) -> None:
    """A registry with files that are closed and not stored."""
    with opened(path, create=True) as registry:
        registry.people.ensure_storage("s3://bucket/prefix", "s3")
        hands = Hands(registry)
        for name in names:
            hands.create(name)


def puts(path: Path) -> list[str]:
    """Keys of the files whose put is owed."""
    with opened(path) as registry:
        return [registry.tree.path(entry.ino) or "" for entry in registry.journal.puts()]


def test_what_is_pushed_has_nothing_of_this_machine_s_work(path: Path, tmp_path: Path) -> None:
    make(path, "a.csv")
    with opened(path) as registry:
        (put,) = registry.journal.puts()
        registry.partial_spools.add(put.src, [1, 2])
        registry.journal.announced("somewhere")
        registry.db.snapshot(tmp_path / "copy.lndb")
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.lndb")) as conn:
        tables = {row[0] for row in conn.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        assert not tables & {"journal", "partial_spool", "claim", "upload", "part", "seal", "spent"}
        (pending,) = conn.execute("SELECT pending FROM inode WHERE pending IS NOT NULL").fetchone()
    assert pending == f"{registry.db.machine}:{put.src}:{put.uid}"
    data = (tmp_path / "copy.lndb").read_bytes()
    assert b"somewhere" not in data


def test_an_inode_says_who_has_its_bytes_as_long_as_they_are_not_stored(path: Path) -> None:
    with opened(path, create=True) as registry:
        registry.people.ensure_storage("s3://bucket/prefix", "s3")
        hands = Hands(registry)
        ino = hands.create("a.csv")
        (put,) = registry.journal.puts()
        assert registry.replay.of(ino) == (registry.db.machine, put.src, put.uid)
        record = hands.store(ino, b"abc")
        assert record is not None
        assert registry.replay.of(ino) is None
        assert registry.describe(record)["pending"] is False
        hands.rewrite("a.csv")
        (put,) = registry.journal.puts()
        assert registry.replay.of(ino) == (registry.db.machine, put.src, put.uid)
        assert registry.describe(record)["pending"] is True
        other = hands.create("b.csv")
        hands.rename("b.csv", "a.csv")  # b's bytes are to become a's artifact
        assert registry.replay.of(other) == (registry.db.machine, registry.journal.puts()[0].src, record.uid)
        registry.journal.drop_put(other)
        assert registry.replay.of(other) is None
        assert not registry.replay.is_needed()


def test_a_registry_of_version_13_is_split(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        schema.apply(conn, WORK_SPLIT - 1)
        conn.execute("INSERT INTO meta VALUES('schema_version', ?), ('slug', 'ada/one')", (WORK_SPLIT - 1,))
        for ino, name in ((3, "a"), (4, "b")):
            conn.execute(
                "INSERT INTO inode(ino, mode, uid, gid, nlink, atime_ns, mtime_ns, ctime_ns)"
                " VALUES(?,33188,0,0,1,1,1,1)",
                (ino,),
            )
            conn.execute("INSERT INTO dentry(parent, name, ino) VALUES(1, ?, ?)", (name, ino))
        conn.executemany(
            "INSERT INTO journal(id, op, state, ino, uid, object_key, src, created_at, owner, payload)"
            " VALUES(?,?,?,?,?,?,?,1,'x:1:1',?)",
            [
                (7, "put", "ready", 3, "u" * 20, "o", "3-aaaaaaaaaaaa", '{"base": "5:x"}'),
                (8, "abort", "ready", None, None, "o", None, '{"upload_id": "1"}'),
                (9, "delete", "ready", None, None, "old", None, '{"etag": "e"}'),
                (10, "delete", "held", None, None, "held", None, "{}"),
                (11, "move", "ready", None, "m" * 20, None, None, "{}"),
            ],
        )
        conn.execute("INSERT INTO overlay(src, block, ranges) VALUES('3-aaaaaaaaaaaa', 2, '[[1, 2]]')")
        conn.execute("INSERT INTO unsaid VALUES('o')")
        conn.execute("INSERT INTO seal VALUES('3-aaaaaaaaaaaa', 3, x'00')")
        conn.execute("INSERT INTO spent VALUES('3-bbbbbbbbbbbb')")
        conn.execute("INSERT INTO upload VALUES(7, 'o', 'id', 0)")
        conn.execute("INSERT INTO part VALUES(7, 1, 0, 3, x'', 'etag')")
        before = path.read_bytes()
    # An earlier try that came to its end in one of the two files only.
    make_stale = workdb.work_path(path)
    workdb.split(path)
    assert make_stale.exists()
    assert path.read_bytes() == before
    with opened(path) as registry:
        kinds = [(entry.id, type(entry), entry.state, entry.about) for entry in registry.journal.entries()]
        assert kinds == [
            (7, Put, "ready", "o"),
            (8, Abort, "ready", "o"),
            (10, Delete, "held", "held"),
            (workdb.FIRST_OWED + 1, Delete, "ready", "old"),
            (workdb.FIRST_OWED + 2, Move, "ready", "m" * 20),
        ]
        put = registry.journal.get_put(7)
        assert put is not None
        assert put.base == "5:x"
        assert registry.replay.of(3) == (registry.db.machine, "3-aaaaaaaaaaaa", "u" * 20)
        assert registry.replay.of(4) is None
        assert registry.partial_spools.ranges(put.src) == {2: ((1, 2),)}
        assert registry.journal.is_claimed("o")
        assert registry.journal.is_spent("3-bbbbbbbbbbbb")
        assert registry.seals.of(put.src) is not None
        upload = registry.uploads.of(7)
        assert upload is not None
        assert list(upload.parts) == [1]
        assert registry.db.get_meta("schema_version") == SCHEMA_VERSION
        assert registry.journal.add_save("s" * 20, "x", {}) > 11


def test_a_work_database_of_another_registry_is_put_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(path, "mine")
    work = workdb.work_path(path)
    other = path.with_name("other.lndb")
    make(other, "theirs")
    shutil.move(workdb.work_path(other), work)
    with caplog.at_level(logging.WARNING):
        assert puts(path) == []
    assert "put aside" in caplog.text
    assert puts(other) == ["theirs"]  # which has come back to its own
    with opened(path) as registry:
        assert registry.replay.is_needed()
        registry.replay.run(lambda src: 3, lambda src: False, spare_uid=lambda: "s" * 20, now=1)
        assert not registry.replay.is_needed()
    assert puts(path) == ["mine"]


def test_a_registry_that_lost_a_rename_keeps_its_artifacts(path: Path, tmp_path: Path) -> None:
    """b's bytes were to become a's artifact, by a rename that only the work database knows of."""
    make(path)
    with opened(path) as registry:
        hands = Hands(registry)
        hands.save("a.csv", b"abc")
        hands.create("b.csv")
    shutil.copy(path, tmp_path / "before")
    with opened(path) as registry:
        Hands(registry).rename("b.csv", "a.csv")
    shutil.copy(tmp_path / "before", path)
    with opened(path) as registry:
        assert registry.replay.is_needed()
        registry.replay.run(lambda src: 3, lambda src: False, spare_uid=lambda: "s" * 20, now=1)
        (put,) = registry.journal.puts()
        assert registry.tree.path(put.ino) == "b.csv"
        record = Hands(registry).store(put.ino, b"new")
        kept = registry.artifacts.by_key("a.csv")
        assert record is not None
        assert kept is not None
        assert record.uid != kept.uid
        assert not registry.replay.is_needed()


def test_a_crash_while_a_registry_is_replaced_leaves_a_pair(path: Path) -> None:
    """Its work database is beside it, under the name that it was to have."""
    make(path, "mine")
    kept = path.with_name("registry.20260101T000000.abcd.lndb")
    workdb.rename_work(path, kept)
    fresh = path.with_name(".fresh.lndb")
    make(fresh, "fresh")
    workdb.rename_work(fresh, path)
    assert puts(path) == ["mine"]
    assert not workdb.work_path(kept).exists()
    assert puts(fresh) == ["fresh"]


@pytest.mark.parametrize("data", [b"", b"rubbish" * 1000])
def test_a_damaged_work_database_is_put_aside_and_made_anew(
    path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    make(path, "a.csv", "b.csv")
    work = workdb.work_path(path)
    work.write_bytes(data)
    for side in ("-wal", "-shm"):
        Path(f"{work}{side}").unlink(missing_ok=True)
    with opened(path) as registry:
        assert registry.journal.puts() == []
        registry.replay.run(lambda src: 3, lambda src: False, spare_uid=lambda: "s" * 20, now=1)
    assert puts(path) == ["a.csv", "b.csv"]
    kept = [each for each in path.parent.glob("work.*.work.db") if each.read_bytes() == data]
    assert bool(kept) == bool(data)


def test_a_newer_work_database_is_refused(path: Path) -> None:
    make(path, "a")
    with contextlib.closing(sqlite3.connect(workdb.work_path(path))) as conn:
        conn.execute(f"PRAGMA user_version={workdb.VERSION + 1}")
    with pytest.raises(RegistryError, match="install the newer lamfs that wrote it"):
        Registry(path)


def test_both_files_are_for_nobody_else(path: Path) -> None:
    make(path, "a")
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_payloads_stay_as_they_are(path: Path) -> None:
    make(path, "a")
    with opened(path) as registry:
        (put,) = registry.journal.puts()
        registry.journal.set_base(put.ino, "3:abc")
        row = registry.db.one("SELECT payload FROM journal")
        assert row is not None
        assert json.loads(row[0])["base"] == "3:abc"


def test_a_file_gets_its_log_when_its_reader_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SQLite does not wait for by itself."""
    path = tmp_path / "new.db"
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader,
        contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as conn,
    ):
        conn.execute("CREATE TABLE x(y)")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM x").fetchone()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            conn.execute("PRAGMA journal_mode=WAL")
        monkeypatch.setattr(workdb.time, "sleep", lambda seconds: reader.in_transaction and reader.execute("COMMIT"))
        workdb.begin_wal(conn)
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_value_that_nobody_wrote_is_damage_of_the_file_that_has_it(path: Path) -> None:
    make(path, "a")
    with opened(path) as registry:
        registry.file.check_values()
        registry.db.execute("UPDATE journal SET payload='{'")
        with pytest.raises(DamagedRegistry, match=r"The work database .*work\.db is damaged \(a row of its journal"):
            registry.file.check_values()
        registry.db.execute("UPDATE journal SET payload='{}'")
        registry.db.execute("INSERT INTO owed(op, object_key, created_at, payload) VALUES('delete', 'o', 1, '{')")
        with pytest.raises(DamagedRegistry, match=r"The registry .*registry\.lndb is damaged \(a row of what it owes"):
            registry.file.check_values()


def test_a_work_database_made_anew_never_gives_way_to_the_damaged_one(path: Path) -> None:
    make(path, "a.csv", "b.csv")
    kept = workdb.make_anew(path)
    with opened(path) as registry:
        assert registry.journal.puts() == []
        assert registry.replay.run(lambda src: 3, lambda src: False, spare_uid=lambda: "s" * 20, now=1) == 2
    workdb.work_path(path).unlink()
    with opened(path) as registry:
        assert registry.journal.puts() == []
    assert kept.exists()


def test_a_work_database_is_not_made_anew_from_what_is_no_registry(path: Path) -> None:
    make(path, "a.csv")
    path.write_bytes(b"")
    assert not is_whole(path)
    with pytest.raises(sqlite3.Error):
        workdb.make_anew(path)
    assert workdb.flaw(path) is None
    assert list(path.parent.glob("work.*.work.db")) == []


def test_a_damaged_work_database_is_looked_for_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon meets it again and again, and others wait meanwhile."""
    make(path, "a.csv")
    looks: list[Path] = []
    flaw = workdb.flaw
    monkeypatch.setattr(workdb, "flaw", lambda registry: looks.append(registry) or flaw(registry))
    with opened(path) as registry:
        with contextlib.closing(sqlite3.connect(workdb.work_path(path))) as conn:
            conn.execute("DROP TABLE journal")
        for _ in range(3):
            with pytest.raises(DamagedRegistry, match=r"The work database .* is damaged \(no such table: journal"):
                registry.journal.entries()
        assert looks == [path]
