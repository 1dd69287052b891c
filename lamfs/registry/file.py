"""A registry as one file: which instance it is of, what it comes from, and copies of it. The Database's thread.

Each method that changes something is one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lamfs.errors import DamagedRegistry
from lamfs.registry.changes import ChangeLog
from lamfs.registry.db import Database
from lamfs.registry.journal import Journal
from lamfs.registry.origins import FENCE, PUSHES, PUSHES_KEPT, SOURCE, About, pushes_of
from lamfs.registry.people import People

if TYPE_CHECKING:
    from lamfs.config import UserSettings


class RegistryFile:
    """Reads and writes what one registry says of itself."""

    def __init__(self, db: Database, people: People, journal: Journal, changes: ChangeLog) -> None:
        self._db = db
        self._people = people
        self._journal = journal
        self._changes = changes

    # -- which instance -----------------------------------------------------------------------------------------

    def set_up(
        self,
        slug: str,
        *,
        now: int,
        storage_uid: str,
        root: str,
        kind: str,
        region: str | None,
        user: UserSettings,
    ) -> None:
        """Write the first rows of a new registry: the instance ``slug``, its default storage, and its first user.

        ``root``, ``kind``, ``region`` and ``storage_uid`` are the storage's. Afterwards all is in the file itself, and
        its log is empty.
        """
        with self._db.transaction():
            self._db.set_meta("slug", slug)
            storage = self._people.ensure_storage(root, kind, region, uid=storage_uid, now=now)
            self._db.set_meta("uid", storage.uid)
            self._db.set_meta("root", storage.root)
            self._people.ensure_user(user.uid, user.handle, user.email, user.name, now=now)
        self.fold_log()

    def about(self) -> About:
        """The instance of this registry."""
        names = "slug", "uid", "root"
        values = dict(self._db.all("SELECT key, value FROM meta WHERE key IN (?, ?, ?)", names))
        found = [values.get(name) for name in names]
        return About(*(value if isinstance(value, str) else None for value in found))

    def move_to(self, root: str) -> None:
        """Note that the default storage is at another root."""
        with self._db.transaction():
            self._db.set_meta("root", root)
            self._people.move_storage(root)

    # -- what it comes from -------------------------------------------------------------------------------------

    def fence(self) -> int | None:
        """The number of the lease under which this registry was changed last; None: it says none."""
        value = self._db.get_meta(FENCE)
        return value if isinstance(value, int) else None

    def begin_lease(self, fence: int) -> None:
        """Note that this machine changes the registry under the lease ``fence`` from now on.

        Another machine may have written the objects that the journal claims: the claims are doubted.
        """
        with self._db.transaction():
            self._journal.doubt_claims()
            self._db.set_meta(FENCE, fence)

    def source(self) -> str | None:
        """ETag of the copy in storage that this registry was made of; None: it was made here, or does not say."""
        value = self._db.get_meta(SOURCE)
        return value if isinstance(value, str) else None

    def made_of(self, etag: str) -> None:
        """Note the ETag of the copy in storage that this registry was made of."""
        self._db.set_meta(SOURCE, etag)

    def pushes(self) -> tuple[str, ...]:
        """Names of the pushes that this registry comes from, or replaces, the newest first; see Origin."""
        return pushes_of(self._db.get_meta(PUSHES))

    def add_pushes(self, names: Iterable[str]) -> None:
        """Note that this registry comes from these pushes, too."""
        with self._db.transaction():
            found = list(dict.fromkeys([*names, *self.pushes()]))
            self._db.set_meta(PUSHES, json.dumps(found[:PUSHES_KEPT]))

    def supersede(self, pushes: Iterable[str], changes: int) -> None:
        """Make this registry the successor of these pushes: it counts on from ``changes`` changes, or more."""
        with self._db.transaction():
            self.add_pushes(pushes)
            self._changes.reach(changes)

    # -- state and copies ---------------------------------------------------------------------------------------

    def mark(self) -> str:
        """A text that differs after every change that is worth a push."""
        return ":".join(map(str, (self._changes.last(), *self._people.counts())))

    def is_changed(self) -> bool:
        """Whether this connection has changed a row since it was opened."""
        return self._db.changes() > 0

    def copy_to(self, target: Path, *, push: str) -> None:
        """Write a consistent, compact copy to ``target``, a new file of mode 0600, as the push of that name.

        The change log is trimmed first. Raises RegistryError.
        """
        with self._db.transaction():
            self.add_pushes([push])
            self._changes.trim()
        self._db.snapshot(target)

    def fold_log(self) -> None:
        """Write all that is in the log into the file, and empty the log: the file alone is the registry then."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # -- damage -------------------------------------------------------------------------------------------------

    def check_values(self) -> None:
        """Raise DamagedRegistry when a value cannot be what was written. Reads the whole file."""
        self._db.check_values()

    def damaged(self, what: str) -> DamagedRegistry:
        """The error that says what is wrong with this file, in the words ``what``, and names the way back."""
        return self._db.damaged(what)
