"""Partial spools after a power cut: the ranges that did not reach the disk. Synchronous, any thread.

fs/partial.py says what a partial spool is, and registry/partial_spools.py what is noted of one.
"""

from __future__ import annotations

import contextlib
import logging
import os

from lamfs.model import now_ns
from lamfs.registry import Registry
from lamfs.registry.entries import Put
from lamfs.spool import SpoolFolder

log = logging.getLogger("lamfs.recover")


def keep_durable(registry: Registry, entry: Put, spool: SpoolFolder) -> None:
    """The machine went down: drop the ranges of a put's spool file that are not durable, and log what is lost; see
    Upkeep.keep_durable."""

    def cut(size: int) -> None:
        with contextlib.suppress(FileNotFoundError), spool.opened(entry.src, os.O_RDWR) as fd:
            if os.fstat(fd).st_size > size:
                os.ftruncate(fd, size)

    for lost in registry.upkeep.keep_durable(entry, now=now_ns(), cut=cut):
        log.error("%s.", lost.sentence)
