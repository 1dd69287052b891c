"""The uploader works through the journal. Runs in the daemon's trio loop; the only task that starts storage work there.

It owns which rows are under way, and when a failed row is tried again: with growing pauses, for as long as it takes.
steps.py and moves.py do the work of a row.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from lamfs.errors import FsError, LamfsError, StorageError, TooLarge, TransferDied
from lamfs.model import now_ns
from lamfs.mover import beats
from lamfs.mover.beats import Beat
from lamfs.mover.client import Mover
from lamfs.registry import Provenance, Registry
from lamfs.registry.entries import Abort, Delete, Drop, Move, Owed, Put
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStore
from lamfs.work import batches, multipart
from lamfs.work.debounce import Debounce
from lamfs.work.durable import Folding, RangeSync
from lamfs.work.guard import Permit, anybody
from lamfs.work.loop import LoopWaits
from lamfs.work.moves import Moves
from lamfs.work.multipart import Multipart
from lamfs.work.puts import Puts
from lamfs.work.sealing import Sealing
from lamfs.work.steps import FileHooks, Steps, what
from lamfs.work.streaming import Streams

log = logging.getLogger("lamfs.uploader")

SETTLE = 0.05
"""Seconds that a closed file waits for its upload, so that write-then-rename, or quick overwriting, is one upload."""
RETRY_UNNOTED = 2.0
"""Pause in seconds if the registry cannot be written."""
MAX_PAUSE = 60.0
"""Longest pause in seconds between two tries."""
HURRIED_PAUSE = 3.0
"""The same while a caller waits until nothing is pending."""
STILL = 3 * HURRIED_PAUSE
"""Seconds without progress after which untried rows count as waiting for those that storage refuses."""
NOTE_SECONDS = 1.0
"""Seconds between two records in the journal that a put makes progress, for other mounts that wait for it."""
CLOCK_STEP = 1.0
"""Seconds by which the wall clock may go back unnoticed. The journal's times are of that clock."""
BATCH = 256
"""Most rows read from the journal at a time, and most objects deleted in one request."""

T = TypeVar("T", bound=Owed)
Job = Callable[[list[T]], Awaitable[dict[int, LamfsError] | None]]
"""Does rows of the journal. Returns errors by id, if some rows failed and others did not."""


def _wall_clock() -> float:
    """Seconds by which the wall clock is ahead of the monotonic clock."""
    return time.time() - time.monotonic()


@dataclass(slots=True)
class Failure:
    """One failed try, for ``lamfs status``. ``at`` in nanoseconds since the epoch."""

    at: int
    what: str
    error: str


class _PutBeat(Beat):
    """Counts the progress of a job, and records it in the journal now and then."""

    __slots__ = ("_next", "_registry", "_rows")

    def __init__(self, whole: Beat, registry: Registry, rows: list[int]) -> None:
        super().__init__(whole)
        self._registry = registry
        self._rows = rows
        self._next = trio.current_time() + NOTE_SECONDS

    def __call__(self) -> None:
        super().__call__()
        if trio.current_time() >= self._next:
            self._next = trio.current_time() + NOTE_SECONDS
            with contextlib.suppress(LamfsError):  # the next one will be recorded
                for row in self._rows:
                    self._registry.journal.went_on(row, self.value())


class Uploader:
    """Drains the journal with ``workers`` jobs at a time. Loop only.

    Large files do not count as jobs, but only half as many are under way at a time: so small files go on, however many
    large ones there are. One job stores several small new files (batches.py), one after the other.
    """

    def __init__(
        self,
        registry: Registry,
        store: ObjectStore,
        mover: Mover,
        spool: SpoolFolder,
        origin: Provenance,
        *,
        workers: int = 8,
        permit: Permit = anybody,
    ) -> None:
        self._registry = registry
        self._store = store
        self._permit = permit
        self._waits = LoopWaits(registry, spool)
        busy: set[str] = set()
        parts = Multipart(registry, mover, self._waits)
        self._steps = Steps(registry, store, mover, self._waits, spool, origin, parts, busy, permit)
        self._moves = Moves(registry, store, mover, self._waits, permit, parts, busy)
        self._streams = Streams(registry, parts, spool)
        self.puts = Puts(registry, self._steps, self._streams, spool)
        self.range_sync = RangeSync(registry, spool)
        self.sealing = Sealing(registry, mover, spool, self.is_uploading, self._waits.may_abandon)
        self._wanted = self.puts.wanted
        self.beat = Beat()
        """Progress of all work for the journal ..."""
        self.fresh = Beat(self.beat)
        """... and of work for rows that have not failed. Failed rows repeat their steps, perhaps in vain."""
        self._beats: dict[int, Beat] = {}
        self._limit = workers
        self._queue: deque[Owed] = deque()
        self._busy: set[int] = set()
        self._jobs = 0
        self._large: set[int] = set()
        self._debounce = Debounce()
        self._parked: set[int] = set()
        self._being_written: dict[int, int] = {}
        self._attempts: dict[int, trio.Event] = {}
        self._results: dict[int, LamfsError | None] = {}
        self._work = trio.Event()
        self._idle = trio.Event()
        self._hurry = 0
        self._wakes_at = 0.0
        self._clock = _wall_clock()
        self._stopped: LamfsError | None = None
        self._singly: set[int] = set()
        """Deletions that failed together with others: each is tried alone."""
        self._refused: dict[int, tuple[float, str]] = {}
        """Rows other than puts that storage refused for good at their last try: the time, and a sentence."""
        self.failures: deque[Failure] = deque(maxlen=50)
        self.failed_tries = 0

    def attach(self, hooks: FileHooks) -> None:
        """Connect the open files. Called before ``run``."""
        self._steps.hooks = hooks
        self._moves.pin = hooks.pin
        self._moves.gone = hooks.gone

    # -- calls of the file system -------------------------------------------------------------------------------

    def notify(self, ino: int | None = None) -> None:
        """Something became ready: the put of ``ino`` (its last writer may be gone), or any row."""
        if ino is not None:
            self._debounce.closed(ino)
            self.sealing.closed(ino)
            self._being_written.pop(ino, None)
            if self._wakes_at <= trio.current_time() + SETTLE:
                return  # the loop looks soon enough by itself
        self._work.set()

    def opened(self) -> None:
        """A program has opened a file or directory, and waits for the answer."""
        self._debounce.opened()

    def written(self, ino: int, src: str, offset: int, length: int, size: int) -> None:
        """Bytes were written into a spool file, which has ``size`` bytes now. A large file is sent while it grows."""
        self._streams.written(ino, src, offset, length, size)

    def cut(self, ino: int, size: int) -> None:
        """A spool file was truncated, or extended by a hole."""
        self._streams.cut(ino, size)

    def stop(self, error: LamfsError) -> None:
        """This process must not store anything any more. Calls that wait for it, now or later, raise ``error``."""
        self._stopped = error
        for event in self._attempts.values():
            event.set()
        self._attempts.clear()
        self._idle.set()

    def _check(self) -> None:
        if self._stopped is not None:
            raise type(self._stopped)(str(self._stopped), errno=self._stopped.errno)

    def abandon(self, ino: int) -> None:
        """The inode is gone, and its put with it."""
        self._waits.abandon(ino)
        self._streams.forget(ino)
        self._look_again(ino)

    def _look_again(self, ino: int | None) -> None:
        """Wake up callers that wait for the next try of an inode's put."""
        event = self._attempts.pop(ino, None) if ino is not None else None
        if event is not None:
            event.set()

    def is_uploading(self, ino: int, src: str) -> bool:
        """Whether spool file ``src`` is being read for an upload now."""
        return self.puts.uploading.get(ino) == src

    def progress(self, ino: int) -> object:
        """A value that changes when the inode's put makes progress, or, while that waits its turn, when other work
        does."""
        beat = self._beats.get(ino)
        if beat is not None:
            return id(beat), beat.value()
        entry = self._registry.journal.put_of(ino)
        if entry is not None and entry.owner != self._registry.journal.owner:
            return entry.beat
        return self.beat.value()

    async def wait_stored(self, ino: int, row: int, gen: int) -> None:
        """Return when generation ``gen`` of the inode's put ``row`` is in storage and in the registry.

        Tries at once, and again if the moving process dies. Raises the error of a failed try (the row stays and is
        tried again later), and FsError(ESTALE) if another mount goes on writing the file.
        """
        self._wanted[ino] = self._wanted.get(ino, 0) + 1
        self._being_written.pop(ino, None)
        try:
            while (entry := self._registry.journal.put_of(ino)) is not None:
                if self.puts.committed.get(ino, (0, 0)) >= (row, gen):
                    break
                self._check()
                self.check_refused(ino)
                if entry.owner != self._registry.journal.owner:
                    raise FsError(errno.ESTALE, "the file was replaced by somebody else while it was open")
                event = self._attempts.setdefault(ino, trio.Event())
                if entry.id not in self._busy:
                    self._registry.journal.postpone(entry.id, 0)
                    self._queue.appendleft(entry)
                self._work.set()
                await event.wait()
                if (error := self._results.get(ino)) is not None and not isinstance(error, TransferDied):
                    raise type(error)(str(error), errno=error.errno)
                await trio.sleep(0 if error is None else SETTLE)
        finally:
            self._wanted[ino] -= 1
            if not self._wanted[ino]:
                del self._wanted[ino]
                self.puts.committed.pop(ino, None)
                self._results.pop(ino, None)

    def check_refused(self, ino: int) -> None:
        """Raise TooLarge if storage can never take the pending bytes of an inode."""
        entry = self._registry.journal.put_of(ino)
        if entry is not None and entry.state == "refused":
            raise TooLarge(entry.error or "Storage can never take the file; make it smaller.")

    async def drain(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Return when this process has no pending rows any more, except for files that storage can never take.

        Calls ``progress(rows, bytes)`` now and then. Waits through failures: the caller decides when to give up, and
        cancels. Deletes, moves and aborts that storage refuses for good are not waited for: no bytes are lost with
        them. They stay in the journal. Returns a sentence for each.
        """
        self._hurry += 1
        self._being_written.clear()
        began = changed = trio.current_time()
        before, alone = -1, None
        try:
            self._registry.journal.retry_now()
            while True:
                rows, size = self.owed()
                if progress is not None:
                    progress(rows, size)
                if rows != before:
                    before, changed = rows, trio.current_time()
                still = trio.current_time() - changed >= STILL
                refused = self._all_refused(rows, began if alone is None else alone, still=still)
                if refused and alone is None:
                    # Try each once more: work that has just ended may have been in the way.
                    alone, refused = trio.current_time(), []
                if not self._busy and (not rows or refused):
                    await self.durable()
                    return refused
                self._check()
                self._idle = trio.Event()
                self._work.set()
                with trio.move_on_after(0.2):
                    await self._idle.wait()
                    while self._busy:  # counting pending rows takes long if there are many
                        self._idle = trio.Event()
                        await self._idle.wait()
                    await trio.sleep(0.02)
        finally:
            self._hurry -= 1

    def _all_refused(self, rows: int, since: float, *, still: bool) -> list[str]:
        """A sentence for each row that is left, if storage has refused all of them since ``since``; none while there is
        other work. ``still``: nothing has ended for a while, so rows that were not tried count as waiting for the
        refused.
        """
        journal = self._registry.journal
        if not self._refused or self._busy or journal.owes_bytes():
            return []
        self._refused = {row: found for row, found in self._refused.items() if journal.get(row) is not None}
        refused = [sentence for at, sentence in self._refused.values() if at >= since]
        return refused if len(refused) == rows or still else []

    async def durable(self) -> None:
        """Return when everything committed so far survives a power cut. Raises RegistryError."""
        await self._waits.durable()

    def can_drain(self) -> bool:
        """Whether something pending can be stored now: not only files that are still being written."""
        return self._stopped is None and self.owed()[0] > len(self._being_written)

    def owed(self) -> tuple[int, int]:
        """Number of ready rows of this process, and bytes of the files among them."""
        return self._registry.journal.owed_by_me()

    # -- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled. The next mount finishes what is under way then."""
        async with trio.open_nursery() as nursery:
            if self._store.parts is not None:
                self._streams.start(nursery)
            nursery.start_soon(Folding(self._registry.db).run)
            nursery.start_soon(self.range_sync.run)
            nursery.start_soon(self.sealing.run)
            while True:
                self._work = trio.Event()
                try:
                    pause = self._start_ready(nursery)
                except LamfsError as error:
                    log.error("could not look what is owed: %s", error)
                    pause = 1.0
                self._wakes_at = trio.current_time() + pause
                with trio.move_on_after(pause):
                    await self._work.wait()
                    # Each closed file wakes this up: wait a little, to serve a burst at once, unless a caller waits.
                    await trio.sleep(0.0 if self._wanted else 0.001)

    def _start_ready(self, nursery: trio.Nursery) -> float:
        """Start what may start. Returns the seconds after which to look again, if nothing wakes the loop before."""
        journal = self._registry.journal
        journal.release(self._busy)
        if self._being_written:
            urged = set(journal.urged())
            self._being_written = {ino: row for ino, row in self._being_written.items() if row not in urged}
        clock, self._clock = self._clock, _wall_clock()
        if self._clock < clock - CLOCK_STEP:
            log.info("the clock was put back by %.0f s: what waits to be tried again is tried now", clock - self._clock)
            journal.retry_now()
        burst = 0.0 if self._hurry else self._debounce.pause()
        if burst and not self._wanted:
            return min(burst, SETTLE)  # so soon that closed files need not wake this up
        refilled = bool(burst)
        while self._has_room():
            if not self._queue:
                if refilled:
                    if not burst:
                        self._debounce.drained()
                    break
                refilled = True
                skip = self._busy.union(self._being_written.values(), self._parked)
                self._queue.extend(journal.ready(BATCH, now=now_ns(), skip=skip))
                continue
            entry = self._next()
            if entry is None or (burst and not self._is_wanted(entry)):
                continue  # rows that are skipped now are read again
            if isinstance(entry, Put):
                if self._must_wait(entry):
                    continue
                size = self._steps.size_of(entry)
                if self._is_small(entry, size):
                    self._begin(nursery, self.puts.many, self._gather(entry))
                elif self._may_begin(entry, size):
                    self._begin(nursery, self.puts.one, [entry])
            elif isinstance(entry, Delete):
                self._begin(nursery, self._delete, self._gather_deletes(entry))
            elif isinstance(entry, Move):
                self._begin(nursery, self._move, [entry])
            elif isinstance(entry, Abort):
                self._begin(nursery, self._abort, [entry])
            elif isinstance(entry, Drop):
                self._begin(nursery, self._drop, [entry])
        if not self._has_room():
            return 3600.0
        next_at = journal.next_at(skip=self._busy.union(self._being_written.values(), self._parked))
        pause = 3600.0 if next_at is None else min(max((next_at - now_ns()) / 1e9, 0.001), MAX_PAUSE)
        return max(pause, burst)

    def _has_room(self) -> bool:
        """Whether another job may begin that is not for a large file."""
        return self._jobs < self._limit

    def _next(self) -> Owed | None:
        """The next row of the queue. None if it must not be worked on now."""
        journal = self._registry.journal
        found = self._queue.popleft()
        # The present row: it may have been written again, postponed or removed since it was read.
        entry = journal.get(found.id)
        if entry is None or entry.op != found.op or entry.owner != journal.owner:
            # Its file was deleted, or another mount writes it by now: waiting callers have to look again.
            if isinstance(found, Put):
                self._look_again(found.ino)
            self.puts.alone.discard(found.id)
            return None
        if entry.id in self._busy or entry.next_at > now_ns():
            return None
        if entry.state != "ready" and not self._is_wanted(entry):
            return None
        return entry

    def _is_wanted(self, entry: Owed) -> bool:
        """Whether a caller waits for the put of a file."""
        return isinstance(entry, Put) and entry.ino in self._wanted

    def _is_small(self, entry: Put, size: int) -> bool:
        """Whether a put may be done in a batch: it must be of a small new file."""
        if size > batches.SMALL or self._store.imports_files or entry.id in self.puts.alone:
            return False
        return not (self._streams.sends(entry.ino) or self._registry.artifacts.has_ino(entry.ino))

    def _gather(self, entry: Put) -> list[Put]:
        """A batch of small files from the queue, with ``entry``. Each job that may begin gets its share of the queue.

        Files that a caller waits for are not held up by files that nobody waits for.
        """
        share = min(-(-(1 + len(self._queue)) // (self._limit - self._jobs)), batches.FILES)
        found = {entry.id: entry}
        while self._queue and len(found) < share and isinstance(self._queue[0], Put):
            more = self._next()
            if not isinstance(more, Put) or more.id in found or self._must_wait(more):
                continue
            urgent = more.ino in self._wanted or entry.ino not in self._wanted
            if not urgent or not self._is_small(more, self._steps.size_of(more)):
                self._queue.appendleft(more)
                break
            found[more.id] = more
        return list(found.values())

    def _gather_deletes(self, entry: Delete) -> list[Delete]:
        """Deletions from the queue for one request, with ``entry``."""
        found = {entry.id: entry}
        if entry.id in self._singly:
            return [entry]
        while self._queue and isinstance(self._queue[0], Delete) and len(found) < BATCH:
            if self._queue[0].id in self._singly:
                break
            more = self._registry.journal.get(self._queue.popleft().id)
            if isinstance(more, Delete) and more.id not in self._busy:
                found[more.id] = more
        return list(found.values())

    def _may_begin(self, entry: Put, size: int) -> bool:
        """Whether a put may begin now. A large file that nobody waits for may have to wait for another large file.

        The parts of a large file do not hold up other files' jobs, so it does not count as a job.
        """
        if size <= multipart.MULTIPART_ABOVE:
            return True
        if entry.ino not in self._wanted and len(self._large) >= max(1, self._limit // 2):
            self._parked.add(entry.id)
            return False
        self._large.add(entry.id)
        return True

    def _must_wait(self, entry: Put) -> bool:
        """Whether a file that was closed once is still being written through a handle: its upload waits for the
        close."""
        assert self._steps.hooks is not None
        if self._hurry or entry.next_at < 0 or entry.ino in self._wanted:
            return False
        if not self._steps.hooks.has_writers(entry.ino):
            return False
        self._being_written[entry.ino] = entry.id
        return True

    def _begin(self, nursery: trio.Nursery, job: Job[T], entries: list[T]) -> None:
        self._busy.update(entry.id for entry in entries)
        for entry in entries:
            if isinstance(entry, Put):
                self.puts.begin(entry)  # now: before the job gets its turn, the file may be written again
        self._jobs += entries[0].id not in self._large
        nursery.start_soon(self._guard, job, entries)

    async def _guard(self, job: Job[T], entries: list[T]) -> None:
        """Run one job, and count its progress."""
        whole = self.beat if any(entry.attempts for entry in entries) else self.fresh
        puts = {entry.ino: entry.id for entry in entries if isinstance(entry, Put)}
        beat = _PutBeat(whole, self._registry, list(puts.values()))
        own: dict[int, Beat] = dict.fromkeys(puts, beat)
        self._beats.update(own)
        try:
            with beats.doing(beat):
                await self._run_job(job, entries)
        finally:
            for ino in own:
                if self._beats.get(ino) is beat:
                    del self._beats[ino]

    async def _run_job(self, job: Job[T], entries: list[T]) -> None:
        """Run one job. Any error becomes a failed try of its rows."""
        error: LamfsError | None = None
        errors: dict[int, LamfsError] = {}
        try:
            await self._permit(not isinstance(entries[0], Put))
            errors = await job(entries) or {}
        except LamfsError as problem:
            error = problem
        except OSError as problem:
            error = StorageError(f"A file of the spool could not be used: {problem}.", errno=problem.errno)
        except Exception:
            log.exception("unexpected error while storing %s", what(self._registry, entries[0]))
            error = StorageError("An unexpected error; the log has the traceback.")
        unnoted = 0.0
        for entry in entries:
            problem_of = error or errors.get(entry.id)
            overtaken = problem_of is not None and self._overtaken(entry)
            if not isinstance(entry, Put):
                self._note_refusal(entry, problem_of, alone=len(entries) == 1)
            if problem_of is not None and not overtaken and not self._failed(entry, problem_of):
                unnoted = RETRY_UNNOTED
            if isinstance(entry, Put):
                if entry.ino in self._wanted:
                    self._results[entry.ino] = None if overtaken else problem_of
                self._look_again(entry.ino)
        if unnoted:
            # The rows cannot record when to try again, so they stay busy until then.
            await trio.sleep(unnoted)
        self._busy.difference_update(entry.id for entry in entries)
        if entries[0].id in self._large:
            self._large.discard(entries[0].id)
            self._parked.clear()
        else:
            self._jobs -= 1
        self._work.set()
        self._idle.set()

    def _overtaken(self, entry: Owed) -> bool:
        """Whether a put's row was removed or rewritten meanwhile: its file may be gone, so nothing failed."""
        if not isinstance(entry, Put):
            return False
        try:
            now = self._registry.journal.get_put(entry.id)
        except LamfsError:
            return False
        return now is None or (now.src, now.gen) != (entry.src, entry.gen)

    def _note_refusal(self, entry: Owed, error: LamfsError | None, *, alone: bool) -> None:
        """Remember whether another try of a deletion, move or abort, ``alone`` or not, can succeed."""
        self._refused.pop(entry.id, None)
        self._singly.discard(entry.id)
        if not isinstance(error, StorageError) or error.retryable:
            return
        if isinstance(entry, Delete):
            self._singly.add(entry.id)
        if alone:
            self._refused[entry.id] = trio.current_time(), f"{entry.op} {entry.about}: {error}"

    def _failed(self, entry: Owed, error: LamfsError) -> bool:
        """Record a failed try. False if the registry cannot be written (its disk is full)."""
        longest = HURRIED_PAUSE if self._hurry else MAX_PAUSE
        pause = min(longest, 0.5 * 2 ** min(entry.attempts, 10)) * random.uniform(0.75, 1.25)  # noqa: S311
        try:
            name = what(self._registry, entry)
            if isinstance(error, TooLarge):
                log.error("could not %s %s: %s It is not tried again.", entry.op, name, error)
                self.failures.append(Failure(now_ns(), f"{entry.op} {name}", str(error)))
                self._registry.journal.refuse(entry.id, str(error))
                return True
            log.warning("could not %s %s: %s Trying again in %.0f s.", entry.op, name, error, pause)
            self.failed_tries += 1
            self.failures.append(Failure(now_ns(), f"{entry.op} {name}", str(error)))
            self._registry.journal.failed(entry.id, str(error), now_ns() + int(pause * 1e9))
            if isinstance(entry, Put):
                self.sealing.closed(entry.ino)  # it has to wait now
        except LamfsError as problem:
            log.error("could not note a failure: %s", problem)
            return False
        return True

    async def _delete(self, entries: list[Delete]) -> None:
        await self._moves.delete(entries)

    async def _move(self, entries: list[Move]) -> None:
        await self._moves.move(entries[0])

    async def _drop(self, entries: list[Drop]) -> None:
        await self._steps.drop(entries[0])

    async def _abort(self, entries: list[Abort]) -> None:
        await self._moves.abort(entries[0])
