"""What is known of a block and its leaves, and fetches in flight. Data of BlockFile and Fetches; loop only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import trio

from lamfs.errors import LamfsError, StorageError, TransferDied

log = logging.getLogger(__name__)

ABSENT, PRESENT, VERIFIED = 0, 1, 2
"""States of a block: not in the file; in the file, as the index says; verified by this process."""


class Fetch:
    """The fetch of a block, or of some of its leaves (``mask``). All readers that want them wait for the same fetch."""

    __slots__ = ("began", "done", "error", "mask", "prefetch", "unasked")

    def __init__(self, prefetch: bool, mask: int = 0, *, unasked: bool = False) -> None:
        self.prefetch = prefetch
        """It uses the place of a prefetch."""
        self.mask = mask
        self.unasked = prefetch or unasked
        """Nobody waited for it when it started."""
        self.began = trio.current_time()
        """Trio's clock."""
        self.done = trio.Event()
        self.error: LamfsError | None = None

    @contextlib.contextmanager
    def caught(self, what: str) -> Iterator[None]:
        """An error while ``what`` is fetched becomes the fetch's error. Readers that wait for the fetch raise it."""
        try:
            yield
        except LamfsError as error:
            self.error = error
        except trio.Cancelled:
            self.error = TransferDied("The read was given up: the mount is being ended.")
            raise
        except Exception as error:
            log.exception("Bringing %s failed.", what)
            self.error = StorageError(f"Reading {what} failed: {error}; see the mount's log.")


class Leaves:
    """What is known of the leaves of an unverified block. Leaf i is bit i of each mask."""

    __slots__ = ("fetches", "present", "verified")

    def __init__(self, present: int) -> None:
        self.present = present
        """In the file, as the index says. Of a PRESENT block, all are."""
        self.verified = 0
        """Verified by this process."""
        self.fetches: list[Fetch] = []

    def in_flight(self) -> int:
        """Leaves in flight."""
        mask = 0
        for fetch in self.fetches:
            mask |= fetch.mask
        return mask
