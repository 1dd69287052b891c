"""``lost+found``: the folder for files and directories that have lost their place in the tree. The Database's thread.

For a registry that came from storage, whose rows may contradict each other. Runs inside the caller's transaction.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lamfs.keys import suffix_of
from lamfs.model import AUTO_INO, ROOT_INO
from lamfs.registry.artifacts import NOW
from lamfs.registry.db import Database

NAME = "lost+found"
KEY_BYTES = 64 << 20
"""Limit on the characters of keys that are rewritten: a deep tree of wrong keys could be larger than its source."""
STEPS = 10_000_000
"""Limit on keys, times renames of directories, that are rewritten. lamfs itself rewrites them within seconds."""
_DIRECTORY = f"mode & {0o170000} = {stat.S_IFDIR}"
_REGULAR = f"mode & {0o170000} = {stat.S_IFREG}"


class Finding(NamedTuple):
    """A fault that was found. ``row`` names the row of ``table``; ``what`` tells the fault and the repair. ``place``:
    the file's new place in the tree, if the repair moved it."""

    table: str
    row: str
    what: str
    place: str | None = None

    @property
    def sentence(self) -> str:
        """For people. May contain any characters."""
        where = f"; it is at '{self.place}'" if self.place else ""
        return f"{self.table}: {self.row}: {self.what}{where}"


def reattach(db: Database, now: int, unnamed: Iterable[int] = (), unread: Iterable[int] = ()) -> Iterator[Finding]:
    """Make a tree of the given inodes and entries, whatever they say.

    Afterwards each directory is reached by one path from the root, no entry names a missing inode, and each living
    artifact and each inode of ``unnamed`` has a place. Files of ``unread``, whose bytes are not known any more, give
    their names up to others. ``now``: of directories and files that are new, in nanoseconds since the epoch.

    Yields what was found and done. The tree is right only after the last one. Link counts and the keys of artifacts
    follow.
    """
    tree = _Tree(db, now)
    tree.fix_roots()
    yield from tree.drop_dangling()
    yield from tree.one_name_for_directories()
    yield from tree.break_circles()
    yield from tree.place_artifacts()
    yield from tree.place_unnamed(unnamed)
    yield from tree.move_unread(unread)
    tree.follow_renames()
    yield from tree.follow_names()
    tree.count_links()


def find_folder(db: Database) -> tuple[str, int | None]:
    """Name and inode number of the folder ``lost+found`` at the root. The number is None if it does not exist yet."""
    name, count = NAME, 1
    while (row := db.one("SELECT ino FROM dentry WHERE parent=? AND name=?", (ROOT_INO, name))) is not None:
        if db.one(f"SELECT 1 FROM inode WHERE ino=? AND {_DIRECTORY}", row) is not None:
            return name, int(row[0])
        count += 1
        name = f"{NAME}.{count}"
    return name, None


class _Tree:
    """The tree of one Database during repair."""

    def __init__(self, db: Database, now: int) -> None:
        self._db = db
        self._now = now
        self._folder: int | None = None

    # -- inodes and entries -------------------------------------------------------------------------------------

    def fix_roots(self) -> None:
        """Make the two directories that always exist."""
        for ino in (ROOT_INO, AUTO_INO):
            if self._db.one(f"SELECT 1 FROM inode WHERE ino=? AND {_DIRECTORY}", (ino,)) is None:
                self._db.execute(
                    "INSERT OR REPLACE INTO inode(ino, mode, uid, gid, nlink, atime_ns, mtime_ns, ctime_ns)"
                    " VALUES(?,?,?,?,2,?,?,?)",
                    (ino, stat.S_IFDIR | 0o755, os.getuid(), os.getgid(), self._now, self._now, self._now),
                )
        # Other entries with their names, or that place them elsewhere, are dropped below.
        self._db.execute("DELETE FROM dentry WHERE ino=? AND NOT (parent=? AND name='.lamindb')", (AUTO_INO, ROOT_INO))
        if self._db.one("SELECT 1 FROM dentry WHERE ino=?", (AUTO_INO,)) is None:
            self._db.execute("UPDATE dentry SET name='.lamindb.' || id WHERE parent=? AND name='.lamindb'", (ROOT_INO,))
            self._db.execute("INSERT INTO dentry(parent, name, ino) VALUES(?, '.lamindb', ?)", (ROOT_INO, AUTO_INO))
        name, count = ".lamfs", 1
        while self._db.one("SELECT 1 FROM dentry WHERE parent=? AND name=?", (ROOT_INO, name)) is not None:
            count += 1
            name = f".lamfs.{count}"
        self._db.execute("UPDATE dentry SET name=? WHERE parent=? AND name='.lamfs'", (name, ROOT_INO))

    def drop_dangling(self) -> Iterator[Finding]:
        """Remove entries whose file or directory is missing. Give an artifact without a file a new one."""
        rows = self._db.all(
            "SELECT d.id, d.parent, d.name, d.ino FROM dentry d LEFT JOIN inode p ON p.ino=d.parent"
            f" LEFT JOIN inode i ON i.ino=d.ino WHERE i.ino IS NULL OR p.ino IS NULL OR NOT p.{_DIRECTORY}"
            f" OR d.ino={ROOT_INO} OR (d.parent={AUTO_INO} AND i.{_DIRECTORY})"
        )
        for id_, parent, name, ino in rows:
            self._db.execute("DELETE FROM dentry WHERE id=?", (id_,))
            if ino == ROOT_INO or self._db.one("SELECT 1 FROM inode WHERE ino=?", (ino,)) is None:
                yield Finding(
                    "dentry", f"'{name}' in directory {parent}", "it names what is not there, and was left out"
                )
            elif self._is_nameless(ino):
                place = self._attach(ino, name)
                yield Finding("dentry", f"'{name}' in directory {parent}", "there is no such directory", place)
        missing = self._db.all(
            f"SELECT a.id, a.uid, r.size FROM {NOW} WHERE NOT EXISTS"
            f" (SELECT 1 FROM inode i WHERE i.ino=a.ino AND i.{_REGULAR})"
        )
        for id_, _, size in missing:
            self._db.execute(
                "INSERT INTO inode(mode, uid, gid, nlink, size, atime_ns, mtime_ns, ctime_ns) VALUES(?,?,?,0,?,?,?,?)",
                (stat.S_IFREG | 0o600, os.getuid(), os.getgid(), size, self._now, self._now, self._now),
            )
            self._db.execute("UPDATE artifact SET ino=last_insert_rowid() WHERE id=?", (id_,))

    def one_name_for_directories(self) -> Iterator[Finding]:
        """Leave each directory one name."""
        rows = self._db.all(
            f"SELECT d.id, d.name, d.ino FROM dentry d JOIN inode i ON i.ino=d.ino WHERE i.{_DIRECTORY}"
            " AND d.id>(SELECT min(id) FROM dentry o WHERE o.ino=d.ino)"
        )
        for id_, name, ino in rows:
            self._db.execute("DELETE FROM dentry WHERE id=?", (id_,))
            yield Finding("dentry", f"'{name}' (inode {ino})", "a directory has one name, and this was another")

    def break_circles(self) -> Iterator[Finding]:
        """Give a place to directories that cannot be reached from the root."""
        above: dict[int, tuple[int, str]] = {
            ino: (parent, name)
            for ino, parent, name in self._db.all(
                "WITH RECURSIVE below(ino) AS (SELECT ? UNION SELECT d.ino FROM below b JOIN dentry d ON d.parent=b.ino"
                f" JOIN inode i ON i.ino=d.ino WHERE i.{_DIRECTORY})"
                " SELECT i.ino, coalesce(d.parent, 0), coalesce(d.name, '')"
                " FROM inode i LEFT JOIN dentry d ON d.ino=i.ino"
                f" WHERE i.{_DIRECTORY} AND i.ino NOT IN (SELECT ino FROM below)",
                (ROOT_INO,),
            )
        }
        seen: set[int] = set()
        for start in above:
            ino, way = start, set()
            while ino in above and ino not in seen and ino not in way:
                way.add(ino)
                parent = above[ino][0]
                if parent == 0:
                    yield from self._cut(ino, "")
                elif parent in way:
                    yield from self._cut(ino, above[ino][1])
                ino = parent
            seen |= way

    def _cut(self, ino: int, name: str) -> Iterator[Finding]:
        if not name and self._db.one("SELECT 1 FROM dentry WHERE parent=? LIMIT 1", (ino,)) is None:
            return  # an empty directory that somebody had open when it was removed
        self._db.execute("DELETE FROM dentry WHERE ino=?", (ino,))
        place = self._attach(ino, name)
        yield Finding("inode", f"directory {ino}", "it cannot be reached from the root", place)

    # -- lost+found ---------------------------------------------------------------------------------------------

    def place_artifacts(self) -> Iterator[Finding]:
        """Give a place to living artifacts whose file has no name."""
        rows = self._db.all(
            "SELECT uid, suffix, ino, key FROM artifact a WHERE visibility>-1"
            " AND NOT EXISTS (SELECT 1 FROM dentry d WHERE d.ino=a.ino)"
        )
        for uid, suffix, ino, key in rows:
            place = self._attach(ino, f"{uid}{suffix}")
            yield Finding("artifact", f"'{key or uid}'", "its file has no name", place)
        # A file with a name is not in the trash.
        for uid, key in self._db.all(
            "SELECT uid, key FROM artifact a WHERE visibility=-1 AND EXISTS (SELECT 1 FROM dentry d WHERE d.ino=a.ino)"
        ):
            self._db.execute("UPDATE artifact SET visibility=1, key=NULL WHERE uid=?", (uid,))
            yield Finding("artifact", f"'{key or uid}'", "it is in the trash and has a name, and was taken out")

    def place_unnamed(self, unnamed: Iterable[int]) -> Iterator[Finding]:
        """Give a place to files whose entry was left out."""
        for ino in sorted(unnamed):
            row = self._db.one("SELECT mode FROM inode WHERE ino=?", (ino,))
            trashed = self._db.one("SELECT 1 FROM artifact WHERE ino=? AND visibility=-1", (ino,)) is not None
            if row is not None and not trashed and self._is_nameless(ino) and ino not in (ROOT_INO, AUTO_INO):
                place = self._attach(ino, "")
                yield Finding("inode", f"inode {ino}", "its entry was left out", place)

    def _is_nameless(self, ino: int) -> bool:
        return self._db.one("SELECT 1 FROM dentry WHERE ino=? LIMIT 1", (ino,)) is None

    def _attach(self, ino: int, name: str) -> str:
        """Give an inode a name in ``lost+found``. Returns its key there."""
        folder = self._lost_and_found()
        wanted = name or f"inode-{ino}"
        count = 1
        while self._db.one("SELECT 1 FROM dentry WHERE parent=? AND name=?", (folder, wanted)) is not None:
            wanted = f"inode-{ino}" if count == 1 else f"inode-{ino}.{count}"
            count += 1
        self._db.execute("INSERT INTO dentry(parent, name, ino) VALUES(?,?,?)", (folder, wanted, ino))
        return f"{self._folder_name}/{wanted}"

    def _lost_and_found(self) -> int:
        if self._folder is not None:
            return self._folder
        self._folder_name, self._folder = find_folder(self._db)
        if self._folder is not None:
            return self._folder
        cursor = self._db.execute(
            "INSERT INTO inode(mode, uid, gid, nlink, size, atime_ns, mtime_ns, ctime_ns) VALUES(?,?,?,2,0,?,?,?)",
            (stat.S_IFDIR | 0o700, os.getuid(), os.getgid(), self._now, self._now, self._now),
        )
        assert cursor.lastrowid is not None
        self._folder = cursor.lastrowid
        self._db.execute(
            "INSERT INTO dentry(parent, name, ino) VALUES(?,?,?)", (ROOT_INO, self._folder_name, self._folder)
        )
        return self._folder

    def move_unread(self, unread: Iterable[int]) -> Iterator[Finding]:
        """Give a place to files whose artifact was left out."""
        for ino in sorted(unread):
            names = self._db.all(
                "SELECT d.name FROM dentry d JOIN inode i ON i.ino=d.ino WHERE d.ino=?"
                f" AND i.{_REGULAR} AND NOT EXISTS (SELECT 1 FROM artifact a WHERE a.ino=d.ino) ORDER BY d.id LIMIT 1",
                (ino,),
            )
            for (name,) in names:
                self._db.execute("DELETE FROM dentry WHERE ino=?", (ino,))
                place = self._attach(ino, name)
                yield Finding("inode", f"'{name}' (inode {ino})", "nobody knows where its bytes are", place)

    # -- keys and link counts -----------------------------------------------------------------------------------

    def follow_renames(self) -> None:
        """Change the keys that have not followed their renamed directories yet (Artifacts.settle).

        If that could take too long, or make keys too large, the tree alone decides what the keys are (follow_names).
        """
        count, grown = self._db.all("SELECT count(*), coalesce(sum(max(length(new)-length(old), 0)), 0) FROM rekey")[0]
        keyed = self._db.all("SELECT count(*) FROM artifact WHERE key IS NOT NULL AND visibility>-1")[0][0]
        if count * keyed <= STEPS and grown * keyed <= KEY_BYTES:
            for old, new in self._db.all("SELECT old, new FROM rekey ORDER BY id"):
                self._db.execute(
                    "UPDATE OR IGNORE artifact SET key=?||substr(key, ?) WHERE key>=? AND key<? AND visibility>-1",
                    (new, len(old) + 1, f"{old}/", f"{old}0"),
                )
        self._db.execute("DELETE FROM rekey")

    def follow_names(self) -> Iterator[Finding]:
        """Set each artifact's key to the path of the first name of its file."""
        budget = KEY_BYTES
        wrong: list[tuple[str, str | None]] = []
        for uid, key, parts, above, name in self._artifacts():
            length = above + len(name)
            if key is not None and len(key) == length and key == "/".join((*parts, name)):
                continue
            budget -= length
            wrong.append((uid, "/".join((*parts, name)) if budget > 0 else None))
            if key is not None:
                yield Finding("artifact", f"'{uid}'", f"its key '{key[:200]}' is not where it is", wrong[-1][1])
        for uid, _ in wrong:
            self._db.execute("UPDATE artifact SET key=NULL WHERE uid=?", (uid,))
        for uid, path in wrong:
            if path is not None:
                suffix = suffix_of(path.rpartition("/")[2])
                self._db.execute("UPDATE artifact SET key=?, suffix=? WHERE uid=?", (path, suffix, uid))
        self._db.execute(
            "UPDATE artifact SET key=NULL WHERE key IS NOT NULL AND visibility>-1 AND EXISTS"
            " (SELECT 1 FROM dentry d WHERE d.ino=artifact.ino AND d.parent=? AND d.id="
            " (SELECT min(id) FROM dentry o WHERE o.ino=d.ino))",
            (AUTO_INO,),
        )

    def _artifacts(self) -> Iterator[tuple[str, str | None, list[str], int, str]]:
        """uid, key, and the path of the first name of each artifact that has a key or ought to have one.

        The path comes as its directories, the number of characters that these take with a slash after each, and the
        name. Directory by directory, depth first, so that only one path is in memory.
        """
        here: list[str] = []
        todo = [(ROOT_INO, "", 0, 0)]
        while todo:
            ino, name, depth, above = todo.pop()
            del here[max(depth - 1, 0) :]
            if depth:
                here.append(name)
            for uid, key, called in self._db.all(
                "SELECT a.uid, a.key, d.name FROM dentry d JOIN artifact a ON a.ino=d.ino WHERE d.parent=?"
                " AND a.visibility>-1 AND d.id=(SELECT min(id) FROM dentry o WHERE o.ino=d.ino)",
                (ino,),
            ):
                yield uid, key, here, above, called
            todo += [
                (child, called, depth + 1, above + len(called) + 1)
                for child, called in self._db.all(
                    "SELECT d.ino, d.name FROM dentry d JOIN inode i ON i.ino=d.ino"
                    f" WHERE d.parent=? AND i.{_DIRECTORY} AND d.ino<>?",
                    (ino, AUTO_INO),
                )
            ]

    def count_links(self) -> None:
        """Set link counts to the number of entries."""
        self._db.execute(
            f"UPDATE inode SET nlink=(SELECT count(*) FROM dentry d WHERE d.ino=inode.ino) WHERE NOT ({_DIRECTORY})"
        )
        self._db.execute(
            "UPDATE inode SET nlink=CASE WHEN ino=? OR EXISTS(SELECT 1 FROM dentry d WHERE d.ino=inode.ino) THEN 2 +"
            " (SELECT count(*) FROM dentry d JOIN inode c ON c.ino=d.ino WHERE d.parent=inode.ino AND"
            f" c.{_DIRECTORY}) ELSE 0 END WHERE {_DIRECTORY}",
            (ROOT_INO,),
        )
