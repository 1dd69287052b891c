"""The files that a program will read next in its directory are prefetched before it opens them. Loop only.

One after the other, small files cost a round trip to storage each. The registry knows what is beside a file. When a
program reads a directory in order (ordered.py), the next files are fetched together, more of them the longer that goes
on. When it reads one in no order, the others are fetched bit by bit (scattered.py). Files that were prefetched and not
read make the prefetches fewer, and their bytes are bounded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Protocol

import trio

from lamfs.errors import LamfsError
from lamfs.model import BLOCK_SIZE, Revision
from lamfs.prefetch import settings
from lamfs.prefetch.files import FileQueue
from lamfs.prefetch.ordered import Ordered
from lamfs.prefetch.scattered import Scattered
from lamfs.registry import Registry
from lamfs.registry.siblings import Place, Siblings

log = logging.getLogger("lamfs.fs")


class Counters(Protocol):
    """What a mount counts of prefetched files: see lamfs.fs.counters."""

    prefetched_files: int
    prefetched_used: int
    prefetched_wasted: int


class DirectoryPrefetch:
    """How the programs of one mount go through directories, and what was prefetched for them.

    ``files``: where prefetches are queued; None: nothing is prefetched.
    """

    def __init__(self, registry: Registry, files: FileQueue | None, counters: Counters) -> None:
        self._siblings = Siblings(registry.db)
        self._files = files
        self._counters = counters
        self._orders: list[Ordered] = []
        """The one with the latest hit comes first."""
        self._scattered: dict[int, Scattered] = {}
        """By directory; the one read last comes last."""
        self._ahead: dict[str, tuple[Ordered | Scattered, int]] = {}
        """What was prefetched and has not been read yet, by object key: for whom, and bytes."""
        self._ordered_bytes = self._scattered_bytes = 0
        """Bytes of that, of files in order and in no order."""

    # -- what programs do

    def read(self, ino: int, revision: Revision) -> None:
        """A file is read for the first time since it was opened."""
        if not self._ahead:
            return
        found = self._forget(revision.object_key)
        if found is None:
            return
        self._counters.prefetched_used += 1
        with self._guarded():
            if isinstance(found, Scattered):
                found.last = trio.current_time()
                self._fetch_scattered(found)
            else:
                found.was_used()
                self._follow(ino)
                self._hit(found)

    def missed(self, ino: int) -> None:
        """The first read of a file waits for storage."""
        if self._files is None:
            return
        with self._guarded():
            self._missed(ino)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """No error of prefetching fails a read. The read itself reports the registry's errors."""
        try:
            yield
        except LamfsError as error:
            log.debug("nothing is read ahead: %s", error)
        except Exception:
            log.exception("unexpected error in reading ahead, which this mount does no more")
            self._files = None

    def _missed(self, ino: int) -> None:
        now = trio.current_time()
        for idle in [order for order in self._orders if now - order.last > settings.ORDER_IDLE]:
            self._end_order(idle)
        for directory in [at for at, each in self._scattered.items() if now - each.last > settings.SCATTER_IDLE]:
            self._end_scattered(directory)
        order = self._follow(ino)
        if order is not None:
            self._hit(order)
            return
        place = self._siblings.place(ino)
        if place is None:
            return
        scattered = self._scattered.pop(place.parent, None) or Scattered(self._siblings, place.parent, now)
        self._scattered[place.parent] = scattered
        scattered.missed(now)
        if scattered.begun and not scattered.done:
            self._fetch_scattered(scattered)
            return
        before, top = self._left_for(place)
        for by_name in (True, False) if before is None else (before.by_name,):
            order = Ordered(self._siblings, place, ino, by_name=by_name, most=settings.LARGEST_FILE)
            order.last = now
            self._orders.insert(0, order)
            if before is not None:
                order.continues(before, top)
                self._fetch_ordered(order)
        if before is not None:
            self._end_order(before)
        self._end_oldest()

    def _follow(self, ino: int) -> Ordered | None:
        """Move all orders to which a file belongs; return the one with the latest hit before."""
        first = None
        for order in self._orders:
            if order.accepts(ino):
                order.last = trio.current_time()
                first = first or order
        return first

    def _hit(self, order: Ordered) -> None:
        if self._orders[0] is not order:
            self._orders.remove(order)
            self._orders.insert(0, order)
        for key in order.passed():
            if self._forget(key) is not None:
                self._counters.prefetched_wasted += 1
                order.was_wasted()
        self._fetch_ordered(order)

    # -- what is prefetched

    def _fetch_ordered(self, order: Ordered) -> None:
        files = self._files
        if files is None or order.hits < settings.ORDER_SURE or not order.window:
            return
        budget = min(settings.ORDERED_BYTES, files.budget()) - self._ordered_bytes
        wanted = [revision for revision in order.wanted(budget) if revision.object_key not in self._ahead]
        if not wanted:
            return
        for revision in files.add(wanted, self._failed):
            size = min(revision.size, BLOCK_SIZE)
            self._ahead[revision.object_key] = order, size
            self._ordered_bytes += size
            self._counters.prefetched_files += 1

    def _fetch_scattered(self, scattered: Scattered) -> None:
        files = self._files
        if files is None or not scattered.begun or len(self._ahead) >= settings.SCATTERED_FILES:
            return
        budget = files.budget() // settings.SCATTERED_PART - self._scattered_bytes
        wanted = [revision for revision in scattered.wanted(budget) if revision.object_key not in self._ahead]
        for revision in files.add(wanted, self._failed):
            self._ahead[revision.object_key] = scattered, revision.size
            scattered.prefetched.add(revision.object_key)
            self._scattered_bytes += revision.size
            self._counters.prefetched_files += 1

    def _forget(self, key: str) -> Ordered | Scattered | None:
        """A file is not ahead any more. Returns for whom it was prefetched."""
        found, size = self._ahead.pop(key, (None, 0))
        if isinstance(found, Scattered):
            found.prefetched.discard(key)
            self._scattered_bytes -= size
        else:
            self._ordered_bytes -= size
        return found

    def _failed(self, revision: Revision) -> None:
        found = self._forget(revision.object_key)
        if found is not None:
            self._counters.prefetched_wasted += 1
            found.was_wasted()

    # -- beginnings and ends

    def _left_for(self, place: Place) -> tuple[Ordered | None, int]:
        """The order that may continue at a place, at its directory's end, and the directory that contains both."""
        here: list[int] = []
        for order in self._orders:
            if order.hits >= settings.ORDER_SURE and order.is_at_end():
                here = here or self._above(place.parent)
                for directory in self._above(order.directory()):
                    if directory in here:
                        return order, directory
        return None, 0

    def _above(self, directory: int) -> list[int]:
        """A directory and those that contain it."""
        found = [directory]
        while len(found) < settings.LEVELS:
            up = self._siblings.place(found[-1])
            if up is None:
                break
            found.append(up.parent)
        return found

    def _end_oldest(self) -> None:
        """Keep only so many orders and directories: those with the latest hits."""
        for sure, most in ((True, settings.SURE_ORDERS), (False, settings.UNSURE_ORDERS)):
            for order in [order for order in self._orders if (order.hits >= settings.ORDER_SURE) == sure][most:]:
                self._end_order(order)
        for directory in list(self._scattered)[: -settings.SCATTERED_DIRECTORIES]:
            self._end_scattered(directory)

    def _end_order(self, order: Ordered) -> None:
        self._orders.remove(order)
        for _, key in order.prefetched:
            if self._ahead.get(key, (None,))[0] is order:
                self._forget(key)
                self._counters.prefetched_wasted += 1

    def _end_scattered(self, directory: int) -> None:
        for key in list(self._scattered.pop(directory).prefetched):
            self._forget(key)
            self._counters.prefetched_wasted += 1
