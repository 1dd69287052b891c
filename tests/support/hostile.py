"""An HTTP server that sends any answer that a test wants, also an endless one. Standard library only.

    with HostileServer(lambda method, target: [b"HTTP/1.1 200 OK\\r\\n\\r\\n", *repeat(b"<a>", 10)]) as server:
        config = server.config()

``answer`` gets each request's method and target, and returns the bytes of the reply, piece by piece, as long as the
client reads them. It is called in a thread for each connection.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from lamfs.storage.base import StorageConfig

Answer = Callable[[str, str], Iterable[bytes]]


def reply(body: bytes, status: str = "200 OK", **headers: str) -> list[bytes]:
    """A whole reply. ``headers`` use ``_`` for ``-``."""
    told = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return [f"HTTP/1.1 {status}\r\n{lines}\r\n".encode(), body]


def tls(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A TLS context for a server on 127.0.0.1, and the certificate that its clients trust. Both are made in
    ``folder``."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
        f" -addext subjectAltName=IP:127.0.0.1 -keyout {key.name} -out {certificate.name}".split(),
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=30,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


def dripping(data: bytes, size: int, pause: float) -> Iterator[bytes]:
    """Yields ``size`` bytes at a time, every ``pause`` seconds."""
    never = threading.Event()
    for at in range(0, len(data), size):
        never.wait(pause)
        yield data[at : at + size]


class HostileServer:
    """Answers on a port of 127.0.0.1 until the block ends."""

    def __init__(self, answer: Answer, context: ssl.SSLContext | None = None) -> None:
        """``context``: for TLS."""
        self.requests: list[tuple[str, str]] = []
        self._answer = answer
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._run)]
        self._open: set[socket.socket] = set()

    def config(self, *, timeout: float = 2.0) -> StorageConfig:
        """A storage on this server."""
        return StorageConfig(
            "s3://bucket/root", endpoint_url=self.url, region="us-east-1", path_style=True, timeout=timeout
        )

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(10)
            assert not thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._open.add(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, plain: socket.socket) -> None:
        with plain, contextlib.suppress(OSError):
            plain.settimeout(20)
            if self._context is None:
                self._talk(plain)
            else:
                with self._context.wrap_socket(plain, server_side=True) as sock:
                    self._open.add(sock)
                    self._talk(sock)
        self._open.discard(plain)

    def _talk(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as stream:
            while first := stream.readline():
                method, target, _ = first.decode().split(" ", 2)
                length = 0
                while (line := stream.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                stream.read(length)
                self.requests.append((method, target))
                for piece in self._answer(method, target):
                    sock.sendall(piece)
                    if method == "HEAD" and piece.endswith(b"\r\n\r\n"):
                        break  # a reply to HEAD has no body
