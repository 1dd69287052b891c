"""The proxy of the benchmark: what it counts, and that it delays."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.proxy import Proxy

ROOT = Path(__file__).parents[3]
ANSWER = b"y" * 100_000
DELAY = 0.03


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def put(proxy: Proxy, system: str, times: int, size: int) -> float:
    """So many requests over one connection; seconds that all took."""
    connection = http.client.HTTPConnection(proxy.url(system).removeprefix("http://"), timeout=30)
    begin = time.perf_counter()
    for _ in range(times):
        connection.request("PUT", "/x", body=b"x" * size)
        assert connection.getresponse().read() == ANSWER
    took = time.perf_counter() - begin
    connection.close()
    return took


@pytest.mark.parametrize("delay", [0.0, DELAY])
def test_requests_and_bytes_are_counted_and_delayed(
    tmp_path: Path, upstream: int, delay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    proxy = Proxy(tmp_path, upstream, ["one", "two"], delay)
    try:
        assert put(proxy, "one", 4, 300_000) >= 4 * delay
        moved = proxy.traffic("one")
        assert moved.requests == 4
        assert 4 * 300_000 <= moved.up < 4 * 300_000 + 4000
        assert 4 * len(ANSWER) <= moved.down < 4 * len(ANSWER) + 4000
        assert proxy.traffic("two").requests == 0
        put(proxy, "two", 1, 10)
        later = proxy.traffic("one") - moved
        assert (later.requests, later.up, later.down) == (0, 0, 0)
        assert proxy.traffic("two").requests == 1
    finally:
        proxy.close()
