"""Puts, from the file system's side: open files are told before and after, and what is under way can be seen.

Runs in the daemon's trio loop, called by the uploader only. What is done to storage and registry is in steps.py and
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

log = logging.getLogger("lamfs.uploader")


class Puts:
    """Does puts, one large file or many small ones at a time. Owns which spool files are being read. Loop only.

    ``wanted``: how many wait for an inode's put; ``committed``: row and generation of what was stored last of those. (A
    row that comes later has a larger number, and its generations begin anew.)
    """

    def __init__(self, registry: Registry, steps: Steps, spool: SpoolFolder) -> None:
        self._registry = registry
        self._steps = steps
        self._spool = spool
        self.wanted: dict[int, int] = {}
        self.committed: dict[int, tuple[int, int]] = {}
        self.uploading: dict[int, str] = {}
        self.uploads: dict[int, Upload] = {}
        self.alone: set[int] = set()
        """Rows that cannot be stored together with others, or that failed so."""
        self.stored_bytes = 0
        self.stored_files = 0

    def begin(self, entry: Put) -> None:
        """A put is about to begin: its spool file is not written any more. To be followed by ``one`` or ``many``."""
        assert self._steps.hooks is not None
        self.uploading[entry.ino] = entry.src
        self._steps.hooks.freeze(entry.ino, entry.src)
        self.uploads[entry.id] = Upload(entry)

    async def one(self, entries: list[Put]) -> None:
        """Store one spool file, with its open handles told before and after."""
        entry = entries[0]
        started = time.monotonic()
        upload = self.uploads[entry.id]
        current = False
        try:
            upload.known = await self._steps.streams.finish(entry.ino, entry.src)
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
        """Store many small files; the errors of those that failed. What cannot be stored so is stored alone, next."""
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
                            self.alone.discard(upload.entry.id)  # that was not this file's fault
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
        """A put is done: tell the open handles, and count. Whether nothing was written meanwhile."""
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
        self._steps.streams.finished(entry.ino)
        if self.uploading.get(entry.ino) == entry.src:  # not the next one of this file, which may have begun
            del self.uploading[entry.ino]
        self.uploads.pop(entry.id, None)
        if not current:
            self._steps.hooks.thaw(entry.ino, entry.src)

    def _superseded(self, src: str) -> bool:
        """Whether nobody owes a spool file any more (as another file it may be owed, after a conflict)."""
        return not self._registry.journal.owes_file(src)
