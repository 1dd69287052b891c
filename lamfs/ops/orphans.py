"""Reports objects that no artifact references, keeps them as files of ``lost+found``, and deletes them on request.

Synchronous, any thread. An object that this registry does not know may still be wanted: after another machine was taken
over from an old copy of the registry, these are its newest files. So each is reported with its metadata, which is a
hint and not a proof. Keeping an object reads all of it, and makes an artifact of it where it is.
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
"""Days; younger orphans are never deleted."""
_DAY_NS = 24 * 3600 * 1_000_000_000
MOST_ASKED = 10_000
"""Objects at keys not made by lamfs that are asked for their metadata: other programs may use the storage, too."""


class Orphan(NamedTuple):
    """An object that no artifact references, and its metadata."""

    item: ObjectStat
    meta: ObjectMeta | None

    @property
    def old(self) -> bool:
        """Whether it is old enough to be deleted."""
        return now_ns() - self.item.mtime_ns > PURGE_DAYS * _DAY_NS

    @property
    def told(self) -> str:
        """Size, time and metadata, for people."""
        return newer.told(self.item, self.meta)


@dataclass(slots=True)
class Found:
    """``orphans``: objects that may be kept or deleted; ``notes``: a sentence for each object that is left alone, with
    the reason."""

    orphans: list[Orphan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(instance: Instance, items: Iterable[ObjectStat], *, shared: bool, jobs: int) -> Found:
    """Find the orphans of a listing. ``shared``: other instances use this storage, and the objects may be theirs.

    An object whose key lamfs has not made is an orphan only when its metadata says that it was an artifact's.
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
    known = registry.rescue.named_objects()  # with what was stored during the listing
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
    """An object with its metadata; None: it is gone, or not an object."""
    try:
        return Orphan(item, instance.store.meta(item.key))
    except StorageError as error:
        if isinstance(error, ObjectMissing) or error.errno == errno.ELOOP:
            return None
        raise


# -- keeping ----------------------------------------------------------------------------------------------------------


def keep(instance: Instance, orphan: Orphan, progress: Callable[[int], None] | None = None) -> str | None:
    """Make an orphan a file in ``lost+found``, where it is in storage. Returns its key there; None: an artifact has it
    now.

    All of it is read. ``progress`` gets how many bytes. Raises ObjectChanged when somebody writes it, and storage
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
    return registry.rescue.keep_object(
        unknown.names(registry, item, meta), record, mtime_ns=item.mtime_ns, now=now_ns(), spare_uid=new_uid()
    )


def _uid(instance: Instance, orphan: Orphan) -> str:
    """The uid in its metadata, or else in its key, unless an artifact has that; otherwise a new one."""
    uid = orphan.meta.uid if orphan.meta is not None else None
    match = OWN_OBJECT.fullmatch(orphan.item.key)
    if uid is None and match is not None:
        uid = orphan.item.key.removeprefix(AUTO_KEY_PREFIX)[:ARTIFACT_UID_LEN]
    return uid if uid is not None and instance.registry.artifacts.by_uid(uid) is None else new_uid()


# -- deleting ---------------------------------------------------------------------------------------------------------


def purge(instance: Instance, orphans: Iterable[Orphan]) -> list[Orphan]:
    """Delete orphans that are older than PURGE_DAYS and have not changed since they were found. Returns those.

    Raises the error that stopped it; the deletion stays owed then.
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
        if registry.rescue.give_up_object(orphan.item.key, orphan.item.etag, now=now_ns()):
            gone.append(orphan)
    if gone:
        recover.run_owed(instance, ops=("delete",), strict=True)
    return gone
