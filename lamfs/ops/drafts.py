"""What a save or replace would do, found out before anything is stored: Draft. Synchronous, any thread.

Rules (docs/SEMANTICS.md, and LaminDB 0.72 where they do not differ): a copy is a file, so equal bytes under another key
make another artifact; a key that exists names that artifact, whose content is then replaced; equal bytes under the same
key are the existing artifact. Equality is decided on the BLAKE3 block hashes (docs/decisions/hashes.md).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lamfs import config, copying, hashing
from lamfs.errors import AlreadyExists, InvalidArgument, LamfsError, NotFound, ObjectMissing, StorageError
from lamfs.keys import check_key, into, key_with_suffix, root_path, suffix_of
from lamfs.model import AUTO_KEY_PREFIX, BLOCK_SIZE, ArtifactRecord, ContentHash, Revision, new_uid
from lamfs.mover import buffers
from lamfs.ops import mounts
from lamfs.ops.instance import Instance
from lamfs.pool import Pool
from lamfs.registry import Provenance
from lamfs.storage.base import ObjectStat, ObjectStore, check_size

READERS = 8
"""Blocks of an object that are read at a time."""


class FileMissing(NotFound, FileNotFoundError):  # type: ignore[misc]
    """The file that was to be saved does not exist."""


class Copy:
    """A temporary file with what was read of another one, which is removed with this object."""

    def __init__(self) -> None:
        fd, name = tempfile.mkstemp(prefix=f"{config.temporary_name()}-copy-", dir=config.temporary_folder())
        os.close(fd)
        self.path = Path(name)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)


@dataclass(slots=True)
class Draft:
    """An artifact as it shall become, and the file its bytes come from.

    ``path`` None: nothing is to be stored (the record is that of an existing artifact, or with ``etag`` that of an
    object which is in storage already). ``temporary``: the file is ours and may be taken. ``stamp``: what stat(2) said
    when the file was hashed. ``replaces``: the artifact's record before, also when nothing is to be stored because it
    has these bytes. ``copy``: holds the file at ``path`` when
    that is a copy of the one that was given.
    """

    record: ArtifactRecord
    path: Path | None = None
    stamp: tuple[int, ...] = ()
    temporary: bool = False
    replaces: ArtifactRecord | None = None
    etag: str | None = None
    copy: Copy | None = None

    @property
    def pending(self) -> bool:
        """Whether ``commit`` has something to do."""
        return self.path is not None or self.etag is not None


def draft_new(
    instance: Instance,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    description: str | None = None,
    origin: Provenance | None = None,
    virtual: bool = True,
    accessor: str | None = None,
    temporary: bool = False,
) -> Draft:
    """What saving a file as an artifact would do.

    Raises InvalidArgument and InvalidName (ValueErrors), FileMissing, AlreadyExists, RegistryError.
    """
    origin = origin or Provenance()
    inside = key_in_storage(instance.store, path)
    if inside is not None:
        return _draft_in_place(instance, inside, key, description, origin, accessor)
    mounted = None if key is not None or temporary else _key_in_mount(instance, path)
    if mounted is not None and (there := _at_key(instance, mounted)) is not None:
        return _existing(there, description)
    if key is None and description is None and origin.run_id is None:
        raise InvalidArgument("Pass one of key, run or description as a parameter.")
    source = check_file(path)
    check_size(instance.store, source.stat().st_size, str(source))
    if key is not None:
        if key.endswith("/") and temporary:
            raise InvalidArgument(
                f"The key '{key}' is a directory, and a DataFrame has no file name; give a whole key."
            )
        key = check_key(into(key, source.name), real=not virtual)
    registry = instance.registry
    content, stamp, copy = _hash_whole(source)
    if key is None:
        for twin in registry.artifacts.same_content(content):
            if twin.key is None and twin.visibility > -1:
                return _existing(twin, description)
    else:
        there = _at_key(instance, key)
        if there is not None:
            if content.same_bytes(there.revision.content):
                return _existing(there, description)
            record = replace(
                there,
                revision=Revision(content, "", ""),
                description=there.description if description is None else description,
                accessor=there.accessor if accessor is None else accessor,
            )
            _link(record, origin)
            return Draft(record, _read_from(copy, source), stamp, temporary, replaces=there, copy=copy)
    suffix = suffix_of(source.name) if key is None else suffix_of(root_path(key)[1])
    record = ArtifactRecord(
        uid=new_uid(), key=key, suffix=suffix, revision=Revision(content, "", ""), description=description,
        key_is_virtual=virtual, accessor=accessor,
    )  # fmt: skip
    _link(record, origin)
    return Draft(record, _read_from(copy, source), stamp, temporary, copy=copy)


def draft_replace(
    instance: Instance,
    before: ArtifactRecord,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    origin: Provenance | None = None,
    temporary: bool = False,
) -> Draft:
    """What replacing the content of a saved artifact would do; not pending when the bytes are the same.

    uid, description, accessor and provenance stay; another suffix changes the key, which is ``key`` if it is to be
    renamed as well. Raises InvalidArgument (a ValueError), FileMissing, NotFound.
    """
    registry = instance.registry
    if key_in_storage(instance.store, path) is not None:
        raise InvalidArgument("Can only replace with a local file not in any Storage.")
    source = check_file(path)
    current = registry.artifacts.by_uid(before.uid)
    if current is None:
        raise NotFound(f"The artifact {before.uid} was deleted for good; save the file as a new one.")
    if key is not None:
        current.key, current.suffix = key, suffix_of(root_path(key)[1])
    check_size(instance.store, source.stat().st_size, str(source))
    content, stamp, copy = _hash_whole(source)
    newer = current.ino is not None and registry.journal.put_of(current.ino) is not None
    if content.same_bytes(current.revision.content) and not newer:
        return _existing(current, None)
    record = replace(current, revision=Revision(content, "", ""), suffix=suffix_of(source.name))
    if record.suffix != current.suffix and current.key is not None:
        record.key = check_key(
            key_with_suffix(current.key, current.suffix, record.suffix), real=not current.key_is_virtual
        )
        if current.visibility > -1 and registry.tree.resolve(record.key) is not None:
            raise InvalidArgument(
                f"Replacing '{current.key}' by a '{record.suffix}' file would change its key to '{record.key}', which"
                " is taken; rename or delete what is there."
            )
    if origin is not None:
        _link(record, origin)
    return Draft(record, _read_from(copy, source), stamp, temporary, replaces=current, copy=copy)


def _link(record: ArtifactRecord, origin: Provenance) -> None:
    """Link a record to the run that makes its content. Who created it stays."""
    if record.created_by_id is None:
        record.created_by_id = origin.user_id
    if origin.run_id is not None:
        record.run_id, record.transform_id = origin.run_id, origin.transform_id


def _existing(record: ArtifactRecord, description: str | None) -> Draft:
    """The draft of an artifact that has the bytes already: no more than its description changes."""
    now = replace(record, description=record.description if description is None else description)
    return Draft(now, replaces=record)


def text_of(record: ArtifactRecord) -> str:
    """An artifact as LaminDB's repr shows it, fields that are None left out."""
    from lamfs.model import iso

    fields: dict[str, object] = {
        "uid": record.uid, "key": record.key, "description": record.description, "suffix": record.suffix,
        "accessor": record.accessor, "size": record.size, "hash": record.hash,
        "hash_type": record.revision.content.hash_type, "visibility": record.visibility,
        "key_is_virtual": record.key_is_virtual, "updated_at": iso(record.updated_at) if record.updated_at else None,
        "storage_id": record.storage_id, "transform_id": record.transform_id, "run_id": record.run_id,
        "created_by_id": record.created_by_id,
    }  # fmt: skip
    return f"Artifact({', '.join(f'{name}={value!r}' for name, value in fields.items() if value is not None)})"


# -- keys -------------------------------------------------------------------------------------------------------------


def _at_key(instance: Instance, key: str) -> ArtifactRecord | None:
    """The artifact that has a key. Raises InvalidArgument when a directory is there, or a file on the way to it."""
    tree = instance.registry.tree
    parent = root_path(key)[0]
    while parent:
        inode = tree.resolve(parent)
        if inode is not None:
            if not stat.S_ISDIR(inode.mode):
                raise InvalidArgument(
                    f"'{parent}' is a file, so nothing can be stored below it as '{key}'; choose another key."
                )
            break
        parent = root_path(parent)[0]
    inode = tree.resolve(key)
    if inode is None:
        return None
    if stat.S_ISDIR(inode.mode):
        raise InvalidArgument(f"'{key}' is a directory; choose another key, such as '{key}/name.csv'.")
    artifact = instance.registry.artifacts.by_ino(inode.ino)
    if artifact is None:
        from lamfs.ops.artifacts import settle

        settle(instance, inode.ino)
        artifact = instance.registry.artifacts.by_ino(inode.ino)
    if artifact is None:
        raise AlreadyExists(
            f"The key '{key}' is taken by a file that is not stored yet, or is no regular file; choose another key, or"
            " run 'lamfs sync' first."
        )
    return artifact


# -- files ------------------------------------------------------------------------------------------------------------


def check_file(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a regular file. Raises FileMissing, InvalidArgument."""
    source = Path(os.path.abspath(os.path.expanduser(path)))
    try:
        mode = source.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileMissing(f"There is no file {source}; check the path.") from None
    except OSError as error:
        raise InvalidArgument(f"The file {source} cannot be read: {error}.", errno=error.errno) from error
    if stat.S_ISDIR(mode):
        raise InvalidArgument(
            f"{source} is a directory; Artifact.from_dir(path, key=…) makes one artifact of each file in it."
        )
    if not stat.S_ISREG(mode):
        raise InvalidArgument(f"{source} is no regular file; only regular files become artifacts.")
    return source


def hash_stable(path: Path) -> tuple[ContentHash, tuple[int, ...]]:
    """Hash a file that is not being written: the hash, and what stat(2) said before and after.

    Raises InvalidArgument when it changes all the time, or cannot be read.
    """
    for _ in range(3):
        try:
            before = stamp_of(path)
            content = hashing.hash_file(path)
            if stamp_of(path) == before:
                return content, before
        except EOFError:
            continue
        except OSError as error:
            raise InvalidArgument(f"The file {path} cannot be read: {error}.", errno=error.errno) from error
    raise InvalidArgument(f"The file {path} is being written; save it when that is done.")


def _hash_whole(source: Path) -> tuple[ContentHash, tuple[int, ...], Copy | None]:
    """As hash_stable; of a file that says a wrong size of itself (those of /proc say 0), a copy is hashed: what counts
    is what is read. Raises InvalidArgument."""
    try:
        with open(source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            beyond = os.pread(file.fileno(), 1, size)
            lacking = size and not os.pread(file.fileno(), 1, size - 1)
            if not beyond and not lacking:
                return *hash_stable(source), None
            copy = Copy()
            with open(copy.path, "wb") as whole:
                shutil.copyfileobj(file, whole, BLOCK_SIZE)
    except OSError as error:
        raise InvalidArgument(
            f"The file {source} cannot be read: {os.strerror(error.errno or 0)}.", errno=error.errno
        ) from error
    return *hash_stable(copy.path), copy


def _read_from(copy: Copy | None, source: Path) -> Path:
    return source if copy is None else copy.path


def _key_in_mount(instance: Instance, path: str | os.PathLike[str]) -> str | None:
    """The key of a path that lies in a mount of the instance, else None."""
    found = mounts.find_by_path(os.path.expanduser(path))
    if found is None or found[0].slug != instance.settings.slug:
        return None
    return found[1] or None


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is written: size, times, inode and device."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def key_in_storage(store: ObjectStore, path: str | os.PathLike[str]) -> str | None:
    """The object key of a path that lies in the storage, else None. Raises InvalidArgument for another bucket.

    Links on the way to a storage folder are followed. Those in it are not: what is named there is the link, wherever
    it leads to, and the storage refuses that.
    """
    text = os.fspath(path)
    root = store.config.root
    if "://" in text:
        if text.startswith(f"{root}/"):
            return text[len(root) + 1 :]
        raise InvalidArgument(f"{text} is not in the storage {root}; download it first, and save the local file.")
    if not root.startswith("/"):
        return None
    base = os.path.realpath(root)
    parts = os.path.abspath(os.path.expanduser(text)).split("/")[1:]
    real = ""
    for depth, part in enumerate(parts):
        real = os.path.realpath(f"{real}/{part}")
        if real == base or real.startswith(f"{base}/"):
            inside = real[len(base) + 1 :].split("/") if real != base else []
            return "/".join([*inside, *parts[depth + 1 :]]) or None
    return None


# -- in place ---------------------------------------------------------------------------------------------------------


def _draft_in_place(
    instance: Instance,
    object_key: str,
    key: str | None,
    description: str | None,
    origin: Provenance,
    accessor: str | None,
) -> Draft:
    """Register an object that is in storage already, where it is: its key is real."""
    store, registry = instance.store, instance.registry
    url = store.url(object_key)
    holder = registry.artifacts.with_object(object_key)
    if holder is not None and holder.visibility > -1 and key in (None, holder.key):
        return _existing(holder, description)
    if object_key.startswith(AUTO_KEY_PREFIX) or (object_key.endswith(".lndb") and "/" not in object_key):
        raise InvalidArgument(f"{url} is lamfs's own; save a copy of it from another place.")
    if holder is not None:
        raise InvalidArgument(f"{url} holds the bytes of artifact {holder.uid}; restore that, or delete it for good.")
    if key is not None and check_key(key) != object_key:
        raise InvalidArgument(
            f"The path '{url}' is already in registered storage '{store.config.root}' with key '{object_key}'. You"
            f" passed conflicting key '{key}': please move the file before registering it."
        )
    key = check_key(object_key, real=True)
    if _at_key(instance, key) is not None:
        raise InvalidArgument(f"The key '{key}' of {url} is that of another artifact; rename one of them.")
    try:
        content, etag = hash_object(store, object_key)
    except FileMissing:
        if store.on_disk:
            check_file(url)  # says so when it is there, and no file
        raise
    record = ArtifactRecord(
        uid=new_uid(), key=key, suffix=suffix_of(root_path(key)[1]), revision=Revision(content, object_key, etag),
        description=description, key_is_virtual=False, accessor=accessor,
    )  # fmt: skip
    _link(record, origin)
    return Draft(record, etag=etag)


def hash_object(
    store: ObjectStore, object_key: str, progress: Callable[[int], None] | None = None
) -> tuple[ContentHash, str]:
    """Read an object once, and hash it. Returns the hash and the ETag of what was read. ``progress``: told the bytes.

    Raises FileMissing, and storage errors: a link in a storage folder is one.
    """
    try:
        found = store.head(object_key)
        local = store.open_local(object_key)
        if local is not None:
            content = _hash_opened(local, found.size, store.url(object_key), progress)
            if content is None or store.head(object_key).etag != found.etag:
                raise LamfsError(f"The file {store.url(object_key)} is being written; save it when that is done.")
            return content, found.etag
    except ObjectMissing:
        raise FileMissing(f"There is no object {store.url(object_key)}; check the path.") from None
    return _hash_fetched(store, found, progress), found.etag


def _hash_fetched(store: ObjectStore, found: ObjectStat, progress: Callable[[int], None] | None) -> ContentHash:
    """Hash an object of a bucket. On the disk are no more than its two ends, which one of its hashes is made of."""
    size = found.size
    with tempfile.TemporaryFile(dir=config.temporary_folder()) as ends:
        os.ftruncate(ends.fileno(), size)

        def fetch(offset: int) -> ContentHash:
            length = min(BLOCK_SIZE, size - offset)
            with buffers.own().view(length) as view:
                store.get_view(found.key, view, offset=offset, etag=found.etag)
                if offset < hashing.MD5_MAX or offset + length > size - hashing.MD5_MAX:
                    copying.write_full(ends.fileno(), view, offset)
                return hashing.hash_view(view)

        parts: dict[int, ContentHash] = {}
        with Pool(READERS, "lamfs-hash") as pool:
            for offset, future in pool.unordered(fetch, range(0, size, BLOCK_SIZE)):
                parts[offset] = future.result()
                if progress is not None:
                    progress(parts[offset].size)
        if size <= hashing.MD5_MAX:
            return hashing.hash_fd(ends.fileno(), size)
        return hashing.join_ranges((parts[at] for at in sorted(parts)), hashing.hash_ends(ends.fileno(), size))


def may_be_stored(store: ObjectStore, object_key: str | None, artifact: ArtifactRecord | None) -> bool:
    """Whether a spool file was perhaps renamed into the storage folder: something is there that is not what its
    ``artifact`` had before, or it cannot be told."""
    if object_key is None or not store.takes_files:
        return False
    try:
        etag = store.head(object_key).etag
        return artifact is None or (object_key, etag) != (artifact.revision.object_key, artifact.revision.etag)
    except ObjectMissing:
        return False
    except StorageError:
        return True  # a link; the folder is away; …: said when it is stored


def _hash_opened(fd: int, size: int, name: str, progress: Callable[[int], None] | None) -> ContentHash | None:
    """The hash of the first ``size`` bytes of a file, which is closed then; None: it has become shorter."""
    try:
        return hashing.hash_fd(fd, size, progress)
    except EOFError:
        return None
    except OSError as error:
        raise InvalidArgument(f"The file {name} cannot be read: {error}.", errno=error.errno) from error
    finally:
        os.close(fd)
