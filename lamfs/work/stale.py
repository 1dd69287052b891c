"""Which objects delete and move rows mean, and the messages about objects that are not those. Any thread."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from lamfs.keys import OWN_OBJECT, is_private
from lamfs.model import ARTIFACT_UID_LEN, AUTO_KEY_PREFIX, ObjectMeta, Revision
from lamfs.registry import Registry
from lamfs.registry.entries import Delete, Move

log = logging.getLogger("lamfs.uploader")


def meant_by(entries: Iterable[Delete]) -> dict[str, set[str] | None]:
    """Which objects the deletes mean: ETags by object key; None: any object that lamfs has stored there. A doubted
    delete without an ETag means no object."""
    meant: dict[str, set[str] | None] = {}
    for entry in entries:
        key = entry.object_key
        known = meant.setdefault(key, set())
        if known is not None and entry.etag is not None:
            known.add(entry.etag)
        elif not entry.doubted:
            meant[key] = None
    return meant


def copied_from(registry: Registry, entry: Delete) -> str | None:
    """If a move may have made the object that is to be deleted: the key of its original; None: no move has. If the
    original is gone (the registry has lost its last changes, or the object was damaged), the copy is not a leftover."""
    artifact = None if entry.copy_of is None else registry.artifacts.by_uid(entry.copy_of)
    if artifact is None or artifact.revision.object_key == entry.object_key:
        return None
    return artifact.revision.object_key


def is_doubted(entry: Delete) -> bool:
    """Whether a delete names its object, but another machine may have had the lease since."""
    return entry.doubted and entry.etag is not None


def only_copy_but_for(registry: Registry, entry: Delete, said: ObjectMeta | None) -> Revision | bool:
    """Whether a doubted delete may mean the only copy of something. Work of which this registry does not know may have
    brought the bytes back to the same key, with the same ETag. ``said``: the object's metadata.

    A Revision: the object is needed unless storage has that revision.
    """
    key, meant = entry.object_key, entry.uid
    uid = said.uid if said is not None else None
    if uid is None and OWN_OBJECT.fullmatch(key):
        uid = key.removeprefix(AUTO_KEY_PREFIX)[:ARTIFACT_UID_LEN]
    artifact = registry.artifacts.by_uid(uid) if uid is not None else None
    if artifact is not None:
        return artifact.revision
    return (uid is None or uid != meant) and not is_private(key)


def say_left(url: str) -> None:
    """Log that an object is not the one that was to be deleted."""
    log.warning("The object %s is not the one that was to be deleted, and stays; 'lamfs fsck' says what it is.", url)


def give_up_lost_move(registry: Registry, entry: Move, target: str, url: str) -> None:
    """Give up a move to ``target`` whose object is missing, or is not what the registry knows. ``url``: where the
    object should be."""
    registry.commits.give_up_move(entry.id, target)
    log.warning(
        "The object of artifact %s is not moved, for %s is gone, or is not what this registry knows; 'lamfs fsck' says"
        " what there is of it.", entry.uid, url,
    )  # fmt: skip


def give_up_move(registry: Registry, entry: Move, url: str) -> None:
    """Give up a move because something unknown is at its target. Both objects stay: the present place is as good."""
    registry.journal.done(entry.id)
    log.warning(
        "The object of artifact %s stays where it is, for something else is at %s; 'lamfs fsck' says what that is.",
        entry.uid, url,
    )  # fmt: skip
