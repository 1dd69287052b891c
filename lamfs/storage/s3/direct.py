"""The requests that a mount sends by the thousand, without botocore, for a quarter of the CPU. Thread-safe.

botocore still finds and renews the credentials, and says once per client where the bucket is and how requests are
signed. What is not simple (proxies, access points, S3 Express, a wrong region) is left to it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import ssl
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lamfs.storage.meta import PREFIX
from lamfs.storage.s3 import replies
from lamfs.storage.s3.errors import ERROR_BYTES, NotS3, Refused, refusal
from lamfs.storage.s3.sign import (
    EMPTY,
    UNSIGNED,
    Credentials,
    Signer,
    digest_of,
    environment_keys,
    is_in_the_open,
    quoted_path,
    quoted_query,
)
from lamfs.storage.s3.wire import Reply, Wire
from lamfs.storage.s3.xmltext import MAX_BYTES

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest
    from botocore.client import BaseClient
    from botocore.session import Session

    from lamfs.model import StorageConfig

_METHODS = {
    "get_object": "GET",
    "head_object": "HEAD",
    "put_object": "PUT",
    "delete_object": "DELETE",
    "delete_objects": "POST",
    "copy_object": "PUT",
    "list_objects_v2": "GET",
    "create_multipart_upload": "POST",
    "upload_part": "PUT",
    "upload_part_copy": "PUT",
    "complete_multipart_upload": "POST",
    "abort_multipart_upload": "DELETE",
    "list_multipart_uploads": "GET",
    "list_parts": "GET",
}
_SAID_IN_XML = frozenset(
    {
        "copy_object",
        "list_objects_v2",
        "delete_objects",
        "create_multipart_upload",
        "upload_part_copy",
        "complete_multipart_upload",
        "list_multipart_uploads",
        "list_parts",
    }
)
_HEADERS = {
    "Range": "range",
    "IfMatch": "if-match",
    "IfNoneMatch": "if-none-match",
    "CopySourceIfMatch": "x-amz-copy-source-if-match",
    "CopySourceRange": "x-amz-copy-source-range",
    "MetadataDirective": "x-amz-metadata-directive",
    "ContentType": "content-type",
    "CacheControl": "cache-control",
    "ContentDisposition": "content-disposition",
    "ContentEncoding": "content-encoding",
    "ContentLanguage": "content-language",
}
_QUERY = {
    "PartNumber": "partNumber",
    "UploadId": "uploadId",
    "Prefix": "prefix",
    "MaxKeys": "max-keys",
    "ContinuationToken": "continuation-token",
    "KeyMarker": "key-marker",
    "UploadIdMarker": "upload-id-marker",
    "PartNumberMarker": "part-number-marker",
}
_ALWAYS = {
    "list_objects_v2": {"list-type": "2", "encoding-type": "url"},
    "delete_objects": {"delete": ""},
    "create_multipart_upload": {"uploads": ""},
    "list_multipart_uploads": {"uploads": ""},
}
_KNOWN = frozenset(
    {"Key", "Body", "ContentLength", "CopySource", "MultipartUpload", "Delete", "Metadata", *_HEADERS, *_QUERY}
)
_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*/\d{8}/([^/,]+)/s3/aws4_request,")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/?")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_REGION = re.compile(r"(?!aws-|fips-)[a-z0-9-]+(?<!-fips)")
_PROBE = "lamfs"


class Elsewhere(Exception):
    """The server sends the request to another region or endpoint. botocore can follow."""


class Direct:
    """These calls on one bucket, with the parameters and results of boto3's client."""

    def __init__(self, wire: Wire, host: str, path: str, signer: Signer, *, signs_bodies: bool) -> None:
        """``signs_bodies``: nothing else protects them on their way."""
        self._signs_bodies = signs_bodies
        self._wire = wire
        self._host = host
        self._path = path
        self._signer = signer

    def supports(self, operation: str, params: dict[str, Any]) -> bool:
        """Whether this is one of the calls."""
        return operation in _METHODS and params.keys() <= _KNOWN

    def call(self, operation: str, params: dict[str, Any], timeout: float) -> dict[str, Any]:
        """One request; ``timeout``: seconds of silence that are allowed. Raises NoAnswer, Elsewhere, Refused, NotS3,
        and botocore's errors of credentials."""
        method = _METHODS[operation]
        if not params.get("Key", "*"):
            raise ValueError("an object without a key would be the bucket")
        # In path style a bucket's own URL ends without a slash, in host style with one.
        path = self._path + quoted_path(params["Key"]) if "Key" in params else self._path.rstrip("/") or "/"
        told = {name: str(params[key]) for key, name in _QUERY.items() if key in params}
        query = quoted_query({**_ALWAYS.get(operation, {}), **told})
        headers = {name: params[key] for key, name in _HEADERS.items() if key in params}
        headers.update({PREFIX + name: text for name, text in params.get("Metadata", {}).items()})
        headers["host"] = self._host
        if "CopySource" in params:
            headers["x-amz-copy-source"] = quoted_path("{Bucket}/{Key}".format_map(params["CopySource"]))
        body = params.get("Body")
        if "MultipartUpload" in params:
            body = replies.completion(params["MultipartUpload"]["Parts"])
        if "Delete" in params:
            body = replies.deletion(params["Delete"]["Objects"])
            # Amazon S3 requires a checksum; every server knows this one.
            headers["content-md5"] = base64.b64encode(hashlib.md5(body).digest()).decode()
        payload = EMPTY
        if body is not None:
            payload = digest_of(body) if self._signs_bodies else UNSIGNED
        self._signer.sign(method, path, query, headers, payload)
        headers["accept-encoding"] = "identity"
        headers["user-agent"] = "lamfs"
        if method in ("PUT", "POST"):
            headers["content-length"] = str(params.get("ContentLength", len(body) if isinstance(body, bytes) else 0))
        reply = self._wire.request(method, f"{path}?{query}" if query else path, headers, body, timeout)
        with contextlib.ExitStack() as ended:
            ended.callback(reply.close)
            if reply.status < 300 and method == "GET" and operation not in _SAID_IN_XML:
                result = _result(operation, reply)
                ended.pop_all()
                return {**result, "Body": reply}
            if reply.status >= 300:
                error = refusal(reply.status, reply.headers, reply.whole(ERROR_BYTES))
                raise Elsewhere if _is_elsewhere(reply, error, self._signer.region) else error
            text = reply.whole(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise NotS3("its answer does not end")
            if operation not in _SAID_IN_XML:
                return _result(operation, reply)
            said = replies.result(operation, text)
            if said is None:
                raise refusal(500, reply.headers, text)
            return said

    def close(self) -> None:
        """Close idle connections now, and the others when they are not in use any more."""
        self._wire.close()


def _is_elsewhere(reply: Reply, error: Refused, region: str) -> bool:
    return (
        reply.status < 400
        or reply.headers.get("x-amz-bucket-region", region) != region
        or error.response["Error"].get("Code") in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
    )


def _result(operation: str, reply: Reply) -> dict[str, Any]:
    found = reply.headers
    result: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": reply.status, "HTTPHeaders": found}}
    if "etag" in found:
        result["ETag"] = found["etag"]
    if "content-range" in found:
        result["ContentRange"] = found["content-range"]
    if "content-length" in found:
        result["ContentLength"] = int(found["content-length"])
    if operation == "head_object" and "last-modified" in found:
        try:
            result["LastModified"] = parsedate_to_datetime(found["last-modified"])
        except (ValueError, OverflowError, TypeError, IndexError) as error:
            raise NotS3(f"its answer is of no date: {error}") from error
    return result


class _Prepared(Exception):
    """Ends a call of botocore at the moment when its request would be sent."""

    def __init__(self, request: AWSPreparedRequest) -> None:
        self.request = request


def find(
    config: StorageConfig,
    bucket: str,
    session: Callable[[], Session],
    client: Callable[[], BaseClient],
    *,
    connect_timeout: float,
    keep: int,
) -> Direct | None:
    """The direct way to where ``client()`` sends its requests; None if there is none. Nobody else uses that client yet.

    botocore is asked only for what the configuration and the environment do not say: importing it takes 0.1 s of CPU
    and 14 MiB, making a client as much again. ``connect_timeout`` (seconds), ``keep``: see Wire. Raises botocore's
    errors.
    """
    credentials: Credentials | None = environment_keys(config)
    place = trusted = None
    if credentials is not None:
        place = _told(config, bucket, config.region or os.environ.get("AWS_DEFAULT_REGION"))
    if credentials is None or place is None:
        found = session()
        credentials = found.get_credentials()
        if credentials is None:
            return None
        trusted = found.get_config_variable("ca_bundle")
        if "s3" not in found.get_scoped_config():
            place = _told(config, bucket, found.get_config_variable("region"))
        place = place or _learnt(client(), bucket)
    if place is None or _is_proxied(place[0]):
        return None
    where = urlsplit(place[0])
    assert where.hostname is not None
    secure = where.scheme == "https"
    wire = Wire(
        where.hostname,
        where.port or (443 if secure else 80),
        context=_tls(trusted) if secure else None,
        connect_timeout=connect_timeout,
        keep=keep,
    )
    signer = Signer(credentials, place[1])
    return Direct(wire, where.netloc, where.path, signer, signs_bodies=is_in_the_open(place[0]))


def _told(config: StorageConfig, bucket: str, region: str | None) -> tuple[str, str] | None:
    """URL of the bucket, with a slash at its end, and the region, if the configuration has both."""
    url = config.endpoint_url
    region = region or "us-east-1"
    if url is None or not config.path_style or not _ENDPOINT.fullmatch(url):
        return None
    if not _BUCKET.fullmatch(bucket) or "--" in bucket or not _REGION.fullmatch(region):
        return None
    return f"{url.rstrip('/')}/{bucket}/", region


def _is_proxied(url: str) -> bool:
    if not any(value and name.lower().endswith("_proxy") for name, value in os.environ.items()):
        return False
    from botocore.utils import get_environ_proxies

    return bool(get_environ_proxies(url))


def _learnt(client: Any, bucket: str) -> tuple[str, str] | None:
    """The same, from a request as botocore would send it; None when it is not signed as usual."""
    request = _prepared(client, bucket)
    scope = _SCOPE.match(_text(request.headers.get("Authorization", "")))
    where = urlsplit(str(request.url))
    if scope is None or where.hostname is None or where.query or not where.path.endswith(f"/{_PROBE}"):
        return None
    return str(request.url).removesuffix(_PROBE), scope[1]


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _prepared(client: Any, bucket: str) -> AWSPreparedRequest:
    """A request as botocore would send it."""

    def caught(request: AWSPreparedRequest, **_: Any) -> None:
        raise _Prepared(request)

    events = client.meta.events
    events.register_first("before-send.s3.HeadObject", caught)
    try:
        client.head_object(Bucket=bucket, Key=_PROBE)
    except _Prepared as prepared:
        return prepared.request
    finally:
        events.unregister("before-send.s3.HeadObject", caught)
    raise AssertionError("botocore has sent the request")


def _tls(trusted: str | None) -> ssl.SSLContext:
    """A TLS context that trusts whom botocore trusts. ``trusted``: the settings' certificates."""
    trusted = trusted or os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
    if not trusted:
        from botocore.httpsession import get_cert_path

        trusted = str(get_cert_path(True))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if os.path.isdir(trusted):
        context.load_verify_locations(capath=trusted)
    else:
        context.load_verify_locations(cafile=trusted)
    return context
