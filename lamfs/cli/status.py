"""``lamfs status``: mounts, pending work, cache use, the last errors. Main thread only; starts quickly.

A living mount answers over its control socket. Instances that are not mounted are read from their registries.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lamfs import mountinfo
from lamfs.cli import mountpoints
from lamfs.cli.common import json_option
from lamfs.cli.output import print_json, say, shown, size, when, width
from lamfs.cli.seam import Command
from lamfs.cli.sync import ask, owed_words
from lamfs.errors import LamfsError
from lamfs.printable import count_of, one_line

if TYPE_CHECKING:
    from lamfs.config import InstanceSettings
    from lamfs.ops.mounts import DeadMount, MountRecord
    from lamfs.registry import Registry

MAX_ERRORS = 10
MAX_SCRATCH = 3
"""Scratch files that are named, at most."""
SPOOL_SECONDS = 2.0
"""Seconds that a storage folder may take to list the spools of other machines."""
WATCH_SECONDS = 1.0
"""Seconds between two looks of --watch."""


@click.command(
    cls=Command,
    examples="""
    lamfs status --json
    lamfs status --watch
    """,
)
@json_option
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C; with --json, one line each.")
def status(as_json: bool, watch: bool) -> None:
    """Show mounts, their numbers, what is owed, and errors.

    Work that a dead mount has left is listed too; the next mount of its instance does it.
    """
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            keep_watching(as_json)
    elif as_json:
        print_json(everything())
    else:
        for line in lines(everything()):
            say(line)


def keep_watching(as_json: bool) -> None:
    """Show the status every second, in place on a terminal, until interrupted."""
    in_place = not as_json and sys.stdout.isatty()
    first = True
    while True:
        began = time.monotonic()
        result = everything()
        if as_json:
            print_json(result, indent=None)
        elif in_place:
            sys.stdout.write(
                screen([one_line(line) for line in lines(result)], shutil.get_terminal_size(), clear=first)
            )
        else:
            say("".join(f"{line}\n" for line in lines(result)))
        sys.stdout.flush()
        first = False
        time.sleep(max(WATCH_SECONDS - (time.monotonic() - began), 0.1))


def screen(text: list[str], room: os.terminal_size, *, clear: bool) -> str:
    """What to send to a terminal so that it shows these lines from its top, cut to its size, and nothing else."""
    cut = [line if width(line) < room.columns else line[: max(room.columns - 2, 0)] + "…" for line in text]
    if len(cut) >= room.lines > 1:
        cut = [*cut[: room.lines - 2], f"… {len(cut) - room.lines + 2} more lines"]
    start = "\x1b[H\x1b[2J" if clear else "\x1b[H"
    return start + "".join(f"{line}\x1b[K\n" for line in cut) + "\x1b[J"


def everything() -> dict[str, Any]:
    """Mounts, instances and cache."""
    from lamfs.ops import mounts

    records = mounts.all_live()
    gone = mountpoints.detached(records)
    live = [
        {**mount_status(record), "detached": record.pid in gone, "storing_registry": not os.path.exists(record.socket)}
        for record in records
    ]
    return {
        "mounts": live,
        "dead": [dead_status(dead) for dead in mounts.all_dead()],
        "instances": instance_status({str(mount["slug"]) for mount in live}),
        "cache": cache_status(),
    }


def mount_status(record: MountRecord) -> dict[str, Any]:
    """One living mount: its record, and what its daemon says."""
    from lamfs.model import iso

    known = {name: value for name, value in record._asdict().items() if name not in ("owner", "socket")}
    known["started_at"] = iso(record.started_at)
    try:
        return {**known, **ask(record), "answers": True}
    except LamfsError as error:
        return {**known, "answers": False, "error": str(error)}


def dead_status(dead: DeadMount) -> dict[str, Any]:
    """A mount whose daemon died: its record, its last sign of life, and what is mounted at its place now."""
    from lamfs.model import iso

    record = dead.record
    place = mountinfo.at(record.mountpoint)
    written = 0
    if place is None:
        with contextlib.suppress(OSError), os.scandir(record.mountpoint) as entries:
            written = sum(1 for _ in entries)
    return {
        "slug": record.slug,
        "mountpoint": record.mountpoint,
        "pid": record.pid,
        "started_at": iso(record.started_at),
        "last_seen": iso(dead.last_seen),
        "read_only": record.read_only,
        "in_tree": place is not None and place.is_lamfs and place.device == record.device,
        "written": written,
    }


def instance_status(mounted: set[str]) -> list[dict[str, Any]]:
    """Every instance that this machine knows: whether it is mounted, and its pending work according to its registry."""
    from lamfs import config
    from lamfs.ops import written

    current = config.current_slug()
    found = []
    for settings in config.list_instances():
        entry: dict[str, Any] = {
            "slug": settings.slug,
            "storage": settings.storage.root,
            "current": settings.slug == current,
            "mounted": settings.slug in mounted,
        }
        if settings.registry_path.exists() or written.had_one(settings):
            entry |= look_into(settings, mounted=settings.slug in mounted)
        if unreturned := taken_over(settings):
            entry["unreturned"] = unreturned
        if any(settings.directory.glob("diverged.*.lndb")):
            entry["diverged"] = known_diverged(settings)
        found.append(entry)
    return found


def look_into(settings: InstanceSettings, *, mounted: bool) -> dict[str, Any]:
    """What the registry of an instance says: scratch files, what was found and lost, and known damage.

    Also its pending work, if it is not ``mounted``.
    """
    from lamfs.ops import damage, in_use, spools

    harmed = (settings.directory / "damage.json").exists()
    try:
        with in_use.looking(settings) as registry:
            scratch = [{"key": key, "size": size} for key, size in registry.names.scratch_files()]
            owed = spools.owed(registry)
            found = {
                **({"scratch": scratch} if scratch else {}),
                **({} if mounted else left_over(registry)),
                **rescued(registry),
                # A sentence for each object that the last 'lamfs fsck --data' found damaged, and that still is.
                **({"damage": [one.sentence for one in damage.known_in(settings, registry)]} if harmed else {}),
            }
        # Storage may take its time: nobody waits for the registry meanwhile.
        others = other_spools(settings, owed)
        return {**found, **({"spools": others} if others else {})}
    except LamfsError as error:
        said = str(error)
        return ({} if mounted else {"error": said}) | ({"damage": [said]} if harmed else {})


def taken_over(settings: InstanceSettings) -> str | None:
    """The message about a machine from which this one took the instance over: ops.unreturned.known."""
    if not (settings.directory / "unreturned.json").exists():
        return None  # status starts quickly
    from lamfs.ops import unreturned

    return unreturned.known(settings)


def known_diverged(settings: InstanceSettings) -> list[dict[str, Any]]:
    """What only this machine had when another one took the instance over: ops.diverged.known."""
    from lamfs.ops import diverged

    return diverged.known(settings)


def other_spools(settings: InstanceSettings, owed: set[str]) -> list[str]:
    """A sentence for each spool folder in storage that has files and belongs to another machine."""
    from lamfs.ops import spools

    found: list[str] = []

    def look() -> None:
        with contextlib.suppress(LamfsError):
            found.extend(spools.sentences(settings, owed))

    # The folder may be on a server that does not answer, which is just when users ask for the status.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(SPOOL_SECONDS)
    return list(found)


def rescued(registry: Registry) -> dict[str, Any]:
    """What was found that nobody owed, and what was lost, until somebody has dealt with it."""
    folder, count = registry.rescue.found()
    lost = [one.sentence for one in registry.rescue.lost()]
    return ({"found": {"folder": folder, "entries": count}} if count else {}) | ({"lost": lost} if lost else {})


def left_over(registry: Registry) -> dict[str, Any]:
    """Pending work of an instance that is not mounted, and its last error."""
    from lamfs.registry import is_alive

    owed = registry.journal.owed()
    entries = registry.journal.entries() if owed else []
    owners = {entry.owner for entry in entries}
    return {
        "owed": owed,
        "owed_bytes": registry.journal.owed_bytes(),
        # boot id, pid, start time: a process that saves something, or a mount that has left the tree already
        "busy": sorted(int(owner.split(":")[1]) for owner in owners if owner and is_alive(owner)),
        "errors": [{"what": f"{entry.op} {entry.about}", "error": entry.error} for entry in entries if entry.error][
            -MAX_ERRORS:
        ],
    }


def cache_status() -> dict[str, Any]:
    """Where the cache is, and its size."""
    from lamfs import config
    from lamfs.cache.index import NAME, CacheIndex

    directory = config.cache_dir()
    used = 0
    if (directory / NAME).exists():
        index = CacheIndex(directory)
        used = index.total_bytes()
        index.close()
    return {"directory": str(directory), "bytes": used}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The status for users."""
    for mount in result["mounts"]:
        yield from mount_lines(mount)
    if not result["mounts"]:
        yield "No mount is alive."
    for dead in result["dead"]:
        yield from dead_lines(dead)
    for instance in result["instances"]:
        for kept in instance.get("diverged", ()):
            back = count_of(len(kept["brought_back"]), "artifact", "was")
            told = f"{back} brought back, {len(kept['left'])} only in there"
            if kept["renamed"]:
                listing = shown(kept["registry"].removesuffix(".lndb") + ".json")
                told += f", {len(kept['renamed'])} have another name now, which {listing} lists"
            yield f"  KEPT     {shown(kept['registry'])}: {instance['slug']} before another machine took over; {told}"
        if instance.get("unreturned"):
            yield f"  TAKEN OVER  {shown(instance['unreturned'])}"
        scratch = instance.get("scratch", [])
        if scratch:
            named = ", ".join(shown(file["key"]) for file in scratch[:MAX_SCRATCH])
            more = f" and {len(scratch) - MAX_SCRATCH} more" if len(scratch) > MAX_SCRATCH else ""
            total = size(sum(file["size"] for file in scratch))
            yield f"{instance['slug']}: scratch files on this machine only, {total}: {named}{more}"
        for sentence in instance.get("damage", ()):
            yield f"  STORAGE DAMAGE  {shown(sentence)}: restore the object from a backup, or replace the artifact"
        yield from _rescue_lines(instance)
        for sentence in instance.get("spools", ()):
            yield f"  OTHERS   {shown(sentence)} ({instance['slug']})"
        if instance["mounted"]:
            continue
        star = " (current)" if instance["current"] else ""
        yield f"{instance['slug']}{star}, not mounted, storage {shown(instance['storage'])}"
        if instance.get("error"):
            yield f"  error    {shown(instance['error'])}"
        if instance.get("owed"):
            busy = ", ".join(f"process {pid}" for pid in instance["busy"])
            does = f"{busy} does it" if busy else "the next mount does it"
            yield f"  owed     {owed_words(instance['owed'], instance['owed_bytes'])}; {does}"
        for error in instance.get("errors", ()):
            yield f"  error    {shown(error['what'])}: {shown(error['error'])}"
    cache = result["cache"]
    yield f"cache: {size(cache['bytes'])} in {shown(cache['directory'])}"


def dead_lines(dead: dict[str, Any]) -> Iterator[str]:
    """A mount whose daemon died, for users."""
    place = shown(dead["mountpoint"])
    since, seen = when(dead["started_at"]), when(dead["last_seen"])
    yield f"{dead['slug']} at {place}: its daemon (pid {dead['pid']}, since {since}) DIED; it was last alive at {seen}"
    again = f"'lamfs mount --instance {dead['slug']}{' --read-only' if dead['read_only'] else ''}"
    does = ""
    if dead["in_tree"]:
        yield "  state    every call in it fails with ENOTCONN, so nothing can be written to the wrong place"
    elif dead["written"]:
        entries = count_of(dead["written"], "entry")
        yield f"  state    nothing is mounted there now, and the folder itself has got {entries}"
        again, does = f"{again} --adopt", " (and moves these into it)"
    else:
        yield "  state    nothing is mounted there now"
    yield f"  next     {again} {place}' mounts it again{does} and stores what is owed;"
    yield f"           'lamfs umount {place}' clears it away"


def mount_lines(mount: dict[str, Any]) -> Iterator[str]:
    """One mount for users."""
    read_only = ", read-only" if mount.get("read_only") else ""
    began = when(mount["started_at"])
    where = f"{'unmounted from' if mount['detached'] else 'at'} {shown(mount['mountpoint'])}"
    waits = "; its daemon ends when its files are closed and everything is stored" if mount["detached"] else ""
    yield f"{mount['slug']} {where} (pid {mount['pid']}, since {began}{read_only}){waits}"
    if not mount["answers"] and mount["storing_registry"]:
        yield "  state    it stores the registry, and ends then"
        return
    if not mount["answers"]:
        yield f"  error    {shown(mount['error'])}"
        return
    if mount.get("notice"):
        yield f"  NOTE     {shown(mount['notice'])}"
    for damage in mount.get("storage_damage", ()):
        whose = f"{shown(damage['key'] or '')} (uid {damage['uid']})" if damage["uid"] else "no artifact"
        yield (
            f"  STORAGE DAMAGE  {when(damage['at'])}  block {damage['block']} of {whose}, object"
            f" {shown(damage['object'])}: restore the object from a backup, or replace the artifact"
        )
    for changed in mount.get("storage_changed", ()):
        yield (
            f"  OBJECT CHANGED  {when(changed['at'])}  {shown(changed['key'])} (uid {changed['uid']}): the object"
            f" {shown(changed['object'])} is {shown(changed['problem'])}"
        )
    rates = mount.get("rates")
    if rates:
        yield f"  reads    {_rate(rates, 'read')}"
        yield f"  writes   {_rate(rates, 'write')}"
    yield f"  owed     {owed_words(mount.get('owed', {}), mount.get('owed_bytes', 0))}"
    for upload in mount.get("uploading", ()):
        share = f"{100 * upload['done'] // upload['size']} % of " if upload.get("size") else ""
        yield f"  storing  {shown(upload['key'])}: {share}{size(upload.get('size', 0))}"
    yield from _retry_lines(mount)
    yield from _cache_lines(mount)
    if mount.get("open_files"):
        yield f"  open     {mount['open_files']}"
    # A repeated failure is shown once, as it was last.
    latest = {(error["what"], error["error"]): error for error in mount.get("errors", ())}
    for error in list(latest.values())[-MAX_ERRORS:]:
        yield f"  error    {when(error['at'])}  {shown(error['what'])}: {shown(error['error'])}"


def _rescue_lines(instance: dict[str, Any]) -> Iterator[str]:
    """What a user should look through."""
    lost = instance.get("lost", ())
    for sentence in lost[-MAX_ERRORS:]:
        yield f"  LOST     {shown(sentence)} ({instance['slug']}; 'lamfs fsck --repair' forgets it)"
    if len(lost) > MAX_ERRORS:
        yield f"  LOST     and {len(lost) - MAX_ERRORS} more"
    found = instance.get("found")
    if found:
        count = "1 entry" if found["entries"] == 1 else f"{found['entries']} entries"
        yield (
            f"  FOUND    '{shown(found['folder'])}' of {instance['slug']} has {count}, which nobody knew:"
            " look at what is there, and move or delete it"
        )


def _rate(rates: dict[str, float], verb: str) -> str:
    return f"{rates[f'{verb}s_per_second']:.0f} a second, {size(int(rates[f'{verb}_bytes_per_second']))}/s"


def _retry_lines(mount: dict[str, Any]) -> Iterator[str]:
    retries = mount.get("retries", ())
    for retry in retries[:MAX_ERRORS]:
        failed = f"failed {count_of(retry['attempts'], 'time')}"
        if retry["next_at"] is None:
            yield f"  refused  {shown(retry['what'])}, not tried again: {shown(retry['error'])}"
        else:
            yield f"  retry    {shown(retry['what'])}: {failed}, next try {when(retry['next_at'])}"
    more = mount.get("retrying", 0) - len(retries[:MAX_ERRORS])
    if more > 0:
        yield f"  retry    and {more} more"


def _cache_lines(mount: dict[str, Any]) -> Iterator[str]:
    cache = mount.get("cache", {})
    if cache.get("hit_rate") is not None:
        hits = f"{100 * cache['hit_rate']:.1f} % of {cache['read_hits'] + cache['read_misses']} reads from the cache"
        yield f"  cache    {hits}, {cache['read_misses']} waited for storage"
    if cache.get("hits") or cache.get("misses"):
        yield f"  blocks   {cache['hits']} from the cache, {cache['misses']} fetched ({size(cache['fetched_bytes'])})"
    damaged = cache.get("damaged", 0) - mount.get("storage_damage_total", 0)
    if damaged > 0:
        yield f"  damaged  {count_of(damaged, 'block')} in the cache, fetched again"
    if mount.get("io_errors"):
        yield f"  failed   {count_of(mount['io_errors'], 'call')} with EIO, {mount['timeouts']} of them by the timeout"
