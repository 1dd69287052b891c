"""A storage folder that others have filled: no link in it is followed, and nothing outside of it is touched."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs.errors import LamfsError, ObjectMissing, StorageError
from lamfs.storage import StorageConfig
from lamfs.storage import folder as folder_module
from lamfs.storage.folder import TEMP_FOLDER
from lamfs.storage.local import LocalStore

SECRET = b"nobody else may see this"
NEW = b"new bytes"
MakeFile = Callable[[bytes], Path]
Act = Callable[[LocalStore, str, Path], Any]


def picture(folder: Path) -> list[tuple[object, ...]]:
    """Everything below a folder: names, inodes, times, modes, contents."""
    found: list[tuple[object, ...]] = []
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found.append((str(path), status.st_ino, status.st_mtime_ns, status.st_mode, status.st_nlink, data))
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the storage with a secret, an empty folder and old files. It is as it was after the test."""
    path = tmp_path / "outside"
    (path / "empty/_tmp").mkdir(parents=True)
    (path / "_tmp").mkdir()
    long_ago = time.time() - 25 * 3600
    for name in ("secret", "lock", "_tmp/old", "spooled"):
        (path / name).write_bytes(SECRET)
        os.utime(path / name, (long_ago, long_ago))
    before = picture(path)
    yield path
    assert picture(path) == before


def get_into(store: LocalStore, key: str, source: Path) -> None:
    with open(source, "r+b") as stream:
        store.get_into(key, stream.fileno(), offset=0, length=1)


def opened(store: LocalStore, key: str, source: Path) -> None:
    os.close(store.open_local(key))


def copy_to(store: LocalStore, key: str, source: Path) -> None:
    Path(store.root, "from").write_bytes(NEW)
    store.copy("from", key)


READS: dict[str, Act] = {
    "head": lambda store, key, _: store.head(key),
    "get": lambda store, key, _: store.get(key),
    "get a range": lambda store, key, _: store.get(key, offset=1, length=2),
    "get_into": get_into,
    "get_view": lambda store, key, _: store.get_view(key, memoryview(bytearray(1)), offset=0),
    "get_views": lambda store, key, _: store.get_views(
        key, iter([memoryview(bytearray(1))]), offset=0, length=1, etag="x"
    ),
    "open_local": opened,
    "copy from": lambda store, key, _: store.copy(key, "copied"),
    "replace guarded": lambda store, key, _: store.put_bytes(key, NEW, if_match="x"),
}
PUTS: dict[str, Act] = {
    "put_file": lambda store, key, source: store.put_file(key, str(source)),
    "consume": lambda store, key, source: store.put_file(key, str(source), consume=True),
    "put_bytes": lambda store, key, _: store.put_bytes(key, NEW),
    "copy to": copy_to,
}
CREATE: dict[str, Act] = {"create": lambda store, key, _: store.put_bytes(key, NEW, if_none_match=True)}

TARGETS = ["secret", "_tmp", "nowhere"]


def refuses(act: Act, local: LocalStore, key: str, source: Path, link: str) -> None:
    with pytest.raises(StorageError, match=f"'{link}' in the storage {local.root} is a link.*put the file") as caught:
        act(local, key, source)
    assert caught.value.errno == errno.ELOOP
    assert key in str(caught.value)
    assert SECRET.decode() not in str(caught.value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*READS, *CREATE])
def test_an_object_that_is_a_link_is_not_read(
    local: LocalStore, folder: Path, outside: Path, make_file: MakeFile, name: str, target: str
) -> None:
    (folder / "k").symlink_to(outside / target)
    refuses((READS | CREATE)[name], local, "k", make_file(NEW), "k")
    assert (folder / "k").is_symlink()
    assert not (folder / "copied").exists()


@pytest.mark.parametrize("name", [*READS, *PUTS, *CREATE])
def test_nothing_is_reached_through_a_linked_folder(
    local: LocalStore, folder: Path, outside: Path, make_file: MakeFile, name: str
) -> None:
    source = make_file(NEW)
    (folder / "a").mkdir()
    (folder / "a/b").symlink_to(outside)
    act = (READS | PUTS | CREATE)[name]
    for key in ("a/b/secret", "a/b/empty/new", "a/b/new/new"):
        refuses(act, local, key, source, "a/b")
    assert source.read_bytes()[1:] == NEW[1:]


@pytest.mark.parametrize("name", [*READS, *PUTS, *CREATE])
@pytest.mark.parametrize("target", ["", "empty", "nowhere"])
def test_lamfs_own_folder_is_no_link(
    local: LocalStore, folder: Path, outside: Path, make_file: MakeFile, name: str, target: str
) -> None:
    (folder / ".lamindb").symlink_to(outside / target)
    refuses((READS | PUTS | CREATE)[name], local, ".lamindb/secret", make_file(NEW), ".lamindb")


@pytest.mark.parametrize("link", [".lamindb", TEMP_FOLDER])
@pytest.mark.parametrize("target", ["", "_tmp", "empty", "nowhere"])
def test_the_folder_of_temporary_files_is_no_link(
    local: LocalStore, folder: Path, outside: Path, make_file: MakeFile, link: str, target: str
) -> None:
    (folder / "k").write_bytes(b"old")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(outside / target)
    for name in ("put_file", "put_bytes"):
        refuses(PUTS[name], local, "k", make_file(NEW), link)
    with pytest.raises(StorageError, match=f"'{link}' in the storage {folder} is a link"):
        local.put_bytes("k", NEW, if_match=local.head("k").etag)
    with pytest.raises(StorageError, match=f"'{link}' in the storage {folder} is a link"):
        local.check()
    local.check(write=False)
    assert local.get("k") == b"old"
    local.put_file("k", str(make_file(NEW)), consume=True)
    assert local.get("k") == NEW
    local.delete(["k"])
    assert (folder / link).is_symlink()


def test_the_lock_of_writers_is_no_link(local: LocalStore, folder: Path, outside: Path) -> None:
    etag = local.put_bytes("k", b"old").etag
    (folder / TEMP_FOLDER / "lock").symlink_to(outside / "lock")
    with pytest.raises(StorageError, match=f"'{TEMP_FOLDER}/lock' in the storage {folder} is a link and 'k' is refus"):
        local.put_bytes("k", NEW, if_match=etag)
    assert local.get("k") == b"old"


def test_a_spool_file_that_is_a_link_is_not_stored(local: LocalStore, outside: Path, tmp_path: Path) -> None:
    """Spool files are named by way of their open folder; a user's own file may be a link."""
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool/spooled").symlink_to(outside / "secret")
    folder = os.open(tmp_path / "spool", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for consume in (True, False):
            with pytest.raises(StorageError, match="cannot be read"):
                local.put_file("k", f"/proc/{os.getpid()}/fd/{folder}/spooled", consume=consume)
    finally:
        os.close(folder)
    with pytest.raises(ObjectMissing):
        local.head("k")
    local.put_file("k", str(tmp_path / "spool/spooled"))
    assert local.get("k") == SECRET


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PUTS)
def test_a_put_replaces_a_link_and_never_writes_through_it(
    local: LocalStore, folder: Path, outside: Path, make_file: MakeFile, name: str, target: str
) -> None:
    (folder / "a").mkdir()
    (folder / "a/k").symlink_to(outside / target)
    PUTS[name](local, "a/k", make_file(NEW))
    assert not (folder / "a/k").is_symlink()
    assert local.get("a/k") == NEW


@pytest.mark.parametrize("target", TARGETS)
def test_delete_removes_the_link_itself(local: LocalStore, folder: Path, outside: Path, target: str) -> None:
    (folder / "a").mkdir()
    (folder / "a/k").symlink_to(outside / target)
    local.delete(["a/k"])
    assert list(folder.iterdir()) == []


def test_links_are_not_listed(local: LocalStore, folder: Path, outside: Path) -> None:
    local.put_bytes("a/k", NEW)
    (folder / "a/file").symlink_to(outside / "secret")
    (folder / "a/folder").symlink_to(outside)
    (folder / "a/nothing").symlink_to(outside / "nowhere")
    (folder / "b").symlink_to(folder / "a")
    for prefix in ("", "a", "a/"):
        assert [each.key for each in local.list(prefix)] == ["a/k"]
    for prefix in ("b", "b/", "b/k", "a/folder/", "a/folder/_tmp/", "a/file/", "a/nothing/"):
        assert list(local.list(prefix)) == []


def test_links_on_the_way_to_the_root_are_the_users_own(folder: Path, tmp_path: Path, make_file: MakeFile) -> None:
    (tmp_path / "above").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to("above/storage")
    store = LocalStore(StorageConfig(str(tmp_path / "alias")))
    assert store.check().create_exclusive
    store.put_file("a/k", str(make_file(NEW)), consume=True)
    assert (folder / "a/k").read_bytes() == store.get("a/k") == NEW
    assert [each.key for each in store.list()] == ["a/k"]


# what is swapped while lamfs is at work


def test_an_object_that_becomes_a_link_between_two_calls(
    local: LocalStore, folder: Path, outside: Path, make_file: MakeFile
) -> None:
    etag = local.put_bytes("a/k", NEW).etag
    assert local.head("a/k").etag == etag
    (folder / "a/k").unlink()
    (folder / "a/k").symlink_to(outside / "secret")
    for name in READS:
        refuses(READS[name], local, "a/k", make_file(NEW), "a/k")
    (folder / "a/k").unlink()
    (folder / "a").rmdir()
    (folder / "a").symlink_to(outside)
    for act in (READS | PUTS | CREATE).values():
        refuses(act, local, "a/k", make_file(NEW), "a")


def test_a_folder_that_becomes_a_link_just_before_the_rename(
    local: LocalStore, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a").mkdir()
    local.put_bytes("b", NEW)  # the first temporary file of a machine gives that its name
    rename = os.rename

    def swapped_first(old: str, new: str, **folders: Any) -> None:
        monkeypatch.undo()
        rename(folder / "a", folder / "away")
        (folder / "a").symlink_to(outside)
        rename(old, new, **folders)

    monkeypatch.setattr(folder_module.os, "rename", swapped_first)
    local.put_bytes("a/secret", NEW)
    assert (folder / "away/secret").read_bytes() == NEW
    assert (folder / "a").is_symlink()


def test_a_link_where_a_folder_was_about_to_be_made(
    local: LocalStore, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def too_late(name: str, *args: Any, **folders: Any) -> None:
        if name == "a":
            (folder / "a").symlink_to(outside)
        mkdir(name, *args, **folders)

    monkeypatch.setattr(folder_module.os, "mkdir", too_late)
    with pytest.raises(StorageError, match=r"'a' in the storage .* is a link") as caught:
        local.put_bytes("a/b/c", NEW)
    assert caught.value.errno == errno.ELOOP


def test_a_folder_that_becomes_a_link_while_it_is_pruned(
    local: LocalStore, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.put_bytes("a/empty/k", NEW)
    unlink = os.unlink

    def swapped_then(name: str, **folders: Any) -> None:
        unlink(name, **folders)
        if name == "k":
            monkeypatch.undo()
            (folder / "a/empty").rmdir()
            (folder / "a").rmdir()
            (folder / "a").symlink_to(outside)

    monkeypatch.setattr(os, "unlink", swapped_then)
    local.delete(["a/empty/k"])
    assert (folder / "a").is_symlink()


# what is no file either


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file_neither_hangs_nor_is_read(
    local: LocalStore, folder: Path, make_file: MakeFile, kind: str
) -> None:
    path = folder / "k"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(5, 0))  # /dev/tty
        except PermissionError:
            pytest.skip("device nodes cannot be made here")
    failed: list[BaseException] = []

    def work() -> None:
        for name, act in READS.items():
            if name == "replace guarded":
                continue
            try:
                act(local, "k", make_file(NEW))
            except ObjectMissing:
                continue
            except LamfsError as error:
                # Opening a terminal that nobody has, or a device where those are forbidden, is refused.
                if kind == "device":
                    continue
                failed.append(error)
            failed.append(AssertionError(name))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert failed == []
    assert list(local.list()) == []
    if kind == "folder":
        with pytest.raises(StorageError, match="rename one"):
            local.put_bytes("k", NEW)
    else:
        local.put_bytes("k", NEW)
        assert local.get("k") == NEW


def test_a_fifo_is_not_stored(local: LocalStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for consume in (True, False):
        with pytest.raises(StorageError, match="no regular file"):
            local.put_file("k", str(tmp_path / "fifo"), consume=consume)


def test_what_lies_behind_a_linked_folder_is_not_deleted(local: LocalStore, folder: Path, outside: Path) -> None:
    """It is not in the storage: so it is gone for this one, and the others of the batch are deleted."""
    (folder / "a").mkdir()
    (folder / "a/b").symlink_to(outside)
    (folder / "k").write_bytes(NEW)
    local.delete(["a/b/secret", "a/b/empty/new", "a/b/new/new", "k"])
    assert (outside / "secret").read_bytes() == SECRET
    assert not (folder / "k").exists()
    assert (folder / "a/b").is_symlink()
