"""The XML of S3's replies and requests. Pure functions, any thread.

A function that reads a reply gets the body of one with status 200. It raises Refused for an error: Amazon S3 sends the
status before it has copied or assembled anything. It raises NotS3 for a listing that is something else, because an
empty one would mean that nothing is there, or that everything was deleted.
"""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from http.client import responses
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote_plus

from lamfs.storage.base import ObjectStat, PartStat, UnfinishedUpload
from lamfs.storage.s3 import limits, xmltext
from lamfs.storage.s3.calls import NotDeleted, Page, bare
from lamfs.storage.s3.errors import NotS3, Refused

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

T = TypeVar("T")

ERROR_BYTES = 64 << 10
"""Bytes of an error's body that are read."""
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_NUMBER = re.compile(r"[0-9]{1,19}")


def completion(etags: Sequence[str]) -> bytes:
    """The body of CompleteMultipartUpload."""
    inside = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{html.escape(etag)}</ETag></Part>"
        for number, etag in enumerate(etags, 1)
    )
    return f'<CompleteMultipartUpload xmlns="{_NAMESPACE}">{inside}</CompleteMultipartUpload>'.encode()


def deletion(keys: Sequence[str]) -> bytes:
    """The body of DeleteObjects. The reply should name only the objects that could not be deleted."""
    inside = "".join(f"<Object><Key>{_escaped(key)}</Key></Object>" for key in keys)
    return f'<Delete xmlns="{_NAMESPACE}">{inside}<Quiet>true</Quiet></Delete>'.encode()


def _escaped(key: str) -> str:
    """XML parsers normalize line breaks, so these are escaped."""
    return html.escape(key, quote=False).replace("\r", "&#xD;").replace("\n", "&#xA;")


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refused:
    """A reply with an error: code and message from its XML, else from its status."""
    code = message = None
    with contextlib.suppress(xmltext.NotXml):
        root = xmltext.parse(body)
        code, message = root.findtext(".//{*}Code"), root.findtext(".//{*}Message")
    if not code:
        code, message = str(status), responses.get(status)
    return Refused(code, message or "", status, headers.get("x-amz-bucket-region", ""))


def etag(body: bytes) -> str:
    """The ETag of what was copied or assembled, as it was sent."""
    return limits.etag(_value(body, "ETag"))


def upload_id(body: bytes) -> str:
    """The id of the upload that has begun."""
    return limits.upload_id(_value(body, "UploadId"))


def objects(body: bytes) -> Page[ObjectStat]:
    """A page of ListObjectsV2."""
    root = _root(body, "ListBucketResult")
    decoded = unquote_plus if _text(root, "EncodingType") == "url" else str

    def entry(found: Element) -> ObjectStat:
        etag = bare(limits.etag(_text(found, "ETag")))
        return ObjectStat(
            decoded(_text(found, "Key")), limits.size(_number(found, "Size")), etag, _time(found, "LastModified")
        )

    return _page(root, "Contents", entry, "NextContinuationToken")


def uploads(body: bytes) -> Page[UnfinishedUpload]:
    """A page of ListMultipartUploads."""

    def entry(found: Element) -> UnfinishedUpload:
        return UnfinishedUpload(
            _text(found, "Key"), limits.upload_id(_text(found, "UploadId")), _time(found, "Initiated")
        )

    root = _root(body, "ListMultipartUploadsResult")
    return _page(root, "Upload", entry, "NextKeyMarker", "NextUploadIdMarker")


def parts(body: bytes) -> Page[PartStat]:
    """A page of ListParts."""

    def entry(found: Element) -> PartStat:
        etag = bare(limits.etag(_text(found, "ETag")))
        return PartStat(limits.part_number(_number(found, "PartNumber")), limits.size(_number(found, "Size")), etag)

    return _page(_root(body, "ListPartsResult"), "Part", entry, "NextPartNumberMarker")


def not_deleted(body: bytes) -> list[NotDeleted]:
    """What DeleteObjects could not delete."""
    return [
        NotDeleted(_text(one, "Key"), _text(one, "Code")) for one in _root(body, "DeleteResult").iterfind("{*}Error")
    ]


def _page(root: Element, entries: str, entry: Callable[[Element], T], *following: str) -> Page[T]:
    try:
        found = [entry(one) for one in root.iterfind(f"{{*}}{entries}")]
    except ValueError as error:
        raise NotS3(f"its list cannot be read: {error}") from error
    return Page(found, _text(root, "IsTruncated") == "true", limits.marker(*(_text(root, name) for name in following)))


def _root(body: bytes, kind: str | None = None) -> Element:
    """The root element; ``kind``: its name, if it must be a list."""
    try:
        root = xmltext.parse(body)
    except xmltext.NotXml as error:
        if kind is None:
            raise refusal(500, {}, body) from error
        raise NotS3(f"it sent no list: {error}") from error
    found = root.tag.rpartition("}")[2]
    if found == "Error":
        raise refusal(500, {}, body)
    if kind is not None and found != kind:
        raise NotS3(f"it sent '{found}' for a list")
    return root


def _value(body: bytes, name: str) -> str:
    found = _text(_root(body), name)
    if not found:
        raise refusal(500, {}, body)
    return found


def _time(element: Element, name: str) -> int:
    return limits.nanoseconds(datetime.fromisoformat(_text(element, name)))


def _number(element: Element, name: str) -> int:
    text = _text(element, name)
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{name} is {text[:80]!r}")
    return int(text)


def _text(element: Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""
