"""Objects with unknown bytes become files of ``lost+found``; they stay where they are in storage.

An object's metadata is only a hint: nothing is deleted because of it. The thread of the Registry.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamfs.keys import name_with, root_path
from lamfs.model import (
    AUTO_KEY_PREFIX,
    ArtifactRecord,
    ContentHash,
    ObjectMeta,
    Revision,
    iso,
    new_uid,
    now_ns,
)
from lamfs.registry import Registry
from lamfs.storage.base import ObjectStat


def keep(
    registry: Registry,
    user_id: int | None,
    item: ObjectStat,
    meta: ObjectMeta | None,
    content: ContentHash,
    instead: ArtifactRecord | None = None,
) -> str | None:
    """Make an object a file of ``lost+found``. Returns its key there. ``meta``: its metadata. ``content``: its bytes.

    ``instead``: the artifact that had this object before something else was written there. That artifact gets an unused
    object key, because its bytes are not in storage any more. None, with nothing changed: the object got an artifact
    meanwhile, or ``instead`` has another revision by now, or is being written.
    """
    elsewhere = None
    if instead is not None:
        elsewhere = instead, f"{AUTO_KEY_PREFIX}{instead.uid}.{new_uid(6)}{instead.suffix}"
    return registry.rescue.keep_object(
        names(registry, item, meta, None if instead is None else instead.place),
        record_of(registry, user_id, item, meta, content),
        mtime_ns=item.mtime_ns,
        now=now_ns(),
        spare_uid=new_uid(),
        instead=elsewhere,
    )


def record_of(
    registry: Registry, user_id: int | None, item: ObjectStat, meta: ObjectMeta | None, content: ContentHash
) -> ArtifactRecord:
    """The artifact for an unknown object. It gets the uid from the metadata, unless an artifact has that."""
    said = meta.uid if meta is not None else None
    uid = said if said is not None and registry.artifacts.by_uid(said) is None else new_uid()
    return ArtifactRecord(
        uid=uid,
        key=None,
        suffix="",
        revision=Revision(content, item.key, item.etag),
        description=_description(registry, item, meta, content),
        created_by_id=user_id,
        number=(meta.revision if meta is not None else None) or 1,
    )


def names(registry: Registry, item: ObjectStat, meta: ObjectMeta | None, place: str | None = None) -> Sequence[str]:
    """Names for an unknown object, the best first. ``place``: key of the artifact whose object it should have been."""
    key = meta.key if meta is not None and meta.key is not None else place or item.key
    name = root_path(key)[1]
    if meta is None:
        return (name,)
    if registry.artifacts.by_uid(meta.uid) is not None and meta.revision is not None:
        # It is an older or a newer revision of that artifact.
        return (name_with(name, f"revision {meta.revision}"), name_with(name, meta.uid))
    return (name, name_with(name, meta.uid))


def is_said(meta: ObjectMeta, content: ContentHash) -> bool:
    """Whether the bytes have the hash in the metadata, if there is one."""
    return meta.hash in (None, f"{content.hash_type}:{content.hash}")


def _description(registry: Registry, item: ObjectStat, meta: ObjectMeta | None, content: ContentHash) -> str:
    was = f"was the object {item.key}"
    if meta is not None:
        was = f"was {meta.key or meta.uid}{'…' if meta.cut else ''}"
        if meta.revision is not None:
            was += f", revision {meta.revision}"
        if registry.artifacts.by_uid(meta.uid) is not None:
            was += f", of the artifact {meta.uid}"
    text = f"{was}, found {iso(now_ns())[:10]}"
    if meta is None or is_said(meta, content):
        return text
    return f"{text}; its bytes are not those that were stored ({meta.hash})"
