"""The registry is changed by its verbs alone, and these get from their callers all that is random or timed.

The source is read, nothing is run. As in test_layers.py, the last tests show the reader what is forbidden.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.registry import verbs

PACKAGE = Path(__file__).parents[2] / "lamfs"

SQL = {"execute", "executemany", "executescript", "all", "one", "rows", "set_meta"}
"""Methods of a Database that run a statement, or write."""

NOT_YET = {"ops/strays.py", "ops/working_copy.py"}
"""Modules that still start transactions, or write SQL. To become empty."""

OTHERS = {
    # The tables themselves, and this machine's own work (journal, spool files, uploads), which is no part of Verbs.
    "schema.py", "db.py", "journal.py", "entries.py", "partial_spools.py", "uploads.py", "seals.py",
    # A registry that comes from storage is checked, mended and carried over as a whole, by one command.
    "carry.py", "aside.py", "intake.py", "received.py", "lostfound.py", "workdb.py",
    # Where commands get what they do not say themselves.
    "clocked.py",
}  # fmt: skip
"""Modules of the registry that may ask for the time, or for something random."""

RANDOM_NAMES = {"new_uid", "now_ns", "spool_token", "new_origin", "uuid4", "uuid1", "urandom"}
RANDOM_MODULES = {"time", "secrets", "random"}

ROLES = {"names", "attributes", "writes", "commits", "rescue", "people"}
"""Attributes of Verbs that have changing verbs."""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, ast.Attribute | ast.Name]]:
    """Calls of names and of attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            yield node, node.func


def last_name(node: ast.AST) -> str:
    """``c`` of ``a.b.c`` and of ``c``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def transactions(source: str) -> list[int]:
    """Lines that start a transaction, or run a statement on a Database."""
    return [
        call.lineno
        for call, func in calls(ast.parse(source))
        if isinstance(func, ast.Attribute)
        and (func.attr == "transaction" or (func.attr in SQL and last_name(func.value) in ("db", "_db", "conn")))
    ]


def random_calls(source: str) -> list[str]:
    """What a module asks the clock, or chance, for; and names of spool files whose random part is not said."""
    found = []
    for call, func in calls(ast.parse(source)):
        name, module = last_name(func), last_name(func.value) if isinstance(func, ast.Attribute) else ""
        said = len(call.args) + len(call.keywords) > 1
        if (
            name in RANDOM_NAMES
            or module in RANDOM_MODULES
            or (name == "spool_name" and not said)
            or (module in ("datetime", "date") and name in ("now", "utcnow", "today"))
        ):
            found.append(f"line {call.lineno}: {ast.unparse(func)}")
    return found


def said_by_callers() -> dict[str, set[str]]:
    """The arguments of each verb that its caller must say by name."""
    found: dict[str, set[str]] = {}
    for protocol in vars(verbs).values():
        if not (inspect.isclass(protocol) and protocol.__module__ == verbs.__name__):
            continue
        for name, method in inspect.getmembers(protocol, inspect.isfunction):
            parameters = inspect.signature(method).parameters.values()
            said = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty}
            if said and not name.startswith("_"):
                found[name] = said
    return found


def unsaid(source: str, verbs: dict[str, set[str]]) -> list[str]:
    """Calls of verbs that leave out what the registry must not make up itself."""
    found = []
    for call, func in calls(ast.parse(source)):
        if isinstance(func, ast.Attribute) and func.attr in verbs and last_name(func.value).lstrip("_") in ROLES:
            said = {each.arg for each in call.keywords}
            missing = verbs[func.attr] - said
            if func.attr == "rename" and "backup" in said:
                missing |= {"copy_uid"} - said
            if missing:
                found.append(f"line {call.lineno}: {ast.unparse(func)} lacks {', '.join(sorted(missing))}")
    return found


def sources(*parts: str) -> Iterator[tuple[str, str]]:
    """Path below the package, and text, of each module of these parts (all but the registry and the cache, if none)."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        part = name.partition("/")[0]
        if part in parts if parts else part not in ("registry", "cache"):  # the cache has an index of its own
            yield name, file.read_text()


def test_nobody_but_the_registry_starts_transactions_or_writes_sql() -> None:
    found = {name for name, source in sources() if transactions(source)}
    assert found - NOT_YET == set()
    assert NOT_YET - found == set(), "they need no exception any more: take them off the list"


def test_the_registry_asks_neither_the_clock_nor_chance() -> None:
    found = {
        name: what
        for name, source in sources("registry")
        if (what := random_calls(source)) and name.removeprefix("registry/") not in OTHERS
    }
    # A Registry object's own name: not part of any verb; it can be read as ``origin``.
    assert found.pop("registry/__init__.py") == [found_origin()]
    assert found == {}


def found_origin() -> str:
    source = (PACKAGE / "registry" / "__init__.py").read_text().splitlines()
    return f"line {next(number for number, line in enumerate(source, 1) if 'new_origin()' in line)}: new_origin"


def test_the_mount_and_the_api_say_when_and_which() -> None:
    known = said_by_callers()
    assert known["rename"] == {"now"}
    assert known["create_file"] == {"now", "artifact_uid", "token"}
    found = {name: what for name, source in sources("fs", "work", "daemon", "api") if (what := unsaid(source, known))}
    assert found == {}


def test_every_verb_is_told_of() -> None:
    for protocol in vars(verbs).values():
        if inspect.isclass(protocol) and protocol.__module__ == verbs.__name__:
            assert protocol.__doc__
            for name, member in vars(protocol).items():
                if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    assert member.__doc__, f"{protocol.__name__}.{name}"


@pytest.mark.parametrize(
    "source",
    [
        "with registry.db.transaction():\n    pass",
        "with self._c.registry.db.transaction() as conn:\n    pass",
        "registry.db.execute('DELETE FROM journal')",
        "db = registry.db\nrows = db.all('SELECT 1')",
        "instance.registry.db.set_meta('uid', 1)",
        "registry.db.conn.executemany('', [])",
    ],
)
def test_the_reader_sees_sql(source: str) -> None:
    assert len(transactions(source)) == 1


def test_the_reader_lets_pass_what_changes_nothing() -> None:
    assert transactions("registry.db.data_version()\nall(rows)\nself.all('x')\nregistry.names.unlink(1, 'a')") == []


@pytest.mark.parametrize(
    "source",
    [
        "now = now_ns()",
        "uid = model.new_uid(12)",
        "time." + "sleep(1)",
        "at = time.time_ns()",
        "secrets.token_hex(6)",
        "src = spool_name(inode.ino)",
        "at = datetime.now(UTC)",
    ],
)
def test_the_reader_sees_what_is_random_or_timed(source: str) -> None:
    assert len(random_calls(source)) == 1


def test_the_reader_lets_pass_what_was_said() -> None:
    assert random_calls("spool_name(ino, token)\ndatetime.combine(day, time.min)\ndatetime.fromtimestamp(now)") == []


def test_the_reader_sees_what_a_caller_leaves_out() -> None:
    known = {"unlink": {"now"}, "rename": {"now"}}
    assert unsaid("names.rename(1, 'a', 1, 'b', now=now, backup=kept)", known) == [
        "line 1: names.rename lacks copy_uid"
    ]
    assert len(unsaid("registry.names.unlink(1, 'a')\nself._names.unlink(1, 'a')", known)) == 2
    assert unsaid("registry.names.unlink(1, 'a', now=now)\nos.unlink('a')\nspool.unlink('a')", known) == []
