"""HTTP over a socket, against a server that says exactly what a test wants; signatures, against Amazon's example."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse, InvalidURL

import pytest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from lamfs.storage.s3 import sign, wire
from lamfs.storage.s3.wire import NoAnswer, Wire

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Script:
    """Answers connections one after the other: each is a list of steps. ``read`` waits for a request's head, ``body n``
    for bytes, ``close`` ends the connection; other steps are sent."""

    def __init__(self, *connections: list[bytes]) -> None:
        self.heads: list[str] = []
        self._connections = connections
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Script:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        for steps in self._connections:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, sock.makefile("rb") as stream, contextlib.suppress(OSError):
                sock.settimeout(5)
                for step in steps:
                    if step == b"read":
                        lines = []
                        while (line := stream.readline()) not in (b"\r\n", b""):
                            lines.append(line.decode())
                        self.heads.append("".join(lines))
                    elif step.startswith(b"body "):
                        stream.read(int(step[5:]))
                    elif step == b"close":
                        break
                    else:
                        sock.sendall(step)
                else:
                    stream.read(1)  # until the client hangs up


@contextlib.contextmanager
def wired(*connections: list[bytes]) -> Iterator[tuple[Wire, Script]]:
    with Script(*connections) as script:
        line = Wire("127.0.0.1", script.port, context=None, connect_timeout=2, keep=4)
        try:
            yield line, script
        finally:
            line.close()


def fetch(line: Wire, method: str = "GET", body: bytes | None = None, timeout: float = 5.0) -> tuple[int, bytes]:
    headers = {"host": "h"} if body is None else {"host": "h", "content-length": str(len(body))}
    reply = line.request(method, "/k", headers, body, timeout)
    with contextlib.closing(reply):
        return reply.status, reply.whole(1 << 20)


def test_a_connection_is_used_again() -> None:
    with wired([b"read", OK, b"read", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", b"read", OK]) as (line, script):
        assert [fetch(line), fetch(line), fetch(line)] == [(200, b"ok"), (404, b""), (200, b"ok")]
        assert script.heads[0] == "GET /k HTTP/1.1\r\nhost: h\r\n"


def test_what_comes_before_and_behind_a_reply_ends() -> None:
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"
    go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
    with wired([b"read", 3 * go_on + OK, b"read", chunks + 3 * b"t: x\r\n" + b"\r\n", b"read", OK]) as (line, _):
        assert [fetch(line), fetch(line), fetch(line)] == 3 * [(200, b"ok")]
    for said in (1000 * go_on, chunks + 1000 * b"t: x\r\n"):
        with wired([b"read", said]) as (line, _), pytest.raises(NoAnswer):
            fetch(line)


def test_a_reply_to_head_has_no_body() -> None:
    with wired([b"read", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"read", OK]) as (line, _):
        assert fetch(line, "HEAD") == (200, b"")
        assert fetch(line) == (200, b"ok")


def test_a_body_in_chunks() -> None:
    chunks = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0a\r\n0123456789\r\n0\r\nT: r\r\n\r\n"
    )
    with wired([b"read", chunks[:60], chunks[60:], b"read", OK]) as (line, _):
        assert fetch(line) == (200, b"abc0123456789")
        assert fetch(line) == (200, b"ok")


def test_a_body_that_ends_with_the_connection() -> None:
    with wired([b"read", b"HTTP/1.0 200 OK\r\n\r\nall", b"close"], [b"read", OK]) as (line, _):
        assert fetch(line) == (200, b"all")
        assert fetch(line) == (200, b"ok")


def test_a_body_that_is_left_unread_ends_the_connection() -> None:
    with wired([b"read", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"], [b"read", OK]) as (line, _):
        reply = line.request("GET", "/k", {}, None, 5.0)
        view = memoryview(bytearray(4))
        assert reply.readinto(view) == 4
        assert bytes(view) == b"half"
        reply.close()
        assert fetch(line) == (200, b"ok")


@pytest.mark.parametrize("framing", [b"Content-Length: 9\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n9\r\nhalf"])
def test_a_body_that_is_cut_short_is_no_answer(framing: bytes) -> None:
    cut = [b"read", b"HTTP/1.1 200 OK\r\n" + framing, b"close"]
    with wired(cut, [b"read", OK]) as (line, _):
        with pytest.raises(NoAnswer, match="broke off"):
            fetch(line)
        assert fetch(line) == (200, b"ok")


def test_what_came_before_a_body_was_cut_short_counts() -> None:
    cut = [b"read", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"close"]
    with wired(cut, cut) as (line, _):
        reply = line.request("GET", "/k", {}, None, 5.0)
        assert reply.read(9) == b"half"
        with pytest.raises(NoAnswer):
            reply.read(5)
        reply = line.request("GET", "/k", {}, None, 5.0)
        view = memoryview(bytearray(9))
        assert reply.readinto(view) == 4
        with pytest.raises(NoAnswer):
            reply.readinto(view)


def test_an_idle_connection_that_the_server_has_closed_is_not_used() -> None:
    with wired([b"read", OK, b"close"], [b"read", OK]) as (line, _):
        assert fetch(line) == (200, b"ok")
        kept = line._idle[0]
        deadline = time.monotonic() + 5
        while not wire._answers(kept, 0) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert fetch(line) == (200, b"ok")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nETag: x\r\n",
        b"HTTP/1.1 200 OK\r\nETag: x\r\nno header\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0x2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: half",
        b"HTTP/1.1 101 Other\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_what_is_no_answer(answer: bytes) -> None:
    with wired([b"read", answer, b"close"]) as (line, _), pytest.raises(NoAnswer):
        fetch(line)


def test_no_header_is_smuggled_in() -> None:
    with wired([], [], [b"read", OK]) as (line, script):
        with pytest.raises(ValueError, match="header"):
            line.request("GET", "/k", {"if-match": "x\r\nhost: other"}, None, 5.0)
        with pytest.raises(InvalidURL):
            line.request("GET", "/k HTTP/1.1\r\nhost: other", {}, None, 5.0)
        assert script.heads == []
        assert fetch(line) == (200, b"ok")


def test_a_header_that_goes_on_in_the_next_line() -> None:
    with wired([b"read", b"HTTP/1.1 200 OK\r\nETag: a\r\n b\r\nContent-Length: 0\r\n\r\n"]) as (line, _):
        with contextlib.closing(line.request("GET", "/k", {}, None, 5.0)) as reply:
            assert reply.headers["etag"] == "a b"


def test_a_body_after_the_end_is_nobodys() -> None:
    with wired([b"read", OK + bytes(20000)], [b"read", OK]) as (line, _):
        assert fetch(line) == (200, b"ok")
        assert fetch(line) == (200, b"ok")


def test_silence_is_no_answer() -> None:
    with wired([b"read"]) as (line, _), pytest.raises(NoAnswer, match="in time"):
        fetch(line, timeout=0.05)


def test_after_silence_no_other_old_connection_is_tried() -> None:
    """A machine that has slept, or changed its network, has only connections of which the server knows nothing."""
    replies = iter([OK, OK, b"", OK])

    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as sock:
            while sock.recv(4096):
                sock.sendall(next(replies))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = Wire("127.0.0.1", listener.getsockname()[1], context=None, connect_timeout=2, keep=4)
        threads = []

        def ask(timeout: float, *, new: bool) -> wire.Reply:
            if new:
                threads.append(threading.Thread(target=answer, args=(listener,)))
                threads[-1].start()
            return line.request("GET", "/k", {"host": "h"}, None, timeout)

        for reply in [ask(5.0, new=True), ask(5.0, new=True)]:
            reply.whole(1 << 20)
        with pytest.raises(NoAnswer):
            ask(0.05, new=False)
        assert not line._idle
        assert ask(5.0, new=True).whole(10) == b"ok"
        line.close()
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)


def test_a_large_body_waits_until_it_is_wanted() -> None:
    body = bytes(wire.EXPECT_ABOVE + 1)
    length = b"body %d" % len(body)
    with wired([b"read", b"HTTP/1.1 100 Continue\r\n\r\n", length, OK, b"read", OK]) as (line, script):
        assert fetch(line, "PUT", body) == (200, b"ok")
        assert "expect: 100-continue" in script.heads[0]
        assert fetch(line, "PUT", b"small") == (200, b"ok")
        assert "expect" not in script.heads[1]


def test_a_large_body_that_is_refused_is_not_sent() -> None:
    body = bytes(wire.EXPECT_ABOVE + 1)
    with wired([b"read", b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"], [b"read", OK]) as (line, _):
        assert fetch(line, "PUT", body) == (503, b"")
        assert fetch(line) == (200, b"ok")  # on another connection: the server may still wait for the body


def test_success_for_a_part_of_a_body_is_none() -> None:
    with wired([b"read", OK]) as (line, _), pytest.raises(NoAnswer, match="a part of the body"):
        fetch(line, "PUT", bytes(wire.EXPECT_ABOVE + 1))


def test_a_server_that_does_not_know_how_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "EXPECT_SECONDS", 0.05)
    body = bytes(wire.EXPECT_ABOVE + 1)
    with wired([b"read", b"body %d" % len(body), OK]) as (line, _):
        assert fetch(line, "PUT", body) == (200, b"ok")


def test_a_refusal_in_the_middle_of_a_body_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "EXPECT_SECONDS", 0.01)
    body = bytes(64 << 20)
    with wired([b"read", b"body 100000", b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"]) as (line, _):
        assert fetch(line, "PUT", body, timeout=0.5)[0] == 403


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    line = Wire("127.0.0.1", port, context=None, connect_timeout=1, keep=1)
    with pytest.raises(NoAnswer, match="refused"):
        fetch(line)


def test_a_signature_is_that_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first example of "Signature Calculations for the Authorization Header" (S3 API reference)."""
    monkeypatch.setattr(sign.time, "gmtime", lambda: time.struct_time((2013, 5, 24, 0, 0, 0, 4, 144, 0)))
    signer = sign.Signer(Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"), "us-east-1")
    headers = {"host": "examplebucket.s3.amazonaws.com", "range": "bytes=0-9"}
    signer.sign("GET", "/test.txt", "", headers, sign.EMPTY)
    assert headers["authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        " SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,"
        " Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


class _Said:
    """What a reply is read from, in place of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(self._data))

    def gettimeout(self) -> float:
        return 5.0


def _understood(kind: type[HTTPResponse], data: bytes) -> tuple[object, ...]:
    response = kind(_Said(data), method="GET")  # type: ignore[arg-type]
    try:
        response.begin()
        headers = wire._checked_headers(response)  # type: ignore[arg-type]
    except (HTTPException, NoAnswer) as error:
        return (type(error),)
    kept = {name: value for name, value in headers.items() if name != "twice"}
    return response.version, response.status, response.length, response.chunked, response.will_close, kept


_FIELDS = [
    "Content-Length: 5", "content-length:5", "Content-Length: 05", "Content-Length: 5, 5", "Content-Length: +5",
    "Content-Length: \u00b2", "Content-Length:", f"Content-Length: {'9' * 5000}", "Content-Length : 5",
    "Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Connection: close", "Connection: Keep-Alive, CLOSE",
    "Twice: a", "Twice: b", "ETag:  \"x\" \t", "Server: \u00e4\u00a0", "Odd: a\rb", "Folded: a\r\n b", " first",
    "no colon", ": no name", "Empty:", "A b: c", "Nul: \0",
]  # fmt: skip
_LINES = [
    "HTTP/1.1 200 OK",
    "HTTP/1.1 206",
    "HTTP/1.1 204 No",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 2000 OK",
    "HTTP/1.1  200 OK",
]


@given(st.sampled_from(_LINES), st.lists(st.sampled_from(_FIELDS), max_size=4), st.integers(0, 3))
def test_a_head_means_what_the_library_reads_in_it(first: str, fields: list[str], cut: int) -> None:
    """Simple heads are read without it."""
    text = "".join(f"{line}\r\n" for line in [first, "Content-Length: 5", *fields][: 4 - cut]) + "\r\n12345"
    data = text.encode("latin-1")
    ours, theirs = _understood(wire._Response, data), _understood(_Library, data)
    assert ours == theirs


def test_most_heads_are_simple() -> None:
    response = wire._Response(_Said(OK), method="GET")  # type: ignore[arg-type]
    response.begin()
    assert response.simple == {"content-length": "2"}
    assert response.read() == b"ok"


class _Library(HTTPResponse):
    simple = None
