"""A server that answers, but so slowly that nobody lives to see the end: it has a time in which it must come to it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lamfs.errors import StorageUnavailable
from lamfs.storage.s3 import client
from lamfs.storage.s3.slow import SLOWEST
from lamfs.storage.s3.store import S3Store
from tests.support.hostile import Answer, HostileServer, dripping, tls

TIMEOUT = 1.0
LONGEST = 8.0
"""Seconds. Two tries take twice 0.9 s."""
ENDLESS = 100_000


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def drip(start: bytes, rest: bytes, size: int = 1) -> Answer:
    """``start`` at once, and then 20 times a second ``size`` bytes of ``rest``."""
    return lambda *_: itertools.chain([start], dripping(rest, size, 0.05))


HEAD = b"HTTP/1.1 206 Partial\r\netag: e\r\ncontent-range: bytes 0-99999/100000\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
OBJECT = HEAD + b"content-length: 100000\r\n\r\n"
SPACES = b" " * ENDLESS
DRIPS: dict[str, Answer] = {
    "a status": drip(b"H", b"TTP/1.1 200 OK\r\n" + b"x: y\r\n" * 90),
    "a head": drip(HEAD, b"x: y\r\n" * 90),
    "a head whose lines are long": drip(HEAD, (b"x: " + b"y" * 60_000 + b"\r\n") * 90, 4000),
    "interim answers": drip(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 90),
    "a body": drip(OBJECT, SPACES),
    "a body to the end": drip(HEAD + b"connection: close\r\n\r\n", SPACES),
    "a body that begins well": drip(OBJECT + b" " * 9_000, SPACES),
    "a refusal": drip(b"HTTP/1.1 403 No\r\ncontent-length: 9999\r\n\r\n", SPACES),
    "a chunk": drip(CHUNKED + b"ffff\r\n", SPACES),
    "chunks": drip(CHUNKED, b"1\r\n \r\n" * 9_000),
    "the size of a chunk": drip(CHUNKED, b"1;" + b"x" * 60_000),
    "trailers": drip(CHUNKED + b"1\r\n \r\n0\r\n", b"t: " + b"x" * 4_000),
}


def opened(server: HostileServer, way: str = "direct") -> S3Store:
    store = S3Store(server.config(timeout=TIMEOUT))
    if way == "botocore":
        store._connection._looked = True  # and found no other
    return store


@pytest.mark.parametrize("way", ["direct", "botocore"])
@pytest.mark.parametrize("name", DRIPS)
def test_a_reply_that_drips_is_none(name: str, way: str) -> None:
    with HostileServer(DRIPS[name]) as server:
        store = opened(server, way)
        store.prepare()
        for action in (lambda: list(store.list()), lambda: store.get("k", length=ENDLESS, etag="e")):
            began = time.monotonic()
            with pytest.raises(StorageUnavailable, match="too slowly" if way == "direct" else None):
                action()
            assert time.monotonic() - began < LONGEST
        store.close()


@pytest.mark.parametrize("way", ["direct", "botocore"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_slow_server_is_served_to_the_end(way: str, chunked: bool) -> None:
    """4 KiB a second, for several times as long as a slower one is borne."""
    data = bytes(range(256)) * 64
    body = b"4000\r\n" + data + b"\r\n0\r\n\r\n" if chunked else data
    head = (CHUNKED if chunked else OBJECT).replace(b"100000", b"16384").replace(b"99999", b"16383")
    with HostileServer(drip(head, body, 205)) as server:
        store = opened(server, way)
        assert store.get("k", length=len(data), etag="e") == data
        assert len(server.requests) == 1
        store.close()


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, certificate = tls(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    for name in ("a head", "a body", "chunks"):
        with HostileServer(DRIPS[name], context) as server:
            store = opened(server)
            began = time.monotonic()
            with pytest.raises(StorageUnavailable, match="too slowly"):
                store.get("k", length=ENDLESS, etag="e")
            assert time.monotonic() - began < LONGEST
            store.close()


@pytest.mark.parametrize(("rate", "tries"), [(SLOWEST // 2, client.ATTEMPTS), (SLOWEST * 2, 100)])
def test_only_progress_that_is_fast_enough_renews_patience(
    rate: int, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(client, "time", clock)
    patience = client.Patience(10_000)
    last, done = now[0], 0
    try:
        for _ in range(100):
            now[0] += 1
            patience.progressed(int(rate * (now[0] - last)))
            last = now[0]
            done += 1
            patience.wait(StorageUnavailable("no"))
    except StorageUnavailable:
        pass
    assert done == tries


@pytest.mark.parametrize(("silence", "tries"), [(27.0, 2), (0.0, client.ATTEMPTS), (70.0, 1)])
def test_a_server_that_is_silent_is_not_waited_for_longer_than_an_operation_may_take(
    silence: float, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'lamfs delete-instance' waited for 82 s: a third try was begun at the end of the second."""
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(client, "time", clock)
    patience = client.Patience(60)
    for _ in range(tries - 1):
        now[0] += silence
        patience.wait(StorageUnavailable("no"))
    now[0] += silence
    with pytest.raises(StorageUnavailable):
        patience.wait(StorageUnavailable("no"))
