"""The lease that one machine holds on an instance: an object in storage. Synchronous; one Lease object per thread.

``{root}/.lamindb/_exclusion/{instance id hex}``, JSON ``{handle, host, machine, token, since, until, fence, seconds}``,
times in seconds since the epoch. The object is made with ``If-None-Match: *``, and renewed, given back and taken over
with ``If-Match``. ``machine`` is config.machine_token(): all processes that share a data directory share the lease;
``""``: no machine has it. ``fence`` rises whenever another machine gets the lease. Giving the lease back leaves the
object with its number, so the number of a holder that was overtaken is never the newest again. An object that cannot be
read counts as free, with the number 0.

No machine's clock decides. A lease has run out when ``seconds`` (and MARGIN) have passed since its object was written,
by the clock that stamps the storage's objects: on S3, ``Last-Modified`` compared with that of an object that is written
now; in a folder, st_ctime, which no program can set. Its holder counts ``seconds`` from before the write, by a clock
that goes on while the machine sleeps, so it stops earlier than others begin. ``until`` is for people, and for locks of
older versions, which have no ``seconds``.

A lease holds for MOUNT_SECONDS while a mount lives, which renews it every MOUNT_LOOK seconds. For everything else
('connect', 'init', changes of CLI and API) it holds for LEASE_SECONDS, until 'close'. After every acquisition the
object is read back. So all but one of the machines that race for it notice a storage that ignores conditions, unless
they race within the same instant.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import uuid
from typing import NamedTuple, Protocol

from lamfs import config
from lamfs.errors import LeaseLost, Locked, ObjectChanged, ObjectMissing, PreconditionFailed, StorageError
from lamfs.jsontext import is_number, parse_object
from lamfs.keys import LOCK_FOLDER
from lamfs.processes import uptime
from lamfs.storage.base import ObjectStat

LEASE_SECONDS = 24 * 3600.0
"""Seconds that a machine without a mount holds the lease after its last change."""
RENEW_AFTER = 3600.0
"""A command renews a lease that is older than this, in seconds."""
MOUNT_SECONDS = 60.0
"""Seconds that a mount holds the lease after its daemon renewed it last."""
MOUNT_LOOK = 20.0
"""Seconds between two renewals by a mount."""
MARGIN = 2.0
"""Seconds that are added: storage's clocks show whole seconds."""
LOCK_BYTES = 64 << 10
"""Most bytes of a lock object that are read; lamfs writes some 200."""
MAX_TEXT = 255
"""Most characters of a name in a lock."""
MAX_FENCE = 1 << 53
MAX_SINCE = 253_370_764_800.0
"""The year 9999 begins, in seconds since the epoch: Python and the C library can print earlier times."""
_TRIES = 8


class Holder(NamedTuple):
    """The user and machine that ask for a lease."""

    handle: str
    host: str
    machine: str


class LeaseState(NamedTuple):
    """The content of the lock object. ``since`` and ``until`` in seconds since the epoch; ``seconds``: how long the
    lease holds after the write, 0 in locks of older versions."""

    handle: str
    host: str
    machine: str
    token: str
    since: float
    until: float
    fence: int = 0
    seconds: float = 0.0


class LockStore(Protocol):
    """The methods of an ObjectStore that a lease needs."""

    def url(self, key: str) -> str:
        """As ObjectStore's, like the methods below."""

    def open_local(self, key: str) -> int | None: ...

    def head(self, key: str) -> ObjectStat: ...

    def get(self, key: str, *, length: int, etag: str | None = None) -> bytes: ...

    def put_bytes(
        self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat: ...

    def delete(self, keys: list[str]) -> None: ...


class _Found(NamedTuple):
    """The lock object as one read returned it."""

    state: LeaseState
    stat: ObjectStat


class Lease:
    """The lock object of one instance.

    ``etag`` and ``at`` are of the last ``acquire``, ``renew`` or ``prove``: the object's ETag, and the value of
    ``uptime()`` from which the lease holds. ``before``: the machine whose lease the last ``acquire`` took over, because
    it had run out and was not given back.
    """

    def __init__(self, store: LockStore, instance: uuid.UUID, holder: Holder, *, slug: str = "") -> None:
        self._store = store
        self._holder = Holder(_as_name(holder.handle), _as_name(holder.host), holder.machine)
        self._slug = slug or instance.hex
        self.key = f"{LOCK_FOLDER}{instance.hex}"
        self.etag = ""
        self.at = 0.0
        self.before: LeaseState | None = None

    def peek(self) -> LeaseState | None:
        """The machine that holds the lease, or the last one whose lease ran out; None: nobody had it, or it was given
        back."""
        found = self._read()
        return found.state if found is not None and found.state.machine else None

    def acquire(self, *, fence: int = 0, seconds: float | None = None) -> tuple[LeaseState, bool]:
        """Take the lease, or renew it when this machine has it. Returns it, and whether it was this machine's already.

        ``fence``: the highest number that this machine knows. ``seconds``: how long it holds; None: LEASE_SECONDS.
        Raises Locked while another machine holds the lease, and storage errors.
        """
        seconds = LEASE_SECONDS if seconds is None else seconds
        for _ in range(_TRIES):
            found = self._read()
            if found is not None and not self.is_ours(found.state) and not self._has_run_out(found):
                raise self._locked(found.state)
            ours = found is not None and self.is_ours(found.state)
            most = max(fence, found.state.fence if found is not None else 0)
            since = found.state.since if found is not None and ours else None
            wanted, at = self._wanted(most if ours else most + 1, seconds, since), uptime()
            try:
                stat = self._write(wanted, found)
            except (PreconditionFailed, ObjectChanged, ObjectMissing):
                continue  # another machine was quicker; look which
            after = self.peek()
            if after is not None and self.is_ours(after):
                self.etag, self.at = stat.etag, at
                self.before = found.state if found is not None and found.state.machine and not ours else None
                return after, ours
        state = self.peek()
        if state is not None and not self.is_ours(state):
            raise self._locked(state)
        raise StorageError(
            f"The lock of instance '{self._slug}' at {self._store.url(self.key)} changes all the time; look who writes"
            " it, and try again."
        )

    def renew(self, fence: int, seconds: float) -> LeaseState:
        """Renew the lease that this machine got with this number. Raises LeaseLost when this machine does not have it
        any more, and storage errors."""
        for _ in range(_TRIES):
            found = self._own(fence)
            wanted, at = self._wanted(fence, seconds, found.state.since), uptime()
            try:
                stat = self._write(wanted, found)
            except (PreconditionFailed, ObjectChanged, ObjectMissing):
                continue  # another process of this machine, or another machine
            self.etag, self.at = stat.etag, at
            return wanted
        raise StorageError(f"The lock at {self._store.url(self.key)} changes all the time; try again.")

    def prove(self, fence: int, etag: str) -> None:
        """Return when storage confirms the lease that this machine got with this number: one request when the lock
        object's ETag is still ``etag``. Raises LeaseLost, and storage errors."""
        try:
            if etag and self._store.head(self.key).etag == etag:
                return
        except ObjectMissing:
            pass
        self.etag = self._own(fence).stat.etag

    def release(self, *, forget: bool = False) -> None:
        """Give the lease back, if this machine has it. ``forget``: its number as well, because the instance is
        deleted."""
        for _ in range(_TRIES):
            found = self._read()
            if found is None or not (self.is_ours(found.state) or (forget and not found.state.machine)):
                return
            if forget:
                self._store.delete([self.key])
                return
            free = found.state._replace(machine="", token=secrets.token_hex(8), until=0.0, seconds=0.0)
            try:
                self._write(free, found)
                return
            except (PreconditionFailed, ObjectChanged, ObjectMissing):
                continue

    def _own(self, fence: int) -> _Found:
        found = self._read()
        if found is not None and self.is_ours(found.state) and found.state.fence == fence:
            return found
        state = None if found is None else found.state
        if state is None or not state.machine:
            who = "nobody has it now"
        elif self.is_ours(state):
            who = "another process of this machine has taken it anew"
        else:
            who = f"{state.handle} on {state.host} has it now"
        raise LeaseLost(
            f"This machine has lost the lock of '{self._slug}' ({who}), so nothing is written to"
            " storage; what is not stored stays on this machine."
        )

    def is_ours(self, state: LeaseState) -> bool:
        """Whether this machine has the lease, with any number."""
        return state.machine == self._holder.machine

    def _wanted(self, fence: int, seconds: float, since: float | None) -> LeaseState:
        now = time.time()
        token = secrets.token_hex(8)
        handle, host, machine = self._holder
        return LeaseState(handle, host, machine, token, now if since is None else since, now + seconds, fence, seconds)

    def _write(self, state: LeaseState, over: _Found | None) -> ObjectStat:
        body = json.dumps(state._asdict()).encode()
        if over is None:
            return self._store.put_bytes(self.key, body, if_none_match=True)
        return self._store.put_bytes(self.key, body, if_match=over.stat.etag)

    def _has_run_out(self, found: _Found) -> bool:
        state = found.state
        if not state.machine:
            return True
        if not state.seconds:
            return time.time() >= state.until
        return self._age(found) >= min(state.seconds, LEASE_SECONDS) + MARGIN

    def _age(self, found: _Found) -> float:
        """Seconds since the lock was written, by the storage's clock."""
        name = f"{self.key}.{config.temporary_name()}"  # a probe
        try:
            now = self._written(self._store.put_bytes(name, b"What time is it?"), ask=True)
        finally:
            self._store.delete([name])
        return (now - self._written(found.stat)) / 1e9

    def _written(self, stat: ObjectStat, *, ask: bool = False) -> int:
        """When an object was written, in nanoseconds of the storage's clock. ``ask``: ask storage, because the answer
        to a write does not tell."""
        fd = self._store.open_local(stat.key)
        if fd is None:
            return self._store.head(stat.key).mtime_ns if ask else stat.mtime_ns
        try:
            return os.fstat(fd).st_ctime_ns
        finally:
            os.close(fd)

    def _read(self) -> _Found | None:
        """The lock object; None: there is none."""
        for _ in range(_TRIES):
            try:
                found = self._store.head(self.key)
                if found.size > LOCK_BYTES:
                    return _Found(_NO_LOCK, found)
                # The size comes from storage and may be wrong: no more than this is read.
                return _Found(_parse(self._store.get(self.key, length=LOCK_BYTES, etag=found.etag)), found)
            except ObjectMissing:
                return None
            except ObjectChanged:
                continue
        raise StorageError(f"The lock at {self._store.url(self.key)} changes all the time; try again.")

    def _locked(self, state: LeaseState) -> Locked:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.since))
        who = f"The instance '{self._slug}' is locked by {state.handle} on {state.host} since {since}"
        if 0 < state.seconds <= MOUNT_SECONDS:
            return Locked(
                f"{who}, which has it mounted; unmount it there, or wait: a mount that has died keeps the lock for"
                f" {state.seconds:.0f} s."
            )
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.until))
        return Locked(f"{who}, until {until} at the latest; run 'lamfs close' there, or wait.")


_NO_LOCK = LeaseState("somebody", "unknown", "", "", 0.0, 0.0)


def _parse(body: bytes) -> LeaseState:
    try:
        data = parse_object(body, LOCK_BYTES)
        texts = [data[name] for name in ("handle", "host", "machine", "token")]
        times = [data[name] for name in ("since", "until")]
    except (ValueError, KeyError):
        return _NO_LOCK
    fence, seconds = data.get("fence", 0), data.get("seconds", 0)
    if not all(map(_is_name, texts)) or not all(is_number(value, 0, MAX_SINCE) for value in (*times, seconds)):
        return _NO_LOCK
    if not isinstance(fence, int) or not is_number(fence, 0, MAX_FENCE):
        return _NO_LOCK
    handle, host, machine, token = texts
    return LeaseState(handle, host, machine, token, float(times[0]), float(times[1]), fence, float(seconds))


def _is_name(text: object) -> bool:
    return isinstance(text, str) and len(text) <= MAX_TEXT and text.isprintable()


def _as_name(text: str) -> str:
    """A machine's name, as a lock can have it."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_TEXT])
