"""The connection to a bucket: botocore's clients, one call, and retries. Thread-safe; one per store.

lamfs retries, not botocore, because only here is it known what may be retried and how: a body that was cut short, a
conditional write whose reply was lost, and the total time of one operation. botocore's adaptive mode stays on for its
client-side rate limit after SlowDown.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lamfs.errors import LamfsError, StorageError, StorageForbidden, StorageUnavailable
from lamfs.storage.base import StorageConfig
from lamfs.storage.root import split_s3
from lamfs.storage.s3 import limits
from lamfs.storage.s3.direct import Direct, Elsewhere, find
from lamfs.storage.s3.errors import NOT_IMPLEMENTED, code_of, is_throttling, translate
from lamfs.storage.s3.sign import is_in_the_open
from lamfs.storage.s3.slow import SLOWEST

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from botocore.session import Session

log = logging.getLogger(__name__)

POOL_CONNECTIONS = 64
ATTEMPTS = 8
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
"""Seconds. Each pause is twice the one before: eight attempts take about 11 s when every reply comes at once."""
LOOK_PAUSE = 1.0
"""Seconds between two looks for other credentials while the server refuses the current ones."""
THROTTLED_SECONDS = 60.0
"""Seconds for which requests go through botocore, which limits their rate, after a server asked for fewer."""
PATIENT_SECONDS = 600.0
"""Seconds that a server may be silent while it copies or assembles gigabytes before it replies."""

_NO_META = NOT_IMPLEMENTED | {
    "400", "431", "InvalidArgument", "InvalidMetadata", "InvalidRequest", "InvalidTag", "MetadataTooLarge",
    "RequestHeaderSectionTooLarge", "UnsupportedMetadata", "XMinioMetadataTooLarge",
}  # fmt: skip
"""Error codes of servers that accept no metadata, or not as much."""

T = TypeVar("T")


def bare(etag: str) -> str:
    """An ETag as lamfs keeps it, without quotes and weak mark."""
    return etag.removeprefix("W/").strip('"')


def quoted(etag: str) -> str:
    """An ETag as ``If-Match`` needs it (RFC 9110 §8.8.3)."""
    return f'"{etag}"'


class Patience:
    """Decides how long one operation is retried. Used by one thread.

    It ends after ATTEMPTS tries, or when ``timeout`` seconds have passed since the last progress. The third and later
    tries are not started if, being as long as the one before, they would end after that.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._began = time.monotonic()
        self._count_from(self._began)

    def progressed(self, count: int) -> None:
        """So many bytes have arrived: count the time from here, unless they came too slowly."""
        self._came += count
        now = time.monotonic()
        if self._came >= SLOWEST * (now - self._since):
            self._count_from(now)

    def _count_from(self, now: float) -> None:
        self._since, self._deadline = now, now + self._timeout
        self._came = 0
        self._attempt = 1

    def wait(self, error: StorageUnavailable) -> None:
        """Sleep before the next try, or raise ``error`` when there is none."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._attempt - 1)) * random.uniform(0.5, 1.5)  # noqa: S311
        now = time.monotonic()
        silent = now - max(self._began, self._since) if self._attempt > 1 else 0.0
        if self._attempt >= ATTEMPTS or now + pause + silent >= self._deadline:
            raise error
        log.info("Attempt %d failed, trying again in %.1f s: %s", self._attempt, pause, error)
        self._attempt += 1
        time.sleep(pause)
        self._began = time.monotonic()


class Connection:
    """Calls of the S3 API on one bucket. Clients are made at the first call, from boto3's own credential chain."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.bucket, self.prefix = split_s3(config.root)
        self.endpoint = config.endpoint_url or "Amazon S3"
        self._lock = threading.Lock()
        self._clients: dict[bool, BaseClient] = {}
        self._session: Session | None = None
        """None while botocore is not needed."""
        self._direct: Direct | None = None
        """The short way for frequent calls; None when there is none, ..."""
        self._looked = False
        """... or it was not looked for yet with the present credentials."""
        self._throttled_until = 0.0
        self._takes_meta = True
        self._connect_timeout = min(10.0, config.timeout / 3)
        self._read_timeout = config.timeout * 0.45
        """Seconds: two silent tries fit into the timeout of an operation."""
        self._renewing = threading.Lock()
        self._look_again = 0.0

    def call(self, operation: str, what: str, *, patient: bool = False, **params: Any) -> dict[str, Any]:
        """Call an operation on the bucket, and retry while that can help. ``what``: see errors.translate.

        ``patient``: the server may work for minutes before it replies.
        """
        return self.retrying(lambda: self.once(operation, what, patient=patient, **params), patient=patient)

    def retrying(self, action: Callable[[], T], *, patient: bool = False) -> T:
        """The result of ``action``, repeated while it raises StorageUnavailable and patience lasts."""
        patience = self.patience(patient=patient)
        while True:
            try:
                return action()
            except StorageUnavailable as error:
                patience.wait(error)

    def saying(self, said: dict[str, Any], action: Callable[[dict[str, Any]], T]) -> T:
        """The result of ``action`` with the parameters ``said``: an object's metadata.

        Without them if the server accepts no metadata: the bytes are stored all the same.
        """
        if not said or not self._takes_meta:
            return action({})
        try:
            return action(said)
        except StorageError as error:
            if code_of(error) not in _NO_META:
                raise
            result = action({})
            self._takes_meta = False
            log.warning("%s takes no metadata, so objects do not say what they are: %s", self.endpoint, error)
            return result

    def patience(self, *, patient: bool = False) -> Patience:
        """A new count of tries."""
        return Patience(max(self.config.timeout, PATIENT_SECONDS) if patient else self.config.timeout)

    def once(self, operation: str, what: str, *, patient: bool = False, **params: Any) -> dict[str, Any]:
        """One request. Raises domain errors only, with botocore's as the cause.

        Raises StorageUnavailable (try again) when the credentials were refused and there are other ones by now.
        """
        session: Session | None = None
        result: dict[str, Any] | None = None
        try:
            direct, session = self._way()
            if direct is not None and direct.supports(operation, params) and not self._throttled():
                try:
                    result = direct.call(operation, params, PATIENT_SECONDS / 2 if patient else self._read_timeout)
                except Elsewhere:
                    self._leave(direct)
                    if not isinstance(params.get("Body", b""), bytes):
                        params["Body"].seek(0)
            if result is None:
                client, session = self._client(patient)
                result = getattr(client, operation)(Bucket=self.bucket, **params)
            assert result is not None
            _check(operation, result)
        except LamfsError:
            raise
        except Exception as error:
            known = self.translated(error, what)
            if is_throttling(error):
                self._throttled_until = time.monotonic() + THROTTLED_SECONDS
            if session is not None and _is_refusal(error, known) and self._renewed(session):
                raise StorageUnavailable(f"{known} There are other credentials now.") from error
            raise known from error
        return result

    def _throttled(self) -> bool:
        """Whether the server asked for fewer requests a short time ago: then botocore limits their rate."""
        return time.monotonic() < self._throttled_until

    def _leave(self, direct: Direct) -> None:
        """The direct way does not work: do not use it any more."""
        with self._lock:
            if self._direct is direct:
                self._direct = None
        direct.close()
        log.info("Requests to s3://%s go by way of botocore.", self.bucket)

    def translated(self, error: Exception, what: str) -> LamfsError:
        """The domain error for an exception of boto3, also for one that came while a body was read."""
        return translate(error, what, self.bucket, self.endpoint)

    def prepare(self) -> None:
        """Find credentials and the way to the bucket. The first call reports what goes wrong."""
        with contextlib.suppress(Exception):
            self._way()

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            clients, self._clients = self._clients, {}
            direct, self._direct = self._direct, None
        for client in clients.values():
            client.close()
        if direct is not None:
            direct.close()

    def _way(self) -> tuple[Direct | None, Session | None]:
        with self._lock:
            if not self._looked:
                self._direct = find(
                    self.config,
                    self.bucket,
                    self._made_session,
                    lambda: self._made_client(self._made_session(), False),
                    connect_timeout=self._connect_timeout,
                    keep=POOL_CONNECTIONS,
                )
                self._looked = True
            return self._direct, self._session

    def _made_session(self) -> Session:
        if self._session is None:
            self._session = _new_session(self.config)
        return self._session

    def _client(self, patient: bool) -> tuple[BaseClient, Session]:
        with self._lock:
            session = self._made_session()
            return self._made_client(session, patient), session

    def _made_client(self, session: Session, patient: bool) -> BaseClient:
        client = self._clients.get(patient)
        if client is None:
            client = self._clients[patient] = self._make_client(session, patient)
        return client

    def _renewed(self, session: Session) -> bool:
        """The server refuses the credentials of ``session``: whether boto3's chain has others now, to be used from here
        on.

        boto3 itself reads a settings file once. Keys in it may expire, and be replaced.
        """
        with self._renewing:
            with self._lock:
                if session is not self._session:
                    return True  # another thread has found them
            if time.monotonic() < self._look_again:
                return False
            try:
                fresh = _new_session(self.config)
                if _keys(fresh) == _keys(session):
                    return False
            except Exception as error:
                log.info("There are no other credentials: %s", error)
                return False
            finally:
                self._look_again = time.monotonic() + LOOK_PAUSE
            with self._lock:
                # The old clients may be in use by other threads.
                self._session, self._clients = fresh, {}
                direct, self._direct, self._looked = self._direct, None, False
            if direct is not None:
                direct.close()
        log.info("The credentials for s3://%s were refused; using the new ones.", self.bucket)
        return True

    def _make_client(self, session: Session, patient: bool) -> BaseClient:
        client = self._new_client(session, patient, signed=False)
        if is_in_the_open(str(client.meta.endpoint_url)):
            client.close()
            client = self._new_client(session, patient, signed=True)
        return client

    def _new_client(self, session: Session, patient: bool, *, signed: bool) -> BaseClient:
        """A new client. ``signed``: also what signs its requests."""
        from botocore.config import Config

        from lamfs.storage.s3.bounded import BoundedSession

        config = self.config
        client = session.create_client(
            "s3",
            region_name=session.get_config_variable("region") or "us-east-1",
            endpoint_url=config.endpoint_url,
            config=Config(
                connect_timeout=self._connect_timeout,
                read_timeout=PATIENT_SECONDS / 2 if patient else self._read_timeout,
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


def _check(operation: str, result: dict[str, Any]) -> None:
    """Raises NotS3 when a reply is impossible in S3. Closes its body then."""
    try:
        limits.check(operation, result)
    except BaseException:
        if "Body" in result:
            result["Body"].close()
        raise


def _is_refusal(error: Exception, known: LamfsError) -> bool:
    """Whether the server may have refused the credentials. A reply to HEAD has no body that would say so.

    Amazon's reply to an expired token is a bare 400.
    """
    reply = getattr(error, "response", None) or {}
    return isinstance(known, StorageForbidden) or reply.get("Error", {}).get("Code") == "400"


def _keys(session: Session) -> tuple[str, ...] | None:
    found = session.get_credentials()
    return None if found is None else tuple(map(str, found.get_frozen_credentials()))


_models: list[Any] = []
_models_lock = threading.Lock()


def _new_session(config: StorageConfig) -> Session:
    """A session with the current credentials. Its description of S3 (0.2 s to parse) is shared by the process."""
    import botocore.session

    core = botocore.session.Session(profile=config.profile)
    with _models_lock:
        if not _models:
            _models.append(core.get_component("data_loader"))
        core.register_component("data_loader", _models[0])
    if config.region:
        core.set_config_variable("region", config.region)
    return core
