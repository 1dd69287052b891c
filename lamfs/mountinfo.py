"""The kernel's table of mounts, as /proc/<pid>/mountinfo shows it (proc_pid_mountinfo(5)). Any thread."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

OWN = "/proc/self/mountinfo"
"""The table of this process's mount namespace."""


class Mounted(NamedTuple):
    """One line: mount point, the file system's type and source, its device (major:minor), and the mount's id."""

    path: str
    fstype: str
    source: str
    device: str = ""
    id: int = 0

    @property
    def is_lamfs(self) -> bool:
        """Whether lamfs mounted this."""
        return self.fstype == "fuse.lamfs" or (self.fstype.startswith("fuse") and self.source == "lamfs")


def table(path: str = OWN) -> list[Mounted]:
    """All mounts, later ones on top of earlier ones. Raises OSError."""
    mounts = []
    with open(path, "rb") as lines:
        for line in lines:
            before, _, after = line.partition(b" - ")
            fields, rest = before.split(), after.split()
            place, fstype, source = _plain(fields[4]), _plain(rest[0]), _plain(rest[1])
            mounts.append(Mounted(place, fstype, source, fields[2].decode(), int(fields[0])))
    return mounts


def at(path: str) -> Mounted | None:
    """The topmost mount at exactly this path; None: nothing is mounted there. Raises OSError."""
    return next((mounted for mounted in reversed(table()) if mounted.path == path), None)


def _plain(field: bytes) -> str:
    """A field without its octal escapes."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))
