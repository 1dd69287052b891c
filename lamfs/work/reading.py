"""Whole objects are read and hashed, to tell whose they are, or to make an artifact of them. Steps that do no I/O
themselves (worker.py)."""

from __future__ import annotations

import os
import tempfile
from typing import IO

from lamfs import config
from lamfs.copying import path_of
from lamfs.errors import ObjectChanged
from lamfs.hashing import MD5_MAX, join_ranges
from lamfs.model import BLOCK_SIZE, ContentHash
from lamfs.storage.base import ObjectStat, ObjectStore
from lamfs.work.worker import Progress, Waits, Worker

READERS = 8
"""Blocks of an object that are read at the same time."""


async def hash_object(
    worker: Worker, waits: Waits, store: ObjectStore, found: ObjectStat, progress: Progress | None = None
) -> ContentHash:
    """Read the object ``found`` once, and hash it. ``progress`` gets the number of bytes of each piece.

    Raises ObjectChanged if the object has changed since, or is being written, ObjectMissing, and other storage errors,
    also for a link in a storage folder.
    """
    local = store.open_local(found.key)
    if local is None:
        return await _hash_fetched(worker, waits, found, progress)
    content = await hash_opened(worker, local, progress)
    if (await worker.head(found.key)).etag != found.etag:
        raise ObjectChanged(
            f"The object {store.url(found.key)} is being written by somebody else; try again when that is done."
        )
    return content


async def hash_opened(worker: Worker, fd: int, progress: Progress | None = None) -> ContentHash:
    """Hash an open file, and close it."""
    try:
        return await worker.hash(path_of(fd), progress=progress)
    finally:
        os.close(fd)


async def _hash_fetched(worker: Worker, waits: Waits, found: ObjectStat, progress: Progress | None) -> ContentHash:
    """Hash an object of a bucket. Only its two ends, which LaminDB's hash covers, and the blocks being fetched are on
    the disk."""
    size = found.size
    parts: dict[int, ContentHash] = {}
    with _temporary() as ends:
        ends.truncate(size)

        async def fetch(offset: int) -> ContentHash:
            length = min(BLOCK_SIZE, size - offset)
            if offset < MD5_MAX or offset + length > size - MD5_MAX:
                return await hashed(ends, offset, length)
            with _temporary() as block:
                return await hashed(block, offset, length)

        async def hashed(file: IO[bytes], offset: int, length: int) -> ContentHash:
            path = path_of(file.fileno())
            await worker.fetch(found.key, etag=found.etag, offset=offset, length=length, path=path, digest=None)
            return await worker.hash_range(path, offset, length)

        def done(offset: int, part: ContentHash) -> None:
            parts[offset] = part
            if progress is not None:
                progress(part.size)

        await waits.each(range(0, size, BLOCK_SIZE), fetch, done, READERS)
        path = path_of(ends.fileno())
        if size <= MD5_MAX:
            return await worker.hash(path, size)
        return join_ranges((parts[at] for at in sorted(parts)), await worker.hash_ends(path, size))


def _temporary() -> IO[bytes]:
    return tempfile.TemporaryFile(dir=config.temporary_folder())
