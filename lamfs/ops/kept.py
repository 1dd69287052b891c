"""Copies of the registry that storage keeps beside the current one: the last KEPT pushes. Synchronous.

``{root}/.lamindb/_registry/{instance id hex}/{changes}-{uid}-{push}.lndb``: how many changes the copy has seen (20
digits), its instance (Origin.uid), and the random name of its push. So a listing tells what each copy is. A copy that
was damaged when it was replaced has ``damaged`` in place of the uid.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid
from collections.abc import Iterable
from typing import NamedTuple

from lamfs.errors import InvalidName, ObjectMissing
from lamfs.keys import LOCK_FOLDER, OWN_OBJECT, is_internal, is_registry_key
from lamfs.model import AUTO_KEY_PREFIX
from lamfs.storage.base import ObjectStat, ObjectStore

PREFIX = f"{AUTO_KEY_PREFIX}_registry/"
KEPT = 5
DAMAGED = "damaged"
_NAME = re.compile(rf"([0-9]{{20}})-([0-9A-Za-z]{{12}}|{DAMAGED})-([0-9a-f]{{16}})\.lndb")
_HEX = re.compile("[0-9a-f]{32}")


class Copy(NamedTuple):
    """One kept copy. ``name``: its name in its instance's folder; ``stored``: the object."""

    name: str
    changes: int
    uid: str
    push: str
    stored: ObjectStat


def key(instance: uuid.UUID, name: str) -> str:
    """Object key of a kept copy. Raises InvalidName when ``name`` cannot be a copy's."""
    if not _NAME.fullmatch(name):
        raise InvalidName(f"'{name}' is not the name of a kept copy of a registry.")
    return f"{PREFIX}{instance.hex}/{name}"


def name_of(changes: int, uid: str | None, push: str) -> str:
    """The name of a copy. ``uid``: its instance; None: the copy is damaged."""
    return f"{changes:020d}-{uid or DAMAGED}-{push}.lndb"


def push_of(etag: str) -> str:
    """Stands for the name of a push that has none (an older lamfs made it), or whose name cannot be read."""
    return hashlib.sha256(etag.encode(errors="surrogateescape")).hexdigest()[:16]


def copies(store: ObjectStore, instance: uuid.UUID) -> list[Copy]:
    """All kept copies of an instance, the newest first."""
    found = []
    prefix = f"{PREFIX}{instance.hex}/"
    for item in store.list(prefix):
        match = _NAME.fullmatch(item.key.removeprefix(prefix))
        if match is not None:
            changes, uid, push = match.groups()
            found.append(Copy(match[0], int(changes), uid, push, item))
    # A bucket's times are whole seconds.
    return sorted(found, key=lambda copy: (copy.stored.mtime_ns, copy.changes, copy.name), reverse=True)


def instances(store: ObjectStore) -> list[uuid.UUID]:
    """The instances whose copies a storage keeps."""
    names = {item.key.removeprefix(PREFIX).partition("/")[0] for item in store.list(PREFIX)}
    return [uuid.UUID(hex=name) for name in sorted(names) if _HEX.fullmatch(name)]


def keep(store: ObjectStore, instance: uuid.UUID, current: ObjectStat, name: str, known: Iterable[Copy]) -> None:
    """Keep the object ``current`` under this name, unless ``known`` has it. The storage copies it.

    Raises ObjectChanged and ObjectMissing when it is not there any more, and storage errors.
    """
    if all(copy.name != name for copy in known):
        store.copy(current.key, key(instance, name), etag=current.etag, size=current.size)


def prune(store: ObjectStore, instance: uuid.UUID, uid: str) -> None:
    """Remove older copies of one instance: the last KEPT stay, and the copy that has seen most changes."""
    for whose in (uid, DAMAGED):
        found = [copy for copy in copies(store, instance) if copy.uid == whose]
        most = max(found, key=lambda copy: copy.changes, default=None)
        store.delete([copy.stored.key for copy in found[KEPT:] if copy is not most])


def remove(store: ObjectStore, instance: uuid.UUID) -> None:
    """Remove all copies of an instance, which is deleted."""
    store.delete([copy.stored.key for copy in copies(store, instance)])


def traces(store: ObjectStore, instance: uuid.UUID) -> list[str]:
    """Traces of an instance whose registry is gone, in words; empty: there are none."""
    words = []
    if copies(store, instance):
        words.append("kept copies of its registry")
    with contextlib.suppress(ObjectMissing):
        store.head(f"{LOCK_FOLDER}{instance.hex}")
        words.append("its lock")
    if has_objects(store) and not _has_registry(store):
        words.append("objects of artifacts")
    return words


def has_objects(store: ObjectStore) -> bool:
    """Whether a storage has objects of artifacts."""
    return any(OWN_OBJECT.fullmatch(item.key) and not is_internal(item.key) for item in store.list(AUTO_KEY_PREFIX))


def _has_registry(store: ObjectStore) -> bool:
    """Whether another instance has its registry here: then the objects may belong to it."""
    # One listing per first digit: a bucket full of other keys is not listed as a whole.
    return any(is_registry_key(item.key) for digit in "0123456789abcdef" for item in store.list(digit))
