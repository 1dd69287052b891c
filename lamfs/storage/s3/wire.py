"""HTTP/1.1 over kept connections to one server: the little of it that calls of S3 need. Thread-safe.

urllib3 and botocore take a millisecond of CPU for each request, and copy each body twice. Here a request is one line of
text and a reply's body goes from the socket to where it is wanted.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, Protocol

HEAD_LIMIT = 256 << 10
"""Bytes of a reply's status line and headers, and of one line of a chunked body."""
RECEIVE = 64 << 10
SEND = 256 << 10
"""Bytes per send: each may take as long as silence is borne."""
EXPECT_ABOVE = 1 << 20
"""Larger bodies are sent when the server has said that it wants them (100-continue, RFC 9110 §10.1.1), ..."""
EXPECT_SECONDS = 1.0
"""... or has said nothing for so long."""
_NO_BODY = frozenset({204, 304})


class NoAnswer(Exception):
    """The server could not be reached, did not answer in time, or broke off. Its text says which."""


class Source(Protocol):
    """A request body that is read as it is sent."""

    def readinto(self, place: memoryview, /) -> int:
        """Put the next bytes there; how many, 0 at the end."""


class Head(NamedTuple):
    """A reply's head: its status, whether the connection goes on, and its headers, with lower-case names."""

    status: int
    keep: bool
    headers: dict[str, str]


class Reply:
    """A reply whose body was not read yet. One thread uses it, and closes it."""

    def __init__(self, wire: Wire, line: _Line, head: Head, *, bare: bool, keep: bool) -> None:
        """``bare``: there is no body. ``keep``: the connection can be used again."""
        self.status, _, headers = head
        self.headers = headers
        self._wire = wire
        self._line: _Line | None = line
        self._keep = keep
        self._chunked = not bare and "chunked" in headers.get("transfer-encoding", "").lower()
        self._left: int | None = None
        """Bytes of the body, or of its chunk, that were not read; None: until the connection ends."""
        try:
            if bare:
                self._left = 0
            elif self._chunked:
                self._next_chunk()
            elif "content-length" in headers:
                self._left = _length(headers["content-length"], 10)
        except NoAnswer:
            self.close()
            raise
        if self._left == 0:
            self._finish()

    def readinto(self, view: memoryview) -> int:
        """Up to ``len(view)`` bytes of the body, 0 at its end or where the connection ends. Raises NoAnswer."""
        line = self._line
        if line is None or not len(view):
            return 0
        left = self._left
        count = line.receive_into(view if left is None or left >= len(view) else view[:left])
        if count == 0:
            self.close()
            return 0
        if left is not None:
            self._left = left - count
            if left == count:
                if self._chunked:
                    line.until(b"\r\n")
                    self._next_chunk()
                if self._left == 0:
                    self._finish()
        return count

    def read(self, size: int = -1) -> bytes:
        """``size`` bytes, all when negative; fewer only at the end. Raises NoAnswer."""
        parts = []
        while size:
            piece = bytearray(RECEIVE if size < 0 else min(size, RECEIVE))
            count = self.readinto(memoryview(piece))
            if not count:
                break
            parts.append(piece[:count])
            size -= count if size > 0 else 0
        return b"".join(parts)

    def close(self) -> None:
        """End the connection, unless the body was read to its end: then it has been given back."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _next_chunk(self) -> None:
        assert self._line is not None
        self._left = _length(self._line.until(b"\r\n").partition(b";")[0], 16)
        if self._left == 0:
            while self._line.until(b"\r\n"):
                pass  # trailers

    def _finish(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            self._wire.give_back(line, self._keep)


class _Line:
    """One connection. One thread at a time uses it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""
        """Bytes that were received and not used."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()

    __del__ = close

    def is_idle(self) -> bool:
        """Whether the server has said nothing, and has not hung up, since the last reply."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not self._rest and not poll.poll(0)

    def exchange(self, head: bytes, body: bytes | Source | None, ask: bool) -> tuple[Head, bool]:
        """Send a request; the head of its reply, and whether all was sent. ``ask``: first, whether the body is wanted.

        Raises NoAnswer, and what reading the body raises.
        """
        found: Head | None = None
        whole = True
        try:
            self._send(head, None if ask else body)
            if ask and self.answers(EXPECT_SECONDS):
                found = self.head()
            if found is not None and found.status >= 200:
                whole = False
            elif ask:
                self._send(b"", body)
        except NoAnswer:
            if not self.answers(0):
                raise
            whole = False  # it has refused before it had everything, and hung up: its answer counts
        while found is None or found.status < 200:
            found = self.head()
        return found, whole

    def _send(self, head: bytes, body: bytes | Source | None) -> None:
        if isinstance(body, bytes) and len(body) <= SEND:
            head, body = head + body, None
        self._send_all(memoryview(head))
        if isinstance(body, bytes):
            self._send_all(memoryview(body))
        elif body is not None:
            place = memoryview(bytearray(SEND))
            while count := body.readinto(place):
                self._send_all(place[:count])

    def _send_all(self, data: memoryview) -> None:
        for at in range(0, len(data), SEND):
            try:
                self.sock.sendall(data[at : at + SEND])
            except OSError as error:
                raise NoAnswer(_cause(error)) from error

    def answers(self, seconds: float) -> bool:
        """Whether something comes within so many seconds."""
        if self._rest or (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()):
            return True
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def receive_into(self, view: memoryview) -> int:
        if self._rest:
            count = min(len(self._rest), len(view))
            view[:count] = self._rest[:count]
            self._rest = self._rest[count:]
            return count
        try:
            return self.sock.recv_into(view)
        except OSError as error:
            raise NoAnswer(_cause(error)) from error

    def until(self, end: bytes) -> bytes:
        """What comes before ``end``. Raises NoAnswer."""
        while (at := self._rest.find(end)) < 0:
            try:
                data = self.sock.recv(RECEIVE)
            except OSError as error:
                raise NoAnswer(_cause(error)) from error
            if not data or len(self._rest) > HEAD_LIMIT:
                raise NoAnswer("it hung up without an answer" if not data else "its answer is no HTTP")
            self._rest += data
        found, self._rest = self._rest[:at], self._rest[at + len(end) :]
        return found

    def head(self) -> Head:
        """The head of the next reply, ``100 Continue`` too. Raises NoAnswer."""
        first, *fields = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise NoAnswer("its answer is no HTTP")
        headers = {}
        for field in fields:
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        kept = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        return Head(int(rest[:3]), kept, headers)


class Wire:
    """Connections to one server, kept for the next request. Thread-safe."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        context: ssl.SSLContext | None,
        connect_timeout: float,
        keep: int,
    ) -> None:
        """``context``: for TLS. ``connect_timeout``: seconds for making a connection. ``keep``: idle ones at most."""
        self._host, self._port = host, port
        self._context = context
        self._connect_timeout = connect_timeout
        self._idle: deque[_Line] = deque()
        self._keep = keep
        self._closed = False

    def request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | Source | None, timeout: float
    ) -> Reply:
        """Send a request; ``headers`` have its Host and the length of its body. ``timeout``: seconds of silence that
        are borne. Raises NoAnswer, and what reading the body raises."""
        ask = body is not None and int(headers.get("content-length", 0)) > EXPECT_ABOVE
        text = [f"{method} {target} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in headers.items())]
        text.append("expect: 100-continue\r\n\r\n" if ask else "\r\n")
        line = self._take()
        try:
            line.sock.settimeout(timeout)
            head, whole = line.exchange("".join(text).encode("latin-1"), body, ask)
        except BaseException:
            line.close()
            raise
        return Reply(self, line, head, bare=method == "HEAD" or head.status in _NO_BODY, keep=whole and head.keep)

    def give_back(self, line: _Line, keep: bool) -> None:
        """A reply was read to its end."""
        if keep and not self._closed and len(self._idle) < self._keep:
            self._idle.append(line)
        else:
            line.close()

    def close(self) -> None:
        """End the idle connections, and those in use when they come back."""
        self._closed = True
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().close()

    def _take(self) -> _Line:
        while True:
            try:
                line = self._idle.pop()
            except IndexError:
                return self._connect()
            if line.is_idle():
                return line
            line.close()

    def _connect(self) -> _Line:
        try:
            sock = socket.create_connection((self._host, self._port), self._connect_timeout)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if self._context is not None:
                    sock = self._context.wrap_socket(sock, server_hostname=self._host)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise NoAnswer(_cause(error)) from error
        return _Line(sock)


def _length(text: str | bytes, base: int) -> int:
    try:
        length = int(text, base)
    except ValueError:
        length = -1
    if length < 0:
        raise NoAnswer("its answer is no HTTP: the length of the body is wrong")
    return length


def _cause(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return error.strerror or str(error)
