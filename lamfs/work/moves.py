"""Moves, deletes and aborts: storage work without new bytes. Steps that do no I/O themselves (worker.py).

The order is as in steps.py: object first, registry row second, stale object last.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from lamfs.errors import ObjectChanged, ObjectMissing
from lamfs.model import now_ns
from lamfs.registry import Registry
from lamfs.registry.entries import Abort, Delete, Move
from lamfs.storage.base import ObjectStore, Over
from lamfs.work.conflicts import is_own, look, object_at
from lamfs.work.guard import Permit
from lamfs.work.multipart import Multipart
from lamfs.work.stale import (
    copied_from,
    give_up_lost_move,
    give_up_move,
    is_doubted,
    meant_by,
    only_copy_but_for,
    say_left,
)
from lamfs.work.worker import Waits, Worker


async def nobody_reads(object_key: str) -> None:
    """A ``pin`` for when no file is open."""


def nobody_caches(object_key: str) -> None:
    """A ``gone`` for when no object is cached."""


class Moves:
    """Does one journal row at a time, or many deletes at once. ``busy``: the objects that this process is writing.
    ``pin``: awaited before an object is replaced or deleted; fetches what open handles still need of it. ``gone``:
    called after an object was deleted; no revision will have its key."""

    def __init__(
        self,
        registry: Registry,
        store: ObjectStore,
        worker: Worker,
        waits: Waits,
        permit: Permit,
        parts: Multipart,
        busy: set[str],
        pin: Callable[[str], Awaitable[None]] = nobody_reads,
        gone: Callable[[str], None] = nobody_caches,
    ) -> None:
        self._registry = registry
        self._store = store
        self._worker = worker
        self._waits = waits
        self._permit = permit
        self._multipart = parts
        self._busy = busy
        self.pin = pin
        self.gone = gone

    async def move(self, entry: Move) -> None:
        """Move the object of an artifact to where its key and suffix require, one copy at a time."""
        registry = self._registry
        artifact = registry.artifacts.by_uid(entry.uid)
        owed = None if artifact is None or artifact.ino is None else registry.journal.put_of(artifact.ino)
        if owed is not None and owed.state == "ready":
            # New bytes are being uploaded, and will be stored at the right place.
            registry.journal.postpone(entry.id, _after(0.2))
            return
        plan = registry.commits.move_plan(entry.uid, now=now_ns())
        if plan is None:
            if registry.commits.is_home(entry.uid):
                registry.journal.done(entry.id)
            else:
                registry.journal.postpone(entry.id, _after(0.2))  # its place is taken for now
            return
        before, target = plan
        if target in self._busy or before.revision.object_key in self._busy:
            registry.journal.postpone(entry.id, _after(0.05))
            return
        objects = {target, before.revision.object_key}
        self._busy.update(objects)
        try:
            await self.pin(target)
            await self.pin(before.revision.object_key)
            over = await self._free(target)
            if over is None:
                give_up_move(registry, entry, self._store.url(target))
                return
            registry.commits.begin_move(entry.uid, target, now=now_ns())
            await self._waits.durable()
            await self._permit(True)  # pinning may have taken long
            stat = await self._worker.copy(
                before.revision.object_key, target, etag=before.revision.etag, meta=before.meta, over=over
            )
            registry.commits.moved(entry.id, before, target, stat.etag, now=now_ns())
        except (ObjectMissing, ObjectChanged):
            now = registry.artifacts.by_uid(entry.uid)
            if now is not None and now.revision == before.revision:
                give_up_lost_move(registry, entry, target, self._store.url(before.revision.object_key))
        finally:
            self._busy -= objects

    async def _free(self, target: str) -> Over | None:
        """What a move may replace: nothing, or an object that lamfs itself left there. None: something else is
        there."""
        found, over = await look(self._worker, target)
        return over if found is None or await is_own(self._registry, self._worker, found) else None

    async def delete(self, entries: list[Delete]) -> None:
        """Delete objects that no artifact needs, many in one request."""
        registry = self._registry
        rows: list[Delete] = []
        keys: set[str] = set()
        meant = meant_by(entries)
        for entry in entries:
            if entry.object_key in self._busy:
                continue  # a move is making this object, and removes the row when it is done
            if await self._is_only_copy(entry) and registry.journal.get(entry.id) is not None:
                say_left(self._store.url(entry.object_key))
                registry.journal.done(entry.id)
        entries = [entry for entry in entries if registry.journal.get(entry.id) is not None]
        for entry in entries:
            if entry.object_key in self._busy or registry.journal.holds(entry.object_key):
                registry.journal.postpone(entry.id, _after(0.1))
            elif registry.artifacts.with_object(entry.object_key) is not None:
                registry.journal.done(entry.id)
            else:
                rows.append(entry)
                keys.add(entry.object_key)
        if not keys:
            return
        self._busy |= keys
        try:
            for key in keys:
                await self.pin(key)
            await self._waits.durable()
            await self._permit(True)  # pinning may have taken long
            for key in await self._worker.delete({key: meant[key] for key in sorted(keys)}):
                say_left(self._store.url(key))
            registry.commits.deleted(entry.id for entry in rows)
            for key in keys:
                self.gone(key)
        finally:
            self._busy -= keys

    async def _is_only_copy(self, entry: Delete) -> bool:
        """Whether this is a move's copy (stale.copied_from) whose original is gone, or may be the only copy of
        something else (stale.only_copy_but_for). Raises StorageError."""
        source = copied_from(self._registry, entry)
        if source is not None and await self._is_gone(source):
            return True
        if not is_doubted(entry) or await self._is_gone(entry.object_key):
            return False
        other = only_copy_but_for(self._registry, entry, await self._worker.meta(entry.object_key))
        if isinstance(other, bool):
            return other
        found = await object_at(self._worker, other.object_key)
        return found is None or found.etag != other.etag

    async def _is_gone(self, object_key: str) -> bool:
        """Whether there is no such object. Raises StorageError if that cannot be determined: behind a linked folder."""
        try:
            await self._worker.head(object_key)
        except ObjectMissing:
            return True
        return False

    async def abort(self, entry: Abort) -> None:
        """Abort an upload that is not needed any more."""
        if await self._multipart.abort(entry):
            self._registry.journal.done(entry.id)
        else:
            self._registry.journal.postpone(entry.id, _after(0.2))


def _after(seconds: float) -> int:
    """The time after so many seconds, in nanoseconds since the epoch."""
    return now_ns() + int(seconds * 1e9)
