"""Deals with bytes that only this machine has of an instance that is about to be deleted: stores them, or leaves them
and names them.

Bytes in a spool may be somebody's only copy. Bytes that cannot be stored stay in the spool folder, and the registry,
which alone says what they are, is put aside. A new instance of the same name finds them there: its first mount makes
files of them in ``lost+found`` (strays.py). Synchronous.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError, LeaseLost, NotSetUp, RegistryError, StorageUnavailable
from lamfs.ops import messages, recover, spools, strays, working_copy
from lamfs.ops.instance import Instance
from lamfs.ops.strays import Kind
from lamfs.registry import Registry
from lamfs.spool import SpoolFolder
from lamfs.storage import ObjectStore

SHOWN = 10
"""Files that are listed."""
_UNKNOWN = frozenset({Kind.STRAY, Kind.UNTOLD})


class Left(NamedTuple):
    """A spool file that stays. ``key``: of its file in the tree; ``""``: not known."""

    path: str
    key: str
    size: int


def store(instance: Instance) -> None:
    """Store what dead processes of this machine owe, as far as storage takes it. The rest stays owed.

    Raises StorageUnavailable and LeaseLost: another try may succeed, and nothing else can be done either.
    """
    try:
        recover.finish_puts(instance, strict=True)
    except (StorageUnavailable, LeaseLost):
        raise
    except LamfsError as error:
        messages.warn(str(error))
    recover.finish_saves(instance)
    recover.run_owed(instance)


def sort_out(settings: InstanceSettings, store: ObjectStore) -> list[Left]:
    """Remove useless files from this machine's spool, while no process has the registry open. Returns the files that
    are left.

    When the registry cannot be read, every file with bytes may be useful and is left. Raises StorageError when a file
    that this machine owes cannot be brought into its spool, and OSError.
    """
    with contextlib.ExitStack() as stack:
        registry: Registry | None = None
        with contextlib.suppress(RegistryError, NotSetUp):
            registry = stack.enter_context(contextlib.closing(Registry(settings.registry_path)))
            spools.take_in(settings, registry)
        spool = SpoolFolder.find(*settings.spool_place)
        if spool is None:
            return []
        stack.enter_context(spool)
        wanted = _wanted(registry, store, spool)
        left = []
        for name in spool.names():
            size = spool.stat(name).st_size
            if name in wanted or (registry is None and size):
                left.append(Left(spool.shown(name), wanted.get(name, ""), size))
            else:
                spool.unlink(name)
        return left


def _wanted(registry: Registry | None, store: ObjectStore, spool: SpoolFolder) -> dict[str, str]:
    """Keys of the spool files that have the only copy of their bytes, by spool file."""
    if registry is None:
        return {}
    found: dict[str, str] = {}
    for entry in registry.journal.puts():
        inode = registry.tree.get(entry.ino)
        if entry.state != "scratch" or (inode is not None and inode.size):
            found[entry.src] = registry.tree.path(entry.ino) or entry.uid
    found |= {stray.src: "" for stray in strays.look(registry, store, spool) if stray.kind in _UNKNOWN}
    return found


def clear(settings: InstanceSettings, *, keep: bool) -> Path | None:
    """Remove the instance's directory on this machine. ``keep``: leave a spool in it, and the registries that say what
    is in the spool. Spools that were put aside stay in any case, unless they are empty.

    Returns where the last registry is then; None: it is gone too.
    """
    directory = settings.directory
    aside = [path for path in directory.glob("spool.*") if path.is_dir() and any(path.iterdir())]
    if not keep and not aside:
        shutil.rmtree(directory, ignore_errors=True)
        return None
    kept = None
    if settings.registry_path.exists():
        kept = working_copy.put_aside(settings.registry_path, "registry")
        settings.registry_path.unlink(missing_ok=True)
    stays = {directory / "spool", *aside, *directory.glob("*.*.lndb*"), *directory.glob("*.*.work.db*")}
    for path in directory.iterdir():
        if path in stays:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return kept


def sentences(left: list[Left], kept: Path | None) -> list[str]:
    """Sentences for people about spool files that stay. ``kept``: the registry that says what they are."""
    if not left:
        return []
    count = "1 file that is" if len(left) == 1 else f"{len(left)} files that are"
    knows = f"; the registry that says what they are was put aside as {kept}" if kept is not None else ""
    lines = [f"the bytes of {count} not in storage are left in {os.path.dirname(left[0].path)}{knows}"]
    for one in left[:SHOWN]:
        what = f"'{one.key}'" if one.key else "of a file that is not known"
        lines.append(f"  {what} ({one.size} bytes): {one.path}")
    if len(left) > SHOWN:
        lines.append(f"  … and {len(left) - SHOWN} more")
    return lines
