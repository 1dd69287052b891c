"""Mounting where something else than a lock lies in the lock's place."""

from __future__ import annotations

import pytest

from lamfs.model import instance_id
from lamfs.storage import open_store
from tests.support.locks import NO_LOCKS, lock_of_another
from tests.support.mounts import MountedInstance

pytestmark = pytest.mark.usefixtures("fuse")
SOME = ["empty", "deep", "long", "until 1e300", "until NaN", "handle of two lines", "machine that is a list"]


def plant(instance: MountedInstance, body: bytes) -> None:
    store = open_store(instance.storage)
    store.put_bytes(f".lamindb/_exclusion/{instance_id(instance.slug).hex}", body)
    store.close()


def test_what_is_no_lock_hinders_no_mount(instance: MountedInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in instance.env.items():
        monkeypatch.setenv(name, value)
    instance.extend(110)
    for number, name in enumerate(SOME):
        instance.cli("close")
        instance.cli("connect", instance.slug)
        plant(instance, NO_LOCKS[name])
        (instance.directory / "lease.json").unlink(missing_ok=True)
        instance.mount()
        (instance.path / f"{number}.txt").write_text(name)
        instance.sync()
        assert (instance.path / "0.txt").read_text() == SOME[0]
        instance.umount()


def test_a_lock_of_another_is_said(instance: MountedInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in instance.env.items():
        monkeypatch.setenv(name, value)
    plant(instance, lock_of_another(until=253_370_000_000))
    (instance.directory / "lease.json").unlink()
    refused = instance.cli("mount", str(instance.path), check=False)
    assert refused.returncode == 1
    assert "is locked by eve on elsewhere" in refused.stderr
    assert "Traceback" not in refused.stderr
    instance.expect_log("is locked by eve")
