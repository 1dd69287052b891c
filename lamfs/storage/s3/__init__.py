"""Storage in an S3 bucket. Nothing outside of this package knows botocore. Inside, only client.py, direct.py and
errors.py do, and they import it when they need it."""

from __future__ import annotations

from lamfs.storage.s3.store import S3Store

__all__ = ["S3Store"]
