"""What the CLI prints: lines, columns, JSON and progress. Main thread; any thread may call ``Progress.add``.

Data goes to stdout, everything else to stderr. Nothing is cut to the terminal's width. rich is imported only when there
is a terminal to draw a bar on.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from lamfs.printable import count_of, in_json, lines, one_line

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

QUIET_SECONDS = 10.0
"""Without a terminal: seconds between two lines of progress."""


def shown(text: str) -> str:
    """Text that is safe for a terminal: control characters and bytes that are not UTF-8 are escaped.

    A key may contain a newline or an escape sequence. A line of output must stay one line, and must not control the
    terminal.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def say(text: str) -> None:
    """Print lines for users on stdout."""
    click.echo(lines(text))


def say_path(path: str) -> None:
    """Print a path on stdout: raw for a program, as ``shown`` on a terminal (as ls(1) does)."""
    click.echo(shown(path) if sys.stdout.isatty() else path)


def note(text: str) -> None:
    """Print a line besides the data, on stderr."""
    click.echo(one_line(text), err=True)


def complain(text: str) -> None:
    """Print an error: ``lamfs: sentence``."""
    click.echo(f"lamfs: {one_line(text)}", err=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON, for programs. Without ``indent`` it is one line."""
    click.echo(in_json(json.dumps(value, indent=indent, ensure_ascii=False)))


def size(count: int) -> str:
    """Bytes for users: ``224 B``, ``1.4 GiB``."""
    if count < 1024:
        return f"{count} B"
    value = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def when(time_: int | str) -> str:
    """Nanoseconds since the epoch, or ISO 8601, as local date and time."""
    moment = datetime.fromisoformat(time_) if isinstance(time_, str) else datetime.fromtimestamp(time_ / 1e9)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def columns(rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset(), indent: str = "") -> None:
    """Print rows as aligned columns. Those in ``right`` are aligned to the right."""
    table = [[shown(cell) for cell in row] for row in rows]
    if not table:
        return
    widths = [max(width(row[index]) for row in table) for index in range(len(table[0]))]
    for row in table:
        cells = []
        for index, cell in enumerate(row):
            gap = " " * (widths[index] - width(cell))
            cells.append(gap + cell if index in right else cell + gap)
        click.echo((indent + "  ".join(cells)).rstrip())


class Progress:
    """Progress towards a total, as a bar on a terminal and as a line now and then elsewhere. A context manager.

    ``total`` in bytes, or in ``unit``s if one is given; 0 while it is unknown.
    """

    def __init__(self, label: str, total: int = 0, *, unit: str | None = None) -> None:
        self._label = shown(label)
        self._total = total
        self._done = 0
        self._unit = unit
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._began = self._said = time.monotonic()
        self._base = 0
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> Self:
        self._draw()
        return self

    def _draw(self) -> None:
        """Draw the bar, if there is a terminal."""
        if self._bar is None and not self._over and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn() if self._unit else DownloadColumn(binary_units=True),
                TimeElapsedColumn(),
                *(() if self._unit else (TransferSpeedColumn(), TimeRemainingColumn(compact=True))),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._label, total=self._total or None)
            self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A thread that waits for a daemon may report once more.
        self._over = True
        if self._bar is not None:
            self._bar.stop()

    def begin(self, done: int, total: int) -> None:
        """Record how much was done before: rate and remaining time count from here."""
        self._done = self._base = done
        self._total = total
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, total=total or None, completed=done)

    def add(self, count: int) -> None:
        """``count`` more is done."""
        with self._lock:
            self.set(self._done + count)

    def note(self, text: str) -> None:
        """Print a line besides the bar, on stderr."""
        if self._bar is not None:
            self._bar.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)
        else:
            note(text)

    def set(self, done: int, total: int | None = None) -> None:
        """Record how much is done, and of how much."""
        self._done = done
        self._total = self._total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, description=self._label, completed=done, total=self._total or None)
        elif time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            of = f" of {self._amount(self._total)}" if self._total else ""
            note(f"{self._label}: {self._amount(done)}{of}{self._rate()}")

    def _rate(self) -> str:
        """Rate and remaining time in words, if bytes are counted and enough of them have come."""
        seconds = time.monotonic() - self._began
        if self._unit or not self._total or self._done <= self._base or seconds < QUIET_SECONDS:
            return ""
        rate = (self._done - self._base) / seconds
        left = max(0, round((self._total - self._done) / rate))
        return f", {size(round(rate))}/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"

    def _amount(self, count: int) -> str:
        return count_of(count, self._unit) if self._unit else size(count)


class OwedProgress(Progress):
    """Progress of a mount's pending work, fed with the daemon's ``{"owed": rows, "bytes": bytes}``.

    Nothing is drawn while nothing is pending.
    """

    def __init__(self, label: str = "storing") -> None:
        super().__init__(label, unit="step")
        self._plain = self._label
        self._most = 0
        self.owed = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def report(self, message: dict[str, Any]) -> None:
        """Handle one progress message of the daemon."""
        self.owed, self.bytes = int(message.get("owed", 0)), int(message.get("bytes", 0))
        if self.owed:
            self._draw()
        # More may be written meanwhile: then the total grows.
        self._most = max(self._most, self.owed)
        self._label = f"{self._plain}, {size(self.bytes)} left" if self.bytes else self._plain
        self.set(self._most - self.owed, self._most)
