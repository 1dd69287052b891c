"""Lines of JSON: whole wherever the stream is cut, and one line whatever is in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamfs.jsonlines import Lines, decode, encode


@given(st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"."))), st.data())
def test_lines_are_whole_wherever_the_stream_is_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines) + b"rest"
    cutter, got, at = Lines(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        got += cutter.feed(stream[at : at + size])
        at += size
    assert got == lines
    assert cutter.feed(b"\n") == [b"rest"]


def test_a_message_is_one_line_whatever_a_path_contains() -> None:
    path = b"/a\nb\xff\xc3\xa4\x00".decode("utf-8", "surrogateescape")
    line = encode({"id": 1, "path": path})
    assert line.count(b"\n") == 1
    assert decode(line[:-1])["path"] == path


@pytest.mark.parametrize("line", [b"[1]", b"", b"{", b"\xff"])
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode(line)


@given(st.integers(0, 8), st.lists(st.binary(max_size=12), max_size=8))
def test_a_line_without_an_end_is_refused_and_no_other(limit: int, pieces: list[bytes]) -> None:
    """However it comes in pieces: what has its end may be as long as it likes."""
    cutter, stream = Lines(limit), b""
    for piece in pieces:
        stream += piece
        if len(stream.rpartition(b"\n")[2]) > limit:
            with pytest.raises(ValueError, match=f"more than {limit} bytes"):
                cutter.feed(piece)
            return
        assert cutter.feed(piece) == stream.split(b"\n")[stream.count(b"\n") - piece.count(b"\n") : -1]
