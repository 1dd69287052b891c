"""Stores of each kind, closed after the test."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamfs.storage import ObjectStore, StorageConfig, open_store
from lamfs.storage.local import LocalStore
from lamfs.storage.s3 import S3Store

Opener = Callable[[StorageConfig], ObjectStore]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens stores, and closes them at the end."""
    stores: list[ObjectStore] = []

    def open_one(config: StorageConfig) -> ObjectStore:
        stores.append(open_store(config))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty storage folder."""
    path = tmp_path / "storage"
    path.mkdir()
    return path


@pytest.fixture
def local(folder: Path) -> LocalStore:
    """A store in ``folder``."""
    return LocalStore(StorageConfig(str(folder)))


@pytest.fixture(params=["local", "seaweed", "botocore", "ministack"])
def store(request: pytest.FixtureRequest, opened: Opener) -> ObjectStore:
    """A store of every kind that lamfs supports, its root empty. ``botocore``: one whose requests all go that way."""
    if request.param == "local":
        found: ObjectStore = request.getfixturevalue("local")
        return found
    if request.param == "botocore":
        store = opened(request.getfixturevalue("seaweed_config"))
        assert isinstance(store, S3Store)
        store._connection._looked = True  # and found no direct way
        return store
    return opened(request.getfixturevalue(f"{request.param}_config"))


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes a new file outside of the storage."""

    def make(data: bytes) -> Path:
        path = tmp_path / f"file-{secrets.token_hex(4)}"
        path.write_bytes(data)
        return path

    return make
