"""Files get into and out of a storage folder whole: temporary files, renames, pruning, the lock of writers.

Everything below the root is reached by descriptors of the folders on the way. No link is followed there: others may
have filled the folder. Links on the way to the root are the user's own.

Folder has no state but the root's path, so any thread and process may use the same folder at once. Its methods take
keys, which the caller has checked. They raise OSError as the system does, with ELOOP for a link (``filename`` is its
path below the root), StorageMissing (no root), and StorageUnavailable (a race that never ends).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lamfs import beneath, config
from lamfs.errors import StorageMissing, StorageUnavailable
from lamfs.storage.osfiles import fsync_directory

TEMP_FOLDER = ".lamindb/_tmp"
SPOOL_FOLDER = ".lamindb/_spool"
RACES = 1000
"""Times that somebody else may prune a folder between our mkdir and our rename before we give up."""
LOCK_SECONDS = 20.0
"""Seconds that a writer waits for the other conditional writers of the folder. Each needs some milliseconds."""

READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
"""For names that may not be regular files: opening a FIFO or a terminal must neither block nor make it our terminal."""

_TEMP = TEMP_FOLDER.split("/")
_LOCK = "lock"


class Entry(NamedTuple):
    """A file by its name in an open directory. Without a directory, ``name`` is a path."""

    directory: int | None
    name: str

    def exists(self) -> bool:
        """Whether something has the name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def stat(self) -> os.stat_result:
        """As lstat(2)."""
        return os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)

    def unlink(self) -> None:
        """Remove the name, if it is there and may be removed."""
        with contextlib.suppress(OSError):
            os.unlink(self.name, dir_fd=self.directory)


class Folder:
    """The folder of a storage. Stateless."""

    def __init__(self, root: str) -> None:
        self.root = root

    def missing(self) -> StorageMissing:
        """The error for a root that does not exist."""
        return StorageMissing(
            f"The storage folder {self.root} does not exist or is no folder; create it, or mount the disk it is on."
        )

    def exists(self) -> bool:
        """Whether the root exists."""
        return os.path.isdir(self.root)

    # opening

    def open(self, key: str) -> int:
        """Open ``key`` for reading. It may be something other than a regular file."""
        *parts, name = key.split("/")
        folder = beneath.open_directory(self.root, parts, flags=beneath.THROUGH)
        try:
            return _open(folder, parts, name, READ)
        finally:
            os.close(folder)

    def stat(self, key: str) -> os.stat_result:
        """stat(2) of ``key``. Raises OSError(ELOOP) for a link."""
        *parts, name = key.split("/")
        folder = beneath.open_directory(self.root, parts, flags=beneath.THROUGH)
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        finally:
            os.close(folder)
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), key)
        return status

    @contextlib.contextmanager
    def entry(self, key: str) -> Iterator[Entry]:
        """A context with the entry ``key``, be it a link or nothing."""
        *parts, name = key.split("/")
        with self._directory(parts, beneath.THROUGH) as folder:
            yield Entry(folder, name)

    @contextlib.contextmanager
    def entries(self, folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """A context with the entries of a folder (``""``: the root)."""
        with self._directory(folder.split("/") if folder else [], beneath.DIRECTORY) as fd, os.scandir(fd) as found:
            yield found

    @contextlib.contextmanager
    def _directory(self, parts: Sequence[str], flags: int) -> Iterator[int]:
        fd = beneath.open_directory(self.root, parts, flags=flags)
        try:
            yield fd
        finally:
            os.close(fd)

    # getting into place

    @contextlib.contextmanager
    def temporary(self) -> Iterator[tuple[int, Entry]]:
        """A context with a new file of mode 0600: descriptor and name. It is removed if it still has that name."""
        fd, entry = self._create(config.temporary_name(), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            yield fd, entry
        finally:
            os.close(fd)
            entry.unlink()
            _close(entry)

    def place(self, source: Entry, key: str, *, exclusive: bool = False) -> None:
        """Give the file ``source`` the name ``key``, and make the name durable. Makes folders as needed.

        Replaces what has the name, and never writes through it: of a link, the link itself. With ``exclusive`` it
        raises FileExistsError instead, and ``source`` may stay as a second name. A caller that deletes the last object
        of a folder also removes the folder, perhaps between our mkdir and our rename: then both are repeated.
        """
        *parts, name = key.split("/")
        changed: set[int] = set()
        for _ in range(RACES):
            try:
                with self._directory(parts, beneath.DIRECTORY) as folder:
                    if exclusive:
                        self._link_new(source, folder, name)
                    else:
                        os.rename(source.name, name, src_dir_fd=source.directory, dst_dir_fd=folder)
                    with contextlib.suppress(FileNotFoundError):  # the object and its folder are deleted already
                        fsync_directory(folder)
            except FileNotFoundError:
                if not source.exists():
                    raise
                changed |= self._make(parts)
                continue
            for depth in sorted(changed, reverse=True):
                with contextlib.suppress(FileNotFoundError), self._directory(parts[:depth], beneath.DIRECTORY) as above:
                    fsync_directory(above)
            return
        raise StorageUnavailable(
            f"The folder {self.root}/{'/'.join(parts)} is removed again and again while it is written; see by whom."
        )

    def _link_new(self, source: Entry, folder: int, name: str) -> None:
        """Give the file ``source`` the name ``name`` in a folder, unless something has it. Raises FileExistsError.

        Without hard links, the lock of this machine's writers is used.
        """
        try:
            os.link(source.name, name, src_dir_fd=source.directory, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno not in beneath.NO_LINKS:
                raise
            with self.locked():
                if Entry(folder, name).exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
                os.rename(source.name, name, src_dir_fd=source.directory, dst_dir_fd=folder)

    def prune(self, parts: Sequence[str]) -> None:
        """Remove the folder at ``parts`` below the root and its parents while they are empty, never the root."""
        for depth in range(len(parts), 0, -1):
            try:
                with self._directory(parts[: depth - 1], beneath.THROUGH) as above:
                    os.rmdir(parts[depth - 1], dir_fd=above)
            except FileNotFoundError:
                pass
            except OSError:
                return  # not empty, or not ours to remove

    def prune_temp(self) -> None:
        """Remove TEMP_FOLDER if it is empty. It is made again when it is needed."""
        self.prune(_TEMP)

    def files(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        """Name and status of each file in a folder. In TEMP_FOLDER the lock file is left out."""
        try:
            with self.entries(folder) as found:
                for each in found:
                    with contextlib.suppress(FileNotFoundError):
                        status = each.stat(follow_symlinks=False)
                        if (folder, each.name) != (TEMP_FOLDER, _LOCK) and stat.S_ISREG(status.st_mode):
                            yield each.name, status
        except (FileNotFoundError, NotADirectoryError):
            return

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude every other conditional writer of this folder, in any thread and process of this machine.

        The holder removes the lock file, so a lock counts only while the locked file still has its name.
        """
        while True:
            fd, entry = self._create(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
            try:
                self._lock(fd)
                if os.path.samestat(os.fstat(fd), entry.stat()):
                    break
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                _close(entry)
                raise
            os.close(fd)
            _close(entry)
        try:
            yield
        finally:
            entry.unlink()
            os.close(fd)
            _close(entry)

    def _lock(self, fd: int) -> None:
        """Wait for the lock of writers, but not for ever: anybody who can open its file can hold it."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageUnavailable(
                        f"The file {self.root}/{TEMP_FOLDER}/{_LOCK} has been locked by another process for more than"
                        f" {LOCK_SECONDS:.0f} s, so nothing was written; find what holds it (lslocks) and end it."
                    ) from None
                time.sleep(0.005)
            else:
                return

    def probe(self) -> bool:
        """Write, link and remove a file as a put does. Returns whether link works."""
        linked = True
        with self.temporary() as (_, entry):
            other = Entry(entry.directory, f"{entry.name}-probe")
            try:
                os.link(
                    entry.name, other.name,
                    src_dir_fd=entry.directory, dst_dir_fd=other.directory, follow_symlinks=False,
                )  # fmt: skip
            except OSError as error:
                if error.errno not in beneath.NO_LINKS:
                    raise
                linked = False
            else:
                other.unlink()
        self.prune_temp()
        return linked

    def _create(self, name: str, flags: int) -> tuple[int, Entry]:
        """Open a file in TEMP_FOLDER, which is made as needed. The caller closes the descriptor and the entry's."""
        for _ in range(RACES):
            try:
                folder = beneath.open_directory(self.root, _TEMP, flags=beneath.THROUGH)
                try:
                    return _open(folder, _TEMP, name, flags), Entry(folder, name)
                except BaseException:
                    os.close(folder)
                    raise
            except FileNotFoundError:
                self._make(_TEMP)
        raise StorageUnavailable(
            f"The folder {self.root}/{TEMP_FOLDER} is removed again and again while it is written; see by whom."
        )

    def _make(self, parts: Sequence[str]) -> set[int]:
        """Make the folder at ``parts`` (mode 0700), but not the root.

        Returns the depths of the folders that got an entry: 0 is the root.
        """
        if not self.exists():
            raise self.missing()
        changed = set()
        for depth, part in enumerate(parts):
            try:
                with self._directory(parts[:depth], beneath.THROUGH) as above:
                    os.mkdir(part, 0o700, dir_fd=above)
            except FileExistsError:
                continue
            except FileNotFoundError:
                break  # pruned meanwhile; the caller tries again
            changed.add(depth)
        return changed


def _open(folder: int, parts: Sequence[str], name: str, flags: int) -> int:
    try:
        return beneath.open_file(folder, name, flags)
    except OSError as error:
        error.filename = "/".join([*parts, name])
        raise


def _close(entry: Entry) -> None:
    if entry.directory is not None:
        os.close(entry.directory)
