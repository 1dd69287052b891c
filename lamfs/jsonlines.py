"""JSON objects as lines of a byte stream: messages between lamfs's own processes, over sockets and pipes. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def encode(message: Mapping[str, Any]) -> bytes:
    """One object as one line."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The object in one line. Raises ValueError if it is not a JSON object."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"not a message: {line[:80]!r}")
    return message


class Lines:
    """Cuts a byte stream into lines, in time linear in the bytes. One reader owns it."""

    def __init__(self, limit: int | None = None) -> None:
        """``limit``: bytes that an unfinished line may have."""
        self._limit = limit
        self._parts: list[bytes] = []
        self._buffered = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Take data of the stream. Returns the lines that it completed, without their newline.

        Raises ValueError if an unfinished line is longer than the limit.
        """
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines:
            lines[0] = b"".join((*self._parts, lines[0]))
            self._parts, self._buffered = [], 0
        if rest:
            self._parts.append(rest)
            self._buffered += len(rest)
        if self._limit is not None and self._buffered > self._limit:
            raise ValueError(f"a line of more than {self._limit} bytes")
        return lines
