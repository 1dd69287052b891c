"""Replies of servers in lamfs's words."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from botocore import exceptions as boto

from lamfs.errors import (
    LamfsError,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageUnavailable,
)
from lamfs.storage.s3 import replies
from lamfs.storage.s3.errors import NotS3, Refused, code_of, translate

WHAT = "store s3://bucket/key"


def reply(code: str, status: int, message: str = "told by the server.", **headers: str) -> boto.ClientError:
    return boto.ClientError(
        {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},  # type: ignore[typeddict-item]
        },
        "PutObject",
    )


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (reply("NoSuchKey", 404), ObjectMissing, "no such object"),
        (reply("404", 404), ObjectMissing, "no such object"),
        (reply("NoSuchBucket", 404), StorageMissing, "'bucket' does not exist at http://server; create it"),
        (reply("AccessDenied", 403), StorageForbidden, "'bucket' refuses these credentials"),
        (reply("ExpiredToken", 400), StorageForbidden, "told by the server"),
        (reply("403", 403, ""), StorageForbidden, "403"),
        (reply("RequestTimeTooSkewed", 403), StorageForbidden, "clock"),
        (reply("PreconditionFailed", 412), ObjectChanged, "look it up again"),
        (reply("SlowDown", 503), StorageUnavailable, "busy"),
        (reply("", 500), StorageUnavailable, "HTTP 500"),
        (reply("InternalError", 200), StorageUnavailable, "busy"),
        (reply("XMinioStorageFull", 507), StorageFull, "no space"),
        (reply("PermanentRedirect", 301, **{"x-amz-bucket-region": "eu-west-1"}), StorageError, r"\(eu-west-1\)"),
        (reply("EntityTooLarge", 400), StorageError, "EntityTooLarge"),
        (reply("NotImplemented", 501), StorageError, "supports"),
        (boto.NoCredentialsError(), StorageForbidden, "AWS_ACCESS_KEY_ID"),
        (boto.ProfileNotFound(profile="mine"), StorageForbidden, "mine"),
        (boto.EndpointConnectionError(endpoint_url="http://server"), StorageUnavailable, "did not answer"),
        (boto.ReadTimeoutError(endpoint_url="http://server"), StorageUnavailable, "did not answer"),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), StorageUnavailable, "did not answer"),
        (boto.ParamValidationError(report="bad"), StorageError, "bad"),
        (RuntimeError("surprise"), StorageError, "surprise"),
    ],
    ids=lambda value: value.response["Error"]["Code"] if isinstance(value, boto.ClientError) else None,
)
def test_translation(error: Exception, kind: type[LamfsError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        raise translate(error, WHAT, "bucket", "http://server") from error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"Cannot {WHAT}: ")
    assert str(caught.value).endswith(".")
    assert caught.value.errno in errno.errorcode
    if isinstance(error, boto.ClientError):
        assert code_of(caught.value) == error.response["Error"]["Code"]


def test_a_name_that_is_too_long() -> None:
    error = translate(reply("KeyTooLongError", 400), WHAT, "bucket", "http://server")
    assert error.errno == errno.ENAMETOOLONG


def test_a_long_story_is_cut() -> None:
    error = translate(reply("Odd", 400, "word " * 500), WHAT, "bucket", "http://server")
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"<Error><Code>NoSuchKey</Code><Message>a &lt;b&gt; &amp; c</Message></Error>", "NoSuchKey", "a <b> & c"),
        (b'\n<?xml version="1.0"?>\n<Error xmlns="urn:x"><Code>SlowDown</Code></Error>\n', "SlowDown", ""),
        (b"<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>", "AccessDenied", ""),
        (b"<Error><Message><![CDATA[<Code>NoSuchKey</Code>]]></Message></Error>", "503", "Service Unavailable"),
        (b"<!-- <Code>NoSuchKey</Code> --><html/>", "503", "Service Unavailable"),
        (b"<Error><Code>NoSuchKey</Code>", "503", "Service Unavailable"),
        (b"", "503", "Service Unavailable"),
    ],
)
def test_the_xml_of_an_error(body: bytes, code: str, message: str) -> None:
    found = replies.refusal(503, {}, body)
    assert (found.code, found.message, found.status) == (code, message, 503)


XMLNS = b'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


@pytest.mark.parametrize(
    ("read", "body", "said"),
    [
        (
            replies.etag,
            b'  <?xml version="1.0"?>\n  <CompleteMultipartUploadResult '
            + XMLNS
            + b"><Key>&lt;ETag&gt;no&lt;/ETag&gt;</Key>"
            b"<ETag>&quot;a-1&quot;</ETag></CompleteMultipartUploadResult>",
            '"a-1"',
        ),
        (replies.etag, b"<CopyObjectResult><ETag>a</ETag></CopyObjectResult>", "a"),
        (replies.upload_id, b"<R><UploadId>u</UploadId></R>", "u"),
        (replies.not_deleted, b"<DeleteResult/>", []),
    ],
)
def test_the_xml_of_a_result(read: Callable[[bytes], object], body: bytes, said: object) -> None:
    assert read(body) == said


@pytest.mark.parametrize(
    ("read", "body", "code"),
    [
        (replies.etag, b"<Error><ETag>a</ETag></Error>", "500"),
        (replies.etag, b"<R><ETag>a</ETag>", "500"),
        (replies.etag, b"", "500"),
        (replies.upload_id, b"<R/>", "500"),
        (replies.not_deleted, b"<Error><Code>InternalError</Code></Error>", "InternalError"),
        (replies.objects, b"<Error><Code>SlowDown</Code></Error>", "SlowDown"),
    ],
)
def test_an_error_in_a_reply_with_a_good_status(read: Callable[[bytes], object], body: bytes, code: str) -> None:
    with pytest.raises(Refused) as caught:
        read(body)
    assert caught.value.code == code


LISTS = (replies.objects, replies.uploads, replies.parts, replies.not_deleted)


@pytest.mark.parametrize("read", LISTS)
@pytest.mark.parametrize("body", [b"", b"<html><body>Welcome</body></html>", b"<ListBucketResult><Contents>"])
def test_what_is_no_list_is_not_an_empty_one(read: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(NotS3):
        read(body)


def test_a_list_whose_sizes_are_none() -> None:
    with pytest.raises(NotS3):
        replies.objects(b"<ListBucketResult><Contents><Size>x</Size></Contents></ListBucketResult>")
