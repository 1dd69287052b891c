"""Bodies are signed where nothing else guards them on their way: plain HTTP to another machine."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from lamfs.errors import StorageError, StorageForbidden
from lamfs.storage import ObjectStore, StorageConfig
from lamfs.storage.s3 import boto, direct, sign, upload
from tests.support.proxy import FaultProxy
from tests.support.servers_fixtures import through

Opener = Callable[[StorageConfig], ObjectStore]


@pytest.mark.parametrize(
    ("url", "signed"),
    [
        ("http://storage.example/b/", True),
        ("http://10.0.0.1:9000/b/", True),
        ("http://127.evil.example/", True),
        ("http://127.0.0.1.evil.example/", True),
        ("http://localhost.example/", True),
        ("http://[fe80::1]:80/", True),
        ("https://storage.example/b/", False),
        ("http://127.0.0.1:9000/b/", False),
        ("http://127.8.7.6/", False),
        ("http://LOCALHOST:80/", False),
        ("http://[::1]:9000/", False),
    ],
)
def test_where_bodies_are_signed(url: str, signed: bool) -> None:
    assert sign.is_in_the_open(url) == signed


def test_the_digest_of_a_file_moves_nothing(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    path = tmp_path / "f"
    path.write_bytes(data)
    moved: list[int] = []
    with path.open("rb") as stream:
        body = upload.FileSlice(stream.fileno(), 5, 2_500_000, upload.Meter(moved.append))
        body.read(10)
        before = body.tell(), list(moved)
        assert sign.digest_of(body) == hashlib.sha256(data[5:2_500_005]).hexdigest()
        assert (body.tell(), moved) == before
        short = upload.FileSlice(stream.fileno(), 5, 3_000_000)
        with pytest.raises(EOFError):
            short.sha256()
        assert isinstance(short.failure, EOFError)
    assert sign.digest_of(b"data") == hashlib.sha256(b"data").hexdigest()


def test_the_signature_is_the_one_of_botocore(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Credentials("AKID", "secret", "a token")
    request = AWSRequest("PUT", "http://10.0.0.1:9000/b/a%20key", {"If-None-Match": "*"}, b"the body")
    S3SigV4Auth(keys, "s3", "eu-west-1").add_auth(request)
    monkeypatch.setattr(sign.time, "strftime", lambda *_: request.context["timestamp"])
    headers = {"host": "10.0.0.1:9000", "if-none-match": "*"}
    sign.Signer(keys, "eu-west-1").sign("PUT", "/b/a%20key", "", headers, sign.digest_of(b"the body"))
    for name, value in headers.items():
        assert name == "host" or request.headers[name] == value


@pytest.fixture
def store(
    seaweed_proxy: FaultProxy, seaweed_config: StorageConfig, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    """A store whose server is taken for one on another machine."""
    monkeypatch.setattr(direct, "is_in_the_open", lambda url: True)
    monkeypatch.setattr(boto, "is_in_the_open", lambda url: True)
    return opened(through(seaweed_proxy, seaweed_config))


def sums(proxy: FaultProxy) -> list[str]:
    return [request.get("x-amz-content-sha256") or "" for request in proxy.requests if request.method == "PUT"]


def test_a_server_accepts_what_is_signed(store: ObjectStore, seaweed_proxy: FaultProxy, tmp_path: Path) -> None:
    small, large = os.urandom(1000), os.urandom(3_000_000)
    path = tmp_path / "f"
    path.write_bytes(large)
    store.put_bytes("small", small)
    done: list[int] = []
    store.put_file("large", str(path), progress=done.append)
    assert (store.get("small"), store.get("large")) == (small, large)
    assert sums(seaweed_proxy) == [hashlib.sha256(data).hexdigest() for data in (small, large)]
    assert sum(done) == len(large)
    store.copy("large", "copy")
    store.delete(["small", "copy"])
    parts = store.parts
    assert parts is not None
    upload_id = parts.begin_upload("parts")
    etag = parts.send_part("parts", upload_id, 1, str(path), 1, 2_000_000)
    parts.complete_upload("parts", upload_id, [etag])
    assert store.get("parts") == large[1:2_000_001]


def test_a_body_that_is_refused_is_sent_again(store: ObjectStore, seaweed_proxy: FaultProxy, tmp_path: Path) -> None:
    """It was changed on its way, or its file while it was sent: the test servers take anything, Amazon S3 does not."""
    path = tmp_path / "f"
    path.write_bytes(os.urandom(600_000))
    rule = seaweed_proxy.add("status", code=400, error="XAmzContentSHA256Mismatch", method="PUT")
    etag = store.put_file("k", str(path)).etag
    assert rule.hits == 1
    assert store.get("k", etag=etag) == path.read_bytes()
    assert len(sums(seaweed_proxy)) == 2


def test_what_is_signed_counts(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_ = sign.Signer.sign

    def other(self: sign.Signer, method: str, path: str, query: str, headers: dict[str, str], payload: str) -> None:
        sign_(self, method, path, query, headers, payload)
        headers["x-amz-content-sha256"] = sign.UNSIGNED

    monkeypatch.setattr(sign.Signer, "sign", other)
    with pytest.raises(StorageForbidden, match="SignatureDoesNotMatch"):
        store.put_bytes("k", b"data")


def test_botocore_signs_them_too(store: ObjectStore, seaweed_proxy: FaultProxy) -> None:
    seaweed_proxy.add("status", code=307, error="TemporaryRedirect", method="PUT")
    store.put_bytes("k", b"data")
    assert set(sums(seaweed_proxy)) == {hashlib.sha256(b"data").hexdigest()}
    assert seaweed_proxy.requests[-1].get("User-Agent") != "lamfs"


def test_on_loopback_they_are_not(seaweed_proxy: FaultProxy, seaweed_config: StorageConfig, opened: Opener) -> None:
    for path_style in (True, False):
        opened(dataclasses.replace(through(seaweed_proxy, seaweed_config), path_style=path_style)).put_bytes("k", b"d")
    assert set(sums(seaweed_proxy)) == {sign.UNSIGNED}


def test_a_file_that_became_shorter_is_said(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    sha256 = upload.FileSlice.sha256

    def late(self: upload.FileSlice) -> str:
        os.truncate(path, 10)
        return sha256(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(upload.FileSlice, "sha256", late)
        with pytest.raises(StorageError, match="could not be stored"):
            store.put_file("k", str(path))
