"""The artifact table: rows as ArtifactRecord. Synchronous; the Database's thread. Knows nothing of names in the tree.

Changes of several rows belong in one ``Database.transaction()``: namespace.py and commits.py open it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lamfs.hashing import zero_block, zero_leaves
from lamfs.keys import is_in_place, is_private, object_key_for, revision_key
from lamfs.model import AUTO_KEY_PREFIX, TRASH, ArtifactRecord, ContentHash, Revision
from lamfs.registry.conditions import clause
from lamfs.registry.db import Database

_COLUMNS = (
    "a.id, a.uid, a.storage_id, a.key, a.suffix, a.description, a.accessor, r.size, r.hash, r.hash_type, r.blocks,"
    " r.object_key, r.etag, a.visibility, a.key_is_virtual, a.created_by_id, a.run_id, a.transform_id, a.created_at,"
    " a.updated_at, a.ino, r.head, r.number, a.used"
)
NOW = "artifact a JOIN revision r ON r.id=a.revision_id AND a.id=r.artifact_id"
"""Artifacts with their current revision. (The second condition lets SQLite go from either table to the other.)"""
_MARK = 8
"""Bytes of the block's own hash that precede its leaf hashes. They show which rows belong to content since replaced."""
_RENAMES = "(SELECT json_group_array(json_array(old, new)) FROM (SELECT old, new FROM rekey ORDER BY id))"
FEW = 100
"""With up to so many artifacts below it, a renamed directory changes their keys at once."""
STEP, PAUSE = 2000, 0.005
"""Keys that are changed in one transaction, and seconds between two of them for other writers."""


@dataclass(slots=True)
class Provenance:
    """The user, run and transform of a new artifact or revision."""

    user_id: int | None = None
    run_id: int | None = None
    transform_id: int | None = None


class Artifacts:
    """Reads and writes artifact rows of one Database. ``pause`` waits so many seconds."""

    def __init__(self, db: Database, pause: Callable[[float], None]) -> None:
        self._db = db
        self._pause = pause

    # -- keys below renamed directories -------------------------------------------------------------------------

    def settle(self, limit: int | None = None) -> bool:
        """Change the keys below renamed directories, in the order of the renames: at most ``limit`` rows, or all.

        Every search by key calls this first. Returns whether keys are left to change.
        """
        if limit is None and not self._db.conn.in_transaction:
            while self._settle(STEP):
                self._pause(PAUSE)
            return False
        return self._settle(limit)

    def _settle(self, limit: int | None) -> bool:
        while self._renames():
            with self._db.transaction():
                for id_, old, new in self._renames():
                    done = self._move_keys(old, new, -1 if limit is None else limit)
                    if limit is not None and (limit := limit - done) <= 0:
                        return True
                    self._db.execute("DELETE FROM rekey WHERE id=?", (id_,))
        return False

    def _make_way(self, key: str | None) -> None:
        """Before a living artifact gets ``key``: finish the pending renames if one of them would change that key
        too."""
        if key is not None and any(key.startswith(f"{old}/") for _, old, _ in self._renames()):
            self.settle()

    def _renames(self) -> list[tuple[Any, ...]]:
        """Renamed directories with keys that are still to change, as (id, old key, new key)."""
        return self._db.all("SELECT id, old, new FROM rekey ORDER BY id")

    def _move_keys(self, old: str, new: str, limit: int = -1) -> int:
        """Move at most ``limit`` keys from below ``old`` to below ``new``. Returns how many were moved."""
        return self._db.execute(
            "UPDATE artifact SET key=?||substr(key, ?) WHERE id IN"
            " (SELECT id FROM artifact WHERE key>=? AND key<? AND visibility>-1 LIMIT ?)",
            (new, len(old) + 1, *_below(old), limit),
        ).rowcount

    # -- reading ------------------------------------------------------------------------------------------------

    def by_uid(self, uid: str) -> ArtifactRecord | None:
        """The artifact with this uid, in the trash or not."""
        return self._one("uid=?", uid)

    def by_ino(self, ino: int) -> ArtifactRecord | None:
        """The artifact whose bytes inode ``ino`` shows."""
        return self._one("ino=?", ino)

    def has_ino(self, ino: int) -> bool:
        """Whether inode ``ino`` shows the bytes of an artifact."""
        return self._db.one("SELECT 1 FROM artifact WHERE ino=?", (ino,)) is not None

    def by_key(self, key: str) -> ArtifactRecord | None:
        """The artifact that has this key now, never one in the trash."""
        self.settle()
        return self._one("key=? AND visibility>-1", key)

    def trashed(self, key: str) -> ArtifactRecord | None:
        """The artifact in the trash that had this key: of several, the last one deleted."""
        return self._one("key=? AND visibility=-1 ORDER BY a.updated_at DESC, a.id DESC", key)

    def same_content(self, content: ContentHash, limit: int = -1) -> list[ArtifactRecord]:
        """Artifacts with exactly these bytes, of any visibility: the ``limit`` oldest, oldest first (-1: all)."""
        rows = self._db.all(
            f"SELECT {_COLUMNS}, {_RENAMES} FROM {NOW} WHERE r.hash=? AND r.size=? AND r.blocks=?"
            " ORDER BY a.id LIMIT ?",
            (content.hash, content.size, content.blocks, limit),
        )
        return [_record_now(row) for row in rows]

    def has_large(self, size: int) -> bool:
        """Whether there is an artifact of ``size`` bytes. ``size`` must be more than 64 MiB."""
        # With 'size>67108864' SQLite uses the index of large revisions.
        return self._db.one("SELECT 1 FROM revision WHERE size=? AND size>67108864 LIMIT 1", (size,)) is not None

    def sizes(self) -> set[int]:
        """The sizes of all artifacts, in bytes. Reads all rows."""
        return {row[0] for row in self._db.all("SELECT DISTINCT size FROM revision")}

    def with_object(self, object_key: str) -> ArtifactRecord | None:
        """The artifact whose bytes are in this object now."""
        return self._one("object_key=?", object_key)

    def home(self, record: ArtifactRecord, at: str | None = None) -> str:
        """The object key where an artifact's bytes belong. ``at``: where they are (None: where the record says).

        In the trash the object stays where it is, unless a living artifact needs that place. Several artifacts in the
        trash may have the same key.
        """
        at = record.revision.object_key if at is None else at
        if record.visibility == TRASH and (is_private(at) or not self._is_wanted(at)):
            return at
        key = None if record.visibility == TRASH else record.key
        if is_in_place(at, record.uid, record.suffix, key, record.key_is_virtual):
            return at
        place = object_key_for(record.uid, record.suffix, key, record.key_is_virtual)
        return next(self.private_keys(record, record.number)) if is_private(place) else place

    def private_keys(self, record: ArtifactRecord, number: int) -> Iterator[str]:
        """Object keys below ``.lamindb/`` for revision ``number`` of an artifact, best first, without its present
        object key. The first one has no number, unless an earlier revision has used that name."""
        plain, at = object_key_for(record.uid, record.suffix, None, True), record.revision.object_key
        if record.suffix not in record.used and at != plain:
            yield plain
        for more in itertools.count(number):
            name = revision_key(record.uid, record.suffix, more)
            if name != at:
                yield name

    def _is_wanted(self, key: str) -> bool:
        """Whether a living artifact has this real key, or one that a folder cannot have beside it."""
        self.settle()
        clause, params = _conflicts("key", key)
        # With 'key IS NOT NULL' SQLite uses the index of living keys.
        return self._one(f"visibility>-1 AND key IS NOT NULL AND key_is_virtual=0 AND ({clause})", *params) is not None

    def in_the_way(self, object_key: str, uid: str) -> list[ArtifactRecord]:
        """Artifacts whose objects prevent an object from being at ``object_key``: those at the same key, above it or
        below it, since a folder and some servers cannot have both ``a`` and ``a/b``."""
        if is_private(object_key):
            holder = self._one("object_key=? AND uid<>?", object_key, uid)
            return [] if holder is None else [holder]
        clause, params = _conflicts("object_key", object_key)
        rows = self._db.all(
            # The artifact's own object is in the way too if one of the two would have to be a folder: 'a' moving to
            # 'a/a'.
            f"SELECT {_COLUMNS}, {_RENAMES} FROM {NOW} WHERE ({clause}) AND NOT (uid=? AND object_key=?) LIMIT 1000",
            (*params, uid, object_key),
        )
        return [_record_now(row) for row in rows]

    def _one(self, where: str, *params: Any) -> ArtifactRecord | None:
        row = self._db.one(f"SELECT {_COLUMNS}, {_RENAMES} FROM {NOW} WHERE {where} LIMIT 1", params)
        return None if row is None else _record_now(row)

    def leaves(self, revision: Revision, block: int) -> bytes | None:
        """The concatenated leaf hashes of one block of a stored revision; None if they are not known.

        A row that was stored for another content of the block is ignored.
        """
        digest = revision.content.block(block)
        if digest == zero_block():
            return zero_leaves()
        for (hashes,) in self._db.all(
            "SELECT hashes FROM leaf WHERE block=?"
            " AND artifact_id IN (SELECT artifact_id FROM revision WHERE object_key=?)",
            (block, revision.object_key),
        ):
            if hashes.startswith(digest[:_MARK]):
                return bytes(hashes[_MARK:])
        return None

    def filter(self, **conditions: Any) -> Iterator[ArtifactRecord]:
        """Artifacts that meet all conditions, oldest first. Includes the trash only if ``visibility`` is given.

        ``field=value``, ``field=None`` and ``field__op=value`` (conditions.py). ``visibility=None`` means any. Raises
        InvalidArgument.
        """
        clauses = [] if "visibility" in conditions else ["visibility > -1"]
        params: list[Any] = []
        for name, value in conditions.items():
            if name != "visibility" or value is not None:
                found = clause(name, value)
                clauses.append(found.sql)
                params += found.params
        self.settle()
        where = " AND ".join(clauses) or "1"
        for row in self._db.all(f"SELECT {_COLUMNS} FROM {NOW} WHERE {where} ORDER BY a.id", params):
            yield _record(row)

    def count(self, *, trash: bool = False) -> int:
        """Number of artifacts outside (or in) the trash."""
        operator = "=" if trash else ">"
        row = self._db.one(f"SELECT count(*) FROM artifact WHERE visibility {operator} -1")
        assert row is not None
        return int(row[0])

    def total_bytes(self) -> int:
        """Sum of the sizes of all artifacts, the trash included, in bytes."""
        row = self._db.one(f"SELECT coalesce(sum(r.size), 0) FROM {NOW}")
        assert row is not None
        return int(row[0])

    # -- changing -----------------------------------------------------------------------------------------------

    def insert(self, record: ArtifactRecord) -> int:
        """Add a row and one for its revision; ``record`` has inode and times. Fills in and returns the id."""
        self._make_way(record.key)
        cursor = self._db.execute(
            "INSERT INTO artifact(uid, storage_id, key, suffix, description, accessor, visibility, key_is_virtual,"
            " created_by_id, run_id, transform_id, created_at, updated_at, ino, used, revision_id)"
            " VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,(SELECT coalesce(max(id), 0) + 1 FROM revision))",
            (
                record.uid, record.storage_id, record.key, record.suffix, record.description, record.accessor,
                record.visibility, int(record.key_is_virtual), record.created_by_id, record.run_id,
                record.transform_id, record.created_at, record.updated_at, record.ino, _json(record.used),
            ),
        )  # fmt: skip
        record.id = cursor.lastrowid
        assert record.id is not None
        origin = Provenance(record.created_by_id, record.run_id)
        # SQLite gives the new row the id predicted above: one more than the highest.
        self._insert_revision(record.id, record.number, record.revision, record.updated_at, origin)
        self._put_leaves(record.id, record.revision.content)
        return record.id

    def _insert_revision(
        self, artifact_id: int, number: int, revision: Revision, created_at: int, origin: Provenance
    ) -> int:
        """Add the row of a revision. Returns its id, one more than the highest."""
        content = revision.content
        cursor = self._db.execute(
            "INSERT INTO revision(artifact_id, number, size, hash, hash_type, blocks, head, object_key, etag,"
            " created_at, created_by_id, run_id) VALUES(?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                artifact_id, number, content.size, content.hash, content.hash_type, content.blocks, content.head,
                revision.object_key, revision.etag, created_at, origin.user_id, origin.run_id,
            ),
        )  # fmt: skip
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _put_leaves(self, id_: int, content: ContentHash) -> None:
        """Store the leaf hashes that ``content`` has. Rows of other blocks stay."""
        if content.leaves:
            self._db.conn.executemany(
                "INSERT OR REPLACE INTO leaf(artifact_id, block, hashes) VALUES(?, ?, ?)",
                ((id_, block, content.block(block)[:_MARK] + hashes) for block, hashes in content.leaves.items()),
            )

    def take_leaves(self, source: int, target: int) -> None:
        """Move the leaf hashes of artifact id ``source``, which goes away, to artifact id ``target``."""
        self._db.execute("DELETE FROM leaf WHERE artifact_id=?", (target,))
        self._db.execute("UPDATE leaf SET artifact_id=? WHERE artifact_id=?", (target, source))

    def set_revision(
        self,
        record: ArtifactRecord,
        revision: Revision,
        *,
        updated_at: int,
        origin: Provenance | None = None,
    ) -> None:
        """Point an artifact, whose row is ``record``, at new bytes. Bytes that differ become its next revision.

        ``updated_at``: in nanoseconds since the epoch. ``origin``: the user and run of the new bytes.
        """
        assert record.id is not None
        uid = record.uid
        if revision.content.same_bytes(record.revision.content):
            self._set_content(record, revision)
            self.update(uid, updated_at=updated_at)
        else:
            new = self._insert_revision(record.id, record.number + 1, revision, updated_at, origin or Provenance())
            self._db.execute("DELETE FROM revision WHERE id=(SELECT revision_id FROM artifact WHERE uid=?)", (uid,))
            self._db.execute(
                "UPDATE artifact SET revision_id=?, updated_at=?, used=? WHERE id=?",
                (new, updated_at, _json(_used(record, revision.object_key)), record.id),
            )
        self._db.execute("DELETE FROM leaf WHERE artifact_id=? AND block>=?", (record.id, revision.block_count()))
        self._put_leaves(record.id, revision.content)

    def _set_content(self, record: ArtifactRecord, revision: Revision) -> None:
        """Update a revision whose bytes stay the same: more may be known of them now."""
        content = revision.content
        self._db.execute(
            "UPDATE revision SET hash=?, hash_type=?, head=coalesce(?, head)"
            " WHERE id=(SELECT revision_id FROM artifact WHERE uid=?)",
            (content.hash, content.hash_type, content.head, record.uid),
        )
        self._set_object(record, revision.object_key, revision.etag)

    def set_object(self, uid: str, object_key: str, etag: str) -> None:
        """Record that the same bytes are in another object now, or in a copy at the same place."""
        record = self.by_uid(uid)
        if record is not None:
            self._set_object(record, object_key, etag)

    def _set_object(self, record: ArtifactRecord, object_key: str, etag: str) -> None:
        uid = record.uid
        self._db.execute(
            "UPDATE revision SET object_key=?, etag=? WHERE id=(SELECT revision_id FROM artifact WHERE uid=?)",
            (object_key, etag, uid),
        )
        used = _used(record, object_key)
        if used != record.used:
            self._db.execute("UPDATE artifact SET used=? WHERE uid=?", (_json(used), uid))

    def set_number(self, uid: str, number: int) -> None:
        """Set the number of the current revision to the one that its object names."""
        self._db.execute(
            "UPDATE revision SET number=? WHERE id=(SELECT revision_id FROM artifact WHERE uid=?)", (number, uid)
        )

    def update(self, uid: str, /, **columns: Any) -> None:
        """Set other columns of a row (key, suffix, description, accessor, visibility, ino, run_id …)."""
        if "visibility" in columns and "key" not in columns and (record := self.by_uid(uid)) is not None:
            columns["key"] = record.key  # in the trash its key follows no rename any more
        if columns.get("visibility") != TRASH:
            self._make_way(columns.get("key"))
        names = ", ".join(f"{name}=?" for name in columns)
        self._db.execute(f"UPDATE artifact SET {names} WHERE uid=?", (*columns.values(), uid))

    def remove(self, uid: str) -> None:
        """Delete a row for good."""
        self._db.execute("DELETE FROM leaf WHERE artifact_id=(SELECT id FROM artifact WHERE uid=?)", (uid,))
        self._db.execute("DELETE FROM revision WHERE id=(SELECT revision_id FROM artifact WHERE uid=?)", (uid,))
        self._db.execute("DELETE FROM artifact WHERE uid=?", (uid,))

    def rekey(self, old: str, new: str) -> list[str]:
        """Move the keys of all artifacts from below directory key ``old`` to below ``new``. Returns uids with real
        keys."""
        self.settle()
        real = self._db.all(
            "SELECT uid FROM artifact INDEXED BY artifact_real WHERE key>=? AND key<? AND visibility>-1"
            " AND key_is_virtual=0",
            _below(old),
        )
        self._move_keys(old, new)
        return [row[0] for row in real]

    def rekey_later(self, old: str, new: str) -> bool:
        """Like ``rekey``, but writes one row, however many artifacts there are; ``settle`` does the rest.

        Returns False, and does nothing, where ``rekey`` fits better: it is as quick for few rows, and real keys mean
        storage work.
        """
        below = _below(old)
        if self._db.one(
            "SELECT 1 FROM artifact INDEXED BY artifact_real WHERE key>=? AND key<? AND visibility>-1"
            " AND key_is_virtual=0 LIMIT 1",
            below,
        ):
            return False
        many = "SELECT 1 FROM artifact WHERE key>=? AND key<? AND visibility>-1 LIMIT 1 OFFSET ?"
        if not self._renames() and self._db.one(many, (*below, FEW)) is None:
            return False
        self._db.execute("INSERT INTO rekey(old, new) VALUES(?, ?)", (old, new))
        return True


def _used(record: ArtifactRecord, object_key: str) -> tuple[str, ...]:
    """The value of ArtifactRecord.used once the artifact's bytes are in ``object_key``."""
    at, suffix = record.revision.object_key, record.revision.object_key.removeprefix(f"{AUTO_KEY_PREFIX}{record.uid}")
    if object_key == at or suffix == at or suffix.startswith(f".{record.number}.") or suffix == f".{record.number}":
        return record.used
    return tuple(dict.fromkeys([*record.used, suffix]))


def _json(used: tuple[str, ...]) -> str | None:
    return json.dumps(used) if used else None


def _below(key: str) -> tuple[str, str]:
    """The range of keys below a directory. '0' is the character after '/', so the range is all that starts with
    'key/'."""
    return f"{key}/", f"{key}0"


def _conflicts(column: str, key: str) -> tuple[str, list[str]]:
    """A condition: ``column`` is ``key``, a folder above it, or anything below it ('0' follows '/')."""
    parts = key.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    marks = ",".join("?" * len(above))
    return f"{column} IN ({marks}) OR ({column}>=? AND {column}<?)", [*above, f"{key}/", f"{key}0"]


def _record_now(row: tuple[Any, ...]) -> ArtifactRecord:
    """A record with its present key, from a row and the renames that its key may not have followed yet.

    Both come from one statement: between two statements another thread may change the key.
    """
    record = _record(row[:-1])
    if row[-1] != "[]" and record.key is not None and record.visibility != TRASH:
        for old, new in json.loads(row[-1]):
            if record.key.startswith(f"{old}/"):
                record.key = new + record.key[len(old) :]
    return record


def _record(row: tuple[Any, ...]) -> ArtifactRecord:
    (id_, uid, storage_id, key, suffix, description, accessor, size, hash_, hash_type, blocks, object_key, etag,
     visibility, virtual, created_by, run, transform, created_at, updated_at, ino, head, number,
     used) = row  # fmt: skip
    return ArtifactRecord(
        uid=uid,
        key=key,
        suffix=suffix,
        revision=Revision(ContentHash(size, hash_, hash_type, bytes(blocks), head=head), object_key, etag),
        description=description,
        visibility=visibility,
        key_is_virtual=bool(virtual),
        accessor=accessor,
        storage_id=storage_id,
        created_by_id=created_by,
        run_id=run,
        transform_id=transform,
        created_at=created_at,
        updated_at=updated_at,
        ino=ino,
        id=id_,
        number=number,
        used=tuple(json.loads(used)) if used else (),
    )
