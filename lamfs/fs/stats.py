"""The numbers of one mount: what was read and written, the cache, what is owed, what failed. Loop only.

The hot path adds to the plain integers of ``Counters``; the follower takes a sample of them every second, and the
difference to an earlier sample is a rate. ``numbers`` is what ``lamfs status`` and the control files show.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lamfs.errors import LamfsError
from lamfs.model import ArtifactRecord, Revision, iso, now_ns
from lamfs.transfer.steps import what

if TYPE_CHECKING:
    from lamfs.fs.context import Context

log = logging.getLogger("lamfs.fs")

SAMPLE_SECONDS = 1.0
"""Least time between two samples."""
SAMPLES = 6
"""Samples that are kept: rates are those of the last 5 s or so."""
SHOWN = 50
"""Rows of a list that are shown: uploads that wait for another try, damaged blocks."""
WHEN_GONE = (
    "gone, so it cannot be read: restore the object from a backup, or from a version of it that the bucket has kept,"
    " and run 'lamfs fsck --repair', which takes it when it has the same bytes; or write the file anew, or delete it"
)
WHEN_CHANGED = (
    "not what the registry knows, so it cannot be read: 'lamfs fsck' says what is there and what helps, and 'lamfs fsck"
    " --repair' makes that readable, unless it is damaged"
)


@dataclass(slots=True)
class Counters:
    """What programs have read and written since the mount began, and how many calls failed. Bytes and calls.

    Reads and writes are those that reach lamfs: what the kernel answers from its page cache is not among them.
    """

    spool_reads: int = 0
    """Reads of bytes that are not in storage yet."""
    hits: int = 0
    """Reads of stored bytes that were all in the cache (or in the local storage folder)."""
    misses: int = 0
    """Reads that waited for storage."""
    read_bytes: int = 0
    prefetched_files: int = 0
    """Small files that were fetched before a program asked for them."""
    prefetched_used: int = 0
    """Those of them that were read then."""
    prefetched_wasted: int = 0
    """Those that did not come, or on which nobody counts any more."""
    writes: int = 0
    write_bytes: int = 0
    io_errors: int = 0
    """Calls that were answered with EIO."""
    timeouts: int = 0
    """Calls that ended because storage took longer than the mount's ``timeout``."""

    @property
    def reads(self) -> int:
        """All reads."""
        return self.spool_reads + self.hits + self.misses


@dataclass(slots=True)
class Damage:
    """A block in storage whose BLAKE3 is wrong. ``at``: when that was last seen, ns; ``times``: how often it was.

    ``key`` and ``uid`` are None when no artifact has the object any more.
    """

    key: str | None
    uid: str | None
    url: str
    etag: str
    block: int
    at: int
    times: int = 1


@dataclass(slots=True)
class Changed:
    """A file whose object is ``gone``, or is not what the registry says. ``at``: when that was last seen, ns."""

    key: str
    uid: str
    url: str
    at: int
    gone: bool

    @property
    def problem(self) -> str:
        """What is wrong with the object, and what to do."""
        return WHEN_GONE if self.gone else WHEN_CHANGED


class About(NamedTuple):
    """Which mount this is. ``started_at`` in nanoseconds since the epoch."""

    slug: str = ""
    mountpoint: str = ""
    started_at: int = 0


class Stats:
    """Counters, samples of them, and damage seen, of one mount."""

    def __init__(self, about: About | None = None) -> None:
        self.about = about or About()
        self.counters = Counters()
        self.notice = ""
        """Why the mount cannot do all that it should, for people."""
        self.damaged_blocks = 0
        """How often a block was found damaged in storage."""
        self._damage: dict[tuple[str, str, int], Damage] = {}
        self._changed: dict[tuple[str, str], Changed] = {}
        self._samples: deque[tuple[float, tuple[int, ...]]] = deque([(time.monotonic(), (0,) * 6)], maxlen=SAMPLES)

    # -- rates --------------------------------------------------------------------------------------------------

    def sample(self, context: Context) -> None:
        """Note the counters, when the last time was long enough ago."""
        now = time.monotonic()
        if now - self._samples[-1][0] >= SAMPLE_SECONDS:
            self._samples.append((now, self._totals(context)))

    def _totals(self, context: Context) -> tuple[int, ...]:
        counted = self.counters
        return (
            counted.reads,
            counted.read_bytes,
            counted.writes,
            counted.write_bytes,
            context.cache.fetched_bytes,
            context.uploader.puts.stored_bytes,
        )

    def _rates(self, context: Context) -> dict[str, float]:
        """Per second, over the last samples."""
        totals = self._totals(context)
        since, before = self._samples[0]
        seconds = max(time.monotonic() - since, SAMPLE_SECONDS)
        names = ("reads", "read_bytes", "writes", "write_bytes", "fetched_bytes", "stored_bytes")
        return {
            f"{name}_per_second": round((total - earlier) / seconds, 1)
            for name, total, earlier in zip(names, totals, before, strict=True)
        }

    # -- damage -------------------------------------------------------------------------------------------------

    def damaged(self, context: Context, revision: Revision, block: int) -> None:
        """A block of an object in storage is not what was saved: say so in the log, and remember it."""
        self.damaged_blocks += 1
        url = context.store.url(revision.object_key)
        record = None
        try:
            record = context.registry.artifacts.with_object(revision.object_key)
        except LamfsError as error:
            log.warning("could not look up whose object %s is: %s", url, error)
        key, uid = (None, None) if record is None else (record.key, record.uid)
        whose = "an object of no artifact" if uid is None else f"artifact '{key or uid}' (uid {uid})"
        log.error(
            "STORAGE DAMAGE: block %d of %s is not what was saved; object %s, ETag %s", block, whose, url, revision.etag
        )
        place = (url, revision.etag, block)
        times = self._damage.pop(place).times if place in self._damage else 0
        self._damage[place] = Damage(key, uid, url, revision.etag, block, now_ns(), times + 1)
        if len(self._damage) > SHOWN:
            del self._damage[next(iter(self._damage))]

    def changed(self, context: Context, record: ArtifactRecord, *, gone: bool) -> None:
        """The object of an artifact is ``gone``, or not what the registry says: say what to do, once, and remember
        it."""
        url, etag = context.store.url(record.revision.object_key), record.revision.etag
        before = self._changed.pop((url, etag), None)
        now = self._changed[url, etag] = Changed(record.place, record.uid, url, now_ns(), gone)
        if before is None or before.gone != gone:
            log.error("The object %s of '%s' (artifact %s) is %s.", url, record.place, record.uid, now.problem)
        if len(self._changed) > SHOWN:
            del self._changed[next(iter(self._changed))]

    async def look_again(self, context: Context) -> None:
        """Forget the objects that were changed or gone, and are what the registry knows again: storage is asked."""
        for place, found in list(self._changed.items()):
            record = context.registry.artifacts.by_uid(found.uid)
            if record is None or not self._is_so(context, found.uid, place):
                continue
            try:
                item = await context.mover.head(record.revision.object_key)
            except LamfsError:
                continue
            right = (item.size, item.etag) == (record.size, record.revision.etag)
            if right and place in self._changed:
                del self._changed[place]
                log.info("the object %s of '%s' (artifact %s) is right again", found.url, record.place, record.uid)

    @staticmethod
    def _is_so(context: Context, uid: str, place: tuple[str, str]) -> bool:
        """Whether an artifact still has the object, by URL and ETag, that was seen changed."""
        record = context.registry.artifacts.by_uid(uid)
        return record is not None and (context.store.url(record.revision.object_key), record.revision.etag) == place

    # -- all of it ----------------------------------------------------------------------------------------------

    def numbers(self, context: Context) -> dict[str, Any]:
        """Everything that is shown of the mount, as JSON can hold it. Sizes in bytes, times ISO 8601 in UTC."""
        registry, uploader, counted = context.registry, context.uploader, self.counters
        rows, size = uploader.owed()
        retrying, retries = registry.journal.failing(SHOWN)
        stored_reads = counted.hits + counted.misses
        return {
            "mountpoint": self.about.mountpoint,
            "slug": self.about.slug,
            "pid": os.getpid(),
            "started_at": iso(self.about.started_at),
            "read_only": context.policy.read_only,
            "notice": self.notice,
            "reads": counted.reads,
            "read_bytes": counted.read_bytes,
            "writes": counted.writes,
            "write_bytes": counted.write_bytes,
            "rates": self._rates(context),
            "owed": registry.journal.owed(),
            "owed_rows": rows,
            "owed_bytes": size,
            "uploading": [
                {"key": what(registry, upload.entry), "size": upload.size, "done": upload.done}
                for upload in uploader.puts.uploads.values()
            ],
            "retrying": retrying,
            "retries": [
                {
                    "what": f"{entry.op} {what(registry, entry)}",
                    "attempts": entry.attempts,
                    # None: storage can never take it, so it is not tried again.
                    "next_at": None if entry.state == "refused" else iso(max(entry.next_at, 0)),
                    "error": entry.error,
                }
                for entry in retries
            ],
            "stored_files": uploader.puts.stored_files,
            "stored_bytes": uploader.puts.stored_bytes,
            "cache": {
                **context.cache.stats(),
                "limit_bytes": context.cache.limit_bytes,
                "read_hits": counted.hits,
                "read_misses": counted.misses,
                "prefetched_files": counted.prefetched_files,
                "prefetched_used": counted.prefetched_used,
                "prefetched_wasted": counted.prefetched_wasted,
                "hit_rate": round(counted.hits / stored_reads, 4) if stored_reads else None,
            },
            "failed_tries": uploader.failed_tries,
            "io_errors": counted.io_errors,
            "timeouts": counted.timeouts,
            "errors": [
                {"at": iso(failure.at), "what": failure.what, "error": failure.error} for failure in uploader.failures
            ],
            "storage_damage_total": self.damaged_blocks,
            "storage_damage": [
                {
                    "at": iso(found.at),
                    "key": found.key,
                    "uid": found.uid,
                    "object": found.url,
                    "etag": found.etag,
                    "block": found.block,
                    "times": found.times,
                }
                for found in self._damage.values()
            ],
            "storage_changed": [
                {
                    "at": iso(found.at),
                    "key": found.key,
                    "uid": found.uid,
                    "object": found.url,
                    "problem": found.problem,
                }
                for place, found in self._changed.items()
                if self._is_so(context, found.uid, place)
            ],
            "open_files": sum(state.handles for state in context.states.values()),
            "inodes": len(context.nodes),
        }
