"""A spool file that became an object a moment ago: it is read where it is, never written, and no link is followed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import FsError, StorageError
from lamfs.fs.state import open_spool
from lamfs.keys import spool_name
from lamfs.spool import SpoolFolder
from lamfs.storage import StorageConfig
from lamfs.storage.local import LocalStore

NAME = spool_name(5)


@pytest.fixture
def spool_folder(tmp_path: Path) -> Iterator[SpoolFolder]:
    with SpoolFolder.make(tmp_path, ("spool",)) as folder:
        yield folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    (tmp_path / "root").mkdir()
    return LocalStore(StorageConfig(str(tmp_path / "root")))


def test_the_object_is_read_and_never_written(store: LocalStore, spool_folder: SpoolFolder) -> None:
    with open(spool_folder.open(NAME, os.O_RDWR | os.O_CREAT), "wb") as file:
        file.write(b"bytes")
    store.put_file("a/k", spool_folder.path(NAME), consume=True)
    spool = open_spool(spool_folder, NAME, store, "a/k")
    try:
        assert os.pread(spool.fd, 10, 0) == b"bytes"
        with pytest.raises(OSError, match="Bad file descriptor"):
            spool.write(0, b"other")
    finally:
        spool.close()
    assert store.get("a/k") == b"bytes"


@pytest.mark.parametrize("key", ["a/k", None])
def test_a_file_that_is_nowhere(store: LocalStore, spool_folder: SpoolFolder, key: str | None) -> None:
    with pytest.raises(FsError) as caught:
        open_spool(spool_folder, NAME, store, key)
    assert caught.value.errno == errno.EIO


def test_a_link_in_the_place_of_the_object(store: LocalStore, spool_folder: SpoolFolder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root/k").symlink_to(tmp_path / "secret")
    with pytest.raises(StorageError, match="is a link") as caught:
        open_spool(spool_folder, NAME, store, "k")
    assert caught.value.errno == errno.ELOOP
