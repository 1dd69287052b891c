"""Which blocks, and which leaves of a block, as bits. Pure."""

from __future__ import annotations

from lamfs.model import BLOCK_SIZE, LEAF_SIZE

REGION_BLOCKS = 16
"""Blocks of a larger file that are used and evicted together: 64 MiB."""

_EXPAND = [bytes((value >> bit) & 1 for bit in range(8)) for value in range(256)]


def unpack_bitmap(bitmap: bytes, count: int) -> bytearray:
    """One byte (0 or 1) for each of ``count`` blocks from a bitmap: block i is bit i & 7 of byte i >> 3."""
    flags = bytearray(b"".join([_EXPAND[value] for value in bitmap]))
    return flags[:count] if len(flags) >= count else flags + bytes(count - len(flags))


def full_bitmap(count: int) -> bytes:
    """The bitmap of ``count`` blocks that are all present."""
    return ((1 << count) - 1).to_bytes((count + 7) // 8, "little")


def leaf_mask(size: int, block: int, first: int = 0, last: int = 63) -> int:
    """Bits of leaves ``first`` to ``last`` of a block (leaf i is bit i), if a file of ``size`` bytes has them."""
    count = -(-min(BLOCK_SIZE, size - block * BLOCK_SIZE) // LEAF_SIZE)
    return ((1 << min(last + 1, count)) - 1) & ~((1 << first) - 1)


def leaf_bytes(size: int, block: int, mask: int) -> int:
    """Bytes in the leaves of a block that ``mask`` names."""
    short = -size % LEAF_SIZE  # the last leaf of the file may be shorter
    has_last = short and block == (size - 1) // BLOCK_SIZE and mask >> (((size - 1) % BLOCK_SIZE) // LEAF_SIZE) & 1
    return mask.bit_count() * LEAF_SIZE - (short if has_last else 0)
