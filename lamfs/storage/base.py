"""What every storage can do: the ObjectStore protocol. Synchronous, callable from any thread; no state but clients.

Keys are relative to the store's root, with ``/`` and no leading slash. ETags are opaque strings that change whenever an
object's bytes do; they come without surrounding quotes. Every error is one of lamfs.errors' storage errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

from lamfs.errors import TooLarge
from lamfs.model import ObjectMeta as ObjectMeta
from lamfs.model import StorageConfig as StorageConfig


class ObjectStat(NamedTuple):
    """One object: ``key`` below the root, ``size`` in bytes, ``etag``, ``mtime_ns`` since the epoch."""

    key: str
    size: int
    etag: str
    mtime_ns: int


class UnfinishedUpload(NamedTuple):
    """A multipart upload that has begun: the object's ``key``, the upload's ``id``, ``started_ns`` since the epoch."""

    key: str
    id: str
    started_ns: int


class Capabilities(NamedTuple):
    """What a storage can do, as a check has shown.

    ``create_exclusive``: a race of ``If-None-Match: *`` writers has one winner. ``replace_guarded``: ``If-Match`` on
    PUT is honoured. ``read_guarded``: ``If-Match`` on GET is honoured. ``warnings``: one sentence per missing
    capability, with what that costs the user.
    """

    create_exclusive: bool
    replace_guarded: bool
    read_guarded: bool
    warnings: tuple[str, ...] = ()


class Over(NamedTuple):
    """What a write may replace: the object with ETag ``if_match``; nothing, with ``if_none_match``; or anything."""

    if_match: str | None = None
    if_none_match: bool = False


ANYTHING = Over()
NOTHING = Over(if_none_match=True)


class PartStat(NamedTuple):
    """One part of an unfinished upload: ``number`` from 1, ``size`` in bytes, ``etag``."""

    number: int
    size: int
    etag: str


Progress = Callable[[int], None]
"""Called with a number of bytes that have just been moved, from the moving thread."""


class ObjectStore(Protocol):
    """A root in a local folder or a bucket. Thread-safe."""

    config: StorageConfig

    @property
    def kind(self) -> Literal["local", "s3"]:
        """Which implementation this is, as the registry records it. The properties below say what it can do."""

    @property
    def on_disk(self) -> bool:
        """Whether objects are regular files of this machine.

        ``open_local`` opens them, an open descriptor keeps the bytes whatever happens to the object, and caching gains
        nothing.
        """

    @property
    def imports_files(self) -> bool:
        """Whether put_file with ``consume`` may rename the file into the storage, so that storing moves no bytes."""

    @property
    def parts(self) -> MultipartStore | None:
        """Its multipart uploads; None if it takes objects as a whole only."""

    @property
    def cache_name(self) -> str:
        """Relative path of this root below the cache directory: ``bucket/prefix``, or the folder's path."""

    def url(self, key: str) -> str:
        """Full name of an object, for users: ``s3://bucket/prefix/key`` or ``/folder/key``."""

    def open_local(self, key: str) -> int | None:
        """Open the object's own regular file for reading, if the storage is a local folder; else return None.

        The caller closes the descriptor. Raises ObjectMissing, StorageError (a link is ELOOP).
        """

    def check(self, *, write: bool = True, exclusive: bool = False) -> Capabilities:
        """Prove that the root exists and can be read (and written), and find out what conditional requests do.

        ``exclusive``: an earlier check has shown ``create_exclusive``, so it is not tested again. Leaves nothing
        behind. Raises StorageMissing, StorageForbidden, StorageReadOnly or StorageUnavailable.
        """

    def head(self, key: str) -> ObjectStat:
        """Stat one object. Raises ObjectMissing."""

    def meta(self, key: str) -> ObjectMeta | None:
        """The metadata that lamfs stored with the object, whichever instance did; None: it has none. Raises
        ObjectMissing."""

    def get(self, key: str, *, offset: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """Read ``length`` bytes (None: to the end) at ``offset``. Raises ObjectMissing, and ObjectChanged if ``etag``
        differs.

        Short bodies are retried; after that it raises StorageUnavailable.
        """

    def get_into(self, key: str, fd: int, *, offset: int, length: int, etag: str | None = None) -> None:
        """As get, but pwrite into ``fd``, at the same ``offset``, as bytes arrive."""

    def get_view(self, key: str, view: memoryview, *, offset: int, etag: str | None = None) -> None:
        """As get_into, into memory: as many bytes as fit."""

    def get_views(self, key: str, views: Iterator[memoryview], *, offset: int, length: int, etag: str) -> None:
        """As get_view, into several pieces of memory one after the other, ``length`` bytes together.

        The next piece is asked for when one is full, and once more after the last. So ``views`` can use what has
        arrived, and may raise a LamfsError.
        """

    def put_file(
        self,
        key: str,
        path: str,
        *,
        consume: bool = False,
        progress: Progress | None = None,
        meta: ObjectMeta | None = None,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> ObjectStat:
        """Store a file's bytes under ``key``. Atomically replaces what was there; durable when it returns.

        ``meta``: metadata to store with the object. A storage that keeps none stores the object all the same.

        With ``consume`` a local folder may rename the file into place; it is then gone from ``path``. Large files go as
        multipart uploads. Raises StorageFull, StorageUnavailable, StorageForbidden.

        With ``if_none_match`` only if there is no object, with ``if_match`` only over that ETag; else
        PreconditionFailed. That is also raised after a write of our own whose reply was lost, if the store cannot tell:
        the caller looks what is there.
        """

    def put_bytes(
        self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        """Store a small object. With ``if_none_match`` only if there is none, with ``if_match`` only over that ETag.

        Else it raises PreconditionFailed. A write of our own whose reply was lost counts as done.
        """

    def copy(
        self,
        src: str,
        dst: str,
        *,
        etag: str | None = None,
        size: int | None = None,
        meta: ObjectMeta | None = None,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> ObjectStat:
        """Copy within the storage without moving bytes through here. Raises ObjectMissing, ObjectChanged.

        ``if_none_match`` and ``if_match``: as for put_file, of ``dst``, where a copy takes long: in a folder, and of
        more than 5 GiB in a bucket. (Few servers know conditions of a copy in one request.)

        ``meta``: metadata of the copy, instead of the source's.

        With the size of that revision, in bytes, no request is sent first. But then ``dst`` may have been written when
        it turns out that the source has changed.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in batches. It is no error if some are gone already."""

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        """All objects whose key starts with ``prefix``, in no particular order."""

    def temporaries(self) -> Iterator[ObjectStat]:
        """Files that are not objects, or not yet: those that a put is writing, and those of a check.

        Their names say which process made them (processes.state_of). Those of a dead process can be deleted by their
        key.
        """

    def uploads(self) -> Iterator[UnfinishedUpload]:
        """Multipart uploads that were neither completed nor aborted; none in a folder."""

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Abort a multipart upload, and free its parts. It is no error if it is gone already."""

    def prepare(self) -> None:
        """Do what the first call would otherwise wait for. Sends no request, and raises nothing."""

    def close(self) -> None:
        """Release connections. The store is not used afterwards."""


class MultipartStore(Protocol):
    """A store with multipart uploads: each part survives the process that sent it. Thread-safe.

    Amazon S3: up to 10,000 parts, numbered from 1, each of 5 MiB to 5 GiB; the last may be smaller. Sending a part's
    number again replaces it. All but ``begin_upload``, ``uploads_of`` and ``abort_upload`` raise UploadGone when the
    upload does not exist any more.
    """

    def begin_upload(self, key: str, meta: ObjectMeta | None = None) -> str:
        """Begin an upload of ``key``, which nobody else may be uploading now. Returns its id.

        ``meta``: as for put_file. It cannot be changed later, so it has no hash of bytes that may still change.
        """

    def send_part(
        self,
        key: str,
        upload_id: str,
        number: int,
        path: str,
        offset: int,
        length: int,
        progress: Progress | None = None,
    ) -> str:
        """Send a range of the file at ``path`` as a part. Returns its ETag."""

    def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, offset: int, length: int
    ) -> str:
        """Copy a range of the object ``source`` as a part, within the storage. Returns its ETag.

        Raises ObjectChanged when the source has another ETag by now, ObjectMissing when it is gone.
        """

    def complete_upload(
        self,
        key: str,
        upload_id: str,
        etags: Sequence[str],
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> str:
        """Make the object from parts 1 to ``len(etags)``. Returns its ETag. It is no error if it is completed already.

        With ``if_match`` only over the object with that ETag, with ``if_none_match`` only if there is none, where the
        server knows such a condition; else PreconditionFailed.
        """

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Abort an upload and drop its parts. It is no error if it is gone already."""

    def list_parts(self, key: str, upload_id: str) -> Sequence[PartStat]:
        """The parts that storage has, by number."""

    def uploads_of(self, key: str) -> Sequence[str]:
        """Ids of the unfinished uploads of exactly this key."""


LARGEST_OBJECT = 5 << 40
"""Bytes of the largest object in a bucket: what nearly all S3 servers accept, in 10,000 parts of up to 5 GiB."""


def check_size(store: ObjectStore, size: int, name: str) -> None:
    """Raise TooLarge when the storage can never store ``size`` bytes. (A folder's file system decides itself.)"""
    if size > largest(store):
        raise TooLarge(
            f"'{name}' has {size / (1 << 40):.3g} TiB, more than a bucket takes of one file (5 TiB); cut it, or split"
            " it into several files."
        )


def largest(store: ObjectStore) -> int:
    """Bytes of the largest file that may be written; a folder's file system decides itself."""
    return (1 << 63) - 1 if store.on_disk else LARGEST_OBJECT
