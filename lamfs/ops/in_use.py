"""The lock that keeps a working copy where it is while a program has it open. Synchronous; any thread.

It is flock(2) on the file ``in-use`` of ``settings.directory``: shared by each process with an open registry, exclusive
for one that replaces or removes it. Without it SQLite could fold the log of one registry into another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lamfs import config
from lamfs.config import InstanceSettings
from lamfs.errors import Locked
from lamfs.ops import written

if TYPE_CHECKING:
    from lamfs.registry import Registry

LOOK_SECONDS = 5.0
"""Seconds for which a program that only looks into the registry waits for one that replaces it."""
ALONE_SECONDS = 2.0
"""Seconds for which a program that replaces the registry waits for those that only look into it."""
_PAUSE = 0.02


def take(settings: InstanceSettings, how: int, seconds: float | None = None) -> int:
    """Lock the instance, with ``fcntl.LOCK_SH`` or ``LOCK_EX``. Returns the descriptor; closing it ends the lock.

    ``seconds``: how long this may take; None: as long as it must. Raises BlockingIOError when the time is up.
    """
    config.make_directory(settings.directory)
    fd = os.open(settings.directory / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if seconds is None:
            fcntl.flock(fd, how)
            return fd
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(fd, how | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise
            time.sleep(_PAUSE)
    except BaseException:
        os.close(fd)
        raise


@contextlib.contextmanager
def looking(settings: InstanceSettings, **options: object) -> Iterator[Registry]:
    """The working copy, open for a short look inside the block: nobody replaces it meanwhile.

    ``options``: as Registry has them. Raises Locked when it is being replaced, and what written.open_registry raises.
    """
    if not settings.directory.exists():
        written.refuse_missing(settings)  # nothing is made here for an instance that is gone
    try:
        fd = take(settings, fcntl.LOCK_SH, LOOK_SECONDS)
    except BlockingIOError:
        raise Locked(
            f"Another program is replacing the registry of '{settings.slug}' on this machine, so it cannot be read"
            " now; try again when that has ended."
        ) from None
    try:
        with contextlib.closing(written.open_registry(settings, **options)) as registry:
            yield registry
    finally:
        os.close(fd)
