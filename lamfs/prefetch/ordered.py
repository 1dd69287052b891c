"""A program that reads a directory's files in order: where it is, and which files it will read next. Loop only.

A directory has two orders (siblings.py). An order is believed as long as each file that is read is one of the next few;
the longer that goes on, the more files are prefetched. They are of the same directory, until the program was seen to
leave it: then also of the directories below and of those that follow, up to the directory that contains them all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lamfs.model import BLOCK_SIZE, Revision
from lamfs.prefetch import settings
from lamfs.registry.siblings import Place, Sibling, Siblings


class Ordered:
    """One program's position in one order of a directory. It begins at a file that was read."""

    __slots__ = (
        "_ahead", "_asked", "_at", "_end", "_most", "_place", "_siblings", "_stream",
        "by_name", "front", "hits", "last", "prefetched", "top", "window",
    )  # fmt: skip

    def __init__(self, siblings: Siblings, place: Place, ino: int, *, by_name: bool, most: int) -> None:
        self.by_name = by_name
        self.hits = 0
        """How often the file that was read next was one of the next few."""
        self.window = 0
        """Files to have ahead of the program."""
        self.top = 0
        """The directory that the program may go on in when its own is done; 0: none."""
        self.last = 0.0
        """When the last hit was (trio's clock)."""
        self.prefetched: deque[tuple[int, str]] = deque()
        """Number and object key of the files that were prefetched, the next one first."""
        self._siblings = siblings
        self._most = most
        self._place = place
        self.front = 0
        """Number of the furthest file that was read; the first file is 0."""
        self._asked = 0
        """Number of the last file that was given out for prefetching."""
        self._end = 1
        self._ahead: deque[Sibling] = deque()
        """The entries behind the front."""
        self._at: dict[int, int] = {ino: 0}
        """Numbers by inode."""
        self._stream: Iterator[Sibling | None] | None = self._after(place)

    # -- what comes next

    def _after(self, place: Place) -> Iterator[Sibling | None]:
        """The entries after a place; None after each query."""
        yield from self._within(place)
        if self.top:  # a program that reads files first enters the directories below only now
            start = Place(place.parent, "", 0)
            for entry in self._siblings.after(start, settings.ORDER_PAGE, by_name=self.by_name, most=0):
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
        """The entries after a place of the same directory: of each page the files, then what its directories hold."""
        while True:
            count = settings.ORDER_PAGE if self.hits >= settings.ORDER_SURE else settings.ORDER_FIRST_PAGE
            page = self._siblings.after(place, count, by_name=self.by_name, most=self._most)
            yield None
            for entry in page:
                if not entry.directory:
                    yield entry
            for entry in page:
                if entry.directory and self.top and depth < settings.ORDER_DEPTH:
                    yield from self._within(Place(entry.ino, "", 0), depth + 1)
            if len(page) < count:
                return
            place = page[-1].place

    def _read(self, number: int) -> None:
        """Read the entries up to a number, if they are not too far apart."""
        pages = 0
        while self._end <= number and self._stream is not None and pages < settings.ORDER_PAGES:
            try:
                entry = next(self._stream)
            except StopIteration:
                self._stream = None
                return
            if entry is None:
                pages += 1
            else:
                self._at.setdefault(entry.ino, self._end)
                self._ahead.append(entry)
                self._end += 1

    # -- where the program is

    def accepts(self, ino: int) -> bool:
        """Whether a file that is read now is one of the next few; if so, it is the position now."""
        reach = settings.ORDER_FAR if self.hits >= settings.ORDER_SURE else settings.ORDER_NEAR
        self._read(self.front + reach)
        number = self._at.get(ino)
        if number is None or not self.front - settings.ORDER_BACK <= number <= self.front + reach:
            return False
        if number > self.front:
            self.hits += 1
            if self.hits == settings.ORDER_SURE and not self.window:
                self.window = settings.ORDER_FIRST_WINDOW
            for passed in range(self.front, number):
                entry = self._ahead.popleft()
                if passed + 1 == number:
                    self._place = entry.place
            self.front = number
            if len(self._at) > 4 * (settings.ORDER_BACK + settings.ORDER_WINDOW):
                self._at = {ino: at for ino, at in self._at.items() if at >= number - settings.ORDER_BACK}
        return True

    def passed(self) -> Iterator[str]:
        """Object keys of the prefetched files that the program has passed by. Each is given once."""
        while self.prefetched and self.prefetched[0][0] < self.front - settings.ORDER_BACK:
            yield self.prefetched.popleft()[1]

    def wanted(self, budget: int) -> Iterator[Revision]:
        """The files to prefetch now, of each no more than a block, and ``budget`` bytes at most. Each is given once."""
        if self.front + self.window - self._asked < self.window // 4:
            return  # several at a time cost less
        stop = self.front + self.window
        self._read(stop)
        first = max(self._asked, self.front) + 1
        for number in range(first, min(stop + 1, self._end)):
            entry = self._ahead[number - self.front - 1]
            if entry.revision is not None:
                budget -= min(entry.revision.size, BLOCK_SIZE)
                if budget < 0:
                    return
                self.prefetched.append((number, entry.revision.object_key))
                yield entry.revision
            self._asked = number

    def is_at_end(self) -> bool:
        """Whether the directory has been read (almost) to its end."""
        self._read(self.front + settings.ORDER_FAR + 1)
        if len(self._ahead) > settings.ORDER_FAR:
            return self._ahead[settings.ORDER_FAR].place.parent != self._place.parent
        return self._stream is None

    def directory(self) -> int:
        """The directory of the position."""
        return self._place.parent

    # -- how many files ahead

    def was_used(self) -> None:
        """A prefetched file was read: widen the window, so that it doubles in each round trip."""
        self.window = min(self.window + 1, settings.ORDER_WINDOW)

    def was_wasted(self) -> None:
        """A prefetched file was not read: halve the window."""
        self.window //= 2
        if not self.window:
            self.hits = 0  # begin again

    def continues(self, before: Ordered, top: int) -> None:
        """The program has come here from another directory. ``top``: the directory that contains both."""
        self.hits, self.window, self.top = before.hits, before.window, top
