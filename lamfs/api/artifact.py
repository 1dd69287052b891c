"""``ln.Artifact``. An object belongs to the thread that uses it; several objects may mean the same artifact.

Fields have the values of when the object was made, saved or replaced. ``path``, ``cache`` and methods that change the
artifact look at the registry anew.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace as with_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamfs.api import frames, state
from lamfs.api.fields import ArtifactFields
from lamfs.api.paths import object_path
from lamfs.api.queryset import QuerySet
from lamfs.api.settings import settings
from lamfs.api.strict import check_flag, check_text
from lamfs.errors import InvalidArgument, LamfsError, NotFound
from lamfs.keys import check_key, key_with_suffix, object_key_for, suffix_of
from lamfs.model import ArtifactRecord
from lamfs.ops import artifacts, drafts, folders, messages
from lamfs.ops.drafts import Draft
from lamfs.registry import Provenance, Run

if TYPE_CHECKING:
    from cloudpathlib import S3Path

    PathLike = str | os.PathLike[str] | S3Path

NAMED = 10
"""Files that cannot be read and are named in one error."""
NO_RUN = "no run & transform get linked, consider calling ln.track()"


class Artifact(ArtifactFields):
    """A file in the registry: ``Artifact(path, key=…).save()``.

    Pass a key, a description or a run. A path that lies in the storage is registered where it is. Nothing is stored
    before ``save()``. Raises InvalidArgument and InvalidName (ValueErrors), FileNotFoundError, NotSetUp.
    """

    _draft: Draft | None
    _finalizer: weakref.finalize[..., Artifact] | None

    def __init__(
        self,
        path: PathLike | Any = None,
        key: str | None = None,
        description: str | None = None,
        *,
        data: Any = None,
        run: Run | None = None,
        accessor: str | None = None,
    ) -> None:
        if (path is None) == (data is None):
            raise InvalidArgument("Pass one path (or one DataFrame as data).")
        check_text("key", key)
        check_text("description", description)
        check_text("accessor", accessor)
        self._make(path if path is not None else data, key, description, accessor, _origin(run))

    def _make(
        self,
        source: Any,
        key: str | None,
        description: str | None,
        accessor: str | None,
        origin: Provenance,
    ) -> None:
        if frames.is_frame(source) and accessor is None:
            messages.warn("data is a DataFrame, please use .from_df()")
            accessor = "DataFrame"
        if frames.is_frame(source) and key is not None and suffix_of(key) != ".parquet":
            raise InvalidArgument(
                f"The suffix '{suffix_of(key)}' of the provided key is incorrect, it should be '.parquet'."
            )
        with _file_of(source) as (file, temporary):
            draft = drafts.draft_new(
                state.instance(),
                file,
                key=key,
                description=description,
                origin=origin,
                virtual=settings.artifact_use_virtual_keys,
                accessor=accessor,
                temporary=temporary,
            )
            _tell_new(draft)
            self._begin(draft, file if temporary else None)

    # -- making -------------------------------------------------------------------------------------------------

    @classmethod
    def from_df(
        cls, df: Any, key: str | None = None, description: str | None = None, *, run: Run | None = None
    ) -> Artifact:
        """An artifact of a DataFrame, stored as parquet. Needs ``lamfs[pandas]``."""
        if not frames.is_frame(df):
            raise InvalidArgument(f"from_df takes a pandas DataFrame, not {type(df).__name__}.")
        return cls(data=df, key=key, description=description, run=run, accessor="DataFrame")

    @classmethod
    def from_dir(
        cls,
        path: str | os.PathLike[str],
        key: str | None = None,
        *,
        run: Run | None = None,
        follow_links: bool = False,
    ) -> list[Artifact]:
        """One artifact for each file below a folder, with keys below ``key`` (by default the folder's name).

        They are not saved yet. Links are left out with a warning; ``follow_links`` follows them. Raises InvalidArgument
        when ``path`` is not a folder, and when some of its files cannot be read: the error names them (the first 10),
        and nothing is made.
        """
        if not isinstance(path, str | os.PathLike):
            raise InvalidArgument(f"from_dir takes the path of a folder, not {type(path).__name__}.")
        check_text("key", key)
        folder = Path(os.path.abspath(os.path.expanduser(path)))
        if not folder.is_dir():
            raise InvalidArgument(f"{folder} is no directory; Artifact(path) makes an artifact of a file.")
        inside = drafts.key_in_storage(state.instance().store, folder) is not None
        base = key.rstrip("/") if key is not None else folder.name
        problems: list[LamfsError] = []
        files = []
        for file, relative in folders.files_below(
            folder, follow_links=follow_links, left_out=_left_out, failed=problems.append
        ):
            problem = folders.unreadable(file)
            problems += [] if problem is None else [problem]
            files.append((file, relative))
        if problems:
            named = " ".join(str(problem) for problem in problems[:NAMED])
            more = f" And {len(problems) - NAMED} more." if len(problems) > NAMED else ""
            raise InvalidArgument(f"{named}{more}", errno=problems[0].errno)
        origin = _origin(run) if files else Provenance()
        found = []
        for file, relative in files:
            artifact = cls.__new__(cls)
            name = None if inside and key is None else f"{base}/{relative}"
            artifact._make(file, name, None, None, origin)
            found.append(artifact)
        count = f"{len(found)} artifact{'s' if len(found) != 1 else ''}"
        messages.info(f"made {count} of {folder} with key '{base}/'; save each with .save()")
        return found

    @classmethod
    def _of(cls, record: ArtifactRecord) -> Artifact:
        self = cls.__new__(cls)
        self._begin(Draft(record))
        return self

    @classmethod
    def get(cls, uid: str | None = None, *, key: str | None = None) -> Artifact:
        """The artifact with a uid (or the first characters of one, 8 or more), or with a key. Raises NotFound."""
        if (uid is None) == (key is None):
            raise InvalidArgument("Pass a uid, or key='…'.")
        check_text("uid", uid)
        check_text("key", key)
        here = state.instance()
        if key is not None:
            found = here.registry.artifacts.by_key(check_key(key))
            if found is None:
                raise NotFound(f"There is no artifact with key '{key}'; Artifact.filter(key__startswith=…) finds more.")
            return cls._of(found)
        assert uid is not None
        if not (uid.isascii() and uid.isalnum()):
            raise NotFound(f"'{uid}' is no uid (letters and digits); with a key, write Artifact.get(key={uid!r}).")
        return cls._of(artifacts.by_uid_prefix(here, uid))

    @classmethod
    def filter(cls, **conditions: Any) -> QuerySet[Artifact]:
        """Artifacts that meet all conditions: ``field=value``, ``field__startswith=``, ``__contains``, ``__endswith``,
        ``__gt``, ``__gte``, ``__lt``, ``__lte``, ``__in``. The trash only with ``visibility=``.

        Times are datetimes, dates or texts in ISO 8601; without a time zone they are local, while ``created_at``,
        ``describe()`` and ``lamfs info`` are in UTC. A date is all of its day:
        ``created_at__gt`` is after it, ``__lte`` until its end. Sizes are bytes, or texts such as ``"5 MB"``. Raises
        InvalidArgument for an unknown field or condition, and for a value that is not of the field's type.
        """
        return QuerySet(cls._of(record) for record in state.instance().registry.artifacts.filter(**conditions))

    # -- storing ------------------------------------------------------------------------------------------------

    def save(self, progress: Callable[[int], None] | None = None) -> Artifact:
        """Store what is pending: first a new key, then the object, then the row; the stale object goes last. Returns
        the artifact.

        Raises storage errors: the revision before is whole then, and ``save()`` may be called again. Raises
        AlreadyExists for a new key that is taken, InvalidName for one below a file, and InvalidArgument for an artifact
        in the trash; then nothing has changed.
        """
        here = state.instance()
        draft = self._draft or Draft(self._record)
        self._record = artifacts.commit(here, draft, key=self._new_key, progress=progress)
        self._drop_temporary()
        self._draft = self._new_key = None
        return self

    def replace(self, path: PathLike | Any = None, *, data: Any = None, run: Run | None = None) -> Artifact:
        """Replace the content by a file's or a DataFrame's at the next ``save()``. uid, description and accessor stay;
        a new suffix changes the key, with a warning. Equal content changes nothing. Returns the artifact.

        Raises InvalidArgument (a ValueError) for a path in the storage, or when the new key is taken.
        """
        if (path is None) == (data is None):
            raise InvalidArgument("Pass one path (or one DataFrame as data).")
        origin = _origin(run)
        here = state.instance()
        with _file_of(path if path is not None else data) as (file, temporary):
            before = here.registry.artifacts.by_uid(self.uid)
            if before is None and self._draft is not None:
                draft = self._redraft(file, origin, temporary)
            else:
                draft = drafts.draft_replace(
                    here, self._record, file, key=self._new_key, origin=origin, temporary=temporary
                )
                if draft.pending and draft.replaces is not None:
                    _tell_key(draft.replaces.key, draft.record)
                elif not draft.pending:
                    _tell_new(draft)
                draft.record.description = self._record.description
            if self._new_key is not None:
                self._new_key = draft.record.key
            self._drop_temporary()
            self._begin(draft, file if temporary else None)
        return self

    def _redraft(self, file: str | os.PathLike[str], origin: Provenance, temporary: bool) -> Draft:
        """Draft another file for an artifact that was never saved."""
        record = self._record
        key = record.key
        if drafts.key_in_storage(state.instance().store, file) is not None:
            raise InvalidArgument("Can only replace with a local file not in any Storage.")
        if key is not None:
            key = key_with_suffix(key, record.suffix, suffix_of(os.fspath(file)))
        draft = drafts.draft_new(
            state.instance(),
            file,
            key=key,
            description=record.description,
            origin=origin,
            virtual=record.key_is_virtual,
            accessor=record.accessor,
            temporary=temporary,
        )
        _tell_key(record.key, draft.record)
        _tell_new(draft)
        if draft.replaces is None and draft.pending:
            draft.record.uid = record.uid
        return draft

    def _begin(self, draft: Draft, temporary: str | os.PathLike[str] | None = None) -> None:
        """Take over a draft's fields. ``temporary``: lamfs's own file of its bytes, which is removed when nobody needs
        it."""
        self._record = draft.record
        self._draft = draft if draft.pending else None
        self._finalizer = None
        if temporary is not None:
            self._finalizer = weakref.finalize(self, _unlink, os.fspath(temporary))
            if not draft.pending:
                self._drop_temporary()

    def _drop_temporary(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path | S3Path:
        """Path of the object (before the first save: where it will be)."""
        here = state.instance()
        record = here.registry.artifacts.by_uid(self.uid) or self._record
        key = record.revision.object_key or object_key_for(record.uid, record.suffix, record.key, record.key_is_virtual)
        return object_path(here.settings.storage, key)

    def cache(self, progress: Callable[[int], None] | None = None) -> Path:
        """A local file with the newest stored content, complete and verified, below the cache directory.

        Raises NotFound (not saved, or deleted), and storage errors.
        """
        return artifacts.cache(state.instance(), self._record, progress)

    # -- leaving ------------------------------------------------------------------------------------------------

    def delete(self, permanent: bool | None = None, storage: bool | None = None) -> None:
        """Move the artifact to the trash. From there, or with ``permanent=True``, delete it for good.

        The object is deleted with the row, unless ``storage=False``. For a real key without ``storage`` a person at a
        terminal is asked; without a terminal the object stays. Raises NotFound, and InvalidArgument for other values,
        and when the artifact is in the trash and nobody can be asked.
        """
        check_flag("permanent", permanent)
        check_flag("storage", storage)
        here = state.instance()
        current = here.registry.artifacts.by_uid(self.uid)
        if current is None:
            self._drop_temporary()
            if self._draft is None:
                raise NotFound(f"The artifact {self.uid} was deleted for good already.")
            self._draft = None
            return
        if not artifacts.in_trash(current) and not permanent:
            if storage is not None:
                messages.warn("moving artifact to trash, storage arg is ignored")
            self._record = artifacts.trash(here, current)
            messages.warn("moved artifact to trash (visibility = -1)")
            return
        if permanent is None and not _ask(
            "Artifact record is already in trash! Are you sure you want to permanently delete it? (y/n) You can't undo"
            " this action. ",
            f"The artifact {self.uid} is in the trash already; pass permanent=True to delete it for good.",
        ):
            return
        if permanent is False:
            messages.warn("the artifact is in the trash already")
            return
        where = artifacts.url(here, current)
        if storage is None:
            storage = True
            if current.key is not None and not current.key_is_virtual:
                storage = _ask(f"Are you sure to want to delete {where}? (y/n)  You can't undo this action. ")
        self._record = with_fields(artifacts.purge(here, current, storage))
        self._drop_temporary()
        self._draft = None
        if storage:
            messages.success(f"deleted {where}")

    def restore(self, key: str | None = None) -> Artifact:
        """Bring the artifact back from the trash, to where it was or to ``key``. Raises AlreadyExists, NotFound."""
        check_text("key", key)
        self._record = artifacts.restore(state.instance(), self._record, key)
        return self

    def describe(self) -> dict[str, Any]:
        """All fields with their references resolved, ready for JSON."""
        here = state.instance()
        return artifacts.info(here, artifacts.by_uid(here, self.uid))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Artifact) and self.uid == other.uid

    def __hash__(self) -> int:
        return hash(self.uid)

    def __repr__(self) -> str:
        return drafts.text_of(self._record)


def _tell_new(draft: Draft) -> None:
    """Tell the user when a file is the content of an existing artifact, or new content for one."""
    before, now = draft.replaces, draft.record
    if before is None:
        return
    if draft.pending:
        messages.warn(f"artifact with key '{now.key}' exists: its content will be replaced upon `save()`")
        return
    messages.info(f"returning existing artifact with same hash: {drafts.text_of(before)}")
    if now.description != before.description:
        messages.warn(f"updated description from {before.description} to {now.description}")


def _tell_key(before: str | None, now: ArtifactRecord) -> None:
    """Tell the user that the key follows the suffix of a new file."""
    if before in (None, now.key):
        return
    if now.key_is_virtual:
        messages.warn(f"the suffix follows the new file: its key is now '{now.key}', upon `save()`, and not '{before}'")
    else:
        messages.warn(
            f"replacing the file will replace key '{before}' with '{now.key}' and delete '{before}' upon `save()`"
        )


def _left_out(path: str, why: str) -> None:
    messages.warn(f"left out, {why}: {path}")


def _origin(run: Run | None) -> Provenance:
    """The provenance of new content; warns when it has no run."""
    origin = state.provenance()
    if run is not None:
        if not isinstance(run, Run):
            raise InvalidArgument(f"run is a run, as ln.track() makes it, not {type(run).__name__}.")
        return Provenance(origin.user_id, run.id, run.transform_id)
    if origin.run_id is None:
        messages.warn(NO_RUN)
    return origin


@contextlib.contextmanager
def _file_of(source: Any) -> Iterator[tuple[str | os.PathLike[str], bool]]:
    """Yields the file that has the bytes, and whether it is a temporary one of lamfs's own.

    A temporary file is removed when the block fails: no draft has it then.
    """
    if frames.is_frame(source):
        path = frames.write_parquet(source)
        taken = False
        try:
            yield path, True
            taken = True
        finally:
            if not taken:
                _unlink(str(path))
    elif hasattr(source, "cloud_prefix"):
        yield str(source), False  # not fspath(): that would download it
    elif isinstance(source, str | os.PathLike):
        yield source, False
    else:
        raise InvalidArgument(f"An artifact is made of a path or a DataFrame, not of {type(source).__name__}.")


def _ask(question: str, refusal: str | None = None) -> bool:
    """Ask a person at the terminal. Without one: raises InvalidArgument with ``refusal``, or returns False when that is
    None."""
    if sys.stdin is not None and sys.stdin.isatty():
        return input(question).strip().lower() in ("y", "yes")
    if refusal is not None:
        raise InvalidArgument(refusal)
    return False


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
