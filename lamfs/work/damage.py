"""Spool files that changed after they were closed. Synchronous; the thread of the Registry."""

from __future__ import annotations

from collections.abc import Collection

from lamfs.errors import StorageError
from lamfs.model import ContentHash
from lamfs.registry import Registry
from lamfs.registry.entries import Put


def compare(registry: Registry, entry: Put, content: ContentHash) -> list[int] | None:
    """Compare a put's spool file, whose hashes are now ``content``, with what was written. Records and returns the
    blocks that differ.

    None: the file is sound, as before. Then these hashes become its seal. For a partial spool they include the blocks
    that it lacks, which come from its base revision.
    """
    seal, known = registry.seals.of(entry.src), entry.damaged
    if seal is None and known:
        return sorted(known)
    blocks = [] if seal is None else seal.broken(content)
    if not blocks:
        registry.seals.complete(entry, content, seal)
    if set(blocks) != known:
        registry.seals.set_damaged(entry.id, blocks)
    return blocks if blocks or known else None


def error(name: str, path: str, blocks: Collection[int]) -> StorageError:
    """The error for a spool file with damaged blocks."""
    which = (
        f"block {min(blocks)}" if len(blocks) == 1 else f"{len(blocks)} blocks, the first is {min(blocks)}, of 4 MiB"
    )
    return StorageError(
        f"The spool file {path} of '{name}' is not what was written ({which}): its disk has changed it, so it is not"
        " stored. Write the file again or delete it; or unmount with --force, and 'lamfs fsck --repair' keeps what is"
        " left of it in lost+found."
    )
