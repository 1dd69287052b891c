"""Commands where the instance's lock is none, or one of the far future: in a folder and on S3."""

from __future__ import annotations

import pytest

from lamfs.model import StorageConfig, instance_id
from lamfs.storage import open_store
from tests.component.cli.test_s3 import options
from tests.support.commands import ROOT, lamfs, quick, quick_json
from tests.support.locks import NO_LOCKS, lock_of_another

FILES = ROOT / "test-files"
SLUG = "testuser1/locked"


@pytest.fixture(params=["local", "seaweed"])
def storage(request: pytest.FixtureRequest) -> StorageConfig:
    """An instance with one file in it, which nobody has locked."""
    config: StorageConfig
    if request.param == "local":
        config = StorageConfig(str(request.getfixturevalue("tmp_path") / "store"))
        more = []
    else:
        config = request.getfixturevalue("seaweed_config")
        more = options(config)
    quick("login", "testuser1")
    quick("init", "--storage", config.root, "--name", "locked", *more)
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    quick("close")
    return config


def plant(config: StorageConfig, body: bytes) -> None:
    store = open_store(config)
    store.put_bytes(f".lamindb/_exclusion/{instance_id(SLUG).hex}", body)
    store.close()


def test_what_is_no_lock_hinders_nobody(storage: StorageConfig) -> None:
    for name, body in NO_LOCKS.items():
        plant(storage, body)
        quick("connect", SLUG)
        assert quick_json("status")["instances"][0]["slug"] == SLUG
        assert "a.csv" in quick("ls").splitlines(), name
        quick("save", FILES / "iris.data", "--key", f"{name}.data")
        assert quick("fsck").splitlines()[-1].startswith(f"{SLUG}: clean")
        quick("close")


def test_a_lock_of_the_far_future_is_said(storage: StorageConfig) -> None:
    plant(storage, lock_of_another(until=253_370_000_000))
    said = lamfs("connect", SLUG, code=1)
    assert "is locked by eve on elsewhere" in said
    assert "until 9998-12-" in said
    assert len(said.splitlines()) == 1
