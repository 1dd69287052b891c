"""The registry's copy in storage, ``{root}/{instance id hex}.lndb``: the holder of the lease pushes it. Synchronous.

``settings.directory/snapshot.json`` remembers the copy that this machine pushed or pulled last: its ETag, how many
changes it had seen, and the name of its push. It also has the mark (RegistryFile.mark) of the working copy at that
time. So it tells whether either has changed since.

A push replaces only the copy that this machine's registry comes from: ``decide`` says so, and a condition of the write
makes sure that no other machine was quicker. The copy that is replaced is kept (kept.py).

A copy in storage is data from another machine: it is taken over row by row (registry/intake.py), and only when it is of
the instance that this machine means.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import secrets
import shlex
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lamfs import config
from lamfs.config import InstanceSettings
from lamfs.errors import (
    DamagedRegistry,
    InvalidArgument,
    InvalidName,
    LamfsError,
    LeaseLost,
    Locked,
    NotSetUp,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    RegistryError,
    StorageError,
    StorageFull,
)
from lamfs.model import STORAGE_UID_LEN, StorageConfig, iso, new_uid, now_ns
from lamfs.ops import diverged, held, kept, messages, working_copy, written
from lamfs.ops.opened import Opened
from lamfs.printable import count_of
from lamfs.registry import Registry, workdb
from lamfs.storage.base import ObjectStat

if TYPE_CHECKING:
    from lamfs.registry.intake import Taken
    from lamfs.registry.origins import Origin

SHOWN = 10
"""Findings that are printed; a file lists all."""
OVERTAKEN, RECEIVED = "overtaken", "received"
"""Words in the names of working copies that another machine's has replaced, and of registries that had something wrong.
Nothing is lost with them, so only a few are kept."""
SPARE_BYTES = 64 << 20
"""Bytes that stay free on the disk when a registry is fetched."""
_TRIES = 8


class Known(NamedTuple):
    """What this machine remembers of the copy that it pushed or pulled last, with the mark of its working copy at that
    time. All None: nothing; ``changes`` and ``push`` None: an older lamfs wrote the note."""

    etag: str | None = None
    mark: str | None = None
    changes: int | None = None
    push: str | None = None


class Own(NamedTuple):
    """What the working copy says of itself: see Origin."""

    uid: str
    changes: int
    pushes: tuple[str, ...]


class Found(NamedTuple):
    """The copy in storage. ``origin``: what it says of itself; None: it is ``damaged``, with the error."""

    stored: ObjectStat
    origin: Origin | None
    damaged: DamagedRegistry | None = None


class Verdict(enum.Enum):
    """How the working copy relates to the copy in storage."""

    FIRST = "there is none, and was none"
    GONE = "there is none any more"
    DAMAGED = "it is damaged"
    NEXT = "the working copy comes from it"
    OTHER = "it is of another instance"
    NEWER = "it has something that the working copy does not have"


MAY_WRITE = frozenset({Verdict.FIRST, Verdict.GONE, Verdict.DAMAGED, Verdict.NEXT})
"""Verdicts with which the working copy may replace the copy in storage."""


def decide(own: Own, known: Known, found: Found | None, copies: Sequence[kept.Copy]) -> Verdict:
    """How a working copy relates to the copy in storage. ``copies``: the kept copies, the newest first."""
    if found is None or found.origin is None:
        # The copy cannot be read. The kept copies tell whether it had more changes than this machine.
        ours = [copy for copy in copies if copy.uid == own.uid]
        unknown = [copy for copy in ours if copy.push not in own.pushes]
        if unknown and (unknown[0] is ours[0] or any(copy.changes > own.changes for copy in unknown)):
            return Verdict.NEWER
        if found is not None:
            return Verdict.DAMAGED
        return Verdict.GONE if known.etag is not None or ours else Verdict.FIRST
    origin = found.origin
    if origin.uid != own.uid:
        return Verdict.OTHER
    if origin.changes > own.changes:
        return Verdict.NEWER
    if found.stored.etag == known.etag:
        return Verdict.NEXT
    if origin.pushes:
        return Verdict.NEXT if origin.pushes[0] in own.pushes else Verdict.NEWER
    # An older lamfs stored it. This machine has every change that it has seen in storage, and this copy has no more.
    seen = known.changes is not None and origin.changes <= known.changes
    return Verdict.NEXT if seen else Verdict.NEWER


def _memory(instance: Opened) -> Path:
    return instance.settings.directory / "snapshot.json"


def _known(instance: Opened) -> Known:
    data = config.read_json(_memory(instance)) or {}
    etag, mark_, push_ = (data.get(name) for name in ("etag", "mark", "push"))
    changes = data.get("changes")
    return Known(
        etag if isinstance(etag, str) else None,
        mark_ if isinstance(mark_, str) else None,
        changes if isinstance(changes, int) else None,
        push_ if isinstance(push_, str) else None,
    )


def _own(registry: Registry) -> Own:
    return Own(str(registry.file.about().uid), registry.changes.last(), registry.file.pushes())


def push(instance: Opened, *, look: bool = False) -> bool:
    """Store a consistent copy of the registry; False when storage has this state already. ``look``: read the copy that
    is there, whatever this machine remembers of it.

    Storage is asked whether this machine holds the lease. Raises LeaseLost; Locked when this registry does not come
    from the copy in storage (both stay as they are); RegistryError, also when the working copy is that of another
    storage; and storage errors.
    """
    registry = instance.registry
    instance.check_own()
    now = registry.file.mark()
    written.note(instance.settings, registry, durable=True)
    known = Known() if look else _known(instance)
    name = secrets.token_hex(8)
    with _temporary(instance, "push") as temp:
        for _ in range(_TRIES):
            found = _find(instance, known)
            if found is not None and found.origin is not None and found.origin.pushes[:1] == (name,):
                break  # this push: the reply was lost
            if found is not None and known.mark == now and found.stored.etag == known.etag:
                return False
            _check_fence(instance, found)
            copies = kept.copies(instance.store, instance.settings.id)
            verdict = decide(_own(registry), known, found, copies)
            _require(instance, verdict, found)
            if found is not None:
                registry.file.add_pushes([_keep(instance, found, copies)])
            if not temp.exists():
                registry.file.copy_to(temp, push=name)
            try:
                found = _write(instance, temp, found)
                break
            except PreconditionFailed:
                continue  # another machine was quicker: look at its copy
        else:
            url = instance.store.url(instance.settings.snapshot_key)
            raise StorageError(f"The registry {url} changes all the time; look who writes it, and try again.")
    _remember(instance, found.stored, found.origin, now)
    _keep_new(instance, found)
    _say_mended(instance, verdict)
    return True


def _check_fence(instance: Opened, found: Found | None) -> None:
    """Raise LeaseLost unless this machine holds the lease, has brought its working copy up to date under it, and the
    copy in storage was not written under a later one."""
    instance.prove()
    note, own = held.read(instance.settings.directory), instance.registry.file.fence() or 0
    slug, key = instance.settings.slug, instance.settings.snapshot_key
    if note is None or own != note.fence:
        raise LeaseLost(
            f"This machine's registry of '{slug}' was not compared with the one in storage since another machine had"
            f" the lock; run 'lamfs connect {slug}'."
        )
    if found is not None and found.origin is not None and found.origin.fence > own:
        raise LeaseLost(
            f"The registry {instance.store.url(key)} was written by another machine that took the lock over, so"
            f" this machine's does not replace it, and stays as it is. 'lamfs connect {slug} --restore' takes the one"
            " in storage and puts this machine's aside."
        )


def _find(instance: Opened, known: Known) -> Found | None:
    """The copy in storage; None: there is none. It is read only when it is not the one that this machine remembers."""
    from lamfs.registry import intake
    from lamfs.registry.origins import Origin

    key = instance.settings.snapshot_key
    try:
        stored = instance.store.head(key)
    except ObjectMissing:
        return None
    if stored.etag == known.etag and known.changes is not None and known.push is not None:
        uid = instance.registry.file.about().uid
        return Found(stored, Origin("", str(uid), None, 0, known.changes, (known.push,)))
    with _temporary(instance, "peek") as temp:
        try:
            stored = fetch(instance, key, temp)
            return Found(stored, intake.look(temp, instance.store.url(key)))
        except NotSetUp:
            return None
        except DamagedRegistry as error:
            return Found(stored, None, error)


def _require(instance: Opened, verdict: Verdict, found: Found | None) -> None:
    """Raise Locked unless this machine's registry may replace the copy in storage."""
    if verdict in MAY_WRITE:
        return
    settings, url = instance.settings, instance.store.url(instance.settings.snapshot_key)
    if verdict is Verdict.OTHER:
        raise Locked(
            f"The registry {url} is of another instance than '{settings.slug}' on this machine, so it is not replaced,"
            " and nothing was stored over it; move it away, and try again."
        )
    if found is None or found.origin is None:
        raise Locked(
            f"The registry {url} is gone or damaged, and a copy that is kept of it has what this machine's has not, so"
            f" nothing was stored over it. {ways_back(instance)}"
        )
    raise Locked(
        f"The registry {url} has changes that this machine's does not have, so it is not replaced, and this machine's"
        f" stays as it is. 'lamfs connect {settings.slug} --restore' takes the one in storage and puts this machine's"
        " aside."
    )


def _keep(instance: Opened, found: Found, copies: Sequence[kept.Copy]) -> str:
    """Keep the copy that is about to be replaced. Returns the name of its push."""
    origin = found.origin
    push_ = origin.pushes[0] if origin is not None and origin.pushes else kept.push_of(found.stored.etag)
    name = kept.name_of(0 if origin is None else origin.changes, None if origin is None else origin.uid, push_)
    try:
        kept.keep(instance.store, instance.settings.id, found.stored, name, copies)
    except StorageFull as error:
        messages.warn(f"the registry that is replaced in storage is not kept: {error}")
    except (ObjectChanged, ObjectMissing):
        pass  # it is gone, so it is not replaced either
    return push_


def _write(instance: Opened, temp: Path, found: Found | None) -> Found:
    """Store the copy at ``temp`` in the place of ``found``. Raises PreconditionFailed when that is not there any
    more."""
    from lamfs.registry import intake

    key = instance.settings.snapshot_key
    origin = intake.look(temp, str(temp))
    etag = None if found is None else found.stored.etag
    stored = instance.store.put_file(key, str(temp), consume=True, if_none_match=etag is None, if_match=etag)
    return Found(stored, origin)


def _keep_new(instance: Opened, found: Found) -> None:
    """Keep a copy of what was pushed, and remove older copies. After a failure the next push does it."""
    origin, store, id_ = found.origin, instance.store, instance.settings.id
    assert origin is not None
    assert origin.uid is not None
    try:
        kept.keep(store, id_, found.stored, kept.name_of(origin.changes, origin.uid, origin.pushes[0]), ())
        kept.prune(store, id_, origin.uid)
    except StorageError as error:
        messages.warn(f"the registry is stored, but no copy of it is kept: {error}")


def _say_mended(instance: Opened, verdict: Verdict) -> None:
    if verdict in (Verdict.GONE, Verdict.DAMAGED):
        url = instance.store.url(instance.settings.snapshot_key)
        was = "was damaged" if verdict is Verdict.DAMAGED else "was gone"
        notice = f"the registry {url} {was}; this machine's is stored there again"
        instance.notices.append(notice)
        messages.warn(notice)


def _remember(instance: Opened, stored: ObjectStat | None, origin: Origin | None, now: str) -> None:
    data: dict[str, object] = {"etag": None if stored is None else stored.etag, "mark": now}
    if origin is not None and origin.pushes:
        data |= {"changes": origin.changes, "push": origin.pushes[0]}
    config.write_json(_memory(instance), data)


def _etag(instance: Opened) -> str | None:
    try:
        return instance.store.head(instance.settings.snapshot_key).etag
    except ObjectMissing:
        return None


def exists(instance: Opened) -> bool:
    """Whether there is a copy in storage."""
    return _etag(instance) is not None


def compare(instance: Opened) -> tuple[Verdict, Found | None, Known]:
    """How this machine's working copy relates to the copy in storage, with that copy and what this machine remembers of
    it. The copy is read as a whole, and checked. Raises RegistryError (it cannot be read here), and storage errors."""
    from lamfs.registry import intake

    key, found = instance.settings.snapshot_key, None
    # Read first: a mount of this machine may push at any moment, and a copy that is read later is not older.
    known = _known(instance)
    with _temporary(instance, "peek") as temp, contextlib.suppress(NotSetUp):
        stored = fetch(instance, key, temp)
        try:
            found = Found(stored, intake.check(temp, instance.store.url(key)))
        except DamagedRegistry as error:
            found = Found(stored, None, error)
    copies = kept.copies(instance.store, instance.settings.id)
    return decide(_own(instance.registry), known, found, copies), found, known


# -- ways back --------------------------------------------------------------------------------------------------------


def ways_back(instance: Opened) -> str:
    """What a person can do when the copy in storage is of no use, in words. Reads the kept copies."""
    good = newest_good(instance)
    way = (
        "'lamfs close' on the machine that worked with it last stores its registry there again, if that machine has not"
        " deleted the instance; 'lamfs init' does not bring it back."
    )
    if good is None:
        return way[0].upper() + way[1:]
    copy, origin = good
    settings = instance.settings
    where = settings.storage
    words = ["lamfs", "connect", settings.slug]
    if settings not in config.list_instances():
        words = ["lamfs", "connect", origin.slug, *_reaching(where)]
    words += ["--restore", "--copy", copy.name]
    return f"'{shlex.join(words)}' takes the newest copy that is kept and whole, of {iso(copy.stored.mtime_ns)}; {way}"


def anew(where: StorageConfig, slug: str | None = None) -> str:
    """The commands that make the objects of a lost registry readable again, in words. ``slug``: of the new instance;
    None: it gets the name of its storage."""
    words = ["lamfs", "init", *_reaching(where), *([] if slug is None else ["--name", slug.partition("/")[2]]), "--new"]
    return f"'{shlex.join(words)}' and then 'lamfs fsck --repair' give its objects names again, in lost+found"


def connecting(settings: InstanceSettings) -> str:
    """The command that connects to an instance which this machine may not know."""
    name = [] if settings.slug == settings.registry_slug else ["--name", settings.slug]
    return shlex.join(["lamfs", "connect", settings.registry_slug, *_reaching(settings.storage), *name])


def _reaching(where: StorageConfig) -> list[str]:
    """The options of a command that reach a storage."""
    words = ["--storage", where.root]
    for option, value in (("endpoint-url", where.endpoint_url), ("region", where.region)):
        words += [f"--{option}", value] if value else []
    return words + (["--path-style"] if where.path_style else [])


def newest_good(instance: Opened, id_: uuid.UUID | None = None) -> tuple[kept.Copy, Origin] | None:
    """The newest kept copy that is whole, and what it says of itself. ``id_``: of which instance; None: this one."""
    from lamfs.registry import intake

    for copy in kept.copies(instance.store, id_ or instance.settings.id):
        with _temporary(instance, "peek") as temp, contextlib.suppress(RegistryError, NotSetUp, ObjectChanged):
            fetch(instance, copy.stored.key, temp)
            return copy, intake.check(temp, instance.store.url(copy.stored.key))
    return None


def copy_key(instance: Opened, name: str) -> str:
    """Object key of a kept copy. Raises InvalidArgument, with the names of the copies that exist."""
    try:
        key = kept.key(instance.settings.id, name)
        instance.store.head(key)
        return key
    except (InvalidName, ObjectMissing):
        names = [copy.name for copy in kept.copies(instance.store, instance.settings.id)]
        which = f"kept are, the newest first: {', '.join(names)}" if names else "none is kept there"
        raise InvalidArgument(
            f"There is no copy '{name}' of the registry of '{instance.settings.slug}' in"
            f" {instance.settings.storage.root}; {which}."
        ) from None


# -- from storage -----------------------------------------------------------------------------------------------------


def pull(
    instance: Opened, *, restore: bool = False, copy: str | None = None, ahead: bool = False, keep_both: bool = False
) -> Path | None:
    """Make the copy in storage the working copy. The old working copy is put aside, and the work that it owes is
    carried over.

    A working copy that comes from the copy in storage stays as it is. ``restore``: replace it in any case; otherwise it
    has to be of the same instance. ``copy``: take the kept copy of this name instead. ``ahead``: the working copy has
    changes that no other machine has; with ``keep_both`` they are kept (ops/diverged.py). Returns where the old working
    copy is now; None: there was none, or it stays. Raises NotSetUp (there is no copy), InvalidArgument (it is of
    another instance), Locked (the registry is in use, or ``ahead`` without ``keep_both``), DamagedRegistry,
    RegistryError (the copy is newer).
    """
    from lamfs.registry import intake

    settings = instance.settings
    key = settings.snapshot_key if copy is None else copy_key(instance, copy)
    url = instance.store.url(key)
    with _temporary(instance, "pull") as temp, _temporary(instance, "fresh") as fresh:
        try:
            stored = fetch(instance, key, temp)
            origin = intake.look(temp, url)
            _check_origin(instance, origin, url, restore=restore)
        except DamagedRegistry as error:
            if not restore and settings.registry_path.exists() and _has_all(instance, None):
                return None
            raise DamagedRegistry(f"{error} {ways_back(instance)}") from None
        if not restore and settings.registry_path.exists() and _has_all(instance, Found(stored, origin)):
            return None
        _refuse_ahead(settings, ahead, keep_both)
        try:
            place = intake.Place(instance.store.kind, settings.storage.root)
            taken = intake.take(temp, url, fresh, place, now=now_ns(), spare_uid=new_uid(STORAGE_UID_LEN))
        except DamagedRegistry as error:
            raise DamagedRegistry(f"{error} {ways_back(instance)}") from None
        with contextlib.closing(Registry(fresh, work=False)) as registry:
            registry.file.made_of(stored.etag)
            if copy is not None:
                _supersede(instance, registry)
            registry.file.fold_log()
            now = registry.file.mark()
        apart = restore and _went_on_apart(instance, Found(stored, origin))
        with instance.alone("replaced"):
            # Another process of this machine may have changed it until now.
            ahead = ahead or (not restore and settings.registry_path.exists() and _went_on(instance))
            _refuse_ahead(settings, ahead, keep_both)
            back = _bring_back(instance, fresh) if ahead else diverged.BroughtBack()
            note = written.read(settings)
            # Before the replacement: a crash leaves no note then that calls the new working copy too old.
            written.forget(settings)
            put_aside = working_copy.replace(
                settings,
                fresh,
                instance.store,
                word="registry" if restore else diverged.DIVERGED if ahead else OVERTAKEN,
                apart=ahead or apart,
                wrote=None if note is None else note.uid,
            )
        if ahead and put_aside is not None:
            instance.notices.append(diverged.tell(settings, put_aside, back))
        working_copy.keep_newest(settings.directory, OVERTAKEN)
        if taken.total:
            _tell(instance, taken, temp, url)
    if copy is None:
        _remember(instance, stored, origin, now)
    else:
        _remember(instance, None, None, "")  # it has to be pushed
    written.note(settings, instance.registry, durable=True)
    return put_aside


def _refuse_ahead(settings: InstanceSettings, ahead: bool, keep_both: bool) -> None:
    if ahead and not keep_both:
        raise Locked(
            f"The registry of '{settings.slug}' was changed on another machine, and here as well since the last"
            f" 'lamfs close'. 'lamfs connect {settings.slug}' takes the one in storage, and keeps what only this"
            " machine has."
        )


def _went_on(instance: Opened) -> bool:
    """As ``is_ahead``, when no process has the registry open."""
    with contextlib.closing(Registry(instance.settings.registry_path)) as registry:
        return _is_ahead(instance, registry)


def _has_all(instance: Opened, found: Found | None) -> bool:
    """Whether the working copy has all changes of the copy in storage. None: that copy is damaged."""
    own, known = _own(instance.registry), _known(instance)
    copies = kept.copies(instance.store, instance.settings.id) if found is None else ()
    return decide(own, known, found, copies) in MAY_WRITE


def _went_on_apart(instance: Opened, found: Found) -> bool:
    """Whether the copy that is taken has something that the working copy never had, such as another machine's newer
    bytes. Work that is owed here does not replace those. True also when the working copy cannot tell."""
    if not instance.settings.registry_path.exists():
        return False
    try:
        return not _has_all(instance, found)
    except LamfsError:
        return True


def _supersede(instance: Opened, registry: Registry) -> None:
    """Let a kept copy that was chosen succeed everything in storage: it comes after that, and counts on."""
    found = _find(instance, Known())
    seen = [(copy.push, copy.changes) for copy in kept.copies(instance.store, instance.settings.id)]
    if found is not None and found.origin is not None and found.origin.pushes:
        seen.append((found.origin.pushes[0], found.origin.changes))
    elif found is not None and found.origin is not None:
        seen.append((kept.push_of(found.stored.etag), found.origin.changes))
    changes = max((changes for _, changes in seen), default=0) + 1
    registry.file.supersede([push_ for push_, _ in seen], changes)


def _bring_back(instance: Opened, fresh: Path) -> diverged.BroughtBack:
    path = instance.settings.registry_path
    with contextlib.closing(Registry(path)) as old, contextlib.closing(Registry(fresh)) as new:
        kept = diverged.bring_back(instance.store, old, new)
        new.file.fold_log()
    return kept


@contextlib.contextmanager
def _temporary(instance: Opened, what: str) -> Iterator[Path]:
    """Yields a name for a new file beside the working copy. A file that has the name at the end is removed."""
    config.make_directory(instance.settings.directory)
    temp = instance.settings.directory / f".{what}-{config.temporary_name()}.lndb"
    try:
        yield temp
    finally:
        workdb.remove(temp)


def origin(instance: Opened, key: str) -> Origin:
    """What a registry in storage says of itself. Raises NotSetUp, RegistryError, storage errors."""
    from lamfs.registry import intake

    with _temporary(instance, "peek") as temp:
        fetch(instance, key, temp)
        return intake.look(temp, instance.store.url(key))


def fetch(instance: Opened, key: str, path: Path) -> ObjectStat:
    """Write an object of the storage to a new file, mode 0600. Raises NotSetUp when there is none."""
    store = instance.store
    try:
        stored = store.head(key)
    except ObjectMissing:
        raise NotSetUp(f"There is no registry at {store.url(key)}; check owner, name and storage.") from None
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


def _check_origin(instance: Opened, found: Origin, url: str, *, restore: bool) -> None:
    """Raise InvalidArgument unless a registry in storage is of the instance that this machine means."""
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


def _tell(instance: Opened, taken: Taken, received: Path, url: str) -> None:
    """Tell the user what was wrong with a registry, and keep it as it came."""
    directory = instance.settings.directory
    kept = working_copy.aside(directory, RECEIVED)
    os.rename(received, kept)
    working_copy.keep_newest(directory, RECEIVED)
    listing = directory / "left-out.json"
    sentences = [finding.sentence for finding in taken.findings]
    config.write_json(listing, {"registry": url, "kept": str(kept), "total": taken.total, "findings": sentences})
    were = "was" if taken.total == 1 else "were"
    notice = (
        f"{count_of(taken.total, 'thing')} in the registry {url} cannot be right, and {were} left out: {listing} lists"
        f" what; the registry is kept as it came in {kept}"
    )
    instance.notices.append(notice)
    messages.warn(notice)
    for sentence in sentences[:SHOWN]:
        messages.warn(f"  {sentence}")
    if taken.total > SHOWN:
        messages.warn(f"  … and {taken.total - SHOWN} more")


def catch_up(instance: Opened, *, keep_both: bool = False) -> None:
    """Take over what another machine pushed before this one got the lease.

    When this machine has changes as well: with ``keep_both`` the other registry is taken, and what only this machine
    has is kept (ops/diverged.py). Otherwise raises Locked: objects of this process may be of the old registry.
    """
    etag, known = _etag(instance), _known(instance)
    if etag is None or etag == known.etag:
        return
    registry = instance.registry
    if etag == registry.file.source():
        return  # it was pulled, and the process died before it noted that
    pull(instance, ahead=is_ahead(instance), keep_both=keep_both)


def is_current(instance: Opened) -> bool:
    """Whether the copy in storage is the one that this machine pushed or pulled last. True when there is none."""
    return _etag(instance) in (None, known_etag(instance))


def known_etag(instance: Opened) -> str | None:
    """ETag of the copy that this machine pushed or pulled last."""
    return _known(instance).etag


def known_at(instance: Opened) -> int | None:
    """When this machine pushed or pulled its registry last, in nanoseconds since the epoch; None: never."""
    try:
        return _memory(instance).stat().st_mtime_ns
    except OSError:
        return None


def is_ahead(instance: Opened) -> bool:
    """Whether the working copy has changes that were neither pushed nor pulled. Raises RegistryError."""
    return _is_ahead(instance, instance.registry)


def _is_ahead(instance: Opened, registry: Registry) -> bool:
    return _known(instance).mark != registry.file.mark() or bool(registry.journal.owed())
