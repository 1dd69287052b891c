"""Names of processes that are never reused, and names of temporary files that tell whose they are. Any thread.

A pid alone is reused, and names another process in another container or on another machine. So a process is named by
the boot of its kernel, its pid and its start time (proc(5)). A temporary file in a place that several machines share
is named also by the machine and the pid namespace.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import time
from typing import Literal, NamedTuple

_MARK = re.compile(r"([0-9a-z]{12})-([0-9a-f]{8})-([0-9]{1,12})-([0-9]{1,10})-([0-9]{1,20})-[0-9a-f]{8}")


def process_id(pid: int | None = None) -> str | None:
    """A name that no other process ever has: boot id, pid and start time (proc(5)). None if the process is gone."""
    pid = os.getpid() if pid is None else pid
    try:
        boot = boot_id()
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return f"{boot}:{pid}:{int(fields[19])}"


def is_alive(owner: str | None) -> bool:
    """Whether the process that ``process_id`` named is still running."""
    if not owner:
        return False
    try:
        pid = int(owner.split(":")[1])
    except (IndexError, ValueError):
        return False
    return process_id(pid) == owner


def of_another_boot(owner: str | None) -> bool:
    """Whether the process that ``process_id`` named ran before this machine's last boot, or on another machine."""
    mine = process_id()
    return bool(owner) and mine is not None and ":" in str(owner) and str(owner).split(":")[0] != mine.split(":")[0]


class Mark(NamedTuple):
    """What the name of a temporary file tells about its maker. ``boot``: the beginning of the boot id. ``namespace``:
    the inode number of the pid namespace."""

    machine: str
    boot: str
    namespace: int
    pid: int
    started: int


def mark(machine: str) -> str:
    """A new name for a temporary file of this process. ``machine``: a name of this machine, 12 characters."""
    here = _here(os.getpid())
    return f"{machine}-{here.boot}-{here.namespace}-{here.pid}-{here.started}-{secrets.token_hex(4)}"


def find_mark(name: str) -> Mark | None:
    """What ``mark`` has put into a name. None: nothing."""
    found = _MARK.search(name)
    if found is None:
        return None
    return Mark(found[1], found[2], int(found[3]), int(found[4]), int(found[5]))


def state_of(name: str, machine: str) -> Literal["alive", "dead", "elsewhere"]:
    """Whether the process that made a temporary file lives. ``elsewhere``: that cannot be known here."""
    found = find_mark(name)
    if found is None or found.machine != machine:
        return "elsewhere"
    here = _here(os.getpid())
    if not here.boot:
        return "elsewhere"
    if found.boot != here.boot:
        return "dead"
    if found.namespace != here.namespace:
        return "elsewhere"  # made in a container that shares this machine's directories
    now = process_id(found.pid)
    return "alive" if now is not None and int(now.split(":")[2]) == found.started else "dead"


@functools.lru_cache(maxsize=4)
def _here(pid: int) -> Mark:
    """This process. Cached by pid, because the child of a fork is another process."""
    boot, _, started = (process_id(pid) or "::0").split(":")
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return Mark("", boot.replace("-", "")[:8] or "0" * 8, namespace, pid, int(started))


def boot_id() -> str:
    """The id of this machine's present boot (random(4))."""
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return boot.read().strip()


def uptime() -> float:
    """Seconds since this machine was booted, including the time it slept (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
