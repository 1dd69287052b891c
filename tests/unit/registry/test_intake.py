"""A registry that came from storage is taken over row by row: what is wrong with it is named, and reaches nothing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamfs.config import machine_mark
from lamfs.errors import RegistryError
from lamfs.model import AUTO_INO, DESCRIPTION_XATTR, ROOT_INO, ArtifactRecord, ContentHash, Revision
from lamfs.registry import intake, schema
from lamfs.registry.artifacts import NOW
from lamfs.registry.db import SCHEMA_VERSION, WORK_SPLIT
from lamfs.registry.entries import Delete, Move
from lamfs.registry.rules import REVISIONS, TABLES
from tests.support.timed import Registry

Change = Callable[[sqlite3.Connection], object]
PLACE = intake.Place("local", "/the/storage")
AT = 1_750_000_000_000_000_000
SPARE = "s" * 12


class Box:
    """A good registry with some of everything, and what becomes of it after a change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "registry.lndb"
        self.count = 0
        registry = Registry(self.path, create=True)
        registry.db.set_meta("slug", "ada/one")
        registry.people.ensure_storage("/the/storage", "local")
        user = registry.people.ensure_user("12345678", "ada", "ada@example.com", "Ada")
        transform = registry.people.ensure_transform("t", "t.py", "script", user.id)
        run = registry.people.start_run(transform.id, user.id)
        self.inos = {name: self._file(registry, name, run.id, transform.id) for name in ("a.csv", "d/b.txt", "d/e/ä")}
        names = registry.names
        self.directory = registry.tree.resolve("d").ino  # type: ignore[union-attr]
        self.inner = registry.tree.resolve("d/e").ino  # type: ignore[union-attr]
        self.link = names.create(ROOT_INO, "link", stat.S_IFLNK | 0o777, 0, 0, target=b"a.csv").ino
        registry.tree.set_xattr(self.directory, "user.x", b"y")
        self.trashed = registry.artifacts.by_ino(self._file(registry, "gone", None, None)).uid  # type: ignore[union-attr]
        names.trash(self.trashed)
        registry.journal.add_delete(".lamindb/aaaaaaaaaaaaaaaaaaaa.x", "etag")
        registry.journal.add_move(registry.artifacts.by_ino(self.inos["a.csv"]).uid)  # type: ignore[union-attr]
        registry.db.set_meta("retained:old/thing", 1)
        registry.db.snapshot(folder / "good.lndb")
        registry.close()

    def _file(self, registry: Registry, key: str, run: int | None, transform: int | None) -> int:
        content = ContentHash(5, "h" * 22, "md5", bytes(32))
        record = ArtifactRecord("", key, "", Revision(content, "", ""), run_id=run, transform_id=transform)
        record.uid = f"{self.count:020d}"
        record.suffix = "." + key.rpartition(".")[2] if "." in key else ""
        self.count += 1
        entry, object_key, *_ = registry.commits.announce_save(record)
        record.revision = Revision(content, object_key, "")
        saved = registry.commits.save(entry, record, "etag", mode=0o644, uid=0, gid=0)
        assert saved.ino is not None
        return saved.ino

    def changed(self, change: Change | str) -> Path:
        """A copy of the good registry after a change by somebody with SQLite."""
        self.count += 1
        path = self.folder / f"changed-{self.count}.lndb"
        path.write_bytes((self.folder / "good.lndb").read_bytes())
        with contextlib.closing(sqlite3.connect(path)) as conn:
            conn.execute("PRAGMA writable_schema=ON")
            if isinstance(change, str):
                conn.executescript(change)
            else:
                change(conn)
            conn.commit()
        return path

    def take(self, change: Change | str = "") -> tuple[intake.Taken, Registry]:
        """What comes of taking the changed registry over."""
        path = self.changed(change)
        fresh = self.folder / f"fresh-{self.count}.lndb"
        taken = intake.take(path, "the registry", fresh, PLACE, now=AT, spare_uid=SPARE)
        assert stat.S_IMODE(fresh.stat().st_mode) == 0o600
        return taken, Registry(fresh)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return Box(tmp_path_factory.mktemp("intake"))


@pytest.fixture
def taken(box: Box) -> Iterator[Callable[..., tuple[intake.Taken, Registry]]]:
    opened: list[Registry] = []

    def take(change: Change | str = "") -> tuple[intake.Taken, Registry]:
        result = box.take(change)
        opened.append(result[1])
        return result

    yield take
    for registry in opened:
        check_tree(registry)
        registry.close()


def check_tree(registry: Registry) -> None:
    """Whatever came: a tree, with right link counts, and artifacts whose keys are where they are."""
    db = registry.db
    assert db.all("PRAGMA integrity_check") == [("ok",)]
    assert db.all("PRAGMA foreign_key_check") == []
    reached = {
        row[0]
        for row in db.all(
            "WITH RECURSIVE below(ino) AS (VALUES(1) UNION SELECT d.ino FROM below b JOIN dentry d ON d.parent=b.ino)"
            " SELECT ino FROM below"
        )
    }
    assert {row[0] for row in db.all("SELECT ino FROM dentry")} <= reached
    assert db.all("SELECT 1 FROM dentry d LEFT JOIN inode i ON i.ino=d.ino WHERE i.ino IS NULL") == []
    for record in registry.artifacts.filter():
        assert record.ino is not None
        assert registry.tree.first_name(record.ino) is not None
        if registry.tree.parent(record.ino) != AUTO_INO:
            assert registry.tree.path(record.ino) == record.key
    for name, columns in TABLES.items():
        assert {row[1] for row in db.all(f"PRAGMA table_info({name})")} == set(columns), name


OF = dict.fromkeys(("size", "hash", "hash_type", "blocks", "object_key", "etag", "head", "number"), "r")


def change_artifact(conn: sqlite3.Connection, column: str, value: object, ino: int) -> None:
    """Set a column of an artifact's row, or of its revision's."""
    where = "ino=?" if column not in OF else "id=(SELECT revision_id FROM artifact WHERE ino=?)"
    conn.execute(f"UPDATE {'revision' if column in OF else 'artifact'} SET {column}=? WHERE {where}", (value, ino))


def rows(path: Path | Registry, table: str) -> list[tuple[object, ...]]:
    if isinstance(path, Registry):
        return path.db.all(f"SELECT * FROM {table} ORDER BY 1")
    with contextlib.closing(sqlite3.connect(path)) as conn:
        return conn.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()


def test_a_good_registry_comes_as_it_is(box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]) -> None:
    result, fresh = taken()
    assert (result.findings, result.total) == ([], 0)
    origin = result.origin
    assert (origin.slug, origin.root, origin.version) == ("ada/one", "/the/storage", SCHEMA_VERSION)
    assert origin.changes == fresh.changes.last() > 0
    for table in TABLES.keys() - {"journal"}:
        assert rows(fresh, table) == rows(box.folder / "good.lndb", table), table
    before = dict(rows(box.folder / "good.lndb", "meta"))  # type: ignore[arg-type]
    after = dict(rows(fresh, "meta"))  # type: ignore[arg-type]
    assert after.pop("work") != before.pop("work")  # a work database is of one registry on one machine
    assert after.pop("pushes", "[]") == before.pop("pushes", "[]")
    assert after == {**before, "uid": result.origin.uid, "root": "/the/storage"}
    for table, seq in rows(box.folder / "good.lndb", "sqlite_sequence"):
        assert (table, seq) in rows(fresh, "sqlite_sequence")
    assert rows(fresh, "change") == []


def old_registry(conn: sqlite3.Connection, version: int) -> None:
    """A registry of that version, with a file ``x``, inode 3, that is no artifact."""
    schema.apply(conn, version)
    conn.execute("INSERT INTO meta VALUES('schema_version', ?), ('slug', 'ada/one')", (version,))
    conn.execute("INSERT INTO storage VALUES(1, 'abcdefghijkl', ?, '/elsewhere', 'local', NULL, 1)", ("a" * 32,))
    conn.execute(
        "INSERT INTO inode(ino, mode, uid, gid, nlink, atime_ns, mtime_ns, ctime_ns) VALUES(3,?,0,0,1,1,1,1)",
        (stat.S_IFREG | 0o644,),
    )
    conn.execute("INSERT INTO dentry(parent, name, ino) VALUES(1, 'x', 3)")


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_registries_of_every_version_are_taken(tmp_path: Path, version: int) -> None:
    old = tmp_path / "old.lndb"
    with contextlib.closing(sqlite3.connect(old, isolation_level=None)) as conn:
        old_registry(conn, version)
        if version >= REVISIONS:
            conn.execute(
                "INSERT INTO revision VALUES(1, 1, 1, 0, 'h', 'md5', x'', NULL, '.lamindb/y', 'e', 1, NULL, NULL)"
            )
            conn.execute(
                "INSERT INTO artifact(uid, storage_id, key, suffix, revision_id, ino, created_at, updated_at)"
                " VALUES(?,1,'x','',1,3,1,1)",
                ("u" * 20,),
            )
        else:
            conn.execute(
                "INSERT INTO artifact(uid, storage_id, key, suffix, size, hash, hash_type, blocks, object_key, etag,"
                " ino, created_at, updated_at) VALUES(?,1,'x','',0,'h','md5',x'','.lamindb/y','e',3,1,1)",
                ("u" * 20,),
            )
    result = intake.take(old, "old", tmp_path / "fresh.lndb", PLACE, now=AT, spare_uid=SPARE)
    assert result.findings == []
    fresh = Registry(tmp_path / "fresh.lndb")
    record = fresh.artifacts.by_key("x")
    assert record is not None
    assert (record.uid, record.revision.object_key) == ("u" * 20, ".lamindb/y")
    assert (fresh.db.get_meta("uid"), fresh.db.get_meta("root")) == ("abcdefghijkl", "/the/storage")
    assert fresh.people.storage(1).root == "/the/storage"  # type: ignore[union-attr]
    fresh.close()


# -- what SQLite would run --------------------------------------------------------------------------------------------


OBJECTS = {
    "trigger": "CREATE TRIGGER evil AFTER DELETE ON owed BEGIN INSERT INTO owed(op, object_key, created_at)"
    " VALUES('delete', '/etc/passwd', 1); END",
    "view": "CREATE VIEW evil AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT x FROM n",
    "table": "CREATE TABLE evil(x)",
    "index": "CREATE INDEX evil ON artifact(lower(key))",
    "virtual table": "CREATE VIRTUAL TABLE evil USING fts5(x)",
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_other_things_in_the_file_are_left_out(taken: Callable[..., tuple[intake.Taken, Registry]], kind: str) -> None:
    result, fresh = taken(OBJECTS[kind])
    assert any("'evil'" in finding.row for finding in result.findings)
    assert fresh.db.all("SELECT name FROM sqlite_master WHERE name LIKE 'evil%'") == []
    assert len(rows(fresh, "artifact")) == 4


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE VIEW {0} AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT x AS id FROM n",
        "CREATE VIRTUAL TABLE {0} USING fts5(x)",
        "CREATE TABLE {0}(key TEXT, value, evil GENERATED ALWAYS AS (abs(-9223372036854775808)))",
        "CREATE TABLE {0}(key TEXT COLLATE NOCASE)",
        None,
    ],
)
@pytest.mark.parametrize("table", ["meta", "storage", "artifact", "owed"])
def test_a_table_that_lamfs_has_not_made_is_refused_at_once(box: Box, table: str, sql: str | None) -> None:
    path = box.changed(f"DROP TABLE {table}; {sql.format(table) if sql else ''}")
    began = time.monotonic()
    with pytest.raises(RegistryError, match=r"the registry is damaged \(its table '\w+' is not as lamfs makes it\)"):
        intake.take(path, "the registry", box.folder / f"never-{os.urandom(4).hex()}", PLACE, now=AT, spare_uid=SPARE)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("data", [b"", b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_file_that_is_no_registry_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(RegistryError, match=r"^The registry s3://x is damaged \("):
        intake.look(tmp_path / "bad", "s3://x")


@pytest.mark.parametrize(
    ("value", "text"),
    [("'x'", "which version"), ("0", "which version"), ("99", "install the newer lamfs"), ("NULL", "which version")],
)
def test_a_version_that_is_none_or_newer(box: Box, value: str, text: str) -> None:
    path = box.changed(f"UPDATE meta SET value={value} WHERE key='schema_version'")
    with pytest.raises(RegistryError, match=text):
        intake.look(path, "the registry")


@pytest.mark.parametrize("slug", ["", "x", "a/b/c", "a/\x1b[31mb", "a/b\n", "../b", "a/..", "a" * 65 + "/b", "ä/b"])
def test_a_slug_that_is_none(box: Box, slug: str) -> None:
    def change(conn: sqlite3.Connection) -> None:
        conn.execute("UPDATE meta SET value=? WHERE key='slug'", (slug,))

    with pytest.raises(RegistryError, match="which instance") as error:
        intake.look(box.changed(change), "the registry")
    assert str(error.value).isprintable()


# -- rows -------------------------------------------------------------------------------------------------------------


BAD_NAMES = ["..", ".", "", "a/b", "/", "../../x", "a\0b", "x" * 256, b"\xff\xfe", 5, None, 1.5]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_file_whose_name_cannot_be_is_in_lost_and_found(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]], name: object
) -> None:
    def change(conn: sqlite3.Connection) -> None:
        sql = "CAST(? AS TEXT)" if isinstance(name, bytes) else "?"
        if name is None:  # a column that takes none
            conn.execute("DELETE FROM dentry WHERE ino=?", (box.inos["a.csv"],))
            return
        conn.execute(f"UPDATE dentry SET name={sql} WHERE ino=?", (name, box.inos["a.csv"]))

    result, fresh = taken(change)
    if isinstance(name, (int, float)):  # SQLite makes text of it in this column
        assert fresh.tree.resolve(str(name)) is not None
        return
    record = fresh.artifacts.by_ino(box.inos["a.csv"])
    assert record is not None
    assert record.key is not None
    assert record.key.startswith("lost+found/")
    assert any(finding.place == record.key for finding in result.findings)
    folder = fresh.tree.resolve("lost+found")
    assert folder is not None
    assert stat.S_IMODE(folder.mode) == 0o700


NOT_IN_FOLDERS = ["./a", "a/./b", "a//b", "a/"]
BAD_OBJECT_KEYS = [
    "../x", "a/../../x", "/etc/passwd", "..", "a/..", "", "a\0b", "x" * 1025, b"\xff", ".lamindb/_exclusion/x",
    ".lamindb/_spool/x/y", ".lamindb/_tmp/a", ".lamindb/_registry/x", "0" * 32 + ".lndb",
    *NOT_IN_FOLDERS, "/",
]  # fmt: skip


@pytest.mark.parametrize("key", BAD_OBJECT_KEYS)
def test_an_artifact_whose_object_is_elsewhere_is_left_out(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]], key: str | bytes
) -> None:
    def change(conn: sqlite3.Connection) -> None:
        sql = "CAST(? AS TEXT)" if key == b"\xff" else "?"
        for table in ("revision", "owed"):
            conn.execute(f"UPDATE {table} SET object_key={sql} WHERE object_key IS NOT NULL", (key,))
        conn.execute("INSERT OR REPLACE INTO meta VALUES('retained:' || ?, 1)", (key,))

    result, fresh = taken(change)
    assert rows(fresh, "artifact") == []
    assert [row for row in rows(fresh, "owed") if row[1] != "move"] == []
    assert sum(finding.table == "artifact" for finding in result.findings) >= 4
    assert fresh.tree.resolve("a.csv") is None
    assert fresh.tree.resolve("lost+found/a.csv") is not None
    retained = {str(row[0]) for row in rows(fresh, "meta") if str(row[0]).startswith("retained:")}
    # What only says that an object is not lamfs's to delete may be of any storage.
    assert retained - {f"retained:{key!s}" for key in NOT_IN_FOLDERS} == {"retained:old/thing"}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("uid", "../../../../../../.."), ("uid", "x"), ("size", -1), ("size", "many"),
        ("hash", "a/b"), ("hash_type", "sha1"), ("blocks", b"x"), ("blocks", "text"), ("etag", "a\r\nX: y"),
        ("etag", 'a"b'), ("storage_id", -1),
    ],
)  # fmt: skip
def test_an_artifact_that_cannot_be_read_is_left_out(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]], column: str, value: object
) -> None:
    def change(conn: sqlite3.Connection) -> None:
        change_artifact(conn, column, value, box.inos["d/b.txt"])

    result, fresh = taken(change)
    assert fresh.artifacts.by_ino(box.inos["d/b.txt"]) is None
    assert len(rows(fresh, "artifact")) == 3
    table = "revision" if column in OF else "artifact"
    finding = next(finding for finding in result.findings if finding.table == table)
    assert column in finding.what
    assert any(finding.place == "lost+found/b.txt" for finding in result.findings)


@pytest.mark.parametrize(
    ("column", "value", "then"),
    [
        ("key", "../../x", "d/b.txt"), ("key", "/abs", "d/b.txt"), ("key", ".lamindb/x", "d/b.txt"),
        ("key", "elsewhere", "d/b.txt"), ("key", 7, "d/b.txt"), ("suffix", "/../x", ""), ("description", b"x", None),
        ("visibility", 5, 1), ("created_by_id", 99, None), ("run_id", "x", None), ("head", b"x", None),
    ],
)  # fmt: skip
def test_what_an_artifact_can_do_without_is_not_taken(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]], column: str, value: object, then: object
) -> None:
    def change(conn: sqlite3.Connection) -> None:
        change_artifact(conn, column, value, box.inos["d/b.txt"])

    result, fresh = taken(change)
    found = fresh.db.all(f"SELECT {OF.get(column, 'a')}.{column} FROM {NOW} WHERE ino=?", (box.inos["d/b.txt"],))
    assert found == [(then,)]
    assert result.total >= 1
    assert all(finding.sentence for finding in result.findings)


@pytest.mark.parametrize("version", range(1, WORK_SPLIT))
def test_work_of_another_machine_is_not_done_here(tmp_path: Path, version: int) -> None:
    """Up to version 13 a registry had it."""
    old = tmp_path / "old.lndb"
    with contextlib.closing(sqlite3.connect(old, isolation_level=None)) as conn:
        old_registry(conn, version)
        for number, src in enumerate(["/etc/passwd", "../../x", "3-aaaaaaaaaaaa", None]):
            conn.execute(
                "INSERT INTO journal(op, state, ino, uid, object_key, src, created_at, owner, payload)"
                " VALUES('put', 'ready', ?, 'u', 'o', ?, 1, 'x:1:1', '{\"base\": \"5:x\"}')",
                (1000 + number, src),
            )
            if version >= 4:
                conn.execute("INSERT INTO overlay(src, block) VALUES(?, ?)", (src or "x", number))
        conn.execute(
            "INSERT INTO journal(op, state, uid, object_key, created_at, owner, payload)"
            " VALUES('save', 'open', 'u', '../x', 1, 'x:1:1', ?)",
            ("[" * 100_000,),
        )
        conn.executemany(
            "INSERT INTO journal(op, state, uid, object_key, created_at, payload) VALUES(?, 'ready', ?, ?, 1, ?)",
            [
                ("abort", None, ".lamindb/z", '{"upload_id":"x"}'),
                ("delete", None, ".lamindb/z", '{"etag":"e"}'),
                ("delete", None, ".lamindb/any", "{}"),
                ("move", "u" * 20, None, "{}"),
            ],
        )
    result = intake.take(old, "old", tmp_path / "fresh.lndb", PLACE, now=AT, spare_uid=SPARE)
    fresh = Registry(tmp_path / "fresh.lndb")
    assert [(type(entry), entry.about) for entry in fresh.journal.entries()] == [
        (Delete, ".lamindb/z"),
        (Move, "u" * 20),
    ]
    assert result.findings == []
    fresh.close()


def test_whose_bytes_are_elsewhere_is_said(box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]) -> None:
    """But nobody says which spool files of this machine are whose."""
    other, mine = f"{'a' * 12}:3-{'b' * 12}:{'u' * 20}", f"{machine_mark()}:3-{'b' * 12}:{'u' * 20}"

    def change(conn: sqlite3.Connection) -> None:
        for key, text in (("a.csv", other), ("d/b.txt", mine), ("d/e/ä", "../../x\x1b")):
            conn.execute("UPDATE inode SET pending=? WHERE ino=?", (text, box.inos[key]))

    result, fresh = taken(change)
    assert fresh.replay.of(box.inos["a.csv"]) == ("a" * 12, f"3-{'b' * 12}", "u" * 20)
    assert fresh.replay.of(box.inos["d/b.txt"]) is None
    assert fresh.db.one("SELECT count(*) FROM inode WHERE pending IS NOT NULL") == (1,)
    assert result.total == 1
    assert not fresh.replay.is_needed()


def test_a_description_that_is_no_text_is_left_out(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]
) -> None:
    result, fresh = taken(
        f"INSERT INTO xattr VALUES({box.inos['a.csv']}, '{DESCRIPTION_XATTR}', x'ff');"
        f"INSERT INTO xattr VALUES({box.inos['a.csv']}, 'user.other', x'ff');"
    )
    assert [finding.table for finding in result.findings] == ["xattr"]
    assert fresh.db.all("SELECT name FROM xattr WHERE ino=?", (box.inos["a.csv"],)) == [("user.other",)]


def test_keys_that_follow_a_renamed_directory_have_followed(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]
) -> None:
    result, fresh = taken(
        f"UPDATE dentry SET name='z' WHERE parent={ROOT_INO} AND ino={box.directory};"
        "INSERT INTO rekey(old, new) VALUES('d', 'y'), ('y', 'z')"
    )
    assert (result.findings, rows(fresh, "rekey")) == ([], [])
    assert fresh.tree.path(box.inos["d/b.txt"]) == "z/b.txt"


@pytest.mark.parametrize(
    "renames",
    [[("d", "d/" * 500_000 + "d")] * 40, [("d", "x"), ("x", "d")] * 500, [("d", "a")], [("a.csv", "q")] * 9],
    ids=["growing", "back and forth", "not in the tree", "of nothing"],
)
def test_renames_that_keys_are_to_follow_are_bounded(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]], renames: list[tuple[str, str]]
) -> None:
    began = time.monotonic()
    _, fresh = taken(lambda conn: conn.executemany("INSERT INTO rekey(old, new) VALUES(?, ?)", renames))
    assert time.monotonic() - began < 60
    assert rows(fresh, "rekey") == []
    assert fresh.tree.path(box.inos["d/b.txt"]) == "d/b.txt"


def test_circles_and_second_names_of_directories(box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]) -> None:
    result, fresh = taken(
        f"UPDATE dentry SET parent={box.inner} WHERE ino={box.directory};"
        f"INSERT INTO dentry(parent, name, ino) VALUES(1, 'second', {box.inner});"
        f"INSERT INTO dentry(parent, name, ino) VALUES(1, '.lamfs', {box.link});"
        f"INSERT INTO dentry(parent, name, ino) VALUES(5000, 'nowhere', {box.link});"
        "INSERT INTO dentry(parent, name, ino) VALUES(1, 'nothing', 5000);"
        f"INSERT INTO dentry(parent, name, ino) VALUES({box.link}, 'in a link', 1);"
    )
    for name in ("d/b.txt", "d/e/ä"):
        record = fresh.artifacts.by_ino(box.inos[name])
        assert record is not None
        assert record.key is not None
        assert record.key.startswith("lost+found/")
        assert record.key.endswith(name.rpartition("/")[2])
    assert fresh.tree.lookup(ROOT_INO, ".lamfs") is None
    assert result.total >= 4


def test_the_two_fixed_directories_are_there_whatever_came(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]
) -> None:
    _, fresh = taken(
        f"DELETE FROM inode WHERE ino IN ({ROOT_INO}, {AUTO_INO}); DELETE FROM dentry WHERE ino={AUTO_INO};"
        f"UPDATE inode SET mode=33188 WHERE ino={box.directory}"
    )
    assert fresh.tree.resolve(".lamindb").ino == AUTO_INO  # type: ignore[union-attr]
    assert fresh.tree.resolve("a.csv") is not None
    assert len(rows(fresh, "artifact")) == 4


def test_the_name_of_the_control_directory_is_taken_from_whatever_has_it(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]
) -> None:
    names = [".lamfs", *(f".lamfs.{number}" for number in range(300))]

    def change(conn: sqlite3.Connection) -> None:
        conn.executemany(
            f"INSERT INTO dentry(parent, name, ino) VALUES({ROOT_INO}, ?, {box.inos['a.csv']})",
            ((name,) for name in names),
        )

    _, fresh = taken(change)
    assert fresh.tree.lookup(ROOT_INO, ".lamfs") is None
    assert len(fresh.tree.names(box.inos["a.csv"])) == 1 + len(names)


def test_numbers_are_not_given_out_again(box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]) -> None:
    _, fresh = taken(
        "UPDATE sqlite_sequence SET seq=9223372036854775807; DELETE FROM sqlite_sequence WHERE name='dentry'"
    )
    inode = fresh.names.create(ROOT_INO, "new", stat.S_IFDIR | 0o755, 0, 0)
    assert inode.ino == max(int(str(row[0])) for row in rows(box.folder / "good.lndb", "inode")) + 1


def test_inode_numbers_near_the_end_are_changed(box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]) -> None:
    high = (1 << 47) - 1

    def change(conn: sqlite3.Connection) -> None:
        for number, (table, column) in enumerate(
            [("inode", "ino"), ("dentry", "ino"), ("dentry", "parent"), ("artifact", "ino"), ("xattr", "ino")]
        ):
            for old, new in ((box.directory, high), (box.inos["a.csv"], high - 1)):
                conn.execute(f"UPDATE {table} SET {column}=? WHERE {column}=?", (new, old))
            assert number < 5
        conn.execute("UPDATE sqlite_sequence SET seq=? WHERE name='inode'", (high,))

    result, fresh = taken(change)
    assert result.total == 1
    assert fresh.db.one("SELECT max(ino) FROM inode") < (100,)  # type: ignore[operator]
    inode = fresh.names.create(ROOT_INO, "new", stat.S_IFDIR | 0o755, 0, 0)
    assert inode.ino < 100
    assert fresh.artifacts.by_key("a.csv") is not None
    assert fresh.artifacts.by_key("d/b.txt") is not None
    directory = fresh.tree.resolve("d")
    assert directory is not None
    assert fresh.tree.xattr(directory.ino, "user.x") == b"y"


def test_keys_that_no_folder_can_have(box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]) -> None:
    change = (
        "INSERT INTO owed(op, object_key, created_at, payload) VALUES('delete', 'a//b', 1, '{\"etag\":\"e\"}'),"
        "('delete', './a', 1, '{\"etag\":\"e\"}'), ('delete', 'a/', 1, '{\"etag\":\"e\"}')"
    )
    result, fresh = taken(change)
    assert result.total == 3
    assert len(rows(fresh, "owed")) == 2
    path = box.changed(change)
    place = intake.Place("s3", "s3://bucket")
    in_bucket = intake.take(path, "x", box.folder / "bucket.lndb", place, now=AT, spare_uid=SPARE)
    assert in_bucket.total == 0


def test_very_many_bad_rows_take_little_memory(box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]) -> None:
    def change(conn: sqlite3.Connection) -> None:
        conn.executemany(
            "INSERT INTO dentry(parent, name, ino) VALUES(?, ?, ?)", ((9000 + n, "../" * 9, n) for n in range(20_000))
        )

    result, fresh = taken(change)
    assert len(result.findings) <= intake.SHOWN + 10
    assert result.total >= 20_000
    assert fresh.tree.resolve("a.csv") is not None


def test_a_deep_tree_with_a_file_at_each_level_takes_no_longer_than_its_rows(
    box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]
) -> None:
    depth = 30_000
    inode = "INSERT INTO inode(ino, mode, uid, gid, nlink, atime_ns, mtime_ns, ctime_ns) VALUES(?,?,0,0,1,1,1,1)"

    def change(conn: sqlite3.Connection) -> None:
        for level in range(depth):
            above, folder, file = (ROOT_INO if not level else 9_998 + 2 * level), 10_000 + 2 * level, 10_001 + 2 * level
            conn.execute(inode, (folder, stat.S_IFDIR | 0o755))
            conn.execute(inode, (file, stat.S_IFREG | 0o644))
            conn.executemany(
                "INSERT INTO dentry(parent, name, ino) VALUES(?, ?, ?)", [(above, "n", folder), (folder, "f", file)]
            )
            conn.execute(
                "INSERT INTO artifact(id, uid, storage_id, suffix, created_at, updated_at, ino, revision_id)"
                " SELECT ?1, ?2, storage_id, suffix, created_at, updated_at, ?1, ?1 FROM artifact LIMIT 1",
                (file, f"{level:010d}deepdeepde"),
            )
            conn.execute(
                "INSERT INTO revision SELECT ?1, ?1, 1, size, hash, hash_type, blocks, head, object_key, etag,"
                " created_at, created_by_id, run_id FROM revision LIMIT 1",
                (file,),
            )

    path = box.changed(change)
    began = time.monotonic()
    intake.take(path, "the registry", box.folder / "deep.lndb", PLACE, now=AT, spare_uid=SPARE)
    assert time.monotonic() - began < 25


def test_a_deep_tree_of_wrong_keys_is_bounded(box: Box, taken: Callable[..., tuple[intake.Taken, Registry]]) -> None:
    depth = 3000

    def change(conn: sqlite3.Connection) -> None:
        parent = ROOT_INO
        for level in range(depth):
            conn.execute(
                "INSERT INTO inode(ino, mode, uid, gid, nlink, atime_ns, mtime_ns, ctime_ns) VALUES(?,?,0,0,2,1,1,1)",
                (10_000 + level, stat.S_IFDIR | 0o755),
            )
            conn.execute("INSERT INTO dentry(parent, name, ino) VALUES(?, ?, ?)", (parent, "n" * 255, 10_000 + level))
            parent = 10_000 + level
        conn.execute("UPDATE dentry SET parent=? WHERE ino=?", (parent, box.inos["a.csv"]))

    began = time.monotonic()
    _, fresh = taken(change)
    assert time.monotonic() - began < 20
    record = fresh.artifacts.by_ino(box.inos["a.csv"])
    assert record is not None
    assert record.key is not None
    assert len(record.key) == 256 * depth + 5


def test_a_storage_without_a_right_row_gets_the_uid_and_the_time_that_were_said(box: Box) -> None:
    taken, fresh = box.take("UPDATE storage SET uid='no uid'")
    with contextlib.closing(fresh):
        assert fresh.db.all("SELECT uid, created_at FROM storage") == [(SPARE, AT)]
    assert any("it has a new one" in finding.sentence for finding in taken.findings)
