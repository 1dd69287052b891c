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

OTHERS = {
    "schema.py",  # when the first two directories were made, by a new registry that nobody has yet
    "workdb.py",  # the file of this machine's work, which no verb is about, and its names when it is put aside
    "received.py",  # how long the check of an untrusted registry may take
}
"""Modules of the registry that may ask for the time, or for something random."""

RANDOM_NAMES = {"new_uid", "now_ns", "spool_token", "uuid4", "uuid1", "urandom"}
RANDOM_MODULES = {"time", "secrets", "random"}

ROLES = {
    name: member.fget.__annotations__["return"]
    for name, member in vars(verbs.Verbs).items()
    if isinstance(member, property)
}
"""Attributes of Verbs, and their protocols."""

CHANGING = ROLES.keys() - {"tree", "artifacts", "changes"}
"""Those with verbs that must be told something by name. (``artifacts`` is also a module of others.)"""

FUSE = "fuse/operations.py"
"""Calls fs/names.py, which says when."""

OWN = {"journal", "partial_spools", "uploads", "seals", "replay"}
"""Attributes of a Registry that are this machine's own work, and no part of Verbs."""


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


def used(source: str) -> set[tuple[str, str]]:
    """Roles of registries, and the verbs of them, that a module uses."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            role, owner = node.value.attr, last_name(node.value.value).lstrip("_")
            if role in ROLES.keys() | OWN and owner in ("registry", "verbs", "old", "new"):
                found.add((role, node.attr))
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
        if isinstance(func, ast.Attribute) and func.attr in verbs and last_name(func.value).lstrip("_") in CHANGING:
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
    assert {name for name, source in sources() if transactions(source)} == set()


def test_nobody_uses_what_is_no_verb() -> None:
    """So the list of verbs is all that another registry has to have. Registry has them: mypy checks it."""
    known = {
        (role, name) for role, protocol in ROLES.items() for name in vars(getattr(verbs, protocol)) if name[0] != "_"
    }
    found = {name: what for name, source in sources() if (what := {u for u in used(source) if u[0] in ROLES} - known)}
    assert found == {}


def test_the_registry_asks_neither_the_clock_nor_chance() -> None:
    found = {
        name: what
        for name, source in sources("registry")
        if (what := random_calls(source)) and name.removeprefix("registry/") not in OTHERS
    }
    # A Registry object's own name, ``origin``, and its process's where the system does not tell: no part of any verb.
    assert [text.partition(": ")[2] for text in found.pop("registry/__init__.py")] == ["new_uid", "new_uid"]
    assert set(found) == set()
    needed = {name for name in OTHERS if random_calls((PACKAGE / "registry" / name).read_text())}
    assert needed == OTHERS, "take those off the list that need no exception any more"


def test_everybody_says_when_and_which() -> None:
    known = said_by_callers()
    assert known["rename"] == {"now"}
    assert known["create_file"] == {"now", "artifact_uid", "token"}
    found = {name: what for name, source in sources() if (what := unsaid(source, known)) and name != FUSE}
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
        "at = time.monotonic()",
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
