"""Boxes in memory: thousands of them are made, crashed and thrown away."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamfs.fs import spooling
from tests.support.fsbox import Box

MakeBox = Callable[..., Box]


@pytest.fixture
def make_box(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeBox]:
    """``make_box(kind, real_keys=…)``: a fresh instance each time. Uploads start at once after a close."""
    monkeypatch.setattr(spooling, "SETTLE", 0.0)
    shm = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(prefix="lamfs-b", dir=shm if os.access(shm, os.W_OK) else None))
    count = 0

    def make(kind: str, *, real_keys: bool = False) -> Box:
        nonlocal count
        shutil.rmtree(base / str(count), ignore_errors=True)
        count += 1
        return Box(base / str(count), kind, real_keys=real_keys)

    try:
        yield make
    finally:
        shutil.rmtree(base, ignore_errors=True)
