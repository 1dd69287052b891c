"""The spools of one instance: this machine's own, and those of other machines that share its storage folder.

Where storage is a folder, a spool lies in it: ``.lamindb/_spool/<instance id>.<machine>``. There is one for each data
directory (config.spool_mark), so all mounts of one machine share it, and no other machine does. The note ``<instance
id>.<machine>.json`` beside it names the machine, for people. ``<instance id>`` alone is the spool that all machines
shared before; ``….<time>.<digits>`` was put aside (working_copy.py).

Only the journal of the machine that wrote a spool file knows what it is. So every file that this machine's journal owes
comes into its own spool, wherever it lies. It is moved out of the folder that all machines shared. It is copied out of
a folder with a machine's name, because a copied data directory owes what its original owes. Every other file in such
folders is reported, and never changed: its machine may be away for a week, or may have lost its lease a minute ago and
still be writing.

Synchronous, any thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Collection, Iterator
from typing import NamedTuple

from lamfs import beneath, config, copying
from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError, Locked, StorageError
from lamfs.jsontext import parse_object
from lamfs.keys import is_spool_name, spool_inode, spool_name
from lamfs.model import iso
from lamfs.ops import messages, mounts
from lamfs.printable import count_of
from lamfs.registry import Registry
from lamfs.registry.entries import Drop, Put
from lamfs.spool import SpoolFolder

_MACHINE = re.compile(r"\.[0-9a-f]{12}")
_ASIDE = re.compile(r"(\.[0-9a-f]{12})?\.[0-9]{8}T[0-9]{6}\.[0-9a-f]{4}")
_NO_WRITING = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_NOTE_BYTES = 4096
_NOTE_TEXT = 255
"""Most characters of a name in a note."""


class Waiting(NamedTuple):
    """Files in a spool folder that is not this machine's. ``kind``: ``machine`` (another machine's), ``shared`` (that
    of older versions), ``aside``. ``whose``: user and host, as its note says; ``""``: it does not. ``since_ns``: when
    the oldest file was written. ``problem``: why the folder cannot be read."""

    folder: str
    kind: str
    whose: str = ""
    files: int = 0
    bytes: int = 0
    since_ns: int = 0
    problem: str = ""

    @property
    def sentence(self) -> str:
        """The files and what to do with them, for people."""
        if self.problem:
            return f"the spool folder {self.folder} of this instance is not this machine's, and is left: {self.problem}"
        count = "1 file" if self.files == 1 else f"{self.files} files"
        what = f"{count} ({self.bytes} bytes, the oldest of {iso(self.since_ns)})"
        if self.kind == "aside":
            return f"{self.folder}, which was put aside, has {what}; look at them, and move or delete them"
        if self.kind == "machine":
            owner = f"another machine ({self.whose})" if self.whose else "another machine"
            them = "it" if self.files == 1 else "them"
            return (
                f"the spool of {owner}, {self.folder}, has {what}, not stored yet; that machine stores"
                f" {them} when it mounts or connects to the instance again, and if it never does, each is a whole file"
                " that 'lamfs save' takes"
            )
        return (
            f"the spool that machines had in common, {self.folder}, has {what} that this machine does not owe; the one"
            " that wrote them takes them when it mounts again, and if it never does, each is a whole file that 'lamfs"
            " save' takes"
        )


# -- this machine's ---------------------------------------------------------------------------------------------------


def find(settings: InstanceSettings, registry: Registry) -> SpoolFolder | None:
    """This machine's spool, with every file that its journal owes; None: there is none. The caller closes it.

    While a mount writes, no file is brought in: the mount has done that. Raises StorageError as SpoolFolder.find does,
    and when a file cannot be brought in.
    """
    take_in(settings, registry)
    return SpoolFolder.find(*settings.spool_place)


def make(settings: InstanceSettings, registry: Registry, *, read_only: bool = False) -> SpoolFolder:
    """As ``find``, for a mount: the spool is made when it is missing. ``read_only``: in a storage folder where none can
    be made, an empty one in the data directory takes its place.

    Raises also Locked while an older lamfs has the instance mounted: it keeps its files where this one does not look.
    """
    if mounts.is_written(settings):
        for folder in _elsewhere(settings, registry):
            if folder.name == _stem(settings):
                raise Locked(
                    f"The instance is mounted by an older lamfs, whose files wait in {folder.path}; unmount that first."
                )
    else:
        take_in(settings, registry)
    try:
        spool = SpoolFolder.make(*settings.spool_place)
    except StorageError as error:
        if not read_only or error.errno not in _NO_WRITING:
            raise
        return SpoolFolder.make(settings.directory, ("spool",))
    _write_note(settings)
    return spool


def take_in(settings: InstanceSettings, registry: Registry) -> int:
    """Bring the files that this machine's journal owes from other folders into its spool. Returns how many; 0 while a
    mount writes. Raises StorageError when one cannot be brought in: that file is not lost, and must not be reported as
    missing."""
    found = _elsewhere(settings, registry)
    if not found or mounts.is_written(settings):
        return 0
    count = 0
    with SpoolFolder.make(*settings.spool_place) as spool:
        for folder in found:
            try:
                count += _bring(settings, spool, folder)
            except OSError as error:
                raise StorageError(
                    f"{count_of(len(folder.names), 'file')} still to be stored by this machine, in {folder.path},"
                    f" cannot be brought into its spool {spool.folder} ({os.strerror(error.errno or 0)}); all stays"
                    " there. Mend that, and try again.",
                    errno=error.errno,
                ) from error
        spool.sync()
    return count


def owed_elsewhere(settings: InstanceSettings, registry: Registry) -> dict[str, str]:
    """Spool files that this machine owes, and that lie in other folders: their paths, by name."""
    found = _elsewhere(settings, registry)
    mine = owed(registry) if found else set()
    return {name: os.path.join(folder.path, name) for folder in found for name in sorted(folder.names & mine)}


def owed(registry: Registry) -> set[str]:
    """Names of the spool files that the journal owes."""
    return {
        entry.src for entry in registry.journal.entries() if isinstance(entry, Put | Drop) and is_spool_name(entry.src)
    }


class _Folder(NamedTuple):
    """A spool folder that is not this machine's. ``names``: files in it that this machine owes, and does not have."""

    name: str
    path: str
    names: set[str]


def _elsewhere(settings: InstanceSettings, registry: Registry) -> list[_Folder]:
    folders = [name for name in _names(settings) if name == _stem(settings) or _kind(settings, name) == "machine"]
    if not folders:
        return []
    wanted, spent = owed(registry), registry.journal.spent()
    with contextlib.ExitStack() as stack:
        own = SpoolFolder.find(*settings.spool_place)
        if own is not None:
            have = set(stack.enter_context(own).names())
            wanted -= have
            spent -= have
    found = []
    for name in sorted(folders):
        # Files that are not owed any more leave the folder that all machines shared.
        mine = wanted | spent if name == _stem(settings) else wanted
        with contextlib.suppress(OSError), _opened(settings, name) as fd, _scanned(fd) as entries:
            names = {entry.name for entry in entries if entry.name in mine and entry.is_file(follow_symlinks=False)}
            if names:
                found.append(_Folder(name, _path(settings, name), names))
                wanted -= names
    return found


def _bring(settings: InstanceSettings, spool: SpoolFolder, folder: _Folder) -> int:
    """Move, or copy, files into this machine's spool. Returns how many. Raises OSError."""
    common = folder.name == _stem(settings)
    count = 0
    with _opened(settings, folder.name) as fd:
        for name in sorted(folder.names):
            with contextlib.suppress(FileNotFoundError):  # another process of this machine does the same
                if common:
                    spool.receive(name, fd)
                else:
                    _copy(spool, name, fd)
                count += 1
        with contextlib.suppress(OSError):
            os.fsync(fd)
    if common:
        root, parts = settings.spool_place
        with contextlib.suppress(OSError), beneath.directory(root, parts[:-1]) as above:
            os.rmdir(folder.name, dir_fd=above)
    return count


def _copy(spool: SpoolFolder, name: str, folder: int) -> None:
    source = beneath.open_file(folder, name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            return
        # A name of its own: two processes that do this at once do not write to one draft.
        draft = spool_name(spool_inode(name))
        target = spool.open_draft(draft)
        try:
            try:
                copying.copy_fd(source, target)
            except EOFError:  # another process cuts it now: the rest would pass for the whole
                raise OSError(errno.EIO, os.strerror(errno.EIO), name) from None
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.fsync(target)
            spool.finish_draft_as(draft, name)
        except BaseException:
            spool.drop_draft(draft)
            raise
        finally:
            os.close(target)
    finally:
        os.close(source)


# -- others' ----------------------------------------------------------------------------------------------------------


def others(settings: InstanceSettings, mine: Collection[str] = ()) -> list[Waiting]:
    """The files in spool folders of this instance that are not this machine's, except the files ``mine``. Empty folders
    are left out. Nothing is changed. Any thread."""
    names = _names(settings)
    if not names:
        return []
    found = [_look(settings, name, mine) for name in names]
    return [waiting for waiting in found if waiting.files or waiting.problem]


def sentences(settings: InstanceSettings, mine: Collection[str] = ()) -> list[str]:
    """The sentences of ``others``, for people."""
    return [waiting.sentence for waiting in others(settings, mine)]


def tell(settings: InstanceSettings, notices: list[str]) -> None:
    """This machine takes over from another one: tell the user what other machines have not stored yet, and note it in
    ``notices``."""
    for waiting in others(settings):
        if waiting.kind == "machine":
            notices.append(waiting.sentence)
            messages.warn(waiting.sentence)


def _look(settings: InstanceSettings, name: str, mine: Collection[str]) -> Waiting:
    files = size = 0
    since = 0
    kind, path = _kind(settings, name), _path(settings, name)
    try:
        with _opened(settings, name) as fd, _scanned(fd) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # that machine is working now
                    status = entry.stat(follow_symlinks=False)
                    if entry.name in mine or not stat.S_ISREG(status.st_mode):
                        continue
                    files += 1
                    size += status.st_size
                    since = min(since or status.st_mtime_ns, status.st_mtime_ns)
    except FileNotFoundError:
        pass
    except OSError as error:
        return Waiting(path, kind, problem=os.strerror(error.errno or 0))
    return Waiting(path, kind, _whose(settings, name) if kind == "machine" else "", files, size, since)


# -- names ------------------------------------------------------------------------------------------------------------


def _stem(settings: InstanceSettings) -> str:
    """The beginning of the names of all spool folders of the instance; alone it names the one that all machines
    shared."""
    return settings.spool_place[1][-1].partition(".")[0]


def _kind(settings: InstanceSettings, name: str) -> str:
    rest = name.removeprefix(_stem(settings))
    if not rest:
        return "shared"
    return "machine" if _MACHINE.fullmatch(rest) else "aside"


def _path(settings: InstanceSettings, name: str) -> str:
    root, parts = settings.spool_place
    return os.path.join(root, *parts[:-1], name)


def _names(settings: InstanceSettings) -> list[str]:
    """The spool folders of the instance, except this machine's own, in order."""
    root, parts = settings.spool_place
    if len(parts) == 1:
        return []  # in the data directory
    stem = _stem(settings)
    try:
        with beneath.directory(root, parts[:-1]) as fd:
            names = os.listdir(fd)
    except OSError:
        return []
    return sorted(name for name in names if name != parts[-1] and _is_folder_name(name, stem))


def _is_folder_name(name: str, stem: str) -> bool:
    rest = name.removeprefix(stem)
    return name.startswith(stem) and (not rest or bool(_MACHINE.fullmatch(rest) or _ASIDE.fullmatch(rest)))


@contextlib.contextmanager
def _opened(settings: InstanceSettings, name: str) -> Iterator[int]:
    """A descriptor of another spool folder. Raises OSError."""
    root, parts = settings.spool_place
    with beneath.directory(root, (*parts[:-1], name)) as fd:
        yield fd


@contextlib.contextmanager
def _scanned(fd: int) -> Iterator[Iterator[os.DirEntry[str]]]:
    with os.scandir(fd) as entries:
        yield entries


# -- whose it is ------------------------------------------------------------------------------------------------------


def _write_note(settings: InstanceSettings) -> None:
    """Write beside this machine's spool whose it is. Nothing depends on it, so errors are ignored."""
    root, parts = settings.spool_place
    if len(parts) == 1:
        return
    name = f"{parts[-1]}.json"
    body = json.dumps({"handle": config.current_user().handle, "host": socket.gethostname()}).encode()
    with contextlib.suppress(OSError, LamfsError), beneath.directory(root, parts[:-1]) as fd:
        if _read_note(fd, name) == body:
            return
        temp = f"{name}.{secrets.token_hex(6)}"
        note = beneath.open_file(fd, temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.write(note, body)
        finally:
            os.close(note)
        os.rename(temp, name, src_dir_fd=fd, dst_dir_fd=fd)


def forget(settings: InstanceSettings) -> None:
    """Forget whose spool this is, before it is removed. Raises OSError."""
    root, parts = settings.spool_place
    if len(parts) > 1:
        with contextlib.suppress(FileNotFoundError), beneath.directory(root, parts[:-1]) as fd:
            os.unlink(f"{parts[-1]}.json", dir_fd=fd)


def _read_note(fd: int, name: str) -> bytes:
    try:
        note = beneath.open_file(fd, name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(note, _NOTE_BYTES)
    finally:
        os.close(note)


def _whose(settings: InstanceSettings, name: str) -> str:
    """User and host of another machine's spool, as its note says. The note comes from outside: no more of it is
    believed."""
    root, parts = settings.spool_place
    try:
        with beneath.directory(root, parts[:-1]) as fd:
            data = parse_object(_read_note(fd, f"{name}.json"), _NOTE_BYTES)
        words = [data["handle"], data["host"]]
    except (OSError, ValueError, KeyError):
        return ""
    if not all(isinstance(word, str) and word.isprintable() and len(word) <= _NOTE_TEXT for word in words):
        return ""
    return " on ".join(words)
