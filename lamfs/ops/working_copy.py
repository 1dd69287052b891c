"""This machine's working copy of a registry: whose it is, and how another one takes its place. Synchronous.

A working copy is never overwritten. It is put aside beside itself, under its own name with the time in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError, NotSetUp, ObjectMissing, RegistryError, StorageError
from lamfs.keys import root_path
from lamfs.model import ArtifactRecord, now_ns
from lamfs.ops import adoption, messages, spools, strays
from lamfs.printable import count_of
from lamfs.registry import Lost, Registry, workdb
from lamfs.registry.aside import Told
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore
from lamfs.storage.osfiles import fsync_folder
from lamfs.work.replaying import replay

SAID = 10
"""Files that are said one by one."""
KEPT = 3
"""Copies that are kept of those nobody has lost anything with: overtaken by another machine's, or as they came."""


def uid(settings: InstanceSettings) -> str | None:
    """The random name of the instance that the working copy is of; None without one, or when it cannot be read."""
    with contextlib.suppress(LamfsError), contextlib.closing(Registry(settings.registry_path)) as registry:
        return registry.file.about().uid
    return None


def replace(
    settings: InstanceSettings,
    fresh: Path,
    store: ObjectStore,
    *,
    word: str,
    apart: bool = False,
    wrote: str | None = None,
) -> Path | None:
    """Make ``fresh`` the working copy, while nobody has it open. The one that is there is put aside, as
    ``<word>.<time>.lndb``, which is returned, and what it had still to store is owed by the new one. ``wrote``: the uid
    of the instance whose working copy lamfs wrote here last (written.py).

    Spool files of files that ``fresh`` does not know are in its ``lost+found``. When the one that is there cannot be
    read, or something else than lamfs has put it there, they stay in the spool, and the next mount looks what they are
    (strays.py); when they are another instance's, they are put aside with it. ``apart``: see carry.carry_over.
    """
    path = settings.registry_path
    _gather(settings)
    same = not path.exists() or _carry_over(settings, fresh, store, apart, wrote)
    with contextlib.nullcontext() if same else _spool_aside(settings, fresh):
        with open(fresh, "rb") as file:
            os.fsync(file.fileno())
        kept = put_aside(path, word) if path.exists() else None
        logs_aside(path, word)
        # A crash before the last step leaves the old registry, which finds the work database that belongs to it.
        workdb.rename_work(fresh, path)
        os.rename(fresh, path)
        fsync_folder(str(path.parent))
    return kept


def retire(settings: InstanceSettings, word: str) -> Path:
    """Put the working copy aside, while nobody has it open, with all that it had still to store; there is none then.
    Returns where it is."""
    path = settings.registry_path
    _gather(settings)
    with _spool_aside(settings, None):
        kept = put_aside(path, word)
        path.unlink(missing_ok=True)
        fsync_folder(str(path.parent))
    return kept


def _gather(settings: InstanceSettings) -> None:
    """See that all that the working copy has still to store is in this machine's spool, where it is looked for from
    now on. Of one that cannot be read nobody knows what that is. Raises StorageError."""
    with contextlib.suppress(RegistryError, NotSetUp):
        with contextlib.closing(Registry(settings.registry_path)) as registry:
            spools.take_in(settings, registry)


def _carry_over(settings: InstanceSettings, fresh: Path, store: ObjectStore, apart: bool, wrote: str | None) -> bool:
    """Owe in ``fresh`` what is owed in the working copy. False when the spool is another instance's."""
    try:
        with contextlib.closing(Registry(settings.registry_path)) as old, contextlib.closing(Registry(fresh)) as new:
            own = new.file.about().uid
            if old.file.about().uid != own:
                # No lamfs has worked with a registry that is not the one it wrote here: the spool is not of that.
                return wrote is not None and wrote == own
            _replay(settings, old, store)
            with new.upkeep.succeeding(old.db, apart=apart) as left:
                _keep(settings, new, store, left)
            new.file.fold_log()
    except LamfsError as error:
        messages.warn(
            f"what this machine had still to store is not known any more: {error} The next mount puts what is in the"
            " spool into lost+found"
        )
    return True


def _replay(settings: InstanceSettings, registry: Registry, store: ObjectStore) -> None:
    """Bring a working copy and its work database together, for what is owed is taken from the latter alone."""
    spool = SpoolFolder.find(*settings.spool_place) if registry.replay.is_needed() else None
    if spool is not None:
        with spool:
            replay(registry, store, spool)


def _keep(settings: InstanceSettings, new: Registry, store: ObjectStore, left: Mapping[str, Told]) -> None:
    """Make files in ``lost+found`` of spool files that were left behind. What was in missing ones is lost, and said."""
    if not left:
        return
    spool = SpoolFolder.find(*settings.spool_place)
    kept: list[tuple[Told, str]] = []
    missing = dict(left)
    if spool is not None:
        with spool:
            there = set(spool.names())
            for src, told in left.items():
                if src not in there:
                    continue
                try:
                    kept.append((told, strays.keep(new, store, spool, src, told)))
                except (StorageError, OSError) as error:
                    messages.warn(
                        f"what was not stored of '{told.key or told.uid}' cannot be looked at, and is no file of"
                        f" lost+found: {error} The spool file is put aside"
                    )
        missing = {src: told for src, told in left.items() if src not in there}
    for src, told in missing.items():
        _miss(new, store, src, told)
    if kept:
        messages.warn(
            f"{count_of(len(kept), 'file')} not stored yet: the registry that is used now does not know of this, and"
            f" the bytes are in '{root_path(kept[0][1])[0]}' of the tree; look at them, and move or delete them"
        )
    for told, key in kept[:SAID]:
        messages.warn(f"  what was not stored of '{told.key or told.uid}' is '{key}'")
    if len(kept) > SAID:
        messages.warn(f"  … and {len(kept) - SAID} more; 'lamfs info' of each says of which file it is")


def _may_be_stored(new: Registry, store: ObjectStore, told: Told, artifact: ArtifactRecord | None) -> bool:
    """Whether the object may be there that a spool file was to become, and only the old working copy knew of it."""
    if told.object_key is None or store.imports_files:
        return adoption.may_be_stored(store, told.object_key, artifact)
    try:
        store.head(told.object_key)
    except ObjectMissing:
        return False
    except StorageError:
        return True
    return new.artifacts.with_object(told.object_key) is None


def _miss(new: Registry, store: ObjectStore, src: str, told: Told) -> None:
    """Say what has become of a spool file that was left behind, and is not there."""
    artifact = new.artifacts.by_uid(told.uid) if told.uid is not None else None
    name = told.key or told.uid or src
    if _may_be_stored(new, store, told, artifact):
        messages.warn(
            f"the spool file with the last bytes of '{name}' was missing; perhaps they are in the object"
            f" {store.url(told.object_key or '')}, of which the registry that is used now knows nothing: 'lamfs fsck'"
            " tells more"
        )
        return
    lost = Lost(name, told.uid or "", told.size, artifact is not None, now_ns())
    new.rescue.note_lost(lost)
    messages.warn(lost.sentence)


@contextlib.contextmanager
def _spool_aside(settings: InstanceSettings, fresh: Path | None) -> Iterator[None]:
    """Move what ``fresh`` does not owe (None: everything) out of the spool, where it would be taken for a leftover: it
    may be somebody's only copy.

    Inside of the block, where the working copy is replaced, these files are in both places. So a crash leaves them
    where the working copy that is there then, or a person, finds them.
    """
    root, parts = settings.spool_place
    spool = SpoolFolder.find(root, parts)
    if spool is None:
        yield
        return
    with spool:
        strays = spool.names()
        if fresh is not None:
            with contextlib.closing(Registry(fresh)) as registry:
                strays = [name for name in strays if not registry.journal.owes_file(name)]
        if not strays:
            yield
            return
        place = (*parts[:-1], time.strftime(f"{parts[-1]}.%Y%m%dT%H%M%S.{secrets.token_hex(2)}"))
        with SpoolFolder.make(root, place) as kept:
            for name in strays:
                spool.link(name, kept)
            kept.sync()
            yield
            for name in strays:
                spool.unlink(name)
            messages.warn(
                f"{count_of(len(strays), 'file')} not stored yet: the registry that is used now does not know of this,"
                f" and the bytes are in {kept.folder}, and the registry that was put aside says which they are"
            )


def put_aside(path: Path, word: str) -> Path:
    """Give a working copy another name beside it, with its write-ahead log folded in where it can be read at all.

    It may keep its old name too, until something else is renamed over that: so at no moment there is none.
    """
    with contextlib.suppress(LamfsError):
        Registry(path).close()
    kept = aside(path.parent, word)
    log = Path(f"{path}-wal")
    if log.exists() and log.stat().st_size:
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{path}{suffix}", f"{kept}{suffix}")
        workdb.rename_work(path, kept)
        return kept
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:  # a file system without hard links
        os.rename(path, kept)
    workdb.rename_work(path, kept)
    return kept


def logs_aside(path: Path, word: str) -> None:
    """Before a new registry gets the name ``path``: what one before has left there gets another name. SQLite would
    write what is in a log into the new one."""
    kept = aside(path.parent, word)
    workdb.rename_work(path, kept)
    for suffix in ("-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{kept}{suffix}")


def aside(directory: Path, word: str) -> Path:
    """A new name for a registry that is put aside."""
    return directory / time.strftime(f"{word}.%Y%m%dT%H%M%S.{secrets.token_hex(2)}.lndb")


def keep_newest(directory: Path, word: str) -> None:
    """Remove what was put aside with this word, but for the newest KEPT."""
    for old in sorted(directory.glob(f"{word}.*.lndb"))[:-KEPT]:
        workdb.remove(old)
