"""How much of a body was sent, whatever had to be sent again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lamfs.errors import StorageUnavailable
from lamfs.model import StorageConfig
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.upload import READ_AHEAD, FileSlice, send

T = TypeVar("T")

SIZE = 6 * READ_AHEAD


class Flaky(Connection):
    """Reads bodies as botocore does; the first two requests fail in the middle of theirs, or all do."""

    def __init__(self, *, hopeless: bool = False) -> None:
        super().__init__(StorageConfig("s3://bucket", timeout=0.5))
        self.calls = 0
        self._hopeless = hopeless

    def once(self, action: Callable[[Any], T], what: str) -> T:
        return action(self)

    def put(self, key: str, body: FileSlice) -> str:
        self.calls += 1
        read = 0
        while data := body.read(1):
            read += len(data)
            if read >= SIZE // 2 and (self.calls < 3 or self._hopeless):
                raise StorageUnavailable("cut off")
        return "e"


@pytest.mark.parametrize("hopeless", [False, True])
def test_bytes_that_are_sent_again_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hopeless: bool) -> None:
    monkeypatch.setattr("lamfs.storage.s3.client.FIRST_PAUSE", 0.001)
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    told: list[int] = []

    def put(s3: Any, body: Any) -> str:
        return str(s3.put("k", body))

    connection = Flaky(hopeless=hopeless)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(StorageUnavailable) if hopeless else contextlib.nullcontext():
            send(connection, put, "store it", str(path), fd, 0, SIZE, told.append)
    finally:
        os.close(fd)
    assert connection.calls >= 3
    assert sum(told) == (0 if hopeless else SIZE)
    assert told[:3] == [READ_AHEAD] * 3
    assert max(sum(told[:count]) for count in range(len(told) + 1)) <= SIZE
