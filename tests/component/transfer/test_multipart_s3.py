"""Uploads in parts on a real server: what storage can do, and that what it has is not sent twice."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lamfs.errors import ObjectChanged, ObjectMissing, UploadGone
from lamfs.mover.client import Mover
from lamfs.storage import StorageConfig, open_store
from lamfs.storage.s3 import S3Store
from tests.support.proxy import FaultProxy
from tests.support.servers_fixtures import through
from tests.support.transfer import content_of, make_bytes, running_mover

MIB = 1 << 20
SIZES = (5 * MIB, 6 * MIB, 7)
DATA = make_bytes(sum(SIZES))


@pytest.fixture
def config(seaweed_config: StorageConfig) -> StorageConfig:
    return seaweed_config


@pytest.fixture
async def mover(config: StorageConfig) -> AsyncIterator[Mover]:
    async with running_mover(config) as mover:
        yield mover


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "file").write_bytes(DATA)
    return str(tmp_path / "file")


async def test_parts_by_the_mover(mover: Mover, config: StorageConfig, path: str) -> None:
    """Sent, copied, listed, sent again with other bytes, completed twice; then it is gone."""
    store = open_store(config)
    source = store.put_bytes("source", DATA)
    upload_id = await mover.begin_upload("a/ü")
    assert await mover.uploads_of("a/ü") == [upload_id]
    assert await mover.uploads_of("a") == []
    await mover.send_part("a/ü", upload_id, 1, path, 3, SIZES[0])
    etag, hashes = await mover.send_part("a/ü", upload_id, 1, path, 0, SIZES[0], hashed=True)
    assert hashes == dataclasses.replace(content_of(DATA[: SIZES[0]]), hash="", hash_type="")
    assert hashes is not None
    assert await mover.hash_range(path, 0, SIZES[0]) == hashes
    etags = [
        etag,
        await mover.copy_part("a/ü", upload_id, 2, "source", source.etag, SIZES[0], SIZES[1]),
        (await mover.send_part("a/ü", upload_id, 3, path, SIZES[0] + SIZES[1], SIZES[2]))[0],
    ]
    listed = await mover.list_parts("a/ü", upload_id)
    found = {(part.number, part.size, part.etag) for part in listed}
    # SeaweedFS lists what was replaced as well.
    assert found >= {(number, SIZES[number - 1], etag.strip('"')) for number, etag in enumerate(etags, 1)}
    await mover.send_part("a/ü", upload_id, 4, path, 0, 9)  # a file that became shorter since
    etag = await mover.complete_upload("a/ü", upload_id, etags)
    assert await mover.complete_upload("a/ü", upload_id, etags) == etag
    assert store.get("a/ü", etag=etag) == DATA
    assert await mover.uploads_of("a/ü") == []
    with pytest.raises(UploadGone):
        await mover.list_parts("a/ü", upload_id)
    store.close()


async def test_an_aborted_upload_is_gone(mover: Mover, path: str) -> None:
    upload_id = await mover.begin_upload("k")
    await mover.send_part("k", upload_id, 1, path, 0, 9)
    for _ in range(2):
        await mover.abort_upload("k", upload_id)
    assert await mover.uploads_of("k") == []
    with pytest.raises(UploadGone):
        await mover.send_part("k", upload_id, 2, path, 0, 9)
    with pytest.raises(UploadGone):
        await mover.list_parts("k", upload_id)
    with pytest.raises(UploadGone):
        await mover.complete_upload("k", upload_id, ['"0"'])


async def test_a_part_is_not_copied_of_another_revision(mover: Mover, config: StorageConfig) -> None:
    store = open_store(config)
    stored = store.put_bytes("source", DATA)
    upload_id = await mover.begin_upload("k")
    store.put_bytes("source", b"x" * len(DATA))
    with pytest.raises(ObjectChanged):
        await mover.copy_part("k", upload_id, 1, "source", stored.etag, 0, SIZES[0])
    store.delete(["source"])
    with pytest.raises(ObjectMissing):
        await mover.copy_part("k", upload_id, 1, "source", stored.etag, 0, SIZES[0])
    await mover.abort_upload("k", upload_id)
    store.close()


def test_a_begin_whose_reply_was_lost_leaves_nothing(seaweed_config: StorageConfig, seaweed_proxy: FaultProxy) -> None:
    store = S3Store(through(seaweed_proxy, seaweed_config))
    lost = seaweed_proxy.add("lost_reply", method="POST", path="uploads")
    upload_id = store.parts.begin_upload("k")
    assert lost.hits == 1
    assert store.parts.uploads_of("k") == [upload_id]
    store.parts.abort_upload("k", upload_id)
    store.close()


def test_many_uploads_are_listed_page_by_page(seaweed_config: StorageConfig, path: str) -> None:
    store = S3Store(seaweed_config)
    begun = {store.parts.begin_upload("k") for _ in range(3)}
    assert set(store.parts.uploads_of("k")) == begun
    for upload_id in begun:
        store.parts.abort_upload("k", upload_id)
    assert store.parts.uploads_of("k") == []
    store.close()
    assert os.path.exists(path)
