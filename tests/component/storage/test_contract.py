"""What every ObjectStore promises, tried on a local folder, SeaweedFS and ministack."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lamfs import config
from lamfs.errors import (
    DamagedData,
    InvalidName,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
)
from lamfs.storage import ObjectStore, StorageConfig

MakeFile = Callable[[bytes], Path]

ODD_KEYS = [
    "with space/and + plus",
    "percent%2F%20 & ? # = ;",
    "umlaut-äöü/日本語/😀",
    "e\u0301 is not é",
    "quote\"'<>`$(){}[]*",
    "tab\there",
    "newline\nhere",
    "\x01control",
    ".hidden/.lamindb-not/x",
    "trailing dot./and space ",
    "~tilde^",
    "x" * 255,
    "/".join(["deep"] * 40),
]


def test_an_object_comes_back(store: ObjectStore) -> None:
    written = store.put_bytes("a/b.csv", b"hello")
    assert store.get("a/b.csv") == b"hello"
    assert (written.key, written.size) == ("a/b.csv", 5)
    assert '"' not in written.etag
    found = store.head("a/b.csv")
    assert (found.key, found.size, found.etag) == ("a/b.csv", 5, written.etag)
    assert abs(found.mtime_ns - written.mtime_ns) < 120 * 10**9
    assert store.url("a/b.csv") == f"{store.config.root}/a/b.csv"


def test_each_write_changes_the_etag(store: ObjectStore) -> None:
    etags = {store.put_bytes("k", data).etag for data in (b"one", b"two", b"three", b"")}
    assert len(etags) == 4
    assert store.get("k") == b""


RANGES = [
    (0, None, b"0123456789"),
    (3, None, b"3456789"),
    (0, 4, b"0123"),
    (4, 3, b"456"),
    (9, 1, b"9"),
    (8, 100, b"89"),
    (10, 1, b""),
    (10, None, b""),
    (25, 5, b""),
    (5, 0, b""),
]


def test_ranges(store: ObjectStore) -> None:
    etag = store.put_bytes("r", b"0123456789").etag
    for offset, length, expected in RANGES:
        assert store.get("r", offset=offset, length=length) == expected, (offset, length)
        assert store.get("r", offset=offset, length=length, etag=etag) == expected, (offset, length)


def test_an_empty_object(store: ObjectStore, make_file: MakeFile) -> None:
    stored = store.put_file("e", str(make_file(b"")))
    assert stored.size == 0
    assert store.get("e") == b""
    assert store.get("e", offset=0, length=10, etag=stored.etag) == b""
    assert store.head("e").etag == stored.etag


def test_what_is_missing_is_said_so(store: ObjectStore, make_file: MakeFile) -> None:
    store.put_bytes("there", b"x")
    fd = os.open(make_file(b""), os.O_RDWR)
    try:
        for act in (
            lambda: store.head("not/there"),
            lambda: store.get("not/there"),
            lambda: store.get("not/there", offset=1, length=1, etag="0" * 32),
            lambda: store.get_into("not/there", fd, offset=0, length=1),
            lambda: store.copy("not/there", "new"),
        ):
            with pytest.raises(ObjectMissing, match="not/there"):
                act()
    finally:
        os.close(fd)
    assert [entry.key for entry in store.list()] == ["there"]


def test_a_folder_is_no_object(store: ObjectStore) -> None:
    store.put_bytes("a/b/c", b"x")
    with pytest.raises(ObjectMissing):
        store.head("a/b")
    with pytest.raises(ObjectMissing):
        store.get("a/b")
    store.delete(["a/b", "a"])
    assert store.get("a/b/c") == b"x"


def test_reads_are_of_one_revision(store: ObjectStore, make_file: MakeFile) -> None:
    old = store.put_bytes("k", b"old bytes").etag
    new = store.put_bytes("k", b"new bytes").etag
    fd = os.open(make_file(b""), os.O_RDWR)
    try:
        with pytest.raises(ObjectChanged):
            store.get("k", etag=old)
        with pytest.raises(ObjectChanged):
            store.get("k", offset=2, length=3, etag=old)
        with pytest.raises(ObjectChanged):
            store.get("k", offset=2, length=0, etag=old) if store.kind == "s3" else store.get("k", etag=old)
        with pytest.raises(ObjectChanged):
            store.get_into("k", fd, offset=0, length=3, etag=old)
        with pytest.raises(ObjectChanged):
            store.copy("k", "other", etag=old)
        assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)
    assert store.get("k", etag=new) == b"new bytes"


def test_get_into_writes_where_it_is_told(store: ObjectStore, make_file: MakeFile) -> None:
    data = os.urandom(3_000_000)
    etag = store.put_bytes("k", data).etag
    path = make_file(b"-" * 10)
    fd = os.open(path, os.O_RDWR)
    try:
        store.get_into("k", fd, offset=1000, length=2_500_000, etag=etag)
        assert os.pread(fd, 2_500_000, 1000) == data[1000:2_501_000]
        with pytest.raises(ObjectChanged, match="ends before"):
            store.get_into("k", fd, offset=2_999_999, length=2, etag=etag)
    finally:
        os.close(fd)


def test_get_views_fills_one_after_the_other(store: ObjectStore) -> None:
    data = os.urandom(3_000_000)
    etag = store.put_bytes("k", data).etag
    place = memoryview(bytearray(1_200_000))
    got: list[bytes] = []

    def views(*lengths: int) -> Iterator[memoryview]:
        got.clear()
        for length in lengths:
            with place[:length] as view:
                yield view
                got.append(bytes(view))

    store.get_views("k", views(1_200_000, 1, 700_000), offset=1000, length=1_900_001, etag=etag)
    assert [len(part) for part in got] == [1_200_000, 1, 700_000]
    assert b"".join(got) == data[1000:1_901_001]
    with pytest.raises(ObjectChanged, match="ends before"):
        store.get_views("k", views(10, 10), offset=len(data) - 15, length=20, etag=etag)
    assert got == [data[-15:-5]]

    def refusing() -> Iterator[memoryview]:
        yield place[:10]
        raise DamagedData("not what I want")

    with pytest.raises(DamagedData, match="not what I want"):
        store.get_views("k", refusing(), offset=0, length=len(data), etag=etag)
    store.put_bytes("k", data[:-1])
    with pytest.raises(ObjectChanged):
        store.get_views("k", views(10), offset=0, length=10, etag=etag)


def test_get_into_from_many_threads(store: ObjectStore, make_file: MakeFile) -> None:
    data = os.urandom(4_000_000)
    etag = store.put_bytes("k", data).etag
    path = make_file(b"")
    fd = os.open(path, os.O_RDWR)
    step = 250_000
    try:
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda at: store.get_into("k", fd, offset=at, length=step, etag=etag), range(0, len(data), step)
                )
            )
    finally:
        os.close(fd)
    assert path.read_bytes() == data


def test_get_into_a_file_that_cannot_be_written(store: ObjectStore, make_file: MakeFile) -> None:
    store.put_bytes("k", b"abc")
    fd = os.open(make_file(b""), os.O_RDONLY)
    try:
        with pytest.raises(StorageError, match="cache") as caught:
            store.get_into("k", fd, offset=0, length=3)
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [1, 4096, (4 << 20) + 1, 9_000_001])
def test_files_of_many_sizes(store: ObjectStore, make_file: MakeFile, size: int) -> None:
    data = os.urandom(size)
    path = make_file(data)
    moved: list[int] = []
    stored = store.put_file("some/file.bin", str(path), progress=moved.append)
    assert path.read_bytes() == data
    assert sum(moved) == size
    assert (stored.size, stored.etag) == (size, store.head("some/file.bin").etag)
    assert store.get("some/file.bin", etag=stored.etag) == data


def test_a_consumed_file_is_stored(store: ObjectStore, make_file: MakeFile) -> None:
    path = make_file(b"take me")
    moved: list[int] = []
    stored = store.put_file("k", str(path), consume=True, progress=moved.append)
    assert store.get("k", etag=stored.etag) == b"take me"
    assert sum(moved) == 7
    assert path.exists() == (store.kind == "s3")


def test_a_file_given_by_descriptor(store: ObjectStore, make_file: MakeFile) -> None:
    path = make_file(b"unlinked, but open")
    fd = os.open(path, os.O_RDWR)
    try:
        path.unlink()
        stored = store.put_file("k", f"/proc/{os.getpid()}/fd/{fd}", consume=True)
        assert store.get("k", etag=stored.etag) == b"unlinked, but open"
        os.pwrite(fd, b"later", 0)
        assert store.get("k", etag=stored.etag) == b"unlinked, but open"
    finally:
        os.close(fd)


def test_a_source_that_is_gone(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere") as caught:
        store.put_file("k", str(tmp_path / "nowhere"))
    assert caught.value.errno == errno.ENOENT
    assert not isinstance(caught.value, ObjectMissing)
    assert list(store.list()) == []


def test_a_reader_keeps_old_or_new(store: ObjectStore, make_file: MakeFile) -> None:
    """While an object is replaced again and again, each read is of one revision."""
    files = [str(make_file(bytes([number]) * 300_000)) for number in range(4)]
    store.put_file("k", files[0])
    done = threading.Event()
    reads = 0

    def reader() -> None:
        nonlocal reads
        while not done.is_set() or reads < 3:
            data = store.get("k")
            assert len(data) == 300_000
            assert len(set(data)) == 1
            reads += 1

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(reader)
        try:
            for turn in range(20):
                store.put_file("k", files[turn % 4])
        finally:
            done.set()
        future.result()


def test_create_only_when_missing(store: ObjectStore) -> None:
    first = store.put_bytes("lock/x", b"owner one", if_none_match=True)
    with pytest.raises(PreconditionFailed) as caught:
        store.put_bytes("lock/x", b"owner two", if_none_match=True)
    assert caught.value.errno == errno.EEXIST
    assert store.get("lock/x") == b"owner one"
    # the same bytes: a repeated write of ours, whose reply was lost
    assert store.put_bytes("lock/x", b"owner one", if_none_match=True).etag == first.etag
    store.delete(["lock/x"])
    store.put_bytes("lock/x", b"owner two", if_none_match=True)
    assert store.get("lock/x") == b"owner two"


def test_replace_only_what_was_read(store: ObjectStore) -> None:
    first = store.put_bytes("k", b"one")
    second = store.put_bytes("k", b"two", if_match=first.etag)
    with pytest.raises(PreconditionFailed):
        store.put_bytes("k", b"three", if_match=first.etag)
    assert store.get("k", etag=second.etag) == b"two"
    with pytest.raises(PreconditionFailed):
        store.put_bytes("missing", b"x", if_match=first.etag)
    assert [entry.key for entry in store.list()] == ["k"]


@pytest.mark.parametrize("size", [10, 70 << 20])
def test_a_file_is_stored_on_a_condition(store: ObjectStore, make_file: MakeFile, size: int) -> None:
    """In one request, and in parts."""
    old, new = make_file(b"o" * size), make_file(b"n" * size)
    first = store.put_file("k", str(old), if_none_match=True)
    assert store.head("k").etag == first.etag
    for condition in ({"if_none_match": True}, {"if_match": "0" * 32}):
        with pytest.raises(PreconditionFailed):
            store.put_file("k", str(new), consume=True, **condition)
        assert new.stat().st_size == size, "what was refused is still the caller's"
        assert store.head("k").etag == first.etag
    with pytest.raises(PreconditionFailed):
        store.put_file("other", str(new), if_match=first.etag)
    second = store.put_file("k", str(new), consume=True, if_match=first.etag)
    assert store.head("k").etag == second.etag != first.etag
    assert store.get("k", length=5) == b"nnnnn"


def test_a_race_of_creators_has_one_winner(store: ObjectStore) -> None:
    racers = 6
    barrier = threading.Barrier(racers)

    def create(number: int) -> bool:
        barrier.wait(30)
        try:
            store.put_bytes("race/key", f"owner {number}".encode(), if_none_match=True)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(racers) as pool:
        won = list(pool.map(create, range(racers)))
    assert won.count(True) == 1
    assert store.get("race/key") == f"owner {won.index(True)}".encode()


def test_a_race_of_replacers_has_one_winner(store: ObjectStore) -> None:
    etag = store.put_bytes("race/key", b"start").etag
    racers = 6
    barrier = threading.Barrier(racers)

    def replace(number: int) -> bool:
        barrier.wait(30)
        try:
            store.put_bytes("race/key", f"owner {number}".encode(), if_match=etag)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(racers) as pool:
        won = list(pool.map(replace, range(racers)))
    assert won.count(True) == 1
    assert store.get("race/key") == f"owner {won.index(True)}".encode()


def test_copies(store: ObjectStore) -> None:
    source = store.put_bytes("from/ä +%.csv", b"content")
    copied = store.copy("from/ä +%.csv", "to/x/y.csv", etag=source.etag)
    assert (copied.key, copied.size) == ("to/x/y.csv", 7)
    assert store.get("to/x/y.csv", etag=copied.etag) == b"content"
    store.put_bytes("other", b"other content")
    copied = store.copy("other", "to/x/y.csv")
    assert store.get("to/x/y.csv", etag=copied.etag) == b"other content"
    again = store.copy("other", "other")
    assert store.get("other", etag=again.etag) == b"other content"
    # of which everything is known
    known = store.copy("from/ä +%.csv", "to/z", etag=source.etag, size=7)
    assert (known.key, known.size) == ("to/z", 7)
    assert store.head("to/z")._replace(mtime_ns=0) == known._replace(mtime_ns=0)
    assert store.get("to/z", etag=known.etag) == b"content"
    store.put_bytes("from/ä +%.csv", b"changed")
    with pytest.raises(ObjectChanged):
        store.copy("from/ä +%.csv", "to/z", etag=source.etag, size=7)
    with pytest.raises(ObjectMissing):
        store.copy("never/was", "to/z", etag=source.etag, size=7)


def test_deleting(store: ObjectStore) -> None:
    keys = [f"d/{number % 7}/{number}" for number in range(40)]
    for key in keys:
        store.put_bytes(key, b"x")
    store.put_bytes("kept", b"x")
    store.delete([*keys, "never/was", "d/never"])
    assert [entry.key for entry in store.list()] == ["kept"]
    store.delete(keys[:1])
    store.delete([])
    store.delete(iter(["kept"]))
    assert list(store.list()) == []


def test_listing(store: ObjectStore) -> None:
    sizes = {"a": 1, "a/b": 2} if store.kind == "s3" else {"a.txt": 1, "a/b": 2}
    sizes |= {"ab/c": 3, "ab/d/e": 4, "b": 5, ".lamindb/uid.csv": 6}
    written = {key: store.put_bytes(key, b"x" * size) for key, size in sizes.items()}
    assert {entry.key: entry.size for entry in store.list()} == sizes
    assert {entry.key: entry.etag for entry in store.list()} == {key: at.etag for key, at in written.items()}
    assert {entry.key for entry in store.list("a")} == {key for key in sizes if key.startswith("a")}
    assert {entry.key for entry in store.list("ab/")} == {"ab/c", "ab/d/e"}
    assert {entry.key for entry in store.list("ab/d")} == {"ab/d/e"}
    assert {entry.key for entry in store.list(".lamindb/")} == {".lamindb/uid.csv"}
    assert list(store.list("zz")) == []
    assert list(store.list("zz/y")) == []


def test_odd_keys(store: ObjectStore) -> None:
    for key in ODD_KEYS:
        data = key.encode()
        etag = store.put_bytes(key, data).etag
        assert store.get(key, etag=etag) == data
        assert [entry.key for entry in store.list()] == [key]
        store.copy(key, "copy")
        store.copy("copy", key)
        assert store.get(key) == data
        store.delete([key, "copy"])
        assert list(store.list()) == []


@pytest.mark.parametrize("kind", ["local", "seaweed"])
def test_keys_that_leave_the_storage(
    kind: str, request: pytest.FixtureRequest, opened: Callable[[StorageConfig], ObjectStore], make_file: MakeFile
) -> None:
    store = request.getfixturevalue("local") if kind == "local" else opened(request.getfixturevalue("seaweed_config"))
    path = str(make_file(b"x"))
    for key in ("", "/abs", "..", "../out", "a/../../out", "a/..", "nul\0", "\udcff"):
        for act in (
            lambda key=key: store.put_bytes(key, b"x"),
            lambda key=key: store.put_file(key, path),
            lambda key=key: store.get(key),
            lambda key=key: store.head(key),
            lambda key=key: store.copy(key, "x"),
            lambda key=key: store.delete([key]),
        ):
            with pytest.raises(InvalidName):
                act()


def test_check_proves_and_leaves_nothing(store: ObjectStore) -> None:
    found = store.check()
    assert (found.create_exclusive, found.replace_guarded, found.read_guarded) == (True, True, True)
    assert found.warnings == ()
    assert list(store.list()) == []
    assert store.check(write=False).warnings == ()
    assert list(store.list()) == []


def test_what_was_made_to_ask_something_is_temporary(store: ObjectStore) -> None:
    lock = f".lamindb/_exclusion/{'0' * 32}"
    probes = [f"{lock}.0123abcd", f"{lock}.{config.temporary_name()}", ".lamindb/_exclusion/probe-x"]
    for key in (lock, f"{lock}x", *probes):
        store.put_bytes(key, b"x")
    found = [item.key for item in store.temporaries()]
    assert sorted(found) == sorted(probes)
    store.delete(found)
    assert list(store.temporaries()) == []
    assert store.head(lock).size == 1


def test_check_beside_objects(store: ObjectStore) -> None:
    store.put_bytes("x", b"x")
    assert store.check(write=False).read_guarded
    assert store.check().read_guarded
    assert [entry.key for entry in store.list()] == ["x"]
