"""Names and artifacts together: create, unlink, rename, trash, restore, purge. Synchronous; the Database's thread.

Each public method is one transaction, with its change-log rows. The rules that make files artifacts live here:

- Removing the last name of a file moves its artifact to the trash (visibility -1). The inode row stays, without entry.
- Renaming a file over an artifact replaces that artifact's content. uid, description and provenance stay, and the inode
  becomes the renamed file's (docs/SEMANTICS.md).
- Keys follow their names at once. The objects of real keys follow later, through the journal.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lamfs.errors import AlreadyExists, FsError, InvalidArgument, InvalidName, NotFound
from lamfs.keys import check_key, into, is_in_place, root_path, spool_name, suffix_of
from lamfs.model import AUTO_INO, AUTO_KEY_PREFIX, ROOT_INO, SHOWN, TRASH, ArtifactRecord, Inode
from lamfs.registry.artifacts import Artifacts
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.identity import Identity, Removed
from lamfs.registry.journal import Journal
from lamfs.registry.rules import RETAINED
from lamfs.registry.tree import Tree
from lamfs.scratch import Matcher, is_probe, nothing

FIXED = (ROOT_INO, AUTO_INO)


class Backup(NamedTuple):
    """A file that was renamed aside and is kept. ``ended``: as in Renamed."""

    ino: int
    ended: ArtifactRecord | str | None = None


@dataclass(slots=True)
class Renamed:
    """What a rename did. ``replaced``: the file or directory that had the new name."""

    inode: Inode
    replaced: Removed | None = None
    noop: bool = False
    inherited: str | None = None
    """uid of the artifact whose content the renamed file has become."""
    ended: ArtifactRecord | str | None = None
    """What the renamed file was known as before it became the content of another artifact."""
    kept: bool = False
    """Whether the artifact of the backup went on with the renamed file."""


class Namespace:
    """Changes the tree and the artifacts of one Database together.

    ``now``: the time of a change, in nanoseconds since the epoch.
    """

    def __init__(
        self,
        db: Database,
        tree: Tree,
        artifacts: Artifacts,
        journal: Journal,
        changes: ChangeLog,
        scratch: Matcher = nothing,
    ) -> None:
        self._db = db
        self._tree = tree
        self._artifacts = artifacts
        self._journal = journal
        self._changes = changes
        self._identity = Identity(db, tree, artifacts, journal, changes, scratch)

    # -- coming -------------------------------------------------------------------------------------------------

    def create(
        self,
        parent: int,
        name: str,
        mode: int,
        uid: int,
        gid: int,
        *,
        now: int,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> Inode:
        """Make a directory, symlink, FIFO, socket or device node.

        Raises FsError: ENOENT (parent is gone), ENOTDIR, EEXIST, EPERM (reserved place).
        """
        with self._db.transaction():
            return self._create(parent, name, mode, uid, gid, rdev, target, now)

    def create_file(
        self,
        parent: int,
        name: str,
        mode: int,
        uid: int,
        gid: int,
        *,
        now: int,
        artifact_uid: str,
        token: str,
        key_is_virtual: bool = True,
        backup: Backup | None = None,
    ) -> tuple[Inode, str]:
        """Make a regular file that is about to be written. Returns its inode and the name of its spool file.

        ``artifact_uid``: of the artifact that is new by this. ``token``: of the spool file (keys.spool_token).
        ``backup``: the file that had this name until now, and is kept as a backup (Identity.keep_backup): then the file
        goes on with its artifact, and the backup becomes the new one.
        """
        with self._db.transaction():
            inode = self._create(parent, name, mode, uid, gid, 0, None, now)
            src = spool_name(inode.ino, token)
            self._journal.begin_first_put(
                inode.ino, src, now=now, artifact_uid=artifact_uid, key_is_virtual=key_is_virtual
            )
            if backup is not None:
                self._identity.keep_backup(backup.ino, inode.ino, backup.ended, copy_uid=artifact_uid, now=now)
            return inode, src

    def _create(
        self, parent: int, name: str, mode: int, uid: int, gid: int, rdev: int, target: bytes | None, now: int
    ) -> Inode:
        directory = self._directory(parent)
        self._refuse_reserved(parent, name)
        if self._tree.lookup(parent, name) is not None:
            raise FsError(errno.EEXIST)
        if directory.mode & stat.S_ISGID:
            # open(2), mkdir(2): new entries get the group of a set-group-ID directory; directories also get the bit.
            gid = directory.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        inode = self._tree.new_entry(parent, name, mode, uid, gid, rdev=rdev, now=now, target=target)
        self._changes.entry(parent, name, inode.ino)
        return inode

    def link(self, ino: int, parent: int, name: str, *, now: int) -> Inode:
        """Give a file one more name. Raises FsError: EPERM (directory), EEXIST, EMLINK, ENOENT."""
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
            self._tree.add_entry(parent, name, inode, now)
            self._identity.follow_scratch(inode)
            self._changes.entry(parent, name, ino)
            self._changes.attr(ino)
            return inode

    def ensure_directory(self, key: str, uid: int, gid: int, *, now: int) -> int:
        """Inode number of the directory at ``key``. Makes it and its parents if they are missing.

        Raises InvalidName if a part of the key is not a directory.
        """
        with self._db.transaction():
            ino = ROOT_INO
            for name in key.split("/") if key else ():
                inode = self._tree.lookup(ino, name)
                if inode is None:
                    inode = self._create(ino, name, stat.S_IFDIR | 0o755, uid, gid, 0, None, now)
                if not stat.S_ISDIR(inode.mode):
                    raise InvalidName(
                        f"'{self._tree.path(inode.ino)}' is a file, so nothing can be stored below it as"
                        f" '{key}'; choose another key.",
                        errno=errno.ENOTDIR,
                    )
                ino = inode.ino
            return ino

    def place(self, inode: Inode, key: str | None, artifact_uid: str, suffix: str, *, now: int) -> None:
        """Name an inode by its artifact's key, or below ``.lamindb`` if the key is None. Raises AlreadyExists."""
        with self._db.transaction():
            if key is None:
                parent, name = AUTO_INO, artifact_uid + suffix
            else:
                directory, name = root_path(key)
                parent = self.ensure_directory(directory, inode.uid, inode.gid, now=now)
            if self._tree.lookup(parent, name) is not None:
                raise AlreadyExists(self._taken(key or f"{AUTO_KEY_PREFIX}{name}", parent, name))
            self._tree.add_entry(parent, name, inode, now)
            self._changes.entry(parent, name, inode.ino)

    def _taken(self, key: str, parent: int, name: str) -> str:
        there = self._tree.lookup(parent, name)
        what = "something that has come meanwhile"
        if there is not None and stat.S_ISDIR(there.mode):
            what = "a directory"
        elif there is not None:
            artifact = self._artifacts.by_ino(there.ino)
            what = f"the artifact {artifact.uid}" if artifact is not None else "a file that is no artifact yet"
        return f"The key '{key}' is taken by {what}; choose another key, or rename or delete what is there."

    # -- going --------------------------------------------------------------------------------------------------

    def unlink(
        self,
        parent: int,
        name: str,
        *,
        now: int,
        left: Callable[[int], tuple[int, str] | None] = lambda ino: None,
        is_copy: Callable[[int], bool] = lambda ino: False,
    ) -> Removed:
        """Remove a name of a file. Raises FsError: ENOENT, EISDIR.

        ``is_copy(ino)``: whether the inode is a backup whose artifact was handed on. Such a backup is deleted for good.

        ``left(ino)``: the (parent, name) from which the inode has just been moved, as a backup while the file is
        rewritten there. Then the new file is the new content of the same artifact, and nothing goes to the trash: vim
        saves like this.
        """
        with self._db.transaction():
            inode = self._existing(parent, name)
            if stat.S_ISDIR(inode.mode):
                raise FsError(errno.EISDIR)
            if inode.nlink == 1 and is_copy(inode.ino):
                removed = self._identity.drop_copy(parent, name, inode, now)
                self._changes.entry(parent, name, inode.ino)
                return removed
            before = left(inode.ino) if inode.nlink == 1 else None
            heir = self._tree.lookup(*before) if before is not None else None
            if heir is None or heir.ino == inode.ino or not stat.S_ISREG(heir.mode) or not stat.S_ISREG(inode.mode):
                removed = self._identity.drop_name(parent, name, inode, now)
            else:
                removed, _ = self._identity.replace_file(parent, name, inode, heir, now)
                artifact = self._artifacts.by_ino(heir.ino)
                if artifact is not None:
                    self._identity.follow_name(artifact, now)
            self._changes.entry(parent, name, inode.ino)
            return removed

    def rmdir(self, parent: int, name: str, *, now: int) -> Removed:
        """Remove an empty directory. Raises FsError: ENOENT, ENOTDIR, ENOTEMPTY, EBUSY (``.lamindb``)."""
        with self._db.transaction():
            inode = self._existing(parent, name)
            if not stat.S_ISDIR(inode.mode):
                raise FsError(errno.ENOTDIR)
            removed = self._drop_directory(parent, name, inode, now)
            self._changes.entry(parent, name, inode.ino)
            return removed

    def _drop_directory(self, parent: int, name: str, inode: Inode, now: int) -> Removed:
        if inode.ino in FIXED:
            raise FsError(errno.EBUSY)
        if not self._tree.is_empty(inode.ino):
            raise FsError(errno.ENOTEMPTY)
        self._tree.remove_entry(parent, name, inode, now)
        xattrs = self._tree.remove_inode(inode.ino)
        return Removed(inode, row_gone=True, xattrs=xattrs)

    # -- moving -------------------------------------------------------------------------------------------------

    def rename(
        self,
        parent: int,
        name: str,
        new_parent: int,
        new_name: str,
        *,
        now: int,
        noreplace: bool = False,
        backup: Backup | None = None,
        copy_uid: str | None = None,
    ) -> Renamed:
        """rename(2). ``backup``: as for create_file, if the new name is free or is another name of the backup. It goes
        with ``copy_uid``, the uid of the artifact that the backup becomes.

        Raises FsError: ENOENT, EEXIST (noreplace), EINVAL (into itself), ENOTEMPTY, EISDIR, ENOTDIR, EBUSY and EPERM
        (reserved places).
        """
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
            result = Renamed(inode)
            cookie = None
            if target is not None:
                if target.ino == inode.ino:
                    return Renamed(inode, noop=True)
                cookie = self._tree.cookie(new_parent, new_name)
                if stat.S_ISDIR(target.mode):
                    if not directory:
                        raise FsError(errno.EISDIR)
                    result.replaced = self._drop_directory(new_parent, new_name, target, now)
                elif directory:
                    raise FsError(errno.ENOTDIR)
                else:
                    result.ended = self._identity.known_as(inode.ino)
                    result.replaced, result.inherited = self._identity.replace_file(
                        new_parent, new_name, target, inode, now
                    )
            old_key = self._tree.path_at(parent, name)
            new_key = self._tree.path_at(new_parent, new_name)
            self._tree.move_entry(parent, name, new_parent, new_name, inode, now, cookie=cookie)
            if directory:
                assert old_key is not None
                assert new_key is not None
                if not self._artifacts.rekey_later(old_key, new_key):
                    for uid in self._artifacts.rekey(old_key, new_key):
                        self._journal.add_move(uid, now=now)
            else:
                artifact = self._artifacts.by_ino(inode.ino)
                if artifact is not None:
                    self._identity.follow_name(artifact, now)
                free = target is None or (backup is not None and target.ino == backup.ino)
                if backup is not None and free and stat.S_ISREG(inode.mode):
                    assert copy_uid is not None
                    result.kept = self._identity.keep_backup(
                        backup.ino, inode.ino, backup.ended, copy_uid=copy_uid, now=now
                    )
                self._identity.follow_scratch(inode)
            self._changes.entry(parent, name, inode.ino)
            self._changes.entry(new_parent, new_name, inode.ino)
            return result

    def exchange(self, parent: int, name: str, other_parent: int, other_name: str, *, now: int) -> tuple[Inode, Inode]:
        """renameat2(2) with RENAME_EXCHANGE: two names exchange their inodes. Artifacts go with their files.

        Returns the inode that was at ``name`` and the one at ``other_name``. Raises FsError: ENOENT, EINVAL (one is
        inside the other), EBUSY and EPERM (reserved places).
        """
        with self._db.transaction():
            one, two = self._existing(parent, name), self._existing(other_parent, other_name)
            if one.ino in FIXED or two.ino in FIXED:
                raise FsError(errno.EBUSY)
            self._refuse_reserved(parent, name)
            self._refuse_reserved(other_parent, other_name)
            if self._tree.is_below(other_parent, one.ino) or self._tree.is_below(parent, two.ino):
                raise FsError(errno.EINVAL)
            if one.ino == two.ino:
                return one, two
            first, second = self._tree.path_at(parent, name), self._tree.path_at(other_parent, other_name)
            self._tree.exchange_entries(parent, name, one, other_parent, other_name, two, now)
            if first is not None and second is not None:
                self._exchange_keys((one, first), (two, second), now)
            for inode in (one, two):
                self._identity.follow_scratch(inode)
            self._changes.entry(parent, name, two.ino)
            self._changes.entry(other_parent, other_name, one.ino)
            self._changes.attr(one.ino)
            self._changes.attr(two.ino)
            return one, two

    def _exchange_keys(self, one: tuple[Inode, str], two: tuple[Inode, str], now: int) -> None:
        """Update the keys after an exchange. No key begins with ``//``, so keys can wait there during the swap."""
        for (inode, old), spare in ((one, "//1"), (two, "//2")):
            artifact = self._artifacts.by_ino(inode.ino)
            if stat.S_ISDIR(inode.mode):
                self._artifacts.rekey(old, spare)
            elif artifact is not None and artifact.key is not None:
                self._artifacts.update(artifact.uid, key=f"{spare}/")
        for (inode, _), spare, new in ((one, "//1", two[1]), (two, "//2", one[1])):
            if stat.S_ISDIR(inode.mode):
                for uid in self._artifacts.rekey(spare, new):
                    self._journal.add_move(uid, now=now)
            else:
                artifact = self._artifacts.by_ino(inode.ino)
                if artifact is not None:
                    self._identity.follow_name(artifact, now)

    def follow(self, ino: int, *, now: int) -> None:
        """The name of a file has changed: update its artifact and its pending put."""
        artifact, inode = self._artifacts.by_ino(ino), self._tree.get(ino)
        if artifact is not None:
            self._identity.follow_name(artifact, now)
        if inode is not None:
            self._identity.follow_scratch(inode)

    def is_scratch(self, ino: int) -> bool:
        """As Identity.is_scratch."""
        return self._identity.is_scratch(ino)

    def is_scratch_name(self, name: str) -> bool:
        """Whether a file with that name would be scratch."""
        return self._identity.scratch(name)

    def is_probe(self, ino: int) -> bool:
        """Whether all names of an empty file are those of a probe (scratch.is_probe)."""
        names = self._tree.names(ino)
        return bool(names) and all(is_probe(name) for _, name in names)

    def scratch_files(self) -> list[tuple[str, int]]:
        """Key and size in bytes of each scratch file that is not empty. Their bytes are on this machine only."""
        return [(self._tree.path(ino) or f"inode {ino}", size) for ino, size in self._journal.scratch_files()]

    def unread_scratch(self) -> list[Inode]:
        """Scratch files whose bytes this registry cannot find: they can only be on another machine."""
        rows = self._db.all(
            f"SELECT i.ino FROM inode i WHERE i.mode & {0o170000} = {stat.S_IFREG} AND i.size>0"
            " AND NOT EXISTS (SELECT 1 FROM artifact a WHERE a.ino=i.ino)"
            " AND NOT EXISTS (SELECT 1 FROM journal j WHERE j.op='put' AND j.ino=i.ino) ORDER BY i.ino"
        )
        found = [self._tree.get(ino) for (ino,) in rows if self.is_scratch(ino)]
        return [inode for inode in found if inode is not None]

    # -- artifacts ----------------------------------------------------------------------------------------------

    def rename_artifact(self, uid: str, key: str, *, now: int) -> None:
        """Give an artifact another key: what ``mv`` of its first name does. Directories of the key are made.

        Raises AlreadyExists (something has the key: it is not replaced), InvalidName (a part of the key is a file),
        InvalidArgument (the artifact is in the trash), NotFound.
        """
        with self._db.transaction():
            artifact = self._artifact(uid)
            if artifact.key == key and artifact.visibility != TRASH:
                return
            inode = self._tree.get(artifact.ino or 0)
            first = self._tree.first_name(artifact.ino or 0)
            if inode is None or first is None:
                raise InvalidArgument(
                    f"The artifact {uid} is in the trash; restore it as '{key}' to have it back there."
                )
            there = self._tree.resolve(key)
            if there is not None:
                what = "a directory" if stat.S_ISDIR(there.mode) else "another file"
                raise AlreadyExists(
                    f"'{artifact.key or uid}' cannot get the key '{key}': {what} has it; choose another, or rename or"
                    " delete what is there."
                )
            folder, name = root_path(key)
            parent = self.ensure_directory(folder, inode.uid, inode.gid, now=now)
            self.rename(*first, parent, name, now=now)

    def edit_artifact(
        self,
        uid: str,
        *,
        now: int,
        key: str | None,
        description: str | None,
        run_id: int | None,
        transform_id: int | None,
    ) -> None:
        """Set what a person may change of an artifact without new content. ``key``: a new one; None: it stays.

        Raises what ``rename_artifact`` raises; then nothing has changed.
        """
        with self._db.transaction():
            if key is not None:
                self.rename_artifact(uid, key, now=now)
            artifact = self._artifact(uid)
            if (artifact.description, artifact.run_id) != (description, run_id):
                self._artifacts.update(uid, description=description, run_id=run_id, transform_id=transform_id)
                assert artifact.ino is not None
                self._changes.record(artifact.ino)

    def trash(self, uid: str, *, now: int) -> list[Removed]:
        """Move an artifact to the trash, from all its names. Raises NotFound."""
        with self._db.transaction():
            artifact = self._artifact(uid)
            assert artifact.ino is not None
            names = self._tree.names(artifact.ino)
            return [self.unlink(parent, name, now=now) for parent, name in names]

    def restore(self, uid: str, key: str | None = None, *, now: int) -> ArtifactRecord:
        """Bring an artifact back from the trash to where it was, or to ``key``. ``folder/`` keeps its name in that
        folder.

        Raises NotFound, AlreadyExists, InvalidName; InvalidArgument if it is not in the trash and has another key.
        """
        with self._db.transaction():
            artifact = self._artifact(uid)
            if key is not None:
                name = root_path(artifact.key)[1] if artifact.key else f"{uid}{artifact.suffix}"
                key = check_key(into(key, name), real=not artifact.key_is_virtual)
            if artifact.visibility != TRASH:
                if key not in (None, artifact.key):
                    raise InvalidArgument(
                        f"'{artifact.place}' is not in the trash, so it cannot be restored as '{key}'; rename it, or"
                        " save it under that key."
                    )
                return artifact
            inode = self._tree.get(artifact.ino or 0)
            assert inode is not None
            key = artifact.key if key is None else key
            suffix = artifact.suffix if key is None else suffix_of(root_path(key)[1])
            self.place(inode, key, artifact.uid, suffix, now=now)
            self._artifacts.update(uid, visibility=SHOWN, key=key, suffix=suffix, updated_at=now)
            if not is_in_place(artifact.revision.object_key, uid, suffix, key, artifact.key_is_virtual):
                self._journal.add_move(uid, now=now)
            return self._artifact(uid)

    def purge(self, uid: str, *, now: int, storage: bool = True) -> ArtifactRecord:
        """Delete an artifact for good: names, row and inode now, the object afterwards through the journal.

        With ``storage=False`` the object stays, and is recorded as wanted (``is_retained``). Returns the record as it
        was. Raises NotFound.
        """
        with self._db.transaction():
            self.trash(uid, now=now)
            artifact = self._artifact(uid)
            assert artifact.ino is not None
            dropped = self._identity.drop_put(artifact.ino, now)
            self._journal.drop_move(uid)
            self._artifacts.remove(uid)
            self._tree.remove_inode(artifact.ino)
            object_key = artifact.revision.object_key
            if storage:
                self._journal.add_delete(object_key, dropped.meant(artifact.revision), now=now, uid=uid)
            else:
                self._db.set_meta(f"{RETAINED}{object_key}", 1)
            self._changes.record(artifact.ino)
            return artifact

    def is_retained(self, object_key: str) -> bool:
        """Whether somebody deleted the artifact of an object, and wanted the object to stay."""
        return bool(self._db.get_meta(f"{RETAINED}{object_key}"))

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
