"""What a careful user does after a crash or damage: looks, follows the advice, and has a mount again."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

from tests.chaos.world import NAME, SLUG, Machine, Mount, Result, Violation
from tests.support import watchdog

_DELETE = re.compile(r"delete (/\S+/(?:snapshot|lease)\.json)")
_GONE = re.compile(r"^problem: storage: the object .* is gone \(artifact", re.MULTILINE)
_NOT_STORED = re.compile(
    r"is unmounted, but the registry was not stored: .* is damaged .*(--restore|fsck --repair)", re.DOTALL
)
_WORK = "'lamfs fsck --repair --instance "
"""The advice for a damaged work database."""
END_SECONDS = 120.0
"""How long an unmount may take when storage answers."""
STUCK_SECONDS = 15.0
"""The same, when something may not be storable."""

REPAIRS: dict[str, Callable[[Machine], object]] = {
    "status": lambda machine: machine.cli("status"),
    "fsck": lambda machine: machine.cli("fsck", "--instance", SLUG),
    "fsck --data": lambda machine: machine.cli("fsck", "--data", "--instance", SLUG),
    "fsck --repair": lambda machine: machine.cli("fsck", "--repair", "--instance", SLUG),
    "connect": lambda machine: machine.connect(),
    "sync": lambda machine: machine.cli("sync", "--timeout", "20"),
    "close": lambda machine: machine.cli("close", SLUG),
    "ls": lambda machine: machine.cli("ls", "--instance", SLUG),
    "cache": lambda machine: machine.cli("cache", "**", "--instance", SLUG),
    "umount": lambda machine: machine.umount(machine.mounts[0], "--timeout", "20"),
    "umount --force": lambda machine: machine.umount(machine.mounts[0], "--force"),
    "mount": lambda machine: machine.mounts[0].mounted or machine.mount(machine.mounts[0]),
    "mount --read-only": lambda machine: machine.mounts[1].mounted or machine.mount(machine.mounts[1], read_only=True),
}
RESTORE: dict[str, Callable[[Machine], object]] = {"connect --restore": lambda machine: machine.connect("--restore")}
"""Puts names back to what storage says of them; no bytes are lost."""


def try_repairs(machine: Machine, rng: random.Random, count: int, *, restore: bool) -> None:
    """Some repair commands in any order. Whatever they say, nothing may be lost by them."""
    commands = REPAIRS | (RESTORE if restore else {})
    for name in rng.choices(sorted(commands), k=count):
        commands[name](machine)


def recover(machine: Machine, rng: random.Random, *, restore: bool = True, stuck: bool = False) -> bool:
    """Have the instance mounted at the machine's first mountpoint, everything stored, and looked at by fsck --repair.
    Returns whether fsck names objects that are gone.

    ``restore``: whether the registry in storage may be taken when nothing else helps, and at random. ``stuck``:
    something that cannot be stored may keep the mount from ending without --force, if that is said. Raises Violation
    when there is no way, or something does not end.
    """
    world = machine.world
    world.storage.running()
    try_repairs(machine, rng, rng.choice((0, 0, 1, 2, 4)), restore=restore)
    mount = machine.mounts[0]
    for other in machine.mounts[1:]:
        if other.mounted:
            unmount(machine, other)
    _mount(machine, restore=restore)
    limit = STUCK_SECONDS if stuck else END_SECONDS
    stored = machine.cli("sync", str(mount.path), "--timeout", str(limit))
    if not stored.good and world.storage.stalled():
        stored = machine.cli("sync", str(mount.path), "--timeout", str(limit))
    # A bad page may be met only now, and nothing more is stored then: what is said is the way back.
    late = not stored.good and (_WORK in stored.output or (restore and "--restore" in stored.output))
    if not stored.good and not stuck and not late:
        world.complain("hang", f"everything answers, and {stored}")
    ended = unmount(machine, mount, stuck=stuck or late, damaged=restore)
    if (late and "--restore" in stored.output) or "--restore" in ended.output:
        machine.connect("--restore")
    machine.cli("fsck", "--repair", "--instance", SLUG)
    _mount(machine, restore=restore)
    machine.json("status")
    checked = machine.cli("fsck", "--instance", SLUG)
    if _WORK in checked.output:
        unmount(machine, mount, stuck=True, damaged=True)
        machine.cli("fsck", "--repair", "--instance", SLUG)
        _mount(machine, restore=restore)
        checked = machine.cli("fsck", "--instance", SLUG)
    if "--restore" in checked.output and restore:
        # What is wrong with the registry may be seen late; this is what it says to do.
        unmount(machine, mount, stuck=True, damaged=True)
        machine.connect("--restore")
        machine.cli("fsck", "--repair", "--instance", SLUG)
        _mount(machine, restore=restore)
        checked = machine.cli("fsck", "--instance", SLUG)
    machine.hear_logs()
    return _GONE.search(checked.output) is not None


def _mount(machine: Machine, *, restore: bool) -> None:
    """Mount, by whatever way there is. Raises Violation."""
    mount = machine.mounts[0]
    if mount.mounted and mount.daemon is not None:
        return
    rungs: list[Callable[[], Result]] = [
        lambda: machine.cli("fsck", "--repair", "--instance", SLUG),
        lambda: machine.connect(),
        lambda: machine.cli("fsck", "--repair", "--instance", SLUG),
    ]
    if restore:
        rungs += [lambda: machine.connect("--restore"), lambda: machine.cli("fsck", "--repair", "--instance", SLUG)]
    if not machine.knows:
        storage = machine.world.storage
        rungs = [rungs[1], lambda: machine.cli("init", "--storage", storage.root, "--name", NAME, *storage.options())]
    said = []
    for rung in (None, *rungs):
        if rung is not None:
            said.append(rung())
        said.append(machine.mount(mount))
        if said[-1].good:
            return
        for path in {Path(found) for result in said for found in _DELETE.findall(result.output)}:
            if path.is_relative_to(machine.data_dir) and path.exists():
                machine.world.log.write("advice", delete=str(path))
                path.unlink()
    text = "\n".join(map(str, said))
    raise Violation("refused", f"there is no way back to a mount on {machine.name}:\n{text}")


def unmount(machine: Machine, mount: Mount, *, stuck: bool = False, damaged: bool = False) -> Result:
    """Unmount; what does not end by itself is a complaint, unless that is foreseen and said, and is ended by force.

    ``damaged``: that a registry which is damaged could not be stored is foreseen, too. Returns what was said first.
    """
    mount.stop_worker()
    words = ("--timeout", str(STUCK_SECONDS)) if stuck else ()
    result = machine.umount(mount, *words, seconds=END_SECONDS)
    if not result.good and machine.world.storage.stalled():
        result = machine.umount(mount, *words, seconds=END_SECONDS)
    if result.good:
        return result
    if damaged and _NOT_STORED.search(result.output):
        return result
    if not (stuck and "--force" in result.output):
        machine.world.complain("hang" if result.hung else "refused", f"everything answers, and {result}")
    forced = machine.umount(mount, "--force", seconds=END_SECONDS)
    if not forced.good:
        machine.world.complain("hang" if forced.hung else "refused", str(forced))
    machine.kill_daemons([mount])
    if watchdog.is_mounted(str(mount.path)):
        machine.umount(mount)
    mount.mounted = False
    return result
