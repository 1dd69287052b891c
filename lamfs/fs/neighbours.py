"""Bringing the files that a program will read next into the cache, before it opens them. Loop only.

One after the other, small files cost a round trip to storage each. The registry knows what is beside a file: when
programs go through a directory (walks.py), the next files are fetched side by side, more of them the longer that goes
on; of one that is read in no order, the rest bit by bit (sweeps.py). Files that were brought and not read make the
guesses fewer; and they are never more than there is room for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from lamfs.cache.guesses import LARGE_FILE
from lamfs.errors import LamfsError
from lamfs.fs.sweeps import Sweep
from lamfs.fs.walks import SURE, Walk
from lamfs.model import BLOCK_SIZE
from lamfs.registry.siblings import Place, Siblings

if TYPE_CHECKING:
    from lamfs.cache.blocks import BlockCache
    from lamfs.fs.counters import Counters
    from lamfs.model import Revision
    from lamfs.registry import Registry

log = logging.getLogger("lamfs.fs")

MOST_BYTES = 64 << 20
"""Bytes that were brought ahead of walks, or are on their way, and not read yet."""
SWEPT_PART = 8
"""Those of sweeps take this part of the room there is, ..."""
SWEPT_FILES = 16384
"""... and are no more files than this: some MB of memory."""
SWEEPS = 8
"""Directories read in no order that are remembered."""
SURE_WALKS, OTHER_WALKS = 8, 6
"""Walks that are remembered: those that were right, and beginnings."""
IDLE_SECONDS = 10.0
"""A walk that was not right for so long is over, ..."""
SWEEP_SECONDS = 60.0
"""... and a sweep in whose directory nothing was read."""
LEVELS = 8
"""How far up two directories may have their common one."""


class Neighbours:
    """The walks of one mount's programs, and what was brought ahead for them."""

    def __init__(self, registry: Registry, cache: BlockCache, counters: Counters) -> None:
        self._siblings = Siblings(registry.db)
        self._guesses = cache.guesses
        self._counted = counters
        self._walks: list[Walk] = []
        """The one that was right last comes first."""
        self._sweeps: dict[int, Sweep] = {}
        """By directory, the one that was read last comes last."""
        self._ahead: dict[str, tuple[Walk | Sweep, int]] = {}
        """What was brought ahead and not read yet, by object key: whose it is, and bytes."""
        self._bytes = self._swept = 0
        """Bytes of that, of walks and of sweeps."""

    # -- what happens

    def read(self, ino: int, revision: Revision) -> None:
        """A file is read for the first time since it was opened."""
        if not self._ahead:
            return
        found = self._give_up(revision.object_key)
        if found is None:
            return
        self._counted.prefetched_used += 1
        with self._guarded():
            if isinstance(found, Sweep):
                found.last = trio.current_time()
                self._sweep_on(found)
            else:
                found.was_right()
                self._follow(ino)
                self._met(found)

    def missed(self, ino: int) -> None:
        """The first read of a file waits for storage."""
        if self._guesses is None:
            return
        with self._guarded():
            self._missed(ino)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong with guesses, the file is read. (The registry's errors are told by who needs it.)"""
        try:
            yield
        except LamfsError as error:
            log.debug("nothing is read ahead: %s", error)
        except Exception:
            log.exception("unexpected error in reading ahead, which this mount does no more")
            self._guesses = None

    def _missed(self, ino: int) -> None:
        now = trio.current_time()
        for idle in [walk for walk in self._walks if now - walk.last > IDLE_SECONDS]:
            self._end(idle)
        for directory in [at for at, sweep in self._sweeps.items() if now - sweep.last > SWEEP_SECONDS]:
            self._end_sweep(directory)
        walk = self._follow(ino)
        if walk is not None:
            self._met(walk)
            return
        place = self._siblings.place(ino)
        if place is None:
            return
        sweep = self._sweeps.pop(place.parent, None) or Sweep(self._siblings, place.parent, now)
        self._sweeps[place.parent] = sweep
        sweep.missed(now)
        if sweep.begun and not sweep.done:
            self._sweep_on(sweep)
            return
        before, top = self._left(place)
        for by_name in (True, False) if before is None else (before.by_name,):
            walk = Walk(self._siblings, place, ino, by_name=by_name, most=LARGE_FILE)
            walk.last = now
            self._walks.insert(0, walk)
            if before is not None:
                walk.goes_on_from(before, top)
                self._go_on(walk)
        if before is not None:
            self._end(before)
        self._forget_some()

    def _follow(self, ino: int) -> Walk | None:
        """All walks to which a file that is read belongs have come to it; the one that was right last is returned."""
        first = None
        for walk in self._walks:
            if walk.takes(ino):
                walk.last = trio.current_time()
                first = first or walk
        return first

    def _met(self, walk: Walk) -> None:
        if self._walks[0] is not walk:
            self._walks.remove(walk)
            self._walks.insert(0, walk)
        for key in walk.passed():
            if self._give_up(key) is not None:
                self._counted.prefetched_wasted += 1
                walk.was_wrong()
        self._go_on(walk)

    # -- what is brought

    def _go_on(self, walk: Walk) -> None:
        guesses = self._guesses
        if guesses is None or walk.hits < SURE or not walk.window:
            return
        room = min(MOST_BYTES, guesses.room()) - self._bytes
        wanted = [revision for revision in walk.wanted(room) if revision.object_key not in self._ahead]
        if not wanted:
            return
        for revision in guesses.bring(wanted, self._failed):
            size = min(revision.size, BLOCK_SIZE)
            self._ahead[revision.object_key] = walk, size
            self._bytes += size
            self._counted.prefetched_files += 1

    def _sweep_on(self, sweep: Sweep) -> None:
        guesses = self._guesses
        if guesses is None or not sweep.begun or len(self._ahead) >= SWEPT_FILES:
            return
        room = guesses.room() // SWEPT_PART - self._swept
        wanted = [revision for revision in sweep.wanted(room) if revision.object_key not in self._ahead]
        for revision in guesses.bring(wanted, self._failed):
            self._ahead[revision.object_key] = sweep, revision.size
            sweep.owed.add(revision.object_key)
            self._swept += revision.size
            self._counted.prefetched_files += 1

    def _give_up(self, key: str) -> Walk | Sweep | None:
        """A file is not ahead any more; whose it was."""
        owner, size = self._ahead.pop(key, (None, 0))
        if isinstance(owner, Sweep):
            owner.owed.discard(key)
            self._swept -= size
        else:
            self._bytes -= size
        return owner

    def _failed(self, revision: Revision) -> None:
        owner = self._give_up(revision.object_key)
        if owner is not None:
            self._counted.prefetched_wasted += 1
            owner.was_wrong()

    # -- beginnings and ends

    def _left(self, place: Place) -> tuple[Walk | None, int]:
        """The walk that has come to the end of its directory and seems to go on at a place, and the directory in which
        both are."""
        here: list[int] = []
        for walk in self._walks:
            if walk.hits >= SURE and walk.is_at_end():
                here = here or self._above(place.parent)
                for directory in self._above(walk.directory()):
                    if directory in here:
                        return walk, directory
        return None, 0

    def _above(self, directory: int) -> list[int]:
        """A directory and those in which it is."""
        found = [directory]
        while len(found) < LEVELS:
            up = self._siblings.place(found[-1])
            if up is None:
                break
            found.append(up.parent)
        return found

    def _forget_some(self) -> None:
        """Only so many walks: the others, right longest ago, are over."""
        for sure, most in ((True, SURE_WALKS), (False, OTHER_WALKS)):
            for walk in [walk for walk in self._walks if (walk.hits >= SURE) == sure][most:]:
                self._end(walk)
        for directory in list(self._sweeps)[:-SWEEPS]:
            self._end_sweep(directory)

    def _end(self, walk: Walk) -> None:
        self._walks.remove(walk)
        for _, key in walk.owed:
            if self._ahead.get(key, (None,))[0] is walk:
                self._give_up(key)
                self._counted.prefetched_wasted += 1

    def _end_sweep(self, directory: int) -> None:
        for key in list(self._sweeps.pop(directory).owed):
            self._give_up(key)
            self._counted.prefetched_wasted += 1
