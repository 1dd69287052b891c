"""The mounts on this machine: their records, and the client of their control sockets. Synchronous.

A record is ``<data dir>/<instance id hex>/mounts/<pid>.json``, beside the socket ``<pid>.sock``. The mount's daemon
owns both, and touches the record now and then. A record without a daemon is that of a mount that died. It stays until
somebody unmounts, or mounts again. Nothing here touches a path inside of a mount, so a hung mount does not hang its
caller.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lamfs import config, jsonlines
from lamfs.config import InstanceSettings
from lamfs.errors import LamfsError, LeaseLost, NotSetUp
from lamfs.jsonlines import Lines

SOCKET_PATH_MAX = 100
"""Bytes that a socket's name may have; sun_path of unix(7) has 108."""
_MAX_LINKS = 40
_MAX_LINE = 16 << 20
_LAST_WORD = "last-word.json"
"""Beside the records: why the last daemon ended with something undone."""


class MountRecord(NamedTuple):
    """One mount. ``owner`` is registry.process_id() of its daemon; ``started_at`` in ns since the epoch; ``mountpoint``
    is absolute and free of symlinks. ``device`` (major:minor) is the kernel's name of the file system, the same in
    every mount namespace; ``mount_id`` is the mount's number in the daemon's namespace (proc_pid_mountinfo(5)). Empty
    and 0: not known."""

    pid: int
    owner: str
    mountpoint: str
    slug: str
    socket: str
    started_at: int
    read_only: bool = False
    device: str = ""
    mount_id: int = 0


class DeadMount(NamedTuple):
    """A mount whose daemon died. ``last_seen``: when it was last seen alive, in ns since the epoch."""

    record: MountRecord
    last_seen: int


class MountSilent(LamfsError):
    """The daemon of a mount does not answer."""

    errno = errno.ETIMEDOUT


def write(directory: Path, record: MountRecord) -> Path:
    """Announce a mount; returns the record's path, which the daemon unlinks when it ends."""
    path = directory / f"{record.pid}.json"
    config.write_json(path, record._asdict(), durable=False)
    return path


def remove(directory: Path, pid: int) -> None:
    """Remove a mount's record and socket, as far as they are there."""
    for suffix in ("json", "sock"):
        with contextlib.suppress(FileNotFoundError):
            (directory / f"{pid}.{suffix}").unlink()


def leave_word(directory: Path, error: LamfsError) -> None:
    """Note why this daemon could not store the registry after its mount was gone; it ends now. 'lamfs umount' reads the
    note."""
    from lamfs.processes import process_id

    word = {"owner": process_id(), "text": str(error), "lost": isinstance(error, LeaseLost)}
    config.write_json(directory / _LAST_WORD, word, durable=False)


def last_word(record: MountRecord) -> LamfsError | None:
    """Why the daemon of a mount could not store the registry at its end (``leave_word``); None: it did."""
    with contextlib.suppress(NotSetUp):
        data = config.read_json(Path(record.socket).parent / _LAST_WORD) or {}
        if data.get("owner") == record.owner:
            return _error(str(data.get("text")), data)
    return None


def _error(text: str, reply: dict[str, Any]) -> LamfsError:
    """The error that a daemon's reply reports."""
    return LeaseLost(text) if reply.get("lost") else LamfsError(text, errno=reply.get("errno"))


def touch(directory: Path, pid: int) -> None:
    """Show that the daemon lives. Errors are ignored: the record may be missing, or may not be changed."""
    with contextlib.suppress(OSError):
        os.utime(directory / f"{pid}.json")


def live(settings: InstanceSettings) -> list[MountRecord]:
    """Mounts of an instance with a live daemon, oldest first."""
    return _live([settings.mounts_dir])


def is_written(settings: InstanceSettings) -> bool:
    """Whether a live mount of an instance can write."""
    return any(not record.read_only for record in live(settings))


def all_live() -> list[MountRecord]:
    """Live mounts of all instances, oldest first."""
    return _live(config.data_dir().glob("*/mounts"))


def _live(directories: Iterable[Path]) -> list[MountRecord]:
    from lamfs.processes import is_alive

    found = [record for _, record in _records(directories) if is_alive(record.owner)]
    return sorted(found, key=lambda record: record.started_at)


def all_dead() -> list[DeadMount]:
    """Mounts of all instances whose daemon died, and that nobody has unmounted since, oldest first."""
    from lamfs.processes import is_alive

    found = []
    for path, record in _records(config.data_dir().glob("*/mounts")):
        # Read before the daemon is looked for: a daemon that ends removes its record.
        with contextlib.suppress(FileNotFoundError):
            seen = path.stat().st_mtime_ns
            if not is_alive(record.owner) and path.exists():
                found.append(DeadMount(record, seen))
    return sorted(found, key=lambda dead: dead.record.started_at)


def bury(dead: DeadMount) -> None:
    """Remove the record and the socket that a dead daemon has left."""
    remove(Path(dead.record.socket).parent, dead.record.pid)


def _records(directories: Iterable[Path]) -> Iterator[tuple[Path, MountRecord]]:
    """All records. A record that is damaged, or of another version, is removed when its process is gone."""
    for directory in directories:
        for path in directory.glob("[0-9]*.json"):
            try:
                data = config.read_json(path)
                record = MountRecord(**data) if data is not None else None
            except (NotSetUp, TypeError):
                record = None
            if record is not None:
                yield path, record
            elif path.stem.isdigit() and not Path(f"/proc/{path.stem}").exists():
                remove(directory, int(path.stem))


# -- paths ------------------------------------------------------------------------------------------------------------


def find_by_path(path: str | os.PathLike[str]) -> tuple[MountRecord, str] | None:
    """The live mount of a path, and the key below its root (``""``: the mountpoint itself); None: the path is in no
    mount.

    Symlinks on the way are followed. No component inside of any mountpoint is looked at.
    """
    by_point = {record.mountpoint: record for record in all_live()}
    if not by_point:
        return None
    found = _walk(os.path.abspath(os.fspath(path)), set(by_point))
    if found is None:
        return None
    point, key = found
    return by_point[point], key


def find_dead_by_path(path: str | os.PathLike[str]) -> MountRecord | None:
    """The mount of a path whose daemon died and that nobody has unmounted since; None: the path is in no such mount."""
    by_point = {dead.record.mountpoint: dead.record for dead in all_dead()}
    found = _walk(os.path.abspath(os.fspath(path)), set(by_point)) if by_point else None
    return None if found is None else by_point[found[0]]


def _walk(path: str, points: set[str]) -> tuple[str, str] | None:
    """Resolve a path component by component until it enters a mountpoint. Returns the mountpoint, and the rest of the
    path."""
    links = 0
    done = ""
    rest = [part for part in path.split("/") if part]
    while True:
        if (done or "/") in points:
            return done or "/", os.path.normpath("/".join(rest)) if rest else ""
        if not rest:
            return None
        part = rest.pop(0)
        if part == "..":
            done = done.rpartition("/")[0]
            continue
        if part == ".":
            continue
        here = f"{done}/{part}"
        if here not in points:
            try:
                link = os.readlink(here) if stat.S_ISLNK(os.lstat(here).st_mode) else None
            except OSError:
                link = None  # it does not exist (yet): the name counts as it is
            if link is not None:
                links += 1
                if links > _MAX_LINKS:
                    return None
                rest = [piece for piece in link.split("/") if piece] + rest
                done = "" if link.startswith("/") else done
                continue
        done = here


# -- the control socket -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def socket_address(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a name of a unix socket that fits into sun_path, for bind(2) and connect(2). It is valid inside the block.

    A path that is too long is named through a file descriptor of its directory.
    """
    text = os.fspath(path)
    if len(os.fsencode(text)) <= SOCKET_PATH_MAX:
        yield text
        return
    fd = os.open(os.path.dirname(text), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{os.path.basename(text)}"
    finally:
        os.close(fd)


def request(
    record: MountRecord,
    command: dict[str, Any],
    *,
    timeout: float,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Send a command to a daemon, and return its reply. ``timeout``: seconds without any answer from it.

    ``on_progress`` gets the values of ``{"progress": …}`` lines. Raises LamfsError with the daemon's own sentence,
    LeaseLost when it must not store anything any more, and MountSilent when it does not answer or hangs up.
    """
    try:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(timeout)
            with socket_address(record.socket) as address:
                channel.connect(address)
            channel.sendall(jsonlines.encode(command))
            for reply in _replies(channel):
                if "progress" in reply:
                    if on_progress is not None:
                        on_progress(reply["progress"])
                elif reply.get("error"):
                    raise _error(str(reply["error"]), reply)
                else:
                    return reply
    except (OSError, ValueError) as error:
        if isinstance(error, LamfsError):
            raise
        raise MountSilent(
            f"The mount at {record.mountpoint} (process {record.pid}) does not answer ({error}); look at"
            " 'lamfs status', and unmount it with 'lamfs umount --force' if it hangs."
        ) from error
    raise MountSilent(
        f"The mount at {record.mountpoint} (process {record.pid}) hung up before it had answered; look at"
        " 'lamfs status' and try again."
    )


def _replies(channel: socket.socket) -> Iterator[dict[str, Any]]:
    lines = Lines(_MAX_LINE)
    while data := channel.recv(65536):
        for line in filter(None, lines.feed(data)):
            yield jsonlines.decode(line)


def poke(settings: InstanceSettings, *, timeout: float = 0.5) -> None:
    """Tell the instance's mounts that something was committed. They would notice later by themselves. Never raises."""
    with contextlib.suppress(LamfsError, OSError):
        if not settings.mounts_dir.is_dir():
            return
        for record in live(settings):
            with contextlib.suppress(LamfsError):
                request(record, {"cmd": "poke"}, timeout=timeout)


def wait_gone(record: MountRecord, *, timeout: float) -> bool:
    """Wait until a mount's daemon has ended. Returns False when it still lives after ``timeout`` seconds."""
    from lamfs.processes import is_alive

    deadline = time.monotonic() + timeout
    while is_alive(record.owner):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
