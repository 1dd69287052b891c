"""Instances of one name: what a storage claims changes nothing that this machine knows, and no working copy is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from lamfs import config
from lamfs.errors import (
    DamagedRegistry,
    InvalidArgument,
    LamfsError,
    RegistryError,
    StorageError,
    TooLarge,
)
from lamfs.model import StorageConfig, instance_id
from lamfs.ops import artifacts, fsck, recover, setup, snapshot, working_copy
from lamfs.ops.instance import Instance
from lamfs.registry import Lost, schema, workdb
from lamfs.spool import SpoolFolder
from lamfs.storage.local import LocalStore
from lamfs.work import steps
from tests.support.ops import machine, write_spool
from tests.support.timed import timed


@pytest.fixture(autouse=True)
def _ada() -> None:
    setup.login("ada")


def save(slug: str, tmp_path: Path, key: str, text: str, virtual: bool = True) -> None:
    (tmp_path / "file").write_text(text)
    with Instance.open(slug) as opened:
        artifacts.save(opened, tmp_path / "file", key=key, virtual=virtual)


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
    with pytest.raises(InvalidArgument, match="by the name 'ada/default'"):
        setup.connect(str(one), name="theirs")
    setup.close("ada/theirs")
    setup.close("ada/default")
    assert (keys("ada/theirs"), keys("ada/default")) == (["b.txt", "d.txt"], ["a.txt", "e.txt"])
    with machine(tmp_path / "elsewhere"):
        setup.connect("ada/default")
        assert read("ada/default", "d.txt") == "from here"
        setup.close("ada/default")
    setup.delete("ada/theirs", force=True)
    assert keys("ada/default") == ["a.txt", "e.txt"]
    with pytest.raises(InvalidArgument, match="give that too"):
        setup.connect("ada/default", name="x")


def test_an_instance_has_one_name_on_a_machine(two: tuple[Path, Path]) -> None:
    """With two names it would have two working copies under one lease: the later one to be stored would be refused."""
    one, other = two
    with pytest.raises(InvalidArgument, match="already, by the name 'ada/default'; use that: 'lamfs connect ada/def"):
        setup.connect(str(one), name="theirs")
    assert setup.connect(str(one), name="default").slug == "ada/default"
    setup.connect(str(other), name="theirs")
    with pytest.raises(InvalidArgument, match="already, by the name 'ada/theirs'"):
        setup.connect("ada/default", storage=str(other), name="bob/own")
    assert setup.connect(str(other), name="theirs").slug == "ada/theirs"
    assert [known.slug for known in config.list_instances()] == ["ada/default", "ada/theirs"]


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
            inode, src = timed(registry).names.create_file(1, key, 0o100644, 0, 0)
        else:
            src = name
            timed(registry).journal.begin_put(inode.ino, src)
        timed(registry).journal.ready_put(inode.ino)
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
    save("ada/default", tmp_path, "a.txt", "first", virtual=False)
    owe("ada/default", "a.txt", "5-aaaaaaaaaaaa", text)
    with Instance.open("ada/default") as opened:
        path = tmp_path / "store" / artifacts.find(opened, "a.txt").revision.object_key

        def change() -> None:
            path.unlink()
            path.write_text("theirs")

        if when == "before":
            change()
        else:
            changes, put = [change], LocalStore.put_file

            def put_later(*args: Any, **how: Any) -> Any:
                if changes:
                    changes.pop()()
                return put(*args, **how)

            monkeypatch.setattr(LocalStore, "put_file", put_later)
        for _ in range(4):  # the objects go home one after the other
            recover.finish_all(opened, strict=False)
        assert opened.registry.journal.entries() == []
    (beside,) = [key for key in keys("ada/default") if key != "a.txt"]
    assert beside.startswith("a (conflict ")
    assert (read("ada/default", "a.txt"), read("ada/default", beside)) == ("theirs", text)


def test_a_save_replaces_only_what_it_set_out_to_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may sleep in the middle of the upload. What has come meanwhile is kept."""
    setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first", virtual=False)
    with Instance.open("ada/default") as opened:
        path = tmp_path / "store" / artifacts.find(opened, "a.txt").revision.object_key
    put = LocalStore.put_file

    def put_later(store: Any, key: str, *args: Any, **how: Any) -> Any:
        if path.read_text() == "first":
            path.unlink()
            path.write_text("theirs")
        return put(store, key, *args, **how)

    monkeypatch.setattr(LocalStore, "put_file", put_later)
    save("ada/default", tmp_path, "a.txt", "second")
    (beside,) = [key for key in keys("ada/default") if key != "a.txt"]
    assert (read("ada/default", "a.txt"), read("ada/default", beside)) == ("second", "theirs")


def test_restore_does_not_replace_what_another_machine_has_stored_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert f"what was not stored of 'a.txt' is 'lost+found/a (spool {src}).txt'" in caplog.text


def test_a_spool_file_that_cannot_be_looked_at_hinders_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
    owe("ada/default", "a.txt", "5-aaaaaaaaaaaa", "second")
    bad, good = (owe("ada/default", key, "", f"of {key}") for key in ("bad.txt", "good.txt"))
    status = SpoolFolder.stat

    def fails(self: SpoolFolder, name: str) -> os.stat_result:
        if name == bad:
            raise StorageError("It is not what it was.")
        return status(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(SpoolFolder, "stat", fails)
        setup.connect("ada/default", restore=True)
    assert "what was not stored of 'bad.txt' cannot be looked at" in caplog.text
    with Instance.open("ada/default") as opened:
        recover.finish_all(opened)
    assert read("ada/default", "a.txt") == "second"
    assert read("ada/default", f"lost+found/good (spool {good}).txt") == "of good.txt"
    assert [path.read_text() for path in tmp_path.rglob(bad)] == ["of bad.txt"]


def test_another_file_of_the_same_number_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
        assert f"what was not stored of 'ours.txt' is '{place}'" in caplog.text
        (found,) = [record for record in opened.registry.artifacts.filter() if record.key == place]
        assert found.description == "Found in the spool, owed to nobody: bytes of 'ours.txt'"
    assert read("ada/default", place) == "ours"
    assert sorted(keys("ada/default")) == [place, "theirs.txt"]


def test_missing_spool_files_are_named_by_a_restore(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of files that the registry in storage does not know, or knows with other bytes; and what was lost before."""
    setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    save("ada/default", tmp_path, "b.txt", "first")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
        opened.registry.rescue.note_lost(Lost("before.txt", "", 7, False, 1))
    spooled = [
        owe("ada/default", "a.txt", "5-aaaaaaaaaaaa", "second"),
        owe("ada/default", "new.txt", "", "never stored"),
    ]
    with Instance.open("ada/default") as opened:
        b = opened.registry.tree.resolve("b.txt")
        assert b is not None
        timed(opened.registry).journal.begin_put(b.ino, "6-bbbbbbbbbbbb", base="5:other")
        timed(opened.registry).journal.ready_put(b.ino)
        opened.registry.db.execute("UPDATE journal SET owner='x:1:1'")
    for src in spooled:
        (found,) = tmp_path.joinpath("store").rglob(src)
        found.unlink()
    setup.connect("ada/default", restore=True)
    assert "'new.txt' was missing, and it was never stored, so it is gone" in caplog.text
    with Instance.open("ada/default") as opened:
        recover.finish_all(opened)
        lost = {one.key: (one.stored, one.size) for one in opened.registry.rescue.lost()}
        assert lost["new.txt"] == (False, len("never stored"))
        assert lost["a.txt"] == (True, len("second"))
        assert lost["b.txt"][0]
        assert lost["before.txt"] == (False, 7)
        assert opened.registry.tree.resolve("new.txt") is None
    assert read("ada/default", "a.txt") == "first"
    assert read("ada/default", "b.txt") == "first"
    assert keys("ada/default") == ["a.txt", "b.txt"]


def test_close_names_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup.init(str(tmp_path / "store"), "default")
    with Instance.open("ada/default") as opened:
        for number in range(5):
            opened.registry.rescue.note_lost(Lost(f"{number}.bin", "", 7, True, number, ranges=((100, 107),)))
    setup.close("ada/default")
    assert "of what was written to '4.bin' last, 7 bytes are lost (bytes 100-106)" in caplog.text
    assert "'1.bin'" not in caplog.text
    assert "2 more are lost; 'lamfs status --json' lists what is lost" in caplog.text


def test_a_missing_spool_file_that_became_an_object_is_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was renamed into storage, and only the registry that is put aside knew."""
    root = tmp_path / "store"
    setup.init(str(root), "default")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
    src = owe("ada/default", "new.txt", "", "stored")
    with Instance.open("ada/default") as opened:
        (entry,) = opened.registry.journal.entries()
        target = opened.registry.commits.put_target(entry)
        opened.registry.journal.set_target(entry.id, target)
    (found,) = root.rglob(src)
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    found.rename(root / target)
    setup.connect("ada/default", restore=True)
    assert f"perhaps they are in the object {root / target}" in caplog.text
    with Instance.open("ada/default") as opened:
        assert opened.registry.rescue.lost() == []
        problems = fsck.check(opened).problems
    assert any(target in text for text in problems)
    assert (root / target).read_text() == "stored"


def test_owed_deletes_and_saves_are_carried_over(tmp_path: Path) -> None:
    """What only the registry that is put aside says is to go does go; what the restored one needs stays."""
    setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
        (needed,) = [record.revision.object_key for record in opened.registry.artifacts.filter()]
        opened.store.put_bytes(".lamindb/" + "x" * 20, b"stale")
        opened.store.put_bytes(".lamindb/" + "y" * 20, b"used anew since")
        timed(opened.registry).journal.add_delete(needed)
        timed(opened.registry).journal.add_delete(
            ".lamindb/" + "x" * 20, opened.store.head(".lamindb/" + "x" * 20).etag
        )
        timed(opened.registry).journal.add_delete(".lamindb/" + "y" * 20, "another")
        timed(opened.registry).journal.add_delete(".lamindb/" + "y" * 20)  # which nobody can prove any more
        opened.registry.db.execute("UPDATE journal SET owner='gone'")
    setup.connect("ada/default", restore=True)
    with Instance.open("ada/default") as opened:
        recover.finish_all(opened)
        assert opened.registry.journal.entries() == []
        assert not (tmp_path / "store/.lamindb" / ("x" * 20)).exists()
        assert opened.store.get(".lamindb/" + "y" * 20) == b"used anew since"
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
    owe("ada/default", "new.txt", "", "only here")
    config.remove_instance("ada/default")
    with Instance(config.InstanceSettings("ada/default", StorageConfig(str(other)))) as opened:
        name = "5-aaaaaaaaaaaa"
        mine = write_spool(opened, name, "only here")
        setup.connect(str(other))
    assert not mine.exists()
    (kept,) = mine.parent.parent.glob(f"{mine.parent.name}.2*/{name}")
    assert kept.read_text() == "only here"


@pytest.mark.parametrize("slug", ["somebody/else", "ada/default"])
def test_the_spool_is_not_that_of_a_foreign_registry_that_was_put_in_the_place_of_ours(
    tmp_path: Path, slug: str
) -> None:
    """Its files are owed to the instance that this machine worked with, and become files of lost+found."""
    settings = setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
    src = owe("ada/default", "new.txt", "", "only here")
    with contextlib.closing(sqlite3.connect(settings.registry_path)) as db, db:
        db.execute("UPDATE meta SET value=? WHERE key='slug'", (slug,))
        db.execute("UPDATE meta SET value='XXXXXXXXXXXX' WHERE key='uid'")
    with pytest.raises(DamagedRegistry, match=r"another instance|somebody/else"):
        Instance.open("ada/default")
    setup.connect("ada/default", restore=True)
    with Instance.open("ada/default") as opened:
        fsck.check(opened, repair=True)
        recover.finish_all(opened)
    assert read("ada/default", f"lost+found/new (spool {src}).txt") == "only here"
    spools = [path for path in (tmp_path / "store/.lamindb/_spool").iterdir() if path.is_dir()]
    assert [path.name for path in spools] == [settings.spool_place[1][-1]]


def test_a_registry_that_names_the_folder_of_another_machine_is_connected_again(tmp_path: Path) -> None:
    """Older versions let a working copy go on naming the folder in which another machine has the same disk."""
    root = tmp_path / "store"
    setup.init(str(root), "default")
    save("ada/default", tmp_path, "a.txt", "ours")
    with Instance.open("ada/default") as opened:
        opened.registry.file.move_to("/media/elsewhere")
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
    now = settings.registry_path.rename(tmp_path / "now.lndb")
    workdb.remove(settings.registry_path)
    with contextlib.closing(sqlite3.connect(settings.registry_path, isolation_level=None)) as conn:
        schema.apply(conn, 10)
        conn.execute("ATTACH ? AS now", (str(now),))
        content = {"size", "hash", "hash_type", "blocks", "object_key", "etag", "head"}
        for table in ("user", "storage", "inode", "dentry", "artifact"):
            names = [row[1] for row in conn.execute(f"PRAGMA main.table_info({table})")]
            if table == "artifact":
                chosen = [f"{'r' if name in content else 'a'}.{name}" for name in names]
                source = "now.artifact a JOIN now.revision r ON r.id=a.revision_id"
            else:
                chosen, source = names, f"now.{table}"
            conn.execute(f"INSERT OR REPLACE INTO main.{table} SELECT {', '.join(chosen)} FROM {source}")
        conn.execute("INSERT INTO main.sqlite_sequence SELECT * FROM now.sqlite_sequence WHERE name='change'")
        conn.execute("INSERT INTO main.meta SELECT key, value FROM now.meta WHERE key='slug'")
        conn.execute("INSERT INTO main.meta VALUES('schema_version', 10)")
        conn.execute("UPDATE main.storage SET root='/elsewhere'")
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


def test_close_names_what_storage_can_never_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.init(str(tmp_path / "store"), "default")
    for name in ("a.txt", "b.txt", "c.txt"):
        owe("ada/default", name, "", name)

    def check(store: object, size: int, name: str) -> None:
        if name != "b.txt":
            raise TooLarge(f"'{name}' is too large; cut it.")

    monkeypatch.setattr(steps, "check_size", check)
    for _ in range(2):
        with pytest.raises(
            TooLarge, match=r"'ada/default' cannot be closed yet: 'a.txt' is too large; .* of 'c.txt'\."
        ):
            setup.close("ada/default")
    with Instance.open("ada/default") as opened:
        assert [record.key for record in opened.registry.artifacts.filter()] == ["b.txt"]


@pytest.mark.parametrize("again", ["connect", "init"])
def test_the_log_of_a_registry_that_is_gone_is_not_read_into_the_next_one(tmp_path: Path, again: str) -> None:
    """Somebody has deleted the registry alone: SQLite would take the log beside it for that of any other one."""
    settings = setup.init(str(tmp_path / "store"), "default")
    save("ada/default", tmp_path, "a.txt", "first")
    log = Path(f"{settings.registry_path}-wal")
    with Instance.open("ada/default") as opened:
        snapshot.push(opened)
        with opened.registry.db.transaction():
            for number in range(2000):
                opened.registry.db.set_meta(f"filler-{number}", "x" * 200)
        left = log.read_bytes()
    assert left
    settings.registry_path.unlink()
    log.write_bytes(left)
    if again == "connect":
        setup.connect("ada/default", restore=True)
        assert keys("ada/default") == ["a.txt"]
    else:
        setup.delete("ada/default", force=True)
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(left)
        setup.init(str(tmp_path / "store"), "default", new=True)
    with contextlib.closing(sqlite3.connect(settings.registry_path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT count(*) FROM meta WHERE key LIKE 'filler%'").fetchone() == (0,)
