"""Storage work that is owed: finished by whatever process comes next when the one that began it is gone. Synchronous.

Any thread; ``storage_work`` makes the threads of one process take turns at deciding what happens to an object.
Processes keep apart through the journal (Journal.claimed, Journal.adopt). The order is always: object first, registry
row second, stale object last.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Iterable

from lamfs import hashing
from lamfs.errors import (
    AlreadyExists,
    InvalidName,
    LamfsError,
    NotFound,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
    TooLarge,
)
from lamfs.keys import check_spool_name, is_private
from lamfs.model import BLOCK_SIZE, ArtifactRecord, ContentHash, JournalEntry, ObjectMeta, now_ns
from lamfs.ops import adoption, alone, messages, newer, spools
from lamfs.ops.instance import Instance
from lamfs.registry import Provenance, record_from_payload, sync_log
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ANYTHING, ObjectStat, ObjectStore, Over, in_parts
from lamfs.work.direct import finish
from lamfs.work.moves import Moves
from lamfs.work.steps import Upload, what

log = logging.getLogger("lamfs.recover")

storage_work = threading.RLock()
"""Held while this process runs owed deletes and moves, and while it announces a save."""
active: set[int] = set()
"""Journal ids of saves that this process is at work on; under ``storage_work``."""

put_work = threading.RLock()
"""Held while this process finishes puts of processes that are gone."""

RETRY_NS = 5_000_000_000
TRIES = 4
"""Times that a put meets somebody else's object before it is left for later."""


def finish_all(instance: Instance, *, strict: bool = True) -> None:
    """Finish the saves, puts, moves and deletes of processes that are gone, and this process's own that waited.

    With ``strict`` raises what stopped one of them; else that is logged, and it stays owed.
    """
    finish_saves(instance, strict=strict)
    finish_puts(instance, strict=strict)
    run_owed(instance, strict=strict)


def _trouble(instance: Instance, entry: JournalEntry, error: LamfsError, strict: bool) -> None:
    instance.registry.journal.failed(entry.id, str(error), now_ns() + RETRY_NS)
    if strict:
        raise error
    log.warning("could not finish %s of %s: %s", entry.op, entry.object_key or entry.uid or entry.src, error)


# -- saves ------------------------------------------------------------------------------------------------------------


def finish_saves(instance: Instance, *, strict: bool = False) -> int:
    """Finish or undo the saves of dead processes: forward when the object holds exactly the announced bytes.

    Returns how many became artifacts.
    """
    journal = instance.registry.journal
    count = 0
    with storage_work:  # who announces a save holds it until the save is known to be active
        journal.adopt(("save",))
        mine = [entry for entry in journal.mine("save") if entry.id not in active]
    for entry in mine:
        try:
            count += finish_save(instance, entry) is not None
        except StorageError as error:
            _trouble(instance, entry, error, strict)
    return count


def finish_save(instance: Instance, entry: JournalEntry) -> ArtifactRecord | None:
    """Finish one interrupted save if its bytes are in storage; else undo it and return None. Raises storage errors."""
    registry, store = instance.registry, instance.store
    assert entry.object_key is not None
    record = record_from_payload(entry.payload, entry.object_key)
    instance.prove()
    now = registry.artifacts.by_uid(record.uid)
    base = None if now is None else [now.revision.object_key, now.revision.etag]
    abort_unknown(instance, entry.object_key)
    # Only what this save set out to replace may be replaced: whoever came later counts.
    etag = find_bytes(store, entry.object_key, record.revision.content) if base == entry.payload.get("base") else None
    if etag is None:
        _undo_save(instance, entry)
        return None
    try:
        mode = int(str(entry.payload.get("mode", 0o644)))
        return registry.commits.save(entry.id, record, etag, mode=mode, uid=os.getuid(), gid=os.getgid())
    except (AlreadyExists, NotFound, InvalidName) as error:
        log.warning("the interrupted save of '%s' is undone: %s", record.key or record.uid, error)
        _undo_save(instance, entry)
        return None


def _undo_save(instance: Instance, entry: JournalEntry) -> None:
    """Strike a save off that did not become an artifact, and owe the deletion of what it may have stored.

    An object that was there before, and no artifact's, stays unless the save wrote over it.
    """
    assert entry.object_key is not None
    delete = True
    if not is_private(entry.object_key):
        # Other programs store things at such keys, too, before or after: only what says that it is this artifact's is.
        delete = False
        with contextlib.suppress(ObjectMissing):
            said = instance.store.meta(entry.object_key)
            etag = instance.store.head(entry.object_key).etag
            delete = said is not None and said.uid == entry.uid and etag != entry.payload.get("foreign")
    instance.registry.commits.abandon_save(entry.id, entry.object_key, delete=delete)


def find_bytes(store: ObjectStore, object_key: str, content: ContentHash) -> str | None:
    """ETag of an object if it holds exactly these bytes; every block is read and compared. None: it does not."""
    for _ in range(3):
        try:
            found = store.head(object_key)
            return found.etag if found.size == content.size and _same(store, found, content) else None
        except ObjectMissing:
            return None
        except ObjectChanged:
            continue
    raise StorageUnavailable(f"The object {store.url(object_key)} changes all the time; try again.")


def _same(store: ObjectStore, found: ObjectStat, content: ContentHash) -> bool:
    for index, offset in enumerate(range(0, content.size, BLOCK_SIZE)):
        length = min(BLOCK_SIZE, content.size - offset)
        data = store.get(found.key, offset=offset, length=length, etag=found.etag)
        if len(data) != length or hashing.hash_block(data) != content.block(index):
            return False
    return True


# -- puts -------------------------------------------------------------------------------------------------------------


def finish_puts(instance: Instance, *, strict: bool = False) -> int:
    """Store what a mount that is gone had still to store; nothing happens while another mount can do it.

    Returns how many files were stored.
    """
    from lamfs.ops import mounts

    if mounts.is_written(instance.settings):
        return 0
    journal = instance.registry.journal
    if not any(entry.op == "put" for entry in journal.entries()):
        return 0  # whatever is there instead of a spool
    try:
        spool = spools.find(instance.settings, instance.registry)
    except StorageError as error:
        if strict:
            raise
        log.warning("%s", error)
        return 0
    if spool is None:
        return 0  # the disk it is on is not there
    with spool, put_work:
        return _finish_puts(instance, spool, strict)


def _finish_puts(instance: Instance, spool: SpoolFolder, strict: bool) -> int:
    journal = instance.registry.journal
    adoption.adopt_puts(instance.registry, instance.store, spool)
    count = 0
    first: LamfsError | None = None
    for entry in journal.entries():
        if entry.op != "put" or entry.state == "scratch" or entry.owner != journal.owner:
            continue
        try:
            count += finish_put(instance, spool, entry)
            continue
        except TooLarge as problem:
            journal.refuse(entry.id, str(problem))
            first = first or problem
            continue
        except LamfsError as problem:
            error = problem
        except OSError as problem:
            error = StorageError(f"The spool file {spool.shown(entry.src or '')}: {problem}.", errno=problem.errno)
        _trouble(instance, entry, error, strict and isinstance(error, StorageUnavailable))
        first = first or error
    if strict and first is not None:
        raise first
    return count


def finish_put(instance: Instance, spool: SpoolFolder, entry: JournalEntry) -> bool:
    """Store one spool file; False when its file is gone from the tree. Raises InvalidName when the row names none,
    storage errors, and OSError."""
    registry, src = instance.registry, check_spool_name(entry.src)
    assert entry.ino is not None
    inode = registry.tree.get(entry.ino)
    if inode is None or not stat.S_ISREG(inode.mode):
        with registry.db.transaction():
            registry.journal.done(entry.id)
            doubted = entry.object_key is None or "doubted" in entry.payload  # it may be another machine's
            if not doubted and registry.artifacts.with_object(entry.object_key or "") is None:
                registry.journal.add_delete(entry.object_key or "")
        spool.unlink(src)
        return False
    if entry.state != "ready":
        # Its writer died with the file open: the bytes it wrote are what there is.
        registry.journal.ready_put(entry.ino, scratch=registry.names.is_scratch(entry.ino))
        again = registry.journal.put_of(entry.ino)
        assert again is not None
        entry = again
        if entry.state == "scratch":
            return False
    user = instance.user()
    origin = Provenance(user.id if user else None)
    steps, told = alone.puts(instance, spool, origin)
    for _ in range(TRIES):
        try:
            committed, consumed = finish(steps.put(entry, Upload(entry)))
            break
        except ObjectChanged as error:
            if told.conflict is None:
                raise
            # Both are kept: what the put has is a file of its own now, and is stored as that.
            messages.warn(str(error))
            told.conflict = None
        left = registry.journal.get(entry.id)
        if left is None:
            return False
        entry = left
    else:
        raise StorageUnavailable(f"What is stored where '{what(registry, entry)}' goes changes all the time.")
    sync_log(registry.path)
    if not consumed and not registry.journal.owes_file(src):
        spool.unlink(src)
    return committed.record is not None


def replaceable(
    instance: Instance,
    artifact: ArtifactRecord | None,
    target: str,
    *,
    claimed: bool,
) -> Over:
    """What may be replaced at ``target``, looked at just before it is written.

    ``artifact``: as it was before, None for a new one; ``claimed``: Journal.is_claimed before this work announced the
    object. Raises PreconditionFailed (somebody else's object is there), storage errors.
    """
    if artifact is None and is_private(target):
        return ANYTHING  # nobody else has this artifact
    found, over = newer.look_at(instance.store, target)
    if found is None:
        return over
    before = None if artifact is None else artifact.revision
    expected = before is not None and (before.object_key, before.etag) == (target, found.etag)
    if not expected and not (claimed and newer.is_own(instance, found)):
        raise PreconditionFailed(
            f"Somebody else has stored something at {instance.store.url(target)} meanwhile; try again.",
            errno=ObjectChanged.errno,
        )
    return over


def copy_twin(
    instance: Instance, content: ContentHash, target: str, meta: ObjectMeta, over: Over = ANYTHING
) -> str | None:
    """Copy the object of an artifact with the same bytes, so that they need not be sent; None: there is none. ``over``:
    what may be replaced."""
    for twin in instance.registry.artifacts.same_content(content, 3):
        if twin.revision.object_key == target:
            continue
        with contextlib.suppress(ObjectMissing, ObjectChanged):
            source, etag = twin.revision.object_key, twin.revision.etag
            return instance.store.copy(source, target, etag=etag, meta=meta, **over._asdict()).etag
    return None


# -- moves and deletes ------------------------------------------------------------------------------------------------


def run_owed(instance: Instance, *, ops: Iterable[str] = ("move", "delete", "abort"), strict: bool = False) -> None:
    """Run the moves, deletes and aborts that this process or a dead one owes.

    What fails stays owed (or raises, ``strict``).
    """
    wanted = set(ops)
    journal = instance.registry.journal
    with storage_work:
        journal.adopt(wanted)
        moves = alone.moves(instance)
        for entry in journal.mine("move", "abort"):
            try:
                if entry.op == "move" and "move" in wanted:
                    _move(instance, moves, entry)
                elif entry.op == "abort" and "abort" in wanted:
                    finish(moves.abort(entry))
            except LamfsError as error:
                _trouble(instance, entry, error, strict)
        entries = journal.mine("delete") if "delete" in wanted else []
        problem = _delete(instance, moves, entries) if entries else None
        if problem is not None and strict:
            raise problem


def _move(instance: Instance, moves: Moves, entry: JournalEntry) -> None:
    """Bring an object all the way home, as far as nobody is in the way."""
    registry = instance.registry
    assert entry.uid is not None
    while registry.journal.get(entry.id) is not None:
        before = registry.artifacts.by_uid(entry.uid)
        finish(moves.move(entry))
        if before == registry.artifacts.by_uid(entry.uid):
            return  # the next process moves it


def _delete(instance: Instance, moves: Moves, entries: list[JournalEntry]) -> LamfsError | None:
    """Delete what these rows mean, and strike them off; what stopped one of them. What storage refuses of one object
    keeps no other one."""
    journal = instance.registry.journal
    try:
        finish(moves.delete(entries))
    except LamfsError as error:
        if isinstance(error, StorageError) and not error.retryable and len({entry.object_key for entry in entries}) > 1:
            keys = dict.fromkeys(entry.object_key for entry in entries)
            for key in keys:
                problem = _delete(instance, moves, [entry for entry in entries if entry.object_key == key])
                if isinstance(problem, StorageUnavailable):
                    return problem  # the others would have to wait for nothing, too
            return error
        for entry in entries:
            if journal.get(entry.id) is not None:
                _trouble(instance, entry, error, False)
        return error
    return None


def abort_unknown(instance: Instance, object_key: str) -> None:
    """Abort the unfinished uploads of an object that no journal row knows; nobody may be storing it."""
    store = in_parts(instance.store)
    if store is None:
        return
    known = instance.registry.uploads.known(object_key)
    for upload_id in store.uploads_of(object_key):
        if upload_id not in known:
            store.abort_upload(object_key, upload_id)
