"""The mover as a child process: what it inherits, and its end. The trio loop only."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
from pathlib import Path

import trio

from lamfs.copying import path_of
from lamfs.errors import StorageError

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.01
_FD_PATH = re.compile(r"/proc/(self|\d+)/fd/(\d+)")
END_TIMEOUT = 5.0
"""Seconds to wait for the process to end by itself, and again after SIGKILL."""


def environment() -> dict[str, str]:
    """Our environment, changed so that the child imports the same lamfs, also from a source checkout."""
    env = dict(os.environ)
    home = Path(__file__).resolve().parents[2]
    if home.name not in ("site-packages", "dist-packages"):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), env.get("PYTHONPATH")]))
    return env


class Forked:
    """A child made by fork(2), with what its owner needs of a trio.Process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """As subprocess.Popen's; None while it lives."""

    async def wait(self) -> None:
        """Return when it has ended. For a child that is about to end."""
        while self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = self.pid, 0  # we were started with SIGCHLD ignored: nobody knows how it ended
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            else:
                await trio.sleep(_LOOK_SECONDS)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


async def end(process: trio.Process | Forked, patience: float = END_TIMEOUT) -> None:
    """Wait for a process whose socket is closed. After ``patience`` seconds, kill it by its own pid."""
    with trio.move_on_after(patience):
        await process.wait()
        return
    log.warning("The moving process %d does not end; killing it.", process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with trio.move_on_after(END_TIMEOUT):
        await process.wait()
        return
    log.error("The moving process %d cannot be killed (it hangs in the kernel); leaving it behind.", process.pid)


def duplicate(path: str, fds: list[int]) -> str:
    """For a path that names one of our descriptors: the path of a duplicate, which is added to ``fds``."""
    match = _FD_PATH.fullmatch(path)
    if match is None or match[1] not in ("self", str(os.getpid())):
        return path
    try:
        fd = os.dup(int(match[2]))
    except OSError as error:
        raise StorageError(
            f"The open file {path} cannot be handed to the moving process: {error}.", errno=error.errno
        ) from error
    fds.append(fd)
    return path_of(fd)
