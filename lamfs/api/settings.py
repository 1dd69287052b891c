"""``ln.settings``: the storage, the user, and defaults of new artifacts. One object per process, any thread."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lamfs import config
from lamfs.api import state
from lamfs.api.paths import storage_path
from lamfs.api.strict import Strict
from lamfs.config import UserSettings
from lamfs.errors import InvalidArgument

if TYPE_CHECKING:
    from cloudpathlib import S3Path


class CreationSettings(Strict):
    """Defaults of new artifacts, for this process. LaminDB's names."""

    def __init__(self) -> None:
        self._virtual = True

    @property
    def artifact_use_virtual_keys(self) -> bool:
        """Whether keys given to new artifacts are virtual (the object is at ``.lamindb/{uid}{suffix}``) or real."""
        return self._virtual

    @artifact_use_virtual_keys.setter
    def artifact_use_virtual_keys(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise InvalidArgument(f"artifact_use_virtual_keys is True or False, not {value!r}.")
        self._virtual = value

    _artifact_use_virtual_keys = artifact_use_virtual_keys


class Settings(Strict):
    """The class of ``ln.settings``."""

    def __init__(self) -> None:
        self._creation = CreationSettings()

    @property
    def creation(self) -> CreationSettings:
        """Defaults of new artifacts."""
        return self._creation

    @property
    def artifact_use_virtual_keys(self) -> bool:
        """See CreationSettings.artifact_use_virtual_keys."""
        return self.creation.artifact_use_virtual_keys

    @artifact_use_virtual_keys.setter
    def artifact_use_virtual_keys(self, value: bool) -> None:
        self.creation.artifact_use_virtual_keys = value

    _artifact_use_virtual_keys = artifact_use_virtual_keys

    @property
    def storage(self) -> Path | S3Path:
        """The root of the default storage: a pathlib.Path, or cloudpathlib's S3Path. Raises NotSetUp."""
        return storage_path(state.instance().settings.storage)

    @property
    def instance(self) -> str:
        """The current instance, ``owner/name``. Raises NotSetUp."""
        return state.instance().settings.slug

    @property
    def user(self) -> UserSettings:
        """The user who is logged in, or the user of the operating system."""
        return config.current_user()

    @property
    def cache_dir(self) -> Path:
        """The folder of files that ``artifact.cache()`` returns."""
        return config.cache_dir()

    @property
    def scratch_names(self) -> tuple[str, ...]:
        """Patterns of names whose files are not artifacts. A new mount uses the patterns that are set when it starts.

        Raises InvalidArgument for a text that cannot be a pattern. None brings the defaults back.
        """
        return config.scratch_names()

    @scratch_names.setter
    def scratch_names(self, patterns: Iterable[str] | None) -> None:
        if isinstance(patterns, str):
            raise InvalidArgument(f"scratch_names is a list of patterns, such as ['{patterns}'].")
        config.set_scratch_names(patterns)

    def __repr__(self) -> str:
        where = state.instance().settings if state.is_set_up() else None
        return (
            f"Settings(user={self.user.handle!r}, instance={where.slug if where else None!r},"
            f" storage={where.storage.root if where else None!r}, cache_dir={str(self.cache_dir)!r},"
            f" artifact_use_virtual_keys={self.artifact_use_virtual_keys})"
        )


settings = Settings()
