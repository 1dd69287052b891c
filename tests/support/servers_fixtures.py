"""Fixtures for tests/support/servers.py and proxy.py: one server of each kind per test run, one root per test.

``seaweed_config`` and ``ministack_config`` are StorageConfigs of an empty root in a shared bucket, with credentials in
the environment (child processes inherit them). ``seaweed_proxy`` is a FaultProxy in front of SeaweedFS, and
``through(proxy, config)`` is the same root behind it.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator

import pytest

from lamfs.storage.base import StorageConfig
from tests.support.proxy import FaultProxy
from tests.support.servers import MinistackServer, RcloneServer, SeaweedServer, Server

BUCKET = "lamfs-tests"


def _session_server(kind: type[Server], factory: pytest.TempPathFactory) -> Iterator[Server]:
    with kind(factory.mktemp(kind.name)) as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SeaweedFS, for the whole test run."""
    yield from _session_server(SeaweedServer, tmp_path_factory)


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ministack, for the whole test run."""
    yield from _session_server(MinistackServer, tmp_path_factory)


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """rclone serve s3, for the whole test run."""
    yield from _session_server(RcloneServer, tmp_path_factory)


def _own_root(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageConfig]:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    yield server.config(BUCKET, f"t{secrets.token_hex(4)}/root")
    server.ensure_running()


@pytest.fixture
def seaweed_config(seaweed: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageConfig]:
    """A root for this test on SeaweedFS. After the test the server is running again, whatever the test did."""
    yield from _own_root(seaweed, monkeypatch)


@pytest.fixture
def ministack_config(ministack: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageConfig]:
    """A root for this test on ministack. A test must not kill the server: it would lose the bucket."""
    yield from _own_root(ministack, monkeypatch)


@pytest.fixture
def rclone_config(rclone: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageConfig]:
    """A root for this test on rclone."""
    yield from _own_root(rclone, monkeypatch)


@pytest.fixture
def seaweed_proxy(seaweed: Server) -> Iterator[FaultProxy]:
    """A proxy in front of SeaweedFS."""
    with FaultProxy(seaweed.port) as proxy:
        yield proxy


def through(proxy: FaultProxy, config: StorageConfig, **changes: float) -> StorageConfig:
    """The same root, reached through the proxy. ``changes``: as for dataclasses.replace."""
    return dataclasses.replace(config, endpoint_url=proxy.url, **changes)
