"""Roots and keys as people type them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamfs.errors import InvalidArgument, InvalidName
from lamfs.storage import StorageConfig, open_store, parse_root
from lamfs.storage.base import MultipartStore, ObjectStore
from lamfs.storage.local import LocalStore
from lamfs.storage.root import check_object_key, is_s3, split_s3
from lamfs.storage.s3 import S3Store
from lamfs.storage.s3.multipart import S3Parts


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        (" s3://bucket/a/b/ ", "s3://bucket/a/b"),
        ("S3://bucket/a", "s3://bucket/a"),
        ("s3://lamindb-ci/test-add-replace-stage", "s3://lamindb-ci/test-add-replace-stage"),
        ("s3://b.u-c.ket/ä ö", "s3://b.u-c.ket/ä ö"),
        ("/data/folder", "/data/folder"),
        ("/data//folder/../x/", "/data/x"),
        ("file:///data/folder", "/data/folder"),
        ("~/folder", f"{Path.home()}/folder"),
        ("folder", f"{os.getcwd()}/folder"),
    ],
)
def test_normal_form(text: str, root: str) -> None:
    assert parse_root(text) == root
    assert parse_root(root) == root


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("/", "whole machine"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://a", "no bucket name"),
        ("s3://under score/x", "no bucket name"),
        ("s3://bu..cket", "no bucket name"),
        ("s3://-bucket", "no bucket name"),
        ("s3://bucket//x", "empty part"),
        ("s3://bucket/a/../b", "empty part"),
        ("s3://bucket?endpoint_url=x", "options"),
        ("gs://bucket/x", "'gs'"),
        ("https://server/bucket", "'https'"),
        ("file://host/x", "'file'"),
        ("/a\0b", "control characters"),
        ("/a\nb", "control characters"),
        ("/a\udcff", "UTF-8"),
    ],
)
def test_what_is_no_root(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason) as caught:
        parse_root(text)
    assert str(caught.value).endswith(".")


@given(st.text())
def test_any_text_is_refused_or_normal(text: str) -> None:
    try:
        root = parse_root(text)
    except InvalidArgument:
        return
    assert parse_root(root) == root
    assert is_s3(root) or os.path.isabs(root)
    assert not root.endswith("/")


@given(st.text(max_size=30), st.booleans())
def test_any_key_stays_below_the_root(key: str, as_path: bool) -> None:
    try:
        assert check_object_key(key, as_path=as_path) == key
    except InvalidName:
        return
    assert f"{os.path.normpath(f'/root/{key}')}/".startswith("/root/")
    if as_path:
        assert os.path.normpath(f"/root/{key}") == f"/root/{key}"


def test_parts_of_a_bucket_root() -> None:
    assert split_s3("s3://bucket") == ("bucket", "")
    assert split_s3("s3://bucket/a/b") == ("bucket", "a/b")


def test_the_root_says_which_store(tmp_path: Path) -> None:
    local = open_store(StorageConfig(str(tmp_path)))
    assert isinstance(local, LocalStore)
    assert (local.kind, local.cache_name) == ("local", str(tmp_path).lstrip("/"))
    assert local.parts is None
    s3 = open_store(StorageConfig("s3://bucket/prefix"))
    assert (s3.kind, s3.cache_name, s3.url("k/l")) == ("s3", "bucket/prefix", "s3://bucket/prefix/k/l")
    assert s3.parts is not None
    s3.close()


@pytest.mark.parametrize(
    ("protocol", "store"),
    [(ObjectStore, LocalStore), (ObjectStore, S3Store), (MultipartStore, S3Parts)],
)
def test_a_store_has_each_method_itself(protocol: type, store: type) -> None:
    """None is made up as it is asked for, where no reader and no type checker would see it."""
    assert {name for name in vars(protocol) if not name.startswith("_")} <= set(vars(store))
    assert "__getattr__" not in vars(store)


def test_names_of_objects_need_no_http() -> None:
    """A mount's first process only needs those."""
    script = (
        "import sys\nfrom lamfs.storage import StorageConfig, open_store\n"
        "store = open_store(StorageConfig('s3://bucket/prefix', endpoint_url='http://127.0.0.1:1', path_style=True))\n"
        "assert store.url('k') == 's3://bucket/prefix/k' and store.parts and not store.on_disk\n"
        "heavy = {'http.client', 'ssl', 'xml.etree.ElementTree', 'botocore', 'concurrent.futures.thread'}\n"
        "store.close()\nsys.exit(' '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_what_a_storage_can_do(tmp_path: Path) -> None:
    for root, is_folder in ((str(tmp_path), True), ("s3://bucket", False)):
        store = open_store(StorageConfig(root))
        assert (store.on_disk, store.imports_files, store.parts is None) == (is_folder,) * 3
