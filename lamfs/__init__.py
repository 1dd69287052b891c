"""lamfs: files are artifacts. ``import lamfs as ln`` gives what LaminDB's notebooks use.

    ln.setup.login("me"); ln.setup.init(storage="./data")
    artifact = ln.Artifact("iris.csv", key="raw/iris.csv").save()

Everything is imported when it is first used, so that ``import lamfs`` costs a few milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamfs import core, errors
    from lamfs.api import setup
    from lamfs.api.artifact import Artifact
    from lamfs.api.settings import settings
    from lamfs.api.tracking import track

__version__ = "0.1.0"

_WHERE = {
    "Artifact": "lamfs.api.artifact:Artifact",
    "settings": "lamfs.api.settings:settings",
    "setup": "lamfs.api.setup",
    "track": "lamfs.api.tracking:track",
    "core": "lamfs.core",
    "errors": "lamfs.errors",
}

__all__ = ["Artifact", "core", "errors", "settings", "setup", "track"]


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'lamfs' has no attribute '{name}'")
    module, _, attribute = where.partition(":")
    found: Any = import_module(module)
    if attribute:
        found = getattr(found, attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__version__"]
