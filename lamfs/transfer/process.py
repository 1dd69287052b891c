"""The moving process as a child: what it inherits, and its end. The trio loop only."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import trio

log = logging.getLogger(__name__)

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
