"""Scratch names: what editors and desktops drop beside a file, and what never becomes an artifact. Pure functions.

A pattern is of one name: ``*`` is any characters, ``?`` one, ``[…]`` one of a set (fnmatch(3)). A directory of such a
name makes everything below it scratch.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

from lamfs.errors import InvalidArgument

DEFAULT = (".*.sw?", "4913", "*~", ".#*", ".~lock.*#", ".DS_Store", "._*", ".nfs*", ".Trash-*")
"""vim's swap files and its probe, backups, emacs's locks, LibreOffice's locks, macOS, NFS, desktops' trash cans."""

Matcher = Callable[[str], bool]
"""Says of a key whether it is scratch."""


def nothing(key: str) -> bool:
    """The matcher of an empty list."""
    return False


def check(pattern: str) -> str:
    """A pattern that can name something. Raises InvalidArgument."""
    if not pattern or "/" in pattern or "\0" in pattern or not pattern.isprintable() or pattern in (".", ".."):
        raise InvalidArgument(f"{pattern!r} is no pattern of a name; give one such as '*~' or '.*.sw?', without '/'.")
    if not pattern.strip("*?"):
        raise InvalidArgument(f"'{pattern}' would make every file scratch; give a pattern that names some.")
    return pattern


def matcher(patterns: Iterable[str]) -> Matcher:
    """Whether any part of a key matches any of the patterns."""
    one = "|".join(fnmatch.translate(pattern) for pattern in patterns)
    if not one:
        return nothing
    matches = re.compile(one).match

    def is_scratch(key: str) -> bool:
        return any(matches(part) for part in key.split("/"))

    return is_scratch
