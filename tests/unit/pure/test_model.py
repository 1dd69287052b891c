"""Ids, times and the records' own arithmetic."""

from __future__ import annotations

import dataclasses
import re
import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from lamfs.model import (
    ARTIFACT_UID_LEN,
    AUTO_KEY_PREFIX,
    BASE62,
    BLOCK_SIZE,
    STORAGE_UID_LEN,
    USER_UID_LEN,
    ArtifactRecord,
    ContentHash,
    Revision,
    instance_id,
    iso,
    new_uid,
    now_ns,
    storage_id,
)


def content(size: int, blocks: bytes = b"", text: str = "h" * 22) -> ContentHash:
    return ContentHash(size, text, "md5", blocks)


def test_the_alphabet_is_the_62_letters_and_digits() -> None:
    assert len(BASE62) == 62
    assert set(BASE62) == set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_uid_lengths_are_those_of_lamindb() -> None:
    assert (ARTIFACT_UID_LEN, STORAGE_UID_LEN, USER_UID_LEN) == (20, 12, 8)
    assert AUTO_KEY_PREFIX == ".lamindb/"
    assert BLOCK_SIZE == 4 * 1024 * 1024


@given(st.integers(min_value=1, max_value=64))
def test_uid_has_its_length_and_alphabet(length: int) -> None:
    assert re.fullmatch(f"[0-9A-Za-z]{{{length}}}", new_uid(length))


def test_uids_differ_and_use_the_whole_alphabet() -> None:
    uids = [new_uid() for _ in range(2000)]
    assert len(set(uids)) == 2000
    assert {len(uid) for uid in uids} == {20}
    # 40,000 draws: that one of 62 letters is missing has a chance below 1e-280.
    assert set("".join(uids)) == set(BASE62)


def test_instance_id_is_the_documented_one() -> None:
    assert instance_id("testuser1/test-add-replace-stage").hex == "0102f680066a569da6f32766b07a9f5d"


def test_storage_id_is_the_documented_one() -> None:
    assert storage_id("s3://lamindb-ci/test-add-replace-stage").hex == "8d5230fca3955b48bb7f707e93064ca9"


@given(st.text())
def test_ids_are_uuid5_in_the_url_namespace(text: str) -> None:
    assert instance_id(text) == storage_id(text) == uuid.uuid5(uuid.NAMESPACE_URL, text)
    assert instance_id(text).version == 5


def test_now_is_the_wall_clock_in_nanoseconds() -> None:
    before = time.time_ns()
    now = now_ns()
    assert before <= now <= time.time_ns()


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "1970-01-01T00:00:00+00:00"),
        (1_715_000_000_123_456_789, "2024-05-06T12:53:20.123456+00:00"),
        (1_715_000_000_000_000_999, "2024-05-06T12:53:20+00:00"),
        (-1_000, "1969-12-31T23:59:59.999999+00:00"),
    ],
)
def test_iso_is_utc_with_microseconds(ns: int, text: str) -> None:
    assert iso(ns) == text


@given(st.integers(min_value=-(2**60), max_value=2**62))
def test_iso_loses_nothing_above_a_microsecond(ns: int) -> None:
    since = datetime.fromisoformat(iso(ns)) - datetime(1970, 1, 1, tzinfo=UTC)
    assert since // timedelta(microseconds=1) == ns // 1000


def test_equality_of_bytes_is_decided_by_size_and_block_hashes_never_by_the_hash() -> None:
    one = content(5, b"a" * 32, "x" * 22)
    assert one.same_bytes(content(5, b"a" * 32, "y" * 22))
    assert not one.same_bytes(content(5, b"b" * 32, "x" * 22))
    assert not one.same_bytes(content(6, b"a" * 32, "x" * 22))
    assert not one.same_bytes(None)


def test_block_gives_each_digest() -> None:
    digests = [blake3(bytes([n])).digest() for n in range(3)]
    whole = content(2 * BLOCK_SIZE + 1, b"".join(digests))
    assert [whole.block(n) for n in range(3)] == digests


@pytest.mark.parametrize(
    ("size", "count"),
    [(0, 0), (1, 1), (BLOCK_SIZE - 1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 2), (5 * BLOCK_SIZE, 5)],
)
def test_block_count(size: int, count: int) -> None:
    assert Revision(content(size), "k", "e").block_count() == count


def test_revision_and_record_show_size_and_hash_of_their_content() -> None:
    revision = Revision(content(7, b"", "z" * 22), "a/b", "etag")
    record = ArtifactRecord(uid="u" * 20, key="a/b", suffix="", revision=revision)
    assert (revision.size, record.size, record.hash) == (7, 7, "z" * 22)


def test_a_revision_cannot_be_changed() -> None:
    revision = Revision(content(7), "a/b", "etag")
    with pytest.raises(dataclasses.FrozenInstanceError):
        revision.etag = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        revision.content.size = 8  # type: ignore[misc]


def test_a_new_record_is_shown_virtual_and_without_provenance() -> None:
    record = ArtifactRecord(uid="u" * 20, key=None, suffix="", revision=Revision(content(0), "k", "e"))
    assert (record.visibility, record.key_is_virtual, record.run_id, record.transform_id) == (1, True, None, None)
