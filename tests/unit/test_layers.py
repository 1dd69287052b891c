"""An import may only point down the picture in lamfs/docs/ARCHITECTURE.md: every import statement is read, none is run.

Imports inside functions and under TYPE_CHECKING count as well. The last tests give the reader a package with each kind
of bad import, so that a reader that finds nothing is noticed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lamfs"

PURE = {
    "model", "errors", "keys", "hashing", "jsonlines", "jsontext", "permissions", "printable", "processes", "scratch",
    "sizes", "config",
}  # fmt: skip
LEAVES = {"beneath", "copying", "mountinfo", "pool"}
"""Descriptors, threads and tables of the kernel: plain code that imports nothing of lamfs."""
BOTTOM = PURE | LEAVES | {"registry", "spool", "storage"}
MIDDLE = BOTTOM | {"cache", "mover", "prefetch", "work"}

MAY_IMPORT: dict[str, set[str]] = {
    "model": set(),
    "errors": set(),
    "keys": {"model", "errors"},
    "hashing": {"model", "errors"},
    "permissions": {"errors"},
    "scratch": {"errors"},
    "sizes": {"errors"},
    "jsonlines": set(),
    "jsontext": set(),
    "printable": set(),
    "processes": set(),
    "config": {"model", "errors", "keys", "hashing", "jsonlines", "jsontext", "permissions", "processes", "scratch"},
    "beneath": set(),
    "copying": set(),
    "mountinfo": set(),
    "spool": {"beneath", "errors", "keys"},
    "pool": set(),
    "registry": PURE,
    "storage": PURE | LEAVES,
    "mover": BOTTOM,
    "cache": BOTTOM | {"mover"},
    # Asks the cache for what nobody has read yet.
    "prefetch": BOTTOM | {"cache"},
    "work": BOTTOM | {"mover"},
    "fs": MIDDLE,
    "ops": MIDDLE | {"fs"},
    "core": PURE,
    "fuse": MIDDLE | {"fs"},
    "api": MIDDLE | {"ops", "core"},
    # Of the daemon: its options, and launch.py, which starts it as a program.
    "cli": MIDDLE | {"ops", "daemon", ""},
    # Wires a mount together; nobody below imports it.
    "daemon": MIDDLE | {"fs", "fuse", "ops", ""},
    "__main__": {"cli"},
    # lamfs/__init__.py: what `import lamfs as ln` gives.
    "": {"api", "core", "ops"} | PURE,
}
"""What each first-level package or module of lamfs may import of the others."""

ONLY_IN: dict[str, set[str]] = {
    "pyfuse3": {"fuse"},
    "sqlite_utils": {"registry"},
    "sqlite3": {"registry", "cache"},
    "boto3": {"storage"},
    "botocore": {"storage"},
    "s3transfer": {"storage"},
    "mypy_boto3_s3": {"storage"},
    "cloudpathlib": {"storage", "api"},
    "trio": {"fuse", "fs", "prefetch", "cache", "mover", "work", "daemon"},
    "click": {"cli"},
}
"""Where the libraries that shape the layers may be imported: their errors are translated there."""

OPTIONAL = {"pandas", "pyarrow", "numpy"}
"""Of the extra lamfs[pandas]: `import lamfs` must work without them, so no module imports them as it loads."""


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and where: file, line, and whether it is imported when the file is."""

    file: Path
    line: int
    module: str
    at_load: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def part_of(root: Path, file: Path) -> str:
    """First-level package or module of a file below the package's root; ``""`` for its ``__init__``."""
    first = file.relative_to(root).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def is_type_checking(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def is_module(root: Path, name: list[str]) -> bool:
    """Whether an absolute name (``["lamfs", "fs", "files"]``) is a module or package below the package's root."""
    path = root.joinpath(*name[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def modules_named(node: ast.AST, package: list[str], root: Path) -> Iterator[str]:
    """Absolute names of the modules that one syntax node imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        full = [*base, *(node.module.split(".") if node.module else [])]
        # `from lamfs.fs import x`: a module x of lamfs.fs, or a name from lamfs/fs/__init__.py.
        inner = {alias.name for alias in node.names if full[:1] == [root.name] and is_module(root, [*full, alias.name])}
        yield from (".".join([*full, name]) for name in sorted(inner))
        if any(alias.name not in inner for alias in node.names):
            yield ".".join(full)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def imports_of(root: Path, file: Path) -> list[Import]:
    """Every import of a file, in functions too."""
    found: list[Import] = []
    package = [root.name, *file.relative_to(root).parts[:-1]]

    def walk(node: ast.AST, at_load: bool) -> None:
        for name in modules_named(node, package, root):
            found.append(Import(file.relative_to(root.parent), getattr(node, "lineno", 0), name, at_load))
        inner = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_type_checking(node):
            inner = False
        for child in ast.iter_child_nodes(node):
            walk(child, inner)

    walk(ast.parse(file.read_text()), True)
    return found


def problems(root: Path) -> list[str]:
    """A sentence for every import that breaks a rule, every part that has no place, every module that is too long."""
    found = []
    for file in sorted(root.rglob("*.py")):
        part = part_of(root, file)
        if part not in MAY_IMPORT:
            found.append(f"{file.relative_to(root.parent)} has no layer; give '{part}' a place in MAY_IMPORT")
            continue
        for item in imports_of(root, file):
            top, *rest = item.module.split(".")
            if top == root.name:
                target = rest[0] if rest else ""
                if target != part and target not in MAY_IMPORT[part]:
                    found.append(f"{item}: {part or root.name} may not import {target or root.name}")
            elif top in ONLY_IN and part not in ONLY_IN[top]:
                found.append(f"{item}: only {', '.join(sorted(ONLY_IN[top]))} may")
            elif top in OPTIONAL and item.at_load:
                found.append(f"{item} as it loads; import it in the function that needs it")
    return found


def modules_of(root: Path) -> dict[str, set[str]]:
    """Every module of the package, and the modules of the package that it imports, wherever in it."""
    files = {}
    for file in root.rglob("*.py"):
        parts = [root.name, *file.relative_to(root).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {
        name: {item.module for item in imports_of(root, file) if item.module in files} for name, file in files.items()
    }


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The modules that a module imports, directly or by way of others."""
    found: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead.extend(graph[name])
    return found


def cycles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other, each sorted."""
    graph = modules_of(root)
    below = {name: reachable(graph, name) for name in graph}
    groups = {tuple(sorted(other for other in below[name] if name in below[other])) for name in graph}
    return sorted(list(group) for group in groups if group)


def test_every_import_of_lamfs_points_down() -> None:
    assert problems(PACKAGE) == []


def test_no_modules_of_a_package_import_each_other() -> None:
    assert cycles(PACKAGE) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("from lamfs.fs.b import B", "from lamfs.fs.a import A"),
        ("from lamfs.fs import b", "from lamfs.fs import a"),
        ("from . import b", "from .a import A"),
        ("import lamfs.fs.b", "def f():\n    from lamfs.fs.a import A"),
        ("from lamfs.fs.b import B", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lamfs.fs.a"),
        ("from lamfs.fs.c import C", "from lamfs.fs.a import A"),
    ],
)
def test_the_reader_sees_a_cycle(tmp_path: Path, one: str, other: str) -> None:
    root = make_package(tmp_path, "fs/a.py", one)
    (root / "fs" / "b.py").write_text(other)
    (root / "fs" / "c.py").write_text("from lamfs.fs.b import B")
    found = ["lamfs.fs.a", "lamfs.fs.b", *(["lamfs.fs.c"] if ".c" in one else [])]
    assert cycles(root) == [found]


def test_a_package_and_its_modules_make_no_cycle_by_their_names_alone(tmp_path: Path) -> None:
    root = make_package(tmp_path, "fs/a.py", "from lamfs.fs.b import B\nfrom lamfs import model")
    (root / "fs" / "b.py").write_text("import trio")
    assert cycles(root) == []


def test_the_reader_finds_the_package_and_its_imports() -> None:
    modules = {item.module for file in PACKAGE.rglob("*.py") for item in imports_of(PACKAGE, file)}
    assert {"lamfs.model", "lamfs.errors", "blake3"} <= modules


def test_the_rules_have_no_way_round() -> None:
    """What a layer may import, its imports may too only if it may itself: no cycle between layers."""
    for part, allowed in MAY_IMPORT.items():
        assert part not in allowed
        for below in allowed:
            assert part not in MAY_IMPORT[below] or "" in (part, below), f"{part} and {below} may import each other"
    assert [part for part, allowed in MAY_IMPORT.items() if "daemon" in allowed] == ["cli"]


BAD = [
    ("registry/rows.py", "import lamfs.storage.base", "registry may not import storage"),
    ("storage/s3.py", "from lamfs.registry import db", "storage may not import registry"),
    ("storage/s3.py", "from lamfs import registry", "storage may not import registry"),
    ("storage/s3.py", "from ..registry import db", "storage may not import registry"),
    ("storage/s3.py", "from .. import registry", "storage may not import registry"),
    ("storage/deep/s3.py", "from ...registry.db import open", "storage may not import registry"),
    ("fs/files.py", "from lamfs.ops import save", "fs may not import ops"),
    ("fs/files.py", "def f():\n    import lamfs.fuse", "fs may not import fuse"),
    ("mover/server.py", "from lamfs.cache.blocks import BlockCache", "mover may not import cache"),
    ("cache/blocks.py", "from lamfs.prefetch.scheduler import Prefetcher", "cache may not import prefetch"),
    ("prefetch/files.py", "from lamfs.fs.counters import Counters", "prefetch may not import fs"),
    ("fuse/calls.py", "from lamfs.ops import save", "fuse may not import ops"),
    ("ops/save.py", "from lamfs.api import Artifact", "ops may not import api"),
    ("ops/save.py", "import importlib\nimportlib.import_module('lamfs.api')", "ops may not import api"),
    ("api/mount.py", "import lamfs.daemon.launch", "api may not import daemon"),
    ("cli/mount.py", "from lamfs import api", "cli may not import api"),
    ("fs/files.py", "from lamfs import __version__", "fs may not import lamfs"),
    ("fs/files.py", "import lamfs", "fs may not import lamfs"),
    ("model.py", "from lamfs.errors import NotFound", "model may not import errors"),
    (
        "errors.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lamfs.model",
        "may not import model",
    ),
    ("keys.py", "import lamfs.config", "keys may not import config"),
    ("fs/files.py", "import pyfuse3", "only fuse may"),
    ("daemon/main.py", "from pyfuse3 import main", "only fuse may"),
    ("ops/save.py", "import sqlite_utils", "only registry may"),
    ("mover/server.py", "import sqlite3", "only cache, registry may"),
    ("mover/server.py", "from botocore.exceptions import ClientError", "only storage may"),
    ("ops/setup.py", "import boto3.session", "only storage may"),
    ("ops/setup.py", "import cloudpathlib", "only api, storage may"),
    ("storage/local.py", "import trio", "only cache, daemon, fs, fuse, mover, prefetch, work may"),
    ("registry/db.py", "async def f():\n    from trio import to_thread", "may"),
    ("ops/save.py", "import click", "only cli may"),
    ("api/artifact.py", "import pandas as pd", "as it loads"),
    ("api/artifact.py", "class A:\n    import pyarrow.parquet", "as it loads"),
    ("helpers.py", "", "has no layer"),
]


@pytest.mark.parametrize(
    ("name", "source", "says"), BAD, ids=[f"{name}-{index}" for index, (name, *_) in enumerate(BAD)]
)
def test_the_reader_sees_what_is_forbidden(tmp_path: Path, name: str, source: str, says: str) -> None:
    root = make_package(tmp_path, name, source)
    found = problems(root)
    assert len(found) == 1
    assert says in found[0]
    assert f"lamfs/{name}" in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("__init__.py", "from lamfs.api import Artifact\nfrom lamfs.core import storage"),
        ("api/artifact.py", "import typing\nif typing.TYPE_CHECKING:\n    import pandas\ndef f():\n    import pandas"),
        ("cache/blocks.py", "from lamfs.mover.client import Mover\nfrom lamfs.cache import index\nimport trio"),
        ("cli/main.py", "from lamfs import __version__, ops\nimport click"),
        ("daemon/main.py", "from lamfs.fuse import calls\nfrom lamfs.fs import files\nimport trio"),
        ("fs/files.py", "from . import other\nfrom .other import x\nfrom lamfs.registry import db"),
        ("storage/deep/s3.py", "from ..base import ObjectStore\nfrom ... import errors\nimport boto3"),
        ("fs/long.py", "x = 1\n" * 450),
    ],
)
def test_the_reader_lets_pass_what_is_allowed(tmp_path: Path, name: str, source: str) -> None:
    assert problems(make_package(tmp_path, name, source)) == []


def make_package(folder: Path, name: str, source: str) -> Path:
    """An empty lamfs with every layer, and one file with this source."""
    root = folder / "source" / "lamfs"
    root.mkdir(parents=True)
    for part in MAY_IMPORT:
        if part in PURE | LEAVES | {"__main__"}:
            (root / f"{part}.py").touch()
        else:
            (root / part).mkdir(exist_ok=True, parents=True)
            (root / part / "__init__.py").touch()
    (root / name).parent.mkdir(exist_ok=True, parents=True)
    (root / name).write_text(source)
    return root
