"""Inodes and directory entries: the tree itself, without artifacts. Synchronous; the Database's thread.

Methods that change something must run inside ``Database.transaction()`` (namespace.py does that). They keep nlink and
the parents' times as POSIX.1-2024 requires: a change of entries updates mtime and ctime of the directory, a change of
links updates ctime of the inode.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from typing import Any

from lamfs.errors import FsError
from lamfs.model import AUTO_INO, ROOT_INO, Dentry, Inode
from lamfs.registry.db import Database

_INODE = "ino, mode, uid, gid, nlink, size, atime_ns, mtime_ns, ctime_ns, rdev, revision, blocks"
_JOINED = ", ".join(f"i.{column}" for column in _INODE.split(", "))
_LOOKUP = f"SELECT {_JOINED} FROM dentry d JOIN inode i ON i.ino=d.ino WHERE d.parent=? AND d.name=?"
_GET = f"SELECT {_INODE} FROM inode WHERE ino=?"
_WALK = (
    f"SELECT d.id, d.name, {_JOINED} FROM dentry d JOIN inode i ON i.ino=d.ino"
    " WHERE d.parent=? AND d.id>? AND d.id<=? ORDER BY d.id"
)
_LIST = f"{_WALK} LIMIT ?"
NEWEST = (1 << 63) - 1
"""The largest possible cookie."""
LINK_MAX = 65_000
"""Most names of one inode, as on ext4."""
MAX_DEPTH = 65_536
"""Far more levels than PATH_MAX allows. A longer walk has met a loop, which is damage."""


class Tree:
    """Reads and changes inodes and dentries of one Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # -- reading ------------------------------------------------------------------------------------------------

    def get(self, ino: int) -> Inode | None:
        """One inode."""
        row = self._db.one(_GET, (ino,))
        return None if row is None else Inode(*row)

    def lookup(self, parent: int, name: str) -> Inode | None:
        """The inode of entry ``name`` in directory ``parent``."""
        row = self._db.one(_LOOKUP, (parent, name))
        return None if row is None else Inode(*row)

    def entries(self, parent: int, after: int = 0, limit: int = 1000) -> list[Dentry]:
        """Entries of a directory with a cookie above ``after``, in cookie order."""
        rows = self._db.all(_LIST, (parent, after, NEWEST, limit))
        return [Dentry(row[0], row[1], Inode(*row[2:])) for row in rows]

    def walk(self, parent: int, after: int = 0, last: int = NEWEST) -> Iterator[tuple[int, str, Inode]]:
        """Like ``entries``, but yields (cookie, name, inode) one by one, so a caller that stops early reads only these.

        Nothing may be changed while the iterator is held. ``last``: the highest cookie to return.
        """
        for cookie, name, *columns in self._db.rows(_WALK, (parent, after, last)):
            yield cookie, name, Inode(*columns)

    def newest_cookie(self) -> int:
        """The highest cookie that any entry has had so far."""
        row = self._db.one("SELECT seq FROM sqlite_sequence WHERE name='dentry'")
        return int(row[0]) if row else 0

    def is_empty(self, ino: int) -> bool:
        """Whether a directory has no entries."""
        return self._db.one("SELECT 1 FROM dentry WHERE parent=? LIMIT 1", (ino,)) is None

    def names(self, ino: int) -> list[tuple[int, str]]:
        """All (parent, name) of an inode, the oldest first."""
        return [
            (row[0], row[1]) for row in self._db.all("SELECT parent, name FROM dentry WHERE ino=? ORDER BY id", (ino,))
        ]

    def first_name(self, ino: int) -> tuple[int, str] | None:
        """The oldest (parent, name) of an inode; None if it has no name."""
        row = self._db.one("SELECT parent, name FROM dentry WHERE ino=? ORDER BY id LIMIT 1", (ino,))
        return None if row is None else (row[0], row[1])

    def parent(self, ino: int) -> int | None:
        """The directory of the inode's oldest name; None for the root and for an inode without a name."""
        row = self._db.one("SELECT parent FROM dentry WHERE ino=? ORDER BY id LIMIT 1", (ino,))
        return None if row is None else int(row[0])

    def path(self, ino: int) -> str | None:
        """Key of an inode: the path of its oldest entry from the root (``""`` for the root). None without a name."""
        parts: list[str] = []
        while ino != ROOT_INO:
            row = self._db.one("SELECT parent, name FROM dentry WHERE ino=? ORDER BY id LIMIT 1", (ino,))
            if row is None or len(parts) > MAX_DEPTH:
                return None
            ino = row[0]
            parts.append(row[1])
        return "/".join(reversed(parts))

    def path_at(self, parent: int, name: str) -> str | None:
        """Key of entry ``name`` in directory ``parent``."""
        base = self.path(parent)
        if base is None:
            return None
        return f"{base}/{name}" if base else name

    def resolve(self, key: str) -> Inode | None:
        """The inode at a key (``""``: the root). Symlinks are not followed."""
        inode = self.get(ROOT_INO)
        for name in key.split("/") if key else ():
            if inode is None:
                return None
            inode = self.lookup(inode.ino, name)
        return inode

    def is_below(self, ino: int, ancestor: int) -> bool:
        """Whether ``ino`` is ``ancestor``, or is inside it by its oldest name."""
        for _ in range(MAX_DEPTH):
            if ino == ancestor:
                return True
            up = self.parent(ino)
            if up is None:
                return False
            ino = up
        return False

    def count(self) -> int:
        """Number of inodes."""
        row = self._db.one("SELECT count(*) FROM inode")
        assert row is not None
        return int(row[0])

    def symlink_target(self, ino: int) -> bytes:
        """The target of a symlink. Raises FsError(EINVAL) for another kind."""
        row = self._db.one("SELECT target FROM symlink WHERE ino=?", (ino,))
        if row is None:
            raise FsError(errno.EINVAL)
        return bytes(row[0])

    # -- changing -----------------------------------------------------------------------------------------------

    def new_inode(
        self, mode: int, uid: int, gid: int, *, now: int, rdev: int = 0, target: bytes | None = None
    ) -> Inode:
        """Make an inode without a name (nlink 0)."""
        return self._new_inode(mode, uid, gid, 0, rdev, now, target)

    def new_entry(
        self, parent: int, name: str, mode: int, uid: int, gid: int, *, rdev: int, now: int, target: bytes | None
    ) -> Inode:
        """Make an inode and give it its first name: like new_inode and add_entry, in fewer statements."""
        directory = stat.S_ISDIR(mode)
        inode = self._new_inode(mode, uid, gid, 2 if directory else 1, rdev, now, target)
        self._db.execute("INSERT INTO dentry(parent, name, ino) VALUES(?,?,?)", (parent, name, inode.ino))
        self.touch_directory(parent, now, links=1 if directory else 0)
        return inode

    def _new_inode(self, mode: int, uid: int, gid: int, nlink: int, rdev: int, now: int, target: bytes | None) -> Inode:
        size = len(target) if target is not None else 0
        cursor = self._db.execute(
            "INSERT INTO inode(mode, uid, gid, nlink, size, atime_ns, mtime_ns, ctime_ns, rdev)"
            " VALUES(?,?,?,?,?,?,?,?,?)",
            (mode, uid, gid, nlink, size, now, now, now, rdev),
        )
        assert cursor.lastrowid is not None
        if target is not None:
            self._db.execute("INSERT INTO symlink(ino, target) VALUES(?,?)", (cursor.lastrowid, target))
        return Inode(cursor.lastrowid, mode, uid, gid, nlink, size, now, now, now, rdev)

    def add_entry(self, parent: int, name: str, inode: Inode, now: int) -> None:
        """Give an inode a name. Counts the link, for a directory also the parent's. Updates ``inode`` in place."""
        directory = stat.S_ISDIR(inode.mode)
        if not directory and inode.nlink >= LINK_MAX:
            raise FsError(errno.EMLINK)
        self._db.execute("INSERT INTO dentry(parent, name, ino) VALUES(?,?,?)", (parent, name, inode.ino))
        inode.nlink = 2 if directory else inode.nlink + 1
        inode.ctime_ns = now
        self._db.execute("UPDATE inode SET nlink=?, ctime_ns=? WHERE ino=?", (inode.nlink, now, inode.ino))
        self.touch_directory(parent, now, links=1 if directory else 0)

    def remove_entry(self, parent: int, name: str, inode: Inode, now: int) -> None:
        """Remove a name. The inode row stays, with nlink one less (0 for a directory)."""
        directory = stat.S_ISDIR(inode.mode)
        self._db.execute("DELETE FROM dentry WHERE parent=? AND name=?", (parent, name))
        inode.nlink = 0 if directory else inode.nlink - 1
        inode.ctime_ns = now
        self._db.execute("UPDATE inode SET nlink=?, ctime_ns=? WHERE ino=?", (inode.nlink, now, inode.ino))
        self.touch_directory(parent, now, links=-1 if directory else 0)

    def cookie(self, parent: int, name: str) -> int | None:
        """Cookie of an entry; None if there is no such entry."""
        row = self._db.one("SELECT id FROM dentry WHERE parent=? AND name=?", (parent, name))
        return None if row is None else int(row[0])

    def move_entry(
        self,
        parent: int,
        name: str,
        new_parent: int,
        new_name: str,
        inode: Inode,
        now: int,
        *,
        cookie: int | None = None,
    ) -> None:
        """Rename an entry; the new name must be free. It keeps its cookie, so a program that reads the directory
        meanwhile sees the file once. It also keeps its age among the names of the file.

        ``cookie``: of the entry that had the new name until now. If the file has only one name, that name takes it
        over: so a program that reads the directory finds every name that exists all the time.
        """
        directory = stat.S_ISDIR(inode.mode)
        self._db.execute(
            "UPDATE dentry SET parent=?, name=?, id=coalesce(?, id) WHERE parent=? AND name=?",
            (new_parent, new_name, cookie if directory or inode.nlink == 1 else None, parent, name),
        )
        inode.ctime_ns = now
        self._db.execute("UPDATE inode SET ctime_ns=? WHERE ino=?", (now, inode.ino))
        moved = directory and parent != new_parent
        self.touch_directory(parent, now, links=-1 if moved else 0)
        if parent != new_parent:
            self.touch_directory(new_parent, now, links=1 if moved else 0)

    def exchange_entries(
        self, parent: int, name: str, one: Inode, other_parent: int, other_name: str, two: Inode, now: int
    ) -> None:
        """Exchange the inodes of two names. Cookies stay with the names, so a reader sees each name once."""
        for at, called, inode in ((parent, name, two), (other_parent, other_name, one)):
            self._db.execute("UPDATE dentry SET ino=? WHERE parent=? AND name=?", (inode.ino, at, called))
            self._db.execute("UPDATE inode SET ctime_ns=? WHERE ino=?", (now, inode.ino))
            inode.ctime_ns = now
        gained = int(stat.S_ISDIR(two.mode)) - int(stat.S_ISDIR(one.mode)) if parent != other_parent else 0
        self.touch_directory(parent, now, links=gained)
        if parent != other_parent:
            self.touch_directory(other_parent, now, links=-gained)

    def touch_directory(self, ino: int, now: int, *, links: int = 0) -> None:
        """Mark a directory's entries as changed at ``now``."""
        self._db.execute("UPDATE inode SET mtime_ns=?, ctime_ns=?, nlink=nlink+? WHERE ino=?", (now, now, links, ino))

    def update(self, ino: int, **columns: int | None) -> None:
        """Set columns of an inode (mode, uid, gid, size, atime_ns, mtime_ns, ctime_ns, revision, blocks)."""
        names = ", ".join(f"{name}=?" for name in columns)
        self._db.execute(f"UPDATE inode SET {names} WHERE ino=?", (*columns.values(), ino))

    def bump_revision(self, ino: int) -> None:
        """Count a content revision that the mounts which show this inode did not make."""
        self._db.execute("UPDATE inode SET revision=revision+1 WHERE ino=?", (ino,))

    def rewritten(self, inode: Inode) -> int:
        """New bytes are acknowledged: store size, blocks and times of ``inode``, and count a revision. Returns its
        number; 0: there is no such inode."""
        row = self._db.one(
            "UPDATE inode SET size=?, blocks=?, mtime_ns=?, ctime_ns=?, revision=revision+1 WHERE ino=?"
            " RETURNING revision",
            (inode.size, inode.blocks, inode.mtime_ns, inode.ctime_ns, inode.ino),
        )
        return int(row[0]) if row else 0

    def remove_inode(self, ino: int) -> dict[str, bytes]:
        """Remove an inode, its symlink target and its xattrs. Returns the xattrs. The two fixed directories stay."""
        if ino in (ROOT_INO, AUTO_INO):
            raise FsError(errno.EBUSY)
        self._db.execute("DELETE FROM inode WHERE ino=?", (ino,))
        self._db.execute("DELETE FROM symlink WHERE ino=?", (ino,))
        return {
            name: bytes(value)
            for name, value in self._db.all("DELETE FROM xattr WHERE ino=? RETURNING name, value", (ino,))
        }

    # -- extended attributes ------------------------------------------------------------------------------------

    def xattr(self, ino: int, name: str) -> bytes | None:
        """Value of one extended attribute."""
        row = self._db.one("SELECT value FROM xattr WHERE ino=? AND name=?", (ino, name))
        return None if row is None else bytes(row[0])

    def xattrs(self, ino: int) -> dict[str, int]:
        """Names of an inode's extended attributes, with the sizes of their values in bytes."""
        rows: list[tuple[Any, ...]] = self._db.all(
            "SELECT name, length(value) FROM xattr WHERE ino=? ORDER BY name", (ino,)
        )
        return {row[0]: row[1] for row in rows}

    def take_xattr(self, ino: int, name: str) -> bytes | None:
        """Remove an extended attribute. Returns its value; None if there was none."""
        value = self.xattr(ino, name)
        if value is not None:
            self.remove_xattr(ino, name)
        return value

    def set_xattr(self, ino: int, name: str, value: bytes) -> None:
        """Set an extended attribute."""
        self._db.execute(
            "INSERT INTO xattr(ino, name, value) VALUES(?,?,?)"
            " ON CONFLICT(ino, name) DO UPDATE SET value=excluded.value",
            (ino, name, value),
        )

    def remove_xattr(self, ino: int, name: str) -> bool:
        """Remove an extended attribute. Returns False if there was none."""
        return self._db.execute("DELETE FROM xattr WHERE ino=? AND name=?", (ino, name)).rowcount > 0
