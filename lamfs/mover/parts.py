"""The mover's jobs on multipart uploads and their files, as the daemon gives them. The trio loop only.

Each raises as MultipartStore does, or TransferDied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lamfs.model import ContentHash, ObjectMeta
from lamfs.mover.jobs import Message, pack_meta, unpack_bytes, unpack_content
from lamfs.storage.base import ANYTHING, Over, PartStat


class PartJobs:
    """These jobs. Mover has the ``_call`` that they need."""

    async def _call(self, op: str, message: Message, *, paths: tuple[str, ...] = (), progress: Any = None) -> Any:
        raise NotImplementedError

    async def begin_upload(self, key: str, meta: ObjectMeta | None = None) -> str:
        """Begin an upload. Returns its id."""
        return str(await self._call("begin_upload", {"key": key, "meta": pack_meta(meta)}))

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
        progress: Callable[[int], None] | None = None,
    ) -> tuple[str, ContentHash | None]:
        """Send a range of a file. Returns the part's ETag and, if ``hashed``, the result of hash_range.

        ``progress`` gets byte counts, about 10 a second; negative ones when bytes have to be sent again.
        """
        message = {
            "key": key,
            "upload_id": upload_id,
            "number": number,
            "path": path,
            "offset": offset,
            "length": length,
            "hashed": hashed,
        }
        hashes, etag = await self._call("send_part", message, paths=("path",), progress=progress)
        return str(etag), None if hashes is None else unpack_content(hashes)

    async def hash_range(self, path: str, offset: int, length: int) -> ContentHash:
        """hashing.hash_range of a file."""
        message = {"path": path, "offset": offset, "length": length}
        return unpack_content(await self._call("hash_range", message, paths=("path",)))

    async def hash_ends(self, path: str, size: int) -> tuple[str, bytes]:
        """hashing.hash_ends of a file of ``size`` bytes."""
        text, head = await self._call("hash_ends", {"path": path, "size": size}, paths=("path",))
        return str(text), unpack_bytes(head)

    async def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, offset: int, length: int
    ) -> str:
        """Copy a range of an object. Returns the part's ETag. Raises ObjectChanged, ObjectMissing."""
        message = {
            "key": key,
            "upload_id": upload_id,
            "number": number,
            "source": source,
            "etag": source_etag,
            "offset": offset,
            "length": length,
        }
        return str(await self._call("copy_part", message))

    async def complete_upload(self, key: str, upload_id: str, etags: Sequence[str], over: Over = ANYTHING) -> str:
        """Make the object from all parts. Returns its ETag."""
        message = {"key": key, "upload_id": upload_id, "etags": list(etags), "over": list(over)}
        return str(await self._call("complete_upload", message))

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """Abort an upload. It is no error if it is gone."""
        await self._call("abort_upload", {"key": key, "upload_id": upload_id})

    async def list_parts(self, key: str, upload_id: str) -> list[PartStat]:
        """The parts that storage has."""
        return [PartStat(*part) for part in await self._call("list_parts", {"key": key, "upload_id": upload_id})]

    async def uploads_of(self, key: str) -> list[str]:
        """Ids of the unfinished uploads of a key."""
        found: list[str] = await self._call("uploads_of", {"key": key})
        return found
