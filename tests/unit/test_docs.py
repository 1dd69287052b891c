"""lamfs/docs says what is so: tests and modules that it names exist, and nothing cites what the repository lacks."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "lamfs" / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DECISIONS = sorted((DOCS / "decisions").iterdir())
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
MODULE = re.compile(r"`((?:\w+/)*\w+\.py)`")
OUTSIDE = re.compile(r"\b(?:DESIGN|FACTS)\b|\b[Ii]ssues? (?:#|\d|\")|\.\./shared|(?<!\w)/work/|\bpull request\b")
"""How documents and threads are cited that whoever has a clone does not have."""
PAGE = re.compile(r"[\w/.-]+\.md\b")


def sections(text: str) -> dict[str, str]:
    """The text below each headline, without that below the headlines in it."""
    parts = re.split(r"(?m)^(#+ .+)$", text)
    return {title: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def chapters(page: str) -> Iterator[tuple[str, str]]:
    """The innermost sections of a page."""
    found = list(sections((DOCS / page).read_text()).items())
    for (title, body), (following, _) in zip(found, [*found[1:], ("#", "")], strict=True):
        if not following.startswith(title.split(" ")[0] + "#"):
            yield title, body


@functools.cache
def names_of_tests(path: str) -> frozenset[str]:
    """The names of the tests in a file."""
    tree = ast.parse((ROOT / path).read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def sources() -> Iterator[Path]:
    """What is in the repository and written by hand."""
    yield ROOT / "README.md"
    yield ROOT / "pyproject.toml"
    yield from (path for path in (ROOT / "scripts").iterdir() if path.is_file())
    for folder in ("lamfs", "tests"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md"))


def is_there(name: str) -> bool:
    """Whether a page that is cited exists, relative to the root, the package, or its docs."""
    return any((folder / name).is_file() for folder in (ROOT, ROOT / "lamfs", DOCS, DOCS / "decisions"))


@pytest.mark.parametrize(("title", "body"), [pytest.param(*each, id=each[0]) for each in chapters("SEMANTICS.md")])
def test_each_section_of_the_semantics_names_tests_that_exist(title: str, body: str) -> None:
    promise, _, named = body.partition("Tests:")
    assert promise.strip(), "it says something"
    assert TEST.findall(named), "nothing is promised that no test executes"
    assert not TEST.sub("", named).strip(" ,.\n"), "after 'Tests:' there are tests only"
    for path, name in TEST.findall(named):
        assert (ROOT / path).is_file(), path
        assert name in names_of_tests(path), f"{path}::{name}"


def test_the_sections_are_found() -> None:
    titles = [title for title, _ in chapters("SEMANTICS.md")]
    assert {"### read", "### close", "### A read-only mount"} <= set(titles)
    assert "## Content" not in titles


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_modules_and_pages_that_are_cited_exist(page: Path) -> None:
    text = page.read_text()
    for name in MODULE.findall(text):
        assert (ROOT / "lamfs" / name).is_file() or (ROOT / name).is_file(), name
    for name in re.findall(r"`(lamfs(?:\.\w+)+)`", text):
        path = ROOT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
    for name in PAGE.findall(text):
        assert is_there(name) or (page.parent / name).is_file(), name
    titles = {title.lstrip("# ") for title in sections((ROOT / "README.md").read_text())}
    for title in re.findall(r'README\.md,\s+"([^"]+)"', text):
        assert title in titles, title


def test_the_architecture_names_every_package() -> None:
    text = (DOCS / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "lamfs").iterdir():
        if (path / "__init__.py").is_file() and path.name != "core":
            assert re.search(rf"\b{path.name}\b", text), path.name


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_says_why_and_what_would_change_it(page: Path) -> None:
    text = page.read_text()
    for part in ("Context", "Decision", "Consequences", "What would change our mind"):
        assert f"**{part}.**" in text, part


def test_nothing_cites_what_is_outside_of_the_repository() -> None:
    found = []
    for path in sources():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if OUTSIDE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_pages_that_code_cites_exist() -> None:
    for path in sources():
        if path.suffix == ".py" and path != Path(__file__) and "tests/chaos" not in str(path):
            for name in re.findall(r"\b(?:lamfs/)?docs/[\w/.-]+\.md\b|\b(?:README|[A-Z]{9,})\.md\b", path.read_text()):
                assert is_there(name), f"{path.relative_to(ROOT)} cites {name}"


def test_the_pages_are_in_the_wheel() -> None:
    """hatchling takes whole packages, files of any kind, but for what is excluded or ignored by git."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["lamfs"]}
    assert set(build) == {"targets"}
    ignored = (ROOT / ".gitignore").read_text()
    assert "docs" not in ignored
    assert ".md" not in ignored


def awaits_in_transactions(source: str) -> list[int]:
    """The lines of what may let another task run inside of ``with ….transaction()``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.With) and any(
            isinstance(call := item.context_expr, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "transaction"
            for item in node.items
        ):
            inner = (each for statement in node.body for each in ast.walk(statement))
            found += [each.lineno for each in inner if isinstance(each, ast.Await | ast.AsyncWith | ast.AsyncFor)]
    return found


def test_no_transaction_has_a_checkpoint() -> None:
    """CONCURRENCY.md, "The registry connection": another task would join it."""
    for path in (ROOT / "lamfs").rglob("*.py"):
        assert not awaits_in_transactions(path.read_text()), path


@pytest.mark.parametrize("inside", ["await f()", "if x:\n            await f()", "async with f():\n            pass"])
def test_a_checkpoint_in_a_transaction_is_seen(inside: str) -> None:
    source = f"async def g():\n    with registry.db.transaction():\n        {inside}\n"
    assert awaits_in_transactions(source)
    assert not awaits_in_transactions("async def g():\n    with db.transaction():\n        f()\n    await f()\n")


STATE = [pytest.param(*each, id=each[0]) for each in chapters("CONCURRENCY.md") if each[0].startswith("###")]


@pytest.mark.parametrize(("title", "body"), STATE)
def test_each_piece_of_shared_state_has_an_owner_and_says_what_breaks(title: str, body: str) -> None:
    loop = (DOCS / "CONCURRENCY.md").read_text().partition("## In the mover")[0]
    parts = ["Owner", "Lock", "Broken", *(["Checkpoints"] if title in loop else [])]
    assert {part for part in parts if f"\n- {part}: " not in f"\n{body}"} == set()
