"""What one mount counts on its hot path: plain integers, incremented by files, waits and prefetch. Loop only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What programs have read and written since the mount began, and how many calls failed. Bytes and calls.

    Only reads and writes that reach lamfs count: not what the kernel answers from its page cache.
    """

    spool_reads: int = 0
    """Reads of bytes that are not in storage yet."""
    hits: int = 0
    """Reads of stored bytes that were all in the cache (or in the local storage folder)."""
    misses: int = 0
    """Reads that waited for storage."""
    read_bytes: int = 0
    prefetched_files: int = 0
    """Small files that were fetched before a program asked for them."""
    prefetched_used: int = 0
    """Those of them that were read later."""
    prefetched_wasted: int = 0
    """Those of them that could not be fetched, or that nobody is expected to read any more."""
    writes: int = 0
    write_bytes: int = 0
    io_errors: int = 0
    """Calls that failed with EIO."""
    timeouts: int = 0
    """Calls that ended because storage took longer than the mount's ``timeout``."""

    @property
    def reads(self) -> int:
        """All reads."""
        return self.spool_reads + self.hits + self.misses
