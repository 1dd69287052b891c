"""``lamfs ls`` and ``info``: commands that only read. Main thread only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lamfs.cli.common import instance_option, json_option, open_instance, place, title
from lamfs.cli.output import columns, print_json, say, shown, size, when
from lamfs.cli.seam import Command
from lamfs.errors import NotFound

if TYPE_CHECKING:
    from lamfs.model import ArtifactRecord
    from lamfs.ops.instance import Instance


@click.command(
    cls=Command,
    examples="""
    lamfs ls
    lamfs ls -l flowers/
    lamfs ls --trash --json
    """,
)
@click.argument("prefix", required=False)
@click.option("--long", "-l", "details", is_flag=True, help="Also uid, size, time of change and description.")
@click.option("--trash", is_flag=True, help="What is in the trash instead.")
@json_option
@instance_option
def ls(prefix: str | None, details: bool, trash: bool, as_json: bool, instance: str | None) -> None:
    """List artifacts.

    All, or those whose key begins with PREFIX. PREFIX may also be a path in a mount: the file, or everything below the
    directory. Artifacts without a key are listed where they show in a mount, at .lamindb/UID.SUFFIX.
    """
    with open_instance(instance, [prefix] if prefix else [], shows=True) as opened:
        records = sorted(select(opened, prefix, trash), key=lambda record: (record.key is None, place(record)))
        if prefix and not records and not is_place(opened, prefix):
            where = " in the trash" if trash else ""
            raise NotFound(f"There is no artifact{where} at '{prefix}', and no key begins so; 'lamfs ls' lists all.")
        if as_json:
            print_json([opened.registry.describe(record) for record in records])
        elif details:
            columns(
                [
                    [record.uid, size(record.size), when(record.updated_at), title(record), record.description or ""]
                    for record in records
                ],
                right=frozenset({1}),
            )
        else:
            for record in records:
                say(title(record))


def select(instance: Instance, prefix: str | None, trash: bool) -> list[ArtifactRecord]:
    """The artifacts that ``ls PREFIX`` means."""
    from lamfs.model import AUTO_KEY_PREFIX, TRASH
    from lamfs.ops import mounts

    conditions: dict[str, Any] = {"visibility": TRASH} if trash else {}
    found = mounts.find_by_path(prefix) if prefix else None
    if found is not None:
        key = found[1]
        in_it = instance.registry.artifacts.filter(**conditions)
        return [record for record in in_it if not key or _is_at_or_below(record, key)]
    if prefix and prefix.startswith(AUTO_KEY_PREFIX):
        unnamed = instance.registry.artifacts.filter(key=None, **conditions)
        return [record for record in unnamed if place(record).startswith(prefix)]
    if prefix:
        conditions["key__startswith"] = prefix
    return list(instance.registry.artifacts.filter(**conditions))


def is_place(instance: Instance, name: str) -> bool:
    """Whether the tree has a path in a mount, or a key, even if it is an empty directory."""
    from lamfs.ops import mounts

    found = mounts.find_by_path(name)
    key = found[1] if found is not None else name.strip("/")
    return not key or instance.registry.tree.resolve(key) is not None


def _is_at_or_below(record: ArtifactRecord, key: str) -> bool:
    return place(record) == key or place(record).startswith(f"{key}/")


@click.command(
    cls=Command,
    examples="""
    lamfs info flowers/iris.csv
    lamfs info ~/lamfs/flowers/iris.csv --json
    """,
)
@click.argument("names", metavar="ARTIFACT…", nargs=-1, required=True)
@json_option
@instance_option
def info(names: tuple[str, ...], as_json: bool, instance: str | None) -> None:
    """Print the record of an artifact.

    ARTIFACT is a key, a uid or a path in a mount. It also names an artifact in the trash.
    """
    from lamfs.ops import artifacts

    with open_instance(instance, names, shows=True) as opened:
        described = [opened.registry.describe(artifacts.find(opened, name, trash=True)) for name in names]
    if as_json:
        print_json(described[0] if len(described) == 1 else described)
        return
    for number, record in enumerate(described):
        if number:
            say("")
        columns([name, _value(name, value)] for name, value in record.items() if value is not None)


def _value(name: str, value: Any) -> str:
    if name == "size":
        return f"{value} ({size(value)})" if value >= 1024 else str(value)
    if name == "visibility":
        return {1: "shown", 0: "archived", -1: "in the trash"}.get(value, str(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return shown(str(value))
