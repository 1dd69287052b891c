"""S3 (calls.py) by way of botocore: finds credentials, and does what Direct does not. Thread-safe.

Imported only when it is needed: botocore takes 0.1 s of CPU and 14 MiB. Its dictionaries do not leave this module.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import botocore.session
from botocore.client import BaseClient
from botocore.config import Config

from lamfs.storage.base import ANYTHING, ObjectStat, Over, PartStat, StorageConfig, UnfinishedUpload
from lamfs.storage.meta import NO_HEADERS, PREFIX
from lamfs.storage.s3 import limits
from lamfs.storage.s3.bounded import BoundedSession
from lamfs.storage.s3.calls import (
    Body,
    Content,
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
from lamfs.storage.s3.sign import is_in_the_open
from lamfs.storage.s3.wire import POOL_CONNECTIONS

_models: list[Any] = []
_models_lock = threading.Lock()


class Boto:
    """S3 with the credentials that boto3's chain finds now. Clients are made at the first call."""

    def __init__(self, config: StorageConfig, bucket: str, timeouts: Timeouts) -> None:
        """Raises botocore's errors."""
        self._config = config
        self._bucket = bucket
        self._timeouts = timeouts
        self._lock = threading.Lock()
        self._clients: dict[bool, BaseClient] = {}
        self.session = _new_session(config)

    def keys(self) -> tuple[str, ...] | None:
        """The credentials; None: there are none."""
        found = self.session.get_credentials()
        return None if found is None else tuple(map(str, found.get_frozen_credentials()))

    def client(self, *, patient: bool = False) -> BaseClient:
        """The client. ``patient``: one for requests that the server may work on for minutes."""
        with self._lock:
            client = self._clients.get(patient)
            if client is None:
                client = self._clients[patient] = self._new_client(patient)
            return client

    def head(self, key: str) -> Head:
        said = self._call("head_object", Key=key)
        headers = {name.lower(): str(text) for name, text in said["ResponseMetadata"]["HTTPHeaders"].items()}
        return Head(
            limits.size(said.get("ContentLength")),
            bare(limits.etag(said.get("ETag"))),
            limits.nanoseconds(said.get("LastModified")),
            headers,
        )

    def get(self, key: str, start: int = 0, stop: int | None = None, if_match: str | None = None) -> Content:
        params = _given(IfMatch=None if if_match is None else quoted(if_match))
        if start or stop is not None:
            params["Range"] = range_of(start, stop)
        said = self._call("get_object", Key=key, **params)
        try:
            length = said.get("ContentLength")
            if length is not None:
                limits.size(length)
            etag = bare(limits.etag(said.get("ETag", "")))
        except BaseException:
            said["Body"].close()
            raise
        status = said["ResponseMetadata"]["HTTPStatusCode"]
        return Content(said["Body"], status, etag, length, said.get("ContentRange"))

    def put(self, key: str, body: Body, size: int, headers: Headers = NO_HEADERS, over: Over = ANYTHING) -> str:
        params = {**_properties(headers), **_condition(over)}
        said = self._call("put_object", Key=key, Body=_rewound(body), ContentLength=size, **params)
        return bare(limits.etag(said.get("ETag")))

    def copy(self, key: str, source: str, source_etag: str, headers: Headers = NO_HEADERS) -> str:
        params = _properties(headers) | ({"MetadataDirective": "REPLACE"} if headers else {})
        said = self._call(
            "copy_object", patient=True, Key=key,
            CopySource={"Bucket": self._bucket, "Key": source}, CopySourceIfMatch=quoted(source_etag), **params,
        )  # fmt: skip
        return bare(limits.etag(said.get("CopyObjectResult", {}).get("ETag")))

    def delete(self, key: str) -> None:
        self._call("delete_object", Key=key)

    def delete_many(self, keys: Sequence[str]) -> list[NotDeleted]:
        said = self._call("delete_objects", Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
        return [NotDeleted(one.get("Key", ""), one.get("Code", "")) for one in said.get("Errors", ())]

    def objects(self, prefix: str, after: Marker = (), most: int | None = None) -> Page[ObjectStat]:
        said = self._call(
            "list_objects_v2", Prefix=prefix, **_given(MaxKeys=most), **_onward(after, "ContinuationToken")
        )
        found = [
            ObjectStat(
                one.get("Key", ""),
                limits.size(one.get("Size")),
                bare(limits.etag(one.get("ETag", ""))),
                limits.nanoseconds(one.get("LastModified")),
            )
            for one in said.get("Contents", ())
        ]
        return _page(found, said, "NextContinuationToken")

    def begin(self, key: str, headers: Headers = NO_HEADERS) -> str:
        return limits.upload_id(self._call("create_multipart_upload", Key=key, **_properties(headers)).get("UploadId"))

    def send_part(self, key: str, upload_id: str, number: int, body: Body, size: int) -> str:
        said = self._call(
            "upload_part", Key=key, UploadId=upload_id, PartNumber=number, Body=_rewound(body), ContentLength=size
        )
        return limits.etag(said.get("ETag"))

    def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, start: int, stop: int
    ) -> str:
        said = self._call(
            "upload_part_copy", patient=True, Key=key, UploadId=upload_id, PartNumber=number,
            CopySource={"Bucket": self._bucket, "Key": source}, CopySourceIfMatch=quoted(source_etag),
            CopySourceRange=range_of(start, stop),
        )  # fmt: skip
        return limits.etag(said.get("CopyPartResult", {}).get("ETag"))

    def complete(self, key: str, upload_id: str, etags: Sequence[str], over: Over = ANYTHING) -> str:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        said = self._call(
            "complete_multipart_upload", patient=True, Key=key, UploadId=upload_id,
            MultipartUpload={"Parts": parts}, **_condition(over),
        )  # fmt: skip
        return bare(limits.etag(said.get("ETag")))

    def abort(self, key: str, upload_id: str) -> None:
        self._call("abort_multipart_upload", Key=key, UploadId=upload_id)

    def parts(self, key: str, upload_id: str, after: Marker = ()) -> Page[PartStat]:
        marker = _given(PartNumberMarker=int(after[0]) if after else None)
        said = self._call("list_parts", Key=key, UploadId=upload_id, **marker)
        found = [
            PartStat(
                limits.part_number(one.get("PartNumber", 0)),
                limits.size(one.get("Size")),
                bare(limits.etag(one.get("ETag", ""))),
            )
            for one in said.get("Parts", ())
        ]
        return _page(found, said, "NextPartNumberMarker")

    def uploads(self, prefix: str, after: Marker = ()) -> Page[UnfinishedUpload]:
        said = self._call("list_multipart_uploads", Prefix=prefix, **_onward(after, "KeyMarker", "UploadIdMarker"))
        found = [
            UnfinishedUpload(
                one.get("Key", ""), limits.upload_id(one.get("UploadId")), limits.nanoseconds(one.get("Initiated"))
            )
            for one in said.get("Uploads", ())
        ]
        return _page(found, said, "NextKeyMarker", "NextUploadIdMarker")

    def close(self) -> None:
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def _call(self, operation: str, *, patient: bool = False, **params: Any) -> dict[str, Any]:
        client = self.client(patient=patient)
        said: dict[str, Any] = getattr(client, operation)(Bucket=self._bucket, **params)
        return said

    def _new_client(self, patient: bool) -> BaseClient:
        client = self._made(patient, signed=False)
        if is_in_the_open(str(client.meta.endpoint_url)):
            client.close()
            client = self._made(patient, signed=True)
        return client

    def _made(self, patient: bool, *, signed: bool) -> BaseClient:
        """A new client. ``signed``: it signs the bodies of its requests, too."""
        config = self._config
        client = self.session.create_client(
            "s3",
            region_name=self.session.get_config_variable("region") or "us-east-1",
            endpoint_url=config.endpoint_url,
            config=Config(
                connect_timeout=self._timeouts.connect,
                read_timeout=self._timeouts.patient if patient else self._timeouts.silence,
                retries={"mode": "adaptive", "total_max_attempts": 1},
                max_pool_connections=POOL_CONNECTIONS,
                tcp_keepalive=True,
                s3={"payload_signing_enabled": signed, "addressing_style": "path" if config.path_style else "auto"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                user_agent_extra="lamfs",
            ),
        )
        endpoint: Any = client._endpoint  # type: ignore[attr-defined]  # the only way to its session
        endpoint.http_session = BoundedSession(endpoint.http_session)
        return client


def _new_session(config: StorageConfig) -> botocore.session.Session:
    """A session with the current credentials. Its description of S3 (0.2 s to parse) is shared by the process."""
    core = botocore.session.Session(profile=config.profile)
    with _models_lock:
        if not _models:
            _models.append(core.get_component("data_loader"))
        core.register_component("data_loader", _models[0])
    if config.region:
        core.set_config_variable("region", config.region)
    return core


def _properties(headers: Headers) -> dict[str, Any]:
    """The parameters that store headers with an object: ``content-type`` is ContentType."""
    params: dict[str, Any] = {
        name.title().replace("-", ""): text for name, text in headers.items() if not name.startswith(PREFIX)
    }
    said = {name.removeprefix(PREFIX): text for name, text in headers.items() if name.startswith(PREFIX)}
    return params | _given(Metadata=said or None)


def _condition(over: Over) -> dict[str, Any]:
    """The parameters that make a write conditional."""
    return _given(
        IfNoneMatch="*" if over.if_none_match else None,
        IfMatch=None if over.if_match is None else quoted(over.if_match),
    )


def _given(**params: Any) -> dict[str, Any]:
    """These parameters without those that are None."""
    return {name: value for name, value in params.items() if value is not None}


def _onward(after: Marker, *names: str) -> dict[str, Any]:
    """The parameters of a listing's next page, whose markers have these names."""
    return {name: text for name, text in zip(names, after, strict=False) if text}


def _page(found: Sequence[Any], said: dict[str, Any], *following: str) -> Page[Any]:
    return Page(found, bool(said.get("IsTruncated")), limits.marker(*(said.get(name) for name in following)))


def _rewound(body: Body) -> Body:
    """The body from its beginning: Direct may have read some of it."""
    if not isinstance(body, bytes):
        body.seek(0)
    return body
