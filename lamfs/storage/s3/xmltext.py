"""XML from a server, parsed within limits, so that a small body cannot use much memory. Pure functions.

Expat keeps every element and attribute, and expands entities that a document type declares. An S3 reply has neither
document type nor entities of its own, and few attributes.
"""

from __future__ import annotations

from xml.etree import ElementTree

MAX_BYTES = 8 << 20
"""Bytes of a reply. A page of 1000 objects with the longest keys has 4 MiB."""
MAX_TAGS = 100_000
"""Opening and closing tags. Such a page has some 25,000."""
MAX_DEPTH = 32
"""Nested elements; S3 has 5. botocore parses them recursively."""
MAX_ATTRIBUTES = 200_000
"""Equals signs; keys may contain some."""
MAX_PIECE = 64 << 10
"""Bytes from one tag to the next. The longest names and tokens have some thousand."""


class NotXml(ValueError):
    """The text cannot be an XML reply. The message says why in a few words."""


def parse(body: bytes) -> ElementTree.Element:
    """The root element. Raises NotXml."""
    body = body.strip()
    _check(body)
    parser = ElementTree.XMLParser(encoding="utf-8")  # noqa: S314 (it was looked at)
    try:
        parser.feed(body)
        root: ElementTree.Element = parser.close()
    except ElementTree.ParseError as error:
        raise NotXml(str(error)) from error
    level = [root]
    for _ in range(MAX_DEPTH):
        level = [child for element in level for child in element]
        if not level:
            return root
    raise NotXml("it is nested too deeply")


def _check(body: bytes) -> None:
    if len(body) > MAX_BYTES:
        raise NotXml("it is too long")
    if b"\0" in body:
        raise NotXml("it holds NUL bytes")
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        raise NotXml("it declares a document type")
    if body.count(b"<") > MAX_TAGS or body.count(b"=") > MAX_ATTRIBUTES:
        raise NotXml("it has too many parts")
    if max(map(len, body.split(b"<"))) > MAX_PIECE:
        raise NotXml("a part of it is too long")
