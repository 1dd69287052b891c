"""Scratch names: what programs drop beside a file for themselves, and what never becomes an artifact. Pure functions.

Only names that no person gives are on the list that lamfs comes with. ``x~`` is a backup that somebody may want, and
``4913`` a gene, a patient or a chunk of an array. A pattern is of a file's own name: ``*`` is any characters, ``?``
one, ``[…]`` one of a set (fnmatch(3)). The directories above do not count, whatever they are called.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

from lamfs.errors import InvalidArgument

DEFAULT = (".*.sw?", ".#*", ".~lock.*#", ".DS_Store", "._*", ".nfs*")
"""vim's swap files, emacs's locks, LibreOffice's locks, macOS, NFS."""

PROBE_SECONDS = 60.0
"""So long an empty file with the name of a probe is not stored: vim removes its own at once."""
_PROBE = "4913"
"""What vim makes, empty, to see whether it may write to a directory (vim's fileio.c, buf_write)."""

Matcher = Callable[[str], bool]
"""Says of a name whether it is scratch."""


def is_probe(name: str) -> bool:
    """Whether an empty file of this name may be a probe, which is gone again in a moment."""
    return name == _PROBE


def nothing(name: str) -> bool:
    """The matcher of an empty list."""
    return False


def check(pattern: str) -> str:
    """A pattern that can name something. Raises InvalidArgument."""
    if not pattern or "/" in pattern or "\0" in pattern or not pattern.isprintable() or pattern in (".", ".."):
        raise InvalidArgument(f"{pattern!r} is no pattern of a name; give one such as '*.tmp', without '/'.")
    if not pattern.strip("*?"):
        raise InvalidArgument(f"'{pattern}' would make every file scratch; give a pattern that names some.")
    return pattern


def matcher(patterns: Iterable[str]) -> Matcher:
    """Whether a name matches any of the patterns."""
    one = "|".join(fnmatch.translate(pattern) for pattern in patterns)
    if not one:
        return nothing
    matches = re.compile(one).match

    def is_scratch(name: str) -> bool:
        return matches(name) is not None

    return is_scratch
