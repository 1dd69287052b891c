"""A program that reads many small files of a directory in no order: the rest is fetched bit by bit. Loop only.

One by one, each costs a round trip, so that after a part of them all the others would have taken no longer. How many
come with each read is bounded, so that who stops has not fetched much more than was read.
"""

from __future__ import annotations

from collections.abc import Iterator

from lamfs.model import BLOCK_SIZE, Revision
from lamfs.registry.siblings import Place, Siblings

DENSE = 64
"""Files of a directory that must have been waited for, ..."""
DENSE_PART = 8
"""... or this part of all that are in it, ..."""
DENSE_SECONDS = 60.0
"""... within this time."""
LOOK_EVERY = 32
"""The entries of a directory are counted after so many more only."""
STEP = 12
"""Files that are brought with each that is read."""
PAGE, LOOKS = 64, 4
"""Entries that are looked up at a time, and how often with each file that is read."""


class Sweep:
    """The files of one directory, in the order of cookies."""

    __slots__ = ("_at", "_ready", "_siblings", "begun", "done", "last", "misses", "owed", "since")

    def __init__(self, siblings: Siblings, directory: int, now: float) -> None:
        self.misses = 0
        """Files that were waited for, ``since`` then (trio's clock)."""
        self.since = self.last = now
        self.begun = self.done = False
        self.owed: set[str] = set()
        """Object keys of the files that were brought."""
        self._siblings = siblings
        self._at = Place(directory, "", 0)
        self._ready: list[Revision] = []

    def missed(self, now: float) -> None:
        """A file of the directory had to be waited for."""
        if now - self.since > DENSE_SECONDS:
            self.misses, self.since = 0, now
        self.misses += 1
        self.last = now
        if not self.begun and self.misses >= DENSE and self.misses % LOOK_EVERY == 0:
            self.begun = not self._siblings.has_more(self._at.parent, self.misses * DENSE_PART)

    def was_wrong(self) -> None:
        """A file did not come: begin again."""
        self.begun, self.misses = False, 0

    def wanted(self, room: int) -> Iterator[Revision]:
        """The files to be brought now, of ``room`` bytes at most; each is given once."""
        looks = 0
        given = 0
        while given < STEP:
            if not self._ready:
                if self.done or looks == LOOKS:
                    return
                looks += 1
                page = self._siblings.after(self._at, PAGE, by_name=False, most=BLOCK_SIZE)
                self.done = len(page) < PAGE
                if page:
                    self._at = page[-1].place
                self._ready = [entry.revision for entry in reversed(page) if entry.revision is not None]
                continue
            room -= self._ready[-1].size
            if room < 0:
                return
            given += 1
            yield self._ready.pop()
