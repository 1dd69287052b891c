"""A mount's lease: renewed while the mount lives, and checked before storage is changed.

The Keeper runs in the trio loop only; ``renewed`` and ``hand_back`` run after it, in the main thread.

The lease is valid for MOUNT_SECONDS after its last renewal, by a clock that runs while the machine sleeps. So a daemon
that was suspended notices before it starts anything, and asks storage first. A lost lease stays lost: a running mount
cannot import what another machine did meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

import trio

from lamfs import config
from lamfs.daemon.lock import LockByMover
from lamfs.errors import LamfsError, LeaseLost, ObjectMissing, StorageUnavailable
from lamfs.mover.client import Mover
from lamfs.ops import held, lock
from lamfs.ops.instance import Instance
from lamfs.processes import uptime

log = logging.getLogger("lamfs.daemon")

ASK_SECONDS = 180.0
"""Seconds that storage may take to answer."""
FRESH_SECONDS = 2.0
"""Seconds for which storage is not asked again before a delete or a replacement."""


class Keeper:
    """Keeps the lease of one mount.

    ``on_lost`` is called in the loop when the lease is lost for good, ``on_kept`` when storage has accepted a renewal.
    """

    def __init__(
        self, instance: Instance, mover: Mover, on_lost: Callable[[LeaseLost], None], on_kept: Callable[[], None]
    ) -> None:
        self._instance = instance
        self._directory = instance.settings.directory
        self._mover = mover
        self._on_lost = on_lost
        self._on_kept = on_kept
        self.lost: LeaseLost | None = None
        note = held.read(self._directory)
        # Without a note (a power cut loses it): the number of the lease under which this registry was last changed.
        fence = instance.registry.file.fence() if note is None else note.fence
        self._fence = -1 if fence is None else fence
        self._until = note.at + note.seconds if note is not None and note.holds else 0.0
        self._asked = float("-inf")
        self._failed: tuple[float, LamfsError] | None = None
        self._lock = trio.Lock()

    async def run(self) -> None:
        """Renew the lease in time, until cancelled or lost."""
        while True:
            try:
                await self._ask(renew=True)
            except LeaseLost:
                return
            except LamfsError as error:
                log.info("the lock in storage could not be renewed: %s", error)
            await trio.sleep(lock.MOUNT_LOOK)

    async def look(self) -> None:
        """Renew the lease now. Raises LeaseLost, storage errors."""
        self._check()
        await self._ask(renew=True)

    async def permit(self, fresh: bool) -> None:
        """Return when storage may be changed. ``fresh``: storage must confirm it. Raises LeaseLost, storage errors."""
        self._check()
        now = uptime()
        if now >= self._until:
            await self._ask(renew=True)
        elif fresh and now - self._asked > FRESH_SECONDS:
            await self._ask(renew=False)

    def _check(self) -> None:
        if self.lost is not None:
            raise LeaseLost(str(self.lost))

    async def _ask(self, *, renew: bool) -> None:
        wanted = uptime()
        async with self._lock:
            self._check()
            if self._asked >= wanted and uptime() < self._until:
                return  # somebody else has asked meanwhile
            if self._failed is not None and self._failed[0] >= wanted:
                raise type(self._failed[1])(str(self._failed[1]), errno=self._failed[1].errno)
            try:
                with trio.fail_after(ASK_SECONDS):
                    await trio.to_thread.run_sync(self._renew if renew else self._prove)
            except LeaseLost as error:
                self._lose(error)
                raise
            except LamfsError as error:
                self._failed = uptime(), error
                raise
            except trio.TooSlowError:
                raise StorageUnavailable("The lock in storage could not be looked at: no answer.") from None
            self._failed = None
        if renew:
            self._on_kept()

    def _lose(self, error: LeaseLost) -> None:
        name = self._instance.settings.slug
        self.lost = LeaseLost(
            f"{error} The mount is read-only from now on. When it is unmounted ('lamfs umount'), what only this machine"
            f" has stays here; the next mount uses the registry of '{name}' in storage, and gives that names in"
            " lost+found."
        )
        log.error("%s", self.lost)
        with contextlib.suppress(OSError):
            held.forget(self._directory)
        self._on_lost(self.lost)

    # -- in a thread ----------------------------------------------------------------------------------------------

    def _lease(self) -> lock.Lease:
        return self._instance.lease(LockByMover(self._mover, self._instance.store.url))

    def _prove(self) -> None:
        note, lease, now = held.read(self._directory), self._lease(), uptime()
        try:
            lease.prove(self._fence, "" if note is None else note.etag)
        except LeaseLost:
            self._renew()  # also takes a lease that nobody has: an interrupted renewal may leave half a lock
        else:
            self._asked = now

    def _renew(self) -> None:
        lease, seconds = self._lease(), lock.MOUNT_SECONDS
        try:
            lease.renew(self._fence, seconds)
        except LeaseLost:
            if not self._reacquire(lease, seconds):
                raise
        self._until, self._asked = lease.at + seconds, lease.at
        try:
            held.write(self._directory, self._fence, seconds, lease)
        except LamfsError:  # the disk is full
            with contextlib.suppress(OSError):
                held.forget_note(self._directory)  # it may be of a longer lease, from before this mount

    def _reacquire(self, lease: lock.Lease, seconds: float) -> bool:
        """Take a lease that nobody has, or that this machine has taken anew, if nobody has used it meanwhile.

        Nobody has it when it was given back, or its object deleted. This machine takes it anew by a command, or by a
        try of this mount that did not finish. The registry in storage must be the one that this machine's comes from.
        """
        found = lease.peek()
        if found is not None and not lease.is_ours(found):
            return False
        state, _ = lease.acquire(fence=max(self._fence, 0), seconds=seconds)
        try:
            etag: str | None = trio.from_thread.run(self._mover.head, self._instance.settings.snapshot_key).etag
        except ObjectMissing:
            etag = None
        known = (config.read_json(self._directory / "snapshot.json") or {}).get("etag")
        if etag is not None and etag != known:
            lease.release()
            return False
        try:
            self._instance.registry.file.begin_lease(state.fence)
        finally:
            self._instance.close_thread()
        self._fence = state.fence
        return True


@contextlib.contextmanager
def renewed(instance: Instance) -> Iterator[None]:
    """A mount of this process has ended: inside the context its lease is renewed, a minute at a time, to push the
    registry.

    If the push fails or the process dies, the lease expires by itself, and other machines need not wait longer. Raises
    LeaseLost, storage errors.
    """
    prolong(instance, lock.MOUNT_SECONDS)
    over = threading.Event()

    def renew() -> None:
        while not over.wait(lock.MOUNT_LOOK):
            try:
                prolong(instance, lock.MOUNT_SECONDS)
            except LeaseLost:
                return  # the push finds out
            except LamfsError as error:
                log.info("the lock in storage could not be renewed: %s", error)

    thread = threading.Thread(target=renew, name="lamfs-lease", daemon=True)
    thread.start()
    try:
        yield
        over.set()
        thread.join()  # a renewal in flight must not undo giving the lease back
    finally:
        over.set()


def prolong(instance: Instance, seconds: float) -> None:
    """Renew the lease that a mount of this process had until now. Raises LeaseLost, storage errors."""
    directory = instance.settings.directory
    note = held.read(directory)
    if note is not None:
        lease = instance.lease()
        lease.renew(note.fence, seconds)
        held.write(directory, note.fence, seconds, lease)


def hand_back(instance: Instance) -> None:
    """A mount has ended, and its registry is pushed: give the lease back. Never raises: the lease expires by itself.

    It is kept if 'connect', 'init', or a change by CLI or API said that this machine keeps it. (Another mount of this
    machine renews it.)
    """
    from lamfs.ops import mounts

    try:
        if held.is_long(instance.settings.directory):
            prolong(instance, lock.LEASE_SECONDS)
        elif not any(one.pid != os.getpid() and not one.read_only for one in mounts.live(instance.settings)):
            instance.release_lease()
    except LamfsError as error:
        log.info("the lock in storage is not given back, and runs out by itself: %s", error)
