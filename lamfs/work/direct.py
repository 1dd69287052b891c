"""The plain driver of storage work: the calling thread does the jobs, so a step never waits for anything else.

For the CLI, the Python API and recovery, which have no loop and no mover. ``finish`` runs a step to its end.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lamfs import copying, hashing
from lamfs.errors import InvalidArgument, LamfsError
from lamfs.model import ContentHash, ObjectMeta, Revision
from lamfs.mover import fetching, jobs
from lamfs.mover.buffers import Buffers
from lamfs.mover.storing import SmallFiles
from lamfs.pool import Pool
from lamfs.registry import sync_log
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ANYTHING, MultipartStore, ObjectStat, ObjectStore, Over, PartStat
from lamfs.storage.stale import Meant, delete_meant
from lamfs.work import reading
from lamfs.work.worker import Progress

T = TypeVar("T")
U = TypeVar("U")


def finish(step: Coroutine[Any, Any, T]) -> T:
    """Run a step whose Worker and Waits are those of this module. Returns its result."""
    try:
        step.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    step.close()
    raise AssertionError("a step waits, but the plain driver has nothing to wait for")


class DirectWorker:
    """Worker (worker.py) of one storage. Any thread."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._buffers = Buffers()
        self._small = SmallFiles(threads=0)

    @property
    def _parts(self) -> MultipartStore:
        parts = self._store.parts
        if parts is None:
            raise InvalidArgument("This storage takes objects as a whole only.")
        return parts

    async def hash(
        self,
        path: str,
        size: int | None = None,
        progress: Progress | None = None,
        *,
        bulk: bool = False,
        known: Mapping[int, bytes] | None = None,
        head: bytes | None = None,
        ends: str | None = None,
    ) -> ContentHash:
        """Worker.hash."""
        with _local("hash", path=path), copying.opened(path, os.O_RDONLY) as fd:
            size = os.fstat(fd).st_size if size is None else size
            return hashing.hash_fd(fd, size, progress, known=known or {}, head=head, ends=ends)

    async def hash_range(self, path: str, offset: int, length: int) -> ContentHash:
        """Worker.hash_range."""
        with _local("hash_range", path=path, offset=offset), copying.opened(path, os.O_RDONLY) as fd:
            return hashing.hash_range(fd, offset, length)

    async def hash_ends(self, path: str, size: int) -> tuple[str, bytes]:
        """Worker.hash_ends."""
        with _local("hash_ends", path=path), copying.opened(path, os.O_RDONLY) as fd:
            return hashing.hash_ends(fd, size)

    async def head(self, key: str) -> ObjectStat:
        """Worker.head."""
        return self._store.head(key)

    async def meta(self, key: str) -> ObjectMeta | None:
        """Worker.meta."""
        return self._store.meta(key)

    async def fetch(
        self,
        key: str,
        *,
        etag: str,
        offset: int,
        length: int,
        path: str,
        digest: bytes | None,
        leaves: bytes | None = None,
    ) -> None:
        """Worker.fetch."""
        message = jobs.fetch(key, etag, offset, length, path, digest, leaves)
        with _local("fetch", key=key, offset=offset), copying.opened(path, os.O_WRONLY) as fd:
            fetching.fetch(self._store, self._buffers, message, fd)

    async def put(
        self,
        path: str,
        key: str,
        *,
        consume: bool = False,
        progress: Progress | None = None,
        meta: ObjectMeta | None = None,
        over: Over = ANYTHING,
    ) -> ObjectStat:
        """Worker.put."""
        with _local("put", path=path, key=key):
            return self._store.put_file(key, path, consume=consume, progress=progress, meta=meta, **over._asdict())

    async def put_many(
        self, files: Sequence[tuple[str, str, Revision | None, ObjectMeta | None]]
    ) -> list[ObjectStat | LamfsError]:
        """Worker.put_many."""
        return self._small.put_many(
            self._store,
            [
                (path, key, None if twin is None else (twin.object_key, twin.etag, twin.size), meta)
                for path, key, twin, meta in files
            ],
        )

    async def copy(
        self,
        src: str,
        dst: str,
        *,
        etag: str | None = None,
        size: int | None = None,
        meta: ObjectMeta | None = None,
        over: Over = ANYTHING,
    ) -> ObjectStat:
        """Worker.copy."""
        return self._store.copy(src, dst, etag=etag, size=size, meta=meta, **over._asdict())

    async def delete(self, meant: Meant) -> list[str]:
        """Worker.delete."""
        return delete_meant(self._store, meant)

    async def begin_upload(self, key: str, meta: ObjectMeta | None = None) -> str:
        """Worker.begin_upload."""
        return self._parts.begin_upload(key, meta)

    async def send_part(
        self,
        key: str,
        upload_id: str,
        number: int,
        path: str,
        offset: int,
        length: int,
        *,
        hashed: bool = False,
        progress: Progress | None = None,
    ) -> tuple[str, ContentHash | None]:
        """Worker.send_part."""
        hashes = await self.hash_range(path, offset, length) if hashed else None
        with _local("send_part", key=key, path=path, number=number):
            return self._parts.send_part(key, upload_id, number, path, offset, length, progress), hashes

    async def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, offset: int, length: int
    ) -> str:
        """Worker.copy_part."""
        return self._parts.copy_part(key, upload_id, number, source, source_etag, offset, length)

    async def complete_upload(self, key: str, upload_id: str, etags: Sequence[str], over: Over = ANYTHING) -> str:
        """Worker.complete_upload."""
        return self._parts.complete_upload(key, upload_id, etags, **over._asdict())

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """Worker.abort_upload."""
        self._store.abort_upload(key, upload_id)

    async def list_parts(self, key: str, upload_id: str) -> list[PartStat]:
        """Worker.list_parts."""
        return list(self._parts.list_parts(key, upload_id))

    async def uploads_of(self, key: str) -> list[str]:
        """Worker.uploads_of."""
        parts = self._store.parts
        return [] if parts is None else list(parts.uploads_of(key))


@contextlib.contextmanager
def _local(op: str, **message: object) -> Iterator[None]:
    """A context in which an error of a local file becomes a StorageError that names the job, as in the mover."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise jobs.translate(error, copying.shown(jobs.describe({"op": op, **message}))) from error


class DirectWaits:
    """Waits (worker.py) of a thread that has nothing else to do.

    ``path``: of the registry; None if nothing has to be durable. ``spool``: None if no spool file is stored.
    """

    def __init__(self, path: Path | None = None, spool: SpoolFolder | None = None) -> None:
        self._path = path
        self._spool = spool

    async def pause(self, seconds: float) -> None:
        """Waits.pause."""
        time.sleep(seconds)

    async def durable(self) -> None:
        """Waits.durable."""
        if self._path is not None:
            sync_log(self._path)

    async def sync_file(self, fd: int) -> None:
        """Waits.sync_file."""
        try:
            os.fdatasync(fd)
            if self._spool is not None:
                self._spool.sync()
        finally:
            os.close(fd)

    async def beside(self, work: Callable[[], Awaitable[T]], other: Callable[[], Awaitable[None]]) -> T:
        """Waits.beside: one after the other."""
        await other()
        return await work()

    async def unless_abandoned(self, ino: int, work: Callable[[], Awaitable[T]]) -> T | None:
        """Waits.unless_abandoned: nobody abandons an inode here."""
        return await work()

    async def each(
        self,
        items: Iterable[T],
        send: Callable[[T], Coroutine[Any, Any, U]],
        done: Callable[[T, U], None],
        at_once: int,
    ) -> None:
        """Waits.each: ``send`` in a pool of threads, ``done`` in this thread."""
        error: LamfsError | None = None
        with Pool(at_once, "lamfs-work") as pool:
            for item, future in pool.unordered(lambda item: finish(send(item)), items):
                try:
                    done(item, future.result())
                except LamfsError as problem:
                    error = error or problem
                    break
        if error is not None:
            raise error


def hash_object(store: ObjectStore, key: str, progress: Progress | None = None) -> tuple[ContentHash, str]:
    """Read an object once and hash it. Returns the hash, and the ETag of what was read.

    Raises as reading.hash_object.
    """
    found = store.head(key)
    return finish(reading.hash_object(DirectWorker(store), DirectWaits(), store, found, progress)), found.etag
