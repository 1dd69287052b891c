"""What is done when a spool file is not what it was when it was closed. Synchronous; the thread of the Registry."""

from __future__ import annotations

from collections.abc import Collection

from lamfs.errors import StorageError
from lamfs.model import ContentHash
from lamfs.registry import Registry, Seal
from lamfs.registry.entries import Put


def compare(registry: Registry, entry: Put, content: ContentHash) -> list[int] | None:
    """Blocks of a put's spool file, whose hashes are ``content`` now, that are not what was written; noted in its row.

    None: what is known of it has not changed, and it is sound. Then these hashes are its seal from now on: also of what
    it lacks as a partial spool, which comes from the revision that it lies over.
    """
    seal, known = registry.seals.of(entry.src), entry.damaged
    if seal is None and known:
        return sorted(known)
    blocks = [] if seal is None else seal.broken(content)
    if not blocks:
        _seal(registry, entry, content, seal)
    if set(blocks) != known:
        registry.seals.set_damaged(entry.id, blocks)
    return blocks if blocks or known else None


def _seal(registry: Registry, entry: Put, content: ContentHash, known: Seal | None) -> None:
    if known is None or not known.is_whole:
        registry.seals.add(entry, content.size, content.blocks)


def error(name: str, path: str, blocks: Collection[int]) -> StorageError:
    """What is said of it."""
    which = (
        f"block {min(blocks)}" if len(blocks) == 1 else f"{len(blocks)} blocks, the first is {min(blocks)}, of 4 MiB"
    )
    return StorageError(
        f"The spool file {path} of '{name}' is not what was written ({which}): its disk has changed it, so it is not"
        " stored. Write the file again or delete it; or unmount with --force, and 'lamfs fsck --repair' keeps what is"
        " left of it in lost+found."
    )
