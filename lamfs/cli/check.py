"""``lamfs fsck``: checks whether what the registry says is true. Main thread only."""

from __future__ import annotations

import contextlib
import dataclasses

import click

from lamfs.cli.common import instance_option, json_option, open_instance
from lamfs.cli.output import Progress, note, print_json, say, shown, size
from lamfs.cli.seam import FAILURE, Command, leave
from lamfs.errors import InvalidArgument
from lamfs.printable import count_of


@click.command(
    cls=Command,
    examples="""
    lamfs fsck
    lamfs fsck --repair
    lamfs fsck --purge-orphans
    lamfs fsck --data
    """,
)
@click.option("--repair", is_flag=True, help="Mend what can be mended without a decision, and do what is owed.")
@click.option(
    "--purge-orphans",
    "purge",
    is_flag=True,
    help="Delete objects older than 30 days that no artifact references, and uploads that nobody will finish.",
)
@click.option("--data", is_flag=True, help="Also read every object, and compare the hash of each block.")
@click.option("--restart", is_flag=True, help="With --data: read all, also what an earlier check has read.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 32),
    default=8,
    show_default=True,
    metavar="N",
    help="With --data: blocks of 4 MiB read at a time.",
)
@json_option
@instance_option
def fsck(repair: bool, purge: bool, data: bool, restart: bool, jobs: int, as_json: bool, instance: str | None) -> None:
    """Check an instance, and mend it.

    Holds registry, its copy in storage, tree, storage, spool and journal against each other. --data may be interrupted
    at any time: started again, it goes on from there. Exits with 1 when a problem is left.

    --repair deletes nothing that anybody could miss: an object that no artifact references becomes a file of
    lost+found. Only --purge-orphans deletes such objects, when they are older than 30 days.
    """
    if restart and not data:
        raise InvalidArgument("--restart belongs to --data; add it.")
    from lamfs.ops import fsck as checking

    with open_instance(instance, whole=False) as opened:
        slug = opened.settings.slug
        with Progress(f"reading {slug}") if data or repair else contextlib.nullcontext() as progress:
            try:
                report = checking.check(
                    opened, repair=repair, purge=purge, data=data, restart=restart, jobs=jobs, watcher=progress
                )
            except KeyboardInterrupt:
                if data:
                    note("What has been read is noted; 'lamfs fsck --data' goes on from there.")
                raise
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
        read = f", {size(report.read_bytes)} read" if data else ""
        say(f"{slug}: {verdict} ({count_of(report.artifacts, 'artifact')}, {count_of(report.objects, 'object')}{read})")
    if not report.clean:
        leave(FAILURE)
