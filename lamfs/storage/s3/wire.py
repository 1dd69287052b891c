"""Keep-alive connections to one server over http.client: what S3 calls need of HTTP/1.1. Thread-safe.

http.client parses heads, chunks and lengths. This module adds the pool, time limits, Expect: 100-continue, and errors
that http.client does not report: truncated bodies and invalid lengths. Most of a large body goes from the socket
directly to its destination; only its first and last 8 KiB may pass through the library's buffer.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import select
import socket
import ssl
import termios
import time
from array import array
from collections import deque
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection, RemoteDisconnected
from typing import cast

from lamfs.storage.s3.calls import Body
from lamfs.storage.s3.errors import NoAnswer
from lamfs.storage.s3.slow import TimedResponse, TooSlow
from lamfs.storage.signs import sign

POOL_CONNECTIONS = 64
"""Idle connections to one server that are kept."""
PIECE = 256 << 10
"""Bytes per send, each of which may take as long as silence is allowed, and per read, which is lost when it fails."""
EXPECT_ABOVE = 1 << 20
"""Larger bodies are sent after the server asks for them (100-continue, RFC 9110 §10.1.1), ..."""
EXPECT_SECONDS = 1.0
"""... or has been silent for so many seconds. Not over TLS, where a reply cannot be seen without reading it."""
OFF_SECONDS = 0.25
"""Seconds between two looks at how much of a body is still unsent."""
_INTERIM_BYTES = 4096
MAX_INTERIM = 100
"""Interim replies, and lines after the last chunk, at most. The library reads any number of them."""
_STATUS = re.compile(r"HTTP/1\.1 ([2-5]\d\d)(?: [^\r\n]*)?")
_LENGTH = re.compile(r"[0-9]{1,19}")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*)")


class Reply:
    """A reply whose body has not been read yet. One thread uses and closes it. ``headers`` have lower-case names."""

    def __init__(self, wire: Wire, line: HTTPConnection, response: _Response, *, keep: bool) -> None:
        """``keep``: the connection can be reused when the body has been read. Raises NoAnswer."""
        self.status = response.status
        self.headers = _checked_headers(response)
        self._wire = wire
        self._line = line
        self._response = response
        self._keep = keep and not response.will_close
        self._done = False
        if response.length == 0:
            if self._keep and _hung_up(line):
                raise NoAnswer("it hung up before its answer was whole")
            response.read()
            self._finish()

    def readinto(self, view: memoryview) -> int:
        """Up to ``len(view)`` bytes of the body, 0 at its end. Raises NoAnswer, also when the body is truncated."""
        if self._done or not len(view):
            return 0
        try:
            count = self._response.readinto(view[:PIECE])
        except (OSError, HTTPException) as error:
            raise self._broken(error) from error
        self._look_for_end(count)
        return count

    def whole(self, most: int) -> bytes:
        """The body, ``most`` bytes of it at most. Raises NoAnswer as readinto does."""
        found = bytearray()
        while len(found) < most and (part := self.read(most - len(found))):
            found += part
        return bytes(found)

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes of the body, none at its end. Raises NoAnswer as readinto does."""
        if self._done or not size:
            return b""
        try:
            part = self._response.read(min(size, PIECE))
        except (OSError, HTTPException) as error:
            raise self._broken(error) from error
        self._look_for_end(len(part))
        return part

    def close(self) -> None:
        """Close the connection, unless the body was read to its end: then it is back in the pool already."""
        if not self._done:
            self._done = True
            self._response.close()
            self._line.close()

    def _look_for_end(self, count: int) -> None:
        """``count`` bytes have just arrived. They are good even if no others follow."""
        if not self._response.isclosed():
            return
        if not self._response.length:
            self._finish()
        elif not count:
            raise self._broken(HTTPException())

    def _broken(self, error: Exception) -> NoAnswer:
        self.close()
        return NoAnswer(_cause(error) if isinstance(error, OSError) else "its answer broke off")

    def _finish(self) -> None:
        self._done = True
        if self._keep:
            self._wire.give_back(self._line)
        else:
            self._line.close()


class _Response(TimedResponse):
    """http.client's response with a faster parser for simple heads, which take most of a small request's time."""

    _method: str
    _interim = 0
    simple: dict[str, str] | None = None
    """The headers, with lower-case names, of an HTTP/1.1 reply that has each name once and a length."""

    def _read_status(self) -> tuple[str, int, str]:
        """The status of one reply. The library calls it again after each interim reply."""
        self._interim += 1
        if self._interim > MAX_INTERIM:
            raise HTTPException("an answer that never begins")
        found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        return found

    def _read_and_discard_trailer(self) -> None:
        for _ in range(MAX_INTERIM):
            if self.fp.readline(_INTERIM_BYTES) in (b"\r\n", b"\n", b""):
                return
        raise HTTPException("an answer that never ends")

    def begin(self) -> None:
        head, end, _ = self.fp.peek().partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = _STATUS.fullmatch(first)
        fields = [_FIELD.fullmatch(line) for line in lines]
        found = {field[1].lower(): field[2].rstrip() for field in fields if field is not None}
        length = _LENGTH.fullmatch(found.get("content-length", ""))
        if (
            status is None
            or not end
            or len(found) < len(lines)
            or length is None
            or "transfer-encoding" in found
            or status[1] in ("204", "304")
        ):
            super().begin()
            return
        self.fp.read(len(head) + len(end))
        self.version, self.status, self.code = 11, int(status[1]), int(status[1])
        self.headers = self.msg = HTTPMessage()
        self.chunked = False
        self.length = 0 if self._method == "HEAD" else int(length[0])
        self.will_close = "close" in found.get("connection", "").lower()
        self.simple = found
        self._timed.body_begins()


class Wire:
    """Connections to one server, kept for later requests. Thread-safe."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        context: ssl.SSLContext | None,
        connect_timeout: float,
        keep: int,
    ) -> None:
        """``context``: for TLS. ``connect_timeout``: seconds to make a connection. ``keep``: most idle connections."""
        self._host, self._port = host, port
        self._context = context
        self._connect_timeout = connect_timeout
        self._idle: deque[HTTPConnection] = deque()
        self._keep = keep
        self._closed = False

    def request(self, method: str, target: str, headers: Mapping[str, str], body: Body | None, timeout: float) -> Reply:
        """Send a request. ``headers`` include its Host and the length of its body.

        ``timeout``: seconds of silence that are allowed; slow replies: see slow.py. Raises NoAnswer, what reading the
        body raises, and ValueError for a line break in a header.
        """
        ask = body is not None and self._context is None and int(headers.get("content-length", 0)) > EXPECT_ABOVE
        line = self._idle_or_new()
        try:
            line.sock.settimeout(timeout)
            line.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                line.putheader(name, value)
            if ask:
                line.putheader("expect", "100-continue")
            whole = _send(line, body, ask)
            if ask or (body is not None and not isinstance(body, bytes)):
                _see_off(line, timeout)
            response = _response(line)
            if response.status < 300 and not whole:
                raise NoAnswer("it took a part of the body for the whole")
            return Reply(self, line, response, keep=whole)
        except NoAnswer:
            line.close()
            # What broke this connection (another network, a gateway that forgets) probably broke the idle ones too.
            self._drop_idle()
            raise
        except BaseException:
            line.close()
            raise

    def give_back(self, line: HTTPConnection) -> None:
        """A reply was read to its end, and the connection can be reused."""
        if len(self._idle) < self._keep:
            self._idle.append(line)
        else:
            line.close()
        if self._closed:
            self.close()

    def close(self) -> None:
        """Close the idle connections now, and the others when they come back."""
        self._closed = True
        self._drop_idle()

    __del__ = close

    def _drop_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _idle_or_new(self) -> HTTPConnection:
        while True:
            try:
                line = self._idle.pop()
            except IndexError:
                return self._connect()
            if not _answers(line, 0):
                return line
            line.close()  # the server closed it, or sent something unasked

    def _connect(self) -> HTTPConnection:
        line: HTTPConnection
        if self._context is None:
            line = HTTPConnection(self._host, self._port, timeout=self._connect_timeout)
        else:
            line = HTTPSConnection(self._host, self._port, timeout=self._connect_timeout, context=self._context)
        line.response_class = _Response
        try:
            line.connect()  # sets TCP_NODELAY
            line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as error:
            line.close()
            raise NoAnswer(_cause(error)) from error
        return line


def _send(line: HTTPConnection, body: Body | None, ask: bool) -> bool:
    """Send head and body. Returns whether all was sent: not when the server answered before.

    Raises NoAnswer, and what reading the body raises.
    """
    try:
        if ask:
            _end_head(line)
            if _refuses(line):
                return False
        elif body is None or (isinstance(body, bytes) and len(body) <= PIECE):
            _end_head(line, body)
            return True
        else:
            _end_head(line)
        if isinstance(body, bytes):
            for at in range(0, len(body), PIECE):
                _send_piece(line, memoryview(body)[at : at + PIECE])
        elif body is not None:
            place = memoryview(bytearray(PIECE))
            while count := body.readinto(place):
                _send_piece(line, place[:count])
    except NoAnswer:
        if not _answers(line, 0):
            raise
        return False  # it refused before it had everything, and closed the connection: its answer counts
    return True


def _see_off(line: HTTPConnection, timeout: float) -> None:
    """Wait for the answer while the body is still being sent. Returns also when no more of it is accepted.

    Megabytes of the body wait in this machine's own buffer, which takes minutes on a slow line. That is not silence of
    the server.
    """
    left = _unsent(line)
    since = time.monotonic()
    while left and time.monotonic() - since < timeout:
        if _answers(line, OFF_SECONDS):
            return
        now = _unsent(line)
        if now < left:
            left, since = now, time.monotonic()
            sign()


def _unsent(line: HTTPConnection) -> int:
    """Bytes that the server's machine has not acknowledged yet: tcp(7), SIOCOUTQ."""
    found = array("i", [0])
    try:
        fcntl.ioctl(line.sock, termios.TIOCOUTQ, found)
    except OSError:
        return 0
    return found[0]


def _end_head(line: HTTPConnection, body: bytes | None = None) -> None:
    try:
        line.endheaders(body)
    except OSError as error:
        raise NoAnswer(_cause(error)) from error


def _send_piece(line: HTTPConnection, data: memoryview) -> None:
    try:
        line.send(data)
    except OSError as error:
        raise NoAnswer(_cause(error)) from error


def _refuses(line: HTTPConnection) -> bool:
    """Whether the server answers instead of asking for the body. A request for the body (100-continue) is consumed."""
    if not _answers(line, EXPECT_SECONDS):
        return False
    try:
        said = line.sock.recv(_INTERIM_BYTES, socket.MSG_PEEK)
        if not said.startswith((b"HTTP/1.1 100", b"HTTP/1.0 100")):
            return True
        line.sock.recv(said.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in said else 0)
    except OSError as error:
        raise NoAnswer(_cause(error)) from error
    return False


def _response(line: HTTPConnection) -> _Response:
    try:
        return cast(_Response, line.getresponse())
    except RemoteDisconnected as error:
        raise NoAnswer("it hung up without an answer") from error
    except HTTPException as error:
        raise NoAnswer("its answer is no HTTP") from error
    except OSError as error:
        raise NoAnswer(_cause(error)) from error


def _checked_headers(response: _Response) -> dict[str, str]:
    """The headers, with lower-case names. Raises NoAnswer when they do not define the body's length for certain.

    http.client would then assume a body that ends with the connection, and takes a truncated head for a complete one.
    """
    if response.simple is not None:
        return response.simple
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        low = name.lower()
        # a value may continue in the next line (obs-fold, RFC 9112 §5.2)
        value = " ".join(value.split()) if "\n" in value or "\r" in value else value.rstrip()
        if low == "content-length" and (headers.get(low, value) != value or not _LENGTH.fullmatch(value)):
            raise NoAnswer("its answer is no HTTP: the length of the body is wrong")
        headers[low] = value
    to_the_end = response.length is None and not response.chunked
    unsaid = response.version >= 11 and "close" not in headers.get("connection", "").lower()
    if response.status < 200 or response.headers.defects or (to_the_end and (unsaid or "transfer-encoding" in headers)):
        raise NoAnswer("its answer is no HTTP")
    return headers


def _answers(line: HTTPConnection, seconds: float) -> bool:
    """Whether something arrives within so many seconds, if only the end."""
    if isinstance(line.sock, ssl.SSLSocket) and line.sock.pending():
        return True
    poll = select.poll()
    poll.register(line.sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _hung_up(line: HTTPConnection) -> bool:
    """Whether the connection has ended here: http.client takes a truncated head for a complete one."""
    if not _answers(line, 0):
        return False
    try:
        if not isinstance(line.sock, ssl.SSLSocket):
            return not line.sock.recv(1, socket.MSG_PEEK)
        line.sock.settimeout(0)  # the next request sets another
        line.sock.recv(1)
        return True  # the end, or something unasked
    except ssl.SSLWantReadError:
        return False  # a message of TLS itself
    except OSError:
        return True


def _cause(error: OSError) -> str:
    if isinstance(error, TooSlow):
        return "it answered too slowly"
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return error.strerror or str(error)
