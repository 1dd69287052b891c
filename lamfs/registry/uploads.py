"""Multipart uploads that are not finished: what storage has of the bytes of a journal row. The Database's thread.

An upload belongs to a put row. Its record is written before the upload begins in storage (``upload_id`` is None until
storage has named it), and each part's when storage has it, so that whoever continues sends only what is missing. When
the row goes, for whatever reason, a trigger drops the record and owes an ``abort``, unless the upload was completed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lamfs.registry.db import Database


class PartRecord(NamedTuple):
    """A part that storage has: ``length`` bytes at ``offset`` of the file, the BLAKE3 digests of their blocks, ETag."""

    number: int
    offset: int
    length: int
    blocks: bytes
    etag: str


@dataclass(slots=True)
class UploadRecord:
    """An upload of ``object_key``. ``completed``: its object was made, and the registry was not told yet."""

    object_key: str
    upload_id: str | None
    completed: bool
    parts: dict[int, PartRecord] = field(default_factory=dict)


class Uploads:
    """Reads and writes the uploads of one Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, journal_id: int) -> UploadRecord | None:
        """The upload of a journal row."""
        row = self._db.one("SELECT object_key, upload_id, completed FROM upload WHERE journal_id=?", (journal_id,))
        if row is None:
            return None
        parts = self._db.all(
            "SELECT number, offset, length, blocks, etag FROM part WHERE journal_id=? ORDER BY number", (journal_id,)
        )
        return UploadRecord(row[0], row[1], bool(row[2]), {part[0]: PartRecord(*part) for part in parts})

    def announce(self, journal_id: int, object_key: str) -> bool:
        """An upload is about to begin for a row that has none; False when the row was struck off."""
        cursor = self._db.execute(
            "INSERT INTO upload(journal_id, object_key) SELECT id, ? FROM journal WHERE id=?", (object_key, journal_id)
        )
        return cursor.rowcount > 0

    def begun(self, journal_id: int, upload_id: str) -> bool:
        """Storage has named the upload; False when the row was struck off meanwhile (its abortion is owed)."""
        cursor = self._db.execute("UPDATE upload SET upload_id=? WHERE journal_id=?", (upload_id, journal_id))
        return cursor.rowcount > 0

    def add_part(self, journal_id: int, upload_id: str, part: PartRecord) -> bool:
        """Storage has a part; False when the upload is not the row's any more."""
        cursor = self._db.execute(
            "INSERT OR REPLACE INTO part(journal_id, number, offset, length, blocks, etag)"
            " SELECT journal_id, ?, ?, ?, ?, ? FROM upload WHERE journal_id=? AND upload_id=?",
            (part.number, part.offset, part.length, part.blocks, part.etag, journal_id, upload_id),
        )
        return cursor.rowcount > 0

    def completed(self, journal_id: int) -> None:
        """The object was made: there is nothing to abort."""
        self._db.execute("UPDATE upload SET completed=1 WHERE journal_id=?", (journal_id,))

    def forget(self, journal_id: int) -> None:
        """Storage has no such upload."""
        self._db.execute("DELETE FROM upload WHERE journal_id=?", (journal_id,))

    def abandon(self, journal_id: int, owner: str, *, now: int) -> None:
        """The row needs another upload: owe the abortion of this one, since ``now`` (ns since the epoch)."""
        with self._db.transaction():
            self._db.execute(
                "INSERT INTO journal(op, state, object_key, created_at, owner, payload)"
                " SELECT 'abort', 'ready', object_key, ?, ?, json_object('upload_id', upload_id)"
                " FROM upload WHERE journal_id=? AND NOT completed",
                (now, owner, journal_id),
            )
            self.forget(journal_id)

    def targets(self) -> set[str]:
        """The objects of all uploads."""
        return {row[0] for row in self._db.all("SELECT object_key FROM upload")}

    def known(self, object_key: str) -> set[str]:
        """Ids of the uploads of an object that a journal row works on."""
        rows = self._db.all(
            "SELECT upload_id FROM upload WHERE object_key=? AND upload_id IS NOT NULL AND NOT completed", (object_key,)
        )
        return {row[0] for row in rows}
