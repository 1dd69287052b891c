"""Names: lookup, readdir, mkdir, unlink, rename, link and other operations on directory entries. Loop only.

Every call is one registry transaction, and none waits for anything else.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

from lamfs.errors import FsError
from lamfs.fs.backups import is_backup
from lamfs.fs.context import Context
from lamfs.fs.control import NAME as CONTROL_NAME
from lamfs.fs.state import Event
from lamfs.keys import check_name
from lamfs.model import AUTO_INO, ROOT_INO, ArtifactRecord, Inode, new_uid, now_ns
from lamfs.registry import Backup, Removed
from lamfs.registry.tree import NEWEST

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
FIRST_COOKIE = 2
"""Cookies 1 and 2 are ``.`` and ``..``. An entry's cookie is its registry cookie plus 2."""
SYMLINK_MAX = 4095


class Names:
    """Operations on directory entries of one mount."""

    def __init__(self, context: Context) -> None:
        self._c = context

    # -- looking ------------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> tuple[int, Inode] | None:
        """FUSE inode and attributes of an entry, with one lookup counted. None if there is no such entry.

        Raises FsError: ESTALE (``.`` or ``..`` of an inode that the kernel has forgotten), ENAMETOOLONG. A name that
        cannot exist (not UTF-8) gives None.
        """
        if name in (b".", b".."):
            return self._dot(parent, name)
        try:
            text = check_name(name)
        except FsError as error:
            if error.errno == errno.EILSEQ:
                return None
            raise
        inode = self._c.registry.tree.lookup(self._c.nodes.ino(parent), text)
        if inode is None:
            return None
        fino, shown = self._c.shown(inode)
        self._c.nodes.looked_up(fino, inode.revision)
        return fino, shown

    def _dot(self, parent: int, name: bytes) -> tuple[int, Inode]:
        ino: int | None = self._c.nodes.ino(parent)
        if name == b".." and ino != ROOT_INO:
            ino = self._c.registry.tree.parent(ino or 0)
        inode = self._c.registry.tree.get(ino) if ino is not None else None
        if inode is None:
            raise FsError(errno.ESTALE)
        fino, shown = self._c.shown(inode)
        self._c.nodes.looked_up(fino, inode.revision)
        return fino, shown

    def entries(self, directory: int, cookie: int, last: int | None = None) -> Iterator[tuple[int, bytes, int, Inode]]:
        """(cookie, name, FUSE inode, attributes) of a directory's entries after ``cookie``, ``.`` and ``..`` first.

        Counts no lookup: the caller does, for each entry that the kernel took. ``.lamindb`` is shown if it has entries.
        The control directory is never shown. Entries with a registry cookie above ``last`` are left out.
        """
        tree = self._c.registry.tree
        inode = self._c.inode(directory)
        if cookie < 1:
            yield 1, b".", directory, inode
        if cookie < FIRST_COOKIE:
            above = tree.parent(directory) if directory != ROOT_INO else ROOT_INO
            up = tree.get(above) if above is not None else None
            yield FIRST_COOKIE, b"..", above or directory, up or inode
        for found, name, inode in tree.walk(directory, max(cookie - FIRST_COOKIE, 0), NEWEST if last is None else last):
            if inode.ino == AUTO_INO and tree.is_empty(AUTO_INO):
                continue
            fino, shown = self._c.shown(inode)
            yield found + FIRST_COOKIE, name.encode(), fino, shown

    def readlink(self, fino: int) -> bytes:
        """Target of a symlink. Raises FsError(EINVAL) for another kind."""
        target = self._c.registry.tree.symlink_target(self._c.nodes.ino(fino))
        self._c.atimes.read(self._c.inode(fino))
        return target

    # -- making -------------------------------------------------------------------------------------------------

    def make(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, rdev: int = 0, target: bytes | None = None
    ) -> tuple[int, Inode]:
        """mkdir, mknod and symlink. Raises FsError like Namespace.create, and ENAMETOOLONG for a long target."""
        if target is not None and not 0 < len(target) <= SYMLINK_MAX:
            raise FsError(errno.ENAMETOOLONG if target else errno.ENOENT)
        inode = self._c.verbs.names.create(
            self._c.nodes.ino(parent), check_name(name), mode, uid, gid, now=now_ns(), rdev=rdev, target=target
        )
        self._c.nodes.looked_up(inode.ino, inode.revision)
        return inode.ino, inode

    def link(self, fino: int, parent: int, name: bytes) -> tuple[int, Inode]:
        """link(2)."""
        ino, place, known = self._c.nodes.ino(fino), self._c.nodes.ino(parent), check_name(name)
        inode = self._c.verbs.names.link(ino, place, known, now=now_ns())
        for at, old in self._c.registry.tree.names(ino):
            if at == place and is_backup(known, old):
                self._put_aside(inode, place, old, known)
                break
        state = self._c.state_of(ino)
        if state is not None:
            state.inode.nlink, state.inode.ctime_ns = inode.nlink, inode.ctime_ns
        fino, shown = self._c.shown(inode)
        self._c.nodes.looked_up(fino, inode.revision)
        return fino, shown

    # -- removing -----------------------------------------------------------------------------------------------

    def unlink(self, parent: int, name: bytes) -> None:
        """unlink(2): the artifact goes to the trash. Open handles keep the file."""
        known = self._known_name(parent, name)

        backups = self._c.backups
        removed = self._c.verbs.names.unlink(
            self._c.nodes.ino(parent),
            known,
            now=now_ns(),
            left=lambda ino: backups.left(ino, known),
            is_copy=lambda ino: backups.is_copy(ino, known),
        )
        self._left(removed)
        self._c.uploader.notify()

    def rmdir(self, parent: int, name: bytes) -> None:
        """rmdir(2)."""
        known = self._known_name(parent, name)
        self._left(self._c.verbs.names.rmdir(self._c.nodes.ino(parent), known, now=now_ns()))

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """renameat2(2), with RENAME_NOREPLACE or RENAME_EXCHANGE. Raises FsError(EINVAL) for other flags."""
        if flags == RENAME_EXCHANGE:
            self._exchange(parent, name, new_parent, new_name)
            return
        if flags & ~RENAME_NOREPLACE:
            raise FsError(errno.EINVAL)
        backups, known, new_known = self._c.backups, self._known_name(parent, name), check_name(new_name)
        place, new_place = self._c.nodes.ino(parent), self._c.nodes.ino(new_parent)
        backup = backups.kept(new_place, new_known)
        result = self._c.verbs.names.rename(
            place,
            known,
            new_place,
            new_known,
            now=now_ns(),
            noreplace=bool(flags & RENAME_NOREPLACE),
            backup=backup,
            copy_uid=None if backup is None else new_uid(),
        )
        if result.noop:
            return
        if backup is not None and result.kept:
            backups.handed(backup)
        if result.replaced is not None:
            self._left(result.replaced)
            if result.replaced.inode.nlink and not result.kept:
                self._put_aside(result.replaced.inode, new_place, new_known, "")
        if place == new_place and known in new_known:
            self._put_aside(result.inode, place, known, new_known, result.ended)
        state = self._c.state_of(result.inode.ino)
        if state is not None:
            state.inode.ctime_ns = result.inode.ctime_ns
        self._c.uploader.notify()

    def _exchange(self, parent: int, name: bytes, other_parent: int, other_name: bytes) -> None:
        known, other_known = self._known_name(parent, name), self._known_name(other_parent, other_name)
        places = (self._c.nodes.ino(parent), self._c.nodes.ino(other_parent))
        one, two = self._c.verbs.names.exchange(places[0], known, places[1], other_known, now=now_ns())
        for inode, left, at in ((one, (places[0], known), other_known), (two, (places[1], other_known), known)):
            # A program that saves by an exchange removes the old content next. Its artifact stays at the name it has
            # left.
            self._put_aside(inode, *left, at)
            state = self._c.state_of(inode.ino)
            if state is not None:
                state.inode.ctime_ns = inode.ctime_ns
        self._c.uploader.notify()

    def _put_aside(
        self, inode: Inode, place: int, name: str, at: str, ended: ArtifactRecord | str | None = None
    ) -> None:
        if stat.S_ISREG(inode.mode):
            self._c.backups.put_aside(Backup(inode.ino, ended), place, name, at)

    def _known_name(self, parent: int, name: bytes) -> str:
        """A name that must exist. An impossible name is ENOENT. The control directory cannot be changed: EPERM."""
        if parent == ROOT_INO and name == CONTROL_NAME:
            raise FsError(errno.EPERM)
        try:
            return check_name(name)
        except FsError as error:
            raise FsError(errno.ENOENT if error.errno == errno.EILSEQ else error.errno) from None

    def _left(self, removed: Removed) -> None:
        """An inode has lost a name: keep what open handles and the kernel still need of it."""
        inode = removed.inode
        state = self._c.state_of(inode.ino)
        if state is not None:
            state.inode.nlink, state.inode.ctime_ns = inode.nlink, inode.ctime_ns
        if inode.nlink:
            return
        if self._c.nodes.known(self._c.nodes.fino(inode.ino)):
            self._c.nodes.unlinked.add(inode.ino)
        if removed.row_gone:
            self._c.uploader.abandon(inode.ino)
        if removed.row_gone and self._c.nodes.known(self._c.nodes.fino(inode.ino)):
            if state is not None:
                inode = state.inode
            self._c.nodes.ghosts[inode.ino] = inode
            self._c.nodes.ghost_xattrs[inode.ino] = removed.xattrs
        if state is not None and stat.S_ISREG(inode.mode):
            # Now only its handles have it. A spool that still has to be stored for the trash is not written any more.
            owed = self._c.registry.journal.put_of(inode.ino)
            if owed is not None and owed.state == "open" and owed.owner == self._c.registry.journal.owner:
                # What was written so far goes to the trash.
                self._c.owe(state)
            state.become(Event.UNLINK if owed is None or state.spool is None else Event.TRASH)
            state.dirty = False
        elif removed.spool is not None:
            self._c.spool.unlink(removed.spool)
