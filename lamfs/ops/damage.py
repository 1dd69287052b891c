"""The known damage of objects in storage: fsck finds it, and status shows it until it is repaired. Synchronous.

Any thread. ``damage.json`` lies beside the working copy. It is not part of the registry, so writing it needs no lease.
Processes take turns with flock(2). Damage counts while its artifact still has the revision that was found damaged.
Replacing or deleting the artifact ends it, and so does a check that finds the object right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamfs import config
from lamfs.errors import NotSetUp
from lamfs.model import ArtifactRecord, now_ns
from lamfs.ops.instance import Instance
from lamfs.registry import Registry

REPLACED = "was replaced by something else"
"""The problem of an object whose ETag is not the one in the registry."""
MAX_BYTES = 1 << 30
"""Bytes of the file: it names every object when a whole storage is gone."""


@dataclass(slots=True, frozen=True)
class Damage:
    """An object with other content than was saved. ``what``: "is gone", "is damaged in block 3". ``blocks``: numbers of
    the wrong 4 MiB blocks, from 0; empty: the whole object is wrong. ``found_at``: ns since the epoch."""

    uid: str
    key: str
    url: str
    object_key: str
    etag: str
    what: str
    blocks: tuple[int, ...]
    found_at: int

    @property
    def sentence(self) -> str:
        """A sentence for people."""
        return f"the object {self.url} of '{self.key}' {self.what} (artifact {self.uid})"


def known(instance: Instance) -> list[Damage]:
    """All known damage that is not repaired, by key. Cheap when there is none."""
    return known_in(instance.settings, instance.registry)


def known_in(settings: config.InstanceSettings, registry: Registry) -> list[Damage]:
    """As ``known``, for a caller with an open registry alone."""
    found = []
    for entry in _read(settings.directory / "damage.json").values():
        record = registry.artifacts.by_uid(entry.uid)
        if record is not None and _is_of(entry, record):
            found.append(dataclasses.replace(entry, key=record.place))
    return sorted(found, key=lambda entry: entry.key)


def record(instance: Instance, artifact: ArtifactRecord, what: str, blocks: tuple[int, ...] = ()) -> None:
    """Remember that the object of an artifact's revision is damaged. Replaces what was known of it."""
    record_all(instance, [(artifact, what, blocks)])


def record_all(instance: Instance, found: Iterable[tuple[ArtifactRecord, str, tuple[int, ...]]]) -> None:
    """As ``record``, for any number of artifacts: the file is written once."""
    now = now_ns()
    with _changing(instance) as entries:
        for artifact, what, blocks in found:
            revision = artifact.revision
            url = instance.store.url(revision.object_key)
            entries[artifact.uid] = Damage(
                artifact.uid, artifact.place, url, revision.object_key, revision.etag, what, tuple(blocks), now
            )


def clear(instance: Instance, artifact: ArtifactRecord) -> None:
    """Forget the damage of an artifact's object: it was found right."""
    if artifact.uid in _read(instance.settings.directory / "damage.json"):
        with _changing(instance) as entries:
            entries.pop(artifact.uid, None)


def _is_of(entry: Damage, artifact: ArtifactRecord) -> bool:
    return (entry.object_key, entry.etag) == (artifact.revision.object_key, artifact.revision.etag)


def _read(path: Path) -> dict[str, Damage]:
    try:
        data = config.read_json(path, MAX_BYTES) or {}
        return {uid: Damage(**{**_fields(entry), "uid": uid}) for uid, entry in data.items()}
    except (NotSetUp, TypeError, AttributeError, KeyError):
        return {}  # the list itself is damaged, or from another version; the next check finds it all again


def _fields(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "blocks": tuple(entry["blocks"])}


@contextlib.contextmanager
def _changing(instance: Instance) -> Iterator[dict[str, Damage]]:
    """The entries, for the block to change. Entries that are repaired are dropped."""
    folder = instance.settings.directory
    lock = os.open(folder / "damage.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = _read(folder / "damage.json")
        yield entries
        for entry in list(entries.values()):
            artifact = instance.registry.artifacts.by_uid(entry.uid)
            if artifact is None or not _is_of(entry, artifact):
                del entries[entry.uid]
        config.write_json(folder / "damage.json", {uid: dataclasses.asdict(entry) for uid, entry in entries.items()})
    finally:
        os.close(lock)
