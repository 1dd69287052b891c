"""The life of an open regular file: where its bytes are, and what may be done with them now.

There is one FileState per FUSE inode that has open handles. It belongs to the loop's thread. It is made at the first
open and dropped after the last close: by then the journal and the registry know everything it knew.

Its phase tells what the next write has to do first:

STORED       The stored revision is the content (of a new file: nothing). A write makes a spool file of it.
SPOOLED      A spool file has the content. A write updates the journal first, because an upload may begin at any time.
WRITING      The journal's row is open: the file is being written, so it is not uploaded. A write goes straight in.
FROZEN       The spool file must not change: an upload reads it, it has become the object, or it is another mount's. A
             write makes a copy of it.
FROZEN_OPEN  The same, with the journal's row still open: an upload that a caller waits for began between two writes.
DELETED      The file has no name any more. New writes are only for its handles, and are not journaled. There is no
             spool file that it may write to (the trash's must not change). A write makes one.
PRIVATE      The same, with a spool file that only these handles know. A write goes straight in.
STALE        Somebody else has replaced the file, or has taken it out of the trash. It lives on under another FUSE inode
             number. The old handles read what they have. A write fails with ESTALE.

A file begins as STORED, as DELETED (opened again after its last name went) or, if it is new, as WRITING. Only the
events below change that; Event explains them. Any other event is a mistake in the program and raises IllegalEvent.

    FIND         STORED -> SPOOLED, DELETED -> DELETED
    MAKE         STORED -> SPOOLED, FROZEN -> SPOOLED, FROZEN_OPEN -> SPOOLED, DELETED -> PRIVATE
    JOURNAL      SPOOLED -> WRITING
    ACKNOWLEDGE  WRITING -> SPOOLED, FROZEN_OPEN -> FROZEN
    FREEZE       SPOOLED -> FROZEN, WRITING -> FROZEN_OPEN, FROZEN -> FROZEN, FROZEN_OPEN -> FROZEN_OPEN,
                 DELETED -> DELETED
    THAW         FROZEN -> SPOOLED, FROZEN_OPEN -> WRITING
    STORE        FROZEN -> STORED
    TRASH        SPOOLED -> DELETED, WRITING -> DELETED, FROZEN -> DELETED, FROZEN_OPEN -> DELETED
    UNLINK       STORED -> DELETED, SPOOLED -> PRIVATE, WRITING -> PRIVATE, FROZEN -> DELETED, FROZEN_OPEN -> DELETED,
                 STALE -> STALE
    FREE         FROZEN -> PRIVATE, FROZEN_OPEN -> PRIVATE, DELETED -> PRIVATE
    REPLACE      STORED -> STALE, SPOOLED -> STALE, WRITING -> STALE, FROZEN -> STALE, FROZEN_OPEN -> STALE,
                 DELETED -> STALE, PRIVATE -> STALE, STALE -> STALE

Most files go WRITING, SPOOLED (close), FROZEN (upload), STORED. Two facts are independent of the phase. ``dirty``:
bytes were written that are not acknowledged yet. They outlive the phase in which they were written: a copy of a frozen
spool file has them before the journal knows it, and a replaced file has to report at close that they are lost.
``accessed`` is only about times.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

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


class Phase(StrEnum):
    """Where the bytes of an open file are, and what the next write has to do first. See the module."""

    STORED = "STORED"
    SPOOLED = "SPOOLED"
    WRITING = "WRITING"
    FROZEN = "FROZEN"
    FROZEN_OPEN = "FROZEN_OPEN"
    DELETED = "DELETED"
    PRIVATE = "PRIVATE"
    STALE = "STALE"


class Event(StrEnum):
    """What happens to an open file."""

    FIND = "FIND"
    """It was opened, and the journal names a spool file of it."""
    MAKE = "MAKE"
    """It got a new spool file: made of the stored revision, or a copy of the frozen one."""
    JOURNAL = "JOURNAL"
    """The journal knows that its spool file is about to be written."""
    ACKNOWLEDGE = "ACKNOWLEDGE"
    """The journal knows that the bytes written so far have to be stored."""
    FREEZE = "FREEZE"
    """Its spool file must not change from now on."""
    THAW = "THAW"
    """The upload is over, and the spool file may be written again."""
    STORE = "STORE"
    """The upload is over, and the stored revision has replaced the spool file."""
    TRASH = "TRASH"
    """Its last name is gone, and its spool file still has to be stored, for the trash."""
    UNLINK = "UNLINK"
    """Its last name is gone, and its bytes need not be stored."""
    FREE = "FREE"
    """It has no name, and only its handles need its spool file now."""
    REPLACE = "REPLACE"
    """Somebody else has made another revision of it, or has taken it out of the trash."""


# Module names: on Python 3.11, reading them from the enumeration takes ten times as long.
STORED, SPOOLED, WRITING, FROZEN, FROZEN_OPEN, DELETED, PRIVATE, STALE = Phase

TRANSITIONS: dict[Event, dict[Phase, Phase]] = {
    Event.FIND: {STORED: SPOOLED, DELETED: DELETED},
    Event.MAKE: {STORED: SPOOLED, FROZEN: SPOOLED, FROZEN_OPEN: SPOOLED, DELETED: PRIVATE},
    Event.JOURNAL: {SPOOLED: WRITING},
    Event.ACKNOWLEDGE: {WRITING: SPOOLED, FROZEN_OPEN: FROZEN},
    # FREEZE again: a try to store it failed after it had become the object, or it was another mount's until now.
    Event.FREEZE: {
        SPOOLED: FROZEN, WRITING: FROZEN_OPEN, FROZEN: FROZEN, FROZEN_OPEN: FROZEN_OPEN, DELETED: DELETED,
    },
    Event.THAW: {FROZEN: SPOOLED, FROZEN_OPEN: WRITING},
    Event.STORE: {FROZEN: STORED},
    Event.TRASH: {SPOOLED: DELETED, WRITING: DELETED, FROZEN: DELETED, FROZEN_OPEN: DELETED},
    Event.UNLINK: {
        STORED: DELETED, SPOOLED: PRIVATE, WRITING: PRIVATE, FROZEN: DELETED, FROZEN_OPEN: DELETED, STALE: STALE,
    },
    Event.FREE: {FROZEN: PRIVATE, FROZEN_OPEN: PRIVATE, DELETED: PRIVATE},
    Event.REPLACE: dict.fromkeys(Phase, STALE),
}  # fmt: skip
"""For each event, the phases in which it may happen, and the phase that follows. There are no others."""


class IllegalEvent(FsError):
    """An event that cannot happen in the open file's phase: a mistake in the program. EIO at the mount. The file keeps
    its phase."""


class Spool:
    """An open spool file: the bytes of one inode that storage may not have. Closed by ``close``.

    ``missing``: 4 MiB blocks that are only in the stored revision (partial.py). ``ranges``: bytes of those blocks that
    were written here. ``inherited``: these may belong to a spool file that is being stored. ``writes``: number of
    writes to each such block. ``own``: this process made it, or took it over from a dead one; no other process may
    remove it. ``damaged``: blocks that differ from what was written.
    """

    __slots__ = ("damaged", "fd", "inherited", "missing", "name", "own", "ranges", "writes")

    def __init__(self, fd: int, name: str, *, own: bool = True) -> None:
        self.own = own
        self.fd = fd
        # Another mount may have written it, and turn it into a cache file: no holes then, while it is open here.
        holes.share(self.fd)
        self.name = name
        self.missing: set[int] = set()
        self.damaged: set[int] = set()
        self.ranges: dict[int, Ranges] = {}
        self.inherited = False
        self.writes: Counter[int] = Counter()

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Write all of ``data`` at ``offset``. Raises OSError (ENOSPC …), perhaps after a part was written."""
        done = os.pwrite(self.fd, data, offset)
        while done < len(data):
            more = os.pwrite(self.fd, memoryview(data)[done:], offset + done)
            if more == 0:
                raise OSError(errno.EIO, "the spool file takes no more bytes")
            done += more
        return done

    def check(self, offset: int, size: int) -> None:
        """Raise FsError(EIO) if bytes at ``offset`` are in a damaged block."""
        last = (offset + max(size, 1) - 1) // BLOCK_SIZE
        if self.damaged and any(offset // BLOCK_SIZE <= block <= last for block in self.damaged):
            raise FsError(errno.EIO, f"the spool file {self.name} is not what was written")

    def close(self) -> None:
        """Close the descriptor. The file stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_spool(folder: SpoolFolder, name: str, store: ObjectStore, object_key: str | None) -> Spool:
    """The spool file of a pending put. Raises FsError(EIO) if it cannot be found, StorageError, and like
    SpoolFolder.open.

    ``object_key``: the object that it became, if it was renamed into a local storage a moment ago and is not committed
    yet. The object is opened only for reading: a file that is an object is never written again. The path stays that of
    the spool file, because giving up the file removes that path, which must not be the object.
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

    ``inode``: a copy of its attributes. While there is a ``spool``, its size and times are the true ones. ``phase``:
    see the module; only ``become`` changes it. STORED has no spool, DELETED and STALE may have one, all others have
    one. ``writable_now``: whether a write may go straight into the spool. It follows from the phase, and is kept
    because each write asks. ``dirty``: written since the last acknowledgement. ``accessed``: read since it was opened,
    written, or given other times. ``unsaved``: columns of ``inode`` that the registry gets with the next
    acknowledgement. (Programs such as tar and cp -a set three or four, one by one, on a file that they are still
    writing.) ``beat``: progress of the work that calls wait for, other than storing. ``seen``: the revision of the
    inode that this is, apart from bytes that are not acknowledged yet. ``owed``: the spool file with that revision that
    this process has still to store, as last read from the journal.
    """

    ino: int
    fino: int
    inode: Inode
    phase: Phase = STORED
    revision: Revision | None = None
    base: BlockFile | None = None
    spool: Spool | None = None
    handles: int = 0
    writers: int = 0
    dirty: bool = False
    accessed: bool = False
    gen: int = 0
    seen: int = 0
    owed: str | None = None
    unsaved: dict[str, int] = field(default_factory=dict)
    beat: Beat = field(default_factory=Beat)
    lock: trio.Lock = field(default_factory=trio.Lock)
    writable_now: bool = field(init=False)

    def __post_init__(self) -> None:
        self._enter(self.phase)

    def become(self, event: Event) -> None:
        """Enter the phase that follows ``event``. The spool must already be as that phase needs it.

        Raises IllegalEvent, with nothing changed, if the table does not have the event in the present phase.
        """
        after = TRANSITIONS[event].get(self.phase)
        if after is None:
            raise IllegalEvent(
                errno.EIO, f"{event} cannot happen to an open file that is {self.phase}, as inode {self.ino} is"
            )
        self._enter(after)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.writable_now = phase is WRITING or phase is PRIVATE

    def is_deleted(self) -> bool:
        """Whether its last name is gone, so that new writes are not journaled."""
        return self.phase is DELETED or self.phase is PRIVATE

    def is_stale(self) -> bool:
        """Whether somebody else has replaced it."""
        return self.phase is STALE

    def is_open_in_journal(self) -> bool:
        """Whether its journal row is open, and has to be acknowledged even if nothing was written."""
        return self.phase is WRITING or self.phase is FROZEN_OPEN

    def will_be_acknowledged(self) -> bool:
        """Whether a writer has not closed it since the last write."""
        return self.dirty and self.writers > 0 and self.is_open_in_journal()

    def count_blocks(self) -> None:
        """Update the number of allocated blocks from the spool. Holes do not count, unless the stored revision has
        them."""
        if self.spool is not None:
            self.inode.blocks = None if self.spool.missing else os.fstat(self.spool.fd).st_blocks

    def drop_base(self) -> None:
        """Close the stored revision's file."""
        if self.base is not None:
            self.base.close()
            self.base = None

    def drop_spool(self) -> None:
        """Close the spool file's descriptor."""
        if self.spool is not None:
            self.spool.close()
            self.spool = None


@dataclass(slots=True, eq=False)
class Handle:
    """One open file description. ``reader`` knows what was read through it of the stored revision.

    ``opener``: the thread that opened it (0: not known). ``failed``: the time at which a read last failed for lack of
    storage, and the time at which that read began (seconds of trio's clock).
    """

    state: FileState
    readable: bool
    writable: bool
    reader: Reader
    opener: int = 0
    failed: tuple[float, float] | None = None
