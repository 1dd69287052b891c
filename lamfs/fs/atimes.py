"""Access times, as Linux's ``relatime`` keeps them (mount(8)). Loop only.

The kernel leaves atime to the file system, and asks again after each read that reached it. A read updates the atime if
the file was changed since it was last read, or was last read a day ago. The new times are kept in memory and written to
the registry now and then. So no read waits for a transaction, and a crash loses nothing but access times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamfs.model import Inode, now_ns

if TYPE_CHECKING:
    from lamfs.registry.verbs import Verbs


DAY_NS = 86_400 * 10**9
FLUSH = 5.0
"""Seconds after which new times are in the registry."""


class Atimes:
    """Access times that the registry does not have yet, by registry inode number."""

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._times: dict[int, int] = {}

    def is_due(self, inode: Inode) -> bool:
        """Whether reading it now would change its access time."""
        if not self._keep:
            return False
        self.show(inode)
        return inode.atime_ns <= max(inode.mtime_ns, inode.ctime_ns) or inode.atime_ns < now_ns() - DAY_NS

    def read(self, inode: Inode) -> None:
        """It has been read. Updates ``inode`` in place."""
        if self.is_due(inode):
            inode.atime_ns = self._times[inode.ino] = now_ns()

    def show(self, inode: Inode) -> None:
        """Update attributes that came from the registry."""
        time = self._times.get(inode.ino)
        if time is not None:
            inode.atime_ns = time

    def forget(self, ino: int) -> None:
        """Somebody set its time, or it is gone."""
        self._times.pop(ino, None)

    def flush(self, registry: Verbs) -> None:
        """Write the new times to the registry. For others this is no change: no cache needs to be invalidated."""
        if self._times:
            registry.attributes.set_atimes(self._times)
            self._times.clear()
