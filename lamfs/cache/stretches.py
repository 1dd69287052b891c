"""Blocks that follow each other, prefetched by one request: less work for storage, and here. The trio loop only."""

from __future__ import annotations

import logging
import os
from typing import Protocol

import trio

from lamfs.cache.blockfile import BlockFile
from lamfs.cache.moving import BlockMover
from lamfs.cache.states import ABSENT, Fetch
from lamfs.errors import DamagedData, LamfsError, StorageFull, TransferDied
from lamfs.model import BLOCK_SIZE
from lamfs.mover import beats

log = logging.getLogger(__name__)

STRETCH = 2
"""Blocks in one request at most. A stretch ends at a multiple of it, so that it is no matter which of its blocks was
wished for. One connection to a distant server is slow: large stretches would leave too few of them."""


class BlockFetcher(Protocol):
    """What a stretch needs of the cache's Fetches."""

    nursery: trio.Nursery | None
    misses: int

    def came(self, file: BlockFile, block: int) -> None:
        """A block is in the file, and it is right."""

    def finish(self, file: BlockFile, block: int, fetch: Fetch) -> None:
        """The fetch of a block is over."""

    async def run_block(self, file: BlockFile, block: int, fetch: Fetch) -> None:
        """Bring a block, whose fetch it is, and end the fetch."""


def around(file: BlockFile, block: int) -> range:
    """A block, and those behind it that one request can bring with it."""
    end = block + 1
    last = min(end + -end % STRETCH, len(file.state))
    while end < last and file.state[block] == file.state[end] == ABSENT and end not in file.fetches:
        end += 1
    return range(block, end)


async def run(owner: BlockFetcher, mover: BlockMover, file: BlockFile, fetches: dict[int, Fetch]) -> None:
    """Bring blocks that follow each other, each of which ends when it has come.

    What must be done when bytes are wrong, the disk is full or the moving process dies is done for each by itself.
    """
    revision, nursery = file.revision, owner.nursery
    assert nursery is not None
    left = list(fetches)
    error: LamfsError | None = None

    def came(count: int) -> None:
        for block in left[:count]:
            owner.misses += 1
            with fetches[block].caught(f"block {block} of '{revision.object_key}'"):
                owner.came(file, block)
            owner.finish(file, block, fetches[block])
        del left[:count]

    try:
        with beats.doing(file.beat):
            await mover.fetch_stretch(
                revision.object_key,
                etag=revision.etag,
                offset=left[0] * BLOCK_SIZE,
                blocks=[(file.span(block)[1], revision.content.block(block)) for block in left],
                path=f"/proc/{os.getpid()}/fd/{file.fd()}",
                came=came,
            )
    except (DamagedData, StorageFull, TransferDied) as problem:
        log.debug("Blocks of '%s' are brought one by one: %s", revision.object_key, problem)
    except LamfsError as problem:
        error = problem
    finally:
        for block in left:
            if error is None:
                nursery.start_soon(owner.run_block, file, block, fetches[block])
            else:
                owner.misses += 1
                fetches[block].error = error
                owner.finish(file, block, fetches[block])
