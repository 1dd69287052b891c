"""What an object says of itself: any key comes back, and nothing that others have written is believed."""

from __future__ import annotations

import pytest

from lamfs.model import ObjectMeta
from lamfs.storage import meta

UID = "0123456789abcdefABCD"
HASH = "sha1-fl:abcdefghij_-ABCDEFGHIJ"
KEYS = [
    "a.csv",
    "with space/and + plus",
    "percent%2F%20",
    "umlaut-äöü/日本語/😀",
    "quote\"'<>",
    "tab\tnew\nline",
    " x ",
    "=",
    "~a",
]


@pytest.mark.parametrize("key", KEYS)
def test_any_key_comes_back(key: str) -> None:
    said = ObjectMeta(UID, key, 12, HASH)
    headers = meta.as_headers(said)
    assert all(text.isascii() and text.isprintable() and " " not in text for text in headers.values())
    assert meta.from_headers(headers) == said
    assert meta.from_attribute(meta.as_attribute(said)) == said


@pytest.mark.parametrize("said", [ObjectMeta(UID), ObjectMeta(UID, None, 3), ObjectMeta(UID, "k", None, HASH)])
def test_what_is_not_known_is_left_out(said: ObjectMeta) -> None:
    headers = meta.as_headers(said)
    assert meta.from_headers(headers) == said
    assert meta.from_attribute(meta.as_attribute(said)) == said


@pytest.mark.parametrize("part", ["x", "ä", "日"])
def test_a_key_that_is_too_long_is_cut_and_said_to_be(part: str) -> None:
    key = "/".join([part * 60] * 60)
    said = ObjectMeta(UID, key, 1, HASH)
    headers = meta.as_headers(said)
    assert sum(len(name) + len(text) for name, text in headers.items()) < 2048
    for found in (
        meta.from_headers(headers),
        meta.from_attribute(meta.as_attribute(said)),
    ):
        assert found is not None
        assert found.cut
        assert found.key is not None
        assert key.startswith(found.key)
        assert len(found.key) > 100
    assert len(meta.as_attribute(said)) < 1200


@pytest.mark.parametrize(
    "headers",
    [
        {"lamfs-uid": UID, "lamfs-key": "../../etc/passwd"},
        {"lamfs-uid": UID, "lamfs-key": "a%00b"},
        {"lamfs-uid": UID, "lamfs-key": "%ff%fe"},
        {"lamfs-uid": UID, "lamfs-key": ".lamindb/x"},
        {"lamfs-uid": UID, "lamfs-key": "x" * 100_000},
        {"lamfs-uid": UID, "lamfs-revision": "-1", "lamfs-hash": "md5"},
        {"lamfs-uid": UID, "lamfs-revision": "9" * 400, "lamfs-hash": "md5:" + "x" * 9999},
        {"lamfs-uid": UID, "lamfs-revision": "٣", "lamfs-hash": "rm -rf:x"},
    ],
)
def test_what_is_wrong_counts_as_nothing(headers: dict[str, str]) -> None:
    found = meta.from_headers({f"x-amz-meta-{name}": text for name, text in headers.items()})
    assert found == ObjectMeta(UID)


@pytest.mark.parametrize("uid", ["", "short", UID + "x", UID[:-1] + "/", UID[:-1] + "\n"])
def test_without_a_right_uid_it_is_not_ours(uid: str) -> None:
    assert meta.from_headers({"x-amz-meta-lamfs-uid": uid, "x-amz-meta-lamfs-key": "a"}) is None
    assert meta.from_attribute(f"{uid} 1 - =a".encode()) is None


@pytest.mark.parametrize("value", [b"", b"\xff\xfe", b"x" * 70_000, UID.encode(), f"{UID} 1".encode()])
def test_attributes_that_lamfs_has_not_written(value: bytes) -> None:
    assert meta.from_attribute(value) is None
