"""What people get wrong at the command line: the sentence names the thing, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lamfs.cli import main
from tests.support.commands import ROOT, quick, quick_json

FILES = ROOT / "test-files"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    quick("login", "testuser1")
    quick("init", "--storage", tmp_path / "store")
    return tmp_path / "store"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def test_a_key_with_a_slash_at_its_end_is_a_directory(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "folder/")
    quick("save", FILES / "new_iris.csv", "--key", "folder/")
    assert quick("ls").split() == ["folder/iris.csv", "folder/new_iris.csv"]
    refused = run("save", FILES / "iris.csv", "--key", "/abs/x")
    assert refused.exit_code == 2
    assert "give 'abs/x'" in refused.stderr


def test_a_key_that_is_none_is_misuse_also_for_a_directory(root: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_text("a")
    for key in ("/abs", "/", "../x"):
        refused = run("save", tmp_path / "folder", "--key", key)
        assert refused.exit_code == 2
        assert "The key" in refused.stderr
    assert run("save", tmp_path / "folder", "--key", "there/").exit_code == 0
    assert quick("ls").split() == ["there/a"]


def test_what_save_and_replace_do_is_said_in_words_of_the_command_line(root: Path, tmp_path: Path) -> None:
    """Not in those of Python: nobody calls save() here, and a record's repr is no sentence."""
    one, other = tmp_path / "rep.txt", tmp_path / "n"
    one.write_text("one")
    other.write_text("two")
    quick("save", one, "--key", "d/rep.txt")
    again = run("save", one, "--key", "d/rep.txt")
    assert "'d/rep.txt' has these bytes already" in again.stderr
    assert "nothing is changed" in again.stderr
    described = run("save", one, "--key", "d/rep.txt", "--description", "some text")
    assert "only its description is changed" in described.stderr
    replaced = run("save", other, "--key", "d/rep.txt")
    assert "'d/rep.txt' is there already: its content is replaced" in replaced.stderr
    renamed = run("replace", "d/rep.txt", other)
    assert "nothing is changed" in renamed.stderr
    other.write_text("three")
    renamed = run("replace", "d/rep.txt", other)
    assert "its key is now 'd/rep', and not 'd/rep.txt'" in renamed.stderr
    assert quick("ls").split() == ["d/rep"]
    for said in (again, described, replaced, renamed):
        assert said.exit_code == 0
        assert "save()" not in said.output
        assert "Artifact(" not in said.output


def test_saved_again_without_a_description_it_keeps_the_one_it_has(root: Path) -> None:
    uid = quick("save", FILES / "iris.csv", "--description", "six flowers").split()[0]
    again = run("save", FILES / "iris.csv")
    assert again.stdout.split()[0] == uid
    assert "nothing is changed" in again.stderr
    assert quick_json("info", uid)["description"] == "six flowers"
    assert quick_json("info", quick("save", FILES / "iris.data").split()[0])["description"] == "iris.data"


def test_a_directory_is_not_an_artifact(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "raw/iris.csv")
    for words in (("info", "raw"), ("delete", "raw/"), ("restore", "raw"), ("replace", "raw", FILES / "iris.csv")):
        refused = run(*words)
        assert refused.exit_code == 1
        assert "is a directory, not an artifact; give the artifacts in it: 'lamfs ls raw/' lists them" in refused.stderr
    assert quick("ls").split() == ["raw/iris.csv"]


def test_an_object_that_was_changed_outside_is_named_with_the_next_step(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "a.csv", "--real-key")
    (root / "a.csv").chmod(0o600)
    (root / "a.csv").write_text("by hand")
    refused = run("cache", "a.csv")
    assert refused.exit_code == 1
    assert f"{root}/a.csv is not the revision that was saved; 'lamfs fsck' says what is there" in refused.stderr
    assert (root / "a.csv").read_text() == "by hand"


def test_several_are_restored_and_none_when_one_is_not_in_the_trash(root: Path) -> None:
    for key in ("a.csv", "d/b.csv", "d/c.csv"):
        quick("save", FILES / "iris.csv", "--key", key)
    quick("delete", "d/b.csv", "d/c.csv")
    refused = run("restore", "d/b.csv", "a.csv")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "'a.csv' is not in the trash" in refused.stderr
    assert "'lamfs ls --trash' shows" in run("restore", "d/nothing").stderr
    refused = run("restore", "--key", "e.csv", "d/b.csv", "d/c.csv")
    assert refused.exit_code == 2
    assert "--key is the place of one artifact" in refused.stderr
    assert quick("ls").split() == ["a.csv"]
    assert quick("restore", "d/b.csv", "d/c.csv").count("restored: ") == 2
    assert sorted(quick("ls").split()) == ["a.csv", "d/b.csv", "d/c.csv"]


@pytest.mark.parametrize("command", ["umount", "sync"])
def test_a_time_that_is_none(root: Path, command: str) -> None:
    for given in ("x", "-1", "nan"):
        refused = run(command, "--timeout", given, "/nowhere")
        assert refused.exit_code == 2
        assert f"'{given}' is no time; give a number of seconds, such as 30." in refused.stderr


def test_a_mount_that_is_refused_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """The directories that it made are gone again; those that were there stay."""
    (tmp_path / "there").mkdir()
    for place in ("new/er/mnt", "there", "there/mnt"):
        refused = run("mount", tmp_path / place, "--instance", "nope")
        assert refused.exit_code == 1
    assert not (tmp_path / "new").exists()
    assert os.listdir(tmp_path / "there") == []


def test_fsck_counts_what_there_is_after_a_repair(root: Path) -> None:
    (root / ".lamindb").mkdir(exist_ok=True)
    (root / ".lamindb/0123456789abcdefABCD.csv").write_text("nobody's")
    repaired = run("fsck", "--repair")
    assert "clean (1 artifact, 1 object)" in repaired.stdout
    checked = run("fsck")
    assert "'lost+found' has 1 entry; look at what is there" in checked.stdout


def test_ls_of_what_is_not_there(root: Path) -> None:
    assert run("ls").exit_code == 0
    assert run("ls", "--trash").exit_code == 0
    missing = run("ls", "nosuch")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "'nosuch'" in missing.stderr
    quick("save", FILES / "iris.csv", "--key", "folder/iris.csv")
    assert run("ls", "fold").exit_code == 0
    quick("delete", "folder/iris.csv")
    assert run("ls", "folder/").exit_code == 0  # an empty directory
    assert run("ls", "--trash", "x").exit_code == 1


def test_restore_of_what_is_not_in_the_trash(root: Path) -> None:
    quick("save", FILES / "iris.csv", "--key", "good.csv")
    for words in (("good.csv", "--key", "../e"), ("good.csv", "--key", "e.csv"), ("good.csv",)):
        refused = run("restore", *words)
        assert refused.exit_code == 1
        assert "'good.csv' is not in the trash" in refused.stderr
    assert quick("ls").split() == ["good.csv"]


def test_a_directory_with_what_cannot_be_saved(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    (folder / "secret").mkdir(parents=True)
    (folder / "a").write_text("a")
    (folder / "link").symlink_to("a")
    saved = run("save", folder)
    assert saved.exit_code == 0
    assert f"left out, a link: {folder}/link" in saved.stderr
    assert run("save", "--follow-links", folder).exit_code == 0
    assert quick("ls").split() == ["folder/a", "folder/link"]
    listed = os.listdir

    def refuse(path: str) -> list[str]:  # as for anybody but root
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr("lamfs.ops.folders.os.listdir", refuse)
    refused = run("save", folder, "--key", "again")
    assert refused.exit_code == 1
    assert "secret cannot be read (Permission denied)" in refused.stderr
    assert "again/a" in quick("ls").split()


def test_storage_that_is_a_file(tmp_path: Path) -> None:
    quick("login", "testuser1")
    (tmp_path / "file.txt").write_text("mine")
    for place in ("file.txt", "file.txt/below"):
        refused = run("init", "--storage", tmp_path / place)
        assert refused.exit_code == 2
        assert f"{tmp_path / place} is a file, or lies below one" in refused.stderr
    assert (tmp_path / "file.txt").read_text() == "mine"


def test_mount_options_are_named(root: Path, tmp_path: Path) -> None:
    refused = run("mount", "-o", "cache_limit=abc", tmp_path / "mnt")
    assert refused.exit_code == 2
    assert "The mount option 'cache_limit' needs a size" in refused.stderr


def test_ctrl_c_while_the_program_loads(tmp_path: Path) -> None:
    """The import that SIGINT meets is one of the first."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(99)\n")
    environment = {**os.environ, "PYTHONPATH": f"{hook}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "lamfs", "--help"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    ignored = subprocess.run(
        [sys.executable, "-m", "lamfs", "--help"], env=environment, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert ignored.returncode == 99
