"""Registries whose verbs can be called in short: they happen now, and what is new gets a random uid.

The product says both with every call (lamfs/registry/verbs.py). A test says what it is about:

    registry = Registry(path, create=True)                 # as lamfs.registry.Registry
    timed(instance.registry).names.trash(uid)              # the same, of a registry that the product has opened
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lamfs import registry as product
from lamfs.keys import spool_token
from lamfs.model import RUN_UID_LEN, STORAGE_UID_LEN, TRANSFORM_UID_LEN, new_uid, now_ns

ROLES = "names", "writes", "commits", "rescue", "people", "file", "consistency", "upkeep", "journal", "uploads"
"""Attributes of a registry whose verbs are filled in."""

FILL: dict[str, Callable[[], Any]] = {
    "now": now_ns,
    "artifact_uid": new_uid,
    "spare_uid": new_uid,
    "copy_uid": new_uid,
    "storage_uid": functools.partial(new_uid, STORAGE_UID_LEN),
    "token": spool_token,
}
UIDS = {"ensure_storage": STORAGE_UID_LEN, "ensure_transform": TRANSFORM_UID_LEN, "start_run": RUN_UID_LEN}
"""Verbs whose ``uid`` is that of a new row, and how long it is."""


@functools.cache
def _left_out(verb: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """What a caller must say by name, and how it is made here."""
    must = [
        each.name
        for each in inspect.signature(verb).parameters.values()
        if each.kind is each.KEYWORD_ONLY and each.default is each.empty
    ]
    found = {name: FILL[name] for name in must if name in FILL}
    if verb.__name__ in UIDS:
        found["uid"] = functools.partial(new_uid, UIDS[verb.__name__])
    return found


class _Role:
    """One role of a registry."""

    def __init__(self, role: Any) -> None:
        object.__setattr__(self, "_role", role)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._role, name)
        if not inspect.ismethod(found):
            return found
        fill = _left_out(found.__func__)

        def verb(*args: Any, **said: Any) -> Any:
            more = {each: make() for each, make in fill.items() if each not in said}
            if said.get("backup") is not None and name == "rename" and "copy_uid" not in said:
                more["copy_uid"] = new_uid()
            return found(*args, **said, **more)

        return verb if fill or name == "rename" else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._role, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._role, name)


class Registry(product.Registry):
    """A registry for tests that open one themselves."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ROLES:
            setattr(self, name, _Role(getattr(self, name)))


class _Timed:
    """A registry that the product has opened."""

    def __init__(self, registry: product.Registry) -> None:
        self._registry = registry

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._registry, name)
        return _Role(found) if name in ROLES else found


def timed(registry: product.Registry) -> Any:
    """A view of a registry that fills in what the caller leaves out; the registry itself stays as strict as it is."""
    return registry if isinstance(registry, Registry) else _Timed(registry)
