"""``lamfs cache``: artifacts into the local cache, and out of it. Main thread; other threads report progress."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

import click

from lamfs.cli.common import instance_option, open_instance, title
from lamfs.cli.output import Progress, complain, say, say_path, shown, size
from lamfs.cli.seam import FAILURE, Command, leave
from lamfs.errors import InvalidArgument, NotFound
from lamfs.printable import count_of

if TYPE_CHECKING:
    from lamfs.model import ArtifactRecord
    from lamfs.ops.caching import Selection
    from lamfs.ops.instance import Instance

MOST_JOBS = 32
"""As many as a store keeps connections."""


@click.command(
    cls=Command,
    examples="""
    lamfs cache flowers/iris.csv
    lamfs cache ~/data/reads
    lamfs cache --jobs 32 'reads/**/*.bam'
    lamfs cache --evict reads/
    """,
)
@click.argument("names", metavar="PATH…", nargs=-1, required=True)
@click.option("--evict", is_flag=True, help="Delete the local copies instead; storage keeps what it has.")
@click.option("--paths", is_flag=True, help="Print the path of every file, not only of those named one by one.")
@click.option(
    "--jobs",
    type=click.IntRange(1, MOST_JOBS),
    default=16,
    show_default=True,
    metavar="N",
    help="Blocks fetched at a time.",
)
@instance_option
def cache(names: tuple[str, ...], evict: bool, paths: bool, jobs: int, instance: str | None) -> None:
    """Bring artifacts into the local cache.

    PATH is a file or a directory in a mount, a key, a directory of keys, a uid, or a pattern over keys in quotes: '*'
    is anything but '/', '**' as a whole part any directories below. Prints the path of each file that was named by
    itself, and a summary of directories and patterns. What has come stays when something fails or Ctrl-C ends it, and
    the next time goes on from there.
    """
    if evict and paths:
        raise InvalidArgument("--evict leaves no files behind; leave --paths out.")
    with open_instance(instance, names, shows=True) as opened:
        chosen, failed = select(opened, names, store_first=not evict)
        failed |= (throw_out if evict else bring_in)(opened, chosen, paths, jobs)
    if failed:
        leave(FAILURE)


def select(instance: Instance, names: tuple[str, ...], *, store_first: bool) -> tuple[list[Selection], bool]:
    """What the names mean, and whether one of them means nothing, which is reported."""
    from lamfs.ops import caching

    chosen, failed = [], False
    for name in names:
        try:
            chosen.append(caching.select(instance, name, store_first=store_first))
        except NotFound as error:
            complain(str(error))
            failed = True
    for key in [key for each in chosen for key in each.unstored]:
        complain(f"{shown(key)}: is not in storage yet; 'lamfs sync' waits until it is.")
        failed = True
    return chosen, failed


def bring_in(instance: Instance, chosen: list[Selection], paths: bool, jobs: int) -> bool:
    """Fill the cache. Returns whether something failed."""
    from lamfs.ops import caching

    if not caching.copies(instance) and not all(each.single for each in chosen):
        say(
            f"Storage is the folder {shown(instance.settings.storage.root)} of this machine: mounts read it as it is,"
            " and nothing of directories and patterns was copied. A file that is named by itself gets a copy."
        )
        chosen = [each for each in chosen if each.single]
    records = unique(chosen)
    if not records:
        if chosen:
            say("There is nothing to cache.")
        return False
    label = title(records[0]) if len(records) == 1 else count_of(len(records), "file")
    results = {}
    with Progress(label, sum(record.size for record in records)) as progress:
        with closing(caching.fill(instance, records, jobs=jobs, progress=progress.add)) as done:
            for result in done:
                results[result.record.uid] = result
                if result.error is not None:
                    progress.note(f"lamfs: {title(result.record)}: {result.error}")
    for each in chosen:
        for record in each.records if paths or each.single else ():
            path = results[record.uid].path
            if path is not None:
                say_path(os.fspath(path))
    good = [result for result in results.values() if result.error is None]
    if not paths and not all(each.single for each in chosen):
        fetched = [result.record for result in good if result.fetched]
        say(
            f"{count_of(len(good), 'file')} ({size(sum(result.record.size for result in good))}) in the cache,"
            f" {len(fetched)} ({size(sum(record.size for record in fetched))}) of them new"
        )
    if len(good) < len(results):
        complain(f"{count_of(len(results) - len(good), 'file')} could not be cached, {len(good)} could.")
    return len(good) < len(results)


def throw_out(instance: Instance, chosen: list[Selection], paths: bool, jobs: int) -> bool:
    """Evict what was chosen. This cannot fail."""
    from lamfs.ops import caching

    count, freed = caching.evict(instance, unique(chosen))
    say(f"{count_of(count, 'file')} evicted, {size(freed)} freed")
    return False


def unique(chosen: list[Selection]) -> list[ArtifactRecord]:
    """All chosen artifacts, each once."""
    return list({record.uid: record for each in chosen for record in each.records}.values())
