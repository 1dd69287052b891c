"""Overlays of a mount that is gone, made complete: spool files that lack blocks which the stored revision has.

Synchronous, any thread. See fs/overlay.py for what an overlay is, and registry/overlays.py for what is noted of it.
"""

from __future__ import annotations

import contextlib
import logging
import os

from lamfs import copying, hashing
from lamfs.errors import DamagedData, ObjectChanged, StorageError
from lamfs.model import BLOCK_SIZE, Inode, JournalEntry, Revision, now_ns
from lamfs.ops.instance import Instance
from lamfs.registry import Lost, Registry, is_based_on, lacks_some, missing_blocks, unwritten
from lamfs.spool import SpoolFolder

log = logging.getLogger("lamfs.recover")


def keep_durable(registry: Registry, entry: JournalEntry, inode: Inode, spool: SpoolFolder) -> None:
    """The machine went down: of the ranges of a put's spool file only those that are durable are there. The others are
    noted as lost, in one transaction.

    Where the stored revision ends within a block, and what was appended there is lost, the file ends there again.
    """
    assert entry.src is not None
    with registry.db.transaction():
        lost = registry.overlays.keep_durable(entry.src)
        if lost:
            registry.seals.forget(entry.src)
        size = int(str(entry.payload.get("base", "0")).partition(":")[0])
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
    """Whether an overlay of ``size`` bytes lacks what follows the ``base`` bytes of its revision, within a block."""
    block, end = divmod(base, BLOCK_SIZE)
    if not end or size <= base or block in registry.overlays.present(src):
        return False
    ranges = registry.overlays.ranges(src).get(block, ())
    return not any(start <= end and stop == BLOCK_SIZE for start, stop in ranges)


def complete(instance: Instance, entry: JournalEntry, spool: SpoolFolder) -> None:
    """Bring what the spool file of a put lacks from the stored revision; it is an ordinary spool file then.

    Nothing happens when it is one already. What was brought is noted block by block, so the next try goes on from
    there. Raises storage errors: StorageError when that revision is not there any more; and OSError.
    """
    registry = instance.registry
    if "base" not in entry.payload:
        return
    assert entry.ino is not None
    assert entry.src is not None
    artifact = registry.artifacts.by_ino(entry.ino)
    if artifact is None or not is_based_on(entry, artifact.revision.content):
        raise StorageError(
            f"The revision of '{registry.tree.path(entry.ino) or entry.uid}' that was changed is not there any more, so"
            f" what was written cannot be stored; it is in the spool file {entry.src}."
        )
    with spool.opened(entry.src, os.O_RDWR) as fd:
        size = os.fstat(fd).st_size
        etag = artifact.revision.etag
        ranges = registry.overlays.ranges(entry.src)
        for block in sorted(missing_blocks(registry.overlays.present(entry.src), artifact.size, size)):
            offset, known = block * BLOCK_SIZE, ranges.get(block, ())
            if lacks_some(known, size - offset):
                try:
                    data = _block(instance, artifact.revision, block, etag)
                except ObjectChanged:
                    # A crash between storing an earlier overlay and saying so leaves the object newer than the base;
                    # what this one lacks is in there all the same, as the block's hash proves.
                    etag = instance.store.head(artifact.revision.object_key).etag
                    data = _block(instance, artifact.revision, block, etag)
                for place, piece in unwritten(offset, data[: size - offset], known):
                    copying.write_full(fd, piece, place)
            os.fdatasync(fd)  # a power cut must not leave zeros where the registry says that bytes are
            registry.overlays.add(entry.src, [block])


def _block(instance: Instance, base: Revision, block: int, etag: str) -> bytes:
    """A block of the revision, verified."""
    offset = block * BLOCK_SIZE
    length = min(BLOCK_SIZE, base.size - offset)
    data = instance.store.get(base.object_key, offset=offset, length=length, etag=etag)
    if hashing.hash_block(data) != base.content.block(block):
        raise DamagedData(
            f"Block {block} of the object {instance.store.url(base.object_key)} is not what was saved, so what was"
            " changed beside it cannot be stored; 'lamfs fsck --data' tells more."
        )
    return data
