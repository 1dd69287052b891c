"""The next entries of a directory, with their revisions: for prefetch. Synchronous; the Database's thread.

Programs go through a directory by name (``ls``, a shell's ``*``, rsync) or in the order of readdir (find, tar, grep
-r), which is the order of cookies.
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from lamfs.model import ContentHash, Revision
from lamfs.registry.db import Database

_SELECT = (
    "SELECT d.id, d.name, d.ino, i.mode, r.size, r.hash, r.hash_type, r.blocks, r.object_key, r.etag"
    " FROM dentry d JOIN inode i ON i.ino=d.ino LEFT JOIN artifact a ON a.ino=d.ino"
    " LEFT JOIN revision r ON r.id=a.revision_id AND r.size<=? WHERE d.parent=?"
)
_BY_NAME = f"{_SELECT} AND d.name>? ORDER BY d.name LIMIT ?"
_BY_COOKIE = f"{_SELECT} AND d.id>? ORDER BY d.id LIMIT ?"


class Place(NamedTuple):
    """One name of a file, or of a directory."""

    parent: int
    name: str
    cookie: int


class Sibling(NamedTuple):
    """An entry of a directory. ``revision``: what is stored of it, if that is not larger than the given limit."""

    place: Place
    ino: int
    directory: bool
    revision: Revision | None


class Siblings:
    """Reads the entries of one Database's directories in either order."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def place(self, ino: int) -> Place | None:
        """The oldest name of an inode; None if it has no name."""
        row = self._db.one("SELECT parent, name, id FROM dentry WHERE ino=? ORDER BY id LIMIT 1", (ino,))
        return None if row is None else Place(*row)

    def has_more(self, directory: int, count: int) -> bool:
        """Whether a directory has more than ``count`` entries."""
        row = self._db.one("SELECT count(*) FROM (SELECT 1 FROM dentry WHERE parent=? LIMIT ?)", (directory, count + 1))
        return row is not None and row[0] > count

    def after(self, place: Place, count: int, *, by_name: bool, most: int) -> list[Sibling]:
        """The ``count`` entries that follow ``place`` in its directory, with revisions of up to ``most`` bytes.

        A name ``""`` or a cookie 0 comes before all entries.
        """
        if by_name:
            rows = self._db.all(_BY_NAME, (most, place.parent, place.name, count))
        else:
            rows = self._db.all(_BY_COOKIE, (most, place.parent, place.cookie, count))
        return [
            Sibling(
                Place(place.parent, name, cookie),
                ino,
                stat.S_ISDIR(mode),
                None if key is None else Revision(ContentHash(size, hash_, kind, bytes(blocks)), key, etag),
            )
            for cookie, name, ino, mode, size, hash_, kind, blocks, key, etag in rows
        ]
