"""S3Store: the ObjectStore over a bucket and prefix. Thread-safe.

Its state is the connection and two findings about the server (whether it knows batch deletes, and If-Match on GET),
which only ever go from true to false.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal

from lamfs.copying import open_source
from lamfs.errors import ObjectChanged, ObjectMissing, StorageError
from lamfs.keys import LOCK_FOLDER, is_probe
from lamfs.storage.base import (
    ANYTHING,
    Capabilities,
    MultipartStore,
    ObjectMeta,
    ObjectStat,
    Over,
    Progress,
    StorageConfig,
    UnfinishedUpload,
)
from lamfs.storage.meta import as_headers, from_headers
from lamfs.storage.osfiles import source_error, write_fetched
from lamfs.storage.root import check_object_key
from lamfs.storage.s3 import multipart
from lamfs.storage.s3.calls import Head, Headers, Stream
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.download import Download, Sink, into
from lamfs.storage.s3.errors import NO_KEY, NOT_IMPLEMENTED, code_of
from lamfs.storage.s3.multipart import S3Parts, precondition_failed
from lamfs.storage.s3.upload import send

MD5_PIECE = 1 << 20
"""Bytes of a file that are hashed at a time."""
DELETE_BATCH = 1000
"""Keys per DeleteObjects (Amazon S3)."""
_NO_BATCHES = NOT_IMPLEMENTED | {"MissingContentMD5", "MalformedXML", "InvalidRequest", "InvalidArgument", "400"}
"""Errors of a server without DeleteObjects, or that requires an older checksum or cannot read a key as XML.

Then keys are deleted one by one.
"""


class S3Store:
    """Objects at ``s3://bucket/prefix/key``. Thread-safe."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self._connection = Connection(config)
        self._parts = S3Parts(self._connection, self._key, self.url)
        self._bucket = self._connection.bucket
        self._base = f"{self._connection.prefix}/" if self._connection.prefix else ""
        self._batch_delete = True
        self._guarded = True

    @property
    def kind(self) -> Literal["s3"]:
        return "s3"

    @property
    def on_disk(self) -> bool:
        return False

    @property
    def imports_files(self) -> bool:
        return False

    @property
    def parts(self) -> MultipartStore:
        return self._parts

    @property
    def cache_name(self) -> str:
        return f"{self._bucket}/{self._base}".rstrip("/")

    def url(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._base}{key}"

    def open_local(self, key: str) -> None:
        """None: objects are not files here."""

    def prepare(self) -> None:
        self._connection.prepare()

    def close(self) -> None:
        self._connection.close()

    def check(self, *, write: bool = True, exclusive: bool = False) -> Capabilities:
        from lamfs.storage.s3.check import check_bucket

        return check_bucket(self, self._connection, write=write, exclusive=exclusive)

    # reading

    def head(self, key: str) -> ObjectStat:
        found = self._head(key)
        return ObjectStat(key, found.size, found.etag, found.mtime_ns)

    def meta(self, key: str) -> ObjectMeta | None:
        return from_headers(self._head(key).headers)

    def _head(self, key: str) -> Head:
        full_key = self._key(key)
        return self._connection.call(lambda s3: s3.head(full_key), f"read {self.url(key)}")

    def get(self, key: str, *, offset: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        chunks: list[bytes] = []

        def sink(body: Stream, at: int, count: int) -> int:
            if at == 0:
                chunks.clear()
            chunks.append(body.read(count))
            return len(chunks[-1])

        self._download(key, offset, length, etag, sink)
        return b"".join(chunks)

    def get_into(self, key: str, fd: int, *, offset: int, length: int, etag: str | None = None) -> None:
        def sink(body: Stream, at: int, count: int) -> int:
            data = body.read(count)
            write_fetched(fd, data, offset + at)
            return len(data)

        self._whole(key, offset, length, etag, sink)

    def get_view(self, key: str, view: memoryview, *, offset: int, etag: str | None = None) -> None:
        self._whole(key, offset, len(view), etag, into(view))

    def get_views(self, key: str, views: Iterator[memoryview], *, offset: int, length: int, etag: str) -> None:
        view, filled = next(views), 0

        def sink(body: Stream, at: int, count: int) -> int:
            nonlocal view, filled
            with view[filled : filled + count] as place:
                got = body.readinto(place)
            filled += got
            if filled == len(view):
                view, filled = next(views, view), 0
            return got

        self._whole(key, offset, length, etag, sink)

    def _whole(self, key: str, offset: int, length: int, etag: str | None, sink: Sink) -> None:
        if self._download(key, offset, length, etag, sink) < length:
            raise ObjectChanged(
                f"The object {self.url(key)} ends before byte {offset + length}, which was asked for; look the"
                " artifact up again."
            )

    def _download(self, key: str, offset: int, length: int | None, etag: str | None, sink: Sink) -> int:
        if length == 0:
            if etag is not None and self.head(key).etag != etag:
                raise ObjectChanged(f"The object {self.url(key)} has changed; look the artifact up again.")
            return 0
        download = Download(self._connection, self._key(key), self.url(key), etag, self._guarded)
        count = download.run(offset, length, sink)
        self._guarded = self._guarded and download.guarded
        return count

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        what = f"list {self.url(prefix)}"
        asked = self._base + prefix
        for found in self._connection.entries(lambda s3, after: s3.objects(asked, after), what):
            key = found.key.removeprefix(self._base)
            if key and found.key.startswith(asked):
                yield found._replace(key=key)

    # writing

    def put_file(
        self,
        key: str,
        path: str,
        *,
        consume: bool = False,
        progress: Progress | None = None,
        meta: ObjectMeta | None = None,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> ObjectStat:
        """As the protocol says. No file is renamed here, so ``consume`` leaves it where it is."""
        what = f"store {self.url(key)}"
        over = Over(if_match, if_none_match)
        full_key = self._key(key)
        said = as_headers(meta)
        try:
            fd = open_source(path)
        except OSError as error:
            raise source_error(error, path) from error
        try:
            size = os.fstat(fd).st_size
            if size > multipart.MULTIPART_ABOVE:
                etag = self._parts.upload(key, path, fd, size, progress, said, over)
            else:
                etag = self._connection.saying(
                    said,
                    lambda headers: send(
                        self._connection,
                        lambda s3, body: s3.put(full_key, body, size, headers, over),
                        what, path, fd, 0, size, progress,
                    ),
                )  # fmt: skip
        except (ObjectChanged, ObjectMissing) as error:
            if over == ANYTHING:
                raise
            ours = self._sent_before(key, fd, size)
            if ours is not None:
                return ours
            raise precondition_failed(what, over) from error
        finally:
            os.close(fd)
        return ObjectStat(key, size, etag, time.time_ns())

    def put_bytes(
        self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        full_key, over = self._key(key), Over(if_match, if_none_match)
        what = f"store {self.url(key)}"
        try:
            etag = self._connection.call(lambda s3: s3.put(full_key, data, len(data), over=over), what)
        except (ObjectChanged, ObjectMissing) as error:
            # ObjectMissing: If-Match found no object. Either way the write may be our own, repeated because its reply
            # was lost: then the object has exactly our bytes.
            ours = self._written_before(key, data)
            if ours is not None:
                return ours
            raise precondition_failed(what, over) from error
        return ObjectStat(key, len(data), etag, time.time_ns())

    def _sent_before(self, key: str, fd: int, size: int) -> ObjectStat | None:
        """The object, if its ETag says that it has these bytes: then a write of our own was repeated because its reply
        was lost.

        (The ETag of an object that is encrypted with its owner's key says nothing.)
        """
        if size > multipart.MULTIPART_ABOVE:
            return None
        with contextlib.suppress(ObjectMissing, ObjectChanged, OSError):
            found = self.head(key)
            if found.size == size and found.etag == _md5_of(fd, size):
                return found
        return None

    def _written_before(self, key: str, data: bytes) -> ObjectStat | None:
        with contextlib.suppress(ObjectMissing, ObjectChanged):
            found = self.head(key)
            # SeaweedFS shows an object without an ETag while somebody else is still writing it.
            if found.etag and found.size == len(data) and self.get(key, length=found.size, etag=found.etag) == data:
                return found
        return None

    def copy(
        self,
        src: str,
        dst: str,
        *,
        etag: str | None = None,
        size: int | None = None,
        meta: ObjectMeta | None = None,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> ObjectStat:
        what = f"copy {self.url(src)} to {self.url(dst)}"
        source, target = self._key(src), self._key(dst)
        if etag is not None and size is not None and size <= multipart.COPY_LIMIT and source != target:
            new = self._copy_at_once(source, target, what, etag, as_headers(meta))
            # Some servers ignore the condition. An object that was sent in one request has the same ETag everywhere.
            if new != etag and self.head(src).etag != etag:
                raise ObjectChanged(f"Cannot {what}: the source has changed; look the artifact up again.")
            return ObjectStat(dst, size, new, time.time_ns())
        found = self._head(src)
        if etag is not None and found.etag != etag:
            raise ObjectChanged(f"Cannot {what}: the source has changed; look the artifact up again.")
        if source == target:
            return ObjectStat(src, found.size, found.etag, found.mtime_ns)
        if found.size > multipart.COPY_LIMIT:
            said, over = as_headers(meta, found.headers), Over(if_match, if_none_match)
            new = self._parts.copy(src, dst, found.size, found.etag, said, over)
        else:
            new = self._copy_at_once(source, target, what, found.etag, as_headers(meta, found.headers))
        return ObjectStat(dst, found.size, new, time.time_ns())

    def _copy_at_once(self, source: str, target: str, what: str, etag: str, said: Headers) -> str:
        return self._connection.saying(
            said,
            lambda headers: self._connection.call(
                lambda s3: s3.copy(target, source, etag, headers), what, patient=True
            ),
        )

    def delete(self, keys: Iterable[str]) -> None:
        rest = iter([self._key(key) for key in keys])
        while batch := tuple(islice(rest, DELETE_BATCH)):
            single = self._delete_batch(batch) if len(batch) > 1 and self._batch_delete else batch
            for full_key in single:
                self._delete_one(full_key)

    def _delete_one(self, full_key: str) -> None:
        with contextlib.suppress(ObjectMissing):
            self._connection.call(lambda s3: s3.delete(full_key), f"delete s3://{self._bucket}/{full_key}")

    def _delete_batch(self, batch: Sequence[str]) -> Sequence[str]:
        """Delete up to DELETE_BATCH keys in one request. Returns those that must be deleted one by one.

        That is all of them when the server has no batches. A single request is retried, and reports the error.
        """
        try:
            failed = self._connection.call(
                lambda s3: s3.delete_many(batch), f"delete {len(batch)} objects of s3://{self._bucket}"
            )
        except StorageError as error:
            if code_of(error) not in _NO_BATCHES:
                raise
            if code_of(error) in NOT_IMPLEMENTED:
                self._batch_delete = False
            return batch
        left = [key for key, code in failed if code not in NO_KEY]
        # An error for a key that was not asked for, or without a key: all that is known is that something failed.
        return left if set(left) <= set(batch) else batch

    def temporaries(self) -> Iterator[ObjectStat]:
        return (item for item in self.list(LOCK_FOLDER) if is_probe(item.key))

    def uploads(self) -> Iterator[UnfinishedUpload]:
        for found in self._parts.unfinished(self._base, self.url("")):
            yield found._replace(key=found.key.removeprefix(self._base))

    def abort_upload(self, key: str, upload_id: str) -> None:
        self._parts.abort_upload(key, upload_id)

    def _key(self, key: str) -> str:
        return self._base + check_object_key(key, as_path=False)


def _md5_of(fd: int, size: int) -> str:
    """md5 of a file of ``size`` bytes in hexadecimal. Raises OSError."""
    digest, offset = hashlib.md5(usedforsecurity=False), 0
    while offset < size and (piece := os.pread(fd, min(MD5_PIECE, size - offset), offset)):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()
