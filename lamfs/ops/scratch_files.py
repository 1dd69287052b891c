"""Scratch files: their bytes are in the spool of the machine that wrote them, and never in storage. Any thread.

Synchronous. A registry that came from storage has the name of a scratch file alone. On the machine that wrote the file,
the spool file becomes one of ``lost+found`` then (strays.py), and its name there tells whose bytes it has. On any other
machine the name is all there is, and nothing is wrong.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError
from lamfs.keys import is_spool_name, spool_inode
from lamfs.model import Inode, now_ns
from lamfs.ops import in_use
from lamfs.printable import count_of
from lamfs.registry import Registry

NAMED = 3
"""Files that a sentence names."""
_SPOOL = re.compile(r"\(spool ([^()]+)\)")
"""In the names of files of ``lost+found``: the spool file from which one was made."""


# -- with bytes -------------------------------------------------------------------------------------------------------


def known(settings: InstanceSettings) -> list[tuple[str, int]]:
    """Key, and size in bytes, of each scratch file that has bytes; empty when the registry cannot be read."""
    with contextlib.suppress(LamfsError), in_use.looking(settings) as registry:
        return registry.names.scratch_files()
    return []


def sentence(files: Sequence[tuple[str, int]]) -> str:
    """A sentence for a person who leaves this machine. ``files``: at least one, as ``known`` returns them."""
    named = ", ".join(f"'{key}'" for key, _ in files[:NAMED])
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    verb, total = "is" if len(files) == 1 else "are", count_of(sum(size for _, size in files), "byte")
    return (
        f"{named}{more} {verb} on this machine only, with {total}: 'lamfs scratch' lists such names; rename what you"
        " want to keep."
    )


# -- without bytes ----------------------------------------------------------------------------------------------------


class Unread(NamedTuple):
    """A scratch name whose bytes are not on this machine. ``kept``: the file of ``lost+found`` that has them, by its
    name there; None: no such file is known."""

    inode: Inode
    key: str
    kept: str | None


def find_unread(registry: Registry) -> list[Unread]:
    """All scratch names without bytes, by inode number."""
    inodes = registry.names.unread_scratch()
    kept = _kept(registry) if inodes else {}
    return [Unread(inode, registry.tree.path(inode.ino) or "", kept.get((inode.ino, inode.size))) for inode in inodes]


def _kept(registry: Registry) -> dict[tuple[int, int], str]:
    """Names in ``lost+found`` by the inode of their spool file and their size in bytes. The newest name counts."""
    found: dict[tuple[int, int], str] = {}
    folder = registry.tree.resolve(registry.rescue.found()[0])
    if folder is None:
        return found
    for _, name, inode in registry.tree.walk(folder.ino):
        match = _SPOOL.search(name)
        if match is not None and is_spool_name(match[1]):
            found[spool_inode(match[1]), inode.size] = name
    return found


def give_back(registry: Registry, unread: Unread) -> bool:
    """Let the file that has the bytes take the place of the name that has none. False: one of the two is gone."""
    return unread.kept is not None and registry.rescue.give_back(unread.kept, unread.inode, now=now_ns())
