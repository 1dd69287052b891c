"""What commands raise becomes a sentence and an exit code; nobody sees a traceback."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from lamfs import errors
from lamfs.cli import main, seam
from lamfs.cli.seam import Command

raising: list[BaseException] = []


@pytest.fixture
def run() -> Iterator[object]:
    """Run a command that raises what it is given."""

    @click.command("explode", cls=Command, examples="lamfs explode")
    def explode() -> None:
        raise raising.pop()

    main.add_command(explode)

    def invoke(error: BaseException) -> Result:
        raising.append(error)
        return CliRunner().invoke(main, ["explode"])

    yield invoke
    del main.commands["explode"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.NotFound("There is no artifact 'x'."), 1, "lamfs: There is no artifact 'x'.\n"),
        (errors.StorageUnavailable("s3://b does not answer."), 1, "lamfs: s3://b does not answer.\n"),
        (errors.InvalidArgument("'x' is not a size."), 2, "lamfs: 'x' is not a size.\n"),
        (errors.InvalidName("The key is empty."), 2, "lamfs: The key is empty.\n"),
        (KeyboardInterrupt(), 130, "lamfs: interrupted\n"),
        (click.Abort(), 130, "lamfs: nothing was done\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "lamfs: /x/y: Permission denied\n"),
        (click.UsageError("no such thing"), 2, "Usage: main explode [OPTIONS]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_have_a_sentence_and_a_code(run, error: BaseException, code: int, said: str) -> None:
    result = run(error)
    assert result.exit_code == code
    assert result.stderr.startswith(said)
    assert result.stdout == ""
    assert not (Path(os.environ["LAMFS_DATA_DIR"]) / "error.log").exists()


def test_the_unexpected_is_one_line_and_a_log_that_only_the_user_reads(run) -> None:
    result = run(ZeroDivisionError("division\nby zero"))
    log = Path(os.environ["LAMFS_DATA_DIR"]) / "error.log"
    assert result.exit_code == 1
    assert result.stderr == (
        f"lamfs: this should not have happened (ZeroDivisionError: division); the traceback is in {log}\n"
    )
    assert "Traceback (most recent call last)" in log.read_text()
    assert "raise raising.pop()" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    run(KeyError("again"))
    assert log.read_text().count("Traceback") == 2


def test_an_oserror_that_names_no_file_is_unexpected(run) -> None:
    result = run(OSError(5, "Input/output error"))
    assert result.exit_code == 1
    assert "this should not have happened" in result.stderr


def test_the_log_does_not_grow_for_ever(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "LOG_LIMIT", 10)
    log = Path(os.environ["LAMFS_DATA_DIR"]) / "error.log"
    for name in ("first", "second"):
        run(KeyError(name))
    assert "second" in log.read_text()
    assert "first" not in log.read_text()


def test_without_a_data_directory_the_log_is_a_temporary_file(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMFS_DATA_DIR", str(tmp_path / "file" / "data"))
    monkeypatch.setattr(seam.tempfile, "tempdir", str(tmp_path))
    result = run(ZeroDivisionError("x"))
    path = Path(result.stderr.rpartition(" is in ")[2].strip())
    assert path.parent == tmp_path
    assert "ZeroDivisionError" in path.read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["save"],
        ["save", "/there/is/no/such/file"],
        ["delete"],
        ["mount", "--nonsense"],
        ["sync", "--timeout", "-1"],
        ["init"],
        ["delete", "x", "--keep-storage"],
        ["mount", "/tmp/x", "-o", "nonsense"],
        ["mount", "/tmp/x", "-o", "umask=9"],
    ],
    ids=" ".join,
)
def test_misuse_is_2(words: list[str]) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls"], "No instance is connected"),
        (["info", "x"], "No instance is connected"),
        (["fsck"], "No instance is connected"),
        (["close"], "No instance is connected"),
        (["ls", "--instance", "a/b"], "There is no instance 'a/b'"),
        (["connect", "a/b"], "There is no instance 'a/b'"),
        (["mount", "/tmp/x", "--instance", "a/b"], "There is no instance 'a/b'"),
        (["umount", "/tmp"], "Nothing is mounted at /tmp"),
        (["umount", "/proc"], "is not a lamfs mount (proc)"),
        (["mount", "/proc"], "Something else is mounted at /proc (proc)"),
        (["sync", "/tmp"], "is not in a living mount"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_failure_is_1_with_a_sentence(words: list[str], said: str) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1, result.output
    assert said in result.stderr
    assert result.stderr.startswith("lamfs: ")
