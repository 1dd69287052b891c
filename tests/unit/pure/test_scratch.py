"""Which names are scratch, and the setting that says so."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

import lamfs
from lamfs import config, scratch
from lamfs.cli import main
from lamfs.errors import InvalidArgument, NotSetUp


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (".x.swp", True), (".x.csv.swo", True), ("x.swp", False), ("4913", False), ("49133", False), ("x~", False),
        ("~x", False), (".#x", True), ("#x#", False), (".~lock.x.ods#", True), (".DS_Store", True), ("._x", True),
        (".nfs000123", True), (".Trash-1000", False), ("b", False), ("._new\nline", True), ("._é", True),
    ],
)  # fmt: skip
def test_the_default_list(name: str, wanted: bool) -> None:
    assert scratch.matcher(scratch.DEFAULT)(name) is wanted


def test_the_probe_of_vim_is_the_only_one() -> None:
    assert [name for name in ("4913", "5036", "49130", "x") if scratch.is_probe(name)] == ["4913"]


def test_an_empty_list_matches_nothing() -> None:
    assert scratch.matcher([]) is scratch.nothing
    assert not scratch.nothing("x~")


@pytest.mark.parametrize("pattern", ["", "a/b", "*", "**", "?", "?*", ".", "..", "a\0b", "a\nb"])
def test_what_is_no_pattern_of_a_name_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgument):
        scratch.check(pattern)


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["scratch", *words])


def test_the_command_changes_the_setting() -> None:
    assert run().stdout.split() == list(scratch.DEFAULT)
    assert run("--add", "*.tmp", "--remove", "._*").exit_code == 0
    wanted = [*(pattern for pattern in scratch.DEFAULT if pattern != "._*"), "*.tmp"]
    assert run("--add", "*.tmp").stdout.split() == wanted
    assert json.loads(run("--json").stdout) == {"scratch_names": wanted}
    refused = run("--remove", "nothing")
    assert (refused.exit_code, config.scratch_names()) == (2, tuple(wanted))
    assert "'nothing' is not on the list" in refused.stderr
    assert run("--add", "*").exit_code == 2
    assert run("--reset").stdout.split() == list(scratch.DEFAULT)


def test_the_setting_in_python() -> None:
    assert lamfs.settings.scratch_names == scratch.DEFAULT
    lamfs.settings.scratch_names = ["*.tmp"]  # type: ignore[assignment]
    assert lamfs.settings.scratch_names == ("*.tmp",)
    lamfs.settings.scratch_names = []  # type: ignore[assignment]
    assert lamfs.settings.scratch_names == ()
    with pytest.raises(InvalidArgument, match="list of patterns"):
        lamfs.settings.scratch_names = "*.tmp"  # type: ignore[assignment]
    lamfs.settings.scratch_names = None  # type: ignore[assignment]
    assert lamfs.settings.scratch_names == scratch.DEFAULT


def test_damaged_settings_are_named() -> None:
    config.write_json(config.config_dir() / "settings.json", {"scratch_names": "x~"})
    with pytest.raises(NotSetUp, match=r"settings\.json"):
        config.scratch_names()
