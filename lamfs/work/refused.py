"""The message about files that storage can never take. Synchronous; the thread of the Registry."""

from __future__ import annotations

from collections.abc import Sequence

from lamfs.registry import Registry
from lamfs.registry.entries import Put

NAMED = 3
"""Files that are named besides the first."""


def sentence(registry: Registry, entries: Sequence[Put]) -> str:
    """Why the first of these puts is not stored, and which others are not stored for the same reason."""
    first, *others = entries
    names = [f"'{_name(registry, entry)}'" for entry in others[:NAMED]]
    if len(others) > NAMED:
        left = len(others) - NAMED
        names.append(f"{left} more files" if left > 1 else "one more file")
    more = ""
    if names:
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        more = f" The same is true of {listed}."
    why = first.error or f"'{_name(registry, first)}' is more than storage takes of one file; make it smaller."
    return f"{why} Until then it is not stored, and stays in the spool.{more}"


def _name(registry: Registry, entry: Put) -> str:
    return registry.tree.path(entry.ino) or entry.about
