"""Removes what processes that are gone have left half made: in storage, beside the registry, in the cache. Synchronous.

The name of a temporary file tells its process (lamfs/processes.py). A file of a dead process of this machine is removed
at once: nothing was promised for it, and its bytes are where they came from. A file of another machine, or of an older
lamfs, is left alone for a day.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lamfs import config
from lamfs.errors import LamfsError
from lamfs.ops.instance import Instance
from lamfs.processes import state_of

LEFTOVER_SECONDS = 24 * 3600
"""Seconds after its last write from which a temporary belongs to nobody."""
_BESIDE = (".push-", ".pull-", ".fresh-", ".peek-", ".new-")
"""Beginnings of the names of registries that are new, or on their way to or from storage."""


@dataclass(slots=True)
class Swept:
    """Sentences: ``removed`` names what was removed, or could not be; ``left``, what belongs to others. ``size``: bytes
    that are free again."""

    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    size: int = 0


def sweep(instance: Instance, *, everywhere: bool = False) -> Swept:
    """Remove the temporaries of dead processes.

    ``everywhere``: also where looking takes a while and large files are rare: in a bucket, which has to be asked, and
    in the cache, whose index is read through. Raises storage errors when the storage cannot be looked at.
    """
    swept = Swept()
    store = instance.store
    for item in store.temporaries() if everywhere or store.on_disk else ():
        _judge(swept, store.url(item.key), item.size, item.mtime_ns, partial(store.delete, [item.key]))
    for path in _beside(instance):
        _sweep_file(swept, path)
    if everywhere:
        index = instance.cache_index
        for name in index.temporaries():
            if _sweep_file(swept, instance.cache_dir / os.fsdecode(name)):
                index.forget(os.fsdecode(name))
    return swept


def _beside(instance: Instance) -> Iterator[Path]:
    for folder, beginnings in ((instance.settings.directory, _BESIDE), (config.temporary_folder(), ("",))):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = os.listdir(folder)
            yield from (folder / name for name in sorted(names) if name.startswith(beginnings))


def _sweep_file(swept: Swept, path: Path) -> bool:
    """Remove a local file, if it is due. Returns whether it is gone."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return True
    return _judge(swept, str(path), status.st_size, status.st_mtime_ns, partial(path.unlink, missing_ok=True))


def _judge(swept: Swept, name: str, size: int, mtime_ns: int, remove: Callable[[], None]) -> bool:
    """Remove a temporary, if it is due, and note it. Returns whether it is gone."""
    state = state_of(name.rpartition("/")[2], config.machine_mark())
    age = time.time() - mtime_ns / 1e9
    whose = "a process that is gone" if state == "dead" else "another machine, or of an older lamfs"
    what = f"the temporary {name} ({size} bytes) of {whose}"
    if state == "dead" or (state == "elsewhere" and age > LEFTOVER_SECONDS):
        try:
            remove()
        except (LamfsError, OSError) as error:
            swept.left.append(f"{what} cannot be removed: {error}")
            return False
        swept.removed.append(f"{what} was removed")
        swept.size += size
        return True
    if state == "elsewhere":
        swept.left.append(f"{what} was written {_ago(age)} ago, and is left until it is a day old")
    return False


def _ago(seconds: float) -> str:
    minutes = max(0, int(seconds // 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
