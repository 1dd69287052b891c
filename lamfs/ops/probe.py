"""Checks a storage before it is relied on, and remembers the slow part of the check. Synchronous, any thread.

Only a race shows whether a race of conditional writes has one winner: it takes many requests, and on some servers
seconds of waiting. A server that has passed is trusted for a day, so a mount after a crash is there at once.
"""

from __future__ import annotations

from lamfs import config
from lamfs.errors import LamfsError
from lamfs.model import now_ns
from lamfs.ops.instance import Instance
from lamfs.storage.base import Capabilities

NAME = "storage-check.json"
BELIEVED_NS = 24 * 3600 * 10**9


def check_storage(instance: Instance, *, write: bool) -> Capabilities:
    """Check an instance's storage as ObjectStore.check does, with what is known of its server. Raises what that
    raises."""
    storage = instance.settings.storage
    path = instance.settings.directory / NAME
    server = {"root": storage.root, "endpoint_url": storage.endpoint_url}
    try:
        known = config.read_json(path) or {}
    except LamfsError:
        known = {}
    at = known.get("exclusive_at")
    proven = (
        {name: known.get(name) for name in server} == server
        and isinstance(at, int)
        and 0 <= now_ns() - at < BELIEVED_NS
    )
    found = instance.store.check(write=write, exclusive=proven)
    if write and found.create_exclusive and not proven and not instance.store.on_disk:
        config.write_json(path, {**server, "exclusive_at": now_ns()})
    return found
