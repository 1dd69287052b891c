"""The words of lamfs as types: ids, records, constants. Pure; imported by every layer, imports none of them."""

from __future__ import annotations

import functools
import secrets
import string
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

BASE62 = string.digits + string.ascii_letters
"""The alphabet of every uid (LaminDB: ``[0-9A-Za-z]``)."""

BLOCK_SIZE = 4 << 20
"""Bytes per block: the unit of per-block hashes, of the cache and of fetching."""

LEAF_SIZE = 64 << 10
"""Bytes per leaf of a block: the smallest unit that is fetched and verified for a random read."""
LEAF_HASH = 16
"""Bytes per leaf hash: BLAKE3, truncated."""

AUTO_KEY_PREFIX = ".lamindb/"
"""Object keys of artifacts without a real key start with this (LaminDB 0.72)."""

ARTIFACT_UID_LEN = 20
STORAGE_UID_LEN = 12
USER_UID_LEN = 8
RUN_UID_LEN = 20
TRANSFORM_UID_LEN = 16

ROOT_INO = 1
"""Inode number of the root of the tree, as in FUSE."""
AUTO_INO = 2
"""Inode number of the directory ``.lamindb``, which shows auto-managed artifacts."""

DESCRIPTION_XATTR = "user.lamfs.description"
"""lamfs's only own extended attribute that can be written. A file that is not stored yet has it like any other."""

SHOWN, TRASH = 1, -1
"""Artifact visibility (LaminDB's VisibilityChoice). lamfs keeps its 0, archived, but never sets it."""


def new_uid(length: int = ARTIFACT_UID_LEN) -> str:
    """A random uid of ``length`` base62 characters."""
    text = ""
    while len(text) < length:
        # Of a byte's 256 values, 248 are four times 62. The others would make some characters more likely.
        text += "".join([BASE62[byte % 62] for byte in secrets.token_bytes(2 * length) if byte < 248])
    return text[:length]


@functools.lru_cache(maxsize=64)
def instance_id(slug: str) -> uuid.UUID:
    """Id of instance ``owner/name``: ``uuid5(NAMESPACE_URL, "owner/name")``."""
    return uuid.uuid5(uuid.NAMESPACE_URL, slug)


def storage_id(root: str) -> uuid.UUID:
    """Id of a storage root: ``uuid5(NAMESPACE_URL, root)``. ``root`` has no trailing slash."""
    return uuid.uuid5(uuid.NAMESPACE_URL, root)


def now_ns() -> int:
    """Wall clock in nanoseconds since the epoch."""
    return time.time_ns()


def iso(ns: int) -> str:
    """Nanoseconds since the epoch as ISO 8601 in UTC, with microseconds."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000).isoformat()


@dataclass(slots=True, frozen=True)
class StorageConfig:
    """How to reach a storage. Has no secrets: credentials come from boto3's own chain (environment, profile, role).

    ``root`` is ``s3://bucket[/prefix]`` or an absolute folder path, without a trailing slash.
    """

    root: str
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    path_style: bool = False
    timeout: float = 60.0


@dataclass(slots=True, frozen=True)
class ContentHash:
    """What is known about the bytes of one revision before they are stored.

    ``size`` in bytes. ``hash`` and ``hash_type`` are LaminDB's (22 characters; ``md5`` or ``sha1-fl``). ``blocks`` is
    the concatenation of one 32-byte BLAKE3 digest per 4 MiB block (empty for an empty file). Two revisions are equal if
    ``size`` and ``blocks`` are, never by ``hash`` alone.

    ``leaves`` has, for some blocks, the concatenated hashes of their 64 KiB leaves (``LEAF_HASH`` bytes each). It is
    filled only when the bytes have just been hashed; the registry returns leaf hashes by block. ``head``: SHA-1 of the
    first 50 MiB of a larger file, if known: ``hash`` is made from it and from the hash of the last 50 MiB.
    """

    size: int
    hash: str
    hash_type: str
    blocks: bytes
    leaves: Mapping[int, bytes] = field(default_factory=dict, compare=False, repr=False)
    head: bytes | None = field(default=None, compare=False, repr=False)

    def same_bytes(self, other: ContentHash | None) -> bool:
        """Whether both describe the same bytes (decided by the BLAKE3 block hashes)."""
        return other is not None and self.size == other.size and self.blocks == other.blocks

    def block(self, index: int) -> bytes:
        """BLAKE3 digest of block ``index``."""
        return self.blocks[32 * index : 32 * index + 32]


@dataclass(slots=True, frozen=True)
class Revision:
    """One stored revision of an artifact: its bytes, and the object that contains them."""

    content: ContentHash
    object_key: str
    etag: str

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.content.size

    def block_count(self) -> int:
        """Number of 4 MiB blocks (0 for an empty file)."""
        return (self.content.size + BLOCK_SIZE - 1) // BLOCK_SIZE


@dataclass(slots=True, frozen=True)
class ObjectMeta:
    """An object's metadata: whose bytes it has. A hint for a person who has lost the registry. It comes from storage,
    so it never leads to anything that cannot be undone.

    ``key``: of the artifact when the object was stored. None: the artifact had none. Only the beginning if it is
    ``cut``. ``revision``: ArtifactRecord.number. ``hash``: LaminDB's, as ``type:hash``. None: not known when it was
    stored.
    """

    uid: str
    key: str | None = None
    revision: int | None = None
    hash: str | None = None
    cut: bool = False

    @classmethod
    def of(cls, uid: str, key: str | None, revision: int, content: ContentHash | None) -> ObjectMeta:
        """The metadata for a revision of an artifact."""
        return cls(uid, key, revision, None if content is None else f"{content.hash_type}:{content.hash}")

    def is_revision_of(self, known: ObjectMeta) -> bool:
        """Whether this is the metadata of the revision ``known`` to the registry, whatever its key was."""
        return None not in (known.revision, known.hash) and (self.uid, self.revision, self.hash) == (
            known.uid, known.revision, known.hash,
        )  # fmt: skip


@dataclass(slots=True)
class ArtifactRecord:
    """One row of the artifact table. Times in nanoseconds since the epoch."""

    uid: str
    key: str | None
    suffix: str
    revision: Revision
    description: str | None = None
    visibility: int = SHOWN
    key_is_virtual: bool = True
    accessor: str | None = None
    storage_id: int = 1
    created_by_id: int | None = None
    run_id: int | None = None
    transform_id: int | None = None
    created_at: int = 0
    updated_at: int = 0
    ino: int | None = None
    id: int | None = None
    number: int = 1
    """Number of the revision. 1 is the first; each change of the bytes makes the next one."""
    used: tuple[str, ...] = ()
    """Suffixes for which ``.lamindb/{uid}{suffix}`` has been the object key of an earlier revision."""

    @property
    def meta(self) -> ObjectMeta:
        """The metadata of the object of its revision."""
        return ObjectMeta.of(self.uid, self.key, self.number, self.revision.content)

    @property
    def size(self) -> int:
        """Bytes of the stored revision."""
        return self.revision.content.size

    @property
    def place(self) -> str:
        """Where it shows in a mount: at its key, or below ``.lamindb/``."""
        return f"{AUTO_KEY_PREFIX}{self.uid}{self.suffix}" if self.key is None else self.key

    @property
    def hash(self) -> str:
        """LaminDB's content hash of the stored revision."""
        return self.revision.content.hash


@dataclass(slots=True)
class Inode:
    """One row of the inode table: the POSIX attributes of a file, directory or other node."""

    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int = 0
    revision: int = 0
    """Counts content revisions made outside the mount that shows it. A new value means a new FUSE inode."""
    blocks: int | None = None
    """Allocated units of 512 bytes (st_blocks) of a file with holes; None: all of ``size``."""


@dataclass(slots=True)
class Dentry:
    """One directory entry. ``cookie`` never changes, and orders readdir."""

    cookie: int
    name: str
    inode: Inode
