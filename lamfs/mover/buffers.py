"""Memory for the blocks that are fetched, verified or hashed at the time. Thread-safe."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator

from lamfs.model import BLOCK_SIZE


class Buffers:
    """Memory for one block each, kept from job to job: 4 MiB of page faults cost more than fetching them from a near
    server. There are as many as there were jobs at a time that needed one.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    @contextlib.contextmanager
    def view(self, length: int) -> Iterator[memoryview]:
        """Memory of ``length`` bytes, with whatever was in it before."""
        found: mmap.mmap | None = None
        if length <= BLOCK_SIZE:
            with contextlib.suppress(IndexError):
                found = self._free.pop()
        if found is None:
            found = mmap.mmap(-1, max(length, BLOCK_SIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            with memoryview(found) as whole, whole[:length] as part:
                yield part
        finally:
            if length <= BLOCK_SIZE:
                self._free.append(found)

    def drop(self) -> None:
        """Give the memory back that nobody uses."""
        self._free.clear()


_thread = threading.local()


def own() -> Buffers:
    """This thread's own Buffers: their memory goes with the thread, or by ``drop``."""
    found: Buffers | None = getattr(_thread, "buffers", None)
    if found is None:
        found = _thread.buffers = Buffers()
    return found
