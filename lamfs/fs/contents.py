"""The contents of generated files: made when they are read, shared by their readers, and few of them kept. Loop only.

Opening costs a small entry. As with the files of /proc, a content that was dropped is made anew when it is read again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

LIMIT = 4 << 20
"""Bytes of contents that are kept at most. The newest is always kept."""
SHARED_SECONDS = 0.2
"""Seconds for which other handles may read what was made for one, while nothing happens that would change it."""
OVERHEAD = 256
"""Bytes that keeping a content takes besides the content itself."""


@dataclass(slots=True, eq=False)
class Content:
    """A file's content at ``made_at``, seconds. ``data`` is None once dropped. ``readers``: handles reading it."""

    number: int
    data: bytes | None
    stamp: object | None
    made_at: float
    readers: int = 0


@dataclass(slots=True, eq=False)
class Opened:
    """An open handle. ``end``: the end of the content that it was told; None before that, and when it reads again."""

    number: int
    content: Content | None = None
    end: int | None = None


class Contents:
    """Handles of one mount's generated files, and what they read.

    ``make(number)`` gives the content of a file now; it may raise FsError. ``stamp(number)`` changes when a program may
    expect a new content because of what it has just done. None: each handle gets its own content, and only equal ones
    are shared. ``clock`` counts seconds.
    """

    def __init__(
        self,
        make: Callable[[int], bytes],
        stamp: Callable[[int], object | None],
        first: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._stamp = stamp
        self._clock = clock
        self._next = first
        self._opened: dict[int, Opened] = {}
        self._kept: dict[Content, None] = {}  # the oldest first
        self._latest: dict[int, Content] = {}
        self.kept_bytes = 0
        """Memory used by the contents that are kept."""

    def open(self, number: int) -> int:
        """A handle, whose number is never used again."""
        self._next += 1
        self._opened[self._next] = Opened(number)
        return self._next

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Bytes of a file. A handle reads one content until it was told the end, as long as that content is kept."""
        opened = self._opened[handle]
        if opened.end is not None and offset >= opened.end:
            return b""  # a content that was made meanwhile may be longer
        content = opened.content
        data = None if content is None else content.data
        if data is None:
            self._leave(opened)
            content = opened.content = self._content_now(opened.number)
            content.readers += 1
            opened.end = None
            data = content.data or b""
        if offset >= len(data):
            opened.end = len(data)
            self._leave(opened)
        return data[offset : offset + size]

    def release(self, handle: int) -> None:
        """The handle is closed."""
        opened = self._opened.pop(handle, None)
        if opened is not None:
            self._leave(opened)

    def _content_now(self, number: int) -> Content:
        """The content for a handle that begins to read now."""
        now = self._clock()
        self._drop_old(now)
        latest, stamp = self._latest.get(number), self._stamp(number)
        if latest is not None and stamp is not None and latest.stamp == stamp and not self._is_old(latest, now):
            return latest
        data = self._make(number)
        if latest is not None and latest.data == data:
            return latest
        content = Content(number, data, stamp, now)
        self._kept[content] = None
        self._latest[number] = content
        self.kept_bytes += len(data) + OVERHEAD
        while self.kept_bytes > LIMIT and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))
        return content

    def _leave(self, opened: Opened) -> None:
        """The handle does not read its content any more."""
        content, opened.content = opened.content, None
        if content is None:
            return
        content.readers -= 1
        if not content.readers and self._is_old(content, self._clock()):
            self._drop(content)

    def _is_old(self, content: Content, now: float) -> bool:
        """Whether no new handle may read it."""
        return content.stamp is None or now - content.made_at > SHARED_SECONDS

    def _drop_old(self, now: float) -> None:
        """Drop contents that nobody reads, or will read."""
        while self._kept:
            oldest = next(iter(self._kept))
            if oldest.readers or not self._is_old(oldest, now):
                return
            self._drop(oldest)

    def _drop(self, content: Content) -> None:
        if content.data is None:
            return
        self.kept_bytes -= len(content.data) + OVERHEAD
        content.data = None
        del self._kept[content]
        if self._latest.get(content.number) is content:
            del self._latest[content.number]
