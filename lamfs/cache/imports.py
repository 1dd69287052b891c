"""Spool files that become cache files once their content is stored. Synchronous, any thread."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lamfs.cache import holes, sparse
from lamfs.cache.index import CacheIndex
from lamfs.cache.states import ABSENT, VERIFIED
from lamfs.model import Revision

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Imported:
    """The new cache file: descriptor (-1: it is not kept open), inode, and state of each block.

    ``donor``: the file of an earlier revision that was at its path. The caller owns both descriptors.
    """

    fd: int
    ino: int
    state: bytearray
    donor: sparse.Opened | None


def import_file(
    index: CacheIndex,
    cache_dir: Path,
    path: str,
    fd: int,
    spool_path: str,
    revision: Revision,
    missing: Collection[int],
) -> Imported | None:
    """Rename a spool file, open as ``fd``, to its cache path. It has all blocks of ``revision`` but ``missing``.

    Returns None, and changes nothing, when it is on another file system, or is not that file.
    """
    full = os.path.join(cache_dir, path)
    donor: sparse.Opened | None = None
    floor = 0
    try:
        spool = os.fstat(fd)
        if not os.path.samestat(spool, os.lstat(spool_path)) or spool.st_size != revision.size:
            return None
        sparse.make_parents(index, cache_dir, path)
        floor = sparse.make_way(index, cache_dir, path)
        donor = sparse.open_old(index, cache_dir, path) if missing else None
        os.rename(spool_path, full)
    except OSError as error:
        log.debug("The spool file %s does not become a cache file: %s.", spool_path, error)
        if donor is not None:
            os.close(donor.fd)
        return None
    ino = sparse.ino_of(spool)
    state = bytearray([VERIFIED]) * revision.block_count()
    for block in missing:
        state[block] = ABSENT
    index.reset(path, sparse.tag(revision), revision.size, ino=ino, floor_ns=floor, full=not missing)
    if missing:
        index.mark(path, sparse.tag(revision), [block for block, value in enumerate(state) if value], ino=ino)
    own = -1
    try:
        own = os.dup(fd)
        os.fchmod(own, 0o600)
        os.utime(own)
        if missing:
            holes.share(own)
        else:
            sparse.seal(index, path, revision, own)
    except OSError as error:  # out of descriptors
        log.debug("The new cache file %s is not kept open: %s.", full, error)
    if own < 0 and donor is not None:
        os.close(donor.fd)
        donor = None
    return Imported(own, ino, state, donor)
