"""Text of others on a terminal and in a log."""

from __future__ import annotations

import json
import logging
import sys
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from lamfs.printable import LogFormatter, count_of, in_json, lines, one_line

EVIL = "a\x1b[31mb\x9bc\x7f\r\u2028\u202ed\u2066\x00\b\x0c"


def is_harmless(text: str) -> bool:
    return not any(unicodedata.category(char) in ("Cc", "Zl", "Zp") or char in "\u202e\u2066" for char in text)


@given(st.text())
def test_one_line_is_one_line(text: str) -> None:
    assert is_harmless(one_line(text))
    assert len(one_line(text).splitlines()) <= 1


def test_what_stays_and_what_is_spelled_out() -> None:
    assert one_line(EVIL) == r"a\x1b[31mb\x9bc\x7f\r\u2028\u202ed\u2066\x00\x08\x0c"
    assert one_line("a\nb\tc") == r"a\nb\tc"
    assert lines("a\nb\tc\r\x1b") == "a\nb\tc\\r\\x1b"
    plain = "Ünïcode 文 👩\u200d🔬 \udcff \\n"
    assert one_line(plain) == lines(plain) == in_json(plain) == plain


@given(st.text())
def test_json_says_the_same(text: str) -> None:
    said = in_json(json.dumps({text: [text]}, indent=2, ensure_ascii=False))
    assert json.loads(said) == {text: [text]}
    assert is_harmless(said.replace("\n", ""))


def record(message: str, *, failed: bool = False) -> logging.LogRecord:
    try:
        raise ValueError("first\nlamfs: all is well\x1b[2J")
    except ValueError:
        info = sys.exc_info() if failed else None
    return logging.LogRecord("lamfs.x", logging.ERROR, "f.py", 1, "%s", (message,), info)


def test_a_record_is_one_line() -> None:
    formatter = LogFormatter("%(levelname)s %(message)s")
    assert formatter.format(record("a\nERROR b\x1b[2J")) == r"ERROR a\nERROR b\x1b[2J"


def test_a_traceback_is_told_from_records() -> None:
    first, *rest = LogFormatter("%(levelname)s %(message)s").format(record("a", failed=True)).split("\n")
    assert first == "ERROR a"
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-1] == r"    lamfs: all is well\x1b[2J"
    assert all(line.startswith("    ") and is_harmless(line) for line in rest)


def test_counted_words() -> None:
    assert [count_of(number, "file") for number in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert [count_of(number, "entry") for number in (1, 2)] == ["1 entry", "2 entries"]
    assert [count_of(number, "file", "is") for number in (1, 2)] == ["1 file is", "2 files are"]
    assert [count_of(number, "artifact", "was") for number in (1, 2)] == ["1 artifact was", "2 artifacts were"]
