"""What one mount remembers about itself: counters, samples of them, damage and changes seen in storage. Loop only.

The hot path adds to the plain integers of ``Counters``. The follower takes a sample of them every second, and the
difference to an earlier sample is a rate. numbers.py turns this, and the mount's parts, into what is shown.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from lamfs.errors import LamfsError
from lamfs.fs.counters import Counters
from lamfs.model import ArtifactRecord, Revision, now_ns
from lamfs.mover.client import Mover
from lamfs.registry import Registry
from lamfs.storage.base import ObjectStore

log = logging.getLogger("lamfs.fs")

SAMPLE_SECONDS = 1.0
"""Seconds between two samples, at least."""
SAMPLES = 6
"""Samples that are kept: rates are those of the last 5 s or so."""
SHOWN = 50
"""Rows of a list that are shown: uploads that wait for a retry, damaged blocks."""
WHEN_GONE = (
    "gone, so it cannot be read: restore the object from a backup, or from a version of it that the bucket has kept,"
    " and run 'lamfs fsck --repair', which takes it when it has the same bytes; or write the file anew, or delete it"
)
WHEN_CHANGED = (
    "not what the registry knows, so it cannot be read: 'lamfs fsck' says what is there and what helps, and 'lamfs fsck"
    " --repair' makes that readable, unless it is damaged"
)


@dataclass(slots=True)
class Damage:
    """A block in storage whose BLAKE3 is wrong. ``at``: when that was last seen, ns; ``times``: how often.

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
        """Why the mount cannot do everything that it should, for users."""
        self.damaged_blocks = 0
        """How often a block was found damaged in storage."""
        self._damage: dict[tuple[str, str, int], Damage] = {}
        self._changed: dict[tuple[str, str], Changed] = {}
        self._samples: deque[tuple[float, tuple[int, ...]]] = deque([(time.monotonic(), (0,) * 6)], maxlen=SAMPLES)

    # -- rates --------------------------------------------------------------------------------------------------

    def sample(self, fetched_bytes: int, stored_bytes: int) -> None:
        """Record the counters, and the bytes to and from storage, if the last sample is old enough."""
        now = time.monotonic()
        if now - self._samples[-1][0] >= SAMPLE_SECONDS:
            self._samples.append((now, self._totals(fetched_bytes, stored_bytes)))

    def _totals(self, fetched_bytes: int, stored_bytes: int) -> tuple[int, ...]:
        counted = self.counters
        return counted.reads, counted.read_bytes, counted.writes, counted.write_bytes, fetched_bytes, stored_bytes

    def rates(self, fetched_bytes: int, stored_bytes: int) -> dict[str, float]:
        """Per second, from the oldest sample to now."""
        totals = self._totals(fetched_bytes, stored_bytes)
        since, before = self._samples[0]
        seconds = max(time.monotonic() - since, SAMPLE_SECONDS)
        names = ("reads", "read_bytes", "writes", "write_bytes", "fetched_bytes", "stored_bytes")
        return {
            f"{name}_per_second": round((total - earlier) / seconds, 1)
            for name, total, earlier in zip(names, totals, before, strict=True)
        }

    # -- damage -------------------------------------------------------------------------------------------------

    def damaged(self, registry: Registry, store: ObjectStore, revision: Revision, block: int) -> None:
        """A block of an object in storage is not what was saved: log it, and remember it."""
        self.damaged_blocks += 1
        url = store.url(revision.object_key)
        record = None
        try:
            record = registry.artifacts.with_object(revision.object_key)
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

    def changed(self, store: ObjectStore, record: ArtifactRecord, *, gone: bool) -> None:
        """An artifact's object is ``gone``, or not what the registry says: log what to do once, and remember it."""
        url, etag = store.url(record.revision.object_key), record.revision.etag
        before = self._changed.pop((url, etag), None)
        now = self._changed[url, etag] = Changed(record.place, record.uid, url, now_ns(), gone)
        if before is None or before.gone != gone:
            log.error("The object %s of '%s' (artifact %s) is %s.", url, record.place, record.uid, now.problem)
        if len(self._changed) > SHOWN:
            del self._changed[next(iter(self._changed))]

    async def look_again(self, registry: Registry, store: ObjectStore, mover: Mover) -> None:
        """Forget objects that were changed or gone, and are as the registry says again. Asks storage."""
        for place, found in list(self._changed.items()):
            record = registry.artifacts.by_uid(found.uid)
            if record is None or not _has_object(store, record, place):
                continue
            try:
                item = await mover.head(record.revision.object_key)
            except LamfsError:
                continue
            right = (item.size, item.etag) == (record.size, record.revision.etag)
            if right and place in self._changed:
                del self._changed[place]
                log.info("the object %s of '%s' (artifact %s) is right again", found.url, record.place, record.uid)

    def damage(self) -> list[Damage]:
        """Blocks that were found damaged, the latest last."""
        return list(self._damage.values())

    def still_changed(self, registry: Registry, store: ObjectStore) -> list[Changed]:
        """Objects that were seen changed, without artifacts that have another object by now."""
        records = {found.uid: registry.artifacts.by_uid(found.uid) for found in self._changed.values()}
        return [found for place, found in self._changed.items() if _has_object(store, records[found.uid], place)]


def _has_object(store: ObjectStore, record: ArtifactRecord | None, place: tuple[str, str]) -> bool:
    """Whether an artifact, if it still exists, has the object with this URL and ETag."""
    return record is not None and (store.url(record.revision.object_key), record.revision.etag) == place
