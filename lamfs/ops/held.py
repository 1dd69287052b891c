"""What this machine knows of its lease on an instance without asking storage. Synchronous, any process.

Two files of ``settings.directory``: ``lease.json`` is written by each process that acquires or renews the lease.
``held-long`` exists while this machine keeps the lease after its last mount has ended.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from lamfs import config
from lamfs.errors import LamfsError
from lamfs.jsontext import is_number
from lamfs.ops import lock
from lamfs.processes import boot_id, uptime

NOTE, LONG = "lease.json", "held-long"


class Note(NamedTuple):
    """The lease as it was written last. ``fence``: its number; ``seconds``: how long it holds from ``at``, a value of
    ``uptime()`` in the boot ``boot``; ``etag``: of the lock object."""

    fence: int
    seconds: float
    at: float
    boot: str
    etag: str

    @property
    def age(self) -> float:
        """Seconds since it was written; infinite when the machine has been started since."""
        age = uptime() - self.at
        return age if self.boot == boot_id() and age >= 0 else float("inf")

    @property
    def holds(self) -> bool:
        """Whether the lease still holds, so that no other machine can have taken it over."""
        return self.age < self.seconds

    @property
    def renew_due(self) -> bool:
        """Whether the next command should renew it. (A living mount renews its own.)"""
        return self.age >= min(lock.RENEW_AFTER, self.seconds)


def read(directory: Path) -> Note | None:
    """The note of an instance; None: there is none, or it is damaged or from an older version."""
    try:
        data = config.read_json(directory / NOTE)
    except LamfsError:
        return None
    if data is None or not all(isinstance(data.get(name), str) for name in ("boot", "etag")):
        return None
    fence, seconds, at = (data.get(name) for name in ("fence", "seconds", "at"))
    if not isinstance(fence, int) or not is_number(fence, 0, lock.MAX_FENCE):
        return None
    if not is_number(seconds, 0, lock.LEASE_SECONDS + 1) or not is_number(at, 0, 1e12):
        return None
    return Note(fence, float(seconds), float(at), data["boot"], data["etag"])  # type: ignore[arg-type]


def write(directory: Path, fence: int, seconds: float, lease: lock.Lease) -> None:
    """Note the lease that ``lease`` has just acquired or renewed. Raises LamfsError."""
    note = Note(fence, seconds, lease.at, boot_id(), lease.etag)
    config.write_json(directory / NOTE, note._asdict(), durable=False)


def forget_note(directory: Path) -> None:
    """Forget the note; commands ask storage then. Raises OSError."""
    (directory / NOTE).unlink(missing_ok=True)


def forget(directory: Path) -> None:
    """Forget the lease: this machine does not have it any more."""
    for name in (NOTE, LONG):
        (directory / name).unlink(missing_ok=True)


def keep_long(directory: Path) -> None:
    """Keep the lease until 'lamfs close', also when a mount ends. Raises LamfsError."""
    if not is_long(directory):
        config.make_directory(directory)
        config.write_json(directory / LONG, {}, durable=False)


def is_long(directory: Path) -> bool:
    """Whether ``keep_long`` was called since the lease was given back."""
    with contextlib.suppress(OSError):
        return (directory / LONG).exists()
    return False
