"""Both ways to a bucket, our own HTTP and botocore, ask the same and give the same answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import StorageError
from lamfs.storage import StorageConfig, open_store
from lamfs.storage.base import NOTHING, Over
from lamfs.storage.s3 import S3Store
from lamfs.storage.s3.calls import S3, Marker, NotDeleted
from lamfs.storage.s3.errors import as_refused
from lamfs.storage.s3.upload import FileSlice
from tests.support.hostile import HostileServer, reply

MIB = 1 << 20


def ways(store: S3Store) -> tuple[S3, S3]:
    direct, _ = store._connection._way()
    assert direct is not None
    return direct, store._connection._made_boto()


@pytest.fixture
def bucket(seaweed_config: StorageConfig) -> Iterator[tuple[S3, S3, str]]:
    """Both ways, and the prefix of this test's objects."""
    store = S3Store(seaweed_config)
    yield *ways(store), store._base
    store.close()


def code(error: pytest.ExceptionInfo[Exception]) -> str:
    found = as_refused(error.value)
    assert found is not None
    return found.code


@pytest.mark.parametrize("first", [0, 1])
def test_objects(bucket: tuple[S3, S3, str], first: int) -> None:
    """What one way has stored, the other way sees."""
    one, other, base = bucket[first], bucket[1 - first], bucket[2]
    key, headers = f"{base}a ü&b", {"content-type": "text/csv", "cache-control": "no-store", "x-amz-meta-lab": "42"}
    etag = one.put(key, b"0123456789", 10, headers)
    assert '"' not in etag
    for s3 in (one, other):
        head = s3.head(key)
        assert (head.size, head.etag) == (10, etag)
        assert headers.items() <= head.headers.items()
        whole, part, rest = s3.get(key), s3.get(key, 2, 5, etag), s3.get(key, 8)
        assert (whole.body.read(99), part.body.read(99), rest.body.read(99)) == (b"0123456789", b"234", b"89")
        assert (whole.status, part.status) == (200, 206)
        assert (part.etag, part.length, part.range, rest.range) == (etag, 3, "bytes 2-4/10", "bytes 8-9/10")
        for content in (whole, part, rest):
            content.body.close()
        with pytest.raises(Exception, match=r"412|Precondition") as refused:
            s3.get(key, 0, 1, "0" * 32)
        with pytest.raises(Exception, match=r"412|Precondition") as refused:
            s3.put(key, b"x", 1, over=NOTHING)
        assert code(refused) in ("PreconditionFailed", "412")
    assert one.head(key).mtime_ns == other.head(key).mtime_ns
    same = one.copy(f"{base}copy", key, etag)
    new = one.copy(f"{base}other", key, etag, {"content-type": "text/plain"})
    assert other.head(f"{base}copy").headers["x-amz-meta-lab"] == "42"
    assert "x-amz-meta-lab" not in other.head(f"{base}other").headers
    assert etag == same == new == one.put(key, b"0123456789", 10, over=Over(etag))
    assert one.objects(base) == other.objects(base)
    assert [entry.key for entry in one.objects(base).entries] == [key, f"{base}copy", f"{base}other"]
    assert one.delete_many([key, f"{base}none"]) == []
    one.delete(f"{base}copy")
    assert [entry.key for entry in other.objects(base).entries] == [f"{base}other"]


@pytest.mark.parametrize("way", [0, 1])
def test_pages(bucket: tuple[S3, S3, str], way: int) -> None:
    s3, base = bucket[way], bucket[2]
    for name in "abc":
        s3.put(base + name, b"", 0)
    found: list[str] = []
    after: Marker = ()
    for number in range(3):
        page = s3.objects(base, after, most=1)
        found += [entry.key.removeprefix(base) for entry in page.entries]
        assert page.more == bool(page.following) == (number < 2)
        after = page.following
    assert found == ["a", "b", "c"]


@pytest.mark.parametrize("first", [0, 1])
def test_parts(bucket: tuple[S3, S3, str], first: int, tmp_path: Path) -> None:
    one, other, base = bucket[first], bucket[1 - first], bucket[2]
    data = os.urandom(11 * MIB)
    (tmp_path / "f").write_bytes(data)
    source = one.put(f"{base}source", data, len(data))
    key = f"{base}large"
    upload_id = one.begin(key, {"x-amz-meta-lab": "42"})
    with (tmp_path / "f").open("rb") as stream:
        body = FileSlice(stream.fileno(), 0, 5 * MIB)
        body.read(10)
        body.seek(0)
        etags = [
            one.send_part(key, upload_id, 1, body, 5 * MIB),
            one.copy_part(key, upload_id, 2, f"{base}source", source, 5 * MIB, 11 * MIB),
        ]
    assert one.parts(key, upload_id) == other.parts(key, upload_id)
    assert [(part.number, part.size) for part in one.parts(key, upload_id).entries] == [(1, 5 * MIB), (2, 6 * MIB)]
    assert one.uploads(base) == other.uploads(base)
    assert [(found.key, found.id) for found in one.uploads(base).entries] == [(key, upload_id)]
    etag = one.complete(key, upload_id, etags)
    head = other.head(key)
    assert (head.size, head.etag, head.headers["x-amz-meta-lab"]) == (len(data), etag, "42")
    upload_id = one.begin(key)
    one.abort(key, upload_id)
    assert other.uploads(base).entries == []
    for s3 in (one, other):
        with pytest.raises(Exception, match=r"NoSuchUpload|404"):
            s3.parts(key, upload_id)


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("way", [0, 1])
def test_what_could_not_be_deleted(way: int) -> None:
    said = b"<DeleteResult><Error><Key>a</Key><Code>AccessDenied</Code></Error><Error/></DeleteResult>"
    with HostileServer(lambda *_: reply(said)) as server:
        store = S3Store(server.config())
        assert ways(store)[way].delete_many(["a", "b"]) == [NotDeleted("a", "AccessDenied"), NotDeleted("", "")]
        store.close()


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("begin", b"<InitiateMultipartUploadResult><UploadId>a&#13;&#10;b</UploadId></InitiateMultipartUploadResult>"),
        ("objects", b"<ListBucketResult><Contents><Key>k</Key><ETag>e</ETag><Size>-1</Size>"
         b"<LastModified>2024-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>"),
        ("objects", b"<ListBucketResult><Contents><Key>k</Key><ETag>e&quot;f</ETag><Size>1</Size>"
         b"<LastModified>2024-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>"),
        ("objects", b"<ListBucketResult><NextContinuationToken>" + b"x" * 9000 + b"</NextContinuationToken>"
         b"<IsTruncated>true</IsTruncated></ListBucketResult>"),
        ("put", b""),
    ],
    ids=["an upload's id", "a size", "an ETag", "a token", "no ETag"],
)  # fmt: skip
def test_an_answer_that_cannot_be(call: str, body: bytes, way: int) -> None:
    with HostileServer(lambda *_: reply(body)) as server:
        store = open_store(server.config())
        assert isinstance(store, S3Store)
        if way:
            store._connection._looked = True  # and found no direct way
        with pytest.raises(StorageError, match="does not speak S3"):
            store._connection.call(
                lambda s3: s3.put("k", b"x", 1) if call == "put" else getattr(s3, call)("k"), "try it"
            )
        store.close()
