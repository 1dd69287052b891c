"""What is known of a regular file while it is open: where its bytes are, and what has not been acknowledged yet.

A FileState belongs to the loop's thread; files.py changes it, the uploader's hooks do too. There is one per FUSE inode
that has open handles. When the last handle goes it is dropped: journal and registry know everything it knew.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field

import trio

from lamfs.cache import holes
from lamfs.cache.blocks import BlockFile
from lamfs.errors import FsError, ObjectMissing, StorageMissing
from lamfs.model import BLOCK_SIZE, Inode, Revision
from lamfs.mover.beats import Beat
from lamfs.prefetch.patterns import Reader
from lamfs.registry import Ranges
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore


class Spool:
    """An open spool file: the bytes of one inode that storage may not have. Closed by ``close``.

    ``missing``: 4 MiB blocks that are not in it, but in the stored revision (overlay.py). ``ranges``: those bytes of
    them that are in it all the same. ``inherited``: these may be of a spool file that is being stored.
    ``writes``: how many there were to such a block. ``own``: this process made it, or has taken it over from a
    dead one; nobody else may remove it. ``damaged``: blocks that are not what was written.
    """

    __slots__ = ("damaged", "fd", "inherited", "missing", "name", "own", "ranges", "writes")

    def __init__(self, fd: int, name: str, *, own: bool = True) -> None:
        self.own = own
        self.fd = fd
        # Another mount may have written it, and let it become a cache file: no holes then, as long as it is open here.
        holes.share(self.fd)
        self.name = name
        self.missing: set[int] = set()
        self.damaged: set[int] = set()
        self.ranges: dict[int, Ranges] = {}
        self.inherited = False
        self.writes: Counter[int] = Counter()

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Write all of ``data`` at ``offset``. Raises OSError (ENOSPC …) and then may have written a part."""
        done = os.pwrite(self.fd, data, offset)
        while done < len(data):
            more = os.pwrite(self.fd, memoryview(data)[done:], offset + done)
            if more == 0:
                raise OSError(errno.EIO, "the spool file takes no more bytes")
            done += more
        return done

    def check(self, offset: int, size: int) -> None:
        """Raise FsError(EIO) when bytes at ``offset`` are not what was written."""
        last = (offset + max(size, 1) - 1) // BLOCK_SIZE
        if self.damaged and any(offset // BLOCK_SIZE <= block <= last for block in self.damaged):
            raise FsError(errno.EIO, f"the spool file {self.name} is not what was written")

    def close(self) -> None:
        """Close the descriptor; the file stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_spool(folder: SpoolFolder, name: str, store: ObjectStore, object_key: str | None) -> Spool:
    """The spool file of an owed put. Raises FsError(EIO) when it is nowhere, StorageError, and as SpoolFolder.open.

    ``object_key``: the object that it became if it was renamed into a local storage a moment ago, and that is not
    committed yet. That is opened to read it: a file that is an object is never written again. The path stays that of
    the spool file: what is removed when the file is given up must not be the object.
    """
    try:
        return Spool(folder.open(name, os.O_RDWR), name)
    except FileNotFoundError:
        try:
            fd = store.open_local(object_key) if object_key is not None else None
        except (ObjectMissing, StorageMissing):
            fd = None
        if fd is None:
            raise FsError(errno.EIO) from None
        return Spool(fd, name)


@dataclass(slots=True, eq=False)
class FileState:
    """An open regular file.

    ``inode`` is a copy of its attributes; while ``spool`` is there, its size and times are the true ones.
    ``frozen``: the spool is being uploaded, or belongs to another process; write to a copy. ``private``: unlinked, or
    read only for us; nothing is journaled. ``dirty``: written since the last acknowledgement. ``accessed``: read since
    it was opened, written, or given other times. ``unsaved``: columns of ``inode`` that the registry gets with the next
    acknowledgement: a program that is not done with a file it writes (tar, cp -a) sets three or four, one by one.
    ``beat``: how what calls wait for (but storing) goes on. ``seen``: the revision of the inode that this is, but for
    what is not acknowledged yet. ``owed``: the spool file with it that this process has still to store, as the journal
    said last.
    """

    ino: int
    fino: int
    inode: Inode
    revision: Revision | None = None
    base: BlockFile | None = None
    spool: Spool | None = None
    handles: int = 0
    writers: int = 0
    dirty: bool = False
    journaled: bool = False
    frozen: bool = False
    private: bool = False
    stale: bool = False
    accessed: bool = False
    gen: int = 0
    seen: int = 0
    owed: str | None = None
    unsaved: dict[str, int] = field(default_factory=dict)
    beat: Beat = field(default_factory=Beat)
    lock: trio.Lock = field(default_factory=trio.Lock)

    def writable_now(self) -> bool:
        """Whether a write may go into the spool without further ado."""
        return self.spool is not None and not self.frozen and (self.journaled or self.private)

    def will_be_acknowledged(self) -> bool:
        """Whether somebody has it open for writing who has not closed it since the last write."""
        return self.dirty and self.writers > 0 and self.spool is not None and not (self.private or self.stale)

    def count_blocks(self) -> None:
        """See how much of the spool file is allocated: holes are not, but for what the stored revision has."""
        if self.spool is not None:
            self.inode.blocks = None if self.spool.missing else os.fstat(self.spool.fd).st_blocks

    def drop_base(self) -> None:
        """Let go of the stored revision's file."""
        if self.base is not None:
            self.base.close()
            self.base = None

    def drop_spool(self) -> None:
        """Let go of the spool file's descriptor."""
        if self.spool is not None:
            self.spool.close()
            self.spool = None


@dataclass(slots=True, eq=False)
class Handle:
    """One open file description. ``reader`` knows what it has read of the stored revision.

    ``opener``: the thread that opened it (0: not known). ``failed``: when a read failed for lack of storage last, and
    when that read began (seconds of trio's clock).
    """

    state: FileState
    readable: bool
    writable: bool
    reader: Reader
    opener: int = 0
    failed: tuple[float, float] | None = None
