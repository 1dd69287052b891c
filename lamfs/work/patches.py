"""Plans of partial spools: which parts of a changed artifact are sent, and which are copied in storage. Pure.

S3 (Amazon S3, "Multipart upload limits"): every part but the last has at least 5 MiB. So each run of sent or copied
blocks has at least two blocks of 4 MiB, except for the last one.
"""

from __future__ import annotations

from lamfs.hashing import MD5_MAX
from lamfs.model import BLOCK_SIZE, ContentHash

LEAST = 2
"""Blocks of the shortest part."""


def needed(size: int, missing: set[int], base: ContentHash) -> set[int]:
    """The missing blocks without which a file of ``size`` bytes cannot be hashed. LaminDB's hash covers all bytes, or
    the first and the last 50 MiB (hashing.py). An end that lies in ``base``, where its hash is known, needs no
    blocks."""
    if size <= MD5_MAX:
        return set(missing)
    head, ends = known(size, missing, base)
    return missing & ((set() if head else _head()) | _tail(size) if ends is None else set())


def known(size: int, missing: set[int], base: ContentHash) -> tuple[bytes | None, str | None]:
    """The hashes of ``base`` that are still valid if all changes are outside the missing blocks: the SHA-1 of the first
    50 MiB, and LaminDB's hash. None if it has changed, or is not known."""
    if min(size, base.size) <= MD5_MAX or base.hash_type != "sha1-fl" or not _head() <= missing:
        return None, None
    return base.head, base.hash if size == base.size and _tail(size) <= missing else None


def _head() -> set[int]:
    """The blocks that contain the first 50 MiB of a file."""
    return set(range(-(-MD5_MAX // BLOCK_SIZE)))


def _tail(size: int) -> set[int]:
    """The blocks that contain the last 50 MiB."""
    return set(range((size - MD5_MAX) // BLOCK_SIZE, -(-size // BLOCK_SIZE)))


def segments(content: ContentHash, base: ContentHash) -> list[tuple[bool, int, int]]:
    """The file in order, as (sent, offset, length). What is not sent is copied from the base, from the same place."""
    count = -(-content.size // BLOCK_SIZE)
    sent = bytearray(
        content.block(block) != base.block(block) or _length(content, block) != _length(base, block)
        for block in range(count)
    )
    first = 0
    while first < count:
        last = _end_of_run(sent, first)
        if last - first >= LEAST or last == count:
            first = last
        elif sent[first]:
            sent[last] = 1  # the next block is sent with it
        else:
            sent[first] = 1  # it is sent with its neighbours
    found = []
    first = 0
    while first < count:
        last = _end_of_run(sent, first)
        offset = first * BLOCK_SIZE
        found.append((bool(sent[first]), offset, min(last * BLOCK_SIZE, content.size) - offset))
        first = last
    return found


def _end_of_run(flags: bytearray, first: int) -> int:
    end = flags.find(1 - flags[first], first)
    return len(flags) if end < 0 else end


def _length(content: ContentHash, block: int) -> int:
    return max(min(BLOCK_SIZE, content.size - block * BLOCK_SIZE), 0)
