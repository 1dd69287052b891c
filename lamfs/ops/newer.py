"""Objects at the key of an artifact that are not what this registry says of it. Synchronous, any thread.

A revision may be written over the one before, in the same object. So after another machine was taken over from an old
copy of the registry, the object of an artifact has newer bytes than the registry knows; these may be all that is left.
When the object says that it is a later revision of the same artifact, and its bytes are those that it says, they become
the artifact's content. Anything else becomes a file of ``lost+found``, where it is in storage. Nothing is deleted.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lamfs.errors import InvalidName, LamfsError, ObjectChanged, ObjectMissing, StorageError, StorageUnavailable
from lamfs.keys import is_private, name_with, root_path
from lamfs.model import (
    AUTO_KEY_PREFIX,
    ArtifactRecord,
    ContentHash,
    ObjectMeta,
    Revision,
    iso,
    new_uid,
    now_ns,
)
from lamfs.ops import drafts
from lamfs.ops.instance import Instance
from lamfs.storage.base import ObjectStat, ObjectStore, Over
from lamfs.work import conflicts
from lamfs.work.direct import DirectWorker, finish

log = logging.getLogger("lamfs.newer")

READ_MOST = 256 << 20
"""Bytes that a check without a repair reads, in all, to tell damaged objects from copies."""


class Other(NamedTuple):
    """An object that is not the revision of ``record``, and what it says of itself."""

    record: ArtifactRecord
    item: ObjectStat
    meta: ObjectMeta | None

    @property
    def is_later(self) -> bool:
        """Whether it says that it is a later revision of that artifact."""
        meta = self.meta
        return meta is not None and meta.uid == self.record.uid and (meta.revision or 0) > self.record.number

    @property
    def is_itself(self) -> bool:
        """Whether it says that it is that very revision: then it is damaged, or a copy of what was saved."""
        return self.meta is not None and self.meta.uid == self.record.uid and self.meta.hash == self.record.meta.hash

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is under another object key than that which the registry knows."""
        return self.item.key != self.record.revision.object_key

    @property
    def is_same_number(self) -> bool:
        """Whether it says that it is the artifact's revision of the number that the registry knows."""
        return self.meta is not None and (self.meta.uid, self.meta.revision) == (self.record.uid, self.record.number)

    @property
    def told(self) -> str:
        """For people: what it is."""
        if self.is_later:
            what = "a later revision than this registry knows"
        elif self.is_elsewhere:
            what = "that revision"
        else:
            what = "something that this registry does not know"
        return f"{what} ({told(self.item, self.meta)})"


class Wrong(NamedTuple):
    """An artifact whose object is not what the registry says, and what is wrong, after "the object … of …"."""

    record: ArtifactRecord
    problem: str


class Seen(NamedTuple):
    """What is wrong, and what is in storage instead; None: nothing that is of use."""

    wrong: Wrong
    other: Other | None
    url: str = ""

    @property
    def what(self) -> str:
        """What is wrong, and what is there."""
        if self.other is None:
            return self.wrong.problem
        where = f"at {self.url}" if self.other.is_elsewhere else "there"
        return f"{self.wrong.problem}; {where} is {self.other.told}"

    @property
    def named(self) -> Wrong:
        """The same with what can be done."""
        if self.other is None:
            return self.wrong
        adopts = self.other.is_later or self.other.is_elsewhere
        ways = "makes that its content" if adopts else "puts that into lost+found"
        return Wrong(self.wrong.record, f"{self.what}; 'lamfs fsck --repair' {ways}")


class Mended(NamedTuple):
    """What became of it: a sentence, if something did; what is still wrong; the object key that an artifact has now."""

    text: str | None
    left: Wrong | None
    used: str | None


def told(item: ObjectStat, meta: ObjectMeta | None) -> str:
    """Size and time of an object, and what it says, for people."""
    facts = [f"{item.size} bytes", iso(item.mtime_ns)[:19]]
    if meta is not None:
        if meta.key is not None:
            facts.append(f"was '{meta.key}{'…' if meta.cut else ''}'")
        if meta.revision is not None:
            facts.append(f"revision {meta.revision}")
        facts.append(f"artifact {meta.uid}")
        if meta.hash is not None:
            facts.append(meta.hash)
    return ", ".join(facts)


def look(instance: Instance, record: ArtifactRecord) -> Other | None:
    """What is where the bytes of an artifact should be; None: they are, or nothing is. Raises storage errors."""
    key = record.revision.object_key
    try:
        item = instance.store.head(key)
        if (item.size, item.etag) == (record.size, record.revision.etag):
            return None
        return Other(record, item, instance.store.meta(key))
    except InvalidName:
        return None  # no object has such a name
    except StorageError as error:
        if isinstance(error, ObjectMissing) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise


def find(
    instance: Instance, wrong: Iterable[Wrong], unknown: Iterable[tuple[ObjectStat, ObjectMeta | None]], *, shared: bool
) -> list[Seen]:
    """What is in storage instead of the objects of artifacts: in their place, or elsewhere, among the objects that are
    ``unknown`` to the registry, the latest revision of the artifact. ``shared``: other instances use this storage."""
    latest: dict[str, tuple[ObjectStat, ObjectMeta]] = {}
    for item, meta in unknown:
        if meta is not None and (meta.uid not in latest or (latest[meta.uid][1].revision or 0) < (meta.revision or 0)):
            latest[meta.uid] = item, meta
    seen = []
    budget = READ_MOST
    for each in wrong:
        record = each.record
        other = look(instance, record)
        if other is not None and other.is_itself and other.is_same_number:
            budget -= other.item.size if other.item.size == record.size else 0
            each = Wrong(record, _changed(instance, other, each.problem, read=budget >= 0))
        if other is None and record.uid in latest:
            other = Other(record, *latest[record.uid])
        if other is not None and not (other.is_later or (other.is_elsewhere and other.is_same_number)):
            # Of the very revision that was saved: that is damage. In a place that others use: it may be theirs.
            other = None if other.is_elsewhere or other.is_itself or shared else other
        seen.append(Seen(each, other, "" if other is None else instance.store.url(other.item.key)))
    return seen


def _changed(instance: Instance, other: Other, problem: str, *, read: bool) -> str:
    """What is wrong with an object that says it is the very revision which the registry knows. ``read``: tell by its
    bytes, if its size does not. Raises StorageUnavailable."""
    record, item, _ = other
    right = None if item.size == record.size else False
    if right is None and read:
        try:
            content, etag = drafts.hash_object(instance.store, item.key)
            right = content.same_bytes(record.revision.content) if etag == item.etag else None
        except StorageUnavailable:
            raise
        except LamfsError as error:
            return f"was changed, and cannot be read now: {error}"
    if right is None:
        return (
            f"was changed, and says that it is revision {record.number}: it is damaged, or a copy; 'lamfs fsck"
            " --repair' looks which"
        )
    if right:
        return "was replaced by a copy with the same bytes; 'lamfs fsck --repair' takes that"
    damaged = f"its bytes are not those of revision {record.number}"
    text = f"is damaged: {damaged}" if item.size == record.size else f"{problem}: it is damaged, {damaged}"
    return (
        f"{text}; put the object back from a backup, or give the file its content anew ('lamfs replace', or write it):"
        " what is in the object goes to lost+found then"
    )


def mend(instance: Instance, seen: Seen, progress: Callable[[int], None] | None = None) -> Mended:
    """See that the bytes of an object which is not what the registry says can be read: all of it is read.

    ``progress`` is told how many bytes. Raises StorageUnavailable.
    """
    wrong, other, _ = seen
    if other is None:
        return Mended(None, wrong, None)
    record, url = wrong.record, instance.store.url(wrong.record.revision.object_key)
    what = f"the object {url} of '{record.place}' {seen.what}"
    try:
        if _adopt(instance, other, progress):
            text = f"{what}; that is its content now"
            if other.is_later:
                text += f", and the {record.size} bytes of revision {record.number} are in storage no more"
            return Mended(text, None, other.item.key)
        if other.is_elsewhere:
            return Mended(None, wrong, None)  # it is kept as any object that no artifact references
        place = _keep(instance, other, progress)
    except StorageUnavailable:
        raise
    except LamfsError as error:
        return Mended(None, Wrong(record, f"{seen.what}; that cannot be read now: {error}"), None)
    now = instance.registry.artifacts.by_uid(record.uid)
    if place is not None:
        text = f"{what}; that is '{place}' now, and what was saved is gone"
        return Mended(text, None if now is None else Wrong(now, "is gone"), other.item.key)
    if now is None or now.revision != record.revision:
        return Mended(None, None, None)
    return Mended(None, Wrong(record, f"{seen.what}; the file is being written, try again later"), None)


def _adopt(instance: Instance, other: Other, progress: Callable[[int], None] | None) -> bool:
    """Make a revision that is in storage the content of its artifact; whether it is that now.

    Not when its bytes are not those that it says, or somebody is writing the file.
    """
    record, item, meta = other
    if meta is None or meta.revision is None or not (other.is_later or (other.is_elsewhere and other.is_same_number)):
        return False
    content, etag = drafts.hash_object(instance.store, item.key, progress)
    if etag != item.etag or not _is_said(meta, content):
        return False
    if not other.is_later and not content.same_bytes(record.revision.content):
        return False
    revision = Revision(content, item.key, etag)
    return instance.registry.commits.adopt(record, revision, meta.revision, mtime_ns=item.mtime_ns)


def _keep(instance: Instance, other: Other, progress: Callable[[int], None] | None = None) -> str | None:
    """Make the object a file of ``lost+found``; its key there. None: somebody is writing the file, or has changed it.

    The artifact gets an object key where nothing is: what it had is in storage no more.
    """
    record, item, meta = other
    content, etag = drafts.hash_object(instance.store, item.key, progress)
    if etag != item.etag:
        return None
    found = record_of(instance, item, meta, content)
    place = instance.registry.rescue.keep_object(
        names(instance, item, meta, record.place),
        found,
        mtime_ns=item.mtime_ns,
        instead=(record, f"{AUTO_KEY_PREFIX}{record.uid}.{new_uid(6)}{record.suffix}"),
    )
    if place is not None:
        url = instance.store.url(item.key)
        log.warning("The object %s was not what was saved of '%s'; it is '%s' now.", url, record.place, place)
    return place


def look_at(store: ObjectStore, object_key: str) -> tuple[ObjectStat | None, Over]:
    """conflicts.look, by this thread."""
    return finish(conflicts.look(DirectWorker(store), object_key))


def is_own(instance: Instance, found: ObjectStat) -> bool:
    """conflicts.is_own, by this thread."""
    return finish(conflicts.is_own(instance.registry, DirectWorker(instance.store), found))


def keep_before(instance: Instance, record: ArtifactRecord | None, object_key: str) -> None:
    """Before a save writes an object: what is in it, and unknown, becomes a file of ``lost+found``, and another object
    has to be written then if it is not that of ``record``. ``record``: the artifact that is written, if there is one.

    Raises ObjectChanged when that cannot be kept now, and storage errors.
    """
    if instance.registry.journal.is_claimed(object_key):
        found = None if is_private(object_key) else look_at(instance.store, object_key)[0]
        if found is None or is_own(instance, found):
            return
    url = instance.store.url(object_key)
    if record is not None and object_key == record.revision.object_key:
        other = look(instance, record)
        if other is not None and _keep(instance, other) is None:
            raise ObjectChanged(f"Somebody else has changed the object {url}, or is writing its file; try again later.")
    elif record is not None or not is_private(object_key):  # else: a name that was just made
        _keep_unknown(instance, object_key)


def _keep_unknown(instance: Instance, object_key: str) -> None:
    """What is in an object that is no artifact's, if there is one, becomes a file of ``lost+found``."""
    try:
        item = instance.store.head(object_key)
        meta = instance.store.meta(object_key)
        content, etag = drafts.hash_object(instance.store, object_key)
    except (ObjectMissing, drafts.FileMissing):
        return
    except StorageError as error:
        if error.errno == errno.ELOOP:
            return  # a link is no object: what is stored takes its place
        raise
    url = instance.store.url(object_key)
    record = record_of(instance, item, meta, content)
    record.revision = Revision(content, object_key, etag)
    place = instance.registry.rescue.keep_object(names(instance, item, meta), record, mtime_ns=item.mtime_ns)
    if place is None:
        raise ObjectChanged(f"The object {url} got an artifact meanwhile; try again.")
    log.warning("The object %s was nobody's; it is '%s' now.", url, place)


# -- what is kept -----------------------------------------------------------------------------------------------------


def record_of(instance: Instance, item: ObjectStat, meta: ObjectMeta | None, content: ContentHash) -> ArtifactRecord:
    """The artifact that is made of an unknown object, with the uid that it says, if none has that."""
    said = meta.uid if meta is not None else None
    uid = said if said is not None and instance.registry.artifacts.by_uid(said) is None else new_uid()
    record = ArtifactRecord(
        uid=uid,
        key=None,
        suffix="",
        revision=Revision(content, item.key, item.etag),
        description=_description(instance, item, meta, meta is None or _is_said(meta, content)),
        number=(meta.revision if meta is not None else None) or 1,
    )
    user = instance.user()
    record.created_by_id = user.id if user is not None else None
    return record


def names(instance: Instance, item: ObjectStat, meta: ObjectMeta | None, place: str | None = None) -> Sequence[str]:
    """Names for it, the one that is wanted most first. ``place``: where it shows whose object it should have been."""
    key = meta.key if meta is not None and meta.key is not None else place or item.key
    name = root_path(key)[1]
    if meta is None:
        return (name,)
    if instance.registry.artifacts.by_uid(meta.uid) is not None and meta.revision is not None:
        # Of that artifact it is an older or a newer revision.
        return (name_with(name, f"revision {meta.revision}"), name_with(name, meta.uid))
    return (name, name_with(name, meta.uid))


def _is_said(meta: ObjectMeta, content: ContentHash) -> bool:
    """Whether the bytes are those that the object says, where it does."""
    return meta.hash in (None, f"{content.hash_type}:{content.hash}")


def _description(instance: Instance, item: ObjectStat, meta: ObjectMeta | None, right: bool) -> str:
    was = f"was the object {item.key}"
    if meta is not None:
        was = f"was {meta.key or meta.uid}{'…' if meta.cut else ''}"
        if meta.revision is not None:
            was += f", revision {meta.revision}"
        if instance.registry.artifacts.by_uid(meta.uid) is not None:
            was += f", of the artifact {meta.uid}"
    text = f"{was}, found {iso(now_ns())[:10]}"
    return text if right else f"{text}; its bytes are not those that were stored ({meta.hash if meta else ''})"
