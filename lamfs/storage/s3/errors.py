"""The one seam between botocore's exceptions, those of the direct way, and lamfs.errors. Pure functions, any thread.

Codes are Amazon's ("Error responses" of the S3 API reference) and those of MinIO, Ceph and SeaweedFS where they differ.
"""

from __future__ import annotations

import errno

from lamfs.errors import (
    InvalidArgument,
    LamfsError,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageMissing,
    StorageUnavailable,
)


class NoAnswer(Exception):
    """The server could not be reached, did not answer in time, or broke off. The text says which."""


class Refused(Exception):
    """A reply with an error: its code and message, the HTTP status (0: not known), and the region that it names."""

    def __init__(self, code: str, message: str = "", status: int = 0, region: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.message = message
        self.status = status
        self.region = region


class NotS3(Exception):
    """The server's reply is not S3."""


FORBIDDEN = frozenset(
    {
        "AccessDenied",
        "AccessForbidden",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "InvalidToken",
        "NotSignedUp",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnauthorizedAccess",
    }
)
FULL = frozenset(
    {
        "BucketQuotaExceeded",
        "InsufficientCapacity",
        "InsufficientStorage",
        "InsufficientStorageSpace",
        "NoSpaceLeft",
        "QuotaExceeded",
        "ServiceQuotaExceededException",
        "StorageFull",
        "XMinioAdminBucketQuotaExceeded",
        "XMinioStorageFull",
    }
)
BUSY = frozenset(
    {
        "BadDigest",
        "Busy",
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
        "XMinioServerNotInitialized",
    }
)
"""Errors after which a retry may help, also when a body did not match its signature: damaged on its way, or because its
file changed."""
THROTTLING = frozenset(
    {"RequestLimitExceeded", "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "TooManyRequests"}
)
NOT_IMPLEMENTED = frozenset({"NotImplemented", "MethodNotAllowed", "501", "405"})
CHANGED = frozenset({"PreconditionFailed", "412"})
NO_KEY = frozenset({"NoSuchKey", "NoSuchVersion", "NotFound", "404"})
NO_UPLOAD = frozenset({"NoSuchUpload", "404"})
"""Codes of a request on a multipart upload that does not exist."""
OTHER_REGION = frozenset({"PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException", "301", "307"})
BAD_RANGE = frozenset({"InvalidRange", "416"})


def code_of(error: BaseException) -> str:
    """The S3 error code behind a translated error; ``""`` when there is none. HTTP statuses count as codes."""
    found = None if error.__cause__ is None else as_refused(error.__cause__)
    return "" if found is None else found.code


def is_throttling(error: BaseException) -> bool:
    """Whether the server asks for fewer requests."""
    found = as_refused(error)
    return found is not None and (found.code in THROTTLING or found.status == 429)


def as_refused(error: BaseException) -> Refused | None:
    """The refusal that an exception is, also one of botocore's (ClientError); None for other errors."""
    if isinstance(error, Refused):
        return error
    reply = getattr(error, "response", None)
    if not isinstance(reply, dict):
        return None
    told, about = reply.get("Error", {}), reply.get("ResponseMetadata", {})
    region = about.get("HTTPHeaders", {}).get("x-amz-bucket-region", "")
    return Refused(
        str(told.get("Code", "")), str(told.get("Message") or ""), int(about.get("HTTPStatusCode", 0)), region
    )


def translate(error: Exception, what: str, bucket: str, endpoint: str) -> LamfsError:
    """The domain error for an exception of boto3.

    ``what`` was tried, as a verb with its object ("read s3://b/k"). HTTP 412 is ObjectChanged here; writers that set a
    condition turn it into PreconditionFailed.
    """
    found = as_refused(error)
    if found is not None:
        return _from_reply(found, what, bucket, endpoint)
    cause = _short(str(error))
    if isinstance(error, NoAnswer):
        return _no_answer(what, endpoint, cause)
    if isinstance(error, NotS3):
        return _not_s3(what, endpoint, cause)
    return _from_botocore(error, what, endpoint, cause)


def _no_answer(what: str, endpoint: str, cause: str) -> StorageUnavailable:
    return StorageUnavailable(
        f"Cannot {what}: {endpoint} did not answer ({cause}); check that the server runs and the network is up."
    )


def _not_s3(what: str, endpoint: str, cause: str) -> StorageError:
    return StorageError(f"Cannot {what}: {endpoint} does not speak S3 ({cause}); check the endpoint URL.")


def _from_botocore(error: Exception, what: str, endpoint: str, cause: str) -> LamfsError:
    # botocore takes 14 MiB, and may not be needed at all
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    if isinstance(
        error,
        (
            boto.NoCredentialsError,
            boto.PartialCredentialsError,
            boto.CredentialRetrievalError,
            boto.MetadataRetrievalError,
            boto.NoAuthTokenError,
            boto.TokenRetrievalError,
            boto.SSOError,
            boto.LoginError,
            boto.ProfileNotFound,
            boto.ConfigNotFound,
            boto.ConfigParseError,
        ),
    ):
        return StorageForbidden(
            f"Cannot {what}: there are no usable credentials ({cause}); set AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or choose a profile of ~/.aws/credentials."
        )
    if isinstance(
        error,
        (
            boto.ConnectionError,
            boto.HTTPClientError,
            boto.IncompleteReadError,
            boto.ConnectTimeoutError,
            boto.ReadTimeoutError,
        ),
    ):
        return _no_answer(what, endpoint, cause)
    if isinstance(error, ResponseParserError):
        return _not_s3(what, endpoint, cause)
    if isinstance(error, ValueError) and not isinstance(error, boto.BotoCoreError):
        return InvalidArgument(f"Cannot {what}: {cause}; correct the endpoint URL, region or profile.")
    return StorageError(
        f"Cannot {what}: {type(error).__name__}: {cause}; check endpoint URL, region and profile.", errno=errno.EIO
    )


def _from_reply(reply: Refused, what: str, bucket: str, endpoint: str) -> LamfsError:
    code, status = reply.code, reply.status
    cause = _short(": ".join(part for part in (code or f"HTTP {status}", reply.message) if part))
    if code in CHANGED or status == 412:
        return ObjectChanged(f"Cannot {what}: the object is not the revision that was asked for; look it up again.")
    if code == "NoSuchBucket":
        return StorageMissing(
            f"Cannot {what}: the bucket '{bucket}' does not exist at {endpoint}; create it, or correct its name."
        )
    if code in NO_KEY:
        return ObjectMissing(f"Cannot {what}: there is no such object; it was deleted or never stored.")
    if code == "RequestTimeTooSkewed":
        return StorageForbidden(f"Cannot {what}: this machine's clock is wrong ({cause}); set it right.")
    if code in FULL or status == 507:
        return StorageFull(f"Cannot {what}: no space is left at {endpoint} ({cause}); free some, or raise the quota.")
    if code in FORBIDDEN or status in (401, 403):
        return StorageForbidden(
            f"Cannot {what}: the bucket '{bucket}' refuses these credentials ({cause}); check the access key, the"
            " profile and the bucket's policy."
        )
    if code in OTHER_REGION or status in (301, 307):
        region = _short(reply.region)
        return StorageError(
            f"Cannot {what}: the bucket '{bucket}' is in another region{f' ({region})' if region else ''}; give that"
            " region, or its endpoint URL."
        )
    if code == "KeyTooLongError" or status == 414:
        return StorageError(f"Cannot {what}: the key is too long for S3; shorten it.", errno=errno.ENAMETOOLONG)
    if code in BUSY or status in (408, 429) or (status >= 500 and status != 501):
        return StorageUnavailable(f"Cannot {what}: {endpoint} is busy or failing ({cause}); try again later.")
    return StorageError(f"Cannot {what}: {endpoint} refused ({cause}, HTTP {status}); check what the server supports.")


def _short(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 240 else text[:239] + "…"
