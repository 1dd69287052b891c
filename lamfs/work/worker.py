"""What the steps of storage work need of a driver: the jobs (Worker), and how to wait (Waits).

The steps (steps.py) do no I/O themselves: they await what is listed here. There are two drivers. In a mount the mover
does the jobs in another process, and the trio loop waits (loop.py). In the CLI, the API and recovery the calling thread
does them (direct.py); a step never waits there, and a plain call runs it to its end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from lamfs.errors import LamfsError
from lamfs.model import ContentHash, ObjectMeta, Revision
from lamfs.storage.base import ANYTHING, ObjectStat, Over, PartStat
from lamfs.storage.stale import Meant

T = TypeVar("T")
U = TypeVar("U")

Progress = Callable[[int], None]
"""Called with byte counts; negative ones when bytes have to be sent again."""


class Worker(Protocol):
    """The jobs. Each raises storage errors as the methods of ObjectStore and MultipartStore do.

    If a local file fails, it raises StorageError with the errno of that.
    """

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
        """Hash the first ``size`` bytes (None: all) of a file.

        ``bulk``: it takes long, and the jobs of other files must not wait for it. See hashing.hash_fd for the rest.
        """

    async def hash_range(self, path: str, offset: int, length: int) -> ContentHash:
        """hashing.hash_range of a file."""

    async def hash_ends(self, path: str, size: int) -> tuple[str, bytes]:
        """hashing.hash_ends of a file of ``size`` bytes."""

    async def head(self, key: str) -> ObjectStat:
        """ObjectStore.head."""

    async def meta(self, key: str) -> ObjectMeta | None:
        """ObjectStore.meta."""

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
        """Write a range of the object's revision ``etag`` into the file at ``path``, at the same offset.

        With ``digest`` (BLAKE3 of the range) or ``leaves`` (the hashes of its leaves, the first of which begins at
        ``offset``) the bytes are checked before they are written. Raises DamagedData when they are wrong.
        """

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
        """ObjectStore.put_file."""

    async def put_many(
        self, files: Sequence[tuple[str, str, Revision | None, ObjectMeta | None]]
    ) -> list[ObjectStat | LamfsError]:
        """Store small files. Returns the object or the error of each.

        A file is given as path, key, an object that may be copied instead, and the metadata to store with it.
        """

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
        """ObjectStore.copy."""

    async def delete(self, meant: Meant) -> list[str]:
        """stale.delete_meant."""

    async def begin_upload(self, key: str, meta: ObjectMeta | None = None) -> str:
        """MultipartStore.begin_upload."""

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
        """MultipartStore.send_part. Returns the part's ETag and, if ``hashed``, the result of hash_range."""

    async def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, offset: int, length: int
    ) -> str:
        """MultipartStore.copy_part."""

    async def complete_upload(self, key: str, upload_id: str, etags: Sequence[str], over: Over = ANYTHING) -> str:
        """MultipartStore.complete_upload."""

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """MultipartStore.abort_upload."""

    async def list_parts(self, key: str, upload_id: str) -> list[PartStat]:
        """MultipartStore.list_parts."""

    async def uploads_of(self, key: str) -> list[str]:
        """MultipartStore.uploads_of. A folder has none."""


class Waits(Protocol):
    """How a step waits, and how it does several things at once."""

    async def pause(self, seconds: float) -> None:
        """Return after so many seconds."""

    async def durable(self) -> None:
        """Return when every earlier commit would survive a power cut. Raises RegistryError."""

    async def sync_file(self, fd: int) -> None:
        """Return when a spool file, and its name, are durable. Closes ``fd``, its descriptor. Raises OSError."""

    async def beside(self, work: Callable[[], Awaitable[T]], other: Callable[[], Awaitable[None]]) -> T:
        """The result of ``work``, after ``other`` has also ended. Raises what either of them raises."""

    async def unless_abandoned(self, ino: int, work: Callable[[], Awaitable[T]]) -> T | None:
        """The result of ``work``; None if the inode was abandoned meanwhile."""

    async def each(
        self,
        items: Iterable[T],
        send: Callable[[T], Coroutine[Any, Any, U]],
        done: Callable[[T, U], None],
        at_once: int,
    ) -> None:
        """``send`` the items, ``at_once`` at a time, and call ``done`` for each, in the thread of the steps.

        After an error no new item begins; the error is raised when those in flight have ended. ``send`` must not use
        the registry.
        """
