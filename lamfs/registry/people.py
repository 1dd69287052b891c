"""Users, storages, transforms and runs: the small tables beside the artifacts. Synchronous; the Database's thread."""

from __future__ import annotations

from typing import NamedTuple

from lamfs.model import storage_id
from lamfs.registry.db import Database


class User(NamedTuple):
    """A row of the user table. ``uid`` has 8 base62 characters."""

    id: int
    uid: str
    handle: str
    email: str | None
    name: str | None


class Storage(NamedTuple):
    """A row of the storage table. ``uid``: 12 base62 characters. ``uuid``: ``uuid5(NAMESPACE_URL, root)``."""

    id: int
    uid: str
    uuid: str
    root: str
    type: str
    region: str | None


class Transform(NamedTuple):
    """A notebook, script or pipeline that makes artifacts."""

    id: int
    uid: str
    name: str
    key: str | None
    type: str


class Run(NamedTuple):
    """One execution of a transform. Times in nanoseconds since the epoch."""

    id: int
    uid: str
    transform_id: int
    created_by_id: int | None
    started_at: int
    finished_at: int | None


class People:
    """Reads and writes the small tables of one Database.

    ``now``: the time of a change, in nanoseconds since the epoch. ``uid``: of what is new by it.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def ensure_user(self, uid: str, handle: str, email: str | None, name: str | None, *, now: int) -> User:
        """The user with that handle, inserted or updated."""
        self._db.execute(
            "INSERT INTO user(uid, handle, email, name, created_at) VALUES(?,?,?,?,?)"
            " ON CONFLICT(handle) DO UPDATE"
            " SET email=coalesce(excluded.email, email), name=coalesce(excluded.name, name)",
            (uid, handle, email, name, now),
        )
        found = self.user_by_handle(handle)
        assert found is not None
        return found

    def user_by_handle(self, handle: str) -> User | None:
        """A user by handle."""
        row = self._db.one("SELECT id, uid, handle, email, name FROM user WHERE handle=?", (handle,))
        return User(*row) if row else None

    def user(self, user_id: int | None) -> User | None:
        """A user by id."""
        row = self._db.one("SELECT id, uid, handle, email, name FROM user WHERE id=?", (user_id,))
        return User(*row) if row else None

    def ensure_storage(self, root: str, kind: str, region: str | None = None, *, uid: str, now: int) -> Storage:
        """The storage with that root, inserted if missing (``uid``: STORAGE_UID_LEN base62 characters)."""
        self._db.execute(
            "INSERT INTO storage(uid, uuid, root, type, region, created_at) VALUES(?,?,?,?,?,?)"
            " ON CONFLICT(root) DO NOTHING",
            (uid, storage_id(root).hex, root, kind, region, now),
        )
        row = self._db.one("SELECT id, uid, uuid, root, type, region FROM storage WHERE root=?", (root,))
        assert row is not None
        return Storage(*row)

    def move_storage(self, root: str) -> None:
        """Record that the default storage, which is the first one, is at another root now."""
        self._db.execute(
            "UPDATE storage SET root=?, uuid=? WHERE id=(SELECT min(id) FROM storage)", (root, storage_id(root).hex)
        )

    def storage(self, storage_row: int) -> Storage | None:
        """A storage by row id."""
        row = self._db.one("SELECT id, uid, uuid, root, type, region FROM storage WHERE id=?", (storage_row,))
        return Storage(*row) if row else None

    def ensure_transform(
        self, name: str, key: str | None, kind: str, user_id: int | None, *, uid: str, now: int
    ) -> Transform:
        """The transform with that key (its path or name), inserted if missing (``uid``: TRANSFORM_UID_LEN base62
        characters)."""
        with self._db.transaction():
            row = self._db.one("SELECT id, uid, name, key, type FROM transform WHERE key IS ? AND name=?", (key, name))
            if row is None:
                self._db.execute(
                    "INSERT INTO transform(uid, name, key, type, created_by_id, created_at, updated_at)"
                    " VALUES(?,?,?,?,?,?,?)",
                    (uid, name, key, kind, user_id, now, now),
                )
                row = self._db.one("SELECT id, uid, name, key, type FROM transform WHERE id=last_insert_rowid()")
            assert row is not None
            return Transform(*row)

    def transform(self, transform_id: int | None) -> Transform | None:
        """A transform by row id."""
        row = self._db.one("SELECT id, uid, name, key, type FROM transform WHERE id=?", (transform_id,))
        return Transform(*row) if row else None

    def start_run(self, transform_id: int, user_id: int | None, *, uid: str, now: int) -> Run:
        """Begin a run of a transform (``uid``: RUN_UID_LEN base62 characters)."""
        with self._db.transaction():
            self._db.execute(
                "INSERT INTO run(uid, transform_id, created_by_id, started_at) VALUES(?,?,?,?)",
                (uid, transform_id, user_id, now),
            )
            row = self._db.one(
                "SELECT id, uid, transform_id, created_by_id, started_at, finished_at FROM run"
                " WHERE id=last_insert_rowid()"
            )
            assert row is not None
            return Run(*row)

    def run(self, run_id: int | None) -> Run | None:
        """A run by row id."""
        row = self._db.one(
            "SELECT id, uid, transform_id, created_by_id, started_at, finished_at FROM run WHERE id=?", (run_id,)
        )
        return Run(*row) if row else None

    def counts(self) -> tuple[int, int, int]:
        """How many runs, transforms and users there are."""
        row = self._db.one(
            "SELECT (SELECT count(*) FROM run), (SELECT count(*) FROM transform), (SELECT count(*) FROM user)"
        )
        assert row is not None
        return row[0], row[1], row[2]

    def finish_run(self, run_id: int, *, now: int) -> None:
        """Record that a run has ended."""
        self._db.execute("UPDATE run SET finished_at=? WHERE id=?", (now, run_id))
