"""``lamfs mount`` and ``umount``. Main thread only; paths inside a mount are never touched here."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import click

from lamfs.cli import mountpoints
from lamfs.cli.common import instance_option
from lamfs.cli.output import complain, note, say, shown
from lamfs.cli.seam import Command, leave, leave_at_once
from lamfs.cli.sync import Pending, sync_mount
from lamfs.errors import AlreadyExists, LamfsError, NotFound, NotSetUp

if TYPE_CHECKING:
    from lamfs.ops.mounts import MountRecord

DEFAULT_MOUNTPOINT = "~/lamfs"
FORCED_SECONDS = 30.0
"""With --force: how long storing what is owed may take before the mount goes anyway."""
MAX_HOLDERS = 5

OPTION_HELP = """\b
-o takes, separated by commas:
  ro, rw              read-only, or not
  allow_other         other users may use the mount (needs user_allow_other
                      in /etc/fuse.conf unless root mounts)
  public_stats        everybody may read .lamfs/stats and .lamfs/metrics, not
                      only the user that mounts
  uid=N, gid=N        show everything as owned by this user, group
  umask=OCTAL         take these bits from every mode
  xattr               extended attributes: user.lamfs.* and your own
  real_keys           new files get real keys: the object's key is the path
  close=spool         close() returns when the bytes are on the local disk
                      (default); close=storage: when they are in storage
  fsync=storage       fsync() returns when the bytes are in storage
                      (default); fsync=spool: when on the local disk
  cache_limit=SIZE    most bytes in the block cache, such as 20G (default)
  spool_limit=SIZE    bytes not stored yet at which writers wait, such as 32G (default)
  spool_free=SIZE     bytes that waiting writers leave free on the disk (default: 1G, at most 2 % of it)
  cache_free=SIZE     what the cache leaves free of its disk (5 %, at most 10G)
  timeout=SECONDS     how long a read or an fsync waits for storage before it
                      fails with EIO (default 60)
  uploads=N           files stored at a time, 1 to 64 (default 8)
  debug               a more talkative log
  noatime, noexec, sync, dirsync, nodev, nosuid
                      as in mount(8); a mount is always nodev and nosuid
"""


@click.command(
    cls=Command,
    epilog=OPTION_HELP,
    examples="""
    lamfs mount ~/data
    lamfs mount --read-only -o allow_other,umask=022 --instance alice/screens /srv/screens
    """,
)
@click.argument("mountpoint", type=click.Path(readable=False), default=DEFAULT_MOUNTPOINT)
@instance_option
@click.option("--read-only", is_flag=True, help="Refuse every change.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground and log to the terminal.")
@click.option("-o", "words", metavar="OPTION[,…]", multiple=True, help="Mount options; see below.")
def mount(mountpoint: str, instance: str | None, read_only: bool, foreground: bool, words: tuple[str, ...]) -> None:
    """Show an instance as a directory.

    MOUNTPOINT is ~/lamfs by default. The directory is made when it is missing, and must be empty. Without any instance
    this makes the default one, with a local folder as its storage. Returns when the mount is ready.
    """
    from lamfs.daemon.options import MountOptions, apply_words

    options = MountOptions(slug="", mountpoint="", read_only=read_only, foreground=foreground)
    apply_words(options, [word for given in words for word in given.split(",") if word])
    path = mountpoints.absolute(mountpoint)
    clear_the_way(path)
    mountpoints.prepare(path)
    options.slug = choose_instance(instance)
    options.mountpoint = path

    from lamfs.daemon import launch

    if foreground:
        leave(launch.run_foreground(options))
    pid = launch.launch(options, warn=note)
    say(f"{options.slug} is mounted at {shown(path)}{' read-only' if options.read_only else ''} (pid {pid}).")
    say(f"Unmount it with: lamfs umount {shown(path)}")
    leave_at_once()


OTHERS = "another user, or with other directories (LAMFS_DATA_DIR)"


def clear_the_way(path: str) -> None:
    """See that nothing is mounted at ``path``; unmount what a dead daemon has left. Raises AlreadyExists."""
    mounted = mountpoints.at(path)
    if mounted is None:
        return
    record = live_mount(path)
    if record is not None:
        raise AlreadyExists(f"{record.slug} is mounted at {path} already (pid {record.pid}).")
    if not mounted.is_lamfs:
        raise AlreadyExists(f"Something else is mounted at {path} ({mounted.fstype}); choose another directory.")
    if not mountpoints.is_dead(path):
        raise AlreadyExists(f"A living lamfs mount of {OTHERS} is at {path}; choose another directory.")
    mountpoints.unmount(path, lazy=True)
    note(f"A mount at {shown(path)} had lost its daemon; it is cleaned away.")


def choose_instance(slug: str | None) -> str:
    """The instance to mount: the one asked for, else the current one, else the embedded default.

    Raises NotSetUp when there are several and none is current.
    """
    from lamfs import config
    from lamfs.ops import setup

    if slug is not None or config.current_slug() is not None:
        return config.load_instance(slug).slug
    known = [settings.slug for settings in config.list_instances()]
    default = f"{config.current_user().handle}/default"
    if any(name != default for name in known):
        raise NotSetUp(
            f"No instance is the current one; choose with --instance: {', '.join(known)}. Or make one current with"
            " 'lamfs connect'."
        )
    # What init says of locks and cloud copies would only puzzle whoever asked for nothing but a mount.
    settings = setup.ensure_default(say=lambda _: None)
    if default not in known:
        say(f"There was no instance yet: made {settings.slug}, with its storage in {settings.storage.root}.")
    return settings.slug


def live_mount(path: str) -> MountRecord | None:
    """The living mount at just this path; not one that has left the tree and only waits for its last open file."""
    from lamfs.ops import mounts

    gone = mountpoints.detached(mounts.all_live())
    return next((record for record in mounts.all_live() if record.mountpoint == path and record.pid not in gone), None)


@click.command(
    cls=Command,
    examples="""
    lamfs umount ~/data
    lamfs umount --force ~/data
    """,
)
@click.argument("mountpoint", type=click.Path(readable=False), default=DEFAULT_MOUNTPOINT)
@click.option("--force", is_flag=True, help="Unmount although files are open, or something cannot be stored.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help=f"How long storing may take.  [default: no limit; with --force {FORCED_SECONDS:.0f}]",
)
def umount(mountpoint: str, force: bool, timeout: float | None) -> None:
    """Store what is owed, then unmount.

    MOUNTPOINT is ~/lamfs by default. Returns when nothing is owed and the daemon has ended. With --force the mount
    leaves the tree although files are open in it, and although storage does not answer: the daemon goes on trying, and
    if it ends before, the next mount stores what is left. Also clears away a mount whose daemon has died.
    """
    path = mountpoints.absolute(mountpoint)
    record = live_mount(path)
    if record is None:
        clear_dead(path)
        return
    problem = None
    try:
        sync_mount(record, FORCED_SECONDS if force and timeout is None else timeout)
    except LamfsError as error:
        if not force:
            raise LamfsError(f"{error} {path} stays mounted; --force unmounts it all the same.") from error
        complain(str(error))
        problem = error
    # A mount that is this process's own working directory would be busy because of it.
    os.chdir("/")
    in_use = force and bool(mountpoints.holders(path))
    try:
        mountpoints.unmount(path, lazy=force)
    except LamfsError as error:
        if error.errno != errno.EBUSY:
            raise
        raise LamfsError(busy(path), errno=errno.EBUSY) from None
    if problem is None and not in_use:
        wait_for_end(record)
    elif problem is None or isinstance(problem, Pending):
        note(f"Its daemon (pid {record.pid}) ends when the files in it are closed and everything is stored.")
    say(f"{shown(path)} is unmounted.")
    tell_scratch(record.slug)


def tell_scratch(slug: str) -> None:
    """Name the scratch files that hold bytes: nobody else has them."""
    from lamfs import config
    from lamfs.ops import scratch_files

    files = scratch_files.known(config.load_instance(slug))
    if files:
        note(shown(scratch_files.sentence(files)))


def clear_dead(path: str) -> None:
    """Unmount what a dead daemon has left at ``path``. Raises NotFound when there is no lamfs mount."""
    mounted = mountpoints.at(path)
    if mounted is None:
        outer = mountpoints.around(path)
        if outer is not None:
            raise NotFound(f"{path} is inside the lamfs mount {outer.path}; name that one.")
        raise NotFound(f"Nothing is mounted at {path}; 'lamfs status' lists the mounts.")
    if not mounted.is_lamfs:
        raise NotFound(f"{path} is not a lamfs mount ({mounted.fstype}); use umount.")
    if not mountpoints.is_dead(path):
        raise LamfsError(f"{path} was mounted by {OTHERS}; unmount it there.", errno=errno.EPERM)
    mountpoints.unmount(path, lazy=True)
    say(f"The mount at {shown(path)} had lost its daemon; it is unmounted. The next mount stores what is owed.")


def busy(path: str) -> str:
    """A sentence that says who uses a mount."""
    found = mountpoints.holders(path)
    if not found:
        return f"{path} is in use by a process that you may not look at; close it, or use --force."
    named = [f"{holder.name} (pid {holder.pid}: {holder.path})" for holder in found[:MAX_HOLDERS]]
    more = f" and {len(found) - MAX_HOLDERS} more" if len(found) > MAX_HOLDERS else ""
    return f"{path} is in use by {', '.join(named)}{more}. Close these, or use --force."


def wait_for_end(record: MountRecord) -> None:
    """Wait until the daemon of a mount has ended: it drains once more and stores the registry."""
    from lamfs.ops import mounts

    try:
        mounts.wait_gone(record, timeout=float("inf"))
    except KeyboardInterrupt:
        note(f"The daemon (pid {record.pid}) goes on storing what is owed, and then ends.")
        raise
