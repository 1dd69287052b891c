"""LocalStore beyond the contract: what is on the disk, in which order, with which rights; what the system refuses."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lamfs import config, copying
from lamfs.errors import (
    InvalidName,
    LamfsError,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageReadOnly,
    StorageUnavailable,
)
from lamfs.processes import state_of
from lamfs.storage import StorageConfig
from lamfs.storage import folder as folder_module
from lamfs.storage.local import LocalStore, etag_of
from lamfs.storage.signs import told

MakeFile = Callable[[bytes], Path]
TEMP = ".lamindb/_tmp"


def names(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy in steps of 64 KiB."""
    monkeypatch.setattr(copying, "COPY_CHUNK", 1 << 16)


def test_rights(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    source = make_file(b"x")
    source.chmod(0o664)
    old = os.umask(0)
    try:
        local.put_file("a/b/copied", str(source))
        local.put_file("a/b/taken", str(source), consume=True)
        local.put_bytes("c/bytes", b"x")
    finally:
        os.umask(old)
    for name in names(folder):
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        assert mode == (0o700 if (folder / name).is_dir() else 0o600), name


def test_consuming_is_a_rename(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    source = make_file(b"spooled")
    inode = source.stat().st_ino
    stored = local.put_file("k/file", str(source), consume=True)
    assert (folder / "k/file").stat().st_ino == inode
    assert stored.etag == etag_of((folder / "k/file").stat())
    assert local.url("k/file") == f"{folder}/k/file"


def test_a_file_is_taken_to_where_nothing_is(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    source = make_file(b"spooled")
    inode = source.stat().st_ino
    local.put_file("k/file", str(source), consume=True, if_none_match=True)
    status = (folder / "k/file").stat()
    assert (status.st_ino, status.st_nlink) == (inode, 1)
    assert not source.exists()
    other = make_file(b"another one")
    with pytest.raises(PreconditionFailed):
        local.put_file("k/file", str(other), consume=True, if_none_match=True)
    assert local.get("k/file") == b"spooled"
    assert other.read_bytes() == b"another one"


def test_a_file_with_two_names_is_not_taken(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    """Who writes through the other name must not change the object."""
    source = make_file(b"shared")
    other = source.with_suffix(".other")
    os.link(source, other)
    local.put_file("k", str(source), consume=True)
    other.write_bytes(b"SHARED")
    assert local.get("k") == b"shared"


def test_a_symlink_is_not_taken(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    source = make_file(b"pointed at")
    link = source.with_suffix(".link")
    link.symlink_to(source)
    local.put_file("k", str(link), consume=True)
    assert not (folder / "k").is_symlink()
    assert local.get("k") == b"pointed at"
    assert source.exists()


def test_taking_from_another_file_system(
    local: LocalStore, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    shm = Path("/dev/shm")
    if shm.is_dir() and shm.stat().st_dev != Path(local.root).stat().st_dev:
        with tempfile.NamedTemporaryFile(dir=shm, delete=False) as stream:
            stream.write(b"far away")
        source = Path(stream.name)
    else:
        source = make_file(b"far away")
        rename = os.rename

        def refuse(old: str, new: str, **folders: Any) -> None:
            if old == str(source):
                raise OSError(errno.EXDEV, "another file system")
            rename(old, new, **folders)

        monkeypatch.setattr(folder_module.os, "rename", refuse)
    try:
        stored = local.put_file("k", str(source), consume=True)
        assert local.get("k", etag=stored.etag) == b"far away"
        assert not source.exists()
    finally:
        source.unlink(missing_ok=True)


def test_the_same_times_make_no_same_etag(local: LocalStore, make_file: MakeFile) -> None:
    """``cp -p`` gives two revisions one mtime; sizes may be equal, and an inode is used again."""
    etags = []
    for data in (b"one", b"two", b"six"):
        source = make_file(data)
        os.utime(source, ns=(10**18, 10**18))
        etags.append(local.put_file("k", str(source), consume=True).etag)
        local.delete(["k"])
    assert len(set(etags)) == 3


def test_durable_before_it_has_its_name(
    local: LocalStore, folder: Path, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        steps.append(f"fsync {path if os.path.isdir(path) else 'data'}")
        fsync(fd)

    def noting_rename(old: str, new: str, **folders: Any) -> None:
        rename(old, new, **folders)
        steps.append("rename")

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    local.put_bytes("d/e/f", b"x")
    for act in (
        lambda: local.put_file("d/e/f", str(make_file(b"x")), consume=True),
        lambda: local.put_file("d/e/f", str(make_file(b"x"))),
        lambda: local.put_bytes("d/e/f", b"x"),
        lambda: local.copy("d/e/f", "d/e/g"),
    ):
        steps.clear()
        act()
        assert steps == ["fsync data", "rename", f"fsync {folder}/d/e"]
    local.delete(["d/e/f", "d/e/g"])
    steps.clear()
    local.put_bytes("d/e/f", b"x")
    assert steps == ["fsync data", "rename", f"fsync {folder}/d/e", f"fsync {folder}/d", f"fsync {folder}"]


def test_holes_stay_holes(local: LocalStore, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    size = 64 << 20
    with source.open("wb") as stream:
        stream.seek(1 << 20)
        stream.write(b"data")
        stream.seek(40 << 20)
        stream.write(b"more")
        stream.truncate(size)
    moved: list[int] = []
    local.put_file("k", str(source), progress=moved.append)
    assert sum(moved) == size
    assert (folder / "k").stat().st_size == size
    assert (folder / "k").stat().st_blocks * 512 < 1 << 20
    assert local.get("k", offset=1 << 20, length=4) == b"data"
    assert local.get("k", offset=40 << 20, length=6) == b"more\0\0"


@pytest.mark.usefixtures("small_copies")
@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EINVAL])
def test_copies_without_help_of_the_kernel(
    local: LocalStore, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    data = os.urandom(300_001)
    if refusal is not None:

        def refuse(*_: object) -> int:
            raise OSError(refusal, os.strerror(refusal))

        monkeypatch.setattr(copying.os, "copy_file_range", refuse)
    moved: list[int] = []
    local.put_file("k", str(make_file(data)), progress=moved.append)
    assert local.get("k") == data
    assert sum(moved) == len(data)


@pytest.mark.usefixtures("small_copies")
def test_a_copy_gives_signs_of_life_where_nobody_counts(local: LocalStore, make_file: MakeFile) -> None:
    signs: list[None] = []
    with told(lambda: signs.append(None)):
        local.put_file("k", str(make_file(os.urandom(300_001))))
    assert len(signs) >= 5


@pytest.mark.usefixtures("small_copies")
def test_a_source_that_becomes_shorter(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    source = make_file(os.urandom(1 << 20))
    local.put_bytes("k", b"old")
    with pytest.raises(StorageError, match="became shorter"):
        local.put_file("k", str(source), progress=lambda _: os.truncate(source, 200_000))
    assert local.get("k") == b"old"
    assert names(folder / TEMP) == set()


@pytest.mark.usefixtures("small_copies")
def test_a_put_that_is_broken_off(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    local.put_bytes("k", b"old")
    with pytest.raises(KeyboardInterrupt):
        local.put_file("k", str(make_file(os.urandom(1 << 20))), progress=interrupt)
    assert local.get("k") == b"old"
    assert names(folder / TEMP) == set()


def test_deleting_prunes_folders(local: LocalStore, folder: Path) -> None:
    (folder / "mine").mkdir()
    for key in ("a/b/c/1", "a/b/2", ".lamindb/uid.csv"):
        local.put_bytes(key, b"x")
    local.delete(["a/b/c/1"])
    assert {"a", "a/b", "a/b/2"} <= names(folder)
    assert "a/b/c" not in names(folder)
    local.delete(["a/b/2", ".lamindb/uid.csv"])
    assert names(folder) == {"mine"}
    local.delete(["x"])
    assert folder.is_dir()


def test_a_key_that_no_file_can_have_is_deleted_at_once(local: LocalStore) -> None:
    """Else what a registry says of it is owed for ever."""
    local.put_bytes("a", b"x")
    local.delete(["n" * 256, f"d/{'n' * 300}/x", "a", "a/b", ".lamindb"])
    assert list(local.list("")) == []


def test_creators_and_deleters_race(local: LocalStore) -> None:
    """Each delete of the last object removes the folders that the next put needs."""
    end = time.monotonic() + 1.0

    def work(number: int) -> int:
        count = 0
        while time.monotonic() < end:
            key = f"a/b/c/{number}"
            local.put_bytes(key, b"x")
            assert local.get(key) == b"x"
            local.delete([key])
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) > 12
    assert list(local.list()) == []


def test_guarded_replacements_lose_no_update(local: LocalStore) -> None:
    """Threads count together in one object, each time over the revision that they read."""
    threads, turns = 6, 25
    local.put_bytes("count", b"0 nobody")

    def work(owner: int) -> None:
        done = 0
        while done < turns:
            found = local.head("count")
            try:
                value = int(local.get("count", etag=found.etag).split()[0])
                local.put_bytes("count", b"%d %d" % (value + 1, owner), if_match=found.etag)
            except (ObjectChanged, PreconditionFailed):
                continue
            done += 1

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    assert int(local.get("count").split()[0]) == threads * turns


def test_lists_what_are_objects(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    local.put_bytes("a/b", b"x")
    for name in (f"{TEMP}/half", ".lamindb/_spool/owed", "a/linked"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / TEMP / "half").write_bytes(b"x")
    (folder / ".lamindb/_spool/owed").write_bytes(b"x")
    (folder / "a/linked").symlink_to(make_file(b"linked"))
    (folder / "a/dangling").symlink_to(folder / "nowhere")
    (folder / "a/loop").symlink_to(folder / "a")
    os.mkfifo(folder / "a/fifo")
    Path(os.fsdecode(os.fsencode(folder) + b"/not-\xff-utf8")).write_bytes(b"x")
    assert {entry.key for entry in local.list()} == {"a/b"}
    for name in ("a/fifo", "a/fifo/b", "a"):
        with pytest.raises(ObjectMissing):
            local.get(name)
        with pytest.raises(ObjectMissing):
            local.head(name)


@pytest.mark.parametrize("key", ["a//b", "a/", "./a", "a/./b", "."])
def test_keys_that_would_share_a_file(local: LocalStore, key: str) -> None:
    with pytest.raises(InvalidName):
        local.put_bytes(key, b"x")


def test_a_file_where_a_folder_must_be(local: LocalStore) -> None:
    local.put_bytes("a", b"x")
    with pytest.raises(StorageError, match="rename one") as caught:
        local.put_bytes("a/b", b"x")
    assert caught.value.errno == errno.ENOTDIR
    for act in (lambda: local.get("a/b"), lambda: local.head("a/b")):
        with pytest.raises(ObjectMissing):
            act()
    local.delete(["a/b"])
    local.put_bytes("c/d", b"x")
    with pytest.raises(StorageError, match="rename one") as caught:
        local.put_bytes("c", b"x")
    assert caught.value.errno == errno.EISDIR
    with pytest.raises(StorageError) as caught:
        local.put_bytes("n" * 256, b"x")
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_write_in_place_is_noticed(local: LocalStore, folder: Path) -> None:
    etag = local.put_bytes("k", b"stored").etag
    (folder / "k").write_bytes(b"edited")
    with pytest.raises(ObjectChanged):
        local.get("k", etag=etag)


def test_a_write_in_place_while_it_is_read(local: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etag = local.put_bytes("k", b"stored").etag
    pread = os.pread

    def edited_first(fd: int, length: int, offset: int) -> bytes:
        (folder / "k").write_bytes(b"edited")
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", edited_first)
    with pytest.raises(ObjectChanged):
        local.get("k", etag=etag)


def test_without_hard_links(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(folder_module.os, "link", refuse)
    found = local.check()
    assert not found.create_exclusive
    assert "two machines could write at once" in found.warnings[0]
    racers = 6
    barrier = threading.Barrier(racers)

    def create(number: int) -> bool:
        barrier.wait(30)
        try:
            local.put_bytes("lock", f"{number}".encode(), if_none_match=True)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(racers) as pool:
        assert list(pool.map(create, range(racers))).count(True) == 1


def test_temporaries_say_whose_they_are(local: LocalStore, folder: Path, make_file: MakeFile) -> None:
    assert list(local.temporaries()) == []
    seen = []

    def look(_: int) -> None:
        seen.extend((item.key, state_of(item.key, config.machine_mark())) for item in local.temporaries())

    local.put_file("k", str(make_file(b"bytes")), progress=look)
    assert [(key.rpartition("/")[0], state) for key, state in seen] == [(TEMP, "alive")]
    assert list(local.temporaries()) == []
    (folder / TEMP).mkdir(parents=True, exist_ok=True)
    for name in ("old", "lock"):
        (folder / TEMP / name).write_bytes(b"xy")
    found = list(local.temporaries())
    assert [(item.key, item.size) for item in found] == [(f"{TEMP}/old", 2)]
    assert state_of("old", config.machine_mark()) == "elsewhere"
    local.delete([found[0].key])
    assert list(local.temporaries()) == []


# what the system refuses


def test_a_missing_folder(tmp_path: Path, make_file: MakeFile) -> None:
    missing = tmp_path / "missing"
    store = LocalStore(StorageConfig(str(missing)))
    for act in (
        store.check,
        lambda: store.check(write=False),
        lambda: list(store.list()),
        lambda: store.get("k"),
        lambda: store.head("k"),
        lambda: store.put_bytes("k", b"x"),
        lambda: store.put_file("a/k", str(make_file(b"x"))),
        lambda: store.put_file("a/k", str(make_file(b"x")), consume=True),
        lambda: store.copy("a", "b"),
        lambda: store.delete(["k"]),
    ):
        with pytest.raises(StorageMissing, match=f"{missing} does not exist"):
            act()
    assert not missing.exists()
    missing.write_bytes(b"a file")
    with pytest.raises(StorageMissing):
        store.check()


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder in which this process, as nobody where it was root, may read and not write."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    (folder / "k").write_bytes(b"content")
    (folder / "k").chmod(0o644)
    folder.chmod(0o555)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if was == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written(unprivileged: Path) -> None:
    store = LocalStore(StorageConfig(str(unprivileged)))
    with pytest.raises(StorageReadOnly, match=rf"{unprivileged} can be read but not written.*--read-only"):
        store.check()
    assert store.check(write=False).read_guarded
    assert store.get("k") == b"content"
    with pytest.raises(StorageForbidden):
        store.put_bytes("k", b"new")
    with pytest.raises(StorageForbidden):
        store.delete(["k"])


def test_a_folder_that_may_not_be_read(unprivileged: Path) -> None:
    store = LocalStore(StorageConfig("/proc/1/fd" if os.geteuid() == 65534 else str(unprivileged)))
    if store.root == str(unprivileged):
        unprivileged.chmod(0)
    with pytest.raises(StorageForbidden, match="may not be read"):
        store.check()


@pytest.mark.parametrize("write", [True, False])
def test_a_folder_that_others_can_write(local: LocalStore, folder: Path, write: bool) -> None:
    folder.chmod(0o777)
    with pytest.raises(StorageForbidden, match=rf"{folder} can be written by everybody.*chmod o-w {folder}"):
        local.check(write=write)
    assert names(folder) == set()
    folder.chmod(0o755)
    assert local.check(write=write).warnings == ()
    if os.geteuid() == 0:
        os.chown(folder, 65534, -1)
        assert [str(folder) in warning for warning in local.check(write=write).warnings] == [True]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EROFS, StorageReadOnly),
        (errno.EACCES, StorageForbidden),
        (errno.EPERM, StorageForbidden),
        (errno.ESTALE, StorageUnavailable),
        (errno.ENOTCONN, StorageUnavailable),
        (errno.EIO, StorageError),
    ],
)
def test_what_the_system_refuses(
    local: LocalStore,
    folder: Path,
    make_file: MakeFile,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[LamfsError],
) -> None:
    source = make_file(b"new")
    local.put_bytes("k", b"old")

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    for act in (
        lambda: local.put_bytes("k", b"new"),
        lambda: local.put_file("k", str(source)),
        lambda: local.put_file("k", str(source), consume=True),
        lambda: local.copy("k", "l"),
    ):
        with pytest.raises(kind) as caught:
            act()
        assert type(caught.value) is kind
        assert str(caught.value).endswith((".", ")"))
        assert str(folder) in str(caught.value)
    monkeypatch.undo()
    assert local.get("k") == b"old"
    assert source.read_bytes() == b"new"
    assert names(folder / TEMP) == set()
    assert [entry.key for entry in local.list()] == ["k"]


def test_a_lock_of_writers_that_somebody_keeps_is_an_error(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may open the file can lock it."""
    monkeypatch.setattr("lamfs.storage.folder.LOCK_SECONDS", 0.2)
    old = local.put_bytes("a", b"old")
    with local._folder.locked(), pytest.raises(StorageUnavailable, match="lock has been locked by another process"):
        local.put_bytes("a", b"new", if_match=old.etag)
    assert local.get("a") == b"old"
    local.put_bytes("a", b"new", if_match=old.etag)


def test_deleting_what_no_file_can_be_called(local: LocalStore) -> None:
    local.put_bytes("a", b"a")
    local.delete(["x" * 300, f"a/{'y' * 300}/z", "a"])
    assert list(local.list()) == []
