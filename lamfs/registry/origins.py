"""Where a registry comes from: its own record of that, and the pushes that are its ancestors. Pure."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

PUSHES = "pushes"
"""Key of the meta table: JSON, the names of the pushes that a registry comes from, newest first."""
PUSHES_KEPT = 64
FENCE = "fence"
"""Key of the meta table: the number of the lease under which the registry was changed last."""
SOURCE = "taken"
"""Key of the meta table: the ETag of the copy in storage that a working copy was made of."""
PUSH = re.compile("[0-9a-f]{16}")
"""The name of a push: random."""


class About(NamedTuple):
    """The instance of a registry. ``slug``: ``owner/name``; ``uid``: of its default storage's row; ``root``: where that
    storage is. None: the registry does not say, or not in words."""

    slug: str | None
    uid: str | None
    root: str | None


class Origin(NamedTuple):
    """A registry's own record of where it comes from.

    ``slug``: the instance, ``owner/name``. ``uid``: of its default storage's row, 12 random characters, made with the
    instance. ``root``: where that storage was when the file was written. ``version``: of its schema. ``changes``: how
    many changes of the tree it has seen, on all machines. ``pushes``: the random names of the pushes that it comes
    from, its own first; none from an older lamfs. ``fence``: the number of the lease under which it was written, 0 from
    an older lamfs.
    """

    slug: str
    uid: str | None
    root: str | None
    version: int
    changes: int = 0
    pushes: tuple[str, ...] = ()
    fence: int = 0


def pushes_of(value: object) -> tuple[str, ...]:
    """The names in the meta row PUSHES; none if the row does not have lamfs's format."""
    try:
        found = json.loads(value) if isinstance(value, str) else []
    except (ValueError, RecursionError):
        return ()
    if not isinstance(found, list) or not all(isinstance(name, str) and PUSH.fullmatch(name) for name in found):
        return ()
    return tuple(found[:PUSHES_KEPT])
