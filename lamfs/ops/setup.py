"""login, init, connect, close and delete: what a person does with a whole instance. Synchronous.

``say`` gets one sentence for each thing that is done; by default they go to lamfs's logger.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from lamfs import config, spool
from lamfs.config import InstanceSettings, UserSettings
from lamfs.errors import (
    DamagedRegistry,
    InvalidArgument,
    LamfsError,
    Locked,
    NotEmpty,
    NotSetUp,
    RegistryError,
    StorageError,
    StorageForbidden,
    StorageReadOnly,
    TooLarge,
)
from lamfs.keys import is_registry_key
from lamfs.model import STORAGE_UID_LEN, StorageConfig, instance_id, new_uid, now_ns, storage_id
from lamfs.ops import kept, losses, messages, mounts, scratch_files, snapshot, spools, unstored, working_copy, written
from lamfs.ops.instance import Instance
from lamfs.ops.probe import check_storage
from lamfs.printable import count_of
from lamfs.registry import Registry
from lamfs.registry.entries import Put, Save
from lamfs.storage import ObjectStore, parse_root
from lamfs.work import refused

Say = Callable[[str], None]


# -- who --------------------------------------------------------------------------------------------------------------


def login(handle: str, email: str | None = None, name: str | None = None, *, say: Say | None = None) -> UserSettings:
    """Set the user of this machine; ``handle`` may be an e-mail address. Raises InvalidArgument."""
    if "@" in handle:
        handle, email = handle.partition("@")[0], email or handle
    known = config.known_user(handle)
    user = config.make_user(handle, email or (known.email if known else None), name or (known.name if known else None))
    config.save_user(user)
    (say or messages.success)(f"logged in with handle {user.handle}, email {user.email}, uid {user.uid}")
    return user


# -- begin ------------------------------------------------------------------------------------------------------------


def init(
    storage: str,
    name: str | None = None,
    owner: str | None = None,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    profile: str | None = None,
    path_style: bool = False,
    new: bool = False,
    say: Say | None = None,
) -> InstanceSettings:
    """Make an instance with this default storage, and make it the current one. An instance that exists is connected.

    ``name``: by default the last part of the storage's root; ``owner``: by default the current user. Where an instance
    has lost its registry, or has a damaged one, no new one is made, unless ``new``: the objects then stay where they
    are, and belong to no artifact. Raises InvalidArgument, Locked, RegistryError (an instance was there), and storage
    errors (missing, forbidden, read-only).
    """
    root = parse_root(storage)
    inside = mounts.find_by_path(root) if root.startswith("/") else None
    if inside is not None:
        raise InvalidArgument(
            f"The storage '{root}' is inside of the mount at {inside[0].mountpoint}; choose a folder outside of mounts."
        )
    slug = f"{config.check_handle(owner or config.current_user().handle)}/{config.check_handle(name or _name_of(root))}"
    where = StorageConfig(root, endpoint_url, region, profile, path_style)
    known = next((known for known in config.list_instances() if known.slug == slug), None)
    if known is not None and known.storage.root != root:
        raise InvalidArgument(
            f"The instance '{slug}' exists with the storage {known.storage.root}; give another name with --name, or"
            f" delete it first with 'lamfs delete-instance {slug}'."
        )
    settings = InstanceSettings(slug, where, None if known is None else known.stored_slug)
    if root.startswith("/"):
        _make_folder(root)
    with Instance(settings) as instance:
        instance.refuse_damaged()
        for warning in check_storage(instance, write=True).warnings:
            (say or messages.warn)(warning)
        if not _is_free(instance, new):
            _connect(instance, say, restore=False)
            return settings
        instance.take_lease()
        _create_registry(instance)
        instance.hold()  # so the registry says under which lease it was made
        tell = say or messages.info
        tell(f"updating & unlocking cloud SQLite '{root}/{settings.snapshot_key}' of instance '{slug}'")
        snapshot.push(instance)
        config.save_instance(settings)
        config.set_current(slug)
        tell(_LOCKED)
    return settings


def _is_free(instance: Instance, new: bool) -> bool:
    """Whether an instance may be made here; False when one exists. Raises RegistryError when one was here, and
    InvalidArgument when one exists and a ``new`` one was wanted."""
    settings = instance.settings
    there = settings.registry_path.exists()
    if not there and snapshot.exists(instance):
        try:
            snapshot.origin(instance, settings.snapshot_key)
            there = True
        except DamagedRegistry as error:
            if not new:
                raise DamagedRegistry(f"{error} {snapshot.ways_back(instance)} {_anew(settings)}") from None
    if there and new:
        raise InvalidArgument(
            f"The instance '{settings.slug}' is there, and whole, so no new one is made in its place; connect to it,"
            f" or delete it first with 'lamfs delete-instance {settings.slug}'."
        )
    if there or new:
        return not there
    traces = kept.traces(instance.store, settings.id)
    own = instance.lease().peek()
    if traces == ["its lock"] and (own is None or own.machine == config.machine_token()):
        return True  # an 'init' that was interrupted
    if traces:
        raise RegistryError(
            f"The storage {settings.storage.root} holds {' and '.join(traces)}, but the registry of the instance"
            f" '{settings.slug}' is gone, so no new one is made over it. {snapshot.ways_back(instance)}"
            f" {_anew(settings)}"
        )
    return True


_LOCKED = "locked instance (to unlock and push changes to the cloud SQLite file, call: lamfs close)"


def _anew(settings: InstanceSettings) -> str:
    """What a person can do when no machine has the registry any more, in words."""
    return f"Only if no machine has it any more: {snapshot.anew(settings.storage, settings.slug)}."


def _name_of(root: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", root.rpartition("/")[2]).lstrip("._-")[:64]
    if not name:
        raise InvalidArgument(f"No instance name can be made from '{root}'; give one with --name.")
    return name


def _make_folder(root: str) -> None:
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InvalidArgument(
            f"The storage {root} is a file, or lies below one, and a storage is a folder; give another place."
        ) from None
    except OSError as error:
        raise StorageForbidden(
            f"The storage folder {root} cannot be made ({os.strerror(error.errno or 0)}); make it yourself, or choose"
            " another place.",
            errno=error.errno,
        ) from error


def _create_registry(instance: Instance) -> None:
    """Make the working copy with its first rows. It gets its name when it is whole."""
    settings = instance.settings
    config.make_directory(settings.directory)
    temp = settings.directory / f".new-{config.temporary_name()}.lndb"
    registry = Registry(temp, create=True, work=False)
    try:
        registry.file.set_up(
            settings.slug,
            now=now_ns(),
            storage_uid=new_uid(STORAGE_UID_LEN),
            root=settings.storage.root,
            kind=instance.store.kind,
            region=settings.storage.region,
            user=config.current_user(),
        )
    finally:
        registry.close()
    with contextlib.suppress(Locked), instance.alone("made"):
        if not settings.registry_path.exists():
            working_copy.logs_aside(settings.registry_path, "registry")
    try:
        # link(2), not rename: when two processes come here at once, both use the registry of one.
        with contextlib.suppress(FileExistsError):
            os.link(temp, settings.registry_path)
    finally:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{temp}{suffix}").unlink(missing_ok=True)


def ensure_default(*, say: Say | None = None) -> InstanceSettings:
    """The current instance; without any, the embedded default: ``<user>/default`` in a folder of the data directory.

    Raises NotSetUp when another instance was wanted and refused: its files do not belong into the default one.
    """
    slug = config.current_slug()
    if slug is not None:
        return config.load_instance(slug)
    if command := config.refused():
        raise NotSetUp(
            f"No instance is the current one, for '{command}' was refused, so nothing else is used in its place; run"
            " that again when its lock is free, or make another instance with 'lamfs init'."
        )
    return init(str(config.data_dir() / "storage"), "default", say=say)


# -- connect ----------------------------------------------------------------------------------------------------------


def connect(
    target: str,
    *,
    storage: str | None = None,
    name: str | None = None,
    endpoint_url: str | None = None,
    region: str | None = None,
    profile: str | None = None,
    path_style: bool = False,
    restore: bool = False,
    copy: str | None = None,
    say: Say | None = None,
) -> InstanceSettings:
    """Connect this machine to an instance: ``owner/name`` that it knows, or the storage root that has its registry.

    With several instances in one storage give both: the slug as ``target``, the root as ``storage``. ``name``: what the
    instance is called on this machine, where another one has its name. ``restore``: take the registry in storage
    instead of this machine's, which is put aside. ``copy``: the name of a kept copy to take. Raises NotSetUp,
    InvalidArgument (another instance has the name), Locked, DamagedRegistry, RegistryError, storage errors.
    """
    if copy is not None and not restore:
        raise InvalidArgument("A kept copy of the registry replaces this machine's; give --restore (restore=True) too.")
    if storage is None and ("://" in target or target.startswith(("/", ".", "~"))):
        target, storage = "", target
    if storage is None:
        if name is not None:
            raise InvalidArgument("Another name is given when an instance is connected by its storage; give that too.")
        settings = config.load_instance(target)
    else:
        where = StorageConfig(parse_root(storage), endpoint_url, region, profile, path_style)
        stored = config.parse_slug(target) if target else _find_slug(where)
        settings = _settings_for(stored, where, name, typed=bool(target))
    with Instance(settings) as instance:
        if not restore:
            instance.refuse_damaged()
        check_storage(instance, write=False)
        try:
            _connect(instance, say, restore=restore, copy=copy)
        except Locked:
            if config.current_slug() is None and settings not in config.list_instances():
                config.note_refused(snapshot.connecting(settings))
            raise
    return settings


def _settings_for(stored: str, where: StorageConfig, name: str | None, *, typed: bool) -> InstanceSettings:
    """The settings under which this machine knows, or will know, the instance ``stored`` of a storage.

    A slug that comes from a bucket (not ``typed``) never changes how a known instance is reached. Raises
    InvalidArgument when another instance has the name, and when this machine knows the instance by another name.
    """
    known = config.list_instances()
    slug = stored
    if name is not None:
        slug = config.parse_slug(name if "/" in name else f"{stored.partition('/')[0]}/{name}")
    for one in known:
        place = one.storage.root, one.storage.endpoint_url
        if one.registry_slug == stored and place == (where.root, where.endpoint_url):
            if name is not None and slug != one.slug:
                # A machine has one lease: two working copies of an instance would both write under it.
                raise InvalidArgument(
                    f"This machine knows the instance in {where.root} already, by the name '{one.slug}'; use that:"
                    f" 'lamfs connect {one.slug}'."
                )
            return InstanceSettings(one.slug, where, one.stored_slug)
    settings = InstanceSettings(slug, where, None if slug == stored else stored)
    other = next((one for one in known if one.slug == slug), None)
    if other is None:
        return settings
    if (other.registry_slug, other.storage.root) == (stored, where.root) and (
        typed or other.storage.endpoint_url == where.endpoint_url
    ):
        return settings
    if other.registry_slug == stored and _has_moved(other, settings):
        return settings
    at = f" at {other.storage.endpoint_url}" if other.storage.endpoint_url else ""
    raise InvalidArgument(
        f"This machine knows the instance '{slug}' in {other.storage.root}{at}, and that in {where.root} is another one"
        f" of this name; 'lamfs connect {where.root} --name NAME' makes it known here by another name."
    )


def _has_moved(known: InstanceSettings, settings: InstanceSettings) -> bool:
    """Whether a storage folder that this machine knows was moved: its old place has no registry, and the other folder
    has the same one."""
    old, new = known.storage.root, settings.storage.root
    if not (old.startswith("/") and new.startswith("/")) or os.path.lexists(f"{old}/{known.snapshot_key}"):
        return False
    own = working_copy.uid(known)
    with Instance(settings) as instance:
        return own is not None and own == snapshot.origin(instance, settings.snapshot_key).uid


def _connect(instance: Instance, say: Say | None, *, restore: bool, copy: str | None = None) -> None:
    settings = instance.settings
    if restore:
        _refuse_while_mounted(settings, "restored")
    else:
        _look_whose(instance)
    if copy is not None:
        snapshot.copy_key(instance, copy)
    elif (restore or not settings.registry_path.exists()) and not snapshot.exists(instance):
        stays = " What this machine has stays as it is." if restore else ""
        raise NotSetUp(
            f"There is no registry at {instance.store.url(settings.snapshot_key)}; check owner, name and storage."
            f"{stays} If it was there: {snapshot.ways_back(instance)}"
        )
    locked = True
    try:
        instance.take_lease(catch_up=not restore, keep_both=True)
    except (StorageReadOnly, StorageForbidden) as error:
        locked = False
        (say or messages.warn)(f"{error} Only reading is possible.")
    before = None
    if restore or not settings.registry_path.exists():
        try:
            before = snapshot.pull(instance, restore=restore, copy=copy)
        except LamfsError:
            if locked:
                instance.release_lease()
            raise
    _ = instance.registry
    if locked:
        instance.hold()
    config.save_instance(settings)
    config.set_current(settings.slug)
    if before is not None:
        (say or messages.info)(f"the registry in storage is used; this machine's was put aside as {before}")
    (say or messages.info)(f"connected to instance '{settings.slug}' in {settings.storage.root}")
    for waiting in spools.others(settings, spools.owed(instance.registry)):
        if waiting.kind != "aside" and waiting.sentence not in instance.notices:
            (say or messages.warn)(waiting.sentence)
    if locked:
        (say or messages.info)(_LOCKED)


def _look_whose(instance: Instance) -> None:
    """Make sure that a working copy and a storage that it may not know are of one instance.

    A working copy of another storage, without settings, is put aside. Raises InvalidArgument.
    """
    settings = instance.settings
    if not settings.registry_path.exists():
        return
    known = next((one for one in config.list_instances() if one.slug == settings.slug), None)
    _, own, root = instance.registry.file.about()
    if known is not None and known.storage == settings.storage and root == settings.storage.root:
        return
    if snapshot.exists(instance):
        found = snapshot.origin(instance, settings.snapshot_key)
        if found.uid is not None and found.uid != own and known is not None:
            raise InvalidArgument(
                f"The registry {instance.store.url(settings.snapshot_key)} is not that of '{settings.slug}' as this"
                f" machine knows it, but of another instance of the same name; 'lamfs connect {settings.storage.root}"
                " --name NAME' makes it known here by another name."
            )
        if found.uid is not None and found.uid != own:
            _put_aside(instance)
            return
    if root != settings.storage.root:
        instance.registry.file.move_to(settings.storage.root)


def _put_aside(instance: Instance) -> None:
    """Put the working copy aside, with its spool, of an instance that has no settings here any more."""
    with instance.alone("replaced"):
        kept = working_copy.retire(instance.settings, "registry")
    (instance.settings.directory / "snapshot.json").unlink(missing_ok=True)
    written.forget(instance.settings)
    messages.warn(f"a registry of another instance of this name was here; it was put aside as {kept}")


MOST_REGISTRIES = 64
"""Registries of one storage that are read to find their names."""


def _find_slug(where: StorageConfig) -> str:
    """The slug of the only instance whose registry is in a storage."""
    with Instance(InstanceSettings("unknown/unknown", where)) as instance:
        store = instance.store
        store.check(write=False)
        # One listing per first digit: a bucket full of other keys is not listed as a whole.
        keys = (found.key for digit in "0123456789abcdef" for found in store.list(digit) if is_registry_key(found.key))
        slugs: list[str] = []
        problem: RegistryError | None = None
        for key in islice(keys, MOST_REGISTRIES):
            try:
                slug = snapshot.origin(instance, key).slug
                if f"{instance_id(slug).hex}.lndb" != key:
                    raise RegistryError(
                        f"The registry {store.url(key)} says that it is that of '{slug}', which has another name; it is"
                        " left out."
                    )
                slugs.append(slug)
            except RegistryError as error:
                messages.warn(str(error))
                problem = error
        if not slugs:
            problem = _lost(where, store, problem)
    if len(slugs) == 1:
        return slugs[0]
    if slugs:
        raise InvalidArgument(
            f"The storage {where.root} holds the instances {', '.join(sorted(slugs))}; name one, and give the storage"
            " with --storage."
        )
    if problem is not None:
        raise problem
    raise NotSetUp(f"There is no registry in {where.root}; 'lamfs init --storage {where.root}' makes a new instance.")


def _lost(where: StorageConfig, store: ObjectStore, problem: RegistryError | None) -> RegistryError | None:
    """The error for a storage that has lost its registry, or has only a useless one; None: it never had one.
    ``problem``: the error of a registry that is there."""
    for id_ in kept.instances(store):
        with Instance(InstanceSettings("unknown/unknown", where)) as instance:
            found = snapshot.newest_good(instance, id_)
        if found is not None and instance_id(found[1].slug) == id_:
            what = problem or f"The registry of the instance '{found[1].slug}' in {where.root} is gone."
            with Instance(_settings_for(found[1].slug, where, None, typed=False)) as instance:
                return DamagedRegistry(f"{what} {snapshot.ways_back(instance)}")
    if problem is not None:
        return problem
    if kept.has_objects(store):
        return RegistryError(
            f"There is no registry in {where.root}, but objects of artifacts are, so one was there: 'lamfs close' on"
            " the machine that worked with it last stores it again, if that machine has not deleted the instance. If no"
            f" machine has it any more: {snapshot.anew(where)}."
        )
    return None


# -- end --------------------------------------------------------------------------------------------------------------


def close(slug: str | None = None, *, say: Say | None = None) -> InstanceSettings:
    """Store what is owed, push the registry, give the lock back, and forget the instance as the current one.

    Raises Locked while it is mounted or another process still saves, and storage errors.
    """
    from lamfs.ops import recover

    settings = config.load_instance(slug)
    _refuse_while_mounted(settings, "closed")
    tell = say or messages.info
    with Instance(settings) as instance:
        instance.refuse_damaged()
        instance.hold()
        with contextlib.suppress(TooLarge):  # reported below
            recover.finish_all(instance)
        owed = instance.registry.journal.entries()
        if too_large := [entry for entry in owed if isinstance(entry, Put) and entry.state == "refused"]:
            raise TooLarge(
                f"The instance '{settings.slug}' cannot be closed yet: {refused.sentence(instance.registry, too_large)}"
                " Mount it to change or delete what is too large."
            )
        busy = [entry for entry in owed if isinstance(entry, Put | Save) and entry.state != "scratch"]
        if busy:
            raise Locked(
                f"The instance '{settings.slug}' cannot be closed yet: {count_of(len(busy), 'file', 'is')} still on the"
                " way to storage; see 'lamfs status', and try again."
            )
        tell(
            f"updating & unlocking cloud SQLite '{settings.storage.root}/{settings.snapshot_key}' of instance"
            f" '{settings.slug}'"
        )
        snapshot.push(instance)
        instance.release_lease()
        files = instance.registry.names.scratch_files()
        lost = instance.registry.rescue.lost()
    for text in losses.sentences(lost):
        messages.warn(text)
    if files:
        tell(scratch_files.sentence(files))
    if config.current_slug() == settings.slug:
        config.set_current(None)
    return settings


def delete(slug: str, *, force: bool = False, say: Say | None = None) -> None:
    """Remove an instance: registry, lock, settings, and this machine's working copy and cache.

    What is owed to storage is stored first. Bytes that storage does not take stay in the spool folder, which is named.
    Objects of artifacts stay in storage. Without ``force`` raises NotEmpty while artifacts remain, the trash included,
    or scratch files with bytes. Raises Locked while it is mounted, in use, or another machine's; storage errors.
    """
    settings = config.load_instance(slug)
    _refuse_while_mounted(settings, "deleted")
    tell, warn = say or messages.info, say or messages.warn
    with Instance(settings) as instance:
        readable = _is_readable(instance, force)
        instance.take_lease(catch_up=readable)
        if not settings.registry_path.exists() and not written.had_one(settings) and snapshot.exists(instance):
            snapshot.pull(instance)
            readable = True
        if readable:
            if not force:
                _refuse_contents(instance)
            unstored.store(instance)
        registry = instance.registry if readable else None
        count = 0 if registry is None else registry.artifacts.count() + registry.artifacts.count(trash=True)
        remain = bool(count) or (registry is None and kept.has_objects(instance.store))
        with instance.alone("deleted"):
            instance.store.delete([settings.snapshot_key])
            kept.remove(instance.store, settings.id)
            cached = config.cache_dir() / instance.store.cache_name
            instance.cache_index.forget_below(instance.store.cache_name)
            shutil.rmtree(cached, ignore_errors=True)
            instance.release_lease(forget=True)
            _clear_machine(instance, warn)
        instance.close()
    config.remove_instance(settings.slug)
    if remain:
        whose = "its artifacts" if registry is None else count_of(count, "artifact")
        warn(
            f"the objects of {whose} remain in {settings.storage.root}, not referenced via an artifact; if they are"
            f" wanted: {snapshot.anew(settings.storage, settings.slug)}"
        )
    tell(f"deleted storage record {storage_id(settings.storage.root).hex} ({settings.storage.root})")
    tell(f"deleted instance record {settings.id.hex} ({settings.slug})")


def _clear_machine(instance: Instance, warn: Say) -> None:
    """Remove this machine's part of an instance, and tell what stays: bytes that are nowhere else, and files in its
    spool folder that lamfs has not made."""
    settings = instance.settings
    left: list[unstored.Left] = []
    strangers: list[str] = []
    known = True
    try:
        left = unstored.sort_out(settings, instance.store)
        if not left:
            spools.forget(settings)
            strangers = spool.remove(*settings.spool_place)
    except (StorageError, OSError) as error:
        known = False
        warn(f"the spool is left where it is: {error}")
    registry = unstored.clear(settings, keep=bool(left) or not known)
    for sentence in (*unstored.sentences(left, registry), *spools.sentences(settings)):
        warn(sentence if sentence.startswith(" ") else f"left where it is: {sentence}")
    if strangers and settings.storage.root.startswith("/"):
        warn(f"left where it is, because lamfs has not made it: {', '.join(strangers)}")


def _is_readable(instance: Instance, force: bool) -> bool:
    """Whether the registry exists and can be read. A damaged one raises, unless ``force``."""
    try:
        _ = instance.registry
    except NotSetUp:
        return False
    except DamagedRegistry:
        if force:
            return False
        raise
    return True


def _refuse_contents(instance: Instance) -> None:
    """Raise NotEmpty when an instance has artifacts, files that will become artifacts, or scratch files with bytes."""
    registry, slug = instance.registry, instance.settings.slug
    owed = sum(1 for entry in registry.journal.entries() if isinstance(entry, Put | Save) and entry.state != "scratch")
    count = registry.artifacts.count() + registry.artifacts.count(trash=True) + owed
    if count:
        raise NotEmpty(
            f"The instance '{slug}' still has {count_of(count, 'artifact')} (the trash included); delete them first,"
            " or pass --force (force=True) to remove the registry and leave their objects in storage."
        )
    if files := registry.names.scratch_files():
        raise NotEmpty(
            f"The instance '{slug}' still has files: {scratch_files.sentence(files)} Or pass --force (force=True),"
            " which leaves their bytes in the spool folder."
        )


def _refuse_while_mounted(settings: InstanceSettings, what: str) -> None:
    mounted = mounts.live(settings)
    if mounted:
        places = ", ".join(record.mountpoint for record in mounted)
        raise Locked(
            f"The instance '{settings.slug}' is mounted at {places}, so it cannot be {what}; run"
            f" 'lamfs umount {mounted[0].mountpoint}' first."
        )
