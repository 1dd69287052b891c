"""Names lost bytes to the command that stores the rest. Synchronous."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lamfs import config
from lamfs.errors import LamfsError
from lamfs.ops import written

if TYPE_CHECKING:
    from lamfs.registry import Lost

NAMED = 3
"""Losses that are lines one by one."""


def known(slug: str) -> list[Lost]:
    """What an instance has lost, oldest first, until somebody forgets it; nothing when its registry cannot be read."""
    with contextlib.suppress(LamfsError):
        with contextlib.closing(written.open_registry(config.load_instance(slug))) as registry:
            return registry.rescue.lost()
    return []


def sentences(lost: Sequence[Lost]) -> list[str]:
    """What a person is told of it: the last ones, and where the others are."""
    lines = [f"LOST: {one.sentence}" for one in lost[-NAMED:]]
    if lost:
        more = f"{len(lost) - NAMED} more are lost; " if len(lost) > NAMED else ""
        lines.append(f"{more}'lamfs status --json' lists what is lost, and 'lamfs fsck --repair' forgets it")
    return lines
