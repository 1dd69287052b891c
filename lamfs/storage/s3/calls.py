"""What lamfs asks of an S3 server, one request per method. Direct (direct.py) and Boto (boto.py) both implement it.

Keys are whole object keys of one bucket. What an answer holds has been checked (limits.py). ETags are without quotes,
except those of parts, which the server wants back exactly as it sent them. Every method raises Refused, NotS3, NoAnswer
or one of botocore's exceptions; errors.translate turns them into lamfs's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from lamfs.storage.base import ANYTHING, ObjectStat, Over, PartStat, UnfinishedUpload
from lamfs.storage.meta import NO_HEADERS

T = TypeVar("T")

Headers = Mapping[str, str]
"""HTTP headers, with lower-case names. Of a request: what is stored with the object and sent back with it."""
Marker = tuple[str, ...]
"""Where a listing continues: what its last page said. Empty: at its beginning."""


class Timeouts(NamedTuple):
    """Seconds. ``connect``: to make a connection. ``silence``: of the server; ``patient``: while it copies or
    assembles gigabytes before it replies."""

    connect: float
    silence: float
    patient: float


class Elsewhere(Exception):
    """The server sends the request to another region or endpoint. botocore can follow."""


class FileBody(Protocol):
    """A request body that is read from a file as it is sent. Its methods raise OSError and EOFError."""

    def readinto(self, place: memoryview, /) -> int:
        """Put the next bytes into ``place``. Returns how many; 0 at the end."""

    def sha256(self) -> str:
        """SHA-256 of all of it, in hex."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As io.RawIOBase.seek."""


Body = bytes | FileBody


class Head(NamedTuple):
    """An object without its bytes."""

    size: int
    etag: str
    mtime_ns: int
    headers: Headers


class Stream(Protocol):
    """The body of an answer. It must be read to its end, or closed."""

    def readinto(self, view: memoryview, /) -> int:
        """Up to ``len(view)`` bytes; 0 at the end."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes, none at the end."""

    def close(self) -> None:
        """Read no more."""


class Content(NamedTuple):
    """An object's bytes, or a range of them. ``etag`` is empty and the others are None where the server says nothing.

    ``length``: bytes of the body. ``range``: the Content-Range header.
    """

    body: Stream
    status: int
    etag: str
    length: int | None
    range: str | None


class Page(NamedTuple, Generic[T]):
    """A page of a listing. ``more``: there is another one, from ``following`` on."""

    entries: Sequence[T]
    more: bool
    following: Marker


class NotDeleted(NamedTuple):
    """A key that DeleteObjects could not delete, and the error code."""

    key: str
    code: str


class S3(Protocol):
    """One bucket. Thread-safe."""

    def head(self, key: str) -> Head:
        """HeadObject."""

    def get(self, key: str, start: int = 0, stop: int | None = None, if_match: str | None = None) -> Content:
        """GetObject: the bytes from ``start`` to before ``stop`` (None: to the end)."""

    def put(self, key: str, body: Body, size: int, headers: Headers = NO_HEADERS, over: Over = ANYTHING) -> str:
        """PutObject of ``size`` bytes. Returns the ETag."""

    def copy(self, key: str, source: str, source_etag: str, headers: Headers = NO_HEADERS) -> str:
        """CopyObject. ``headers``: instead of the source's, if there are any. Returns the ETag."""

    def delete(self, key: str) -> None:
        """DeleteObject."""

    def delete_many(self, keys: Sequence[str]) -> list[NotDeleted]:
        """DeleteObjects. Returns what is left."""

    def objects(self, prefix: str, after: Marker = (), most: int | None = None) -> Page[ObjectStat]:
        """ListObjectsV2: ``most`` objects per page at most."""

    def begin(self, key: str, headers: Headers = NO_HEADERS) -> str:
        """CreateMultipartUpload. Returns the upload's id."""

    def send_part(self, key: str, upload_id: str, number: int, body: Body, size: int) -> str:
        """UploadPart. Returns the ETag as it was sent."""

    def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, start: int, stop: int
    ) -> str:
        """UploadPartCopy of the bytes from ``start`` to before ``stop``. Returns the ETag as it was sent."""

    def complete(self, key: str, upload_id: str, etags: Sequence[str], over: Over = ANYTHING) -> str:
        """CompleteMultipartUpload of parts 1 to ``len(etags)``. Returns the object's ETag."""

    def abort(self, key: str, upload_id: str) -> None:
        """AbortMultipartUpload."""

    def parts(self, key: str, upload_id: str, after: Marker = ()) -> Page[PartStat]:
        """ListParts."""

    def uploads(self, prefix: str, after: Marker = ()) -> Page[UnfinishedUpload]:
        """ListMultipartUploads."""

    def close(self) -> None:
        """Close idle connections now, and the others when they are not in use any more."""


def bare(etag: str) -> str:
    """An ETag as lamfs keeps it, without quotes and weak mark."""
    return etag.removeprefix("W/").strip('"')


def quoted(etag: str) -> str:
    """An ETag as ``If-Match`` needs it (RFC 9110 §8.8.3)."""
    return f'"{etag}"'


def range_of(start: int, stop: int | None) -> str:
    """The Range header for the bytes from ``start`` to before ``stop`` (None: to the end)."""
    return f"bytes={start}-{'' if stop is None else stop - 1}"
