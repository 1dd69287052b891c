"""Who else can write to a folder, by its owner, group and mode, and what follows from that. No state; any thread.

Anybody who can write to the folders of lamfs's own state can make lamfs read or overwrite any file of its user. Such
folders are refused, as ssh(1) does. Objects in a storage folder are checked before they are used, and links in it are
not followed. A storage folder is refused only if everybody can write to it.
"""

from __future__ import annotations

import enum
import grp
import os
import pwd
import shlex
import stat

from lamfs.errors import NotSetUp, StorageForbidden


class Others(enum.Enum):
    """Who, besides a user and root, can write to a folder."""

    NOBODY = enum.auto()
    EVERYBODY = enum.auto()
    OWNER = enum.auto()
    """It belongs to somebody else."""
    GROUP = enum.auto()


def others(status: os.stat_result, *, uid: int | None = None) -> Others:
    """Who else than ``uid`` (None: the user of this process) can write to the folder with this stat(2).

    The owner's private group, which Debian and Fedora make for umask 002, does not count: it is the owner's primary
    group, has the owner's name, and has no other members. Root is a user like any other here: what somebody else puts
    into root's folder, lamfs would use with root's rights. Access control lists count only as far as the mode shows
    them, in the group bits.
    """
    if status.st_mode & stat.S_IWOTH:
        return Others.EVERYBODY
    if status.st_uid not in (0, os.geteuid() if uid is None else uid):
        return Others.OWNER
    if status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid, status.st_uid):
        return Others.GROUP
    return Others.NOBODY


def _is_private_group(gid: int, uid: int) -> bool:
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def check_private(path: str, status: os.stat_result, variable: str, *, uid: int | None = None) -> None:
    """Raise NotSetUp if others can write to a folder of lamfs's own. ``variable`` names the folder, or can name
    another."""
    found = others(status, uid=uid)
    if found is Others.NOBODY:
        return
    if found is Others.OWNER:
        step = f"run 'sudo chown {_user(os.geteuid() if uid is None else uid)} {shlex.quote(path)}'"
    elif status.st_mode & stat.S_ISVTX:
        step = "make a folder of your own below it"
    else:
        step = f"run 'chmod go-w {shlex.quote(path)}'"
    raise NotSetUp(
        f"The folder {path} ({variable}) {_fault(found, status)}, so others could make lamfs read or overwrite any file"
        f" of yours; {step}, or name another folder with {variable}."
    )


def check_storage_folder(path: str, status: os.stat_result, *, uid: int | None = None) -> str | None:
    """A warning, as a sentence, about others who can write to the root of a storage folder. None: there are none.

    Raises StorageForbidden if everybody can. An owner or a group only gets a warning, also for root's processes: an
    administrator may intend that, and so may a container whose volume has its host's users. But two users cannot share
    such a storage: the objects of each have mode 0600.
    """
    found = others(status, uid=uid)
    if found is Others.NOBODY:
        return None
    if found is not Others.EVERYBODY:
        return (
            f"The storage folder {path} {_fault(found, status)}: others can replace what is stored there. A folder"
            " cannot be shared between users of a machine; give each a folder of his own, or use a bucket."
        )
    if status.st_mode & stat.S_ISVTX:
        step = "make a folder of your own below it, and use that"
    else:
        step = f"run 'chmod o-w {shlex.quote(path)}', or choose another folder"
    raise StorageForbidden(
        f"The storage folder {path} {_fault(found, status)}, so others could make lamfs read or overwrite any file of"
        f" yours; {step}."
    )


def _fault(found: Others, status: os.stat_result) -> str:
    if found is Others.OWNER:
        return f"belongs to {_user(status.st_uid)}"
    everybody = found is Others.EVERYBODY
    writers = "everybody" if everybody else f"the group {_group(status.st_gid)}"
    return f"can be written by {writers} (mode {stat.S_IMODE(status.st_mode):04o})"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
