"""A spool file that became an object a moment ago: it is read where it is, never written, and no link is followed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lamfs.errors import FsError, StorageError
from lamfs.fs.state import open_spool
from lamfs.storage import StorageConfig
from lamfs.storage.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    (tmp_path / "root").mkdir()
    return LocalStore(StorageConfig(str(tmp_path / "root")))


def test_the_object_is_read_and_never_written(store: LocalStore, tmp_path: Path) -> None:
    path = tmp_path / "spooled"
    path.write_bytes(b"bytes")
    store.put_file("a/k", str(path), consume=True)
    spool = open_spool(str(path), "spooled", store, "a/k")
    try:
        assert os.pread(spool.fd, 10, 0) == b"bytes"
        assert Path(spool.proc_path()).read_bytes() == b"bytes"
        with pytest.raises(OSError, match="Bad file descriptor"):
            spool.write(0, b"other")
        assert spool.path == str(path)  # what may be removed
    finally:
        spool.close()
    assert store.get("a/k") == b"bytes"


@pytest.mark.parametrize("key", ["a/k", None])
def test_a_file_that_is_nowhere(store: LocalStore, tmp_path: Path, key: str | None) -> None:
    with pytest.raises(FsError) as caught:
        open_spool(str(tmp_path / "spooled"), "spooled", store, key)
    assert caught.value.errno == errno.EIO


def test_a_link_in_the_place_of_the_object(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root/k").symlink_to(tmp_path / "secret")
    with pytest.raises(StorageError, match="is a link") as caught:
        open_spool(str(tmp_path / "spooled"), "spooled", store, "k")
    assert caught.value.errno == errno.ELOOP
