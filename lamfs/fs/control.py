"""The control directory ``.lamfs``: files that lamfs makes up. Reachable by name, never listed at the root. Loop only.

``.lamfs/info/<key>`` is the record of the artifact at ``<key>`` as JSON, made when it is looked at. ``.lamfs/stats``
and ``.lamfs/metrics`` are the mount's numbers; as the files of /proc they have size 0 and are made when opened.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator

from lamfs.errors import FsError
from lamfs.fs.context import Context
from lamfs.fs.exposition import metrics_text, stats_text
from lamfs.fs.nodes import CONTROL_BASE
from lamfs.model import AUTO_INO, ROOT_INO, Inode, now_ns

NAME = b".lamfs"
_TOP = CONTROL_BASE
_INFO = CONTROL_BASE + 1
_STATS = CONTROL_BASE + (1 << 60)
_METRICS = _STATS + 1
_PLAIN = {b"stats": _STATS, b"metrics": _METRICS}


class Control:
    """The made-up files of one mount. Numbers are ``CONTROL_BASE`` + 2 + the inode number they tell about."""

    def __init__(self, context: Context) -> None:
        self._c = context
        self._contents: dict[int, bytes] = {}
        self._next = CONTROL_BASE

    def is_control(self, number: int) -> bool:
        """Whether a FUSE inode number or a handle is of this directory."""
        return number >= CONTROL_BASE

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
        if inode is None or not (stat.S_ISDIR(inode.mode) or stat.S_ISREG(inode.mode)):
            return None
        number = _INFO + inode.ino
        return number, self.attributes(number)

    def _subject(self, number: int) -> int:
        """The inode that a number below ``info`` tells about; ``info`` itself tells about the root."""
        return ROOT_INO if number == _INFO else number - _INFO

    def attributes(self, number: int) -> Inode:
        """Attributes: read-only, owned by who mounted."""
        now = now_ns()
        if number in (_TOP, _INFO):
            return Inode(number, stat.S_IFDIR | 0o555, os.getuid(), os.getgid(), 2, 0, now, now, now)
        if number >= _STATS:
            return Inode(number, stat.S_IFREG | 0o444, os.getuid(), os.getgid(), 1, 0, now, now, now)
        subject = self._c.registry.tree.get(self._subject(number))
        if subject is None:
            raise FsError(errno.ENOENT)
        directory = stat.S_ISDIR(subject.mode)
        mode = stat.S_IFDIR | 0o555 if directory else stat.S_IFREG | 0o444
        size = 0 if directory else len(self._record(subject))
        return Inode(
            number, mode, os.getuid(), os.getgid(), 2 if directory else 1, size, now, subject.mtime_ns, subject.ctime_ns
        )

    def _record(self, inode: Inode) -> bytes:
        registry = self._c.registry
        artifact = registry.artifacts.by_ino(inode.ino)
        if artifact is not None:
            return _json(registry.describe(artifact))
        owed = registry.journal.put_of(inode.ino)
        _, shown = self._c.shown(inode)
        # Written, but not in storage yet: what is known so far.
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
                if stat.S_ISDIR(entry.inode.mode) or stat.S_ISREG(entry.inode.mode):
                    number = _INFO + entry.inode.ino
                    yield after, entry.name.encode(), number, self.attributes(number)

    def open(self, number: int, flags: int) -> int:
        """Open for reading; the content is made now and stays as it is for this handle. Raises EACCES for writing."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FsError(errno.EACCES)
        content = self._content(number)
        self._next += 1
        self._contents[self._next] = content
        return self._next

    def _content(self, number: int) -> bytes:
        if number >= _STATS:
            numbers = self._c.stats.numbers(self._c)
            return (stats_text if number == _STATS else metrics_text)(numbers).encode(errors="surrogateescape")
        inode = self._c.registry.tree.get(self._subject(number))
        if inode is None:
            raise FsError(errno.ENOENT)
        return self._record(inode)

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Bytes of an opened record."""
        return self._contents[handle][offset : offset + size]

    def release(self, handle: int) -> None:
        """Close an opened record."""
        self._contents.pop(handle, None)


def _json(record: dict[str, object]) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
