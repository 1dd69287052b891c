"""Whether what is in an object that lamfs claimed is lamfs's own, or somebody else's who came first. Any thread.

A claim (Journal.is_claimed) is noted before an object is written, so it outlives a process that dies in between. Under
``.lamindb/`` nobody but lamfs stores anything. At a real key other programs do: there the object has to say itself that
lamfs wrote it (storage/meta.py), or has to have the bytes that were to be written.
"""

from __future__ import annotations

from lamfs.keys import is_private
from lamfs.model import ContentHash, ObjectMeta
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.registry.seals import Seal
from lamfs.storage.base import ObjectStat


def is_said(registry: Registry, found: ObjectStat, said: ObjectMeta | None) -> bool:
    """Whether a claimed object is known to be lamfs's: it says so (``said``), or is the one whose deletion is owed."""
    return is_private(found.key) or said is not None or registry.journal.owes_delete(found.key, found.etag)


def may_have_bytes(registry: Registry, found: ObjectStat, entry: Put) -> bool:
    """Whether it is worth to compare the bytes of an object with those of a put (``has_bytes``)."""
    seal = _seal(registry, entry)
    return seal is not None and seal.size == found.size


def has_bytes(registry: Registry, content: ContentHash, entry: Put) -> bool:
    """Whether these are the bytes of a put. Storage that keeps no metadata cannot show more, nor what lamfs stored
    before objects said whose they are."""
    seal = _seal(registry, entry)
    return seal is not None and not seal.broken(content)


def is_put(registry: Registry, object_key: str, said: ObjectMeta | None, content: ContentHash, entry: Put) -> bool:
    """Whether the object that a put claimed, with these bytes, is what the put stored. ``said``: by the object itself;
    it need not be asked where only lamfs stores anything (``is_private``)."""
    return is_private(object_key) or said is not None or has_bytes(registry, content, entry)


def _seal(registry: Registry, entry: Put) -> Seal | None:
    """The hashes of a put's file, if all are noted: they are before an object is made of it, and what is known of some
    blocks says nothing of the others."""
    seal = None if entry.src is None else registry.seals.of(entry.src)
    return seal if seal is not None and seal.knows(0, len(seal.blocks) // 32) else None
