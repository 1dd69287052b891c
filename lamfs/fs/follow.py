"""Following the change log: what the Python API, the CLI and other mounts did shows here at once. Loop only.

``PRAGMA data_version`` tells cheaply whether another connection committed anything. Then the rows since the last look
tell exactly what the kernel has to forget.
"""

from __future__ import annotations

import contextlib
import logging
import os

import trio

from lamfs.errors import LamfsError
from lamfs.fs.atimes import FLUSH
from lamfs.fs.context import Context
from lamfs.model import now_ns
from lamfs.registry import Change
from lamfs.registry.entries import Put
from lamfs.registry.writes import SpoolInfo
from lamfs.work.replaying import replay

log = logging.getLogger("lamfs.fs")

INTERVAL = 0.1
"""Seconds between two looks."""
TRIM_INTERVAL = 3600.0
"""Seconds between two trims of the change log."""
FORGET_INTERVAL = 60.0
"""Seconds between two checks whether spent spool files are gone."""
ADOPT_INTERVAL = 2.0
"""Seconds between two looks for storage work left behind by processes that are gone."""

OPS = ("put", "move", "delete", "abort", "drop")
"""Kinds of storage work that are taken over. (A save is finished or undone by a command.)"""

KEYS, KEYS_PAUSE = 2000, 0.02
"""Keys that follow a renamed directory in one step, and seconds between two steps for everybody else."""


def adopt(context: Context) -> bool:
    """Take over the work of processes of this machine that are gone. Returns whether there was any.

    If another mount's daemon died while it was writing a file, the file counts as closed with what was written.
    """
    registry = context.registry
    replay(registry, context.store, context.spool)
    left = registry.journal.left(OPS)
    if not left:
        return False
    spools: dict[int, SpoolInfo] = {}
    for entry in left:
        if not isinstance(entry, Put) or entry.state != "open" or registry.tree.get(entry.ino) is None:
            continue
        with contextlib.suppress(LamfsError, OSError):  # the uploader says what is wrong with it
            if entry.object_key is None and not entry.gen:
                # It may have died between naming a new file and making it: then nothing was written.
                os.close(context.spool.open(entry.src, os.O_CREAT | os.O_RDWR))
            info = context.spool.stat(entry.src)
            spools[entry.id] = SpoolInfo(info.st_size, info.st_mtime_ns, info.st_blocks)
    taken = context.verbs.writes.take_over(left, spools, now=now_ns())
    for ino in taken.closed:
        context.renew(ino)
    return bool(taken.rows)


class Follower:
    """Reads the change log of one mount's registry, and invalidates the kernel's caches."""

    def __init__(self, context: Context) -> None:
        self._c = context
        self._seq = context.registry.changes.last()
        self._version = context.registry.db.data_version()
        self._poke = trio.Event()

    def poke(self) -> None:
        """Look now: a message says that there are changes."""
        self._poke.set()

    async def run(self) -> None:
        """Look until cancelled."""
        adopt_at = trim_at = flush_at = forget_at = trio.current_time()
        pause = INTERVAL
        while True:
            self._poke = trio.Event()
            with trio.move_on_after(pause):
                await self._poke.wait()
            try:
                self._c.stats.sample(self._c.cache.fetched_bytes, self._c.uploader.puts.stored_bytes)
                changed = self.look()
                if changed or trio.current_time() >= adopt_at:
                    adopt_at = trio.current_time() + ADOPT_INTERVAL
                    self._adopt()
                follow = not self._c.policy.read_only and self._c.registry.artifacts.settle(KEYS)
                pause = KEYS_PAUSE if follow else INTERVAL
                if trio.current_time() >= flush_at:
                    flush_at = trio.current_time() + FLUSH
                    self._c.atimes.flush(self._c.registry)
                if trio.current_time() >= trim_at and not self._c.policy.read_only:
                    trim_at = trio.current_time() + TRIM_INTERVAL
                    self._c.registry.changes.trim()
                if trio.current_time() >= forget_at and not self._c.policy.read_only:
                    forget_at = trio.current_time() + FORGET_INTERVAL
                    await self._forget_spent()
            except LamfsError as error:
                log.error("could not follow the registry's changes: %s Trying again", error)
            except Exception:
                log.exception("could not follow the registry's changes; trying again")

    async def _forget_spent(self) -> None:
        """Forget spent spool files that are gone: their records are not needed any more, once no power cut can set the
        registry back to before they were."""
        names = self._c.spool.names()
        await self._c.uploader.durable()
        self._c.registry.journal.forget_spent(names)

    def look(self) -> bool:
        """Handle what others committed since the last look. Returns whether there was anything."""
        # In this order: if nobody else has committed since the last look, rows up to ``last`` are this mount's own.
        last = self._c.registry.changes.last()
        version = self._c.registry.db.data_version()
        if version == self._version:
            self._seq = last
            return False
        self._version = version
        origin = self._c.registry.changes.origin
        while True:
            rows, lost = self._c.registry.changes.since(self._seq)
            if lost:
                self._forget_everything()
                self._seq = self._c.registry.changes.last()
                return True
            for row in rows:
                self._seq = row.seq
                if row.origin != origin:
                    self._apply(row)
            if not rows:
                return True

    def _apply(self, change: Change) -> None:
        nodes, kernel = self._c.nodes, self._c.kernel
        if change.kind == "entry" and change.parent is not None and change.name is not None:
            if nodes.known(change.parent):
                kernel.entry(change.parent, change.name)
                kernel.attributes(change.parent)
            fino = nodes.fino(change.ino)
            if nodes.known(fino):
                kernel.attributes(fino)
        elif change.kind == "attr":
            fino = nodes.fino(change.ino)
            if nodes.known(fino):
                kernel.attributes(fino)
        elif change.kind == "content":
            self._new_revision(change.ino)

    def _new_revision(self, ino: int) -> None:
        """Somebody else made new content: the kernel gets a new inode for it, and open handles keep the old one."""
        state = self._c.state_of(ino)
        if state is not None and state.spool is not None and self._c.owes(state, self._c.registry.journal.put_of(ino)):
            return  # our own bytes are newer, and will replace theirs
        self._c.renew(ino)

    def _forget_everything(self) -> None:
        log.warning("the change log was trimmed past this mount; everything the kernel cached is dropped")
        tree = self._c.registry.tree
        for fino in self._c.nodes.all_known():
            ino = self._c.nodes.ino(fino)
            self._new_revision(ino)
            for parent, name in tree.names(ino):
                self._c.kernel.entry(parent, name)
            self._c.kernel.attributes(fino)

    def _adopt(self) -> None:
        """Take over the work of processes that are gone (a CLI command, a crashed notebook)."""
        if self._c.policy.read_only:
            return  # a read-only mount would never do the work, and keep others from it
        taken = adopt(self._c)
        if taken or self._c.registry.journal.next_at() is not None:
            self._c.uploader.notify()
