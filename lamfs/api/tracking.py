"""``ln.track()``: link the artifacts that this process saves to its script or notebook. Any thread."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from pathlib import Path

from lamfs.api import state
from lamfs.errors import LamfsError
from lamfs.model import RUN_UID_LEN, TRANSFORM_UID_LEN, new_uid, now_ns
from lamfs.ops import messages
from lamfs.registry import Run


def track(name: str | None = None, *, key: str | None = None) -> Run:
    """Begin a run of the calling script or notebook. Artifacts that this process saves later are linked to it.

    Path (``key``) and name, which both can be given, identify the transform. Raises NotSetUp.
    """
    here = state.instance()
    here.hold()
    found_key, kind = _caller()
    key = key or found_key
    name = name or (Path(key).name if key else "interactive")
    user = here.user()
    user_id = user.id if user is not None else None
    people = here.registry.people
    transform = people.ensure_transform(name, key, kind, user_id, uid=new_uid(TRANSFORM_UID_LEN), now=now_ns())
    run = people.start_run(transform.id, user_id, uid=new_uid(RUN_UID_LEN), now=now_ns())
    state.tracked = state.Tracked(here.settings.slug, run, transform)
    atexit.unregister(_finish)
    atexit.register(_finish)
    messages.info(f"tracking run {run.uid} of {kind} '{transform.name}' (transform {transform.uid})")
    return run


def _caller() -> tuple[str | None, str]:
    """Path of the notebook or script of this process, as far as it can be known, and which of the two it is."""
    main = sys.modules.get("__main__")
    notebook = os.environ.get("JPY_SESSION_NAME") or getattr(main, "__vsc_ipynb_file__", None)
    if notebook and str(notebook).endswith(".ipynb"):
        return os.path.abspath(notebook), "notebook"
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        return None, "notebook" if "ipykernel" in sys.modules else "script"
    path = getattr(main, "__file__", None)
    return (os.path.abspath(path), "script") if path else (None, "script")


def _finish() -> None:
    """Note the end of the run when the process ends."""
    now = state.tracked
    if now is not None:
        with contextlib.suppress(LamfsError):
            here = state.instance()
            if here.settings.slug == now.slug:
                here.registry.people.finish_run(now.run.id, now=now_ns())
