"""What ``Artifact.filter`` returns: a list of artifacts with LaminDB's words for looking at it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lamfs.api.fields import ArtifactFields
from lamfs.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    import pandas as pd

A = TypeVar("A", bound=ArtifactFields)


class QuerySet(list[A]):
    """Artifacts found at one moment, oldest first. An ordinary list besides."""

    def all(self) -> QuerySet[A]:
        """All of them."""
        return self

    def one(self) -> A:
        """The only one. Raises NotFound when there is none, InvalidArgument when there are more."""
        found = self.one_or_none()
        if found is None:
            raise NotFound("No artifact meets these conditions.")
        return found

    def one_or_none(self) -> A | None:
        """The only one, or None. Raises InvalidArgument when there are more."""
        if len(self) > 1:
            raise InvalidArgument(f"{len(self)} artifacts meet these conditions; name one more closely.")
        return self[0] if self else None

    def first(self) -> A | None:
        """The oldest, or None."""
        return self[0] if self else None

    def last(self) -> A | None:
        """The newest, or None."""
        return self[-1] if self else None

    def exists(self) -> bool:
        """Whether there is any."""
        return bool(self)

    def count(self, *value: Any) -> int:
        """How many there are; with a value, how often that is in the list."""
        return super().count(*value) if value else len(self)

    def cache(self, progress: Callable[[int], None] | None = None) -> list[Path]:
        """``artifact.cache()`` of each, many at a time. Returns the paths in the order of this list.

        ``progress`` gets bytes, from any thread. An error (NotFound, storage errors) is raised after all other files
        have come.
        """
        from lamfs.api import state
        from lamfs.ops import caching

        records = {artifact.uid: artifact._record for artifact in self}
        with closing(caching.fill(state.instance(), records.values(), progress=progress)) as filling:
            done = {found.record.uid: found for found in filling}
        for found in done.values():
            if found.error is not None:
                raise found.error
        return [path for artifact in self if (path := done[artifact.uid].path) is not None]

    def df(self) -> pd.DataFrame:
        """As a pandas DataFrame, one row an artifact, by id. Raises NotSetUp without pandas."""
        from lamfs.api.frames import pandas

        columns = (
            "id", "uid", "key", "description", "suffix", "accessor", "size", "hash", "hash_type", "visibility",
            "key_is_virtual", "storage_id", "transform_id", "run_id", "created_by_id", "created_at", "updated_at",
        )  # fmt: skip
        rows = [{name: getattr(artifact, name) for name in columns} for artifact in self]
        frame: pd.DataFrame = pandas().DataFrame(rows, columns=list(columns)).set_index("id")
        return frame
