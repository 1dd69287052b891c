"""Which requests go past botocore, where to, and when they do not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs.errors import InvalidArgument, ObjectMissing, StorageError, StorageUnavailable
from lamfs.storage import ObjectStore, StorageConfig
from lamfs.storage.base import ObjectStat, PartStat
from lamfs.storage.s3 import client
from lamfs.storage.s3.calls import Page
from tests.component.storage.test_wire import Script
from tests.support.hostile import tls
from tests.support.proxy import FaultProxy
from tests.support.servers import Server
from tests.support.servers_fixtures import through

Opener = Callable[[StorageConfig], ObjectStore]


@pytest.fixture
def proxy(seaweed_proxy: FaultProxy) -> FaultProxy:
    return seaweed_proxy


@pytest.fixture
def store(proxy: FaultProxy, seaweed_config: StorageConfig, opened: Opener) -> ObjectStore:
    """A store behind the proxy."""
    return opened(through(proxy, seaweed_config))


def ways(proxy: FaultProxy) -> list[tuple[str, bool]]:
    """The requests since the last call: their methods, and whether they went past botocore."""
    found = [(request.method, request.get("User-Agent") == "lamfs") for request in proxy.requests]
    proxy.requests.clear()
    return found


def test_hot_calls_go_past_botocore(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"data")
    etag = store.put_file("k", str(path)).etag
    assert store.head("k").size == 4
    assert store.get("k", offset=1, length=2, etag=etag) == b"at"
    store.delete(["k"])
    assert ways(proxy) == [("PUT", True), ("HEAD", True), ("GET", True), ("DELETE", True)]
    assert store._connection._boto is None  # type: ignore[attr-defined]  # nor was botocore imported


def test_unfinished_uploads_are_listed_past_botocore(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(6 << 20))
    parts = store.parts
    assert parts is not None
    ident = parts.begin_upload("a key & more")
    etag = parts.send_part("a key & more", ident, 1, str(path), 0, 6 << 20)
    assert parts.list_parts("a key & more", ident) == [PartStat(1, 6 << 20, etag.strip('"'))]
    assert [(found.key, found.id) for found in store.uploads()] == [("a key & more", ident)]
    assert list(parts.uploads_of("a key & more")) == [ident]
    parts.abort_upload("a key & more", ident)
    assert all(past for _, past in ways(proxy))


def test_botocore_says_where_the_bucket_is(proxy: FaultProxy, seaweed_config: StorageConfig, opened: Opener) -> None:
    store = opened(dataclasses.replace(through(proxy, seaweed_config), path_style=False))
    store.put_bytes("a key", b"data")
    assert store.get("a key") == b"data"
    assert ways(proxy) == [("PUT", True), ("GET", True)]


def test_another_region_is_left_to_botocore(store: ObjectStore, proxy: FaultProxy) -> None:
    store.put_bytes("k", b"data")
    ways(proxy)
    proxy.add("status", code=301, error="PermanentRedirect", method="GET")
    assert store.get("k") == b"data"
    store.put_bytes("k", b"data")
    assert ways(proxy) == [("GET", True), ("GET", False), ("PUT", False)]


@pytest.mark.parametrize(("region", "left"), [("us-east-1", False), ("eu-west-1", True)])
def test_an_error_may_name_the_region(store: ObjectStore, proxy: FaultProxy, region: str, left: bool) -> None:
    proxy.add("reply_header", name="x-amz-bucket-region", value=region, count=1)
    with pytest.raises(ObjectMissing):
        store.get("none")
    assert ("GET", False) in ways(proxy) if left else ways(proxy) == [("GET", True)]


def test_a_body_that_is_sent_elsewhere_begins_at_its_start(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path
) -> None:
    data = os.urandom(600_000)  # read as it is sent
    path = tmp_path / "f"
    path.write_bytes(data)
    proxy.add("status", code=307, error="TemporaryRedirect", method="PUT")
    etag = store.put_file("k", str(path)).etag
    assert ways(proxy)[:2] == [("PUT", True), ("PUT", False)]
    assert store.get("k", etag=etag) == data


@pytest.mark.parametrize("name", ["ETag", "Last-Modified"])
def test_an_answer_without_what_it_is_for(store: ObjectStore, proxy: FaultProxy, name: str) -> None:
    store.put_bytes("k", b"data")
    proxy.add("reply_header", name=name, value=None, count=None)
    with pytest.raises(StorageError, match=f"no '{name}'"):
        store.head("k")
    if name == "ETag":
        with pytest.raises(StorageError, match="no 'ETag'"):
            store.put_bytes("k", b"data")


def test_a_date_that_is_none(store: ObjectStore, proxy: FaultProxy) -> None:
    store.put_bytes("k", b"data")
    proxy.add("reply_header", name="Last-Modified", value="yesterday", count=2)
    with pytest.raises(StorageError, match="date"):
        store.head("k")
    assert store.get("k") == b"data", "nobody asks when it was written"


def test_a_list_that_is_cut_short_is_fetched_again(store: ObjectStore, proxy: FaultProxy) -> None:
    store.put_bytes("k", b"data")
    rule = proxy.add("truncate", keep=20, method="GET")
    assert [found.key for found in store.list()] == ["k"]
    assert rule.hits == 1


def test_a_body_that_is_not_the_range_it_says(store: ObjectStore, proxy: FaultProxy) -> None:
    store.put_bytes("k", b"data")
    rule = proxy.add("reply_header", name="Content-Range", value="bytes 0-1/4", method="GET")
    assert store.get("k", offset=0, length=4) == b"data"
    assert rule.hits == 1
    assert [method for method, _ in ways(proxy)] == ["PUT", "GET", "GET"]


@pytest.mark.parametrize("token", [(), ("same",)])
def test_a_list_that_does_not_say_how_it_goes_on(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, token: tuple[str, ...]
) -> None:
    page = Page[ObjectStat]([], True, token)
    monkeypatch.setattr(store._connection, "call", lambda *_, **__: page)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="not how to go on"):
        list(store.list())


def test_a_server_that_wants_fewer_requests_is_left_to_botocore(
    store: ObjectStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("k", b"data")
    ways(proxy)
    proxy.add("status", code=503, error="SlowDown", method="GET")
    assert store.get("k") == b"data"
    assert ways(proxy) == [("GET", True), ("GET", False)]
    monkeypatch.setattr(store._connection, "_throttled_until", 0.0)  # type: ignore[attr-defined]
    assert store.get("k") == b"data"
    assert ways(proxy) == [("GET", True)]


def test_an_http_proxy_is_left_to_botocore(
    seaweed: Server,
    proxy: FaultProxy,
    seaweed_config: StorageConfig,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "elsewhere")
    hasty = opened(dataclasses.replace(through(proxy, seaweed_config), timeout=0.3))
    with pytest.raises(StorageUnavailable):
        hasty.head("k")
    assert ways(proxy) == []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    opened(through(proxy, seaweed_config)).put_bytes("k", b"data")
    assert ways(proxy) == [("PUT", True)]


def test_a_session_token_is_signed(store: ObjectStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a token")
    with contextlib.suppress(Exception):
        store.head("k")
    request = proxy.requests[0]
    assert request.get("x-amz-security-token") == "a token"
    assert "x-amz-security-token" in (request.get("authorization") or "")


@pytest.fixture
def secured(seaweed: Server, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL of SeaweedFS behind TLS, and its certificate."""
    context, certificate = tls(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        ended = threading.Event()
        relay = threading.Thread(target=_relay_all, args=(listener, context, seaweed.port, ended))
        relay.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}", certificate
        ended.set()
        relay.join()


def _relay_all(listener: socket.socket, context: ssl.SSLContext, port: int, ended: threading.Event) -> None:
    threads = []
    while not ended.is_set():
        with contextlib.suppress(TimeoutError):
            threads.append(threading.Thread(target=_relay, args=(listener.accept()[0], context, port)))
            threads[-1].start()
    for thread in threads:
        thread.join()


def _relay(plain: socket.socket, context: ssl.SSLContext, port: int) -> None:
    with plain, contextlib.suppress(OSError):
        plain.settimeout(10)
        with (
            context.wrap_socket(plain, server_side=True) as inside,
            socket.create_connection(("127.0.0.1", port)) as out,
        ):
            back = threading.Thread(target=_pump, args=(out, inside))
            back.start()
            _pump(inside, out)
            back.join()


def _pump(source: Any, target: Any) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def test_tls(
    secured: tuple[str, Path],
    seaweed_config: StorageConfig,
    opened: Opener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, certificate = secured
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    store = opened(dataclasses.replace(seaweed_config, endpoint_url=url))
    data = os.urandom(3_000_000)
    path = tmp_path / "f"
    path.write_bytes(data)
    etag = store.put_file("k", str(path)).etag
    assert store.get("k", etag=etag) == data
    view = memoryview(bytearray(1_000_000))
    store.get_view("k", view, offset=5, etag=etag)
    assert view == data[5:1_000_005]
    assert store._connection._direct is not None  # type: ignore[attr-defined]
    store.close()


def test_a_certificate_that_nobody_trusts(
    secured: tuple[str, Path], seaweed_config: StorageConfig, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    store = opened(dataclasses.replace(seaweed_config, endpoint_url=secured[0]))
    with pytest.raises(StorageUnavailable, match="certificate verify failed"):
        store.head("k")


def test_many_objects_are_deleted_in_one_request(store: ObjectStore, proxy: FaultProxy) -> None:
    keys = ["a & b", "two\r\nlines", "<k>", "plain"]
    for key in [*keys, "two\nlines", "kept"]:
        store.put_bytes(key, b"data")
    ways(proxy)
    store.delete(keys)
    assert ways(proxy)[0] == ("POST", True)
    assert {found.key for found in store.list()} == {"kept", "two\nlines"}


def test_an_error_without_a_key_deletes_no_bucket(seaweed_config: StorageConfig, opened: Opener) -> None:
    said = b"<DeleteResult><Error><Code>AccessDenied</Code></Error></DeleteResult>"
    gone = b"HTTP/1.1 204 No Content\r\n\r\n"
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said)
    with Script([b"read", answer, b"read", gone, b"read", gone]) as server:
        store = opened(dataclasses.replace(seaweed_config, endpoint_url=f"http://127.0.0.1:{server.port}"))
        store.delete(["a", "b"])
        with pytest.raises(InvalidArgument, match="bucket"):
            store._connection.call(lambda s3: s3.delete(""), "delete")  # type: ignore[attr-defined]
        store.close()
    base = f" /{seaweed_config.root.removeprefix('s3://')}"
    asked = [head.split(" HTTP")[0].rpartition("DELETE")[2] for head in server.heads[1:]]
    assert asked == [f"{base}/a", f"{base}/b"]


def _imports(config: StorageConfig, **environment: str) -> bool:
    """Whether a process that reads an object imports botocore."""
    script = (
        "import sys\nfrom lamfs.storage import StorageConfig, open_store\n"
        f"store = open_store({config!r})\nassert store.get('k') == b'data'\nstore.close()\n"
        "print('botocore' in sys.modules)\n"
    )
    env = {**os.environ, "AWS_CONFIG_FILE": "/dev/null", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout == "True\n"


def test_botocore_is_imported_only_when_somebody_must_look_for_credentials(
    seaweed_config: StorageConfig, opened: Opener, tmp_path: Path
) -> None:
    opened(seaweed_config).put_bytes("k", b"data")
    assert not _imports(seaweed_config)
    assert _imports(dataclasses.replace(seaweed_config, path_style=False))
    settings = tmp_path / "settings"
    settings.write_text("[default]\nregion = us-east-1\n")
    assert _imports(seaweed_config, AWS_CONFIG_FILE=str(settings))
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    settings.write_text("[profile p]\n" + "".join(f"{name.lower()} = {value}\n" for name, value in keys.items()))
    other = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_PROFILE": "p", "AWS_CONFIG_FILE": str(settings)}
    assert _imports(seaweed_config, **other)
