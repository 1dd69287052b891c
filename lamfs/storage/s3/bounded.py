"""botocore's HTTP with limits. Thread-safe.

botocore itself reads the whole body of a reply, however long it is and however slowly it comes. It also reads a reply
that comes before its own request's body (100-continue); that one has no limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
    AWSResponse,
)
from urllib3.exceptions import HTTPError

from lamfs.storage.s3 import xmltext
from lamfs.storage.s3.errors import NoAnswer, NotS3
from lamfs.storage.s3.replies import ERROR_BYTES
from lamfs.storage.s3.slow import TimedResponse
from lamfs.storage.s3.wire import PIECE


class _Connection(AWSHTTPConnection):
    response_class = TimedResponse  # type: ignore[assignment]  # botocore makes plain ones


class _SecureConnection(AWSHTTPSConnection):
    response_class = TimedResponse  # type: ignore[assignment]  # botocore makes plain ones


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class BoundedSession:
    """Replaces the session of a client's endpoint. Bodies of objects are streamed as before."""

    def __init__(self, session: Any) -> None:
        self._session = session
        # the session and its proxies look into this one dictionary when they make a pool
        session._pool_classes_by_scheme.update(http=_Pool, https=_SecurePool)

    def send(self, request: Any) -> Any:
        """The reply to a request. Raises NoAnswer, NotS3, and what botocore's session raises."""
        streamed, request.stream_output = request.stream_output, True  # else the session reads all of it
        reply = self._session.send(request)
        good = reply.status_code < 300
        if streamed and good:
            return reply
        body = _read(reply.raw, xmltext.MAX_BYTES if good else ERROR_BYTES)
        if body is None and good:
            raise NotS3("its answer does not end")
        body = body or b""
        try:
            if body.strip():
                xmltext.parse(body)  # and then by botocore, without these limits
        except xmltext.NotXml as error:
            if good:
                raise NotS3(f"its answer is none: {error}") from error
            body = b""  # the status says what is wrong
        return AWSResponse(reply.url, reply.status_code, reply.headers, _Said(body))

    def close(self) -> None:
        """End idle connections."""
        self._session.close()


class _Said:
    """A body that has been read."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self) -> Iterator[bytes]:
        """All of it."""
        yield self._body


def _read(raw: Any, most: int) -> bytes | None:
    """The body. None when it is longer; then the connection is closed."""
    found = bytearray()
    try:
        for part in raw.stream(PIECE):
            found += part
            if len(found) > most:
                raw.close()
                return None
    except (HTTPError, OSError) as error:
        raise NoAnswer("its answer broke off") from error
    return bytes(found)
