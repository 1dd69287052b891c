"""Settings: every value comes back as it was, files are private and whole, damaged ones are said."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lamfs import config
from lamfs.config import InstanceSettings
from lamfs.errors import InvalidArgument, NotSetUp
from lamfs.model import BASE62, StorageConfig

handles = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")
texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
storages = st.builds(
    StorageConfig,
    root=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).map(lambda text: f"/{text}"),
    endpoint_url=texts,
    region=texts,
    profile=texts,
    path_style=st.booleans(),
    timeout=st.floats(0.1, 1e6),
)
relaxed = hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(owner=handles, name=handles, storage=storages)
def test_an_instance_comes_back(owner: str, name: str, storage: StorageConfig) -> None:
    instance = InstanceSettings(f"{owner}/{name}", storage)
    config.save_instance(instance)
    assert config.load_instance(instance.slug) == instance
    config.set_current(instance.slug)
    assert config.load_instance() == instance
    config.remove_instance(instance.slug)
    assert config.current_slug() is None
    with pytest.raises(NotSetUp):
        config.load_instance(instance.slug)


@relaxed
@given(handle=handles, email=texts, name=texts)
def test_a_user_comes_back(handle: str, email: str | None, name: str | None) -> None:
    user = config.make_user(handle, email, name)
    assert len(user.uid) == 8
    assert set(user.uid) <= set(BASE62)
    assert user.uid == config.user_uid(handle)
    config.save_user(user)
    assert config.load_user() == user
    assert config.known_user(handle) == user


def test_files_are_private_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        config.write_json(tmp_path / "new" / "a.json", {"a": 1})
    finally:
        os.umask(old)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "new/a.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"slug": "a/b"}', '{"slug": "a/b", "storage": 3}', "\0"])
def test_damaged_settings_are_said(text: str) -> None:
    config.save_instance(InstanceSettings("a/b", StorageConfig("/x")))
    path = next((config.config_dir() / "instances").iterdir())
    path.write_text(text)
    with pytest.raises(NotSetUp, match="settings file"):
        config.load_instance("a/b")


def test_settings_of_a_newer_lamfs_can_be_read() -> None:
    config.save_instance(InstanceSettings("a/b", StorageConfig("/x")))
    path = next((config.config_dir() / "instances").iterdir())
    data = config.read_json(path)
    assert data is not None
    data["storage"]["colour"] = "red"
    config.write_json(path, data)
    assert config.load_instance("a/b").storage.root == "/x"


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAMFS_DATA_DIR", str(tmp_path / "file/below"))
    with pytest.raises(NotSetUp, match="cannot be made"):
        config.data_dir()


def test_places_of_an_instance(tmp_path: Path) -> None:
    local = InstanceSettings("a/b", StorageConfig("/store"))
    remote = InstanceSettings("a/b", StorageConfig("s3://bucket/p"))
    assert local.spool_place == ("/store", (".lamindb", "_spool", f"{local.id.hex}.{config.spool_mark()}"))
    assert remote.spool_place == (str(remote.directory), ("spool",))
    assert remote.registry_path == config.data_dir() / remote.id.hex / "registry.lndb"
    assert remote.snapshot_key == f"{remote.id.hex}.lndb"


def test_the_machine_has_one_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = config.machine_token()
    assert config.machine_token() == name
    monkeypatch.setenv("LAMFS_DATA_DIR", str(tmp_path / "another"))
    assert config.machine_token() != name


def test_a_spool_is_that_of_one_data_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a copied one, too, whose original may be at work: a name of its host or the token alone would not tell."""
    mark = config.spool_mark()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "renamed")
        assert config.spool_mark() == mark
    moved = config.data_dir().rename(tmp_path / "moved")
    shutil.copytree(moved, tmp_path / "copied")
    monkeypatch.setenv("LAMFS_DATA_DIR", str(moved))
    assert config.spool_mark() == mark
    monkeypatch.setenv("LAMFS_DATA_DIR", str(tmp_path / "copied"))
    assert config.spool_mark() != mark
    assert config.machine_token()


def test_the_environment_names_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    config.set_current("a/b")
    monkeypatch.setenv("LAMFS_INSTANCE", "c/d")
    assert config.current_slug() == "c/d"
    monkeypatch.setenv("LAMFS_INSTANCE", "c/../d")
    with pytest.raises(InvalidArgument):
        config.current_slug()


# -- directories that others can write to ------------------------------------------------------------------------------

PLACES = {"LAMFS_CONFIG_DIR": config.config_dir, "LAMFS_DATA_DIR": config.data_dir, "LAMFS_CACHE_DIR": config.cache_dir}


@pytest.mark.parametrize("variable", PLACES)
def test_a_directory_that_others_can_write_is_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    monkeypatch.setenv(variable, str(folder))
    get = PLACES[variable]
    assert get() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)  # it was checked before: each change is seen
    with pytest.raises(NotSetUp, match=rf"{folder} \({variable}\) can be written by everybody.*chmod go-w {folder}"):
        get()
    folder.chmod(0o1777)
    with pytest.raises(NotSetUp, match="make a folder of your own below it"):
        get()
    folder.chmod(0o755)
    assert get() == folder


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    monkeypatch.setenv("LAMFS_DATA_DIR", str(folder))
    if os.geteuid() == 0:
        os.chown(folder, 65534, -1)
    else:
        another = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(NotSetUp, match=rf"{folder} \(LAMFS_DATA_DIR\) belongs to .*sudo chown"):
        config.data_dir()


def test_a_link_to_a_directory_of_ones_own_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.setenv("LAMFS_DATA_DIR", str(tmp_path / "link"))
    assert config.data_dir() == tmp_path / "link"
    (tmp_path / "mine").chmod(0o777)
    with pytest.raises(NotSetUp, match="can be written by everybody"):
        config.data_dir()


DAMAGED = {
    "no JSON": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "huge": '{"a": "' + "x" * (2 << 20) + '"}',
    "not a number": '{"slug": NaN}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_settings_file_that_is_anything(text: str) -> None:
    for name, read in (("user.json", config.current_user), ("current.json", config.load_instance)):
        (config.config_dir() / name).write_text(text)
        with pytest.raises(NotSetUp, match="mend or delete it"):
            read()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slug", 5), ("slug", "a/b\n"), ("slug", ["a/b"]), ("storage", []), ("storage", {"root": 5}),
        ("storage", {"root": "/x", "timeout": "long"}), ("storage", {"root": "/x", "timeout": 1e300}),
        ("storage", {"root": "/x", "path_style": 1}), ("storage", {"root": "/x", "endpoint_url": {}}),
    ],
)  # fmt: skip
def test_settings_of_an_instance_of_odd_types(name: str, value: object) -> None:
    path = config._instance_path("a/b")
    config.write_json(path, {"slug": "a/b", "storage": {"root": "/x"}})
    assert config.load_instance("a/b").storage.root == "/x"
    config.write_json(path, {"slug": "a/b", "storage": {"root": "/x"}, name: value})
    with pytest.raises(NotSetUp, match="is damaged"):
        config.load_instance("a/b")


def test_a_user_and_a_machine_of_odd_types() -> None:
    config.write_json(config.config_dir() / "user.json", {"handle": 5, "uid": "x"})
    with pytest.raises(NotSetUp, match="damaged"):
        config.load_user()
    for token in (None, 5, ""):
        config.write_json(config.data_dir() / "machine.json", {"token": token})
        with pytest.raises(NotSetUp, match="token"):
            config.machine_token()
    config.write_json(config.config_dir() / "current.json", {"slug": ["a/b\n"]})
    with pytest.raises(InvalidArgument):
        config.current_slug()
