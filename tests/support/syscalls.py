"""The same system calls in two places: calls that Python lacks, and the attributes that must be equal in both.

Paths are always str: pathlib would drop the ``/`` at the end and the ``.`` in the middle, which the calls must see.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
CLOCK_REALTIME_COARSE = 5
SECOND = 10**9
RECENT = 3600 * SECOND

libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def rename2(old: str, new: str, flags: int) -> None:
    """renameat2(2)."""
    _checked(libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)))


def utimens(where: str | int, atime: int | str, mtime: int | str, *, follow: bool = True) -> None:
    """utimensat(2) of a path, or futimens(3) of a descriptor. A time is nanoseconds, ``now`` or ``omit``."""
    times = (_Timespec * 2)()
    for number, value in enumerate((atime, mtime)):
        if isinstance(value, str):
            times[number] = _Timespec(0, UTIME_NOW if value == "now" else UTIME_OMIT)
        else:
            times[number] = _Timespec(value // SECOND, value % SECOND)
    if isinstance(where, int):
        _checked(libc.futimens(where, ctypes.byref(times)))
    else:
        flags = 0 if follow else AT_SYMLINK_NOFOLLOW
        _checked(libc.utimensat(AT_FDCWD, os.fsencode(where), ctypes.byref(times), flags))


@contextlib.contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Inside the block, this thread's calls are checked like those of another user (setfsuid(2)). Only for root.

    The effective user stays, so a mount without ``allow_other`` answers.
    """
    if user == 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    libc.setfsgid(user)
    libc.setfsuid(user)
    try:
        yield
    finally:
        libc.setfsuid(0)
        libc.setfsgid(0)
        os.setgroups(groups)


def outcome(call: Callable[[], Any]) -> Any:
    """The result of a call: its value, or the name of its errno if it fails."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def next_tick() -> None:
    """Return when the clock that stamps times on local disks has advanced, so that the next change is visible."""
    begin = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) == begin:
        pass


def far(time_ns: int) -> int | str:
    """A time that a call has set, or ``recent``: such a time cannot be equal in two places."""
    return "recent" if abs(time_ns - time.time_ns()) < RECENT else time_ns


def mode_of(status: os.stat_result) -> str:
    """The mode, without a set-group-ID bit on a file that the group cannot execute. Linux clears that bit when a user
    outside the group writes to the file. Its FUSE leaves it (fuse_setattr), without telling the file system."""
    mode = status.st_mode
    if stat.S_ISREG(mode) and not mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return oct(mode)


def shape(status: os.stat_result) -> dict[str, Any]:
    """The part of stat(2) that must be equal in both places, if times were set to the far past or future."""
    directory = stat.S_ISDIR(status.st_mode)
    return {
        "mode": mode_of(status),
        "nlink": status.st_nlink,
        "size": None if directory else status.st_size,
        "uid": status.st_uid,
        "gid": status.st_gid,
        "rdev": status.st_rdev,
        "mtime": far(status.st_mtime_ns),
    }


def xattrs(where: str | int, *, follow: bool = False) -> dict[str, bytes]:
    """The user's own extended attributes."""
    options = {} if isinstance(where, int) else {"follow_symlinks": follow}
    names = [name for name in os.listxattr(where, **options) if name.startswith("user.")]
    return {name: os.getxattr(where, name, **options) for name in names if not name.startswith("user.lamfs.")}


def whole_tree(root: str, *, with_xattrs: bool) -> dict[str, dict[str, Any]]:
    """Everything in and below a folder by path, and which paths are the same file.

    It also compares the ways to list a directory with each other.
    """
    found: dict[str, dict[str, Any]] = {".": shape(os.lstat(root))}
    first: dict[int, str] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(root + "/" + folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        assert sorted(os.listdir(root + "/" + folder)) == [entry.name for entry in entries]
        for entry in entries:
            path = folder + entry.name
            status = os.lstat(entry.path)
            assert entry.inode() == status.st_ino, f"readdir and lstat differ on the inode number of {path}"
            assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(status.st_mode), path
            assert entry.is_symlink() == stat.S_ISLNK(status.st_mode), path
            item = found[path] = shape(status)
            item["same as"] = first.setdefault(status.st_ino, path)
            if stat.S_ISDIR(status.st_mode):
                pending.append(path + "/")
            elif stat.S_ISREG(status.st_mode):
                with open(entry.path, "rb") as file:
                    item["content"] = file.read()
            elif stat.S_ISLNK(status.st_mode):
                item["target"] = os.readlink(entry.path)
            if with_xattrs:
                item["xattrs"] = xattrs(entry.path)
    return found


def differences(wanted: dict[str, Any], got: dict[str, Any], prefix: str = "") -> list[str]:
    """The differences between two trees (or results made of dicts), one per line."""
    lines: list[str] = []
    for key in sorted({*wanted, *got}):
        name = f"{prefix}{key}"
        if key not in got:
            lines.append(f"{name}: missing")
        elif key not in wanted:
            lines.append(f"{name}: should not be there")
        elif isinstance(wanted[key], dict) and isinstance(got[key], dict):
            lines += differences(wanted[key], got[key], f"{name} ")
        elif wanted[key] != got[key]:
            lines.append(f"{name}: {brief(got[key])}, on the plain disk {brief(wanted[key])}")
    return lines


def brief(value: Any) -> str:
    """A value for a message."""
    if isinstance(value, bytes) and len(value) > 40:
        return f"{len(value)} bytes {value[:12]!r}…"
    text = repr(value)
    return text if len(text) < 300 else text[:300] + "…"


def keeps_times(folder: str, times: Collection[int]) -> list[int]:
    """Those of ``times`` that the file system of a folder keeps to the nanosecond."""
    path = folder + "/times"
    with open(path, "w"):
        pass
    kept = []
    for value in times:
        utimens(path, value, value)
        if os.stat(path).st_mtime_ns == value:
            kept.append(value)
    os.unlink(path)
    return kept


def keeps_xattrs(folder: str) -> bool:
    """Whether the file system of a folder has extended attributes."""
    return outcome(lambda: os.setxattr(folder, "user.probe", b"x")) is None


def counts_folders(folder: str) -> bool:
    """Whether a directory's nlink is two plus the number of directories in it, as on ext4 but not on btrfs."""
    os.mkdir(folder + "/probe")
    counts = os.stat(folder).st_nlink == 3
    os.rmdir(folder + "/probe")
    return counts
