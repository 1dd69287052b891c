"""Backups that programs make of a file before they rewrite it: which name is still the file. Loop only.

Editors and ``sed -i.bak`` rename ``x`` to ``x~`` or ``x.bak`` and make a new ``x``. perl and GLib give ``x`` the other
name by link(2), and rename a new file over ``x``. For users, the artifact is what is at ``x``, and the backup is a copy
of its old content. A file that was renamed aside is remembered for a few seconds, in memory: the two steps of a save
follow each other at once.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from lamfs.registry import Backup

SECONDS = 10.0
"""Seconds for which a file that was renamed aside can turn out to be the backup of another one."""
KEPT = re.compile(r"(~|\.~[^/]*~|\.bak|\.orig|\.old|\.backup|\.save)\Z", re.IGNORECASE)
"""Suffixes of kept backups: emacs (also numbered), nano, kate, sed, perl."""


def is_backup(at: str, name: str) -> bool:
    """Whether ``at`` is a name for a kept backup of ``name``."""
    return at.startswith(name) and KEPT.match(at, len(name)) is not None


@dataclass(slots=True)
class Aside:
    """A file that has left the name ``name`` in directory ``parent``, and is at ``at`` now (``""``: not known)."""

    backup: Backup
    parent: int
    name: str
    at: str
    since: float
    handed: bool = False
    """The new file at the old name has its artifact now."""


class Backups:
    """Files that were put aside a moment ago, by inode. Directories are registry inode numbers."""

    def __init__(self) -> None:
        self._by_ino: dict[int, Aside] = {}
        self._by_place: dict[tuple[int, str], Aside] = {}

    def put_aside(self, backup: Backup, parent: int, name: str, at: str = "") -> None:
        """The file ``backup`` has just lost the name ``name``."""
        old = time.monotonic() - SECONDS
        while self._by_ino and (first := next(iter(self._by_ino.values()))).since < old:
            self._drop(first)
        before = self._by_ino.get(backup.ino)
        if before is not None:
            self._drop(before)
        aside = Aside(backup, parent, name, at, time.monotonic())
        self._by_ino[backup.ino] = self._by_place[parent, name] = aside

    def _drop(self, aside: Aside) -> None:
        self._by_ino.pop(aside.backup.ino, None)
        if self._by_place.get((aside.parent, aside.name)) is aside:
            del self._by_place[aside.parent, aside.name]

    def kept(self, parent: int, name: str) -> Backup | None:
        """A new file is about to get this name: the kept backup of the file that was there.

        It must be in the same directory, with the name of a backup.
        """
        aside = self._by_place.get((parent, name))
        if aside is None or aside.handed or aside.since < time.monotonic() - SECONDS:
            return None
        return aside.backup if is_backup(aside.at, name) else None

    def handed(self, backup: Backup) -> None:
        """The new file has got this file's artifact."""
        self._by_ino[backup.ino].handed = True

    def place(self, backup: Backup) -> tuple[int, str]:
        """The (parent, name) at which a kept backup is."""
        aside = self._by_ino[backup.ino]
        return aside.parent, aside.at

    def is_copy(self, ino: int, name: str) -> bool:
        """Whether the file at ``name`` is a backup whose artifact went to the new file: only the backup is lost."""
        aside = self._recent(ino)
        return aside is not None and aside.handed and aside.at == name

    def left(self, ino: int, name: str) -> tuple[int, str] | None:
        """The file ``ino`` is about to lose ``name``: the (parent, name) that it left before, if this is its backup."""
        aside = self._recent(ino)
        if aside is None or aside.handed or not (aside.name in name or aside.at == name):
            return None
        return aside.parent, aside.name

    def _recent(self, ino: int) -> Aside | None:
        aside = self._by_ino.get(ino)
        return aside if aside is not None and aside.since >= time.monotonic() - SECONDS else None
