"""Every command explains itself, and starts without what it does not need."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import lamfs
from lamfs.cli import main
from lamfs.daemon.options import KERNEL_WORDS, MountOptions, apply_words

SETUP = ("login", "init", "connect", "instances", "scratch", "fsck", "close", "delete-instance")
MOUNTS = ("mount", "umount", "status", "sync")
ARTIFACTS = ("info", "ls", "save", "replace", "cache", "delete", "restore")
COMMANDS = SETUP + MOUNTS + ARTIFACTS


def run(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_are_those_of_the_documentation() -> None:
    assert sorted(main.commands) == sorted(COMMANDS)


def test_the_help_lists_every_command_once_with_a_whole_sentence() -> None:
    text = run("--help")
    for name in COMMANDS:
        lines = re.findall(rf"^  {name} +(\S.*)$", text, re.MULTILINE)
        assert len(lines) == 1, name
        assert lines[0].endswith(".")
        assert "..." not in lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_begin_with_the_command(name: str) -> None:
    text = run(name, "--help")
    assert run(name, "-h") == text
    examples = re.split(r"^Examples?:$", text, flags=re.MULTILINE)[1].strip().splitlines()
    assert examples
    for example in examples:
        assert example.strip().startswith(f"lamfs {name}"), example


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_use_options_that_exist(name: str) -> None:
    command = main.commands[name]
    known = {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    examples = re.split(r"^Examples?:$", run(name, "--help"), flags=re.MULTILINE)[1]
    for word in re.findall(r"(?<!\S)--?[a-z][a-z-]*", examples):
        assert word in known, word


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.opts


def test_the_version() -> None:
    assert run("--version") == f"lamfs {lamfs.__version__}\n"


VALUES = {
    "uid": "1000", "gid": "1000", "umask": "022", "close": "storage", "fsync": "spool", "cache_limit": "1G",
    "timeout": "5", "uploads": "4", "spool_limit": "1G", "spool_free": "1G", "cache_free": "2G",
}  # fmt: skip


def test_the_help_of_mount_knows_the_options_of_the_daemon() -> None:
    """Each word in the help's table is one that the daemon takes, and none that it takes is missing."""
    table = run("mount", "--help").partition("-o takes")[2].partition("Examples:")[0]
    named = set()
    for line in re.findall(r"^ {4}(\S.*?)(?:  |$)", table, re.MULTILINE):
        named |= set(re.findall(r"[a-z_]+", re.sub(r"=\S+|opposites|and their", "", line)))
    for word in sorted(named):
        options = MountOptions("a/b", "/m")
        apply_words(options, [f"{word}={VALUES[word]}" if word in VALUES else word])
    shown = {"ro", "rw", "allow_other", "public_stats", "xattr", "real_keys", "debug", *VALUES}
    assert shown <= named
    kernel = {word for word in KERNEL_WORDS if word.startswith("no")} | {"sync", "dirsync"}
    assert named - shown == kernel


@pytest.mark.parametrize("words", [["--help"], ["mount", "--help"], ["status"], ["instances"]], ids=" ".join)
def test_quick_commands_load_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom lamfs.cli import main\n"
        f"main({words!r}, standalone_mode=False)\n"
        "heavy = {'boto3', 'botocore', 'sqlite_utils', 'rich', 'pandas', 'numpy', 'trio', 'pyfuse3', 'cloudpathlib'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", ["ops.setup", "ops.artifacts", "ops.fsck", "ops.snapshot", "api.artifact", "work.steps"]
)
def test_what_is_synchronous_loads_no_event_loop(module: str) -> None:
    code = f"import sys, lamfs.{module}\nsys.exit(', '.join({{'trio', 'pyfuse3'}} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
