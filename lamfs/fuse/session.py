"""The one FUSE session of a process: mount, serve, end. pyfuse3 keeps it in globals; the daemon's main thread only."""

from __future__ import annotations

import pyfuse3

from lamfs.errors import LamfsError
from lamfs.fuse.loop import quick_loop
from lamfs.fuse.operations import Operations

MAX_TASKS = 1000
"""Requests that may wait for storage before no others are answered."""


def mount(operations: Operations, mountpoint: str, name: str, words: tuple[str, ...]) -> None:
    """Mount. The kernel's requests wait until ``serve`` runs. ``name`` is the device that ``df`` shows.

    Raises LamfsError when the kernel or fusermount3 refuses.
    """
    # Not auto_unmount: when this process dies, the mount point must say so (ENOTCONN). An empty folder in its place
    # would accept what programs write, on the local disk.
    options = set(pyfuse3.default_options) | {f"fsname={name}", "subtype=lamfs", *words}
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        raise LamfsError(
            f"The kernel refused to mount at {mountpoint} ({error}); check that /dev/fuse is there, that 'fusermount3'"
            " is installed, and that you own the folder. 'allow_other' needs user_allow_other in /etc/fuse.conf."
        ) from error


async def serve() -> None:
    """Answer the kernel until the file system is unmounted or ``end`` is called."""
    with quick_loop():
        await pyfuse3.main(max_tasks=MAX_TASKS)


def end() -> None:
    """Make ``serve`` return, whatever is still open."""
    pyfuse3.terminate()


def close(*, unmount: bool) -> None:
    """Release the session. ``unmount``: also take the mount out of the tree, if it is still there.

    Else it stays there without a daemon, and every call in it fails with ENOTCONN.
    """
    pyfuse3.close(unmount=unmount)
