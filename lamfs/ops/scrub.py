"""Reads everything in storage, and compares each block with the registry's hash: ``fsck --data``. Synchronous.

One round over all artifacts may take days. It can be interrupted at any moment, and goes on when it is started again.
``scrub.log`` beside the registry has what was found right in this round: one entry of 24 bytes an artifact. An entry
has a fingerprint of the revision that was read, so an artifact that has changed since is read again. Entries are
appended, and an artifact of many blocks gets one now and then. A torn or zeroed entry fits no artifact. Damage is noted
in damage.py, and damaged artifacts are read again the next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from lamfs import hashing
from lamfs.errors import LamfsError, Locked, ObjectChanged, ObjectMissing
from lamfs.model import BLOCK_SIZE, ArtifactRecord
from lamfs.mover import buffers
from lamfs.mover.fetching import fetch_right
from lamfs.ops import damage
from lamfs.ops.instance import Instance
from lamfs.pool import Pool

JOBS = 8
"""Blocks that are read at a time; each takes BLOCK_SIZE of memory."""
CHECKPOINT_BLOCKS = 64
"""Blocks of one artifact between two entries in the log."""
MOST_UNREAD = 8
"""Unreadable artifacts in a row that mean that storage is away; the round is left for later."""
PASSES = 3
"""Passes that look for what was saved, replaced or moved while the rest was read."""
_ENTRY = struct.Struct("<qq8s")
"""An entry: artifact id, number of leading blocks that are right, fingerprint."""


class Watcher(Protocol):
    """Gets the progress of a round, in bytes. Called from this thread."""

    def begin(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes were read by an earlier run."""

    def add(self, count: int) -> None:
        """``count`` more bytes are read."""


@dataclass(slots=True)
class Result:
    """What one run read, in artifacts and bytes; what earlier runs of the same round read; and what is still unread."""

    artifacts: int = 0
    bytes: int = 0
    before: int = 0
    before_bytes: int = 0
    unread: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Reading:
    """An artifact that is being read. ``right``: leading blocks that are right; ``ahead``: right blocks after a gap."""

    record: ArtifactRecord
    right: int
    asked: int = 0
    back: int = 0
    ahead: set[int] = field(default_factory=set)
    wrong: list[int] = field(default_factory=list)
    error: LamfsError | None = None

    def over(self) -> bool:
        """Whether every block that was asked for has come, and no more will be asked for."""
        count = self.record.revision.block_count()
        return self.back == self.asked and (
            self.error is not None or len(self.ahead) + len(self.wrong) + self.right == count
        )


class Log:
    """The entries of this round. One process at a time has them."""

    def __init__(self, instance: Instance, *, restart: bool) -> None:
        path = instance.settings.directory / "scrub.log"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise Locked(
                f"Another process is reading all of '{instance.settings.slug}' right now; let it end, or interrupt it."
            ) from None
        size = os.fstat(self._fd).st_size
        os.ftruncate(self._fd, 0 if restart else size - size % _ENTRY.size)
        self._right: dict[int, tuple[int, bytes]] = {}
        with os.fdopen(os.dup(self._fd), "rb") as stream:
            stream.seek(0)
            while data := stream.read(_ENTRY.size << 12):
                for ident, blocks, mark in _ENTRY.iter_unpack(data):
                    self._right[ident] = (blocks, mark)

    def close(self) -> None:
        """Let other processes check. The entries stay."""
        os.close(self._fd)

    def right(self, record: ArtifactRecord) -> int:
        """Leading blocks of an artifact's revision that were found right."""
        assert record.id is not None
        blocks, mark = self._right.get(record.id, (0, b""))
        return blocks if mark == _fingerprint(record) else 0

    def note(self, record: ArtifactRecord, blocks: int) -> None:
        """Note how many leading blocks are right."""
        assert record.id is not None
        mark = _fingerprint(record)
        self._right[record.id] = (blocks, mark)
        os.write(self._fd, _ENTRY.pack(record.id, blocks, mark))

    def end(self) -> None:
        """End the round: the next run begins a new one."""
        os.ftruncate(self._fd, 0)


def _fingerprint(record: ArtifactRecord) -> bytes:
    text = f"{record.uid}\0{record.revision.object_key}\0{record.revision.etag}"
    return hashing.hash_block(text.encode(errors="surrogateescape") + record.revision.content.blocks)[:8]


def run(
    instance: Instance,
    leave_out: set[str],
    *,
    jobs: int = JOBS,
    restart: bool = False,
    watcher: Watcher | None = None,
) -> Result:
    """Read the artifacts that this round has not read yet, except those whose uid is in ``leave_out``. Damage is
    recorded.

    Raises Locked when another process does the same, and StorageError when storage is away. Then, as after an
    interrupt, the next run goes on from there.
    """
    result = Result()
    log = Log(instance, restart=restart)
    try:
        finished = set(leave_out)  # uids that this run does not read (again)
        todo = list(_todo(instance, log, finished))
        sizes = [record.size for record in _all(instance) if record.uid not in leave_out]
        left = sum(record.size - start * BLOCK_SIZE for record, start in todo)
        result.before, result.before_bytes = len(sizes) - len(todo), sum(sizes) - left
        if watcher is not None:
            watcher.begin(result.before_bytes, sum(sizes))
        for _ in range(PASSES):
            _read_all(instance, log, todo, finished, result, jobs, watcher)
            todo = list(_todo(instance, log, finished))
            if not todo:
                break
        if not todo and not result.unread:
            log.end()
    finally:
        log.close()
    return result


def _all(instance: Instance) -> Iterator[ArtifactRecord]:
    return (record for record in instance.registry.artifacts.filter(visibility=None) if record.size)


def _todo(instance: Instance, log: Log, finished: set[str]) -> Iterator[tuple[ArtifactRecord, int]]:
    for record in _all(instance):
        start = log.right(record)
        if record.uid not in finished and start < record.revision.block_count():
            yield record, start


def _read_all(
    instance: Instance,
    log: Log,
    todo: list[tuple[ArtifactRecord, int]],
    finished: set[str],
    result: Result,
    jobs: int,
    watcher: Watcher | None,
) -> None:
    def blocks() -> Iterator[tuple[_Reading, int]]:
        for record, start in todo:
            reading = _Reading(record, start)
            for block in range(start, record.revision.block_count()):
                if reading.error is not None:
                    break
                reading.asked += 1
                yield reading, block

    def is_right(item: tuple[_Reading, int]) -> bool:
        return _is_right(instance, item[0].record, item[1])

    in_a_row = 0
    with Pool(jobs, "lamfs-scrub") as pool, contextlib.closing(pool.unordered(is_right, blocks())) as done:
        for (reading, block), future in done:
            reading.back += 1
            length = 0
            try:
                if future.result():
                    reading.ahead.add(block)
                    _advance(log, reading)
                else:
                    reading.wrong.append(block)
            except LamfsError as error:
                reading.error = error
            else:
                length = min(BLOCK_SIZE, reading.record.size - block * BLOCK_SIZE)
                result.bytes += length
            if reading.over():
                in_a_row = in_a_row + 1 if _judge(instance, log, reading, finished, result) else 0
                if in_a_row == MOST_UNREAD and reading.error is not None:
                    raise reading.error
            if watcher is not None:
                watcher.add(length)


def _advance(log: Log, reading: _Reading) -> None:
    """Count the leading blocks that are right, and note them now and then."""
    before = reading.right
    while reading.right in reading.ahead:
        reading.ahead.discard(reading.right)
        reading.right += 1
    if reading.right // CHECKPOINT_BLOCKS > before // CHECKPOINT_BLOCKS:
        log.note(reading.record, reading.right)


def _judge(instance: Instance, log: Log, reading: _Reading, finished: set[str], result: Result) -> bool:
    """Record the result of an artifact that was read to its end, or to an error. Returns whether it is still unread."""
    record, error = reading.record, reading.error
    if reading.wrong:
        damage.record(instance, record, _where(reading.wrong), tuple(sorted(reading.wrong)))
    elif error is None:
        log.note(record, reading.right)
        damage.clear(instance, record)
    else:
        now = instance.registry.artifacts.by_uid(record.uid)
        if now is None or now.revision != record.revision:
            return False  # another process's work; the next pass reads its new revision
        if isinstance(error, ObjectMissing):
            damage.record(instance, record, "is gone")
        elif isinstance(error, ObjectChanged):
            damage.record(instance, record, damage.REPLACED)
        else:
            result.unread.append(f"'{record.place}' (artifact {record.uid}) cannot be read: {error}")
            finished.add(record.uid)
            return True
    finished.add(record.uid)
    result.artifacts += 1
    return False


def _where(blocks: list[int]) -> str:
    numbers = [str(block) for block in sorted(blocks)]
    if len(numbers) == 1:
        return f"is damaged in block {numbers[0]}"
    shown = ", ".join(numbers[:10]) + (f" and {len(numbers) - 10} others" if len(numbers) > 10 else "")
    return f"is damaged in blocks {shown}"


def has_its_bytes(instance: Instance, record: ArtifactRecord, etag: str, jobs: int = JOBS) -> bool:
    """Whether the object of an artifact, now with another ETag, has all the bytes that were saved. Raises storage
    errors, and ObjectChanged when it is replaced meanwhile."""
    copy = dataclasses.replace(record, revision=dataclasses.replace(record.revision, etag=etag))

    def is_right(block: int) -> bool:
        return _is_right(instance, copy, block)

    with Pool(jobs, "lamfs-scrub") as pool:
        blocks = range(copy.revision.block_count())
        with contextlib.closing(pool.unordered(is_right, blocks)) as done:
            return all(future.result() for _, future in done)


def _is_right(instance: Instance, record: ArtifactRecord, block: int) -> bool:
    """Read one block of an object. Raises storage errors."""
    revision = record.revision
    offset = block * BLOCK_SIZE
    digest = revision.content.block(block)
    with buffers.own().view(min(BLOCK_SIZE, revision.size - offset)) as view:
        return fetch_right(
            instance.store, revision.object_key, revision.etag, offset, view,
            lambda data: hashing.hash_block(data) == digest,
        )  # fmt: skip
