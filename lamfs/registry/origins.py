"""Where a registry comes from: what it says of itself, and the pushes that are its ancestors. Pure."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

PUSHES = "pushes"
"""Key of the meta table: JSON, the names of the pushes that a registry comes from, the newest first."""
PUSHES_KEPT = 64
FENCE = "fence"
"""Key of the meta table: the number of the lease under which the registry was changed last."""
SOURCE = "taken"
"""Key of the meta table: the ETag of the copy in storage that a working copy was made of."""
PUSH = re.compile("[0-9a-f]{16}")
"""A name of a push: random."""


class About(NamedTuple):
    """The instance of a registry. ``slug``: ``owner/name``; ``uid``: of its default storage's row; ``root``: where that
    storage is. None: the registry does not say, or not in words."""

    slug: str | None
    uid: str | None
    root: str | None


class Origin(NamedTuple):
    """What a registry says of itself. ``slug``: the instance, ``owner/name``; ``uid``: of its default storage's row, 12
    random characters, made when the instance was; ``root``: where that storage was when the file was written.
    ``version``: of its schema. ``changes``: how many changes of the tree it has seen, of all machines. ``pushes``: the
    random names of the pushes that it comes from, its own first; none of an older lamfs. ``fence``: the number of the
    lease under which it was written, 0 of an older lamfs."""

    slug: str
    uid: str | None
    root: str | None
    version: int
    changes: int = 0
    pushes: tuple[str, ...] = ()
    fence: int = 0


def pushes_of(value: object) -> tuple[str, ...]:
    """What the meta row PUSHES says; nothing when it is not as lamfs writes it."""
    try:
        found = json.loads(value) if isinstance(value, str) else []
    except (ValueError, RecursionError):
        return ()
    if not isinstance(found, list) or not all(isinstance(name, str) and PUSH.fullmatch(name) for name in found):
        return ()
    return tuple(found[:PUSHES_KEPT])
