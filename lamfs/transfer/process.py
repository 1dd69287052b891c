"""The moving process as a child: what it inherits, and its end. The trio loop only."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path

import trio

from lamfs.errors import StorageError

log = logging.getLogger(__name__)

_FD_PATH = re.compile(r"/proc/(self|\d+)/fd/(\d+)")
END_TIMEOUT = 5.0
"""Seconds to wait for the process to end by itself, and again after SIGKILL."""


def environment() -> dict[str, str]:
    """Our environment, in which the child finds the lamfs that we are, also when that is a source checkout."""
    env = dict(os.environ)
    # By default each thread keeps memory of its own that it once needed.
    env.setdefault("MALLOC_ARENA_MAX", "2")
    home = Path(__file__).resolve().parents[2]
    if home.name not in ("site-packages", "dist-packages"):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), env.get("PYTHONPATH")]))
    return env


async def end(process: trio.Process) -> None:
    """Wait for a process whose socket is closed; kill it, by its own pid, when it takes too long."""
    with trio.move_on_after(END_TIMEOUT):
        await process.wait()
        return
    log.warning("The moving process %d does not end; killing it.", process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with trio.move_on_after(END_TIMEOUT):
        await process.wait()
        return
    log.error("The moving process %d cannot be killed (it hangs in the kernel); leaving it behind.", process.pid)


def hold(path: str, fds: list[int]) -> str:
    """For a path that names one of our descriptors: that of a duplicate, which is added to ``fds``."""
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
    return f"/proc/{os.getpid()}/fd/{fd}"
