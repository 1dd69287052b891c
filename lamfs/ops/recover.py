"""Finishes the storage work of processes that are gone, in any process that comes next. Synchronous.

Any thread; ``alone.storage_work`` makes the threads of one process take turns at deciding what happens to an object.
The journal keeps processes apart (Journal.claimed, Journal.adopt). The order is always: object first, registry row
second, stale object last.
"""

from __future__ import annotations

import logging
import stat
import threading
from collections.abc import Iterable

from lamfs.errors import LamfsError, ObjectChanged, StorageError, StorageUnavailable, TooLarge
from lamfs.keys import check_spool_name
from lamfs.model import now_ns
from lamfs.ops import adoption, alone, messages, mounts, spools
from lamfs.ops.instance import Instance
from lamfs.registry import sync_log
from lamfs.registry.entries import Abort, Delete, Move, Owed, Put, Save
from lamfs.spool import SpoolFolder
from lamfs.work.direct import finish
from lamfs.work.moves import Moves
from lamfs.work.steps import Upload, what

log = logging.getLogger("lamfs.recover")

put_work = threading.RLock()
"""Held while this process finishes puts of processes that are gone."""

RETRY_NS = 5_000_000_000
SYNC_SILENCE = 60.0
"""Seconds without an answer from a mount that was asked to sync."""
TRIES = 4
"""Times that a put meets another program's object before it is left for later."""


def finish_all(instance: Instance, *, strict: bool = True) -> None:
    """Finish the saves, puts, moves and deletes of processes that are gone, and those of this process that waited.

    ``strict``: raise the error that stops one of them. Otherwise it is logged, and the work stays owed.
    """
    finish_saves(instance, strict=strict)
    finish_puts(instance, strict=strict)
    run_owed(instance, strict=strict)


def _trouble(instance: Instance, entry: Owed, error: LamfsError, strict: bool) -> None:
    instance.registry.journal.failed(entry.id, str(error), now_ns() + RETRY_NS)
    if strict:
        raise error
    log.warning("could not finish %s of %s: %s", entry.op, entry.about, error)


# -- saves ------------------------------------------------------------------------------------------------------------


def finish_saves(instance: Instance, *, strict: bool = False) -> int:
    """Finish or undo the saves of dead processes. A save is finished when its object has exactly the announced bytes.

    Returns how many became artifacts.
    """
    journal = instance.registry.journal
    count = 0
    with alone.storage_work:  # a process that announces a save has this lock until the save is in ``active``
        journal.adopt(("save",))
        mine = [entry for entry in journal.mine(Save) if entry.id not in alone.active]
    for entry in mine:
        try:
            count += finish(alone.saves(instance).finish(entry)) is not None
        except StorageError as error:
            _trouble(instance, entry, error, strict)
    return count


# -- puts -------------------------------------------------------------------------------------------------------------


def finish_puts(instance: Instance, *, strict: bool = False) -> int:
    """Store what a mount that is gone still owes; nothing happens while another mount can do it.

    Returns how many files were stored.
    """
    if mounts.is_written(instance.settings):
        return 0
    registry = instance.registry
    journal = registry.journal
    if not journal.puts() and not registry.replay.is_needed():
        return 0  # the spool is not needed
    try:
        spool = spools.find(instance.settings, instance.registry)
    except StorageError as error:
        if strict:
            raise
        log.warning("%s", error)
        return 0
    if spool is None:
        return 0  # its disk is not mounted
    with spool, put_work:
        return _finish_puts(instance, spool, strict)


def _finish_puts(instance: Instance, spool: SpoolFolder, strict: bool) -> int:
    journal = instance.registry.journal
    adoption.adopt_puts(instance.registry, instance.store, spool)
    count = 0
    first: LamfsError | None = None
    for entry in journal.mine(Put):
        if entry.state == "scratch":
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
            error = StorageError(f"The spool file {spool.shown(entry.src)}: {problem}.", errno=problem.errno)
        _trouble(instance, entry, error, strict and isinstance(error, StorageUnavailable))
        first = first or error
    if strict and first is not None:
        raise first
    return count


def finish_put(instance: Instance, spool: SpoolFolder, entry: Put) -> bool:
    """Store one spool file. Returns False when its file is gone from the tree. Raises InvalidName when the row names no
    spool file, storage errors, and OSError."""
    registry, src = instance.registry, check_spool_name(entry.src)
    inode = registry.tree.get(entry.ino)
    if inode is None or not stat.S_ISREG(inode.mode):
        registry.commits.abandon_put(entry, now=now_ns())
        spool.unlink(src)
        return False
    if entry.state != "ready":
        # Its writer died with the file open: the bytes that were written count.
        registry.journal.ready_put(entry.ino, now=now_ns(), scratch=registry.names.is_scratch(entry.ino))
        again = registry.journal.put_of(entry.ino)
        assert again is not None
        entry = again
        if entry.state == "scratch":
            return False
    steps, told = alone.puts(instance, spool)
    for _ in range(TRIES):
        try:
            committed, consumed = finish(steps.put(entry, Upload(entry)))
            break
        except ObjectChanged as error:
            if told.conflict is None:
                raise
            # Both are kept: the put's bytes have a file of their own now, and are stored as that.
            messages.warn(str(error))
            told.conflict = None
        left = registry.journal.get_put(entry.id)
        if left is None:
            return False
        entry = left
    else:
        raise StorageUnavailable(f"What is stored where '{what(registry, entry)}' goes changes all the time.")
    sync_log(registry.path)
    if not consumed and not registry.journal.owes_file(src):
        spool.unlink(src)
    return committed.record is not None


def ensure_stored(instance: Instance, ino: int) -> bool:
    """Have a file's pending bytes stored. Returns False, after a warning, when they are not."""
    journal = instance.registry.journal
    if journal.put_of(ino) is None:
        return True
    problem = "it is still open, or its mount has not got to it"
    try:
        writable = [record for record in mounts.live(instance.settings) if not record.read_only]
        for record in writable:
            mounts.request(record, {"cmd": "sync", "ino": ino}, timeout=SYNC_SILENCE)
        if not writable:
            instance.hold()
            if finish_puts(instance):
                run_owed(instance, ops=("delete",))
    except LamfsError as error:
        problem = str(error)
    if journal.put_of(ino) is None:
        return True
    name = instance.registry.tree.path(ino) or f"inode {ino}"
    messages.warn(f"the newest bytes of '{name}' are not in storage yet ({problem}); the last stored revision is used")
    return False


# -- moves and deletes ------------------------------------------------------------------------------------------------


def run_owed(instance: Instance, *, ops: Iterable[str] = ("move", "delete", "abort"), strict: bool = False) -> None:
    """Run the moves, deletes and aborts that this process or a dead one owes.

    ``strict``: raise the error of one that fails. Otherwise it stays owed.
    """
    wanted = set(ops)
    journal = instance.registry.journal
    with alone.storage_work:
        journal.adopt(wanted)
        moves = alone.moves(instance)
        for entry in (*journal.mine(Move), *journal.mine(Abort)):
            try:
                if isinstance(entry, Move) and "move" in wanted:
                    _move(instance, moves, entry)
                elif isinstance(entry, Abort) and "abort" in wanted:
                    finish(moves.abort(entry))
            except LamfsError as error:
                _trouble(instance, entry, error, strict)
        entries = journal.mine(Delete) if "delete" in wanted else []
        problem = _delete(instance, moves, entries) if entries else None
        if problem is not None and strict:
            raise problem


def _move(instance: Instance, moves: Moves, entry: Move) -> None:
    """Move an object until it has its right key, as far as no other object is in the way."""
    registry = instance.registry
    while registry.journal.get(entry.id) is not None:
        before = registry.artifacts.by_uid(entry.uid)
        finish(moves.move(entry))
        if before == registry.artifacts.by_uid(entry.uid):
            return  # the next process moves it


def _delete(instance: Instance, moves: Moves, entries: list[Delete]) -> LamfsError | None:
    """Delete the objects of these rows, and strike the rows off. Returns the error that stopped one of them. An object
    that storage refuses to delete does not stop the others."""
    journal = instance.registry.journal
    try:
        finish(moves.delete(entries))
    except LamfsError as error:
        if isinstance(error, StorageError) and not error.retryable and len({entry.object_key for entry in entries}) > 1:
            keys = dict.fromkeys(entry.object_key for entry in entries)
            for key in keys:
                problem = _delete(instance, moves, [entry for entry in entries if entry.object_key == key])
                if isinstance(problem, StorageUnavailable):
                    return problem  # the others would wait in vain, too
            return error
        for entry in entries:
            if journal.get(entry.id) is not None:
                _trouble(instance, entry, error, False)
        return error
    return None
