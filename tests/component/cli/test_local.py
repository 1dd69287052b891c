"""The commands on a local folder."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lamfs.cli import main
from lamfs.model import instance_id
from tests.support.commands import ROOT, lamfs, quick, quick_json

FILES = ROOT / "test-files"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The storage folder of instance testuser1/store, which is the current one."""
    quick("login", "testuser1", "--email", "me@example.com")
    quick("init", "--storage", tmp_path / "store")
    return tmp_path / "store"


def objects(root: Path) -> set[str]:
    """Object keys of artifacts in a storage folder."""
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return {key for key in found if not key.startswith((".lamindb/_", ".lamindb/.")) and not key.endswith(".lndb")}


def test_login_says_who(tmp_path: Path) -> None:
    said = quick("login", "testuser1", "--email", "me@example.com")
    assert "handle testuser1" in said
    assert "me@example.com" in said
    assert "uid " in said


def test_init_makes_an_instance_and_makes_it_current(tmp_path: Path) -> None:
    quick("login", "testuser1")
    said = quick("init", "--storage", tmp_path / "store", "--name", "mine")
    assert "testuser1/mine" in said
    assert "lamfs close" in said
    quick("init", "--storage", tmp_path / "other")
    known = quick_json("instances")
    assert [(each["slug"], each["current"]) for each in known] == [("testuser1/mine", False), ("testuser1/other", True)]
    assert known[0]["storage"]["root"] == str(tmp_path / "store")
    assert quick("instances").splitlines()[1].startswith("*  testuser1/other")


def test_saved_found_by_key_uid_and_beginning_of_uid(root: Path) -> None:
    said = quick("save", FILES / "iris.csv", "--key", "a/iris.csv", "--description", "six flowers")
    uid, key = said.split()
    assert key == "a/iris.csv"
    for name in ("a/iris.csv", uid, uid[:8]):
        record = quick_json("info", name)
        assert record["uid"] == uid
        assert record["hash"] == "iwc1TmF1TW_l5weDvscSHw"
        assert record["size"] == 224
        assert record["description"] == "six flowers"
        assert record["created_by"] == "testuser1"
    assert objects(root) == {f".lamindb/{uid}.csv"}
    text = quick("info", "a/iris.csv")
    assert f"uid             {uid}\n" in text
    assert quick("info", "b/iris.csv", code=1).startswith("lamfs: There is no artifact 'b/iris.csv'")


def test_without_a_key_it_shows_below_lamindb(root: Path) -> None:
    uid, place = quick("save", FILES / "iris.csv").split()
    assert place == f".lamindb/{uid}.csv"
    assert quick("ls").split() == [place]
    assert quick("ls", ".lamindb/").split() == [place]


def test_a_real_key_is_the_key_of_the_object(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a/iris.csv", "--real-key")
    assert objects(root) == {"a/iris.csv"}
    assert "needs a key" in quick("save", FILES / "iris.csv", "--real-key", code=2)


def test_a_directory_becomes_one_artifact_per_file(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "er" / "b c.txt").write_text("b")
    (folder / "link").symlink_to("a.txt")
    (folder / "to-dir").symlink_to("deep")
    os.mkfifo(folder / "pipe")
    saved = CliRunner().invoke(main, ["save", str(folder)])
    assert saved.exit_code == 0
    left_out = sorted(line.rpartition("/")[2] for line in saved.stderr.splitlines() if "left out" in line)
    assert left_out == ["link", "pipe", "to-dir"]
    assert quick("ls").splitlines() == ["results/a.txt", "results/deep/er/b c.txt"]
    quick("save", folder, "--key", "again/")
    assert quick("ls", "again").splitlines() == ["again/a.txt", "again/deep/er/b c.txt"]


def test_one_bad_file_does_not_stop_the_others(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "good").write_text("g")
    (folder / os.fsdecode(b"b\xffd")).write_text("b")
    problems = quick("save", folder, code=1)
    assert "is not valid UTF-8" in problems
    assert "1 file could not be saved, 1 could" in problems
    assert quick("ls").split() == ["results/good"]


def test_replace_keeps_the_uid_and_moves_the_key_with_the_suffix(root: Path) -> None:
    uid = quick("save", FILES / "iris.csv", "--key", "a/iris.csv").split()[0]
    assert quick("replace", "a/iris.csv", FILES / "iris.data").split() == [uid, "a/iris.data"]
    assert quick_json("info", uid)["hash"] == "42Br6no9CjB6s5ZbmO-bmw"
    assert objects(root) == {f".lamindb/{uid}.data"}
    assert "not in any Storage" in quick("replace", uid, root / ".lamindb" / f"{uid}.data", code=2)


def test_cache_prints_a_path_per_artifact(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    quick("save", FILES / "iris.data", "--key", "b.data")
    paths = quick("cache", "a.csv", "b.data").splitlines()
    assert [Path(path).read_bytes() for path in paths] == [
        (FILES / name).read_bytes() for name in ("iris.csv", "iris.data")
    ]
    assert all(path.startswith(os.environ["LAMFS_CACHE_DIR"]) for path in paths)


def test_deleted_restored_and_deleted_for_good(root: Path) -> None:
    uid = quick("save", FILES / "iris.csv", "--key", "a/iris.csv").split()[0]
    quick("delete", "a/iris.csv")
    assert quick("ls") == ""
    assert quick("ls", "--trash").split() == ["a/iris.csv"]
    assert quick_json("info", "a/iris.csv")["visibility"] == -1
    quick("restore", "a/iris.csv")
    assert quick("ls").split() == ["a/iris.csv"]
    quick("delete", uid)
    quick("restore", uid, "--key", "b.csv")
    assert quick("ls").split() == ["b.csv"]
    assert "add --yes" in quick("delete", "--permanent", "b.csv", code=2)
    assert quick("ls").split() == ["b.csv"]
    quick("delete", "--permanent", "--yes", "b.csv")
    assert quick("ls", "--trash") == ""
    assert objects(root) == set()


def test_restore_means_the_one_in_the_trash_when_its_place_is_taken(root: Path) -> None:
    old = quick("save", FILES / "iris.csv", "--key", "a.csv").split()[0]
    quick("delete", "a.csv")
    new = quick("save", FILES / "new_iris.csv", "--key", "a.csv").split()[0]
    assert "taken" in quick("restore", "a.csv", code=1)
    assert quick("restore", "a.csv", "--key", "old.csv").split()[1:] == [old, "old.csv"]
    assert {each["uid"]: each["key"] for each in quick_json("ls")} == {old: "old.csv", new: "a.csv"}


def test_one_in_the_trash_can_be_deleted_for_good(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    quick("delete", "a.csv")
    quick("delete", "--permanent", "-y", "a.csv")
    assert quick("ls", "--trash") == ""


def test_a_deletion_may_leave_the_object(root: Path) -> None:
    uid = quick("save", FILES / "iris.csv", "--key", "a.csv").split()[0]
    quick("delete", "--permanent", "--keep-storage", "--yes", "a.csv")
    assert objects(root) == {f".lamindb/{uid}.csv"}


def test_nothing_is_deleted_when_one_name_is_wrong(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    quick("delete", "a.csv", "nonsense", code=1)
    assert quick("ls").split() == ["a.csv"]


def test_ls_by_prefix_long_and_for_programs(root: Path) -> None:
    for key in ("a/x.csv", "a/y.csv", "ab.csv"):
        quick("save", FILES / "iris.csv", "--key", key, "--description", f"of {key}")
    assert quick("ls", "a/").split() == ["a/x.csv", "a/y.csv"]
    assert quick("ls", "a").split() == ["a/x.csv", "a/y.csv", "ab.csv"]
    line = quick("ls", "-l", "ab").split()
    assert line[1:3] == ["224", "B"]
    assert line[5:] == ["ab.csv", "of", "ab.csv"]
    assert [each["key"] for each in quick_json("ls", "a/")] == ["a/x.csv", "a/y.csv"]


def test_a_key_with_a_newline_is_one_line(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a\nb\x1b[2J.csv")
    assert quick("ls").splitlines() == [r"a\nb\x1b[2J.csv"]
    assert quick_json("ls")[0]["key"] == "a\nb\x1b[2J.csv"


def test_another_instance_is_worked_on_with_its_name(root: Path, tmp_path: Path) -> None:
    quick("init", "--storage", tmp_path / "second")
    quick("save", FILES / "iris.csv", "--key", "first.csv", "--instance", "testuser1/store")
    assert quick("ls") == ""
    assert quick("ls", "--instance", "testuser1/store").split() == ["first.csv"]
    assert objects(tmp_path / "second") == set()


def test_status_of_what_is_not_mounted(root: Path) -> None:
    status = quick_json("status")
    assert status["mounts"] == []
    assert status["instances"] == [
        {
            "slug": "testuser1/store", "storage": str(root), "current": True, "mounted": False, "owed": {},
            "owed_bytes": 0, "busy": [], "errors": [],
        }
    ]  # fmt: skip
    assert status["cache"]["directory"] == os.environ["LAMFS_CACHE_DIR"]
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    quick("cache", "a.csv")
    assert quick_json("status")["cache"]["bytes"] == 224
    assert "No mount is alive." in quick("status")


def test_status_of_what_a_dead_process_has_left(root: Path) -> None:
    """Work of a process that is gone is listed with its last error, and close does it."""
    code = (
        "from lamfs.ops.instance import Instance\n"
        "with Instance.open() as instance:\n"
        "    journal = instance.registry.journal\n"
        "    journal.add_delete('.lamindb/nothing.csv', now=1)\n"
        "    journal.failed(journal.entries()[0].id, 'The storage was away.', 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
    instance = quick_json("status")["instances"][0]
    assert instance["owed"] == {"delete": 1}
    assert instance["busy"] == []
    assert instance["errors"] == [{"what": "delete .lamindb/nothing.csv", "error": "The storage was away."}]
    assert "owed     1 delete; the next mount does it" in quick("status")
    quick("close")
    assert quick_json("status")["instances"][0]["owed"] == {}


def test_a_damaged_registry_does_not_hide_the_rest_of_the_status(root: Path, tmp_path: Path) -> None:
    quick("init", "--storage", tmp_path / "second")
    folders = list(Path(os.environ["LAMFS_DATA_DIR"]).glob("*/registry.lndb"))
    assert len(folders) == 2
    for path in folders:
        path.write_bytes(b"this is no database" * 100)
    entries = quick_json("status")["instances"]
    assert len(entries) == 2
    assert all(entry["error"] for entry in entries)
    assert "lamfs connect --restore" in quick("ls", code=1) or "damaged" in quick("ls", code=1)


def test_closed_it_is_no_longer_current_and_unlocked(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    lock = root / ".lamindb" / "_exclusion" / instance_id("testuser1/store").hex
    assert lock.exists()
    said = quick("close")
    assert "testuser1/store" in said
    assert json.loads(lock.read_text())["machine"] == "", "the number of the lease is kept, nobody holds it"
    said = quick("ls", code=1)
    assert "No instance is connected" in said
    assert "'lamfs connect testuser1/store'" in said
    assert "connected to instance 'testuser1/store'" in quick("connect", "testuser1/store")
    assert quick("ls").split() == ["a.csv"]


def test_another_machine_connects_once_it_is_closed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    here = os.environ["LAMFS_DATA_DIR"], os.environ["LAMFS_CONFIG_DIR"]
    monkeypatch.setenv("LAMFS_DATA_DIR", str(tmp_path / "there" / "data"))
    monkeypatch.setenv("LAMFS_CONFIG_DIR", str(tmp_path / "there" / "config"))
    there = os.environ["LAMFS_DATA_DIR"], os.environ["LAMFS_CONFIG_DIR"]
    assert "is locked by testuser1" in quick("connect", root, code=1)
    for name, value in zip(("LAMFS_DATA_DIR", "LAMFS_CONFIG_DIR"), here, strict=True):
        monkeypatch.setenv(name, value)
    quick("close")
    for name, value in zip(("LAMFS_DATA_DIR", "LAMFS_CONFIG_DIR"), there, strict=True):
        monkeypatch.setenv(name, value)
    quick("connect", root)
    assert quick("ls").split() == ["a.csv"]


def test_an_instance_with_artifacts_is_removed_by_force_only(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    assert "1 artifact" in quick("delete-instance", "testuser1/store", code=1)
    quick("delete-instance", "testuser1/store", "--force")
    assert quick_json("instances") == []
    assert "There is no instance" in quick("delete-instance", "testuser1/store", code=1)


def test_fsck_says_clean_and_finds_what_is_missing_or_damaged(root: Path) -> None:
    uid = quick("save", FILES / "iris.csv", "--key", "a.csv").split()[0]
    assert quick("fsck", "--data") == "testuser1/store: clean (1 artifact, 1 object, 224 B read)\n"
    report = quick_json("fsck")
    assert (report["instance"], report["clean"], report["problems"]) == ("testuser1/store", True, [])
    stored = root / ".lamindb" / f"{uid}.csv"
    status = stored.stat()
    stored.chmod(0o600)
    stored.write_bytes(b"x" * 224)
    os.utime(stored, ns=(status.st_atime_ns, status.st_mtime_ns))
    for words in (["fsck", "--data"], ["fsck", "--data", "--repair"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 1
        assert uid in done.stdout
    assert f"is damaged in block 0 (artifact {uid})" in quick("status")
    stored.unlink()
    done = CliRunner().invoke(main, ["fsck"])
    assert done.exit_code == 1
    assert done.stdout.startswith("problem: ")
    assert uid in done.stdout
    assert done.stdout.splitlines()[-1] == "testuser1/store: 1 problem (1 artifact, 0 objects)"
    report = json.loads(CliRunner().invoke(main, ["fsck", "--json"]).stdout)
    assert report["clean"] is False
    assert len(report["problems"]) == 1


@pytest.mark.parametrize("linked", ["object", "folder"])
def test_what_a_link_in_the_storage_leads_to_is_not_shown(root: Path, tmp_path: Path, linked: str) -> None:
    """The link leads to the very bytes that the registry names, so that nothing but the link is wrong."""
    (tmp_path / "secret.csv").write_text("the secret\n")
    uid = quick("save", tmp_path / "secret.csv", "--key", "a.csv").split()[0]
    quick("save", FILES / "iris.csv", "--key", "b.csv")
    stored = root / ".lamindb" / f"{uid}.csv"
    if linked == "folder":
        stored = stored.parent
    kept = tmp_path / "kept"
    stored.rename(kept)
    stored.symlink_to(kept)
    before = sorted(path.name for path in kept.rglob("*"))
    for words in (["cache", "a.csv"], ["fsck"], ["fsck", "--data"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 1, words
        assert "is a link" in done.output, words
        assert "the secret" not in done.output
        assert "Traceback" not in done.output
    cached = [path for path in tmp_path.glob("lamfs/cache/**/*") if path.is_file()]
    assert not [path for path in cached if b"the secret" in path.read_bytes()]
    if linked == "object":
        quick("cache", "b.csv")
        assert "a.csv" in quick("ls")
    assert sorted(path.name for path in kept.rglob("*")) == before


def test_a_link_in_the_storage_is_not_registered_in_place(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("the secret\n")
    (root / "a").mkdir()
    (root / "a/link.csv").symlink_to(tmp_path / "secret.csv")
    (root / "folder").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(root)
    (tmp_path / "within").symlink_to(root / "a")
    for name in (
        root / "a/link.csv",
        root / "folder/secret.csv",
        tmp_path / "alias/a/link.csv",
        tmp_path / "within/link.csv",
    ):
        said = quick("save", name, code=1)
        assert "is a link" in said, name
        assert "put the file or folder itself there" in said
    assert quick_json("ls") == []
    (root / "a/link.csv").unlink()
    (root / "a/link.csv").write_text("a file\n")
    assert quick("save", tmp_path / "within/link.csv").split()[1] == "a/link.csv"


def test_a_storage_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    quick("login", "testuser1")
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o777)
    assert f"chmod o-w {tmp_path}/store" in quick("init", "--storage", tmp_path / "store", code=1)
    assert list((tmp_path / "store").iterdir()) == []
    assert quick_json("instances") == []


def test_fsck_repairs_what_it_can(root: Path) -> None:
    stray = root / ".lamindb" / f"{'A' * 20}.csv"
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("nobody's")
    quick("fsck", code=1)
    assert "repaired: " in quick("fsck", "--repair")
    assert stray.read_text() == "nobody's"
    assert quick("ls", "lost+found").split() == [f"lost+found/{stray.name}"]
    assert quick("fsck").splitlines()[-1] == "testuser1/store: clean (1 artifact, 1 object)"


def test_what_lamfs_makes_is_the_users_alone(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a.csv")
    quick("cache", "a.csv")
    for name in ("LAMFS_CONFIG_DIR", "LAMFS_DATA_DIR", "LAMFS_CACHE_DIR"):
        for path in (Path(os.environ[name]), *Path(os.environ[name]).rglob("*")):
            assert not path.is_symlink()
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_output_that_nobody_reads_any_more_is_no_traceback(root: Path) -> None:
    for number in range(3):
        quick("save", FILES / "iris.csv", "--key", f"{'k' * 200}/{number}.csv")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lamfs", "ls", "--json"],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
            cwd=ROOT,
        )
    finally:
        os.close(writing)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 1


def test_names_that_are_not_utf8_are_told_as_they_came(root: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.csv")
    (tmp_path / name).write_bytes(b"x")
    uid, key = quick("save", tmp_path / name, "--key", "cafe.csv").split()
    assert key == "cafe.csv"
    assert quick_json("info", uid)["size"] == 1


def test_each_command_as_a_process_of_its_own(tmp_path: Path) -> None:
    """What the other tests do inside of this process, done as a user does it."""
    lamfs("login", "testuser1")
    lamfs("init", "--storage", tmp_path / "store")
    uid = lamfs("save", FILES / "iris.csv", "--key", "a.csv").split()[0]
    lamfs("replace", "a.csv", FILES / "new_iris.csv")
    assert json.loads(lamfs("info", "a.csv", "--json"))["hash"] == "lp2-ycXcKcaliUTnR_TqHA"
    assert Path(lamfs("cache", uid[:10]).strip()).read_bytes() == (FILES / "new_iris.csv").read_bytes()
    lamfs("delete", "a.csv")
    lamfs("restore", "a.csv")
    assert lamfs("ls").split() == ["a.csv"]
    assert "clean" in lamfs("fsck")
    assert "testuser1/store (current)" in lamfs("status")
    assert "No mount is alive" in lamfs("sync")
    lamfs("close")
    lamfs("connect", "store")
    assert "testuser1/store" in lamfs("instances")
    lamfs("delete-instance", "store", "--force")
