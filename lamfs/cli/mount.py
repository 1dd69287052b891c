"""``lamfs mount``. Main thread only; paths inside a mount are never touched here."""

from __future__ import annotations

import contextlib
import os

import click

from lamfs import mountinfo
from lamfs.cli import mountpoints
from lamfs.cli.common import instance_option
from lamfs.cli.output import Progress, complain, note, say, shown, size
from lamfs.cli.seam import FAILURE, Command, leave, leave_at_once
from lamfs.cli.umount import OTHERS, bury_at, live_mount
from lamfs.errors import AlreadyExists, InvalidArgument, NotSetUp
from lamfs.printable import count_of

MAX_FAILED = 10

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
    lamfs mount --adopt ~/data
    lamfs mount --read-only -o allow_other,umask=022 --instance alice/screens /srv/screens
    """,
)
@click.argument("mountpoint", type=mountpoints.UNTOUCHED, default=mountpoints.DEFAULT)
@instance_option
@click.option("--read-only", is_flag=True, help="Refuse every change.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground and log to the terminal.")
@click.option(
    "--adopt",
    is_flag=True,
    help="Move what is in the directory itself, such as files written while nothing was mounted, into the mount.",
)
@click.option("-o", "words", metavar="OPTION[,…]", multiple=True, help="Mount options; see below.")
def mount(
    mountpoint: str, instance: str | None, read_only: bool, foreground: bool, adopt: bool, words: tuple[str, ...]
) -> None:
    """Show an instance as a directory.

    MOUNTPOINT is ~/lamfs by default. The directory is made when it is missing, and must be empty, or be given with
    --adopt. Without any instance this makes the default one, with a local folder as its storage. Returns when the mount
    is ready.
    """
    from lamfs.daemon.options import MountOptions, apply_words

    options = MountOptions(slug="", mountpoint="", read_only=read_only, foreground=foreground, adopt=adopt)
    apply_words(options, [word for given in words for word in given.split(",") if word])
    if adopt and (foreground or options.read_only):
        raise InvalidArgument(
            f"--adopt does not go with {'--foreground' if foreground else 'a read-only mount'}; mount with --adopt"
            " alone once, unmount, and mount as you like."
        )
    path = mountpoints.absolute(mountpoint)
    clear_the_way(path)
    made = mountpoints.prepare(path, empty=not adopt)
    try:
        # The folder that the mount is going to hide.
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if adopt else None
        options.slug = choose_instance(instance)
        options.mountpoint = path

        from lamfs.daemon import launch

        if foreground:
            code = launch.run_foreground(options)
            made = made if code else []
            leave(code)
        pid = launch.launch(options, warn=note)
    except BaseException:
        for directory in made:  # nobody else has anything in there
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        raise
    say(f"{options.slug} is mounted at {shown(path)}{' read-only' if options.read_only else ''} (pid {pid}).")
    say(f"Unmount it with: lamfs umount {shown(path)}")
    if folder is not None:
        move_in(folder, path)
    leave_at_once()


def move_in(folder: int, path: str) -> None:
    """Move what is in the folder below a mount into it. Say what was moved and what was not."""
    from lamfs.ops import stranded

    with Progress(f"moving what was in {path} into the mount") as progress:
        moved = stranded.move_in(folder, path, progress.add)
    if moved.files:
        say(f"Moved {count_of(moved.files, 'file')} ({size(moved.bytes)}) from the folder itself into the mount.")
    for name, there in sorted(moved.beside):
        note(f"'{shown(name)}' is in the mount already: what was in the folder is '{shown(there)}'.")
    if moved.bare:
        note(f"Extended attributes of {count_of(moved.bare, 'file')} were not kept; '-o xattr' keeps them.")
    for name, what in sorted(moved.special):
        note(f"'{shown(name)}' is {what}, and stays in the folder.")
    for name, why in sorted(moved.failed)[:MAX_FAILED]:
        complain(f"'{shown(name)}' could not be moved: {why}.")
    if moved.failed:
        more = f" {len(moved.failed)} in all." if len(moved.failed) > MAX_FAILED else ""
        complain(
            f"What could not be moved is in the folder still, hidden by the mount.{more} Nothing is lost: unmount, and"
            " mount with --adopt again."
        )
        leave(FAILURE)


def clear_the_way(path: str) -> None:
    """Make sure that nothing is mounted at ``path``. Unmounts what a dead daemon has left. Raises AlreadyExists."""
    mounted = mountinfo.at(path)
    if mounted is None:
        bury_at(path)
        return
    record = live_mount(path)
    if record is not None:
        raise AlreadyExists(f"{record.slug} is mounted at {path} already (pid {record.pid}).")
    if not mounted.is_lamfs:
        raise AlreadyExists(f"Something else is mounted at {path} ({mounted.fstype}); choose another directory.")
    if not mountpoints.is_dead(path):
        raise AlreadyExists(f"A living lamfs mount of {OTHERS} is at {path}; choose another directory.")
    mountpoints.unmount(path, lazy=True)
    bury_at(path)
    note(f"A mount at {shown(path)} had lost its daemon; it is cleaned away.")


def choose_instance(slug: str | None) -> str:
    """The instance to mount: the one asked for, else the current one, else the embedded default.

    Raises NotSetUp when there are several and none is current.
    """
    from lamfs import config

    if slug is not None or config.current_slug() is not None:
        return config.load_instance(slug).slug
    known = [settings.slug for settings in config.list_instances()]
    default = f"{config.current_user().handle}/default"
    if any(name != default for name in known):
        raise NotSetUp(
            f"No instance is the current one; choose with --instance: {', '.join(known)}. Or make one current with"
            " 'lamfs connect'."
        )
    from lamfs.ops import setup

    # What init says of locks and cloud copies would only puzzle a user who asked for nothing but a mount.
    settings = setup.ensure_default(say=lambda _: None)
    if default not in known:
        say(f"There was no instance yet: made {settings.slug}, with its storage in {settings.storage.root}.")
    return settings.slug
