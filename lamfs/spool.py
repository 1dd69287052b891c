"""The spool of one instance on this machine: a folder of files with bytes that storage may not have yet.

A registry and a shared storage folder come from others. So neither the names in a journal nor the files in the folder
are trusted: a spool file has a name that ``spool_name`` can make, is a regular file, and is opened relative to its
folder, without following links. The folder belongs to this user, and nobody else may enter it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Self

from lamfs import beneath
from lamfs.errors import StorageError
from lamfs.keys import DRAFT, check_spool_name, is_draft_name, is_spool_name

log = logging.getLogger("lamfs.spool")

_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
"""Errors of fsync(2) on a folder, on file systems that need none."""
_NO_FILE = frozenset({errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV})
"""Errors of open(2) for a link, a directory, a FIFO, a socket, a device."""


class SpoolFolder:
    """An open spool folder. Its descriptor is held until ``close``. Any thread. Context manager: closes.

    Methods with a name raise InvalidName if ``spool_name`` cannot make it, StorageError if it does not name a regular
    file, and OSError like the system call.
    """

    def __init__(self, fd: int, folder: str) -> None:
        """Use ``find`` or ``make``. This object closes ``fd``."""
        self._fd = fd
        self.folder = folder
        """The path for people. Nothing is opened by it."""

    @classmethod
    def find(cls, root: str | os.PathLike[str], parts: Sequence[str]) -> Self | None:
        """The folder at ``parts`` below ``root``. None if there is none (no spool yet, or its disk is not mounted).

        Raises StorageError if it, or a folder on the path to it, is a link or not a directory, or if it is somebody
        else's.
        """
        return cls._open(root, parts, make=False)

    @classmethod
    def make(cls, root: str | os.PathLike[str], parts: Sequence[str]) -> Self:
        """Like ``find``, but makes the folder if there is none. Raises StorageError also if it cannot be made."""
        found = cls._open(root, parts, make=True)
        assert found is not None
        return found

    @classmethod
    def _open(cls, root: str | os.PathLike[str], parts: Sequence[str], *, make: bool) -> Self | None:
        folder = os.path.join(os.fspath(root), *parts)
        try:
            fd = beneath.open_directory(root, parts, make=make)
        except OSError as error:
            if error.errno == errno.ENOENT and not make:
                return None
            raise _unusable(folder, error) from error
        try:
            _make_private(fd, folder)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, folder)

    def close(self) -> None:
        """Close the folder's descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- files --------------------------------------------------------------------------------------------------

    def open(self, name: str, flags: int) -> int:
        """Descriptor of a spool file, made with mode 0600 if ``flags`` require it. The caller closes it."""
        check_spool_name(name)
        try:
            fd = beneath.open_file(self._fd, name, flags | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise self._no_file(name) from error
            raise
        if not flags & os.O_EXCL and not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._no_file(name)
        return fd

    @contextlib.contextmanager
    def opened(self, name: str, flags: int) -> Iterator[int]:
        """As ``open``, for the time of the block."""
        fd = self.open(name, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def stat(self, name: str) -> os.stat_result:
        """Attributes of a spool file."""
        check_spool_name(name)
        found = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise self._no_file(name)
        return found

    def exists(self, name: str) -> bool:
        """Whether there is a spool file with that name."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def unlink(self, name: str, *, missing_ok: bool = True) -> None:
        """Remove a spool file. If the name is a link, remove the link."""
        check_spool_name(name)
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def link(self, name: str, other: SpoolFolder) -> None:
        """Also give a spool file its name in another folder on the same disk. If the file system has no hard links,
        move it there."""
        check_spool_name(name)
        try:
            os.link(name, name, src_dir_fd=self._fd, dst_dir_fd=other._fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in beneath.NO_LINKS:
                raise
            os.rename(name, name, src_dir_fd=self._fd, dst_dir_fd=other._fd)

    def receive(self, name: str, folder: int) -> None:
        """Move a spool file here, from another folder on the same disk. ``folder``: descriptor of that folder."""
        os.rename(check_spool_name(name), name, src_dir_fd=folder, dst_dir_fd=self._fd)

    def rename(self, name: str, new: str) -> None:
        """Give a spool file another name."""
        os.rename(check_spool_name(name), check_spool_name(new), src_dir_fd=self._fd, dst_dir_fd=self._fd)

    # -- drafts -------------------------------------------------------------------------------------------------
    # A spool file whose bytes exist elsewhere too is made under another name until it has all of them. After a crash
    # the incomplete file is not needed.

    def open_draft(self, name: str) -> int:
        """Descriptor of the new draft of a spool file, to read and write. The caller closes it."""
        check_spool_name(name)
        return beneath.open_file(self._fd, f"{name}{DRAFT}", os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def draft_path(self, name: str) -> str:
        """As ``path``, for the draft of a spool file."""
        return f"{self.path(name)}{DRAFT}"

    def finish_draft(self, name: str) -> None:
        """The draft of a spool file is complete: give it the spool file's name."""
        os.rename(f"{check_spool_name(name)}{DRAFT}", name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def finish_draft_as(self, draft: str, name: str) -> None:
        """The draft of ``draft`` is complete: make it spool file ``name``. If that exists already, it stays."""
        source = f"{check_spool_name(draft)}{DRAFT}"
        try:
            os.link(source, check_spool_name(name), src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in beneath.NO_LINKS:
                raise
            if not self.exists(name):
                os.rename(source, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        self.drop_draft(draft)

    def drop_draft(self, name: str) -> None:
        """Remove the draft of a spool file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{check_spool_name(name)}{DRAFT}", dir_fd=self._fd)

    def drafts(self) -> list[str]:
        """The spool files that have a draft, in order. A process may still be working on a draft."""
        with self._entries() as entries:
            found = [entry.name for entry in entries if is_draft_name(entry.name)]
        return sorted(name.removesuffix(DRAFT) for name in found)

    def path(self, name: str) -> str:
        """A path for open(2), link(2) and rename(2), in this and other processes of this user, as long as the folder is
        open here. It leads to the folder even if that is renamed. open(2) follows a link there, so use the path only
        for a file that ``stat`` or ``open`` has found."""
        return f"/proc/{os.getpid()}/fd/{self._fd}/{check_spool_name(name)}"

    def shown(self, name: str) -> str:
        """The path of a spool file for people."""
        return os.path.join(self.folder, name)

    def _no_file(self, name: str) -> StorageError:
        return StorageError(
            f"{self.shown(name)} is not a file that lamfs has made (it is a link, a folder or a device), so it is not"
            " used; look what it is, and remove it."
        )

    # -- the folder ---------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The spool files, in order: regular files with a spool name."""
        with self._entries() as entries:
            return sorted(entry.name for entry in entries if _is_spool_file(entry))

    def strangers(self) -> list[str]:
        """Names of everything else in the folder, in order."""
        with self._entries() as entries:
            return sorted(
                entry.name for entry in entries if not _is_spool_file(entry) and not is_draft_name(entry.name)
            )

    def allocated(self) -> int:
        """Allocated bytes of everything in the folder."""
        used = 0
        with self._entries() as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # stored meanwhile
                    used += entry.stat(follow_symlinks=False).st_blocks * 512
        return used

    @contextlib.contextmanager
    def _entries(self) -> Iterator[Iterator[os.DirEntry[str]]]:
        # Its own open file description: two readers of the same one would share their position.
        fd = os.open(".", beneath.DIRECTORY, dir_fd=self._fd)
        try:
            with os.scandir(fd) as entries:
                yield entries
        finally:
            os.close(fd)

    def disk(self) -> os.statvfs_result:
        """Size and free space of the folder's disk."""
        return os.fstatvfs(self._fd)

    def device(self) -> int:
        """The number of that disk, as in ``st_dev``."""
        return os.fstat(self._fd).st_dev

    def sync(self) -> None:
        """Make the names in the folder durable."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise


def remove(root: str | os.PathLike[str], parts: Sequence[str]) -> list[str]:
    """Remove a spool: its files, then the folder and the one above it (not ``root``), if nothing else is in them.

    Returns the paths that stay because lamfs has not made them. Raises StorageError like ``find``, OSError.
    """
    spool = SpoolFolder.find(root, parts)
    if spool is None:
        return []
    with spool:
        for name in spool.names():
            spool.unlink(name)
        for name in spool.drafts():
            spool.drop_draft(name)
        left = [spool.shown(name) for name in spool.strangers()]
    for depth in range(len(parts), max(len(parts) - 2, 0), -1):
        with contextlib.suppress(OSError), beneath.directory(root, parts[: depth - 1]) as above:
            os.rmdir(parts[depth - 1], dir_fd=above)
    return left


def _is_spool_file(entry: os.DirEntry[str]) -> bool:
    return is_spool_name(entry.name) and entry.is_file(follow_symlinks=False)


def _make_private(fd: int, folder: str) -> None:
    """Make sure that only this user can enter the folder. Raises StorageError if it belongs to somebody else."""
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        raise StorageError(
            f"The spool folder {folder} belongs to another user (uid {found.st_uid}), so nothing is kept in it; look"
            " who made it, and remove or rename it.",
            errno=errno.EPERM,
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        with contextlib.suppress(OSError):
            os.fchmod(fd, 0o700)
        if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:
            # The file system has no permissions (exFAT), or is read-only. Files in there are equally open.
            log.info("the permissions of the spool folder %s cannot be changed", folder)


def _unusable(folder: str, error: OSError) -> StorageError:
    name = os.fsdecode(error.filename or folder)
    place = name if name.startswith("/") else f"{folder.rpartition(f'/{name}')[0]}/{name}"
    place = "it" if place == folder else place
    if error.errno == errno.ELOOP:
        return StorageError(
            f"The spool folder {folder} is not used, because {place} is a link, and links are not followed there;"
            " replace it by a directory of your own.",
            errno=errno.ELOOP,
        )
    if error.errno == errno.ENOTDIR:
        return StorageError(
            f"The spool folder {folder} cannot be used, because {place} is not a directory; remove or rename it.",
            errno=errno.ENOTDIR,
        )
    return StorageError(
        f"The spool folder {folder} cannot be used ({os.strerror(error.errno or errno.EIO)}, at {name}); make it"
        " yourself, or look at the permissions there.",
        errno=error.errno,
    )
