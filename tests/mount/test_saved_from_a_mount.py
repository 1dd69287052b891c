"""A file in a mount that is saved from Python or a shell is the artifact that it is."""

from __future__ import annotations

import sys

from tests.support.mounts import MountedInstance


def test_saving_a_file_of_the_mount_makes_no_second_copy(local_mount: MountedInstance) -> None:
    (local_mount.path / "a").mkdir()
    path = local_mount.path / "a/x.csv"
    path.write_bytes(b"1,2\n")
    script = (
        "import sys, lamfs as ln\n"
        "artifact = ln.Artifact(sys.argv[1]).save()\n"
        "print(artifact.uid, artifact.key)\n"
        "copy = ln.Artifact(sys.argv[1], key='copy.csv').save()\n"
        "print(copy.uid)\n"
    )
    said = local_mount.run([sys.executable, "-c", script, str(path)], cwd="/").stdout.split()
    uid = local_mount.stored_info("a/x.csv")["uid"]
    assert said[:2] == [uid, "a/x.csv"]
    assert said[2] != uid
    assert local_mount.cli("save", str(path)).stdout.split() == [uid, "a/x.csv"]
    assert sorted(local_mount.cli("ls").stdout.split()) == ["a/x.csv", "copy.csv"]
