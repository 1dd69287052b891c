"""The verbs of the registry: what the mount, the CLI and the Python API do to names, artifacts and revisions.

These protocols are the interface behind which a registry lives. ``Registry`` is the one of today, an SQLite file; one
on a server fits behind the same verbs. So each changing verb

- is one transaction, with its change-log rows: it happens as a whole, or an exception says that nothing has changed;
- gets all that is random or timed as an argument (``now``, the uids of what is new), or returns it (inode numbers):
  the same call can be tried again after a conflict, and be carried out elsewhere;
- looks at nothing but the registry: no file, no object, no clock.

Inode numbers are the registry's, names are checked already (keys.check_name), times are nanoseconds since the epoch.
``now`` is when it happens; the times that POSIX asks for (POSIX.1-2024, XSH, "File Times Update") are set to it.
Errors: FsError with the errno of the system call; NotFound, AlreadyExists, InvalidName, InvalidArgument with a sentence
for a person; RegistryError from any verb when the registry itself fails.

The journal, the spool files and the multipart uploads are this machine's own work (``Registry.journal``,
``partial_spools``, ``uploads``, ``seals``, ``replay``), and no part of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lamfs.errors import DamagedRegistry
from lamfs.model import ArtifactRecord, ContentHash, Dentry, Inode, ObjectMeta, Revision
from lamfs.registry.artifacts import Provenance
from lamfs.registry.aside import Told
from lamfs.registry.changes import Change
from lamfs.registry.commits import Announced, Committed, Conflict, NewObject, Stored
from lamfs.registry.consistency import FileFlaws, Flaw
from lamfs.registry.db import Database
from lamfs.registry.entries import Owed, Put
from lamfs.registry.identity import Removed
from lamfs.registry.namespace import Backup, Renamed
from lamfs.registry.origins import About
from lamfs.registry.partial_spools import Ranges
from lamfs.registry.people import Run, Storage, Transform, User
from lamfs.registry.rescue import Lost
from lamfs.registry.tree import NEWEST
from lamfs.registry.upkeep import Displaced
from lamfs.registry.writes import Acknowledged, Begun, SpoolInfo, Taken

if TYPE_CHECKING:
    from lamfs.config import UserSettings


class NameVerbs(Protocol):
    """Names of files and directories, and the artifacts that go with them."""

    def create(
        self,
        parent: int,
        name: str,
        mode: int,
        uid: int,
        gid: int,
        *,
        now: int,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> Inode:
        """Make a directory, symlink (``target``), FIFO, socket or device node (``rdev``): mkdir, symlink and mknod.

        POSIX: mkdir(), symlink(), mknod(). In a set-group-ID directory it gets the group of that (Linux, mkdir(2)).
        Raises FsError: ENOENT (the directory is gone), ENOTDIR, EEXIST, EPERM (a reserved place).
        """

    def create_file(
        self,
        parent: int,
        name: str,
        mode: int,
        uid: int,
        gid: int,
        *,
        now: int,
        artifact_uid: str,
        token: str,
        key_is_virtual: bool = True,
        backup: Backup | None = None,
    ) -> tuple[Inode, str]:
        """Make a regular file that is about to be written, and owe its put; its inode and its spool file's name.

        POSIX: open() with O_CREAT. ``artifact_uid``: of the artifact that it becomes when it is stored (LaminDB: 20
        base62 characters). ``token``: the random part of the spool file's name (keys.spool_token). ``backup``: the file
        that had this name a moment ago: the new file goes on with its artifact, and the backup becomes the new one.
        Raises as create.
        """

    def link(self, ino: int, parent: int, name: str, *, now: int) -> Inode:
        """Give a file one more name. POSIX: link(). Raises FsError: EPERM (a directory, a reserved place), EEXIST,
        EMLINK, ENOENT, ENOTDIR."""

    def unlink(
        self,
        parent: int,
        name: str,
        *,
        now: int,
        left: Callable[[int], tuple[int, str] | None] = ...,
        is_copy: Callable[[int], bool] = ...,
    ) -> Removed:
        """Remove a name of a file. With the last one its artifact goes to the trash, and what was never stored goes.

        POSIX: unlink(); the trash is LaminDB's ``visibility = -1``. ``left``, ``is_copy``: what the caller remembers of
        backups (Namespace.unlink). Raises FsError: ENOENT, ENOTDIR, EISDIR.
        """

    def rmdir(self, parent: int, name: str, *, now: int) -> Removed:
        """Remove an empty directory. POSIX: rmdir(). Raises FsError: ENOENT, ENOTDIR, ENOTEMPTY, EBUSY."""

    def rename(
        self,
        parent: int,
        name: str,
        new_parent: int,
        new_name: str,
        *,
        now: int,
        noreplace: bool = False,
        backup: Backup | None = None,
        copy_uid: str | None = None,
    ) -> Renamed:
        """Move a name, with all that is below it; keys follow, and objects of real keys are owed their moves.

        POSIX: rename(); ``noreplace``: Linux, renameat2(2) with RENAME_NOREPLACE. A file renamed over an artifact is
        its new content. ``backup``: as for create_file, and with it ``copy_uid``, of the artifact that it becomes by
        that. Raises FsError: ENOENT, ENOTDIR, EISDIR, EEXIST, EINVAL (into itself), ENOTEMPTY, EBUSY and EPERM
        (reserved places).
        """

    def exchange(self, parent: int, name: str, other_parent: int, other_name: str, *, now: int) -> tuple[Inode, Inode]:
        """Let two names change what they mean; the inodes that were at the first and at the second.

        Linux: renameat2(2) with RENAME_EXCHANGE. Raises FsError: ENOENT, ENOTDIR, EINVAL (one is inside of the other),
        EBUSY and EPERM (reserved places).
        """

    def ensure_directory(self, key: str, uid: int, gid: int, *, now: int) -> int:
        """Inode number of the directory at a key, made with its parents where they are missing (``mkdir -p``).

        Raises InvalidName: a part of the key is a file.
        """

    def trash(self, uid: str, *, now: int) -> list[Removed]:
        """Move an artifact to the trash, from all its names. LaminDB: Artifact.delete(). Raises NotFound."""

    def restore(self, uid: str, key: str | None = None, *, now: int) -> ArtifactRecord:
        """Bring an artifact back from the trash, to where it was or to ``key`` (``folder/``: by its name in there).

        LaminDB: Artifact.restore(). Raises NotFound, AlreadyExists, InvalidName, and InvalidArgument (it is not in the
        trash).
        """

    def purge(self, uid: str, *, now: int, storage: bool = True) -> ArtifactRecord:
        """Delete an artifact for good, from the trash or not; the record as it was. The object is owed its deletion,
        unless ``storage`` is False. LaminDB: Artifact.delete(permanent=True, storage=…). Raises NotFound."""

    def rename_artifact(self, uid: str, key: str, *, now: int) -> None:
        """Give an artifact another key, as ``mv`` of its first name does; directories of the key are made.

        Raises NotFound, AlreadyExists (something has the key), InvalidName (a part of the key is a file),
        InvalidArgument (it is in the trash).
        """

    def edit_artifact(
        self,
        uid: str,
        *,
        now: int,
        key: str | None,
        description: str | None,
        run_id: int | None,
        transform_id: int | None,
    ) -> None:
        """Set what a person may change of an artifact without new content; ``key`` None: it stays. LaminDB:
        Artifact.save() of a changed record. Raises as rename_artifact; then nothing has changed."""

    def is_retained(self, object_key: str) -> bool:
        """Whether the artifact of an object was purged, and its object was to stay."""

    def scratch_files(self) -> list[tuple[str, int]]:
        """Key, and size in bytes, of each scratch file whose bytes are with this machine alone."""

    def unread_scratch(self) -> list[Inode]:
        """Scratch files whose bytes are not with this machine."""

    def is_scratch(self, ino: int) -> bool:
        """Whether a file is no artifact, and by none of its names becomes one."""

    def is_scratch_name(self, name: str) -> bool:
        """Whether a file of that name would be scratch."""

    def is_probe(self, ino: int) -> bool:
        """Whether a file has no name but that of a probe (scratch.is_probe)."""


class AttributeVerbs(Protocol):
    """Attributes of inodes, and the description of an artifact."""

    def set_attributes(self, ino: int, **columns: int) -> None:
        """Set mode, uid, gid, size, atime_ns, mtime_ns or ctime_ns. POSIX: chmod(), chown(), futimens(). Who may do so
        was checked by the caller."""

    def set_atimes(self, times: Mapping[int, int]) -> None:
        """Set access times by inode number, as reads have left them (Linux, relatime). Without change-log rows."""

    def set_xattr(self, ino: int, name: str, value: bytes, *, now: int) -> None:
        """Set an extended attribute. Linux: setxattr(2). Raises FsError: ENOSPC (the list of names is full)."""

    def remove_xattr(self, ino: int, name: str, *, now: int) -> None:
        """Remove an extended attribute. Linux: removexattr(2). Raises FsError: ENODATA."""

    def describe(self, ino: int, description: str, *, now: int) -> None:
        """Set the description of a file's artifact, or of the one that it will be; ``""``: none. LaminDB:
        Artifact.description."""


class WriteVerbs(Protocol):
    """What is written to files, until it is stored."""

    def begin_put(
        self,
        ino: int,
        src: str,
        *,
        now: int,
        artifact_uid: str,
        key_is_virtual: bool,
        seen: int,
        mine: str | None,
        base: str | None = None,
        blocks: Iterable[int] = ...,
        ranges: Mapping[int, Ranges] | None = None,
    ) -> Begun:
        """Note that a spool file is about to be written, as the next content of a file (Writes.begin_put).
        ``artifact_uid``: of the artifact that comes of it, if the file is new and not owed yet.

        Raises FsError: ESTALE, when the file has another revision than the one it was opened with, or another process
        is writing it.
        """

    def acknowledge(
        self,
        inode: Inode,
        *,
        now: int,
        src: str | None = None,
        settle: float = 0.0,
        probe_settle: float | None = None,
        columns: Mapping[str, int] | None = None,
    ) -> Acknowledged | None:
        """What was written so far has to be stored: close() and fsync() rest on this. None: that is not owed any more.
        See Writes.acknowledge."""

    def take_over(self, left: Iterable[Owed], spools: Mapping[int, SpoolInfo], *, now: int) -> Taken:
        """Take over the work of processes that are gone; what they were writing counts as closed, as the files of a
        process that dies are (POSIX, _exit())."""

    def close_left(self, entry: Put, found: SpoolInfo, *, now: int) -> None:
        """The same of one file whose put was taken over before."""


class CommitVerbs(Protocol):
    """What storage has done, or is about to do, with the objects of artifacts.

    The order is object first, registry row second, stale object last (docs/ARCHITECTURE.md): these are the second
    steps, and what is noted before the first.
    """

    def put_target(self, entry: Put) -> str:
        """The object key under which the content of a put belongs now."""

    def put_meta(self, entry: Put, content: ContentHash | None) -> ObjectMeta:
        """What the object of a put is to say of itself."""

    def announce_many(self, files: Iterable[tuple[Put, ContentHash]], busy: Set[str]) -> list[NewObject]:
        """Choose and note the objects of many small new files; those that have to be put one by one are left out."""

    def put(
        self,
        ino: int,
        gen: int,
        content: ContentHash,
        object_key: str,
        etag: str,
        origin: Provenance,
        *,
        now: int,
        taken: str | None = None,
        row: int | None = None,
    ) -> Committed:
        """The bytes of generation ``gen`` of an inode are in an object: they are an artifact, or its next revision.

        LaminDB: Artifact.save() and replace(). ``taken``: the spool file that has become the object, by a rename;
        ``row``: the journal row that was worked on.
        """

    def put_many(self, files: Iterable[Stored], origin: Provenance, *, now: int) -> dict[int, Committed]:
        """As put, of many files in one transaction; the outcomes by journal row."""

    def put_unneeded(self, ino: int, gen: int, *, now: int, row: int | None = None) -> Committed:
        """Generation ``gen`` of an inode has the content that its artifact has already: only the put goes."""

    def abandon_put(self, entry: Put, *, now: int) -> None:
        """The file of a put is gone: strike it off; the object that it may have made is owed its deletion."""

    def give_up_target(self, entry_id: int, object_key: str, etag: str, *, now: int) -> None:
        """An earlier try of a put has made an object with other bytes: that is owed its deletion."""

    def conflict(
        self,
        entry_id: int,
        content: ContentHash,
        object_key: str,
        etag: str,
        origin: Provenance,
        *,
        now: int,
        copy_uid: str,
    ) -> Conflict | None:
        """Somebody else has changed the object of a file that is being stored: keep both, what was written here as a
        file beside it, artifact ``copy_uid``. None: the put is owed no more."""

    def save_target(self, record: ArtifactRecord) -> str:
        """The object key under which a save would be stored now."""

    def save_meta(self, record: ArtifactRecord) -> ObjectMeta:
        """What the object of a save is to say of itself."""

    def announce_save(
        self, record: ArtifactRecord, *, now: int, foreign: str | None = None, mode: int = 0o644
    ) -> Announced:
        """Note that a user's file is about to be stored as this artifact, so that whoever finds its process dead can
        finish or undo that. Raises AlreadyExists (a mount has changes that need the bytes which are replaced)."""

    def save(
        self, entry_id: int, record: ArtifactRecord, etag: str, *, mode: int, uid: int, gid: int, now: int
    ) -> ArtifactRecord:
        """The bytes of a save are in storage: the artifact is as announced, and has its name. LaminDB: Artifact.save().

        Raises AlreadyExists (the key was taken meanwhile), NotFound (the artifact was deleted for good), InvalidName.
        """

    def abandon_save(self, entry_id: int, object_key: str, *, now: int, delete: bool) -> None:
        """A save has failed: strike it off; ``delete``: its object is owed its deletion, unless it is an artifact's."""

    def move_plan(self, uid: str, *, now: int) -> tuple[ArtifactRecord, str] | None:
        """Where the object of an artifact has to go: the record, and the object key to copy to; None: nowhere now."""

    def is_home(self, uid: str) -> bool:
        """Whether the object of an artifact is where its key says, or there is no such artifact."""

    def begin_move(self, uid: str, object_key: str, *, now: int) -> None:
        """The object of an artifact is about to be copied: until ``moved``, the copy is owed its deletion."""

    def give_up_move(self, entry_id: int, object_key: str) -> None:
        """What was to be copied is gone, or is something else: nothing is owed there."""

    def moved(self, entry_id: int, before: ArtifactRecord, object_key: str, etag: str, *, now: int) -> bool:
        """The object was copied: the artifact has the copy, and the original is owed its deletion. False, and nothing
        has changed: the artifact has other bytes by now."""

    def deleted(self, entry_ids: Iterable[int]) -> None:
        """The objects of these rows are gone: they are owed no more."""

    def adopt(self, before: ArtifactRecord, revision: Revision, number: int, *, mtime_ns: int, now: int) -> bool:
        """An object in storage is a later revision of an artifact than the registry knows: that is its content now.
        False, and nothing has changed: the artifact is being written, or has changed."""

    def same_bytes(self, before: ArtifactRecord, etag: str) -> bool:
        """The object of an artifact is a copy of the one that was saved: note its ETag. False: it has another revision
        by now."""


class RescueVerbs(Protocol):
    """``lost+found``, and what is known to be lost."""

    def keep_file(
        self,
        name: str,
        *,
        src: str,
        size: int,
        mtime_ns: int,
        now: int,
        spare_uid: str,
        mode: int = 0o600,
        owner: tuple[int, int] | None = None,
        artifact_uid: str | None = None,
        description: str | None = None,
    ) -> str:
        """Make a spool file that nobody owes a file of ``lost+found``, and owe its put; its key."""

    def keep_put(
        self,
        row: int,
        name: str,
        *,
        src: str,
        size: int,
        mtime_ns: int,
        now: int,
        spare_uid: str,
        description: str,
    ) -> str:
        """Make the last bytes of a put, which are in another spool file now, a file of ``lost+found``; its key. The
        put's own file is as it was stored last, or gone."""

    def keep_object(
        self,
        names: Sequence[str],
        record: ArtifactRecord,
        *,
        mtime_ns: int,
        now: int,
        spare_uid: str,
        mode: int = 0o600,
        instead: tuple[ArtifactRecord, str] | None = None,
    ) -> str | None:
        """Make an object that nobody names an artifact of ``lost+found``; its key. None: somebody names it by now."""

    def name_again(self, ino: int, *, now: int) -> str:
        """Give what has lost its name one in ``lost+found``; its key."""

    def name_nameless(self, *, now: int) -> list[tuple[int, str]]:
        """The same of all that have lost their name and lead to bytes or to entries, while no mount lives; inode
        numbers and keys."""

    def give_back(self, name: str, scratch: Inode, *, now: int) -> bool:
        """Let a file of ``lost+found``, which has the bytes of a scratch file, take the place of that. False, and
        neither has changed: one of the two is gone, or the scratch file has bytes."""

    def named_objects(self) -> set[str]:
        """Object keys that a revision names, or something that is owed."""

    def give_up(self, row: int, *, now: int, note: bool = True) -> Lost | None:
        """The bytes of a put are lost: its file is as it was stored last, or gone, and that is remembered (``note``).
        None: there is no such file."""

    def give_up_object(self, object_key: str, etag: str, *, now: int) -> bool:
        """Owe the deletion of an object that nobody names; whether that is so."""

    def note_lost(self, lost: Lost) -> None:
        """Remember what is lost, until somebody was told."""

    def lost(self) -> list[Lost]:
        """What is lost, oldest first, as long as nobody has forgotten it."""

    def forget_lost(self) -> None:
        """Somebody was told what is lost."""

    def found(self) -> tuple[str, int]:
        """The name of ``lost+found``, and how many entries it has."""


class PeopleVerbs(Protocol):
    """Users, storages, transforms and runs: LaminDB's records of the same names."""

    def ensure_user(self, uid: str, handle: str, email: str | None, name: str | None, *, now: int) -> User:
        """The user of that handle, made or brought up to date."""

    def user(self, user_id: int | None) -> User | None:
        """A user by row id."""

    def user_by_handle(self, handle: str) -> User | None:
        """A user by handle."""

    def ensure_storage(self, root: str, kind: str, region: str | None = None, *, uid: str, now: int) -> Storage:
        """The storage with that root, made when missing."""

    def storage(self, storage_row: int) -> Storage | None:
        """A storage by row id."""

    def ensure_transform(
        self, name: str, key: str | None, kind: str, user_id: int | None, *, uid: str, now: int
    ) -> Transform:
        """The transform with that name and key, made when missing. LaminDB: what ln.track() finds or makes."""

    def transform(self, transform_id: int | None) -> Transform | None:
        """A transform by row id."""

    def start_run(self, transform_id: int, user_id: int | None, *, uid: str, now: int) -> Run:
        """Begin a run of a transform. LaminDB: ln.track()."""

    def finish_run(self, run_id: int, *, now: int) -> None:
        """Note that a run has ended. LaminDB: ln.finish()."""

    def run(self, run_id: int | None) -> Run | None:
        """A run by row id."""


class TreeReads(Protocol):
    """Looks at inodes and directory entries."""

    def get(self, ino: int) -> Inode | None:
        """One inode. POSIX: fstat()."""

    def lookup(self, parent: int, name: str) -> Inode | None:
        """The inode that a name means in a directory."""

    def entries(self, parent: int, after: int = 0, limit: int = 1000) -> list[Dentry]:
        """Entries of a directory with a cookie above ``after``, in cookie order. POSIX: readdir()."""

    def walk(self, parent: int, after: int = 0, last: int = NEWEST) -> Iterator[tuple[int, str, Inode]]:
        """The same as (cookie, name, inode), one by one. Nothing may be changed while the iterator is held."""

    def newest_cookie(self) -> int:
        """The highest cookie that any entry has had so far."""

    def is_empty(self, ino: int) -> bool:
        """Whether a directory has no entries."""

    def names(self, ino: int) -> list[tuple[int, str]]:
        """All (directory, name) of an inode, the first given first."""

    def first_name(self, ino: int) -> tuple[int, str] | None:
        """The (directory, name) that an inode has had longest."""

    def parent(self, ino: int) -> int | None:
        """Directory of the inode's first name; None for the root and for what has no name."""

    def path(self, ino: int) -> str | None:
        """Key of an inode by its first name; ``""`` for the root, None without a name."""

    def resolve(self, key: str) -> Inode | None:
        """The inode at a key. Symlinks are not followed."""

    def is_below(self, ino: int, ancestor: int) -> bool:
        """Whether an inode is ``ancestor``, or is inside of it by its first name."""

    def symlink_target(self, ino: int) -> bytes:
        """What a symlink says. POSIX: readlink(). Raises FsError: EINVAL."""

    def xattr(self, ino: int, name: str) -> bytes | None:
        """Value of an extended attribute."""

    def xattrs(self, ino: int) -> dict[str, int]:
        """Names of an inode's extended attributes, with the sizes of their values in bytes."""


class ArtifactReads(Protocol):
    """Looks at artifacts."""

    def by_uid(self, uid: str) -> ArtifactRecord | None:
        """The artifact of that uid, in the trash or not."""

    def by_ino(self, ino: int) -> ArtifactRecord | None:
        """The artifact whose bytes an inode shows."""

    def has_ino(self, ino: int) -> bool:
        """Whether an inode shows the bytes of an artifact."""

    def by_key(self, key: str) -> ArtifactRecord | None:
        """The artifact that has this key; never one in the trash."""

    def trashed(self, key: str) -> ArtifactRecord | None:
        """The artifact in the trash that had this key, the last one thrown away first."""

    def same_content(self, content: ContentHash, limit: int = -1) -> list[ArtifactRecord]:
        """Artifacts with exactly these bytes, the ``limit`` oldest first (-1: all)."""

    def with_object(self, object_key: str) -> ArtifactRecord | None:
        """The artifact whose bytes are in this object."""

    def leaves(self, revision: Revision, block: int) -> bytes | None:
        """The leaf hashes of one block of a revision; None: not known."""

    def home(self, record: ArtifactRecord, at: str | None = None) -> str:
        """The object key where an artifact's bytes belong. ``at``: where they are (None: where the record says)."""

    def has_large(self, size: int) -> bool:
        """Whether there is a revision of ``size`` bytes, which are more than 64 MiB."""

    def sizes(self) -> set[int]:
        """The sizes of all revisions, in bytes. Reads all rows."""

    def settle(self, limit: int | None = None) -> bool:
        """Let keys follow the directories that were renamed, at most ``limit`` of them; whether any are left. Reads by
        key wait for all of them."""

    def filter(self, **conditions: Any) -> Iterator[ArtifactRecord]:
        """Artifacts that meet all conditions, oldest first (registry/conditions.py). LaminDB: Artifact.filter().
        Raises InvalidArgument."""

    def count(self, *, trash: bool = False) -> int:
        """Number of artifacts outside (or in) the trash."""

    def total_bytes(self) -> int:
        """Sum of the sizes of all artifacts, the trash included, in bytes."""


class ChangeReads(Protocol):
    """Follows what others change."""

    @property
    def origin(self) -> str:
        """What this registry object's own rows are marked with."""

    def last(self) -> int:
        """Number of the newest row."""

    def since(self, seq: int, limit: int = 10_000) -> tuple[list[Change], bool]:
        """Rows after ``seq`` in order, and whether rows between were trimmed already."""

    def trim(self) -> None:
        """Drop rows that nobody can need any more."""


class FileVerbs(Protocol):
    """A registry as one file: which instance it is of, what it comes from, and copies of it."""

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
        """Write the first rows of a new one: the instance, its storage, and its first user. LaminDB: lamin init."""

    def about(self) -> About:
        """The instance of this registry."""

    def move_to(self, root: str) -> None:
        """The default storage is at another root."""

    def fence(self) -> int | None:
        """The number of the lease under which it was changed last; None: it says none."""

    def begin_lease(self, fence: int) -> None:
        """This machine changes it under the lease ``fence`` from now on; what another one may have written is
        doubted."""

    def source(self) -> str | None:
        """ETag of the copy in storage that it was made of; None: of none, or it does not say."""

    def made_of(self, etag: str) -> None:
        """It was made of the copy in storage that has this ETag."""

    def pushes(self) -> tuple[str, ...]:
        """Names of the pushes that it comes from, or replaces, the newest first."""

    def add_pushes(self, names: Iterable[str]) -> None:
        """It comes from these pushes, too."""

    def supersede(self, pushes: Iterable[str], changes: int) -> None:
        """It takes the place of these pushes, and counts on from ``changes`` changes, or more."""

    def mark(self) -> str:
        """A text that differs after every change that is worth a push."""

    def is_changed(self) -> bool:
        """Whether anything was changed through this object."""

    def copy_to(self, target: Path, *, push: str) -> None:
        """Write a consistent copy to ``target``, a new file of mode 0600, as the push of that name."""

    def fold_log(self) -> None:
        """Let the file alone be the registry, without a log beside it."""

    def check_values(self) -> None:
        """Raise DamagedRegistry when a value cannot be what was written. Reads everything."""

    def damaged(self, what: str) -> DamagedRegistry:
        """The error that says what is wrong with this registry, in the words ``what``, and names the way back."""


class CheckVerbs(Protocol):
    """Whether the rows of a registry agree with each other."""

    def check_file(self) -> FileFlaws:
        """What the database itself finds wrong. Raises DamagedRegistry."""

    def check_tree(self, *, now: int, repair: bool, is_mounted: Callable[[], bool]) -> list[Flaw]:
        """What is wrong with inodes, entries and artifacts; ``repair``: mend what can be (Consistency.check_tree)."""


class UpkeepVerbs(Protocol):
    """Puts of processes that are gone, and what only another registry knows."""

    def deciding(self, entry: Put) -> AbstractContextManager[bool]:
        """A transaction in which something is decided about a put of a process that is gone; whether the put is as
        ``entry`` says. An exception undoes all of it."""

    def strike_off(self, entry: Put, *, now: int) -> bool:
        """Strike off a put that cannot be lamfs's own, and give its file up. False, and nothing happens: another
        process has taken or changed it."""

    def keep_durable(self, entry: Put, *, now: int, cut: Callable[[int], None]) -> list[Lost]:
        """The machine went down: believe only what was durable of a put's spool file; what is lost, which is
        remembered. ``cut``: shortens the spool file, before the commit."""

    def add_unnoted(self, entry: Put, known: Mapping[int, Ranges], found: Mapping[int, Ranges]) -> bool:
        """Bytes of a put's spool file that nobody has noted count as written (Upkeep.add_unnoted). False, and nothing
        happens: what is noted is not ``known`` any more."""

    def succeeding(self, old: Database, *, apart: bool) -> AbstractContextManager[Mapping[str, Told]]:
        """A transaction in which this registry takes over what ``old``, this machine's working copy so far, owes; the
        spool files that are left behind. ``apart``: another machine has gone on with this one."""

    def bring_back(
        self,
        record: ArtifactRecord,
        *,
        now: int,
        author: User | None,
        displaced: Displaced | None,
        uid: int,
        gid: int,
    ) -> None:
        """Add an artifact that another registry knows, with the object that it has there (Upkeep.bring_back)."""


class Verbs(Protocol):
    """A registry, as the mount, the CLI and the API see it. Belongs to the thread that opened it."""

    @property
    def names(self) -> NameVerbs:
        """Names of files, and their artifacts."""

    @property
    def attributes(self) -> AttributeVerbs:
        """Attributes of inodes."""

    @property
    def writes(self) -> WriteVerbs:
        """What is written, until it is stored."""

    @property
    def commits(self) -> CommitVerbs:
        """What storage has done."""

    @property
    def rescue(self) -> RescueVerbs:
        """``lost+found``."""

    @property
    def people(self) -> PeopleVerbs:
        """Users, storages, transforms, runs."""

    @property
    def tree(self) -> TreeReads:
        """Looks at inodes and entries."""

    @property
    def artifacts(self) -> ArtifactReads:
        """Looks at artifacts."""

    @property
    def changes(self) -> ChangeReads:
        """What others have changed."""

    @property
    def file(self) -> FileVerbs:
        """The registry as one file."""

    @property
    def consistency(self) -> CheckVerbs:
        """Checks of it."""

    @property
    def upkeep(self) -> UpkeepVerbs:
        """What others have left behind."""

    def describe(self, record: ArtifactRecord) -> dict[str, Any]:
        """An artifact's record with its references resolved, ready for JSON."""

    def close(self) -> None:
        """Let go of it."""
