"""Conditions on artifacts, ``field__operator=value``, as SQL. Pure functions.

Each field has a type, and a value is converted to it or refused. SQLite compares values of different types by their
types: a text in place of a number would find everything, or nothing. Operators are Django's, as in LaminDB.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, NamedTuple

from lamfs.errors import InvalidArgument
from lamfs.sizes import parse_size

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LARGEST = (1 << 63) - 1
"""The largest integer of SQLite: https://www.sqlite.org/datatype3.html"""
_COMPARE = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_TEXT = {
    "startswith": "substr({0}, 1, length(?)) = ?",
    "contains": "instr({0}, ?) > 0",
    "endswith": "substr({0}, -length(?)) = ?",
}
OPERATORS = (*_TEXT, *_COMPARE, "in")

_TEXTS = frozenset({"uid", "key", "suffix", "description", "accessor", "hash", "hash_type", "object_key", "etag"})
_TIMES = frozenset({"created_at", "updated_at"})
FIELDS = (
    "id", "uid", "storage_id", "key", "suffix", "description", "accessor", "size", "hash", "hash_type", "object_key",
    "etag", "visibility", "key_is_virtual", "created_by_id", "run_id", "transform_id", "created_at", "updated_at",
    "ino",
)  # fmt: skip


_OF_REVISION = frozenset({"size", "hash", "hash_type", "object_key", "etag"})


class Clause(NamedTuple):
    """A condition in SQL over ``artifact a`` and its ``revision r``, and its parameters."""

    sql: str
    params: list[Any]


class Span(NamedTuple):
    """The nanoseconds since the epoch that a time means, from ``begin`` to before ``end``. A registry has times in
    nanoseconds, a datetime covers a microsecond, and a date covers a day."""

    begin: int
    end: int


def clause(name: str, value: object) -> Clause:
    """The condition ``name=value``. ``name`` is a field, or ``field__operator``.

    Raises InvalidArgument for an unknown field or operator, an operator that the field does not have, or a value of
    another type than the field's.
    """
    field, _, word = name.partition("__")
    if field not in FIELDS:
        raise InvalidArgument(f"Artifacts have no field '{field}'; choose one of {', '.join(FIELDS)}.")
    if word and word not in OPERATORS:
        raise InvalidArgument(f"'{name}': '{word}' is no condition on a field; choose one of {', '.join(OPERATORS)}.")
    if value is None and not word:
        return Clause(f"{_column(field)} IS NULL", [])
    if word == "in":
        return _among(name, field, value)
    if word in _TEXT:
        if field not in _TEXTS:
            raise InvalidArgument(f"'{name}' asks for a part of a text, which '{field}' is not; {_can(field)}.")
        text = _text(name, value)
        return Clause(_TEXT[word].format(_column(field)), [text] * _TEXT[word].count("?"))
    if field in _TIMES:
        return _compare_times(field, word, _span(name, value))
    if word and field == "key_is_virtual":
        raise InvalidArgument(f"'{name}' cannot be asked, for that field is True or False; use key_is_virtual=True.")
    return Clause(f"{_column(field)} {_COMPARE.get(word, '=')} ?", [_parser(field)(name, value)])


def _column(field: str) -> str:
    return f"{'r' if field in _OF_REVISION else 'a'}.{field}"


def _can(field: str) -> str:
    return f"use {field}=…, {field}__gt, __gte, __lt, __lte or __in"


def _among(name: str, field: str, value: object) -> Clause:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidArgument(f"{name}={_shown(value)} needs a list of values, such as {name}=[…].")
    values = list(value)
    if field in _TIMES:
        spans = [_compare_times(field, "", _span(name, one)) for one in values]
        if not spans:
            return Clause("0", [])
        return Clause(
            f"({' OR '.join(found.sql for found in spans)})", [one for found in spans for one in found.params]
        )
    parse = _parser(field)
    # One parameter, however many values there are: SQLite takes at most 32,766.
    return Clause(
        f"{_column(field)} IN (SELECT value FROM json_each(?))", [json.dumps([parse(name, one) for one in values])]
    )


def _compare_times(field: str, word: str, span: Span) -> Clause:
    if not word:
        column = _column(field)
        return Clause(f"({column} >= ? AND {column} < ?)", [span.begin, span.end])
    # "After a day" means after its end, and "up to a day" includes all of it.
    sign, bound = {"gt": (">=", span.end), "gte": (">=", span.begin), "lt": ("<", span.begin), "lte": ("<", span.end)}[
        word
    ]
    return Clause(f"{_column(field)} {sign} ?", [bound])


# -- values -----------------------------------------------------------------------------------------------------------


def _parser(field: str) -> Callable[[str, object], Any]:
    if field in _TEXTS:
        return _text
    if field == "size":
        return _size
    return _flag if field == "key_is_virtual" else _number


def _refuse(name: str, value: object, wanted: str) -> InvalidArgument:
    return InvalidArgument(f"{name}={_shown(value)} is not {wanted}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refuse(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refuse(name, value, "a text in Unicode, so no artifact has it") from None
    return value


def _number(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise _refuse(name, value, "a whole number")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise _refuse(name, value, "a whole number") from None
    if not -_LARGEST <= number <= _LARGEST:
        raise _refuse(name, value, "a number that a registry can hold")
    return number


def _size(name: str, value: object) -> int | float:
    if isinstance(value, str):
        try:
            return min(parse_size(value), _LARGEST)
        except InvalidArgument:
            raise _refuse(name, value, "a size; give bytes, or a text such as '5 MB' or '20G'") from None
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise _refuse(name, value, "a size in bytes")
    if isinstance(value, int) and not isinstance(value, bool):
        return max(min(value, _LARGEST), -_LARGEST)
    try:
        return _number(name, value)
    except InvalidArgument:
        raise _refuse(name, value, "a size; give bytes, or a text such as '5 MB' or '20G'") from None


def _flag(name: str, value: object) -> int:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return int(value)
    raise _refuse(name, value, "True or False")


def _span(name: str, value: object) -> Span:
    if isinstance(value, str):
        value = _parse_time(name, value)
    if isinstance(value, datetime):
        if value != value:  # pandas' NaT
            raise _refuse(name, value, "a time")
        begin = _nanoseconds(value)
        return Span(begin, min(begin + 1000, _LARGEST))
    if isinstance(value, date):
        # The day in this computer's time zone, which may have 23 or 25 hours.
        after = value + timedelta(days=1) if value < date.max else value
        return Span(_nanoseconds(datetime.combine(value, time.min)), _nanoseconds(datetime.combine(after, time.min)))
    raise _refuse(name, value, "a time; give a datetime, a date, or a text such as '2026-11-28' or '2026-11-28T14:00Z'")


def _parse_time(name: str, text: str) -> date:
    for parse in (date.fromisoformat, datetime.fromisoformat):
        try:
            found: date = parse(text.strip())
        except ValueError:
            continue
        return found
    raise _refuse(name, text, "a time; give a datetime, a date, or a text such as '2026-11-28' or '2026-11-28T14:00Z'")


def _nanoseconds(moment: datetime) -> int:
    """Since the epoch. A time without a zone is local. Clamped to what SQLite can hold (the years 1677 to 2262)."""
    if moment.tzinfo is None:
        try:
            moment = moment.astimezone()
        except (OverflowError, ValueError, OSError):  # in the years 1 and 9999
            moment = moment.replace(tzinfo=UTC)
    found = (moment - _EPOCH) // timedelta(microseconds=1) * 1000
    return max(min(found, _LARGEST), -_LARGEST)
