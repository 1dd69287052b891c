"""Content hashes: LaminDB's (md5, sha1-fl), and lamfs's own BLAKE3 of blocks and leaves. Any thread.

Plain functions.

LaminDB 0.72: url-safe base64 of the digest without ``=``, first 22 characters.
"""

from __future__ import annotations

import base64
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from blake3 import blake3

from lamfs.model import BLOCK_SIZE, LEAF_HASH, LEAF_SIZE, ContentHash

PIECE = 1 << 20
"""Bytes read at a time. They are still in the processor's cache for the second hash."""
MD5_MAX = 52_428_800
"""Files up to this many bytes (50 MiB) are hashed with md5, larger ones with sha1-fl."""


def encode_digest(digest: bytes) -> str:
    """LaminDB's text form of a digest."""
    return base64.urlsafe_b64encode(digest).decode().strip("=")[:22]


def hash_block(data: bytes | memoryview) -> bytes:
    """BLAKE3 of one block, 32 bytes."""
    return blake3(data).digest()


def hash_leaf(data: bytes | memoryview) -> bytes:
    """Hash of one leaf: the first LEAF_HASH bytes of its BLAKE3."""
    return blake3(data).digest(length=LEAF_HASH)


def hash_leaves(block: bytes | memoryview) -> bytes:
    """The concatenated hashes of the leaves of one block."""
    with memoryview(block) as view:
        return b"".join([hash_leaf(view[at : at + LEAF_SIZE]) for at in range(0, len(view), LEAF_SIZE)])


def hash_fd(
    fd: int,
    size: int,
    progress: Callable[[int], None] | None = None,
    *,
    known: Mapping[int, bytes] = MappingProxyType({}),
    head: bytes | None = None,
    ends: str | None = None,
) -> ContentHash:
    """Hash ``size`` bytes of an open file from its start, in one pass of pread. The file offset may move.

    ``progress`` gets the number of bytes of each block. Raises EOFError if the file is shorter. No leaves are returned
    for files of a single leaf (their block hash is enough) or for holes (see zero_leaves).

    ``known``: BLAKE3 of blocks that need not be read. It must not contain blocks that the whole-file hash covers,
    unless that hash is known too. For a file of more than MD5_MAX bytes that is ``head``, the SHA-1 of the first
    MD5_MAX bytes, and ``ends``, the sha1-fl.
    """
    small = size <= MD5_MAX
    data_at = 0
    whole = hashlib.md5() if small else hashlib.sha1()
    first = MD5_MAX if head is None and ends is None else 0
    blocks = bytearray()
    leaves: dict[int, bytes] = {}
    buffer = memoryview(bytearray(min(PIECE, size) or 1))
    for offset in range(0, size, BLOCK_SIZE):
        want = min(BLOCK_SIZE, size - offset)
        digest = known.get(offset // BLOCK_SIZE)
        if digest is not None:
            blocks += digest
            if progress is not None:
                progress(want)
            continue
        if not small and data_at <= offset:
            data_at = _next_data(fd, offset, size)
        if data_at >= offset + BLOCK_SIZE and offset >= MD5_MAX and want == BLOCK_SIZE:
            # A hole: its hash is known without reading it.
            blocks += zero_block()
            if progress is not None:
                progress(want)
            continue
        found: list[bytes] | None = [] if size > LEAF_SIZE else None
        blocks += _hash_block_at(fd, offset, want, buffer, found, whole, first - offset)
        if found is not None:
            leaves[offset // BLOCK_SIZE] = b"".join(found)
        if progress is not None:
            progress(want)
    if os.fstat(fd).st_size < size:
        raise EOFError("file ended while it was hashed")  # there is no data beyond its end either
    if small:
        return ContentHash(size, encode_digest(whole.digest()), "md5", bytes(blocks), leaves)
    if ends is None:
        head = head or whole.digest()
        ends = _both(head, _sha1(fd, size - MD5_MAX, buffer))
    return ContentHash(size, ends, "sha1-fl", bytes(blocks), leaves, head)


def hash_range(fd: int, offset: int, length: int, progress: Callable[[int], None] = lambda count: None) -> ContentHash:
    """BLAKE3 of the blocks of a range that begins at a block, and of their leaves, numbered from the start of the
    range.

    It has no whole-file hash. ``progress`` gets the bytes of each block. Raises EOFError if the file is shorter.
    """
    blocks = bytearray()
    leaves: dict[int, bytes] = {}
    buffer = memoryview(bytearray(min(PIECE, length) or 1))
    for index, at in enumerate(range(0, length, BLOCK_SIZE)):
        found: list[bytes] = []
        digest = _hash_block_at(fd, offset + at, min(BLOCK_SIZE, length - at), buffer, found)
        blocks += digest
        if digest != zero_block():
            leaves[index] = b"".join(found)
        progress(min(BLOCK_SIZE, length - at))
    return ContentHash(length, "", "", bytes(blocks), leaves)


def hash_view(block: memoryview) -> ContentHash:
    """Like hash_range, for one block in memory."""
    digest = hash_block(block)
    leaves = {} if digest == zero_block() else {0: hash_leaves(block)}
    return ContentHash(len(block), "", "", digest, leaves)


def join_ranges(ranges: Iterable[ContentHash], ends: tuple[str, bytes]) -> ContentHash:
    """The ContentHash of a file, from those of consecutive ranges and the result of hash_ends."""
    size = 0
    blocks = bytearray()
    leaves: dict[int, bytes] = {}
    for part in ranges:
        leaves.update((size // BLOCK_SIZE + index, found) for index, found in part.leaves.items())
        blocks += part.blocks
        size += part.size
    return ContentHash(size, ends[0], "sha1-fl", bytes(blocks), leaves, ends[1])


def hash_ends(fd: int, size: int, progress: Callable[[int], None] = lambda count: None) -> tuple[str, bytes]:
    """The sha1-fl of a file of more than MD5_MAX bytes, which covers only the first and the last MD5_MAX; and the SHA-1
    of the first. ``progress`` gets byte counts."""
    buffer = memoryview(bytearray(PIECE))
    head = _sha1(fd, 0, buffer, progress)
    return _both(head, _sha1(fd, size - MD5_MAX, buffer, progress)), head


def _both(head: bytes, tail: bytes) -> str:
    return encode_digest(hashlib.sha1(head + tail).digest())


def _sha1(fd: int, start: int, buffer: memoryview, progress: Callable[[int], None] = lambda count: None) -> bytes:
    """SHA-1 of MD5_MAX bytes of a file."""
    whole = hashlib.sha1()
    for at in range(start, start + MD5_MAX, PIECE):
        view = buffer[: min(PIECE, start + MD5_MAX - at)]
        _read_full(fd, view, at)
        whole.update(view)
        progress(len(view))
    return whole.digest()


def _hash_block_at(
    fd: int,
    offset: int,
    length: int,
    buffer: memoryview,
    leaves: list[bytes] | None,
    whole: Any = None,
    whole_bytes: int = 0,
) -> bytes:
    """BLAKE3 of a block of a file. Appends the hashes of its leaves to ``leaves``, and feeds its first ``whole_bytes``
    to ``whole``."""
    block = blake3()
    for at in range(0, length, len(buffer)):
        view = buffer[: min(len(buffer), length - at)]
        _read_full(fd, view, offset + at)
        block.update(view)
        if leaves is not None:
            leaves.append(hash_leaves(view))
        if at < whole_bytes:
            whole.update(view[: whole_bytes - at])
    return block.digest()


@functools.cache
def zero_block() -> bytes:
    """BLAKE3 of a full block of zeros."""
    return hash_block(bytes(BLOCK_SIZE))


@functools.cache
def zero_leaves() -> bytes:
    """The leaf hashes of a full block of zeros."""
    return hash_leaf(bytes(LEAF_SIZE)) * (BLOCK_SIZE // LEAF_SIZE)


def _next_data(fd: int, offset: int, size: int) -> int:
    """Where the next data at or after ``offset`` begins: lseek(2), SEEK_DATA. On files without holes: ``offset``."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else offset


def _read_full(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise EOFError(f"file ended at byte {offset + done}")
        done += got


def hash_file(path: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> ContentHash:
    """Hash a regular file. Raises OSError like open, EOFError if the file shrinks meanwhile."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return hash_fd(fd, os.fstat(fd).st_size, progress)
    finally:
        os.close(fd)
