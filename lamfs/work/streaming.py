"""Parts of a large file are sent while it is still being written. In the daemon's trio loop, driven by the writes.

When a file has grown past START bytes at its end, its full parts well before the end are hashed and sent, a few at a
time. A write into a part that was sent spoils it: it is sent again when the file is stored. This module only knows
which parts certainly have not changed. The registry knows which parts storage has (registry/uploads.py), so after a
crash they are compared with the file, and not sent again either.
"""

from __future__ import annotations

import logging

import trio

from lamfs.errors import LamfsError
from lamfs.model import ContentHash
from lamfs.mover import beats
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder
from lamfs.work import multipart
from lamfs.work.multipart import Multipart, Part, part_size

log = logging.getLogger("lamfs.uploader")

START = 64 << 20
"""Bytes that a file must have before any part of it is sent."""
BEHIND = 16 << 20
"""The last so many bytes are not sent yet: programs go back a little more often than far."""
WAIT = 3.0
"""Seconds between that size and the first part. A file that is closed sooner is sent then, and until then its writer
has the machine to itself."""
PARTS = 2
"""Parts of all such files in flight at a time: writers and finished files come first."""
REST = (3.0, 1.0)
"""Pause after a part: so many times the time it took, and at most so many seconds. With fast storage, sending takes the
CPU from a writer that will be done soon. With slow storage the pause hardly counts."""
PATIENCE = 5.0
"""Seconds that storing a closed file waits for its parts in flight, before it sends them itself."""
SPOILED = 4
"""Spoiled parts after which the file counts as one that is not only appended to, and no further part is sent."""


class _Stream:
    """One spool file that is being sent while it grows."""

    def __init__(self, ino: int, src: str) -> None:
        self.ino = ino
        self.src = src
        self.size = 0
        self.sent = 0
        self.number = 0
        self.known: dict[int, ContentHash] = {}
        self.parts: dict[int, Part] = {}
        self.spoiled: set[int] = set()
        self.over = False
        self.beat = beats.Beat()
        self.grown = trio.Event()
        self.stopped = trio.Event()
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    def next_part(self) -> Part | None:
        """The next part, if the file is long enough. From now on it counts as sent."""
        length = part_size(self.number + 1)
        if self.over or self.size < self.sent + length + BEHIND or self.number == multipart.MAX_PARTS - 1:
            return None
        self.number += 1
        part = self.parts[self.number] = Part(self.number, self.sent, length, None)
        self.sent += length
        return part

    def spoil(self, start: int, end: int) -> None:
        """These bytes have changed."""
        for part in self.parts.values():
            if part.offset < end and start < part.offset + part.length:
                self.spoiled.add(part.number)
                self.known.pop(part.number, None)
        if len(self.spoiled) > SPOILED:
            self.end()

    def has_ended(self) -> bool:
        """Whether no further part will be sent."""
        return self.over

    def end(self) -> None:
        """Send no further part."""
        self.over = True
        self.grown.set()
        self.stopped.set()


class Streams:
    """Owns which files are being sent while they grow. Loop only."""

    def __init__(self, registry: Registry, parts: Multipart, spool: SpoolFolder) -> None:
        self._registry = registry
        self._multipart = parts
        self._spool = spool
        self._streams: dict[int, _Stream] = {}
        self._putting: set[int] = set()
        self._limit = trio.CapacityLimiter(PARTS)
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Send files as they grow from now on, in tasks of ``nursery``."""
        self._nursery = nursery

    def written(self, ino: int, src: str, offset: int, length: int, size: int) -> None:
        """``length`` bytes were written at ``offset`` of a spool file, which has ``size`` bytes now."""
        stream = self._streams.get(ino)
        appended = offset + length == size
        if stream is None:
            if size < START or not appended or self._nursery is None or ino in self._putting:
                return
            stream = self._streams[ino] = _Stream(ino, src)
            self._nursery.start_soon(self._run, stream)
        elif stream.src != src:
            stream.end()
            return
        if offset < stream.sent:
            stream.spoil(offset, offset + length)
        if appended:
            stream.size = size
            if not stream.over and size >= stream.sent + part_size(stream.number + 1) + BEHIND:
                stream.grown.set()

    def cut(self, ino: int, size: int) -> None:
        """The file was cut, or extended by a hole, to ``size`` bytes."""
        stream = self._streams.get(ino)
        if stream is not None:
            if size > stream.size:
                stream.end()
            stream.size = min(size, stream.size)
            stream.spoil(size, multipart.MAX_PARTS << 40)

    def sends(self, ino: int) -> bool:
        """Whether the file is or was sent while it is written. Then it is stored only after ``finish``."""
        return ino in self._streams

    async def finish(self, ino: int, src: str) -> dict[int, ContentHash]:
        """The file is being stored, and does not change any more: send nothing until ``finished``.

        Returns the hashes, by number, of the parts that were sent and certainly have not changed.
        """
        self._putting.add(ino)
        stream = self._streams.pop(ino, None)
        if stream is None:
            return {}
        stream.end()
        put = beats.current()
        if put is not None:
            stream.beat.counts_for(put)
        with trio.move_on_after(PATIENCE):
            await stream.ended.wait()
        stream.scope.cancel()
        await stream.ended.wait()
        return stream.known if stream.src == src else {}

    def finished(self, ino: int) -> None:
        """The file was stored, or storing it failed."""
        self._putting.discard(ino)

    def forget(self, ino: int) -> None:
        """The file is gone."""
        stream = self._streams.pop(ino, None)
        if stream is not None:
            stream.end()

    async def _run(self, stream: _Stream) -> None:
        begun: Put | None = None
        try:
            with trio.move_on_after(WAIT):
                await stream.stopped.wait()
            entry = self._registry.journal.put_of(stream.ino)
            if stream.over or entry is None or not self._may_send(stream, entry):
                return
            target = self._registry.commits.put_target(entry)
            if not self._registry.uploads.announce(entry.id, target):
                return
            begun = entry
            upload_id = await self._multipart.begin(entry, target)
            with stream.scope, beats.doing(stream.beat):
                async with trio.open_nursery() as nursery:
                    for _ in range(PARTS):
                        nursery.start_soon(self._work, stream, entry.id, target, upload_id)
        except LamfsError as error:
            log.info("%s is not sent before it is complete: %s", stream.src, error)
        except Exception:
            log.exception("unexpected error while sending %s before it is complete", stream.src)
        finally:
            stream.end()
            if begun is not None:
                self._multipart.finished(begun.id)
            stream.ended.set()

    def _may_send(self, stream: _Stream, entry: Put) -> bool:
        """Whether a file may become an artifact as it is. An upload of an earlier try is resumed when it is stored."""
        registry = self._registry
        if entry.src != stream.src or entry.owner != registry.journal.owner or entry.base is not None:
            return False
        names = registry.tree.names(stream.ino)
        if not names or names[0][1].startswith(".") or registry.names.is_scratch(stream.ino):
            return False
        record = registry.uploads.of(entry.id)
        if record is not None and record.completed:
            registry.uploads.forget(entry.id)
            record = None
        return record is None

    async def _work(self, stream: _Stream, entry_id: int, target: str, upload_id: str) -> None:
        path = self._spool.path(stream.src)
        while not stream.over:
            part = stream.next_part()
            if part is None:
                if stream.grown.is_set():
                    stream.grown = trio.Event()
                await stream.grown.wait()
                continue
            try:
                async with self._limit:
                    if stream.has_ended():
                        return
                    begun = trio.current_time()
                    hashes = await self._multipart.send(entry_id, target, upload_id, part, path)
            except LamfsError as error:
                log.info("%s is not sent on before it is complete: %s", stream.src, error)
                stream.end()
                return
            if part.number not in stream.spoiled:
                stream.known[part.number] = hashes
            with trio.move_on_after(min(REST[0] * (trio.current_time() - begun), REST[1])):
                await stream.stopped.wait()
