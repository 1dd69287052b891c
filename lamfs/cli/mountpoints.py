"""Mount points as the kernel knows them: looked up in /proc/self/mountinfo, and unmounted with fusermount3.

Nothing here touches a path inside a mount: if its daemon is stuck, the command would hang. Main thread only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import click

from lamfs import config, mountinfo
from lamfs.errors import AlreadyExists, InvalidArgument, LamfsError, NotEmpty, NotSetUp

if TYPE_CHECKING:
    from lamfs.ops.mounts import MountRecord

DEFAULT = "~/lamfs"
UNTOUCHED = click.UNPROCESSED
"""The type of a path argument that may be a mount point. click.Path would ask the file system, and hang with it."""
LOOK_SECONDS = 5.0
"""Seconds that a living mount may take to answer."""
UNMOUNT_SECONDS = 30.0
"""Seconds that fusermount3 may take."""
FLUSH_SECONDS = 2.0


def detached(records: list[MountRecord]) -> set[int]:
    """The pids of daemons whose mount has left the tree, and that still live because of open files or pending work.

    ``records`` oldest first: of several at one place, the newest is the one that is mounted.
    """
    there = {mounted.path for mounted in mountinfo.table() if mounted.is_lamfs}
    newest = {record.mountpoint: record.pid for record in records}
    return {
        record.pid for record in records if record.mountpoint not in there or newest[record.mountpoint] != record.pid
    }


def absolute(path: str) -> str:
    """A path without symlinks, as mountinfo spells it. Its last part is looked at only when no mount is there.

    ``~`` is the home directory. Raises InvalidArgument when the path is empty.
    """
    if not path:
        raise InvalidArgument("The mount point is empty; name a directory.")
    path = os.path.abspath(os.path.expanduser(path))
    parent, name = os.path.split(path)
    spelled = os.path.join(os.path.realpath(parent), name) if name else path
    return spelled if mountinfo.at(spelled) else os.path.realpath(spelled)


def around(path: str) -> mountinfo.Mounted | None:
    """The lamfs mount that contains ``path``."""
    return next(
        (mounted for mounted in mountinfo.table() if mounted.is_lamfs and path.startswith(f"{mounted.path}/")), None
    )


def is_dead(path: str) -> bool:
    """Whether the mount at ``path`` has lost its daemon. Another process looks, since a stuck mount never answers.

    It uses statfs: the kernel may answer a stat from its own cache. The living mount of another user is not dead,
    although nobody else may look into it.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        looked = subprocess.run(
            ["stat", "--file-system", "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LOOK_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
        return os.strerror(errno.ENOTCONN).encode() in looked.stderr
    return False


def prepare(path: str, *, empty: bool = True) -> list[str]:
    """Make sure ``path`` is a directory, and ``empty``. Makes it (mode 0700) if there is none.

    Returns the directories that were made, the innermost first. Raises NotSetUp (not a directory, or it cannot be
    made), NotEmpty, AlreadyExists (inside a lamfs mount), InvalidArgument (where lamfs keeps its own files).
    """
    outer = around(path)
    if outer is not None:
        raise AlreadyExists(f"{path} is inside the lamfs mount {outer.path}; choose a place outside of it.")
    for what, directory in (
        ("settings", config.config_dir()),
        ("registries", config.data_dir()),
        ("cache", config.cache_dir()),
    ):
        # The cache may be deleted at any time. With a mount in it, that would delete every artifact.
        if f"{path}/".startswith(f"{os.path.realpath(directory)}/"):
            raise InvalidArgument(f"{path} is where lamfs keeps its {what} ({directory}); mount elsewhere.")
    made, above = [], path
    while not os.path.lexists(above):
        made.append(above)
        above = os.path.dirname(above)
    try:
        os.makedirs(path, mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise NotSetUp(
            f"The mount point {path} cannot be made ({error.strerror}); choose another directory."
        ) from error
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotSetUp(f"{path} is not a directory; choose an empty directory as the mount point.")
    with os.scandir(path) as entries:
        if empty and any(True for _ in entries):
            raise NotEmpty(
                f"{path} is not empty; a mount would hide what is in it. Choose an empty directory, or have what is in"
                " it moved into the mount with --adopt."
            )
    return made


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount with fusermount3. Raises LamfsError: EBUSY when something is in use there, else with fusermount3's
    message.

    ``lazy`` takes the mount out of the tree at once, and ends it when the last file in it is closed.
    """
    try:
        done = subprocess.run(
            ["fusermount3", "-uz" if lazy else "-u", "--", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=UNMOUNT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise NotSetUp("The program fusermount3 is missing; install the package fuse3.") from None
    except subprocess.TimeoutExpired:
        raise LamfsError(f"fusermount3 did not end within {UNMOUNT_SECONDS:.0f} s; is {path} stuck?") from None
    if done.returncode == 0 or mountinfo.at(path) is None:
        return
    said = os.fsdecode(done.stderr).strip().removeprefix("fusermount3: ")
    if "not found in /etc/mtab" in said:
        raise LamfsError(f"{path} was mounted by another user; only they or root can unmount it.", errno=errno.EPERM)
    number = errno.EBUSY if "busy" in said else errno.EIO
    raise LamfsError(f"{path} could not be unmounted: {said or 'fusermount3 failed'}.", errno=number)


def flush(path: str) -> None:
    """Have the kernel write dirty pages of mappings to the daemon; for FLUSH_SECONDS at most."""
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            ["sync", "--file-system", "--", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # A process that hangs in the mount ends with the daemon.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(FLUSH_SECONDS)


class Holder(NamedTuple):
    """A process that uses a mount: its id, its name, and one path that it has open."""

    pid: int
    name: str
    path: str


def holders(mountpoint: str) -> list[Holder]:
    """The processes that have a file or their working directory in a mount. Only those that this user may look at."""
    return _find(lambda pid: _held_path(pid, mountpoint))


def holders_of(mount_id: int) -> list[Holder]:
    """The same for a mount that has left the tree in this namespace."""
    return _find(lambda pid: _held_in(pid, mount_id)) if mount_id else []


def elsewhere(device: str) -> list[Holder]:
    """The processes in whose mount namespace a file system is mounted, with its place there.

    For a file system that is not mounted in ours any more: these are in others, such as a container's.
    """
    line = f" {device} ".encode()

    def place(pid: str) -> str | None:
        name = f"/proc/{pid}/mountinfo"
        with contextlib.suppress(OSError, ValueError, IndexError), open(name, "rb") as text:
            if line in text.read():
                return next(
                    (found.path for found in mountinfo.table(name) if found.device == device and found.is_lamfs), None
                )
        return None

    return _find(place) if device else []


def _find(look: Callable[[str], str | None]) -> list[Holder]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        path = look(entry)
        if path is not None:
            with contextlib.suppress(OSError), open(f"/proc/{entry}/comm", "rb") as comm:
                found.append(Holder(int(entry), os.fsdecode(comm.read().strip()), path))
    return found


def _held_in(pid: str, mount_id: int) -> str | None:
    """One path of a mount that a process has open. Does not ask the file system: see proc_pid_fdinfo(5)."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fdinfo"):
            if _mount_of(f"/proc/{pid}/fdinfo/{number}") == mount_id:
                return os.readlink(f"/proc/{pid}/fd/{number}")
    for name in ("cwd", "root"):
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{pid}/{name}", os.O_PATH | os.O_CLOEXEC)
            try:
                if _mount_of(f"/proc/self/fdinfo/{fd}") == mount_id:
                    return os.readlink(f"/proc/{pid}/{name}")
            finally:
                os.close(fd)
    return None


def _mount_of(fdinfo: str) -> int | None:
    with contextlib.suppress(OSError, ValueError), open(fdinfo, "rb") as lines:
        for line in lines:
            if line.startswith(b"mnt_id:"):
                return int(line.split()[1])
    return None


def _held_path(pid: str, mountpoint: str) -> str | None:
    """One path below ``mountpoint`` that a process has open. Reads only links in /proc, which asks no file system."""
    links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
    with contextlib.suppress(OSError):
        links += [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target == mountpoint or target.startswith(f"{mountpoint}/"):
                return target
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            mapped = os.fsdecode(line.rstrip(b"\n").partition(b"/")[2])
            if f"/{mapped}".startswith(f"{mountpoint}/"):
                return f"/{mapped}"
    return None
