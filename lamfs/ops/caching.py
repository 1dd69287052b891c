"""Fills the cache with many artifacts at once, and empties it, for ``lamfs cache`` and ``QuerySet.cache``. Synchronous.

It has threads of its own: some see each artifact through, and one pool fetches the blocks of all of them.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lamfs.cache import files as cache_files
from lamfs.cache.small import LARGEST, SmallFetcher
from lamfs.errors import LamfsError, NotFound
from lamfs.keys import glob_pattern, is_glob
from lamfs.model import AUTO_KEY_PREFIX, ArtifactRecord
from lamfs.ops import artifacts, mounts, recover
from lamfs.ops.instance import Instance
from lamfs.pool import Pool

JOBS = 16
"""Blocks of all artifacts that are fetched at a time."""
_AT_A_TIME = 500
"""Artifacts that one query of the registry returns."""


@dataclass(slots=True, frozen=True)
class Selection:
    """The artifacts that a name on the command line means. ``single``: the name is an artifact's, not a directory or a
    pattern.

    ``unstored``: keys of files that a mount has not stored yet, and that were never stored before.
    """

    records: list[ArtifactRecord]
    single: bool
    unstored: list[str]


@dataclass(slots=True, frozen=True)
class Cached:
    """The outcome for one artifact: its cache file, or the error. ``fetched``: the file was not complete before."""

    record: ArtifactRecord
    path: Path | None
    error: LamfsError | None
    fetched: bool


def select(instance: Instance, name: str, *, store_first: bool = True) -> Selection:
    """The artifacts that a person means. ``name``: one artifact (see artifacts.find), a directory of a mount or of keys
    with everything below it, or a pattern over keys (keys.glob_pattern). ``store_first``: mounts store what they still
    owe of these before.

    Raises NotFound. An empty directory gives an empty selection.
    """
    inside = mounts.find_by_path(name)
    in_mount = inside is not None and inside[0].slug == instance.settings.slug
    key = inside[1] if inside is not None and in_mount else name.strip("/")
    inode = instance.registry.tree.resolve(key) if key or in_mount else None
    if inode is not None and stat.S_ISDIR(inode.mode):
        start = f"{key}/" if key else ""
        return _select(instance, lambda place: place.startswith(start), start, store_first, unnamed=True)
    try:
        return Selection([artifacts.find(instance, name)], True, [])
    except NotFound:
        if not is_glob(key):
            raise
    pattern = glob_pattern(key)
    start = key[: min(key.find(char) for char in "*?[" if char in key)]
    found = _select(instance, lambda place: pattern.fullmatch(place) is not None, start, store_first, unnamed=False)
    if not found.records and not found.unstored:
        raise NotFound(f"No key matches '{name}'; 'lamfs ls' shows what there is.")
    return found


def _select(
    instance: Instance, covers: Callable[[str], bool], start: str, store_first: bool, *, unnamed: bool
) -> Selection:
    """The artifacts at covered places, all of which begin with ``start``. ``unnamed``: artifacts without a key as well,
    unless ``start`` excludes them."""
    unstored = _store(instance, covers) if store_first else []
    table = instance.registry.artifacts
    if start.startswith(AUTO_KEY_PREFIX):
        found, unnamed = table.filter(key=None), True
    else:
        found = table.filter(key__startswith=start) if start else table.filter()
    records = [record for record in found if (unnamed or record.key is not None) and covers(record.place)]
    return Selection(sorted(records, key=lambda record: record.place), False, unstored)


def _store(instance: Instance, covers: Callable[[str], bool]) -> list[str]:
    """Have mounts store the covered files that they still owe. Returns the keys of files that were never stored."""
    registry = instance.registry
    unstored = []
    for entry in registry.journal.puts():
        if entry.state == "scratch":
            continue
        place = registry.tree.path(entry.ino)
        if place is not None and covers(place):
            recover.ensure_stored(instance, entry.ino)
            if registry.artifacts.by_ino(entry.ino) is None and registry.tree.path(entry.ino) is not None:
                unstored.append(place)
    return unstored


def fill(
    instance: Instance,
    records: Iterable[ArtifactRecord],
    *,
    jobs: int = JOBS,
    progress: Callable[[int], None] | None = None,
) -> Generator[Cached, None, None]:
    """Make the complete, verified cache file of each artifact. Yields each outcome when it is known, small artifacts
    first.

    One artifact's error does not stop the others. ``jobs``: blocks that are fetched at a time, of one or of many
    artifacts. ``progress`` gets bytes, from any thread: in sum the size of each artifact that is done. When the caller
    stops or is interrupted, the fetched blocks stay for the next time.
    """
    ordered = sorted(records, key=lambda record: -record.size)
    with (
        # More threads than jobs: while one opens or seals a file, others fetch their blocks.
        Pool(min(2 * jobs, len(ordered)) or 1, "lamfs-artifact", leave=instance.close_thread) as seeing,
        Pool(jobs, "lamfs-block") as blocks,
    ):

        def bring(record: ArtifactRecord) -> Cached:
            told = 0

            def tell(count: int) -> None:
                nonlocal told
                count = min(count, record.size - told)
                told += count
                if progress is not None and count:
                    progress(count)

            try:
                # An empty file has no block to fetch.
                missing = not record.size and not _path(instance, record).is_file()
                path = artifacts.cache(instance, record, tell, pool=blocks)
            except LamfsError as error:
                return Cached(record, None, error, told > 0)
            fetched = told > 0 or missing
            tell(record.size)
            return Cached(record, path, None, fetched)

        left = {record.uid: record for record in ordered}
        with closing(_fetch_small(instance, ordered, blocks, progress)) as done:
            for each in done:
                del left[each.record.uid]
                yield each
        with closing(seeing.unordered(bring, left.values(), abandon=True)) as rest:
            for _, future in rest:
                yield future.result()


def _fetch_small(
    instance: Instance, records: Iterable[ArtifactRecord], pool: Pool, progress: Callable[[int], None] | None
) -> Generator[Cached, None, None]:
    """The outcomes for small artifacts, except those that change meanwhile or need a closer look."""
    small = {record.uid: record for record in records if 0 < record.size <= LARGEST} if copies(instance) else {}
    uids = list(small)
    owed = {entry.ino for entry in instance.registry.journal.puts()}
    chosen = [
        small[now.uid]
        for start in range(0, len(uids), _AT_A_TIME)
        for now in instance.registry.artifacts.filter(uid__in=uids[start : start + _AT_A_TIME], visibility=None)
        if now.revision == small[now.uid].revision and (now.ino is None or now.ino not in owed)
    ]
    files = SmallFetcher(instance.store, instance.cache_index, instance.cache_dir, pool)
    with closing(files.fetch([record.revision for record in chosen], progress)) as done:
        for number, outcome in done:
            record = chosen[number]
            if isinstance(outcome, LamfsError):
                yield Cached(record, None, outcome, False)
            elif outcome is not None:
                if not outcome and progress is not None:
                    progress(record.size)
                yield Cached(record, _path(instance, record), None, outcome)


def _path(instance: Instance, record: ArtifactRecord) -> Path:
    return cache_files.cache_path(instance.cache_dir, instance.store, record.revision.object_key)


def evict(instance: Instance, records: Iterable[ArtifactRecord]) -> tuple[int, int]:
    """Delete the cache files of artifacts, whole or partial. Returns how many there were, and the bytes of disk that
    are free again.

    A mount goes on reading a file that it has open; the file's space is free when it is closed.
    """
    count = freed = 0
    for record in records:
        path = _path(instance, record)
        if path.is_file():
            count += 1
            freed += cache_files.evict(instance.cache_index, instance.cache_dir, [path])
    mounts.poke(instance.settings)
    return count, freed


def copies(instance: Instance) -> bool:
    """Whether caching an artifact makes a mount's reads faster: not where storage is a folder of this machine."""
    return not instance.store.on_disk
