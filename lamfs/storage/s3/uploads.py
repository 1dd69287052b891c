"""Listing multipart uploads that never ended. Any thread.

A process that is killed during an upload leaves its parts in the bucket, where they cost space and no listing of
objects shows them (Amazon S3, "Aborting a multipart upload").
"""

from __future__ import annotations

from collections.abc import Iterator

from lamfs.errors import StorageError
from lamfs.storage.base import UnfinishedUpload
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.errors import NOT_IMPLEMENTED, code_of
from lamfs.storage.s3.paging import entries


def unfinished(connection: Connection, base: str, what: str = "") -> Iterator[UnfinishedUpload]:
    """The unfinished uploads of keys that begin with ``base``, which is removed from the keys.

    None where the server cannot list them. ``what``: see errors.translate. Raises storage errors.
    """
    what = what or f"list unfinished uploads in s3://{connection.bucket}/{base}"
    try:
        for found in entries(
            lambda after: connection.call(lambda s3: s3.uploads(base, after), what), what, connection.endpoint
        ):
            # Some servers do not filter: skip what is outside of the root.
            if found.key.startswith(base):
                yield found._replace(key=found.key.removeprefix(base))
    except StorageError as error:
        if code_of(error) not in NOT_IMPLEMENTED:
            raise
