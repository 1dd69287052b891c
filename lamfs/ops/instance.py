"""One instance as a program uses it: its open parts (opened.py), and this machine's lease on it.

Synchronous; threads as in opened.py.
"""

from __future__ import annotations

import os

from lamfs.errors import ObjectMissing, StorageMissing
from lamfs.ops import held, kept, lock
from lamfs.ops.opened import Opened


class Instance(Opened):
    """Registry, store, cache and lease of one instance. Context manager: see Opened."""

    def hold(self) -> None:
        """Make sure that this machine holds the lease; cheap while no other machine can have taken it over.

        Every change calls this first; ``prove`` is called before storage loses something. The lease then stays with
        this machine until it is given back, even when a mount ends. Another machine's newer registry is pulled first,
        unless something here would be lost by that. Raises Locked, RegistryError, and storage errors.
        """
        self._refuse_empty_place()
        self.check_own()
        note = held.read(self.settings.directory)
        if note is None or note.renew_due or note.seconds < self.lease_seconds() or self.fence() != note.fence:
            self.take_lease()  # a mount that took it for a minute may have died since
        held.keep_long(self.settings.directory)

    def hold_for_mount(self) -> None:
        """As ``hold``, for a mount: storage is always asked, and when both machines have changes, both are kept. The
        lease runs out when the mount dies. It is given back when the mount ends, unless ``hold`` was called
        meanwhile."""
        self._refuse_empty_place()
        self.check_own()
        self.take_lease(keep_both=True, seconds=lock.MOUNT_SECONDS)

    def _refuse_empty_place(self) -> None:
        """Refuse to write to the empty folder at which the storage's disk is mounted at other times.

        The registry's copy tells: this machine stored one there, and it is gone. Raises StorageMissing.
        """
        memory = self.settings.directory / "snapshot.json"
        if not memory.exists():
            return
        try:
            copy = self.store.open_local(self.settings.snapshot_key)
        except (ObjectMissing, StorageMissing) as error:
            if isinstance(error, ObjectMissing) and kept.traces(self.store, self.settings.id):
                return  # it is the storage, without its registry; the next push stores that again
            name = self.store.url(self.settings.snapshot_key)
            raise StorageMissing(
                f"The folder {self.settings.storage.root} is not the storage of '{self.settings.slug}' as it was left:"
                f" {name} is not there. Mount its disk; if the file was deleted on purpose, delete {memory} as well."
            ) from None
        if copy is not None:
            os.close(copy)

    def take_lease(self, *, catch_up: bool = True, keep_both: bool = False, seconds: float | None = None) -> bool:
        """Acquire or renew the lease now. Returns whether it is new to this machine. Raises what ``hold`` raises.

        ``catch_up``: take over what another machine pushed meanwhile. ``keep_both``: also when this machine has
        changes, see snapshot.catch_up. ``seconds``: how long the lease holds, unless this machine has it for longer
        already.
        """
        directory = self.settings.directory
        note = held.read(directory)
        lease = self.lease()
        seconds = self.lease_seconds() if seconds is None else seconds
        known = max(0 if note is None else note.fence, self.fence())
        if note is not None and note.holds:
            seconds = max(seconds, note.seconds)
        state, ours = lease.acquire(fence=known, seconds=seconds)
        # Also true when a process of this machine died between taking the lease and noting it in the registry.
        new = not ours or note is None or note.fence != state.fence or self.fence() != state.fence
        if self.settings.registry_path.exists():
            if catch_up and new:
                from lamfs.ops import snapshot

                try:
                    snapshot.catch_up(self, keep_both=keep_both)
                except BaseException:
                    if not ours:  # a lease that was ours already stays: a mount of this machine may need it
                        self.release_lease()
                    raise
            if catch_up and self.fence() != state.fence:
                self.registry.file.begin_lease(state.fence)
        held.write(directory, state.fence, seconds, lease)
        self._proven = lease.at
        if lease.before is not None:
            from lamfs.ops import messages, unreturned

            sentence = unreturned.note(self.settings, self.store, lease.before)
            self.notices.append(sentence)
            messages.warn(sentence)
        if not ours:
            from lamfs.ops import spools

            spools.tell(self.settings, self.notices)
        return not ours
