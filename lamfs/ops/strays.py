"""Spool files that the journal does not owe: leftovers go, and what may be somebody's only copy goes to ``lost+found``.

Synchronous. While no mount of the instance lives. What a crash of lamfs itself leaves behind is told by what is known
of it (``Kind``); all else has bytes of which the registry knows nothing, because it is older than they are: it was
restored, or its log was damaged.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import stat
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from lamfs import hashing
from lamfs.errors import LamfsError, ObjectChanged, ObjectMissing, StorageError
from lamfs.keys import root_path, spool_inode, spool_name, suffix_of
from lamfs.model import TRASH, ContentHash, new_uid, now_ns
from lamfs.printable import count_of
from lamfs.registry import Registry, aside, sync_log
from lamfs.registry.entries import Drop, Put
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore
from lamfs.work.replaying import may_be_partial

log = logging.getLogger("lamfs.recover")


class Kind(enum.Enum):
    """What a spool file that nothing owes is."""

    SPENT = "was stored or deleted, and a crash has left it"
    EMPTY = "has no bytes"
    DOUBLE = "has the bytes of a stored revision, or of another spool file"
    UNTOLD = "may have the bytes of a stored revision, which storage cannot be asked for now"
    STRAY = "has bytes that the registry knows nothing of"


@dataclass(slots=True)
class Stray:
    """One spool file that nothing owes. ``key``: where a stray is now, in ``lost+found``; None: it is in the spool."""

    src: str
    kind: Kind
    size: int
    key: str | None = None


def look(registry: Registry, store: ObjectStore, spool: SpoolFolder) -> Iterator[Stray]:
    """Spool files that nothing owes, by name, and what each is. Nothing is changed."""
    names = spool.names()  # before the journal: what is made meanwhile by another process stays
    owed = {entry.src for entry in registry.journal.entries() if isinstance(entry, Put | Drop)}
    spent = registry.journal.spent()
    sizes: set[int] | None = None
    for name in names:
        if name in owed:
            continue
        try:
            with spool.opened(name, os.O_RDONLY) as fd:
                size = os.fstat(fd).st_size
                if name in spent:
                    yield Stray(name, Kind.SPENT, size)
                    continue
                if sizes is None:  # once: it takes long where there are many artifacts
                    sizes = registry.artifacts.sizes()
                yield Stray(name, _kind(registry, store, spool, name, fd, size, sizes), size)
        except (LamfsError, OSError) as error:
            log.error("the spool file %s, which nothing owes, cannot be read, and stays there: %s", name, error)


def settle(registry: Registry, store: ObjectStore, spool: SpoolFolder, directory: Path) -> list[Stray]:
    """Remove what is left over, and make files in ``lost+found`` of all else; what was found, by name.

    ``directory``: where registries are that were put aside, which may know whose the bytes are.
    """
    found = list(look(registry, store, spool))
    told: dict[str, aside.Told] | None = None
    for stray in found:
        if stray.kind is Kind.STRAY:
            if told is None:
                told = _told(directory)
            try:
                stray.key = keep(registry, store, spool, stray.src, told.get(stray.src))
            except (StorageError, OSError) as error:
                log.error("the spool file %s, which nothing owes, cannot be looked at, and stays: %s", stray.src, error)
                continue
            log.warning("the spool file %s was owed to nobody: its %d bytes are '%s'", stray.src, stray.size, stray.key)
        elif stray.kind is Kind.UNTOLD:
            log.info("the spool file %s %s; it stays until it can", stray.src, stray.kind.value)
        else:
            spool.unlink(stray.src)
    for name in spool.drafts():
        spool.drop_draft(name)
    if registry.journal.spent():
        sync_log(registry.path)  # a power cut that sets the registry back needs them
    registry.journal.forget_spent(spool.names())
    count = sum(stray.key is not None for stray in found)
    if count:
        folder = registry.rescue.found()[0]
        log.warning(
            "%s that the journal did not know: look into '%s', and move or delete what is there",
            count_of(count, "file"),
            folder,
        )
    return found


def keep(registry: Registry, store: ObjectStore, spool: SpoolFolder, src: str, told: aside.Told | None = None) -> str:
    """Make a file in ``lost+found`` of a spool file that nothing owes; its key there. Raises StorageError and OSError,
    and nothing has changed, when it cannot be looked at."""
    status = spool.stat(src)
    inode = registry.tree.get(spool_inode(src))
    key = told.key if told is not None else None
    perhaps = key is None
    if key is None and inode is not None and stat.S_ISREG(inode.mode):
        key = registry.tree.path(inode.ino)
    partial = told.partial if told is not None else may_be_partial(registry, store, spool, src)
    stem, suffix = "", ""
    if key:
        name = root_path(key)[1]
        suffix = suffix_of(name)
        stem = f"{name.removesuffix(suffix)} "
    end = f"(spool {src}){suffix}{'.partial' if partial else ''}"
    stem = stem.encode()[: 240 - len(end.encode())].decode(errors="ignore")
    about = f"{'perhaps of ' if perhaps else 'of '}'{key}'" if key else "of a file that is not known"
    return registry.rescue.keep_file(
        f"{stem}{end}",
        src=src,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        now=now_ns(),
        spare_uid=new_uid(),
        artifact_uid=told.uid if told is not None and not partial else None,
        description=f"Found in the spool, owed to nobody: bytes {about}"
        + (", without those that were not written" if partial else ""),
    )


def keep_damaged(registry: Registry, spool: SpoolFolder, entry: Put) -> str:
    """Make a file in ``lost+found`` of a put's spool file that is not what was written, as it is; its key there. The
    put's own file is as it was stored last, or gone. Raises OSError."""
    name = spool_name(entry.ino)
    spool.rename(entry.src, name)  # what is known of the old name is that nobody owes it
    status = spool.stat(name)
    key = registry.tree.path(entry.ino) or str(entry.uid)
    called = root_path(key)[1]
    suffix = suffix_of(called)
    blocks = ", ".join(map(str, sorted(entry.damaged)[:20]))
    return registry.rescue.keep_put(
        entry.id,
        f"{called.removesuffix(suffix)} (damaged){suffix}{'.partial' if entry.base is not None else ''}",
        src=name,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        now=now_ns(),
        spare_uid=new_uid(),
        description=f"What was written last to '{key}', changed by the disk it waited on: blocks {blocks} of 4 MiB",
    )


def _told(directory: Path) -> dict[str, aside.Told]:
    """What registries that were put aside say of spool files; of several the newest counts."""
    known: dict[str, aside.Told] = {}
    for path in sorted(directory.glob("*.*.lndb"), key=lambda path: path.stat().st_mtime, reverse=True):
        for src, one in aside.puts(path).items():
            known.setdefault(src, one)
    return known


def _kind(
    registry: Registry, store: ObjectStore, spool: SpoolFolder, name: str, fd: int, size: int, sizes: Container[int]
) -> Kind:
    if not size or not _has_data(fd):
        return Kind.EMPTY
    if size in sizes:
        content = hashing.hash_fd(fd, size)
        stored = _is_stored(registry, store, content)
        if stored is not False:
            return Kind.DOUBLE if stored else Kind.UNTOLD
    owed = registry.journal.put_of(spool_inode(name))
    if owed is None or owed.src is None or owed.src == name:
        return Kind.STRAY
    if _same(spool, owed.src, fd, size) or _is_object(store, owed, fd, size):
        return Kind.DOUBLE
    return Kind.STRAY


def _has_data(fd: int) -> bool:
    """Whether anything was ever written into a file; true where that cannot be told."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno != errno.ENXIO
    return True


def _is_stored(registry: Registry, store: ObjectStore, content: ContentHash) -> bool | None:
    """Whether storage has these bytes, as an artifact's revision outside of the trash; None when it cannot be asked."""
    told: bool | None = False
    for record in registry.artifacts.same_content(content):
        if record.visibility == TRASH:
            continue  # nobody misses that, until it is gone
        try:
            if store.head(record.revision.object_key).etag == record.revision.etag:
                return True
        except (ObjectMissing, ObjectChanged):
            continue
        except LamfsError:
            told = None
    return told


def _same(spool: SpoolFolder, other: str, fd: int, size: int) -> bool:
    """Whether the ``size`` bytes of a spool file are those with which another one begins: where a file that is cut was
    to go on in a new one, that has no more."""
    try:
        with spool.opened(other, os.O_RDONLY) as beside:
            return _begins_with(beside, fd, size)
    except (LamfsError, OSError, EOFError):
        return False


def _is_object(store: ObjectStore, owed: Put, fd: int, size: int) -> bool:
    """As ``_same``, of an owed spool file that was renamed into a storage folder, which the registry does not say
    yet."""
    if owed.object_key is None or not store.imports_files:
        return False
    try:
        found = store.open_local(owed.object_key)
        if found is None:
            return False
        with open(found, "rb") as beside:
            return _begins_with(beside.fileno(), fd, size)
    except (LamfsError, OSError, EOFError):
        return False


def _begins_with(beside: int, fd: int, size: int) -> bool:
    """Whether the file ``beside`` begins with the ``size`` bytes of the file ``fd``."""
    return os.fstat(beside).st_size >= size and hashing.hash_fd(fd, size).same_bytes(hashing.hash_fd(beside, size))
