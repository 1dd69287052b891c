"""AWS Signature Version 4 in headers ("Signature Calculations for the Authorization Header" of the S3 API reference).

botocore finds and renews the credentials. Here requests are signed with them; the day's key is cached. Thread-safe.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self
from urllib.parse import quote, urlsplit

from lamfs.model import StorageConfig
from lamfs.storage.s3.calls import Body

UNSIGNED = "UNSIGNED-PAYLOAD"
EMPTY = hashlib.sha256().hexdigest()
"""The payload hash of a request without a body."""
_LOOPBACK = re.compile(r"127(\.[0-9]{1,3}){3}|localhost|::1")


def is_in_the_open(url: str) -> bool:
    """Whether requests to a URL cross a network without TLS, where others could change an unsigned body."""
    where = urlsplit(url)
    return where.scheme == "http" and not _LOOPBACK.fullmatch(where.hostname or "")


def quoted_path(path: str) -> str:
    """A key as it is written in a URL and signed."""
    return quote(path, safe="/~")


def quoted_query(params: Mapping[str, str]) -> str:
    """A query string as it is sent and signed."""
    return "&".join(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in sorted(params.items()))


class Keys(Protocol):
    """Credentials at one moment."""

    @property
    def access_key(self) -> str | None:
        """Identifies their owner."""

    @property
    def secret_key(self) -> str | None:
        """The signing secret."""

    @property
    def token(self) -> str | None:
        """The session token of temporary credentials; else None."""


class Credentials(Protocol):
    """botocore's credentials, which it renews before they expire."""

    def get_frozen_credentials(self) -> Keys:
        """The current ones. Raises botocore's errors."""


@dataclass(frozen=True)
class EnvironmentKeys:
    """Credentials from the environment, which do not change."""

    access_key: str
    secret_key: str
    token: str | None

    def get_frozen_credentials(self) -> Self:
        """These."""
        return self


def environment_keys(config: StorageConfig) -> EnvironmentKeys | None:
    """The credentials that botocore would find in the environment, if nothing else could take precedence.

    That is: no profile, no settings file, no expiry date.
    """
    environment = os.environ
    if config.profile or any(
        environment.get(name) for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CREDENTIAL_EXPIRATION")
    ):
        return None
    settings = os.path.expanduser(environment.get("AWS_CONFIG_FILE") or "~/.aws/config")
    if os.path.exists(settings) and settings != os.devnull:
        return None
    access, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
    if not access or not secret:
        return None
    token = environment.get("AWS_SECURITY_TOKEN") or environment.get("AWS_SESSION_TOKEN")
    return EnvironmentKeys(access, secret, token)


def digest_of(body: Body) -> str:
    """The payload hash of a request whose body is signed."""
    return hashlib.sha256(body).hexdigest() if isinstance(body, bytes) else body.sha256()


class Signer:
    """Signs requests of one region with boto3's current credentials."""

    def __init__(self, credentials: Credentials, region: str) -> None:
        self._credentials = credentials
        self.region = region
        self._key: tuple[tuple[str, str], bytes] = ("", ""), b""
        """The last key, and the secret and day that it belongs to."""

    def sign(self, method: str, path: str, query: str, headers: dict[str, str], payload: str) -> None:
        """Add the signature to a request's headers, which have lower-case names and are all signed.

        ``payload``: SHA-256 of the body in hex, or UNSIGNED. Raises botocore's errors when expired credentials cannot
        be renewed.
        """
        found = self._credentials.get_frozen_credentials()
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        day = now[:8]
        headers["x-amz-content-sha256"] = payload
        headers["x-amz-date"] = now
        if found.token:
            headers["x-amz-security-token"] = found.token
        names = sorted(headers)
        signed = ";".join(names)
        lines = "".join([f"{name}:{headers[name]}\n" for name in names])
        request = hashlib.sha256(f"{method}\n{path}\n{query}\n{lines}\n{signed}\n{payload}".encode()).hexdigest()
        scope = f"{day}/{self.region}/s3/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{request}"
        signature = hmac.digest(self._day_key(str(found.secret_key), day), text.encode(), "sha256").hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={found.access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
        )

    def _day_key(self, secret: str, day: str) -> bytes:
        of, key = self._key
        if of != (secret, day):
            key = f"AWS4{secret}".encode()
            for part in (day, self.region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._key = (secret, day), key
        return key
