"""JSON objects written by others: read within bounds, with one error for anything that can be wrong. Pure.

Python's reader accepts NaN and Infinity, which JSON does not have (RFC 8259 §6), turns ``1e400`` into infinity, and
fails on deep nesting with a RecursionError.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse_object(data: bytes, limit: int) -> dict[str, Any]:
    """The JSON object in ``data``, which may have up to ``limit`` bytes. Every number in it is finite.

    Raises ValueError with a short reason.
    """
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value from JSON is a number from ``low`` up to, but not including, ``high``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < high


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON's")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value
