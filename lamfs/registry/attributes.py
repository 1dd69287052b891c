"""Attributes of inodes: mode, owner, times, extended attributes, and an artifact's description, which is shown as one.

Synchronous; the Database's thread. Each method is one transaction, with its change-log rows. Times are in nanoseconds
since the epoch.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from lamfs.errors import FsError
from lamfs.model import DESCRIPTION_XATTR
from lamfs.registry.artifacts import Artifacts
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.tree import Tree

LIST_MAX = 65_536
"""Bytes of the names of all extended attributes of a file, each with a zero after it: the kernel's XATTR_LIST_MAX."""


class Attributes:
    """Changes attributes of the inodes of one Database."""

    def __init__(self, db: Database, tree: Tree, artifacts: Artifacts, changes: ChangeLog) -> None:
        self._db = db
        self._tree = tree
        self._artifacts = artifacts
        self._changes = changes

    def set_attributes(self, ino: int, **columns: int) -> None:
        """Set mode, uid, gid, size or times of an inode, and log it."""
        with self._db.transaction():
            self._tree.update(ino, **columns)
            self._changes.attr(ino)

    def set_atimes(self, times: Mapping[int, int]) -> None:
        """Set access times by inode number. The change log does not hear of it: no cache needs to be invalidated."""
        with self._db.transaction():
            for ino, atime_ns in times.items():
                self._tree.update(ino, atime_ns=atime_ns)

    def set_xattr(self, ino: int, name: str, value: bytes, *, now: int) -> None:
        """setxattr(2) of an attribute that is kept as it is. Raises FsError(ENOSPC): the list of names is full."""
        with self._db.transaction():
            check_list([other for other in self._tree.xattrs(ino) if other != name], name)
            self._tree.set_xattr(ino, name, value)
            self._changed(ino, now)

    def remove_xattr(self, ino: int, name: str, *, now: int) -> None:
        """removexattr(2) of such an attribute. Raises FsError(ENODATA): there is none."""
        with self._db.transaction():
            if not self._tree.remove_xattr(ino, name):
                raise FsError(errno.ENODATA)
            self._changed(ino, now)

    def describe(self, ino: int, description: str, *, now: int) -> None:
        """Set the description of the artifact of a file (``""``: none). A file that is no artifact yet keeps it as an
        extended attribute, and the artifact gets it with the first revision."""
        with self._db.transaction():
            artifact = self._artifacts.by_ino(ino)
            if artifact is not None:
                self._artifacts.update(artifact.uid, description=description or None, updated_at=now)
            elif description:
                self._tree.set_xattr(ino, DESCRIPTION_XATTR, description.encode())
            else:
                self._tree.remove_xattr(ino, DESCRIPTION_XATTR)
            self._changes.record(ino)

    def _changed(self, ino: int, now: int) -> None:
        self._tree.update(ino, ctime_ns=now)
        self._changes.attr(ino)


def check_list(others: list[str], name: str) -> None:
    """Raise FsError(ENOSPC) when a file with the attributes ``others`` cannot have ``name`` too."""
    if sum(len(each.encode()) + 1 for each in (*others, name)) > LIST_MAX:
        raise FsError(errno.ENOSPC)
