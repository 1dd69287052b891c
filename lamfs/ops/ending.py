"""Ends a mount's daemon that does not end by itself: by command, by signal, by SIGKILL. Synchronous, any thread.

The journal and the spool keep what the daemon owes, as after any ``kill -9``. A process is signalled through a
descriptor that was compared with the mount's record (pid and start time), so a process that got the same pid later is
safe.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

from lamfs.errors import LamfsError
from lamfs.ops import mounts
from lamfs.ops.mounts import MountRecord

TOLD_SECONDS = 3.0
"""Seconds that a daemon may take to end after a command."""
ASKED_SECONDS = 1.0
"""The same after SIGTERM."""
KILLED_SECONDS = 5.0
"""The same after SIGKILL."""
MOVER = "lamfs-mover"
"""The name of a mover in /proc/<pid>/comm."""


class Process(NamedTuple):
    """A process that may be signalled: its id, and a descriptor of it (pidfd_open(2))."""

    pid: int
    fd: int

    def send(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end of the process, at most ``seconds``. Returns whether it has ended."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))


@contextlib.contextmanager
def daemon_of(record: MountRecord) -> Iterator[Process | None]:
    """The daemon of a mount; None when it has ended."""
    from lamfs.processes import is_alive

    try:
        fd = os.pidfd_open(record.pid)
    except OSError:
        yield None
        return
    try:
        yield Process(record.pid, fd) if is_alive(record.owner) else None
    finally:
        os.close(fd)


@contextlib.contextmanager
def movers_of(pid: int) -> Iterator[list[Process]]:
    """The movers of the daemon ``pid``, which is alive."""
    with contextlib.ExitStack() as stack:
        found = []
        for child in _children(pid):
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(child)
                stack.callback(os.close, fd)
                with open(f"/proc/{child}/comm") as name:
                    if name.read().strip() == MOVER and child in _children(pid):
                        found.append(Process(child, fd))
        yield found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as pids:
                found += map(int, pids.read().split())
    return found


def ask(record: MountRecord) -> None:
    """Ask a daemon (SIGTERM) to store what it owes, to unmount, and to end. Nothing happens when it has ended."""
    with daemon_of(record) as daemon:
        if daemon is not None:
            daemon.send(signal.SIGTERM)


def end(record: MountRecord) -> bool:
    """End a daemon and its mover now, whatever they do. Returns whether one of them had to be killed.

    Raises LamfsError when one hangs in the kernel, or belongs to another user.
    """
    with daemon_of(record) as daemon:
        if daemon is None:
            return False
        with movers_of(daemon.pid) as movers:
            try:
                killed = _end(record, daemon)
                deadline = time.monotonic() + ASKED_SECONDS
                for mover in movers:
                    if not mover.ends_within(deadline - time.monotonic()):
                        mover.send(signal.SIGKILL)
                        killed = True
            except PermissionError:
                raise LamfsError(
                    f"The daemon of {record.mountpoint} (pid {record.pid}) is another user's; only they or root can end"
                    " it."
                ) from None
            for process in (daemon, *movers):
                if not process.ends_within(KILLED_SECONDS):
                    raise LamfsError(
                        f"Process {process.pid} of the mount at {record.mountpoint} hangs in the kernel, so that it"
                        " cannot be killed; what its storage is on does not answer."
                    )
    return killed


def _end(record: MountRecord, daemon: Process) -> bool:
    """Have a daemon end: by command, then by SIGTERM, then by SIGKILL. Returns whether it took SIGKILL."""
    with contextlib.suppress(LamfsError):
        mounts.request(record, {"cmd": "end"}, timeout=ASKED_SECONDS)
        if daemon.ends_within(TOLD_SECONDS):
            return False
    daemon.send(signal.SIGTERM)
    if daemon.ends_within(ASKED_SECONDS):
        return False
    daemon.send(signal.SIGKILL)
    return True
