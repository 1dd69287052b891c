"""Signs of life of a transfer: the thread's caller is told that bytes move, even where no count is kept.

Each thread has its own state; any thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_thread = threading.local()


@contextlib.contextmanager
def told(callback: Callable[[], None]) -> Iterator[None]:
    """Inside the context, call ``callback`` at each sign that this thread gives. It must not raise."""
    before = getattr(_thread, "callback", None)
    _thread.callback = callback
    try:
        yield
    finally:
        _thread.callback = before


def sign() -> None:
    """Bytes have just moved, in this thread."""
    callback: Callable[[], None] | None = getattr(_thread, "callback", None)
    if callback is not None:
        callback()
