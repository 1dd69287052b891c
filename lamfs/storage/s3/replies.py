"""The XML of S3's replies, in boto3's shapes, and the XML of requests. Pure functions, any thread."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

from lamfs.storage.s3 import xmltext
from lamfs.storage.s3.errors import NotS3

if TYPE_CHECKING:
    from xml.etree import ElementTree

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_LISTS = {
    "list_objects_v2": "ListBucketResult",
    "list_multipart_uploads": "ListMultipartUploadsResult",
    "list_parts": "ListPartsResult",
    "delete_objects": "DeleteResult",
}
"""The root elements of lists. Another document must not pass as an empty list, which would mean that there is nothing,
or that everything was deleted."""
_NUMBER = re.compile(r"[0-9]{1,19}")
_INSIDE = {"copy_object": "CopyObjectResult", "upload_part_copy": "CopyPartResult"}


def completion(parts: Sequence[dict[str, Any]]) -> bytes:
    """The body of CompleteMultipartUpload."""
    inside = "".join(
        f"<Part><PartNumber>{part['PartNumber']}</PartNumber><ETag>{html.escape(part['ETag'])}</ETag></Part>"
        for part in parts
    )
    return f'<CompleteMultipartUpload xmlns="{_NAMESPACE}">{inside}</CompleteMultipartUpload>'.encode()


def deletion(keys: Sequence[dict[str, Any]]) -> bytes:
    """The body of DeleteObjects. The reply should name only the objects that could not be deleted."""
    inside = "".join(f"<Object><Key>{_escaped(entry['Key'])}</Key></Object>" for entry in keys)
    return f'<Delete xmlns="{_NAMESPACE}">{inside}<Quiet>true</Quiet></Delete>'.encode()


def _escaped(key: str) -> str:
    """XML parsers normalize line breaks, so these are escaped."""
    return html.escape(key, quote=False).replace("\r", "&#xD;").replace("\n", "&#xA;")


def result(operation: str, body: bytes) -> dict[str, Any] | None:
    """What the body of a reply with status 200 says; None when it is an error, or empty.

    Amazon S3 sends the status before it has copied or assembled anything. Raises NotS3 for a list that is something
    else.
    """
    try:
        root = xmltext.parse(body)
    except xmltext.NotXml as error:
        if operation in _LISTS:
            raise NotS3(f"its list is none: {error}") from error
        return None
    kind = root.tag.rpartition("}")[2]
    if kind == "Error":
        return None
    if operation in _LISTS:
        if kind != _LISTS[operation]:
            raise NotS3(f"its list is none, but '{kind}'")
        try:
            return _READERS[operation](root)
        except ValueError as error:
            raise NotS3(f"its list is none: {error}") from error
    name = "UploadId" if operation == "create_multipart_upload" else "ETag"
    value = _text(root, name)
    if not value:
        return None
    inside = _INSIDE.get(operation)
    return {inside: {name: value}} if inside else {name: value}


def _listing(root: ElementTree.Element) -> dict[str, Any]:
    encoded = _text(root, "EncodingType") == "url"
    contents = []
    for entry in root.iterfind("{*}Contents"):
        key = _text(entry, "Key")
        contents.append(
            {
                "Key": unquote_plus(key) if encoded else key,
                "Size": _number(entry, "Size"),
                "ETag": _text(entry, "ETag"),
                "LastModified": datetime.fromisoformat(_text(entry, "LastModified")),
            }
        )
    return {"Contents": contents, **_onward(root, "NextContinuationToken")}


def _uploads(root: ElementTree.Element) -> dict[str, Any]:
    found = [
        {
            "Key": _text(entry, "Key"),
            "UploadId": _text(entry, "UploadId"),
            "Initiated": datetime.fromisoformat(_text(entry, "Initiated")),
        }
        for entry in root.iterfind("{*}Upload")
    ]
    return {"Uploads": found, **_onward(root, "NextKeyMarker", "NextUploadIdMarker")}


def _parts(root: ElementTree.Element) -> dict[str, Any]:
    found = [
        {
            "PartNumber": _number(entry, "PartNumber"),
            "Size": _number(entry, "Size"),
            "ETag": _text(entry, "ETag"),
        }
        for entry in root.iterfind("{*}Part")
    ]
    return {"Parts": found, **_onward(root, "NextPartNumberMarker")}


def _left(root: ElementTree.Element) -> dict[str, Any]:
    return {"Errors": [{"Key": _text(one, "Key"), "Code": _text(one, "Code")} for one in root.iterfind("{*}Error")]}


_READERS = {
    "list_objects_v2": _listing,
    "list_multipart_uploads": _uploads,
    "list_parts": _parts,
    "delete_objects": _left,
}


def _onward(root: ElementTree.Element, *names: str) -> dict[str, Any]:
    """Whether a list continues, and where."""
    said = {name: text for name in names if (text := _text(root, name))}
    return {"IsTruncated": _text(root, "IsTruncated") == "true", **said}


def _number(element: ElementTree.Element, name: str) -> int:
    text = _text(element, name)
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{name} is {text[:80]!r}")
    return int(text)


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""
