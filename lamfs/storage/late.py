"""The store of a bucket that costs nothing until an object is asked for. Thread-safe.

A mount's first process never talks to S3 while all goes well; its mover does. Names are enough for it. HTTP and TLS
take 0.03 s of imports and 5 MiB, botocore more, when credentials must be looked up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from lamfs.storage.base import (
    Capabilities,
    MultipartStore,
    ObjectMeta,
    ObjectStat,
    PartStat,
    Progress,
    StorageConfig,
    UnfinishedUpload,
)
from lamfs.storage.root import split_s3

if TYPE_CHECKING:
    from lamfs.storage.s3 import S3Store


class LateS3Store:
    """An S3Store that is made on first use. Whatever only needs names is answered without it."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        bucket, prefix = split_s3(config.root)
        self._cache_name = f"{bucket}/{prefix}".rstrip("/")
        self._guard = threading.Lock()
        self._made: S3Store | None = None

    def _store(self) -> S3Store:
        with self._guard:
            if self._made is None:
                from lamfs.storage.s3 import S3Store

                self._made = S3Store(self.config)
            return self._made

    # by its name alone

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
        return self

    @property
    def cache_name(self) -> str:
        return self._cache_name

    def url(self, key: str) -> str:
        return f"s3://{self._cache_name}/{key}"

    def open_local(self, key: str) -> None:
        """None: objects are not files here."""

    def close(self) -> None:
        """Close the store, if it was made."""
        with self._guard:
            if self._made is not None:
                self._made.close()

    # by the store

    def prepare(self) -> None:
        self._store().prepare()

    def check(self, *, write: bool = True, exclusive: bool = False) -> Capabilities:
        return self._store().check(write=write, exclusive=exclusive)

    def head(self, key: str) -> ObjectStat:
        return self._store().head(key)

    def meta(self, key: str) -> ObjectMeta | None:
        return self._store().meta(key)

    def get(self, key: str, *, offset: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        return self._store().get(key, offset=offset, length=length, etag=etag)

    def get_into(self, key: str, fd: int, *, offset: int, length: int, etag: str | None = None) -> None:
        self._store().get_into(key, fd, offset=offset, length=length, etag=etag)

    def get_view(self, key: str, view: memoryview, *, offset: int, etag: str | None = None) -> None:
        self._store().get_view(key, view, offset=offset, etag=etag)

    def get_views(self, key: str, views: Iterator[memoryview], *, offset: int, length: int, etag: str) -> None:
        self._store().get_views(key, views, offset=offset, length=length, etag=etag)

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
        return self._store().put_file(
            key, path, consume=consume, progress=progress, meta=meta, if_none_match=if_none_match, if_match=if_match
        )

    def put_bytes(
        self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        return self._store().put_bytes(key, data, if_none_match=if_none_match, if_match=if_match)

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
        return self._store().copy(
            src, dst, etag=etag, size=size, meta=meta, if_none_match=if_none_match, if_match=if_match
        )

    def delete(self, keys: Iterable[str]) -> None:
        self._store().delete(keys)

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        return self._store().list(prefix)

    def temporaries(self) -> Iterator[ObjectStat]:
        return self._store().temporaries()

    def uploads(self) -> Iterator[UnfinishedUpload]:
        return self._store().uploads()

    # in parts (MultipartStore)

    def begin_upload(self, key: str, meta: ObjectMeta | None = None) -> str:
        return self._store().begin_upload(key, meta)

    def send_part(
        self,
        key: str,
        upload_id: str,
        number: int,
        path: str,
        offset: int,
        length: int,
        progress: Progress | None = None,
    ) -> str:
        return self._store().send_part(key, upload_id, number, path, offset, length, progress)

    def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, offset: int, length: int
    ) -> str:
        return self._store().copy_part(key, upload_id, number, source, source_etag, offset, length)

    def complete_upload(
        self,
        key: str,
        upload_id: str,
        etags: Sequence[str],
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> str:
        return self._store().complete_upload(key, upload_id, etags, if_none_match=if_none_match, if_match=if_match)

    def abort_upload(self, key: str, upload_id: str) -> None:
        self._store().abort_upload(key, upload_id)

    def list_parts(self, key: str, upload_id: str) -> Sequence[PartStat]:
        return self._store().list_parts(key, upload_id)

    def uploads_of(self, key: str) -> Sequence[str]:
        return self._store().uploads_of(key)
