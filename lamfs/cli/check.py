"""``lamfs fsck``: is what the registry says true. Main thread only."""

from __future__ import annotations

import click

from lamfs.cli.common import instance_option, json_option, open_instance
from lamfs.cli.output import count_of, print_json, say, shown
from lamfs.cli.seam import FAILURE, Command, leave


@click.command(
    cls=Command,
    examples="""
    lamfs fsck
    lamfs fsck --repair
    """,
)
@click.option("--repair", is_flag=True, help="Mend what can be mended.")
@json_option
@instance_option
def fsck(repair: bool, as_json: bool, instance: str | None) -> None:
    """Check an instance, and mend it.

    Holds registry, tree, storage, spool and journal against each other, and exits with 1 when there are problems.
    """
    from lamfs.ops import fsck as checking

    with open_instance(instance) as opened:
        report = checking.check(opened, repair=repair)
    if as_json:
        print_json({"instance": opened.settings.slug, "clean": report.clean, "problems": report.problems})
    else:
        for problem in report.problems:
            say(shown(problem))
        found = count_of(len(report.problems), "problem")
        say(f"{opened.settings.slug}: {'clean' if report.clean else found}")
    if not report.clean:
        leave(FAILURE)
