"""The rows of the journal, each kind with what it has. What they mean is in journal.py. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from lamfs.errors import RegistryError
from lamfs.model import ArtifactRecord, ContentHash, Revision

COLUMNS = "id, op, state, ino, uid, object_key, src, gen, attempts, error, next_at, created_at, owner, payload"
"""Of the journal table, as ``entry`` takes them."""


@dataclass(slots=True)
class Owed:
    """One piece of storage work: what all kinds have. Times in nanoseconds since the epoch."""

    op: ClassVar[str] = ""
    """Its kind, in the table and in messages."""

    id: int
    state: str
    attempts: int
    error: str | None
    next_at: int
    created_at: int
    owner: str | None

    @property
    def about(self) -> str:
        """What it is about, for messages: an object key, an uid or a spool file."""
        return f"journal row {self.id}"


@dataclass(slots=True)
class Put(Owed):
    """The bytes of inode ``ino`` are in the spool file ``src``. ``uid``: of the artifact that they are the content of.

    ``gen``: how often it was closed. ``object_key``: the object that a try has claimed. ``base``: the content over
    which a partial spool file lies (partial_spools.base_id). ``doubted``: another machine may have had the lease since.
    ``damaged``: blocks that are known not to be what was written. ``beat``: another number than before when the put
    has gone on.
    """

    op: ClassVar[str] = "put"

    ino: int
    uid: str
    src: str
    gen: int
    object_key: str | None = None
    key_is_virtual: bool = True
    base: str | None = None
    doubted: bool = False
    damaged: frozenset[int] = frozenset()
    beat: object = None

    @property
    def about(self) -> str:
        """Owed.about."""
        return self.object_key or self.uid or self.src


@dataclass(slots=True)
class Save(Owed):
    """A user's file is being stored. ``record``: the artifact as it is to become, its ETag not known.

    ``base``: object key and ETag of what it replaces; None: nothing. ``mode``: of a new file. ``foreign``: ETag of an
    object that was at its real key, and no artifact's.
    """

    op: ClassVar[str] = "save"

    uid: str
    object_key: str
    record: ArtifactRecord
    base: tuple[str, str] | None = None
    mode: int = 0o644
    foreign: str | None = None

    @property
    def about(self) -> str:
        """Owed.about."""
        return self.object_key


@dataclass(slots=True)
class Move(Owed):
    """The object of artifact ``uid`` has to go where its key and suffix say."""

    op: ClassVar[str] = "move"

    uid: str

    @property
    def about(self) -> str:
        """Owed.about."""
        return self.uid


@dataclass(slots=True)
class Delete(Owed):
    """Nothing needs ``object_key`` any more. ``etag``: which object is meant; None: whatever this machine's work may
    have left there. ``copy_of``: uid of the artifact whose object is being copied there. ``uid``: of the artifact that
    had it. ``doubted``: another machine may have had the lease since."""

    op: ClassVar[str] = "delete"

    object_key: str
    etag: str | None = None
    copy_of: str | None = None
    uid: str | None = None
    doubted: bool = False

    @property
    def about(self) -> str:
        """Owed.about."""
        return self.object_key


@dataclass(slots=True)
class Abort(Owed):
    """A multipart upload of ``object_key`` is needed no more; without ``upload_id`` each that no row knows."""

    op: ClassVar[str] = "abort"

    object_key: str
    upload_id: str | None = None

    @property
    def about(self) -> str:
        """Owed.about."""
        return self.object_key


@dataclass(slots=True)
class Drop(Owed):
    """The spool file ``src`` is to be removed by the process that wrote it."""

    op: ClassVar[str] = "drop"

    src: str

    @property
    def about(self) -> str:
        """Owed.about."""
        return self.src


def entry(row: tuple[Any, ...]) -> Owed:
    """A row, read by COLUMNS. Raises RegistryError for one that lamfs has not written.

    What a row lacks is empty, and what should be text and is not is left out: nothing has such a name.
    """
    try:
        return _entry(row)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise RegistryError(f"Row {row[0]} of the journal is not as lamfs writes it ({error!r}).") from error


def _entry(row: tuple[Any, ...]) -> Owed:
    id_, op, state, ino, uid, object_key, src, gen, attempts, error, next_at, created_at, owner, text = row
    has: dict[str, Any] = json.loads(text)
    common = (id_, state, attempts, error, next_at, created_at, owner)
    if op == "put":
        damaged = has.get("damaged")
        return Put(
            *common, ino or 0, uid or "", src or "", gen, object_key, bool(has.get("key_is_virtual", True)),
            _text(has.get("base")), "doubted" in has,
            frozenset(block for block in (damaged if isinstance(damaged, list) else []) if isinstance(block, int)),
            has.get("beat"),
        )  # fmt: skip
    if op == "save":
        base = has.get("base")
        return Save(
            *common, uid or "", object_key or "", _record(has, object_key or ""),
            None if base is None else (str(base[0]), str(base[1])), int(str(has.get("mode", 0o644))),
            _text(has.get("foreign")),
        )  # fmt: skip
    if op == "move":
        return Move(*common, uid or "")
    if op == "delete":
        return Delete(
            *common, object_key or "", _text(has.get("etag")), _text(has.get("copy_of")), _text(has.get("uid")),
            "doubted" in has,
        )  # fmt: skip
    if op == "abort":
        return Abort(*common, object_key or "", _text(has.get("upload_id")))
    if op == "drop":
        return Drop(*common, src or "")
    raise RegistryError(f"The journal has a row of an unknown kind ({str(op)[:40]!r}).")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


_NAMES = (
    "uid", "key", "suffix", "description", "key_is_virtual", "accessor", "storage_id", "created_by_id", "run_id",
    "transform_id",
)  # fmt: skip


def save_payload(
    record: ArtifactRecord, *, base: tuple[str, str] | None, mode: int, foreign: str | None = None
) -> dict[str, Any]:
    """The payload of a Save's row."""
    content = record.revision.content
    payload: dict[str, Any] = {name: getattr(record, name) for name in _NAMES} | {
        "size": content.size, "hash": content.hash, "hash_type": content.hash_type, "blocks": content.blocks.hex(),
        "base": base, "mode": mode,
    }  # fmt: skip
    return payload if foreign is None else payload | {"foreign": foreign}


def _record(payload: dict[str, Any], object_key: str) -> ArtifactRecord:
    content = ContentHash(payload["size"], payload["hash"], payload["hash_type"], bytes.fromhex(payload["blocks"]))
    return ArtifactRecord(revision=Revision(content, object_key, ""), **{name: payload[name] for name in _NAMES})
