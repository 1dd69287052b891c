"""Large files go to storage in parts that outlive the process that sends them. Called by the steps, in their thread.

Each part that storage has is recorded in the registry (registry/uploads.py) with the digests of its bytes. An upload
that was interrupted, by a crash, an outage or new bytes, is resumed: only parts that storage lacks, or has with other
bytes, are sent or copied. This module owns the table of uploads that are under way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lamfs.errors import InvalidArgument, LamfsError, StorageError, StorageUnavailable, UploadGone
from lamfs.hashing import join_ranges
from lamfs.model import BLOCK_SIZE, ContentHash, now_ns
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
"""Bytes of each of the first STEP parts. Later ones are larger."""
COPY_PART_SIZE = 128 * MIB
"""Bytes of a part that storage copies. Amazon S3 limits the speed of one copy and runs several at once. This is large
enough that requests cost nothing, and small enough that 1 GiB makes WINDOW parts. (EMR's S3DistCp also uses 128 MiB.)
"""
MIN_PART = 5 * MIB
MAX_PARTS = 10_000
STEP = 1000
LARGEST = 8
"""Part sizes double after every STEP parts, LARGEST times: up to 4 GiB each, 7.8 TiB in 10,000 parts. (Amazon S3
accepts parts up to 5 GiB.) So the offset of a part does not depend on the size that the file will have."""
WINDOW = 8
"""Parts of one file in flight at a time."""
SEALED = 16 << 30
"""One part waits to be sealed together with others for each SEALED bytes of the file's size."""


class Segment(NamedTuple):
    """``length`` bytes at ``offset`` of the spool file, or the same range of ``source``: an object key and its ETag.

    Segments follow each other without gaps. All but the last are multiples of the block size and at least MIN_PART.
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
    """Bytes of part ``number`` if it is sent from a file."""
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
            # Only the very last part may be small. Another remainder that is too small joins the part before it.
            length = left if left - size < (1 if last else MIN_PART) else size
            parts.append(Part(len(parts) + 1, at, length, segment.source))
            at += length
    if len(parts) > MAX_PARTS:
        raise InvalidArgument(f"An upload of {len(parts)} parts is more than storage takes ({MAX_PARTS}).")
    return parts


def digests(content: ContentHash, part: Part) -> bytes:
    """The digests of the blocks in a part."""
    return content.blocks[32 * (part.offset // BLOCK_SIZE) : 32 * -(-(part.offset + part.length) // BLOCK_SIZE)]


@dataclass(slots=True)
class _Job:
    """The upload of one file.

    ``hashes``: of single parts, by number, while ``content`` is not known yet. ``etags``: of the parts in storage.
    """

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
    """Parts whose hashes are not in the registry yet."""
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
        """Storage does not have a part after all."""
        if self.etags.pop(part.number, None) is not None:
            self.progress(-part.length)


class Multipart:
    """Stores files in parts. Used by the thread of the registry; any number of files at once, one task each."""

    def __init__(self, registry: Registry, worker: Worker, waits: Waits) -> None:
        self._registry = registry
        self._uploads = registry.uploads
        self._worker = worker
        self._waits = waits
        self._busy: dict[int, str] = {}

    def is_busy(self, upload_id: str) -> bool:
        """Whether parts of an upload may be in flight."""
        return upload_id in self._busy.values()

    def finished(self, entry_id: int) -> None:
        """No part of the row's upload is in flight any more."""
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
        """Make the object ``target`` from the segments of a put row's file with the bytes ``content``.

        Returns its ETag. ``progress`` gets the bytes that storage has gained, negative if it lost some. Raises what the
        worker raises (ObjectChanged or ObjectMissing: a source is gone); the next call resumes the upload.
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
        """As store, for a whole file of ``size`` bytes, more than MD5_MAX, that is hashed as it is sent.

        ``known``: the hashes, by number, of parts that certainly have not changed since they were sent. Each part is
        sealed (registry/seals.py) before it is sent; in files of more than 32 GiB, several together. ``check`` is
        called with the file's hashes before the object is made, and may raise.
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
                # Storage dropped the upload, or completed it with other bytes: there is nothing to resume.
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
        """Whether the recorded part has the bytes that are needed now."""
        if (old.offset, old.length) != (part.offset, part.length):
            return False
        if job.content is not None:
            return old.blocks == digests(job.content, part)
        return old.blocks == (await self._hash(job, part)).blocks

    async def _hash(self, job: _Job, part: Part) -> ContentHash:
        """The hashes of a part of a file that was not hashed before. Seals the part."""
        if part.number not in job.hashes:
            job.hashes[part.number] = await self._worker.hash_range(job.path, part.offset, part.length)
            self._seal(job, [part])
        return job.hashes[part.number]

    def _seal(self, job: _Job, parts: Sequence[Part], *, at_once: bool = False) -> None:
        """Note the hashes of these parts. Each call rewrites the whole seal, so in very large files parts wait."""
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
        """The record of the row's upload to ``target``, a new one if it has none."""
        record = self._uploads.of(entry.id)
        if record is not None and record.object_key != target:
            self._uploads.abandon(entry.id, self._registry.journal.owner, now=now_ns())
            record = None
        if record is None:
            if not self._uploads.announce(entry.id, target):
                raise _overtaken()
            return UploadRecord(target, None, False)
        if record.upload_id is None:
            # It may have begun before its id was lost. The row claims this key, so no other upload can be there.
            known = self._uploads.known(target)
            for upload_id in await self._worker.uploads_of(target):
                if upload_id not in known:
                    await self._worker.abort_upload(target, upload_id)
        return record

    async def begin(self, entry: Put, target: str) -> str:
        """Begin the upload that was announced for a row. Returns its id. It is busy until ``finished``."""
        # Without a hash, because the upload may be resumed after the file has changed.
        meta = self._registry.commits.put_meta(entry, None)
        upload_id = self._busy[entry.id] = await self._worker.begin_upload(target, meta)
        if not self._uploads.begun(entry.id, upload_id):
            await self._worker.abort_upload(target, upload_id)
            raise _overtaken()
        return upload_id

    async def _there(
        self, entry: Put, target: str, upload_id: str, *, all_known: bool
    ) -> set[tuple[int, int, str]] | None:
        """Number, size and ETag of the parts that storage has. Some servers also list parts that were replaced.

        None: the upload is gone, perhaps because it is complete.
        """
        try:
            return {(part.number, part.size, part.etag) for part in await self._worker.list_parts(target, upload_id)}
        except UploadGone:
            if all_known:
                return None
            raise
        except StorageUnavailable:
            raise
        except StorageError:
            # The server cannot list parts, so nobody knows whether it has them.
            return set()

    async def _move(self, job: _Job, upload_id: str) -> None:
        """Send or copy the parts that storage lacks. After an error no new part begins."""

        async def send(part: Part) -> tuple[bytes, str]:
            return await self._move_one(job, upload_id, part)

        def done(part: Part, sent: tuple[bytes, str]) -> None:
            blocks, etag = sent
            self.record(job.entry.id, upload_id, part, blocks, etag)
            job.got(part, etag)

        await self._waits.each([part for part in job.parts if part.number not in job.etags], send, done, WINDOW)

    async def _move_one(self, job: _Job, upload_id: str, part: Part) -> tuple[bytes, str]:
        """Copy or send a part. Returns the digests of its blocks, and its ETag."""
        if part.source is not None:
            assert job.content is not None
            etag = await self._worker.copy_part(
                job.target, upload_id, part.number, *part.source, part.offset, part.length
            )
            return digests(job.content, part), etag
        # Hash first: then the bytes are in memory when they are sent.
        blocks = (await self._hash(job, part)).blocks if job.content is None else digests(job.content, part)
        with _counted(job) as count:
            etag, _ = await self._worker.send_part(
                job.target, upload_id, part.number, job.path, part.offset, part.length, progress=count
            )
        return blocks, etag

    async def send(self, entry_id: int, target: str, upload_id: str, part: Part, path: str) -> ContentHash:
        """Hash, send and record a part of a file that is still being written.

        Raises storage errors, and StorageError if the row is gone.
        """
        etag, hashes = await self._worker.send_part(
            target, upload_id, part.number, path, part.offset, part.length, hashed=True
        )
        assert hashes is not None
        self.record(entry_id, upload_id, part, hashes.blocks, etag)
        return hashes

    def record(self, entry_id: int, upload_id: str, part: Part, blocks: bytes, etag: str) -> None:
        """Record that storage has a part. Raises StorageError if the row is gone."""
        record = PartRecord(part.number, part.offset, part.length, blocks, etag)
        if not self._uploads.add_part(entry_id, upload_id, record):
            raise _overtaken()

    async def abort(self, entry: Abort) -> bool:
        """Do an ``abort`` row. False: it must wait, because the upload or its object is in use."""
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
        """Abort the unfinished uploads of an object that no journal row knows. Nobody may be storing it now."""
        known = self._uploads.known(key)
        for found in await self._worker.uploads_of(key):
            if found not in known:
                await self._worker.abort_upload(key, found)


def _overtaken() -> StorageError:
    return StorageError("The file was deleted while it was uploaded.")


@contextlib.contextmanager
def _counted(job: _Job) -> Iterator[Progress]:
    """A context that reports a part as it is sent, and takes that back at its end: then the part counts as a whole."""
    told = 0

    def count(size: int) -> None:
        nonlocal told
        told += size
        job.progress(size)

    try:
        yield count
    finally:
        job.progress(-told)
