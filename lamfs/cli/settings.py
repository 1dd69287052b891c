"""``lamfs scratch``. Main thread only."""

from __future__ import annotations

import click

from lamfs.cli.common import json_option
from lamfs.cli.output import print_json, say, shown
from lamfs.cli.seam import Command
from lamfs.errors import InvalidArgument


@click.command(
    cls=Command,
    examples="""
    lamfs scratch
    lamfs scratch --add '*.tmp' --add '*~'
    lamfs scratch --remove '.DS_Store'
    lamfs scratch --reset
    """,
)
@click.option("--add", "added", metavar="PATTERN", multiple=True, help="Names like this make no artifacts.")
@click.option("--remove", "removed", metavar="PATTERN", multiple=True, help="Names like this make artifacts again.")
@click.option("--reset", is_flag=True, help="Go back to the list that lamfs comes with.")
@json_option
def scratch(added: tuple[str, ...], removed: tuple[str, ...], reset: bool, as_json: bool) -> None:
    """List or change the scratch names.

    Files by these names are what programs drop beside a file for themselves. In a mount they are files as any other,
    but no artifacts: they stay on this machine, until they are renamed to a name that is not on the list. 'lamfs
    status', 'lamfs umount' and 'lamfs close' name those that hold bytes. Directories are never scratch, and what is in
    them is by its own name. In a PATTERN '*' is any characters, '?' one, '[...]' one of a set. A change counts for
    mounts made after it.
    """
    from lamfs import config

    if reset:
        config.set_scratch_names(None)
    patterns = list(config.scratch_names())
    for pattern in removed:
        if pattern not in patterns:
            raise InvalidArgument(f"'{pattern}' is not on the list; 'lamfs scratch' shows it.")
        patterns.remove(pattern)
    if added or removed:
        config.set_scratch_names([*patterns, *added])
    if as_json:
        print_json({"scratch_names": list(config.scratch_names())})
        return
    for pattern in config.scratch_names():
        say(shown(pattern))
