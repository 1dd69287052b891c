"""Storage in a local folder: one file per object, at the object's key below the root.

LocalStore has no state but the root's path; any thread and any number of processes may use the same folder. An object
is only replaced as a whole, by rename, so a reader that has it open keeps the revision it opened. No link below the
root is followed: an object that is a link, or lies below one, is StorageError (ELOOP).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from lamfs import permissions
from lamfs.copying import copy_fd, open_source, write_full
from lamfs.errors import (
    LamfsError,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageForbidden,
    StorageReadOnly,
)
from lamfs.keys import LOCK_FOLDER, is_probe
from lamfs.storage import meta as metas
from lamfs.storage.base import Capabilities, ObjectMeta, ObjectStat, Progress, StorageConfig, UnfinishedUpload
from lamfs.storage.folder import READ, SPOOL_FOLDER, TEMP_FOLDER, Entry, Folder
from lamfs.storage.osfiles import source_error, storage_error, sync, write_fetched
from lamfs.storage.root import check_object_key, is_utf8
from lamfs.storage.signs import sign

READ_CHUNK = 1 << 20

_CANNOT_IMPORT = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EROFS, errno.ETXTBSY})
"""Errors with which the file itself cannot be renamed (another file system, somebody else's file).

Then it is copied, and the copy reports the real cause.
"""


def etag_of(status: os.stat_result) -> str:
    """The ETag of a file. Every put changes it, because that makes a new inode with the time of the put."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"


class LocalStore:
    """ObjectStore over a folder. Objects are mode 0600, folders 0700. Stateless and thread-safe."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.root = config.root
        self._folder = Folder(config.root)

    @property
    def kind(self) -> Literal["local"]:
        return "local"

    @property
    def on_disk(self) -> bool:
        return True

    @property
    def imports_files(self) -> bool:
        return True

    @property
    def parts(self) -> None:
        """None: a file is copied or renamed as a whole."""

    @property
    def cache_name(self) -> str:
        return self.root.lstrip("/")

    def url(self, key: str) -> str:
        return f"{self.root}/{key}"

    def prepare(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to close."""

    # reading

    def head(self, key: str) -> ObjectStat:
        check_object_key(key, as_path=True)
        with self._errors_of(key):
            try:
                status = self._folder.stat(key)
            except NotADirectoryError:
                raise self._missing(key) from None
        if not stat.S_ISREG(status.st_mode):
            raise self._missing(key)
        return _object_stat(key, status)

    def open_local(self, key: str) -> int:
        check_object_key(key, as_path=True)
        with self._errors_of(key):
            try:
                fd = self._folder.open(key)
            except NotADirectoryError:
                raise self._missing(key) from None
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise self._missing(key)
            return fd

    def meta(self, key: str) -> ObjectMeta | None:
        fd = self.open_local(key)
        try:
            return _said(fd)
        finally:
            os.close(fd)

    def get(self, key: str, *, offset: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        with self._open(key, etag) as (fd, size):
            end = size if length is None else min(size, offset + length)
            return b"".join(_chunks(fd, offset, end, end - offset))

    def get_into(self, key: str, fd: int, *, offset: int, length: int, etag: str | None = None) -> None:
        end = offset + length
        with self._open(key, etag) as (source, size):
            for chunk in _chunks(source, offset, min(end, size), READ_CHUNK):
                write_fetched(fd, chunk, offset)
                offset += len(chunk)
        if offset < end:
            raise self._ends(key, end)

    def get_view(self, key: str, view: memoryview, *, offset: int, etag: str | None = None) -> None:
        with self._open(key, etag) as (source, _):
            done = 0
            while done < len(view):
                with view[done:] as rest:
                    got = os.preadv(source, [rest], offset + done)
                if not got:
                    raise self._ends(key, offset + len(view))
                done += got

    def get_views(self, key: str, views: Iterator[memoryview], *, offset: int, length: int, etag: str) -> None:
        for view in views:
            end = offset + len(view)
            self.get_view(key, view, offset=offset, etag=etag)
            offset = end

    def _ends(self, key: str, end: int) -> ObjectChanged:
        return ObjectChanged(
            f"The object '{key}' in {self.root} ends before byte {end}, which was asked for; look the artifact up"
            " again."
        )

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        base = prefix.rpartition("/")[0]
        if base and any(part in ("", ".", "..") for part in base.split("/")):
            return
        pending = [base]
        while pending:
            folder = pending.pop()
            try:
                with self._folder.entries(folder) as entries:
                    for entry in entries:
                        key = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir(follow_symlinks=False):
                            inside = key.startswith(prefix) or prefix.startswith(f"{key}/")
                            if inside and key not in (TEMP_FOLDER, SPOOL_FOLDER):
                                pending.append(key)
                        elif key.startswith(prefix) and is_utf8(key):
                            with contextlib.suppress(FileNotFoundError):
                                status = entry.stat(follow_symlinks=False)
                                if stat.S_ISREG(status.st_mode):
                                    yield _object_stat(key, status)
            except (FileNotFoundError, NotADirectoryError):
                if not self._folder.exists():
                    raise self._folder.missing() from None
            except OSError as error:
                if folder and error.errno == errno.ELOOP:
                    continue  # a link has replaced the folder: links are not objects, nor is what they lead to
                raise self._error(error, folder or ".") from error

    # writing

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
        check_object_key(key, as_path=True)
        with self._source(path) as (source, entry):
            importable = consume and _is_only_name(entry, source)
            if importable and self._import(key, source, entry, meta, exclusive=if_none_match, over=if_match):
                result = _object_stat(key, os.fstat(source))
                if progress is not None and result.size:
                    progress(result.size)
                return result
            result = self._store(
                key,
                lambda fd: _copy_all(source, fd, path, progress),
                exclusive=if_none_match,
                over=if_match,
                meta=meta,
            )
            if importable:
                entry.unlink()
        return result

    @contextlib.contextmanager
    def _source(self, path: str) -> Iterator[tuple[int, Entry]]:
        """Descriptor and name of a file to store."""
        try:
            source = open_source(path, READ)
        except OSError as error:
            raise source_error(error, path) from error
        try:
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise StorageError(f"'{path}', which was to be stored, is no regular file; store a regular file.")
            yield source, Entry(None, path)
        finally:
            os.close(source)

    def put_bytes(
        self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        check_object_key(key, as_path=True)

        def fill(fd: int) -> None:
            write_full(fd, data, 0)

        if not if_none_match and if_match is None:
            return self._store(key, fill)
        try:
            return self._store(key, fill, exclusive=if_none_match, over=if_match)
        except PreconditionFailed:
            if self._has_content(key, data):
                return self.head(key)
            raise

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
        check_object_key(dst, as_path=True)
        with self._open(src, etag) as (source, _):
            said = _said(source) if meta is None else meta
            return self._store(
                dst,
                lambda fd: _copy_all(source, fd, self.url(src), None),
                exclusive=if_none_match,
                over=if_match,
                meta=said,
            )

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            check_object_key(key, as_path=True)
            with self._errors_of(key):
                try:
                    with self._folder.entry(key) as entry:
                        os.unlink(entry.name, dir_fd=entry.directory)
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    if not self._folder.exists():
                        raise self._folder.missing() from None
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
                        raise
                    # A link on the way: what it leads to is not in this storage, so there is no object. The same holds
                    # for a name that is too long for the file system.
                    continue
            self._folder.prune(key.split("/")[:-1])
        self._folder.prune_temp()

    def temporaries(self) -> Iterator[ObjectStat]:
        with self._errors_of(TEMP_FOLDER):
            for name, status in self._folder.files(TEMP_FOLDER):
                if is_utf8(name):
                    yield _object_stat(f"{TEMP_FOLDER}/{name}", status)
        with self._errors_of(LOCK_FOLDER):
            for name, status in self._folder.files(LOCK_FOLDER.rstrip("/")):
                if is_utf8(name) and is_probe(f"{LOCK_FOLDER}{name}"):
                    yield _object_stat(f"{LOCK_FOLDER}{name}", status)

    def uploads(self) -> Iterator[UnfinishedUpload]:
        return iter(())

    def abort_upload(self, key: str, upload_id: str) -> None:
        """There are none in a folder."""

    # checking

    def check(self, *, write: bool = True, exclusive: bool = False) -> Capabilities:
        try:
            with self._folder.entries("") as entries:
                next(entries, None)
            status = os.stat(self.root)
        except PermissionError as error:
            raise StorageForbidden(
                f"The storage folder {self.root} may not be read by you ({error.strerror}); change its owner or"
                " permissions, or choose another folder."
            ) from error
        except OSError as error:
            raise self._error(error, ".") from error
        shared = permissions.check_storage_folder(self.root, status)
        linked = True
        if write:
            try:
                with self._errors_of(TEMP_FOLDER):
                    linked = self._folder.probe()
            except (StorageForbidden, StorageReadOnly) as error:
                raise StorageReadOnly(
                    f"The storage folder {self.root} can be read but not written ({os.strerror(error.errno)}); change"
                    " its permissions, remount it writable, or mount with --read-only."
                ) from error
        found = (None if linked else _NO_LINKS_WARNING.format(root=self.root), shared)
        warnings = tuple(warning for warning in found if warning is not None)
        return Capabilities(create_exclusive=linked, replace_guarded=True, read_guarded=True, warnings=warnings)

    # how an object gets into place

    def _import(
        self, key: str, source: int, entry: Entry, meta: ObjectMeta | None, *, exclusive: bool, over: str | None
    ) -> bool:
        """Rename the file itself into place. False: it must be copied. ``exclusive``, ``over``: as _store."""
        with self._errors_of(key):
            try:
                os.fchmod(source, 0o600)
                _say(source, meta)
                _stamp(source)
                sync(source)
                with self._over(key, over):
                    self._folder.place(entry, key, exclusive=exclusive)
                if exclusive:
                    entry.unlink()
            except OSError as error:
                if exclusive and isinstance(error, FileExistsError):
                    raise self._made_first(key) from None
                if error.errno in _CANNOT_IMPORT:
                    return False
                raise
        return True

    def _store(
        self,
        key: str,
        fill: Callable[[int], None],
        *,
        exclusive: bool = False,
        meta: ObjectMeta | None = None,
        over: str | None = None,
    ) -> ObjectStat:
        """Write a temporary file, make it durable, and give it its name.

        Raises PreconditionFailed when ``exclusive`` and the name is taken, or when the object does not have the ETag
        ``over``.
        """
        with self._errors_of(key), self._folder.temporary() as (fd, temp):
            fill(fd)
            _say(fd, meta)
            _stamp(fd)
            sync(fd)
            try:
                with self._over(key, over):
                    self._folder.place(temp, key, exclusive=exclusive)
            except FileExistsError:
                if not exclusive:
                    raise
                raise self._made_first(key) from None
            return _object_stat(key, os.fstat(fd))

    @contextlib.contextmanager
    def _over(self, key: str, etag: str | None) -> Iterator[None]:
        """A context in which the object has this ETag, and no other conditional writer changes it. None: no condition.

        Raises PreconditionFailed.
        """
        if etag is None:
            yield
            return
        with self._folder.locked():
            self._require(key, etag)
            yield

    def _require(self, key: str, etag: str) -> None:
        try:
            found = etag_of(self._folder.stat(key))
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found != etag:
            raise PreconditionFailed(
                f"The object '{key}' in {self.root} was changed by somebody else; read it again.", errno=errno.ESTALE
            )

    def _made_first(self, key: str) -> PreconditionFailed:
        return PreconditionFailed(f"There is already an object '{key}' in {self.root}; somebody else made it first.")

    def _has_content(self, key: str, data: bytes) -> bool:
        """Whether the object is exactly ``data``: then an earlier try of the same write has made it."""
        try:
            return self.head(key).size == len(data) and self.get(key) == data
        except ObjectMissing:
            return False

    # opening and errors

    @contextlib.contextmanager
    def _open(self, key: str, etag: str | None) -> Iterator[tuple[int, int]]:
        """Descriptor and size of an object. The ETag is compared before and after, to see writes in between."""
        fd = self.open_local(key)
        try:
            with self._errors_of(key):
                before = os.fstat(fd)
                if etag is not None and etag_of(before) != etag:
                    raise self._changed(key)
                yield fd, before.st_size
                if etag is not None and etag_of(os.fstat(fd)) != etag:
                    raise self._changed(key)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _errors_of(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(error, key) from error

    def _error(self, error: OSError, name: str) -> LamfsError:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and not self._folder.exists():
            return self._folder.missing()
        return storage_error(error, name, self.root)

    def _missing(self, key: str) -> LamfsError:
        if not self._folder.exists():
            return self._folder.missing()
        return ObjectMissing(f"There is no object '{key}' in the storage {self.root}; it was deleted or never stored.")

    def _changed(self, key: str) -> ObjectChanged:
        return ObjectChanged(
            f"The object '{key}' in the storage {self.root} is not the revision that was asked for; look the artifact"
            " up again."
        )


_NO_LINKS_WARNING = (
    "The file system of {root} has no hard links, so the lock of an instance holds between processes of one machine"
    " only: two machines could write at once, and the later one wins. Use the instance from one machine at a time."
)


def _object_stat(key: str, status: os.stat_result) -> ObjectStat:
    return ObjectStat(key, status.st_size, etag_of(status), status.st_mtime_ns)


def _chunks(fd: int, offset: int, end: int, chunk: int) -> Iterator[bytes]:
    """The bytes from ``offset`` to ``end``, or to the file's end if that comes first."""
    while offset < end:
        data = os.pread(fd, min(chunk, end - offset), offset)
        if not data:
            return
        yield data
        offset += len(data)


def _is_only_name(entry: Entry, fd: int) -> bool:
    """Whether renaming ``entry`` moves the whole open file: it is that file, and its only name."""
    try:
        named, opened = entry.stat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, opened) and opened.st_nlink == 1


def _stamp(fd: int) -> None:
    """Set the mtime to this moment, in nanoseconds.

    A spool file may have a time that a user set (``cp -p``), and the kernel's own timestamps are as coarse as its clock
    tick. Either could repeat an ETag on a reused inode.
    """
    now = time.time_ns()
    os.utime(fd, ns=(now, now))


def _say(fd: int, meta: ObjectMeta | None) -> None:
    """Store metadata with a file, if its file system keeps extended attributes. None: remove ours."""
    with contextlib.suppress(OSError):
        if meta is not None:
            os.setxattr(fd, metas.ATTRIBUTE, metas.as_attribute(meta))
        elif metas.ATTRIBUTE in os.listxattr(fd):
            os.removexattr(fd, metas.ATTRIBUTE)


def _said(fd: int) -> ObjectMeta | None:
    try:
        return metas.from_attribute(os.getxattr(fd, metas.ATTRIBUTE))
    except OSError:
        return None


def _copy_all(source: int, target: int, name: str, progress: Progress | None) -> None:
    def moved(count: int) -> None:
        sign()
        if progress is not None:
            progress(count)

    try:
        copy_fd(source, target, moved)
    except EOFError as error:
        raise StorageError(f"'{name}' became shorter while it was stored ({error}); store it again.") from error
