"""Replies that come too slowly.

A socket's timeout applies to one recv, and http.client calls recv until it has what it wants. A server that sends a
byte now and then would block a thread for ever, so time and bytes are counted here.
"""

from __future__ import annotations

import io
import socket
import time
from http.client import HTTPResponse
from typing import Any

from lamfs.storage.s3.limits import SLOWEST
from lamfs.storage.signs import sign


class TooSlow(TimeoutError):
    """Bytes arrive, but fewer than SLOWEST in a second."""


class TimedResponse(HTTPResponse):
    """A response whose reads raise TooSlow when the server is too slow. http.client lets that exception through.

    The time allowed is twice the socket's timeout, so one silence alone is not slow. Before the first byte only the
    socket's timeout counts. The head must be complete within that time; the body, with its chunk sizes and trailer,
    must come at SLOWEST or faster. Over TLS one recv reads a whole record, and the timeout applies to that.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._timed = _Timed(self.fp.detach(), sock.gettimeout())
        self.fp = io.BufferedReader(self._timed)

    def begin(self) -> None:
        super().begin()
        self._timed.body_begins()


class _Timed(io.RawIOBase):
    """The bytes of one reply as they come from the socket."""

    def __init__(self, raw: io.RawIOBase, silence: float | None) -> None:
        """``silence``: seconds that one recv may take; None: no limit."""
        self._raw = raw
        self._silence = float("inf") if silence is None else silence
        self._begun = False
        self._in_head = True
        self._waited = 0.0
        self._came = 0

    def readable(self) -> bool:
        return True

    def readinto(self, place: Any, /) -> int:
        began = time.monotonic()
        count: int = self._raw.readinto(place)
        if count:
            sign()
        if not self._begun:
            self._begun = True
            return count
        # A longer wait than one recv can take means that this process was stopped.
        self._waited += min(time.monotonic() - began, self._silence)
        self._came += count
        if self._waited >= 2 * self._silence and count:
            if self._in_head or self._came < SLOWEST * self._waited:
                raise TooSlow("too slow")
            self._waited, self._came = 0.0, 0
        return count

    def body_begins(self) -> None:
        """The head is complete: from here on the rate counts."""
        self._in_head = False
        self._waited, self._came = 0.0, 0

    def close(self) -> None:
        super().close()
        self._raw.close()
