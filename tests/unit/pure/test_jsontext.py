"""JSON of others: an object with finite numbers, or one kind of error."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamfs.jsontext import is_number, parse_object

BAD = {
    "empty": b"",
    "no object": b"[1]",
    "text": b'"a"',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "too large": b'{"a": 1e400}',
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "deep": b'{"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "deep objects": b'{"a": ' * 10_000 + b"1" + b"}" * 10_000,
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a mark before it": b"\xef\xbb\xbf{}",
    "cut off": b'{"a": ',
    "too long": b'{"a": "' + b"x" * (1 << 16) + b'"}',
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_object(BAD[name], 1 << 16)


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.floats())))
def test_what_is_written_is_read(value: dict[str, Any]) -> None:
    text = json.dumps(value).encode()
    if any(isinstance(each, float) and not math.isfinite(each) for each in value.values()):
        with pytest.raises(ValueError, match="not a number"):
            parse_object(text, 1 << 20)
    else:
        assert parse_object(text, len(text)) == value


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data, 1 << 20), dict)
    except ValueError:
        pass


def test_numbers() -> None:
    assert is_number(0, 0, 1)
    assert is_number(0.5, 0, 1)
    for value in (True, "0", None, 1, -1, math.nan, math.inf, 10**400, [0]):
        assert not is_number(value, 0, 1)
