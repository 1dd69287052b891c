"""A proxy that understands HTTP and breaks it on demand, in front of a real S3 server. Standard library only.

    with FaultProxy(server.port) as proxy:
        config = replace(config, endpoint_url=proxy.url)
        proxy.add("status", code=503, method="PUT", count=3)     # the next three PUTs are answered with 503
        rule = proxy.add("truncate", keep=1000, path="big.bin")  # one GET gets only 1000 bytes of its body
        ...
        assert rule.hits == 1
        proxy.clear()

Every request is compared with the rules in the order in which they were added. The first matching rule acts. It is
used up after ``count`` requests (None: never). ``method`` and ``header`` (a name that the request must have) restrict a
rule. ``path`` is a part of the request's path with its query, as sent (so URL-encoded). ``skip`` lets that many
matching requests through first.

actions: what happens to the request
    delay       forwarded after ``seconds``
    slow        the bodies of request and reply pass at ``rate`` bytes a second
    status      not forwarded; answered with ``code`` (503) and the S3 error code ``error`` ("SlowDown")
    reset       TCP reset: at once without forwarding, or after ``after`` bytes of the reply's body
    hang        swallowed and never answered, until clear(), stop(), or the client goes away
    truncate    the reply's headers are whole; its body ends after ``keep`` bytes (half by default) with a clean close
    corrupt     the reply's body has the right length and one wrong byte at ``at`` (0)
    lost_reply  forwarded; the server acts and answers, but the client gets a reset
    check_then_write   for PUT with If-None-Match: the condition is checked when the request comes, and nothing is held
                meanwhile, so sequential writers are excluded but concurrent ones are not (like Swift)
    strip       forwarded without request header ``name`` (the server must not check signatures)
    reply_header  header ``name`` of the reply becomes ``value`` (None removes it)

``cut()`` resets all connections and refuses new ones, ``heal()`` ends that. ``requests`` lists all requests. The Host
header passes as the client sent it, because SigV4 signs it. The proxy runs in its own thread; all methods may be called
from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

Action = Literal[
    "delay",
    "slow",
    "status",
    "reset",
    "hang",
    "truncate",
    "corrupt",
    "lost_reply",
    "check_then_write",
    "strip",
    "reply_header",
]
CHUNK = 1 << 16


@dataclass
class Rule:
    """One fault. ``hits`` counts the requests on which it acted."""

    action: Action
    method: str | None = None
    path: str = ""
    header: str | None = None
    count: int | None = 1
    skip: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    hits: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def takes(self, head: Head) -> bool:
        """Whether this rule acts on a request. Counts the request."""
        if self.count is not None and self.hits >= self.count:
            return False
        if self.method is not None and head.method != self.method:
            return False
        if self.path not in head.path or (self.header is not None and head.get(self.header) is None):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        return True


@dataclass
class Head:
    """Start line and headers of a request or a reply; ``method`` and ``path`` are the first two words of a request."""

    start: str
    headers: list[tuple[str, str]]
    status: int = 0

    @classmethod
    def parse(cls, raw: bytes) -> Head:
        start, *lines = raw.decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines if line]
        head = cls(start, [(name, value.strip()) for name, _, value in pairs])
        if start.startswith("HTTP/"):
            head.status = int(start.split()[1])
        return head

    @property
    def method(self) -> str:
        return self.start.split(" ")[0]

    @property
    def path(self) -> str:
        return self.start.split(" ")[1]

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def put(self, name: str, value: str | None) -> None:
        self.headers = [(key, old) for key, old in self.headers if key.lower() != name.lower()]
        if value is not None:
            self.headers.append((name, value))

    def raw(self) -> bytes:
        return "\r\n".join([self.start, *(f"{key}: {value}" for key, value in self.headers), "", ""]).encode("latin-1")


class _Closed(Exception):
    """The connection to the client has ended."""


class FaultProxy:
    """See the docstring of the module."""

    def __init__(self, upstream_port: int) -> None:
        self.requests: list[Head] = []
        self._upstream_port = upstream_port
        self._rules: list[Rule] = []
        self._created: set[str] = set()
        self._cut = False
        self._tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """The endpoint URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    def add(
        self,
        action: Action,
        *,
        method: str | None = None,
        path: str = "",
        header: str | None = None,
        count: int | None = 1,
        skip: int = 0,
        **options: Any,
    ) -> Rule:
        """Add a rule after the others."""
        rule = Rule(action, method, path, header, count, skip, options)
        self._rules = [*self._rules, rule]
        return rule

    def clear(self) -> None:
        """Drop all rules. Hanging requests end with a reset."""
        rules, self._rules = self._rules, []
        for rule in rules:
            self._loop.call_soon_threadsafe(rule.released.set)

    def cut(self) -> None:
        """Reset every connection now, and every new one from now on."""
        self._cut = True
        self._call(self._reset_all())

    def heal(self) -> None:
        """End cut()."""
        self._cut = False

    def start(self) -> None:
        self._thread.start()
        self._call(self._serve())

    def stop(self) -> None:
        self.clear()
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._reset_all()

    async def _reset_all(self) -> None:
        tasks = dict(self._tasks)
        for task, writer in tasks.items():
            _reset(writer)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = writer
        try:
            while not self._cut:
                await self._exchange(reader, writer)
            _reset(writer)
        except (_Closed, OSError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass
        finally:
            del self._tasks[task]
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one request and its reply."""
        request = Head.parse(await reader.readuntil(b"\r\n\r\n"))
        self.requests.append(request)
        rule = next((rule for rule in self._rules if rule.takes(request)), None)
        options = rule.options if rule is not None else {}
        match rule.action if rule is not None else None:
            case "delay":
                await asyncio.sleep(options["seconds"])
            case "status":
                await self._answer(request, reader, writer, options.get("code", 503), options.get("error", "SlowDown"))
                return
            case "reset" if "after" not in options:
                _reset(writer)
                raise _Closed
            case "hang":
                assert rule is not None
                await _either(rule.released.wait(), _drain_all(reader))
                _reset(writer)
                raise _Closed
            case "check_then_write" if request.get("If-None-Match") and request.path in self._created:
                await self._answer(request, reader, writer, 412, "PreconditionFailed")
                return
            case "strip":
                request.put(options["name"], None)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=1 << 20)
        try:
            await self._relay(request, rule, reader, writer, up_reader, up_writer)
        finally:
            up_writer.close()

    async def _relay(
        self,
        request: Head,
        rule: Rule | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        up_writer.write(request.raw())
        slow = rule is not None and rule.action == "slow"
        pause = CHUNK / rule.options["rate"] if rule is not None and slow else 0.0
        sending = asyncio.create_task(_copy_body(request, reader, up_writer, pause=pause))
        try:
            reply = Head.parse(await up_reader.readuntil(b"\r\n\r\n"))
            while reply.status == 100:
                writer.write(reply.raw())
                reply = Head.parse(await up_reader.readuntil(b"\r\n\r\n"))
            whole = sending.done()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        request.status = reply.status
        if request.get("If-None-Match") and reply.status == 200:
            self._created.add(request.path)
        action, options = (rule.action, rule.options) if rule is not None else (None, {})
        if action == "lost_reply":
            await _copy_body(reply, up_reader, None, request)
            _reset(writer)
            raise _Closed
        if action == "reply_header":
            reply.put(options["name"], options["value"])
        writer.write(reply.raw())
        if action in ("truncate", "reset", "corrupt"):
            await self._broken_body(action, options, reply, up_reader, writer)
        else:
            await _copy_body(reply, up_reader, writer, request, pause=pause)
        if not whole or (reply.get("Connection") or "").lower() == "close" or _endless(reply, request):
            raise _Closed

    async def _broken_body(
        self,
        action: str,
        options: dict[str, Any],
        reply: Head,
        up_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        body = bytearray(await up_reader.readexactly(int(reply.get("Content-Length") or 0)))
        if action == "corrupt":
            body[options.get("at", 0)] ^= 0xFF
            writer.write(body)
            await writer.drain()
            return
        writer.write(body[: options["after"] if action == "reset" else options.get("keep", len(body) // 2)])
        await writer.drain()
        if action == "reset":
            _reset(writer)
        raise _Closed

    async def _answer(
        self, request: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, code: int, error: str
    ) -> None:
        if (request.get("Expect") or "").lower() != "100-continue":
            await _copy_body(request, reader, None)
        request.status = code
        body = f"<?xml version='1.0'?><Error><Code>{error}</Code><Message>from the proxy</Message></Error>".encode()
        if request.method == "HEAD":
            body = b""
        head = f"HTTP/1.1 {code} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _either(*coroutines: Any) -> None:
    """Wait for the first of several coroutines."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain_all(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(CHUNK):
            pass


def _endless(reply: Head, request: Head) -> bool:
    """Whether the body of a reply ends with the connection."""
    if request.method == "HEAD" or reply.status in (204, 304):
        return False
    return reply.get("Content-Length") is None and "chunked" not in (reply.get("Transfer-Encoding") or "").lower()


async def _copy_body(
    head: Head,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter | None,
    request: Head | None = None,
    *,
    pause: float = 0.0,
) -> None:
    """Read the body that belongs to ``head``, and forward it unless ``writer`` is None. ``request``: for replies.
    ``pause``: seconds per CHUNK."""

    async def give(data: bytes) -> None:
        if writer is not None:
            writer.write(data)
            await writer.drain()

    if request is not None and (request.method == "HEAD" or head.status in (204, 304)):
        return
    if "chunked" in (head.get("Transfer-Encoding") or "").lower():
        while True:
            line = await reader.readline()
            await give(line)
            size = int(line.split(b";")[0], 16)
            await give(await reader.readexactly(size + 2))
            if size == 0:
                return
    length = head.get("Content-Length")
    if length is None:
        while request is not None and (data := await reader.read(CHUNK)):
            await give(data)
        return
    left = int(length)
    while left:
        data = await reader.read(min(CHUNK, left))
        if not data:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(data)
        if pause:
            await asyncio.sleep(pause * len(data) / CHUNK)
        await give(data)
