"""``lamfs status``: mounts, what is owed, cache use, the last errors. Main thread only; starts quickly.

A living mount is asked over its control socket. Instances that are not mounted are read from their registries.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from lamfs.cli import mountpoints
from lamfs.cli.common import json_option
from lamfs.cli.output import print_json, say, shown, size, when
from lamfs.cli.seam import Command
from lamfs.cli.sync import ask, owed_words
from lamfs.errors import LamfsError

if TYPE_CHECKING:
    from lamfs.config import InstanceSettings
    from lamfs.ops.mounts import MountRecord

MAX_ERRORS = 10


@click.command(cls=Command, examples="lamfs status --json")
@json_option
def status(as_json: bool) -> None:
    """Show mounts, what is owed, and the last errors.

    Work that a dead mount has left is listed too; the next mount of its instance does it.
    """
    from lamfs.ops import mounts

    records = mounts.all_live()
    gone = mountpoints.detached(records)
    live = [{**mount_status(record), "detached": record.pid in gone} for record in records]
    result = {
        "mounts": live,
        "instances": instance_status({str(mount["slug"]) for mount in live}),
        "cache": cache_status(),
    }
    if as_json:
        print_json(result)
    else:
        show(result)


def mount_status(record: MountRecord) -> dict[str, Any]:
    """One living mount: its record, and what its daemon says."""
    from lamfs.model import iso

    known = {name: value for name, value in dataclasses.asdict(record).items() if name not in ("owner", "socket")}
    known["started_at"] = iso(record.started_at)
    try:
        return {**known, **ask(record), "answers": True}
    except LamfsError as error:
        return {**known, "answers": False, "error": str(error)}


def instance_status(mounted: set[str]) -> list[dict[str, Any]]:
    """Every instance that this machine knows: whether it is mounted, and what its registry says is owed."""
    from lamfs import config

    current = config.current_slug()
    found = []
    for settings in config.list_instances():
        entry: dict[str, Any] = {
            "slug": settings.slug,
            "storage": settings.storage.root,
            "current": settings.slug == current,
            "mounted": settings.slug in mounted,
        }
        if settings.slug not in mounted and settings.registry_path.exists():
            entry |= left_over(settings)
        found.append(entry)
    return found


def left_over(settings: InstanceSettings) -> dict[str, Any]:
    """What the registry of an instance that is not mounted says is owed, and what went wrong with it last."""
    from lamfs.registry import Registry, is_alive

    try:
        registry = Registry(settings.registry_path)
        try:
            owed = registry.journal.owed()
            entries = registry.journal.entries() if owed else []
        finally:
            registry.close()
    except LamfsError as error:
        return {"error": str(error)}
    owners = {entry.owner for entry in entries}
    return {
        "owed": owed,
        # boot id, pid, start time: a process that saves something, or a mount that has left the tree already
        "busy": sorted(int(owner.split(":")[1]) for owner in owners if owner and is_alive(owner)),
        "errors": [
            {"what": f"{entry.op} {entry.object_key or entry.uid or entry.ino}", "error": entry.error}
            for entry in entries
            if entry.error
        ][-MAX_ERRORS:],
    }


def cache_status() -> dict[str, Any]:
    """Where the cache is, and how much is in it."""
    from lamfs import config
    from lamfs.cache.index import NAME, CacheIndex

    directory = config.cache_dir()
    used = 0
    if (directory / NAME).exists():
        index = CacheIndex(directory)
        used = index.total_bytes()
        index.close()
    return {"directory": str(directory), "bytes": used}


def show(result: dict[str, Any]) -> None:
    """Print the status for people."""
    for mount in result["mounts"]:
        show_mount(mount)
    if not result["mounts"]:
        say("No mount is alive.")
    for instance in result["instances"]:
        if instance["mounted"]:
            continue
        star = " (current)" if instance["current"] else ""
        say(f"{instance['slug']}{star}, not mounted, storage {shown(instance['storage'])}")
        if instance.get("error"):
            say(f"  error    {shown(instance['error'])}")
        if instance.get("owed"):
            busy = ", ".join(f"process {pid}" for pid in instance["busy"])
            say(f"  owed     {owed_words(instance['owed'])}; {f'{busy} does it' if busy else 'the next mount does it'}")
        for error in instance.get("errors", ()):
            say(f"  error    {shown(error['what'])}: {shown(error['error'])}")
    cache = result["cache"]
    say(f"cache: {size(cache['bytes'])} in {shown(cache['directory'])}")


def show_mount(mount: dict[str, Any]) -> None:
    """Print one mount for people."""
    read_only = ", read-only" if mount.get("read_only") else ""
    began = when(mount["started_at"])
    where = f"{'unmounted from' if mount['detached'] else 'at'} {shown(mount['mountpoint'])}"
    waits = "; its daemon ends when its files are closed and everything is stored" if mount["detached"] else ""
    say(f"{mount['slug']} {where} (pid {mount['pid']}, since {began}{read_only}){waits}")
    if not mount["answers"]:
        say(f"  error    {shown(mount['error'])}")
        return
    say(f"  owed     {owed_words(mount.get('owed', {}), mount.get('owed_bytes', 0))}")
    for upload in mount.get("uploading", ()):
        share = f"{100 * upload['done'] // upload['size']} % of " if upload.get("size") else ""
        say(f"  storing  {shown(upload['key'])}: {share}{size(upload.get('size', 0))}")
    cache = mount.get("cache", {})
    if cache.get("hits") or cache.get("misses"):
        say(f"  blocks   {cache['hits']} from the cache, {cache['misses']} fetched ({size(cache['fetched_bytes'])})")
    if cache.get("damaged"):
        say(f"  damaged  {cache['damaged']} blocks in the cache, fetched again")
    if mount.get("open_files"):
        say(f"  open     {mount['open_files']}")
    # The same failure again and again is shown once, as it was last.
    latest = {(error["what"], error["error"]): error for error in mount.get("errors", ())}
    for error in list(latest.values())[-MAX_ERRORS:]:
        say(f"  error    {when(error['at'])}  {shown(error['what'])}: {shown(error['error'])}")
