"""Replies of servers in lamfs's words."""

from __future__ import annotations

import errno

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
from lamfs.storage.s3.errors import code_of, translate

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
