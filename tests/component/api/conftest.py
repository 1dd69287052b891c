"""An API that starts fresh in every test, on a local folder and on SeaweedFS."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lamfs as ln
from lamfs.api import state
from lamfs.model import StorageConfig

FILES = Path(__file__).parents[3] / "test-files"


@dataclass
class Place:
    """A storage root that a test may init, and how to reach it."""

    config: StorageConfig

    @property
    def root(self) -> str:
        return self.config.root

    def init(self, **kwargs: str) -> None:
        ln.setup.init(
            storage=self.root,
            endpoint_url=self.config.endpoint_url,
            region=self.config.region,
            path_style=self.config.path_style,
            **kwargs,
        )


@pytest.fixture(autouse=True)
def _fresh_api(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, logger="lamfs")
    ln.settings.artifact_use_virtual_keys = True
    yield
    state.forget()
    ln.settings.artifact_use_virtual_keys = True


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The same test on both kinds of storage."""
    if request.param == "local":
        return Place(StorageConfig(f"{tmp_path}/test-add-replace-stage"))
    return Place(request.getfixturevalue("seaweed_config"))


@pytest.fixture
def local(tmp_path: Path) -> Place:
    """A local folder."""
    return Place(StorageConfig(f"{tmp_path}/store"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The three files of the lifecycle, where they may be changed."""
    folder = tmp_path / "test-files"
    folder.mkdir()
    for name in ("iris.csv", "iris.data", "new_iris.csv"):
        (folder / name).write_bytes((FILES / name).read_bytes())
    return folder
