"""``lost+found`` of a registry in use: bytes without a known place become files there. The Database's thread.

Each public method is one transaction, with its change-log rows, so that mounts show the new files. ``now``: the time of
a change, in nanoseconds since the epoch. (lostfound.py repairs a registry that came from storage, and uses the same
folder.)
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Sequence
from typing import Any, NamedTuple

from lamfs.keys import suffix_of
from lamfs.model import AUTO_INO, DESCRIPTION_XATTR, ROOT_INO, ArtifactRecord, Inode
from lamfs.registry.artifacts import Artifacts
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.entries import Abort, Delete, Put, Save
from lamfs.registry.journal import Journal
from lamfs.registry.lostfound import find_folder
from lamfs.registry.namespace import Namespace
from lamfs.registry.tree import Tree

NAME_MAX = 255
"""Most bytes of a name."""
LOST = 100_000
"""Lost files that are remembered: the last ones."""
LOST_META = "lost:"
"""Keys of their rows in the meta table: followed by a number, in order."""
_LOST_END = "lost;"
_LOST_LIST = "lost"
"""Row of the meta table in which older versions keep all of them."""
RANGES = 16
"""Lost ranges of a file that are remembered one by one: the first ones."""


class Lost(NamedTuple):
    """A file whose last ``size`` bytes are lost since ``at`` (ns since the epoch). It has its last ``stored`` content,
    or is gone with its ``names`` (directory and name).

    ``left``: bytes that it still has; None: see above. ``ranges``: where the lost bytes were (start and end of the
    first RANGES pieces), in a file that has all its other bytes.
    """

    key: str
    uid: str
    size: int
    stored: bool
    at: int
    names: Sequence[tuple[int, str]] = ()
    left: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def sentence(self) -> str:
        """For people."""
        if self.ranges:
            first = self.ranges[:RANGES]
            where = ", ".join(f"{start}-{end - 1}" for start, end in first)
            more = " and more" if sum(end - start for start, end in first) < self.size else ""
            return (
                f"of what was written to '{self.key}' last, {self.size} bytes are lost (bytes {where}{more}): the"
                " machine went down before they were stored; there is what was there before"
            )
        if self.left is not None:
            return (
                f"'{self.key}' has only {self.left} of its {self.size} bytes: the machine went down, or its spool file"
                " was lost, before they were stored"
            )
        became = "so it is as it was stored last" if self.stored else "and it was never stored, so it is gone"
        return f"the spool file with the last {self.size} bytes of '{self.key}' was missing, {became}"


class Rescue:
    """Makes ``lost+found`` and files in it, in one Database."""

    def __init__(
        self,
        db: Database,
        tree: Tree,
        artifacts: Artifacts,
        journal: Journal,
        changes: ChangeLog,
        names: Namespace,
    ) -> None:
        self._db = db
        self._tree = tree
        self._artifacts = artifacts
        self._journal = journal
        self._changes = changes
        self._names = names

    def folder(self, *, now: int) -> int:
        """Inode number of ``lost+found`` at the root, made if missing, mode 0700. If that name is a file, the folder is
        ``lost+found.2`` …"""
        with self._db.transaction():
            name, ino = find_folder(self._db)
            if ino is not None:
                return ino
            return self._names.create(ROOT_INO, name, stat.S_IFDIR | 0o700, os.getuid(), os.getgid(), now=now).ino

    def free_name(self, wanted: str, *, now: int) -> str:
        """A free name in ``lost+found``, made from ``wanted``, and never scratch. Characters that no name may contain
        are left out, and a number distinguishes it from present names."""
        with self._db.transaction():
            folder = self.folder(now=now)
            base = _clean(wanted)
            if self._names.is_scratch_name(base):
                base = _clean(f"kept {base.strip('.~#')}")
                if self._names.is_scratch_name(base):
                    base = "kept"
            name, count = base, 1
            while self._tree.lookup(folder, name) is not None:
                count += 1
                stem, dot, suffix = base.partition(".") if not base.startswith(".") else (base, "", "")
                name = _cut(stem, f".{count}{dot}{suffix}")
            return name

    def keep_file(
        self,
        name: str,
        *,
        src: str,
        size: int,
        mtime_ns: int,
        now: int,
        spare_uid: str,
        mode: int = 0o600,
        owner: tuple[int, int] | None = None,
        artifact_uid: str | None = None,
        description: str | None = None,
    ) -> str:
        """Make a regular file in ``lost+found`` with the bytes of the spool file ``src``, and journal its put as ready.
        Returns its key.

        ``name``: as for ``free_name``. ``size`` in bytes, ``mtime_ns`` in nanoseconds since the epoch. ``mode``: its
        permissions. ``owner``: uid and gid; None: this process's. ``artifact_uid``: the uid for its artifact, unless
        another artifact has it; then it is ``spare_uid``. ``description``: of the artifact.
        """
        with self._db.transaction():
            folder = self.folder(now=now)
            name = self.free_name(name, now=now)
            uid, gid = owner if owner is not None else (os.getuid(), os.getgid())
            inode = self._tree.new_entry(
                folder, name, stat.S_IFREG | stat.S_IMODE(mode), uid, gid, rdev=0, now=now, target=None
            )
            self._tree.update(inode.ino, size=size, mtime_ns=mtime_ns)
            if artifact_uid is None or self._artifacts.by_uid(artifact_uid) is not None:
                artifact_uid = spare_uid
            self._journal.begin_first_put(inode.ino, src, now=now, artifact_uid=artifact_uid)
            self._journal.ready_put(inode.ino, now=now)
            if description is not None:
                self._tree.set_xattr(inode.ino, DESCRIPTION_XATTR, description.encode())
            self._changes.entry(folder, name, inode.ino)
            return self._tree.path(inode.ino) or name

    def keep_put(
        self,
        row: int,
        name: str,
        *,
        src: str,
        size: int,
        mtime_ns: int,
        now: int,
        spare_uid: str,
        description: str,
    ) -> str:
        """Make a file in ``lost+found`` with the last bytes of a put, which are in the spool file ``src`` now, and give
        the put up. Returns the file's key. As keep_file, and give_up without a note."""
        with self._db.transaction():
            key = self.keep_file(
                name, src=src, size=size, mtime_ns=mtime_ns, now=now, spare_uid=spare_uid, description=description
            )
            self.give_up(row, now=now, note=False)
            return key

    def keep_object(
        self,
        names: Sequence[str],
        record: ArtifactRecord,
        *,
        mtime_ns: int,
        now: int,
        spare_uid: str,
        mode: int = 0o600,
        instead: tuple[ArtifactRecord, str] | None = None,
    ) -> str | None:
        """Make an artifact, a file in ``lost+found``, from the object that ``record`` names. The object stays in place.
        Returns the key.

        ``names``: possible names; the first free one is used. ``record``: with content, object and ETag. It gets key,
        suffix, inode and times, and ``spare_uid`` if an artifact has its uid. ``mtime_ns``: in nanoseconds since the
        epoch. ``instead``: the artifact that had this object before something else was written there, and its new
        object key. None, with nothing changed: an artifact or the journal names the object by now.
        """
        with self._db.transaction():
            object_key = record.revision.object_key
            if not (self._is_unknown(object_key) if instead is None else self._give_way(object_key, *instead)):
                return None
            folder = self.folder(now=now)
            free = (name for name in names if self._tree.lookup(folder, _clean(name)) is None)
            name = self.free_name(next(free, names[-1]), now=now)
            inode = self._tree.new_entry(
                folder, name, stat.S_IFREG | stat.S_IMODE(mode), os.getuid(), os.getgid(),
                rdev=0, now=now, target=None,
            )  # fmt: skip
            self._tree.update(inode.ino, size=record.size, mtime_ns=mtime_ns)
            if self._artifacts.by_uid(record.uid) is not None:
                record.uid = spare_uid
            record.key, record.suffix, record.ino = self._tree.path(inode.ino) or name, suffix_of(name), inode.ino
            record.created_at, record.updated_at = record.created_at or now, record.updated_at or now
            self._artifacts.insert(record)
            self._changes.entry(folder, name, inode.ino)
            return record.key

    def name_again(self, ino: int, *, now: int) -> str:
        """Give a file or directory that has lost its name a name in ``lost+found``. Returns its key there. The keys of
        artifacts below it follow."""
        with self._db.transaction():
            inode = self._tree.get(ino)
            assert inode is not None
            inode.nlink = 0
            folder = self.folder(now=now)
            name = self.free_name(f"inode {ino}", now=now)
            self._tree.add_entry(folder, name, inode, now)
            self._changes.entry(folder, name, ino)
            below = self._db.all(
                "WITH RECURSIVE below(ino) AS"
                " (SELECT ? UNION SELECT d.ino FROM below b JOIN dentry d ON d.parent=b.ino)"
                " SELECT a.ino FROM below b JOIN artifact a ON a.ino=b.ino",
                (ino,),
            )
            for (file,) in below:
                self._names.follow(file, now=now)
            self._names.follow(ino, now=now)
            return self._tree.path(ino) or name

    def name_nameless(self, *, now: int) -> list[tuple[int, str]]:
        """Give names in ``lost+found`` to what has lost its name and leads to something else: directories with entries,
        and files whose bytes are still to be stored. Returns their inode numbers and keys.

        What somebody has removed leads nowhere, and gets none. No mount may be live: it has such inodes open.
        """
        with self._db.transaction():
            pending = {entry.ino for entry in self._journal.puts()}
            rows = self._db.all(
                "SELECT ino, mode, EXISTS (SELECT 1 FROM dentry WHERE parent=i.ino) FROM inode i"
                " WHERE ino NOT IN (?, ?) AND ino NOT IN (SELECT ino FROM dentry)"
                " AND ino NOT IN (SELECT ino FROM artifact)",
                (ROOT_INO, AUTO_INO),
            )
            return [
                (ino, self.name_again(ino, now=now))
                for ino, mode, has_entries in rows
                if (stat.S_ISDIR(mode) and has_entries) or (stat.S_ISREG(mode) and ino in pending)
            ]

    def give_back(self, name: str, scratch: Inode, *, now: int) -> bool:
        """Let the file ``name`` of ``lost+found``, which has the bytes of a scratch file, take the place of that, with
        its mode and owner. False, and neither has changed: one of the two is gone, or the scratch file has bytes."""
        with self._db.transaction():
            folder = self.folder(now=now)
            place = self._tree.first_name(scratch.ino)
            there = self._tree.lookup(folder, name)
            if place is None or there is None:
                return False
            if all(inode.ino != scratch.ino for inode in self._names.unread_scratch()):
                return False
            self._tree.update(there.ino, mode=scratch.mode, uid=scratch.uid, gid=scratch.gid)
            self._names.rename(folder, name, *place, now=now)
            self._changes.attr(there.ino)
            return True

    def _give_way(self, object_key: str, before: ArtifactRecord, elsewhere: str) -> bool:
        """An artifact leaves its object to another one. False if it has another revision by now, or is being
        written."""
        now = self._artifacts.by_uid(before.uid)
        if now is None or now.revision != before.revision:
            return False
        owed = None if now.ino is None else self._journal.put_of(now.ino)
        if owed is not None and owed.base is not None:
            return False  # the blocks that it lacks may be in this object
        if self._journal.holds(object_key) or self._journal.saves(now.uid):
            return False
        others = self._artifacts.in_the_way(object_key, now.uid)
        if any(other.revision.object_key == object_key for other in others):
            return False
        self._artifacts.set_object(now.uid, elsewhere, now.revision.etag)
        if now.ino is not None:
            self._changes.record(now.ino)
        return True

    def named_objects(self) -> set[str]:
        """Object keys that a revision or a journal row names."""
        found = {object_key for (object_key,) in self._db.all("SELECT object_key FROM revision")}
        for entry in self._journal.entries():
            if isinstance(entry, Put | Save | Delete | Abort) and entry.object_key is not None:
                found.add(entry.object_key)
        return found

    def give_up_object(self, object_key: str, etag: str, *, now: int) -> bool:
        """Journal the deletion of an object, if neither an artifact nor the journal names it. Returns whether it
        did."""
        with self._db.transaction():
            unknown = self._is_unknown(object_key)
            if unknown:
                self._journal.add_delete(object_key, etag, now=now)
            return unknown

    def _is_unknown(self, object_key: str) -> bool:
        return self._artifacts.with_object(object_key) is None and not self._journal.names(object_key)

    # -- lost files ---------------------------------------------------------------------------------------------

    def give_up(self, row: int, *, now: int, note: bool = True) -> Lost | None:
        """The spool file of a put is gone, or is not a spool file: remove the put's row.

        Its file gets its last stored content; a file that was never stored is removed. Either is noted (``lost``).
        ``note=False``: not noted, since its bytes are elsewhere. None: the file does not exist any more.

        The object that the put was to make stays: storage may have received it, and then it is the only copy. No
        artifact has it, so fsck names it, and a program that stores something at its key keeps it.
        """
        with self._db.transaction():
            entry = self._journal.get_put(row)
            if entry is None:
                return None
            inode = self._tree.get(entry.ino)
            artifact = self._artifacts.by_ino(entry.ino)
            key = self._tree.path(entry.ino)
            self._journal.done(entry.id)
            if entry.object_key is not None:
                self._journal.said(entry.object_key)
            if inode is None:
                return None
            names: list[tuple[int, str]] = []
            if artifact is None:
                names = self._tree.names(inode.ino)
                for parent, name in names:
                    self._names.unlink(parent, name, now=now)
            else:
                self._tree.update(inode.ino, size=artifact.size, blocks=None)
                self._tree.bump_revision(inode.ino)
                self._changes.content(inode.ino)
            uid = entry.uid if artifact is None else artifact.uid
            lost = Lost(key or uid or entry.src, uid, inode.size, artifact is not None, now, names)
            if note:
                self.note_lost(lost)
            return lost

    def note_lost(self, lost: Lost) -> None:
        """Remember a loss, for ``lost``."""
        with self._db.transaction():
            last = self._db.one(
                "SELECT key FROM meta WHERE key>=? AND key<? ORDER BY key DESC LIMIT 1", (LOST_META, _LOST_END)
            )
            number = 1 if last is None else int(last[0].removeprefix(LOST_META)) + 1
            row = [lost.key, lost.uid, lost.size, lost.stored, lost.at, lost.left, lost.ranges[:RANGES]]
            self._db.set_meta(_lost_key(number), json.dumps(row))
            self._db.execute("DELETE FROM meta WHERE key>=? AND key<=?", (LOST_META, _lost_key(max(0, number - LOST))))

    def lost(self) -> list[Lost]:
        """Files whose last bytes were lost with their spool file, oldest first, until ``forget_lost``."""
        return lost_in(self._db)

    def forget_lost(self) -> None:
        """Forget the losses: they were reported."""
        self._db.execute("DELETE FROM meta WHERE key>=? AND key<?", (_LOST_LIST, _LOST_END))

    def found(self) -> tuple[str, int]:
        """Name of the folder ``lost+found``, and its number of entries: 0 if it does not exist."""
        name, ino = find_folder(self._db)
        row = None if ino is None else self._db.one("SELECT count(*) FROM dentry WHERE parent=?", (ino,))
        return name, int(row[0]) if row is not None else 0


def lost_in(db: Database) -> list[Lost]:
    """Files whose last bytes were lost, oldest first, as a registry says."""
    found: list[Lost] = []
    with contextlib.suppress(TypeError, ValueError):
        found += map(_lost, json.loads(db.get_meta(_LOST_LIST, "[]")))
    for (row,) in db.all("SELECT value FROM meta WHERE key>=? AND key<? ORDER BY key", (LOST_META, _LOST_END)):
        with contextlib.suppress(TypeError, ValueError):
            found.append(_lost(json.loads(row)))
    return found


def _lost_key(number: int) -> str:
    return f"{LOST_META}{number:016d}"


def _lost(row: list[Any]) -> Lost:
    left, ranges = (*row[5:7], None, None)[:2]
    pieces = tuple((int(start), int(end)) for start, end in ranges or ())
    return Lost(*row[:5])._replace(left=left, ranges=pieces)


def _clean(wanted: str) -> str:
    text = wanted.encode(errors="ignore").decode().replace("/", "_").replace("\0", "")
    return _cut(text, "") if text not in ("", ".", "..") else "kept"


def _cut(text: str, end: str) -> str:
    """``text`` followed by ``end``, with ``text`` cut so that the result has at most NAME_MAX bytes."""
    return text.encode()[: NAME_MAX - len(end.encode())].decode(errors="ignore") + end
