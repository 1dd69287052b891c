"""What the cache needs of the mover, and repeating a job when the mover dies. The trio loop only."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from lamfs.errors import LamfsError, TransferDied
from lamfs.mover import jobs

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Tries of a job whose mover dies during it."""

T = TypeVar("T")


class BlockMover(Protocol):
    """What the cache needs of lamfs.mover.client.Mover."""

    async def fetch(
        self,
        key: str,
        *,
        etag: str,
        offset: int,
        length: int,
        path: str,
        digest: bytes | None,
        leaves: bytes | None = None,
    ) -> None:
        """Mover.fetch."""

    async def fetch_stretch(
        self,
        key: str,
        *,
        etag: str,
        offset: int,
        blocks: Sequence[tuple[int, bytes]],
        path: str,
        came: Callable[[int], None],
    ) -> None:
        """Mover.fetch_stretch."""

    async def verify(self, path: str, *, offset: int, length: int, digest: bytes) -> bool:
        """Mover.verify."""

    async def graft(self, src: str, dst: str, *, offset: int, length: int, digest: bytes) -> bool:
        """Mover.graft."""

    async def fetch_files(
        self, files: Sequence[jobs.WholeFile], arrived: Callable[[int, LamfsError | None], None]
    ) -> None:
        """Mover.fetch_files."""


async def persist(job: Callable[[], Awaitable[T]]) -> T:
    """Run a job, again when the mover dies during it. Raises TransferDied after ATTEMPTS."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await job()
        except TransferDied as error:
            log.warning("%s", error)
    return await job()
