"""What several commands share: choosing the instance, and naming artifacts. Main thread only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lamfs.cli.output import shown
from lamfs.errors import InvalidArgument

if TYPE_CHECKING:
    from lamfs.model import ArtifactRecord
    from lamfs.ops.instance import Instance

F = TypeVar("F", bound=Callable[..., Any])


def instance_option(function: F) -> F:
    """The option ``--instance``: another instance than the current one."""
    return click.option(
        "--instance", metavar="OWNER/NAME", help="The instance to work on.  [default: the current one]"
    )(function)


def json_option(function: F) -> F:
    """The option ``--json``: output for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def open_instance(
    slug: str | None = None, names: Iterable[str] = (), *, whole: bool = True, shows: bool = False
) -> Instance:
    """Open the instance that a command works on.

    That is the one asked for, else that of the mount in which one of ``names`` lies, else the current one. ``shows``:
    the command shows what the registry says, and warns when that is old.

    ``whole``: opens its registry too. Raises InvalidArgument when ``names`` lie in mounts of different instances,
    NotSetUp when there is no instance, and DamagedRegistry (only with ``whole``) when its registry is damaged.
    """
    from lamfs import config
    from lamfs.ops import messages
    from lamfs.ops.instance import Instance

    messages.show_messages()
    slug = slug or slug_of_paths(names)
    opened = Instance.open(slug) if whole else Instance(config.load_instance(slug))
    if shows:
        from lamfs.ops import freshness

        freshness.warn(opened)
    return opened


def slug_of_paths(names: Iterable[str]) -> str | None:
    """The instance in whose mounts these paths lie; None when none of them is in a mount."""
    from lamfs.ops import mounts

    slugs = {}
    for name in names:
        found = mounts.find_by_path(name)
        if found is not None:
            slugs[found[0].slug] = name
    if len(slugs) > 1:
        raise InvalidArgument(
            f"The paths lie in mounts of different instances ({', '.join(sorted(slugs))}); give them in separate"
            " commands."
        )
    return next(iter(slugs), None)


def seconds(text: str) -> float:
    """The type of an option that is a time in seconds, 0 or more. Raises BadParameter for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise click.BadParameter(f"'{shown(text)}' is no time; give a number of seconds, such as 30.")
    return number


def place(record: ArtifactRecord) -> str:
    """Where a mount shows an artifact: its key, or below ``.lamindb/``."""
    return record.place


def title(record: ArtifactRecord) -> str:
    """``place``, safe to print."""
    return shown(place(record))
