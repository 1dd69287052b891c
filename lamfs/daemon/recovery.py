"""What a mount does before it is visible: take over what a dead daemon left. Synchronous, before the loop runs."""

from __future__ import annotations

import logging

from lamfs.errors import LamfsError
from lamfs.model import now_ns
from lamfs.ops import adoption, mounts, strays, temporaries
from lamfs.ops.instance import Instance
from lamfs.printable import count_of
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.registry.writes import SpoolInfo
from lamfs.spool import SpoolFolder

log = logging.getLogger("lamfs.daemon")


def take_over(instance: Instance, spool: SpoolFolder) -> int:
    """Adopt the journal rows of dead processes. Returns how many.

    A file that was being written when its daemon died counts as closed at that point, as on a local disk whose writer
    died. Of spool files that the journal does not need, leftovers are deleted and all others become files in
    ``lost+found``, unless another mount of the instance may have them open.
    """
    taken = adoption.adopt_puts(instance.registry, instance.store, spool, ("put", "move", "delete", "abort", "drop"))
    for entry in taken:
        if not isinstance(entry, Put):
            continue
        try:
            _close(instance.registry, spool, entry)
        except (LamfsError, OSError) as error:
            log.error("could not take over the put of %s: %s", entry.about, error)
    owed = [entry for entry in taken if not (isinstance(entry, Put) and entry.state == "scratch")]
    if owed:
        log.info("taking over %s of storage work from a mount that ended early", count_of(len(owed), "step"))
    if not mounts.live(instance.settings):
        strays.settle(instance.registry, instance.store, spool, instance.settings.directory)
    return len(taken)


def clear_temporaries(instance: Instance) -> None:
    """Remove half-made files of dead processes of this machine, and log that."""
    try:
        swept = temporaries.sweep(instance)
    except (LamfsError, OSError) as error:
        log.info("could not look for what dead processes have left: %s", error)
        return
    for text in (*swept.removed, *swept.left):
        log.info("%s", text)
    if swept.removed:
        log.info("removed %d temporary files of processes that are gone: %d bytes", len(swept.removed), swept.size)


def _close(registry: Registry, spool: SpoolFolder, entry: Put) -> None:
    """Close a file with a pending put; its size is that of its spool file. Raises OSError, StorageError."""
    try:
        info = spool.stat(entry.src)
    except FileNotFoundError:
        if entry.state == "open":
            registry.journal.ready_put(entry.ino, now=now_ns())
        elif entry.state == "scratch":
            registry.journal.set_scratch(entry.ino, False)
        return  # the uploader finds out where it went
    registry.writes.close_left(entry, SpoolInfo(info.st_size, info.st_mtime_ns, info.st_blocks), now=now_ns())
