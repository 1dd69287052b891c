"""How files get into and out of a storage folder whole: temporary files, renames, pruning, the lock of writers.

Folder owns no state but the root's path, so any thread and process may use the same folder at once. Its methods raise
OSError as the system does, besides StorageMissing (no root) and StorageUnavailable (a race that never ends).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator

from lamfs.errors import StorageMissing, StorageUnavailable
from lamfs.storage.osfiles import fsync_folder

TEMP_FOLDER = ".lamindb/_tmp"
SPOOL_FOLDER = ".lamindb/_spool"
LEFTOVER_SECONDS = 24 * 3600
"""A file in TEMP_FOLDER that nobody has written for this long belongs to a process that died."""
RACES = 1000
"""How often a folder may be pruned by somebody else between our mkdir and our rename before we give up."""
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What link(2) answers on file systems without hard links."""


class Folder:
    """The folder of a storage. Stateless."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.temp = f"{root}/{TEMP_FOLDER}"

    def missing(self) -> StorageMissing:
        """The error that says that the root is not there."""
        return StorageMissing(
            f"The storage folder {self.root} does not exist or is no folder; create it, or mount the disk it is on."
        )

    def exists(self) -> bool:
        """Whether the root is there."""
        return os.path.isdir(self.root)

    @contextlib.contextmanager
    def temporary(self) -> Iterator[tuple[int, str]]:
        """A new file of mode 0600: its descriptor and path. Removed at the end if it still has that name."""
        path = f"{self.temp}/{secrets.token_hex(8)}"
        fd = self._open_making_folder(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            yield fd, path
        finally:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(path)

    def place(self, path: str, target: str, *, exclusive: bool = False) -> None:
        """Give the file ``path`` the name ``target``, making folders as needed; the name is then durable.

        Replaces what has the name. With ``exclusive`` that is FileExistsError, and ``path`` may stay as a second name.
        Whoever deletes the last object of a folder removes the folder, maybe between our mkdir and our rename: so
        both are repeated.
        """
        folder = os.path.dirname(target)
        changed = {folder}
        for _ in range(RACES):
            try:
                if exclusive:
                    self._link_new(path, target)
                else:
                    os.rename(path, target)
            except FileNotFoundError:
                if not os.path.lexists(path):
                    raise
                changed |= self._make(folder)
                continue
            for name in sorted(changed, key=len, reverse=True):
                with contextlib.suppress(FileNotFoundError):  # the object and its folder are deleted already
                    fsync_folder(name)
            return
        raise StorageUnavailable(f"The folder {folder} is removed again and again while it is written; look who does.")

    def _link_new(self, path: str, target: str) -> None:
        """Give the file ``path`` the name ``target`` unless something has it. Raises FileExistsError.

        Without hard links the lock of this machine's writers stands in.
        """
        try:
            os.link(path, target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with self.locked():
                if os.path.lexists(target):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
                os.rename(path, target)

    def prune(self, folder: str) -> None:
        """Remove ``folder`` and its parents while they are empty, never the root."""
        while len(folder) > len(self.root):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                pass
            except OSError:
                return  # not empty, or not ours to remove
            folder = os.path.dirname(folder)

    def prune_temp(self) -> None:
        """Remove TEMP_FOLDER if it is empty; whoever wants it next makes it again."""
        self.prune(self.temp)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude every other conditional writer of this folder, in any thread and process of this machine.

        The lock file is removed by its holder, so a lock counts only while the file that is locked has the name.
        """
        path = f"{self.temp}/lock"
        while True:
            fd = self._open_making_folder(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    break
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(fd)

    def probe(self) -> bool:
        """Write, link and remove a file as a put does, and clear what dead processes left. Whether link works."""
        linked = True
        with self.temporary() as (_, path):
            try:
                os.link(path, f"{path}-probe")
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                linked = False
            else:
                os.unlink(f"{path}-probe")
            with os.scandir(self.temp) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFTOVER_SECONDS:
                            os.unlink(entry.path)
        self.prune_temp()
        return linked

    def _open_making_folder(self, path: str, flags: int) -> int:
        for _ in range(RACES):
            try:
                return os.open(path, flags | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                self._make(os.path.dirname(path))
        raise StorageUnavailable(f"The folder of {path} is removed again and again; look who does.")

    def _make(self, folder: str) -> set[str]:
        """Make ``folder`` (mode 0700) below the root, never the root. Returns the folders that got an entry."""
        if not self.exists():
            raise self.missing()
        changed = set()
        current = self.root
        for part in folder[len(self.root) + 1 :].split("/"):
            parent, current = current, f"{current}/{part}"
            try:
                os.mkdir(current, 0o700)
            except FileExistsError:
                continue
            except FileNotFoundError:
                break  # pruned under our feet; the caller tries again
            changed.add(parent)
        return changed
