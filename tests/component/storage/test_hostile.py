"""A server that says what none should: a sentence comes of it, little memory is used, and nothing wrong is believed."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamfs.errors import LamfsError, StorageError
from lamfs.storage import open_store
from lamfs.storage.s3 import paging, replies, xmltext
from lamfs.storage.s3.calls import Marker, Page
from lamfs.storage.s3.errors import NotS3, Refused
from lamfs.storage.s3.replies import refusal
from tests.support.commands import ROOT
from tests.support.hostile import Answer, HostileServer, reply

MIB = 1 << 20
CLOSING = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
ENTRY = (
    "<Contents><Key>root/%s</Key><Size>1</Size><ETag>&quot;e&quot;</ETag>"
    "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def endless(*pieces: bytes) -> Answer:
    """The last piece is repeated without end."""
    return lambda *_: itertools.chain(pieces[:-1], itertools.repeat(pieces[-1] * (1 + 65536 // len(pieces[-1]))))


def whole(body: bytes, status: str = "200 OK", **headers: str) -> Answer:
    return lambda *_: reply(body, status, **headers)


def laughs(kind: str) -> bytes:
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 9))
    return f'<!DOCTYPE x [<!ENTITY a0 "ha">{entities}]><{kind}><Key>&a8;</Key></{kind}>'.encode()


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LIST = b"<ListBucketResult>"
ANSWERS: dict[str, Answer] = {
    "a list without end": endless(CLOSING, LIST, (ENTRY % "k").encode()),
    "a list in chunks without end": endless(CHUNKED, b"12\r\n" + LIST + b"\r\n", b"3000\r\n" + b"<a>" * 4096 + b"\r\n"),
    "spaces without end": endless(CLOSING, b" "),
    "a chunk without end": endless(CHUNKED, b"fffffffffffff\r\n", b"<a>"),
    "a length that is none": endless(b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999999999999\r\n\r\n", b"<a>"),
    "headers without end": endless(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
    "a header without end": endless(b"HTTP/1.1 200 OK\r\nx: ", b"y"),
    "an error without end": endless(b"HTTP/1.1 403 No\r\nconnection: close\r\n\r\n<Error>", b"<a>"),
    "an error that laughs": whole(laughs("Error"), "403 No"),
    "a list that laughs": whole(laughs("ListBucketResult")),
    "a list that is deep": whole(LIST + b"<a>" * 49_000 + b"</a>" * 49_000 + b"</ListBucketResult>"),
    "an error that is deep": whole(b"<a>" * 9_000 + b"</a>" * 9_000, "403 No"),
    "many elements": whole(LIST + b"<a/>" * (2 * MIB - 10) + b"</ListBucketResult>"),
    "many attributes": whole(LIST + b"<a %s/></ListBucketResult>" % b" ".join(b'a%d=""' % n for n in range(800_000))),
    "many lines": whole(LIST + b"ab\n" * (8 * MIB // 3 - 20) + b"</ListBucketResult>"),
    "another encoding": whole(f"<?xml version='1.0' encoding='utf-16'?>{LIST.decode()}".encode("utf-16")),
}
CALLS = {
    "list": "list(store.list())",
    "head": "store.head('k')",
    "get": "store.get('k', length=100)",
    "put": "store.put_bytes('k', b'data')",
    "copy": "store.copy('k', 'l', etag='e', size=1)",
    "delete": "store.delete(['k', 'l'])",
    "uploads": "list(store.uploads())",
    "parts": "store.parts.list_parts('k', 'id')",
}
SCRIPT = """
import re, sys
from pathlib import Path
from lamfs.errors import LamfsError
from lamfs.storage import StorageConfig, open_store
from lamfs.storage.s3 import client
client.ATTEMPTS = 1
def peak():  # KiB; not ru_maxrss, which counts the process that started this one too
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
store = open_store(StorageConfig("s3://bucket/root", endpoint_url=sys.argv[1], region="us-east-1", path_style=True,
                                 timeout=1.0))
store.prepare()
if sys.argv[2] == "botocore":
    store._connection._made_boto().client()
before = peak()
for call in sys.argv[3:]:
    try:
        found = eval(call)
    except LamfsError as error:
        found = f"{type(error).__name__}: {error}"
    print(call, "->", ascii(found)[:300])
print((peak() - before) >> 10)
"""


@pytest.mark.parametrize("way", ["direct", "botocore"])
@pytest.mark.parametrize("name", ANSWERS)
def test_no_answer_takes_much_memory(name: str, way: str) -> None:
    with HostileServer(ANSWERS[name]) as server:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if way == "botocore":
            env |= {"HTTP_PROXY": server.url, "NO_PROXY": "elsewhere"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, server.url, way, *CALLS.values()],
            env=env,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert server.requests
    assert done.returncode == 0, done.stderr
    *said, grown = done.stdout.splitlines()
    assert int(grown) < 60, done.stdout
    results = dict(line.split(" -> ", 1) for line in said)
    for call in ("list", "delete", "uploads"):
        assert "Storage" in results[CALLS[call]], done.stdout
    if "error" in name:
        assert "StorageForbidden" in results[CALLS["list"]]


def answered(answer: Answer, action: Callable[[Any], Any]) -> Any:
    """What comes of an action on a store of a server that answers so."""
    with HostileServer(answer) as server:
        store = open_store(server.config())
        try:
            return action(store)
        finally:
            store.close()


def test_no_more_is_taken_than_was_asked_for() -> None:
    head = b"HTTP/1.1 206 Partial\r\nconnection: close\r\netag: e\r\ncontent-range: bytes 0-99/100\r\n\r\n"
    data = answered(endless(head, b"x"), lambda store: store.get("k", length=100, etag="e"))
    assert data == b"x" * 100


def a_list(entry: str = "", rest: str = "") -> bytes:
    return f"<ListBucketResult>{entry}{rest}</ListBucketResult>".encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (">1<", ">-1<"),
        (">1<", ">1_0<"),
        (">1<", ">٣<"),
        (">1<", ">99999999999999999999<"),
        (">1<", ">9999999999999999999<"),
        (">1<", "><"),
        ("&quot;e&quot;", "e&#10;x: y"),
        ("&quot;e&quot;", "e&quot;f"),
        ("&quot;e&quot;", "é"),
        ("&quot;e&quot;", "e" * 1025),
        ("2024-01-01T00:00:00.000Z", "2024"),
        ("2024-01-01T00:00:00.000Z", "9999-12-31T23:59:59Z"),
        ("2024-01-01T00:00:00.000Z", "yesterday"),
        ("</ETag>", "</ETag><!--" + "x" * 70_000 + "-->"),
    ],
)
def test_an_entry_of_a_list_that_cannot_be(old: str, new: str) -> None:
    entry = (ENTRY % "k").replace(old, new)
    assert entry != ENTRY % "k"
    with pytest.raises(StorageError, match="does not speak S3"):
        answered(whole(a_list(entry)), lambda store: list(store.list()))


def test_what_is_before_the_epoch_is_at_the_epoch() -> None:
    """Servers written in Go show a time that is not known as the year 1."""
    entry = (ENTRY % "k").replace("2024-", "0001-")
    assert [item.mtime_ns for item in answered(whole(a_list(entry)), lambda store: list(store.list()))] == [0]


def test_keys_that_lamfs_could_not_have_made_are_listed() -> None:
    names = ["%00", "/x", "../x", "a%0Ab", "%FF", "fine"]
    entries = "".join(ENTRY % name for name in names) + (ENTRY % "k").replace("root/", "elsewhere/")
    body = a_list(entries, "<EncodingType>url</EncodingType>")
    found = [item.key for item in answered(whole(body), lambda store: list(store.list()))]
    assert found == ["\0", "/x", "../x", "a\nb", "\ufffd", "fine"]


@pytest.mark.parametrize(
    "headers",
    [
        {"etag": '"a"b"'},
        {"etag": "x" * 1025},
        {"etag": "caf\xe9"},
        {"content_length": "9999999999999999999"},
        {"last_modified": "Mon, 01 Jan 99999 00:00:00 GMT"},
        {"last_modified": "Fri, 31 Dec 9999 23:59:59 GMT"},
        {"last_modified": "Mon, 01 Jan 2024 00:00:00 +999999999999"},
        {"last_modified": "never"},
    ],
)
def test_a_head_that_cannot_be(headers: dict[str, str]) -> None:
    good = {"etag": '"e"', "last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    assert answered(whole(b"", **good), lambda store: store.head("k")).size == 0
    with pytest.raises(StorageError, match="does not speak S3"):
        answered(whole(b"", **{**good, **headers}), lambda store: store.head("k"))


def test_an_upload_with_an_id_that_would_be_a_header() -> None:
    body = b"<InitiateMultipartUploadResult><UploadId>a&#13;&#10;b</UploadId></InitiateMultipartUploadResult>"
    with pytest.raises(StorageError, match="does not speak S3"):
        answered(whole(body), lambda store: store.parts.begin_upload("k"))


def test_parts_that_cannot_be() -> None:
    for number in (0, 10_001):
        body = f"<ListPartsResult><Part><PartNumber>{number}</PartNumber><Size>1</Size><ETag>e</ETag></Part>"
        with pytest.raises(StorageError, match="does not speak S3"):
            answered(whole(f"{body}</ListPartsResult>".encode()), lambda store: store.parts.list_parts("k", "id"))


def going_on(entries: Iterator[str], tokens: Iterator[str]) -> Answer:
    def answer(*_: object) -> Iterable[bytes]:
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{next(tokens)}</NextContinuationToken>"
        return reply(a_list(next(entries), more))

    return answer


@pytest.mark.parametrize(
    ("entries", "tokens"),
    [
        (itertools.repeat(""), map(str, itertools.count())),
        (itertools.repeat(ENTRY % "k"), map(str, itertools.count())),
        (map(ENTRY.__mod__, itertools.count()), itertools.cycle("abcde")),
        (itertools.cycle([ENTRY % "k", ENTRY % "l", ENTRY % "m"]), map(str, itertools.count())),
        (itertools.repeat(ENTRY % "k"), itertools.repeat("")),
        (itertools.repeat(ENTRY % "k"), itertools.repeat("x" * 9000)),
    ],
    ids=["empty", "one page", "a ring of tokens", "a ring of pages", "no token", "a long token"],
)
def test_a_list_that_does_not_end(
    entries: Iterator[str], tokens: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "EMPTY_PAGES", 20)
    with pytest.raises(StorageError, match=r"not how to go on|a next page in 9000"):
        answered(going_on(entries, tokens), lambda store: list(store.list()))


def test_a_long_list_with_empty_pages_is_read_to_its_end() -> None:
    numbers = itertools.count()

    def page(_: Marker) -> Page[int]:
        number = next(numbers)
        return Page([] if number % 3 else [number], number < 5000, (str(number),))

    assert list(paging.entries(page, "list", "here")) == list(range(0, 5001, 3))


READERS = (replies.objects, replies.uploads, replies.parts, replies.not_deleted, replies.etag, replies.upload_id)
_TAGS = ["ListBucketResult", "Contents", "Key", "Size", "ETag", "LastModified", "Error", "Code", "UploadId", "Upload"]
_TEXTS = st.one_of(
    st.tuples(st.sampled_from(["<", "</", "<!"]), st.sampled_from(_TAGS), st.just(">")).map("".join),
    st.text(max_size=9),
)
BODIES = st.one_of(st.binary(), st.lists(_TEXTS).map("".join).map(lambda text: text.encode(errors="ignore")))


@given(st.sampled_from(READERS), BODIES, st.booleans())
def test_any_bytes_for_a_body(read: Callable[[bytes], object], body: bytes, wrapped: bool) -> None:
    if wrapped:
        body = a_list(body.decode(errors="ignore"))
    with contextlib.suppress(NotS3, Refused):
        read(body)
    refusal(500, {}, body)


def test_only_what_could_be_a_reply_is_parsed() -> None:
    assert xmltext.parse(b" \n<a/>\n ").tag == "a"
    for body in (
        b"", b"\0<a/>", b"<a>\0</a>", b"<!DOCTYPE html><html/>", b"<a/>" * 60_000, b"<a>" + b" " * 70_000 + b"</a>",
        b"<a " + b"b='' " * 12_000 + b"/>" + b"=" * 200_000, "<a>\ud800</a>".encode(errors="surrogatepass"),
    ):  # fmt: skip
        with pytest.raises(xmltext.NotXml):
            xmltext.parse(body)


def test_the_longest_page_is_read() -> None:
    """1000 keys of 1024 bytes, each of which is three in a URL."""
    entry = (ENTRY % ("%25" * 1019)).replace("</Contents>", "<Owner><ID>x</ID><DisplayName>y</DisplayName></Owner>")
    body = a_list("".join(entry + "</Contents>" for _ in range(1000)), "<EncodingType>url</EncodingType>")
    assert len(replies.objects(body).entries) == 1000


def test_errors_of_a_server_are_one_sentence() -> None:
    body = b"<Error><Code>Evil</Code><Message>a&#10;b\x1b[31m" + b"x" * 9999 + b"</Message></Error>"
    with pytest.raises(LamfsError) as caught:
        answered(whole(body.replace(b"\x1b", b""), "400 Bad"), lambda store: store.head("k") or store.list())
    assert len(str(caught.value)) < 1000


def test_interim_answers_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamfs.storage.s3.client.ATTEMPTS", 1)
    with HostileServer(endless(b"HTTP/1.1 100 Continue\r\n\r\n")) as server:
        store = open_store(server.config())
        with pytest.raises(LamfsError, match="its answer is no HTTP"):
            store.head("k")
        store.close()
