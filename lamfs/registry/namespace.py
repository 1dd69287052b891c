"""Names and artifacts together: create, unlink, rename, trash, restore, purge. Synchronous; the Database's thread.

Each public method is one transaction, with its change-log rows. The rules that make files artifacts live here:

- A name that goes takes its artifact to the trash (visibility -1), where the inode row waits without an entry.
- A file renamed over an artifact replaces that artifact's content: its uid, description and provenance stay, its inode
  becomes the one that was renamed (DESIGN: identity survives).
- Keys follow their names at once; the objects of real keys follow later, through the journal.
"""

from __future__ import annotations

import errno
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass

from lamfs.errors import AlreadyExists, FsError, InvalidName, NotFound
from lamfs.keys import PATH_MAX, check_key, object_key_for, root_path, suffix_of
from lamfs.model import AUTO_INO, ROOT_INO, SHOWN, TRASH, ArtifactRecord, Inode, now_ns
from lamfs.registry.artifacts import Artifacts
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.journal import Journal
from lamfs.registry.tree import Tree

FIXED = (ROOT_INO, AUTO_INO)


@dataclass(slots=True)
class Removed:
    """What a removal did. ``spool``: name of the spool file that nothing owes any more."""

    inode: Inode
    spool: str | None = None
    trashed: str | None = None
    row_gone: bool = False


@dataclass(slots=True)
class Renamed:
    """What a rename did. ``replaced`` is the file or directory whose name was taken."""

    inode: Inode
    replaced: Removed | None = None
    noop: bool = False
    inherited: str | None = None
    """uid of the artifact whose content the renamed file has become."""


class Namespace:
    """Changes the tree and the artifacts of one Database together."""

    def __init__(self, db: Database, tree: Tree, artifacts: Artifacts, journal: Journal, changes: ChangeLog) -> None:
        self._db = db
        self._tree = tree
        self._artifacts = artifacts
        self._journal = journal
        self._changes = changes

    # -- coming -------------------------------------------------------------------------------------------------

    def create(
        self, parent: int, name: str, mode: int, uid: int, gid: int, *, rdev: int = 0, target: bytes | None = None
    ) -> Inode:
        """Make a directory, symlink, FIFO, socket or device node.

        Raises FsError: ENOENT (parent is gone), ENOTDIR, EEXIST, EPERM (reserved place), ENAMETOOLONG.
        """
        with self._db.transaction():
            return self._create(parent, name, mode, uid, gid, rdev, target)

    def create_file(
        self, parent: int, name: str, mode: int, uid: int, gid: int, *, key_is_virtual: bool = True
    ) -> tuple[Inode, str]:
        """Make a regular file that is about to be written; returns its inode and the name of its spool file."""
        with self._db.transaction():
            inode = self._create(parent, name, mode, uid, gid, 0, None)
            src = spool_name(inode.ino)
            self._journal.begin_put(inode.ino, src, key_is_virtual=key_is_virtual)
            return inode, src

    def _create(self, parent: int, name: str, mode: int, uid: int, gid: int, rdev: int, target: bytes | None) -> Inode:
        directory = self._directory(parent)
        self._refuse_reserved(parent, name)
        if self._tree.lookup(parent, name) is not None:
            raise FsError(errno.EEXIST)
        self._refuse_long(parent, name)
        if directory.mode & stat.S_ISGID:
            # open(2), mkdir(2): a set-group-ID directory hands its group on, and the bit to directories.
            gid = directory.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        now = now_ns()
        inode = self._tree.new_inode(mode, uid, gid, rdev=rdev, now=now, target=target)
        self._tree.add_entry(parent, name, inode, now)
        self._changes.entry(parent, name, inode.ino)
        return inode

    def link(self, ino: int, parent: int, name: str) -> Inode:
        """Give a file one more name. Raises FsError: EPERM (directory), EEXIST, EMLINK, ENOENT, ENAMETOOLONG."""
        with self._db.transaction():
            self._directory(parent)
            self._refuse_reserved(parent, name)
            inode = self._tree.get(ino)
            if inode is None or inode.nlink == 0:
                raise FsError(errno.ENOENT)
            if stat.S_ISDIR(inode.mode):
                raise FsError(errno.EPERM)
            if self._tree.lookup(parent, name) is not None:
                raise FsError(errno.EEXIST)
            self._refuse_long(parent, name)
            self._tree.add_entry(parent, name, inode, now_ns())
            self._changes.entry(parent, name, ino)
            self._changes.attr(ino)
            return inode

    def ensure_directory(self, key: str, uid: int, gid: int) -> int:
        """Inode number of the directory at ``key``, made with its parents when missing.

        Raises InvalidName when a part of the key is not a directory.
        """
        with self._db.transaction():
            ino = ROOT_INO
            for name in key.split("/") if key else ():
                inode = self._tree.lookup(ino, name)
                if inode is None:
                    inode = self._create(ino, name, stat.S_IFDIR | 0o755, uid, gid, 0, None)
                if not stat.S_ISDIR(inode.mode):
                    raise InvalidName(
                        f"'{self._tree.path(inode.ino)}' is a file, so nothing can be stored below it as"
                        f" '{key}'; choose another key.",
                        errno=errno.ENOTDIR,
                    )
                ino = inode.ino
            return ino

    def place(self, inode: Inode, key: str | None, artifact_uid: str, suffix: str) -> None:
        """Name an inode by its artifact's key, or below ``.lamindb`` when the key is None. Raises AlreadyExists."""
        with self._db.transaction():
            if key is None:
                parent, name = AUTO_INO, artifact_uid + suffix
            else:
                directory, name = root_path(key)
                parent = self.ensure_directory(directory, inode.uid, inode.gid)
            if self._tree.lookup(parent, name) is not None:
                raise AlreadyExists(f"The key '{key or name}' is taken; choose another, or delete what is there.")
            self._tree.add_entry(parent, name, inode, now_ns())
            self._changes.entry(parent, name, inode.ino)

    # -- going --------------------------------------------------------------------------------------------------

    def unlink(
        self, parent: int, name: str, *, left: Callable[[int], tuple[int, str] | None] = lambda ino: None
    ) -> Removed:
        """Remove a name of a file. Raises FsError: ENOENT, EISDIR.

        ``left(ino)``: the (parent, name) that the inode has just been moved away from, to be kept as a backup while
        the file is written anew there. Then the new file is the new content of the same artifact, and nothing goes to
        the trash: this is how vim saves.
        """
        with self._db.transaction():
            inode = self._existing(parent, name)
            if stat.S_ISDIR(inode.mode):
                raise FsError(errno.EISDIR)
            before = left(inode.ino) if inode.nlink == 1 else None
            heir = self._tree.lookup(*before) if before is not None else None
            if heir is None or heir.ino == inode.ino or not stat.S_ISREG(heir.mode) or not stat.S_ISREG(inode.mode):
                removed = self._drop_name(parent, name, inode)
            else:
                removed, _ = self._replace_file(parent, name, inode, heir)
                artifact = self._artifacts.by_ino(heir.ino)
                if artifact is not None:
                    self._follow_name(artifact)
            self._changes.entry(parent, name, inode.ino)
            return removed

    def rmdir(self, parent: int, name: str) -> Removed:
        """Remove an empty directory. Raises FsError: ENOENT, ENOTDIR, ENOTEMPTY, EBUSY (``.lamindb``)."""
        with self._db.transaction():
            inode = self._existing(parent, name)
            if not stat.S_ISDIR(inode.mode):
                raise FsError(errno.ENOTDIR)
            removed = self._drop_directory(parent, name, inode)
            self._changes.entry(parent, name, inode.ino)
            return removed

    def _drop_directory(self, parent: int, name: str, inode: Inode) -> Removed:
        if inode.ino in FIXED:
            raise FsError(errno.EBUSY)
        if not self._tree.is_empty(inode.ino):
            raise FsError(errno.ENOTEMPTY)
        self._tree.remove_entry(parent, name, inode, now_ns())
        self._tree.remove_inode(inode.ino)
        return Removed(inode, row_gone=True)

    def _drop_name(self, parent: int, name: str, inode: Inode) -> Removed:
        self._tree.remove_entry(parent, name, inode, now_ns())
        artifact = self._artifacts.by_ino(inode.ino)
        if inode.nlink:
            if artifact is not None:
                self._follow_name(artifact)
            self._changes.attr(inode.ino)
            return Removed(inode)
        if artifact is not None:
            self._artifacts.update(artifact.uid, visibility=TRASH, updated_at=now_ns())
            return Removed(inode, trashed=artifact.uid)
        spool, _ = self._drop_put(inode.ino)
        self._tree.remove_inode(inode.ino)
        return Removed(inode, spool=spool, row_gone=True)

    # -- moving -------------------------------------------------------------------------------------------------

    def rename(self, parent: int, name: str, new_parent: int, new_name: str, *, noreplace: bool = False) -> Renamed:
        """rename(2). Raises FsError: ENOENT, EEXIST (noreplace), EINVAL (into itself), ENOTEMPTY, EISDIR, ENOTDIR,
        ENAMETOOLONG, EBUSY and EPERM (reserved places)."""
        with self._db.transaction():
            inode = self._existing(parent, name)
            self._directory(new_parent)
            target = self._tree.lookup(new_parent, new_name)
            if target is not None and noreplace:
                raise FsError(errno.EEXIST)
            if inode.ino in FIXED or (target is not None and target.ino in FIXED):
                raise FsError(errno.EBUSY)
            self._refuse_reserved(new_parent, new_name)
            directory = stat.S_ISDIR(inode.mode)
            if directory and self._tree.is_below(new_parent, inode.ino):
                raise FsError(errno.EINVAL)
            self._refuse_long(new_parent, new_name)
            result = Renamed(inode)
            if target is not None:
                if target.ino == inode.ino:
                    return Renamed(inode, noop=True)
                if stat.S_ISDIR(target.mode):
                    if not directory:
                        raise FsError(errno.EISDIR)
                    result.replaced = self._drop_directory(new_parent, new_name, target)
                elif directory:
                    raise FsError(errno.ENOTDIR)
                else:
                    result.replaced, result.inherited = self._replace_file(new_parent, new_name, target, inode)
            old_key = self._tree.path_at(parent, name)
            new_key = self._tree.path_at(new_parent, new_name)
            self._tree.move_entry(parent, name, new_parent, new_name, inode, now_ns())
            if directory:
                assert old_key is not None
                assert new_key is not None
                for uid in self._artifacts.rekey(old_key, new_key):
                    self._journal.add_move(uid)
            else:
                artifact = self._artifacts.by_ino(inode.ino)
                if artifact is not None:
                    self._follow_name(artifact)
            self._changes.entry(parent, name, inode.ino)
            self._changes.entry(new_parent, new_name, inode.ino)
            return result

    def _replace_file(self, parent: int, name: str, target: Inode, inode: Inode) -> tuple[Removed, str | None]:
        """Remove ``target`` from its name, and hand its artifact on to ``inode``."""
        artifact = self._artifacts.by_ino(target.ino)
        if artifact is None or target.nlink > 1 or not stat.S_ISREG(inode.mode):
            pending = self._journal.put_of(target.ino) if artifact is None and target.nlink == 1 else None
            removed = self._drop_name(parent, name, target)
            if pending is not None and self._artifacts.by_ino(inode.ino) is None:
                # Closed but not stored yet: whoever saw its uid finds it again.
                self._db.execute("UPDATE journal SET uid=? WHERE op='put' AND ino=?", (pending.uid, inode.ino))
            return removed, None
        self._tree.remove_entry(parent, name, target, now_ns())
        spool, written = self._drop_put(target.ino)
        self._tree.remove_inode(target.ino)
        self._inherit(artifact, inode.ino, intact=written is None)
        return Removed(target, spool=spool, row_gone=True), artifact.uid

    def _drop_put(self, ino: int) -> tuple[str | None, str | None]:
        """Owe nothing for an inode any more; what an upload may have left behind is owed its deletion.

        Returns the free spool file, and the object that may have been written.
        """
        spool, object_key = self._journal.drop_put(ino)
        if object_key is not None and self._artifacts.with_object(object_key) is None:
            self._journal.add_delete(object_key)
        return spool, object_key

    def _inherit(self, artifact: ArtifactRecord, ino: int, *, intact: bool) -> None:
        """The bytes of inode ``ino`` become the content of ``artifact``; an artifact that ``ino`` had ends here.

        Not ``intact``: an upload that is not owed any more may have written over the artifact's object.
        """
        source = self._artifacts.by_ino(ino)
        if source is not None:
            self._artifacts.remove(source.uid)
            self._db.execute("DELETE FROM journal WHERE op='move' AND uid=?", (source.uid,))
            if intact and source.revision.content.same_bytes(artifact.revision.content):
                self._journal.add_delete(source.revision.object_key)
            else:
                self._artifacts.set_revision(artifact.uid, source.revision)
                # The stale object goes, or the move writes over it if it still leads there when it comes.
                self._journal.add_delete(artifact.revision.object_key)
                self._journal.add_move(artifact.uid)
        self._artifacts.update(artifact.uid, ino=ino)
        self._db.execute("UPDATE journal SET uid=? WHERE op='put' AND ino=?", (artifact.uid, ino))

    def _follow_name(self, artifact: ArtifactRecord) -> None:
        """Bring key and suffix of an artifact in line with the first name of its inode."""
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
        if object_key_for(artifact.uid, suffix, key, artifact.key_is_virtual) != artifact.revision.object_key:
            self._journal.add_move(artifact.uid)

    # -- the trash ----------------------------------------------------------------------------------------------

    def trash(self, uid: str) -> list[Removed]:
        """Move an artifact to the trash, from all its names. Raises NotFound."""
        with self._db.transaction():
            artifact = self._artifact(uid)
            assert artifact.ino is not None
            names = self._tree.names(artifact.ino)
            return [self.unlink(parent, name) for parent, name in names]

    def restore(self, uid: str, key: str | None = None) -> ArtifactRecord:
        """Bring an artifact back from the trash to where it was, or to ``key``. Raises NotFound, AlreadyExists."""
        with self._db.transaction():
            artifact = self._artifact(uid)
            if artifact.visibility != TRASH:
                return artifact
            inode = self._tree.get(artifact.ino or 0)
            assert inode is not None
            key = artifact.key if key is None else check_key(key, real=not artifact.key_is_virtual)
            suffix = artifact.suffix if key is None else suffix_of(root_path(key)[1])
            self.place(inode, key, artifact.uid, suffix)
            self._artifacts.update(uid, visibility=SHOWN, key=key, suffix=suffix, updated_at=now_ns())
            if object_key_for(uid, suffix, key, artifact.key_is_virtual) != artifact.revision.object_key:
                self._journal.add_move(uid)
            return self._artifact(uid)

    def purge(self, uid: str, *, storage: bool = True) -> ArtifactRecord:
        """Delete an artifact for good: names, row and inode now, the object afterwards through the journal.

        With ``storage=False`` the object is left where it is. Returns the record as it was.
        """
        with self._db.transaction():
            self.trash(uid)
            artifact = self._artifact(uid)
            assert artifact.ino is not None
            self._drop_put(artifact.ino)
            self._db.execute("DELETE FROM journal WHERE op='move' AND uid=?", (uid,))
            self._artifacts.remove(uid)
            self._tree.remove_inode(artifact.ino)
            if storage:
                self._journal.add_delete(artifact.revision.object_key)
            self._changes.record(artifact.ino)
            return artifact

    # -- attributes ---------------------------------------------------------------------------------------------

    def set_attributes(self, ino: int, **columns: int) -> None:
        """Set mode, uid, gid, size or times of an inode, and log it."""
        with self._db.transaction():
            self._tree.update(ino, **columns)
            self._changes.attr(ino)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _artifact(self, uid: str) -> ArtifactRecord:
        artifact = self._artifacts.by_uid(uid)
        if artifact is None:
            raise NotFound(f"There is no artifact with uid '{uid}'; 'lamfs ls' shows what there is.")
        return artifact

    def _existing(self, parent: int, name: str) -> Inode:
        self._directory(parent)
        inode = self._tree.lookup(parent, name)
        if inode is None:
            raise FsError(errno.ENOENT)
        return inode

    def _directory(self, ino: int) -> Inode:
        inode = self._tree.get(ino)
        if inode is None:
            raise FsError(errno.ENOENT)
        if not stat.S_ISDIR(inode.mode):
            raise FsError(errno.ENOTDIR)
        return inode

    def _refuse_reserved(self, parent: int, name: str) -> None:
        if parent == AUTO_INO or (parent == ROOT_INO and name == ".lamfs"):
            raise FsError(errno.EPERM)

    def _refuse_long(self, parent: int, name: str) -> None:
        """A key is at most PATH_MAX bytes; a program that walks down with relative names would get further."""
        path = self._tree.path_at(parent, name)
        if path is not None and len(path.encode()) > PATH_MAX:
            raise FsError(errno.ENAMETOOLONG)


def spool_name(ino: int) -> str:
    """A fresh name for a spool file of an inode."""
    return f"{ino:x}-{secrets.token_hex(6)}"
