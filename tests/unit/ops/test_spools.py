"""Machines on one storage folder: each has a spool of its own, takes what it owes from elsewhere, names the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs import config, copying
from lamfs.daemon.recovery import take_over
from lamfs.errors import Locked, StorageError
from lamfs.keys import spool_name
from lamfs.ops import artifacts, fsck, mounts, recover, setup, snapshot, spools
from lamfs.ops.instance import Instance
from lamfs.ops.mounts import MountRecord
from lamfs.registry import process_id
from lamfs.spool import SpoolFolder
from tests.support.ops import machine, write_spool
from tests.support.timed import timed

SLUG = "ada/default"


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Path:
    """The folder that all machines share. The first one made the instance, and stored its registry."""
    setup.login("ada")
    setup.init(str(tmp_path / "store"), "default")
    push()
    return tmp_path / "store"


@pytest.fixture
def shared(store: Path) -> Path:
    """The spool that older versions shared between machines."""
    folder = store / ".lamindb/_spool" / config.load_instance(SLUG).id.hex
    folder.mkdir(parents=True, mode=0o700)
    return folder


@pytest.fixture
def opened() -> Iterator[Instance]:
    with Instance.open(SLUG) as found:
        yield found


def push() -> None:
    with Instance.open(SLUG) as opened:
        snapshot.push(opened)


def give_up_lease() -> None:
    with Instance.open(SLUG) as opened:
        opened.release_lease()


def owe(key: str, text: str, *, folder: Path | None = None) -> str:
    """A new file that a mount which was killed has left in this machine's spool, or in ``folder``; its spool name."""
    with Instance.open(SLUG) as opened:
        inode, src = timed(opened.registry).names.create_file(1, key, 0o100644, 0, 0)
        timed(opened.registry).journal.ready_put(inode.ino)
        opened.registry.db.execute("UPDATE journal SET owner='x:1:1' WHERE src=?", (src,))
        opened.registry.tree.update(inode.ino, size=len(text))
        path = write_spool(opened, src, text)
        if folder is not None:
            path.rename(folder / src)
        return src


def mount() -> None:
    """What a mount does before it is shown, and with what it finds to store."""
    with Instance.open(SLUG) as opened:
        with spools.make(opened.settings, opened.registry) as spool:
            take_over(opened, spool)
        recover.finish_all(opened)


def contents() -> dict[str, str]:
    """What the keys of this machine's registry hold. Its registry, storage and spool say the same."""
    with Instance.open(SLUG) as opened:
        assert fsck.check(opened, data=True).problems == []
        return {
            str(record.key): artifacts.cache(opened, record).read_text()
            for record in opened.registry.artifacts.filter()
        }


def own_spool() -> Path:
    root, parts = config.load_instance(SLUG).spool_place
    return Path(root, *parts)


def said_by_fsck(text: str) -> list[str]:
    with Instance.open(SLUG) as opened:
        report = fsck.check(opened)
        return [note for note in report.notes if text in note]


def live_mount(settings: config.InstanceSettings, *, read_only: bool = False) -> None:
    owner = process_id() or ""
    record = MountRecord(os.getpid(), owner, "/mnt", SLUG, "/none", 1, read_only, "", 0)
    config.make_directory(settings.mounts_dir)
    mounts.write(settings.mounts_dir, record)


# -- two machines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", [False, True])
def test_what_a_machine_has_to_store_outlives_another_one_that_takes_over(
    store: Path, tmp_path: Path, restore: bool, caplog: pytest.LogCaptureFixture
) -> None:
    names = {owe("new.txt", "of the first"), owe("more.txt", "of the first, too")}
    push()
    first = own_spool()
    # What nobody owes is of the first machine, too: it may have been restored there.
    stray = first / spool_name(0x999)
    stray.write_text("a stray")
    note_spool()
    give_up_lease()
    with machine(tmp_path / "two"):
        setup.login("bob")
        said: list[str] = []
        setup.connect(str(store), say=said.append)
        if restore:
            caplog.clear()
            said.clear()
            setup.connect(SLUG, restore=True, say=said.append)
        waiting = f", has 3 files ({sum(path.stat().st_size for path in first.iterdir())} bytes, the oldest of "
        heard = caplog.text + "".join(said)
        assert waiting in heard
        assert f"the spool of another machine (ada on {os.uname().nodename}), {first}, has 3 files (" in heard
        mount()
        save(tmp_path, "theirs.txt", "of the second")
        assert contents() == {"theirs.txt": "of the second"}
        (note,) = said_by_fsck(str(first))
        assert waiting in note
        with Instance.open(SLUG) as opened:
            fsck.check(opened, repair=True, purge=True)
        assert {path.name for path in first.iterdir()} == {*names, stray.name}
        setup.close(SLUG)
    setup.connect(SLUG, restore=True)
    mount()
    assert contents() == {
        "new.txt": "of the first",
        "more.txt": "of the first, too",
        "theirs.txt": "of the second",
        f"lost+found/(spool {stray.name})": "a stray",
    }
    assert not list(first.iterdir())
    assert said_by_fsck("spool") == []


def note_spool() -> None:
    """Make this machine's spool as a mount does, with a note of whose it is."""
    with Instance.open(SLUG) as opened:
        spools.make(opened.settings, opened.registry).close()


def save(tmp_path: Path, key: str, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with Instance.open(SLUG) as opened:
        artifacts.save(opened, tmp_path / "file", key=key)


def test_a_take_over_says_what_waits_elsewhere(store: Path, tmp_path: Path) -> None:
    """By whoever takes the lock, also when the registry in storage is the one that it has."""
    give_up_lease()
    with machine(tmp_path / "two"):
        setup.connect(str(store))
        give_up_lease()
    owe("new.txt", "of the first")
    first = own_spool()
    give_up_lease()
    with machine(tmp_path / "two"), Instance.open(SLUG) as opened:
        opened.hold()
        (notice,) = opened.notices
        assert "1 file (12 bytes, the oldest of" in notice
        assert f"another machine, {first}, has 1 file" in notice
        assert "not stored yet; that machine stores it when" in notice


def test_a_copied_home_folder_is_another_machine(store: Path, tmp_path: Path) -> None:
    """It owes what its original owes, and has the same token. Whatever it does, the original finds its files."""
    owed = owe("new.txt", "closed before the copy")
    for name, place in (("config", config.config_dir()), ("data", config.data_dir()), ("cache", config.cache_dir())):
        shutil.copytree(place, tmp_path / "copy" / name)
    later = owe("later.txt", "closed after the copy")
    first = own_spool()
    with machine(tmp_path / "copy"):
        assert own_spool() != first
        with Instance.open(SLUG) as opened:
            report = fsck.check(opened)
            assert [text for text in report.problems if not text.startswith("journal: the put of ")] == []
            assert (
                f"spool: {first / owed} is still to be stored by this machine, whose next mount takes it"
                in report.notes
            )
        mount()
        assert contents() == {"new.txt": "closed before the copy"}
        assert {path.name for path in first.iterdir()} == {owed, later}
        assert said_by_fsck(f"{first}, has 2 files")
    mount()
    assert contents() == {"new.txt": "closed before the copy", "later.txt": "closed after the copy"}


def test_a_machine_without_its_token_finds_what_it_owes() -> None:
    """As lamfs itself advises for a damaged one, it is deleted."""
    owed = owe("new.txt", "only here")
    first = own_spool()
    (config.data_dir() / "machine.json").unlink()
    assert own_spool() != first
    mount()
    assert contents() == {"new.txt": "only here"}
    assert [path.name for path in first.iterdir()] == [owed]


def test_what_cannot_be_brought_in_is_not_found_missing(
    store: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owed = owe("new.txt", "only here", folder=shared)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(SpoolFolder, "receive", full)
        with pytest.raises(
            StorageError, match=rf"1 file still to be stored .*in {shared}, cannot be brought .*No space left"
        ):
            mount()
        with pytest.raises(StorageError, match="No space left"):
            setup.connect(SLUG, restore=True)
        with Instance.open(SLUG) as opened:
            assert any("No space left" in text for text in fsck.check(opened, repair=True).problems)
    assert (shared / owed).read_text() == "only here"
    mount()
    assert contents() == {"new.txt": "only here"}


def test_a_file_that_is_cut_while_it_is_copied_is_not_taken_for_whole(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owe("new.txt", "closed before the copy")
    for name, place in (("config", config.config_dir()), ("data", config.data_dir()), ("cache", config.cache_dir())):
        shutil.copytree(place, tmp_path / "copy" / name)

    def cut(*_: object) -> None:
        raise EOFError("the file ended at byte 3")

    with machine(tmp_path / "copy"):
        with monkeypatch.context() as patch:
            patch.setattr(copying, "copy_fd", cut)
            with pytest.raises(StorageError, match=r"cannot be brought into its spool .*Input/output error"):
                mount()
        assert not list(own_spool().iterdir())
        mount()
        assert contents() == {"new.txt": "closed before the copy"}


# -- the spool that machines had in common ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mount", "finish", "fsck", "restore"])
def test_who_owes_a_file_takes_it_out_of_the_common_spool(shared: Path, tmp_path: Path, how: str) -> None:
    owe("new.txt", "only here", folder=shared)
    stranger = shared / spool_name(0x77)
    stranger.write_text("of another machine")
    assert len(said_by_fsck("whose next mount takes it") + said_by_fsck("that this machine does not owe")) == 2
    if how == "mount":
        mount()
    elif how == "restore":
        setup.connect(SLUG, restore=True)
        mount()
    else:
        with Instance.open(SLUG) as opened:
            if how == "fsck":
                fsck.check(opened, repair=True)
            recover.finish_all(opened)
    assert list(contents().values()) == ["only here"]  # the registry in storage does not know its name
    assert [path.name for path in shared.iterdir()] == [stranger.name]
    (note,) = said_by_fsck(str(shared))
    assert "1 file (18 bytes, the oldest of " in note
    assert "that this machine does not owe" in note
    stranger.unlink()
    assert said_by_fsck(str(shared)) == []


def test_an_empty_common_spool_goes(shared: Path) -> None:
    owe("new.txt", "only here", folder=shared)
    mount()
    assert not shared.exists()


def test_what_was_stored_leaves_the_common_spool_too(shared: Path, opened: Instance) -> None:
    src = spool_name(5)
    (shared / src).write_text("stored long ago")
    opened.registry.journal.spend(src)
    mount()
    assert not shared.exists()
    assert not list(own_spool().iterdir())
    assert opened.registry.rescue.found()[1] == 0


def test_an_older_mount_is_not_robbed(shared: Path, opened: Instance) -> None:
    """It looks for its files where it has put them."""
    owed = owe("new.txt", "only here", folder=shared)
    live_mount(opened.settings)
    with pytest.raises(Locked, match=rf"mounted by an older lamfs, whose files wait in {shared}; unmount that first"):
        spools.make(opened.settings, opened.registry)
    assert spools.take_in(opened.settings, opened.registry) == 0
    assert (shared / owed).exists()
    mounts.remove(opened.settings.mounts_dir, os.getpid())
    live_mount(opened.settings, read_only=True)
    spools.make(opened.settings, opened.registry).close()
    assert (own_spool() / owed).exists()


def test_links_and_folders_there_are_not_followed(shared: Path, tmp_path: Path, opened: Instance) -> None:
    owed = owe("new.txt", "only here")
    (tmp_path / "documents").mkdir()
    (own_spool() / owed).rename(tmp_path / "documents" / owed)
    shared.rmdir()
    shared.symlink_to(tmp_path / "documents")
    other = shared.with_name(f"{shared.name}.{'a' * 12}")
    other.symlink_to(tmp_path / "documents")
    aside = shared.with_name(f"{shared.name}.{'a' * 12}.20200101T000000.abcd")
    aside.mkdir()
    (aside / owed).write_text("put aside")
    (aside / "linked").symlink_to(tmp_path / "documents" / owed)
    assert spools.take_in(opened.settings, opened.registry) == 0
    told = spools.others(opened.settings)
    assert [(waiting.folder, waiting.kind, waiting.files, bool(waiting.problem)) for waiting in told] == [
        (str(shared), "shared", 0, True),
        (str(other), "machine", 0, True),
        (str(aside), "aside", 1, False),
    ]
    assert "was put aside" in told[2].sentence
    assert "is left: " in told[0].sentence
    assert (tmp_path / "documents" / owed).read_text() == "only here"


@pytest.mark.parametrize(
    "note",
    [b"", b"[]", b'{"handle": 5, "host": "x"}', b'{"handle": "a\\u001b[31m", "host": "x"}', b'{"handle": "a"}',
     b'{"handle": "%s", "host": "x"}' % (b"a" * 300), b"x" * 9000],
)  # fmt: skip
def test_a_note_of_somebody_else_is_not_believed(store: Path, opened: Instance, note: bytes) -> None:
    other = store / ".lamindb/_spool" / f"{opened.settings.id.hex}.{'a' * 12}"
    other.mkdir(parents=True)
    (other / spool_name(4)).write_text("x")
    other.with_name(f"{other.name}.json").write_bytes(note)
    (waiting,) = spools.others(opened.settings)
    assert waiting.whose == ""
    assert "another machine, " in waiting.sentence


def test_other_instances_are_none_of_ours(store: Path, opened: Instance) -> None:
    for name in ("0" * 32, f"{'0' * 32}.{'a' * 12}", f"{opened.settings.id.hex}.odd", f"{opened.settings.id.hex}x"):
        folder = store / ".lamindb/_spool" / name
        folder.mkdir(parents=True)
        (folder / spool_name(4)).write_text("x")
    assert spools.others(opened.settings) == []


def test_a_deleted_instance_leaves_the_spools_of_others(store: Path, opened: Instance) -> None:
    other = store / ".lamindb/_spool" / f"{opened.settings.id.hex}.{'a' * 12}"
    note_spool()
    other.mkdir(parents=True)
    (other / spool_name(4)).write_text("x")
    opened.close()
    said: list[str] = []
    setup.delete(SLUG, force=True, say=said.append)
    assert any(
        text.startswith(f"left where it is: the spool of another machine, {other}, has 1 file ") for text in said
    )
    assert [path.name for path in other.parent.iterdir()] == [other.name]


def test_a_read_only_mount_needs_no_spool_in_a_folder_that_it_cannot_write(
    opened: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = SpoolFolder.make

    def refuse(root: str | os.PathLike[str], parts: tuple[str, ...]) -> SpoolFolder:
        if parts != ("spool",):
            raise StorageError("The spool folder cannot be used.", errno=30)
        return make(root, parts)

    monkeypatch.setattr(SpoolFolder, "make", refuse)
    with pytest.raises(StorageError, match="cannot be used"):
        spools.make(opened.settings, opened.registry)
    with spools.make(opened.settings, opened.registry, read_only=True) as spool:
        assert spool.folder == str(opened.settings.directory / "spool")
