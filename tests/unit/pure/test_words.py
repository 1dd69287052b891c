"""Names in code use the words of the field: fetch, in flight, prefetch, debounce; no synonyms of our own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "lamfs"

INSTEAD = {
    "flight": "fetch",
    "guess": "prefetch",
    "neighbour": "prefetch",
    "pace": "debounce",
}
"""Words that are not used in names, and the ones that are. ``in_flight`` is the field's."""


def words_of(name: str) -> list[str]:
    """The words of an identifier or a file's name, lower-case and singular."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name.replace("in_flight", ""))
    found = [part.lower() for part in parts]
    return [re.sub(r"(?<=s)es$|s$", "", word) if word.endswith("s") else word for word in found]


def names_in(path: Path) -> Iterator[str]:
    """Every name that a module defines or uses, and its own."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_use_the_words_of_the_field(path: Path) -> None:
    found = {(name, INSTEAD[word]) for name in names_in(path) for word in words_of(name) if word in INSTEAD}
    assert found == set(), "(name, the word to use instead)"


def test_words_are_found_in_names_of_any_form() -> None:
    assert words_of("_start_flights") == ["start", "flight"]
    assert words_of("FlightGuesses") == ["flight", "guess"]
    assert words_of("PACE_SECONDS") == ["pace", "second"]
    assert words_of("_in_flight") == []
