"""The cache index: what it remembers, and that nothing which happens to its file reaches the caller."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lamfs.cache import index as index_module
from lamfs.cache import tables
from lamfs.cache.bits import full_bitmap, unpack_bitmap
from lamfs.cache.index import CacheIndex
from lamfs.cache.tables import SCHEMA
from lamfs.model import BLOCK_SIZE


@pytest.fixture
def index(tmp_path: Path) -> CacheIndex:
    return CacheIndex(tmp_path)


def flags(index: CacheIndex, path: str, etag: str, count: int, ino: int | None = None) -> list[int] | None:
    bitmap = index.present(path, etag, ino=ino)
    return None if bitmap is None else list(unpack_bitmap(bitmap, count))


def test_blocks_are_remembered_across_instances(index: CacheIndex, tmp_path: Path) -> None:
    size = 10 * BLOCK_SIZE + 1
    index.reset("b/k", "e", size, ino=7)
    assert flags(index, "b/k", "e", 11) == [0] * 11
    index.mark("b/k", "e", [0, 8, 10], ino=7)
    index.mark("b/k", "e", [8], ino=7)
    expected = [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]
    assert flags(index, "b/k", "e", 11) == expected
    assert flags(CacheIndex(tmp_path), "b/k", "e", 11, ino=7) == expected
    assert index.total_bytes() == 2 * BLOCK_SIZE + 1
    assert stat.S_IMODE(os.stat(tmp_path / "index.db").st_mode) == 0o600


def test_another_revision_or_inode_knows_nothing_and_marks_nothing(index: CacheIndex) -> None:
    index.reset("k", "e1", BLOCK_SIZE, ino=7)
    for etag, ino in (("e2", 7), ("e1", 8)):
        index.mark("k", etag, [0], ino=ino)
        index.complete("k", etag, 1, ino=ino)
        assert index.present("k", etag, ino=ino) is None
    row = index.row("k")
    assert row is not None
    assert (row.bitmap, row.bytes, row.complete) == (b"\0", 0, False)
    index.mark("nowhere", "e", [0])
    assert index.row("nowhere") is None
    index.mark("k", "e1", [5], ino=7)  # no such block
    assert index.total_bytes() == 0


def test_totals_follow_reset_and_forget(index: CacheIndex) -> None:
    index.reset("a", "e", 100, full=True)
    index.reset("b", "e", 3 * BLOCK_SIZE, full=True)
    assert index.total_bytes() == 100 + 3 * BLOCK_SIZE
    assert flags(index, "b", "e", 3) == [1, 1, 1]
    index.reset("b", "e2", 5)
    assert index.total_bytes() == 100
    index.forget("a")
    index.forget("a")
    assert index.total_bytes() == 0


def test_forgetting_a_folder_takes_its_files_alone(index: CacheIndex) -> None:
    for path in ("a", "a/b", "a/c/d", "ab", "a.b", "a0"):
        index.reset(path, "e", 1, full=True)
    index.forget_below("a")
    assert {row.path for row, _ in index.evictable(10)} == {"a", "ab", "a.b", "a0"}


def test_what_was_used_longest_ago_goes_first(index: CacheIndex) -> None:
    for name in "abcd":
        index.reset(name, "e", 1)
    index.touch("a")
    index.touch({"b": 5, "nowhere": 6})
    assert [row.path for row, _ in index.evictable(10)] == ["b", "c", "d", "a"]
    assert [row.path for row, _ in index.evictable(1)] == ["b"]


def test_completion_and_the_floor_of_mtimes(index: CacheIndex) -> None:
    index.reset("k", "e1", 1, floor_ns=50)
    index.complete("k", "e1", 60)
    row = index.row("k")
    assert row is not None
    assert row.complete
    assert (row.mtime_ns, row.floor_ns) == (60, 50)
    index.reset("k", "e2", 1, floor_ns=55)
    row = index.row("k")
    assert row is not None
    assert (row.mtime_ns, row.floor_ns) == (None, 60)


def test_names_that_are_not_utf8_and_huge_files(index: CacheIndex) -> None:
    name = os.fsdecode(b"b/\xff\xfe")
    blocks = 300_000
    index.reset(name, "e", blocks * BLOCK_SIZE, ino=2**63 - 1)
    index.mark(name, "e", [blocks - 1], ino=2**63 - 1)
    row = index.row(name)
    assert row is not None
    assert unpack_bitmap(row.bitmap, blocks).find(1) == blocks - 1


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1000])
def test_a_full_bitmap_has_every_block_and_no_more(count: int) -> None:
    assert list(unpack_bitmap(full_bitmap(count), count)) == [1] * count
    assert sum(unpack_bitmap(full_bitmap(count), count + 16)) == count


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    for junk in (b"not a database, whatever it says " * 200, b"x"):
        index = CacheIndex(tmp_path)
        index.reset("k", "e", 1, full=True)
        index.close()
        (tmp_path / "index.db").write_bytes(junk)
        again = CacheIndex(tmp_path)
        assert again.row("k") is None
        again.reset("k2", "e", 1, full=True)
        assert again.total_bytes() == 1
        again.close()


def test_sweeping_is_owed_once_for_each_index(index: CacheIndex, tmp_path: Path) -> None:
    assert not index.swept("bucket")
    assert index.swept("bucket", done=True)
    assert CacheIndex(tmp_path).swept("bucket")
    assert not index.swept("other")
    (tmp_path / "index.db").unlink()
    assert not index.swept("bucket")


def test_damage_while_it_is_open(index: CacheIndex, tmp_path: Path) -> None:
    for number in range(2000):
        index.reset(f"k{number}", "e", 1, full=True)
    index.close()
    assert index.row("k5") is not None
    with (tmp_path / "index.db").open("r+b") as stream:
        stream.seek(4096)
        stream.write(os.urandom(200_000))
    for number in range(2000):
        index.row(f"k{number}")
        index.mark(f"k{number}", "e", [0])
    index.reset("new", "e", 1, full=True)
    assert index.row("new") is not None


def test_a_newer_index_is_made_anew(index: CacheIndex, tmp_path: Path) -> None:
    index.reset("k", "e", 1)
    index.close()
    with sqlite3.connect(tmp_path / "index.db") as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    assert index.row("k") is None
    index.reset("k", "e", 1)
    assert index.row("k") is not None


def test_the_directory_may_vanish_at_any_moment(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    index = CacheIndex(folder)
    index.reset("k", "e", 1, full=True)
    for call in (
        lambda: index.row("k"),
        lambda: index.reset("k", "e", 1),
        lambda: index.mark("k", "e", [0]),
        lambda: index.touch("k"),
        lambda: index.forget("k"),
        lambda: index.total_bytes(),
        lambda: index.evictable(5),
    ):
        shutil.rmtree(folder)
        call()
    index.reset("k", "e", 1)
    assert CacheIndex(folder).row("k") is not None, "it writes to the new file, not to the deleted one"


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    index = CacheIndex(tmp_path / "file")
    index.reset("k", "e", 1)
    assert index.row("k") is None
    assert index.total_bytes() == 0
    assert index.evictable(3) == []


def test_a_busy_index_makes_a_call_do_nothing(
    index: CacheIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamfs.cache.index.BUSY_SECONDS", 0.05)
    index.reset("k", "e", 1)
    index.close()
    other = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    index.mark("k", "e", [0])
    assert index.present("k", "e") == b"\0"
    other.execute("ROLLBACK")
    other.close()
    index.mark("k", "e", [0])
    assert index.present("k", "e") == b"\1"


def test_threads_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, and not in SQLite's busy handler, in which here a call would give up at once."""
    monkeypatch.setattr(index_module, "BUSY_SECONDS", 0.0)
    CacheIndex(tmp_path).reset("k", "e", 10)

    def work(me: int) -> None:
        index = CacheIndex(tmp_path)
        for number in range(50):
            with index.together():
                index.reset(f"{me}/{number}", "e", 10)
                index.mark(f"{me}/{number}", "e", [0])
            index.touch(f"{me}/{number}")
        index.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert CacheIndex(tmp_path).total_bytes() == 4 * 50 * 10


def test_several_processes_at_once(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lamfs.cache.index import CacheIndex\n"
        "index = CacheIndex(Path(sys.argv[1]))\n"
        "me = int(sys.argv[2])\n"
        "for n in range(100):\n"
        "    index.reset(f'{me}/{n}', 'e', 10, full=True)\n"
        "    index.mark('shared', 'e', [me * 100 + n])\n"
    )
    folder = tmp_path / "cache"
    first = CacheIndex(folder)
    first.reset("shared", "e", 400 * BLOCK_SIZE)
    first.close()
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(folder), str(me)], cwd=Path(__file__).parents[3])
        for me in range(4)
    ]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    assert flags(first, "shared", "e", 400) == [1] * 400
    assert first.total_bytes() == 400 * BLOCK_SIZE + 4000


def test_a_second_connection_takes_no_lock_from_the_first(tmp_path: Path) -> None:
    """fcntl(2) drops all locks of a process on a file when it closes any descriptor of it: then another process that
    closes the index believes to be the last one, and deletes the log under the first connection."""
    first, second = CacheIndex(tmp_path), CacheIndex(tmp_path)
    first.reset("a", "e", 5, full=True)
    second.reset("b", "e", 5, full=True)
    code = (
        "import sys\nfrom pathlib import Path\nfrom lamfs.cache.index import CacheIndex\n"
        "index = CacheIndex(Path(sys.argv[1]))\nindex.reset('c', 'e', 5, full=True)\nindex.close()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "index.db-wal").exists()
    first.reset("d", "e", 5, full=True)
    second.close()
    assert CacheIndex(tmp_path).total_bytes() == 20


def test_what_another_boot_has_completed_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a power cut the bytes of a file may be lost whose row is there."""
    index = CacheIndex(tmp_path)
    index.reset("k", "e", 10, ino=7, full=True)
    index.complete("k", "e", 123, ino=7)
    index.close()
    index = CacheIndex(tmp_path)
    assert index.row("k").mtime_ns == 123  # type: ignore[union-attr]
    index.close()
    boot = tmp_path / "boot"
    boot.write_text("another\n")
    monkeypatch.setattr(tables, "BOOT_ID", boot)
    index = CacheIndex(tmp_path)
    row = index.row("k")
    assert row is not None
    assert (row.mtime_ns, row.floor_ns, row.bytes) == (None, 123, 10)
    index.close()
