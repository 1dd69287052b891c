"""``lamfs sync``, and waiting until a mount has nothing pending. Main thread, and one that waits for the daemon."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import click

from lamfs.cli import mountpoints
from lamfs.cli.common import seconds
from lamfs.cli.output import OwedProgress, complain, note, say, shown, size
from lamfs.cli.seam import FAILURE, Command, leave
from lamfs.errors import LamfsError, NotFound
from lamfs.printable import count_of

if TYPE_CHECKING:
    from lamfs.ops.mounts import MountRecord

LOOK_SECONDS = 2.0
"""Seconds between two looks at errors while a mount does its pending work."""
AGAIN_SECONDS = 10.0
"""Seconds between two lines that say what is waited for."""
ANSWER_SECONDS = 10.0
"""Seconds that a daemon may take to report its status."""
MAX_REFUSED = 5
WAIT_SECONDS = 14 * 86_400.0
"""Seconds that a daemon may be silent while it stores: files may have any size."""


class Pending(LamfsError):
    """The time is up, and something is still pending."""


@click.command(
    cls=Command,
    examples="""
    lamfs sync
    lamfs sync ~/data
    lamfs sync ~/data/plates
    """,
)
@click.argument("path", type=mountpoints.UNTOUCHED, required=False)
@click.option("--timeout", type=seconds, metavar="SECONDS", help="How long it may take.  [default: no limit]")
def sync(path: str | None, timeout: float | None) -> None:
    """Wait until everything is in storage.

    With PATH, what is at or below it; else everything in every mount. What mounts and commands that died have left is
    stored by the next mount; without PATH it is named, and the exit code is 1.
    """
    from lamfs.ops import losses, mounts

    key = ""
    failed = False
    if path is None:
        records = mounts.all_live()
        for problem in left_behind({record.slug for record in records if not record.read_only}):
            complain(problem)
            failed = True
        if not records and not failed:
            say("No mount is alive, and nothing waits to be stored.")
    else:
        found = mounts.find_by_path(os.path.expanduser(path)) if path else None
        if found is None:
            raise NotFound(f"'{path}' is not in a living mount; 'lamfs status' lists the mounts.")
        records, key = [found[0]], found[1]
    for record in records:
        try:
            note_refused(sync_mount(record, timeout, key))
        except LamfsError as error:
            complain(str(error))
            failed = True
        else:
            say(f"{shown(os.path.join(record.mountpoint, key) if key else record.mountpoint)}: everything is stored.")
    for slug in dict.fromkeys(record.slug for record in records):
        for text in losses.sentences(losses.known(slug)):
            note(shown(text))
    if failed:
        leave(FAILURE)


def left_behind(mounted: Collection[str]) -> list[str]:
    """A sentence for each instance that no mount stores, if its bytes wait to be stored, or may wait.

    ``mounted``: instances that a mount stores.
    """
    from lamfs import config
    from lamfs.ops import in_use, mounts

    found = []
    places = {dead.record.slug: dead.record.mountpoint for dead in mounts.all_dead() if not dead.record.read_only}
    for settings in config.list_instances():
        slug = settings.slug
        if slug in mounted or not settings.registry_path.exists():
            continue
        try:
            with in_use.looking(settings) as registry:
                owed, owed_bytes = registry.journal.owed(), registry.journal.owed_bytes()
        except LamfsError as error:
            found.append(str(error))
            continue
        if not owed.get("put") and not owed.get("save"):
            continue
        words = ["lamfs", "mount", "--instance", slug, *([places[slug]] if slug in places else [])]
        found.append(
            f"{slug} is not mounted, and owes storage {owed_words(owed, owed_bytes)}; '{shlex.join(words)}' stores it,"
            f" 'lamfs close {slug}' does without a mount."
        )
    return found


def sync_mount(record: MountRecord, timeout: float | None = None, key: str = "", *, give_up: str = "") -> list[str]:
    """Wait until a mount has nothing pending. Say what it waits for, and what goes wrong: the daemon keeps retrying.

    Returns a sentence for each deletion or move that storage refuses for good: those are not waited for.

    ``timeout``: seconds. ``key``: wait only for what is at or below it. ``give_up``: a sentence on how to stop waiting.
    Raises Pending when the time is up, MountSilent when the daemon hangs or dies.
    """
    began = time.time()
    waiting = _Waiting(record, key)
    give_up = give_up or "Ctrl-C stops waiting, not the mount."
    with OwedProgress(f"storing what {record.mountpoint} owes") as progress:
        waiting.start(progress)
        said, say_at = None, began
        while not waiting.over.wait(LOOK_SECONDS if timeout is None else min(LOOK_SECONDS, timeout)):
            status = ask(record, ANSWER_SECONDS if timeout is None else max(1.0, min(timeout, ANSWER_SECONDS)))
            problem = last_error(status, began)
            if problem is not None and problem != said:
                progress.note(f"{problem} Trying again.")
            if problem != said or time.time() >= say_at:
                left = owed_words(status.get("owed", {}), status.get("owed_bytes", 0))
                progress.note(f"Still to store: {left}. {give_up}")
                # A terminal shows a bar meanwhile.
                said, say_at = problem, time.time() + (AGAIN_SECONDS if not sys.stderr.isatty() else 3600.0)
            if timeout is not None and time.time() - began >= timeout:
                left = count_of(progress.owed, "step") + (f" ({size(progress.bytes)})" if progress.bytes else "")
                raise Pending(f"{record.mountpoint} still owes storage {left} after {timeout:g} s.")
    if waiting.error is not None:
        raise waiting.error
    return waiting.refused


class _Waiting:
    """The thread that waits for the daemon's answer. ``over`` is set at its end; then ``error`` may be read."""

    def __init__(self, record: MountRecord, key: str) -> None:
        self._record = record
        self._command = {"cmd": "sync", "below": key} if key else {"cmd": "sync"}
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.refused: list[str] = []

    def start(self, progress: OwedProgress) -> None:
        threading.Thread(target=self._run, args=(progress,), daemon=True).start()

    def _run(self, progress: OwedProgress) -> None:
        from lamfs.ops import mounts

        try:
            reply = mounts.request(self._record, self._command, timeout=WAIT_SECONDS, on_progress=progress.report)
            self.refused = [str(sentence) for sentence in reply.get("refused", ())]
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()


def ask(record: MountRecord, timeout: float | None = None) -> dict[str, Any]:
    """The status of a mount's daemon, within ``timeout`` seconds (ANSWER_SECONDS). Raises MountSilent."""
    from lamfs.ops import mounts

    status: dict[str, Any] = mounts.request(record, {"cmd": "status"}, timeout=timeout or ANSWER_SECONDS)["status"]
    return status


def note_refused(refused: list[str]) -> None:
    """Say what storage refuses for good."""
    for sentence in refused[:MAX_REFUSED]:
        note(f"Storage refuses for good: {sentence}")
    if refused:
        more = f" ({len(refused)} in all)" if len(refused) > MAX_REFUSED else ""
        note(f"That is left in the journal{more}, and tried again by the next mount; no bytes are lost with it.")


def last_error(status: dict[str, Any], since: float) -> str | None:
    """The newest failure in a daemon's status that is not older than ``since`` (seconds since the epoch)."""
    from datetime import datetime

    for failure in reversed(status.get("errors", ())):
        if datetime.fromisoformat(failure["at"]).timestamp() >= since:
            return f"{shown(failure['what'])}: {shown(failure['error'])}"
    return None


def owed_words(owed: dict[str, int], owed_bytes: int = 0) -> str:
    """Pending work, for users: ``2 puts (1.5 MiB), 1 delete``; ``nothing``."""
    words = []
    for op in ("put", "save", "move", "delete", "abort"):
        if owed.get(op):
            extra = f" ({size(owed_bytes)})" if op == "put" and owed_bytes else ""
            words.append(count_of(owed[op], op) + extra)
    return ", ".join(words) or "nothing"
