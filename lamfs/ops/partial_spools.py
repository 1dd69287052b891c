"""Partial spools of a mount that is gone, made complete: spool files that lack blocks which the stored revision has.

Synchronous, any thread. See fs/partial.py for what a partial spool is, and registry/partial_spools.py for what is noted
of it.
"""

from __future__ import annotations

import contextlib
import logging
import os

from lamfs.model import BLOCK_SIZE, Inode, now_ns
from lamfs.registry import Lost, Registry
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder

log = logging.getLogger("lamfs.recover")


def keep_durable(registry: Registry, entry: Put, inode: Inode, spool: SpoolFolder) -> None:
    """The machine went down: of the ranges of a put's spool file only those that are durable are there. The others are
    noted as lost, in one transaction.

    Where the stored revision ends within a block, and what was appended there is lost, the file ends there again.
    """
    with registry.db.transaction():
        lost = registry.partial_spools.keep_durable(entry.src)
        if lost:
            registry.seals.forget(entry.src)
        size = int((entry.base or "0").partition(":")[0])
        before = inode.size
        if not _ends_at(registry, entry.src, before, size):
            size = before
        artifact = registry.artifacts.by_ino(inode.ino)
        key = registry.tree.path(inode.ino) or entry.uid or entry.src
        uid = entry.uid if artifact is None else artifact.uid
        noted = Lost(key, uid or "", before, True, now_ns())
        within = tuple((start, min(end, size)) for start, end in lost if start < size)
        if within:
            _note(registry, noted._replace(size=sum(end - start for start, end in within), ranges=within))
        if size == before:
            return
        _note(registry, noted._replace(left=size))
        inode.size = size
        registry.seals.forget(entry.src)
        registry.tree.update(inode.ino, size=size)
        registry.tree.bump_revision(inode.ino)
        registry.changes.content(inode.ino)
        with contextlib.suppress(FileNotFoundError), spool.opened(entry.src, os.O_RDWR) as fd:
            if os.fstat(fd).st_size > size:
                os.ftruncate(fd, size)


def _note(registry: Registry, lost: Lost) -> None:
    registry.rescue.note_lost(lost)
    log.error("%s.", lost.sentence)


def _ends_at(registry: Registry, src: str, size: int, base: int) -> bool:
    """Whether a partial spool of ``size`` bytes lacks what follows the ``base`` bytes of its revision, within a
    block."""
    block, end = divmod(base, BLOCK_SIZE)
    if not end or size <= base or block in registry.partial_spools.present(src):
        return False
    ranges = registry.partial_spools.ranges(src).get(block, ())
    return not any(start <= end and stop == BLOCK_SIZE for start, stop in ranges)
