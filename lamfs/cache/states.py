"""What is known of a block and of its leaves, and what is on its way. Data of BlockFile and Fetches; loop only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import trio

from lamfs.errors import LamfsError, StorageError, TransferDied

log = logging.getLogger(__name__)

ABSENT, PRESENT, VERIFIED = 0, 1, 2
"""States of a block: not in the file; said to be in the file by the index; checked by this process."""


class Fetch:
    """A block or some leaves of one (``mask``) on their way; all readers that want them wait for the same fetch."""

    __slots__ = ("began", "done", "error", "mask", "prefetch", "unasked")

    def __init__(self, prefetch: bool, mask: int = 0, *, unasked: bool = False) -> None:
        self.prefetch = prefetch
        """It takes the place of a prefetch."""
        self.mask = mask
        self.unasked = prefetch or unasked
        """Nobody waited for it when it began."""
        self.began = trio.current_time()
        """Trio's clock."""
        self.done = trio.Event()
        self.error: LamfsError | None = None

    @contextlib.contextmanager
    def caught(self, what: str) -> Iterator[None]:
        """What goes wrong while ``what`` is brought becomes the fetch's error: who waits for it raises it."""
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
    """What is known of the leaves of a block that is not verified as a whole. Leaf i is bit i of each mask."""

    __slots__ = ("fetches", "present", "verified")

    def __init__(self, present: int) -> None:
        self.present = present
        """Said to be in the file. Of a block that is PRESENT all are."""
        self.verified = 0
        """Checked by this process."""
        self.fetches: list[Fetch] = []

    def in_flight(self) -> int:
        """Leaves that are on their way."""
        mask = 0
        for fetch in self.fetches:
            mask |= fetch.mask
        return mask
