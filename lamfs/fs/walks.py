"""A program that goes through a directory, file after file: where it is, and which files it will read next. Loop only.

A walk is a guess that files are read in one of a directory's two orders (siblings.py). It holds as long as each file
that is read is one of the next few; the more often it does, the further ahead it looks. It leaves its directory only
when the program has been seen to: then it goes on below, and with the directories that follow, up to the one in which
they all are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lamfs.model import BLOCK_SIZE, Revision
from lamfs.registry.siblings import Place, Sibling, Siblings

PAGE, FIRST_PAGE = 64, 8
"""Entries that are looked up at a time, by a walk that is sure, or not."""
LOOKS = 8
"""Pages that are looked up at a time: on the loop, a few hundred microseconds each."""
DEEPEST = 32
"""How far below the directory that a walk is in it looks."""
SURE = 2
"""How often a walk must have been right before anything is brought ahead."""
NEAR, FAR = 4, 16
"""A file so many places ahead of the last belongs to a walk: one that is not sure yet, or is."""
BACK = 16
"""Places behind the last one that still belong to it: several threads read in turn."""
FIRST_WINDOW = 4
MOST_FILES = 64
"""Files ahead of the reader at most."""


class Walk:
    """One program's way through a directory. It begins with a file that was read."""

    __slots__ = (
        "_ahead", "_asked", "_at", "_end", "_most", "_place", "_siblings", "_stream",
        "by_name", "front", "hits", "last", "owed", "top", "window",
    )  # fmt: skip

    def __init__(self, siblings: Siblings, place: Place, ino: int, *, by_name: bool, most: int) -> None:
        self.by_name = by_name
        self.hits = 0
        """How often the next file that was read was one of the next here."""
        self.window = 0
        """Files to have ahead."""
        self.top = 0
        """The directory in which the walk may go on when its own is done; 0: in none."""
        self.last = 0.0
        """When it was right last (trio's clock)."""
        self.owed: deque[tuple[int, str]] = deque()
        """Number and object key of the files that were brought ahead, the next first."""
        self._siblings = siblings
        self._most = most
        self._place = place
        self.front = 0
        """Number of the furthest file that was read; the first is 0."""
        self._asked = 0
        """Up to which number files have been wanted."""
        self._end = 1
        self._ahead: deque[Sibling] = deque()
        """The entries from the front on, this one not."""
        self._at: dict[int, int] = {ino: 0}
        """Numbers by inode."""
        self._stream: Iterator[Sibling | None] | None = self._go(place)

    # -- what comes

    def _go(self, place: Place) -> Iterator[Sibling | None]:
        """What follows a place; None after each look into the registry."""
        yield from self._within(place)
        if self.top:  # who reads a directory's files first goes below it only now
            start = Place(place.parent, "", 0)
            for entry in self._siblings.after(start, PAGE, by_name=self.by_name, most=0):
                if entry.place == place:
                    break
                if entry.directory:
                    yield from self._within(Place(entry.ino, "", 0))
        at = place.parent
        while self.top and at != self.top:
            up = self._siblings.place(at)
            if up is None:
                return
            yield from self._within(up)
            at = up.parent

    def _within(self, place: Place, depth: int = 0) -> Iterator[Sibling | None]:
        """What follows in the same directory: of each page the files, then what is below its directories."""
        while True:
            count = PAGE if self.hits >= SURE else FIRST_PAGE
            page = self._siblings.after(place, count, by_name=self.by_name, most=self._most)
            yield None
            for entry in page:
                if not entry.directory:
                    yield entry
            for entry in page:
                if entry.directory and self.top and depth < DEEPEST:
                    yield from self._within(Place(entry.ino, "", 0), depth + 1)
            if len(page) < count:
                return
            place = page[-1].place

    def _look(self, number: int) -> None:
        """Know the entries up to a number, if they are not too far apart."""
        looks = 0
        while self._end <= number and self._stream is not None and looks < LOOKS:
            try:
                entry = next(self._stream)
            except StopIteration:
                self._stream = None
                return
            if entry is None:
                looks += 1
            else:
                self._at.setdefault(entry.ino, self._end)
                self._ahead.append(entry)
                self._end += 1

    # -- where it is

    def takes(self, ino: int) -> bool:
        """Whether a file that is read now is of this walk, which then has come to it."""
        reach = FAR if self.hits >= SURE else NEAR
        self._look(self.front + reach)
        number = self._at.get(ino)
        if number is None or not self.front - BACK <= number <= self.front + reach:
            return False
        if number > self.front:
            self.hits += 1
            if self.hits == SURE and not self.window:
                self.window = FIRST_WINDOW
            for passed in range(self.front, number):
                entry = self._ahead.popleft()
                if passed + 1 == number:
                    self._place = entry.place
            self.front = number
            if len(self._at) > 4 * (BACK + MOST_FILES):
                self._at = {ino: at for ino, at in self._at.items() if at >= number - BACK}
        return True

    def passed(self) -> Iterator[str]:
        """Keys of the files that were brought ahead, and are behind now; each is given once."""
        while self.owed and self.owed[0][0] < self.front - BACK:
            yield self.owed.popleft()[1]

    def wanted(self, room: int) -> Iterator[Revision]:
        """The files to be brought now, of each no more than a block, and ``room`` bytes at most; each is given once."""
        if self.front + self.window - self._asked < self.window // 4:
            return  # a few at a time cost less
        stop = self.front + self.window
        self._look(stop)
        first = max(self._asked, self.front) + 1
        for number in range(first, min(stop + 1, self._end)):
            entry = self._ahead[number - self.front - 1]
            if entry.revision is not None:
                room -= min(entry.revision.size, BLOCK_SIZE)
                if room < 0:
                    return
                self.owed.append((number, entry.revision.object_key))
                yield entry.revision
            self._asked = number

    def is_at_end(self) -> bool:
        """Whether (almost) all of the directory has been read."""
        self._look(self.front + FAR + 1)
        if len(self._ahead) > FAR:
            return self._ahead[FAR].place.parent != self._place.parent
        return self._stream is None

    def directory(self) -> int:
        """The directory it is in."""
        return self._place.parent

    # -- how far ahead

    def was_right(self) -> None:
        """A file that was brought ahead was read: twice as many in each round trip."""
        self.window = min(self.window + 1, MOST_FILES)

    def was_wrong(self) -> None:
        """A file that was brought ahead was passed by."""
        self.window //= 2
        if not self.window:
            self.hits = 0  # begin again

    def goes_on_from(self, before: Walk, top: int) -> None:
        """The program that was in another directory has come here; ``top``: where both are."""
        self.hits, self.window, self.top = before.hits, before.window, top
