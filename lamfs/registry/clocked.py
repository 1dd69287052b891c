"""The verbs of a command, which happen when it is run: what a caller does not say comes from the clock, or is random.

The verbs themselves take every time and every new uid as an argument, so that one and the same change can be tried
again, or be made by a server. Whoever acts for another (the mount: for a program) says them. ``now``: nanoseconds since
the epoch; None: the present time. A uid of None: a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lamfs.keys import spool_token
from lamfs.model import (
    RUN_UID_LEN,
    STORAGE_UID_LEN,
    TRANSFORM_UID_LEN,
    ArtifactRecord,
    ContentHash,
    Inode,
    Revision,
    new_uid,
    now_ns,
)
from lamfs.registry.artifacts import Provenance
from lamfs.registry.commits import Commits, Committed
from lamfs.registry.entries import Put
from lamfs.registry.file import RegistryFile
from lamfs.registry.identity import Removed
from lamfs.registry.namespace import Backup, Namespace, Renamed
from lamfs.registry.people import People, Run, Storage, Transform, User
from lamfs.registry.replay import Replay
from lamfs.registry.rescue import Lost, Rescue
from lamfs.registry.upkeep import Displaced, Upkeep

if TYPE_CHECKING:
    from lamfs.config import UserSettings


def new_origin() -> str:
    """What the change-log rows of one registry object are marked with: random."""
    return new_uid(12)


def _at(now: int | None) -> int:
    return now_ns() if now is None else now


class ClockedNames(Namespace):
    """Namespace with the time and the uids that a caller leaves out."""

    def create(
        self,
        parent: int,
        name: str,
        mode: int,
        uid: int,
        gid: int,
        *,
        now: int | None = None,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> Inode:
        """Namespace.create."""
        return super().create(parent, name, mode, uid, gid, now=_at(now), rdev=rdev, target=target)

    def create_file(
        self,
        parent: int,
        name: str,
        mode: int,
        uid: int,
        gid: int,
        *,
        now: int | None = None,
        artifact_uid: str | None = None,
        token: str | None = None,
        key_is_virtual: bool = True,
        backup: Backup | None = None,
    ) -> tuple[Inode, str]:
        """Namespace.create_file."""
        return super().create_file(
            parent, name, mode, uid, gid, now=_at(now), artifact_uid=artifact_uid or new_uid(),
            token=token or spool_token(), key_is_virtual=key_is_virtual, backup=backup,
        )  # fmt: skip

    def link(self, ino: int, parent: int, name: str, *, now: int | None = None) -> Inode:
        """Namespace.link."""
        return super().link(ino, parent, name, now=_at(now))

    def ensure_directory(self, key: str, uid: int, gid: int, *, now: int | None = None) -> int:
        """Namespace.ensure_directory."""
        return super().ensure_directory(key, uid, gid, now=_at(now))

    def unlink(
        self,
        parent: int,
        name: str,
        *,
        now: int | None = None,
        left: Callable[[int], tuple[int, str] | None] = lambda ino: None,
        is_copy: Callable[[int], bool] = lambda ino: False,
    ) -> Removed:
        """Namespace.unlink."""
        return super().unlink(parent, name, now=_at(now), left=left, is_copy=is_copy)

    def rmdir(self, parent: int, name: str, *, now: int | None = None) -> Removed:
        """Namespace.rmdir."""
        return super().rmdir(parent, name, now=_at(now))

    def rename(
        self,
        parent: int,
        name: str,
        new_parent: int,
        new_name: str,
        *,
        now: int | None = None,
        noreplace: bool = False,
        backup: Backup | None = None,
        copy_uid: str | None = None,
    ) -> Renamed:
        """Namespace.rename."""
        if backup is not None and copy_uid is None:
            copy_uid = new_uid()
        return super().rename(
            parent, name, new_parent, new_name, now=_at(now), noreplace=noreplace, backup=backup, copy_uid=copy_uid
        )

    def exchange(
        self, parent: int, name: str, other_parent: int, other_name: str, *, now: int | None = None
    ) -> tuple[Inode, Inode]:
        """Namespace.exchange."""
        return super().exchange(parent, name, other_parent, other_name, now=_at(now))

    def rename_artifact(self, uid: str, key: str, *, now: int | None = None) -> None:
        """Namespace.rename_artifact."""
        super().rename_artifact(uid, key, now=_at(now))

    def edit_artifact(
        self,
        uid: str,
        *,
        now: int | None = None,
        key: str | None,
        description: str | None,
        run_id: int | None,
        transform_id: int | None,
    ) -> None:
        """Namespace.edit_artifact."""
        super().edit_artifact(
            uid, now=_at(now), key=key, description=description, run_id=run_id, transform_id=transform_id
        )

    def trash(self, uid: str, *, now: int | None = None) -> list[Removed]:
        """Namespace.trash."""
        return super().trash(uid, now=_at(now))

    def restore(self, uid: str, key: str | None = None, *, now: int | None = None) -> ArtifactRecord:
        """Namespace.restore."""
        return super().restore(uid, key, now=_at(now))

    def purge(self, uid: str, *, now: int | None = None, storage: bool = True) -> ArtifactRecord:
        """Namespace.purge."""
        return super().purge(uid, now=_at(now), storage=storage)


class ClockedCommits(Commits):
    """Commits with the time that a caller leaves out."""

    def put(
        self,
        ino: int,
        gen: int,
        content: ContentHash,
        object_key: str,
        etag: str,
        origin: Provenance,
        *,
        now: int | None = None,
        taken: str | None = None,
        row: int | None = None,
    ) -> Committed:
        """Commits.put."""
        return super().put(ino, gen, content, object_key, etag, origin, now=_at(now), taken=taken, row=row)

    def save(
        self, entry_id: int, record: ArtifactRecord, etag: str, *, mode: int, uid: int, gid: int, now: int | None = None
    ) -> ArtifactRecord:
        """Commits.save."""
        return super().save(entry_id, record, etag, mode=mode, uid=uid, gid=gid, now=_at(now))

    def adopt(
        self, before: ArtifactRecord, revision: Revision, number: int, *, mtime_ns: int, now: int | None = None
    ) -> bool:
        """Commits.adopt."""
        return super().adopt(before, revision, number, mtime_ns=mtime_ns, now=_at(now))


class ClockedRescue(Rescue):
    """Rescue with the time and the uids that a caller leaves out."""

    def folder(self, *, now: int | None = None) -> int:
        """Rescue.folder."""
        return super().folder(now=_at(now))

    def free_name(self, wanted: str, *, now: int | None = None) -> str:
        """Rescue.free_name."""
        return super().free_name(wanted, now=_at(now))

    def keep_file(
        self,
        name: str,
        *,
        src: str,
        size: int,
        mtime_ns: int,
        now: int | None = None,
        spare_uid: str | None = None,
        mode: int = 0o600,
        owner: tuple[int, int] | None = None,
        artifact_uid: str | None = None,
        description: str | None = None,
    ) -> str:
        """Rescue.keep_file."""
        return super().keep_file(
            name, src=src, size=size, mtime_ns=mtime_ns, now=_at(now), spare_uid=spare_uid or new_uid(), mode=mode,
            owner=owner, artifact_uid=artifact_uid, description=description,
        )  # fmt: skip

    def keep_object(
        self,
        names: Sequence[str],
        record: ArtifactRecord,
        *,
        mtime_ns: int,
        now: int | None = None,
        spare_uid: str | None = None,
        mode: int = 0o600,
        instead: tuple[ArtifactRecord, str] | None = None,
    ) -> str | None:
        """Rescue.keep_object."""
        return super().keep_object(
            names, record, mtime_ns=mtime_ns, now=_at(now), spare_uid=spare_uid or new_uid(), mode=mode, instead=instead
        )

    def name_again(self, ino: int, *, now: int | None = None) -> str:
        """Rescue.name_again."""
        return super().name_again(ino, now=_at(now))

    def name_nameless(self, *, now: int | None = None) -> list[tuple[int, str]]:
        """Rescue.name_nameless."""
        return super().name_nameless(now=_at(now))

    def give_back(self, name: str, scratch: Inode, *, now: int | None = None) -> bool:
        """Rescue.give_back."""
        return super().give_back(name, scratch, now=_at(now))

    def give_up(self, row: int, *, now: int | None = None, note: bool = True) -> Lost | None:
        """Rescue.give_up."""
        return super().give_up(row, now=_at(now), note=note)


class ClockedUpkeep(Upkeep):
    """Upkeep with the time that a caller leaves out."""

    def strike_off(self, entry: Put, *, now: int | None = None) -> bool:
        """Upkeep.strike_off."""
        return super().strike_off(entry, now=_at(now))

    def bring_back(
        self,
        record: ArtifactRecord,
        *,
        now: int | None = None,
        author: User | None,
        displaced: Displaced | None,
        uid: int,
        gid: int,
    ) -> None:
        """Upkeep.bring_back."""
        super().bring_back(record, now=_at(now), author=author, displaced=displaced, uid=uid, gid=gid)


class ClockedFile(RegistryFile):
    """RegistryFile with the time and the uids that a caller leaves out."""

    def set_up(
        self,
        slug: str,
        *,
        now: int | None = None,
        storage_uid: str | None = None,
        root: str,
        kind: str,
        region: str | None,
        user: UserSettings,
    ) -> None:
        """RegistryFile.set_up."""
        uid = storage_uid or new_uid(STORAGE_UID_LEN)
        super().set_up(slug, now=_at(now), storage_uid=uid, root=root, kind=kind, region=region, user=user)


class ClockedPeople(People):
    """People with the time and the uids that a caller leaves out."""

    def ensure_user(
        self, uid: str, handle: str, email: str | None, name: str | None, *, now: int | None = None
    ) -> User:
        """People.ensure_user."""
        return super().ensure_user(uid, handle, email, name, now=_at(now))

    def ensure_storage(
        self, root: str, kind: str, region: str | None = None, *, uid: str | None = None, now: int | None = None
    ) -> Storage:
        """People.ensure_storage."""
        return super().ensure_storage(root, kind, region, uid=uid or new_uid(STORAGE_UID_LEN), now=_at(now))

    def ensure_transform(
        self,
        name: str,
        key: str | None,
        kind: str,
        user_id: int | None,
        *,
        uid: str | None = None,
        now: int | None = None,
    ) -> Transform:
        """People.ensure_transform."""
        return super().ensure_transform(name, key, kind, user_id, uid=uid or new_uid(TRANSFORM_UID_LEN), now=_at(now))

    def start_run(
        self, transform_id: int, user_id: int | None, *, uid: str | None = None, now: int | None = None
    ) -> Run:
        """People.start_run."""
        return super().start_run(transform_id, user_id, uid=uid or new_uid(RUN_UID_LEN), now=_at(now))

    def finish_run(self, run_id: int, *, now: int | None = None) -> None:
        """People.finish_run."""
        super().finish_run(run_id, now=_at(now))


class ClockedReplay(Replay):
    """Replay with the time that a caller leaves out."""

    def undo(self, now: int | None = None) -> None:
        """Replay.undo."""
        super().undo(_at(now))
