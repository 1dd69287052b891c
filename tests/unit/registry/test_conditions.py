"""Conditions on artifacts: each value is of its field's type, or is refused by name."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from lamfs.errors import InvalidArgument
from lamfs.model import ArtifactRecord, ContentHash, Revision
from lamfs.registry.conditions import clause
from tests.support.timed import Registry

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)


def ns(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


@pytest.fixture
def many(registry: Registry) -> Registry:
    """Three artifacts, of 10 bytes, 5 MiB and 5 GiB, made on three days at noon in UTC and 123 ns."""
    for number, size in enumerate((10, 5 << 20, 5 << 30)):
        made = ns(NOON + timedelta(days=number)) + 123
        inode = registry.names.create(1, f"f{number}", 0o100644, 0, 0)
        registry.tree.update(inode.ino, size=size)
        revision = Revision(ContentHash(size, "h", "md5", b""), f"o{number}", "e")
        registry.artifacts.insert(
            ArtifactRecord(
                uid=f"uid{number}", key=f"f{number}", suffix="", revision=revision, ino=inode.ino,
                created_at=made, updated_at=made, storage_id=1,
            )
        )  # fmt: skip
    return registry


def found(registry: Registry, **conditions: Any) -> str:
    return "".join(record.uid[-1] for record in registry.artifacts.filter(**conditions))


def test_times(many: Registry) -> None:
    second = NOON + timedelta(days=1)
    day = second.astimezone().date()
    assert found(many, created_at=second) == "1"
    assert found(many, created_at=second.astimezone()) == "1"
    assert found(many, created_at=second.isoformat()) == "1"
    assert found(many, created_at__gt=second) == "2"
    assert found(many, created_at__gte=second) == "12"
    assert found(many, created_at__lt=second) == "0"
    assert found(many, created_at__lte=second) == "01"
    assert found(many, created_at__in=[second, NOON]) == "01"
    assert found(many, created_at__in=[]) == ""
    assert found(many, created_at=day) == found(many, created_at=str(day)) == "1"
    assert found(many, created_at__gt=day) == "2"
    assert found(many, created_at__lte=day) == "01"
    assert found(many, created_at__lt="2020-01-01") == ""
    assert found(many, created_at__gt="2020-01-01") == "012"
    assert found(many, created_at__lt=datetime(9999, 12, 31)) == found(many, created_at__lt=date.max) == "012"
    assert found(many, created_at__gt=datetime(1, 1, 1)) == "012"


def test_sizes(many: Registry) -> None:
    assert found(many, size__lt="5 MB") == "0"
    assert found(many, size__lte="5MiB") == "01"
    assert found(many, size__gt="0.5 GB") == "2"
    assert found(many, size=10) == found(many, size=10.0) == "0"
    assert found(many, size__gt=10.5) == "12"
    assert found(many, size__lt=10**30) == "012"
    assert found(many, size__in=[10, "5G"]) == "02"


def test_texts(many: Registry) -> None:
    assert found(many, key__in=(f"f{number}" for number in (2, 0))) == "02"
    assert found(many, key__startswith="f") == "012"
    assert found(many, key__contains="2", uid__endswith="2") == "2"
    assert found(many, key__startswith="'; --") == ""
    assert found(many, description=None) == "012"
    assert found(many, uid__in=[f"uid{number}" for number in range(100_000)]) == "012"
    assert found(many, key_is_virtual=True) == "012"
    assert found(many, visibility=None) == "012"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("created_at__lt", "rubbish", "'rubbish' is not a time"), ("created_at", 2020, "2020 is not a time"),
        ("created_at__gt", None, "None is not a time"), ("created_at__in", ["x"], "'x' is not a time"),
        ("created_at__startswith", "2020", "part of a text"), ("size__lt", "5 parsecs", "is not a size"),
        ("size__gt", None, "None is not a size"), ("size", True, "True is not a size"),
        ("size", float("nan"), "is not a size"), ("size__contains", "1", "part of a text"),
        ("key__in", "text", "needs a list"), ("key__in", [None], "None is not a text"), ("key__in", 3, "needs a list"),
        ("key", 3, "3 is not a text"), ("key", "\udcff", "in Unicode"), ("id", "1", "'1' is not a whole number"),
        ("id__in", [1 << 70], "that a registry can hold"), ("visibility", "trash", "is not a whole number"),
        ("key_is_virtual", "yes", "is not True or False"), ("key_is_virtual__gt", False, "cannot be asked"),
        ("keyy", "x", "no field 'keyy'"), ("key__like", "x", "'like' is no condition"), ("blocks", b"", "no field"),
    ],
)  # fmt: skip
def test_what_is_not_of_a_fields_type_is_refused_by_name(name: str, value: object, said: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        clause(name, value)
    assert said in str(refused.value)
    assert name.partition("__")[0] in str(refused.value)
