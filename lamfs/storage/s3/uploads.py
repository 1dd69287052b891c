"""Multipart uploads that were begun and never ended: listing them. Any thread.

A process that is killed while it uploads leaves its parts in the bucket, where they cost room and no listing of objects
shows them (Amazon S3, "Aborting a multipart upload").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lamfs.errors import StorageError
from lamfs.storage.base import UnfinishedUpload
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.errors import NOT_IMPLEMENTED, code_of


def unfinished(connection: Connection, base: str) -> Iterator[UnfinishedUpload]:
    """The unfinished uploads of keys that begin with ``base``, which is taken off them; nothing where the server cannot
    list them. Raises storage errors."""
    what = f"list unfinished uploads in s3://{connection.bucket}/{base}"
    params: dict[str, Any] = {"Prefix": base}
    while True:
        try:
            page = connection.call("list_multipart_uploads", what, **params)
        except StorageError as error:
            if code_of(error) in NOT_IMPLEMENTED:
                return
            raise
        for entry in page.get("Uploads", ()):
            # Some servers do not filter: what is outside of the root is none of ours.
            if entry["Key"].startswith(base):
                started = int(entry["Initiated"].timestamp() * 1_000_000_000)
                yield UnfinishedUpload(entry["Key"].removeprefix(base), entry["UploadId"], started)
        markers = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
        following = {**params, **{name: value for name, value in markers.items() if value}}
        if not page.get("IsTruncated") or following == params:
            return
        params = following
