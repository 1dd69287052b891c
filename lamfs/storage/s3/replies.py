"""What the XML of S3's replies says, in boto3's shapes, and the XML of requests. Pure functions, any thread."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from lamfs.storage.s3.errors import NotS3

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_LISTS = {"list_objects_v2": "ListBucketResult", "delete_objects": "DeleteResult"}
"""Anything else is no list: taken for an empty one it would say that there is nothing, or that all was deleted."""
_INSIDE = {"copy_object": "CopyObjectResult", "upload_part_copy": "CopyPartResult"}


def completion(parts: Sequence[dict[str, Any]]) -> bytes:
    """The body of CompleteMultipartUpload."""
    inside = "".join(
        f"<Part><PartNumber>{part['PartNumber']}</PartNumber><ETag>{html.escape(part['ETag'])}</ETag></Part>"
        for part in parts
    )
    return f'<CompleteMultipartUpload xmlns="{_NAMESPACE}">{inside}</CompleteMultipartUpload>'.encode()


def deletion(keys: Sequence[dict[str, Any]]) -> bytes:
    """The body of DeleteObjects, which is to name only those that could not be deleted."""
    inside = "".join(f"<Object><Key>{_escaped(entry['Key'])}</Key></Object>" for entry in keys)
    return f'<Delete xmlns="{_NAMESPACE}">{inside}<Quiet>true</Quiet></Delete>'.encode()


def _escaped(key: str) -> str:
    """A parser of XML takes a line break for a line break of any kind."""
    return html.escape(key, quote=False).replace("\r", "&#xD;").replace("\n", "&#xA;")


def result(operation: str, body: bytes) -> dict[str, Any] | None:
    """What the body of a reply with status 200 says; None when that is an error, or nothing: Amazon S3 sends the status
    before it has copied or assembled anything.

    Raises NotS3 for a list that is none.
    """
    try:
        root = ElementTree.fromstring(body.strip())  # noqa: S314 (botocore does the same)
    except ElementTree.ParseError as error:
        if operation in _LISTS:
            raise NotS3(f"its list is none: {error}") from error
        return None
    kind = root.tag.rpartition("}")[2]
    if kind == "Error":
        return None
    if operation in _LISTS:
        if kind != _LISTS[operation]:
            raise NotS3(f"its list is none, but '{kind}'")
        return _listing(root) if operation == "list_objects_v2" else _left(root)
    name = "UploadId" if operation == "create_multipart_upload" else "ETag"
    value = _text(root, name)
    if not value:
        return None
    inside = _INSIDE.get(operation)
    return {inside: {name: value}} if inside else {name: value}


def _listing(root: ElementTree.Element) -> dict[str, Any]:
    encoded = _text(root, "EncodingType") == "url"
    contents = []
    try:
        for entry in root.iterfind("{*}Contents"):
            key = _text(entry, "Key")
            contents.append(
                {
                    "Key": unquote_plus(key) if encoded else key,
                    "Size": int(_text(entry, "Size")),
                    "ETag": _text(entry, "ETag"),
                    "LastModified": datetime.fromisoformat(_text(entry, "LastModified")),
                }
            )
    except ValueError as error:
        raise NotS3(f"its list is none: {error}") from error
    page: dict[str, Any] = {"Contents": contents, "IsTruncated": _text(root, "IsTruncated") == "true"}
    token = _text(root, "NextContinuationToken")
    if token:
        page["NextContinuationToken"] = token
    return page


def _left(root: ElementTree.Element) -> dict[str, Any]:
    return {"Errors": [{"Key": _text(one, "Key"), "Code": _text(one, "Code")} for one in root.iterfind("{*}Error")]}


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""
