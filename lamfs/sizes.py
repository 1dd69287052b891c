"""Sizes as people write them. Pure functions."""

from __future__ import annotations

import re

from lamfs.errors import InvalidArgument

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,6})?) ?([kmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """``4096``, ``512M``, ``1.5 GB``, ``20GiB`` in bytes. K, M, G and T are powers of 1024. Raises InvalidArgument."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidArgument(f"'{text}' is not a size; write bytes, or a number with K, M, G or T such as '20G'.")
    return (
        round(float(found[1]) * _UNITS[found[2].lower()])
        if "." in found[1]
        else (int(found[1]) * _UNITS[found[2].lower()])
    )
