"""Bytes that storage has already are copied within it, not sent. Steps that do no I/O themselves (worker.py)."""

from __future__ import annotations

from contextlib import suppress

from lamfs.errors import ObjectChanged, ObjectMissing
from lamfs.model import ContentHash, ObjectMeta
from lamfs.registry import Registry
from lamfs.work.guard import Ready
from lamfs.work.worker import Worker

ASKED = 3
"""Artifacts with the same bytes whose objects are tried."""


async def copy_twin(
    registry: Registry, worker: Worker, content: ContentHash, target: str, meta: ObjectMeta, look: Ready
) -> str | None:
    """Copy the object of an artifact with the same bytes to ``target``, after ``look``. Returns its ETag. None: no
    object can be copied. Raises storage errors."""
    for twin in registry.artifacts.same_content(content, ASKED):
        there = twin.revision
        if there.object_key == target:
            continue
        # If a wrong copy would cost an artifact its bytes, storage is asked for the size first.
        size = there.size if registry.artifacts.with_object(target) is None else None
        with suppress(ObjectMissing, ObjectChanged):
            over = await look()
            stat = await worker.copy(there.object_key, target, etag=there.etag, size=size, meta=meta, over=over)
            return stat.etag
    return None
