"""The fields of ``ln.Artifact``: what its record says, under LaminDB's names."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from lamfs.api import state
from lamfs.api.strict import Strict, check_text
from lamfs.errors import InvalidArgument
from lamfs.keys import check_key, into, root_path, suffix_of
from lamfs.model import ArtifactRecord
from lamfs.registry import Run, Transform, User

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ArtifactFields(Strict):
    """Reads one record."""

    _record: ArtifactRecord
    _new_key: str | None = None
    """The key that the next ``save()`` gives it."""

    @property
    def id(self) -> int | None:
        """Row id."""
        return self._record.id

    @property
    def uid(self) -> str:
        """20 base62 characters that never change."""
        return self._record.uid

    @property
    def key(self) -> str | None:
        """The path in the registry's tree; None: auto-managed.

        Setting it and calling ``save()`` renames the artifact as ``mv`` in a mount does: directories are made, the
        suffix is the new key's, and the object of a real key follows. A key that ends with ``/`` is a directory, into
        which the artifact goes by its own name. Raises InvalidName (a ValueError), and InvalidArgument unless it is a
        str: a key can be changed, but not removed.
        """
        return self._record.key

    @key.setter
    def key(self, key: str | None) -> None:
        check_text("key", key)
        if key is None:
            if self._record.key is None:
                return
            raise InvalidArgument(f"'{self._record.key}' cannot do without a key; give it another one.")
        name = root_path(self._record.key)[1] if self._record.key else f"{self._record.uid}{self._record.suffix}"
        self._new_key = self._record.key = check_key(into(key, name), real=not self._record.key_is_virtual)
        self._record.suffix = suffix_of(root_path(self._new_key)[1])

    @property
    def description(self) -> str | None:
        """A text or None; set it and call ``save()``. Raises InvalidArgument for anything else."""
        return self._record.description

    @description.setter
    def description(self, text: str | None) -> None:
        check_text("description", text)
        self._record.description = text

    @property
    def suffix(self) -> str:
        """``.csv``, ``.tar.gz`` … or ``""``."""
        return self._record.suffix

    @property
    def accessor(self) -> str | None:
        """What the content was in memory, such as ``DataFrame``."""
        return self._record.accessor

    @property
    def size(self) -> int:
        """Bytes."""
        return self._record.size

    @property
    def hash(self) -> str:
        """LaminDB's content hash, 22 characters."""
        return self._record.hash

    @property
    def hash_type(self) -> str:
        """``md5``, or ``sha1-fl`` above 50 MiB."""
        return self._record.revision.content.hash_type

    @property
    def visibility(self) -> int:
        """1 shown, 0 archived, -1 in the trash."""
        return self._record.visibility

    @property
    def key_is_virtual(self) -> bool:
        """Whether the key lives in the registry alone."""
        return self._record.key_is_virtual

    @property
    def storage_id(self) -> int:
        """Row id of the storage."""
        return self._record.storage_id

    @property
    def created_by_id(self) -> int | None:
        """Row id of the user who made it."""
        return self._record.created_by_id

    @property
    def run_id(self) -> int | None:
        """Row id of the run that made its content."""
        return self._record.run_id

    @property
    def transform_id(self) -> int | None:
        """Row id of that run's transform."""
        return self._record.transform_id

    @property
    def created_at(self) -> datetime | None:
        """When it was first saved, in UTC."""
        return _time(self._record.created_at)

    @property
    def updated_at(self) -> datetime | None:
        """When its content or place last changed, in UTC."""
        return _time(self._record.updated_at)

    @property
    def created_by(self) -> User | None:
        """The user who made it."""
        return state.instance().registry.people.user(self.created_by_id)

    @property
    def run(self) -> Run | None:
        """The run that made its content."""
        return state.instance().registry.people.run(self.run_id)

    @property
    def transform(self) -> Transform | None:
        """The script or notebook that made its content."""
        return state.instance().registry.people.transform(self.transform_id)


def _time(ns: int) -> datetime | None:
    # Whole microseconds, cut off and never rounded up: a query with a time that was read finds its artifact again.
    return EPOCH + timedelta(microseconds=ns // 1000) if ns else None
