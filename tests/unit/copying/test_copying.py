"""Copies keep bytes and holes, by whichever way the file system allows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lamfs import copying
from tests.support.transfer import make_bytes

MIB = 1 << 20


def sparse(path: Path, size: int, pieces: dict[int, int]) -> bytes:
    """Make a file with holes: pieces are lengths by offset. Returns its bytes."""
    with path.open("wb") as stream:
        stream.truncate(size)
        for offset, length in pieces.items():
            stream.seek(offset)
            stream.write(make_bytes(length, offset))
    return path.read_bytes()


def copy(source: Path, target: Path) -> int:
    with source.open("rb") as src, target.open("w+b") as dst:
        return copying.copy_fd(src.fileno(), dst.fileno())


def refuse(*_: object) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize(
    "way", ["the best", "copy_file_range refused", "copy_file_range moves nothing", "no holes known"]
)
@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (0, {}),
        (1, {0: 1}),
        (5 * MIB, {}),
        (20 * MIB + 3, {0: 10, 8 * MIB: 5 * MIB, 20 * MIB: 3}),
        (9 * MIB, {0: 9 * MIB}),
        (9 * MIB, {4 * MIB + 5: 100}),
    ],
)
def test_bytes_and_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, size: int, pieces: dict[int, int]
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    data = sparse(source, size, pieces)
    if way != "the best":
        monkeypatch.setattr(copying.fcntl, "ioctl", refuse)
    if way == "copy_file_range refused":
        monkeypatch.setattr(copying.os, "copy_file_range", refuse)
    if way == "copy_file_range moves nothing":
        monkeypatch.setattr(copying.os, "copy_file_range", lambda *_: 0)
    if way == "no holes known":
        monkeypatch.setattr(copying.os, "lseek", refuse)
    assert copy(source, target) == size
    assert target.read_bytes() == data
    if way != "no holes known":
        assert target.stat().st_blocks <= source.stat().st_blocks + 8


def test_a_real_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(tmp_path / "source", 100, {0: 100})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copying.fcntl, "ioctl", refuse)
    monkeypatch.setattr(copying.os, "copy_file_range", full)
    with pytest.raises(OSError) as info:
        copy(tmp_path / "source", tmp_path / "target")
    assert info.value.errno == errno.ENOSPC


@pytest.mark.parametrize("refused", ["nothing", "copy_file_range"])
def test_a_source_that_becomes_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    sparse(tmp_path / "source", 300_000, {0: 300_000})
    monkeypatch.setattr(copying.fcntl, "ioctl", refuse)
    monkeypatch.setattr(copying, "COPY_CHUNK", 1 << 16)
    if refused == "copy_file_range":
        monkeypatch.setattr(copying.os, "copy_file_range", refuse)
    with (tmp_path / "source").open("rb") as src, (tmp_path / "target").open("w+b") as dst:
        with pytest.raises(EOFError, match="ended at byte 100000"):
            copying.copy_fd(src.fileno(), dst.fileno(), lambda _: os.truncate(tmp_path / "source", 100_000))
    assert (tmp_path / "target").stat().st_size == 300_000


def test_progress_adds_up_to_the_size_with_holes(tmp_path: Path) -> None:
    sparse(tmp_path / "source", 9 * MIB + 1, {4 * MIB + 5: 100})
    told: list[int] = []
    with (tmp_path / "source").open("rb") as src, (tmp_path / "target").open("w+b") as dst:
        copying.copy_fd(src.fileno(), dst.fileno(), told.append)
    assert sum(told) == 9 * MIB + 1


def test_a_link_is_not_opened_but_an_open_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("bytes")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError, match="link") as caught, copying.opened(str(tmp_path / "link"), flags):
            pass
        assert caught.value.errno == errno.ELOOP
    with copying.opened(str(tmp_path / "file"), os.O_RDONLY) as fd:
        for owner in ("self", os.getpid()):
            with copying.opened(f"/proc/{owner}/fd/{fd}", os.O_RDONLY) as again:
                assert os.read(again, 9) == b"bytes"
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with copying.opened(f"/proc/{os.getpid()}/fd/{folder}/file", os.O_RDONLY) as fd:
            assert os.read(fd, 9) == b"bytes"
        with pytest.raises(OSError, match="link"):
            copying.opened(f"/proc/{os.getpid()}/fd/{folder}/link", os.O_RDONLY).__enter__()
        text = f"hashing /proc/{os.getpid()}/fd/{folder}/file"
        assert copying.shown(text) == f"hashing {tmp_path}/file"
    finally:
        os.close(folder)
    assert copying.shown("storing /proc/1/fd/x and /proc/0/fd/7/a") == "storing /proc/1/fd/x and /proc/0/fd/7/a"
