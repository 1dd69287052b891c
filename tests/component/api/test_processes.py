"""The API from threads, forked children, scripts and two machines on one bucket."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lamfs as ln
from lamfs.api import state
from lamfs.errors import Locked, StorageForbidden, StorageMissing, StorageReadOnly
from lamfs.ops import fsck
from tests.component.api.conftest import Place
from tests.support.ops import machine


def test_threads(local: Place, tmp_path: Path) -> None:
    local.init()

    def work(n: int) -> str:
        path = tmp_path / f"{n}.txt"
        path.write_text(f"content {n}")
        artifact = ln.Artifact(path, key=f"t/{n}.txt").save()
        path.write_text(f"replaced {n}")
        artifact.replace(path).save()
        return artifact.cache().read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(24))) == [f"replaced {n}" for n in range(24)]
    assert ln.Artifact.filter().count() == 24
    found = ln.Artifact.filter(key__startswith="t/1")
    assert [path.read_text() for path in found.cache()] == [
        f"replaced {artifact.key.removeprefix('t/').removesuffix('.txt')}" for artifact in found if artifact.key
    ]
    assert len(found) == 11
    assert fsck.check(state.instance(), data=True).problems == []
    assert state.instance().registry.journal.entries() == []


def _child(path: str, key: str) -> None:
    ln.Artifact(path, key=key).save()


def test_forked_children(local: Place, files: Path) -> None:
    local.init()
    ln.Artifact(files / "iris.csv", key="parent.csv").save()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(str(files / "iris.data"), f"child{n}.data")) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    ln.Artifact(files / "new_iris.csv", key="parent2.csv").save()
    assert sorted(a.key or "" for a in ln.Artifact.filter()) == [
        "child0.data",
        "child1.data",
        "child2.data",
        "parent.csv",
        "parent2.csv",
    ]
    assert fsck.check(state.instance(), data=True).problems == []


def test_a_script_is_tracked(local: Place, files: Path, tmp_path: Path) -> None:
    local.init()
    script = tmp_path / "analysis.py"
    script.write_text(f"import lamfs as ln\nln.track()\nln.Artifact({str(files / 'iris.csv')!r}, key='a.csv').save()\n")
    env = os.environ | {"PYTHONPATH": str(Path(ln.__file__).parents[1])}
    for _ in range(2):
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, env=env)
        assert done.returncode == 0, done.stderr
    assert "→ tracking run " in done.stderr
    assert "no run & transform" not in done.stderr
    artifact = ln.Artifact.get(key="a.csv")
    assert artifact.transform is not None
    assert (artifact.transform.name, artifact.transform.key) == ("analysis.py", str(script))
    assert artifact.run is not None
    assert artifact.run.finished_at is not None
    assert artifact.run.finished_at >= artifact.run.started_at


def test_messages_leave_an_application_that_logs_alone(local: Place, files: Path) -> None:
    local.init()
    code = (
        "import logging, sys, lamfs as ln\n"
        "if sys.argv[1] == 'own': logging.basicConfig(format='OWN %(message)s', level=logging.INFO)\n"
        f"ln.Artifact({str(files / 'iris.csv')!r}, key='a.csv')\n"
    )
    shown = {
        how: subprocess.run(
            [sys.executable, "-c", code, how], capture_output=True, text=True, timeout=60, check=True
        ).stderr
        for how in ("own", "none")
    }
    assert shown["none"] == "! no run & transform get linked, consider calling ln.track()\n"
    assert "OWN no run & transform get linked, consider calling ln.track()\n" in shown["own"]
    assert "! no run" not in shown["own"]


def test_two_machines_on_one_bucket(seaweed_config: object, files: Path, tmp_path: Path) -> None:
    place = Place(seaweed_config)  # type: ignore[arg-type]
    where = {
        "endpoint_url": place.config.endpoint_url,
        "region": place.config.region,
        "path_style": place.config.path_style,
    }
    ln.setup.login("ada")
    place.init(name="shared")
    uid = ln.Artifact(files / "iris.csv", key="iris.csv").save().uid
    with machine(tmp_path / "two"):
        ln.setup.login("bob")
        with pytest.raises(Locked, match="locked by ada"):
            ln.setup.connect(place.root, **where)
    ln.setup.connect("ada/shared")
    ln.setup.close()
    with machine(tmp_path / "two"):
        ln.setup.connect(place.root, **where)
        artifact = ln.Artifact.get(key="iris.csv")
        assert artifact.uid == uid
        assert artifact.cache().read_bytes() == (files / "iris.csv").read_bytes()
        artifact.replace(files / "new_iris.csv").save()
        assert artifact.created_by is not None
        assert artifact.created_by.handle == "ada"
        ln.setup.close()
    ln.setup.connect("ada/shared")
    assert ln.Artifact.get(uid).size == 229
    assert ln.Artifact.get(uid).cache().read_bytes() == (files / "new_iris.csv").read_bytes()


def test_connecting_with_credentials_that_may_only_read(
    seaweed_config: object, seaweed: object, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(seaweed_config)  # type: ignore[arg-type]
    place.init(name="shared", owner="ada")
    ln.Artifact(files / "iris.csv", key="iris.csv").save()
    ln.setup.close()
    for name, value in seaweed.reader_env.items():  # type: ignore[attr-defined]
        monkeypatch.setenv(name, value)
    with machine(tmp_path / "two"):
        ln.setup.connect(
            place.root, endpoint_url=place.config.endpoint_url, region=place.config.region, path_style=True
        )
        artifact = ln.Artifact.get(key="iris.csv")
        assert artifact.cache().read_bytes() == (files / "iris.csv").read_bytes()
        with pytest.raises((StorageReadOnly, StorageForbidden)):
            artifact.delete()
        artifact.key = "other.csv"
        with pytest.raises((StorageReadOnly, StorageForbidden)):
            artifact.save()
        assert ln.Artifact.get(key="iris.csv").visibility == 1


def test_buckets_that_cannot_be_used_are_said_at_init(
    seaweed_config: object, seaweed: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(seaweed_config)  # type: ignore[arg-type]
    with pytest.raises(StorageMissing, match="no-such-bucket"):
        ln.setup.init(
            storage="s3://no-such-bucket/x", endpoint_url=place.config.endpoint_url, region="us-east-1", path_style=True
        )
    for kind, error in (("reader_env", StorageReadOnly), ("nobody_env", StorageForbidden)):
        for name, value in getattr(seaweed, kind).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(error):
            place.init(name="x")
    assert ln.settings.user.handle
    assert not state.is_set_up()
