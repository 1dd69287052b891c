"""The registry's copy in storage, ``{root}/{instance id hex}.lndb``: pushed by who holds the lease. Synchronous.

``settings.directory/snapshot.json`` remembers the ETag of the copy that this machine pushed or pulled last, and the
mark (see ``mark``) its working copy had then: so it is known whether either has gone on since.

What is in storage is somebody else's data: it is taken over row by row (registry/intake.py), and only when it is of the
instance that this machine means.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lamfs import config
from lamfs.errors import InvalidArgument, LamfsError, Locked, NotSetUp, ObjectMissing, RegistryError
from lamfs.ops import messages, working_copy
from lamfs.ops.instance import Instance
from lamfs.registry import Registry
from lamfs.storage.base import ObjectStat

if TYPE_CHECKING:
    from lamfs.registry.intake import Taken
    from lamfs.registry.received import Origin

SAID = 10
"""Findings that are said one by one; all are in a file."""
OVERTAKEN, RECEIVED = "overtaken", "received"
"""Names of working copies that another machine's has replaced, and of registries that had something wrong. Nothing is
lost with them, so only a few are kept."""
TAKEN = "taken"
"""Key of the meta table: the ETag of the copy in storage that a working copy was made of."""
SPARE_BYTES = 64 << 20
"""What is left free on the disk when a registry is fetched."""


def mark(registry: Registry) -> str:
    """A text that is another one after every change worth pushing."""
    people = registry.db.one("SELECT (SELECT count(*) FROM run), (SELECT count(*) FROM transform), count(*) FROM user")
    assert people is not None
    return ":".join(map(str, (registry.changes.last(), *people)))


def _memory(instance: Instance) -> Path:
    return instance.settings.directory / "snapshot.json"


def push(instance: Instance) -> bool:
    """Store a consistent copy of the registry; False when storage has this state already.

    The caller holds the lease. Raises RegistryError, also when the working copy is that of another storage, and storage
    errors.
    """
    registry = instance.registry
    instance.check_own()
    now = mark(registry)
    known = config.read_json(_memory(instance))
    key = instance.settings.snapshot_key
    if known is not None and known.get("mark") == now and _etag(instance) == known.get("etag"):
        return False
    registry.changes.trim()
    temp = instance.settings.directory / f".push-{config.temporary_name()}.lndb"
    try:
        registry.db.snapshot(temp)
        stored = instance.store.put_file(key, str(temp), consume=True)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temp.unlink()
    _remember(instance, stored, now)
    return True


def _remember(instance: Instance, stored: ObjectStat, now: str) -> None:
    config.write_json(_memory(instance), {"etag": stored.etag, "mark": now})


def _etag(instance: Instance) -> str | None:
    try:
        return instance.store.head(instance.settings.snapshot_key).etag
    except ObjectMissing:
        return None


def exists(instance: Instance) -> bool:
    """Whether there is a copy in storage."""
    return _etag(instance) is not None


# -- from storage -----------------------------------------------------------------------------------------------------


def pull(instance: Instance, *, restore: bool = False) -> None:
    """Make the copy in storage the working copy. One that is there is put aside, and what it owes is carried over.

    ``restore``: whatever the working copy is; else it has to be of the same instance. Raises NotSetUp (there is no
    copy), Locked (the registry is in use), InvalidArgument (it is of another instance), RegistryError (the copy is
    damaged, newer, or no registry).
    """
    from lamfs.registry import intake

    settings = instance.settings
    url = instance.store.url(settings.snapshot_key)
    with _temporary(instance, "pull") as temp, _temporary(instance, "fresh") as fresh:
        stored = fetch(instance, settings.snapshot_key, temp)
        _check_origin(instance, intake.look(temp, url), url, restore=restore)
        taken = intake.take(temp, url, fresh, intake.Place(instance.store.kind, settings.storage.root))
        with contextlib.closing(Registry(fresh)) as registry:
            registry.db.set_meta(TAKEN, stored.etag)
            registry.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            now = mark(registry)
        with instance.alone("replaced"):
            kept = working_copy.replace(settings, fresh, instance.store, word="registry" if restore else OVERTAKEN)
        if restore and kept is not None:
            messages.info(f"this machine's registry was put aside as {kept}")
        working_copy.keep_newest(settings.directory, OVERTAKEN)
        if taken.total:
            _tell(instance, taken, temp, url)
    _remember(instance, stored, now)


@contextlib.contextmanager
def _temporary(instance: Instance, what: str) -> Iterator[Path]:
    """A name for a new file beside the working copy; what has it at the end is removed."""
    config.make_directory(instance.settings.directory)
    temp = instance.settings.directory / f".{what}-{config.temporary_name()}.lndb"
    try:
        yield temp
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{temp}{suffix}").unlink(missing_ok=True)


def origin(instance: Instance, key: str) -> Origin:
    """What a registry in storage says of itself. Raises NotSetUp, RegistryError, storage errors."""
    from lamfs.registry import intake

    with _temporary(instance, "peek") as temp:
        fetch(instance, key, temp)
        return intake.look(temp, instance.store.url(key))


def fetch(instance: Instance, key: str, path: Path) -> ObjectStat:
    """Write an object of the storage to a new file, mode 0600. Raises NotSetUp when there is none."""
    store = instance.store
    try:
        stored = store.head(key)
    except ObjectMissing:
        raise NotSetUp(
            f"There is no registry at {store.url(key)}; 'lamfs init' makes a new instance, or check owner and name."
        ) from None
    if stored.size > shutil.disk_usage(path.parent).free - SPARE_BYTES:
        raise RegistryError(
            f"The registry {store.url(key)} has {stored.size} bytes, for which {path.parent} has no room; free some"
            " space, or move LAMFS_DATA_DIR.",
            errno=errno.ENOSPC,
        )
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        store.get_into(key, fd, offset=0, length=stored.size, etag=stored.etag)
        os.fsync(fd)
    finally:
        os.close(fd)
    return stored


def _check_origin(instance: Instance, found: Origin, url: str, *, restore: bool) -> None:
    """Raise InvalidArgument unless a registry in storage is that of the instance that this machine means."""
    settings = instance.settings
    if found.slug != settings.registry_slug:
        raise InvalidArgument(
            f"The registry {url} is that of the instance '{found.slug}', not of '{settings.registry_slug}'; somebody"
            " has put it there under a name that is not its own."
        )
    own = None if restore else working_copy.uid(settings)
    if own is not None and found.uid is not None and own != found.uid:
        raise InvalidArgument(
            f"The registry {url} is not that of '{settings.slug}' as this machine knows it, but of another instance of"
            f" the same name. 'lamfs connect {settings.slug} --restore' takes it and puts this machine's aside;"
            f" 'lamfs connect {settings.storage.root} --name NAME' makes it known by another name."
        )
    if found.root is not None and found.root != settings.storage.root:
        messages.info(f"the registry was used with {found.root} before, and is used with {settings.storage.root} now")


def _tell(instance: Instance, taken: Taken, received: Path, url: str) -> None:
    """Say what was wrong with a registry, and keep it as it came."""
    directory = instance.settings.directory
    kept = working_copy.aside(directory, RECEIVED)
    os.rename(received, kept)
    working_copy.keep_newest(directory, RECEIVED)
    listing = directory / "left-out.json"
    sentences = [finding.sentence for finding in taken.findings]
    config.write_json(listing, {"registry": url, "kept": str(kept), "total": taken.total, "findings": sentences})
    notice = (
        f"{taken.total} things in the registry {url} cannot be right, and were left out; {listing} lists them, and the"
        f" registry is kept as it came in {kept}"
    )
    instance.notices.append(notice)
    messages.warn(notice)
    for sentence in sentences[:SAID]:
        messages.warn(f"  {sentence}")
    if taken.total > SAID:
        messages.warn(f"  … and {taken.total - SAID} more")


def catch_up(instance: Instance) -> None:
    """The lease is new to this machine: take over what another one pushed meanwhile.

    Raises Locked when both went on: that needs a decision.
    """
    etag = _etag(instance)
    known = config.read_json(_memory(instance)) or {}
    if etag is None or etag == known.get("etag"):
        return
    try:
        registry = instance.registry
        if etag == registry.db.get_meta(TAKEN):
            return  # it was taken, and the process died before that was written down
        ahead = known.get("mark") != mark(registry) or bool(registry.journal.owed())
    except LamfsError:
        if instance.settings.registry_path.exists():
            raise
        ahead = False
    if ahead:
        raise Locked(
            f"The registry of '{instance.settings.slug}' was changed on another machine, and here as well since the"
            f" last 'lamfs close'. 'lamfs connect {instance.settings.slug} --restore' takes the one in storage and puts"
            " this machine's aside."
        )
    pull(instance)
