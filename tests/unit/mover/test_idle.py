"""The moving process without a job: it gives memory back once, and again after the next job."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from lamfs import jsonlines
from lamfs.mover import jobs
from lamfs.mover import server as mover
from lamfs.storage.base import StorageConfig


def test_memory_is_given_back_once_after_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    given = threading.Semaphore(0)
    monkeypatch.setattr(mover, "IDLE_SECONDS", 0.02)
    monkeypatch.setattr(mover, "give_memory_back", given.release)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = mover.Server(theirs)
        serving = threading.Thread(target=server.run)
        serving.start()
        ours.sendall(jsonlines.encode(jobs.pack_config(StorageConfig(str(tmp_path)))))
        for number in (1, 2):
            job = {"id": number, "op": "verify", "path": str(file), "offset": 0, "length": 3, "digest": "00"}
            ours.sendall(jsonlines.encode(job))
            assert jsonlines.decode(ours.recv(1 << 16)) == {"id": number, "ok": False}
            assert given.acquire(timeout=10)
            assert server.buffers._free == []
        assert not given.acquire(timeout=0.1)
        ours.shutdown(socket.SHUT_WR)
        serving.join(10)
