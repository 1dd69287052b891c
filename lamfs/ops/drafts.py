"""Drafts: what a save or replace would do, before anything is stored. Synchronous, any thread.

The rules (docs/SEMANTICS.md, and LaminDB 0.72 where they do not differ): a copy is a file, so equal bytes under another
key make another artifact. A key that exists names its artifact, whose content is then replaced. Equal bytes under the
same key are the existing artifact. The BLAKE3 block hashes decide equality (docs/decisions/hashes.md).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from lamfs import config
from lamfs.errors import AlreadyExists, FileMissing, InvalidArgument, NotFound, ObjectMissing
from lamfs.keys import check_key, into, key_with_suffix, root_path, suffix_of
from lamfs.model import AUTO_KEY_PREFIX, BLOCK_SIZE, ArtifactRecord, ContentHash, Revision, new_uid
from lamfs.ops import mounts, recover
from lamfs.ops.instance import Instance
from lamfs.registry import Provenance
from lamfs.storage.base import ObjectStore, check_size
from lamfs.work.direct import DirectWorker, finish, hash_object
from lamfs.work.source import Stamp, check_file, hash_stable


class Copy:
    """A temporary copy of another file. It is removed with this object."""

    def __init__(self) -> None:
        fd, name = tempfile.mkstemp(prefix=f"{config.temporary_name()}-copy-", dir=config.temporary_folder())
        os.close(fd)
        self.path = Path(name)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)


@dataclass(slots=True)
class Draft:
    """An artifact as it will be, and the file that has its bytes.

    ``path`` None: no bytes have to be stored. The record is then that of an existing artifact, or with ``etag`` that of
    an object which is already in storage. ``temporary``: the file is lamfs's own and may be moved. ``stamp``: the
    result of stat(2) when the file was hashed. ``replaces``: the artifact's record before; also when no bytes have to
    be stored because it has them. ``copy``: keeps the file at ``path`` alive when that is a copy.
    """

    record: ArtifactRecord
    path: Path | None = None
    stamp: Stamp = ()
    temporary: bool = False
    replaces: ArtifactRecord | None = None
    etag: str | None = None
    copy: Copy | None = None

    @property
    def pending(self) -> bool:
        """Whether bytes have to be stored, or an object registered."""
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
    """Draft the save of a file as an artifact.

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
    content, stamp, copy = _hash_whole(instance, source)
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
    """Draft the replacement of a saved artifact's content. The draft is not pending when the bytes are the same.

    uid, description, accessor and provenance stay. Another suffix changes the key. ``key``: the new key when the
    artifact is renamed as well. Raises InvalidArgument (a ValueError), FileMissing, NotFound.
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
    content, stamp, copy = _hash_whole(instance, source)
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
    """Link a record to the run that makes its content. Its creator stays."""
    if record.created_by_id is None:
        record.created_by_id = origin.user_id
    if origin.run_id is not None:
        record.run_id, record.transform_id = origin.run_id, origin.transform_id


def _existing(record: ArtifactRecord, description: str | None) -> Draft:
    """The draft of an artifact that has these bytes already: only its description changes."""
    now = replace(record, description=record.description if description is None else description)
    return Draft(now, replaces=record)


def text_of(record: ArtifactRecord) -> str:
    """An artifact as LaminDB's repr shows it, without the fields that are None."""
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
    """The artifact that has a key. Raises InvalidArgument when a directory has the key, or a file has a part of it."""
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
        recover.ensure_stored(instance, inode.ino)
        artifact = instance.registry.artifacts.by_ino(inode.ino)
    if artifact is None:
        raise AlreadyExists(
            f"The key '{key}' is taken by a file that is not stored yet, or is no regular file; choose another key, or"
            " run 'lamfs sync' first."
        )
    return artifact


# -- files ------------------------------------------------------------------------------------------------------------


def _hash_whole(instance: Instance, source: Path) -> tuple[ContentHash, Stamp, Copy | None]:
    """As hash_stable, but works for files that report a wrong size (those of /proc report 0): a copy is hashed then.
    Raises InvalidArgument."""
    worker = DirectWorker(instance.store)
    try:
        with open(source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            beyond = os.pread(file.fileno(), 1, size)
            lacking = size and not os.pread(file.fileno(), 1, size - 1)
            if not beyond and not lacking:
                return *finish(hash_stable(worker, source)), None
            copy = Copy()
            with open(copy.path, "wb") as whole:
                shutil.copyfileobj(file, whole, BLOCK_SIZE)
    except OSError as error:
        raise InvalidArgument(
            f"The file {source} cannot be read: {os.strerror(error.errno or 0)}.", errno=error.errno
        ) from error
    return *finish(hash_stable(worker, copy.path)), copy


def _read_from(copy: Copy | None, source: Path) -> Path:
    return source if copy is None else copy.path


def _key_in_mount(instance: Instance, path: str | os.PathLike[str]) -> str | None:
    """The key of a path inside of a mount of the instance; None: the path is elsewhere."""
    found = mounts.find_by_path(os.path.expanduser(path))
    if found is None or found[0].slug != instance.settings.slug:
        return None
    return found[1] or None


def key_in_storage(store: ObjectStore, path: str | os.PathLike[str]) -> str | None:
    """The object key of a path inside of the storage; None: the path is elsewhere. Raises InvalidArgument for another
    bucket.

    Links on the way to a storage folder are followed. Links inside it are not: the name means the link itself, and the
    storage refuses links.
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
    """Draft an artifact of an object that is already in storage, under its own name: the key is real."""
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
    except ObjectMissing:
        if store.on_disk:
            check_file(url)  # the error names a directory, or a link
        raise FileMissing(f"There is no object {url}; check the path.") from None
    record = ArtifactRecord(
        uid=new_uid(), key=key, suffix=suffix_of(root_path(key)[1]), revision=Revision(content, object_key, etag),
        description=description, key_is_virtual=False, accessor=accessor,
    )  # fmt: skip
    _link(record, origin)
    return Draft(record, etag=etag)
