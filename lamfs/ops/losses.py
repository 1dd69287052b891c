"""Tells a command that stores what is owed which bytes are lost. Synchronous."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lamfs import config
from lamfs.errors import LamfsError
from lamfs.ops import in_use

if TYPE_CHECKING:
    from lamfs.registry import Lost

NAMED = 3
"""Losses that are listed."""


def known(slug: str) -> list[Lost]:
    """The losses of an instance, oldest first, until a repair forgets them; empty when its registry cannot be read."""
    with contextlib.suppress(LamfsError), in_use.looking(config.load_instance(slug), work=False) as registry:
        return registry.rescue.lost()
    return []


def sentences(lost: Sequence[Lost]) -> list[str]:
    """Sentences for people: the last losses, and where the others are listed."""
    lines = [f"LOST: {one.sentence}" for one in lost[-NAMED:]]
    if lost:
        more = f"{len(lost) - NAMED} more are lost; " if len(lost) > NAMED else ""
        lines.append(f"{more}'lamfs status --json' lists what is lost, and 'lamfs fsck --repair' forgets it")
    return lines
