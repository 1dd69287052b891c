"""Artifacts through the Python API, beside the lifecycle: keys, copies, equality, trash, places, provenance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lamfs as ln
from lamfs import hashing
from lamfs.api import state
from lamfs.errors import AlreadyExists, InvalidArgument, InvalidName, NotFound, NotSetUp
from lamfs.ops import fsck
from tests.component.api.conftest import Place
from tests.component.api.test_lifecycle import NO_RUN, said


@pytest.fixture
def store(local: Place) -> Place:
    local.init()
    return local


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def clean() -> None:
    report = fsck.check(state.instance(), data=True)
    assert report.problems == []


def test_without_an_instance_the_next_step_is_said(files: Path) -> None:
    with pytest.raises(NotSetUp, match=r"ln\.setup\.init"):
        ln.Artifact(files / "iris.csv", key="a.csv")


def test_a_copy_is_a_file(place: Place, files: Path, tmp_path: Path) -> None:
    place.init()
    one = ln.Artifact(files / "iris.csv", key="a/one.csv").save()
    two = ln.Artifact(files / "iris.csv", key="b/two.csv").save()
    assert one != two
    assert one.hash == two.hash
    assert one.path != two.path
    one.delete(permanent=True)
    assert two.cache().read_bytes() == (files / "iris.csv").read_bytes()
    clean()


def test_bytes_that_a_bucket_has_are_not_sent_again(seaweed_config: object, tmp_path: Path) -> None:
    place = Place(seaweed_config)  # type: ignore[arg-type]
    place.init()
    big = write(tmp_path / "big.bin", os.urandom(3 << 20))
    ln.Artifact(big, key="one.bin").save()
    sent: list[int] = []
    ln.Artifact(big, key="two.bin").save(progress=sent.append)
    assert sent == []
    assert ln.Artifact.get(key="two.bin").cache().read_bytes() == big.read_bytes()


def test_an_equal_file_without_a_key_is_the_existing_artifact(
    store: Place, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = ln.Artifact(files / "iris.csv", description="first").save()
    said(caplog)
    again = ln.Artifact(files / "iris.csv", description="second")
    assert again == one
    assert said(caplog)[1].startswith(f"returning existing artifact with same hash: Artifact(uid='{one.uid}'")
    assert again.save().description == "second"
    assert ln.Artifact.get(one.uid).description == "second"
    # Not one in the trash: that would bring it back by accident.
    again.delete()
    assert ln.Artifact(files / "iris.csv", description="third") != one


def test_a_key_that_exists_means_its_artifact(store: Place, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = ln.Artifact(files / "iris.csv", key="x/iris.csv", description="flowers").save()
    said(caplog)
    assert ln.Artifact(files / "iris.csv", key="x/iris.csv") == one
    assert "returning existing artifact" in said(caplog)[-1]
    other = ln.Artifact(files / "new_iris.csv", key="x//iris.csv")
    assert said(caplog)[-1] == "artifact with key 'x/iris.csv' exists: its content will be replaced upon `save()`"
    assert other == one
    assert ln.Artifact.get(one.uid).size == 224
    other.save()
    now = ln.Artifact.get(one.uid)
    assert (now.size, now.description) == (229, "flowers")
    clean()


def test_sha1_fl_does_not_decide_on_equality(store: Place, tmp_path: Path) -> None:
    """A change in the middle of a large file has LaminDB's hash of the unchanged file, and is a change all the same."""
    size = 2 * hashing.MD5_MAX + (8 << 20)
    path = tmp_path / "big.bin"
    with path.open("wb") as stream:
        stream.truncate(size)
    artifact = ln.Artifact(path, key="big.bin").save()
    with path.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"changed")
    before = artifact.hash
    artifact.replace(path).save()
    assert artifact.hash == before
    assert artifact.hash_type == "sha1-fl"
    with artifact.cache().open("rb") as stream:
        stream.seek(size // 2)
        assert stream.read(7) == b"changed"


@pytest.mark.parametrize("virtual", [True, False])
def test_two_part_suffixes(store: Place, tmp_path: Path, virtual: bool) -> None:
    ln.settings.artifact_use_virtual_keys = virtual
    artifact = ln.Artifact(write(tmp_path / "a.tar.gz", "tar"), key="d/a.tar.gz").save()
    assert artifact.suffix == ".tar.gz"
    old = artifact.path
    artifact.replace(write(tmp_path / "b.csv", "csv")).save()
    assert (artifact.key, artifact.suffix) == ("d/a.csv", ".csv")
    assert not old.exists()
    assert artifact.path.read_bytes() == b"csv"
    artifact.replace(write(tmp_path / "v1.2", "no suffix")).save()
    assert (artifact.key, artifact.suffix) == ("d/a", "")
    clean()


def test_a_new_key_that_is_taken_is_refused_and_nothing_is_lost(store: Place, files: Path) -> None:
    one = ln.Artifact(files / "iris.csv", key="iris.csv").save()
    two = ln.Artifact(files / "iris.data", key="iris.data").save()
    with pytest.raises(InvalidArgument, match=r"'iris\.data', which is taken"):
        one.replace(files / "iris.data")
    assert one.save().key == "iris.csv"
    assert ln.Artifact.get(key="iris.data") == two
    clean()


def test_what_is_refused(store: Place, files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Pass one of key, run or description as a parameter"):
        ln.Artifact(files / "iris.csv")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        ln.Artifact(tmp_path / "missing.csv", key="a.csv")
    with pytest.raises(InvalidArgument, match="from_dir"):
        ln.Artifact(files, key="a")
    with pytest.raises(InvalidArgument, match="no regular file"):
        ln.Artifact("/dev/null", key="a")
    for key in ("../x", "a/../b", "", "/", ".lamindb/x", "a\0b", "x" * 256, "\udcff"):
        with pytest.raises(InvalidName):
            ln.Artifact(files / "iris.csv", key=key)
    ln.Artifact(files / "iris.csv", key="dir/iris.csv").save()
    with pytest.raises(InvalidArgument, match="is a directory"):
        ln.Artifact(files / "iris.csv", key="dir")
    with pytest.raises(InvalidArgument, match="is a file"):
        ln.Artifact(files / "iris.csv", key="dir/iris.csv/below.csv")
    with pytest.raises(InvalidArgument, match="path or a DataFrame"):
        ln.Artifact(12, key="a")
    with pytest.raises(InvalidArgument, match="no field 'colour'"):
        ln.Artifact.filter(colour="red")
    with pytest.raises(NotFound):
        ln.Artifact.get(key="nothing.csv")
    clean()


def test_a_key_taken_between_making_and_saving(store: Place, files: Path) -> None:
    one = ln.Artifact(files / "iris.csv", key="a.csv")
    two = ln.Artifact(files / "new_iris.csv", key="a.csv")
    one.save()
    with pytest.raises(AlreadyExists, match="taken meanwhile"):
        two.save()
    assert ln.Artifact.get(key="a.csv") == one
    clean()


def test_what_is_saved_is_what_the_file_holds_at_save(store: Place, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "when made")
    artifact = ln.Artifact(path, key="a.txt")
    path.write_text("when saved, longer")
    artifact.save()
    assert artifact.size == 18
    assert artifact.cache().read_text() == "when saved, longer"
    clean()


def test_in_place_on_a_folder(store: Place, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(Path(store.root) / "raw/run 1.csv", "1;2")
    inode = path.stat().st_ino
    artifact = ln.Artifact(path).save()
    assert (artifact.key, artifact.key_is_virtual, artifact.suffix) == ("raw/run 1.csv", False, ".csv")
    assert artifact.path.stat().st_ino == inode
    said(caplog)
    assert ln.Artifact(path) == artifact
    assert said(caplog)[-1].startswith("returning existing")
    with pytest.raises(ValueError, match=r"conflicting key 'other\.csv'"):
        ln.Artifact(write(Path(store.root) / "b.csv", "b"), key="other.csv")
    with pytest.raises(InvalidArgument, match="lamfs's own"):
        ln.Artifact(next(Path(store.root).glob("*.lndb")))
    # A path of a virtual artifact's object: that artifact.
    auto = ln.Artifact(files / "iris.csv", description="d").save()
    assert ln.Artifact(auto.path) == auto
    clean()


def test_in_place_in_a_bucket(seaweed_config: object) -> None:
    place = Place(seaweed_config)  # type: ignore[arg-type]
    place.init()
    path = ln.settings.storage / "raw/a.csv"
    path.write_text("x,y\n")
    artifact = ln.Artifact(path).save()
    assert (artifact.key, artifact.key_is_virtual, artifact.size) == ("raw/a.csv", False, 4)
    assert ln.Artifact(str(path)) == artifact
    assert artifact.cache().read_text() == "x,y\n"
    with pytest.raises(InvalidArgument, match="not in the storage"):
        ln.Artifact("s3://elsewhere/a.csv", key="a.csv")
    clean()


def test_trash_and_back(store: Place, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact = ln.Artifact(files / "iris.csv", key="d/iris.csv").save()
    said(caplog)
    artifact.delete(storage=True)
    assert said(caplog) == [
        "moving artifact to trash, storage arg is ignored",
        "moved artifact to trash (visibility = -1)",
    ]
    assert artifact.visibility == -1
    assert artifact.path.exists()
    assert ln.Artifact.filter().count() == 0
    assert ln.Artifact.filter(visibility=-1).one() == artifact
    with pytest.raises(InvalidArgument, match="permanent=True"):
        artifact.delete()
    other = ln.Artifact(files / "new_iris.csv", key="d/iris.csv").save()
    with pytest.raises(AlreadyExists):
        artifact.restore()
    assert artifact.restore(key="d/back.csv").key == "d/back.csv"
    assert artifact.visibility == 1
    assert artifact.cache().read_bytes() == (files / "iris.csv").read_bytes()
    assert other.uid != artifact.uid
    artifact.delete(permanent=True)
    with pytest.raises(NotFound):
        artifact.delete(permanent=True)
    with pytest.raises(NotFound):
        artifact.cache()
    clean()


@pytest.mark.parametrize(("answer", "stays"), [("y", False), ("n", True), (None, True)])
def test_a_real_key_is_asked_about(
    store: Place,
    files: Path,
    answer: str | None,
    stays: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ln.settings.artifact_use_virtual_keys = False
    artifact = ln.Artifact(files / "iris.csv", key="iris.csv").save()
    path = artifact.path

    class Terminal:
        def isatty(self) -> bool:
            return answer is not None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda question: answer)
    said(caplog)
    artifact.delete(permanent=True)
    assert path.exists() == stays
    assert any("dangling store" in text for text in said(caplog)) == stays


def test_a_real_key_over_a_foreign_object_and_back(store: Place, files: Path) -> None:
    ln.settings.artifact_use_virtual_keys = False
    ln.Artifact(files / "iris.csv", key="iris.csv").save().delete(permanent=True, storage=False)
    artifact = ln.Artifact(files / "new_iris.csv", key="iris.csv").save()
    assert artifact.path == ln.settings.storage / "iris.csv"
    assert artifact.path.read_bytes() == (files / "new_iris.csv").read_bytes()
    clean()


def test_provenance(store: Place, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    ln.setup.login("ada", email="ada@example.com", name="Ada")
    before = ln.Artifact(files / "new_iris.csv", key="before.csv").save()
    assert before.run is None
    run = ln.track("pipeline", key="scripts/pipeline.py")
    said(caplog)
    artifact = ln.Artifact(files / "iris.csv")  # the run is enough
    artifact.save()
    assert NO_RUN not in said(caplog)
    assert artifact.run == run
    assert artifact.transform is not None
    assert (artifact.transform.name, artifact.transform.key) == ("pipeline", "scripts/pipeline.py")
    assert artifact.created_by is not None
    assert (artifact.created_by.handle, artifact.created_by.email) == ("ada", "ada@example.com")
    again = ln.track("pipeline", key="scripts/pipeline.py")
    assert again.transform_id == run.transform_id
    ln.setup.login("bob")
    before.replace(files / "iris.data").save()
    assert before.run == again
    assert before.created_by is not None
    assert before.created_by.handle == "ada"
    info = before.describe()
    assert (info["run"], info["transform"], info["created_by"]) == (again.uid, "pipeline", "ada")


def test_filter_get_and_repr(store: Place, files: Path) -> None:
    pandas = pytest.importorskip("pandas")
    one = ln.Artifact(files / "iris.csv", key="a/iris.csv", description="one").save()
    two = ln.Artifact(files / "iris.data", key="b/iris.data").save()
    assert ln.Artifact.filter().all() == [one, two]
    assert ln.Artifact.filter(key__startswith="a/").one() == one
    assert ln.Artifact.filter(size__lt=200).first() == two
    assert ln.Artifact.filter(suffix=".zip").one_or_none() is None
    assert ln.Artifact.filter(created_at__gte=one.created_at).count() == 2
    with pytest.raises(InvalidArgument):
        ln.Artifact.filter().one()
    frame = ln.Artifact.filter().df()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["key"]) == ["a/iris.csv", "b/iris.data"]
    assert ln.Artifact.get(one.uid[:10]) == one
    assert {one, ln.Artifact.get(key="a/iris.csv")} == {one}
    text = repr(two)
    assert text.startswith(f"Artifact(uid='{two.uid}', key='b/iris.data', suffix='.data', size=182, hash='42Br6no9Cj")
    assert "description" not in text
    assert "key_is_virtual=True" in text


def test_from_dir(store: Place, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("a.csv", "deep/b.csv", "deep/er/c"):
        write(folder / name, name)
    made = ln.Artifact.from_dir(folder, key="sets/one")
    for artifact in made:
        artifact.save()
    assert sorted(a.key or "" for a in made) == ["sets/one/a.csv", "sets/one/deep/b.csv", "sets/one/deep/er/c"]
    with pytest.raises(InvalidArgument, match="no directory"):
        ln.Artifact.from_dir(folder / "a.csv")
    clean()


def test_frames(store: Place, files: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 2, 3]})
    with pytest.raises(InvalidArgument, match=r"should be '\.parquet'"):
        ln.Artifact.from_df(frame, key="a.csv")
    with pytest.raises(InvalidArgument, match="takes a pandas DataFrame"):
        ln.Artifact.from_df([1, 2], key="a.parquet")
    artifact = ln.Artifact.from_df(frame, key="a.parquet").save()
    assert artifact.replace(data=frame) == artifact
    artifact.replace(data=frame + 1)
    artifact.replace(data=frame + 2).save()
    pandas.testing.assert_frame_equal(pandas.read_parquet(artifact.cache()), frame + 2)
    temporary = list((Path(os.environ["LAMFS_DATA_DIR"]) / "tmp").iterdir())
    assert temporary == []
    clean()


def test_an_unsaved_artifact_may_be_replaced_and_deleted(store: Place, files: Path) -> None:
    artifact = ln.Artifact(files / "iris.csv", key="d/iris.csv")
    uid = artifact.uid
    artifact.replace(files / "iris.data")
    assert (artifact.uid, artifact.key) == (uid, "d/iris.data")
    artifact.save()
    assert ln.Artifact.get(uid).key == "d/iris.data"
    other = ln.Artifact(files / "new_iris.csv", key="new.csv")
    other.delete()
    assert ln.Artifact.filter().all() == [artifact]


def test_setup_close_and_connect(place: Place, files: Path) -> None:
    place.init()
    ln.Artifact(files / "iris.csv", key="iris.csv").save()
    slug = ln.settings.instance
    ln.setup.close()
    with pytest.raises(NotSetUp):
        ln.Artifact.get(key="iris.csv")
    ln.setup.connect(slug)
    assert ln.Artifact.get(key="iris.csv").cache().read_bytes() == (files / "iris.csv").read_bytes()


def test_importing_costs_little() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import lamfs; took = time.perf_counter() - began;"
        "heavy = {'boto3', 'pandas', 'sqlite_utils', 'cloudpathlib', 'sqlite3'} & set(sys.modules);"
        "lamfs.core.storage.paths.AUTO_KEY_PREFIX; lamfs.Artifact;"
        "late = {'boto3', 'pandas', 'sqlite_utils', 'cloudpathlib'} & set(sys.modules);"
        "print(heavy, late, took)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.startswith("set() set() ")
    assert [name for name in dir(ln) if not name.startswith("_")] == sorted(ln.__all__)
    with pytest.raises(AttributeError):
        _ = ln.NoSuchThing
