"""``artifact.key = …; artifact.save()``: what a rename is, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamfs as ln
from lamfs import config
from lamfs.api import state
from lamfs.errors import AlreadyExists, InvalidArgument, InvalidName, LamfsError, Locked, NotFound
from tests.component.api.conftest import Place
from tests.component.api.test_artifacts import clean, write


def keys() -> list[str | None]:
    return [artifact.key for artifact in ln.Artifact.filter()]


@pytest.mark.parametrize("virtual", [True, False])
def test_a_key_is_changed(place: Place, files: Path, virtual: bool) -> None:
    place.init()
    ln.settings.artifact_use_virtual_keys = virtual
    artifact = ln.Artifact(files / "iris.csv", key="iris.csv", description="flowers").save()
    uid, digest, before = artifact.uid, artifact.hash, str(artifact.path)
    artifact.key = "new//deep/flowers.csv"
    assert artifact.key == "new/deep/flowers.csv"
    assert keys() == ["iris.csv"]
    assert artifact.save() is artifact
    now = ln.Artifact.get(key="new/deep/flowers.csv")
    assert (now.uid, now.hash, now.description, now.key_is_virtual) == (uid, digest, "flowers", virtual)
    assert str(now.path) == (before if virtual else f"{place.root}/new/deep/flowers.csv")
    assert now.cache().read_bytes() == (files / "iris.csv").read_bytes()
    assert keys() == ["new/deep/flowers.csv"]
    clean()


def test_a_new_suffix_is_the_keys(local: Place, files: Path) -> None:
    local.init()
    artifact = ln.Artifact(files / "iris.csv", key="iris.csv").save()
    before = artifact.path
    artifact.key = "iris.tsv.gz"
    assert artifact.save().suffix == ".tsv.gz"
    assert not before.exists()
    assert artifact.path.name == f"{artifact.uid}.tsv.gz"
    clean()


def test_an_auto_managed_artifact_gets_a_key(local: Place, files: Path) -> None:
    local.init()
    artifact = ln.Artifact(files / "iris.csv", description="no key").save()
    artifact.key = None
    artifact.key = "a/iris.csv"
    artifact.description = "a key"
    artifact.save()
    assert ln.Artifact.get(key="a/iris.csv").description == "a key"
    with pytest.raises(InvalidArgument, match=r"'a/iris\.csv' cannot do without a key"):
        artifact.key = None
    clean()


def test_what_was_renamed_meanwhile_is_renamed_from_there(local: Place, files: Path) -> None:
    local.init()
    one = ln.Artifact(files / "iris.csv", key="a.csv").save()
    other = ln.Artifact.get(one.uid)
    other.key = "b.csv"
    other.save()
    one.key = "a.csv"
    one.save()
    assert keys() == ["a.csv"]
    other.description = "says nothing of the key"
    other.save()
    assert keys() == ["a.csv"]
    one.key = "a.csv"
    one.save()
    clean()


def test_a_taken_key_is_refused_and_nothing_has_changed(local: Place, files: Path) -> None:
    local.init()
    one = ln.Artifact(files / "iris.csv", key="a.csv").save()
    two = ln.Artifact(files / "iris.data", key="dir/b.csv").save()
    for key, error, said in (
        ("dir/b.csv", AlreadyExists, r"'a\.csv' cannot get the key 'dir/b\.csv': another file has it"),
        ("dir", AlreadyExists, "'dir': a directory has it"),
        ("dir/b.csv/c.csv", InvalidName, r"'dir/b\.csv' is a file"),
    ):
        one.key = key
        one.description = "not this"
        with pytest.raises(error, match=said):
            one.save()
        one = ln.Artifact.get(one.uid)
        one.replace(files / "new_iris.csv")
        one.key = key
        with pytest.raises(error, match=said):
            one.save()
        now = ln.Artifact.get(one.uid)
        assert (now.key, now.description, now.size) == ("a.csv", None, 224)
        one = now
    assert ln.Artifact.get(key="dir/b.csv") == two
    for key in ("../x", "", ".lamindb/x", ".lamfs/x", "x" * 256):
        with pytest.raises(InvalidName):
            one.key = key
    clean()


def test_a_real_key_may_be_no_longer_than_an_s3_key(local: Place, files: Path) -> None:
    local.init()
    ln.settings.artifact_use_virtual_keys = False
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    with pytest.raises(InvalidName, match="1024 bytes"):
        artifact.key = "/".join(["x" * 200] * 6)


def test_in_the_trash_and_deleted_for_good(local: Place, files: Path) -> None:
    local.init()
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    artifact.delete()
    for key in ("b.csv", "a.csv"):
        artifact.key = key
        with pytest.raises(InvalidArgument, match=f"{artifact.uid} is in the trash; restore it as '{key}'"):
            artifact.save()
    artifact.restore("b.csv")
    assert artifact.key == "b.csv"
    artifact.delete(permanent=True)
    artifact.key = "c.csv"
    with pytest.raises(NotFound):
        artifact.save()
    clean()


def test_a_machine_that_may_not_change_the_instance(
    local: Place, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.init(name="shared")
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    artifact.key = "b.csv"
    (config.load_instance().directory / "lease.json").unlink()
    monkeypatch.setattr(config, "machine_token", lambda: "another machine")
    with pytest.raises(Locked):
        artifact.save()
    assert keys() == ["a.csv"]


def test_before_the_first_save(local: Place, files: Path) -> None:
    local.init()
    artifact = ln.Artifact(files / "iris.csv", key="a.csv")
    artifact.key = "b/c.tsv"
    artifact.replace(files / "iris.data")
    assert artifact.key == "b/c.data"
    artifact.key = "b/d.tsv"
    artifact.save()
    assert (artifact.key, artifact.suffix, keys()) == ("b/d.tsv", ".tsv", ["b/d.tsv"])
    assert artifact.path.suffix == ".tsv"
    late = ln.Artifact(files / "new_iris.csv", key="x.csv")
    late.key = "b/d.tsv"
    with pytest.raises(AlreadyExists, match=r"'b/d\.tsv'"):
        late.save()
    clean()


@pytest.mark.parametrize("virtual", [True, False])
def test_content_and_key_in_one_save(place: Place, files: Path, tmp_path: Path, virtual: bool) -> None:
    place.init()
    ln.settings.artifact_use_virtual_keys = virtual
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    uid = artifact.uid
    artifact.replace(files / "new_iris.csv")
    artifact.key = "b/b.csv"
    artifact.save()
    assert (artifact.uid, artifact.key, artifact.cache().read_bytes()) == (
        uid,
        "b/b.csv",
        (files / "new_iris.csv").read_bytes(),
    )
    clean()
    # One after the other, whatever comes first: the suffix of the file changes the key that was there before it.
    artifact.key = "c.csv"
    artifact.replace(files / "iris.data").save()
    assert (artifact.uid, artifact.key, artifact.path.suffix) == (uid, "c.data", ".data")
    artifact.replace(write(tmp_path / "d.txt", "d"))
    artifact.key = "d.csv"
    artifact.save()
    assert (artifact.key, artifact.path.suffix, artifact.cache().read_text()) == ("d.csv", ".csv", "d")
    # Equal bytes: only the key changes.
    artifact.key = "e.csv"
    artifact.replace(write(tmp_path / "d.csv", "d")).save()
    assert (ln.Artifact.get(key="e.csv").uid, keys()) == (uid, ["e.csv"])
    clean()


def test_when_storage_fails_the_new_content_can_be_saved_again(
    local: Place, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.init()
    artifact = ln.Artifact(files / "iris.csv", key="a.csv").save()
    artifact.replace(files / "new_iris.csv")
    artifact.key = "b.csv"
    store = state.instance().store

    def fail(*_: object, **__: object) -> None:
        raise LamfsError("out of order")

    with monkeypatch.context() as broken:
        broken.setattr(store, "put_file", fail)
        with pytest.raises(LamfsError, match="out of order"):
            artifact.save()
    assert ln.Artifact.get(artifact.uid).size == 224
    artifact.save()
    assert (ln.Artifact.get(key="b.csv").uid, artifact.size) == (artifact.uid, 229)
    clean()
