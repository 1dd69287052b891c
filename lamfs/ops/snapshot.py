"""The registry's copy in storage, ``{root}/{instance id hex}.lndb``: pushed by who holds the lease. Synchronous.

``settings.directory/snapshot.json`` remembers the ETag of the copy that this machine pushed or pulled last, and the
mark (see ``mark``) its working copy had then: so it is known whether either has gone on since.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from lamfs import config
from lamfs.errors import LamfsError, Locked, NotSetUp, ObjectMissing, RegistryError
from lamfs.ops.instance import Instance
from lamfs.registry import Registry
from lamfs.storage.base import ObjectStat


def mark(registry: Registry) -> str:
    """A text that is another one after every change worth pushing."""
    people = registry.db.one("SELECT (SELECT count(*) FROM run), (SELECT count(*) FROM transform), count(*) FROM user")
    assert people is not None
    return ":".join(map(str, (registry.changes.last(), *people)))


def _memory(instance: Instance) -> Path:
    return instance.settings.directory / "snapshot.json"


def push(instance: Instance) -> bool:
    """Store a consistent copy of the registry; False when storage has this state already.

    The caller holds the lease. Raises RegistryError and storage errors.
    """
    registry = instance.registry
    now = mark(registry)
    known = config.read_json(_memory(instance))
    key = instance.settings.snapshot_key
    if known is not None and known.get("mark") == now and _etag(instance) == known.get("etag"):
        return False
    registry.changes.trim()
    temp = instance.settings.directory / f".push-{secrets.token_hex(6)}.lndb"
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


def pull(instance: Instance) -> None:
    """Make the copy in storage the working copy, replacing one that is there.

    Raises NotSetUp (there is no copy), Locked (the registry is in use), RegistryError (the copy is damaged or newer).
    """
    settings = instance.settings
    config.make_directory(settings.directory)
    temp = settings.directory / f".pull-{secrets.token_hex(6)}.lndb"
    try:
        stored = fetch(instance, settings.snapshot_key, temp)
        registry = Registry(temp)
        try:
            _check(registry, instance.store.url(settings.snapshot_key))
            now = mark(registry)
        finally:
            registry.close()
        with instance.alone("replaced"):
            for suffix in ("-wal", "-shm"):
                Path(f"{settings.registry_path}{suffix}").unlink(missing_ok=True)
            os.rename(temp, settings.registry_path)
    finally:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{temp}{suffix}").unlink(missing_ok=True)
    _remember(instance, stored, now)


def fetch(instance: Instance, key: str, path: Path) -> ObjectStat:
    """Write an object of the storage to a new file, mode 0600. Raises NotSetUp when there is none."""
    store = instance.store
    try:
        stored = store.head(key)
    except ObjectMissing:
        raise NotSetUp(
            f"There is no registry at {store.url(key)}; 'lamfs init' makes a new instance, or check owner and name."
        ) from None
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        store.get_into(key, fd, offset=0, length=stored.size, etag=stored.etag)
        os.fsync(fd)
    finally:
        os.close(fd)
    return stored


def _check(registry: Registry, name: str) -> None:
    row = registry.db.one("PRAGMA quick_check(1)")
    if row is None or row[0] != "ok":
        raise RegistryError(f"The registry {name} is damaged ({row[0] if row else 'empty'}); restore it from a backup.")


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
