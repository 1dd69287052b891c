"""The connection to a bucket: which of the two ways a request takes, and retries. Thread-safe; one per store.

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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from lamfs.errors import LamfsError, StorageError, StorageForbidden, StorageUnavailable
from lamfs.storage.base import StorageConfig
from lamfs.storage.meta import NO_HEADERS
from lamfs.storage.root import split_s3
from lamfs.storage.s3.calls import S3, Elsewhere, Headers, Marker, Page, Timeouts
from lamfs.storage.s3.errors import NOT_IMPLEMENTED, as_refused, code_of, is_throttling, translate
from lamfs.storage.s3.limits import SLOWEST
from lamfs.storage.s3.paging import entries

if TYPE_CHECKING:
    from lamfs.storage.s3.boto import Boto
    from lamfs.storage.s3.direct import Direct

log = logging.getLogger(__name__)

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
    """The S3 API on one bucket, with retries. Credentials and the way there are found at the first call."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.bucket, self.prefix = split_s3(config.root)
        self.endpoint = config.endpoint_url or "Amazon S3"
        self._lock = threading.Lock()
        self._boto: Boto | None = None
        """None while botocore is not needed."""
        self._direct: Direct | None = None
        """The short way; None when there is none, ..."""
        self._looked = False
        """... or it was not looked for yet with the present credentials."""
        self._throttled_until = 0.0
        self._takes_meta = True
        # two silent tries fit into the timeout of an operation
        self._timeouts = Timeouts(min(10.0, config.timeout / 3), config.timeout * 0.45, PATIENT_SECONDS / 2)
        self._renewing = threading.Lock()
        self._look_again = 0.0

    def call(self, action: Callable[[S3], T], what: str, *, patient: bool = False) -> T:
        """What ``action`` gets from S3. It is repeated while that can help. ``what``: see errors.translate.

        ``patient``: the server may work for minutes before it replies.
        """
        return self.retrying(lambda: self.once(action, what), patient=patient)

    def entries(self, page: Callable[[S3, Marker], Page[T]], what: str) -> Iterator[T]:
        """Every entry of a listing, which ``page`` asks for page by page. ``what``: see errors.translate."""
        return entries(lambda after: self.call(lambda s3: page(s3, after), what), what, self.endpoint)

    def retrying(self, action: Callable[[], T], *, patient: bool = False) -> T:
        """The result of ``action``, repeated while it raises StorageUnavailable and patience lasts."""
        patience = self.patience(patient=patient)
        while True:
            try:
                return action()
            except StorageUnavailable as error:
                patience.wait(error)

    def saying(self, headers: Headers, action: Callable[[Headers], T]) -> T:
        """The result of ``action`` with ``headers``: an object's metadata.

        Without them if the server accepts no metadata: the bytes are stored all the same.
        """
        if not headers or not self._takes_meta:
            return action(NO_HEADERS)
        try:
            return action(headers)
        except StorageError as error:
            if code_of(error) not in _NO_META:
                raise
            result = action(NO_HEADERS)
            self._takes_meta = False
            log.warning("%s takes no metadata, so objects do not say what they are: %s", self.endpoint, error)
            return result

    def patience(self, *, patient: bool = False) -> Patience:
        """A new count of tries."""
        return Patience(max(self.config.timeout, PATIENT_SECONDS) if patient else self.config.timeout)

    def once(self, action: Callable[[S3], T], what: str) -> T:
        """One request. Raises domain errors only, with the original one as the cause.

        ``action`` is called again, with botocore, when the server sends the request elsewhere. Raises
        StorageUnavailable (try again) when the credentials were refused and there are other ones by now.
        """
        boto: Boto | None = None
        try:
            direct, boto = self._way()
            if direct is not None and not self._throttled():
                try:
                    return action(direct)
                except Elsewhere:
                    self._leave(direct)
            with self._lock:
                boto = self._made_boto()
            return action(boto)
        except LamfsError:
            raise
        except Exception as error:
            known = self.translated(error, what)
            if is_throttling(error):
                self._throttled_until = time.monotonic() + THROTTLED_SECONDS
            if boto is not None and _is_refusal(error, known) and self._renewed(boto):
                raise StorageUnavailable(f"{known} There are other credentials now.") from error
            raise known from error

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
            boto, direct, self._direct = self._boto, self._direct, None
        for each in (boto, direct):
            if each is not None:
                each.close()

    def _way(self) -> tuple[Direct | None, Boto | None]:
        with self._lock:
            if not self._looked:
                from lamfs.storage.s3.direct import find

                self._direct = find(self.config, self.bucket, self._made_boto, self._timeouts)
                self._looked = True
            return self._direct, self._boto

    def _made_boto(self) -> Boto:
        if self._boto is None:
            self._boto = self._new_boto()
        return self._boto

    def _new_boto(self) -> Boto:
        from lamfs.storage.s3.boto import Boto

        return Boto(self.config, self.bucket, self._timeouts)

    def _renewed(self, refused: Boto) -> bool:
        """Whether boto3's chain has other credentials now than those that the server refused, to be used from here on.

        boto3 itself reads a settings file once. Keys in it may expire, and be replaced.
        """
        with self._renewing:
            with self._lock:
                if refused is not self._boto:
                    return True  # another thread has found them
            if time.monotonic() < self._look_again:
                return False
            try:
                fresh = self._new_boto()
                if fresh.keys() == refused.keys():
                    return False
            except Exception as error:
                log.info("There are no other credentials: %s", error)
                return False
            finally:
                self._look_again = time.monotonic() + LOOK_PAUSE
            with self._lock:
                self._boto = fresh  # other threads may still use the old one
                direct, self._direct, self._looked = self._direct, None, False
            if direct is not None:
                direct.close()
        log.info("The credentials for s3://%s were refused; using the new ones.", self.bucket)
        return True


def _is_refusal(error: Exception, known: LamfsError) -> bool:
    """Whether the server may have refused the credentials. A reply to HEAD has no body that would say so.

    Amazon's reply to an expired token is a bare 400.
    """
    found = as_refused(error)
    return isinstance(known, StorageForbidden) or (found is not None and found.code == "400")
