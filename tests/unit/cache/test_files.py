"""Complete cache files for the API and the CLI, and how they get on with a mount on the same cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import trio

from lamfs.cache import sparse
from lamfs.cache.blocks import BlockCache
from lamfs.cache.files import cache_file, cache_path, evict
from lamfs.cache.index import CacheIndex
from lamfs.errors import DamagedData, InvalidName, ObjectChanged, ObjectMissing, StorageError
from lamfs.model import BLOCK_SIZE, Revision
from lamfs.storage.base import ObjectStore, StorageConfig
from lamfs.storage.local import LocalStore
from tests.support.mounts import wait_until
from tests.support.transfer import FakeMover, FakeStore, content_of, make_bytes, open_fds


class Rig:
    """One kind of storage, a cache directory, an index."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.dir = folder / "cache"
        self.index = CacheIndex(self.dir)
        self.fake = FakeStore()
        self.local = kind == "local"
        if self.local:
            (folder / "root").mkdir()
            self.store: ObjectStore = LocalStore(StorageConfig(str(folder / "root")))
        else:
            self.store = self.fake  # type: ignore[assignment]

    def put(self, key: str, data: bytes) -> Revision:
        if self.local:
            return Revision(content_of(data), key, self.store.put_bytes(key, data).etag)
        return self.fake.put(key, data)

    def rot(self, revision: Revision, data: bytes) -> None:
        """Change the stored bytes without changing the ETag."""
        if self.local:
            path = self.store.url(revision.object_key)
            before = os.stat(path)
            with open(path, "r+b") as stream:
                stream.write(data)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        else:
            self.fake.objects[revision.object_key] = (revision.etag, data)

    def file(self, revision: Revision, **options: object) -> Path:
        before = open_fds()
        try:
            return cache_file(self.store, self.index, self.dir, revision, **options)  # type: ignore[arg-type]
        finally:
            # Threads that end, of pytest's too, close theirs a moment later.
            wait_until(lambda: open_fds() <= before + 3, "only the index stays open")


@pytest.fixture(params=["s3", "local"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return Rig(request.param, tmp_path)


@pytest.fixture
def s3(tmp_path: Path) -> Rig:
    return Rig("s3", tmp_path)


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE, BLOCK_SIZE + 1, 9 * BLOCK_SIZE + 3])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_whole_file_of_every_size(rig: Rig, size: int, workers: int) -> None:
    data = make_bytes(size)
    revision = rig.put("d/k.bin", data)
    moved: list[int] = []
    path = rig.file(revision, progress=moved.append, workers=workers)
    assert path == rig.dir / rig.store.cache_name / "d/k.bin" == cache_path(rig.dir, rig.store, "d/k.bin")
    assert path.read_bytes() == data
    assert sum(moved) == size
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert rig.index.total_bytes() == size
    assert os.listdir(path.parent) == ["k.bin"]


def test_the_second_time_nothing_is_read(rig: Rig) -> None:
    revision = rig.put("k", make_bytes(2 * BLOCK_SIZE))
    path = rig.file(revision)
    before = path.stat()
    if rig.local:
        rig.store.delete(["k"])
    else:
        del rig.fake.objects["k"]
    moved: list[int] = []
    assert rig.file(revision, progress=moved.append) == path
    assert not moved
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_new_content_is_a_new_inode_with_a_later_mtime(rig: Rig) -> None:
    path = rig.file(rig.put("k", b"one"))
    with path.open("rb") as reader:
        future = path.stat().st_mtime_ns + 10**15
        os.utime(path, ns=(future, future))  # as if the clock had gone back since
        ino = path.stat().st_ino
        assert rig.file(rig.put("k", b"second")) == path
        assert path.read_bytes() == b"second"
        assert path.stat().st_ino != ino
        assert path.stat().st_mtime_ns >= future
        assert reader.read() == b"one"
        sealed = path.stat()
        rig.file(rig.put("k", b"3"))
        assert path.stat().st_mtime_ns >= sealed.st_mtime_ns


@pytest.mark.parametrize("change", ["flip", "truncate", "append", "touch", "replace", "folder", "link"])
def test_what_somebody_did_to_the_file_is_undone(rig: Rig, change: str, tmp_path: Path) -> None:
    data = make_bytes(BLOCK_SIZE + 100)
    revision = rig.put("k", data)
    path = rig.file(revision)
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    match change:
        case "flip":
            with path.open("r+b") as stream:
                stream.write(bytes([data[0] ^ 1]))
        case "truncate":
            os.truncate(path, 5)
        case "append":
            with path.open("ab") as stream:
                stream.write(b"more")
        case "touch":
            os.utime(path, ns=(5, 5))
        case "replace":
            path.unlink()
            path.write_bytes(bytes(len(data)))
        case "folder":
            path.unlink()
            (path / "x").mkdir(parents=True)
        case "link":
            path.unlink()
            path.symlink_to(outside)
    assert rig.file(revision) == path
    assert path.read_bytes() == data
    assert not path.is_symlink()
    assert outside.read_bytes() == b"theirs"
    assert rig.index.total_bytes() == len(data)


def test_only_what_is_missing_or_wrong_is_fetched(s3: Rig) -> None:
    data = make_bytes(5 * BLOCK_SIZE)
    revision = s3.put("k", data)
    s3.file(revision)
    s3.fake.gets.clear()
    path = cache_path(s3.dir, s3.store, "k")
    with path.open("r+b") as stream:
        stream.seek(2 * BLOCK_SIZE + 7)
        stream.write(b"damage")
    s3.file(revision)
    assert path.read_bytes() == data
    assert dict(s3.fake.gets) == {("k", 2 * BLOCK_SIZE): 1}


def test_an_interrupted_fetch_goes_on_where_it_was(s3: Rig) -> None:
    data = make_bytes(6 * BLOCK_SIZE)
    revision = s3.put("k", data)

    def interrupt(count: int) -> None:
        if sum(s3.fake.gets.values()) >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s3.file(revision, progress=interrupt, workers=1)
    moved: list[int] = []
    path = s3.file(revision, progress=moved.append, workers=2)
    assert path.read_bytes() == data
    assert sum(moved) == len(data)
    assert sum(s3.fake.gets.values()) == 6


def test_what_is_being_fetched_is_the_last_that_a_mount_would_evict(s3: Rig) -> None:
    old = s3.put("old", make_bytes(2 * BLOCK_SIZE))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s3.file(old, progress=interrupt, workers=1)
    s3.file(s3.put("young", b"y"))
    newest: list[str] = []
    s3.file(old, progress=lambda _: newest.append(s3.index.evictable(5)[-1][0].path))
    assert [os.path.basename(path) for path in newest] == ["old", "old"]


def test_damage_in_storage(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    data = make_bytes(BLOCK_SIZE + 100)
    revision = rig.put("k", data)
    rig.rot(revision, data[:-1] + bytes([data[-1] ^ 1]))
    for workers in (1, 3):
        with pytest.raises(DamagedData, match="block 1"):
            rig.file(revision, workers=workers)
    assert rig.store.url("k") in caplog.text
    assert revision.etag in caplog.text
    rig.rot(revision, data)
    assert rig.file(revision).read_bytes() == data


def test_an_object_that_is_not_the_revision(rig: Rig) -> None:
    revision = rig.put("k", b"one")
    newer = rig.put("k", b"another")
    with pytest.raises(ObjectChanged):
        rig.file(revision)
    assert rig.file(newer).read_bytes() == b"another"
    if rig.local:
        rig.store.delete(["k"])
    else:
        del rig.fake.objects["k"]
    assert evict(rig.index, rig.dir, [cache_path(rig.dir, rig.store, "k")]) > 0
    with pytest.raises(ObjectMissing):
        rig.file(newer)


def test_a_cache_deleted_in_the_middle(rig: Rig) -> None:
    data = make_bytes(4 * BLOCK_SIZE)
    revision = rig.put("d/k", data)
    deleted: list[int] = []

    def delete(count: int) -> None:
        if not deleted:
            shutil.rmtree(rig.dir)
            deleted.append(count)

    if rig.local:  # the copy gets its name at the end, in a directory that is gone
        with pytest.raises(StorageError):
            rig.file(revision, progress=delete)
    else:
        assert rig.file(revision, progress=delete).read_bytes() == data
    assert rig.file(revision).read_bytes() == data


def test_without_a_usable_index_the_file_is_still_made(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    def connect(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr("lamfs.cache.index.sqlite3.connect", connect)
    assert rig.file(rig.put("k", b"abc")).read_bytes() == b"abc"


def test_a_cache_directory_that_cannot_be_used(rig: Rig) -> None:
    rig.dir.write_bytes(b"a file")
    with pytest.raises(StorageError, match="cache"):
        rig.file(rig.put("k", b"abc"))


def test_a_copy_that_was_never_finished_is_evicted_some_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("local", tmp_path)
    revision = rig.put("d/k", b"abc")
    with monkeypatch.context() as patch:
        patch.setattr("lamfs.cache.files.os.unlink", lambda path: None)
        patch.setattr(CacheIndex, "forget", lambda self, path: None)
        with pytest.raises(KeyboardInterrupt):
            rig.file(revision, progress=lambda count: (_ for _ in ()).throw(KeyboardInterrupt))
    [left] = os.listdir(cache_path(rig.dir, rig.store, "d"))
    assert left.startswith(".lamfs-")
    evict(rig.index, rig.dir, [row.path for row, _ in rig.index.evictable(5)])
    assert not cache_path(rig.dir, rig.store, "d").exists()


def test_evicting_takes_paths_of_both_kinds_and_nothing_outside(s3: Rig, tmp_path: Path) -> None:
    one, two = s3.file(s3.put("d/one", b"1")), s3.file(s3.put("d/two", b"2"))
    (tmp_path / "precious").write_bytes(b"x")
    assert evict(s3.index, s3.dir, [one, "bucket/prefix/d/two", "never/there", "../precious", Path(".")]) > 0
    assert not one.exists()
    assert not two.exists()
    assert not one.parent.exists()
    assert s3.index.total_bytes() == 0
    assert (tmp_path / "precious").exists()
    with pytest.raises(ValueError):
        evict(s3.index, s3.dir, [tmp_path / "precious"])
    with pytest.raises(InvalidName):
        cache_path(s3.dir, s3.store, "../../x")


async def test_a_mount_and_the_api_share_what_they_fetch(s3: Rig) -> None:
    data = make_bytes(4 * BLOCK_SIZE)
    revision = s3.put("k", data)
    cache = BlockCache(s3.store, FakeMover(s3.fake), CacheIndex(s3.dir), s3.dir, limit_bytes=1 << 40)
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        file = cache.open(revision)
        await file.read(BLOCK_SIZE, 10)
        path = cache_file(s3.store, CacheIndex(s3.dir), s3.dir, revision)
        assert path.read_bytes() == data
        assert os.fstat(file.fd()).st_ino == path.stat().st_ino
        assert all(count == 1 for count in s3.fake.gets.values())
        await file.fill()
        assert file.read_now(0, len(data)) == data
        file.close()
        s3.fake.gets.clear()
        assert s3.file(revision) == path  # what the mount wrote again does not make the file suspicious
        assert not s3.fake.gets
        nursery.cancel_scope.cancel()


def test_a_small_file_is_two_transactions_of_the_index(rig: Rig) -> None:
    """Every one of many threads that bring files waits for the others' transactions."""
    rig.file(rig.put("first", b"1"))
    revision = rig.put("second", b"22")
    statements: list[str] = []
    db = rig.index._db
    assert db is not None
    db.set_trace_callback(statements.append)
    rig.file(revision)
    db.set_trace_callback(None)
    words = [text.split()[0] for text in statements if not text.startswith(("SELECT", "PRAGMA", "--"))]
    assert words.count("BEGIN") == words.count("COMMIT") == 2
    outside = " ".join(words).replace("COMMIT", "COMMIT;").split(";")
    assert all(part.split()[0] == "BEGIN" for part in outside if part), "a statement by itself is a transaction, too"
    assert sparse.is_sealed(rig.index, rig.dir, sparse.relative_path(rig.store, "second"), revision)


def test_another_servers_object_of_the_same_name_is_another_file(tmp_path: Path) -> None:
    """Two servers may have buckets of one name: they share paths here. One of them is asked to give the ETag that the
    other one gave, for other bytes."""
    ours, theirs = Rig("s3", tmp_path), Rig("s3", tmp_path / "theirs")
    theirs.dir, theirs.index = ours.dir, ours.index
    good = ours.put("d/k", b"ours")
    bad = Revision(content_of(b"evil"), "d/k", good.etag)
    theirs.fake.objects["d/k"] = (good.etag, b"evil")
    assert theirs.file(bad).read_bytes() == b"evil"
    assert ours.file(good).read_bytes() == b"ours"
