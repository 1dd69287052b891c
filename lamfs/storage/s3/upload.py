"""Files as bodies of requests. Any thread."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from typing import Any

from lamfs.errors import LamfsError, StorageError
from lamfs.storage.base import Progress
from lamfs.storage.s3.calls import S3, Body
from lamfs.storage.s3.client import Connection

IN_MEMORY = 256 << 10
"""Bodies up to this size are bytes; larger ones are read as they are sent. See FileSlice."""
READ_AHEAD = 1 << 20


class Meter:
    """Reports how much of a body was sent, whatever had to be sent again. One thread uses it."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._told = 0

    def at(self, position: int) -> None:
        """The connection has got this many bytes."""
        if position > self._told:
            self.be(position)

    def be(self, count: int) -> None:
        """This many bytes are in storage: all, or none after all."""
        told, self._told = self._told, count
        if self._progress is not None and count != told:
            self._progress(count - told)


class FileSlice(io.RawIOBase):
    """A range of an open file as a request body. Uses pread, so slices of one descriptor do not disturb each other.

    ``read`` returns up to READ_AHEAD bytes whatever botocore asks for. It asks for 16 KiB, and a system call and a turn
    of the interpreter for each 16 KiB would cost more than the transfer. ``failure`` keeps the reason when the file
    could not be read; botocore hides it. ``meter`` is told how far it was read.
    """

    def __init__(self, fd: int, offset: int, length: int, meter: Meter | None = None) -> None:
        self.failure: Exception | None = None
        self._meter = meter
        self._fd = fd
        self._start = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, place: Any, /) -> int:
        view = memoryview(place)[: self._length - self._position]
        try:
            count = os.preadv(self._fd, [view], self._start + self._position) if view else 0
            if not count and view:
                raise EOFError(f"the file ended at byte {self._start + self._position}")
        except (OSError, EOFError) as error:
            self.failure = error
            raise
        self._moved(count)
        return count

    def read(self, size: int = -1, /) -> bytes:
        left = self._length - self._position
        want = left if size is None or size < 0 else min(left, max(size, READ_AHEAD))
        try:
            data = os.pread(self._fd, want, self._start + self._position)
            if not data and want:
                raise EOFError(f"the file ended at byte {self._start + self._position}")
        except (OSError, EOFError) as error:
            self.failure = error
            raise
        self._moved(len(data))
        return data

    def sha256(self) -> str:
        """SHA-256 of the whole range, in hex. Does not change position and meter. Raises OSError, EOFError."""
        found = hashlib.sha256()
        place = memoryview(bytearray(min(self._length, READ_AHEAD)))
        done = 0
        try:
            while done < self._length:
                count = os.preadv(self._fd, [place[: self._length - done]], self._start + done)
                if not count:
                    raise EOFError(f"the file ended at byte {self._start + done}")
                found.update(place[:count])
                done += count
        except (OSError, EOFError) as error:
            self.failure = error
            raise
        return found.hexdigest()

    def _moved(self, count: int) -> None:
        self._position += count
        if self._meter is not None:
            self._meter.at(self._position)


def body_of(fd: int, offset: int, length: int, meter: Meter | None = None) -> bytes | FileSlice:
    """The request body for a range of a file. Raises OSError, and EOFError when the file is shorter."""
    if length > IN_MEMORY:
        return FileSlice(fd, offset, length, meter)
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise EOFError(f"the file ended at byte {offset + len(data)}")
        data += more
    return data


def unreadable(path: str, error: Exception) -> StorageError:
    """The error for a file that cannot be read, or became shorter, during its upload."""
    return StorageError(
        f"The file '{path}' could not be stored: {error}; check that nobody truncates it, and store it again.",
        errno=getattr(error, "errno", None),
    )


def send(
    connection: Connection,
    put: Callable[[S3, Body], str],
    what: str,
    path: str,
    fd: int,
    offset: int,
    length: int,
    progress: Progress | None = None,
) -> str:
    """``put`` a range of the file at ``path``, which is open as ``fd``, with retries. Returns the ETag.

    ``progress`` gets the bytes as they are sent, and negative numbers for bytes of a try that failed.
    """
    meter = Meter(progress)

    def attempt() -> str:
        try:
            body = body_of(fd, offset, length, meter)
        except (OSError, EOFError) as error:
            raise unreadable(path, error) from error
        try:
            return connection.once(lambda s3: put(s3, body), what)
        except LamfsError:
            failure = body.failure if isinstance(body, FileSlice) else None
            if failure is not None:
                raise unreadable(path, failure) from failure
            raise

    try:
        etag = connection.retrying(attempt)
    except BaseException:
        meter.be(0)
        raise
    meter.be(length)
    return etag
