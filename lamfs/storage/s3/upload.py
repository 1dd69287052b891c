"""Request bodies from files, multipart uploads, and server-side copies of large objects.

Parts of one object go through a pool of threads that all transfers of the store share. Each transfer has at most WINDOW
parts waiting or in flight, so a terabyte does not delay the file behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from lamfs.errors import LamfsError, ObjectChanged, ObjectMissing, StorageError, UploadGone
from lamfs.storage.base import ANYTHING, Over, Progress
from lamfs.storage.s3.calls import S3, Body, Headers, bare
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.errors import NO_UPLOAD, code_of

log = logging.getLogger(__name__)

MIB = 1 << 20
MULTIPART_ABOVE = 64 * MIB
"""Files up to this size go in one request."""
PART_SIZE = 16 * MIB
COPY_LIMIT = 5 << 30
"""CopyObject accepts sources up to 5 GiB (Amazon S3)."""
COPY_PART_SIZE = 512 * MIB
MAX_PARTS = 10_000
IN_MEMORY = 256 << 10
"""Bodies up to this size are bytes; larger ones are read as they are sent. See FileSlice."""
READ_AHEAD = 1 * MIB
WINDOW = 8
THREADS = 8

Part = Callable[[int, int, int], str]
"""Transfers part ``number`` (from 1) at ``offset`` with ``length`` bytes. Returns its ETag as the server sent it."""


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


class Transfers:
    """Transfers that take many requests. Owns the pool of part threads; thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End the threads. Parts in flight are finished first."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def send(
        self,
        put: Callable[[S3, Body], str],
        what: str,
        path: str,
        fd: int,
        offset: int,
        length: int,
        progress: Progress | None = None,
    ) -> str:
        """``put`` a range of a file as an object or a part, with retries. Returns the ETag.

        ``progress`` gets the bytes as they are sent, and negative numbers for bytes of a try that failed.
        """
        meter = Meter(progress)

        def attempt() -> str:
            try:
                body = body_of(fd, offset, length, meter)
            except (OSError, EOFError) as error:
                raise unreadable(path, error) from error
            try:
                return self._connection.once(lambda s3: put(s3, body), what)
            except LamfsError:
                failure = body.failure if isinstance(body, FileSlice) else None
                if failure is not None:
                    raise unreadable(path, failure) from failure
                raise

        try:
            etag = self._connection.retrying(attempt)
        except BaseException:
            meter.be(0)
            raise
        meter.be(length)
        return etag

    def upload(
        self,
        key: str,
        what: str,
        path: str,
        fd: int,
        size: int,
        progress: Progress | None,
        said: Headers,
        over: Over,
    ) -> str:
        """Upload ``size`` bytes of a file in parts. Returns the object's ETag.

        ``said``: see Connection.saying. ``over``: what it may replace.
        """

        def part(number: int, offset: int, length: int) -> str:
            return self.send(
                lambda s3, body: s3.send_part(key, upload_id, number, body, length), what, path, fd, offset, length
            )

        upload_id = self._begin(key, what, said)
        return self._transfer(key, what, upload_id, part, size, PART_SIZE, progress, over)

    def copy(
        self,
        source: str,
        key: str,
        what: str,
        size: int,
        etag: str,
        said: Headers,
        over: Over,
    ) -> str:
        """Copy an object over COPY_LIMIT within the bucket, in parts. Returns the new object's ETag.

        The source's own metadata is not copied. ``said``: see Connection.saying. ``over``: what it may replace.
        """

        def part(number: int, offset: int, length: int) -> str:
            return self.copy_part(key, what, upload_id, number, source, etag, offset, length)

        upload_id = self._begin(key, what, said)
        return self._transfer(key, what, upload_id, part, size, COPY_PART_SIZE, None, over)

    def copy_part(
        self, key: str, what: str, upload_id: str, number: int, source: str, etag: str, offset: int, length: int
    ) -> str:
        """Copy a range of an object's revision as a part. Returns the ETag as the server sent it."""
        return self._connection.call(
            lambda s3: s3.copy_part(key, upload_id, number, source, etag, offset, offset + length), what, patient=True
        )

    def _begin(self, key: str, what: str, said: Headers) -> str:
        return self._connection.saying(
            said, lambda headers: self._connection.call(lambda s3: s3.begin(key, headers), what)
        )

    def _transfer(
        self,
        key: str,
        what: str,
        upload_id: str,
        part: Part,
        size: int,
        part_size: int,
        progress: Progress | None,
        over: Over,
    ) -> str:
        try:
            etags = self._parts(part, size, part_size_for(size, part_size), progress)
            return self.complete(key, what, upload_id, etags, over)
        except BaseException:
            with contextlib.suppress(LamfsError):
                self._connection.call(lambda s3: s3.abort(key, upload_id), what)
            raise

    def _parts(self, part: Part, size: int, part_size: int, progress: Progress | None) -> list[str]:
        """Transfer all parts, WINDOW at a time. After an error no new part starts, but those in flight finish."""
        etags = [""] * -(-size // part_size)
        pending: dict[Future[str], int] = {}
        todo = iter(range(len(etags)))
        try:
            while True:
                while len(pending) < WINDOW and (index := next(todo, None)) is not None:
                    length = min(part_size, size - index * part_size)
                    pending[self._threads().submit(part, index + 1, index * part_size, length)] = index
                if not pending:
                    return etags
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    index = pending.pop(future)
                    etags[index] = future.result()
                    if progress is not None:
                        progress(min(part_size, size - index * part_size))
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def complete(self, key: str, what: str, upload_id: str, etags: Sequence[str], over: Over) -> str:
        """Make the object from the parts. Returns its ETag.

        Raises UploadGone, and ObjectChanged or ObjectMissing when it may not replace what is there.
        """

        def attempt() -> str | None:
            try:
                return self._connection.once(lambda s3: s3.complete(key, upload_id, etags, over), what)
            except StorageError as error:
                if code_of(error) in NO_UPLOAD:
                    return None
                raise

        try:
            etag = self._connection.retrying(attempt, patient=True)
        except (ObjectChanged, ObjectMissing):
            if over == ANYTHING:
                raise
            # An earlier try whose reply was lost made the object, so the condition does not hold any more.
            with contextlib.suppress(UploadGone):
                return self._completed_before(key, what, etags)
            raise
        if etag is None:
            return self._completed_before(key, what, etags)
        # rclone and some gateways later report another ETag than in their reply. Recorded with that one, the object
        # could never be read again.
        found = self._connection.call(lambda s3: s3.head(key), what).etag
        if found != etag:
            log.warning("Stored with ETag %s, found with ETag %s, which is the one that counts (%s)", etag, found, what)
        return found

    def _completed_before(self, key: str, what: str, etags: Sequence[str]) -> str:
        """The object of an earlier try whose reply was lost: it has the ETag that Amazon S3 documents for multipart.

        Any other object means that the upload must be done again.
        """
        with contextlib.suppress(ObjectMissing):
            found = self._connection.call(lambda s3: s3.head(key), what).etag
            if found == multipart_etag(etags):
                return found
        raise UploadGone(f"Cannot {what}: the multipart upload is gone; store it again.")

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, "lamfs-part")
            return self._pool


def part_size_for(size: int, part_size: int) -> int:
    """Bytes per part: ``part_size``, or as many whole MiB as are needed for at most MAX_PARTS parts."""
    return max(part_size, -(-size // MAX_PARTS // MIB) * MIB)


def multipart_etag(etags: Sequence[str]) -> str | None:
    """md5 of the parts' md5 digests with the number of parts, or None when the part ETags are not md5."""
    try:
        digests = [bytes.fromhex(bare(etag)) for etag in etags]
    except ValueError:
        return None
    return f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}"
