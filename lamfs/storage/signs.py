"""Signs of life of a transfer: whoever runs one in a thread is told that bytes move, also where no count is kept.

One thread's own state; any thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_thread = threading.local()


@contextlib.contextmanager
def told(callback: Callable[[], None]) -> Iterator[None]:
    """Call ``callback``, which must not raise, at each sign that this thread gives inside of the block."""
    before = getattr(_thread, "callback", None)
    _thread.callback = callback
    try:
        yield
    finally:
        _thread.callback = before


def sign() -> None:
    """Bytes have moved just now, in this thread."""
    callback: Callable[[], None] | None = getattr(_thread, "callback", None)
    if callback is not None:
        callback()
