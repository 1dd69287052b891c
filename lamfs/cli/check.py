"""``lamfs fsck``: is what the registry says true. Main thread only."""

from __future__ import annotations

import dataclasses

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
@click.option("--repair", is_flag=True, help="Mend what can be mended without a decision, and do what is owed.")
@click.option("--data", is_flag=True, help="Also read every object, and compare the hash of each block.")
@json_option
@instance_option
def fsck(repair: bool, data: bool, as_json: bool, instance: str | None) -> None:
    """Check an instance, and mend it.

    Holds registry, tree, storage, spool and journal against each other. Exits with 1 when a problem is left.
    """
    from lamfs.ops import fsck as checking

    with open_instance(instance) as opened:
        report = checking.check(opened, repair=repair, data=data)
        slug = opened.settings.slug
    if as_json:
        print_json({"instance": slug, "clean": report.clean, **dataclasses.asdict(report)})
    else:
        for text in report.notes:
            say(f"note: {shown(text)}")
        for text in report.repaired:
            say(f"repaired: {shown(text)}")
        for text in report.problems:
            say(f"problem: {shown(text)}")
        verdict = "clean" if report.clean else count_of(len(report.problems), "problem")
        say(f"{slug}: {verdict} ({count_of(report.artifacts, 'artifact')}, {count_of(report.objects, 'object')})")
    if not report.clean:
        leave(FAILURE)
