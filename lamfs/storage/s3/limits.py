"""Limits of what an S3 reply may say, in boto3's shapes, checked before anybody uses it. Pure functions.

An ETag or an upload's id goes into headers and URLs of later requests; a size becomes a file's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from lamfs.storage.s3.errors import NotS3

MAX_SIZE = 50 << 40
"""Bytes of an object (Amazon S3: 50 TB)."""
MAX_PARTS = 10_000
MAX_TOKEN = 8 << 10
"""Characters of a listing's continuation token: opaque, but it cannot be much longer than a key."""
_END_NS = 1 << 63
_ETAG = re.compile(r'(?:W/)?"?[!#-~]{0,1024}"?')
"""RFC 9110 §8.8.3, ASCII only. Some servers leave the quotes out, or send an empty one."""
_ID = re.compile(r"[!#-~]{1,1024}")
_NEEDED = {
    "head_object": ("ETag", "ContentLength", "LastModified"),
    "put_object": ("ETag",),
    "upload_part": ("ETag",),
    "copy_object": ("CopyObjectResult",),
    "upload_part_copy": ("CopyPartResult",),
    "create_multipart_upload": ("UploadId",),
    "complete_multipart_upload": ("ETag",),
}
"""What a reply must have to be useful."""
_TOKENS = ("NextContinuationToken", "NextKeyMarker", "NextUploadIdMarker")
_LISTS = {
    "list_objects_v2": ("Contents", ("Key", "ETag", "Size", "LastModified")),
    "list_multipart_uploads": ("Uploads", ("Key", "UploadId", "Initiated")),
    "list_parts": ("Parts", ("PartNumber", "Size", "ETag")),
    "delete_objects": ("Errors", ("Key", "Code")),
}
"""Where the entries of a list are, and what each must have."""
_TEXTS = frozenset({"Key", "Code", "ETag"})
"""Fields of an entry that are empty when they are left out."""


def check(operation: str, reply: Mapping[str, Any]) -> None:
    """Check the parts of a reply that lamfs uses. Raises NotS3.

    Keys of a listing are not checked: others may store objects that lamfs would not.
    """
    for name in _NEEDED.get(operation, ()):
        if name not in reply:
            raise NotS3(f"its answer has no '{name}'")
    _check_values(reply)
    for inside in ("CopyObjectResult", "CopyPartResult"):
        if inside in reply:
            if "ETag" not in reply[inside]:
                raise NotS3("its answer has no 'ETag'")
            _check_values(reply[inside])
    for name in _TOKENS:
        token = reply.get(name)
        if token is not None and len(str(token)) > MAX_TOKEN:
            raise NotS3(f"its '{name}' has {len(str(token))} characters")
    if operation in _LISTS:
        where, names = _LISTS[operation]
        for entry in reply.get(where, ()):
            for name in names:
                if name not in entry:
                    if name not in _TEXTS:
                        raise NotS3(f"an entry of its list has no '{name}'")
                    entry[name] = ""
            _check_values(entry)


def nanoseconds(moment: datetime) -> int:
    """A time of a reply in nanoseconds since the epoch, at least 0. Raises NotS3."""
    try:
        found = int(moment.timestamp()) * 1_000_000_000 + moment.microsecond * 1000
    except (ValueError, OverflowError, OSError) as error:
        raise NotS3(f"its answer is of no date: {error}") from error
    if found >= _END_NS:
        raise NotS3(f"its answer is of the year {moment.year}")
    return max(0, found)


def _check_values(values: Mapping[str, Any]) -> None:
    for name in ("ETag", "UploadId"):
        text = values.get(name)
        if text is not None and not (_ETAG if name == "ETag" else _ID).fullmatch(text):
            raise NotS3(f"its '{name}' is {text[:80]!r}")
    for name, most in (("ContentLength", MAX_SIZE), ("Size", MAX_SIZE), ("PartNumber", MAX_PARTS)):
        number = values.get(name)
        if number is not None and not (name == "PartNumber") <= number <= most:
            raise NotS3(f"its '{name}' is {number}")
    for name in ("LastModified", "Initiated"):
        if name in values:
            nanoseconds(values[name])
