"""What files hold: streams of bytes made from a number, each page of which says which stream it is of. Pure.

A stream is endless and cannot be compressed; its byte at an offset depends on the stream's number and the offset alone.
A version of a file is made of pieces of streams, each at its own offset. So a file of any size is described by a few
numbers, and every page of a file that is found anywhere says what it was.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from blake3 import blake3

PAGE = 4096
CHUNK = 1 << 20
ZEROS = 0
"""The number of the stream that holes are made of."""
_STAMP = struct.Struct(">QQ8s")
_MAGIC = b"lamchaos"


def stream_bytes(stream: int, start: int, end: int) -> bytes:
    """The bytes of a stream from ``start`` to before ``end``."""
    if stream == ZEROS:
        return bytes(end - start)
    first = start // PAGE * PAGE
    last = -(-end // PAGE) * PAGE
    data = bytearray(blake3(stream.to_bytes(8, "big")).digest(length=last - first, seek=first))
    for at in range(0, last - first, PAGE):
        _STAMP.pack_into(data, at, stream, first + at, _MAGIC)
    return bytes(memoryview(data)[start - first : end - first])


def stream_of(page: bytes, offset: int) -> int | None:
    """The stream that a page at this offset of a file begins with; None: it does not say, or another offset."""
    if len(page) < _STAMP.size:
        return None
    stream, at, magic = _STAMP.unpack_from(page)
    return stream if magic == _MAGIC and at == offset else None


class Piece(NamedTuple):
    """Bytes ``start`` to before ``end`` of a file are those of ``stream`` at the same offsets."""

    start: int
    end: int
    stream: int


class Version:
    """One content of a file. Its digest is computed when it is first asked for.

    ``pieces`` of a content that nobody can describe is empty, and ``digest`` given.
    """

    def __init__(self, pieces: Iterable[Piece], *, digest: str | None = None) -> None:
        self.pieces = tuple(pieces)
        if digest is not None:
            self.digest = digest
        self.opaque = digest is not None

    @classmethod
    def whole(cls, size: int, stream: int) -> Version:
        """All of one stream."""
        return cls([Piece(0, size, stream)] if size else [])

    @property
    def size(self) -> int:
        """Bytes."""
        return self.pieces[-1].end if self.pieces else 0

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the content."""
        hasher = blake3()
        for chunk in self.chunks():
            hasher.update(chunk)
        return hasher.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The content, bit by bit."""
        for at in range(0, self.size, CHUNK):
            yield self.read(at, min(at + CHUNK, self.size))

    def read(self, start: int, end: int) -> bytes:
        """Bytes of the content, cut at its end."""
        parts = [
            stream_bytes(piece.stream, max(piece.start, start), min(piece.end, end))
            for piece in self.pieces
            if piece.start < end and piece.end > start
        ]
        return b"".join(parts)

    def cut(self, size: int) -> Version:
        """The content after truncate(2)."""
        pieces = [Piece(start, min(end, size), stream) for start, end, stream in self.pieces if start < size]
        if size > self.size:
            pieces.append(Piece(self.size, size, ZEROS))
        return Version(pieces)

    def written(self, start: int, end: int, stream: int) -> Version:
        """The content after a pwrite(2) of these bytes of a stream."""
        whole = self.cut(max(self.size, end))
        before = [Piece(a, min(b, start), s) for a, b, s in whole.pieces if a < start]
        after = [Piece(max(a, end), b, s) for a, b, s in whole.pieces if b > end]
        return Version([*before, Piece(start, end, stream), *after])

    def listed(self) -> list[list[int]]:
        """The pieces, ready for JSON."""
        return [list(piece) for piece in self.pieces]

    def __repr__(self) -> str:
        return f"Version({self.size} bytes, {self.digest[:12]}, {len(self.pieces)} pieces)"


def version_from(listed: list[list[int]]) -> Version:
    """What ``Version.listed`` made."""
    return Version(Piece(*row) for row in listed)


class Ranges:
    """Which bytes of which streams were found."""

    def __init__(self) -> None:
        self._found: dict[int, list[tuple[int, int]]] = {}

    def add(self, pieces: Iterable[Piece]) -> None:
        """These were found."""
        for start, end, stream in pieces:
            if stream == ZEROS or start >= end:
                continue
            ranges = [*self._found.get(stream, ()), (start, end)]
            merged: list[tuple[int, int]] = []
            for low, high in sorted(ranges):
                if merged and low <= merged[-1][1]:
                    merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
                else:
                    merged.append((low, high))
            self._found[stream] = merged

    def missing(self, version: Version) -> list[Piece]:
        """The parts of a version that were not found. Zeros are found everywhere."""
        left: list[Piece] = []
        for start, end, stream in version.pieces:
            if stream == ZEROS:
                continue
            at = start
            for low, high in self._found.get(stream, ()):
                if high <= at or low >= end:
                    continue
                if low > at:
                    left.append(Piece(at, low, stream))
                at = high
            if at < end:
                left.append(Piece(at, end, stream))
        return left


class Explanation(NamedTuple):
    """What a file's bytes are: ``pieces`` that are known (zeros among them), and ranges of ``garbage``."""

    pieces: list[Piece]
    garbage: list[tuple[int, int]]

    def version(self, digest: str) -> Version:
        """The content as a Version, opaque when there is garbage in it."""
        return Version((), digest=digest) if self.garbage else Version(self.pieces)


def explain(chunks: Iterable[bytes], versions: list[Version]) -> Explanation:
    """Say of each page of a file in which version it is. ``chunks`` are of CHUNK bytes, but for the last."""
    having: dict[int, list[Version]] = {}
    for version in versions:
        for stream in {piece.stream for piece in version.pieces}:
            having.setdefault(stream, []).append(version)
    pieces: list[Piece] = []
    garbage: list[tuple[int, int]] = []
    offset = 0
    for chunk in chunks:
        for at in range(0, len(chunk), PAGE):
            page = chunk[at : at + PAGE]
            start, end = offset + at, offset + at + len(page)
            candidates = having.get(_first_stream(page, start, having), [])
            match = next((version for version in candidates if version.read(start, end) == page), None)
            if match is not None:
                for piece in match.pieces:
                    if piece.start < end and piece.end > start:
                        _append(pieces, Piece(max(piece.start, start), min(piece.end, end), piece.stream))
            elif not any(page):
                _append(pieces, Piece(start, end, ZEROS))
            elif (framed := _between_holes(page, start, versions)) is not None:
                for piece in framed:
                    _append(pieces, piece)
            elif garbage and garbage[-1][1] == start:
                garbage[-1] = (garbage[-1][0], end)
            else:
                garbage.append((start, end))
        offset += len(chunk)
    return Explanation(pieces, garbage)


def _between_holes(page: bytes, start: int, versions: list[Version]) -> list[Piece] | None:
    """The bytes of a page that is part of a version, with zeros where nobody wrote: files that hold changes alone."""
    low, high = start + len(page) - len(page.lstrip(b"\0")), start + len(page.rstrip(b"\0"))
    if high - low == len(page):
        return None
    wanted = page[low - start : high - start]
    for version in versions:
        if version.read(low, high) == wanted:
            inner = [
                Piece(max(piece.start, low), min(piece.end, high), piece.stream)
                for piece in version.pieces
                if piece.start < high and piece.end > low
            ]
            holes = [Piece(start, low, ZEROS), Piece(high, start + len(page), ZEROS)]
            return [piece for piece in (holes[0], *inner, holes[1]) if piece.start < piece.end]
    return None


def _first_stream(page: bytes, start: int, having: dict[int, list[Version]]) -> int:
    found = stream_of(page, start)
    if found is not None and found in having:
        return found
    if len(page) < _STAMP.size:  # the last few bytes of a file say nothing: try all that reach so far
        for stream, versions in having.items():
            if any(version.read(start, start + len(page)) == page for version in versions):
                return stream
    return ZEROS


def _append(pieces: list[Piece], piece: Piece) -> None:
    if pieces and pieces[-1].stream == piece.stream and pieces[-1].end == piece.start:
        pieces[-1] = pieces[-1]._replace(end=piece.end)
    else:
        pieces.append(piece)


def explanation_to_json(found: Explanation) -> dict[str, Any]:
    """Ready for JSON."""
    return {"pieces": [list(piece) for piece in found.pieces], "garbage": [list(part) for part in found.garbage]}


def explanation_from_json(data: dict[str, Any]) -> Explanation:
    """What ``explanation_to_json`` made."""
    return Explanation([Piece(*row) for row in data["pieces"]], [(low, high) for low, high in data["garbage"]])
