"""Partial spools after a crash: the ranges that did not reach the disk, and bytes of which nobody has noted that they
were written. Synchronous, any thread.

fs/partial.py says what a partial spool is, and registry/partial_spools.py what is noted of one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Collection, Iterator, Mapping

from lamfs.model import BLOCK_SIZE, now_ns
from lamfs.registry import Ranges, Registry, add_range, missing_blocks, without
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder

log = logging.getLogger("lamfs.recover")

PAGE = 4096
"""Bytes that are looked at together: a file system has holes of whole pages, and zeros around what is in one."""
SHOWN = 5
"""Ranges that a message has."""


def keep_durable(registry: Registry, entry: Put, spool: SpoolFolder) -> None:
    """The machine went down: drop the ranges of a put's spool file that are not durable, and log what is lost; see
    Upkeep.keep_durable."""

    def cut(size: int) -> None:
        with contextlib.suppress(FileNotFoundError), spool.opened(entry.src, os.O_RDWR) as fd:
            if os.fstat(fd).st_size > size:
                os.ftruncate(fd, size)

    for lost in registry.upkeep.keep_durable(entry, now=now_ns(), cut=cut):
        log.error("%s.", lost.sentence)


def count_unnoted(registry: Registry, entry: Put, spool: SpoolFolder) -> None:
    """A process of this boot was killed: what is in a put's partial spool, and in none of its ranges, counts as
    written. Logs which bytes. Raises OSError.

    Each write is noted before it is acknowledged, so these are of a write, or of a fetch of the base's bytes, that was
    broken off in the middle: its pages may be there or not, as on a local disk. But if the disk has lost the end of the
    work database's log, they were acknowledged, and are nowhere else. The two look the same.

    Only pages that are not all zeros count, without the zeros at both ends of a run of them: where nothing was written
    a file system may have zeros, too. There the base's bytes stay.
    """
    if entry.base is None:
        return
    known = registry.partial_spools.ranges(entry.src)
    present = registry.partial_spools.present(entry.src)
    try:
        with spool.opened(entry.src, os.O_RDONLY) as fd:
            size = os.fstat(fd).st_size
            missing = missing_blocks(present, int(entry.base.partition(":")[0]), size)
            runs = list(_runs(fd, _unnoted(fd, size, missing, known)))
    except FileNotFoundError:
        return
    found: dict[int, Ranges] = {}
    for start, end in runs:
        for block in range(start // BLOCK_SIZE, (end - 1) // BLOCK_SIZE + 1):
            low = block * BLOCK_SIZE
            ranges = found.get(block, known.get(block, ()))
            found[block] = add_range(ranges, max(start - low, 0), min(end - low, BLOCK_SIZE))
    if found and registry.upkeep.add_unnoted(entry, known, found):
        shown = ", ".join(f"{start}-{end}" for start, end in runs[:SHOWN]) + (" …" if len(runs) > SHOWN else "")
        log.warning(
            "'%s': %d bytes in its spool file %s were not noted (%s). They count as written: their process was killed"
            " at that moment, or the disk has lost the end of the work database's log.",
            registry.tree.path(entry.ino) or entry.uid,
            sum(end - start for start, end in runs),
            entry.src,
            shown,
        )


def _unnoted(fd: int, size: int, missing: Collection[int], known: Mapping[int, Ranges]) -> Iterator[tuple[int, int]]:
    """Start and end of what is not a hole, in blocks that are ``missing``, and in none of their ranges; in order."""
    for start, end in _extents(fd, size):
        for block in range(start // BLOCK_SIZE, (end - 1) // BLOCK_SIZE + 1):
            if block in missing:
                low = block * BLOCK_SIZE
                part = max(start, low), min(end, low + BLOCK_SIZE)
                yield from without([part], ((low + first, low + last) for first, last in known.get(block, ())))


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is not a hole; all of the file where that cannot be told."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno != errno.ENXIO:  # that is: no more data
                yield at, size
            return
        if start < end:
            yield start, end
        at = end if end > at else size


def _runs(fd: int, parts: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Of these parts of a file the runs of pages that are not all zeros, without the zeros at the ends of each run."""
    run: tuple[int, int] | None = None
    reached = -1  # where the run's last page ends
    for start, end in parts:
        at = start
        while at < end:
            data = os.pread(fd, min(PAGE - at % PAGE, end - at), at)
            if not data:
                break  # it was cut meanwhile
            first, last = at + len(data) - len(data.lstrip(b"\0")), at + len(data.rstrip(b"\0"))
            if run is not None and (first >= last or at != reached):
                yield run
                run = None
            if first < last:
                run = (first if run is None else run[0]), last
                reached = at + len(data)
            at += len(data)
    if run is not None:
        yield run
