"""Signs that storage work goes on. A call that waits for storage counts its time from the last one. Loop only.

A task says once whose work it does (``doing``); the mover's answers, and its signs of life while it moves bytes, count
for that. Tasks that are started from there count for the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class Beat:
    """Counts the signs of one piece of work, and of all that it is a part of (``whole``)."""

    __slots__ = ("_count", "_paused", "_whole")

    def __init__(self, *whole: Beat) -> None:
        self._whole = list(whole)
        self._count = self._paused = 0

    def __call__(self) -> None:
        """It has gone on."""
        self._count += 1
        for beat in self._whole:
            beat()

    def value(self) -> int:
        """Another number than the last time, if it has gone on since; always while it is ``paused``."""
        if self._paused:
            self._count += 1
        return self._count

    def counts_for(self, whole: Beat) -> None:
        """From now on it is a part of ``whole`` too. Nothing of it may be held now."""
        self._whole.append(whole)

    def pause(self, by: int) -> None:
        """One piece more (1), or less (-1), of it does what gives no sign."""
        self._paused += by
        for beat in self._whole:
            beat.pause(by)


_doing: ContextVar[Beat | None] = ContextVar("beat", default=None)


@contextlib.contextmanager
def doing(beat: Beat) -> Iterator[None]:
    """What is done inside of the block, by this task and those it starts, counts for ``beat``."""
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
    """Inside of the block this machine's own disk is waited for (a sync, which says nothing until it is done): storage
    is not to blame for that time."""
    beat = _doing.get()
    if beat is None:
        yield
        return
    beat.pause(1)
    try:
        yield
    finally:
        beat.pause(-1)
