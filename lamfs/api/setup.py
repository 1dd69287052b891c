"""``ln.setup``: login, init, connect, close, delete. lamfs's logger says what they do. Any thread."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lamfs.api import state
from lamfs.config import InstanceSettings, UserSettings
from lamfs.ops import setup as _setup

__all__ = ["close", "connect", "delete", "init", "login"]


def login(user: str, *, email: str | None = None, name: str | None = None) -> UserSettings:
    """Set the user of this machine: a handle or an e-mail address. No server is asked. Raises InvalidArgument."""
    return _setup.login(user, email, name)


def init(
    *,
    storage: str | os.PathLike[str],
    name: str | None = None,
    owner: str | None = None,
    endpoint_url: str | None = None,
    region: str | None = None,
    profile: str | None = None,
    path_style: bool = False,
    new: bool = False,
) -> InstanceSettings:
    """Make an instance whose default storage is a folder or ``s3://bucket/prefix``, and work with it from now on.

    ``new``: make it even where an instance has lost its registry. Raises RegistryError (an instance was there),
    InvalidArgument, Locked (another machine has it), and storage errors.
    """
    state.forget()
    return _setup.init(
        _text(storage),
        name,
        owner,
        endpoint_url=endpoint_url,
        region=region,
        profile=profile,
        path_style=path_style,
        new=new,
    )


def connect(slug: str | os.PathLike[str], **where: Any) -> InstanceSettings:
    """Work with an instance: ``owner/name`` that this machine knows, or its storage. ``where``: as
    ops.setup.connect."""
    state.forget()
    return _setup.connect(_text(slug), **where)


def close() -> None:
    """Finish what is owed, push the registry to storage and give the lock back. Raises Locked while it is mounted."""
    slug = state.instance().settings.slug
    state.forget()
    _setup.close(slug)


def delete(slug: str, force: bool = False) -> None:
    """Remove an instance: its registry, lock, settings and cache. Raises NotEmpty without ``force`` while artifacts
    remain, Locked while it is mounted or in use."""
    state.forget()
    _setup.delete(slug, force=force)


def _text(place: str | os.PathLike[str]) -> str:
    # str() and not fspath(): the path objects of buckets download their object for the latter.
    return place if isinstance(place, str) else str(Path(place) if isinstance(place, Path) else place)
