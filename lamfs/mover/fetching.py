"""Fetching: bytes are checked in memory and only then written. Any thread.

Plain functions. A message is a job of the mover, as lamfs.mover.client sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lamfs import copying, hashing
from lamfs.errors import DamagedData
from lamfs.mover import jobs
from lamfs.mover.buffers import Buffers
from lamfs.mover.jobs import Message
from lamfs.storage.base import ObjectStore


def fetch_right(
    store: ObjectStore, key: str, etag: str, offset: int, data: memoryview, is_right: Callable[[memoryview], bool]
) -> bool:
    """Fill ``data`` with a range of an object. Returns whether it ``is_right``. Raises as ObjectStore.get.

    Bytes that are wrong once may have been damaged on the way, and are fetched again. Bytes that are wrong twice are
    wrong in storage.
    """
    for _ in range(2):
        store.get_view(key, data, offset=offset, etag=etag)
        if is_right(data):
            return True
    return False


def fetch(store: ObjectStore, buffers: Buffers, message: Message, fd: int) -> None:
    """Write a range of an object into the file ``fd``: see Mover.fetch, whose errors it raises, and OSError."""
    m = message
    key, etag, offset, length = m["key"], m["etag"], m["offset"], m["length"]
    if m["digest"] is None and m["leaves"] is None:
        store.get_into(key, fd, offset=offset, length=length, etag=etag)
        return
    with buffers.view(length) as data:
        if not fetch_right(store, key, etag, offset, data, lambda view: _is_right(m, view)):
            raise _damaged(store, m, offset, length)
        copying.write_full(fd, data, offset)


def _is_right(message: Message, data: memoryview) -> bool:
    """Whether fetched bytes have the hash of a block, or the hashes of leaves, that the job names."""
    if message["leaves"] is not None:
        return hashing.hash_leaves(data) == bytes.fromhex(message["leaves"])
    return hashing.hash_block(data) == bytes.fromhex(message["digest"])


def fetch_stretch(store: ObjectStore, buffers: Buffers, message: Message, fd: int, came: Callable[[], None]) -> None:
    """Write consecutive blocks into the file ``fd``, by one GET. ``came`` is called after each.

    See Mover.fetch_stretch, whose errors it raises.
    """
    lengths = [length for length, _ in message["blocks"]]

    def places() -> Iterator[memoryview]:
        offset = message["offset"]
        for length, digest in message["blocks"]:
            with data[:length] as view:
                yield view
                if hashing.hash_block(view) != bytes.fromhex(digest):
                    raise _damaged(store, message, offset, length)
                try:
                    copying.write_full(fd, view, offset)
                except OSError as error:  # not an error of the storage that is being read
                    raise jobs.translate(error, jobs.describe(message)) from error
            came()
            offset += length

    with buffers.view(max(lengths)) as data:
        store.get_views(message["key"], places(), offset=message["offset"], length=sum(lengths), etag=message["etag"])


def _damaged(store: ObjectStore, message: Message, offset: int, length: int) -> DamagedData:
    return DamagedData(
        f"The object {store.url(message['key'])} (ETag {message['etag']}) is damaged at bytes {offset} to"
        f" {offset + length}: they are not what was saved. Restore the object from a backup or replace the artifact."
    )
