"""Whether storage may be changed: checked at the last moment before the change. Steps that do no I/O themselves.

Between the look at an object and its replacement, a put may take hours, and the machine may sleep. Meanwhile another
machine may have taken over the lease, and stored something there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from lamfs.errors import ObjectChanged, PreconditionFailed
from lamfs.keys import is_private
from lamfs.model import ArtifactRecord
from lamfs.processes import uptime
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.storage.base import ANYTHING, NOTHING, ObjectStat, ObjectStore, Over
from lamfs.work.conflicts import look
from lamfs.work.worker import Worker

Permit = Callable[[bool], Awaitable[None]]
"""Returns when this process may change storage. True: storage itself must confirm that, because objects are deleted or
replaced that other machines may use. Raises the reason if it may not."""
Ready = Callable[[], Awaitable[Over]]
"""Awaited just before an object is made. Returns what it may replace."""


LOOKED_SECONDS = 2.0
"""Seconds for which a look at an object is valid, before a replacement that storage makes on a condition."""


async def anybody(_: bool) -> None:
    """A Permit for when nobody else can have the lease (unit tests)."""


async def over_anything() -> Over:
    """A Ready for an object that nobody else writes."""
    return ANYTHING


class Guard:
    """Ensures that a put or a save replaces only what it set out to replace.

    ``was_claimed``: an earlier try may have made the object: Journal.is_claimed, before this one claims it. ``looked``:
    when (uptime) storage last confirmed that it has the revision to be replaced (Conflicts.find). None: it was not
    asked, or did not have it. ``is_own``: Conflicts.is_own. ``entry``: the put; None: a save, which undoes its claim
    itself.

    A context manager around the upload. If somebody else has changed the object meanwhile, the put's claim is undone,
    so that the next try finds a conflict and keeps both.
    """

    def __init__(
        self,
        registry: Registry,
        store: ObjectStore,
        worker: Worker,
        permit: Permit,
        entry: Put | None,
        artifact: ArtifactRecord | None,
        target: str,
        looked: float | None,
        is_own: Callable[[ObjectStat, Put | None], Awaitable[bool]],
        was_claimed: bool,
    ) -> None:
        self._registry = registry
        self._store = store
        self._worker = worker
        self._permit = permit
        self._entry = entry
        self._target = target
        self._looked = looked
        self._replaced = artifact.revision if artifact is not None and artifact.revision.object_key == target else None
        # An earlier revision of the artifact may still be at its place, and another machine's registry may refer to it.
        self._is_new = artifact is None
        self.was_claimed = was_claimed
        self._is_own = is_own

    async def ready(self) -> Over:
        """A Ready: storage itself checks that the object has not changed since a moment ago, so no further look is
        needed.

        Raises LeaseLost, PreconditionFailed (somebody else's object is there), storage errors.
        """
        if is_private(self._target):
            if not self._is_new:  # nobody else knows a new artifact
                await self._permit(True)
            return NOTHING
        if self._replaced is not None and self._looked is not None and uptime() - self._looked < LOOKED_SECONDS:
            await self._permit(True)
            return Over(self._replaced.etag)
        return await self.look()

    async def look(self) -> Over:
        """Like ``ready``, for a replacement that storage makes without a condition: a copy."""
        private = is_private(self._target)
        if private and self._is_new:
            return NOTHING
        await self._permit(True)
        found, over = await look(self._worker, self._target)
        if found is None:
            return over
        expected = self._replaced is not None and found.etag == self._replaced.etag
        own = not private and self.was_claimed and await self._is_own(found, self._entry)
        if not expected and not own:
            raise PreconditionFailed(
                f"Somebody else has changed the object {self._store.url(self._target)} while it was stored.",
                errno=ObjectChanged.errno,
            )
        return over

    def __enter__(self) -> None:
        """Nothing yet."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PreconditionFailed) and self._entry is not None and not self.was_claimed:
            self._registry.journal.unclaim(self._entry.id, self._target)
