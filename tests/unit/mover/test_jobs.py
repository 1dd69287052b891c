"""The language of the moving process: values and errors survive the way."""

from __future__ import annotations

import errno
import inspect
import socket

import pytest

from lamfs import errors, jsonlines
from lamfs.errors import FsError, LamfsError, StorageError, StorageFull
from lamfs.model import BLOCK_SIZE, LEAF_SIZE, ContentHash
from lamfs.mover import jobs
from lamfs.storage.base import ObjectStat, StorageConfig

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LamfsError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_arrives_with_class_message_and_errno(kind: type[LamfsError]) -> None:
    error = FsError(errno.ENOTEMPTY, "why") if kind is FsError else kind("why", errno=errno.EMLINK)
    arrived = jobs.unpack_error(jsonlines.decode(jsonlines.encode(jobs.pack_error(error))))
    assert type(arrived) is kind
    assert str(arrived) == "why"
    assert arrived.errno == error.errno
    assert jobs.again(error) is not error


def test_an_unknown_error_is_a_storage_error() -> None:
    for name in ("Novel", "annotations", "errno", None):
        arrived = jobs.unpack_error({"type": name, "message": "why", "errno": 5})
        assert type(arrived) is StorageError


def test_system_errors_are_translated() -> None:
    full = jobs.translate(OSError(errno.ENOSPC, "No space left"), "storing x")
    assert isinstance(full, StorageFull)
    assert full.errno == errno.ENOSPC
    denied = jobs.translate(PermissionError(errno.EACCES, "Permission denied", "/x"), "reading /x")
    assert type(denied) is StorageError
    assert denied.errno == errno.EACCES
    assert "/x" in str(denied)
    strange = jobs.translate(KeyError("k"), "reading /X")
    assert type(strange) is StorageError
    assert str(strange).startswith("Reading /X failed with KeyError")


def test_values_survive() -> None:
    config = StorageConfig("s3://b/p", endpoint_url="http://127.0.0.1:1", path_style=True, timeout=3.5)
    assert jobs.unpack_config(jsonlines.decode(jsonlines.encode(jobs.pack_config(config)))) == config
    stat = ObjectStat("a/ä", 5, "e-tag", 1_700_000_000_123_456_789)
    assert jobs.unpack_stat(jsonlines.decode(jsonlines.encode({"x": jobs.pack_stat(stat)}))["x"]) == stat
    content = ContentHash(5, "h", "md5", bytes(range(32)))
    assert jobs.unpack_content(jsonlines.decode(jsonlines.encode({"x": jobs.pack_content(content)}))["x"]) == content
    size = 5 * BLOCK_SIZE + LEAF_SIZE + 1
    leaves = {0: bytes(range(16)) * 64, 3: b"x" * 1024, 5: b"y" * 32}
    known = jobs.pack_content(ContentHash(size, "h", "sha1-fl", bytes(32 * 6), leaves))
    assert jobs.unpack_content(jsonlines.decode(jsonlines.encode({"x": known}))["x"]).leaves == leaves


def test_every_job_has_one_pool_and_a_handler() -> None:
    from lamfs.mover import server as mover

    pools = [jobs.READS, jobs.PARTS, jobs.HASHES, jobs.CONTROL]
    named = frozenset().union(*pools)
    assert named < set(mover._HANDLERS), "what is in none of them is for the writes pool"
    assert sum(map(len, pools)) == len(named)


def test_nothing_is_hashed_behind_what_waits_for_storage() -> None:
    from lamfs.mover.server import _HANDLERS, Server

    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = Server(theirs)
        others = {server.pool_of({"op": op}) for op in _HANDLERS.keys() - jobs.HASHES}
        for bulk in (False, True):
            assert not others & {server.pool_of({"op": op, "bulk": bulk}) for op in jobs.HASHES}
        assert server.pool_of({"op": "hash", "bulk": True}) is not server.pool_of({"op": "hash"})
