"""FUSE inode numbers and lookup counts. Loop only.

A FUSE inode number is the registry's inode number, with one exception: when somebody else makes a new revision of a
file that the kernel knows, the revision gets a new number. So the kernel never mixes old size and new bytes
(docs/decisions/pyfuse3-loop.md). Each number stands for the revision (``Inode.revision``) with which the kernel first
got it. Lookup counts are exact: what the kernel has forgotten is forgotten here.
"""

from __future__ import annotations

from lamfs.model import ROOT_INO, Inode

ALIAS_BASE = 1 << 48
"""FUSE inode numbers from here on are later revisions of an inode."""
CONTROL_BASE = 1 << 62
"""FUSE inode numbers from here on are control files (control.py)."""
MIN_PEAK = 4096


class NodeTable:
    """Which FUSE inode numbers the kernel knows, how often it looked them up, and what they mean."""

    def __init__(self) -> None:
        self._lookups: dict[int, int] = {}
        self._alias: dict[int, int] = {}
        self._current: dict[int, int] = {}
        self._kin: dict[int, set[int]] = {}
        self._next_alias = ALIAS_BASE
        self._peak = MIN_PEAK
        self._revision: dict[int, int] = {}
        """The revision of each number of ``_lookups``, unless it is revision 0, as for most."""
        self.ghosts: dict[int, Inode] = {}
        """Attributes of inodes whose registry row is gone while the kernel still knows them."""
        self.ghost_xattrs: dict[int, dict[str, bytes]] = {}
        """Extended attributes of such inodes."""
        self.unlinked: set[int] = set()
        """Inodes that lost their last name through this mount, while the kernel still knows them."""

    def ino(self, fino: int) -> int:
        """The registry inode number of a FUSE inode number."""
        return self._alias.get(fino, fino) if fino >= ALIAS_BASE else fino

    def fino(self, ino: int) -> int:
        """The FUSE inode number under which an inode is shown now."""
        return self._current.get(ino, ino)

    def is_current(self, fino: int) -> bool:
        """Whether the number still stands for the newest revision of its inode."""
        return self._current.get(self.ino(fino), self.ino(fino)) == fino

    def known(self, fino: int) -> bool:
        """Whether the kernel has looked this number up and not forgotten it; it always knows the root."""
        return fino in self._lookups or fino == ROOT_INO

    def looked_up(self, fino: int, revision: int) -> None:
        """Count one lookup, with which the kernel got attributes of this revision."""
        count = self._lookups.get(fino, 0)
        self._lookups[fino] = count + 1
        if not count:
            if revision:
                self._revision[fino] = revision
            if len(self._lookups) > self._peak:
                self._peak = len(self._lookups)

    def outdated(self, fino: int, revision: int) -> bool:
        """Whether the kernel knows another revision by this number."""
        return self._revision.get(fino, 0) != revision and fino in self._lookups

    def revised(self, fino: int) -> None:
        """This mount itself has made the next revision, and shows it under the same number."""
        if fino in self._lookups:
            self._revision[fino] = self._revision.get(fino, 0) + 1

    def forget(self, fino: int, count: int) -> bool:
        """Subtract ``count`` lookups. Returns whether the kernel does not know the number any more."""
        left = self._lookups.get(fino, 0) - count
        if left > 0:
            self._lookups[fino] = left
            return False
        self._lookups.pop(fino, None)
        self._revision.pop(fino, None)
        self._shrink()
        ino = self.ino(fino)
        kin = self._kin.get(ino, set())
        if self.known(ino) or any(map(self.known, kin)):
            # An older revision is still open somewhere: its number must never stand for the newest one again.
            if self._current.get(ino) != fino and fino in kin:
                kin.remove(fino)
                del self._alias[fino]
            return True
        for alias in kin:
            self._alias.pop(alias, None)
        self._kin.pop(ino, None)
        self._current.pop(ino, None)
        self.ghosts.pop(ino, None)
        self.ghost_xattrs.pop(ino, None)
        self.unlinked.discard(ino)
        return True

    def _shrink(self) -> None:
        """A dict keeps the memory of its largest size. After many entries have gone, move the others to a new one."""
        if len(self._lookups) < self._peak // 4:
            self._lookups, self._revision = dict(self._lookups), dict(self._revision)
            self._peak = max(len(self._lookups), MIN_PEAK)

    def supersede(self, ino: int) -> int | None:
        """A new revision of ``ino`` came from elsewhere: later lookups get another number.

        Returns the number that the kernel knew so far; None when it knows none, and nothing has to be done.
        """
        old = self.fino(ino)
        if not self.known(old):
            return None
        fino = self._next_alias
        self._next_alias += 1
        self._alias[fino] = ino
        self._current[ino] = fino
        self._kin.setdefault(ino, set()).add(fino)
        return old

    def all_known(self) -> list[int]:
        """Every number that the kernel knows."""
        return list(self._lookups)

    def __len__(self) -> int:
        return len(self._lookups)
