"""Replies that come too slowly. A limit of a socket is for one recv, and http.client asks again until it has what it
wants: a server that sends a byte now and then would hold a thread for ever. Here time and bytes are counted.
"""

from __future__ import annotations

import io
import socket
import time
from http.client import HTTPResponse
from typing import Any

from lamfs.storage.signs import sign

SLOWEST = 1024
"""Bytes per second. A reply that comes more slowly counts as none."""


class TooSlow(TimeoutError):
    """Bytes come, but fewer than SLOWEST in a second."""


class PacedResponse(HTTPResponse):
    """The library's, of a server that goes on: else reading raises TooSlow, which the library lets pass.

    What is borne: twice the silence that is, so that one silence alone is not slow. Before the first byte, silence
    is all that is counted. The head must be whole in that time, and the body, the sizes of its chunks, and what is
    behind them, come at SLOWEST or faster. Over TLS a recv is of a whole record, for which its time limit holds.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._paced = _Paced(self.fp.detach(), sock.gettimeout())
        self.fp = io.BufferedReader(self._paced)

    def begin(self) -> None:
        super().begin()
        self._paced.body_begins()


class _Paced(io.RawIOBase):
    """The bytes of one reply, as they come from the socket, to where they are wanted."""

    def __init__(self, raw: io.RawIOBase, silence: float | None) -> None:
        """``silence``: seconds that one recv may last; None: without end."""
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
        # More than a recv may last is the time of a process that was stopped.
        self._waited += min(time.monotonic() - began, self._silence)
        self._came += count
        if self._waited >= 2 * self._silence and count:
            if self._in_head or self._came < SLOWEST * self._waited:
                raise TooSlow("too slow")
            self._waited, self._came = 0.0, 0
        return count

    def body_begins(self) -> None:
        """From here on it is the rate that counts."""
        self._in_head = False
        self._waited, self._came = 0.0, 0

    def close(self) -> None:
        super().close()
        self._raw.close()
