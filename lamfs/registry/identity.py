"""Which artifact a file is, as names come and go. Synchronous; the Database's thread, inside its transactions.

Used only by namespace.py, which opens the transactions and logs the changes of entries.
"""

from __future__ import annotations

import dataclasses
import stat
from dataclasses import dataclass, field

from lamfs.keys import is_in_place, suffix_of
from lamfs.model import AUTO_INO, DESCRIPTION_XATTR, TRASH, ArtifactRecord, Inode
from lamfs.registry.artifacts import Artifacts
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.journal import Dropped, Journal
from lamfs.registry.tree import Tree
from lamfs.scratch import Matcher, nothing


@dataclass(slots=True)
class Removed:
    """What a removal did. ``spool``: name of the spool file that no put needs any more.

    ``row_gone``: the registry has no row for the inode any more, nor the ``xattrs`` that it had.
    """

    inode: Inode
    spool: str | None = None
    trashed: str | None = None
    row_gone: bool = False
    xattrs: dict[str, bytes] = field(default_factory=dict)


class Identity:
    """Hands artifacts from one file to another in one Database. ``now``: the time of a change, in nanoseconds since
    the epoch."""

    def __init__(
        self, db: Database, tree: Tree, artifacts: Artifacts, journal: Journal, changes: ChangeLog, scratch: Matcher
    ) -> None:
        self._db = db
        self._tree = tree
        self._artifacts = artifacts
        self._journal = journal
        self._changes = changes
        self.scratch = scratch

    def drop_name(self, parent: int, name: str, inode: Inode, now: int) -> Removed:
        """Remove a name of a file. With the last name, its artifact goes to the trash, and unstored bytes are
        dropped."""
        self._tree.remove_entry(parent, name, inode, now)
        artifact = self._artifacts.by_ino(inode.ino)
        if inode.nlink:
            if artifact is not None:
                self.follow_name(artifact, now)
            self._changes.attr(inode.ino)
            return Removed(inode)
        if artifact is not None:
            self._artifacts.update(artifact.uid, visibility=TRASH, updated_at=now)
            return Removed(inode, trashed=artifact.uid)
        spool = self.drop_put(inode.ino, now).src
        xattrs = self._tree.remove_inode(inode.ino)
        return Removed(inode, spool=spool, row_gone=True, xattrs=xattrs)

    def replace_file(self, parent: int, name: str, target: Inode, inode: Inode, now: int) -> tuple[Removed, str | None]:
        """Remove ``target`` from its name, and hand its artifact to ``inode``."""
        artifact = self._artifacts.by_ino(target.ino)
        if artifact is None or target.nlink > 1 or not stat.S_ISREG(inode.mode):
            pending = self._journal.put_of(target.ino) if artifact is None and target.nlink == 1 else None
            removed = self.drop_name(parent, name, target, now)
            if pending is not None and self._artifacts.by_ino(inode.ino) is None:
                # Closed but not stored yet: the uid stays valid for programs that have seen it.
                self._db.execute("UPDATE journal SET uid=? WHERE op='put' AND ino=?", (pending.uid, inode.ino))
            return removed, None
        self._tree.remove_entry(parent, name, target, now)
        dropped = self.drop_put(target.ino, now)
        xattrs = self._tree.remove_inode(target.ino)
        self.inherit(artifact, inode.ino, dropped, now)
        return Removed(target, spool=dropped.src, row_gone=True, xattrs=xattrs), artifact.uid

    def drop_put(self, ino: int, now: int) -> Dropped:
        """Drop the pending put of an inode. Journal the deletion of the object that an upload may have left behind."""
        dropped = self._journal.drop_put(ino, now=now)
        key = dropped.object_key
        if key is not None and not dropped.doubted and self._artifacts.with_object(key) is None:
            self._journal.add_delete(key, now=now)
        return dropped

    def inherit(self, artifact: ArtifactRecord, ino: int, dropped: Dropped, now: int) -> None:
        """The bytes of inode ``ino`` become the content of ``artifact``. An artifact that ``ino`` had ends here.

        ``dropped``: a put that is not pending any more. It may have written over the artifact's object.
        """
        source = self._artifacts.by_ino(ino)
        if source is not None:
            same = source.revision.content.same_bytes(artifact.revision.content)
            if not same and source.id is not None and artifact.id is not None:
                self._artifacts.take_leaves(source.id, artifact.id)
            self._artifacts.remove(source.uid)
            self._journal.drop_move(source.uid)
            if dropped.object_key is None and same:
                self._journal.add_delete(source.revision.object_key, source.revision.etag, now=now, uid=source.uid)
            else:
                self._artifacts.set_revision(artifact, source.revision, updated_at=now)
                sure = dropped.object_key is None or dropped.doubted
                # Delete the stale object, or let the move overwrite it if it still leads there.
                etag = artifact.revision.etag if sure else None
                self._journal.add_delete(artifact.revision.object_key, etag, now=now, uid=artifact.uid)
                self._journal.add_move(artifact.uid, now=now)
        self._artifacts.update(artifact.uid, ino=ino)
        description = self._tree.take_xattr(ino, DESCRIPTION_XATTR)
        if description and artifact.description is None:
            self._artifacts.update(artifact.uid, description=description.decode())
        self._db.execute("UPDATE journal SET uid=? WHERE op='put' AND ino=?", (artifact.uid, ino))

    def known_as(self, ino: int) -> ArtifactRecord | str | None:
        """The artifact of a file. If it is not stored yet: the uid that its artifact will have."""
        owed = self._journal.put_of(ino)
        return self._artifacts.by_ino(ino) or (owed.uid if owed is not None else None)

    def keep_backup(
        self, backup: int, heir: int, ended: ArtifactRecord | str | None, *, copy_uid: str, now: int
    ) -> bool:
        """The file ``heir`` has got the name of ``backup``: it becomes the content of the same artifact.

        The old content becomes a new artifact, ``copy_uid``, at the backup's name, without history. Until the new
        content is stored, both have the same object. ``ended``: what ``backup`` was known as, if it replaced the
        content of an older backup and so has that one's artifact now. False if ``backup`` has no name any more, or was
        not an artifact.
        """
        inode = self._tree.get(backup)
        if inode is None or inode.nlink == 0:
            return False
        old = self._artifacts.by_ino(backup)
        known = self.known_as(backup)
        if ended is None or _uid(ended) == _uid(known):
            ended = known
            if ended is None:
                return False
            self._db.execute("UPDATE journal SET uid=? WHERE op='put' AND ino=?", (copy_uid, backup))
            if old is not None:
                self._journal.drop_move(old.uid)
                self._artifacts.update(old.uid, uid=copy_uid, description=None, created_at=now, updated_at=now)
                self._journal.add_move(copy_uid, now=now)
        if isinstance(ended, ArtifactRecord):
            self._go_on(ended, heir, old, now)
        self._db.execute("UPDATE journal SET uid=? WHERE op='put' AND ino=?", (_uid(ended), heir))
        self._changes.record(backup)
        self._changes.record(heir)
        return True

    def _go_on(self, ended: ArtifactRecord, heir: int, old: ArtifactRecord | None, now: int) -> None:
        """Give ``heir`` the identity of an artifact whose row is gone. ``old`` has the stored bytes of that
        artifact."""
        source = self._artifacts.by_ino(heir)
        if source is not None:
            self._journal.drop_move(source.uid)
            self._artifacts.update(
                source.uid, uid=ended.uid, description=ended.description, created_at=ended.created_at,
                created_by_id=ended.created_by_id, run_id=ended.run_id, transform_id=ended.transform_id,
            )  # fmt: skip
        else:
            revision = ended.revision if old is None else old.revision
            self._artifacts.insert(dataclasses.replace(ended, id=None, ino=heir, key=None, revision=revision))
        record = self._artifacts.by_uid(ended.uid)
        assert record is not None
        self.follow_name(record, now)
        self._journal.add_move(ended.uid, now=now)

    def drop_copy(self, parent: int, name: str, inode: Inode, now: int) -> Removed:
        """Remove a backup whose artifact went on with another file. Its content was replaced, so it goes for good."""
        removed = self.drop_name(parent, name, inode, now)
        if removed.trashed is None:
            return removed
        copy = self._artifacts.by_uid(removed.trashed)
        assert copy is not None
        dropped = self.drop_put(inode.ino, now)
        self._journal.drop_move(copy.uid)
        self._artifacts.remove(copy.uid)
        xattrs = self._tree.remove_inode(inode.ino)
        self._journal.add_delete(copy.revision.object_key, dropped.meant(copy.revision), now=now, uid=copy.uid)
        return Removed(inode, spool=dropped.src, row_gone=True, xattrs=xattrs)

    def is_scratch(self, ino: int) -> bool:
        """Whether a file is not an artifact, and none of its names makes it one."""
        if self.scratch is nothing or self._artifacts.has_ino(ino):
            return False
        names = self._tree.names(ino)
        return bool(names) and all(self.scratch(name) for _, name in names)

    def follow_scratch(self, inode: Inode) -> None:
        """The names of a file have changed: unstored bytes have to be stored now, or not any more."""
        if self.scratch is not nothing and self._journal.put_of(inode.ino) is not None:
            self._journal.set_scratch(inode.ino, self.is_scratch(inode.ino))

    def follow_name(self, artifact: ArtifactRecord, now: int) -> None:
        """Set key and suffix of an artifact from the first name of its inode."""
        assert artifact.ino is not None
        first = self._tree.first_name(artifact.ino)
        if first is None:
            return
        parent, name = first
        key = None if parent == AUTO_INO else self._tree.path(artifact.ino)
        suffix = suffix_of(name) if key is not None else artifact.suffix
        if key == artifact.key and suffix == artifact.suffix:
            return
        self._artifacts.update(artifact.uid, key=key, suffix=suffix)
        if not is_in_place(artifact.revision.object_key, artifact.uid, suffix, key, artifact.key_is_virtual):
            self._journal.add_move(artifact.uid, now=now)


def _uid(known: ArtifactRecord | str | None) -> str | None:
    return known.uid if isinstance(known, ArtifactRecord) else known
