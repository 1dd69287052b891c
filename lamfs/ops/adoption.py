"""Takes over the puts of processes that are gone, and gives up puts that cannot be stored. Synchronous.

Any thread. Storage is asked outside of transactions: nobody waits for the registry while an object is read.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from lamfs.errors import InvalidName, NotFound, ObjectMissing, StorageError
from lamfs.keys import check_spool_name
from lamfs.model import ArtifactRecord, ContentHash, new_uid, now_ns
from lamfs.ops import partial_spools
from lamfs.registry import Lost, Provenance, Registry, of_another_boot
from lamfs.registry.entries import Owed, Put
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore
from lamfs.work import direct
from lamfs.work.replaying import replay

log = logging.getLogger("lamfs.recover")


@dataclass(frozen=True, slots=True)
class _File:
    """The file of a put: its ``size`` in bytes, its ``artifact``, and the key of the object that has the bytes that
    were closed last, if they were stored. ``free``: that object belongs to this file, or to no artifact."""

    size: int
    artifact: ArtifactRecord | None
    object_key: str | None
    free: bool

    @property
    def is_own(self) -> bool:
        """Whether that object is the one of the artifact's revision."""
        return self.artifact is not None and self.artifact.revision.object_key == self.object_key


class _Stored(NamedTuple):
    """The content of the object. ``whole``: it has all bytes that were closed, as far as that is known."""

    content: ContentHash
    etag: str
    whole: bool


@dataclass(slots=True)
class _Seen:
    """What is left of a put: ``left`` bytes of its spool file (None: the file is missing), and the content that is
    ``stored`` instead. ``untold``: why storage cannot tell now. ``goes_on``: the put is whole, and nothing has to be
    decided."""

    left: int | None
    goes_on: bool = False
    stored: _Stored | None = None
    untold: StorageError | None = None


def adopt_puts(registry: Registry, store: ObjectStore, spool: SpoolFolder, ops: Iterable[str] = ("put",)) -> list[Owed]:
    """Take over the journal rows of processes that are gone. Returns them as they were, without the puts that are given
    up.

    A put is given up when the disk has lost part of its spool file: the machine went down (power cut), and the file has
    fewer bytes than were acknowledged. Then the artifact has its stored content again. So has a file whose object is in
    storage, even when the registry does not know of the object. A file that was never stored keeps the bytes that are
    left.

    Of a partial spool, bytes that nobody has noted count when only the process was killed (partial_spools.py).

    A put is also given up when it names something that is not a spool file: lamfs has not written such a row.
    """
    replay(registry, store, spool)
    wanted = set(ops)
    taken = registry.journal.adopt(wanted - {"put"})
    left = registry.journal.left_puts() if "put" in wanted else []
    for entry in left:
        if not of_another_boot(entry.owner) and _foreign(spool, entry) is None:
            partial_spools.count_unnoted(registry, entry, spool)
    plain = {entry.id for entry in left if _is_there(registry, spool, entry)}
    taken += registry.journal.take(entry for entry in left if entry.id in plain)
    taken += [entry for entry in left if entry.id not in plain and _decide(registry, store, spool, entry)]
    return sorted(taken, key=lambda entry: entry.id)


def _is_there(registry: Registry, spool: SpoolFolder, entry: Put) -> bool:
    """Whether the spool file of a put still has all its bytes."""
    if _foreign(spool, entry) is not None or (left := _left(spool, entry)) is None:
        return False
    if not of_another_boot(entry.owner):
        return True
    inode = registry.tree.get(entry.ino)
    partial = entry.base is not None or bool(registry.partial_spools.ranges(entry.src))
    return inode is None or (left >= inode.size and not partial)


def _left(spool: SpoolFolder, entry: Put) -> int | None:
    """Bytes of the spool file of a put; None: the file is missing. Raises OSError."""
    try:
        return spool.stat(entry.src).st_size
    except FileNotFoundError:
        return None


def _foreign(spool: SpoolFolder, entry: Put) -> str | None:
    """Why lamfs cannot have written a put, judging by what it names; None: it may have. Raises OSError."""
    if not entry.ino:
        return "it is of no file"
    try:
        spool.exists(check_spool_name(entry.src))
    except (InvalidName, StorageError) as error:
        return str(error)
    except OSError as error:
        log.error("The spool file %s cannot be looked at: %s.", entry.src, error)
        raise
    return None


def _decide(registry: Registry, store: ObjectStore, spool: SpoolFolder, entry: Put) -> bool:
    """Take over a put whose spool file lacks bytes, or give it up. Returns whether this process owes the put from now
    on.

    Storage is asked outside of any transaction. One transaction then takes the row over and writes the decision. Until
    then the row keeps its old owner, which tells whether the machine went down.
    """
    foreign = _foreign(spool, entry)
    if foreign is not None:
        name = registry.tree.path(entry.ino) or entry.uid
        if registry.upkeep.strike_off(entry, now=now_ns()):
            if entry.ino:
                log.error("What the journal owes of '%s' is struck off: %s", name, foreign)
            else:
                log.error("A row of the journal owes what was written to no file, and is struck off.")
        return False
    if of_another_boot(entry.owner):
        partial_spools.keep_durable(registry, entry, spool)
    while True:
        file = _file(registry, entry)
        seen = _look(registry, store, entry, file, _left(spool, entry))
        with registry.upkeep.deciding(entry) as is_ours:
            if not is_ours:
                return False  # another process has decided
            if _file(registry, entry) != file:
                continue
            registry.journal.take([entry])
            goes_on = seen.goes_on or file is None or _conclude(registry, spool, entry, file, seen)
        if not goes_on:
            spool.unlink(entry.src)
        return goes_on


def _file(registry: Registry, entry: Put) -> _File | None:
    """The file of a put; None: the tree has it no more."""
    inode = registry.tree.get(entry.ino)
    if inode is None:
        return None
    artifact = registry.artifacts.by_ino(entry.ino)
    key = entry.object_key
    if key is None and artifact is None:
        key = registry.commits.put_target(entry)
    file = _File(inode.size, artifact, key, True)
    if key is None or file.is_own or registry.artifacts.with_object(key) is None:
        return file
    return replace(file, free=False)


def _look(registry: Registry, store: ObjectStore, entry: Put, file: _File | None, left: int | None) -> _Seen:
    """Look for the bytes of a put. Raises storage errors where the artifact's own object cannot be looked at."""
    if file is None or (left is not None and (left >= file.size or not of_another_boot(entry.owner))):
        return _Seen(left, goes_on=True)
    if left is None and may_be_stored(store, entry.object_key, file.artifact):
        return _Seen(left, goes_on=True)
    if left is None and not file.size and file.artifact is not None:
        return _Seen(left)
    try:
        return _Seen(left, stored=_stored(registry, store, entry, file))
    except StorageError as error:
        if file.is_own:
            raise
        return _Seen(left, untold=error)


def may_be_stored(store: ObjectStore, object_key: str | None, artifact: ArtifactRecord | None) -> bool:
    """Whether a spool file may have been renamed into the storage folder: the object is not the one that ``artifact``
    had before, or storage cannot tell."""
    if object_key is None or not store.imports_files:
        return False
    try:
        etag = store.head(object_key).etag
        return artifact is None or (object_key, etag) != (artifact.revision.object_key, artifact.revision.etag)
    except ObjectMissing:
        return False
    except StorageError:
        return True  # such as a link, or a folder that is away: the put's own error says it


def _stored(registry: Registry, store: ObjectStore, entry: Put, file: _File) -> _Stored | None:
    """The content of a put whose spool file is lost, if it reached its object; None: it did not. Reads the whole
    object.

    The registry may not know of the object: the power was cut before the commit, or the registry was set back. Raises
    storage errors.
    """
    key, artifact = file.object_key, file.artifact
    if key is None or not file.free:
        return None
    with contextlib.suppress(ObjectMissing, NotFound):
        if artifact is not None and file.is_own and store.head(key).etag == artifact.revision.etag:
            return None
        if not file.is_own:
            meta = store.meta(key)
            if meta is None or meta.uid != (entry.uid if artifact is None else artifact.uid):
                return None  # the object of an earlier revision, or of another artifact
        content, etag = direct.hash_object(store, key)
        seal = registry.seals.of(entry.src)
        if seal is not None:
            return _Stored(content, etag, not seal.broken(content))
        # A registry from before the first write knows no size, so no byte can be called missing.
        new = artifact is None and not file.size
        return _Stored(content, etag, new and not of_another_boot(entry.owner))
    return None


def _conclude(registry: Registry, spool: SpoolFolder, entry: Put, file: _File, seen: _Seen) -> bool:
    """Conclude a put of this process, in the transaction that took it over. Returns whether the put is still owed; if
    not, the caller removes its spool file."""
    left, empty = seen.left, seen.left is None and not file.size
    if empty and file.artifact is not None:
        os.close(spool.open(entry.src, os.O_CREAT | os.O_RDWR))
        return True
    name = registry.tree.path(entry.ino) or entry.uid
    why = "the machine went down" if of_another_boot(entry.owner) else f"its spool file {entry.src} was lost"
    if seen.untold is not None:
        log.error("Whether '%s' is in storage cannot be told now: %s", name, seen.untold)
        if file.artifact is None and (left or empty):
            registry.journal.start_over(entry.id, new_uid())  # it gets another object: what it may have stored is kept
    elif seen.stored is not None and _commit_stored(registry, entry, file, seen.stored):
        log.warning("'%s' was stored before %s.", name, why)
        return False
    artifact = registry.artifacts.by_ino(entry.ino)
    if artifact is None and empty:
        # No byte was acknowledged, or the process died between naming a new file and making it.
        os.close(spool.open(entry.src, os.O_CREAT | os.O_RDWR))
        return True
    if artifact is None and left:
        registry.seals.forget(entry.src)
        key = registry.tree.path(entry.ino) or entry.src
        registry.rescue.note_lost(Lost(key, entry.uid, file.size, False, now_ns(), left=left))
        log.error("Of '%s' %d of %d bytes are left: %s before they were stored.", name, left, file.size, why)
        return True
    if artifact is None:
        log.error("'%s' is gone: %s before it was stored.", name, why)
    else:
        log.error("'%s' is as it was stored last: %s before later bytes were stored.", name, why)
    registry.rescue.give_up(entry.id, now=now_ns())
    return False


def _commit_stored(registry: Registry, entry: Put, file: _File, stored: _Stored) -> bool:
    """Commit the content of a put's object as its file's content. Returns whether it is whole; if not, the row
    stays."""
    assert file.object_key is not None
    if stored.whole and entry.state == "open":
        registry.journal.ready_put(entry.ino, now=now_ns())
    row = registry.journal.get_put(entry.id)
    gen = entry.gen if row is None else row.gen
    registry.commits.put(
        entry.ino, gen if stored.whole else gen - 1, stored.content, file.object_key, stored.etag, Provenance(),
        now=now_ns(), row=entry.id,
    )  # fmt: skip
    return stored.whole
