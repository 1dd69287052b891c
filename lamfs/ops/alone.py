"""Storage work outside of a mount: CLI, API and recovery. Any thread, one at a time.

The calling thread runs the same steps as a mount (work/steps.py, work/moves.py), and saves (work/saves.py). It has no
open files that the steps would have to respect.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterable, Iterator

from lamfs import copying, hashing
from lamfs.errors import DamagedData
from lamfs.model import BLOCK_SIZE, Revision
from lamfs.ops import messages
from lamfs.ops.instance import Instance
from lamfs.registry import Conflict, Lost, Provenance, lacks_some, unwritten
from lamfs.spool import SpoolFolder
from lamfs.work.direct import DirectWaits, DirectWorker
from lamfs.work.guard import Permit
from lamfs.work.moves import Moves
from lamfs.work.multipart import Multipart
from lamfs.work.saves import Saves
from lamfs.work.steps import Steps

storage_work = threading.RLock()
"""Held while this process runs owed deletes and moves, and while it announces a save."""
active: set[int] = set()
"""Journal ids of the saves that this process is running. They are added under ``storage_work``."""


def puts(instance: Instance, spool: SpoolFolder) -> tuple[Steps, NoOpenFiles]:
    """The steps of puts from one spool, and the hooks that note how each of them ends."""
    registry, store, origin = instance.registry, instance.store, Provenance(user_id(instance))
    worker, waits = DirectWorker(store), DirectWaits(registry.path, spool)
    parts = Multipart(registry, worker, waits)
    steps = Steps(
        registry, store, worker, waits, spool, origin, parts, set(), _permit(instance), hash_first=True
    )  # fmt: skip
    hooks = steps.hooks = NoOpenFiles(instance, spool)
    return steps, hooks


def moves(instance: Instance) -> Moves:
    """The steps of moves, deletes and aborts of one instance."""
    registry, store = instance.registry, instance.store
    worker, waits = DirectWorker(store), DirectWaits(registry.path)
    parts = Multipart(registry, worker, waits)
    return Moves(registry, store, worker, waits, _permit(instance), parts, set())


def saves(instance: Instance) -> Saves:
    """The steps of saves of one instance."""
    registry, store, origin = instance.registry, instance.store, Provenance(user_id(instance))
    worker, waits = DirectWorker(store), DirectWaits(registry.path)
    parts = Multipart(registry, worker, waits)
    return Saves(registry, store, worker, waits, _permit(instance), parts, origin, active, storage_work)


def user_id(instance: Instance) -> int | None:
    """Row id of the current user, to whom new artifacts are linked."""
    user = instance.user()
    return user.id if user is not None else None


def _permit(instance: Instance) -> Permit:
    async def permit(_: bool) -> None:
        instance.prove()

    return permit


class NoOpenFiles:
    """FileHooks (work/steps.py) for a process without open files. ``conflict``: the conflict in which the last put
    ended."""

    def __init__(self, instance: Instance, spool: SpoolFolder) -> None:
        self._instance = instance
        self._spool = spool
        self.conflict: Conflict | None = None

    def has_writers(self, ino: int) -> bool:
        """As FileHooks says, like the methods below."""
        return False

    def freeze(self, ino: int, src: str) -> None: ...

    def thaw(self, ino: int, src: str) -> None: ...

    def stored(
        self, ino: int, src: str, revision: Revision | None, consumed: bool, missing: Collection[int] = ()
    ) -> None: ...

    @contextlib.contextmanager
    def storing_many(self) -> Iterator[None]:
        yield

    def rebased(self, ino: int, revision: Revision) -> None: ...

    def conflicted(self, ino: int, conflict: Conflict) -> None:
        self.conflict = conflict

    def damaged(self, ino: int, src: str, blocks: Collection[int]) -> None: ...

    async def revive(self, ino: int, src: str) -> bool:
        return False

    def lost(self, ino: int, lost: Lost) -> None:
        messages.warn(lost.sentence)

    async def pin(self, object_key: str, *, but: int | None = None) -> None: ...

    def gone(self, object_key: str) -> None: ...

    async def fill(self, ino: int, src: str, base: Revision, blocks: Iterable[int]) -> None:
        """As FileHooks says. Each block is noted when it is there, so an interrupted fill goes on from there."""
        registry = self._instance.registry
        with self._spool.opened(src, os.O_RDWR) as fd:
            size = os.fstat(fd).st_size
            ranges = registry.partial_spools.ranges(src)
            for block in sorted(blocks):
                offset, known = block * BLOCK_SIZE, ranges.get(block, ())
                if lacks_some(known, size - offset):
                    data = self._block(base, block)
                    for place, piece in unwritten(offset, data[: size - offset], known):
                        copying.write_full(fd, piece, place)
                os.fdatasync(fd)  # a power cut must not leave zeros where the registry says that bytes are
                registry.partial_spools.add(src, [block])

    def _block(self, base: Revision, block: int) -> bytes:
        """One verified block of the revision. Raises DamagedData, and storage errors."""
        store, offset = self._instance.store, block * BLOCK_SIZE
        length = min(BLOCK_SIZE, base.size - offset)
        data = store.get(base.object_key, offset=offset, length=length, etag=base.etag)
        if hashing.hash_block(data) != base.content.block(block):
            raise DamagedData(
                f"Block {block} of the object {store.url(base.object_key)} is not what was saved, so what was changed"
                " beside it cannot be stored; 'lamfs fsck --data' tells more."
            )
        return data
