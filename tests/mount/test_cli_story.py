"""The life of an artifact, told with cp, mv, rm and the command lamfs on a mount; on a local folder and on S3."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, wait_until

FILES = Path(__file__).parents[2] / "test-files"
IRIS = (224, "iwc1TmF1TW_l5weDvscSHw")
DATA = (182, "42Br6no9CjB6s5ZbmO-bmw")
NEW = (229, "lp2-ycXcKcaliUTnR_TqHA")

_OBJECTS = """
import json
from lamfs.ops.instance import Instance
with Instance.open() as instance:
    print(json.dumps(sorted(found.key for found in instance.store.list(""))))
"""


def objects(instance: MountedInstance) -> list[str]:
    """Keys of the objects in storage that hold artifacts: without registry, lock and spool."""
    found: list[str] = json.loads(instance.python(_OBJECTS))
    return [
        key
        for key in found
        if not key.endswith(".lndb")
        and not key.startswith((".lamindb/_exclusion/", ".lamindb/_spool/", ".lamindb/_tmp"))
    ]


def info(instance: MountedInstance, name: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``lamfs info`` says."""
    record: dict[str, Any] = json.loads(instance.cli("info", "--json", os.fspath(name)).stdout)
    return record


def content(record: dict[str, Any]) -> tuple[int, str]:
    """Size and hash of a record."""
    return record["size"], record["hash"]


@pytest.mark.parametrize(
    ("instance", "words"), [("local", []), ("local", ["real_keys"]), ("s3", ["real_keys"])], indirect=["instance"]
)
def test_the_life_of_an_artifact_with_a_key(instance: MountedInstance, words: list[str]) -> None:
    """Saved, replaced by a copy and by a rename, moved to another suffix, copied, thrown away, restored, deleted."""
    instance.mount(words)
    real = bool(words)
    top = instance.path
    instance.run(["mkdir", "flowers"])

    # cp saves.
    instance.run(["cp", FILES / "iris.csv", "flowers/iris.csv"])
    instance.cli("sync", str(top))
    first = info(instance, top / "flowers/iris.csv")
    uid = first["uid"]
    assert content(first) == IRIS
    assert (first["hash_type"], first["suffix"], first["key"]) == ("md5", ".csv", "flowers/iris.csv")
    assert first["created_by"] == "testuser1"
    assert first["key_is_virtual"] is not real
    assert objects(instance) == ["flowers/iris.csv" if real else f".lamindb/{uid}.csv"]

    # cp over it replaces: same uid. The same bytes again are no change.
    instance.run(["cp", FILES / "new_iris.csv", "flowers/iris.csv"])
    instance.cli("sync", str(top))
    second = info(instance, top / "flowers/iris.csv")
    assert (second["uid"], content(second)) == (uid, NEW)
    assert second["updated_at"] > first["updated_at"]
    instance.run(["cp", FILES / "new_iris.csv", "flowers/iris.csv"])
    instance.cli("sync", str(top))
    assert info(instance, uid) == second
    assert objects(instance) == ["flowers/iris.csv" if real else f".lamindb/{uid}.2.csv"]

    # mv to a name with another suffix: the key and the object follow. mv over an artifact replaces its content.
    instance.run(["mv", "flowers/iris.csv", "flowers/iris.data"])
    instance.run(["cp", FILES / "iris.data", "incoming"])
    instance.run(["mv", "incoming", "flowers/iris.data"])
    instance.cli("sync", str(top))
    third = info(instance, "flowers/iris.data")
    assert (third["uid"], third["suffix"], content(third)) == (uid, ".data", DATA)
    # If the rename was in storage before the new bytes, these have the name of the third revision.
    places = [["flowers/iris.data"]] if real else [[f".lamindb/{uid}{number}.data"] for number in ("", ".3")]
    assert objects(instance) in places
    cached = Path(instance.cli("cache", "flowers/iris.data").stdout.strip())
    assert cached.suffix == ".data"
    assert cached.read_bytes() == (FILES / "iris.data").read_bytes()

    # mv of the directory is one step; a copy is a second artifact.
    instance.run(["mv", "flowers", "plants"])
    instance.run(["cp", "-a", "plants/iris.data", "plants/copy.data"])
    instance.cli("sync", str(top))
    copy = info(instance, "plants/copy.data")
    assert copy["uid"] != uid
    assert content(copy) == DATA
    assert info(instance, uid)["key"] == "plants/iris.data"
    assert len(objects(instance)) == 2

    # rm throws away, restore brings back where it was.
    instance.run(["rm", "plants/iris.data"])
    assert instance.cli("ls", "--trash").stdout == "plants/iris.data\n"
    assert not (top / "plants/iris.data").exists()
    instance.cli("restore", str(top / "plants/iris.data"))
    wait_until((top / "plants/iris.data").exists, "the restored file shows", seconds=1)
    assert (top / "plants/iris.data").read_bytes() == (FILES / "iris.data").read_bytes()
    assert info(instance, top / "plants/iris.data")["uid"] == uid

    # rm -rf and delete for good: nothing is left in storage.
    instance.run(["rm", "-rf", "plants"])
    assert os.listdir(top) == []
    instance.cli("delete", "--permanent", "--yes", uid, copy["uid"])
    instance.cli("sync", str(top))
    wait_until(lambda: objects(instance) == [], "the objects are gone", seconds=10)
    instance.umount()
    assert instance.fsck() == []
    assert instance.spooled() == []


def test_the_life_of_an_artifact_without_a_key(mount: MountedInstance) -> None:
    top = mount.path
    uid = mount.cli("save", str(FILES / "iris.csv"), "--description", "six flowers").stdout.split()[0]
    shown = top / ".lamindb" / f"{uid}.csv"
    wait_until(shown.exists, "what was saved shows", seconds=1)
    record = info(mount, shown)
    assert (record["key"], record["description"], content(record)) == (None, "six flowers", IRIS)
    mount.run(["cmp", shown, FILES / "iris.csv"])
    mount.cli("replace", str(shown), str(FILES / "iris.data"))
    moved = top / ".lamindb" / f"{uid}.data"
    wait_until(moved.exists, "the new suffix shows", seconds=1)
    assert not shown.exists()
    assert (info(mount, uid)["description"], content(info(mount, uid))) == ("six flowers", DATA)
    wait_until(lambda: objects(mount) == [f".lamindb/{uid}.data"], "the old object is gone")
    mount.run(["cp", FILES / "iris.data", moved])
    mount.run(["mv", moved, "flowers.data"])
    mount.cli("sync")
    record = info(mount, top / "flowers.data")
    assert (record["uid"], record["key"], record["description"]) == (uid, "flowers.data", "six flowers")
    mount.cli("delete", "--permanent", "--yes", str(top / "flowers.data"))
    wait_until(lambda: os.listdir(top) == [], "it is gone from the mount", seconds=1)
    mount.cli("sync")
    wait_until(lambda: objects(mount) == [], "its object is gone")
    mount.umount()
    assert mount.fsck() == []


def test_an_instance_closed_and_connected_again(mount: MountedInstance) -> None:
    """What was written on a mount is there for the next who connects to the storage, with nothing of this machine."""
    (mount.path / "a").mkdir()
    mount.run(["cp", FILES / "iris.csv", "a/iris.csv"])
    refused = mount.cli("close", check=False)
    assert refused.returncode != 0
    assert str(mount.path) in refused.stderr
    mount.umount()
    mount.cli("close")
    elsewhere = {f"LAMFS_{name}_DIR": str(mount.base / f"elsewhere-{name}") for name in ("CONFIG", "CACHE")}
    elsewhere["LAMFS_DATA_DIR"] = str(mount.data_dir) + "2"
    where = mount.storage
    words = ["--endpoint-url", where.endpoint_url, "--path-style"] if where.endpoint_url else []
    mount.cli("login", "testuser2", env=elsewhere)
    mount.cli("connect", mount.slug, "--storage", where.root, *words, env=elsewhere)
    record = json.loads(mount.cli("info", "--json", "a/iris.csv", env=elsewhere).stdout)
    assert content(record) == IRIS
    assert record["created_by"] == "testuser1"
    path = mount.cli("cache", "a/iris.csv", env=elsewhere).stdout.strip()
    assert Path(path).read_bytes() == (FILES / "iris.csv").read_bytes()
    mount.cli("close", env=elsewhere)


def test_an_instance_is_deleted_with_what_it_holds(mount: MountedInstance) -> None:
    mount.run(["cp", FILES / "iris.csv", "iris.csv"])
    mount.umount()
    refused = mount.cli("delete-instance", mount.slug, check=False)
    assert refused.returncode != 0
    mount.cli("delete-instance", "--force", mount.slug)
    assert mount.slug not in mount.cli("instances").stdout
    assert not (mount.directory / "registry.lndb").exists()
