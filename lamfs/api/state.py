"""The instance that a Python process works with. All its threads share it; each has its own connections."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from lamfs import config
from lamfs.ops.instance import Instance
from lamfs.registry import Provenance, Run, Transform

_guard = threading.Lock()
_instance: Instance | None = None


@dataclass(slots=True, frozen=True)
class Tracked:
    """The run that ``ln.track()`` began, and its instance (row ids mean nothing in another one)."""

    slug: str
    run: Run
    transform: Transform


tracked: Tracked | None = None


def instance() -> Instance:
    """The current instance, opened when it is first used. Raises NotSetUp when there is none."""
    global _instance
    with _guard:
        # Another program may have made another instance the current one. The open one stays until ``forget``.
        if _instance is None:
            _instance = Instance.open()
        return _instance


def forget() -> None:
    """Close the instance; the next use opens what is current then."""
    global _instance, tracked
    with _guard:
        if _instance is not None:
            _instance.close()
        _instance = None
        tracked = None


def provenance() -> Provenance:
    """The user, run and transform of new artifacts."""
    here = instance()
    user = here.user()
    now = tracked if tracked is not None and tracked.slug == here.settings.slug else None
    return Provenance(
        user.id if user is not None else None,
        now.run.id if now is not None else None,
        now.transform.id if now is not None else None,
    )


def is_set_up() -> bool:
    """Whether there is a current instance."""
    return config.current_slug() is not None
