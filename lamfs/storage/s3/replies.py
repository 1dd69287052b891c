"""What the XML of S3's replies says, in boto3's shapes, and the XML of requests. Pure functions, any thread."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from lamfs.storage.s3.errors import NotS3

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_ERROR = re.compile(r"<Error[\s>]")
_TEXTS = re.compile(r"<(UploadId|ETag)>([^<]*)</")


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
    if operation == "list_objects_v2":
        return _listing(body)
    if operation == "delete_objects":
        return _left(body)
    text = body.decode("utf-8", "replace")
    found = {} if _ERROR.search(text) else {tag: html.unescape(value) for tag, value in _TEXTS.findall(text)}
    if operation == "create_multipart_upload":
        return {"UploadId": found["UploadId"]} if found.get("UploadId") else None
    if not found.get("ETag"):
        return None
    if operation == "copy_object":
        return {"CopyObjectResult": {"ETag": found["ETag"]}}
    if operation == "upload_part_copy":
        return {"CopyPartResult": {"ETag": found["ETag"]}}
    return {"ETag": found["ETag"]}


def _listing(body: bytes) -> dict[str, Any]:
    try:
        root = ElementTree.fromstring(body)  # noqa: S314 (botocore does the same)
        encoded = _text(root, "EncodingType") == "url"
        contents = []
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
    except (ElementTree.ParseError, ValueError) as error:
        raise NotS3(f"the listing is not one: {error}") from error
    page: dict[str, Any] = {"Contents": contents, "IsTruncated": _text(root, "IsTruncated") == "true"}
    token = _text(root, "NextContinuationToken")
    if token:
        page["NextContinuationToken"] = token
    return page


def _left(body: bytes) -> dict[str, Any] | None:
    try:
        root = ElementTree.fromstring(body)  # noqa: S314 (botocore does the same)
    except ElementTree.ParseError as error:
        raise NotS3(f"the list of errors is not one: {error}") from error
    if root.tag.rpartition("}")[2] == "Error":
        return None
    return {"Errors": [{"Key": _text(one, "Key"), "Code": _text(one, "Code")} for one in root.iterfind("{*}Error")]}


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""
