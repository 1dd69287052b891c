"""Puts of processes that are gone, and what only another registry knows. The Database's thread.

Each public method is one transaction, with its change-log rows.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from lamfs.model import BLOCK_SIZE, ArtifactRecord
from lamfs.registry.artifacts import Artifacts
from lamfs.registry.aside import Told
from lamfs.registry.carry import carry_over
from lamfs.registry.changes import ChangeLog
from lamfs.registry.commits import Commits
from lamfs.registry.db import Database
from lamfs.registry.entries import Put
from lamfs.registry.journal import Journal
from lamfs.registry.partial_spools import PartialSpools, Ranges
from lamfs.registry.people import People, User
from lamfs.registry.rescue import Lost, Rescue, lost_in
from lamfs.registry.seals import Seals
from lamfs.registry.tree import Tree


class Displaced(NamedTuple):
    """An artifact whose object now has the bytes of another one, and the object key that it gets instead."""

    artifact: ArtifactRecord
    object_key: str


class Upkeep:
    """Decides about puts of processes that are gone, and brings back artifacts, in one Database."""

    def __init__(
        self,
        db: Database,
        tree: Tree,
        artifacts: Artifacts,
        journal: Journal,
        changes: ChangeLog,
        commits: Commits,
        rescue: Rescue,
    ) -> None:
        self._db = db
        self._tree = tree
        self._artifacts = artifacts
        self._journal = journal
        self._changes = changes
        self._commits = commits
        self._rescue = rescue
        self._people = People(db)
        self._partial_spools = PartialSpools(db)
        self._seals = Seals(db)

    # -- puts of processes that are gone ------------------------------------------------------------------------

    @contextlib.contextmanager
    def deciding(self, entry: Put) -> Iterator[bool]:
        """Decide about a put of a process that is gone: the block is one transaction with what it writes.

        Yields whether the row is still as ``entry`` says: else another process has decided. An exception undoes all
        that the block has written.
        """
        with self._db.transaction():
            yield self._is_as_found(entry)

    def _is_as_found(self, entry: Put) -> bool:
        now = self._journal.get_put(entry.id)
        return now is not None and all(
            getattr(now, name) == getattr(entry, name) for name in ("ino", "uid", "object_key", "src", "gen", "owner")
        )

    def strike_off(self, entry: Put, *, now: int) -> bool:
        """Strike off a put that cannot be lamfs's own. Its file is as it was stored last, or goes, see Rescue.give_up.

        False: another process has taken the row over or changed it, and nothing happens.
        """
        with self._db.transaction():
            if not self._journal.take([entry]):
                return False
            inode = self._tree.get(entry.ino) if entry.ino else None
            if inode is None or not stat.S_ISREG(inode.mode):
                self._journal.done(entry.id)
            else:
                self._rescue.give_up(entry.id, now=now)
            return True

    def keep_durable(self, entry: Put, *, now: int, cut: Callable[[int], None]) -> list[Lost]:
        """The machine went down: of the ranges of a put's spool file only the durable ones are believed. Returns what
        is lost since ``now`` (ns since the epoch), which is noted. Nothing happens when the row is not as it was found.

        Where the stored revision ends within a block, and what was appended there is lost, the file ends there again:
        ``cut`` is called with that size in bytes before the commit, to shorten the spool file.
        """
        with self._db.transaction():
            inode = self._tree.get(entry.ino)
            if inode is None or not self._is_as_found(entry):
                return []
            lost = self._partial_spools.keep_durable(entry.src)
            if lost:
                self._seals.forget(entry.src)
            before = inode.size
            size = int((entry.base or "0").partition(":")[0])
            if not self._ends_at(entry.src, before, size):
                size = before
            artifact = self._artifacts.by_ino(inode.ino)
            key = self._tree.path(inode.ino) or entry.uid or entry.src
            uid = entry.uid if artifact is None else artifact.uid
            whole = Lost(key, uid or "", before, True, now)
            noted: list[Lost] = []
            within = tuple((start, min(end, size)) for start, end in lost if start < size)
            if within:
                noted.append(whole._replace(size=sum(end - start for start, end in within), ranges=within))
            if size != before:
                noted.append(whole._replace(left=size))
                self._seals.forget(entry.src)
                self._tree.update(inode.ino, size=size)
                self._tree.bump_revision(inode.ino)
                self._changes.content(inode.ino)
                cut(size)
            for each in noted:
                self._rescue.note_lost(each)
            return noted

    def add_unnoted(self, entry: Put, known: Mapping[int, Ranges], found: Mapping[int, Ranges]) -> bool:
        """Bytes that are in the spool file of a put of a process that is gone, and that nobody has noted, count as
        written. ``known``: the ranges of these blocks as they were noted; ``found``: as they are.

        False, and nothing has changed: the row, or what is noted of these blocks, is not as it was found.
        """
        with self._db.transaction():
            inode = self._tree.get(entry.ino)
            noted, present = self._partial_spools.ranges(entry.src), self._partial_spools.present(entry.src)
            same = all(block not in present and noted.get(block, ()) == known.get(block, ()) for block in found)
            if inode is None or not same or not self._is_as_found(entry):
                return False
            self._partial_spools.add_ranges(entry.src, found)
            self._seals.forget(entry.src)
            self._tree.bump_revision(inode.ino)
            self._changes.content(inode.ino)
            return True

    def _ends_at(self, src: str, size: int, base: int) -> bool:
        """Whether a partial spool of ``size`` bytes lacks what follows the ``base`` bytes of its revision, within a
        block."""
        block, end = divmod(base, BLOCK_SIZE)
        if not end or size <= base or block in self._partial_spools.present(src):
            return False
        ranges = self._partial_spools.ranges(src).get(block, ())
        return not any(start <= end and stop == BLOCK_SIZE for start, stop in ranges)

    # -- another machine's registry -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def succeeding(self, old: Database, *, apart: bool) -> Iterator[Mapping[str, Told]]:
        """Owe here what is owed in ``old``, this machine's working copy so far, and remember what is lost there: the
        block is one transaction with that and with what it writes. Afterwards no process owns the work.

        Yields the spool files of puts that are left behind, and whose they are. ``apart``: see carry_over. An exception
        undoes everything. Raises RegistryError.
        """
        with self._db.transaction():
            left = carry_over(old, self._db, apart=apart)
            known = set(self._rescue.lost())
            for lost in lost_in(old):
                if lost not in known:
                    self._rescue.note_lost(lost)
            yield left
            self._journal.disown()  # whoever comes next does it, and this process may live on for other reasons

    def bring_back(
        self,
        record: ArtifactRecord,
        *,
        now: int,
        author: User | None,
        displaced: Displaced | None,
        uid: int,
        gid: int,
    ) -> None:
        """Add an artifact that another registry knows, with the object that it has there.

        ``record``: without ids, which are the other registry's. ``author``: its user there. ``displaced``: the artifact
        here whose object it was. ``uid``, ``gid``: owner of the file.
        """
        with self._db.transaction():
            if displaced is not None:
                etag = displaced.artifact.revision.etag
                self._artifacts.set_object(displaced.artifact.uid, displaced.object_key, etag)
            here = None
            if author is not None:
                here = self._people.ensure_user(author.uid, author.handle, author.email, author.name, now=now)
            made = replace(record, created_by_id=None if here is None else here.id)
            self._commits.save(0, made, record.revision.etag, mode=0o644, uid=uid, gid=gid, now=now)
