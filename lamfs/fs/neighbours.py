"""Bringing the files that a program will read next into the cache, before it opens them. Loop only.

One after the other, small files cost a round trip to storage each. The registry knows what is beside a file: when
programs go through a directory (walks.py), the next files are fetched side by side, more of them the longer that goes
on. Files that were brought and not read make the guesses fewer; and they are never more than there is room for.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from lamfs.cache.guesses import LARGE_FILE
from lamfs.errors import LamfsError
from lamfs.fs.walks import SURE, Walk
from lamfs.model import BLOCK_SIZE
from lamfs.registry.siblings import Place, Siblings

if TYPE_CHECKING:
    from lamfs.cache.blocks import BlockCache
    from lamfs.fs.stats import Counters
    from lamfs.model import Revision
    from lamfs.registry import Registry

log = logging.getLogger("lamfs.fs")

MOST_BYTES = 64 << 20
"""Bytes that were brought ahead, or are on their way, and not read yet."""
SURE_WALKS, OTHER_WALKS = 8, 6
"""Walks that are remembered: those that were right, and beginnings."""
IDLE_SECONDS = 10.0
"""A walk that was not right for so long is over."""
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
        self._ahead: dict[str, tuple[Walk, int]] = {}
        """What was brought ahead and not read yet, by object key: whose it is, and bytes."""
        self._bytes = 0

    # -- what happens

    def read(self, ino: int, revision: Revision) -> None:
        """A file is read for the first time since it was opened."""
        if not self._ahead:
            return
        found = self._give_up(revision.object_key)
        if found is None:
            return
        self._counted.prefetched_used += 1
        found.was_right()
        self._follow(ino)
        self._met(found)

    def missed(self, ino: int) -> None:
        """The first read of a file waits for storage."""
        if self._guesses is None:
            return
        try:
            self._missed(ino)
        except LamfsError as error:
            log.debug("nothing is read ahead: %s", error)

    def _missed(self, ino: int) -> None:
        now = trio.current_time()
        for idle in [walk for walk in self._walks if now - walk.last > IDLE_SECONDS]:
            self._end(idle)
        walk = self._follow(ino)
        if walk is not None:
            self._met(walk)
            return
        place = self._siblings.place(ino)
        if place is None:
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

    def _give_up(self, key: str) -> Walk | None:
        """A file is not ahead any more; whose it was."""
        walk, size = self._ahead.pop(key, (None, 0))
        self._bytes -= size
        return walk

    def _failed(self, revision: Revision) -> None:
        walk = self._give_up(revision.object_key)
        if walk is not None:
            self._counted.prefetched_wasted += 1
            walk.was_wrong()

    # -- beginnings and ends

    def _left(self, place: Place) -> tuple[Walk | None, int]:
        """The walk that has come to the end of its directory and seems to go on at a place, and the directory in which
        both are."""
        here = self._above(place.parent)
        for walk in self._walks:
            if walk.hits >= SURE and walk.is_at_end():
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

    def _end(self, walk: Walk) -> None:
        self._walks.remove(walk)
        for _, key in walk.owed:
            if self._ahead.get(key, (None,))[0] is walk:
                self._give_up(key)
                self._counted.prefetched_wasted += 1
