"""Finds out whether storage has a newer registry than this machine, where another machine holds the lease. Synchronous.

``freshness.json`` of ``settings.directory`` remembers the answer for LOOK_SECONDS, so ``ls`` asks storage once a minute
at most. An answer that is older than the registry that this machine has stored or taken since says nothing. It waits
ANSWER_SECONDS at most. A storage that does not answer is not mentioned.
"""

from __future__ import annotations

import threading

from lamfs import config
from lamfs.errors import LamfsError
from lamfs.model import iso, now_ns
from lamfs.ops import held, messages, snapshot
from lamfs.ops.instance import Instance
from lamfs.storage.base import ObjectStat

NAME = "freshness.json"
LOOK_SECONDS = 60.0
ANSWER_SECONDS = 2.0


def warn(instance: Instance) -> None:
    """Say on stderr when storage has a newer registry than this machine shows. Never raises, and never waits long."""
    try:
        note = held.read(instance.settings.directory)
        if note is not None and note.holds:
            return  # only this machine can have written it
        known = snapshot.known_etag(instance)
        etag, written = _look(instance, known)
        if etag is not None and etag != known:
            slug = instance.settings.slug
            messages.warn(
                f"this machine's registry of '{slug}' is {_of(instance)}; another machine has stored a newer one on"
                f" {iso(written)}, so this may be out of date: 'lamfs connect {slug}' takes it"
            )
    except LamfsError:
        return


def fetch(instance: Instance) -> None:
    """Take the registry in storage when it is newer and this machine has no changes of its own. Otherwise tell the user
    that what is shown is old. Raises LamfsError."""
    note = held.read(instance.settings.directory)
    if (note is not None and note.holds) or snapshot.is_current(instance):
        return
    if not snapshot.is_ahead(instance):
        try:
            snapshot.pull(instance)
            return
        except LamfsError as error:
            why = str(error)
    else:
        why = "this machine has changes that are not in it"
    slug = instance.settings.slug
    instance.notices.append(
        f"this machine's registry of '{slug}' is {_of(instance)}, and is shown although storage has a newer one, which"
        f" cannot be taken now ({why}); run 'lamfs connect {slug}'"
    )


def _of(instance: Instance) -> str:
    at = snapshot.known_at(instance)
    return "an older one" if at is None else f"of {iso(at)}"


def _look(instance: Instance, known_etag: str | None) -> tuple[str | None, int]:
    """ETag of the copy in storage, and when it was written, if this is known now.

    ``known_etag``: of the copy that this machine has. An answer that was remembered with another one is not used.
    """
    path = instance.settings.directory / NAME
    try:
        known = config.read_json(path) or {}
    except LamfsError:
        known = {}
    at, etag, written = (known.get(name) for name in ("at", "etag", "written"))
    is_new = isinstance(at, int) and 0 <= now_ns() - at < LOOK_SECONDS * 1e9
    if is_new and isinstance(written, int) and known.get("known") == known_etag:
        return (etag if isinstance(etag, str) else None), written
    found = _head(instance)
    etag, written = (None, 0) if found is None else (found.etag, found.mtime_ns)
    config.write_json(path, {"at": now_ns(), "known": known_etag, "etag": etag, "written": written}, durable=False)
    return etag, written


def _head(instance: Instance) -> ObjectStat | None:
    """The copy in storage; None: storage does not answer in time."""
    found: list[ObjectStat] = []
    store, key = instance.store, instance.settings.snapshot_key

    def ask() -> None:
        try:
            found.append(store.head(key))
        except LamfsError:
            return  # storage does not answer, or has no copy

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return found[0] if found else None
