"""The lease that one machine holds on an instance: an object in storage. Synchronous; one Lease object per thread.

``{root}/.lamindb/_exclusion/{instance id hex}``, JSON ``{handle, host, machine, token, since, until}``, times in
seconds since the epoch. Made with ``If-None-Match: *``, renewed and taken over with ``If-Match``; taken over from
another machine only when it has run out. Anything else that lies there counts as a lock that has run out. ``machine``
is config.machine_token(): all processes that share a data directory share the lease. After every write the object is
read back, so that a storage that ignores conditions is noticed by all but one of those who race for it, if they do not
race within the same instant.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from typing import NamedTuple, Protocol

from lamfs.errors import Locked, ObjectChanged, ObjectMissing, PreconditionFailed, StorageError
from lamfs.jsontext import is_number, parse_object
from lamfs.model import AUTO_KEY_PREFIX
from lamfs.storage.base import ObjectStat

LEASE_SECONDS = 24 * 3600.0
RENEW_AFTER = 3600.0
"""A lease older than this is renewed by whatever command or mount comes next."""
LOCK_BYTES = 64 << 10
"""Bytes of a lock object; ours have some 200."""
MAX_TEXT = 255
"""Characters of a name in a lock."""
_END = 253_370_764_800.0
"""The year 9999 begins, in seconds since the epoch: Python and the C library can print what comes before."""
_TRIES = 8


class Holder(NamedTuple):
    """Who asks for a lease."""

    handle: str
    host: str
    machine: str


class LeaseState(NamedTuple):
    """What the lock object says. ``since`` and ``until`` in seconds since the epoch."""

    handle: str
    host: str
    machine: str
    token: str
    since: float
    until: float

    @property
    def expired(self) -> bool:
        """Whether it has run out by this machine's clock."""
        return time.time() >= self.until

    @property
    def renew_due(self) -> bool:
        """Whether it should be renewed now: also when it runs longer than any lease does, for the clock was set."""
        return not LEASE_SECONDS - RENEW_AFTER < self.until - time.time() <= LEASE_SECONDS


class LockStore(Protocol):
    """What a lease needs of an ObjectStore."""

    def url(self, key: str) -> str:
        """As ObjectStore's, like all of these."""

    def head(self, key: str) -> ObjectStat: ...

    def get(self, key: str, *, length: int, etag: str | None = None) -> bytes: ...

    def put_bytes(
        self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat: ...

    def delete(self, keys: list[str]) -> None: ...


class Lease:
    """The lock object of one instance."""

    def __init__(self, store: LockStore, instance: uuid.UUID, holder: Holder, *, slug: str = "") -> None:
        self._store = store
        self._holder = Holder(_as_name(holder.handle), _as_name(holder.host), holder.machine)
        self._slug = slug or instance.hex
        self.key = f"{AUTO_KEY_PREFIX}_exclusion/{instance.hex}"

    def peek(self) -> LeaseState | None:
        """Who holds it now; None: nobody. An object that cannot be read counts as run out."""
        found = self._read()
        return found[0] if found else None

    def acquire(self) -> tuple[LeaseState, bool]:
        """Take the lease, or renew it when this machine has it. Returns it, and whether it was this machine's already.

        Raises Locked while another machine holds it, and storage errors.
        """
        for _ in range(_TRIES):
            found = self._read()
            if found is not None and not self._ours(found[0]) and not found[0].expired:
                raise self._locked(found[0])
            now = time.time()
            ours = found is not None and self._ours(found[0])
            since = found[0].since if found is not None and ours else now
            wanted = LeaseState(
                self._holder.handle,
                self._holder.host,
                self._holder.machine,
                secrets.token_hex(8),
                since,
                now + LEASE_SECONDS,
            )
            body = json.dumps(wanted._asdict()).encode()
            try:
                if found is None:
                    self._store.put_bytes(self.key, body, if_none_match=True)
                else:
                    self._store.put_bytes(self.key, body, if_match=found[1])
            except (PreconditionFailed, ObjectChanged, ObjectMissing):
                continue  # somebody was quicker: look who
            after = self.peek()
            if after is not None and self._ours(after):
                return after, ours
        state = self.peek()
        if state is not None and not self._ours(state):
            raise self._locked(state)
        raise StorageError(
            f"The lock of instance '{self._slug}' at {self._store.url(self.key)} changes all the time; look who writes"
            " it, and try again."
        )

    def release(self) -> None:
        """Give the lease up; nothing happens when it is not this machine's."""
        state = self.peek()
        if state is not None and self._ours(state):
            self._store.delete([self.key])

    def _ours(self, state: LeaseState) -> bool:
        return state.machine == self._holder.machine

    def _read(self) -> tuple[LeaseState, str] | None:
        """The lock object and its ETag, of one and the same write."""
        for _ in range(_TRIES):
            try:
                found = self._store.head(self.key)
                if found.size > LOCK_BYTES:
                    return _NO_LOCK, found.etag
                # Whatever the size is said to be, no more is read.
                return _parse(self._store.get(self.key, length=LOCK_BYTES, etag=found.etag)), found.etag
            except ObjectMissing:
                return None
            except ObjectChanged:
                continue
        raise StorageError(f"The lock at {self._store.url(self.key)} changes all the time; try again.")

    def _locked(self, state: LeaseState) -> Locked:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.since))
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.until))
        return Locked(
            f"The instance '{self._slug}' is locked by {state.handle} on {state.host} since {since}, until {until} at"
            " the latest; run 'lamfs close' there, or wait."
        )


_NO_LOCK = LeaseState("somebody", "unknown", "", "", 0.0, 0.0)


def moment(value: object) -> float:
    """A time of a lease, in seconds since the epoch; 0 when the value from JSON is not such a time."""
    return float(value) if is_number(value, 0, _END) else 0.0  # type: ignore[arg-type]


def _parse(body: bytes) -> LeaseState:
    try:
        data = parse_object(body, LOCK_BYTES)
        texts = [data[name] for name in ("handle", "host", "machine", "token")]
        times = [data[name] for name in ("since", "until")]
    except (ValueError, KeyError):
        return _NO_LOCK
    if not all(map(_is_name, texts)) or not all(is_number(time_, 0, _END) for time_ in times):
        return _NO_LOCK
    return LeaseState(*texts, *map(float, times))


def _is_name(text: object) -> bool:
    return isinstance(text, str) and len(text) <= MAX_TEXT and text.isprintable()


def _as_name(text: str) -> str:
    """What a machine is called, as a lock can say it."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_TEXT])
