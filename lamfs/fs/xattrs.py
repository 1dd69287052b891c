"""Extended attributes (xattr(7)), for mounts with ``-o xattr``. Loop only.

``user.lamfs.*`` are made from the artifact's record; only ``user.lamfs.description`` can be written. The others are not
listed, so that ``cp --preserve=xattr`` and ``rsync -X`` do not try to set them on a copy, which is its own artifact.
Other attributes in ``user.``, ``security.`` and ``trusted.`` are kept in the registry.
"""

from __future__ import annotations

import errno
import os
import stat

from lamfs.errors import FsError
from lamfs.fs.context import Context
from lamfs.model import DESCRIPTION_XATTR, ArtifactRecord, now_ns
from lamfs.registry.attributes import check_list

OWN = "user.lamfs."
NAME_MAX = 255
VALUE_MAX = 65_536


class Xattrs:
    """Extended attributes of one mount's inodes."""

    def __init__(self, context: Context) -> None:
        self._c = context

    def _ino(self, fino: int) -> int:
        self._c.inode(fino)
        return self._c.nodes.ino(fino)

    def _own(self, ino: int, name: str) -> bytes | None:
        """Value of one of lamfs's own attributes; None when the file does not have it."""
        record = self._c.registry.artifacts.by_ino(ino)
        if record is None:
            return self._stored(ino, name)
        value = self._values(record).get(name)
        return None if value is None else value.encode()

    def _values(self, record: ArtifactRecord) -> dict[str, str | None]:
        info = self._c.registry.describe(record)
        return {
            OWN + "uid": record.uid,
            OWN + "hash": record.hash,
            OWN + "hash_type": record.revision.content.hash_type,
            DESCRIPTION_XATTR: record.description,
            OWN + "created_by": info["created_by"],
            OWN + "run": info["run"],
            OWN + "key_is_virtual": "1" if record.key_is_virtual else "0",
            OWN + "storage_path": info["storage_path"],
        }

    def get(self, fino: int, name: bytes) -> bytes:
        """getxattr(2). Raises FsError: ENODATA, EOPNOTSUPP."""
        ino, text = self._ino(fino), self._name(name)
        value = self._own(ino, text) if text.startswith(OWN) else self._stored(ino, text)
        if value is None:
            raise FsError(errno.ENODATA)
        return value

    def names(self, fino: int, *, trusted: bool = True) -> list[bytes]:
        """listxattr(2). ``trusted.*`` is shown to privileged processes only (xattr(7))."""
        ino = self._ino(fino)
        names = list(self._sizes(ino))
        if DESCRIPTION_XATTR not in names and self._own(ino, DESCRIPTION_XATTR) is not None:
            names.insert(0, DESCRIPTION_XATTR)
        return [name.encode() for name in names if trusted or not name.startswith("trusted.")]

    def set(self, fino: int, name: bytes, value: bytes) -> None:
        """setxattr(2). Raises FsError: EPERM (read-only), E2BIG, ENOSPC, EOPNOTSUPP, EINVAL."""
        ino, text = self._ino(fino), self._name(name)
        if len(value) > VALUE_MAX:
            raise FsError(errno.E2BIG)
        if text.startswith(OWN):
            self._describe(ino, text, value)
            return
        if self._stored(ino, text) == value:
            return  # nothing changes, not even ctime: as on ext4
        now = now_ns()
        if ino in self._c.nodes.ghosts:
            check_list([other for other in self._sizes(ino) if other != text], text)
            self._c.nodes.ghost_xattrs.setdefault(ino, {})[text] = value
        else:
            self._c.verbs.attributes.set_xattr(ino, text, value, now=now)
        self._changed(ino, now)

    def _describe(self, ino: int, name: str, value: bytes) -> None:
        """Set the description of an artifact. A file that is not stored yet gets it when it is."""
        inode = self._c.registry.tree.get(ino)
        if name != DESCRIPTION_XATTR or inode is None or not stat.S_ISREG(inode.mode):
            raise FsError(errno.EPERM)
        try:
            description = value.decode()
        except UnicodeDecodeError:
            raise FsError(errno.EILSEQ) from None
        if "\0" in description:
            raise FsError(errno.EINVAL)
        self._c.verbs.attributes.describe(ino, description, now=now_ns())

    def remove(self, fino: int, name: bytes) -> None:
        """removexattr(2). Raises FsError: ENODATA, EPERM (read-only)."""
        ino, text = self._ino(fino), self._name(name)
        if text == DESCRIPTION_XATTR:
            if self._own(ino, text) is None:
                raise FsError(errno.ENODATA)
            self._describe(ino, text, b"")
            return
        if text.startswith(OWN):
            raise FsError(errno.EPERM)
        now = now_ns()
        if ino not in self._c.nodes.ghosts:
            self._c.verbs.attributes.remove_xattr(ino, text, now=now)
        elif self._c.nodes.ghost_xattrs.get(ino, {}).pop(text, None) is None:
            raise FsError(errno.ENODATA)
        self._changed(ino, now)

    def _stored(self, ino: int, name: str) -> bytes | None:
        """Value of an attribute that was set. For an inode without a row, the mount remembers them."""
        if ino in self._c.nodes.ghosts:
            return self._c.nodes.ghost_xattrs.get(ino, {}).get(name)
        return self._c.registry.tree.xattr(ino, name)

    def _sizes(self, ino: int) -> dict[str, int]:
        """Names and sizes of the attributes that were set."""
        if ino in self._c.nodes.ghosts:
            return {name: len(value) for name, value in sorted(self._c.nodes.ghost_xattrs.get(ino, {}).items())}
        return self._c.registry.tree.xattrs(ino)

    def _changed(self, ino: int, now: int) -> None:
        ghost = self._c.nodes.ghosts.get(ino)
        if ghost is not None:
            ghost.ctime_ns = now
        state = self._c.state_of(ino)
        if state is not None:
            state.inode.ctime_ns = now

    def _name(self, name: bytes) -> str:
        if len(name) > NAME_MAX:
            raise FsError(errno.ERANGE)
        text = os.fsdecode(name)
        if not text.startswith(("user.", "security.", "trusted.")):
            raise FsError(errno.EOPNOTSUPP)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise FsError(errno.EILSEQ) from None
        return text
