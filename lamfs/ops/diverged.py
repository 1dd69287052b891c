"""Keeps what this machine alone has, when it takes the registry of another machine. Synchronous.

The other machine took the lease over while this one had changes that were not in storage. Its registry is used from
then on. This machine's registry is put aside as ``diverged.<time>.lndb`` and never removed. Artifacts that only this
registry knows, and whose objects are still in storage, get names in ``lost+found/<time>/`` of the new one, with the
same uid and hash. ``diverged.<time>.json`` beside it lists what cannot be brought back, and what has another name now.
(Files that were never stored are the journal's: working_copy.replace.)
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamfs import config
from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError, ObjectMissing, StorageError, StorageUnavailable
from lamfs.model import AUTO_KEY_PREFIX, TRASH, ArtifactRecord, new_uid, now_ns
from lamfs.ops import messages
from lamfs.printable import count_of
from lamfs.registry import Displaced, Registry
from lamfs.storage.base import ObjectStore

DIVERGED = "diverged"
"""Word in the names of what is put aside."""
SHOWN = 10
"""Sentences that are printed; the file has all of them."""


@dataclass(slots=True)
class BroughtBack:
    """Lists of sentences. ``back``: artifacts with a name in the new registry; ``renamed``: artifacts that have another
    name there; ``left``: artifacts that only the registry put aside has."""

    back: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def bring_back(store: ObjectStore, old: Registry, new: Registry) -> BroughtBack:
    """Give names in ``new``, which nobody uses yet, to the artifacts that only ``old`` knows. Raises
    StorageUnavailable, RegistryError."""
    found = BroughtBack()
    folder = f"lost+found/{time.strftime('%Y-%m-%d %H.%M.%S')}"
    for record in old.artifacts.filter(visibility=None):
        there = new.artifacts.by_uid(record.uid)
        if there is not None and there.revision == record.revision:
            _note_name(found, record, there)
            continue
        try:
            _bring_back(store, old, new, record, there, folder, found)
        except StorageUnavailable:
            raise
        except LamfsError as error:
            found.left.append(f"'{record.place}' (uid {record.uid}): {error}")
    return found


def _bring_back(
    store: ObjectStore,
    old: Registry,
    new: Registry,
    record: ArtifactRecord,
    there: ArtifactRecord | None,
    folder: str,
    found: BroughtBack,
) -> None:
    name = f"'{record.place}' (uid {record.uid})"
    object_key = record.revision.object_key
    if not _is_whole(store, record) or new.names.is_retained(object_key):
        if there is None:
            found.left.append(f"{name}: its object {store.url(object_key)} is not in storage any more")
        elif not record.revision.content.same_bytes(there.revision.content):
            found.left.append(f"{name}: what was stored from here was replaced by what the other machine has stored")
        return
    if there is not None and not _is_whole(store, there):
        # This machine has replaced the bytes that the other machine's row means. Only the new bytes exist.
        new.commits.save(
            0, replace(there, revision=record.revision), record.revision.etag, mode=0o644, uid=os.getuid(),
            gid=os.getgid(), now=now_ns(),
        )  # fmt: skip
        found.back.append(f"'{there.place}' (uid {there.uid}) as it was stored last, from here")
        return
    if there is None and record.visibility == TRASH:
        found.left.append(f"{name}: it was in the trash")
        return
    if there is not None and record.revision.content.same_bytes(there.revision.content):
        _note_name(found, record, there)
        return  # these bytes have a name already
    holder = new.artifacts.with_object(object_key)
    if holder is not None and (
        holder.revision.etag == record.revision.etag
        or (
            holder.revision.content.same_bytes(record.revision.content)
            and new.commits.same_bytes(holder, record.revision.etag)
        )
    ):
        _note_name(found, record, there or holder)
        return  # so have these
    made = replace(
        record,
        id=None,
        uid=record.uid if there is None else new_uid(),
        key=f"{folder}/{record.place}",
        created_by_id=None,
        run_id=None,
        transform_id=None,
    )
    displaced = None
    if holder is not None:
        # This machine has written its bytes over those of the other machine's artifact.
        displaced = Displaced(holder, f"{AUTO_KEY_PREFIX}{holder.uid}.{new_uid(6)}{holder.suffix}")
    author = old.people.user(record.created_by_id)
    new.upkeep.bring_back(made, now=now_ns(), author=author, displaced=displaced, uid=os.getuid(), gid=os.getgid())
    found.back.append(f"{name} as '{made.key}'")
    if holder is not None:
        found.left.append(
            f"'{holder.place}' (uid {holder.uid}): what the other machine has stored was replaced by what was stored"
            " from here"
        )


def _note_name(found: BroughtBack, record: ArtifactRecord, there: ArtifactRecord | None) -> None:
    """Note an artifact that has another name in the new registry: a repair on the other machine makes files of
    lost+found."""
    if there is None or record.visibility == TRASH:
        return
    if there.visibility == TRASH:
        found.renamed.append(f"'{record.place}' (uid {record.uid}) is in the trash now")
    elif there.key != record.key:
        found.renamed.append(f"'{record.place}' (uid {record.uid}) is '{there.place}' now")


def _is_whole(store: ObjectStore, record: ArtifactRecord) -> bool:
    """Whether the object of a record is in storage as it was stored."""
    try:
        return store.head(record.revision.object_key).etag == record.revision.etag
    except ObjectMissing:
        return False
    except StorageUnavailable:
        raise
    except StorageError:
        return False  # a link, or a key that no object can have


def tell(settings: InstanceSettings, put_aside: Path, found: BroughtBack) -> str:
    """Tell the user what was brought back and what was not, and write it down. Returns the sentence."""
    listing = put_aside.with_suffix(".json")
    config.write_json(
        listing, {"registry": str(put_aside), "brought_back": found.back, "renamed": found.renamed, "left": found.left}
    )
    notice = (
        f"another machine has taken '{settings.slug}' over and gone on: its registry is used now, and this machine's,"
        f" which had changes that nobody else has, is kept as {put_aside}"
    )
    if found.back or found.renamed or found.left:
        notice += (
            f"; {count_of(len(found.back), 'artifact', 'was')} brought back, {len(found.renamed)} renamed,"
            f" {len(found.left)} not brought back: {listing} lists them"
        )
    messages.warn(notice)
    for word, texts in (("brought back", found.back), ("renamed", found.renamed), ("not brought back", found.left)):
        for text in texts[:SHOWN]:
            messages.warn(f"  {word}: {text}")
    return notice


def known(settings: InstanceSettings) -> list[dict[str, Any]]:
    """The registries that were put aside on this machine, oldest first: ``registry`` (a path), and lists of sentences,
    ``brought_back``, ``renamed`` and ``left``."""
    found = []
    for path in sorted(settings.directory.glob(f"{DIVERGED}.*.lndb")):
        entry: dict[str, Any] = {"registry": str(path), "brought_back": [], "renamed": [], "left": []}
        with contextlib.suppress(LamfsError):  # a damaged list: the registry is there all the same
            entry |= config.read_json(path.with_suffix(".json"), 64 << 20) or {}
        found.append(entry)
    return found
