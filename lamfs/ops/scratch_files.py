"""Scratch files that hold bytes: they are on this machine only, and whoever leaves it is told. Synchronous."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError
from lamfs.ops import written

NAMED = 3
"""Files that a sentence names."""


def known(settings: InstanceSettings) -> list[tuple[str, int]]:
    """Key and size in bytes of each; nothing when the registry cannot be read."""
    with contextlib.suppress(LamfsError), contextlib.closing(written.open_registry(settings)) as registry:
        return registry.names.scratch_files()
    return []


def sentence(files: Sequence[tuple[str, int]]) -> str:
    """What a person is told of them. ``files``: at least one."""
    named = ", ".join(f"'{key}'" for key, _ in files[:NAMED])
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    verb, total = "is" if len(files) == 1 else "are", sum(size for _, size in files)
    return (
        f"{named}{more} {verb} on this machine only, with {total} bytes: these are scratch names, which 'lamfs scratch'"
        " lists; rename what you want to keep."
    )
