"""Multipart uploads: one request per method, for whoever records the parts; and large objects in one go.

Thread-safe, no state.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence

from lamfs.copying import open_source
from lamfs.errors import (
    LamfsError,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageMissing,
    UploadGone,
)
from lamfs.model import ObjectMeta
from lamfs.pool import Pool
from lamfs.storage.base import ANYTHING, Over, PartStat, Progress, UnfinishedUpload
from lamfs.storage.meta import as_headers
from lamfs.storage.osfiles import source_error
from lamfs.storage.s3.calls import S3, Body, Headers, bare
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.errors import NO_KEY, NO_UPLOAD, NOT_IMPLEMENTED, code_of
from lamfs.storage.s3.upload import send

log = logging.getLogger(__name__)

MIB = 1 << 20
MULTIPART_ABOVE = 64 * MIB
"""Files up to this size go in one request."""
PART_SIZE = 16 * MIB
COPY_LIMIT = 5 << 30
"""CopyObject accepts sources up to 5 GiB (Amazon S3)."""
COPY_PART_SIZE = 512 * MIB
MAX_PARTS = 10_000
WINDOW = 8
"""Parts of one object in flight at a time."""

Part = Callable[[str, int, int, int], str]
"""Transfers part ``number`` (from 1) of an upload at ``offset`` with ``length`` bytes. Returns its ETag."""


class S3Parts:
    """The MultipartStore of an S3Store; also large objects in one go, whose parts nobody records."""

    def __init__(self, connection: Connection, whole: Callable[[str], str], url: Callable[[str], str]) -> None:
        """``whole``: a key with the root's prefix; ``url``: ObjectStore.url."""
        self._connection = connection
        self._key = whole
        self._url = url

    def upload(
        self,
        key: str,
        path: str,
        fd: int,
        size: int,
        progress: Progress | None,
        headers: Headers,
        over: Over,
    ) -> str:
        """Store ``size`` bytes of the file at ``path``, which is open as ``fd``. Returns the object's ETag.

        ``headers``: see Connection.saying. ``over``: what it may replace. After an error nothing of it is left.
        """

        def part(upload_id: str, number: int, offset: int, length: int) -> str:
            return self._send(key, upload_id, number, path, fd, offset, length, None)

        return self._in_one_go(key, part, size, PART_SIZE, progress, headers, over)

    def copy(self, source: str, key: str, size: int, etag: str, headers: Headers, over: Over) -> str:
        """Copy an object of ``size`` bytes. The source's metadata is not copied. The rest: as upload."""

        def part(upload_id: str, number: int, offset: int, length: int) -> str:
            return self.copy_part(key, upload_id, number, source, etag, offset, length)

        return self._in_one_go(key, part, size, COPY_PART_SIZE, None, headers, over)

    def _in_one_go(
        self,
        key: str,
        part: Part,
        size: int,
        part_size: int,
        progress: Progress | None,
        headers: Headers,
        over: Over,
    ) -> str:
        """All parts, WINDOW at a time. After an error no new one starts, but those in flight finish."""
        part_size = part_size_for(size, part_size)
        upload_id, _ = self._begin(key, headers)

        def length_of(index: int) -> int:
            return min(part_size, size - index * part_size)

        def transfer(index: int) -> str:
            return part(upload_id, index + 1, index * part_size, length_of(index))

        try:
            etags = [""] * -(-size // part_size)
            with Pool(min(WINDOW, len(etags)), "lamfs-part") as pool:
                for index, future in pool.unordered(transfer, range(len(etags))):
                    etags[index] = future.result()
                    if progress is not None:
                        progress(length_of(index))
            return self._complete(key, upload_id, etags, over)
        except BaseException:
            with contextlib.suppress(LamfsError):
                self.abort_upload(key, upload_id)
            raise

    # one request each (MultipartStore)

    def begin_upload(self, key: str, meta: ObjectMeta | None = None) -> str:
        """MultipartStore.begin_upload. When replies were lost and several have begun, only the last stays."""
        upload_id, tries = self._begin(key, as_headers(meta))
        if tries > 1:
            for other in self.uploads_of(key):
                if other != upload_id:
                    self.abort_upload(key, other)
        return upload_id

    def _begin(self, key: str, headers: Headers) -> tuple[str, int]:
        """The id of a new upload, and how many may have begun."""
        what, full_key = f"store {self._url(key)}", self._key(key)
        tries = 0

        def attempt(headers: Headers) -> str:
            nonlocal tries
            tries += 1
            return self._connection.once(lambda s3: s3.begin(full_key, headers), what)

        upload_id = self._connection.saying(
            headers, lambda headers: self._connection.retrying(lambda: attempt(headers))
        )
        return upload_id, tries

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
        """MultipartStore.send_part."""
        try:
            fd = open_source(path)
        except OSError as error:
            raise source_error(error, path) from error
        try:
            return self._send(key, upload_id, number, path, fd, offset, length, progress)
        finally:
            os.close(fd)

    def _send(
        self,
        key: str,
        upload_id: str,
        number: int,
        path: str,
        fd: int,
        offset: int,
        length: int,
        progress: Progress | None,
    ) -> str:
        what, full_key = f"store part {number} of {self._url(key)}", self._key(key)

        def put(s3: S3, body: Body) -> str:
            return s3.send_part(full_key, upload_id, number, body, length)

        with _on_upload(what):
            return send(self._connection, put, what, path, fd, offset, length, progress)

    def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, offset: int, length: int
    ) -> str:
        """MultipartStore.copy_part. The error's code tells a missing source from a missing upload."""
        what = f"copy part {number} of {self._url(key)} from {self._url(source)}"
        full_key, source_key, stop = self._key(key), self._key(source), offset + length
        with _on_upload(what):
            return self._connection.call(
                lambda s3: s3.copy_part(full_key, upload_id, number, source_key, source_etag, offset, stop),
                what,
                patient=True,
            )

    def complete_upload(
        self,
        key: str,
        upload_id: str,
        etags: Sequence[str],
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> str:
        """MultipartStore.complete_upload."""
        return self._complete(key, upload_id, etags, Over(if_match, if_none_match))

    def _complete(self, key: str, upload_id: str, etags: Sequence[str], over: Over) -> str:
        what, full_key, connection = f"store {self._url(key)}", self._key(key), self._connection

        def attempt() -> str | None:
            try:
                return connection.once(lambda s3: s3.complete(full_key, upload_id, etags, over), what)
            except StorageError as error:
                if code_of(error) in NO_UPLOAD:
                    return None
                raise

        try:
            etag = connection.retrying(attempt, patient=True)
        except (ObjectChanged, ObjectMissing) as error:
            if over == ANYTHING:
                raise
            # An earlier try whose reply was lost made the object, so the condition does not hold any more.
            with contextlib.suppress(UploadGone):
                return self._completed_before(full_key, what, etags)
            raise precondition_failed(what, over) from error
        if etag is None:
            return self._completed_before(full_key, what, etags)
        # rclone and some gateways later report another ETag than in their reply. Recorded with that one, the object
        # could never be read again.
        found = connection.call(lambda s3: s3.head(full_key), what).etag
        if found != etag:
            log.warning("Stored with ETag %s, found with ETag %s, which is the one that counts (%s)", etag, found, what)
        return found

    def _completed_before(self, full_key: str, what: str, etags: Sequence[str]) -> str:
        """The object of an earlier try whose reply was lost: it has the ETag that Amazon S3 documents for multipart.

        Any other object means that the upload must be done again.
        """
        with contextlib.suppress(ObjectMissing):
            found = self._connection.call(lambda s3: s3.head(full_key), what).etag
            if found == multipart_etag(etags):
                return found
        raise UploadGone(f"Cannot {what}: the multipart upload is gone; store it again.")

    def abort_upload(self, key: str, upload_id: str) -> None:
        """MultipartStore.abort_upload."""
        what, full_key = f"abort the upload of {self._url(key)}", self._key(key)
        with contextlib.suppress(UploadGone, ObjectMissing), _on_upload(what):
            self._connection.call(lambda s3: s3.abort(full_key, upload_id), what)

    def list_parts(self, key: str, upload_id: str) -> Sequence[PartStat]:
        """MultipartStore.list_parts."""
        what, full_key = f"list the parts of {self._url(key)}", self._key(key)
        with _on_upload(what, NO_KEY):
            return list(self._connection.entries(lambda s3, after: s3.parts(full_key, upload_id, after), what))

    def uploads_of(self, key: str) -> Sequence[str]:
        """MultipartStore.uploads_of; none where the server cannot list them."""
        full_key = self._key(key)
        return [found.id for found in self.unfinished(full_key, self._url(key)) if found.key == full_key]

    def unfinished(self, prefix: str, url: str) -> Iterator[UnfinishedUpload]:
        """The unfinished uploads of whole keys that begin with ``prefix``; ``url``: what that is for users.

        None where the server cannot list them. Raises storage errors. A process that is killed during an upload leaves
        its parts in the bucket, where they cost space and no listing of objects shows them (Amazon S3, "Aborting a
        multipart upload").
        """
        what = f"list the unfinished uploads of {url}"
        try:
            for found in self._connection.entries(lambda s3, after: s3.uploads(prefix, after), what):
                if found.key.startswith(prefix):  # some servers do not filter
                    yield found
        except StorageError as error:
            if code_of(error) not in NOT_IMPLEMENTED:
                raise


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


def part_size_for(size: int, part_size: int) -> int:
    """Bytes per part: ``part_size``, or as many whole MiB as are needed for at most MAX_PARTS parts."""
    return max(part_size, -(-size // MAX_PARTS // MIB) * MIB)


def multipart_etag(etags: Sequence[str]) -> str | None:
    """md5 of the parts' md5 digests with the number of parts, or None when the part ETags are not md5."""
    try:
        digests = [bytes.fromhex(bare(etag)) for etag in etags]
    except ValueError:
        return None
    return f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def precondition_failed(what: str, over: Over) -> PreconditionFailed:
    """The error for a write that may not replace what is there. ``what``: see errors.translate."""
    reason = "was changed or removed by somebody else" if over.if_match is not None else "is there already"
    return PreconditionFailed(
        f"Cannot {what}: the object {reason}; read it again.",
        errno=ObjectChanged.errno if over.if_match is not None else None,
    )
