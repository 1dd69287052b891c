"""Writes: what is written to files, until it is stored: begun, acknowledged, taken over from the dead. The Database's
thread.

Each method is one transaction that keeps journal, tree and change log in step. What a spool file is like on the disk
comes in as an argument: nothing here opens one.
``now``: the present time, in nanoseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lamfs.model import Inode
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.entries import Owed, Put
from lamfs.registry.journal import Journal
from lamfs.registry.namespace import Namespace
from lamfs.registry.partial_spools import PartialSpools, Ranges
from lamfs.registry.tree import Tree


class Begun(NamedTuple):
    """What the beginning of a write has come to.

    ``is_gone``: somebody has deleted the file for good, and nobody will be owed the spool file. ``is_spent``: nothing
    has changed, for the name of the spool file was owed once before; it needs another one. ``replaced``: the name of an
    earlier spool file, which is this process's to remove.
    """

    is_gone: bool = False
    is_spent: bool = False
    replaced: str | None = None


class Acknowledged(NamedTuple):
    """``gen``: how often the file was closed; ``revision``: of its inode (0: the inode is gone)."""

    gen: int
    revision: int


class SpoolInfo(NamedTuple):
    """A spool file as it is on the disk: bytes, when it was written (ns since the epoch), 512-byte blocks."""

    size: int
    mtime_ns: int
    blocks: int


class Taken(NamedTuple):
    """What was taken over: the rows as they were, and the inodes of files that count as closed by that."""

    rows: list[Owed]
    closed: list[int]


class Writes:
    """Notes what is written, in one Database."""

    def __init__(
        self,
        db: Database,
        tree: Tree,
        journal: Journal,
        changes: ChangeLog,
        names: Namespace,
        partial_spools: PartialSpools,
    ) -> None:
        self._db = db
        self._tree = tree
        self._journal = journal
        self._changes = changes
        self._names = names
        self._partial_spools = partial_spools

    def begin_put(
        self,
        ino: int,
        src: str,
        *,
        now: int,
        artifact_uid: str,
        key_is_virtual: bool,
        seen: int,
        mine: str | None,
        base: str | None = None,
        blocks: Iterable[int] = (),
        ranges: Mapping[int, Ranges] | None = None,
    ) -> Begun:
        """Note that spool file ``src`` is about to be written, as the next content of a file (Journal.begin_put).

        ``base``: the revision over which it is a partial spool; ``blocks`` and ``ranges``: what of that it has already.
        Raises FsError(ESTALE), and nothing has changed: the file has another revision than ``seen`` by now, or another
        process is writing it.
        """
        with self._db.transaction():
            if self._tree.get(ino) is None:
                self._journal.spend(src)
                return Begun(is_gone=True)
            before = self._journal.put_of(ino)
            if (before is None or before.src != src) and self._journal.is_spent(src):
                return Begun(is_spent=True)
            replaced = self._journal.begin_put(
                ino, src, now=now, artifact_uid=artifact_uid, key_is_virtual=key_is_virtual,
                base=base, seen=seen, mine=mine,
            )  # fmt: skip
            if base is not None:
                self._partial_spools.add(src, blocks)
                self._partial_spools.add_ranges(src, ranges or {})
            return Begun(replaced=replaced)

    def acknowledge(
        self,
        inode: Inode,
        *,
        now: int,
        src: str | None = None,
        settle: float = 0.0,
        probe_settle: float | None = None,
        columns: Mapping[str, int] | None = None,
    ) -> Acknowledged | None:
        """The bytes that were written so far have to be stored: count one more generation, with size, blocks and times
        of ``inode``. None, and nothing has changed: there is no such put.

        ``src``: only if they are in this spool file, and this process's to store. ``settle``: seconds after ``now``
        until its upload may start. ``probe_settle``: the same of an empty file whose name is a probe's; given when the
        file was never stored: then it may be scratch, too. ``columns``: of the inode, to be set with it.
        """
        ino = inode.ino
        with self._db.transaction():
            scratch = False
            if probe_settle is not None:
                scratch = self._names.is_scratch(ino)
                if not inode.size and self._names.is_probe(ino):
                    settle = probe_settle
            gen = self._journal.ready_put(ino, now=now, settle=settle, scratch=scratch, src=src)
            if not gen:
                return None
            revision = self._tree.rewritten(inode)  # for other mounts it is a new one
            self._changes.content(ino)
            if columns:
                self._tree.update(ino, **columns)
            return Acknowledged(gen, revision)

    def take_over(self, left: Iterable[Owed], spools: Mapping[int, SpoolInfo], *, now: int) -> Taken:
        """Take over rows that processes left which are gone (Journal.left), but for those that somebody else has taken
        or changed since. A file that was being written counts as closed where it was.

        ``spools``: by row, the spool files of such files; one that cannot be seen is for the uploader to find out
        about.
        """
        with self._db.transaction():
            taken = self._journal.take(left)
            closed = []
            for entry in taken:
                inode = self._tree.get(entry.ino) if isinstance(entry, Put) and entry.state == "open" else None
                if inode is None or not isinstance(entry, Put):
                    continue
                found = spools.get(entry.id)
                if found is not None:
                    inode.size, inode.mtime_ns = found.size, found.mtime_ns
                    inode.blocks = None if entry.base is not None else found.blocks
                self._journal.ready_put(inode.ino, now=now, scratch=self._names.is_scratch(inode.ino))
                self._tree.rewritten(inode)
                self._changes.content(inode.ino)
                closed.append(inode.ino)
            return Taken(taken, closed)

    def close_left(self, entry: Put, found: SpoolInfo, *, now: int) -> None:
        """The file of a put that was taken over counts as closed, with what its spool file has."""
        with self._db.transaction():
            inode = self._tree.get(entry.ino)
            if inode is not None and (inode.size != found.size or entry.state == "open"):
                blocks = None if entry.base is not None else found.blocks
                self._tree.update(entry.ino, size=found.size, mtime_ns=found.mtime_ns, blocks=blocks)
            scratch = self._names.is_scratch(entry.ino)
            if entry.state == "open":
                self._journal.ready_put(entry.ino, now=now, scratch=scratch)
            else:
                # The list of scratch names may have changed.
                self._journal.set_scratch(entry.ino, scratch)
            self._changes.content(entry.ino)
