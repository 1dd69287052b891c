"""Helpers of the transfer and cache tests: revisions of made-up bytes, a running Mover, an in-process stand-in."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from lamfs.errors import DamagedData, LamfsError, ObjectChanged, ObjectMissing
from lamfs.hashing import encode_digest, hash_block, hash_leaves
from lamfs.model import BLOCK_SIZE, ContentHash, Revision
from lamfs.mover import jobs
from lamfs.mover.client import Mover
from lamfs.storage.base import ObjectStat, StorageConfig


@functools.lru_cache(maxsize=16)
def make_bytes(size: int, seed: int = 1) -> bytes:
    """Bytes in which no two blocks are alike."""
    return random.Random(seed).randbytes(size)


def content_of(data: bytes) -> ContentHash:
    """The ContentHash of bytes, without the code that hashes files. The short hash is always md5; nobody reads it."""
    blocks = b"".join(hash_block(data[at : at + BLOCK_SIZE]) for at in range(0, len(data), BLOCK_SIZE))
    return ContentHash(len(data), encode_digest(hashlib.md5(data).digest()), "md5", blocks)


def open_fds() -> int:
    """How many descriptors this process has open, without those that earlier tests have left to the garbage."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def fds_on(path: str | os.PathLike[str]) -> int:
    """How many descriptors of this process are on one file."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}") == os.fspath(path)
    return count


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for a condition, polling; fails after a deadline."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.asynccontextmanager
async def running_mover(config: StorageConfig) -> AsyncIterator[Mover]:
    """A Mover with its process, ended afterwards."""
    mover = Mover(config)
    async with trio.open_nursery() as nursery:
        await nursery.start(mover.run)
        try:
            yield mover
        finally:
            nursery.cancel_scope.cancel()


@dataclass
class FakeStore:
    """Objects in memory with the face of an S3 store: what the cache needs of one, and counters."""

    objects: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    gets: Counter[tuple[str, int]] = field(default_factory=Counter)
    kind: str = "s3"
    on_disk: bool = False
    imports_files: bool = False
    cache_name: str = "bucket/prefix"

    def put(self, key: str, data: bytes) -> Revision:
        """Store an object and return its revision."""
        etag = hashlib.md5(data).hexdigest()
        self.objects[key] = (etag, data)
        return Revision(content_of(data), key, etag)

    def url(self, key: str) -> str:
        return f"s3://bucket/prefix/{key}"

    def open_local(self, key: str) -> int | None:
        return None

    def get(self, key: str, *, offset: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        self.gets[key, offset] += 1
        if key not in self.objects:
            raise ObjectMissing(f"no object '{key}'")
        found, data = self.objects[key]
        if etag not in (None, found):
            raise ObjectChanged(f"the object '{key}' changed")
        return data[offset:] if length is None else data[offset : offset + length]

    def get_into(self, key: str, fd: int, *, offset: int, length: int, etag: str | None = None) -> None:
        os.pwrite(fd, self.get(key, offset=offset, length=length, etag=etag), offset)

    def get_view(self, key: str, view: memoryview, *, offset: int, etag: str | None = None) -> None:
        view[:] = self.get(key, offset=offset, length=len(view), etag=etag)

    def head(self, key: str) -> ObjectStat:
        etag, data = self.objects[key]
        return ObjectStat(key, len(data), etag, 0)


class FakeMover:
    """Mover.fetch and Mover.verify within the process. ``gate`` holds fetches up; ``failures`` are raised first."""

    def __init__(self, store: FakeStore | None = None) -> None:
        self.store = store
        self.gate = trio.Event()
        self.gate.set()
        self.failures: list[LamfsError] = []
        self.fetching = 0
        self.most_fetching = 0
        self.fetches: list[tuple[str, int]] = []
        self.ranges: list[tuple[int, int]] = []
        self.verifies: list[tuple[str, int]] = []
        self.stretches: list[tuple[str, int, int]] = []

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
        self.fetches.append((key, offset // BLOCK_SIZE))
        self.ranges.append((offset, length))
        self.fetching += 1
        self.most_fetching = max(self.most_fetching, self.fetching)
        try:
            await self.gate.wait()
            await trio.lowlevel.checkpoint()
            if self.failures:
                raise self.failures.pop(0)
            assert self.store is not None
            data = self.store.get(key, offset=offset, length=length, etag=etag)
            if digest is not None and hash_block(data) != digest:
                raise DamagedData(f"{key} is damaged")
            if leaves is not None and hash_leaves(data) != leaves:
                raise DamagedData(f"{key} is damaged in a leaf")
            fd = os.open(path, os.O_WRONLY)
            os.pwrite(fd, data, offset)
            os.close(fd)
        finally:
            self.fetching -= 1

    async def fetch_stretch(
        self,
        key: str,
        *,
        etag: str,
        offset: int,
        blocks: Sequence[tuple[int, bytes]],
        path: str,
        came: Callable[[int], None],
    ) -> None:
        self.stretches.append((key, offset // BLOCK_SIZE, len(blocks)))
        for length, digest in blocks:
            await self.fetch(key, etag=etag, offset=offset, length=length, path=path, digest=digest)
            came(1)
            offset += length

    async def fetch_files(
        self, files: Sequence[jobs.WholeFile], arrived: Callable[[int, LamfsError | None], None]
    ) -> None:
        async def one(number: int, file: jobs.WholeFile) -> None:
            error: LamfsError | None = None
            try:
                await self.fetch(
                    file.key, etag=file.etag, offset=0, length=file.length, path=file.path, digest=file.digest
                )
            except LamfsError as problem:
                error = problem
            arrived(number, error)

        async with trio.open_nursery() as nursery:
            for number, file in enumerate(files):
                nursery.start_soon(one, number, file)

    async def verify(self, path: str, *, offset: int, length: int, digest: bytes) -> bool:
        self.verifies.append((path, offset // BLOCK_SIZE))
        await trio.lowlevel.checkpoint()
        fd = os.open(path, os.O_RDONLY)
        data = os.pread(fd, length, offset)
        os.close(fd)
        return len(data) == length and hash_block(data) == digest
