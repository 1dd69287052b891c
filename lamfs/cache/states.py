"""What is known of a block and of its leaves, and what is on its way. Data of BlockFile and Flights; loop only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import trio

from lamfs.errors import LamfsError, StorageError, TransferDied

log = logging.getLogger(__name__)

ABSENT, PRESENT, VERIFIED = 0, 1, 2
"""States of a block: not in the file; said to be in the file by the index; checked by this process."""


class Flight:
    """A block or some leaves of one (``mask``) on their way; all readers that want them wait for the same flight."""

    __slots__ = ("began", "error", "landed", "mask", "prefetch", "unasked")

    def __init__(self, prefetch: bool, mask: int = 0, *, unasked: bool = False) -> None:
        self.prefetch = prefetch
        """It takes the place of a prefetch."""
        self.mask = mask
        self.unasked = prefetch or unasked
        """Nobody waited for it when it began."""
        self.began = trio.current_time()
        """Trio's clock."""
        self.landed = trio.Event()
        self.error: LamfsError | None = None

    @contextlib.contextmanager
    def caught(self, what: str) -> Iterator[None]:
        """What goes wrong while ``what`` is brought becomes the flight's error: who waits for it raises it."""
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

    __slots__ = ("flights", "present", "verified")

    def __init__(self, present: int) -> None:
        self.present = present
        """Said to be in the file. Of a block that is PRESENT all are."""
        self.verified = 0
        """Checked by this process."""
        self.flights: list[Flight] = []

    def in_air(self) -> int:
        """Leaves that are on their way."""
        mask = 0
        for flight in self.flights:
            mask |= flight.mask
        return mask
