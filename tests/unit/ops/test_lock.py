"""What is read from a lock: a lock of the right types, or one that has run out."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamfs.errors import Locked
from lamfs.model import StorageConfig, instance_id
from lamfs.ops import held, lock, setup
from lamfs.ops.instance import Instance
from lamfs.storage import open_store
from tests.support.locks import GOOD, NO_LOCKS, lock_of_another

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)


def a_lease(root: Path, who: str, host: str = "host") -> lock.Lease:
    root.mkdir(exist_ok=True)
    store = open_store(StorageConfig(str(root)))
    return lock.Lease(store, instance_id("a/b"), lock.Holder(who, host, f"machine of {who}"), slug="a/b")


def is_sound(state: lock.LeaseState) -> bool:
    texts = (state.handle, state.host, state.machine, state.token)
    time.strftime("%Y-%m-%d", time.localtime(state.since))
    time.strftime("%Y-%m-%d", time.localtime(state.until))
    assert isinstance(state.fence, int)
    assert 0 <= state.fence < lock.MAX_FENCE
    assert math.isfinite(state.seconds)
    return all(isinstance(text, str) and text.isprintable() and len(text) <= lock.MAX_TEXT for text in texts) and (
        math.isfinite(state.since) and math.isfinite(state.until)
    )


@pytest.mark.parametrize("name", NO_LOCKS)
def test_what_is_no_lock_has_run_out(name: str, tmp_path: Path) -> None:
    lease = a_lease(tmp_path / "root", "ada")
    lease._store.put_bytes(lease.key, NO_LOCKS[name])
    assert lease.peek() is None
    taken, ours = lease.acquire()
    assert (taken.handle, ours) == ("ada", False)


@given(st.dictionaries(st.sampled_from([*GOOD, "fence", "seconds"]), JSON))
def test_any_values(changes: dict[str, Any]) -> None:
    assert is_sound(lock._parse(json.dumps(GOOD | changes).encode()))


@given(st.binary())
def test_any_bytes(body: bytes) -> None:
    assert is_sound(lock._parse(body))


def test_a_lock_far_in_the_future_is_one(tmp_path: Path) -> None:
    lease = a_lease(tmp_path / "root", "ada")
    lease._store.put_bytes(lease.key, lock_of_another(until=253_370_000_000))
    with pytest.raises(Locked, match=r"locked by eve on elsewhere since 2023-11-1\d \d\d:\d\d, until 9998-12-\d\d"):
        lease.acquire()


def test_no_more_than_a_lock_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size was said to be."""
    lease = a_lease(tmp_path / "root", "ada")
    stat = lease._store.put_bytes(lease.key, lock_of_another() + b" " * lock.LOCK_BYTES)
    asked: list[int] = []

    def get(key: str, *, length: int, etag: str | None = None) -> bytes:
        asked.append(length)
        return b" " * length

    monkeypatch.setattr(lease._store, "get", get)
    assert lease.peek() is None
    monkeypatch.setattr(lease._store, "head", lambda key: stat._replace(size=5))
    assert lease.peek() is None
    assert asked == [lock.LOCK_BYTES]


def test_a_machine_may_be_called_anything(tmp_path: Path) -> None:
    state, _ = a_lease(tmp_path / "root", "ada", "h\x1b\n" + "x" * 300).acquire()
    assert state.host == "h??" + "x" * 252


@pytest.mark.parametrize(
    "text",
    [b"", b"[", b"[]", b"[" * 50_000, b"\xff", b"{}", b'{"until": 1e300}', b'{"until": NaN}', b'{"until": "x"}',
     b'{"fence": 1, "seconds": 60, "at": 1e300, "boot": "", "etag": ""}', b'{"fence": true}', b" " * (2 << 20)],
)  # fmt: skip
def test_a_damaged_note_of_the_lease_is_renewed(text: bytes, tmp_path: Path) -> None:
    settings = setup.init(str(tmp_path / "root"), "a")
    path = settings.directory / "lease.json"
    path.write_bytes(text)
    with Instance.open(settings.slug) as instance:
        instance.hold()
    noted = held.read(settings.directory)
    assert noted is not None
    assert noted.holds
    assert noted.seconds == lock.LEASE_SECONDS
