"""A loopback proxy in front of the S3 server, a process of its own: counts bytes and requests, and can delay requests.

    python -m tests.bench.proxy COUNTERS UPSTREAM DELAY_SECONDS PORT...        one port for each system that is measured

There is no netem in every kernel, so the delay is made here: what a client sends is passed on DELAY later, in order and
pipelined, so that a request costs a round trip of DELAY more while a long upload is not slowed down otherwise. What
the server sends is passed on at once. Bytes are moved by splice(2), two threads a connection: the proxy costs little
CPU and no copy. Counters are in the file COUNTERS (shared memory): for each port requests, bytes up, bytes down, and
requests that wait for an answer, as 64-bit integers. A request is counted when a client sends after it was answered,
or for the first time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tests.support.servers import free_ports

PIPE_BYTES = 1 << 20
F_SETPIPE_SZ = 1031
MAX_QUEUED = 256
RECORD = struct.Struct("=qqqq")


class Traffic(NamedTuple):
    """What passed one port: requests, and bytes to and from the server; ``waiting``: requests not yet answered."""

    requests: int
    up: int
    down: int
    waiting: int

    def __sub__(self, other: object) -> Traffic:
        assert isinstance(other, Traffic)
        return Traffic(self.requests - other.requests, self.up - other.up, self.down - other.down, self.waiting)


class Proxy:
    """The proxy process, as the benchmark holds it."""

    def __init__(self, folder: Path, upstream: int, systems: list[str], delay: float) -> None:
        self._counters = folder / "proxy.counters"
        self._counters.write_bytes(bytes(RECORD.size * len(systems)))
        ports = free_ports(len(systems))
        self._index = {name: index for index, name in enumerate(systems)}
        self._ports = ports
        words = [str(self._counters), str(upstream), str(delay), *map(str, ports)]
        self._process = subprocess.Popen([sys.executable, "-m", "tests.bench.proxy", *words], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def url(self, system: str) -> str:
        """The endpoint for one system."""
        return f"http://127.0.0.1:{self._ports[self._index[system]]}"

    def traffic(self, system: str) -> Traffic:
        """What the system has moved until now."""
        with self._counters.open("rb") as file:
            file.seek(self._index[system] * RECORD.size)
            return Traffic(*RECORD.unpack(file.read(RECORD.size)))

    def close(self) -> None:
        """End it."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait()


class Counter:
    """The counters of one port. Every connection has its own, added to the shared ones under a lock."""

    def __init__(self, shared: mmap.mmap, index: int) -> None:
        self._shared, self._at, self._lock = shared, index * RECORD.size, threading.Lock()

    def add(self, requests: int, up: int, down: int, waiting: int) -> None:
        """Count."""
        with self._lock:
            had = RECORD.unpack_from(self._shared, self._at)
            now = (had[0] + requests, had[1] + up, had[2] + down, had[3] + waiting)
            RECORD.pack_into(self._shared, self._at, *now)


class Connection:
    """One client and the server, both ways."""

    def __init__(self, client: socket.socket, upstream: int, delay: float, counter: Counter) -> None:
        self._client, self._delay, self._counter = client, delay, counter
        self._server = socket.create_connection(("127.0.0.1", upstream))
        for side in (self._client, self._server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answered = True
        threading.Thread(target=self._down, daemon=True).start()
        threading.Thread(target=self._up_later if delay else self._up, daemon=True).start()

    def _sent(self, count: int) -> None:
        fresh, self._answered = int(self._answered), False
        self._counter.add(fresh, count, 0, fresh)

    def _received(self, count: int) -> None:
        fresh, self._answered = int(not self._answered), True
        self._counter.add(0, 0, count, -fresh)

    def _splice(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        reader, writer = os.pipe()
        try:
            fcntl.fcntl(writer, F_SETPIPE_SZ, PIPE_BYTES)
            while count := os.splice(source.fileno(), writer, PIPE_BYTES):
                if up:
                    self._sent(count)
                else:
                    self._received(count)
                while count:
                    count -= os.splice(reader, target.fileno(), count)
        except OSError:
            pass
        finally:
            if not up:
                self._received(0)
            os.close(reader)
            os.close(writer)
            for side in (source, target):
                with contextlib.suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)

    def _down(self) -> None:
        self._splice(self._server, self._client, up=False)

    def _up(self) -> None:
        self._splice(self._client, self._server, up=True)

    def _up_later(self) -> None:
        """What the client sends, DELAY later."""
        line: queue.Queue[tuple[float, bytes]] = queue.Queue(MAX_QUEUED)
        threading.Thread(target=self._pass_on, args=(line,), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := self._client.recv(1 << 18):
                self._sent(len(data))
                line.put((time.monotonic() + self._delay, data))
        line.put((0.0, b""))

    def _pass_on(self, line: queue.Queue[tuple[float, bytes]]) -> None:
        broken = False
        while True:
            due, data = line.get()
            if not data:
                break
            if not broken:
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    self._server.sendall(data)
                except OSError:
                    broken = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)


def serve(port: int, upstream: int, delay: float, counter: Counter) -> None:
    """Accept for ever."""
    with socket.create_server(("127.0.0.1", port), backlog=256) as listener:
        while True:
            client, _ = listener.accept()
            try:
                Connection(client, upstream, delay, counter)
            except OSError:
                client.close()


def main() -> None:
    """Run the proxy until it is ended, or until the benchmark is."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    counters, upstream, delay, *ports = sys.argv[1:]
    with open(counters, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 0)
    for index, port in enumerate(ports):
        arguments = (int(port), int(upstream), float(delay), Counter(shared, index))
        threading.Thread(target=serve, args=arguments, daemon=True).start()
    for port in ports:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
                break
            time.sleep(0.01)
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
