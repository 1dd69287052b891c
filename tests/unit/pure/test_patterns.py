"""A name ends where its pattern ends: a line break behind it is no part of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lamfs
from lamfs import config, keys
from lamfs.errors import InvalidArgument
from lamfs.fs import backups
from lamfs.storage.root import parse_root
from lamfs.storage.s3 import download

IDENT = "0" * 32


def test_handles_and_buckets() -> None:
    assert config.check_handle("ada") == "ada"
    with pytest.raises(InvalidArgument):
        config.check_handle("ada\n")
    with pytest.raises(InvalidArgument):
        config.parse_slug("ada/x\n")
    with pytest.raises(InvalidArgument):
        parse_root("s3://bucket\n/prefix")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (keys._REGISTRY_KEY, f"{IDENT}.lndb"),
        (keys.OWN_OBJECT, f".lamindb/{'a' * 20}"),
        (download._CONTENT_RANGE, "bytes 0-1/2"),
    ],
)
def test_names_in_storage(pattern: re.Pattern[str], text: str) -> None:
    assert pattern.fullmatch(text)
    assert not pattern.fullmatch(f"{text}\n")


def test_backups() -> None:
    assert backups.KEPT.search("a.txt~")
    assert not backups.KEPT.search("a.txt~\n")


def test_no_pattern_ends_in_a_dollar() -> None:
    """``$`` also matches before a line break at the end (Python's re)."""
    found = []
    for path in Path(lamfs.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.") and node.args:
                pattern = node.args[0]
                if isinstance(pattern, ast.Constant) and str(pattern.value).rstrip(")").endswith("$"):
                    found.append(f"{path}:{node.lineno}")
    assert not found
