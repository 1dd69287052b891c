"""Finds objects at an artifact's key that are not the revision in this registry, and mends that. Synchronous, any
thread.

A revision with a real key is written over the one before, in the same object; older versions did so with every key.
When another machine was taken over from an old copy of the registry, such an object has newer bytes than the registry
knows, and may be their only copy. An object that says it is a later revision of the same artifact, and has the bytes
that it says, becomes the artifact's content. Any other object becomes a file of ``lost+found``, where it is in storage.
Nothing is deleted.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lamfs.errors import InvalidName, LamfsError, ObjectMissing, StorageError, StorageUnavailable
from lamfs.model import ArtifactRecord, ObjectMeta, Revision, iso, now_ns
from lamfs.ops import alone
from lamfs.ops.instance import Instance
from lamfs.storage.base import ObjectStat
from lamfs.work import conflicts, direct, unknown
from lamfs.work.direct import DirectWorker, finish

log = logging.getLogger("lamfs.newer")

READ_MOST = 256 << 20
"""Bytes that a check without a repair reads in all, to tell damaged objects from copies."""


class Other(NamedTuple):
    """An object that is not the revision of ``record``, and the metadata that it has."""

    record: ArtifactRecord
    item: ObjectStat
    meta: ObjectMeta | None

    @property
    def is_later(self) -> bool:
        """Whether its metadata says that it is a later revision of that artifact."""
        meta = self.meta
        return meta is not None and meta.uid == self.record.uid and (meta.revision or 0) > self.record.number

    @property
    def is_itself(self) -> bool:
        """Whether its metadata says that it is that very revision: then it is damaged, or a copy."""
        return self.meta is not None and self.meta.uid == self.record.uid and self.meta.hash == self.record.meta.hash

    @property
    def is_elsewhere(self) -> bool:
        """Whether its object key is not the one in the registry."""
        return self.item.key != self.record.revision.object_key

    @property
    def is_same_number(self) -> bool:
        """Whether its metadata has the number of the artifact's revision in the registry."""
        return self.meta is not None and (self.meta.uid, self.meta.revision) == (self.record.uid, self.record.number)

    @property
    def told(self) -> str:
        """A description for people."""
        if self.is_later:
            what = "a later revision than this registry knows"
        elif self.is_elsewhere:
            what = "that revision"
        else:
            what = "something that this registry does not know"
        return f"{what} ({told(self.item, self.meta)})"


class Wrong(NamedTuple):
    """An artifact whose object is wrong. ``problem``: in words that follow "the object … of …"."""

    record: ArtifactRecord
    problem: str


class Seen(NamedTuple):
    """An artifact whose object is wrong, and the ``other`` object that is in storage instead; None: nothing useful
    is."""

    wrong: Wrong
    other: Other | None
    url: str = ""

    @property
    def what(self) -> str:
        """The problem, and the object that is there."""
        if self.other is None:
            return self.wrong.problem
        where = f"at {self.url}" if self.other.is_elsewhere else "there"
        return f"{self.wrong.problem}; {where} is {self.other.told}"

    @property
    def named(self) -> Wrong:
        """The artifact and its problem, with what a repair does."""
        if self.other is None:
            return self.wrong
        is_content = self.other.is_later or self.other.is_elsewhere
        ways = "makes that its content" if is_content else "puts that into lost+found"
        return Wrong(self.wrong.record, f"{self.what}; 'lamfs fsck --repair' {ways}")


class Mended(NamedTuple):
    """The outcome of a repair. ``text``: a sentence, if something was done; ``left``: the problem that remains;
    ``used``: the object key that belongs to an artifact now."""

    text: str | None
    left: Wrong | None
    used: str | None


def told(item: ObjectStat, meta: ObjectMeta | None) -> str:
    """Size and time of an object, and its metadata, for people."""
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
    """The object in the place of an artifact's bytes; None: it is right, or missing. Raises storage errors."""
    try:
        item = finish(conflicts.object_at(DirectWorker(instance.store), record.revision.object_key))
        if item is None or (item.size, item.etag) == (record.size, record.revision.etag):
            return None
        return Other(record, item, instance.store.meta(item.key))
    except (InvalidName, ObjectMissing):
        return None  # no object has such a key, or the object has just gone
    except StorageError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise


def find(
    instance: Instance, wrong: Iterable[Wrong], unknown: Iterable[tuple[ObjectStat, ObjectMeta | None]], *, shared: bool
) -> list[Seen]:
    """Find what storage has instead of the right objects of artifacts. An artifact's other object is in the same place,
    or it is the latest revision of the artifact among the objects that are ``unknown`` to the registry. ``shared``:
    other instances use this storage."""
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
            # The very revision that was saved: damage, or, in a storage that others share, perhaps theirs.
            other = None if other.is_elsewhere or other.is_itself or shared else other
        seen.append(Seen(each, other, "" if other is None else instance.store.url(other.item.key)))
    return seen


def _changed(instance: Instance, other: Other, problem: str, *, read: bool) -> str:
    """The problem of an object that says it is the revision in the registry. ``read``: compare the bytes when the sizes
    are equal. Raises StorageUnavailable."""
    record, item, _ = other
    right = None if item.size == record.size else False
    if right is None and read:
        try:
            content, etag = direct.hash_object(instance.store, item.key)
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
    """Mend an artifact: make its other object its content, or a file of ``lost+found``. All of the object is read.

    ``progress`` gets how many bytes. Raises StorageUnavailable.
    """
    wrong, other, _ = seen
    if other is None:
        return Mended(None, wrong, None)
    record, url = wrong.record, instance.store.url(wrong.record.revision.object_key)
    what = f"the object {url} of '{record.place}' {seen.what}"
    try:
        if _make_content(instance, other, progress):
            text = f"{what}; that is its content now"
            if other.is_later:
                text += f", and the {record.size} bytes of revision {record.number} are in storage no more"
            return Mended(text, None, other.item.key)
        if other.is_elsewhere:
            return Mended(None, wrong, None)  # it is kept as an orphan
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


def _make_content(instance: Instance, other: Other, progress: Callable[[int], None] | None) -> bool:
    """Make a revision in storage the content of its artifact. Returns whether it is.

    It is not when its bytes differ from what its metadata says, or somebody writes the file.
    """
    record, item, meta = other
    if meta is None or meta.revision is None or not (other.is_later or (other.is_elsewhere and other.is_same_number)):
        return False
    content, etag = direct.hash_object(instance.store, item.key, progress)
    if etag != item.etag or not unknown.is_said(meta, content):
        return False
    if not other.is_later and not content.same_bytes(record.revision.content):
        return False
    revision = Revision(content, item.key, etag)
    return instance.registry.commits.adopt(record, revision, meta.revision, mtime_ns=item.mtime_ns, now=now_ns())


def _keep(instance: Instance, other: Other, progress: Callable[[int], None] | None) -> str | None:
    """Make the object a file of ``lost+found``. Returns its key there; None: somebody writes the file, or did."""
    record, item, meta = other
    content, etag = direct.hash_object(instance.store, item.key, progress)
    if etag != item.etag:
        return None
    place = unknown.keep(instance.registry, alone.user_id(instance), item, meta, content, record)
    if place is not None:
        url = instance.store.url(item.key)
        log.warning("The object %s was not what was saved of '%s'; it is '%s' now.", url, record.place, place)
    return place
