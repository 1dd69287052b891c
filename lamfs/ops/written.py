"""Notes beside a working copy how far this machine has written it. Synchronous.

``settings.directory/written.json``: the instance of the working copy, and how many changes it had seen. So a copy that
is older (from a backup, or a disk that was set back) or missing is told from a good one. The file is written when a
process that changes the registry ends, and by a mount every minute. The count of an ordinary process is believed until
the machine restarts, because a power cut may take the last commits; a count that was synced is believed for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lamfs import config
from lamfs.config import InstanceSettings
from lamfs.errors import DamagedRegistry, LamfsError
from lamfs.jsontext import is_number

if TYPE_CHECKING:
    from pathlib import Path

    from lamfs.registry import Registry

_MOST = 1 << 53


class Written(NamedTuple):
    """``synced``: changes that are on the disk; ``changes``: all changes; ``owner``: the process that wrote the
    note."""

    uid: str
    synced: int
    changes: int
    owner: str | None

    @property
    def least(self) -> int:
        """The least number of changes that the working copy must have seen."""
        from lamfs.registry import of_another_boot

        return self.synced if self.owner is None or of_another_boot(self.owner) else max(self.synced, self.changes)


def path(settings: InstanceSettings) -> Path:
    """Path of the note."""
    return settings.directory / "written.json"


def read(settings: InstanceSettings) -> Written | None:
    """The note; None: there is none that can be read."""
    return _read(path(settings))


def _read(place: Path) -> Written | None:
    try:
        data = config.read_json(place) or {}
    except LamfsError:
        return None
    uid, owner = data.get("uid"), data.get("owner")
    numbers = [data.get("synced"), data.get("changes")]
    if not isinstance(uid, str) or not all(is_number(number, 0, _MOST) for number in numbers):
        return None
    return Written(uid, int(numbers[0]), int(numbers[1]), owner if isinstance(owner, str) else None)  # type: ignore[arg-type]


def note(settings: InstanceSettings, registry: Registry, *, durable: bool = False) -> None:
    """Note how far the working copy is. ``durable``: sync it first. Raises LamfsError."""
    from lamfs.registry import process_id, sync_log

    uid, changes = registry.file.about().uid, registry.changes.last()
    if uid is None:
        return
    place = registry.path.with_name(path(settings).name)  # beside the open registry, wherever settings lead by now
    known = _read(place)
    synced = known.synced if known is not None and known.uid == uid else 0
    if known is not None and known.uid == uid and changes <= (synced if durable else known.least):
        return
    if durable:
        sync_log(registry.path)
        synced = changes
    now = Written(uid, synced, max(changes, synced), process_id())
    config.write_json(place, now._asdict(), durable=durable)


def forget(settings: InstanceSettings) -> None:
    """Forget the note, before another working copy, which may have seen less, takes the place of this one."""
    path(settings).unlink(missing_ok=True)


def had_one(settings: InstanceSettings) -> bool:
    """Whether this machine had a working copy."""
    return path(settings).exists() or (settings.directory / "snapshot.json").exists()


def refuse_missing(settings: InstanceSettings) -> None:
    """Raise NotSetUp when this machine has no working copy, and DamagedRegistry when it had one."""
    if not settings.registry_path.exists() and had_one(settings):
        raise DamagedRegistry(
            f"The registry {settings.registry_path} is gone, though this machine had it; 'lamfs connect"
            f" {settings.slug} --restore' takes the copy in storage."
        )
    settings.check_working_copy()


def open_registry(settings: InstanceSettings, **options: object) -> Registry:
    """Open the working copy, and check that it is whole, of this instance, and not older than what was written.

    ``options``: as Registry has them. Raises NotSetUp, and DamagedRegistry with the way back.
    """
    from lamfs.registry import Registry

    refuse_missing(settings)
    registry = Registry(settings.registry_path, name=settings.slug, **options)  # type: ignore[arg-type]
    try:
        _check(settings, registry)
    except BaseException:
        registry.close()
        raise
    return registry


def _check(settings: InstanceSettings, registry: Registry) -> None:
    damaged = registry.file.damaged
    slug, uid, _ = registry.file.about()
    if slug is None or uid is None:
        raise damaged("it does not say which instance it is of")
    if slug != settings.registry_slug:
        raise damaged(f"it is of the instance '{slug}'")
    known = read(settings)
    if known is None:
        return
    if uid != known.uid:
        raise damaged(f"it is of another instance that is called '{slug}' too")
    changes = registry.changes.last()
    if changes < known.least:
        raise damaged(
            f"it is older than what this machine has written: it has seen {changes} changes, and was at {known.least}"
        )
