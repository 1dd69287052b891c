"""Finds out what is wrong with the registry's copy in storage, and mends it. Synchronous.

Other machines take that copy, and so does this one when it loses its own. So fsck reads it as a whole.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from lamfs.errors import ObjectChanged, RegistryError
from lamfs.ops import mounts, snapshot
from lamfs.ops.instance import Instance
from lamfs.ops.snapshot import Found, Verdict


class Finding(NamedTuple):
    """``text``: a sentence. ``problem``: it is a problem; otherwise a note. ``mends``: a push of this machine's
    registry mends it."""

    text: str
    problem: bool = True
    mends: bool = False


def look(instance: Instance) -> Finding | None:
    """Look at the copy in storage; None: it is whole, and this machine's registry comes from it.

    Raises storage errors when storage cannot be asked.
    """
    settings, url = instance.settings, instance.store.url(instance.settings.snapshot_key)
    try:
        verdict, found, known = snapshot.compare(instance)
    except ObjectChanged:
        return Finding(f"{url} is being replaced at this moment", problem=False)
    except RegistryError as error:
        # A full disk of this machine says nothing about the copy.
        return Finding(str(error), problem=error.errno != errno.ENOSPC)
    stores = (
        "the next 'lamfs umount' stores"
        if mounts.is_written(settings)
        else "'lamfs close' or 'lamfs fsck --repair' stores"
    )
    again = f"{stores} this machine's there again"
    if verdict in (Verdict.FIRST, Verdict.GONE):
        return Finding(
            f"{url} is gone, so no other machine can connect, and this one could not come back; {again}", mends=True
        )
    if verdict is Verdict.DAMAGED:
        assert found is not None
        return Finding(f"{found.damaged} {again[0].upper()}{again[1:]}", mends=True)
    if verdict is Verdict.OTHER:
        return Finding(
            f"{url} is of another instance than '{settings.slug}' on this machine; move it away, and {again}"
        )
    if verdict is Verdict.NEWER:
        return _newer(instance, url, found)
    assert found is not None
    if found.origin is not None and known.changes is not None and found.origin.changes < known.changes:
        return Finding(
            f"{url} is older than what this machine has stored: it has seen {found.origin.changes} changes, and"
            f" {known.changes} were stored (it is from a backup, or a disk that was set back); {again}",
            mends=True,
        )
    return None


def _newer(instance: Instance, url: str, found: Found | None) -> Finding:
    restore = f"'lamfs connect {instance.settings.slug} --restore'"
    if found is None or found.origin is None:
        return Finding(
            f"{url} is {'gone' if found is None else 'damaged'}, and a copy that is kept of it has what this machine's"
            f" has not. {snapshot.ways_back(instance)}"
        )
    if not snapshot.is_ahead(instance):
        return Finding(
            f"{url} is newer than this machine's, which has nothing of its own: the next mount, or {restore}, takes it",
            problem=False,
        )
    return Finding(
        f"{url} has changes that this machine's does not have, and this machine's has some of its own: the next mount"
        f" takes it and keeps what is only here, {restore} takes it and puts this machine's aside"
    )


def mend(instance: Instance) -> bool:
    """Store this machine's registry again. Returns False while a mount writes, which does it when it ends. Raises
    Locked and storage errors as snapshot.push does."""
    if mounts.is_written(instance.settings):
        return False
    return snapshot.push(instance, look=True)  # by its ETag alone, a damaged copy may look like this machine's push
