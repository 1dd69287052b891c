"""Multipart uploads whose parts outlive the process that sent them: one request per method. Thread-safe, no state."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from lamfs.copying import open_source
from lamfs.errors import ObjectMissing, StorageError, StorageMissing, UploadGone
from lamfs.storage.base import Over, PartStat, Progress
from lamfs.storage.osfiles import source_error
from lamfs.storage.s3.calls import Headers
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.errors import NO_KEY, NO_UPLOAD, code_of
from lamfs.storage.s3.paging import entries
from lamfs.storage.s3.upload import Transfers
from lamfs.storage.s3.uploads import unfinished


class Multipart:
    """The parts of MultipartStore, on keys with the root's prefix. ``what``: see errors.translate."""

    def __init__(self, connection: Connection, transfers: Transfers) -> None:
        self._connection = connection
        self._transfers = transfers

    def begin(self, key: str, what: str, said: Headers) -> str:
        """Begin an upload. When replies were lost and several have begun, only the last stays.

        ``said``: see Connection.saying.
        """
        tries = 0

        def attempt(headers: Headers) -> str:
            nonlocal tries
            tries += 1
            return self._connection.once(lambda s3: s3.begin(key, headers), what)

        upload_id = self._connection.saying(said, lambda headers: self._connection.retrying(lambda: attempt(headers)))
        if tries > 1:
            for other in self.uploads_of(key, what):
                if other != upload_id:
                    self.abort(key, what, other)
        return upload_id

    def send(
        self,
        key: str,
        what: str,
        upload_id: str,
        number: int,
        path: str,
        offset: int,
        length: int,
        progress: Progress | None = None,
    ) -> str:
        """Send a part, with retries."""
        try:
            fd = open_source(path)
        except OSError as error:
            raise source_error(error, path) from error
        try:
            with _on_upload(what):
                return self._transfers.send(
                    lambda s3, body: s3.send_part(key, upload_id, number, body, length),
                    what, path, fd, offset, length, progress,
                )  # fmt: skip
        finally:
            os.close(fd)

    def copy(
        self, key: str, what: str, upload_id: str, number: int, source: str, etag: str, offset: int, length: int
    ) -> str:
        """Copy a part. The error's code tells a missing source from a missing upload."""
        with _on_upload(what):
            return self._transfers.copy_part(key, what, upload_id, number, source, etag, offset, length)

    def complete(self, key: str, what: str, upload_id: str, etags: Sequence[str], over: Over) -> str:
        """Complete the upload. Returns the object's ETag. Raises as Transfers.complete."""
        return self._transfers.complete(key, what, upload_id, etags, over)

    def abort(self, key: str, what: str, upload_id: str) -> None:
        """Abort the upload. It is no error if it is gone."""
        with contextlib.suppress(UploadGone, ObjectMissing), _on_upload(what):
            self._connection.call(lambda s3: s3.abort(key, upload_id), what)

    def list_parts(self, key: str, what: str, upload_id: str) -> list[PartStat]:
        """All parts, page by page."""
        with _on_upload(what, NO_KEY):
            return list(
                entries(
                    lambda after: self._connection.call(lambda s3: s3.parts(key, upload_id, after), what),
                    what,
                    self._connection.endpoint,
                )
            )

    def uploads_of(self, key: str, what: str) -> list[str]:
        """Unfinished uploads of exactly ``key``; none where the server cannot list them."""
        return [upload.id for upload in unfinished(self._connection, key, what) if not upload.key]


@contextlib.contextmanager
def _on_upload(what: str, codes: frozenset[str] = frozenset()) -> Iterator[None]:
    """Turn a reply that says the upload is gone into UploadGone. ``codes``: others that mean that for this request."""
    try:
        yield
    except StorageMissing:
        raise
    except StorageError as error:
        if code_of(error) in NO_UPLOAD | codes:
            raise UploadGone(f"Cannot {what}: the multipart upload is gone; store it again.") from error
        raise
