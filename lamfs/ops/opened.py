"""The open parts of one instance in a process: registry, store and cache. Synchronous.

Threads may share it: each gets its own registry connection and cache index. After fork(2) the child opens everything
anew. What processes of this machine share is in files of ``settings.directory``: the lock of in_use.py, and held.py's
notes of the lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lamfs import config, scratch
from lamfs.config import InstanceSettings
from lamfs.errors import DamagedRegistry, LamfsError, LeaseLost, Locked, RegistryError
from lamfs.model import now_ns
from lamfs.ops import held, in_use, lock, written
from lamfs.ops.lock import Holder, Lease, LockStore
from lamfs.processes import uptime
from lamfs.storage import ObjectStore, open_store

if TYPE_CHECKING:
    from lamfs.cache.index import CacheIndex
    from lamfs.registry import Registry, User

PROVEN_SECONDS = 1.0
"""Seconds for which storage's answer about the lease is believed, while it holds by this machine's clock."""


_OF_DAMAGE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""Errors that Python raises when a value has a kind that it never had before."""


class Opened:
    """Registry, store and cache of one instance, each opened when it is first used.

    ``store``: one to use; it stays open at the end. Context manager: closes the leaving thread's connections, and the
    store.
    """

    def __init__(self, settings: InstanceSettings, *, store: ObjectStore | None = None) -> None:
        self.settings = settings
        self._given_store = store
        self.notices: list[str] = []
        """Sentences for the user about what was noticed on the way."""
        self._guard = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._store = self._given_store
        self._thread = threading.local()
        self._in_use: int | None = None
        self._generation = 0  # counts working copies: one more for each ``alone``
        self._proven = float("-inf")
        self._users: dict[str, User] = {}

    @classmethod
    def open(cls, slug: str | None = None) -> Self:
        """Open the instance of a slug; None: the current one. Raises NotSetUp, and RegistryError when it is damaged."""
        instance = cls(config.load_instance(slug))
        _ = instance.registry
        return instance

    def _own(self) -> None:
        """Forget what the parent opened, after a fork: it belongs to the parent."""
        if self._pid != os.getpid():
            self._guard = threading.Lock()
            self._reset()

    @property
    def registry(self) -> Registry:
        """The calling thread's connection to the registry. Raises NotSetUp, DamagedRegistry, RegistryError."""
        self._own()
        found: Registry | None = getattr(self._thread, "registry", None)
        if found is not None and self._thread.generation != self._generation:
            # Another thread was in ``alone`` meanwhile: this connection may be to a registry that was put aside.
            del self._thread.registry
            found.close()
            found = None
        if found is None:
            self._thread.generation = self._generation
            self._hold_directory()
            found = self._thread.registry = written.open_registry(
                self.settings, scratch=scratch.matcher(config.scratch_names())
            )
        return found

    def refuse_damaged(self) -> None:
        """Raise DamagedRegistry or RegistryError unless the working copy is whole, or there never was one. Called
        before anything is asked of the storage, or written."""
        if self.settings.registry_path.exists() or written.had_one(self.settings):
            _ = self.registry

    def _hold_directory(self) -> None:
        with self._guard:
            if self._in_use is None:
                written.refuse_missing(self.settings)
                self._in_use = in_use.take(self.settings, fcntl.LOCK_SH)

    @property
    def store(self) -> ObjectStore:
        """The default storage. It is opened once, and threads share it."""
        self._own()
        with self._guard:
            if self._store is None:
                self._store = open_store(self.settings.storage)
            return self._store

    @property
    def cache_dir(self) -> Path:
        """The cache directory of this machine."""
        return config.cache_dir()

    @property
    def cache_index(self) -> CacheIndex:
        """The calling thread's cache index."""
        self._own()
        found: CacheIndex | None = getattr(self._thread, "index", None)
        if found is None:
            from lamfs.cache.index import CacheIndex

            found = self._thread.index = CacheIndex(self.cache_dir)
        return found

    def user(self) -> User | None:
        """The registry's row of the current user, made when missing."""
        user = config.current_user()
        found = self._users.get(user.handle)
        if found is None:
            registry = self.registry
            found = registry.people.user_by_handle(user.handle)
            if found is None or (user.email, user.name) != (found.email, found.name):
                found = registry.people.ensure_user(user.uid, user.handle, user.email, user.name, now=now_ns())
            self._users[user.handle] = found
        return found

    # -- the lease ----------------------------------------------------------------------------------------------

    def lease(self, store: LockStore | None = None) -> Lease:
        """The lock object of this instance in storage. ``store``: how it is reached; None: through the instance's own
        store."""
        holder = Holder(config.current_user().handle, socket.gethostname(), config.machine_token())
        return Lease(store or self.store, self.settings.id, holder, slug=self.settings.slug)

    def prove(self) -> None:
        """Return when storage confirms that this machine has the lease. Called before the registry is pushed, before
        objects are deleted, and before objects are replaced that other machines may use.

        Raises LeaseLost when another machine has it, and storage errors.
        """
        directory = self.settings.directory
        note = held.read(directory)
        if note is not None and note.holds and uptime() - self._proven < PROVEN_SECONDS:
            return
        lease = self.lease()
        try:
            if note is None:
                raise LeaseLost(
                    f"This machine does not hold the lock of '{self.settings.slug}', so nothing is written to storage;"
                    f" run 'lamfs connect {self.settings.slug}'."
                )
            now = uptime()
            if note.renew_due:
                seconds = self.lease_seconds()
                lease.renew(note.fence, seconds)
                held.write(directory, note.fence, seconds, lease)
            else:
                lease.prove(note.fence, note.etag)
        except LeaseLost:
            held.forget(directory)
            raise
        self._proven = now

    def lease_seconds(self) -> float:
        """Seconds for which a lease is taken now: short while a mount lives, which renews it."""
        from lamfs.ops import mounts

        return lock.MOUNT_SECONDS if mounts.is_written(self.settings) else lock.LEASE_SECONDS

    def check_own(self) -> None:
        """Raise RegistryError unless the working copy is of the instance and storage that the settings name."""
        settings = self.settings
        slug, _, root = self.registry.file.about()
        if root is None:  # an older lamfs made it, and did not note this
            root = settings.storage.root
            self.registry.file.move_to(root)
        if (slug, root) != (settings.registry_slug, settings.storage.root):
            raise RegistryError(
                f"The working copy {settings.registry_path} is of the instance '{slug}' in {root}, not of"
                f" '{settings.registry_slug}' in {settings.storage.root}, so nothing is changed; run 'lamfs connect"
                f" {settings.storage.root}'."
            )

    def fence(self) -> int:
        """The number of the lease under which the working copy was changed last; 0: it has none."""
        if not self.settings.registry_path.exists():
            return 0
        try:
            return self.registry.file.fence() or 0
        except RegistryError:
            return 0

    def release_lease(self, *, forget: bool = False) -> None:
        """Give the lease back. ``forget``: see Lease.release."""
        held.forget(self.settings.directory)
        self.lease().release(forget=forget)

    @contextlib.contextmanager
    def alone(self, purpose: str) -> Iterator[None]:
        """Make sure that no process of this machine has the registry open inside the block. This thread's connection is
        closed. Other threads of this process open theirs anew when they use it next.

        Raises Locked when another process, or another Opened, has it open, and does not only look into it for a moment.
        """
        self.close_thread()
        with self._guard:
            self._generation += 1
            if self._in_use is not None:
                os.close(self._in_use)
                self._in_use = None
        try:
            fd = in_use.take(self.settings, fcntl.LOCK_EX, in_use.ALONE_SECONDS)
        except BlockingIOError:
            raise Locked(
                f"The instance '{self.settings.slug}' is in use by another program on this machine, so it cannot be"
                f" {purpose}; close notebooks and mounts that use it, and try again."
            ) from None
        try:
            yield
        finally:
            os.close(fd)

    # -- the end ------------------------------------------------------------------------------------------------

    def close_thread(self) -> None:
        """Close the calling thread's connections."""
        for name in ("registry", "index"):
            thing = getattr(self._thread, name, None)
            if thing is not None:
                delattr(self._thread, name)
                if name == "registry" and thing.file.is_changed():
                    with contextlib.suppress(LamfsError):
                        written.note(self.settings, thing)
                thing.close()

    def close(self) -> None:
        """Close the calling thread's connections and the store. Those of other threads end with their threads."""
        self._own()
        self.close_thread()
        with self._guard:
            if self._store is not None and self._given_store is None:
                self._store.close()
                self._store = None
            if self._in_use is not None:
                os.close(self._in_use)
                self._in_use = None
            self._users.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and isinstance(error, _OF_DAMAGE) and not isinstance(error, LamfsError):
                self._blame_damage(error)
        finally:
            self.close()

    def _blame_damage(self, error: BaseException) -> None:
        """Raise DamagedRegistry when an unexpected error comes of values that were changed on the disk."""
        registry: Registry | None = getattr(self._thread, "registry", None)
        if registry is not None:
            try:
                registry.file.check_values()
            except DamagedRegistry as damaged:
                raise damaged from error

    def __del__(self) -> None:
        if getattr(self, "_in_use", None) is not None and self._pid == os.getpid():
            with contextlib.suppress(OSError):
                os.close(self._in_use)  # type: ignore[arg-type]
