"""The store of a bucket that costs nothing until an object is asked for. Thread-safe.

A mount's first process never talks to S3 while all goes well, its mover does: names are enough for it. HTTP and TLS are
0.03 s of imports and 5 MiB; botocore, where credentials must be looked for, more on top.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

from lamfs.storage.base import StorageConfig
from lamfs.storage.root import split_s3

if TYPE_CHECKING:
    from lamfs.storage.s3 import S3Store


class LateS3Store:
    """An S3Store that is made when it is first used. What only names things is answered without it."""

    kind: Literal["s3"] = "s3"

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        bucket, prefix = split_s3(config.root)
        self.cache_name = f"{bucket}/{prefix}".rstrip("/")
        self._base = f"s3://{self.cache_name}"
        self._guard = threading.Lock()
        self._made: S3Store | None = None

    def url(self, key: str) -> str:
        """Full name of an object, for people."""
        return f"{self._base}/{key}"

    def open_local(self, key: str) -> None:
        """None: objects are not files here."""

    def close(self) -> None:
        """Close the store, if it was made."""
        with self._guard:
            if self._made is not None:
                self._made.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_made", "_guard"):
            raise AttributeError(name)
        with self._guard:
            if self._made is None:
                from lamfs.storage.s3 import S3Store

                self._made = S3Store(self.config)
        return getattr(self._made, name)
