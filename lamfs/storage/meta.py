"""The metadata that lamfs stores with an object: S3 metadata, or an extended attribute. Pure functions, any thread.

S3 accepts 2 KB of names and values (Amazon S3, "User-defined object metadata"), and servers and proxies preserve only
plain ASCII: keys are percent-encoded, and cut if they are too long. In a folder it is one attribute of the object's own
file: it exists before the file has its name, moves with it, and is deleted with it. File systems have little space in
an inode besides its fields, so the value is as short as possible.

Anybody may have written what is read. Whatever is not exactly in this format is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from urllib.parse import quote, unquote_to_bytes

from lamfs.errors import InvalidName
from lamfs.keys import check_key
from lamfs.model import ObjectMeta

ATTRIBUTE = "user.lamfs"
"""Name of the extended attribute."""
KEY_BYTES = 1024
"""Bytes of an encoded key. A longer key is cut."""
MOST_BYTES = 4096
"""Our attributes are never longer."""
PREFIX = "x-amz-meta-"
NO_HEADERS: Mapping[str, str] = {}
_UID, _KEY, _CUT, _REVISION, _HASH = "lamfs-uid", "lamfs-key", "lamfs-key-cut", "lamfs-revision", "lamfs-hash"
_A_UID = re.compile(r"[0-9A-Za-z]{20}")
_A_NUMBER = re.compile(r"[1-9][0-9]{0,15}")
_A_HASH = re.compile(r"(md5|sha1-fl|md5-d):[0-9A-Za-z_-]{1,64}")
_KEPT = frozenset({"content-type", "cache-control", "content-disposition", "content-encoding", "content-language"})
"""Properties of an object that lamfs has not made, which a copy should keep."""
_PLAIN = re.compile(r"(?! )(?:[!-~]| (?! )){1,1000}(?<! )")
"""Text that is signed exactly as it is sent."""
_WHOLE, _BEGINNING = "=", "~"
_NOTHING = "-"


def as_headers(meta: ObjectMeta | None, source: Mapping[str, str] = NO_HEADERS) -> Mapping[str, str]:
    """The headers that store metadata with an object, in plain ASCII with lower-case names. None of it: none.

    ``source``: the headers of the object that it is a copy of. Of these it keeps what lamfs has not written.
    """
    if meta is None:
        return NO_HEADERS
    found = {
        name: text
        for name, text in source.items()
        if (name in _KEPT or (name.startswith(PREFIX) and not name.startswith(f"{PREFIX}lamfs-")))
        and _PLAIN.fullmatch(text)
    }
    found[PREFIX + _UID] = meta.uid
    if meta.revision is not None:
        found[PREFIX + _REVISION] = str(meta.revision)
    if meta.hash is not None:
        found[PREFIX + _HASH] = meta.hash
    if meta.key is not None:
        found[PREFIX + _KEY], cut = _shortened(meta.key, _percent)
        if cut or meta.cut:
            found[PREFIX + _CUT] = "1"
    return found


def from_headers(headers: Mapping[str, str]) -> ObjectMeta | None:
    """The metadata in the headers of a reply (lower-case names); None: lamfs wrote none."""
    said = {name: headers.get(PREFIX + name, "") for name in (_UID, _KEY, _CUT, _REVISION, _HASH)}
    key: str | None = None
    if len(said[_KEY]) <= KEY_BYTES:
        try:
            key = unquote_to_bytes(said[_KEY]).decode() or None
        except UnicodeDecodeError:
            key = None
    return _checked(said[_UID], key, said[_REVISION], said[_HASH], bool(said[_CUT]))


def as_attribute(meta: ObjectMeta) -> bytes:
    """The value of the extended attribute: uid, number, hash and key, separated by spaces."""
    key = ""
    if meta.key is not None:
        text, cut = _shortened(meta.key, str)
        key = (_BEGINNING if cut or meta.cut else _WHOLE) + text
    number = _NOTHING if meta.revision is None else str(meta.revision)
    return f"{meta.uid} {number} {meta.hash or _NOTHING} {key}".encode()


def from_attribute(value: bytes) -> ObjectMeta | None:
    """The metadata that ``as_attribute`` has written; None for anything else."""
    if len(value) > MOST_BYTES:
        return None
    try:
        fields = value.decode().split(" ", 3)
    except UnicodeDecodeError:
        return None
    if len(fields) != 4:
        return None
    uid, number, hash_, key = fields
    return _checked(uid, key[1:] or None, number, hash_, key.startswith(_BEGINNING))


def _shortened(key: str, form: Callable[[str], str]) -> tuple[str, bool]:
    """A key in its encoded form, no longer than KEY_BYTES, and whether it was cut."""
    whole = form(key)
    if len(whole.encode()) <= KEY_BYTES:
        return whole, False
    text, used = "", 0
    for char in key:
        piece = form(char)
        used += len(piece.encode())
        if used > KEY_BYTES:
            break
        text += piece
    return text, True


def _percent(text: str) -> str:
    return quote(text, safe="/~")


def _checked(uid: str, key: str | None, number: str, hash_: str, cut: bool) -> ObjectMeta | None:
    if not _A_UID.fullmatch(uid):
        return None
    if key is not None:
        try:
            key = check_key(key)
        except InvalidName:
            key = None
    return ObjectMeta(
        uid,
        key,
        int(number) if _A_NUMBER.fullmatch(number) else None,
        hash_ if _A_HASH.fullmatch(hash_) else None,
        cut and key is not None,
    )
