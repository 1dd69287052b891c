"""What is in a partial spool, and was not noted, when its process was killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.keys import spool_name
from lamfs.model import BLOCK_SIZE
from lamfs.ops import partial_spools
from lamfs.processes import boot_id
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands

PAGE = partial_spools.PAGE
SIZE = 3 * BLOCK_SIZE + 100


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(tmp_path / "registry.lndb", create=True)
    made.people.ensure_storage("s3://bucket/prefix", "s3")
    yield made
    made.close()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[SpoolFolder]:
    with SpoolFolder.make(tmp_path, ("spool",)) as made:
        yield made


def left(registry: Registry, spool: SpoolFolder, written: dict[int, bytes]) -> Put:
    """A put of a process that was killed, over a revision of SIZE bytes, with these bytes at these places."""
    record = Hands(registry).save("a", b"stored")
    assert record.ino is not None
    src = spool_name(record.ino)
    registry.journal.begin_put(record.ino, src, base=f"{SIZE}:{'0' * 64}")
    registry.db.execute("UPDATE journal SET owner=? WHERE src=?", (f"{boot_id()}:1:1", src))
    fd = spool.open(src, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    for offset, data in written.items():
        os.pwrite(fd, data, offset)
    os.close(fd)
    (entry,) = registry.journal.left_puts()
    return entry


def test_bytes_outside_of_the_ranges_count(registry: Registry, spool: SpoolFolder) -> None:
    across = BLOCK_SIZE - 10
    entry = left(registry, spool, {10: b"noted" * 20 + b"more", across: b"x" * 30, SIZE - 3: b"end"})
    registry.partial_spools.add_ranges(entry.src, {0: ((10, 110),)})
    partial_spools.count_unnoted(registry, entry, spool)
    assert registry.partial_spools.ranges(entry.src) == {
        0: ((10, 114), (across, BLOCK_SIZE)), 1: ((0, 20),), 3: ((97, 100),)
    }  # fmt: skip


def test_what_was_noted_is_as_it_was(registry: Registry, spool: SpoolFolder) -> None:
    """Zeros that a file system has around what was written are the base's bytes, and blocks that are there stay so."""
    entry = left(registry, spool, {PAGE + 5: b"noted", BLOCK_SIZE: b"fetched", 2 * BLOCK_SIZE: bytes(3 * PAGE)})
    registry.partial_spools.add_ranges(entry.src, {0: ((PAGE + 5, PAGE + 10),)})
    registry.partial_spools.add(entry.src, [1])
    registry.seals.add(entry, SIZE, bytes(range(32)) * 4)
    before = registry.db.all("SELECT * FROM partial_spool"), registry.tree.get(entry.ino)
    partial_spools.count_unnoted(registry, entry, spool)
    assert (registry.db.all("SELECT * FROM partial_spool"), registry.tree.get(entry.ino)) == before
    assert registry.partial_spools.present(entry.src) == {1}


def test_pages_of_zeros_end_a_run(registry: Registry, spool: SpoolFolder) -> None:
    """They may be a file system's. Within a run they were written."""
    data = b"a" * 10 + bytes(PAGE) + b"b" * PAGE
    entry = left(registry, spool, {0: data, 5 * PAGE: bytes(7) + b"c" + bytes(PAGE) + bytes(PAGE) + b"d"})
    partial_spools.count_unnoted(registry, entry, spool)
    assert registry.partial_spools.ranges(entry.src) == {
        0: ((0, len(data)), (5 * PAGE + 7, 5 * PAGE + 8), (7 * PAGE + 8, 7 * PAGE + 9))
    }


def test_it_is_another_process_s_by_now(registry: Registry, spool: SpoolFolder) -> None:
    entry = left(registry, spool, {0: b"more"})
    registry.journal.take([entry])
    partial_spools.count_unnoted(registry, entry, spool)
    assert registry.partial_spools.ranges(entry.src) == {}


def test_its_block_has_been_fetched_meanwhile(registry: Registry, spool: SpoolFolder) -> None:
    entry = left(registry, spool, {0: b"more"})
    registry.partial_spools.add(entry.src, [0])
    assert not registry.upkeep.add_unnoted(entry, {}, {0: ((0, 4),)})
    assert registry.partial_spools.present(entry.src) == {0}


def test_without_its_spool_file(registry: Registry, spool: SpoolFolder) -> None:
    entry = left(registry, spool, {})
    spool.unlink(entry.src)
    partial_spools.count_unnoted(registry, entry, spool)
    assert registry.partial_spools.ranges(entry.src) == {}
