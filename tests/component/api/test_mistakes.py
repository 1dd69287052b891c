"""What people get wrong in Python: nothing is lost, nothing silently ignored, and the sentence names the thing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

import lamfs as ln
from lamfs import config
from lamfs.api import state
from lamfs.errors import InvalidArgument, InvalidName, NotFound
from tests.component.api.conftest import Place


@pytest.fixture
def store(local: Place) -> Place:
    local.init()
    return local


def test_names_that_do_not_exist_cannot_be_set(store: Place, files: Path) -> None:
    with pytest.raises(AttributeError, match="did you mean 'artifact_use_virtual_keys'"):
        ln.settings.artifact_use_virtual_key = False  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="did you mean 'artifact_use_virtual_keys'"):
        ln.settings.creation.artifact_use_virtual_key = False  # type: ignore[attr-defined]
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    with pytest.raises(AttributeError, match="did you mean 'key'"):
        artifact.keyy = "b.csv"  # type: ignore[attr-defined]
    with pytest.raises(
        AttributeError, match="'size' of Artifact can be read only; what can be set is description, key"
    ):
        artifact.size = 3  # type: ignore[misc]


@pytest.mark.parametrize("value", [0, 1, "no"])
def test_what_is_neither_true_nor_false_deletes_nothing(store: Place, files: Path, value: Any) -> None:
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    for trashed in (False, True):
        with pytest.raises(InvalidArgument, match="permanent is True, False or None"):
            artifact.delete(permanent=value)
        with pytest.raises(InvalidArgument, match="storage is True, False or None"):
            artifact.delete(permanent=True, storage=value)
        if not trashed:
            artifact.delete()
    assert artifact.restore().cache().read_bytes() == (files / "iris.csv").read_bytes()


def test_a_key_is_not_asked_for_as_a_uid(store: Place, files: Path) -> None:
    ln.Artifact(files / "iris.csv", key="raw/a.csv").save()
    with pytest.raises(NotFound, match=r"'raw/a\.csv' is no uid .*Artifact\.get\(key='raw/a\.csv'\)"):
        ln.Artifact.get("raw/a.csv")


def test_a_key_with_a_slash_at_its_end_is_a_directory(store: Place, files: Path) -> None:
    one = ln.Artifact(files / "iris.csv", key="folder/").save()
    two = ln.Artifact(files / "new_iris.csv", key="folder/").save()
    assert (one.key, two.key) == ("folder/iris.csv", "folder/new_iris.csv")
    one.key = "other/"
    assert one.save().key == "other/iris.csv"
    two.delete()
    assert two.restore(key="back/").key == "back/new_iris.csv"
    with pytest.raises(InvalidName, match=r"give 'abs/x\.csv'"):
        ln.Artifact(files / "iris.csv", key="/abs/x.csv")
    with pytest.raises(InvalidName):
        ln.Artifact(files / "iris.csv", key="/")


def test_what_is_not_in_the_trash_is_not_restored_elsewhere(store: Place, files: Path) -> None:
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    with pytest.raises(InvalidName):
        artifact.restore(key="../e")
    with pytest.raises(InvalidArgument, match=r"'a\.csv' is not in the trash"):
        artifact.restore(key="e.csv")
    assert artifact.restore().key == "a.csv"


def test_the_size_is_what_was_read(store: Place, tmp_path: Path) -> None:
    """Files of /proc say that they have 0 bytes."""
    wanted = Path("/proc/version").read_bytes()
    artifact = ln.Artifact("/proc/version", key="version.txt").save()
    assert artifact.size == len(wanted)
    assert artifact.cache().read_bytes() == wanted
    (tmp_path / "x.txt").write_bytes(b"x")
    other = ln.Artifact(tmp_path / "x.txt", key="x.txt").save()
    other.replace("/proc/version").save()
    assert other.cache().read_bytes() == wanted
    assert os.listdir(config.temporary_folder()) == []


def test_links_in_a_folder(store: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("a")
    (folder / "sub/b").write_text("b")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/c").write_text("c")
    (folder / "dir").symlink_to(tmp_path / "elsewhere")
    (folder / "file").symlink_to(folder / "a")
    (folder / "nowhere").symlink_to("gone")
    (folder / "sub/up").symlink_to(folder)
    os.mkfifo(folder / "fifo")
    plain = {artifact.key for artifact in ln.Artifact.from_dir(folder)}
    assert plain == {"folder/a", "folder/sub/b"}
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [Path(line.rpartition(": ")[2]).name for line in said] == ["dir", "fifo", "file", "nowhere", "up"]
    followed = {artifact.key for artifact in ln.Artifact.from_dir(folder, follow_links=True)}
    assert followed == {"folder/a", "folder/sub/b", "folder/dir/c", "folder/file"}


def test_a_folder_that_cannot_be_read_is_an_error(
    store: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that cannot be read is named, and nothing is made."""
    folder = tmp_path / "folder"
    (folder / "secret").mkdir(parents=True)
    (folder / "a").write_text("a")
    for number in range(12):
        (folder / f"hidden{number:02}").write_text("b")
    listed, opened = os.listdir, os.open

    def refuse(path: str) -> list[str]:  # as for anybody but root
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    def refuse_file(path: object, *words: int, **options: int) -> int:
        if "hidden" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("lamfs.ops.folders.os.listdir", refuse)
    with pytest.raises(InvalidArgument, match="secret cannot be read"):
        ln.Artifact.from_dir(folder)
    monkeypatch.setattr("lamfs.ops.folders.os.open", refuse_file)
    with pytest.raises(InvalidArgument) as caught:
        ln.Artifact.from_dir(folder)
    said = str(caught.value)
    assert [f"hidden{number:02} cannot be read" in said for number in range(12)] == [True] * 10 + [False] * 2
    assert said.endswith(" And 3 more.")
    assert caught.value.errno == 13
    assert len(ln.Artifact.filter()) == 0


def test_a_folder_without_a_run_is_said_once(store: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "folder" / name).write_text(name)
    assert len(ln.Artifact.from_dir(tmp_path / "folder")) == 3
    said = [record.getMessage() for record in caplog.records]
    assert sum("no run & transform" in line for line in said) == 1
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a").write_text("a")
    ln.Artifact.from_dir(tmp_path / "one")
    assert "made 1 artifact of" in caplog.text


def test_values_of_a_wrong_type_are_refused_at_once(store: Place, files: Path) -> None:
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    wrong: Any = 5
    for attempt in (
        lambda: ln.Artifact(files / "iris.csv", key=wrong),
        lambda: ln.Artifact(files / "iris.csv", description=wrong),
        lambda: ln.Artifact(files / "iris.csv", key="b.csv", accessor=wrong),
        lambda: ln.Artifact(files / "iris.csv", key="b.csv", run=wrong),
        lambda: ln.Artifact.from_dir(wrong),
        lambda: ln.Artifact.from_dir(files, key=wrong),
        lambda: ln.Artifact.get(wrong),
        lambda: ln.Artifact.get(key=wrong),
        lambda: artifact.restore(key=wrong),
        lambda: setattr(artifact, "key", wrong),
        lambda: setattr(artifact, "description", wrong),
    ):
        with pytest.raises(InvalidArgument, match="int"):
            attempt()
    assert (artifact.key, artifact.description) == ("a.csv", None)
    artifact.description = None
    assert artifact.save().key == "a.csv"


def test_a_replacement_that_changes_the_key_says_so(
    store: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rep.txt").write_text("one")
    (tmp_path / "n").write_text("two")
    artifact = ln.Artifact(tmp_path / "rep.txt", key="d/rep.txt").save()
    artifact.replace(tmp_path / "n")
    assert "its key is now 'd/rep', upon `save()`, and not 'd/rep.txt'" in caplog.text
    assert artifact.save().key == "d/rep"
    caplog.clear()
    (tmp_path / "m").write_text("three")
    artifact.replace(tmp_path / "m").save()
    assert "its key is now" not in caplog.text


def test_an_artifact_of_the_bucket_is_not_written_by_its_path(
    seaweed_config: object, files: Path, tmp_path: Path
) -> None:
    Place(seaweed_config).init()  # type: ignore[arg-type]
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    wanted = (files / "iris.csv").read_bytes()
    path = artifact.path
    assert path == ln.settings.storage / artifact._record.revision.object_key
    assert ln.settings.storage / artifact._record.revision.object_key == path
    assert path.read_bytes() == wanted
    with open(path, "rb") as file:
        assert file.read() == wanted
    for mode in ("w", "wb", "a", "r+", "rb+"):
        with pytest.raises(InvalidArgument, match=r"artifact\.replace\(file\)"):
            open(path, mode)
        with pytest.raises(InvalidArgument, match=r"artifact\.replace\(file\)"):
            path.open(mode)
    for attempt in (
        lambda: path.write_text("x"),
        lambda: path.write_bytes(b"x"),
        path.touch,
        lambda: path.upload_from(tmp_path),
    ):
        with pytest.raises(InvalidArgument), contextlib.suppress(FileNotFoundError):
            attempt()
    with open(path, "rb") as file:
        assert file.read() == wanted
    assert artifact.cache().read_bytes() == wanted
    assert state.instance().store.head(artifact._record.revision.object_key).size == len(wanted)
