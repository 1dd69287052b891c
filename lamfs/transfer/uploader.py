"""The uploader: works off the journal. Runs in the daemon's trio loop; the only task that starts storage work there.

It owns which rows are under way. Bytes are moved by the Mover; rows are read and struck off through the Registry of the
loop's thread. A row that fails stays, and is tried again with growing pauses for as long as it takes.

The order is always: object first, registry row second, stale object last (DESIGN §3).
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from lamfs.errors import LamfsError, ObjectChanged, ObjectMissing, StorageError
from lamfs.keys import object_key_for
from lamfs.model import ContentHash, JournalEntry, Revision, now_ns
from lamfs.registry import Committed, Provenance, Registry
from lamfs.storage.base import ObjectStore
from lamfs.transfer.client import Mover

log = logging.getLogger("lamfs.uploader")

SETTLE_NS = 50_000_000
"""A closed file waits this long (50 ms) before its upload starts, so that write-then-rename is one upload."""
MAX_PAUSE = 60.0
"""Longest pause in seconds between two tries."""
DELETE_BATCH = 1000


class FileHooks(Protocol):
    """What the uploader needs of the open files; implemented by the file system, called in the loop."""

    def has_writers(self, ino: int) -> bool:
        """Whether a handle may still write to the inode."""

    def freeze(self, ino: int, src: str) -> None:
        """The spool file ``src`` is being read for an upload: nobody writes to it from now on."""

    def thaw(self, ino: int, src: str) -> None:
        """The upload of ``src`` has ended without becoming the current content."""

    def stored(self, ino: int, src: str, revision: Revision | None, consumed: bool) -> None:
        """Spool file ``src`` has been stored as ``revision`` and is owed no more (None: the file is gone)."""

    async def pin(self, object_key: str) -> None:
        """The object is about to be replaced or deleted: fetch what open handles still need of it."""


@dataclass(slots=True)
class Failure:
    """One failed try, for ``lamfs status``. ``at`` in nanoseconds since the epoch."""

    at: int
    what: str
    error: str


@dataclass(slots=True)
class Upload:
    """One upload under way. Bytes."""

    key: str
    size: int
    done: int = 0


class Uploader:
    """Drains the journal with ``workers`` jobs at a time. Loop only."""

    def __init__(
        self,
        registry: Registry,
        store: ObjectStore,
        mover: Mover,
        spool_dir: Path,
        origin: Provenance,
        *,
        workers: int = 8,
    ) -> None:
        self._registry = registry
        self._store = store
        self._mover = mover
        self._spool = spool_dir
        self._origin = origin
        self._limit = workers
        self._hooks: FileHooks | None = None
        self._busy: set[int] = set()
        self._busy_objects: set[str] = set()
        self._uploading: dict[int, str] = {}
        self._ready_since: dict[int, int] = {}
        self._wanted: dict[int, int] = {}
        self._attempts: dict[int, trio.Event] = {}
        self._results: dict[int, LamfsError | None] = {}
        self._committed: dict[int, int] = {}
        self._work = trio.Event()
        self._idle = trio.Event()
        self.hurry = 0
        self.uploads: dict[int, Upload] = {}
        self.failures: deque[Failure] = deque(maxlen=50)
        self.stored_bytes = 0
        self.stored_files = 0

    def attach(self, hooks: FileHooks) -> None:
        """Connect the open files; before ``run``."""
        self._hooks = hooks

    # -- what the file system says ------------------------------------------------------------------------------

    def notify(self, ino: int | None = None) -> None:
        """Something became ready (the put of ``ino``, or any row)."""
        if ino is not None:
            self._ready_since[ino] = now_ns()
        self._work.set()

    def is_uploading(self, ino: int, src: str) -> bool:
        """Whether spool file ``src`` is being read right now."""
        return self._uploading.get(ino) == src

    async def settle(self, ino: int, gen: int) -> None:
        """Return when generation ``gen`` of the inode is in storage and in the registry.

        Tries at once. Raises the error of a try that failed (the row stays and is tried again later).
        """
        self._wanted[ino] = self._wanted.get(ino, 0) + 1
        try:
            entry = self._registry.journal.put_of(ino)
            if entry is not None and entry.next_at > now_ns():
                self._registry.journal.postpone(entry.id, 0)
            while self._registry.journal.put_of(ino) is not None and self._committed.get(ino, 0) < gen:
                event = self._attempts.setdefault(ino, trio.Event())
                self._work.set()
                await event.wait()
                error = self._results.get(ino)
                if error is not None:
                    raise type(error)(str(error), errno=error.errno)
        finally:
            self._wanted[ino] -= 1
            if not self._wanted[ino]:
                del self._wanted[ino]
                self._committed.pop(ino, None)
                self._results.pop(ino, None)

    async def drain(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Return when nothing is owed by this process any more. ``progress(rows, bytes)`` now and then.

        Waits through failures; the caller decides when to give up (cancel).
        """
        self.hurry += 1
        try:
            self._registry.journal.retry_now()
            while True:
                rows, size = self.owed()
                if progress is not None:
                    progress(rows, size)
                if not rows and not self._busy:
                    return
                self._idle = trio.Event()
                self._work.set()
                with trio.move_on_after(0.2):
                    await self._idle.wait()
        finally:
            self.hurry -= 1

    def owed(self) -> tuple[int, int]:
        """Rows of this process that are ready, and bytes of their spool files."""
        owner = self._registry.journal.owner
        rows = self._registry.db.all(
            "SELECT j.op, coalesce(i.size, 0) FROM journal j LEFT JOIN inode i ON i.ino=j.ino"
            " WHERE j.owner=? AND j.state='ready'",
            (owner,),
        )
        return len(rows), sum(size for op, size in rows if op == "put")

    # -- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled. What is under way then is finished by the next mount."""
        assert self._hooks is not None
        async with trio.open_nursery() as nursery:
            while True:
                self._work = trio.Event()
                pause = self._start_ready(nursery)
                with trio.move_on_after(pause):
                    await self._work.wait()

    def _start_ready(self, nursery: trio.Nursery) -> float:
        """Start what may start; returns how long (s) to wait before looking again without being told."""
        assert self._hooks is not None
        free = self._limit - len(self._busy)
        pause = 3600.0
        if free <= 0:
            return pause
        entries = self._registry.journal.ready(free * 4 + 64, skip=self._busy)
        deletes = [entry for entry in entries if entry.op == "delete"]
        now = now_ns()
        for entry in entries:
            if free <= 0:
                return pause
            if entry.op == "put":
                assert entry.ino is not None
                wait = self._ready_since.get(entry.ino, 0) + SETTLE_NS - now
                if not self.hurry and entry.ino not in self._wanted:
                    if self._hooks.has_writers(entry.ino):
                        continue
                    if wait > 0:
                        pause = min(pause, wait / 1e9)
                        continue
                self._begin(nursery, self._put, entry)
            elif entry.op == "move":
                self._begin(nursery, self._move, entry)
            else:
                continue
            free -= 1
        if deletes and free > 0:
            batch = deletes[:DELETE_BATCH]
            self._busy.update(entry.id for entry in batch)
            nursery.start_soon(self._delete, batch)
        next_at = self._registry.journal.next_at()
        if next_at is not None and next_at > now:
            pause = min(pause, (next_at - now) / 1e9)
        return max(pause, 0.001)

    def _begin(self, nursery: trio.Nursery, job: Callable[..., object], entry: JournalEntry) -> None:
        self._busy.add(entry.id)
        nursery.start_soon(self._guard, job, entry)

    async def _guard(self, job: Callable[..., object], entry: JournalEntry) -> None:
        """Run one job; whatever goes wrong becomes a failed try of its row."""
        error: LamfsError | None = None
        try:
            await job(entry)  # type: ignore[misc]
        except LamfsError as problem:
            error = problem
        except OSError as problem:
            error = StorageError(f"The spool file of '{self._what(entry)}': {problem}.", errno=problem.errno)
        except Exception:
            log.exception("unexpected error while storing %s", self._what(entry))
            error = StorageError("An unexpected error; the log has the traceback.")
        finally:
            self._busy.discard(entry.id)
        if error is not None:
            self._failed(entry, error)
        self._finished(entry, error)

    def _failed(self, entry: JournalEntry, error: LamfsError) -> None:
        pause = min(MAX_PAUSE, 0.5 * 2 ** min(entry.attempts, 10)) * random.uniform(0.75, 1.25)  # noqa: S311
        what = self._what(entry)
        log.warning("could not %s %s: %s Trying again in %.0f s.", entry.op, what, error, pause)
        self.failures.append(Failure(now_ns(), f"{entry.op} {what}", str(error)))
        self._registry.journal.failed(entry.id, str(error), now_ns() + int(pause * 1e9))

    def _finished(self, entry: JournalEntry, error: LamfsError | None) -> None:
        if entry.ino is not None:
            if entry.ino in self._wanted:
                self._results[entry.ino] = error
            event = self._attempts.pop(entry.ino, None)
            if event is not None:
                event.set()
        self._work.set()
        self._idle.set()

    def _what(self, entry: JournalEntry) -> str:
        if entry.ino is not None:
            key = self._registry.tree.path(entry.ino)
            if key is not None:
                return key
        return entry.object_key or entry.uid or f"journal row {entry.id}"

    # -- put ----------------------------------------------------------------------------------------------------

    async def _put(self, entry: JournalEntry) -> None:
        assert self._hooks is not None
        assert entry.ino is not None
        assert entry.src is not None
        ino, src = entry.ino, entry.src
        started = time.monotonic()
        self._uploading[ino] = src
        self._hooks.freeze(ino, src)
        upload = Upload(self._what(entry), 0)
        self.uploads[entry.id] = upload
        current = False
        try:
            committed, consumed = await self._store_spool(entry, upload)
            current = committed.current
            self._committed[ino] = entry.gen
            record = committed.record
            if current or committed.record is None:
                self._hooks.stored(ino, src, record.revision if record else None, consumed)
                self._ready_since.pop(ino, None)
            elif not consumed and self._superseded(ino, src):
                (self._spool / src).unlink(missing_ok=True)
            self.stored_files += 1
            log.debug("stored %s in %.3f s", upload.key, time.monotonic() - started)
        finally:
            self._uploading.pop(ino, None)
            self.uploads.pop(entry.id, None)
            if not current:
                self._hooks.thaw(ino, src)
            if ino not in self._wanted:
                self._committed.pop(ino, None)

    def _superseded(self, ino: int, src: str) -> bool:
        row = self._registry.journal.put_of(ino)
        return row is None or row.src != src

    async def _store_spool(self, entry: JournalEntry, upload: Upload) -> tuple[Committed, bool]:
        assert self._hooks is not None
        assert entry.ino is not None
        assert entry.src is not None
        registry, ino = self._registry, entry.ino
        path = str(self._spool / entry.src)
        if not os.path.exists(path):
            return await self._find_stored(entry), True
        content = await self._mover.hash(path)
        upload.size = content.size
        artifact = registry.artifacts.by_ino(ino)
        if artifact is not None and content.same_bytes(artifact.revision.content):
            return registry.commits.put_unneeded(ino, entry.gen), False
        target = registry.commits.put_target(entry)
        while target in self._busy_objects:
            await trio.sleep(0.01)
            target = registry.commits.put_target(entry)
        self._busy_objects.add(target)
        try:
            if (
                entry.object_key not in (None, target)
                and registry.artifacts.with_object(entry.object_key or "") is None
            ):
                # An earlier try may have written elsewhere, before the file was renamed.
                registry.journal.add_delete(entry.object_key or "")
            registry.journal.set_target(entry.id, target)
            if artifact is not None and artifact.revision.object_key == target:
                await self._hooks.pin(target)
            etag, consumed = await self._send(content, path, target, upload, ino)
            committed = registry.commits.put(ino, entry.gen, content, target, etag, self._origin)
        finally:
            self._busy_objects.discard(target)
        self.stored_bytes += content.size
        return committed, consumed

    async def _send(self, content: ContentHash, path: str, target: str, upload: Upload, ino: int) -> tuple[str, bool]:
        """Get the bytes to ``target``: renamed into a local folder, copied where storage has them, else uploaded."""
        assert self._hooks is not None
        if self._store.kind == "local":
            consume = not self._hooks.has_writers(ino)
            return (await self._mover.put(path, target, consume=consume)).etag, consume
        for twin in self._registry.artifacts.same_content(content)[:3]:
            if twin.revision.object_key == target:
                continue
            try:
                stat = await self._mover.copy(twin.revision.object_key, target, etag=twin.revision.etag)
            except (ObjectMissing, ObjectChanged):
                continue
            return stat.etag, False

        def moved(count: int) -> None:
            upload.done += count

        return (await self._mover.put(path, target, progress=moved)).etag, False

    async def _find_stored(self, entry: JournalEntry) -> Committed:
        """The spool file is gone: it was renamed into storage before a crash, or something removed it."""
        assert entry.ino is not None
        local = self._store.local_path(entry.object_key) if entry.object_key else None
        if entry.object_key is None or local is None or not os.path.exists(local):
            if self._registry.artifacts.by_ino(entry.ino) is None and self._registry.tree.get(entry.ino) is None:
                return self._registry.commits.put_unneeded(entry.ino, entry.gen)
            raise StorageError(
                f"The spool file {entry.src} of '{self._what(entry)}' is missing, so its last bytes cannot be stored;"
                " 'lamfs fsck' tells more."
            )
        stat = await self._mover.head(entry.object_key)
        content = await self._mover.hash(local)
        return self._registry.commits.put(entry.ino, entry.gen, content, entry.object_key, stat.etag, self._origin)

    # -- move and delete ----------------------------------------------------------------------------------------

    async def _move(self, entry: JournalEntry) -> None:
        assert self._hooks is not None
        assert entry.uid is not None
        registry = self._registry
        artifact = registry.artifacts.by_uid(entry.uid)
        if artifact is not None and artifact.ino is not None and registry.journal.put_of(artifact.ino) is not None:
            # New bytes are on their way, and will be stored at the right place themselves.
            registry.journal.postpone(entry.id, 0.2)
            return
        plan = registry.commits.move_plan(entry.uid)
        if plan is None:
            if artifact is None or not self._waits_for_place(entry.uid):
                registry.journal.done(entry.id)
            else:
                registry.journal.postpone(entry.id, 0.2)
            return
        before, target = plan
        if target in self._busy_objects or before.revision.object_key in self._busy_objects:
            registry.journal.postpone(entry.id, 0.05)
            return
        objects = {target, before.revision.object_key}
        self._busy_objects |= objects
        try:
            await self._hooks.pin(target)
            await self._hooks.pin(before.revision.object_key)
            stat = await self._mover.copy(before.revision.object_key, target, etag=before.revision.etag)
            registry.commits.moved(entry.id, before, target, stat.etag)
        except (ObjectMissing, ObjectChanged):
            now = registry.artifacts.by_uid(entry.uid)
            if now is not None and now.revision == before.revision:
                raise
        finally:
            self._busy_objects -= objects

    def _waits_for_place(self, uid: str) -> bool:
        """Whether an artifact's object still has a way to go, but its place is taken for now."""
        artifact = self._registry.artifacts.by_uid(uid)
        if artifact is None:
            return False
        home = object_key_for(uid, artifact.suffix, artifact.key, artifact.key_is_virtual)
        return home != artifact.revision.object_key

    async def _delete(self, entries: list[JournalEntry]) -> None:
        """Delete objects that no artifact needs, many in one request."""
        registry = self._registry
        try:
            keys: dict[str, list[JournalEntry]] = {}
            for entry in entries:
                assert entry.object_key is not None
                if entry.object_key in self._busy_objects or registry.journal.holds(entry.object_key):
                    registry.journal.postpone(entry.id, 0.1)
                elif registry.artifacts.with_object(entry.object_key) is not None:
                    registry.journal.done(entry.id)
                else:
                    keys.setdefault(entry.object_key, []).append(entry)
            if not keys:
                return
            self._busy_objects |= keys.keys()
            try:
                assert self._hooks is not None
                for key in keys:
                    await self._hooks.pin(key)
                await self._mover.delete(list(keys))
                with registry.db.transaction():
                    for rows in keys.values():
                        for entry in rows:
                            registry.journal.done(entry.id)
            finally:
                self._busy_objects -= keys.keys()
        except LamfsError as error:
            for entry in entries:
                self._failed(entry, error)
        except Exception:
            log.exception("unexpected error while deleting objects")
            for entry in entries:
                self._failed(entry, StorageError("An unexpected error; the log has the traceback."))
        finally:
            self._busy.difference_update(entry.id for entry in entries)
            self._work.set()
            self._idle.set()
