"""Names of scratch files whose bytes are not on this machine. Synchronous, any thread.

The bytes of a scratch file are in the spool of the machine that wrote it, and in no storage. A registry that came from
storage has the name alone: then the spool file that nothing owes becomes a file of ``lost+found`` (strays.py), by whose
name it can be told whose bytes these are. On another machine the name is all there is, and nothing is wrong.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lamfs.keys import is_spool_name, spool_inode
from lamfs.model import Inode
from lamfs.registry import Registry

_SPOOL = re.compile(r"\(spool ([^()]+)\)")


class Husk(NamedTuple):
    """A name without bytes. ``kept``: name of the file in ``lost+found`` that has them, None when none is known."""

    inode: Inode
    key: str
    kept: str | None


def find(registry: Registry) -> list[Husk]:
    """All of them, by inode number."""
    inodes = registry.names.unread_scratch()
    kept = _kept(registry) if inodes else {}
    return [Husk(inode, registry.tree.path(inode.ino) or "", kept.get((inode.ino, inode.size))) for inode in inodes]


def _kept(registry: Registry) -> dict[tuple[int, int], str]:
    """Names in ``lost+found`` by the inode for which their spool file was made, and their size in bytes; the newest."""
    found: dict[tuple[int, int], str] = {}
    folder = registry.tree.resolve(registry.rescue.found()[0])
    if folder is None:
        return found
    for _, name, inode in registry.tree.walk(folder.ino):
        match = _SPOOL.search(name)
        if match is not None and is_spool_name(match[1]):
            found[spool_inode(match[1]), inode.size] = name
    return found


def mend(registry: Registry, husk: Husk) -> bool:
    """Let the file that has the bytes take the place of the name that has none. False: one of them is gone."""
    return husk.kept is not None and registry.rescue.give_back(husk.kept, husk.inode)
