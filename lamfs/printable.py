"""Text that is safe for a terminal or a log: text from others stays on its line, and cannot control the terminal. Pure.

Names, messages of servers and rows of a registry may contain escape sequences. Surrogates stay: they are bytes of file
names that are not UTF-8, and are written as those bytes.
"""

from __future__ import annotations

import logging
import re
from typing import Any

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Controls of terminals (C0, DEL and C1: ECMA-48), other line ends, and controls of the text direction (Unicode
Standard Annex #9), which make a line look like something else."""
_MANY = {"is": "are", "was": "were", "has": "have"}
_BUT_LINES = re.compile(CONTROL.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def one_line(text: str) -> str:
    """The text with every control character escaped."""
    return CONTROL.sub(_spelled, text)


def lines(text: str) -> str:
    """The same, but line feeds and tabs stay."""
    return _BUT_LINES.sub(_spelled, text)


def in_json(text: str) -> str:
    """JSON text in which control characters that JSON allows in strings are escaped like the others."""
    return _BUT_LINES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def count_of(number: int, noun: str, verb: str = "") -> str:
    """``1 file``, ``2 files``, ``3 entries``; with ``is``, ``was`` or ``has``, the verb as well: ``2 files were``."""
    if number == 1:
        return f"1 {noun} {verb}".rstrip()
    many = f"{noun[:-1]}ies" if noun.endswith("try") else f"{noun}s"
    return f"{number} {many} {_MANY.get(verb, verb)}".rstrip()


class LogFormatter(logging.Formatter):
    """Records of one line each. A traceback follows its record, in lines that begin with spaces."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(f"    {one_line(line)}" for line in text.split("\n"))


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
