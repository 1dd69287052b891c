"""Names in code use the words of the field: fetch, in flight, prefetch, debounce; no synonyms of our own.

Docstrings and comments are plain sentences, where a package has come so far.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
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

PLAIN = sorted([*PACKAGE.glob("api/*.py"), *PACKAGE.glob("ops/*.py")])
"""Modules of which more is asked: the words below, and plain sentences."""
OLDER = {"strays.py", "working_copy.py"}
"""Modules of these folders with older words and sentences."""
ONE_MEANING = {
    "adopt": "take over (rows of a process that is gone); else what is done, such as 'make content'",
    "home": "object key",
    "husk": "unread scratch name",
    "said": "what it is: meta, reply, note",
    "settle": "ensure stored, conclude, finish",
    "unsaid": "pending",
}
"""Words that had several meanings, or none outside of lamfs, and what is used in definitions instead."""
MEANT = {"adopt_puts"}
"""Names that use such a word in the one meaning that it has."""
RIDDLES = re.compile(r"\b(whoever|whomever|upon|for who|(?<!there )(is|are) no(?! longer| more))\b", re.IGNORECASE)
"""Turns of speech that a reader has to read twice."""


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


def definitions_in(path: Path) -> Iterator[str]:
    """Every name that a module defines: functions, classes, arguments and variables."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def sentences_in(text: str) -> Iterator[str]:
    """The docstrings and comments of a module's source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield " ".join(node.value.value.split())
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_use_the_words_of_the_field(path: Path) -> None:
    found = {(name, INSTEAD[word]) for name in names_in(path) for word in words_of(name) if word in INSTEAD}
    assert found == set(), "(name, the word to use instead)"


def test_words_are_found_in_names_of_any_form() -> None:
    assert words_of("_start_flights") == ["start", "flight"]
    assert words_of("FlightGuesses") == ["flight", "guess"]
    assert words_of("PACE_SECONDS") == ["pace", "second"]
    assert words_of("_in_flight") == []


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_word_has_one_meaning(path: Path) -> None:
    names = {name for name in definitions_in(path) if name not in MEANT and path.name not in OLDER}
    found = {(name, ONE_MEANING[word]) for name in names for word in words_of(name) if word in ONE_MEANING}
    assert found == set(), "(name, what to say instead)"


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sentences_are_plain(path: Path) -> None:
    found = [text for text in sentences_in(path.read_text()) if RIDDLES.search(text)]
    assert path.name in OLDER or found == []


def test_riddles_are_found_in_docstrings_and_comments() -> None:
    source = '"""By whoever has it."""\nn = 1  # this is no sentence\nm = "upon save"\n"""There is no\nmore."""\n'
    assert [text for text in sentences_in(source) if RIDDLES.search(text)] == [
        "By whoever has it.",
        "this is no sentence",
    ]
