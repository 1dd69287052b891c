"""Whether the content of an object that lamfs claimed is lamfs's own, or somebody else's that came first. Any thread.

A claim (Journal.is_claimed) is recorded before an object is written, so it outlives a process that dies in between.
Below ``.lamindb/`` only lamfs stores objects. At a real key other programs do too: such an object is lamfs's own if its
metadata says so (storage/meta.py), or if it has the bytes that were to be written.
"""

from __future__ import annotations

from lamfs.keys import is_private
from lamfs.model import ContentHash, ObjectMeta
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.registry.seals import Seal
from lamfs.storage.base import ObjectStat


def is_said(registry: Registry, found: ObjectStat, said: ObjectMeta | None) -> bool:
    """Whether a claimed object is known to be lamfs's: by its metadata (``said``), or by a pending deletion of it."""
    return is_private(found.key) or said is not None or registry.journal.owes_delete(found.key, found.etag)


def may_have_bytes(registry: Registry, found: ObjectStat, entry: Put) -> bool:
    """Whether the bytes of an object are worth comparing with those of a put (``has_bytes``)."""
    seal = _seal(registry, entry)
    return seal is not None and seal.size == found.size


def has_bytes(registry: Registry, content: ContentHash, entry: Put) -> bool:
    """Whether these are the bytes of a put. There is no better proof where storage keeps no metadata, or the object is
    older than lamfs's metadata."""
    seal = _seal(registry, entry)
    return seal is not None and not seal.broken(content)


def is_put(registry: Registry, object_key: str, said: ObjectMeta | None, content: ContentHash, entry: Put) -> bool:
    """Whether the object that a put claimed, with these bytes, is what the put stored. ``said``: the object's metadata.
    Not needed where only lamfs stores objects (``is_private``)."""
    return is_private(object_key) or said is not None or has_bytes(registry, content, entry)


def _seal(registry: Registry, entry: Put) -> Seal | None:
    """The hashes of a put's file, if all are recorded; else None. All are recorded before an object is made of the
    file, and the hashes of some blocks prove nothing about the others."""
    seal = None if entry.src is None else registry.seals.of(entry.src)
    return seal if seal is not None and seal.knows(0, len(seal.blocks) // 32) else None
