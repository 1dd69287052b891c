"""What all parts of the file system share: the wiring of one mount. Loop only; made once by the daemon."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lamfs.cache.blocks import BlockCache
from lamfs.errors import FsError
from lamfs.fs.atimes import Atimes
from lamfs.fs.backups import Backups
from lamfs.fs.nodes import NodeTable
from lamfs.fs.state import Event, FileState
from lamfs.fs.stats import Stats
from lamfs.fs.waits import Waits
from lamfs.model import Inode, now_ns
from lamfs.mover.client import Mover
from lamfs.prefetch.scheduler import Prefetcher
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore
from lamfs.work.uploader import Uploader

if TYPE_CHECKING:
    from lamfs.registry.verbs import Verbs


S_IFMT = 0o170000
"""The bits of a mode for the kind of node: inode(7)."""


class KernelNotifier(Protocol):
    """Tells the kernel which of its caches are stale. Called in the loop; must not wait for the kernel."""

    def entry(self, parent: int, name: str) -> None:
        """Forget what ``name`` means in directory ``parent``."""

    def attributes(self, fino: int) -> None:
        """Forget the attributes of a FUSE inode."""


class NoKernel:
    """A KernelNotifier for a file system without a kernel (unit tests)."""

    def entry(self, parent: int, name: str) -> None:
        """Nothing to tell."""

    def attributes(self, fino: int) -> None:
        """Nothing to tell."""


@dataclass(slots=True)
class Policy:
    """Choices of a mount that the semantics depend on. Times in seconds."""

    real_keys: bool = False
    close_stores: bool = False
    fsync_stores: bool = True
    timeout: float = 60.0
    read_only: bool = False
    spool_limit: int = 32 << 30
    """Bytes in the spool. Above that, writers wait for the uploader."""
    spool_free: int | None = None
    """Bytes of the spool's disk that waiting writers leave free; None: backpressure.FLOOR."""
    public_stats: bool = False
    """Whether everybody may read the mount's numbers in ``.lamfs``; else only the user that mounted."""


@dataclass(slots=True)
class Context:
    """One mount's parts. ``states`` holds the open regular files by FUSE inode number."""

    registry: Registry
    store: ObjectStore
    cache: BlockCache
    prefetcher: Prefetcher
    mover: Mover
    uploader: Uploader
    spool: SpoolFolder
    policy: Policy
    kernel: KernelNotifier = field(default_factory=NoKernel)
    nodes: NodeTable = field(default_factory=NodeTable)
    backups: Backups = field(default_factory=Backups)
    atimes: Atimes = field(default_factory=Atimes)
    states: dict[int, FileState] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)
    verbs: Verbs = field(init=False)
    """The registry, by what it is asked to change."""
    waits: Waits = field(init=False)

    def __post_init__(self) -> None:
        self.verbs = self.registry
        self.waits = Waits(self.stats.counters)
        self.cache.on_storage_damage = lambda revision, block: self.stats.damaged(
            self.registry, self.store, revision, block
        )

    def inode(self, fino: int) -> Inode:
        """Attributes of the revision that a FUSE inode number stands for.

        Raises FsError(ESTALE) when there is no such inode or revision any more: the kernel looks its name up again.
        """
        state = self.states.get(fino)
        if state is not None and (state.spool is not None or state.is_stale()):
            state.count_blocks()
            return state.inode
        ino = self.nodes.ino(fino)
        inode = self.registry.tree.get(ino)
        if inode is None:
            inode = self.nodes.ghosts.get(ino)
            if inode is None:
                raise FsError(errno.ESTALE)
            return inode
        self.atimes.show(inode)
        if self.nodes.outdated(fino, inode.revision):
            # Somebody else has just made a new revision. Its attributes do not belong to this number.
            if state is not None:
                return state.inode
            raise FsError(errno.ESTALE)
        if state is not None:
            state.inode = inode
        return inode

    def owe(
        self, state: FileState, *, src: str | None = None, settle: float = 0.0, probe_settle: float | None = None
    ) -> int:
        """Record that the bytes written so far have to be stored (see Writes.acknowledge), with the file's size, blocks
        and times. Returns the row's generation; 0, and nothing has changed, when there is no such row.
        """
        state.count_blocks()
        done = self.verbs.writes.acknowledge(
            state.inode, now=now_ns(), src=src, settle=settle, probe_settle=probe_settle, columns=state.unsaved
        )
        if done is None:
            return 0
        state.seen = done.revision or state.seen
        return done.gen

    def owes(self, state: FileState, owed: Put | None) -> bool:
        """Whether the put ``owed`` is this mount's, with the bytes that are open here.

        These are newer then than what the Python API has saved.
        """
        return owed is not None and owed.owner == self.registry.journal.owner and owed.src == state.owed

    def renew(self, ino: int) -> None:
        """If somebody else made a new revision of a file, give it a new FUSE inode number, and tell the kernel.

        Open handles keep the old one.
        """
        inode = self.registry.tree.get(ino)
        if inode is not None and self.nodes.outdated(self.nodes.fino(ino), inode.revision):
            self._supersede(ino)

    def _supersede(self, ino: int) -> None:
        state = self.state_of(ino)
        old = self.nodes.supersede(ino)
        if old is None:
            return
        if state is not None:
            # Open handles go on reading the old revision, and learn at the next write that it was replaced.
            state.dirty = state.dirty and not state.is_deleted()  # what was written to a deleted file is not needed
            state.become(Event.REPLACE)
        for parent, name in self.registry.tree.names(ino):
            self.kernel.entry(parent, name)
        self.kernel.attributes(old)

    def shown(self, inode: Inode) -> tuple[int, Inode]:
        """FUSE inode number and attributes under which an inode from the registry is shown now."""
        fino = self.nodes.fino(inode.ino)
        self.atimes.show(inode)
        if inode.mode & S_IFMT == stat.S_IFREG:
            state = self.states.get(fino)
            if state is not None and state.is_deleted():
                # It has a name again: what is written by that name must not go where only the old handles find it.
                self._supersede(inode.ino)
                return self.nodes.fino(inode.ino), inode
            if state is not None and state.spool is not None:
                state.count_blocks()
                return fino, state.inode
            if self.nodes.outdated(fino, inode.revision):
                self.renew(inode.ino)
                fino = self.nodes.fino(inode.ino)
        return fino, inode

    def state_of(self, ino: int) -> FileState | None:
        """The open file that shows the newest revision of an inode."""
        return self.states.get(self.nodes.fino(ino))
