"""Machines and stores for tests of ops: several data directories on one machine, and a store that fails or kills."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lamfs.errors import StorageUnavailable
from lamfs.model import ArtifactRecord
from lamfs.ops.instance import Instance
from lamfs.registry import Registry
from lamfs.registry.rules import RETAINED
from lamfs.spool import SpoolFolder
from lamfs.storage import ObjectStore
from tests.support.timed import timed


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[None]:
    """Inside the block, this process uses the directories of another machine."""
    names = ("CONFIG", "DATA", "CACHE")
    before = {name: os.environ.get(f"LAMFS_{name}_DIR") for name in names}
    for name in names:
        os.environ[f"LAMFS_{name}_DIR"] = str(folder / name.lower())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[f"LAMFS_{name}_DIR"]
            else:
                os.environ[f"LAMFS_{name}_DIR"] = value


def make_spool(instance: Instance) -> SpoolFolder:
    """The spool of an instance, made as a mount does. Open until the instance's process ends, or it is closed."""
    return SpoolFolder.make(*instance.settings.spool_place)


def write_spool(instance: Instance, name: str, text: str) -> Path:
    """Put a file into the spool of an instance. Returns its path."""
    with make_spool(instance) as spool:
        path = Path(spool.shown(name))
    path.write_text(text)
    return path


def make_orphan(registry: Registry, uid: str) -> ArtifactRecord:
    """Take an artifact out of the registry as if it had never known it; its object stays. The record as it was."""
    record = timed(registry).names.purge(uid, storage=False)
    registry.db.execute("DELETE FROM meta WHERE key=?", (f"{RETAINED}{record.revision.object_key}",))
    return record


class BadStore:
    """A store around a real one. ``plan``: what happens at the next calls of a method, in order.

    ``fail``: StorageUnavailable, nothing done. ``lost``: done, then StorageUnavailable. ``die``: the process ends,
    nothing done. ``die_after``: done, then the process ends. ``half``: half of the bytes are stored, then as ``fail``.
    """

    def __init__(self, store: ObjectStore, **plan: list[str]) -> None:
        self._store = store
        self.plan = {name: list(steps) for name, steps in plan.items()}
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _act(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, args[0] if args else None))
        steps = self.plan.get(name)
        step = steps.pop(0) if steps else "go"
        if step == "die":
            os._exit(9)
        if step == "fail":
            raise StorageUnavailable("The storage is away; try again.")
        result = getattr(self._store, name)(*args, **kwargs)
        if step == "die_after":
            os._exit(9)
        if step == "lost":
            raise StorageUnavailable("The reply was lost; try again.")
        return result

    def head(self, key: str) -> Any:
        return self._act("head", key)

    def put_file(self, key: str, path: str, **kwargs: Any) -> Any:
        return self._act("put_file", key, path, **kwargs)

    def copy(self, src: str, dst: str, **kwargs: Any) -> Any:
        return self._act("copy", src, dst, **kwargs)

    def delete(self, keys: Iterable[str]) -> Any:
        return self._act("delete", list(keys))
