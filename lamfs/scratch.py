"""Scratch names: files that programs make for themselves, and that never become artifacts. Pure functions.

The default list has only names that no person gives. ``x~`` is a backup that somebody may want, and ``4913`` may be a
gene, a patient or a chunk of an array. A pattern applies to a file's own name: ``*`` is any characters, ``?`` is one,
``[…]`` is one of a set (fnmatch(3)). The names of the directories above it do not count.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

from lamfs.errors import InvalidArgument

DEFAULT = (".*.sw?", ".#*", ".~lock.*#", ".DS_Store", "._*", ".nfs*")
"""vim's swap files, emacs's locks, LibreOffice's locks, macOS, NFS."""

PROBE_SECONDS = 60.0
"""Seconds for which an empty file with the name of a probe is not stored. vim removes its own at once."""
_PROBE = "4913"
"""vim makes it, empty, to test whether it may write to a directory (vim's fileio.c, buf_write)."""

Matcher = Callable[[str], bool]
"""Tells whether a name is scratch."""


def is_probe(name: str) -> bool:
    """Whether an empty file with this name may be a probe, which will be gone in a moment."""
    return name == _PROBE


def nothing(name: str) -> bool:
    """The matcher of an empty list."""
    return False


def check(pattern: str) -> str:
    """Check that a pattern is valid and does not match every name. Raises InvalidArgument."""
    if not pattern or "/" in pattern or "\0" in pattern or not pattern.isprintable() or pattern in (".", ".."):
        raise InvalidArgument(f"{pattern!r} is no pattern of a name; give one such as '*.tmp', without '/'.")
    if not pattern.strip("*?"):
        raise InvalidArgument(f"'{pattern}' would make every file scratch; give a pattern that names some.")
    return pattern


def matcher(patterns: Iterable[str]) -> Matcher:
    """A Matcher for names that match any of the patterns."""
    one = "|".join(fnmatch.translate(pattern) for pattern in patterns)
    if not one:
        return nothing
    matches = re.compile(one).match

    def is_scratch(name: str) -> bool:
        return matches(name) is not None

    return is_scratch
