"""What has to survive a power cut before the next step may be taken: the registry's log, a spool file. Loop only.

Commits go to the registry's write-ahead log, which nobody syncs by itself. What is done to storage lasts, so the row
that announces it is made durable before; and the row that notes it, before a file goes that would be needed without it.
"""

from __future__ import annotations

import os
from pathlib import Path

import trio

from lamfs.registry import sync_log
from lamfs.storage.osfiles import fsync_folder


class LogSync:
    """``await durable()`` returns when every commit before the call is durable: one sync for all who wait.

    Raises RegistryError.
    """

    def __init__(self, registry_path: Path) -> None:
        self._path = registry_path
        self._lock = trio.Lock()
        self._asked = self._done = 0

    async def __call__(self) -> None:
        self._asked = mine = self._asked + 1
        async with self._lock:
            if self._done >= mine:
                return  # a sync that began after the call has ended meanwhile
            covered = self._asked
            await trio.to_thread.run_sync(sync_log, self._path)
            self._done = covered


async def sync_file(path: str, folder: Path) -> None:
    """Return when a file, and its name in ``folder``, are durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def work() -> None:
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)
        fsync_folder(str(folder))

    await trio.to_thread.run_sync(work)
