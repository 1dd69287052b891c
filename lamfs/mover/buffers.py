"""Memory for blocks that are being fetched, verified or hashed. Thread-safe."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator

from lamfs.model import BLOCK_SIZE


class Buffers:
    """Memory for one block each, kept from job to job. There is one for each job that needed one at the same time.

    Page faults for 4 MiB cost more than fetching them from a near server.
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
        """Free the memory that is not in use."""
        self._free.clear()


_thread = threading.local()


def own() -> Buffers:
    """This thread's own Buffers. Their memory is freed with the thread, or by ``drop``."""
    found: Buffers | None = getattr(_thread, "buffers", None)
    if found is None:
        found = _thread.buffers = Buffers()
    return found
