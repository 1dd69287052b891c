"""Objects say whose bytes they have, however they were stored: in a folder, and on real servers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamfs.errors import ObjectMissing
from lamfs.model import ObjectMeta
from lamfs.storage import ObjectStore, StorageConfig
from lamfs.storage.base import Over
from lamfs.storage.local import LocalStore
from lamfs.storage.s3 import S3Store, multipart
from lamfs.storage.s3.calls import Body, Headers
from lamfs.storage.s3.direct import Direct
from lamfs.storage.s3.errors import Refused
from tests.component.storage.conftest import Opener

MakeFile = Callable[[bytes], Path]

ONE = ObjectMeta("0123456789abcdefABCD", "umlaut-äöü/日 本%2F+.csv", 7, "md5:abcdefghij_-ABCDEFGHIJ")
TWO = ObjectMeta("ABCDEFGHIJ0123456789", "z", 1, "sha1-fl:abcdefghij_-ABCDEFGHIJ")


@pytest.fixture(params=["local", "seaweed", "ministack", "rclone"])
def any_store(request: pytest.FixtureRequest, opened: Opener) -> ObjectStore:
    """A store of every kind."""
    if request.param == "local":
        found: ObjectStore = request.getfixturevalue("local")
        return found
    return opened(request.getfixturevalue(f"{request.param}_config"))


def made(store: ObjectStore) -> S3Store:
    assert isinstance(store, S3Store)
    return store


def test_a_put_says_it(any_store: ObjectStore, make_file: MakeFile) -> None:
    any_store.put_file("a", str(make_file(b"bytes")), consume=True, meta=ONE)
    assert any_store.meta("a") == ONE
    assert any_store.get("a") == b"bytes"
    any_store.put_file("a", str(make_file(b"other")), meta=TWO)
    assert any_store.meta("a") == TWO
    any_store.put_file("a", str(make_file(b"plain")), consume=True)
    assert any_store.meta("a") is None
    any_store.delete(["a"])
    with pytest.raises(ObjectMissing):
        any_store.meta("a")


def test_a_file_that_is_taken_says_only_what_is_meant(local: LocalStore, make_file: MakeFile) -> None:
    """A spool file may be a clone of an object."""
    source = make_file(b"bytes")
    os.setxattr(source, "user.lamfs", b"0123456789abcdefABCD 1 - =old")
    inode = source.stat().st_ino
    local.put_file("a", str(source), consume=True)
    assert os.stat(local.url("a")).st_ino == inode
    assert local.meta("a") is None


def test_a_copy_says_what_it_is_itself(store: ObjectStore, make_file: MakeFile) -> None:
    stored = store.put_file("a", str(make_file(b"bytes")), meta=ONE)
    store.copy("a", "b", etag=stored.etag, size=5, meta=TWO)
    store.copy("a", "c", etag=stored.etag, meta=TWO)
    store.copy("a", "d", etag=stored.etag)
    assert [store.meta(key) for key in "abcd"] == [ONE, TWO, TWO, ONE]
    assert store.get("c") == b"bytes"


@pytest.mark.parametrize("server", ["seaweed", "ministack", "rclone"])
def test_objects_in_parts(
    server: str, request: pytest.FixtureRequest, opened: Opener, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(request.getfixturevalue(f"{server}_config"))
    monkeypatch.setattr(multipart, "MULTIPART_ABOVE", 1 << 20)
    data = os.urandom(6 << 20)
    store.put_file("a", str(make_file(data)), meta=ONE)
    assert store.meta("a") == ONE
    if server == "rclone":
        return  # it does not list or copy parts
    parts = store.parts
    assert parts is not None
    path = str(make_file(data))
    upload_id = parts.begin_upload("b", TWO)
    etag = parts.send_part("b", upload_id, 1, path, 0, len(data))
    parts.complete_upload("b", upload_id, [etag])
    assert store.meta("b") == TWO
    monkeypatch.setattr(multipart, "COPY_LIMIT", 1 << 20)
    store.copy("b", "c", meta=ONE)
    assert store.meta("c") == ONE
    assert store.get("c") == data


def test_a_move_keeps_what_others_have_said(opened: Opener, seaweed_config: StorageConfig) -> None:
    """An object that another program has stored, registered in place, and renamed."""
    store = made(opened(seaweed_config))
    said = {"content-type": "text/csv", "cache-control": "max-age=60", "x-amz-meta-lab": "42"}
    store._connection.call(lambda s3: s3.put(store._key("a"), b"x", 1, said), "test")
    store.copy("a", "b", meta=ONE)
    headers = store._connection.call(lambda s3: s3.head(store._key("b")), "test").headers
    assert (headers["content-type"], headers["cache-control"]) == ("text/csv", "max-age=60")
    assert headers["x-amz-meta-lab"] == "42"
    assert store.meta("b") == ONE


@pytest.mark.parametrize("code", ["NotImplemented", "MetadataTooLarge", "InvalidArgument"])
def test_a_server_that_takes_no_metadata_gets_the_bytes(
    opened: Opener, seaweed_config: StorageConfig, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    store = made(opened(seaweed_config))
    put, refused = Direct.put, []

    def refusing(self: Direct, key: str, body: Body, size: int, headers: Headers, over: Over) -> str:
        if headers:
            refused.append(key)
            raise Refused(code, status=400)
        return put(self, key, body, size, headers, over)

    monkeypatch.setattr(Direct, "put", refusing)
    store.put_file("a", str(make_file(b"bytes")), meta=ONE)
    store.copy("a", "b", meta=TWO)
    store.put_file("c", str(make_file(b"more")), meta=ONE)
    assert (store.get("a"), store.get("b"), store.get("c")) == (b"bytes", b"bytes", b"more")
    assert store.meta("a") is None
    assert len(refused) == 1, "it is asked once"


def test_a_file_system_without_attributes_gets_the_bytes(
    local: LocalStore, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    for name in ("setxattr", "getxattr", "listxattr"):
        monkeypatch.setattr(os, name, refuse)
    local.put_file("a", str(make_file(b"bytes")), consume=True, meta=ONE)
    local.copy("a", "b", meta=TWO)
    assert (local.get("a"), local.get("b")) == (b"bytes", b"bytes")
    assert local.meta("a") is None
