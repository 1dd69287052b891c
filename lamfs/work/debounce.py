"""Debounce: uploads wait for the end of a burst of writes. Loop only.

A program that makes many small files (tar, git, cp -r) waits for the answer to each call. Uploads at the same time take
processor time from it, and are wasted if it removes or renames its files again. So no upload starts while files are
closed in quick succession, or opened right after that (git clone, then git status), but for ten seconds at most. Then
everything that has piled up is stored in batches.
"""

from __future__ import annotations

import trio

MANY = 16
"""Files closed in quick succession that make a burst."""
QUIET = 0.1
"""Seconds without a closed or an opened file that end a burst."""
WAIT = 10.0
"""Most seconds that uploads wait for a burst. Then everything that is ready is stored before they wait again."""


class Debounce:
    """Counts files as they are closed, and tells how long uploads should wait."""

    def __init__(self) -> None:
        self._count = 0
        self._last = 0.0
        self._since: float | None = None
        self._ino = 0

    def closed(self, ino: int) -> None:
        """A file that has to be stored was closed. Writing the same file again and again is not a burst."""
        now = trio.current_time()
        if now - self._last > QUIET:
            self._count = 0
        self._count += ino != self._ino
        self._ino = ino
        self._last = now

    def opened(self) -> None:
        """A file or directory was opened. During a burst this means that the burst goes on."""
        now = trio.current_time()
        if self._count >= MANY and now - self._last <= QUIET:
            self._last = now

    def pause(self) -> float:
        """Seconds after which to ask again, because a burst is going on. 0: go on."""
        now = trio.current_time()
        quiet = self._last + QUIET - now
        if self._count < MANY or quiet <= 0:
            self._since = None
            return 0.0
        if self._since is None:
            self._since = now
        left = self._since + WAIT - now
        return max(min(quiet, left), 0.0)

    def drained(self) -> None:
        """Everything that was ready has started: uploads may wait again."""
        self._since = None
