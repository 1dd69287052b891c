"""Invalid contents of an instance's lock object, and a valid lock of another machine."""

from __future__ import annotations

import json
import time
from typing import Any

GOOD: dict[str, Any] = {
    "handle": "eve",
    "host": "elsewhere",
    "machine": "m" * 32,
    "token": "t" * 16,
    "since": 1_700_000_000.0,
    "until": time.time() + 80_000,
}


def lock_of_another(**changes: Any) -> bytes:
    """A lock that holds. With ``changes``: one that does not."""
    return json.dumps(GOOD | changes).encode()


NO_LOCKS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"\0\xff no JSON",
    "a list": b"[1, 2]",
    "deep": b"[" * 60_000,
    "long": lock_of_another(more="x" * (1 << 20)),
    "no until": json.dumps({name: value for name, value in GOOD.items() if name != "until"}).encode(),
    "until 1e300": lock_of_another(until=1e300),
    "until 1e400": lock_of_another().replace(b"1700000000.0", b"1e400"),
    "until NaN": lock_of_another(until=float("nan")),
    "until Infinity": lock_of_another(until=float("inf")),
    "until an endless integer": lock_of_another(until=10**4000),
    "until text": lock_of_another(until="9999999999"),
    "until true": lock_of_another(until=True),
    "until null": lock_of_another(until=None),
    "since 1e300": lock_of_another(since=1e300),
    "since -1e300": lock_of_another(since=-1e300),
    "since before": lock_of_another(since=-1),
    "handle with codes": lock_of_another(handle="\x1b[2Jeve"),
    "handle of two lines": lock_of_another(handle="eve\nlamfs: all is well"),
    "handle that is long": lock_of_another(handle="e" * 256),
    "host that is a number": lock_of_another(host=5),
    "host that turns around": lock_of_another(host="\u202eevil"),
    "machine that is a list": lock_of_another(machine=["m"]),
    "token with half a character": lock_of_another(token="\ud800"),
}
"""All of these count as an expired lock."""
