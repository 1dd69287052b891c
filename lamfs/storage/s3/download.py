"""A ranged GET that ends with the requested bytes of one revision, or with an error.

botocore returns bodies that end early without an error, and some servers ignore ``Range`` or ``If-Match``. So lengths,
Content-Range and the reply's own ETag are compared here. A Download is used by one thread.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

from lamfs.errors import LamfsError, ObjectChanged, StorageError, StorageUnavailable
from lamfs.storage.s3.calls import Content, Stream
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.errors import BAD_RANGE, NOT_IMPLEMENTED, code_of

CHUNK = 1 << 20

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")

Sink = Callable[[Stream, int, int], int]
"""``sink(body, at, count)`` reads up to ``count`` bytes of a body and returns how many; 0 at the body's end.

They belong ``at`` bytes behind the start of the wanted range. A range may start over, from distance 0.
"""


def into(view: memoryview) -> Sink:
    """A sink into memory that is as long as the range."""

    def sink(body: Stream, at: int, count: int) -> int:
        with view[at : at + count] as place:
            return body.readinto(place)

    return sink


class Download:
    """One range of one object. After an interruption it is resumed behind what has arrived.

    ``guarded``: the server understands ``If-Match`` on GET. Cleared when it turns out that it does not.
    """

    def __init__(self, connection: Connection, key: str, url: str, etag: str | None, guarded: bool) -> None:
        self.guarded = guarded
        self._connection = connection
        self._key = key
        self._what = f"read {url}"
        self._etag = etag

    def run(self, offset: int, length: int | None, sink: Sink) -> int:
        """Give the range to ``sink``. Returns the number of bytes: fewer than ``length`` if the object ends before.

        Without an ETag, an interrupted download is resumed only in the same revision, and otherwise starts over.
        """
        patience = self._connection.patience()
        pinned = self._etag
        position, stop = offset, None if length is None else offset + length
        while stop is None or position < stop:
            before = position
            try:
                reply = self._request(position, stop, pinned)
                if reply is None:
                    break  # the object ends at or before `position`
                body = reply.body
                with contextlib.closing(body):
                    pinned = self._check_etag(reply, pinned)
                    skip, total = self._check_range(reply, position)
                    stop = total if stop is None else min(stop, total)
                    self._drop(body, skip)
                    while position < stop:
                        count = self._receive(sink, body, position - offset, min(CHUNK, stop - position))
                        if not count:
                            break
                        position += count
                    if position < stop:
                        raise StorageUnavailable(f"Cannot {self._what}: the body was cut short; try again later.")
            except StorageUnavailable as error:
                if position > before:
                    patience.progressed(position - before)
                patience.wait(error)
            except ObjectChanged as error:
                if self._etag is not None:
                    raise
                pinned, position, stop = None, offset, None if length is None else offset + length
                patience.wait(StorageUnavailable(str(error)))
        return position - offset

    def _request(self, position: int, stop: int | None, etag: str | None) -> Content | None:
        """Send one GET. None when the object ends at or before ``position``."""
        if etag is None or not self.guarded:
            return self._get(position, stop, None)
        try:
            return self._get(position, stop, etag)
        except ObjectChanged:
            # Ceph 16 and some gateways answer 412 to the right ETag: then the reply's own ETag must do.
            if self._connection.call(lambda s3: s3.head(self._key), self._what).etag != etag:
                raise
        except StorageError as error:
            if code_of(error) not in NOT_IMPLEMENTED:
                raise
        self.guarded = False
        return self._get(position, stop, None)

    def _get(self, position: int, stop: int | None, etag: str | None) -> Content | None:
        try:
            return self._connection.once(lambda s3: s3.get(self._key, position, stop, etag), self._what)
        except StorageError as error:
            if code_of(error) in BAD_RANGE:
                return None
            raise

    def _check_etag(self, reply: Content, pinned: str | None) -> str:
        if pinned is not None and reply.etag != pinned:
            raise ObjectChanged(
                f"Cannot {self._what}: the object is not the revision that was asked for; look it up again."
            )
        return reply.etag

    def _check_range(self, reply: Content, position: int) -> tuple[int, int]:
        """How many bytes of the body come before ``position``, and the size of the object.

        A server that ignores ``Range`` sends everything, with status 200 and without Content-Range. rclone sends the
        range with status 200.
        """
        if reply.range is None and reply.status == 200 and reply.length is not None:
            return position, reply.length
        match = _CONTENT_RANGE.fullmatch(reply.range or "")
        if (
            match is None
            or match[3] == "*"
            or int(match[1]) != position
            or reply.length not in (None, int(match[2]) + 1 - position)
        ):
            raise StorageUnavailable(
                f"Cannot {self._what}: bytes from {position} were asked for, and the server answered {reply.status}"
                f" with '{reply.range}'; check the server or the proxy in front of it."
            )
        return 0, int(match[3])

    def _drop(self, body: Stream, count: int) -> None:
        while count:
            got = self._receive(lambda body, _, most: len(body.read(most)), body, 0, min(CHUNK, count))
            if not got:
                raise StorageUnavailable(f"Cannot {self._what}: the body was cut short; try again later.")
            count -= got

    def _receive(self, sink: Sink, body: Stream, at: int, count: int) -> int:
        try:
            return sink(body, at, count)
        except LamfsError:
            raise
        except Exception as error:
            raise self._connection.translated(error, self._what) from error
