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
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from lamfs.storage.base import ANYTHING, ObjectStat, Over, PartStat, UnfinishedUpload
from lamfs.storage.meta import NO_HEADERS
from lamfs.storage.s3 import limits, replies
from lamfs.storage.s3.calls import (
    Body,
    Content,
    Elsewhere,
    Head,
    Headers,
    Marker,
    NotDeleted,
    Page,
    Timeouts,
    bare,
    quoted,
    range_of,
)
from lamfs.storage.s3.errors import NotS3, Refused
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
from lamfs.storage.s3.wire import POOL_CONNECTIONS, Reply, Wire
from lamfs.storage.s3.xmltext import MAX_BYTES

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest

    from lamfs.model import StorageConfig
    from lamfs.storage.s3.boto import Boto

_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*/\d{8}/([^/,]+)/s3/aws4_request,")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/?")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_REGION = re.compile(r"(?!aws-|fips-)[a-z0-9-]+(?<!-fips)")
_PROBE = "lamfs"


class _Request(NamedTuple):
    """One HTTP request. ``key``: None for the bucket. ``size``: bytes of a body that is not in memory. ``patient``: the
    server may work for minutes before it replies."""

    method: str
    key: str | None
    query: Mapping[str, str] = NO_HEADERS
    headers: Headers = NO_HEADERS
    body: Body | None = None
    size: int = 0
    patient: bool = False


class Direct:
    """S3 (calls.py) over connections of our own."""

    def __init__(
        self,
        bucket: str,
        wire: Wire,
        host: str,
        path: str,
        signer: Signer,
        *,
        signs_bodies: bool,
        timeouts: Timeouts,
    ) -> None:
        """``signs_bodies``: nothing else protects them on their way."""
        self._bucket = bucket
        self._signs_bodies = signs_bodies
        self._wire = wire
        self._host = host
        self._path = path
        self._signer = signer
        self._timeouts = timeouts

    def head(self, key: str) -> Head:
        found, _ = self._whole(_Request("HEAD", key))
        try:
            said = found.get("last-modified")
            moment = None if said is None else parsedate_to_datetime(said)
        except (ValueError, OverflowError, TypeError, IndexError) as error:
            raise NotS3(f"its answer has an impossible date: {error}") from error
        return Head(
            limits.size(_length(found)), bare(limits.etag(found.get("etag"))), limits.nanoseconds(moment), found
        )

    def get(self, key: str, start: int = 0, stop: int | None = None, if_match: str | None = None) -> Content:
        headers = {}
        if start or stop is not None:
            headers["range"] = range_of(start, stop)
        if if_match is not None:
            headers["if-match"] = quoted(if_match)
        reply = self._ask(_Request("GET", key, headers=headers))
        found = reply.headers
        try:
            length = _length(found)
            if length is not None:
                limits.size(length)
            etag = bare(limits.etag(found.get("etag", "")))
        except BaseException:
            reply.close()
            raise
        return Content(reply, reply.status, etag, length, found.get("content-range"))

    def put(self, key: str, body: Body, size: int, headers: Headers = NO_HEADERS, over: Over = ANYTHING) -> str:
        told = {**headers, **_condition(over)}
        found, _ = self._whole(_Request("PUT", key, headers=told, body=body, size=size))
        return bare(limits.etag(found.get("etag")))

    def copy(self, key: str, source: str, source_etag: str, headers: Headers = NO_HEADERS) -> str:
        told = {**headers, **self._source(source, source_etag)}
        if headers:
            told["x-amz-metadata-directive"] = "REPLACE"
        return bare(replies.etag(self._said(_Request("PUT", key, headers=told, patient=True))))

    def delete(self, key: str) -> None:
        self._whole(_Request("DELETE", key))

    def delete_many(self, keys: Sequence[str]) -> list[NotDeleted]:
        body = replies.deletion(keys)
        # Amazon S3 requires a checksum; every server knows this one.
        headers = {"content-md5": base64.b64encode(hashlib.md5(body).digest()).decode()}
        return replies.not_deleted(self._said(_Request("POST", None, {"delete": ""}, headers, body)))

    def objects(self, prefix: str, after: Marker = (), most: int | None = None) -> Page[ObjectStat]:
        query = {"list-type": "2", "encoding-type": "url", "prefix": prefix, **_onward(after, "continuation-token")}
        if most is not None:
            query["max-keys"] = str(most)
        return replies.objects(self._said(_Request("GET", None, query)))

    def begin(self, key: str, headers: Headers = NO_HEADERS) -> str:
        return replies.upload_id(self._said(_Request("POST", key, {"uploads": ""}, headers)))

    def send_part(self, key: str, upload_id: str, number: int, body: Body, size: int) -> str:
        query = {"partNumber": str(number), "uploadId": upload_id}
        found, _ = self._whole(_Request("PUT", key, query, body=body, size=size))
        return limits.etag(found.get("etag"))

    def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, start: int, stop: int
    ) -> str:
        query = {"partNumber": str(number), "uploadId": upload_id}
        headers = {**self._source(source, source_etag), "x-amz-copy-source-range": range_of(start, stop)}
        return replies.etag(self._said(_Request("PUT", key, query, headers, patient=True)))

    def complete(self, key: str, upload_id: str, etags: Sequence[str], over: Over = ANYTHING) -> str:
        query, body = {"uploadId": upload_id}, replies.completion(etags)
        return bare(replies.etag(self._said(_Request("POST", key, query, _condition(over), body, patient=True))))

    def abort(self, key: str, upload_id: str) -> None:
        self._whole(_Request("DELETE", key, {"uploadId": upload_id}))

    def parts(self, key: str, upload_id: str, after: Marker = ()) -> Page[PartStat]:
        query = {"uploadId": upload_id, **_onward(after, "part-number-marker")}
        return replies.parts(self._said(_Request("GET", key, query)))

    def uploads(self, prefix: str, after: Marker = ()) -> Page[UnfinishedUpload]:
        query = {"uploads": "", "prefix": prefix, **_onward(after, "key-marker", "upload-id-marker")}
        return replies.uploads(self._said(_Request("GET", None, query)))

    def close(self) -> None:
        self._wire.close()

    def _source(self, key: str, etag: str) -> dict[str, str]:
        """The headers that name an object to be copied."""
        return {
            "x-amz-copy-source": quoted_path(f"{self._bucket}/{key}"),
            "x-amz-copy-source-if-match": quoted(etag),
        }

    def _said(self, request: _Request) -> bytes:
        """The body of the reply to a request."""
        return self._whole(request)[1]

    def _whole(self, request: _Request) -> tuple[Headers, bytes]:
        """Headers and body of the reply to a request. Raises as _ask."""
        with contextlib.closing(self._ask(request)) as reply:
            text = reply.whole(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise NotS3("its answer does not end")
            return reply.headers, text

    def _ask(self, request: _Request) -> Reply:
        """The reply to a request; the caller reads or closes it.

        Raises NoAnswer, Elsewhere, Refused, NotS3, and botocore's errors of credentials.
        """
        method, key, query, given, body, size, patient = request
        if key is None:
            # In path style a bucket's own URL ends without a slash, in host style with one.
            path = self._path.rstrip("/") or "/"
        elif key:
            path = self._path + quoted_path(key)
        else:
            raise ValueError("an object without a key would be the bucket")
        line = quoted_query(query)
        headers = {**given, "host": self._host}
        payload = EMPTY
        if body is not None:
            payload = digest_of(body) if self._signs_bodies else UNSIGNED
        self._signer.sign(method, path, line, headers, payload)
        headers["accept-encoding"] = "identity"
        headers["user-agent"] = "lamfs"
        if method in ("PUT", "POST"):
            headers["content-length"] = str(len(body) if isinstance(body, bytes) else size)
        timeout = self._timeouts.patient if patient else self._timeouts.silence
        reply = self._wire.request(method, f"{path}?{line}" if line else path, headers, body, timeout)
        if reply.status < 300:
            return reply
        with contextlib.closing(reply):
            error = replies.refusal(reply.status, reply.headers, reply.whole(replies.ERROR_BYTES))
        raise Elsewhere if _is_elsewhere(reply.status, error, self._signer.region) else error


def _is_elsewhere(status: int, error: Refused, region: str) -> bool:
    return (
        status < 400
        or error.region not in ("", region)
        or error.code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
    )


def _length(headers: Headers) -> int | None:
    text = headers.get("content-length")
    return None if text is None else int(text)


def _condition(over: Over) -> dict[str, str]:
    """The headers that make a write conditional."""
    found = {"if-none-match": "*"} if over.if_none_match else {}
    if over.if_match is not None:
        found["if-match"] = quoted(over.if_match)
    return found


def _onward(after: Marker, *names: str) -> dict[str, str]:
    """The query of a listing's next page, whose markers have these names."""
    return {name: text for name, text in zip(names, after, strict=False) if text}


class _Prepared(Exception):
    """Ends a call of botocore at the moment when its request would be sent."""

    def __init__(self, request: AWSPreparedRequest) -> None:
        self.request = request


def find(config: StorageConfig, bucket: str, boto: Callable[[], Boto], timeouts: Timeouts) -> Direct | None:
    """The direct way to where ``boto()`` sends its requests; None if there is none. Nobody else uses that yet.

    botocore is asked only for what the configuration and the environment do not say: importing it takes 0.1 s of CPU
    and 14 MiB, making a client as much again. Raises botocore's errors.
    """
    credentials: Credentials | None = environment_keys(config)
    place = trusted = None
    if credentials is not None:
        place = _told(config, bucket, config.region or os.environ.get("AWS_DEFAULT_REGION"))
    if credentials is None or place is None:
        found = boto().session
        credentials = found.get_credentials()
        if credentials is None:
            return None
        trusted = found.get_config_variable("ca_bundle")
        if "s3" not in found.get_scoped_config():
            place = _told(config, bucket, found.get_config_variable("region"))
        place = place or _learnt(boto().client(), bucket)
    if place is None or _is_proxied(place[0]):
        return None
    where = urlsplit(place[0])
    assert where.hostname is not None
    secure = where.scheme == "https"
    wire = Wire(
        where.hostname,
        where.port or (443 if secure else 80),
        context=_tls(trusted) if secure else None,
        connect_timeout=timeouts.connect,
        keep=POOL_CONNECTIONS,
    )
    signer = Signer(credentials, place[1])
    signs_bodies = is_in_the_open(place[0])
    return Direct(bucket, wire, where.netloc, where.path, signer, signs_bodies=signs_bodies, timeouts=timeouts)


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
