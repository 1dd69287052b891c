"""S3Store against a network and a server that fail: through the proxy, and with the server stopped or killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamfs.errors import (
    ObjectChanged,
    PreconditionFailed,
    StorageFull,
    StorageUnavailable,
)
from lamfs.storage import ObjectStore, StorageConfig
from lamfs.storage.s3 import client
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


@pytest.fixture
def hasty(proxy: FaultProxy, seaweed_config: StorageConfig, opened: Opener) -> ObjectStore:
    """A store that bears little silence."""
    return opened(through(proxy, seaweed_config, timeout=0.8))


@pytest.fixture
def target(tmp_path: Path) -> int:
    """A descriptor to fetch into; closed with the test."""
    stream = (tmp_path / "target").open("w+b")
    yield stream.fileno()  # type: ignore[misc]
    stream.close()


def _get_views(store: ObjectStore, offset: int, length: int, etag: str | None) -> bytes:
    """In pieces of odd sizes; what has no ETag cannot be fetched so."""
    got = bytearray()

    def views() -> Iterator[memoryview]:
        place = memoryview(bytearray(300_007))
        while len(got) < length:
            with place[: min(len(place), length - len(got))] as view:
                yield view
                got.extend(view)

    store.get_views("k", views(), offset=offset, length=length, etag=etag or store.head("k").etag)
    return bytes(got)


@pytest.mark.parametrize("etag_known", [True, False])
@pytest.mark.parametrize("kind", ["truncate", "reset"])
def test_a_body_that_is_cut_short(
    store: ObjectStore, proxy: FaultProxy, target: int, kind: str, etag_known: bool
) -> None:
    data = os.urandom(2_500_000)
    etag = store.put_bytes("k", data).etag
    if not etag_known:
        etag = None  # type: ignore[assignment]
    options = {"keep": 1_200_000} if kind == "truncate" else {"after": 1_200_000}
    for act in (
        lambda: store.get("k", etag=etag),
        lambda: store.get("k", offset=17, length=2_000_000, etag=etag),
        lambda: store.get_into("k", target, offset=17, length=2_000_000, etag=etag),
        lambda: _get_views(store, 17, 2_000_000, etag),
    ):
        rule = proxy.add(kind, method="GET", count=2, **options)  # type: ignore[arg-type]
        result = act()
        assert rule.hits == 2
        proxy.clear()
        if result is not None:
            assert result in (data, data[17:2_000_017])
    assert os.pread(target, 3_000_000, 17) == data[17:2_000_017]


def test_progress_renews_patience(store: ObjectStore, proxy: FaultProxy) -> None:
    data = os.urandom(1_200_000)
    etag = store.put_bytes("k", data).etag
    rule = proxy.add("truncate", method="GET", count=client.ATTEMPTS + 3, keep=100_000)
    assert store.get("k", etag=etag) == data
    assert rule.hits == client.ATTEMPTS + 3


def test_each_read_names_its_revision(store: ObjectStore, proxy: FaultProxy) -> None:
    """A server that honours If-Match never sends bytes of another revision."""
    etag = store.put_bytes("k", b"data").etag
    store.get("k", etag=etag)
    store.get("k", offset=1, length=2, etag=etag)
    conditions = [request.get("If-Match") for request in proxy.requests if request.method == "GET"]
    assert conditions == [f'"{etag}"'] * 2


def test_an_empty_body_is_not_the_end(store: ObjectStore, proxy: FaultProxy) -> None:
    etag = store.put_bytes("k", b"0123456789").etag
    rule = proxy.add("truncate", method="GET", count=3, keep=0)
    assert store.get("k", offset=2, length=5, etag=etag) == b"23456"
    assert rule.hits == 3


def test_a_body_that_is_always_cut_short(hasty: ObjectStore, proxy: FaultProxy) -> None:
    etag = hasty.put_bytes("k", b"0123456789").etag
    proxy.add("truncate", method="GET", count=None, keep=0)
    with pytest.raises(StorageUnavailable):
        hasty.get("k", etag=etag)


def test_resuming_never_splices(
    store: ObjectStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, target: int
) -> None:
    """The object is replaced between the two halves of a read."""
    old, new = b"o" * 400_000, b"n" * 400_000
    sleep = client.time.sleep  # type: ignore[attr-defined]

    def replace_meanwhile(seconds: float) -> None:
        store.put_bytes("k", new)
        sleep(seconds)

    etag = store.put_bytes("k", old).etag
    monkeypatch.setattr(client.time, "sleep", replace_meanwhile)  # type: ignore[attr-defined]
    proxy.add("truncate", method="GET")
    with pytest.raises(ObjectChanged):
        store.get("k", etag=etag)

    store.put_bytes("k", old)
    cut = proxy.add("truncate", method="GET")
    assert store.get("k") == new
    assert cut.hits == 1

    store.put_bytes("k", old)
    cut = proxy.add("truncate", method="GET")
    store.get_into("k", target, offset=0, length=400_000)
    assert cut.hits == 1
    assert os.pread(target, 500_000, 0) == new


def test_a_storm_of_503(store: ObjectStore, proxy: FaultProxy) -> None:
    storm = proxy.add("status", code=503, error="ServiceUnavailable", count=4)
    etag = store.put_bytes("k", b"data").etag
    assert storm.hits == 4
    for code, error in (
        (500, "InternalError"),
        (502, ""),
        (504, ""),
        (429, "TooManyRequests"),
        (408, "RequestTimeout"),
    ):
        rule = proxy.add("status", code=code, error=error)
        assert store.get("k", etag=etag) == b"data"
        assert rule.hits == 1


def test_slow_down(store: ObjectStore, proxy: FaultProxy) -> None:
    rule = proxy.add("status", code=503, error="SlowDown", count=1)
    store.put_bytes("k", b"data")
    assert rule.hits == 1
    assert store.get("k") == b"data"


def test_a_storm_that_does_not_end(hasty: ObjectStore, proxy: FaultProxy) -> None:
    proxy.add("status", code=503, error="ServiceUnavailable", count=None)
    with pytest.raises(StorageUnavailable, match="busy or failing") as caught:
        hasty.put_bytes("k", b"data")
    assert caught.value.retryable


def test_resets(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    (tmp_path / "f").write_bytes(data)
    rule = proxy.add("reset", method="PUT", count=2)
    stored = store.put_file("k", str(tmp_path / "f"))
    assert rule.hits == 2
    rule = proxy.add("reset", count=2)
    assert store.get("k", etag=stored.etag) == data
    assert rule.hits == 2
    rule = proxy.add("reset", count=1)
    assert [entry.key for entry in store.list()] == ["k"]
    assert rule.hits == 1
    rule = proxy.add("reset", count=2)
    store.copy("k", "l")
    store.delete(["k", "l"])
    assert rule.hits == 2
    assert list(store.list()) == []


def test_a_lost_reply_to_a_plain_write(store: ObjectStore, proxy: FaultProxy) -> None:
    rule = proxy.add("lost_reply", method="PUT")
    etag = store.put_bytes("k", b"data").etag
    assert rule.hits == 1
    assert store.get("k", etag=etag) == b"data"


def test_a_lost_reply_to_a_creation(store: ObjectStore, proxy: FaultProxy) -> None:
    rule = proxy.add("lost_reply", method="PUT")
    stored = store.put_bytes("lock", b"token of this owner", if_none_match=True)
    assert rule.hits == 1
    assert [request.status for request in proxy.requests if request.method == "PUT"] == [200, 412]
    assert store.get("lock", etag=stored.etag) == b"token of this owner"
    with pytest.raises(PreconditionFailed):
        store.put_bytes("lock", b"token of another", if_none_match=True)


def test_a_lost_reply_to_a_guarded_replacement(store: ObjectStore, proxy: FaultProxy) -> None:
    first = store.put_bytes("lock", b"lease 1").etag
    rule = proxy.add("lost_reply", method="PUT")
    second = store.put_bytes("lock", b"lease 2", if_match=first).etag
    assert rule.hits == 1
    assert store.get("lock", etag=second) == b"lease 2"


def test_a_lost_reply_to_a_guarded_replacement_by_a_file(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    first = store.put_bytes("k", b"one").etag
    (tmp_path / "file").write_bytes(b"two, longer")
    rule = proxy.add("lost_reply", method="PUT")
    second = store.put_file("k", str(tmp_path / "file"), if_match=first).etag
    assert rule.hits == 1
    assert [request.status for request in proxy.requests if request.method == "PUT"][-1] == 412
    assert store.get("k", etag=second) == b"two, longer"


def test_a_creation_that_somebody_else_won(store: ObjectStore, proxy: FaultProxy) -> None:
    """A reset before the server saw anything, and meanwhile another owner: then 412 does mean somebody else."""
    store.put_bytes("lock", b"another")
    proxy.add("reset", method="PUT")
    with pytest.raises(PreconditionFailed):
        store.put_bytes("lock", b"mine", if_none_match=True)
    assert store.get("lock") == b"another"


def test_a_conflict_is_tried_again(store: ObjectStore, proxy: FaultProxy) -> None:
    """Amazon answers 409 to conditional writes that meet."""
    rule = proxy.add("status", code=409, error="ConditionalRequestConflict", method="PUT", count=2)
    store.put_bytes("lock", b"mine", if_none_match=True)
    assert rule.hits == 2


def test_a_lost_reply_to_a_deletion(store: ObjectStore, proxy: FaultProxy) -> None:
    store.put_bytes("k", b"x")
    rule = proxy.add("lost_reply", method="DELETE")
    store.delete(["k"])
    assert rule.hits == 1
    assert list(store.list()) == []


def test_a_reply_of_another_revision(store: ObjectStore, proxy: FaultProxy) -> None:
    etag = store.put_bytes("k", b"data").etag
    proxy.add("reply_header", method="GET", name="ETag", value='"ffffffffffffffffffffffffffffffff"')
    with pytest.raises(ObjectChanged):
        store.get("k", etag=etag)
    assert store.get("k", etag=etag) == b"data"


@pytest.mark.parametrize("value", ["bytes 0-3/10", "bytes 3-6/*", "rubbish", None])
def test_another_range_than_asked(store: ObjectStore, hasty: ObjectStore, proxy: FaultProxy, value: str | None) -> None:
    etag = store.put_bytes("k", b"0123456789").etag
    once = proxy.add("reply_header", method="GET", name="Content-Range", value=value)
    assert store.get("k", offset=3, length=4, etag=etag) == b"3456"
    assert once.hits == 1
    proxy.add("reply_header", method="GET", name="Content-Range", value=value, count=None)
    with pytest.raises(StorageUnavailable, match="were asked for"):
        hasty.get("k", offset=3, length=4, etag=etag)


def test_a_server_that_ignores_ranges(
    ministack: Server, ministack_config: StorageConfig, opened: Opener, target: int
) -> None:
    data = os.urandom(1_500_000)
    with FaultProxy(ministack.port) as proxy:
        store = opened(through(proxy, ministack_config))
        etag = store.put_bytes("k", data).etag
        rule = proxy.add("strip", name="Range", method="GET", count=None)
        assert store.get("k", offset=1_200_000, length=1000, etag=etag) == data[1_200_000:1_201_000]
        assert store.get("k", offset=1_499_999, etag=etag) == data[-1:]
        store.get_into("k", target, offset=5, length=1_499_995, etag=etag)
        assert os.pread(target, 2_000_000, 5) == data[5:]
        assert store.get("k", offset=2_000_000, length=5, etag=etag) == b""
        assert rule.hits == 4


def test_a_server_that_says_nothing(hasty: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    hasty.put_bytes("k", b"data")
    silent = proxy.add("hang", count=None)
    for act in (
        lambda: hasty.get("k"),
        lambda: hasty.head("k"),
        lambda: hasty.put_file("k", str(tmp_path / "f")),
    ):
        with pytest.raises(StorageUnavailable, match="did not answer"):
            act()
    assert silent.hits >= 3
    proxy.clear()
    assert hasty.get("k") == b"data"


def test_one_request_without_an_answer(hasty: ObjectStore, proxy: FaultProxy) -> None:
    hasty.put_bytes("k", b"data")
    rule = proxy.add("hang", method="GET", count=1)
    assert hasty.get("k") == b"data"
    assert rule.hits == 1


def test_a_slow_server_is_not_a_dead_one(hasty: ObjectStore, proxy: FaultProxy) -> None:
    rule = proxy.add("delay", seconds=0.2, count=None)
    hasty.put_bytes("k", b"data")
    assert hasty.get("k") == b"data"
    assert rule.hits == 2


def test_a_stopped_server(seaweed: Server, seaweed_config: StorageConfig, hasty: ObjectStore) -> None:
    hasty.put_bytes("k", b"data")
    seaweed.pause()
    try:
        with pytest.raises(StorageUnavailable):
            hasty.get("k")
    finally:
        seaweed.resume()
    assert hasty.get("k") == b"data"


def test_a_cut_that_heals(store: ObjectStore, proxy: FaultProxy) -> None:
    store.put_bytes("k", b"data")
    proxy.cut()
    timer = threading.Timer(0.5, proxy.heal)
    timer.start()
    try:
        assert store.get("k") == b"data"
    finally:
        timer.join()


def test_a_killed_server_keeps_what_it_confirmed(
    seaweed: Server, seaweed_config: StorageConfig, opened: Opener
) -> None:
    store = opened(seaweed_config)
    etag = store.put_bytes("k", b"confirmed").etag
    seaweed.kill()
    seaweed.restart()
    assert store.get("k", etag=etag) == b"confirmed"
    store.put_bytes("k", b"after")
    assert store.get("k") == b"after"


@pytest.mark.parametrize(
    ("code", "error"), [(507, "InsufficientStorage"), (507, ""), (503, "XMinioStorageFull"), (403, "QuotaExceeded")]
)
def test_a_full_server(store: ObjectStore, proxy: FaultProxy, code: int, error: str) -> None:
    rule = proxy.add("status", code=code, error=error, method="PUT", count=None)
    with pytest.raises(StorageFull, match="no space is left"):
        store.put_bytes("k", b"data")
    assert rule.hits == 1


def test_damage_on_the_way_is_passed_on(store: ObjectStore, proxy: FaultProxy) -> None:
    """Bytes that are wrong under a right length and ETag are not storage's to find: the block hashes find them."""
    etag = store.put_bytes("k", b"data").etag
    proxy.add("corrupt", method="GET")
    assert store.get("k", etag=etag) == bytes([ord("d") ^ 0xFF]) + b"ata"
