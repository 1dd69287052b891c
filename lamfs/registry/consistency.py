"""Do the rows of a registry agree with each other? What a check looks for, and repairs. The Database's thread."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lamfs.model import AUTO_INO, ROOT_INO
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.journal import Journal
from lamfs.registry.tree import Tree

MOST_ERRORS = 20
"""Errors of the file that SQLite lists before it stops."""

_TYPE = f"mode & {0o170000}"
_TREE_QUERIES = (
    ("entry '{1}' of directory {0} names inode {2}, which does not exist",
     "SELECT d.parent, d.name, d.ino FROM dentry d LEFT JOIN inode i ON i.ino=d.ino WHERE i.ino IS NULL"),
    ("entry '{1}' (inode {2}) is in directory {0}, which does not exist or is none",
     "SELECT d.parent, d.name, d.ino FROM dentry d LEFT JOIN inode p ON p.ino=d.parent"
     f" WHERE p.ino IS NULL OR p.{_TYPE} != {stat.S_IFDIR}"),
    ("directory inode {0} has {1} names",
     "SELECT i.ino, count(*) FROM inode i JOIN dentry d ON d.ino=i.ino"
     f" WHERE i.{_TYPE} = {stat.S_IFDIR} GROUP BY i.ino HAVING count(*) > 1"),
    ("artifact {0} has inode {1}, which does not exist or is no regular file",
     "SELECT a.uid, a.ino FROM artifact a LEFT JOIN inode i ON i.ino=a.ino"
     f" WHERE i.ino IS NULL OR i.{_TYPE} != {stat.S_IFREG}"),
    ("artifact {0} is shown but has no entry",
     "SELECT a.uid FROM artifact a WHERE a.visibility > -1 AND NOT EXISTS(SELECT 1 FROM dentry d WHERE d.ino=a.ino)"),
    ("artifact {0} is in the trash but has the entry '{1}'",
     "SELECT a.uid, d.name FROM artifact a JOIN dentry d ON d.ino=a.ino WHERE a.visibility = -1"),
    ("symlink inode {0} has no target",
     f"SELECT ino FROM inode WHERE {_TYPE} = {stat.S_IFLNK} AND ino NOT IN (SELECT ino FROM symlink)"),
)  # fmt: skip
"""Sentences about the columns of each row that a query finds."""


class Flaw(NamedTuple):
    """Something that cannot be, in one ``sentence`` for people. ``mended``: it was repaired."""

    sentence: str
    mended: bool = False


class FileFlaws(NamedTuple):
    """What SQLite finds wrong. ``errors``: of the file, in SQLite's words; ``dangling``: rows that refer to rows which
    do not exist."""

    errors: list[str]
    dangling: list[Flaw]


class Consistency:
    """Checks the rows of one Database against each other."""

    def __init__(self, db: Database, tree: Tree, journal: Journal, changes: ChangeLog) -> None:
        self._db = db
        self._tree = tree
        self._journal = journal
        self._changes = changes

    def check_file(self) -> FileFlaws:
        """SQLite's own checks of the whole file, which is not the work database's. Raises DamagedRegistry."""
        rows = self._db.all(f"PRAGMA main.integrity_check({MOST_ERRORS})")
        dangling = [
            Flaw(f"a row of table {table} (rowid {rowid}) refers to a row of {parent} that is gone")
            for table, rowid, parent, _ in self._db.all("PRAGMA main.foreign_key_check")
        ]
        return FileFlaws([str(text) for (text,) in rows if text != "ok"], dangling)

    def check_tree(self, *, now: int, repair: bool, is_mounted: Callable[[], bool]) -> list[Flaw]:
        """Check inodes, entries and artifacts against each other, in one transaction: nobody changes them meanwhile.
        ``now``: ns since the epoch.

        ``repair``: correct link counts, and remove inodes without a name that belong to no artifact. A mount may have
        such an inode open, so ``is_mounted`` is asked inside the transaction: a mount that starts later changes
        nothing before the end of it.
        """
        with self._db.transaction():
            return [
                *(Flaw(text.format(*row)) for text, query in _TREE_QUERIES for row in self._db.all(query)),
                *self._links(repair),
                *(() if is_mounted() else self._nameless(repair, now)),
                *self._unreachable(),
            ]

    def _links(self, repair: bool) -> Iterator[Flaw]:
        wrong = self._db.all(
            "SELECT i.ino, i.nlink, n.want FROM inode i JOIN ("
            f" SELECT ino, CASE WHEN {_TYPE} = {stat.S_IFDIR} THEN"
            "   CASE WHEN ino=? OR EXISTS(SELECT 1 FROM dentry WHERE dentry.ino=inode.ino) THEN 2 + ("
            "    SELECT count(*) FROM dentry d JOIN inode c ON c.ino=d.ino"
            f"    WHERE d.parent=inode.ino AND c.{_TYPE} = {stat.S_IFDIR}) ELSE 0 END"
            "  ELSE (SELECT count(*) FROM dentry WHERE dentry.ino=inode.ino) END AS want FROM inode"
            ") n ON n.ino=i.ino WHERE i.nlink != n.want",
            (ROOT_INO,),
        )
        for ino, nlink, want in wrong:
            if repair:
                self._tree.update(ino, nlink=want)
                self._changes.attr(ino)
            yield Flaw(f"inode {ino} counts {nlink} links and has {want}", repair)

    def _nameless(self, repair: bool, now: int) -> Iterator[Flaw]:
        """Inodes without a name that belong to no artifact."""
        rows = self._db.all(
            "SELECT ino FROM inode WHERE ino NOT IN (?, ?) AND ino NOT IN (SELECT ino FROM dentry)"
            " AND ino NOT IN (SELECT ino FROM artifact)",
            (ROOT_INO, AUTO_INO),
        )
        for (ino,) in rows:
            if repair:
                self._journal.drop_put(ino, now=now)
                self._tree.remove_inode(ino)
            yield Flaw(f"inode {ino} has no name and is no artifact's", repair)

    def _unreachable(self) -> Iterator[Flaw]:
        rows = self._db.all(
            "WITH RECURSIVE below(ino) AS ("
            "  SELECT ? UNION SELECT d.ino FROM below b JOIN dentry d ON d.parent=b.ino)"
            " SELECT ino, name FROM dentry WHERE ino NOT IN (SELECT ino FROM below)",
            (ROOT_INO,),
        )
        for ino, name in rows:
            yield Flaw(f"'{name}' (inode {ino}) cannot be reached from the root")
