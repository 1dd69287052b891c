"""Notes that a machine did not give its lock back: the objects that it stored since its last push have no name.
Synchronous.

The registry reaches storage when a mount ends, so nobody knows the objects that a machine stored before it died.
``unreturned.json`` of ``settings.directory`` notes that this machine took the lock over from such a machine, until
'fsck' finds that every object has a name.
"""

from __future__ import annotations

import contextlib

from lamfs import config
from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError, StorageError
from lamfs.jsontext import is_number
from lamfs.model import iso
from lamfs.ops import lock
from lamfs.storage import ObjectStore

NAME = "unreturned.json"


def note(settings: InstanceSettings, store: ObjectStore, before: lock.LeaseState) -> str:
    """Note that the lock was taken over from ``before``. Returns a sentence for people. Never raises."""
    pushed = 0
    with contextlib.suppress(StorageError):
        pushed = store.head(settings.snapshot_key).mtime_ns
    data = {"handle": before.handle, "host": before.host, "since": before.since, "pushed": pushed}
    with contextlib.suppress(LamfsError, OSError):
        config.make_directory(settings.directory)
        config.write_json(settings.directory / NAME, data, durable=False)
    return _sentence(settings.slug, before.handle, before.host, before.since, pushed)


def known(settings: InstanceSettings) -> str | None:
    """The sentence of ``note``, until every object is known to have a name; None afterwards."""
    data = None
    with contextlib.suppress(LamfsError):
        data = config.read_json(settings.directory / NAME)
    if data is None:
        return None
    handle, host, since, pushed = (data.get(name) for name in ("handle", "host", "since", "pushed"))
    if not is_number(since, 0, lock.MAX_SINCE) or not is_number(pushed, 0, lock.MAX_SINCE * 1e9):
        return None
    return _sentence(settings.slug, str(handle), str(host), float(since), int(pushed))  # type: ignore[arg-type]


def forget(settings: InstanceSettings) -> None:
    """Forget the note: every object in storage has a name."""
    with contextlib.suppress(OSError):
        (settings.directory / NAME).unlink(missing_ok=True)


def _sentence(slug: str, handle: str, host: str, since: float, pushed: int) -> str:
    last = f", of {iso(pushed)}," if pushed else ""
    return (
        f"{handle} on {host} had the lock of '{slug}' since {iso(int(since * 1e9))} and did not give it back: what was"
        f" stored there after its last registry{last} has no name here yet; 'lamfs fsck' names such objects, and"
        " 'lamfs fsck --repair' makes them readable, in lost+found"
    )
