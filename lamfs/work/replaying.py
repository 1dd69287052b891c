"""Replay with the spool at hand: what a crash between the commits of registry and work database has left apart is
brought together (registry/replay.py). Synchronous; whatever thread the registry belongs to."""

from __future__ import annotations

import os

from lamfs import hashing
from lamfs.keys import spool_inode
from lamfs.model import new_uid, now_ns
from lamfs.registry import Registry
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore


def replay(registry: Registry, store: ObjectStore, spool: SpoolFolder) -> None:
    """Bring registry and work database together, if a crash has left them apart. Raises OSError and StorageError when a
    spool file cannot be looked at; then nothing has changed."""
    if not registry.replay.is_needed():
        return

    def size(src: str) -> int | None:
        return spool.stat(src).st_size if spool.exists(src) else None

    def may_lack(src: str) -> bool:
        return may_be_partial(registry, store, spool, src)

    registry.replay.run(size, may_lack, spare_uid=new_uid, now=now_ns())


def may_be_partial(registry: Registry, store: ObjectStore, spool: SpoolFolder, src: str) -> bool:
    """Whether a spool file may lack bytes that a stored revision has: it has holes, and its file is a large one."""
    if registry.partial_spools.present(src) or registry.partial_spools.ranges(src):
        return True
    artifact = registry.artifacts.by_ino(spool_inode(src))
    if store.parts is None or artifact is None or artifact.size <= hashing.MD5_MAX:
        return False
    with spool.opened(src, os.O_RDONLY) as fd:
        size = os.fstat(fd).st_size
        return size > 0 and os.lseek(fd, 0, os.SEEK_HOLE) < size
