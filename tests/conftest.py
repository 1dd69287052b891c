"""What every test gets. Fixtures live in the plugin files named here, one per area; add a line for yours."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# How long something takes fails no test: the machine may be busy.
settings.register_profile("lamfs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lamfs")

pytest_plugins = [
    "tests.support.mounts",
    "tests.support.servers_fixtures",
    "tests.support.confined",
    "tests.support.clock",
]


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the directories, credentials or settings of the person who runs it."""
    for name, folder in (
        ("LAMFS_CONFIG_DIR", "config"),
        ("LAMFS_DATA_DIR", "data"),
        ("LAMFS_CACHE_DIR", "cache"),
    ):
        monkeypatch.setenv(name, f"{tmp_path}/lamfs/{folder}")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
