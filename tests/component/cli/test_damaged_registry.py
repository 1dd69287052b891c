"""A registry that is damaged, here or in storage: every command says so with the way back, and nothing good is lost."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from lamfs import config
from lamfs.cli import main
from lamfs.config import InstanceSettings
from lamfs.model import StorageConfig
from lamfs.ops import in_use, kept
from lamfs.ops.instance import Instance
from lamfs.registry import workdb
from lamfs.storage import open_store
from tests.support.commands import quick, quick_json
from tests.support.ops import machine, write_spool
from tests.support.timed import timed

SLUG = "ada/one"


class Place(NamedTuple):
    """A storage, and the options that reach it."""

    storage: StorageConfig

    @property
    def options(self) -> list[str]:
        where = self.storage
        if where.endpoint_url is None:
            return []
        return ["--endpoint-url", where.endpoint_url, "--region", where.region or "", "--path-style"]

    def objects(self) -> dict[str, bytes]:
        """Everything that is in the storage, but for locks."""
        return {key: data for key, data in self._everything().items() if "/_exclusion/" not in key}

    def locks(self) -> dict[str, bytes]:
        """The locks that are in the storage."""
        return {key: data for key, data in self._everything().items() if "/_exclusion/" in key}

    def _everything(self) -> dict[str, bytes]:
        with closing(open_store(self.storage)) as store:
            return {each.key: store.get(each.key, length=each.size) for each in store.list()}

    def put(self, key: str, data: bytes) -> None:
        """Write an object past lamfs."""
        with closing(open_store(self.storage)) as store:
            store.put_bytes(key, data)

    def remove(self, *keys: str) -> None:
        """Delete objects past lamfs."""
        with closing(open_store(self.storage)) as store:
            store.delete(list(keys))


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    quick("login", "ada")
    if request.param == "s3":
        return Place(request.getfixturevalue("ministack_config"))
    (tmp_path / "store").mkdir(mode=0o700)
    return Place(StorageConfig(str(tmp_path / "store")))


def save(tmp_path: Path, key: str, text: str) -> None:
    (tmp_path / "file").write_text(text)
    quick("save", tmp_path / "file", "--key", key)


def begin(place: Place, tmp_path: Path) -> InstanceSettings:
    """An instance with two artifacts, of which storage knows one."""
    quick("init", "--storage", place.storage.root, "--name", "one", *place.options)
    save(tmp_path, "a.txt", "first")
    quick("close")
    quick("connect", SLUG)
    save(tmp_path, "b.txt", "second")
    return config.load_instance(SLUG)


def keys() -> list[str]:
    return quick("ls").split()


def read(key: str) -> str:
    return Path(quick("cache", key).strip()).read_text()


COMMANDS = (
    ("ls",), ("info", "a.txt"), ("cache", "a.txt"), ("save", "{file}", "--key", "c.txt"), ("delete", "a.txt"),
    ("replace", "a.txt", "{file}"), ("close",), ("connect", SLUG), ("delete-instance", SLUG),
)  # fmt: skip


def sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as conn:
            conn.execute(statement)
            conn.commit()

    return change


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    path.write_bytes(b"something else" * 999)


def another(path: Path) -> None:
    path.unlink()
    sql("CREATE TABLE x(y)")(path)


def page(path: Path) -> None:
    """The page with the first rows of the artifact table."""
    with closing(sqlite3.connect(path)) as conn:
        (number,) = conn.execute("SELECT rootpage FROM sqlite_master WHERE name='artifact'").fetchone()
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:
        file.seek((number - 1) * 4096)
        file.write(b"\xa5" * 4096)


WORKING_COPIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: os.truncate(path, 0), "it is empty"),
    "cut": (cut, "malformed"),
    "no SQLite": (overwritten, "not a database"),
    "no tables": (another, "which version"),
    "no meta rows": (sql("DELETE FROM meta"), "which version"),
    "no slug": (sql("DELETE FROM meta WHERE key='slug'"), "which instance it is of"),
    "no uid": (sql("DELETE FROM meta WHERE key='uid'"), "which instance it is of"),
    "another slug": (sql("UPDATE meta SET value='bob/other' WHERE key='slug'"), "of the instance 'bob/other'"),
    "another uid": (sql("UPDATE meta SET value='abcdefghijkl' WHERE key='uid'"), "another instance"),
    "gone": (Path.unlink, "is gone"),
    "a damaged page": (page, "malformed"),
}


@pytest.mark.parametrize("damage", WORKING_COPIES)
@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_damaged_working_copy_is_refused_and_the_one_in_storage_brought_back(
    place: Place, tmp_path: Path, damage: str
) -> None:
    settings = begin(place, tmp_path)
    for suffix in ("-wal", "-shm"):
        Path(f"{settings.registry_path}{suffix}").unlink(missing_ok=True)
    WORKING_COPIES[damage][0](settings.registry_path)
    before = place.objects()
    way = f"'lamfs connect {SLUG} --restore'"
    for words in COMMANDS:
        if damage == "a damaged page" and words[0] in ("connect", "close", "delete-instance"):
            continue  # these look at this page late, or not at all
        said = quick(*(word.format(file=tmp_path / "file") for word in words), code=1)
        assert str(settings.registry_path) in said, words
        assert WORKING_COPIES[damage][1] in said, words
        assert way in said, words
        assert len(said.splitlines()) == 1, words
    if damage != "a damaged page":
        assert way in quick("status")
    found = quick_json_failing("fsck")
    assert way in found
    assert place.objects() == before, "nothing is written for a registry that is damaged"
    quick("connect", SLUG, "--restore")
    assert keys() == ["a.txt"]
    assert read("a.txt") == "first"


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_restore_says_where_the_registry_before_is(
    place: Place, tmp_path: Path, damaged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = begin(place, tmp_path)
    if damaged:
        for suffix in ("-wal", "-shm"):
            Path(f"{settings.registry_path}{suffix}").unlink(missing_ok=True)
        settings.registry_path.write_bytes(b"rubbish" * 1000)
    said = quick("connect", SLUG, "--restore")
    (kept_at,) = re.findall(r"this machine's was put aside as (\S+)", said)
    assert Path(kept_at).exists()
    told = said + "".join(record.getMessage() for record in caplog.records)
    assert "OWNER/NAME" not in told
    assert "--restore" not in told, "it is being done"


@pytest.mark.parametrize("place", ["folder", "s3"], indirect=True)
def test_the_way_back_after_a_delete_is_the_one_that_works(place: Place, tmp_path: Path) -> None:
    begin(place, tmp_path)
    quick("delete-instance", SLUG, "--force")
    way = shlex.join(["lamfs", "init", "--storage", place.storage.root, *place.options])
    for words in (("connect", place.storage.root, *place.options),
                  ("init", "--storage", place.storage.root, "--name", "one", *place.options)):  # fmt: skip
        said = quick(*words, code=1)
        assert "if that machine has not deleted the instance" in said
        named = " --name one" if words[0] == "init" else ""
        assert f"'{way}{named} --new' and then 'lamfs fsck --repair' give its objects names again" in said
    quick(*shlex.split(way)[1:], "--name", "one", "--new")
    quick("fsck", "--repair")
    found = quick("ls", "--json")
    assert sorted(read(one["key"]) for one in json.loads(found)) == ["first", "second"]


def quick_json_failing(*words: str) -> str:
    """What is said by a command that reports problems on stdout, and ends with 1."""
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 1, done.output
    assert "problem: registry: " in done.stdout, done.output
    return done.stdout


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_an_older_working_copy_is_refused(place: Place, tmp_path: Path) -> None:
    """A backup of this machine was restored: what was written since is in storage, and must not be written over."""
    settings = begin(place, tmp_path)
    path = settings.registry_path
    backup = tmp_path / "backup"
    shutil.copy(path, backup)
    save(tmp_path, "c.txt", "third")
    quick("close")
    before = place.objects()
    shutil.copy(backup, path)
    quick("connect", SLUG, code=1)
    config.set_current(SLUG)
    for words in (("ls",), ("save", str(tmp_path / "file"), "--key", "d.txt"), ("close",)):
        said = quick(*words, code=1)
        assert "it is older than what this machine has written" in said
        assert f"'lamfs connect {SLUG} --restore'" in said
    assert place.objects() == before
    quick("connect", SLUG, "--restore")
    assert keys() == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_an_older_working_copy_that_storage_has_nothing_of(place: Place, tmp_path: Path) -> None:
    """Not pushed yet, but written: known by the note beside it."""
    settings = begin(place, tmp_path)
    backup = tmp_path / "backup"
    shutil.copy(settings.registry_path, backup)
    save(tmp_path, "c.txt", "third")
    newest = tmp_path / "newest"
    shutil.copy(settings.registry_path, newest)
    shutil.copy(backup, settings.registry_path)
    assert "it is older than" in quick("ls", code=1)
    shutil.copy(newest, settings.registry_path)
    assert keys() == ["a.txt", "b.txt", "c.txt"]


# -- in storage -------------------------------------------------------------------------------------------------------

IN_STORAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "no SQLite": lambda data: b"something else" * 1000,
    "not UTF-8": lambda data: data.replace(b"CREATE TABLE", b"CREATE \xff\xfe\xff\xfe\xff"),
}


def damage_stored(place: Place, settings: InstanceSettings, how: str) -> None:
    data = IN_STORAGE[how](place.objects()[settings.snapshot_key])
    if data is None:
        place.remove(settings.snapshot_key)
    else:
        place.put(settings.snapshot_key, data)


@pytest.mark.parametrize("how", IN_STORAGE)
def test_a_damaged_copy_in_storage_is_mended_by_the_machine_that_has_a_good_one(
    place: Place, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = begin(place, tmp_path)
    damage_stored(place, settings, how)
    save(tmp_path, "c.txt", "third")
    quick("close")
    assert "this machine's is stored there again" in caplog.text
    with machine(tmp_path / "two"):
        quick("connect", place.storage.root, *place.options)
        assert keys() == ["a.txt", "b.txt", "c.txt"]
        assert read("b.txt") == "second"


@pytest.mark.parametrize("how", IN_STORAGE)
def test_a_damaged_copy_in_storage_is_brought_back_from_a_kept_one(place: Place, tmp_path: Path, how: str) -> None:
    """Another machine, or this one after its disk has died: the error says which command brings back what."""
    settings = begin(place, tmp_path)
    quick("close")
    damage_stored(place, settings, how)
    before = place.objects()
    with machine(tmp_path / "two"):
        quick("login", "ada")
        for words in (
            ("connect", place.storage.root, *place.options),
            ("connect", SLUG, "--storage", place.storage.root, *place.options),
            ("init", "--storage", place.storage.root, "--name", "one", *place.options),
        ):
            said = quick(*words, code=1)
            assert ("--new" in said) == (words[0] == "init")
            assert place.objects() == before, words
            (command,) = re.findall(r"'(lamfs connect .* --restore --copy [^']+\.lndb)'", said)
        quick(*shlex.split(command)[1:])
        assert keys() == ["a.txt", "b.txt"]
        assert (read("a.txt"), read("b.txt")) == ("first", "second")
        save(tmp_path, "c.txt", "third")
        quick("close")
        assert not quick("fsck", "--instance", SLUG).count("problem:")
    quick("connect", SLUG)
    assert keys() == ["a.txt", "b.txt", "c.txt"]


def test_without_a_kept_copy_no_new_instance_is_made_over_the_objects(place: Place, tmp_path: Path) -> None:
    settings = begin(place, tmp_path)
    quick("close")
    copies = [key for key in place.objects() if key.startswith(kept.PREFIX)]
    place.remove(settings.snapshot_key, *copies)
    before = place.objects()
    with machine(tmp_path / "two"):
        quick("login", "ada")
        for words in (
            ("connect", place.storage.root, *place.options),
            ("init", "--storage", place.storage.root, "--name", "one", *place.options),
        ):
            said = quick(*words, code=1)
            assert "objects of artifacts" in said
            assert "'lamfs close' on the machine that worked with it last" in said
            assert "makes a new instance over" not in said
            assert place.objects() == before
        quick("init", "--storage", place.storage.root, "--name", "one", "--new", *place.options)
        assert keys() == []
        after = place.objects()
        assert {key: after[key] for key in before} == before
        quick("close")
    # The machine that has the good one does not write over the new one either.
    assert "another instance" in quick("connect", SLUG, code=2)


def test_new_is_refused_where_the_instance_is_whole(place: Place, tmp_path: Path) -> None:
    begin(place, tmp_path)
    assert "is there, and whole" in quick(
        "init", "--storage", place.storage.root, "--name", "one", "--new", *place.options, code=2
    )


def test_an_instance_that_was_deleted_leaves_no_registry_behind(place: Place, tmp_path: Path) -> None:
    begin(place, tmp_path)
    quick("delete-instance", SLUG, "--force")
    assert not [key for key in place.objects() if key.endswith(".lndb")]


def test_the_last_copies_are_kept_and_one_can_be_chosen(place: Place, tmp_path: Path) -> None:
    settings = begin(place, tmp_path)
    for number in range(kept.KEPT + 2):
        save(tmp_path, f"{number}.txt", str(number))
        quick("close")
        quick("connect", SLUG)
    with Instance(settings) as instance:
        names = [copy.name for copy in kept.copies(instance.store, settings.id)]
    assert len(names) == kept.KEPT
    assert names == sorted(names, reverse=True)
    said = quick("connect", SLUG, "--restore", "--copy", "nonsense", code=2)
    assert all(name in said for name in names)
    assert "--restore" in quick("connect", SLUG, "--copy", names[0], code=2)
    quick("connect", SLUG, "--restore", "--copy", names[2])
    assert len(keys()) == 2 + kept.KEPT
    save(tmp_path, "after.txt", "after")
    quick("close")
    with machine(tmp_path / "two"):
        quick("connect", place.storage.root, *place.options)
        assert "after.txt" in keys()
        assert len(keys()) == 3 + kept.KEPT


def test_a_copy_in_storage_that_has_more_is_not_replaced(place: Place, tmp_path: Path) -> None:
    """Another machine has taken over, and this one thinks that the lease is its own."""
    settings = begin(place, tmp_path)
    save(tmp_path, "ours.txt", "ours")
    lease = place.locks()[f".lamindb/_exclusion/{settings.id.hex}"]
    place.remove(f".lamindb/_exclusion/{settings.id.hex}")
    with machine(tmp_path / "two"):
        quick("connect", place.storage.root, *place.options)
        save(tmp_path, "theirs.txt", "theirs")
        quick("close")
    place.put(f".lamindb/_exclusion/{settings.id.hex}", lease)
    before = place.objects()
    said = quick("close", code=1)
    assert "has changes that this machine's does not have" in said
    assert f"'lamfs connect {SLUG} --restore'" in said
    assert place.objects() == before
    assert "ours.txt" in keys()
    # Gone, but what is kept says that it had more.
    place.remove(settings.snapshot_key)
    said = quick("close", code=1)
    assert "a copy that is kept of it has what this machine's has not" in said
    (command,) = re.findall(r"'(lamfs connect .* --restore --copy [^']+)'", said)
    quick(*shlex.split(command)[1:])
    assert keys() == ["a.txt", "theirs.txt"]


def test_an_older_copy_that_was_put_back_in_storage_is_replaced(place: Place, tmp_path: Path) -> None:
    """The bucket was set back: this machine's registry comes from what is there."""
    settings = begin(place, tmp_path)
    old = place.objects()[settings.snapshot_key]
    quick("close")
    place.put(settings.snapshot_key, old)
    quick("connect", SLUG)
    assert keys() == ["a.txt", "b.txt"]
    save(tmp_path, "c.txt", "third")
    quick("close")
    with machine(tmp_path / "two"):
        quick("connect", place.storage.root, *place.options)
        assert keys() == ["a.txt", "b.txt", "c.txt"]


# -- any damage -------------------------------------------------------------------------------------------------------


def spoiled(data: bytes, chance: random.Random) -> bytes:
    """A file with some bytes changed, or cut."""
    kind = chance.choice(("flip", "flip", "flip", "cut", "zero"))
    if kind == "cut":
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    if kind == "zero":
        at = chance.randrange(0, len(data), 4096)
        changed[at : at + 4096] = bytes(len(changed[at : at + 4096]))
        return bytes(changed)
    for _ in range(chance.choice((1, 1, 8, 64))):
        # Half of them where the schema and the headers of pages are.
        at = chance.choice((chance.randrange(len(data)), chance.randrange(0, len(data), 4096) + chance.randrange(12)))
        changed[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def anyhow(*words: str) -> str:
    """Run a command that may find out or not. No other exception comes out than those that are sentences."""
    done = CliRunner().invoke(main, list(words))
    text = done.stdout + done.stderr
    assert done.exit_code in (0, 1, 2), (words, text)
    assert "Traceback" not in text, (words, text)
    assert "should not have happened" not in text, (words, text)
    return text


@pytest.mark.parametrize("place", ["folder"], indirect=True)
@pytest.mark.parametrize("seed", range(60))
def test_any_damage_to_the_working_copy_is_a_sentence(place: Place, tmp_path: Path, seed: int) -> None:
    settings = begin(place, tmp_path)
    for number in range(3):
        save(tmp_path, f"d/{number}.txt", f"{number}" * 100)
    path = settings.registry_path
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    good = path.read_bytes()
    before = place.objects()
    for turn in range(3):
        path.write_bytes(spoiled(good, random.Random(seed * 100 + turn)))
        for words in (("ls", "-l"), ("info", "a.txt"), ("fsck",), ("ls", "--json"), ("cache", "b.txt"), ("status",)):
            anyhow(*words)
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
    assert place.objects() == before


@pytest.mark.parametrize("place", ["folder"], indirect=True)
@pytest.mark.parametrize("seed", range(40))
def test_any_damage_to_the_copy_in_storage_is_a_sentence(place: Place, tmp_path: Path, seed: int) -> None:
    settings = begin(place, tmp_path)
    quick("close")
    good = place.objects()[settings.snapshot_key]
    for turn in range(3):
        place.put(settings.snapshot_key, spoiled(good, random.Random(seed * 100 + turn)))
        before = place.objects()
        with machine(tmp_path / f"two-{turn}"):
            anyhow("connect", place.storage.root)
            anyhow("connect", SLUG, "--storage", place.storage.root, "--restore")
            if config.current_slug() is not None:
                anyhow("ls")
                with Instance(config.load_instance(SLUG)) as instance:
                    instance.release_lease()
        assert place.objects() == before


# -- the work database ------------------------------------------------------------------------------------------------


def owe(*names: str) -> None:
    """A mount has died before it could store these files."""
    with Instance.open(SLUG) as opened:
        verbs = timed(opened.registry)
        for name in names:
            inode, src = verbs.names.create_file(1, name, 0o100644, 0, 0)
            write_spool(opened, src, f"only here: {name}")
            verbs.journal.ready_put(inode.ino)
        opened.registry.db.execute("UPDATE journal SET owner='x:1:1'")


def work_page(name: str) -> Callable[[Path], None]:
    """Ruins the first page of a table, or of an index, of the work database."""

    def ruin(path: Path) -> None:
        with closing(sqlite3.connect(path)) as conn:
            (number,) = conn.execute("SELECT rootpage FROM sqlite_master WHERE name=?", (name,)).fetchone()
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with open(path, "r+b") as file:
            file.seek((number - 1) * 4096)
            file.write(b"\xa5" * 4096)

    return ruin


WORK_DATABASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the page of the journal": (work_page("journal"), r"malformed|returns error code 11"),
    "the page of an index": (work_page("journal_put"), r"malformed|returns error code 11"),
    "no journal": (sql("DROP TABLE journal"), "no such table"),
}


@pytest.mark.parametrize("damage", WORK_DATABASES)
@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_damaged_work_database_is_named_and_made_anew_from_the_registry(
    place: Place, tmp_path: Path, damage: str
) -> None:
    """It was called damage of the registry. The copy in storage, which was advised, has not what is still to store."""
    settings = begin(place, tmp_path)
    owe("c.txt", "d.txt")
    work = workdb.work_path(settings.registry_path)
    WORK_DATABASES[damage][0](work)
    way = f"'lamfs fsck --repair --instance {SLUG}'"
    for words in (("sync",), ("close",), ("replace", "a.txt", str(tmp_path / "file"))):
        said = quick(*words, code=1)
        assert re.search(rf"The work database {work} is damaged \(.*({WORK_DATABASES[damage][1]})", said), said
        assert way in said, words
        assert "--restore" not in said, words
        assert len(said.splitlines()) == 1, words
    said = quick("status")
    assert str(work) in said
    assert way in said
    done = CliRunner().invoke(main, ["fsck"])
    assert done.exit_code == 1
    assert f"problem: work database: {work} is damaged (" in done.stdout
    assert way in done.stdout
    assert "--restore" not in done.stdout
    said = quick(*shlex.split(way.strip("'"))[1:])
    (kept_at,) = re.findall(r"repaired: work database: .* the old one is (\S+)", said)
    assert Path(kept_at).exists()
    assert keys() == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert [read(key) for key in keys()] == ["first", "second", "only here: c.txt", "only here: d.txt"]
    assert quick_json("info", "c.txt")["pending"] is False
    assert quick("sync") == "No mount is alive, and nothing waits to be stored.\n"
    # The old one never comes back.
    for side in ("", "-wal", "-shm"):
        Path(f"{work}{side}").unlink(missing_ok=True)
    assert "clean" in quick("fsck")
    assert Path(kept_at).exists()


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_damaged_work_database_that_is_in_use_stays(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_use, "ALONE_SECONDS", 0.0)
    settings = begin(place, tmp_path)
    owe("c.txt")
    work = workdb.work_path(settings.registry_path)
    with Instance.open(SLUG) as other:
        work_page("journal")(work)
        done = CliRunner().invoke(main, ["fsck", "--repair"])
        assert done.exit_code == 1
        assert f"problem: work database: {work} is damaged (" in done.stdout
        assert "is in use by another program on this machine, so it cannot be mended" in done.stdout
        assert work.exists()
        _ = other.registry
    quick("fsck", "--repair")
    assert read("c.txt") == "only here: c.txt"


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_registry_that_is_damaged_as_well_is_seen_to_first(place: Place, tmp_path: Path) -> None:
    settings = begin(place, tmp_path)
    work = workdb.work_path(settings.registry_path)
    work_page("journal")(work)
    page(settings.registry_path)
    done = CliRunner().invoke(main, ["fsck", "--repair"])
    assert done.exit_code == 1
    assert f"'lamfs connect {SLUG} --restore'" in done.stdout
    assert list(work.parent.glob("work.*.work.db")) == []
    quick("connect", SLUG, "--restore")
    assert keys() == ["a.txt"]
