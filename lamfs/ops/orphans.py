"""Objects that no artifact references: named, kept as files of ``lost+found``, deleted only when a person says so.

Synchronous, any thread. That this registry does not know an object says nothing of the object: after another machine
was taken over from an old copy of the registry, these are its newest files. So each is named with what it says of
itself, which is a hint and no more; keeping one makes an artifact of it where it is, after all of it was read.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lamfs.errors import ObjectMissing, StorageError
from lamfs.keys import OWN_OBJECT
from lamfs.model import ARTIFACT_UID_LEN, AUTO_KEY_PREFIX, ObjectMeta, Revision, new_uid, now_ns
from lamfs.ops import alone, newer, recover
from lamfs.ops.instance import Instance
from lamfs.pool import Pool
from lamfs.storage.base import ObjectStat
from lamfs.work import direct, unknown

PURGE_DAYS = 30
"""Younger orphans are never deleted."""
_DAY_NS = 24 * 3600 * 1_000_000_000
MOST_ASKED = 10_000
"""So many objects at keys that lamfs has not made up are asked what they are: others may use the storage, too."""


class Orphan(NamedTuple):
    """An object that no artifact references, and what it says of itself."""

    item: ObjectStat
    meta: ObjectMeta | None

    @property
    def old(self) -> bool:
        """Whether it may be deleted."""
        return now_ns() - self.item.mtime_ns > PURGE_DAYS * _DAY_NS

    @property
    def told(self) -> str:
        """Size, time and what it says, for people."""
        return newer.told(self.item, self.meta)


@dataclass(slots=True)
class Found:
    """``orphans``: what may be kept or deleted; ``notes``: a sentence for each object that is left alone, and why."""

    orphans: list[Orphan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(instance: Instance, items: Iterable[ObjectStat], *, shared: bool, jobs: int) -> Found:
    """Which objects of a listing are orphans. ``shared``: other instances use this storage, whose objects these may be.

    At keys that lamfs has not made up only those are that say that they were an artifact's.
    """
    registry, store = instance.registry, instance.store
    found = Found()
    known = registry.rescue.named_objects()
    asked: list[ObjectStat] = []
    strangers = 0
    for item in sorted(items):
        if item.key in known:
            continue
        name = f"storage: {store.url(item.key)}"
        own = OWN_OBJECT.fullmatch(item.key) is not None
        if registry.names.is_retained(item.key):
            found.notes.append(f"{name} is no artifact's, and somebody wanted it to stay")
        elif shared or (not own and strangers == MOST_ASKED):
            found.notes.append(f"{name} is no artifact's")
        else:
            strangers += not own
            asked.append(item)
    answers: dict[str, Orphan | None] = {}
    with Pool(jobs, "lamfs-orphans") as pool:
        for item, future in pool.unordered(lambda item: _ask(instance, item), asked):
            answers[item.key] = future.result()
    known = registry.rescue.named_objects()  # what was stored while the listing came
    for item in asked:
        orphan = answers[item.key]
        if orphan is None or item.key in known:
            continue
        if OWN_OBJECT.fullmatch(item.key) or orphan.meta is not None:
            found.orphans.append(orphan)
        else:
            found.notes.append(f"storage: {store.url(item.key)} is no artifact's")
    return found


def _ask(instance: Instance, item: ObjectStat) -> Orphan | None:
    """What an object says of itself; None: it is not there any more, or no object."""
    try:
        return Orphan(item, instance.store.meta(item.key))
    except StorageError as error:
        if isinstance(error, ObjectMissing) or error.errno == errno.ELOOP:
            return None
        raise


# -- keeping ----------------------------------------------------------------------------------------------------------


def keep(instance: Instance, orphan: Orphan, progress: Callable[[int], None] | None = None) -> str | None:
    """Make an orphan a file in ``lost+found``, where it is in storage; its key there. None: it is one no more.

    All of it is read. ``progress`` is told how many bytes. Raises ObjectChanged when somebody writes it, and storage
    errors.
    """
    registry = instance.registry
    item, meta = orphan
    try:
        content, etag = direct.hash_object(instance.store, item.key, progress)
    except ObjectMissing:
        return None
    record = unknown.record_of(registry, alone.user_id(instance), item, meta, content)
    record.uid, record.revision = _uid(instance, orphan), Revision(content, item.key, etag)
    return registry.rescue.keep_object(unknown.names(registry, item, meta), record, mtime_ns=item.mtime_ns)


def _uid(instance: Instance, orphan: Orphan) -> str:
    """The uid that it says, or else that its key says, if no artifact has that; else a new one."""
    uid = orphan.meta.uid if orphan.meta is not None else None
    match = OWN_OBJECT.fullmatch(orphan.item.key)
    if uid is None and match is not None:
        uid = orphan.item.key.removeprefix(AUTO_KEY_PREFIX)[:ARTIFACT_UID_LEN]
    return uid if uid is not None and instance.registry.artifacts.by_uid(uid) is None else new_uid()


# -- deleting ---------------------------------------------------------------------------------------------------------


def purge(instance: Instance, orphans: Iterable[Orphan]) -> list[Orphan]:
    """Delete orphans that are older than PURGE_DAYS, and are what they were when they were found; which those are.

    Raises what stopped it; then their deletion stays owed.
    """
    registry, store = instance.registry, instance.store
    gone: list[Orphan] = []
    for orphan in orphans:
        if not orphan.old:
            continue
        try:
            now = store.head(orphan.item.key)
        except ObjectMissing:
            continue
        if (now.etag, now.size) != (orphan.item.etag, orphan.item.size):
            continue
        if registry.rescue.give_up_object(orphan.item.key, orphan.item.etag):
            gone.append(orphan)
    if gone:
        recover.run_owed(instance, ops=("delete",), strict=True)
    return gone
