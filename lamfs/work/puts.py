"""Puts, from the file system's side: open files are notified before and after, and running uploads can be listed.

Runs in the daemon's trio loop, called only by the uploader. The changes to storage and registry are in steps.py and
batches.py.
"""

from __future__ import annotations

import logging
import time

from lamfs.errors import LamfsError, StorageUnavailable
from lamfs.registry import Committed, Registry
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder
from lamfs.work.steps import Steps, Upload
from lamfs.work.streaming import Streams

log = logging.getLogger("lamfs.uploader")


class Puts:
    """Does puts: one large file, or many small ones, at a time. Owns which spool files are being read. Loop only.

    ``wanted``: how many callers wait for an inode's put. ``committed``: row and generation of what was last stored for
    them. (A later row has a larger number, and its generations start again.)
    """

    def __init__(self, registry: Registry, steps: Steps, streams: Streams, spool: SpoolFolder) -> None:
        self._registry = registry
        self._steps = steps
        self._streams = streams
        self._spool = spool
        self.wanted: dict[int, int] = {}
        self.committed: dict[int, tuple[int, int]] = {}
        self.uploading: dict[int, str] = {}
        self.uploads: dict[int, Upload] = {}
        self.alone: set[int] = set()
        """Rows that cannot be stored together with others, or that failed that way."""
        self.stored_bytes = 0
        self.stored_files = 0

    def begin(self, entry: Put) -> None:
        """A put is about to begin: its spool file is not written any more. Call ``one`` or ``many`` next."""
        assert self._steps.hooks is not None
        self.uploading[entry.ino] = entry.src
        self._steps.hooks.freeze(entry.ino, entry.src)
        self.uploads[entry.id] = Upload(entry)

    async def one(self, entries: list[Put]) -> None:
        """Store one spool file. Its open handles are notified before and after."""
        entry = entries[0]
        started = time.monotonic()
        upload = self.uploads[entry.id]
        current = False
        try:
            upload.known = await self._streams.finish(entry.ino, entry.src)
            committed, consumed = await self._steps.put(entry, upload)
            current = self._stored(upload, committed, consumed)
            self.alone.discard(entry.id)
            log.debug("stored inode %d, %d bytes, in %.3f s", entry.ino, upload.size, time.monotonic() - started)
        except LamfsError:
            if self._superseded(entry.src):
                self._spool.unlink(entry.src)
            raise
        finally:
            self._leave(entry, current)

    async def many(self, entries: list[Put]) -> dict[int, LamfsError]:
        """Store many small files. Returns the errors of those that failed. A file that cannot be stored this way is
        stored alone, next."""
        hooks = self._steps.hooks
        assert hooks is not None
        uploads = [self.uploads[entry.id] for entry in entries]
        errors: dict[int, LamfsError] = {}
        left = {entry.id for entry in entries}
        self.alone |= left
        try:
            outcomes = await self._steps.batches.put(entries)
            with hooks.storing_many():
                for upload in uploads:
                    outcome = outcomes.get(upload.entry.id)
                    if isinstance(outcome, LamfsError):
                        errors[upload.entry.id] = outcome
                        if isinstance(outcome, StorageUnavailable):
                            self.alone.discard(upload.entry.id)  # not this file's fault
                    elif outcome is not None:
                        self.alone.discard(upload.entry.id)
                        upload.size = outcome.record.size if outcome.record is not None else 0
                        if self._stored(upload, outcome, False):
                            left.discard(upload.entry.id)
        finally:
            for entry in entries:
                self._leave(entry, entry.id not in left)
        return errors

    def _stored(self, upload: Upload, committed: Committed, consumed: bool) -> bool:
        """A put is done: notify the open handles, and count. Returns whether nothing was written meanwhile."""
        hooks, entry, record = self._steps.hooks, upload.entry, committed.record
        assert hooks is not None
        if entry.ino in self.wanted:
            self.committed[entry.ino] = entry.id, entry.gen
        if committed.current:
            hooks.stored(entry.ino, entry.src, record.revision if record else None, consumed, upload.missing)
        else:
            if record is not None and entry.base is not None:
                hooks.rebased(entry.ino, record.revision)
            if not consumed and self._superseded(entry.src):
                self._spool.unlink(entry.src)
        self.stored_files += 1
        self.stored_bytes += upload.size
        return committed.current

    def _leave(self, entry: Put, current: bool) -> None:
        """A put has ended."""
        assert self._steps.hooks is not None
        self._streams.finished(entry.ino)
        if self.uploading.get(entry.ino) == entry.src:  # the file's next put may have begun
            del self.uploading[entry.ino]
        self.uploads.pop(entry.id, None)
        if not current:
            self._steps.hooks.thaw(entry.ino, entry.src)

    def _superseded(self, src: str) -> bool:
        """Whether no put needs a spool file any more. (After a conflict, another file's put may need it.)"""
        return not self._registry.journal.owes_file(src)
