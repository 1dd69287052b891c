"""Save, replace, cache, trash, restore and delete artifacts, for the Python API and the CLI. Synchronous.

Any thread. Every change holds the lease first, journals each step before it runs, and tells live mounts afterwards. No
transaction is open while storage is asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamfs.cache import files as cache_files
from lamfs.errors import (
    InvalidArgument,
    LamfsError,
    NotFound,
    ObjectChanged,
    ObjectMissing,
)
from lamfs.model import AUTO_KEY_PREFIX, TRASH, ArtifactRecord, now_ns
from lamfs.ops import alone, drafts, messages, mounts, recover
from lamfs.ops.drafts import Draft
from lamfs.ops.instance import Instance
from lamfs.pool import Pool
from lamfs.registry import Provenance
from lamfs.registry.entries import Save
from lamfs.registry.rules import TEXT_MAX
from lamfs.spool import SpoolFolder
from lamfs.storage.root import is_utf8
from lamfs.work.direct import finish
from lamfs.work.source import Source

log = logging.getLogger("lamfs.artifacts")

Progress = Callable[[int], None]

MIN_PREFIX = 8
"""Fewest characters of a uid that name an artifact."""


# -- saving -----------------------------------------------------------------------------------------------------------


def save(
    instance: Instance,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    description: str | None = None,
    run: int | None = None,
    transform: int | None = None,
    virtual: bool = True,
    progress: Progress | None = None,
    tell: Callable[[Draft], None] | None = None,
) -> ArtifactRecord:
    """Save a file as a new artifact, or as the new content of the artifact that has the key.

    ``run``, ``transform``: row ids. ``tell`` gets the draft before anything is stored. Raises what drafts.draft_new and
    ``commit`` raise.
    """
    origin = Provenance(alone.user_id(instance), run, transform)
    nameless = key is None and description is None and run is None
    if nameless:
        description = Path(path).name
    draft = drafts.draft_new(instance, path, key=key, description=description, origin=origin, virtual=virtual)
    if nameless and draft.replaces is not None:
        draft.record.description = draft.replaces.description  # nobody asked for another one
    if tell is not None:
        tell(draft)
    return commit(instance, draft, progress=progress)


def replace(
    instance: Instance,
    uid: str,
    path: str | os.PathLike[str],
    *,
    run: int | None = None,
    transform: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[Draft], None] | None = None,
) -> ArtifactRecord:
    """Replace the content of an artifact by a file. ``tell`` gets the draft before anything is stored. Raises what
    drafts.draft_replace and ``commit`` raise."""
    draft = drafts.draft_replace(instance, by_uid(instance, uid), path, origin=Provenance(None, run, transform))
    if tell is not None:
        tell(draft)
    return commit(instance, draft, progress=progress)


def commit(
    instance: Instance, draft: Draft, *, key: str | None = None, progress: Progress | None = None
) -> ArtifactRecord:
    """Store a draft: object first, row second, stale object last. Returns the record after that.

    ``key``: the artifact's new key; the rename comes before all else. Raises storage errors (the old revision is whole
    then), AlreadyExists (the key was taken meanwhile), NotFound (the artifact was deleted for good), InvalidArgument
    (the file is gone or being written), and what Namespace.rename_artifact raises.
    """
    record = draft.record
    _check_description(record.description)
    instance.hold()
    if not draft.pending:
        return _update(instance, record, key)
    registry = instance.registry
    if key is not None and registry.artifacts.by_uid(record.uid) is not None:
        registry.names.rename_artifact(record.uid, key, now=now_ns())
    if registry.journal.saves():
        # An interrupted save of the same artifact must not be finished after this one.
        recover.finish_saves(instance, strict=True)
    before = registry.artifacts.by_uid(record.uid)
    if before is not None and before.ino is not None:
        recover.ensure_stored(instance, before.ino)
    if record.created_by_id is None:
        record.created_by_id = alone.user_id(instance)
    if draft.etag is not None:
        key = record.revision.object_key
        found = instance.store.head(key)
        if found.etag != draft.etag:
            raise ObjectChanged(f"The object {instance.store.url(key)} has changed since; register it again.")
        saved = registry.commits.save(0, record, found.etag, mode=0o644, uid=os.getuid(), gid=os.getgid(), now=now_ns())
    else:
        saved = _store(instance, draft, progress)
    recover.run_owed(instance)
    for _ in range(2):  # the first run may only move away what is in the way
        if registry.commits.is_home(saved.uid):
            break
        recover.run_owed(instance)
    mounts.poke(instance.settings)
    return registry.artifacts.by_uid(saved.uid) or saved


def _check_description(text: str | None) -> None:
    """Raise InvalidArgument for a text that another machine would refuse in a registry."""
    if text is not None and ("\0" in text or not is_utf8(text)):
        raise InvalidArgument("The description has a NUL character, or is not UTF-8; leave that out.")
    if text is not None and len(text.encode()) > TEXT_MAX:
        raise InvalidArgument(f"The description has more than {TEXT_MAX} bytes; shorten it, or save it as a file.")


def _store(instance: Instance, draft: Draft, progress: Progress | None) -> ArtifactRecord:
    assert draft.path is not None
    registry, source = instance.registry, Source(draft.path, draft.stamp, draft.temporary)
    try:
        return finish(alone.saves(instance).save(draft.record, source, progress))
    except BaseException:  # an interrupt too: a save that was undone leaves no object
        with contextlib.suppress(LamfsError):
            if not registry.journal.saves(draft.record.uid):
                recover.run_owed(instance, ops=("delete",))
        raise


def _update(instance: Instance, record: ArtifactRecord, key: str | None) -> ArtifactRecord:
    """Save what a person may change of an artifact without new content: its description and its key."""
    by_uid(instance, record.uid)
    instance.registry.names.edit_artifact(
        record.uid,
        now=now_ns(),
        key=key,
        description=record.description,
        run_id=record.run_id,
        transform_id=record.transform_id,
    )
    if key is not None:
        recover.run_owed(instance)
    mounts.poke(instance.settings)
    return by_uid(instance, record.uid)


# -- reading ----------------------------------------------------------------------------------------------------------


def by_uid(instance: Instance, uid: str) -> ArtifactRecord:
    """An artifact by its full uid. Raises NotFound."""
    found = instance.registry.artifacts.by_uid(uid)
    if found is None:
        raise NotFound(f"There is no artifact with uid '{uid}'; it was deleted for good, or is of another instance.")
    return found


def find(instance: Instance, name: str, *, trash: bool = False) -> ArtifactRecord:
    """The artifact that ``name`` means: a path in a mount of the instance, a key, a uid, or the first characters (8 or
    more) of one uid alone. ``trash``: also the key that an artifact in the trash had. Raises NotFound."""
    registry = instance.registry
    inside = mounts.find_by_path(name)
    if inside is not None and inside[0].slug == instance.settings.slug:
        found = _at_path(instance, inside[1], trash)
        if found is None:
            raise NotFound(f"There is no artifact at {name}; it may be a directory, a link, or not stored yet.")
        return found
    found = registry.artifacts.by_uid(name) or _at_path(instance, name.strip("/"), trash)
    if found is not None:
        return found
    with contextlib.suppress(NotFound):
        return by_uid_prefix(instance, name)
    raise NotFound(_why_not(instance, name, trash))


def _why_not(instance: Instance, name: str, trash: bool) -> str:
    """A sentence that says why nothing is found by ``name``, and what to do."""
    dead = mounts.find_dead_by_path(name)
    if dead is not None:
        return (
            f"The mount at {dead.mountpoint}, in which '{name}' lies, has lost its daemon; 'lamfs mount"
            f" --instance {dead.slug} {dead.mountpoint}' mounts it again, or give the key instead of the path."
        )
    key = name.strip("/")
    inode = instance.registry.tree.resolve(key) if key else None
    if inode is not None and stat.S_ISDIR(inode.mode):
        return (
            f"'{name}' is a directory, not an artifact; give the artifacts in it: 'lamfs ls {key}/' lists them, and"
            " with --trash those in the trash."
        )
    listing = "lamfs ls --trash" if trash else "lamfs ls"
    return f"There is no artifact '{name}': no path in a mount, key or uid; '{listing}' shows what there is."


def by_uid_prefix(instance: Instance, name: str) -> ArtifactRecord:
    """The artifact whose uid is ``name``, or the only one whose uid begins so. Raises NotFound."""
    found = instance.registry.artifacts.by_uid(name)
    if found is not None:
        return found
    if len(name) >= MIN_PREFIX and name.isalnum():
        matches = list(instance.registry.artifacts.filter(uid__startswith=name, visibility=None))
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise NotFound(f"'{name}' begins the uids of {len(matches)} artifacts; give more of it.")
    raise NotFound(f"There is no artifact with uid '{name}'; it was deleted for good, or is of another instance.")


def _at_path(instance: Instance, key: str, trash: bool) -> ArtifactRecord | None:
    registry = instance.registry
    inode = registry.tree.resolve(key) if key else None
    found = None
    if inode is not None:
        found = registry.artifacts.by_ino(inode.ino)
        if found is None and registry.journal.put_of(inode.ino) is not None:
            recover.ensure_stored(instance, inode.ino)
            found = registry.artifacts.by_ino(inode.ino)
    if found is None and trash:
        uid = key.removeprefix(AUTO_KEY_PREFIX).partition(".")[0] if key.startswith(AUTO_KEY_PREFIX) else ""
        found = registry.artifacts.trashed(key) or (registry.artifacts.by_uid(uid) if uid else None)
    return found


def cache(
    instance: Instance, record: ArtifactRecord, progress: Progress | None = None, *, pool: Pool | None = None
) -> Path:
    """The complete, verified cache file of an artifact's newest revision.

    The threads of ``pool`` fetch the blocks; None: threads of its own. Raises NotFound, and storage errors
    (ObjectMissing, DamagedData, StorageUnavailable …).
    """
    current = by_uid(instance, record.uid)
    if current.ino is not None and not recover.ensure_stored(instance, current.ino):
        log.debug("caching the stored revision of %s", record.uid)
    for _ in range(8):
        current = by_uid(instance, record.uid)
        try:
            return cache_files.cache_file(
                instance.store,
                instance.cache_index,
                instance.cache_dir,
                current.revision,
                progress=progress,
                pool=pool,
            )
        except (ObjectChanged, ObjectMissing) as error:
            if by_uid(instance, record.uid).revision == current.revision:
                if not _is_idle(instance, current):
                    continue
                if isinstance(error, ObjectChanged):
                    raise ObjectChanged(
                        f"The object {instance.store.url(current.revision.object_key)} is not the revision that was"
                        " saved; 'lamfs fsck' says what is there, and what helps."
                    ) from error
                raise
    return cache_files.cache_file(
        instance.store, instance.cache_index, instance.cache_dir, current.revision, progress=progress, pool=pool
    )


def _is_idle(instance: Instance, record: ArtifactRecord) -> bool:
    """Whether no save of an artifact is under way. Finishes an interrupted one, and returns False then."""
    entries = instance.registry.journal.entries()
    if not any(isinstance(entry, Save) and entry.uid == record.uid for entry in entries):
        return True
    instance.hold()
    recover.finish_saves(instance)
    return False


def url(instance: Instance, record: ArtifactRecord) -> str:
    """URL of a record's object: ``s3://bucket/key`` or a path."""
    return instance.store.url(record.revision.object_key)


# -- leaving ----------------------------------------------------------------------------------------------------------


def trash(instance: Instance, record: ArtifactRecord) -> ArtifactRecord:
    """Move an artifact to the trash; its bytes are kept. Raises NotFound."""
    instance.hold()
    instance.registry.names.trash(record.uid, now=now_ns())
    mounts.poke(instance.settings)
    return by_uid(instance, record.uid)


def restore(instance: Instance, record: ArtifactRecord, key: str | None = None) -> ArtifactRecord:
    """Bring an artifact back from the trash, to ``key`` or where it was. Raises NotFound, AlreadyExists."""
    instance.hold()
    instance.registry.names.restore(record.uid, key, now=now_ns())
    recover.run_owed(instance)
    mounts.poke(instance.settings)
    return by_uid(instance, record.uid)


def purge(instance: Instance, record: ArtifactRecord, storage: bool = True) -> ArtifactRecord:
    """Delete an artifact for good: first its row, then its object. With ``storage=False`` the object stays, with a
    warning.

    Returns the record as it was. Raises NotFound.
    """
    instance.hold()
    if storage:
        instance.prove()
    registry = instance.registry
    if registry.journal.saves(record.uid):
        recover.finish_saves(instance, strict=True)
    pending = registry.journal.put_of(record.ino) if record.ino is not None else None
    gone = registry.names.purge(record.uid, now=now_ns(), storage=storage)
    if pending is not None and pending.src and not mounts.live(instance.settings):
        with contextlib.suppress(OSError, LamfsError):
            spool = SpoolFolder.find(*instance.settings.spool_place)
            if spool is not None:
                with spool:
                    spool.unlink(pending.src)
    if not storage:
        messages.warn(f"you will retain a dangling store here: {url(instance, gone)}, not referenced via an artifact")
    recover.run_owed(instance)
    mounts.poke(instance.settings)
    return gone


def in_trash(record: ArtifactRecord) -> bool:
    """Whether an artifact is in the trash."""
    return record.visibility == TRASH


def info(instance: Instance, record: ArtifactRecord) -> dict[str, Any]:
    """An artifact's record for people and JSON: what ``lamfs info`` prints."""
    return instance.registry.describe(record)
