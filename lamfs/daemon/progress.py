"""Progress of what a mount still has to store when it ends: a bar on a terminal, lines in a log. The main thread."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger("lamfs.daemon")

LOG_INTERVAL = 5.0
"""Seconds between two lines in the log."""


class Drain:
    """Shows the progress of draining. ``show``: draw a bar if stderr is a terminal."""

    def __init__(self, *, show: bool) -> None:
        self._show = show and sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._said = 0.0

    def progress(self, rows: int, size: int) -> None:
        """``rows`` files (``size`` bytes) are still to be stored."""
        if self._show:
            self._draw(rows)
        elif rows and time.monotonic() - self._said >= LOG_INTERVAL:
            self._said = time.monotonic()
            log.info("still to be stored: %d files, %.1f MB", rows, size / 1e6)

    def _draw(self, rows: int) -> None:
        if self._bar is None:
            if not rows:
                return
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._task = self._bar.add_task("storing", total=rows)
            self._bar.start()
        assert self._task is not None
        self._total = max(self._total, rows)
        self._bar.update(self._task, total=self._total, completed=self._total - rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
