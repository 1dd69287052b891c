"""The artifact lifecycle from a notebook, word for word, on a local folder and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamfs as ln
from lamfs import config
from lamfs.errors import NotEmpty, NotSetUp
from lamfs.ops import fsck
from lamfs.ops.instance import Instance
from tests.component.api.conftest import Place

pd = pytest.importorskip("pandas")

NO_RUN = "no run & transform get linked, consider calling ln.track()"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said since the last call."""
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("lamfs")]
    caplog.clear()
    return texts


def test_the_lifecycle(place: Place, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 1. login and init
    user = ln.setup.login("testuser1")
    assert said(caplog) == [f"logged in with handle testuser1, email {user.email}, uid {user.uid}"]
    assert len(user.uid) == 8
    place.init()
    name = place.root.rpartition("/")[2]
    slug = f"testuser1/{name}"
    settings = config.load_instance()
    assert settings.slug == slug
    snapshot = f"{place.root}/{settings.id.hex}.lndb"
    assert said(caplog) == [
        f"updating & unlocking cloud SQLite '{snapshot}' of instance '{slug}'",
        "locked instance (to unlock and push changes to the cloud SQLite file, call: lamfs close)",
    ]
    prefix = ln.core.storage.paths.AUTO_KEY_PREFIX
    root = ln.settings.storage
    assert str(root) == place.root
    assert (root / f"{settings.id.hex}.lndb").exists()
    assert (root / f".lamindb/_exclusion/{settings.id.hex}").exists()
    cache_dir = config.cache_dir()

    # 2. and 3. an auto key
    artifact = ln.Artifact(str(files / "iris.csv"), description="iris.csv")
    assert said(caplog) == [NO_RUN]
    assert artifact.save() is artifact
    uid = artifact.uid
    assert (artifact.size, artifact.hash, artifact.hash_type) == (224, "iwc1TmF1TW_l5weDvscSHw", "md5")
    assert (artifact.key, artifact.key_is_virtual, artifact.suffix) == (None, True, ".csv")
    key_path = root / f"{prefix}{uid}.csv"
    assert key_path.exists()
    cached = artifact.cache()
    assert cached.is_relative_to(cache_dir)
    assert cached.suffix == ".csv"
    assert cached.read_bytes() == (files / "iris.csv").read_bytes()
    before = cached.stat().st_mtime

    # 4. replaced by another format
    said(caplog)
    artifact.replace(files / "iris.data")
    assert said(caplog) == [NO_RUN]
    artifact.save()
    assert (artifact.uid, artifact.description) == (uid, "iris.csv")
    assert (artifact.size, artifact.hash) == (182, "42Br6no9CjB6s5ZbmO-bmw")
    assert not key_path.exists()
    assert (root / f"{prefix}{uid}.data").exists()
    cached = artifact.cache()
    assert cached.suffix == ".data"
    assert cached.stat().st_mtime >= before
    assert cached.read_bytes() == (files / "iris.data").read_bytes()
    artifact.delete(permanent=True)
    assert not (root / f"{prefix}{uid}.data").exists()

    # 5. real keys
    ln.settings.artifact_use_virtual_keys = False
    artifact = ln.Artifact(files / "iris.csv", key="iris.csv").save()
    assert artifact.key_is_virtual is False
    key_path = root / "iris.csv"
    assert key_path.exists()
    artifact.replace(files / "new_iris.csv")
    artifact.save()
    assert (artifact.size, artifact.hash, artifact.key) == (229, "lp2-ycXcKcaliUTnR_TqHA", "iris.csv")
    assert key_path.exists()
    assert key_path.read_bytes() == (files / "new_iris.csv").read_bytes()
    assert not (root / "new_iris.csv").exists()
    said(caplog)
    artifact.replace(files / "iris.data")
    assert said(caplog) == [
        NO_RUN,
        "replacing the file will replace key 'iris.csv' with 'iris.data' and delete 'iris.csv' upon `save()`",
    ]
    artifact.save()
    assert artifact.key == "iris.data"
    assert not key_path.exists()
    assert (root / "iris.data").exists()
    artifact.delete(permanent=True, storage=True)
    assert not (root / "iris.data").exists()

    # 6. from memory
    iris = pd.read_csv(files / "iris.csv")
    artifact = ln.Artifact.from_df(iris, description="iris_store", key="iris.parquet").save()
    assert artifact.accessor == "DataFrame"
    key_path = root / "iris.parquet"
    assert key_path.exists()
    artifact.replace(data=iris[:-1])
    assert artifact.key == "iris.parquet"
    artifact.save()
    assert key_path.exists()
    pd.testing.assert_frame_equal(pd.read_parquet(artifact.cache()), iris[:-1])
    artifact.replace(files / "new_iris.csv")
    artifact.save()
    assert (artifact.key, artifact.accessor, artifact.description) == ("iris.csv", "DataFrame", "iris_store")
    assert not key_path.exists()
    path_in_storage = artifact.path
    assert path_in_storage == root / "iris.csv"
    said(caplog)
    artifact.delete(permanent=True, storage=False)
    assert said(caplog) == [f"you will retain a dangling store here: {path_in_storage}, not referenced via an artifact"]
    assert path_in_storage.exists()

    # 7. a virtual key beside the dangling object
    ln.settings.artifact_use_virtual_keys = True
    artifact = ln.Artifact(files / "iris.csv", key="iris.csv").save()
    assert artifact.key_is_virtual is True
    with pytest.raises(ValueError, match=r"Can only replace with a local file not in any Storage\."):
        artifact.replace(path_in_storage)
    said(caplog)
    assert artifact == artifact.replace(files / "iris.csv")
    assert said(caplog) == [NO_RUN, f"returning existing artifact with same hash: {artifact}"]
    path = artifact.path
    assert (path.suffix, path.stem) == (".csv", artifact.uid)
    artifact.replace(files / "iris.data")
    artifact.save()
    assert artifact.key == "iris.data"
    assert not path.exists()
    assert (artifact.path.suffix, artifact.path.stem) == (".data", artifact.uid)
    assert artifact.path.exists()
    assert path_in_storage.exists()
    with Instance.open() as instance:
        assert fsck.check(instance, data=True).problems == []
    with pytest.raises(NotEmpty, match="1 artifact"):
        ln.setup.delete(slug)
    artifact.delete(permanent=True, storage=True)
    path_in_storage.unlink()
    said(caplog)
    ln.setup.delete(name, force=True)
    texts = said(caplog)
    assert [text.split()[:3] for text in texts] == [["deleted", "storage", "record"], ["deleted", "instance", "record"]]
    assert settings.id.hex in texts[1]
    assert not settings.directory.exists()
    assert config.list_instances() == []
    assert not [file for file in cache_dir.rglob("*") if file.is_file() and not file.name.startswith("index.db")]
    left = [item.key for item in Instance(settings).store.list()]
    assert left == []
    with pytest.raises(NotSetUp):
        _ = ln.settings.storage
