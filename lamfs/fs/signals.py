"""Whether a process has been told to stop, and which files it has open, according to /proc (proc(5)). Any thread.

The FUSE library does not tell a handler that the kernel wants to interrupt its request. But a signal stays pending
while its process waits for us, and /proc shows that. Nothing here touches a mount.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from typing import NamedTuple

from lamfs import mountinfo

_FIELD = re.compile(rb"^(State|Tgid|PPid|SigPnd|ShdPnd|SigBlk|SigIgn|SigCgt):\t(\w+)", re.MULTILINE)
_QUIET = (b"SigPnd:\t0000000000000000", b"ShdPnd:\t0000000000000000")
_HARMLESS = ("SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU")
MAX_ANCESTORS = 64


class Mount(NamedTuple):
    """A mount as /proc shows it: its number in mountinfo, and its device as in maps."""

    number: int
    device: str


def _mask(*names: str) -> int:
    return sum(1 << (signal.Signals[name] - 1) for name in names)


_STOPS = _mask("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGKILL")
_FATAL = ~_mask(*_HARMLESS)
"""Signals that end a process which does not catch them."""


def _status(pid: int) -> dict[bytes, bytes]:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return dict(_FIELD.findall(file.read()))
    except OSError:
        return {}


def _stops(status: dict[bytes, bytes]) -> bool:
    if status.get(b"State", b"X") in (b"Z", b"X"):
        return False
    pending, shared, blocked, ignored, caught = (
        int(status[name], 16) for name in (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn", b"SigCgt")
    )
    delivered = (pending | shared) & ~(blocked | ignored)
    return bool(delivered & (_STOPS | (_FATAL & ~caught)))


def told_to_stop(pid: int) -> bool:
    """Whether a pending signal of the thread or its process asks it to end, or will end it.

    SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGKILL, and others that the process does not catch. Not a signal that it
    blocks or ignores, and not a caught one of a timer or a child: programs do not expect file calls to fail because of
    those.
    """
    return _stops(_status(pid))


def all_told_to_stop() -> list[int]:
    """Pids of all processes for which ``told_to_stop`` is true."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/status", "rb") as file:
                    text = file.read()
            except OSError:
                continue
            if not all(quiet in text for quiet in _QUIET) and _stops(dict(_FIELD.findall(text))):
                found.append(int(name))
    return found


def process_of(thread: int) -> int | None:
    """The process of a thread; None when the thread is gone."""
    status = _status(thread)
    return int(status[b"Tgid"]) if status else None


def descends(pid: int, ancestor: int) -> bool:
    """Whether a process is ``ancestor`` or was started below it."""
    for _ in range(MAX_ANCESTORS):
        if pid == ancestor:
            return True
        pid = int(_status(pid).get(b"PPid", b"0"))
        if pid <= 1:
            return False
    return False


def find_mount(mountpoint: str) -> Mount | None:
    """The topmost mount at a path."""
    mounted = mountinfo.at(mountpoint)
    if mounted is None:
        return None
    major, minor = map(int, mounted.device.split(":"))
    return Mount(mounted.id, f"{major:02x}:{minor:02x}")


def holds(pid: int, mount: Mount, ino: int) -> bool:
    """Whether a process has a file open, by its inode number. False when that cannot be seen."""
    wanted = (f"\nino:\t{ino}\n".encode(), f"\nmnt_id:\t{mount.number}\n".encode())
    folder = f"/proc/{pid}/fdinfo"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError), open(f"{folder}/{name}", "rb") as file:
                text = b"\n" + file.read()
                if all(line in text for line in wanted):
                    return True
    return False


def holders(mount: Mount, ino: int) -> list[int]:
    """All processes that have a file open or mapped, as far as that can be seen."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if holds(pid, mount, ino) or _maps(pid, mount, ino)]


def _maps(pid: int, mount: Mount, ino: int) -> bool:
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            return f" {mount.device} {ino} ".encode() in file.read()
    except OSError:
        return False
