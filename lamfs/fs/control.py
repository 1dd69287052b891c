"""The control directory ``.lamfs``: generated files. Reachable by name, never listed at the root. Loop only.

``.lamfs/info/<key>`` is the record of the artifact at ``<key>`` as JSON. ``.lamfs/stats`` and ``.lamfs/metrics`` are
the mount's numbers, with size 0 like the files of /proc. All are made when they are read (contents.py).

The kernel decides by mode and owner who may read (default_permissions). It asks for both each time, since it may not
cache them. Below ``info`` they are those of the described file, without the write bits. The numbers belong to the user
that mounted.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from operator import attrgetter

from lamfs.errors import FsError
from lamfs.fs import numbers
from lamfs.fs.contents import Contents
from lamfs.fs.context import Context
from lamfs.fs.counters import Counters
from lamfs.fs.exposition import metrics_text, stats_text
from lamfs.fs.nodes import CONTROL_BASE
from lamfs.model import AUTO_INO, ROOT_INO, Inode, now_ns

NAME = b".lamfs"
_TOP = CONTROL_BASE
_INFO = CONTROL_BASE + 1
_STATS = CONTROL_BASE + (1 << 60)
_METRICS = _STATS + 1
_PLAIN = {b"stats": _STATS, b"metrics": _METRICS}
_counted = attrgetter(*Counters.__slots__)
_DIRECTORY, _FILE = 0o555, 0o444
"""The mode bits that a control directory or record gets from what it describes."""


class Control:
    """The generated files of one mount. Numbers are ``CONTROL_BASE`` + 1 + the inode number that they describe."""

    def __init__(self, context: Context) -> None:
        self._c = context
        self.contents = Contents(self._content, self._stamp, CONTROL_BASE)
        self._owner = os.getuid(), os.getgid()

    def describes(self, number: int) -> bool:
        """Whether a FUSE inode number of this directory has mode and owner of something in the tree."""
        return _TOP < number < _STATS

    def top(self) -> tuple[int, Inode]:
        """``.lamfs`` itself."""
        return _TOP, self.attributes(_TOP)

    def lookup(self, parent: int, name: bytes) -> tuple[int, Inode] | None:
        """An entry of a control directory."""
        if name == b".":
            return parent, self.attributes(parent)
        if name == b"..":
            return None
        if parent == _TOP:
            found = _INFO if name == b"info" else _PLAIN.get(name)
            return None if found is None else (found, self.attributes(found))
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return None
        inode = self._c.registry.tree.lookup(self._subject(parent), text)
        if inode is None or not _is_described(inode):
            return None
        number = _INFO + inode.ino
        return number, self.attributes(number)

    def _subject(self, number: int) -> int:
        """The inode that a number below ``info`` describes; ``info`` itself describes the root."""
        return ROOT_INO if number == _INFO else number - _INFO

    def attributes(self, number: int) -> Inode:
        """Attributes. Raises FsError(ENOENT) when what a number describes is gone.

        The kernel may ask for a number that no name has led to (by a handle of open_by_handle_at(2), with ``.``): the
        answer is the same as for a name.
        """
        now = now_ns()
        uid, gid = self._owner
        if number == _TOP:
            return Inode(number, stat.S_IFDIR | 0o555, uid, gid, 2, 0, now, now, now)
        if number in (_STATS, _METRICS):
            mode = stat.S_IFREG | (0o444 if self._c.policy.public_stats else 0o400)
            return Inode(number, mode, uid, gid, 1, 0, now, now, now)
        found = self._c.registry.tree.get(self._subject(number)) if self.describes(number) else None
        if found is None or not _is_described(found):
            raise FsError(errno.ENOENT)
        # As it is shown: a file that is being written has a new mode or owner before the registry has it.
        _, subject = self._c.shown(found)
        if stat.S_ISDIR(subject.mode):
            kind, links, size = stat.S_IFDIR | subject.mode & _DIRECTORY, 2, 0
        else:
            kind, links, size = stat.S_IFREG | subject.mode & _FILE, 1, len(self._record(found))
        return Inode(number, kind, subject.uid, subject.gid, links, size, now, subject.mtime_ns, subject.ctime_ns)

    def _record(self, inode: Inode) -> bytes:
        registry = self._c.registry
        artifact = registry.artifacts.by_ino(inode.ino)
        if artifact is not None:
            return _json(registry.describe(artifact))
        owed = registry.journal.put_of(inode.ino)
        _, shown = self._c.shown(inode)
        # Written, but not in storage yet: show what is known so far.
        return _json(
            {
                "uid": owed.uid if owed else None,
                "key": registry.tree.path(inode.ino),
                "size": shown.size,
                "hash": None,
                "pending": True,
            }
        )

    def entries(self, directory: int, cookie: int) -> Iterator[tuple[int, bytes, int, Inode]]:
        """What ``ls`` shows in a control directory."""
        if directory == _TOP:
            for at, (name, number) in enumerate({b"info": _INFO, **_PLAIN}.items(), 1):
                if cookie < at:
                    yield at, name, number, self.attributes(number)
            return
        after = cookie
        while page := self._c.registry.tree.entries(self._subject(directory), after, 128):
            for entry in page:
                after = entry.cookie
                if entry.inode.ino == AUTO_INO and self._c.registry.tree.is_empty(AUTO_INO):
                    continue
                if _is_described(entry.inode):
                    number = _INFO + entry.inode.ino
                    yield after, entry.name.encode(), number, self.attributes(number)

    def open(self, number: int, flags: int) -> int:
        """Open for reading. Raises EACCES for writing."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FsError(errno.EACCES)
        return self.contents.open(number)

    def _content(self, number: int) -> bytes:
        """The content of a file now. Raises FsError(ESTALE) when what it describes is gone since it was opened."""
        if number >= _STATS:
            text = stats_text if number == _STATS else metrics_text
            return text(numbers.collect(self._c)).encode(errors="surrogateescape")
        inode = self._c.registry.tree.get(self._subject(number))
        if inode is None:
            raise FsError(errno.ESTALE)
        return self._record(inode)

    def _stamp(self, number: int) -> object | None:
        """Changes when a program has read, written or changed anything, which the numbers must then show.

        A record is made for each handle: it must have the size that the handle was told.
        """
        if number < _STATS:
            return None
        db = self._c.registry.db
        return db.changes(), db.data_version(), db.work_version(), _counted(self._c.stats.counters)

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Bytes of an opened file."""
        return self.contents.read(handle, offset, size)

    def release(self, handle: int) -> None:
        """Close an opened file."""
        self.contents.release(handle)


def _is_described(inode: Inode) -> bool:
    """Whether there is an entry below ``info`` for an inode."""
    return stat.S_ISDIR(inode.mode) or stat.S_ISREG(inode.mode)


def _json(record: dict[str, object]) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
