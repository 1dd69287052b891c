"""Checks the registry, tree, storage, spool and journal against each other. Synchronous.

Work in progress is not reported: rows and spool files of living processes, and objects that a journal row names. Each
problem is one sentence. ``repair`` mends problems that need no decision.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lamfs.errors import (
    DamagedRegistry,
    InvalidName,
    LamfsError,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    StorageUnavailable,
)
from lamfs.keys import is_internal, is_registry_key, is_spool_name, suffix_of
from lamfs.model import AUTO_INO, ArtifactRecord, iso, now_ns
from lamfs.ops import (
    damage,
    mounts,
    newer,
    orphans,
    recover,
    scratch_files,
    scrub,
    spools,
    stored_registry,
    strays,
    temporaries,
    unreturned,
)
from lamfs.ops.instance import Instance
from lamfs.ops.orphans import Orphan
from lamfs.printable import count_of
from lamfs.registry import is_alive, workdb
from lamfs.registry.db import is_whole, mends_work, translated
from lamfs.registry.entries import Abort, Delete, Move, Put, Save
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStat, ObjectStore
from lamfs.storage.root import check_object_key

OUTDATED = "is of an earlier revision than one that is in storage"
NO_NAME = "cannot be there: no object has such a name"
UPLOAD_AGE_NS = 24 * 3600 * 1_000_000_000
"""A younger multipart upload may be in progress."""


@dataclass(slots=True)
class Report:
    """The result of a check: ``problems`` that are left, ``repaired`` ones, and ``notes``, which are not problems."""

    problems: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    artifacts: int = 0
    objects: int = 0
    read_bytes: int = 0

    @property
    def clean(self) -> bool:
        """Whether no problem is left."""
        return not self.problems

    def add(self, text: str, mended: bool = False) -> None:
        """Note a problem."""
        (self.repaired if mended else self.problems).append(text)


def check(
    instance: Instance,
    *,
    repair: bool = False,
    purge: bool = False,
    data: bool = False,
    restart: bool = False,
    jobs: int = scrub.JOBS,
    watcher: scrub.Watcher | None = None,
) -> Report:
    """Check everything. ``data``: read every object too, and compare each block's hash, see scrub.run.

    ``repair``: mend problems that need no decision; no bytes are deleted that a user could miss. ``purge``: delete old
    objects that no artifact references, and the parts of uploads that nobody continues.

    Raises NotSetUp and storage errors only when nothing can be checked at all; with ``data`` also Locked and what
    scrub.run raises.
    """
    report = Report()
    try:
        _check(instance, report, repair, purge, data, restart, jobs, watcher)
    except DamagedRegistry as error:
        report.add(f"registry: {error}")
    return report


def _check(
    instance: Instance,
    report: Report,
    repair: bool,
    purge: bool,
    data: bool,
    restart: bool,
    jobs: int,
    watcher: scrub.Watcher | None,
) -> None:
    # First: a newer registry of another machine takes over what this one still has to store.
    if not _work(instance, report, repair):
        return
    if (repair or purge) and _registry(instance, Report()):
        instance.hold()
        if repair:
            _unnamed(instance, report)
        recover.finish_all(instance, strict=False)
        if _keep_damaged(instance, report):
            recover.finish_puts(instance)
    if not _registry(instance, report):
        return
    _stored_registry(instance, report, repair)
    _tree(instance, report, repair)
    _keys(instance, report)
    _journal(instance, report)
    _spool(instance, report, repair)
    _scratch(instance, report, repair)
    _lost(instance, report, repair)
    wrong, shared, unknown = _storage(instance, report, repair, jobs, watcher)
    _orphan_objects(instance, report, unknown, repair, purge, watcher)
    _uploads(instance, report, purge, shared)
    _temporaries(instance, report)
    if data:
        _data(instance, report, wrong, restart, jobs, watcher)
    for found in damage.known(instance):
        report.add(f"storage: {found.sentence}")
    # Counted last: a repair makes artifacts of objects and of spool files.
    report.artifacts = instance.registry.artifacts.count() + instance.registry.artifacts.count(trash=True)


# -- registry ---------------------------------------------------------------------------------------------------------


def _registry(instance: Instance, report: Report) -> bool:
    """Run SQLite's own checks. Returns False when the tables cannot be trusted."""
    try:
        found = instance.registry.consistency.check_file()
    except DamagedRegistry as error:
        report.add(f"registry: {error}")
        return False
    for flaw in found.dangling:
        report.add(f"registry: {flaw.sentence}")
    for text in found.errors:
        report.add(
            f"registry: SQLite says: {text} ('lamfs connect {instance.settings.slug} --restore' takes the copy in"
            " storage)"
        )
    return not found.errors


def _work(instance: Instance, report: Report, repair: bool) -> bool:
    """Check the work database. Returns False when it cannot be trusted.

    A repair puts it aside, and makes it anew from the registry, while no other program uses the instance. If that is
    damaged as well, it comes first.
    """
    settings = instance.settings
    path = settings.registry_path
    with contextlib.suppress(DamagedRegistry):
        _ = instance.registry  # one that cannot be opened is made anew by that
    what = workdb.flaw(path, thorough=True)
    if what is None or not is_whole(path):
        return True
    text = f"work database: {workdb.work_path(path)} is damaged ({what})"
    if not repair:
        report.add(f"{text}; {mends_work(settings.slug)}")
        return False
    try:
        with instance.alone("mended"), translated(path):
            kept = workdb.make_anew(path)
    except (LamfsError, OSError) as error:
        report.add(f"{text}: {error}")
        return False
    report.add(f"{text}; it was made anew, and the old one is {kept}", True)
    return True


def _stored_registry(instance: Instance, report: Report, repair: bool) -> None:
    """Check the registry's copy in storage. A repair stores this machine's registry there; the old copy is kept
    (kept.py)."""
    found = stored_registry.look(instance)
    if found is None:
        return
    if not found.problem:
        report.notes.append(f"registry in storage: {found.text}")
        return
    mended = False
    if repair and found.mends:
        try:
            mended = stored_registry.mend(instance)
        except LamfsError as error:
            report.add(f"registry in storage: {error}")
    report.add(f"registry in storage: {found.text}", mended)


# -- tree -------------------------------------------------------------------------------------------------------------


def _tree(instance: Instance, report: Report, repair: bool) -> None:
    def is_mounted() -> bool:
        return bool(mounts.live(instance.settings))

    for flaw in instance.registry.consistency.check_tree(now=now_ns(), repair=repair, is_mounted=is_mounted):
        report.add(f"tree: {flaw.sentence}", flaw.mended)


def _unnamed(instance: Instance, report: Report) -> None:
    """Give names in ``lost+found`` to files and directories that have lost theirs, and that lead to bytes or to other
    files."""
    if mounts.live(instance.settings):
        return
    for ino, key in instance.registry.rescue.name_nameless(now=now_ns()):
        report.add(f"tree: inode {ino} had no name, and is '{key}' now", True)


def _keys(instance: Instance, report: Report) -> None:
    registry = instance.registry
    pending = {entry.ino for entry in registry.journal.puts()}
    for record in registry.artifacts.filter(visibility=None):
        assert record.ino is not None
        if record.visibility > -1:
            parent = registry.tree.parent(record.ino)
            path = registry.tree.path(record.ino)
            if parent == AUTO_INO:
                path = None
            if parent is not None and path != record.key:
                report.add(f"tree: artifact {record.uid} has the key '{record.key}' but is at '{path}'")
            if record.key is not None and record.suffix != suffix_of(record.key.rpartition("/")[2]):
                report.add(f"registry: artifact '{record.key}' has the suffix '{record.suffix}'")
        inode = registry.tree.get(record.ino)
        if inode is not None and inode.size != record.size and record.ino not in pending:
            report.add(f"tree: '{record.key or record.uid}' shows {inode.size} bytes and has {record.size}")


# -- journal and spool ------------------------------------------------------------------------------------------------


def _journal(instance: Instance, report: Report) -> None:
    entries = instance.registry.journal.entries()
    left = any(entry.state != "scratch" and not is_alive(entry.owner) for entry in entries)
    mounted = next((record for record in mounts.live(instance.settings) if not record.read_only), None)
    step = _next_step(instance) if left and mounted is None else "'lamfs fsck --repair' does it"
    for entry in entries:
        what = f"{entry.op} of {entry.about}"
        if entry.state == "scratch":
            continue  # scratch: in the spool, and never in storage
        if not is_alive(entry.owner) and mounted is not None and not isinstance(entry, Save):
            report.notes.append(f"journal: the {what} was left to the mount at {mounted.mountpoint}, which does it")
        elif not is_alive(entry.owner):
            report.add(f"journal: the {what} was left by a process that is gone; {step}")
        elif entry.attempts:
            report.add(f"journal: the {what} failed {count_of(entry.attempts, 'time')}: {entry.error}")
        elif entry.owner != instance.registry.journal.owner:
            report.notes.append(f"journal: the {what} is under way")


def _next_step(instance: Instance) -> str:
    """What a person has to do about the work of dead processes, in words."""
    step = "mount, or 'lamfs fsck --repair'"
    holder = None
    with contextlib.suppress(StorageError):
        holder = instance.lease().peek()
    if holder is None or instance.lease().is_ours(holder):
        return step
    return (
        f"as soon as {holder.handle} on {holder.host}, who has the lock, has given it back, or it has run out: {step}"
    )


def _spool(instance: Instance, report: Report, repair: bool) -> None:
    settings, registry = instance.settings, instance.registry
    try:
        if repair:
            spools.take_in(settings, registry)
        spool = SpoolFolder.find(*settings.spool_place)
        elsewhere = spools.owed_elsewhere(settings, registry)
    except StorageError as error:
        report.add(f"spool: {error}")
        return
    with contextlib.ExitStack() as stack:
        if spool is not None:
            stack.enter_context(spool)
        _spool_files(instance, report, repair, spool, elsewhere)
    for path in elsewhere.values():
        report.notes.append(f"spool: {path} is still to be stored by this machine, whose next mount takes it")
    report.notes += [f"spool: {sentence}" for sentence in spools.sentences(settings, spools.owed(registry))]


def _spool_files(
    instance: Instance, report: Report, repair: bool, spool: SpoolFolder | None, elsewhere: Collection[str]
) -> None:
    files = {*(spool.names() if spool is not None else ()), *elsewhere}
    entries = {entry.src: entry for entry in instance.registry.journal.puts()}
    if spool is not None and not mounts.live(instance.settings):
        _strays(instance, report, repair, spool)
    for name in spool.strangers() if spool is not None else ():
        assert spool is not None
        report.notes.append(f"spool: {spool.shown(name)} is not a spool file, and is left there")
    for src, entry in entries.items():
        key = instance.registry.tree.path(entry.ino) or entry.uid
        if not is_spool_name(src):
            report.add(
                f"spool: the journal owes '{key}' a file named {str(src)[:80]!r}, which is not the name of a spool file"
            )
        elif src not in files and not is_alive(entry.owner):
            report.add(
                f"spool: the file {src} with the last bytes of '{key}' is gone; what was stored before is still there,"
                " if anything was"
            )


def _keep_damaged(instance: Instance, report: Report) -> bool:
    """Put spool files whose bytes have changed since they were written into ``lost+found``. Returns whether there were
    any."""
    registry = instance.registry
    wrong = [entry for entry in registry.journal.mine(Put) if entry.damaged]
    spool = SpoolFolder.find(*instance.settings.spool_place) if wrong else None
    if spool is None or mounts.live(instance.settings):
        return False
    with spool:
        for entry in wrong:
            was = registry.tree.path(entry.ino) or entry.uid
            key = strays.keep_damaged(registry, spool, entry)
            report.add(
                f"spool: the last bytes of '{was}' are not what was written: what is left of them is '{key}'", True
            )
    return True


def _lost(instance: Instance, report: Report, repair: bool) -> None:
    """Report the bytes that were lost since the last repair, and the entries of ``lost+found``. A repair forgets the
    losses."""
    rescue = instance.registry.rescue
    for lost in rescue.lost():
        report.notes.append(f"spool: {lost.sentence}")
    if repair:
        rescue.forget_lost()
    folder, count = rescue.found()
    if count:
        report.notes.append(
            f"tree: '{folder}' has {count_of(count, 'entry')}; look at what is there, and move or delete it"
        )


def _scratch(instance: Instance, report: Report, repair: bool) -> None:
    """Check for scratch names whose bytes are not on this machine. On another machine than their own they never are."""
    registry = instance.registry
    for unread in scratch_files.find_unread(registry):
        what = f"tree: '{unread.key}' is a scratch name, and its {unread.inode.size} bytes are not on this machine"
        if unread.kept is None:
            report.notes.append(
                f"{what}, so it cannot be read here; delete the name, unless another machine has the bytes"
            )
            continue
        place = f"{registry.rescue.found()[0]}/{unread.kept}"
        if repair and scratch_files.give_back(registry, unread):
            report.add(f"tree: '{unread.key}' had lost its bytes, and has those of '{place}' again", True)
            mounts.poke(instance.settings)
        else:
            report.add(f"{what}: they are '{place}'; 'lamfs fsck --repair' gives them back")


def _strays(instance: Instance, report: Report, repair: bool, spool: SpoolFolder) -> None:
    """Check for spool files that no journal row names. A repair removes leftovers, and puts all other bytes into
    ``lost+found``."""
    registry, store = instance.registry, instance.store
    if repair:
        found = strays.settle(registry, store, spool, instance.settings.directory)
        recover.finish_puts(instance)
    else:
        found = list(strays.look(registry, store, spool))
    for stray in found:
        text = f"spool: nothing owes the file {spool.shown(stray.src)}, which {stray.kind.value}"
        if stray.kind is strays.Kind.UNTOLD:
            report.notes.append(text)
            continue
        stays = repair and stray.kind is strays.Kind.STRAY and stray.key is None
        if stays:
            text += "; it cannot be looked at, and stays there"
        elif stray.kind is strays.Kind.STRAY:
            text += f"; it is '{stray.key}' now" if stray.key else "; 'lamfs fsck --repair' puts it into lost+found"
        report.add(text, repair and not stays)


# -- storage ----------------------------------------------------------------------------------------------------------


def _storage(
    instance: Instance, report: Report, repair: bool, jobs: int, watcher: scrub.Watcher | None
) -> tuple[set[str], bool, list[Orphan]]:
    """Check objects against artifacts, and remember the damage. Returns the uids of artifacts whose object is wrong,
    whether other instances use this storage too, and the objects that no artifact references."""
    registry, store = instance.registry, instance.store
    found: dict[str, ObjectStat] = {}
    others = 0
    for item in store.list():
        if not _is_key(store, item.key):
            report.notes.append(f"storage: {store.url(item.key)} has a name that lamfs gives no object")
        elif is_registry_key(item.key):
            others += item.key != instance.settings.snapshot_key
        elif not is_internal(item.key):
            found[item.key] = item
    report.objects = len(found)
    before = {entry.uid for entry in damage.known(instance) if not entry.blocks}
    wrong: list[newer.Wrong] = []
    for record in registry.artifacts.filter(visibility=None):
        problem = _object_problem(instance, record, found.get(record.revision.object_key))
        if problem == damage.REPLACED and repair and _note_copy(instance, record, jobs):
            url = store.url(record.revision.object_key)
            report.add(f"storage: the object {url} of '{record.place}' is another one with the same bytes", True)
        elif problem is not None:
            wrong.append(newer.Wrong(record, problem))
        elif record.uid in before:
            damage.clear(instance, record)
    unknown = orphans.find(instance, found.values(), shared=others > 0, jobs=jobs)
    report.notes += unknown.notes
    wrong += _outdated(instance, unknown.orphans, {each.record.uid for each in wrong})
    problems = _others(instance, report, wrong, unknown.orphans, repair, others > 0, watcher)
    if problems:
        damage.record_all(instance, [(record, problem, ()) for record, problem in problems])
    return {record.uid for record, _ in problems}, others > 0, unknown.orphans


def _outdated(instance: Instance, unknown: Iterable[Orphan], wrong: Collection[str]) -> Iterator[newer.Wrong]:
    """Artifacts with a later revision in storage than in this registry, which was set back then. Leaves out those that
    are ``wrong`` already."""
    latest: dict[str, int] = {}
    for orphan in unknown:
        if orphan.meta is not None and orphan.meta.uid not in wrong:
            latest[orphan.meta.uid] = max(latest.get(orphan.meta.uid, 0), orphan.meta.revision or 0)
    for uid, number in latest.items():
        record = instance.registry.artifacts.by_uid(uid)
        if record is not None and number > record.number:
            yield newer.Wrong(record, OUTDATED)


def _others(
    instance: Instance,
    report: Report,
    wrong: Sequence[newer.Wrong],
    unknown: list[Orphan],
    repair: bool,
    shared: bool,
    watcher: scrub.Watcher | None,
) -> list[newer.Wrong]:
    """Report artifacts whose object is wrong, with the object that is there instead, and mend them. Returns those that
    are still wrong. Removes objects that have an artifact now from ``unknown``."""
    seen = newer.find(instance, wrong, unknown, shared=shared)
    if not repair:
        return [each.named for each in seen]
    if watcher is not None and any(each.other for each in seen):
        watcher.begin(0, sum(each.other.item.size for each in seen if each.other is not None))
    left = []
    used = set()
    for each in seen:
        mended = newer.mend(instance, each, None if watcher is None else watcher.add)
        if mended.text is not None:
            report.add(f"storage: {mended.text}", True)
        # An outdated artifact stays as it is: its newer object is kept as an orphan.
        if mended.left is not None and mended.left.problem != OUTDATED:
            left.append(mended.left)
        used.add(mended.used)
    unknown[:] = [orphan for orphan in unknown if orphan.item.key not in used]
    if any(each.other for each in seen):
        mounts.poke(instance.settings)
    return left


def _orphan_objects(
    instance: Instance, report: Report, found: list[Orphan], repair: bool, purge: bool, watcher: scrub.Watcher | None
) -> None:
    """Make files of lost+found of objects that no artifact references, or delete old ones with ``purge``."""
    store = instance.store
    gone = set()
    if purge:
        for orphan in orphans.purge(instance, found):
            gone.add(orphan.item.key)
            report.objects -= 1
            report.add(f"storage: {store.url(orphan.item.key)} ({orphan.told}) was no artifact's, and is deleted", True)
    left = [orphan for orphan in found if orphan.item.key not in gone]
    if repair and watcher is not None and left:
        watcher.begin(0, sum(orphan.item.size for orphan in left))
    for orphan in left:
        what = f"storage: no artifact references {store.url(orphan.item.key)} ({orphan.told})"
        if repair:
            try:
                place = orphans.keep(instance, orphan, None if watcher is None else watcher.add)
            except StorageUnavailable:
                raise
            except LamfsError as error:
                report.add(f"{what}; it cannot be kept now: {error}")
            else:
                if place is not None:
                    report.add(f"{what}; it is '{place}' now", True)
        elif purge and not orphan.old:
            report.add(f"{what}; it is younger than {orphans.PURGE_DAYS} days, and stays")
        else:
            report.add(f"{what}; 'lamfs fsck --repair' puts it into lost+found")
    if repair and left:
        mounts.poke(instance.settings)
    if not left or repair:
        unreturned.forget(instance.settings)


def _is_key(store: ObjectStore, key: str) -> bool:
    """Whether an object can have such a key. Other programs may use the storage, with keys that lamfs cannot even ask
    for."""
    try:
        check_object_key(key, as_path=store.on_disk)
    except InvalidName:
        return False
    return True


def _object_problem(instance: Instance, record: ArtifactRecord, item: ObjectStat | None) -> str | None:
    """The problem of an artifact's object; None: it is right. Looks twice, because others may be at work."""
    if not _is_key(instance.store, record.revision.object_key):
        return NO_NAME
    if item is not None and (item.size, item.etag) == (record.size, record.revision.etag):
        return None
    again = instance.registry.artifacts.by_uid(record.uid)
    if again is None or again.revision != record.revision:
        return None
    try:
        item = instance.store.head(record.revision.object_key)
    except ObjectMissing:
        return "is gone"
    except StorageError as error:
        if error.errno == errno.ELOOP:
            return "is a link, or lies below one, and no link is followed"
        if error.errno != errno.ENAMETOOLONG:
            raise
        return NO_NAME
    if item.etag != record.revision.etag and instance.registry.journal.holds(item.key):
        return None  # it is being stored, or its commit is owed: the journal's rows are reported instead
    if item.size != record.size:
        return f"has {item.size} bytes, not {record.size}"
    if item.etag != record.revision.etag:
        return damage.REPLACED
    return None


def _note_copy(instance: Instance, record: ArtifactRecord, jobs: int) -> bool:
    """Note the ETag of an artifact's object when it is another object with the same bytes: a storage that was copied,
    or restored from a backup, has such objects. Returns whether it was noted."""
    try:
        etag = instance.store.head(record.revision.object_key).etag
        return scrub.has_its_bytes(instance, record, etag, jobs) and instance.registry.commits.same_bytes(record, etag)
    except (ObjectMissing, ObjectChanged):
        return False  # it changes just now


def _data(
    instance: Instance,
    report: Report,
    leave_out: set[str],
    restart: bool,
    jobs: int,
    watcher: scrub.Watcher | None,
) -> None:
    result = scrub.run(instance, leave_out, restart=restart, jobs=jobs, watcher=watcher)
    report.read_bytes = result.bytes
    if result.before:
        report.notes.append(
            f"data: {count_of(result.before, 'artifact', 'was')} found right by an earlier check that did not"
            " end, and not read again; --restart reads them too"
        )
    for text in result.unread:
        report.add(f"storage: {text}")


def _temporaries(instance: Instance, report: Report) -> None:
    try:
        swept = temporaries.sweep(instance, everywhere=True)
    except StorageError as error:
        report.notes.append(f"storage: what processes have left half made cannot be listed: {error}")
        return
    report.repaired += swept.removed
    report.notes += swept.left


def _uploads(instance: Instance, report: Report, purge: bool, shared: bool) -> None:
    """Report multipart uploads that nobody will complete: their parts take space, and no listing of objects shows
    them."""
    store = instance.store
    try:
        found = [upload for upload in store.uploads() if upload.started_ns < now_ns() - UPLOAD_AGE_NS]
    except StorageError as error:
        report.notes.append(f"storage: unfinished uploads cannot be listed: {error}")
        return
    under_way = _targets(instance) if found else set()
    for upload in found:
        name = f"the upload to {store.url(upload.key)} of {iso(upload.started_ns)[:10]}"
        if upload.key in under_way:
            report.notes.append(f"storage: {name} is under way")
        elif shared:
            report.notes.append(f"storage: {name} was not finished, perhaps by another instance in this storage")
        else:
            mended = False
            if purge:
                try:
                    store.abort_upload(upload.key, upload.id)
                    mended = True
                except (StorageError, InvalidName) as error:
                    name = f"{name} cannot be aborted ({error}); it"
            hint = "" if purge else "; 'lamfs fsck --purge-orphans' deletes them"
            report.add(f"storage: {name} was never finished, and its parts take room{hint}", mended)


def _targets(instance: Instance) -> set[str]:
    """Object keys to which the journal's work may upload or copy now."""
    registry = instance.registry
    found = registry.uploads.targets()
    for entry in registry.journal.entries():
        if isinstance(entry, Put | Save | Delete | Abort):
            found.add(entry.object_key or "")
        uid = entry.uid if isinstance(entry, Put | Save | Move | Delete) else None
        record = registry.artifacts.by_uid(uid) if uid else None
        if record is not None:
            found.add(registry.artifacts.home(record))
    return found
