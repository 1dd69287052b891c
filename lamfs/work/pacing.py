"""When the uploader lets writers go first. Loop only.

A program that makes many small files (tar, git, cp -r) waits for the answer to each call. Uploads beside it take the
processor from it, and are for nothing when it removes or renames its files again. So as long as files are closed one
after the other, and files opened after that (git clone, then git status), no upload begins, for a few seconds at most;
then what has come together is stored in batches.
"""

from __future__ import annotations

import trio

MANY = 16
"""Closed files, one soon after the other, from which on it is a program that makes many."""
QUIET = 0.1
"""Seconds without a closed or an opened file after which it has come to its end, or does something else."""
WAIT = 10.0
"""Longest time in seconds that uploads wait for it. Then everything that is ready is stored, before they wait again."""


class Pace:
    """Counts files as they are closed, and says how long uploads are to wait."""

    def __init__(self) -> None:
        self._count = 0
        self._last = 0.0
        self._since: float | None = None
        self._ino = 0

    def closed(self, ino: int) -> None:
        """A file was closed that is to be stored; who writes the same one again and again does not make many."""
        now = trio.current_time()
        if now - self._last > QUIET:
            self._count = 0
        self._count += ino != self._ino
        self._ino = ino
        self._last = now

    def opened(self) -> None:
        """A file or directory was opened: who has made many files until now, or the next program, goes on with them."""
        now = trio.current_time()
        if self._count >= MANY and now - self._last <= QUIET:
            self._last = now

    def pause(self) -> float:
        """Seconds after which to ask again, because a program is at work on many new files; 0: go on."""
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
        """Everything that was ready has begun: uploads may wait again."""
        self._since = None
