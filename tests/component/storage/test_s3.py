"""S3Store beyond the contract: large objects, server-side copies, buckets that are not as they should be."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from lamfs.errors import (
    InvalidArgument,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageForbidden,
    StorageMissing,
    StorageReadOnly,
    StorageUnavailable,
)
from lamfs.storage import ObjectStore, StorageConfig
from lamfs.storage.s3 import client, multipart, upload
from tests.support.proxy import FaultProxy
from tests.support.servers import SeaweedServer, Server
from tests.support.servers_fixtures import BUCKET, through

Opener = Callable[[StorageConfig], ObjectStore]
MakeFile = Callable[[bytes], Path]
MIB = 1 << 20


def uploads_left(server: Server, config: StorageConfig) -> list[str]:
    """Multipart uploads below this test's root that nobody completed or aborted: others may have left some."""
    prefix = config.root.removeprefix(f"s3://{BUCKET}/")
    with server.client() as client:
        found = [entry["Key"] for entry in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]
    return [key for key in found if key.startswith(prefix)]


def use(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    """Make these the credentials of the environment."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)


# large objects


def test_a_large_file_in_parts(seaweed_config: StorageConfig, opened: Opener, tmp_path: Path) -> None:
    store = opened(seaweed_config)
    size = 70 * MIB + 12345
    path = tmp_path / "large"
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for start in range(0, size, MIB):
            block = os.urandom(min(MIB, size - start))
            digest.update(block)
            stream.write(block)
    moved: list[int] = []
    stored = store.put_file("large/ü.bin", str(path), progress=moved.append)
    assert sum(moved) == size
    assert len(moved) == 5
    assert store.head("large/ü.bin") == stored._replace(mtime_ns=store.head("large/ü.bin").mtime_ns)

    copied = store.copy("large/ü.bin", "large/copy", etag=stored.etag)
    back = os.open(tmp_path / "back", os.O_RDWR | os.O_CREAT)
    try:
        for start in range(0, size, 8 * MIB):
            length = min(8 * MIB, size - start)
            store.get_into("large/copy", back, offset=start, length=length, etag=copied.etag)
        assert os.fstat(back).st_size == size
    finally:
        os.close(back)
    with (tmp_path / "back").open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").digest() == digest.digest()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multipart from 6 MiB on, in parts of 5 MiB (Amazon's least), so that tests need little data."""
    for name, value in (("MULTIPART_ABOVE", 6), ("PART_SIZE", 5), ("COPY_LIMIT", 6), ("COPY_PART_SIZE", 5)):
        monkeypatch.setattr(multipart, name, value * MIB)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["seaweed", "ministack"])
def test_a_copy_in_parts(request: pytest.FixtureRequest, opened: Opener, make_file: MakeFile, kind: str) -> None:
    store = opened(request.getfixturevalue(f"{kind}_config"))
    data = os.urandom(11 * MIB + 7)
    stored = store.put_file("from +ä", str(make_file(data)))
    copied = store.copy("from +ä", "to", etag=stored.etag)
    assert copied.size == len(data)
    assert store.get("to", etag=copied.etag) == data
    with pytest.raises(ObjectChanged):
        store.copy("from +ä", "to", etag="0" * 32)


def test_size_of_parts() -> None:
    assert multipart.part_size_for(70 * MIB, 16 * MIB) == 16 * MIB
    for size in (160_000 * MIB, 160_000 * MIB + 1, 5 << 40):
        part = multipart.part_size_for(size, 16 * MIB)
        assert -(-size // part) <= multipart.MAX_PARTS
        assert part % MIB == 0


@pytest.mark.usefixtures("small_parts")
def test_a_failed_upload_leaves_nothing(
    seaweed: Server, seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener, make_file: MakeFile
) -> None:
    store = opened(through(seaweed_proxy, seaweed_config))
    store.put_bytes("k", b"the old revision")
    refused = seaweed_proxy.add("status", code=403, error="AccessDenied", method="PUT", path="partNumber=3", count=None)
    with pytest.raises(StorageForbidden, match=BUCKET):
        store.put_file("k", str(make_file(bytes(22 * MIB))))
    assert refused.hits == 1
    assert store.get("k") == b"the old revision"
    assert uploads_left(seaweed, seaweed_config) == []


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [5 * MIB, 12 * MIB])
def test_a_file_that_becomes_shorter(
    seaweed: Server,
    seaweed_config: StorageConfig,
    seaweed_proxy: FaultProxy,
    opened: Opener,
    make_file: MakeFile,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    store = opened(through(seaweed_proxy, seaweed_config))
    path = make_file(bytes(size))
    preadv = os.preadv

    def shrinking(fd: int, places: list[memoryview], offset: int) -> int:
        os.truncate(path, 4 * MIB)
        return preadv(fd, places, offset)

    monkeypatch.setattr(upload.os, "preadv", shrinking)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="ended at byte") as caught:
        store.put_file("k", str(path))
    assert not isinstance(caught.value, StorageUnavailable)
    assert list(store.list()) == []
    assert uploads_left(seaweed, seaweed_config) == []


@pytest.mark.usefixtures("small_parts")
def test_a_completion_whose_reply_is_lost(
    seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener, make_file: MakeFile
) -> None:
    store = opened(through(seaweed_proxy, seaweed_config))
    data = os.urandom(11 * MIB)
    lost = seaweed_proxy.add("lost_reply", method="POST", path="uploadId=")
    stored = store.put_file("k", str(make_file(data)))
    assert lost.hits == 1
    assert store.get("k", etag=stored.etag) == data


@pytest.mark.usefixtures("small_parts")
def test_a_completion_that_was_lost_and_is_gone(
    seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener, make_file: MakeFile
) -> None:
    """Amazon answers NoSuchUpload to a repeated completion: the object must then be found, not stored again."""
    store = opened(through(seaweed_proxy, seaweed_config))
    data = os.urandom(11 * MIB)
    seaweed_proxy.add("lost_reply", method="POST", path="uploadId=")
    gone = seaweed_proxy.add("status", code=404, error="NoSuchUpload", method="POST", path="uploadId=")
    stored = store.put_file("k", str(make_file(data)))
    assert gone.hits == 1
    assert store.get("k", etag=stored.etag) == data


def test_parts_become_an_object_on_a_condition(
    seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener, make_file: MakeFile
) -> None:
    """Where the server knows the condition, as SeaweedFS does; also when the reply is lost."""
    store = opened(through(seaweed_proxy, seaweed_config))
    parts = store.parts
    assert parts is not None
    old = store.put_bytes("k", b"old").etag
    data = os.urandom(5 * MIB)
    path = str(make_file(data))
    upload = parts.begin_upload("k")
    etags = [parts.send_part("k", upload, 1, path, 0, len(data))]
    with pytest.raises(PreconditionFailed, match="was changed or removed by somebody else"):
        parts.complete_upload("k", upload, etags, if_match="0" * 32)
    assert store.get("k") == b"old"
    lost = seaweed_proxy.add("lost_reply", method="POST", path="uploadId=")
    new = parts.complete_upload("k", upload, etags, if_match=old)
    assert lost.hits == 1
    assert store.get("k", etag=new) == data
    upload = parts.begin_upload("k")
    etags = [parts.send_part("k", upload, 1, path, 0, len(data) - 1)]
    with pytest.raises(PreconditionFailed, match="is there already"):
        parts.complete_upload("k", upload, etags, if_none_match=True)
    upload = parts.begin_upload("n")
    etags = [parts.send_part("n", upload, 1, path, 0, len(data))]
    lost = seaweed_proxy.add("lost_reply", method="POST", path="uploadId=")
    assert store.get("n", etag=parts.complete_upload("n", upload, etags, if_none_match=True)) == data
    assert store.get("k", etag=new) == data
    assert lost.hits == 1


@pytest.mark.usefixtures("small_parts")
def test_an_upload_that_is_gone_was_not_stored(
    seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener, make_file: MakeFile
) -> None:
    store = opened(through(seaweed_proxy, seaweed_config))
    store.put_bytes("k", b"somebody else's")
    seaweed_proxy.add("status", code=503, method="POST", path="uploadId=")
    seaweed_proxy.add("status", code=404, error="NoSuchUpload", method="POST", path="uploadId=", count=None)
    with pytest.raises(StorageUnavailable, match="store it again"):
        store.put_file("k", str(make_file(bytes(11 * MIB))))
    assert store.get("k") == b"somebody else's"


# many objects


def test_more_objects_than_a_page_or_a_batch(ministack_config: StorageConfig, opened: Opener) -> None:
    store = opened(ministack_config)
    keys = [f"many/{number:05}" for number in range(1010)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put_bytes(key, b"x"), keys))
    assert sorted(entry.key for entry in store.list()) == keys
    store.delete(keys)
    assert list(store.list()) == []


@pytest.mark.parametrize(("code", "error"), [(501, "NotImplemented"), (400, "MissingContentMD5")])
def test_a_server_without_batches(
    seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener, code: int, error: str
) -> None:
    store = opened(through(seaweed_proxy, seaweed_config))
    for key in "abc":
        store.put_bytes(key, b"x")
    batch = seaweed_proxy.add("status", code=code, error=error, method="POST", path="delete", count=None)
    store.delete(["a", "b", "never"])
    assert [entry.key for entry in store.list()] == ["c"]
    store.delete(["c", "d"])
    assert list(store.list()) == []
    assert batch.hits == (1 if code == 501 else 2)


@pytest.mark.parametrize("kind", ["seaweed", "ministack"])
def test_unfinished_uploads_are_listed_and_aborted(request: pytest.FixtureRequest, opened: Opener, kind: str) -> None:
    config: StorageConfig = request.getfixturevalue(f"{kind}_config")
    server: Server = request.getfixturevalue(kind)
    store, neighbour = opened(config), opened(dataclasses.replace(config, root=config.root + "-not"))
    prefix = config.root.removeprefix(f"s3://{BUCKET}/")
    begun = time.time_ns()
    with server.client() as client:
        started = {
            key: client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}{key}")["UploadId"]
            for key in ("/a/ä b.bin", "/z", "-not/x")
        }
    found = {upload.key: upload for upload in store.uploads()}
    assert {key: upload.id for key, upload in found.items()} == {
        "a/ä b.bin": started["/a/ä b.bin"],
        "z": started["/z"],
    }
    assert all(abs(upload.started_ns - begun) < 60 * 10**9 for upload in found.values())
    for _ in range(2):
        store.abort_upload("a/ä b.bin", found["a/ä b.bin"].id)
    assert [upload.key for upload in store.uploads()] == ["z"]
    store.abort_upload("z", found["z"].id)
    assert list(store.uploads()) == []
    [last] = neighbour.uploads()
    neighbour.abort_upload(last.key, last.id)


def test_a_root_is_no_prefix_of_its_neighbour(seaweed_config: StorageConfig, opened: Opener) -> None:
    store = opened(seaweed_config)
    neighbour = opened(dataclasses.replace(seaweed_config, root=seaweed_config.root + "2"))
    whole = opened(dataclasses.replace(seaweed_config, root=f"s3://{BUCKET}"))
    store.put_bytes("mine", b"1")
    neighbour.put_bytes("theirs", b"2")
    assert [entry.key for entry in store.list()] == ["mine"]
    prefix = seaweed_config.root.removeprefix(f"s3://{BUCKET}/")
    assert {entry.key for entry in whole.list(prefix)} == {f"{prefix}/mine", f"{prefix}2/theirs"}
    assert whole.get(f"{prefix}/mine") == b"1"
    assert store.cache_name == f"{BUCKET}/{prefix}"
    assert whole.cache_name == BUCKET
    assert store.open_local("mine") is None


# buckets that are not as they should be


def test_a_missing_bucket(seaweed_config: StorageConfig, opened: Opener, make_file: MakeFile) -> None:
    store = opened(dataclasses.replace(seaweed_config, root="s3://no-such-bucket/x"))
    for act in (
        store.check,
        lambda: store.check(write=False),
        lambda: list(store.list()),
        lambda: store.get("k"),
        lambda: store.put_bytes("k", b""),
        lambda: store.put_file("k", str(make_file(b"x"))),
    ):
        with pytest.raises(StorageMissing, match=r"'no-such-bucket' does not exist.*create it"):
            act()


@pytest.mark.parametrize(
    ("key_id", "secret"),
    [("lamfs-test", "wrong-secret"), ("unknown-key", "x"), ("lamfs-nobody", "lamfs-nobody-secret")],
)
def test_credentials_that_are_refused(
    seaweed_config: StorageConfig, opened: Opener, monkeypatch: pytest.MonkeyPatch, key_id: str, secret: str
) -> None:
    use(monkeypatch, Server.env_for(key_id, secret))
    store = opened(seaweed_config)
    for act in (
        store.check,
        lambda: store.check(write=False),
        lambda: store.put_bytes("k", b"x"),
        lambda: store.head("k"),
        lambda: store.get("k"),
        lambda: store.delete(["k"]),
        lambda: store.delete(["k", "l"]),
    ):
        with pytest.raises(StorageForbidden, match=f"'{BUCKET}' refuses.*check the access key") as caught:
            act()
        assert secret not in str(caught.value) or secret == "x"


def test_a_bucket_that_may_only_be_read(
    seaweed: Server, seaweed_config: StorageConfig, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(seaweed_config).put_bytes("k", b"content")
    use(monkeypatch, cast(SeaweedServer, seaweed).reader_env)
    store = opened(seaweed_config)
    with pytest.raises(StorageReadOnly, match=rf"{BUCKET}.*--read-only"):
        store.check()
    assert store.check(write=False).read_guarded
    assert store.get("k") == b"content"
    with pytest.raises(StorageForbidden):
        store.put_bytes("k", b"new")


def test_a_bucket_that_deletes_nothing(
    seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener
) -> None:
    store = opened(through(seaweed_proxy, seaweed_config))
    seaweed_proxy.add("status", code=403, error="AccessDenied", method="POST", path="delete", count=None)
    seaweed_proxy.add("status", code=403, error="AccessDenied", method="DELETE", count=None)
    with pytest.raises(StorageForbidden, match="s3:DeleteObject"):
        store.check()


def test_no_credentials(seaweed_config: StorageConfig, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageForbidden, match="AWS_ACCESS_KEY_ID"):
        opened(seaweed_config).check()
    with pytest.raises(StorageForbidden, match="no-such-profile"):
        opened(dataclasses.replace(seaweed_config, profile="no-such-profile")).check()


def test_credentials_that_are_written_anew(
    seaweed: Server, seaweed_config: StorageConfig, opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settings file whose keys are refused from some moment on, and replaced: all threads go on with the new keys."""
    settings = tmp_path / "credentials"

    def renew(env: dict[str, str]) -> None:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        settings.write_text("[work]\n" + "".join(f"{name.lower()} = {env[name]}\n" for name in names))

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(settings))
    monkeypatch.setattr(client, "LOOK_PAUSE", 0.0)
    renew(cast(SeaweedServer, seaweed).reader_env)
    store = opened(dataclasses.replace(seaweed_config, profile="work"))
    assert list(store.list()) == []
    with pytest.raises(StorageForbidden):
        store.put_bytes("k", b"x")
    renew(seaweed.env)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put_bytes(f"k{number}", b"x"), range(16)))
    assert len(list(store.list())) == 16
    settings.write_text("[work]\n")
    assert store.get("k1") == b"x"


def test_nobody_listens(seaweed_config: StorageConfig, opened: Opener) -> None:
    config = dataclasses.replace(seaweed_config, endpoint_url="http://127.0.0.1:9", timeout=1.0)
    with pytest.raises(StorageUnavailable, match=r"127\.0\.0\.1:9"):
        opened(config).check()


def test_an_endpoint_that_is_none(seaweed_config: StorageConfig, opened: Opener) -> None:
    with pytest.raises(InvalidArgument, match="nonsense"):
        opened(dataclasses.replace(seaweed_config, endpoint_url="nonsense")).head("k")


# what servers do with conditions


def test_a_server_without_conditions_is_found_out(rclone_config: StorageConfig, opened: Opener) -> None:
    store = opened(rclone_config)
    found = store.check()
    assert (found.create_exclusive, found.replace_guarded, found.read_guarded) == (False, False, False)
    assert len(found.warnings) == 3
    assert all(BUCKET in text for text in found.warnings)
    assert sum("two machines could write at once" in text for text in found.warnings) == 2
    # After a race of writers rclone sometimes goes on listing a name that is not there any more.
    for left in store.list():
        with pytest.raises(ObjectMissing):
            store.head(left.key)


def test_reads_are_of_one_revision_without_conditions_too(rclone_config: StorageConfig, opened: Opener) -> None:
    store = opened(rclone_config)
    old = store.put_bytes("k", b"old").etag
    new = store.put_bytes("k", b"new").etag
    with pytest.raises(ObjectChanged):
        store.get("k", etag=old)
    assert store.get("k", offset=1, length=1, etag=new) == b"e"


@pytest.mark.usefixtures("small_parts")
def test_a_server_that_names_two_etags_for_an_upload(
    rclone_config: StorageConfig, opened: Opener, make_file: MakeFile
) -> None:
    store = opened(rclone_config)
    data = os.urandom(11 * MIB)
    stored = store.put_file("k", str(make_file(data)))
    assert store.get("k", etag=stored.etag) == data


def test_a_server_that_only_excludes_sequential_writers(
    rclone: Server, rclone_config: StorageConfig, opened: Opener
) -> None:
    """A probe of one request after the other would be satisfied with this one."""
    with FaultProxy(rclone.port) as proxy:
        store = opened(through(proxy, rclone_config))
        rule = proxy.add("check_then_write", method="PUT", count=None)
        store.put_bytes("sequential", b"one", if_none_match=True)
        with pytest.raises(StorageError):
            store.put_bytes("sequential", b"two", if_none_match=True)
        assert not store.check().create_exclusive
        assert rule.hits > 10


def test_a_server_that_refuses_conditions(
    seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener
) -> None:
    store = opened(through(seaweed_proxy, seaweed_config))
    for header in ("If-None-Match", "If-Match"):
        seaweed_proxy.add("status", code=501, error="NotImplemented", header=header, count=None)
    found = store.check()
    assert (found.create_exclusive, found.replace_guarded, found.read_guarded) == (False, False, False)
    etag = store.put_bytes("k", b"data").etag
    assert store.get("k", etag=etag) == b"data"


def test_a_server_that_refuses_the_right_etag(
    seaweed_config: StorageConfig, seaweed_proxy: FaultProxy, opened: Opener
) -> None:
    """Ceph 16 compares the quotes too. Reading must still work, and still be of one revision."""
    store = opened(through(seaweed_proxy, seaweed_config))
    old = store.put_bytes("k", b"old").etag
    new = store.put_bytes("k", b"new").etag
    rule = seaweed_proxy.add(
        "status", code=412, error="PreconditionFailed", method="GET", header="If-Match", count=None
    )
    assert not store.check().read_guarded
    assert store.get("k", etag=new) == b"new"
    seen = rule.hits
    assert store.get("k", offset=1, length=2, etag=new) == b"ew"
    assert rule.hits == seen, "the condition is not sent again"
    with pytest.raises(ObjectChanged):
        store.get("k", etag=old)


# the process


def test_boto3_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys, lamfs, lamfs.storage as s\n"
        "s.open_store(s.StorageConfig('/tmp'))\n"
        "s.open_store(s.StorageConfig('s3://bucket/prefix')).url('key')\n"
        "assert not any(name.startswith(('boto3', 'botocore')) for name in sys.modules), 'boto3 was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_one_store_for_many_threads(ministack_config: StorageConfig, opened: Opener) -> None:
    store = opened(ministack_config)

    def work(number: int) -> None:
        data = os.urandom(5000)
        etag = store.put_bytes(f"t/{number}", data).etag
        assert store.get(f"t/{number}", etag=etag) == data
        store.copy(f"t/{number}", f"u/{number}")
        store.delete([f"t/{number}"])

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(work, range(120)))
    assert {entry.key for entry in store.list()} == {f"u/{number}" for number in range(120)}
