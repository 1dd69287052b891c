"""Taking over what processes that are gone had still to store, and giving up what cannot be stored. Synchronous.

Any thread; one transaction.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterable

from lamfs.errors import InvalidName, NotFound, ObjectMissing, StorageError
from lamfs.keys import check_spool_name
from lamfs.model import ArtifactRecord, JournalEntry, now_ns
from lamfs.ops import drafts, overlays
from lamfs.registry import Lost, Provenance, Registry, of_another_boot
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore

log = logging.getLogger("lamfs.recover")


def adopt_puts(
    registry: Registry, store: ObjectStore, spool: SpoolFolder, ops: Iterable[str] = ("put",)
) -> list[JournalEntry]:
    """Take over the journal rows of processes that are gone. Returns them as they were, but for puts given up.

    Those are of files that the disk has lost: the machine went down (power cut), and less of the spool file is left
    than was acknowledged. An artifact has its stored content again then, and so has a file whose object is in storage
    although the registry does not say so any more. What was never stored keeps what is left.
    And those that name no spool file, or something that is none: no lamfs has written to that.
    """
    with registry.db.transaction():
        return [
            entry
            for entry in registry.journal.adopt(ops)
            if not (_is_foreign(registry, spool, entry) or _is_lost(registry, store, spool, entry))
        ]


def _is_foreign(registry: Registry, spool: SpoolFolder, entry: JournalEntry) -> bool:
    """Give a put up that cannot be lamfs's own, by what it names."""
    if entry.op != "put":
        return False
    if entry.ino is None:
        log.error("A row of the journal owes what was written to no file, and is struck off.")
        registry.journal.done(entry.id)
        return True
    try:
        spool.exists(check_spool_name(entry.src))
    except (InvalidName, StorageError) as error:
        name = registry.tree.path(entry.ino) or entry.uid
        log.error("What the journal owes of '%s' is struck off: %s", name, error)
        inode = registry.tree.get(entry.ino)
        if inode is None or not stat.S_ISREG(inode.mode):
            registry.journal.done(entry.id)
        else:
            registry.rescue.give_up(entry.id)
        return True
    except OSError as error:
        log.error("The spool file %s cannot be looked at: %s.", entry.src, error)
    return False


def _is_lost(registry: Registry, store: ObjectStore, spool: SpoolFolder, entry: JournalEntry) -> bool:
    inode = None if entry.op != "put" or entry.ino is None else registry.tree.get(entry.ino)
    if inode is None or entry.src is None:
        return False
    went_down = of_another_boot(entry.owner)
    if not went_down and spool.exists(entry.src):
        return False
    if went_down:
        overlays.keep_durable(registry, entry, inode, spool)
    left = spool.stat(entry.src).st_size if spool.exists(entry.src) else None
    artifact = registry.artifacts.by_ino(inode.ino)
    if left is not None and left >= inode.size:
        return False
    if left is None and drafts.may_be_stored(store, entry.object_key, artifact):
        return False
    empty = left is None and not inode.size
    if empty and artifact is not None:
        os.close(spool.open(entry.src, os.O_CREAT | os.O_RDWR))
        return False
    name = registry.tree.path(inode.ino) or entry.uid
    why = "the machine went down" if went_down else f"its spool file {entry.src} was lost"
    try:
        whole = _take_stored(registry, store, entry, artifact)
    except StorageError as error:
        if artifact is not None and artifact.revision.object_key == entry.object_key:
            raise
        log.error("Whether '%s' is in storage cannot be told now: %s", name, error)
        whole = False
        if artifact is None and (left or empty):
            registry.journal.start_over(entry.id)  # what may be there is not written over
    if whole:
        log.warning("'%s' was stored before %s.", name, why)
        spool.unlink(entry.src)
        return True
    artifact = registry.artifacts.by_ino(inode.ino)
    if artifact is None and empty:
        # It had no bytes that were acknowledged, or its process died between naming a new file and making this one.
        os.close(spool.open(entry.src, os.O_CREAT | os.O_RDWR))
        return False
    if artifact is None and left:
        registry.seals.forget(entry.src)
        key = registry.tree.path(inode.ino) or entry.src
        registry.rescue.note_lost(Lost(key, entry.uid or "", inode.size, False, now_ns(), left=left))
        log.error("Of '%s' %d of %d bytes are left: %s before they were stored.", name, left, inode.size, why)
        return False
    if artifact is None:
        log.error("'%s' is gone: %s before it was stored.", name, why)
    else:
        log.error("'%s' is as it was stored last: %s before later bytes were stored.", name, why)
    registry.rescue.give_up(entry.id)
    spool.unlink(entry.src)
    return True


def _take_stored(registry: Registry, store: ObjectStore, entry: JournalEntry, artifact: ArtifactRecord | None) -> bool:
    """The spool file of a put is lost, but what was closed may have reached its object, and the registry does not say
    so: the power was cut before, or it was set back. Then that is the file's content. Whether all of it is there, as
    far as that is known.

    ``artifact``: of the file, before. Raises storage errors.
    """
    assert entry.ino is not None
    assert entry.src is not None
    key = entry.object_key
    if key is None and artifact is None:
        key = registry.commits.put_target(entry)
    if key is None:
        return False
    uid = entry.uid if artifact is None else artifact.uid
    mine = artifact is not None and artifact.revision.object_key == key
    if not mine and registry.artifacts.with_object(key) is not None:
        return False
    seal = registry.seals.of(entry.src)
    with contextlib.suppress(ObjectMissing, NotFound):
        if artifact is not None and (key, store.head(key).etag) == (key if mine else "", artifact.revision.etag):
            return False
        if not mine:
            said = store.meta(key)
            if said is None or said.uid != uid:
                return False  # what was there before is on its way out, or somebody else's
        content, etag = drafts.hash_object(store, key)
        if seal is not None:
            whole = not seal.broken(content)
        else:
            # A registry that was set back to when the file was new knows of no bytes that might be missing.
            inode = registry.tree.get(entry.ino)
            new = artifact is None and inode is not None and not inode.size
            whole = new and not of_another_boot(entry.owner)
        if whole and entry.state == "open":
            registry.journal.ready_put(entry.ino)
        row = registry.journal.get(entry.id)
        gen = entry.gen if row is None else row.gen
        # What is not all of it leaves the row, which is given up then.
        registry.commits.put(entry.ino, gen if whole else gen - 1, content, key, etag, Provenance(), row=entry.id)
        return whole
    return False
