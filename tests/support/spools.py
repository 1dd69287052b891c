"""Where the spool of a machine is. Each machine has its own data directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamfs.config import InstanceSettings
from lamfs.model import StorageConfig


def spool_of(slug: str, storage: StorageConfig, data_dir: str | os.PathLike[str]) -> Path:
    """The spool folder of an instance on the machine with this data directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMFS_DATA_DIR", os.fspath(data_dir))
        root, parts = InstanceSettings(slug, storage).spool_place
        return Path(root, *parts)
