"""The commands on a real S3 server: the life of an artifact, and what is said of a server that is not as it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamfs.model import StorageConfig
from lamfs.storage import open_store
from tests.support.commands import ROOT, lamfs, quick, quick_json
from tests.support.servers import SeaweedServer

FILES = ROOT / "test-files"


def options(config: StorageConfig) -> list[str]:
    assert config.endpoint_url is not None
    return ["--endpoint-url", config.endpoint_url, "--region", config.region or "", "--path-style"]


def keys(config: StorageConfig) -> set[str]:
    """Object keys of artifacts."""
    store = open_store(config)
    try:
        return {each.key for each in store.list() if "/_" not in each.key and not each.key.endswith(".lndb")}
    finally:
        store.close()


def test_the_life_of_an_artifact(seaweed_config: StorageConfig) -> None:
    config = seaweed_config
    lamfs("login", "testuser1")
    said = lamfs("init", "--storage", config.root, "--name", "on-s3", *options(config))
    assert f"{config.root}/" in said
    assert ".lndb" in said
    uid = lamfs("save", FILES / "iris.csv", "--key", "a/iris.csv").split()[0]
    assert keys(config) == {f".lamindb/{uid}.csv"}
    assert quick_json("info", uid)["storage_path"] == f"{config.root}/.lamindb/{uid}.csv"
    assert lamfs("replace", uid, FILES / "iris.data").split() == [uid, "a/iris.data"]
    assert keys(config) == {f".lamindb/{uid}.data"}
    path = Path(lamfs("cache", "a/iris.data").strip())
    assert path.read_bytes() == (FILES / "iris.data").read_bytes()
    lamfs("delete", uid)
    lamfs("restore", uid)
    assert lamfs("ls").split() == ["a/iris.data"]
    lamfs("delete", "--permanent", "--yes", uid)
    assert keys(config) == set()
    lamfs("save", FILES / "new_iris.csv", "--key", "real.csv", "--real-key")
    assert keys(config) == {"real.csv"}
    assert lamfs("fsck").splitlines()[-1].startswith("testuser1/on-s3: clean")
    lamfs("close")
    lamfs("connect", "testuser1/on-s3")
    lamfs("delete-instance", "on-s3", "--force")
    assert quick_json("instances") == []
    assert keys(config) == {"real.csv"}


def test_a_bucket_that_is_missing_is_said_at_init(seaweed_config: StorageConfig) -> None:
    problem = quick("init", "--storage", "s3://lamfs-no-such-bucket/x", *options(seaweed_config), code=1)
    assert "lamfs-no-such-bucket" in problem
    assert quick_json("instances") == []


def test_credentials_that_do_not_suffice_are_said_at_init(
    seaweed: SeaweedServer, seaweed_config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for env, word in ((seaweed.nobody_env, "forbid"), (seaweed.reader_env, "read")):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        problem = quick("init", "--storage", seaweed_config.root, "--name", "x", *options(seaweed_config), code=1)
        assert problem.startswith("lamfs: ")
        assert seaweed_config.root in problem or "bucket" in problem, (word, problem)
        for value in env.values():
            if "secret" in value:
                assert value not in problem


def test_a_server_that_is_away_is_said_with_its_address(seaweed_config: StorageConfig) -> None:
    problem = quick(
        "init", "--storage", seaweed_config.root, "--endpoint-url", "http://127.0.0.1:9", "--path-style", code=1
    )
    assert "http://127.0.0.1:9" in problem
