"""The protocol between the daemon and its mover: jobs, replies, errors. Pure, any thread.

Lines of JSON (jsonlines.py) both ways over one stream socket.

- The daemon's first line is the StorageConfig. Then one line per job, ``{"id": 7, "op": "fetch", …}``, or
  ``{"cancel": 7}``: nobody waits for job 7 any more, and it is skipped if it has not started. It is answered anyway.
- The mover answers each job once, in the order of completion: ``{"id": 7, "ok": result}`` or
  ``{"id": 7, "error": {"type": "ObjectChanged", "message": "…", "errno": 116}}``. Before that it may send
  ``{"id": 7, "progress": bytes}``; a last ``"progress"`` may come with the answer. ("fetch_stretch" counts blocks.)
  For a job with ``"alive": true`` it also sends ``{"id": 7, "alive": 1}`` now and then, while something is done for it.

Binary values travel as base64, paths as Python strings (surrogate escapes survive JSON's ``\\u`` form).
"""

from __future__ import annotations

import base64
import dataclasses
import errno
from typing import Any, NamedTuple

import lamfs.errors
from lamfs.errors import FsError, LamfsError, StorageError, StorageFull
from lamfs.model import BLOCK_SIZE, LEAF_HASH, LEAF_SIZE, ContentHash, ObjectMeta
from lamfs.storage.base import ObjectStat, StorageConfig

Message = dict[str, Any]

READS = frozenset({"fetch", "fetch_stretch", "verify", "get", "head", "meta"})
"""Jobs that a read() waits for: the reads pool."""
CONTROL = frozenset({"put_bytes", "visit"})
"""Small jobs with a deadline (such as renewing the lease): their own pool, so that no transfer delays them."""
PARTS = frozenset({"send_part", "copy_part"})
"""Parts of large files. They have their own pool, so that small files never wait behind them."""
HASHES = frozenset({"hash", "hash_range", "hash_ends"})
"""Hashing: its own pool, so that it never waits for storage, and another for ``bulk`` jobs (a whole large file)."""


class WholeFile(NamedTuple):
    """A small object to fetch whole into the file at ``path``; ``digest``: its BLAKE3."""

    key: str
    etag: str
    length: int
    path: str
    digest: bytes


def fetch(
    key: str, etag: str, offset: int, length: int, path: str, digest: bytes | None, leaves: bytes | None
) -> Message:
    """A job that fetches a range of an object; see Mover.fetch."""
    return {
        "key": key,
        "etag": etag,
        "offset": offset,
        "length": length,
        "path": path,
        "digest": None if digest is None else digest.hex(),
        "leaves": None if leaves is None else leaves.hex(),
    }


def pack_bytes(data: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")


def unpack_bytes(text: str) -> bytes:
    """The bytes of pack_bytes."""
    return base64.b64decode(text)


def pack_config(config: StorageConfig) -> Message:
    """A StorageConfig as a JSON object; it holds no secret."""
    return dataclasses.asdict(config)


def unpack_config(message: Message) -> StorageConfig:
    """The StorageConfig of pack_config."""
    return StorageConfig(**message)


def pack_stat(stat: ObjectStat) -> list[Any]:
    """An ObjectStat as a JSON array."""
    return [stat.key, stat.size, stat.etag, stat.mtime_ns]


def unpack_stat(value: list[Any]) -> ObjectStat:
    """The ObjectStat of pack_stat."""
    return ObjectStat(*value)


def pack_meta(meta: ObjectMeta | None) -> list[Any] | None:
    """An ObjectMeta as a JSON array."""
    return None if meta is None else [meta.uid, meta.key, meta.revision, meta.hash, meta.cut]


def unpack_meta(value: list[Any] | None) -> ObjectMeta | None:
    """The ObjectMeta of pack_meta."""
    return None if value is None else ObjectMeta(*value)


def pack_content(content: ContentHash) -> list[Any]:
    """A ContentHash as a JSON array; the leaves of all its blocks are one text."""
    leaves = content.leaves
    return [
        content.size, content.hash, content.hash_type, pack_bytes(content.blocks),
        list(leaves), pack_bytes(b"".join(leaves.values())), pack_bytes(content.head or b""),
    ]  # fmt: skip


def unpack_content(value: list[Any]) -> ContentHash:
    """The ContentHash of pack_content."""
    size, text, kind, blocks, indexes, joined, head = value
    hashes = unpack_bytes(joined)
    leaves: dict[int, bytes] = {}
    at = 0
    for block in indexes:
        length = -(-min(BLOCK_SIZE, size - block * BLOCK_SIZE) // LEAF_SIZE) * LEAF_HASH
        leaves[block] = hashes[at : at + length]
        at += length
    return ContentHash(size, text, kind, unpack_bytes(blocks), leaves, unpack_bytes(head) or None)


def describe(message: Message) -> str:
    """What a job does, for messages to users."""
    words = {
        "hash": "hashing {path}",
        "put": "storing {path} as '{key}'",
        "put_many": "storing small files",
        "put_bytes": "storing '{key}'",
        "copy": "copying '{src}' to '{dst}'",
        "delete": "deleting objects",
        "head": "looking up '{key}'",
        "meta": "looking up '{key}'",
        "get": "reading '{key}'",
        "visit": "looking at {path}",
        "fetch": "fetching '{key}' at byte {offset}",
        "fetch_stretch": "fetching '{key}' from byte {offset} on",
        "verify": "verifying {path} at byte {offset}",
        "clone": "cloning {src} to {dst}",
        "graft": "copying {src} to {dst} at byte {offset}",
        "begin_upload": "beginning the upload of '{key}'",
        "send_part": "storing part {number} of '{key}' from {path}",
        "hash_range": "hashing {path} at byte {offset}",
        "hash_ends": "hashing {path}",
        "copy_part": "copying part {number} of '{key}' from '{source}'",
        "complete_upload": "completing the upload of '{key}'",
        "abort_upload": "aborting the upload of '{key}'",
        "list_parts": "listing the parts of '{key}'",
        "uploads_of": "listing the uploads of '{key}'",
    }
    return words.get(message["op"], "an unknown job").format_map(message)


def translate(error: BaseException, doing: str) -> LamfsError:
    """The lamfs error for whatever a job raised. ``doing`` names the job for users ("reading /x")."""
    if isinstance(error, LamfsError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageFull(f"No space was left while {doing}; make room on that disk.", errno=error.errno)
        return StorageError(f"The system refused {doing}: {error}.", errno=error.errno)
    if isinstance(error, EOFError):
        return StorageError(f"The file became shorter while {doing}; it is tried again when it is at rest.")
    return StorageError(
        f"{doing[:1].upper()}{doing[1:]} failed with {type(error).__name__}: {error}; see the mount's log."
    )


def pack_error(error: LamfsError) -> Message:
    """A lamfs error as a JSON object."""
    return {"type": type(error).__name__, "message": str(error), "errno": error.errno}


def unpack_error(value: Message) -> LamfsError:
    """A new exception of the class with that name; StorageError when there is none."""
    kind = getattr(lamfs.errors, str(value.get("type")), None)
    message, number = str(value.get("message", "")), int(value.get("errno", errno.EIO))
    if not (isinstance(kind, type) and issubclass(kind, LamfsError)):
        kind = StorageError
    if issubclass(kind, FsError):
        return kind(number, message)
    made: LamfsError = kind(message, errno=number)
    return made


def again(error: LamfsError) -> LamfsError:
    """A copy of an error, for each of several waiters: one exception object must not be raised in two tasks."""
    return unpack_error(pack_error(error))
