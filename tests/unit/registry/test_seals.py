"""Seals: what is known first of a block of a spool file stays, as long as nobody opens the file for writing."""

from __future__ import annotations

import pytest

from lamfs.keys import spool_name
from lamfs.model import BLOCK_SIZE
from lamfs.registry.entries import Put
from lamfs.registry.seals import UNKNOWN
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands

SIZE = 3 * BLOCK_SIZE - 5
ONE, TWO, THREE, FOUR = (bytes([number]) * 32 for number in range(1, 5))


@pytest.fixture
def entry(registry: Registry, hands: Hands) -> Put:
    """The put of a closed file."""
    found = registry.journal.put_of(hands.create("a"))
    assert found is not None
    return found


def known(registry: Registry, entry: Put) -> bytes | None:
    seal = registry.seals.of(entry.src or "")
    return None if seal is None else seal.blocks


def test_what_comes_later_fills_gaps_only(registry: Registry, entry: Put) -> None:
    registry.seals.add(entry, SIZE, TWO, 1)
    assert known(registry, entry) == UNKNOWN + TWO + UNKNOWN
    assert registry.seals.unsealed(registry.journal.owner) == [(entry.ino, entry.src)]
    registry.seals.add(entry, SIZE, ONE + FOUR + THREE)
    assert known(registry, entry) == ONE + TWO + THREE
    assert registry.seals.unsealed(registry.journal.owner) == []
    registry.seals.add(entry, SIZE, FOUR, 2)
    assert known(registry, entry) == ONE + TWO + THREE
    registry.seals.add(entry, SIZE + 1, FOUR * 3)
    assert known(registry, entry) == ONE + TWO + THREE
    registry.seals.forget(entry.src or "")
    assert known(registry, entry) is None


def test_a_scratch_file_has_a_seal_too(registry: Registry, entry: Put) -> None:
    assert entry.ino is not None
    registry.journal.set_scratch(entry.ino, True)
    registry.seals.add(entry, 5, ONE)
    registry.journal.set_scratch(entry.ino, False)
    assert known(registry, entry) == ONE


def test_what_was_hashed_before_a_write_is_not_noted_after_it(registry: Registry, entry: Put) -> None:
    assert entry.ino is not None
    registry.seals.add(entry, 5, ONE)
    registry.journal.begin_put(entry.ino, entry.src or "")
    registry.seals.add(entry, 5, ONE)
    assert known(registry, entry) is None
    registry.journal.ready_put(entry.ino)
    registry.seals.add(entry, 5, ONE)
    assert known(registry, entry) is None, "of an earlier generation"
    now = registry.journal.put_of(entry.ino)
    assert now is not None
    registry.seals.add(now, SIZE, UNKNOWN + TWO)
    registry.seals.add(entry, SIZE, ONE)
    assert known(registry, entry) == UNKNOWN + TWO + UNKNOWN
    registry.journal.begin_put(entry.ino, spool_name(entry.ino))
    assert known(registry, entry) is None
