"""``lamfs umount``: store what is pending, unmount, wait for the daemon's end, and say what is waited for.

Main thread only; paths inside a mount are never touched here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

import click

from lamfs import mountinfo
from lamfs.cli import mountpoints
from lamfs.cli.common import seconds
from lamfs.cli.mountpoints import Holder
from lamfs.cli.output import complain, note, say, shown
from lamfs.cli.seam import Command
from lamfs.cli.sync import AGAIN_SECONDS, Pending, ask, last_error, note_refused, owed_words, sync_mount
from lamfs.errors import LamfsError, LeaseLost, NotFound

if TYPE_CHECKING:
    from lamfs.ops.mounts import MountRecord

OTHERS = "another user, or with other directories (LAMFS_DATA_DIR)"
FORCED_SECONDS = 30.0
"""With --force: seconds that storing may take before the mount is removed anyway."""
LOOK_SECONDS = 2.0
"""Seconds between two looks at what keeps a daemon alive."""
ANSWER_SECONDS = 2.0
"""Seconds that a daemon may take to say what it does."""
MAX_HOLDERS = 5


@click.command(
    cls=Command,
    examples="""
    lamfs umount ~/data
    lamfs umount --force ~/data
    """,
)
@click.argument("mountpoint", type=mountpoints.UNTOUCHED, default=mountpoints.DEFAULT)
@click.option("--force", is_flag=True, help="Unmount although files are open, or something cannot be stored.")
@click.option(
    "--timeout",
    type=seconds,
    metavar="SECONDS",
    help=f"How long storing may take.  [default: no limit; with --force {FORCED_SECONDS:.0f}]",
)
def umount(mountpoint: str, force: bool, timeout: float | None) -> None:
    """Store what is owed, then unmount.

    MOUNTPOINT is ~/lamfs by default. Returns when everything is stored and the daemon has ended, and says what it waits
    for. With --force the mount and its daemon are gone in the end, although files are open in it, and although storage
    does not answer: what is not stored then waits in the spool, and the next mount stores it. Also clears away a mount
    whose daemon has died.
    """
    path = mountpoints.absolute(mountpoint)
    if force and timeout is None:
        timeout = FORCED_SECONDS
    record = live_mount(path)
    if record is not None:
        unmount(record, force, timeout)
        return
    left = leaving(path)
    if not left or mountinfo.at(path) is not None:
        clear_dead(path)
    for each in left:
        note(f"The mount at {shown(path)} has left the tree already, but its daemon (pid {each.pid}) lives on.")
        if force:
            end(each, timeout or 0.0, graceful=True)
        else:
            wait_for_end(each, timeout)
        say(f"{shown(path)} is unmounted.")
        tell_scratch(each.slug)


def unmount(record: MountRecord, force: bool, timeout: float | None) -> None:
    """Unmount a living mount. Raises LamfsError when it stays mounted, or its daemon does not end.

    A mount that has lost the lock cannot store its pending work: that stays on this machine, which is reported.
    """
    path = record.mountpoint
    give_up = (
        f"Ctrl-C stops waiting, not the mount; 'lamfs umount --force {shown(path)}' leaves them in the spool: nothing"
        " is lost, the next mount stores them."
    )
    problem = lost = None
    try:
        note_refused(sync_mount(record, timeout, give_up="" if force else give_up))
    except LeaseLost as error:
        lost = error
        note(shown(str(error)))
    except LamfsError as error:
        if not force:
            raise LamfsError(
                f"{error} {path} stays mounted; --force unmounts it, and leaves the rest in the spool: nothing is lost."
            ) from error
        complain(str(error))
        problem = error
    # A mount that is this process's own working directory would be busy because of it.
    os.chdir("/")
    users = mountpoints.holders(path) if force else []
    if users:
        mountpoints.flush(path)
    try:
        mountpoints.unmount(path, lazy=force)
    except LamfsError as error:
        if error.errno != errno.EBUSY:
            raise
        raise LamfsError(busy(path), errno=errno.EBUSY) from None
    if users:
        note(f"In use by {names(users)}: what was written there is kept, and from now on it gets errors.")
    if force:
        end(record, timeout or 0.0, graceful=problem is None, said=lost is not None)
    else:
        wait_for_end(record, timeout, said=lost is not None)
    if isinstance(problem, Pending):
        note("What is not stored waits in the spool: nothing is lost, and the next mount stores it.")
    say(f"{shown(path)} is unmounted.")
    tell_scratch(record.slug)


def tell_scratch(slug: str) -> None:
    """Name the scratch files that have bytes: nobody else has them."""
    from lamfs import config
    from lamfs.ops import scratch_files

    files = scratch_files.known(config.load_instance(slug))
    if files:
        note(shown(scratch_files.sentence(files)))


# -- which mount ------------------------------------------------------------------------------------------------------


def live_mount(path: str) -> MountRecord | None:
    """The living mount at exactly this path. Not one that has left the tree and only waits for its last open file."""
    from lamfs.ops import mounts

    gone = mountpoints.detached(mounts.all_live())
    return next((record for record in mounts.all_live() if record.mountpoint == path and record.pid not in gone), None)


def leaving(path: str) -> list[MountRecord]:
    """The mounts that have left the tree at this path, and whose daemons still live."""
    from lamfs.ops import mounts

    records = mounts.all_live()
    gone = mountpoints.detached(records)
    return [record for record in records if record.mountpoint == path and record.pid in gone]


def clear_dead(path: str) -> None:
    """Unmount what a dead daemon has left at ``path``. Raises NotFound when there is no lamfs mount."""
    mounted = mountinfo.at(path)
    if mounted is None:
        outer = mountpoints.around(path)
        if outer is not None:
            raise NotFound(f"{path} is inside the lamfs mount {outer.path}; name that one.")
        if not bury_at(path):
            raise NotFound(f"Nothing is mounted at {path}; 'lamfs status' lists the mounts.")
        say(
            f"The mount at {shown(path)} had lost its daemon; nothing is mounted there now. The next mount stores what"
            " is owed."
        )
        return
    if not mounted.is_lamfs:
        raise NotFound(f"{path} is not a lamfs mount ({mounted.fstype}); use umount.")
    if not mountpoints.is_dead(path):
        raise LamfsError(f"{path} was mounted by {OTHERS}; unmount it there.", errno=errno.EPERM)
    mountpoints.unmount(path, lazy=True)
    bury_at(path)
    say(f"The mount at {shown(path)} had lost its daemon; it is unmounted. The next mount stores what is owed.")


def bury_at(path: str) -> bool:
    """Forget the dead mounts of a path. Returns whether there were any."""
    from lamfs.ops import mounts

    dead = [each for each in mounts.all_dead() if each.record.mountpoint == path]
    for each in dead:
        mounts.bury(each)
    return bool(dead)


# -- the daemon's end -------------------------------------------------------------------------------------------------


def wait_for_end(record: MountRecord, timeout: float | None = None, *, said: bool = False) -> None:
    """Wait until the daemon of an unmounted mount has ended, and say why it has not.

    ``said``: the lost lock was reported already. Raises LamfsError when it still lives after ``timeout`` seconds, and
    when it could not store the registry.
    """
    from lamfs.ops import mounts

    began = time.time()
    told, say_at = "", began
    try:
        while not mounts.wait_gone(record, timeout=LOOK_SECONDS if timeout is None else min(LOOK_SECONDS, timeout)):
            why = reason(record, began)
            if why != told or time.time() >= say_at:
                note(why)
                told, say_at = why, time.time() + AGAIN_SECONDS
            if timeout is not None and time.time() - began >= timeout:
                raise LamfsError(
                    f"{record.mountpoint} is unmounted, but its daemon (pid {record.pid}) still lives after {timeout:g}"
                    f" s; 'lamfs umount --force {record.mountpoint}' ends it."
                )
    except KeyboardInterrupt:
        note(f"The daemon (pid {record.pid}) goes on, and ends when nothing keeps it any more.")
        raise
    word = last_word(record, said=said)
    if word is not None:
        raise LamfsError(word)


def last_word(record: MountRecord, *, said: bool) -> str | None:
    """What a daemon failed to do after its mount was gone.

    A lost lock is not a failure: this prints it, unless it was ``said`` before, and returns None.
    """
    from lamfs.ops import mounts

    word = mounts.last_word(record)
    if isinstance(word, LeaseLost):
        if not said:
            note(shown(str(word)))
        return None
    return f"{record.mountpoint} is unmounted, but the registry was not stored: {word}" if word is not None else None


def reason(record: MountRecord, since: float) -> str:
    """What keeps the daemon of an unmounted mount alive, and how to end it."""
    path = shown(record.mountpoint)
    force = f"'lamfs umount --force {path}' ends the daemon all the same"
    others = mountpoints.elsewhere(record.device)
    if others:
        return (
            f"The mount is still in another mount namespace, such as a container's: of {names(others)}. End these (or"
            f" the container), or unmount it there: 'nsenter -t {others[0].pid} -m umount {shown(others[0].path)}';"
            f" {force}, and they get errors from then on."
        )
    users = mountpoints.holders_of(record.mount_id)
    if users:
        return f"{names(users)} still uses a file of the mount. Close it; {force}, and they get errors from then on."
    status = {}
    with contextlib.suppress(LamfsError):
        status = ask(record, ANSWER_SECONDS)
    if not status:
        return f"The daemon (pid {record.pid}) stores the registry; {force}, and the next mount stores it."
    if status.get("owed_rows"):
        problem = last_error(status, since)
        left = owed_words(status.get("owed", {}), status.get("owed_bytes", 0))
        return (
            f"Still to store: {left}.{f' {problem}' if problem else ''} {force}, and leaves them in the spool: nothing"
            " is lost, the next mount stores them."
        )
    if status.get("open_files"):
        return (
            f"A process that you may not look at has {status['open_files']} of its files open, or a container has the"
            f" mount; {force}."
        )
    return f"The daemon (pid {record.pid}) is about to end; {force}."


def end(record: MountRecord, seconds: float, *, graceful: bool, said: bool = False) -> None:
    """End the daemon of an unmounted mount. ``graceful``: it gets ``seconds`` to end by itself.

    ``said``: as for ``wait_for_end``.
    """
    from lamfs.ops import ending, mounts

    if graceful and not mounts.wait_gone(record, timeout=min(LOOK_SECONDS, seconds)):
        ending.ask(record)  # somebody has it open, or it has something to store yet
        mounts.wait_gone(record, timeout=seconds)
    if ending.end(record):
        note(f"Its daemon (pid {record.pid}) did not end, and was killed.")
    word = last_word(record, said=said)
    if word is not None:
        complain(word)
    for dead in mounts.all_dead():
        if dead.record.owner == record.owner:
            mounts.bury(dead)


def names(found: list[Holder]) -> str:
    """Processes for users, with what they have open."""
    named = [f"{shown(holder.name)} (pid {holder.pid}: {shown(holder.path)})" for holder in found[:MAX_HOLDERS]]
    more = f" and {len(found) - MAX_HOLDERS} more" if len(found) > MAX_HOLDERS else ""
    return f"{', '.join(named)}{more}"


def busy(path: str) -> str:
    """A sentence that names the processes which use a mount."""
    found = mountpoints.holders(path)
    if not found:
        return f"{path} is in use by a process that you may not look at; close it, or use --force."
    return f"{path} is in use by {names(found)}. Close these, or use --force."
