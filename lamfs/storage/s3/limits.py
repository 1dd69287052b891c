"""Limits of what an S3 reply may say. Whatever is read from one goes through here. Pure functions.

An ETag or an upload's id goes into headers and URLs of later requests; a size becomes a file's. Keys of a listing are
not checked: others may store objects that lamfs would not.
"""

from __future__ import annotations

import re
from datetime import datetime

from lamfs.storage.s3.errors import NotS3

SLOWEST = 1024
"""Bytes per second. A slower reply counts as no reply."""
MAX_SIZE = 50 << 40
"""Bytes of an object (Amazon S3: 50 TB)."""
MAX_PARTS = 10_000
MAX_TOKEN = 8 << 10
"""Characters of a listing's continuation token: opaque, but it cannot be much longer than a key."""
_END_NS = 1 << 63
_ETAG = re.compile(r'(?:W/)?"?[!#-~]{0,1024}"?')
"""RFC 9110 §8.8.3, ASCII only. Some servers leave the quotes out, or send an empty one."""
_ID = re.compile(r"[!#-~]{1,1024}")


def etag(text: str | None) -> str:
    """An ETag, as it was sent. Raises NotS3, also for None: there is none."""
    if text is None:
        raise NotS3("its answer has no 'ETag'")
    if not _ETAG.fullmatch(text):
        raise NotS3(f"its 'ETag' is {text[:80]!r}")
    return text


def upload_id(text: str | None) -> str:
    """The id of an upload. Raises NotS3."""
    if text is None or not _ID.fullmatch(text):
        raise NotS3(f"its 'UploadId' is {(text or '')[:80]!r}")
    return text


def size(number: int | None) -> int:
    """Bytes of an object or a part. Raises NotS3."""
    if number is None:
        raise NotS3("its answer has no 'Content-Length'")
    if not 0 <= number <= MAX_SIZE:
        raise NotS3(f"it names a size of {number} bytes")
    return number


def part_number(number: int) -> int:
    """The number of a part. Raises NotS3."""
    if not 1 <= number <= MAX_PARTS:
        raise NotS3(f"it names a part {number}")
    return number


def marker(*said: object) -> tuple[str, ...]:
    """What a page of a listing says about the next one; empty when it says nothing. Raises NotS3."""
    found = tuple(str(one or "") for one in said)
    if (most := max(map(len, found))) > MAX_TOKEN:
        raise NotS3(f"it names a next page in {most} characters")
    return found if any(found) else ()


def nanoseconds(moment: datetime | None) -> int:
    """A time of a reply in nanoseconds since the epoch, at least 0. Raises NotS3."""
    if moment is None:
        raise NotS3("its answer has no 'Last-Modified'")
    try:
        found = int(moment.timestamp()) * 1_000_000_000 + moment.microsecond * 1000
    except (ValueError, OverflowError, OSError) as error:
        raise NotS3(f"its answer has an impossible date: {error}") from error
    if found >= _END_NS:
        raise NotS3(f"its answer has a date in the year {moment.year}")
    return max(0, found)
