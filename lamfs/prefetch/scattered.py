"""A program that reads many small files of a directory in no order: the others are prefetched bit by bit. Loop only.

One by one, each file costs a round trip: by the time a part of them was read, all others could have been. The number of
files that come with each read is bounded, so that little is wasted when the program stops.
"""

from __future__ import annotations

from collections.abc import Iterator

from lamfs.model import BLOCK_SIZE, Revision
from lamfs.prefetch import settings
from lamfs.registry.siblings import Place, Siblings


class Scattered:
    """The files of one directory. They are prefetched in the order of cookies."""

    __slots__ = ("_at", "_ready", "_siblings", "begun", "done", "last", "misses", "prefetched", "since")

    def __init__(self, siblings: Siblings, directory: int, now: float) -> None:
        self.misses = 0
        """Files that a program had to wait for, ``since`` then (trio's clock)."""
        self.since = self.last = now
        self.begun = self.done = False
        self.prefetched: set[str] = set()
        """Object keys of the files that were prefetched."""
        self._siblings = siblings
        self._at = Place(directory, "", 0)
        self._ready: list[Revision] = []

    def missed(self, now: float) -> None:
        """A program had to wait for a file of the directory."""
        if now - self.since > settings.SCATTER_SECONDS:
            self.misses, self.since = 0, now
        self.misses += 1
        self.last = now
        if (
            not self.begun
            and self.misses >= settings.SCATTER_MISSES
            and self.misses % settings.SCATTER_COUNT_EVERY == 0
        ):
            self.begun = not self._siblings.has_more(self._at.parent, self.misses * settings.SCATTER_PART)

    def was_wasted(self) -> None:
        """A file could not be fetched: begin again."""
        self.begun, self.misses = False, 0

    def wanted(self, budget: int) -> Iterator[Revision]:
        """The files to prefetch now, ``budget`` bytes at most. Each is given once."""
        pages = 0
        given = 0
        while given < settings.SCATTER_STEP:
            if not self._ready:
                if self.done or pages == settings.SCATTER_PAGES:
                    return
                pages += 1
                page = self._siblings.after(self._at, settings.SCATTER_PAGE, by_name=False, most=BLOCK_SIZE)
                self.done = len(page) < settings.SCATTER_PAGE
                if page:
                    self._at = page[-1].place
                self._ready = [entry.revision for entry in reversed(page) if entry.revision is not None]
                continue
            budget -= self._ready[-1].size
            if budget < 0:
                return
            given += 1
            yield self._ready.pop()
