"""Storage roots and object keys as text: parsing and checking. Pure functions, any thread, no I/O.

A root is ``s3://bucket[/prefix]`` or an absolute folder path, without a trailing slash.
"""

from __future__ import annotations

import os
import re

from lamfs.errors import InvalidArgument, InvalidName

S3_SCHEME = "s3://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
"""What servers accept: Amazon's rules for old buckets, which are the widest."""


def parse_root(text: str) -> str:
    """The normal form of a storage root as a user types it.

    A relative folder is below the current directory, ``~`` is the home directory, ``file://`` is dropped. Raises
    InvalidArgument, which says what is wrong and what would be right.
    """
    text = text.strip()
    if not text:
        raise InvalidArgument("The storage is empty; give a folder or s3://bucket/prefix.")
    if any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in text):
        raise InvalidArgument(f"The storage {text!r} contains control characters or is not UTF-8; type it again.")
    if text.lower().startswith(S3_SCHEME):
        return _parse_s3(text)
    if text.startswith("file:///"):
        text = text.removeprefix("file://")
    scheme = _SCHEME.match(text)
    if scheme is not None:
        raise InvalidArgument(
            f"The storage '{text}' has the scheme '{scheme[1]}', which lamfs does not know; give a folder or"
            " s3://bucket/prefix, with the server's address as the endpoint URL."
        )
    folder = os.path.abspath(os.path.expanduser(text))
    if folder == "/":
        raise InvalidArgument("The storage cannot be '/', the whole machine; give a folder below it.")
    return folder


def _parse_s3(text: str) -> str:
    bucket, _, prefix = text[len(S3_SCHEME) :].partition("/")
    if not bucket:
        raise InvalidArgument(f"The storage '{text}' names no bucket; write s3://bucket/prefix.")
    if "?" in text:
        raise InvalidArgument(f"The storage '{text}' contains '?'; give endpoint and region as options of their own.")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise InvalidArgument(
            f"'{bucket}' is no bucket name: 3 to 63 small letters, digits, dots and hyphens; write s3://bucket/prefix."
        )
    parts = prefix.rstrip("/").split("/") if prefix.rstrip("/") else []
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidArgument(f"The prefix '{prefix}' of '{text}' has an empty part, '.' or '..'; leave it out.")
    return S3_SCHEME + "/".join([bucket, *parts])


def is_s3(root: str) -> bool:
    """Whether a root in normal form is in a bucket."""
    return root.startswith(S3_SCHEME)


def split_s3(root: str) -> tuple[str, str]:
    """Bucket and prefix (``""`` or without a slash at either end) of an S3 root in normal form."""
    bucket, _, prefix = root.removeprefix(S3_SCHEME).partition("/")
    return bucket, prefix


def check_object_key(key: str, *, as_path: bool) -> str:
    """Return ``key`` if it names an object below the root and nothing outside of it.

    Always refused: the empty key, a leading slash, a ``..`` part, NUL, text that is not UTF-8. With ``as_path`` (a
    local folder) also empty and ``.`` parts, because there several keys would name one file. Raises InvalidName.
    """
    if not key or key.startswith("/") or "\0" in key or not is_utf8(key):
        raise InvalidName(f"{key!r} is no object key: it is empty, starts with '/', has a NUL or is not UTF-8.")
    parts = key.split("/")
    if ".." in parts or (as_path and ("" in parts or "." in parts)):
        raise InvalidName(f"The object key '{key}' has an empty part, '.' or '..'; it would leave the storage.")
    return key


def is_utf8(text: str) -> bool:
    """False for text with surrogates. Python uses them for file names that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
