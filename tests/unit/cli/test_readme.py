"""README.md speaks of the options, commands and variables that there are, and of all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lamfs.cli import main
from lamfs.daemon.options import KERNEL_WORDS, MountOptions, apply_words
from lamfs.fs import backpressure
from lamfs.sizes import parse_size

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """The text below a headline."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def first_cells(title: str) -> list[str]:
    """The first cell of each row of a section's table."""
    rows = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [row.split("|")[1] for row in rows][1:]


def test_the_table_of_mount_options_is_what_the_daemon_takes() -> None:
    words = [word for cell in first_cells("Mount options") for word in re.findall(r"`([^`]+)`", cell)]
    values = {"N": "5", "OCTAL": "022", "SIZE": "1G", "SECONDS": "9"}
    for word in words:
        name, _, value = word.partition("=")
        apply_words(MountOptions("a/b", "/m"), [f"{name}={values.get(value, value)}" if value else name])
    named = {word.partition("=")[0] for word in words}
    fields = set(MountOptions.__dataclass_fields__) - {"slug", "mountpoint", "read_only", "foreground", "adopt", "fuse"}
    assert fields | {"ro", "rw"} == {name for name in named if name not in KERNEL_WORDS}
    assert {word for word in KERNEL_WORDS if word.startswith("no")} <= named


def test_the_defaults_it_names_are_the_defaults() -> None:
    text = section("Mount options")
    options = MountOptions("a/b", "/m")
    assert f"Default `{options.close}`. |\n| `fsync" in text
    assert f"means. Default `{options.fsync}`." in text
    assert options.cache_limit == parse_size("20G")
    assert "`20G` (default)" in text
    assert options.spool_limit == parse_size("32G")
    assert "`32G` (default)" in text
    assert backpressure.FLOOR == (1 << 30, 0.02)
    assert "by default 1 GiB, and at most 2 % of the disk" in text
    assert f"for its own. Default {options.timeout:.0f}." in text
    assert f"1 to 64. Default {options.uploads}." in text


def test_the_table_of_commands_is_complete() -> None:
    named = [word.split()[0] for cell in first_cells("Commands") for word in re.findall(r"`([^`]+)`", cell)]
    assert sorted(named) == sorted(main.commands)


def test_commands_and_options_anywhere_in_it_exist() -> None:
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    lines = re.findall(r"(?m)^lamfs ([^\n#]*)", shell) + re.findall(r"`lamfs ([a-z][^`]*)`", README)
    assert len(lines) > 15
    for line in lines:
        name, *words = line.split()
        assert name in main.commands, line
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        for word in words:
            option = word.strip("[]").rstrip(";,.")
            if option.startswith("-"):
                assert option in known, line


def test_what_lies_where_is_moved_by_variables_that_exist() -> None:
    source = "".join(path.read_text() for path in (ROOT / "lamfs").rglob("*.py"))
    for name in set(re.findall(r"LAMFS_[A-Z_]+", README)):
        assert f'"{name}"' in source, name


@pytest.mark.parametrize("name", sorted({*re.findall(r"(?:scripts|test-files)/[A-Za-z_.-]+[a-z]", README)}))
def test_files_it_names_exist(name: str) -> None:
    assert (ROOT / name).exists()
