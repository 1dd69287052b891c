"""Large files go to storage in parts that survive whoever sends them. In the daemon's trio loop, called by the steps.

Each part that storage has is recorded in the registry (registry/uploads.py) with the digests of its bytes. A try that
was cut off, by a crash, an outage or new bytes, is continued: only parts that storage lacks, or has with other bytes,
are moved. Owns which uploads are under way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lamfs.errors import InvalidArgument, LamfsError, StorageError, StorageUnavailable, UploadGone
from lamfs.hashing import join_ranges
from lamfs.model import BLOCK_SIZE, ContentHash
from lamfs.registry import PartRecord, Registry, UploadRecord
from lamfs.registry.entries import Abort, Put
from lamfs.registry.seals import UNKNOWN
from lamfs.work.guard import Ready, over_anything
from lamfs.work.worker import Waits, Worker

Progress = Callable[[int], None]

MIB = 1 << 20
MULTIPART_ABOVE = 64 * MIB
"""Files up to this size go in one request."""
PART_SIZE = 16 * MIB
"""Bytes of each of the first STEP parts; later ones are larger."""
COPY_PART_SIZE = 128 * MIB
"""Bytes of a part that storage copies. Amazon S3 copies each part at its own, limited speed, several at once: large
enough that requests cost nothing, small enough that WINDOW of them share 1 GiB. (EMR's S3DistCp takes 128 MiB too.)"""
MIN_PART = 5 * MIB
MAX_PARTS = 10_000
STEP = 1000
LARGEST = 8
"""Part sizes double after every STEP parts, LARGEST times: up to 4 GiB, and 7.8 TiB in 10,000 parts (Amazon S3 takes
parts up to 5 GiB). So where a part begins does not depend on how large the file becomes."""
WINDOW = 8
"""Parts of one file under way at a time."""
SEALED = 16 << 30
"""Bytes of a file for each part that waits to be sealed with others."""


class Segment(NamedTuple):
    """``length`` bytes at ``offset``: of the spool file, or the same range of ``source``, an object key and its ETag.

    Segments follow each other without gaps; all but the last are multiples of the block size and at least MIN_PART.
    """

    offset: int
    length: int
    source: tuple[str, str] | None = None


class Part(NamedTuple):
    """One part of an upload: a piece of a segment. ``number`` from 1."""

    number: int
    offset: int
    length: int
    source: tuple[str, str] | None


def part_size(number: int) -> int:
    """Bytes of part ``number`` when it is sent from a file."""
    return PART_SIZE << min((number - 1) // STEP, LARGEST)


def plan(segments: Sequence[Segment]) -> list[Part]:
    """The parts of an object. Raises InvalidArgument for segments that do not fit the rules of Segment or of S3."""
    parts: list[Part] = []
    at = 0
    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        if segment.offset != at or (not last and (segment.length % BLOCK_SIZE or segment.length < MIN_PART)):
            raise InvalidArgument(f"The bytes at {segment.offset} cannot be a part of an upload by themselves.")
        end = segment.offset + segment.length
        while at < end:
            size = part_size(len(parts) + 1)
            if segment.source is not None:
                size = max(size, COPY_PART_SIZE)
            left = end - at
            # A remainder that is too small for a part, other than the very last, goes with the one before.
            length = left if left - size < (1 if last else MIN_PART) else size
            parts.append(Part(len(parts) + 1, at, length, segment.source))
            at += length
    if len(parts) > MAX_PARTS:
        raise InvalidArgument(f"An upload of {len(parts)} parts is more than storage takes ({MAX_PARTS}).")
    return parts


def digests(content: ContentHash, part: Part) -> bytes:
    """The digests of the blocks that a part covers."""
    return content.blocks[32 * (part.offset // BLOCK_SIZE) : 32 * -(-(part.offset + part.length) // BLOCK_SIZE)]


@dataclass(slots=True)
class _Job:
    """One file on its way: ``hashes`` has those of single parts, by number, when ``content`` is not known yet;
    ``etags`` those of the parts that storage has."""

    entry: Put
    path: str
    target: str
    parts: list[Part]
    progress: Progress
    content: ContentHash | None
    hashes: dict[int, ContentHash] = field(default_factory=dict)
    etags: dict[int, str] = field(default_factory=dict)
    check: Callable[[ContentHash], Awaitable[None]] | None = None
    unsealed: list[Part] = field(default_factory=list)
    """Parts whose hashes are not noted yet."""
    ready: Ready = over_anything

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(part.length for part in self.parts)

    def got(self, part: Part, etag: str) -> None:
        """Storage has a part."""
        self.etags[part.number] = etag
        self.progress(part.length)

    def lost(self, part: Part) -> None:
        """Storage has it not, after all."""
        if self.etags.pop(part.number, None) is not None:
            self.progress(-part.length)


class Multipart:
    """Stores files in parts. Loop only; any number of files at once, one task each."""

    def __init__(self, registry: Registry, worker: Worker, waits: Waits) -> None:
        self._registry = registry
        self._uploads = registry.uploads
        self._worker = worker
        self._waits = waits
        self._busy: dict[int, str] = {}

    def is_busy(self, upload_id: str) -> bool:
        """Whether parts of an upload may be under way."""
        return upload_id in self._busy.values()

    def finished(self, entry_id: int) -> None:
        """Nothing of the row's upload is under way any more."""
        self._busy.pop(entry_id, None)

    async def store(
        self,
        entry: Put,
        content: ContentHash,
        path: str,
        target: str,
        segments: Sequence[Segment],
        progress: Progress,
        ready: Ready = over_anything,
    ) -> str:
        """Make ``target`` of the segments of a put row's file, whose bytes are ``content``; returns its ETag.

        ``progress`` gets the bytes that storage has more than before (fewer when it lost some). What fails is raised
        as the mover raised it, and continued by the next call; ObjectChanged or ObjectMissing: a source is gone.
        """
        return (await self._store(_Job(entry, path, target, plan(segments), progress, content, ready=ready)))[0]

    async def store_unhashed(
        self,
        entry: Put,
        size: int,
        path: str,
        target: str,
        known: Mapping[int, ContentHash],
        progress: Progress,
        check: Callable[[ContentHash], Awaitable[None]] | None = None,
        ready: Ready = over_anything,
    ) -> tuple[str, ContentHash]:
        """As store, of a whole file of ``size`` bytes, more than MD5_MAX, that is hashed as it is sent.

        ``known``: by number, the hashes of parts that are surely as they were when they were sent. Each part is sealed
        (registry/seals.py) before it is sent; of a file of more than 32 GiB some at a time. ``check`` is called with
        the file's hashes before they become an object, and may raise.
        """
        parts = plan([Segment(0, size)])
        job = _Job(entry, path, target, parts, progress, None, dict(known), check=check, ready=ready)
        etag, content = await self._store(job)
        assert content is not None
        return etag, content

    async def _store(self, job: _Job) -> tuple[str, ContentHash | None]:
        try:
            try:
                return await self._try(job)
            except UploadGone:
                # Storage has dropped it, or the object was completed with other bytes: there is nothing to go on with.
                self._uploads.forget(job.entry.id)
                for part in job.parts:
                    job.lost(part)
                return await self._try(job)
        except LamfsError:
            for part in job.parts:
                job.lost(part)
            raise
        finally:
            self.finished(job.entry.id)

    async def _try(self, job: _Job) -> tuple[str, ContentHash | None]:
        entry, target = job.entry, job.target
        record = await self._resume(entry, target)
        self._seal(job, [part for part in job.parts if part.number in job.hashes], at_once=True)
        for part in job.parts:
            old = record.parts.get(part.number)
            if old is not None and await self._is_right(job, part, old):
                job.got(part, old.etag)
        if record.upload_id is None:
            upload_id = await self.begin(entry, target)
        else:
            upload_id = self._busy[entry.id] = record.upload_id
            complete = len(job.etags) == len(job.parts)
            if not (complete and record.completed):
                there = await self._there(entry, target, upload_id, all_known=complete)
                for part in job.parts if there is not None else ():
                    assert there is not None
                    if (part.number, part.length, job.etags.get(part.number, "").strip('"')) not in there:
                        job.lost(part)
        await self._move(job, upload_id)
        content = job.content
        if content is None:
            ends = await self._worker.hash_ends(job.path, job.size)
            content = join_ranges((job.hashes[part.number] for part in job.parts), ends)
            if job.check is not None:
                await job.check(content)
        etags = [job.etags[part.number] for part in job.parts]
        made = await self._worker.complete_upload(target, upload_id, etags, await job.ready())
        self._uploads.completed(entry.id)
        return made, content

    async def _is_right(self, job: _Job, part: Part, old: PartRecord) -> bool:
        """Whether storage has the very bytes of a part, if it has what is recorded."""
        if (old.offset, old.length) != (part.offset, part.length):
            return False
        if job.content is not None:
            return old.blocks == digests(job.content, part)
        return old.blocks == (await self._hash(job, part)).blocks

    async def _hash(self, job: _Job, part: Part) -> ContentHash:
        """The hashes of a part of a file that was not hashed before; it is sealed."""
        if part.number not in job.hashes:
            job.hashes[part.number] = await self._worker.hash_range(job.path, part.offset, part.length)
            self._seal(job, [part])
        return job.hashes[part.number]

    def _seal(self, job: _Job, parts: Sequence[Part], *, at_once: bool = False) -> None:
        """Note the hashes of these parts. Each writes the whole seal: of very large files some parts wait."""
        job.unsealed += parts
        if not job.unsealed or (not at_once and len(job.unsealed) < job.size // SEALED):
            return
        found = sorted(job.unsealed, key=lambda part: part.offset)
        job.unsealed.clear()
        first = found[0].offset // BLOCK_SIZE
        blocks = bytearray()
        for part in found:
            blocks += UNKNOWN * (part.offset // BLOCK_SIZE - first - len(blocks) // 32)
            blocks += job.hashes[part.number].blocks
        self._registry.seals.add(job.entry, job.size, bytes(blocks), first)

    async def _resume(self, entry: Put, target: str) -> UploadRecord:
        """The record of the row's upload to ``target``; a new one if it has none."""
        record = self._uploads.of(entry.id)
        if record is not None and record.object_key != target:
            self._uploads.abandon(entry.id, self._registry.journal.owner)
            record = None
        if record is None:
            if not self._uploads.announce(entry.id, target):
                raise _overtaken()
            return UploadRecord(target, None, False)
        if record.upload_id is None:
            # It may have begun, and its id was lost: the row claims this key, so nobody else's can be there.
            known = self._uploads.known(target)
            for upload_id in await self._worker.uploads_of(target):
                if upload_id not in known:
                    await self._worker.abort_upload(target, upload_id)
        return record

    async def begin(self, entry: Put, target: str) -> str:
        """Begin the upload that was announced for a row; its id. It is busy from now on, until ``release``."""
        # Without a hash: the upload may be gone on with when the file has other bytes.
        meta = self._registry.commits.put_meta(entry, None)
        upload_id = self._busy[entry.id] = await self._worker.begin_upload(target, meta)
        if not self._uploads.begun(entry.id, upload_id):
            await self._worker.abort_upload(target, upload_id)
            raise _overtaken()
        return upload_id

    async def _there(
        self, entry: Put, target: str, upload_id: str, *, all_known: bool
    ) -> set[tuple[int, int, str]] | None:
        """Number, size and ETag of the parts that storage has, of some servers also those that were replaced; None: the
        upload is gone, perhaps because it is complete."""
        try:
            return {(part.number, part.size, part.etag) for part in await self._worker.list_parts(target, upload_id)}
        except UploadGone:
            if all_known:
                return None
            raise
        except StorageUnavailable:
            raise
        except StorageError:
            # A server that cannot list parts: whether it has them is not known.
            return set()

    async def _move(self, job: _Job, upload_id: str) -> None:
        """Get the parts that are not there to storage. After an error no new one begins."""

        async def send(part: Part) -> tuple[bytes, str]:
            return await self._move_one(job, upload_id, part)

        def done(part: Part, sent: tuple[bytes, str]) -> None:
            blocks, etag = sent
            self.record(job.entry.id, upload_id, part, blocks, etag)
            job.got(part, etag)

        await self._waits.each([part for part in job.parts if part.number not in job.etags], send, done, WINDOW)

    async def _move_one(self, job: _Job, upload_id: str, part: Part) -> tuple[bytes, str]:
        """Copy or send a part; the digests of its blocks, and its ETag."""
        if part.source is not None:
            assert job.content is not None
            etag = await self._worker.copy_part(
                job.target, upload_id, part.number, *part.source, part.offset, part.length
            )
            return digests(job.content, part), etag
        # The bytes that were hashed are in memory then when they are sent.
        blocks = (await self._hash(job, part)).blocks if job.content is None else digests(job.content, part)
        with _counted(job) as count:
            etag, _ = await self._worker.send_part(
                job.target, upload_id, part.number, job.path, part.offset, part.length, progress=count
            )
        return blocks, etag

    async def send(self, entry_id: int, target: str, upload_id: str, part: Part, path: str) -> ContentHash:
        """Hash, send and record a part of a file that is still being written. Raises also StorageError when the row is
        gone."""
        etag, hashes = await self._worker.send_part(
            target, upload_id, part.number, path, part.offset, part.length, hashed=True
        )
        assert hashes is not None
        self.record(entry_id, upload_id, part, hashes.blocks, etag)
        return hashes

    def record(self, entry_id: int, upload_id: str, part: Part, blocks: bytes, etag: str) -> None:
        """Storage has a part. Raises StorageError when the row is gone."""
        record = PartRecord(part.number, part.offset, part.length, blocks, etag)
        if not self._uploads.add_part(entry_id, upload_id, record):
            raise _overtaken()

    async def abort(self, entry: Abort) -> bool:
        """Do an ``abort`` row; False when it has to wait, because somebody is at work there."""
        key, upload_id = entry.object_key, entry.upload_id
        if upload_id is not None:
            if self.is_busy(upload_id):
                return False
            await self._worker.abort_upload(key, upload_id)
            return True
        if self._registry.journal.holds(key):
            return False
        await self.abort_unknown(key)
        return True

    async def abort_unknown(self, key: str) -> None:
        """Abort the unfinished uploads of an object that no journal row knows; nobody may be storing it."""
        known = self._uploads.known(key)
        for found in await self._worker.uploads_of(key):
            if found not in known:
                await self._worker.abort_upload(key, found)


def _overtaken() -> StorageError:
    return StorageError("The file was deleted while it was uploaded.")


@contextlib.contextmanager
def _counted(job: _Job) -> Iterator[Progress]:
    """Counts a part while it is being sent; at its end nothing of that counts, since it is counted as a whole then."""
    told = 0

    def count(size: int) -> None:
        nonlocal told
        told += size
        job.progress(size)

    try:
        yield count
    finally:
        job.progress(-told)
