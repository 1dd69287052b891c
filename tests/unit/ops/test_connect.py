"""Instances of one name: what a storage claims changes nothing that this machine knows, and no working copy is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from lamfs import config
from lamfs.errors import InvalidArgument, LamfsError, RegistryError
from lamfs.model import StorageConfig, instance_id
from lamfs.ops import artifacts, fsck, recover, setup, snapshot, working_copy
from lamfs.ops.instance import Instance
from tests.support.ops import machine, write_spool


@pytest.fixture(autouse=True)
def _ada() -> None:
    setup.login("ada")


def save(slug: str, tmp_path: Path, key: str, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with Instance.open(slug) as opened:
        artifacts.save(opened, tmp_path / "file", key=key)


def read(slug: str, key: str) -> str:
    with Instance.open(slug) as opened:
        return artifacts.cache(opened, artifacts.find(opened, key)).read_text()


def keys(slug: str) -> list[str]:
    with Instance.open(slug) as opened:
        assert fsck.check(opened, data=True).problems == []
        return sorted(record.key or "" for record in opened.registry.artifacts.filter())


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two storages, each with an instance ada/default; this machine knows the first."""
    one, other = tmp_path / "one", tmp_path / "other"
    with machine(tmp_path / "elsewhere"):
        setup.login("ada")
        setup.init(str(other), "default")
        save("ada/default", tmp_path, "b.txt", "theirs")
        setup.close("ada/default")
    setup.init(str(one), "default")
    save("ada/default", tmp_path, "a.txt", "ours")
    return one, other


def test_another_storage_with_a_known_name_is_refused_with_a_way_out(two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = two
    with pytest.raises(InvalidArgument, match=rf"ada/default' in {one}, and that in {other} .* --name NAME'"):
        setup.connect(str(other))
    with pytest.raises(InvalidArgument, match="--name NAME"):
        setup.connect("ada/default", storage=str(other))
    assert config.load_instance("ada/default").storage.root == str(one)
    assert keys("ada/default") == ["a.txt"]
    save("ada/default", tmp_path, "c.txt", "ours too")
    setup.close("ada/default")
    assert sorted(path.name for path in other.iterdir()) == sorted(
        [".lamindb", f"{instance_id('ada/default').hex}.lndb"]
    )
    assert keys("ada/default") == ["a.txt", "c.txt"]


def test_both_are_used_under_two_names(two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = two
    settings = setup.connect(str(other), name="theirs")
    assert (settings.slug, settings.registry_slug) == ("ada/theirs", "ada/default")
    assert settings.id == instance_id("ada/default")
    assert keys("ada/theirs") == ["b.txt"]
    save("ada/theirs", tmp_path, "d.txt", "from here")
    save("ada/default", tmp_path, "e.txt", "ours")
    # By its storage it is found again under the name that it has here.
    assert setup.connect(str(other)).slug == "ada/theirs"
    assert setup.connect(str(one)).slug == "ada/default"
    with pytest.raises(InvalidArgument, match="--name NAME"):
        setup.connect(str(one), name="theirs")
    setup.close("ada/theirs")
    setup.close("ada/default")
    assert (keys("ada/theirs"), keys("ada/default")) == (["b.txt", "d.txt"], ["a.txt", "e.txt"])
    with machine(tmp_path / "elsewhere"):
        setup.connect("ada/default")
        assert read("ada/default", "d.txt") == "from here"
        setup.close("ada/default")
    setup.connect(str(other), name="bob/own")
    assert keys("bob/own") == ["b.txt", "d.txt"]
    setup.delete("ada/theirs", force=True)
    assert keys("ada/default") == ["a.txt", "e.txt"]
    with pytest.raises(InvalidArgument, match="give that too"):
        setup.connect("ada/default", name="x")


def test_a_folder_that_was_moved_is_the_same_instance(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    setup.init(str(old), "default")
    save("ada/default", tmp_path, "a.txt", "ours")
    old.rename(new)
    settings = setup.connect(str(new))
    assert (settings.slug, settings.storage.root) == ("ada/default", str(new))
    save("ada/default", tmp_path, "b.txt", "more")
    assert keys("ada/default") == ["a.txt", "b.txt"]
    with Instance.open("ada/default") as opened:
        assert opened.registry.describe(artifacts.find(opened, "a.txt"))["storage"] == str(new)
    setup.close("ada/default")


def test_a_copy_of_a_folder_is_another_instance(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    setup.init(str(old), "default")
    save("ada/default", tmp_path, "a.txt", "ours")
    setup.close("ada/default")
    shutil.copytree(old, new)
    with pytest.raises(InvalidArgument, match="--name NAME"):
        setup.connect(str(new))
    assert setup.connect(str(new), name="copy").slug == "ada/copy"
    save("ada/copy", tmp_path, "b.txt", "in the copy")
    setup.close("ada/copy")
    assert keys("ada/default") == ["a.txt"]


def test_another_server_with_the_same_bucket_changes_nothing_by_itself() -> None:
    ours = config.InstanceSettings("ada/x", StorageConfig("s3://data", "https://ours.example"))
    config.save_instance(ours)
    theirs = StorageConfig("s3://data", "https://theirs.example")
    with pytest.raises(InvalidArgument, match=r"at https://ours.example, .* --name NAME"):
        setup._settings_for("ada/x", theirs, None, typed=False)
    assert setup._settings_for("ada/x", theirs, None, typed=True).storage == theirs
    assert setup._settings_for("ada/x", theirs, "y", typed=False).slug == "ada/y"


def registry_of(root: Path, slug: str = "ada/default") -> Path:
    return root / f"{instance_id(slug).hex}.lndb"


def test_a_registry_of_another_instance_is_not_taken(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Somebody puts another registry in the place of ours, with a newer date."""
    one, other = two
    setup.close("ada/default")
    shutil.copy(registry_of(other), registry_of(one))
    before = Path(config.load_instance("ada/default").registry_path).read_bytes()
    with pytest.raises(InvalidArgument, match="of another instance of the same name"):
        save("ada/default", tmp_path, "c.txt", "x")
    assert config.load_instance("ada/default").registry_path.read_bytes() == before
    setup.connect("ada/default", restore=True)
    with Instance.open("ada/default") as opened:
        assert [record.key for record in opened.registry.artifacts.filter()] == ["b.txt"]
    kept = list(config.load_instance("ada/default").directory.glob("registry.2*.lndb"))
    assert len(kept) == 1
    with contextlib.closing(sqlite3.connect(kept[0])) as conn:
        assert conn.execute("SELECT key FROM artifact").fetchall() == [("a.txt",)]


def test_a_registry_under_a_name_that_is_not_its_own(two: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = two
    third = tmp_path / "third"
    third.mkdir(mode=0o700)
    shutil.copy(registry_of(other), third / f"{'0' * 32}.lndb")
    with pytest.raises(RegistryError, match="has another name"):
        setup.connect(str(third))
    shutil.copy(registry_of(other), registry_of(third, "ada/else"))
    with pytest.raises(InvalidArgument, match="under a name that is not its own"):
        setup.connect("ada/else", storage=str(third))
    assert [known.slug for known in config.list_instances()] == ["ada/default"]
    shutil.copy(registry_of(other), registry_of(third))
    assert setup.connect(str(third), name="three").slug == "ada/three"


def test_a_working_copy_of_another_storage_is_never_stored(two: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = two
    settings = config.load_instance("ada/default")
    config.save_instance(config.InstanceSettings("ada/default", StorageConfig(str(other))))
    before = registry_of(other).read_bytes()
    with pytest.raises(RegistryError, match="is of the instance 'ada/default' in"):
        save("ada/default", tmp_path, "c.txt", "x")
    with pytest.raises(RegistryError, match="so nothing is changed"):
        setup.close("ada/default")
    assert registry_of(other).read_bytes() == before
    config.save_instance(settings)
    assert keys("ada/default") == ["a.txt"]


def test_settings_that_are_gone_put_the_working_copy_aside(two: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = two
    setup.close("ada/default")
    config.remove_instance("ada/default")
    setup.connect(str(other))
    assert keys("ada/default") == ["b.txt"]
    kept = list(config.load_instance("ada/default").directory.glob("registry.2*.lndb"))
    assert len(kept) == 1
    with contextlib.closing(sqlite3.connect(kept[0])) as conn:
        assert conn.execute("SELECT key FROM artifact").fetchall() == [("a.txt",)]


def test_what_is_wrong_in_a_registry_is_said_and_kept(
    two: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, other = two
    with contextlib.closing(sqlite3.connect(registry_of(other))) as conn:
        conn.execute("UPDATE dentry SET name='../../evil\x1b[31m' WHERE name='b.txt'")
        conn.commit()
    crafted = registry_of(other).read_bytes()
    settings = setup.connect(str(other), name="theirs")
    with Instance.open("ada/theirs") as opened:
        (record,) = opened.registry.artifacts.filter()
        assert record.key is not None
        assert record.key.startswith("lost+found/")
    assert read("ada/theirs", record.key) == "theirs"
    listing = json.loads((settings.directory / "left-out.json").read_text())
    assert listing["total"] >= 1
    assert Path(listing["kept"]).read_bytes() == crafted
    assert "cannot be right, and were left out" in caplog.text
    setup.close("ada/theirs")
    with machine(tmp_path / "third"):
        setup.connect(str(other))
        assert read("ada/default", record.key) == "theirs"


# -- what this machine has still to store -----------------------------------------------------------------------------


def owe(slug: str, key: str, name: str, text: str) -> str:
    """A file of the spool that a mount which is gone has left; returns the spool file's name."""
    with Instance.open(slug) as opened:
        registry = opened.registry
        inode = registry.tree.resolve(key)
        if inode is None:
            inode, src = registry.names.create_file(1, key, 0o100644, 0, 0)
        else:
            src = name
            registry.journal.begin_put(inode.ino, src)
        registry.journal.ready_put(inode.ino)
        registry.db.execute("UPDATE journal SET owner='x:1:1' WHERE src=?", (src,))
        registry.tree.update(inode.ino, size=len(text))
        write_spool(opened, src, text)
        return src


def test_restore_carries_over_what_is_still_to_be_stored(tmp_path: Path) -> None:
    root = tmp_path / "store"
    setup.init(str(root), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
    owe("ada/default", "a.txt", "5-aaaaaaaaaaaa", "second")
    setup.connect("ada/default", restore=True)
    assert read("ada/default", "a.txt") == "second"
    assert keys("ada/default") == ["a.txt"]


def test_what_another_machine_has_to_store_is_left_to_it(tmp_path: Path) -> None:
    root = tmp_path / "store"
    setup.init(str(root), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    owe("ada/default", "a.txt", "5-aaaaaaaaaaaa", "second")
    src = owe("ada/default", "new.txt", "", "never stored")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
        opened.release_lease()
    with machine(tmp_path / "two"):
        setup.login("bob")
        setup.connect(str(root))
        assert read("ada/default", "a.txt") == "first"
        with Instance.open("ada/default") as opened:
            assert opened.registry.journal.entries() == []
            assert opened.registry.tree.resolve("new.txt") is not None
        save("ada/default", tmp_path, "b.txt", "from two")
        setup.close("ada/default")
    # Back home: both went on. A change is refused; connecting takes theirs, and keeps what only we have.
    with pytest.raises(LamfsError, match="changed on another machine, and here as well"):
        save("ada/default", tmp_path, "c.txt", "x")
    setup.connect("ada/default")
    assert read("ada/default", "a.txt") == "second"
    assert read("ada/default", "new.txt") == "never stored"
    assert list(root.rglob(src)) == []


@pytest.mark.parametrize(("when", "text"), [("before", "first"), ("before", "mine"), ("meanwhile", "mine")])
def test_what_somebody_else_has_stored_is_not_replaced_without_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, when: str
) -> None:
    """The registry may be older than the object, or another machine came between. Both have a name then."""
    setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    owe("ada/default", "a.txt", "5-aaaaaaaaaaaa", text)
    with Instance.open("ada/default") as opened:
        path = tmp_path / "store" / artifacts.find(opened, "a.txt").revision.object_key

        def change() -> None:
            path.unlink()
            path.write_text("theirs")

        if when == "before":
            change()
        else:
            changes = [change]

            def sync(_: Path) -> None:
                if changes:
                    changes.pop()()

            monkeypatch.setattr(recover, "sync_log", sync)
        for _ in range(2):
            recover.finish_all(opened, strict=False)
        assert opened.registry.journal.entries() == []
        (beside,) = [key for key in keys("ada/default") if key != "a.txt"]
        assert beside.startswith("a (conflict ")
        assert (read("ada/default", "a.txt"), read("ada/default", beside)) == ("theirs", text)


def test_a_save_keeps_what_somebody_else_has_stored(tmp_path: Path) -> None:
    """The registry that a machine has taken over may be older than an object of it."""
    setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "d/a.txt", "first")
    with Instance.open("ada/default") as opened:
        path = tmp_path / "store" / artifacts.find(opened, "d/a.txt").revision.object_key
    path.unlink()
    path.write_text("newer, of the machine that is gone")
    save("ada/default", tmp_path, "d/a.txt", "second")
    (beside,) = [key for key in keys("ada/default") if key != "d/a.txt"]
    assert beside.startswith("d/a (conflict ")
    assert read("ada/default", "d/a.txt") == "second"
    assert read("ada/default", beside) == "newer, of the machine that is gone"
    with Instance.open("ada/default") as opened:
        assert fsck.check(opened, data=True).problems == []


def test_restore_does_not_replace_what_another_machine_has_stored_since(tmp_path: Path) -> None:
    """What was closed here before another machine went on is older than what that one has stored."""
    root = tmp_path / "store"
    setup.init(str(root), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
        opened.release_lease()
    with machine(tmp_path / "two"):
        setup.login("bob")
        setup.connect(str(root))
        save("ada/default", tmp_path, "a.txt", "theirs")
        setup.close("ada/default")
    src = owe("ada/default", "a.txt", "5-aaaaaaaaaaaa", "closed here")
    setup.connect("ada/default", restore=True)
    with Instance.open("ada/default") as opened:
        recover.finish_all(opened)
    assert read("ada/default", "a.txt") == "theirs"
    assert read("ada/default", f"lost+found/a (spool {src}).txt") == "closed here"


def test_another_file_of_the_same_number_is_not_written(tmp_path: Path) -> None:
    """A put of a file that only this machine knows must not go into the file that another one made meanwhile."""
    root = tmp_path / "store"
    setup.init(str(root), "default")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
        opened.release_lease()
    with machine(tmp_path / "two"):
        setup.connect(str(root))
        save("ada/default", tmp_path, "theirs.txt", "theirs")
        setup.close("ada/default")
    src = owe("ada/default", "ours.txt", "", "ours")
    setup.connect("ada/default", restore=True)
    assert read("ada/default", "theirs.txt") == "theirs"
    # Its bytes are a file of their own, which says where they come from.
    with Instance.open("ada/default") as opened:
        recover.finish_all(opened)
        place = f"lost+found/ours (spool {src}).txt"
        (found,) = [record for record in opened.registry.artifacts.filter() if record.key == place]
        assert found.description == "Found in the spool, owed to nobody: bytes of 'ours.txt'"
    assert read("ada/default", place) == "ours"
    assert sorted(keys("ada/default")) == [place, "theirs.txt"]


def test_owed_deletes_and_saves_are_carried_over(tmp_path: Path) -> None:
    """What only the registry that is put aside says is to go does go; what the restored one needs stays."""
    setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
        (needed,) = [record.revision.object_key for record in opened.registry.artifacts.filter()]
        opened.store.put_bytes(".lamindb/" + "x" * 20, b"stale")
        for key in (needed, ".lamindb/" + "x" * 20):
            opened.registry.journal.add_delete(key)
        opened.registry.db.execute("UPDATE journal SET owner='gone'")
    setup.connect("ada/default", restore=True)
    with Instance.open("ada/default") as opened:
        recover.finish_all(opened)
        assert opened.registry.journal.entries() == []
        assert not (tmp_path / "store/.lamindb" / ("x" * 20)).exists()
    assert read("ada/default", "a.txt") == "first"


def test_working_copies_that_were_overtaken_do_not_pile_up(tmp_path: Path) -> None:
    root = tmp_path / "store"
    setup.init(str(root), "default")
    setup.close("ada/default")
    for turn in range(5):
        with machine(tmp_path / "two"):
            setup.connect(str(root))
            save("ada/default", tmp_path, f"two-{turn}.txt", f"{turn}")
            setup.close("ada/default")
        save("ada/default", tmp_path, f"one-{turn}.txt", f"{turn}")
        setup.close("ada/default")
    directory = config.load_instance("ada/default").directory
    assert len(list(directory.glob("overtaken.*.lndb"))) == working_copy.KEPT
    assert not [name for name in os.listdir(directory) if name.startswith(".")]
    assert len(keys("ada/default")) == 10


def test_a_kill_while_the_working_copy_is_replaced_loses_no_spool_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
    owe("ada/default", "new.txt", "", "only here")
    spool = tmp_path / "store/.lamindb/_spool"

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(working_copy, "put_aside", kill)
        with pytest.raises(KeyboardInterrupt):
            setup.connect("ada/default", restore=True)
    assert [path.read_text() for path in spool.glob("*/*")] == ["only here"]
    assert read("ada/default", "new.txt") == "only here"
    assert keys("ada/default") == ["a.txt", "new.txt"]


def test_the_spool_of_a_working_copy_without_settings_is_put_aside_too(two: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = two
    settings = config.load_instance("ada/default")
    owe("ada/default", "new.txt", "", "only here")
    config.remove_instance("ada/default")
    with Instance(config.InstanceSettings("ada/default", StorageConfig(str(other)))) as opened:
        name = "5-aaaaaaaaaaaa"
        mine = write_spool(opened, name, "only here")
        setup.connect(str(other))
    assert not mine.exists()
    (kept,) = mine.parent.parent.glob(f"{settings.id.hex}.2*/{name}")
    assert kept.read_text() == "only here"


def test_a_registry_that_names_the_folder_of_another_machine_is_connected_again(tmp_path: Path) -> None:
    """Older versions let a working copy go on naming the folder in which another machine has the same disk."""
    root = tmp_path / "store"
    setup.init(str(root), "default")
    save("ada/default", tmp_path, "a.txt", "ours")
    with Instance.open("ada/default") as opened:
        opened.registry.move_to("/media/elsewhere")
    with pytest.raises(RegistryError, match=f"run 'lamfs connect {root}'"):
        save("ada/default", tmp_path, "b.txt", "more")
    setup.connect(str(root))
    save("ada/default", tmp_path, "b.txt", "more")
    assert keys("ada/default") == ["a.txt", "b.txt"]


def test_an_older_working_copy_says_its_root_with_the_first_change(tmp_path: Path) -> None:
    """Older versions kept the root that a folder had when the instance was made: a disk may be elsewhere since."""
    root = tmp_path / "store"
    settings = setup.init(str(root), "default")
    save("ada/default", tmp_path, "a.txt", "ours")
    with contextlib.closing(sqlite3.connect(settings.registry_path)) as conn:
        conn.execute("UPDATE storage SET root='/elsewhere'")
        conn.execute("DELETE FROM meta WHERE key IN ('root', 'uid')")
        conn.execute("UPDATE meta SET value=10 WHERE key='schema_version'")
        conn.execute("DELETE FROM _sqlite_migrations WHERE name='identity'")
        conn.commit()
    save("ada/default", tmp_path, "b.txt", "more")
    assert keys("ada/default") == ["a.txt", "b.txt"]
    with Instance.open("ada/default") as opened:
        assert opened.registry.describe(artifacts.find(opened, "a.txt"))["storage"] == str(root)
    setup.close("ada/default")


def test_a_registry_that_was_taken_before_a_crash_is_not_taken_for_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    setup.init(str(root), "default")
    setup.close("ada/default")
    with machine(tmp_path / "two"):
        setup.connect(str(root))
        save("ada/default", tmp_path, "b.txt", "from two")
        setup.close("ada/default")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_remember", die)
        with pytest.raises(KeyboardInterrupt):
            setup.connect("ada/default")
    save("ada/default", tmp_path, "c.txt", "from one")
    assert keys("ada/default") == ["b.txt", "c.txt"]
    setup.close("ada/default")


@pytest.mark.parametrize("text", ["a\0b", "x" * ((1 << 20) + 1), "\udcff"])
def test_a_description_that_no_other_machine_would_take(tmp_path: Path, text: str) -> None:
    setup.init(str(tmp_path / "store"), "default")
    (tmp_path / "file").write_text("x")
    with Instance.open("ada/default") as opened, pytest.raises(InvalidArgument, match="description"):
        artifacts.save(opened, tmp_path / "file", key="a", description=text)
