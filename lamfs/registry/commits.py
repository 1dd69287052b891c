"""Commits: what was done in storage becomes registry rows, in one transaction each. The Database's thread.

The order is object first, registry row second, stale object last (docs/ARCHITECTURE.md). These are the "row" steps:
each removes the journal row, and journals the deletion of the object that has become stale.
"""

from __future__ import annotations

import dataclasses
import itertools
import stat
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from lamfs.errors import AlreadyExists, NotFound
from lamfs.keys import (
    conflict_name,
    is_in_place,
    is_private,
    key_with_suffix,
    object_key_for,
    revision_key,
    suffix_of,
)
from lamfs.model import (
    AUTO_INO,
    BLOCK_SIZE,
    DESCRIPTION_XATTR,
    TRASH,
    ArtifactRecord,
    ContentHash,
    ObjectMeta,
    Revision,
)
from lamfs.registry.artifacts import Artifacts, Provenance
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.entries import Put, Save, save_payload
from lamfs.registry.journal import Journal
from lamfs.registry.namespace import Namespace
from lamfs.registry.partial_spools import PartialSpools, base_id
from lamfs.registry.seals import Seals
from lamfs.registry.tree import Tree


@dataclass(slots=True)
class Committed:
    """Outcome of a put. ``record`` is None if the file was deleted meanwhile, or became scratch (then not
    ``current``). The object is stale already in both cases.

    ``current``: nothing was written to the file after what was stored. ``spool``: name of the spool file that is free.
    """

    record: ArtifactRecord | None
    current: bool
    spool: str | None = None


@dataclass(slots=True)
class Conflict:
    """Where the bytes of a put are after somebody else changed its object: inode, directory and name."""

    ino: int
    parent: int
    name: str


class Announced(NamedTuple):
    """A save that is about to be stored under ``object_key``. ``before``: the artifact as it is; None: it is new.
    ``was_claimed``: an earlier try may have made the object."""

    entry_id: int
    object_key: str
    before: ArtifactRecord | None
    was_claimed: bool


class NewObject(NamedTuple):
    """A put of a new file that is about to be stored under ``object_key``. ``meta``: what the object is to say of
    itself; ``twin``: a revision with the same bytes, that may be copied."""

    entry: Put
    content: ContentHash
    object_key: str
    meta: ObjectMeta
    twin: Revision | None


class Stored(NamedTuple):
    """The content of a put's spool file is in an object."""

    entry: Put
    content: ContentHash
    object_key: str
    etag: str


class Commits:
    """Writes the outcome of storage work into one Database.

    ``now``: the time of a change, in nanoseconds since the epoch.
    """

    def __init__(
        self,
        db: Database,
        tree: Tree,
        artifacts: Artifacts,
        journal: Journal,
        changes: ChangeLog,
        namespace: Namespace,
    ) -> None:
        self._db = db
        self._tree = tree
        self._artifacts = artifacts
        self._journal = journal
        self._changes = changes
        self._namespace = namespace
        self._partial_spools = PartialSpools(db)
        self._seals = Seals(db)

    # -- puts (the mount) ---------------------------------------------------------------------------------------

    def put_target(self, entry: Put) -> str:
        """The object key for the content of a put row: the artifact's real key, or a name that none of its revisions
        has had. If an earlier try began to store under such a name, that name.

        While another artifact's bytes are still at the real key (its move is pending), or another process works on it:
        a name below ``.lamindb/``, and a move follows.
        """
        artifact = self._artifacts.by_ino(entry.ino)
        if artifact is not None:
            uid, suffix, key, virtual = artifact.uid, artifact.suffix, artifact.key, artifact.key_is_virtual
        else:
            uid = entry.uid
            key, suffix = self._key_of(entry.ino)
            virtual = entry.key_is_virtual
        return self._free_object(uid, suffix, key, virtual, artifact, entry)

    def put_meta(self, entry: Put, content: ContentHash | None) -> ObjectMeta:
        """The metadata of a put row's object. ``content``: its bytes, if they are known before they are stored, and
        cannot change meanwhile."""
        artifact = None if entry.ino is None else self._artifacts.by_ino(entry.ino)
        if artifact is None:
            key = None if entry.ino is None else self._key_of(entry.ino)[0]
            return ObjectMeta.of(entry.uid or "", key, 1, content)
        same = content is not None and content.same_bytes(artifact.revision.content)
        return ObjectMeta.of(artifact.uid, artifact.key, artifact.number + (not same), content)

    def new_object(self, entry: Put, content: ContentHash) -> tuple[str, ObjectMeta]:
        """The results of put_target and put_meta for a put row whose file is not an artifact yet."""
        key, suffix = self._key_of(entry.ino)
        virtual = entry.key_is_virtual
        target = self._free_object(entry.uid, suffix, key, virtual, None, entry)
        return target, ObjectMeta.of(entry.uid, key, 1, content)

    def announce_many(self, files: Iterable[tuple[Put, ContentHash]], busy: Set[str]) -> list[NewObject]:
        """Choose and note the objects of many small files, which are no artifacts yet and have these bytes.

        Left out are files whose bytes are not those with which they were closed, files that an earlier try may have
        stored elsewhere or that another process has taken over, and those whose object is in ``busy``.
        """
        found: list[NewObject] = []
        taken: set[str] = set()
        with self._db.transaction():
            for entry, content in files:
                target, meta = self.new_object(entry, content)
                if target in busy or target in taken or entry.object_key not in (None, target):
                    continue
                if not self._seal(entry, content) or not self._journal.claim_target(entry.id, target):
                    continue
                twins = self._artifacts.same_content(content, 1)
                found.append(NewObject(entry, content, target, meta, twins[0].revision if twins else None))
                taken.add(target)
        return found

    def _seal(self, entry: Put, content: ContentHash) -> bool:
        """Make the hashes of a spool file its seal. False, and nothing is noted, when it is not what it was when it was
        closed, as far as that is known."""
        known = self._seals.of(entry.src)
        if entry.damaged if known is None else known.broken(content):
            return False
        self._seals.complete(entry, content, known)
        return True

    def save_meta(self, record: ArtifactRecord) -> ObjectMeta:
        """The metadata of the object of an artifact that is about to be saved."""
        old, content = self._artifacts.by_uid(record.uid), record.revision.content
        number = 1 if old is None else old.number + (not content.same_bytes(old.revision.content))
        return ObjectMeta.of(record.uid, record.key, number, content)

    def _free_object(
        self,
        uid: str,
        suffix: str,
        key: str | None,
        virtual: bool,
        known: ArtifactRecord | None,
        entry: Put | None,
    ) -> str:
        """The object key for new bytes of an artifact: its real key, else a name below ``.lamindb/``. Never a key with
        another artifact's bytes, or with storage work of others under way. ``known``: the artifact as it is now.
        ``entry``: the put that writes the bytes."""
        row = None if entry is None else entry.id
        place = object_key_for(uid, suffix, key, virtual)
        if not is_private(place) and not (
            self._artifacts.in_the_way(place, uid) or self._journal.claimed(place, uid, row)
        ):
            return place
        begun = None if entry is None or entry.doubted else entry.object_key
        if (
            begun is not None
            and is_in_place(begun, uid, suffix, None, True)
            and self._artifacts.with_object(begun) is None
        ):
            return begun
        names: Iterator[str]
        if known is None:
            plain = object_key_for(uid, suffix, None, True)
            names = itertools.chain([plain], (revision_key(uid, suffix, more) for more in itertools.count(2)))
        else:
            names = self._artifacts.private_keys(dataclasses.replace(known, suffix=suffix), known.number + 1)
        return next(name for name in names if self._journal.is_free(name, row))

    def _key_of(self, ino: int) -> tuple[str | None, str]:
        first = self._tree.first_name(ino)
        if first is None:
            return None, ""
        return (None if first[0] == AUTO_INO else self._tree.path_at(*first)), suffix_of(first[1])

    def put(
        self,
        ino: int,
        gen: int,
        content: ContentHash,
        object_key: str,
        etag: str,
        origin: Provenance,
        *,
        now: int,
        taken: str | None = None,
        row: int | None = None,
    ) -> Committed:
        """The bytes of generation ``gen`` of inode ``ino`` are in ``object_key``: save or replace its artifact.

        ``taken``: name of the spool file, if a rename turned it into the object itself. ``row``: the journal row of
        this work. If it is not the inode's put any more, another process has newer bytes, and this object is dropped.
        """
        with self._db.transaction():
            entry = self._journal.put_of(ino)
            if row is not None and (entry is None or entry.id != row):
                found = self._journal.get(row)
                if found is None:
                    self._drop_object(object_key, now)
                return Committed(None, current=entry is None and found is None)
            artifact = self._artifacts.by_ino(ino)
            inode = self._tree.get(ino)
            if entry is None or inode is None or not stat.S_ISREG(inode.mode):
                if entry is not None:
                    # Written through a handle after somebody deleted the file for good.
                    self._journal.done(entry.id)
                self._drop_object(object_key, now)
                return Committed(None, current=True)
            revision = Revision(content, object_key, etag)
            before, made = artifact.size if artifact is not None else 0, False
            if artifact is None and entry.state == "scratch" and taken is None:
                # It got a scratch name during the upload: it stays in the spool.
                self._journal.set_target(entry.id, None)
                self._drop_object(object_key, now)
                return Committed(None, current=False)
            if artifact is None:
                key, suffix = self._key_of(ino)
                description = self._tree.take_xattr(ino, DESCRIPTION_XATTR)
                artifact = ArtifactRecord(
                    uid=entry.uid, key=key, suffix=suffix, revision=revision,
                    description=description.decode() if description else None,
                    key_is_virtual=entry.key_is_virtual,
                    created_by_id=origin.user_id, run_id=origin.run_id, transform_id=origin.transform_id,
                    created_at=now, updated_at=now, ino=ino,
                )  # fmt: skip
                self._artifacts.insert(artifact)
                made = not content.leaves  # leaf hashes are not kept in memory
            elif artifact.revision != revision:
                if artifact.revision.object_key != object_key:
                    self._journal.add_delete(
                        artifact.revision.object_key, artifact.revision.etag, now=now, uid=artifact.uid
                    )
                same = content.same_bytes(artifact.revision.content)
                self._artifacts.set_revision(
                    artifact, revision, updated_at=artifact.updated_at if same else now, origin=origin
                )
            self._journal.said(object_key)
            self._move_home(artifact, object_key, now)
            # Scratch only now, but its only bytes have gone to storage: so it is an artifact.
            current = entry.gen == gen and entry.state in ("ready", "scratch")
            if entry.state == "scratch":
                self._journal.set_scratch(ino, False)
            if current:
                self._journal.done(entry.id)
                self._tree.update(ino, size=content.size)
            elif entry.src != taken:
                # The rest of this put is not in storage yet, and the object now belongs to the artifact. (A close of
                # the very file that was taken counted a generation meanwhile: then the object is where its bytes are.)
                self._journal.set_target(entry.id, None)
            if not current and entry.base is not None:
                # Later writes went into a copy of the partial spool that was stored. The blocks that the copy lacks are
                # in this revision. It lacks none of the blocks by which the file has grown.
                self._partial_spools.add(entry.src, range(-(-before // BLOCK_SIZE), -(-content.size // BLOCK_SIZE)))
                self._journal.set_base(ino, base_id(content))
            self._changes.content(ino)
            return Committed(artifact if made else self._artifacts.by_ino(ino), current, entry.src if current else None)

    def put_many(self, files: Iterable[Stored], origin: Provenance, *, now: int) -> dict[int, Committed]:
        """As put, of many files in one transaction; the outcomes by journal row."""
        with self._db.transaction():
            return {
                file.entry.id: self.put(
                    file.entry.ino, file.entry.gen, file.content, file.object_key, file.etag, origin, now=now,
                    row=file.entry.id,
                )
                for file in files
            }  # fmt: skip

    def give_up_target(self, entry_id: int, object_key: str, etag: str, *, now: int) -> None:
        """An earlier try of a put has made an object with other bytes: owe its deletion, and let the put choose another
        one."""
        with self._db.transaction():
            self._journal.unclaim(entry_id, object_key)
            self._journal.add_delete(object_key, etag, now=now)

    def deleted(self, entry_ids: Iterable[int]) -> None:
        """The objects of these rows are gone: strike them off."""
        with self._db.transaction():
            for entry_id in entry_ids:
                self._journal.done(entry_id)

    def _drop_object(self, object_key: str, now: int) -> None:
        """Journal the deletion of an object, unless an artifact has it."""
        if self._artifacts.with_object(object_key) is None:
            self._journal.add_delete(object_key, now=now)

    def put_unneeded(self, ino: int, gen: int, *, now: int, row: int | None = None) -> Committed:
        """Generation ``gen`` of an inode has the content that its artifact has already: only the journal row goes.
        ``row``: as in put."""
        with self._db.transaction():
            entry = self._journal.put_of(ino)
            if entry is not None and row is not None and entry.id != row:
                return Committed(None, current=False)
            if entry is None:
                return Committed(None, current=True)
            current = entry.gen == gen and entry.state in ("ready", "scratch")
            artifact = self._artifacts.by_ino(ino)
            if current:
                if entry.object_key is not None and is_private(entry.object_key) and not entry.doubted:
                    self._drop_object(entry.object_key, now)  # an earlier try may have stored other bytes there
                self._journal.done(entry.id)
                if artifact is not None:
                    self._tree.update(ino, size=artifact.size)
            return Committed(artifact, current, entry.src if current else None)

    def abandon_put(self, entry: Put, *, now: int) -> None:
        """The file of a put is gone: strike the put off, and owe the deletion of the object that it may have made.

        The object stays when it may be another machine's.
        """
        with self._db.transaction():
            self._journal.done(entry.id)
            if entry.object_key is not None and not entry.doubted:
                self._drop_object(entry.object_key, now)

    def conflict(
        self,
        entry_id: int,
        content: ContentHash,
        object_key: str,
        etag: str,
        origin: Provenance,
        *,
        now: int,
        copy_uid: str,
    ) -> Conflict | None:
        """Somebody else has put ``content`` into the object that a put is about to write. The file gets that content,
        and the put's bytes become a new file beside it, whose artifact will be ``copy_uid``. None: the put is not
        pending any more."""
        with self._db.transaction():
            entry = self._journal.get_put(entry_id)
            inode = self._tree.get(entry.ino) if entry is not None else None
            first = self._tree.first_name(inode.ino) if inode is not None else None
            if entry is None or inode is None or first is None:
                return None
            parent, name = first
            at = datetime.fromtimestamp(now / 1e9).strftime("%Y-%m-%d %H.%M.%S")
            count, beside = 1, conflict_name(name, at)
            while self._tree.lookup(parent, beside) is not None:
                count += 1
                beside = conflict_name(name, f"{at} {count}")
            copy = self._tree.new_inode(inode.mode, inode.uid, inode.gid, now=now)
            self._tree.add_entry(parent, beside, copy, now)
            self._tree.update(copy.ino, size=inode.size, mtime_ns=inode.mtime_ns, ctime_ns=now, blocks=inode.blocks)
            revision = Revision(content, object_key, etag)
            artifact = self._artifacts.by_ino(inode.ino)
            if artifact is not None:
                if artifact.revision.object_key != object_key:
                    self._journal.add_delete(
                        artifact.revision.object_key, artifact.revision.etag, now=now, uid=artifact.uid
                    )
                self._artifacts.set_revision(artifact, revision, updated_at=now, origin=origin)
            else:
                key, suffix = self._key_of(inode.ino)
                self._artifacts.insert(
                    ArtifactRecord(
                        uid=entry.uid, key=key, suffix=suffix, revision=revision, key_is_virtual=False,
                        created_by_id=origin.user_id, created_at=now, updated_at=now, ino=inode.ino,
                    )
                )  # fmt: skip
            self._db.execute(
                "UPDATE journal SET ino=?, uid=?, object_key=NULL WHERE id=?", (copy.ino, copy_uid, entry_id)
            )
            self._journal.said(object_key)
            self._tree.update(inode.ino, size=content.size, mtime_ns=now, ctime_ns=now, blocks=None)
            self._tree.bump_revision(inode.ino)
            self._changes.entry(parent, beside, copy.ino)
            self._changes.content(inode.ino)
            return Conflict(copy.ino, parent, beside)

    def _move_home(self, artifact: ArtifactRecord, object_key: str, now: int) -> None:
        if self._artifacts.home(artifact, object_key) != object_key:
            self._journal.add_move(artifact.uid, now=now)

    # -- saves (the Python API and the CLI) ---------------------------------------------------------------------

    def save_target(self, record: ArtifactRecord) -> str:
        """The object key under which a save of ``record`` would be stored now."""
        known = self._artifacts.by_uid(record.uid)
        return self._free_object(record.uid, record.suffix, record.key, record.key_is_virtual, known, None)

    def announce_save(
        self, record: ArtifactRecord, *, now: int, foreign: str | None = None, mode: int = 0o644
    ) -> Announced:
        """Journal a save of ``record``, whose ETag is not known yet, under an object key where no other artifact has
        its bytes.

        ``foreign``: ETag of an object at the artifact's home that is not an artifact's. The payload keeps it, unless it
        is lamfs's own object with a pending deletion.
        """
        with self._db.transaction():
            home = object_key_for(record.uid, record.suffix, record.key, record.key_is_virtual)
            object_key = self.save_target(record)
            old = self._artifacts.by_uid(record.uid)
            owed = None if old is None or old.ino is None else self._journal.put_of(old.ino)
            if owed is not None and owed.base is not None:
                raise AlreadyExists(
                    f"'{record.key or record.uid}' has changes that a mount has still to store, and which need the"
                    " bytes that would be replaced; run 'lamfs sync' first."
                )
            was_claimed = self._journal.is_claimed(object_key)
            base = None if old is None else (old.revision.object_key, old.revision.etag)
            # The object of a deletion that is owed is written over in a moment, and struck off then. A key that another
            # process is about to delete was not chosen above.
            if self._journal.owes_any_delete(object_key) or object_key != home:
                foreign = None
            payload = save_payload(record, base=base, mode=mode, foreign=foreign)
            entry_id = self._journal.add_save(record.uid, object_key, payload, now=now)
            return Announced(entry_id, object_key, old, was_claimed)

    def save(
        self, entry_id: int, record: ArtifactRecord, etag: str, *, mode: int, uid: int, gid: int, now: int
    ) -> ArtifactRecord:
        """The bytes of ``record`` are in storage: insert or update its row, name it in the tree, journal the deletion
        of the stale object.

        Raises AlreadyExists if the key was taken meanwhile, NotFound if the artifact was deleted for good. Then nothing
        has changed, and the caller abandons the save.
        """
        with self._db.transaction():
            content, object_key = record.revision.content, record.revision.object_key
            revision = Revision(content, object_key, etag)
            old = self._artifacts.by_uid(record.uid)
            if old is None:
                entry = self._journal.get(entry_id)
                if isinstance(entry, Save) and entry.base is not None:
                    raise NotFound(f"The artifact {record.uid} was deleted for good while it was being replaced.")
                inode = self._tree.new_inode(stat.S_IFREG | mode, uid, gid, now=now)
                self._namespace.place(inode, record.key, record.uid, record.suffix, now=now)
                record.ino, record.revision = inode.ino, revision
                record.created_at = record.updated_at = now
                self._artifacts.insert(record)
            else:
                assert old.ino is not None
                record.ino = old.ino
                if old.revision.object_key != object_key:
                    self._journal.add_delete(old.revision.object_key, old.revision.etag, now=now, uid=old.uid)
                origin = Provenance(record.created_by_id, record.run_id, record.transform_id)
                self._artifacts.set_revision(old, revision, updated_at=now, origin=origin)
                self._artifacts.update(
                    record.uid, description=record.description, accessor=record.accessor, suffix=record.suffix,
                    run_id=record.run_id, transform_id=record.transform_id,
                )  # fmt: skip
                if record.suffix != old.suffix and old.visibility > -1:
                    self._rename_for_suffix(old, record, now)
            self._journal.said(object_key)
            self._journal.drop_delete(object_key)
            ino = record.ino
            self._tree.update(ino, size=content.size, mtime_ns=now, ctime_ns=now, blocks=None)
            # A mount's own writes to this inode stay pending and are stored later; until then it shows a new revision.
            self._tree.bump_revision(ino)
            self._changes.content(ino)
            saved = self._artifacts.by_uid(record.uid)
            assert saved is not None
            self._move_home(saved, object_key, now)
            self._journal.done(entry_id)
            return saved

    def _rename_for_suffix(self, old: ArtifactRecord, record: ArtifactRecord, now: int) -> None:
        """Rename the file in the tree after a replace changed the suffix."""
        assert old.ino is not None
        names = self._tree.names(old.ino)
        if not names:
            return
        parent, name = names[0]
        # Use the present name: the file may have been renamed during the upload.
        new_name = record.uid + record.suffix if old.key is None else key_with_suffix(name, old.suffix, record.suffix)
        if new_name == name:
            return
        inode = self._tree.get(old.ino)
        assert inode is not None
        if self._tree.lookup(parent, new_name) is not None:
            raise AlreadyExists(f"The name '{new_name}' beside '{name}' is taken; rename or delete what is there.")
        self._tree.move_entry(parent, name, parent, new_name, inode, now)
        self._artifacts.update(record.uid, key=None if parent == AUTO_INO else self._tree.path(old.ino))
        self._changes.entry(parent, name, old.ino)
        self._changes.entry(parent, new_name, old.ino)

    def abandon_save(self, entry_id: int, object_key: str, *, now: int, delete: bool) -> None:
        """A save failed, or its process died: remove its row. ``delete``: journal the deletion of the object that it
        may have left.

        The object stays if it holds the bytes of an artifact.
        """
        with self._db.transaction():
            self._journal.done(entry_id)
            if delete:
                self._drop_object(object_key, now)

    # -- moves --------------------------------------------------------------------------------------------------

    def move_plan(self, uid: str, *, now: int) -> tuple[ArtifactRecord, str] | None:
        """Where the object of an artifact has to go: its record and the object key to copy to. None: nowhere.

        While another artifact's bytes are at the destination, the plan is a name below ``.lamindb/``. That breaks
        cycles of renames (a→b, b→a). The rest of the way stays pending.
        """
        artifact = self._artifacts.by_uid(uid)
        if artifact is None:
            return None
        home = self._artifacts.home(artifact)
        at = artifact.revision.object_key
        if at == home:
            return None
        if self._journal.claimed(at, uid, None, moves=False):
            return None
        others_have = self._artifacts.with_object
        aside = (name for name in self._artifacts.private_keys(artifact, artifact.number) if others_have(name) is None)
        for target in (home,) if is_private(at) and not is_private(home) else (home, next(aside)):
            others = self._artifacts.in_the_way(target, uid)
            if others:
                for other in others:
                    if other.visibility == TRASH or self._artifacts.home(other) != other.revision.object_key:
                        # Nothing else makes it give way: it is in the trash, or was found where it is.
                        self._journal.add_move(other.uid, now=now)
                continue
            return None if self._journal.claimed(target, uid, None, moves=False) else (artifact, target)
        return None

    def is_home(self, uid: str) -> bool:
        """Whether the object of an artifact is where its key and suffix require. True if there is no such artifact."""
        artifact = self._artifacts.by_uid(uid)
        return artifact is None or artifact.revision.object_key == self._artifacts.home(artifact)

    def begin_move(self, uid: str, object_key: str, *, now: int) -> None:
        """The object of an artifact is about to be copied to ``object_key``. The deletion of the copy is pending until
        ``moved`` says that the copy is there."""
        with self._db.transaction():
            self._journal.drop_delete(object_key)
            self._journal.add_delete(object_key, now=now, copy_of=uid)

    def give_up_move(self, entry_id: int, object_key: str) -> None:
        """The object that was to be copied to ``object_key`` is gone, or has changed. The object at ``object_key`` may
        be the copy, made before this registry lost its last changes: so leave it alone."""
        with self._db.transaction():
            self._journal.drop_delete(object_key)
            self._journal.done(entry_id)

    def moved(self, entry_id: int, before: ArtifactRecord, object_key: str, etag: str, *, now: int) -> bool:
        """The object was copied: point the row at the copy and journal the deletion of the original.

        False if the artifact has other bytes by now. Then the copy is stale, unless it is in use.
        """
        with self._db.transaction():
            known = self._artifacts.by_uid(before.uid)
            if known is None or known.revision != before.revision:
                return False  # the deletion that begin_move journaled is still due
            self._journal.drop_delete(object_key)
            self._artifacts.set_object(before.uid, object_key, etag)
            self._journal.add_delete(before.revision.object_key, before.revision.etag, now=now, uid=before.uid)
            if object_key == self._artifacts.home(known):
                self._journal.done(entry_id)
            if known.ino is not None:
                self._changes.record(known.ino)
            return True

    def adopt(self, before: ArtifactRecord, revision: Revision, number: int, *, mtime_ns: int, now: int) -> bool:
        """An object in storage is revision ``number`` of an artifact, and the registry knows only an earlier revision
        or another object. It becomes the artifact's content, written at ``mtime_ns``, in nanoseconds since the epoch.

        False, with nothing changed, if the artifact has another revision by now, if somebody is writing it, or if the
        object is another artifact's.
        """
        with self._db.transaction():
            known = self._artifacts.by_uid(before.uid)
            if known is None or known.ino is None or known.revision != before.revision:
                return False
            if self._journal.is_written(known, revision.object_key):
                return False
            if revision.object_key != known.revision.object_key and self._artifacts.with_object(revision.object_key):
                return False
            same = revision.content.same_bytes(known.revision.content)
            if revision.object_key != known.revision.object_key:
                self._journal.add_delete(known.revision.object_key, known.revision.etag, now=now, uid=known.uid)
            self._artifacts.set_revision(known, revision, updated_at=known.updated_at if same else mtime_ns)
            self._artifacts.set_number(known.uid, number)
            self._journal.said(revision.object_key)
            if not same:
                self._tree.update(known.ino, size=revision.size, mtime_ns=mtime_ns, ctime_ns=now, blocks=None)
                self._tree.bump_revision(known.ino)
            self._changes.content(known.ino)
            self._move_home(known, revision.object_key, now)
            return True

    def same_bytes(self, before: ArtifactRecord, etag: str) -> bool:
        """The object of an artifact is a copy of the one that was saved: record its ETag. False if the artifact has
        another revision by now."""
        with self._db.transaction():
            now = self._artifacts.by_uid(before.uid)
            if now is None or now.revision != before.revision:
                return False
            self._artifacts.set_object(before.uid, before.revision.object_key, etag)
            if now.ino is not None:
                self._changes.record(now.ino)
            return True
