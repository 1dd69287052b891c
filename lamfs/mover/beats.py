"""Progress of storage work. A call that waits for storage counts its time from the last progress. Loop only.

A task says once whose work it does (``doing``). The mover's answers, and its signs of life while it moves bytes, count
for that work, and so do tasks that are started from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class Beat:
    """Counts the progress of one piece of work, and of all that it is part of (``whole``)."""

    __slots__ = ("_count", "_paused", "_whole")

    def __init__(self, *whole: Beat) -> None:
        self._whole = list(whole)
        self._count = self._paused = 0

    def __call__(self) -> None:
        """There was progress."""
        self._count += 1
        for beat in self._whole:
            beat()

    def value(self) -> int:
        """A number that differs from the last one if there was progress since, and always while it is ``paused``."""
        if self._paused:
            self._count += 1
        return self._count

    def counts_for(self, whole: Beat) -> None:
        """From now on it is part of ``whole`` too. It must not be paused now."""
        self._whole.append(whole)

    def pause(self, by: int) -> None:
        """One piece more (1), or less (-1), of it is doing something that shows no progress."""
        self._paused += by
        for beat in self._whole:
            beat.pause(by)


_doing: ContextVar[Beat | None] = ContextVar("beat", default=None)


@contextlib.contextmanager
def doing(beat: Beat) -> Iterator[None]:
    """What this task, and tasks that it starts, do inside the context counts for ``beat``."""
    before = _doing.set(beat)
    try:
        yield
    finally:
        _doing.reset(before)


def current() -> Beat | None:
    """What the work of this task counts for."""
    return _doing.get()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Inside the context this machine's own disk is waited for. Storage is not to blame for that time.

    A sync shows no progress until it is done.
    """
    beat = _doing.get()
    if beat is None:
        yield
        return
    beat.pause(1)
    try:
        yield
    finally:
        beat.pause(-1)
