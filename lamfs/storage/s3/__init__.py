"""Storage in an S3 bucket. Nothing outside of this package knows boto3; within it, only client.py, direct.py and
errors.py do."""

from __future__ import annotations

from lamfs.storage.s3.store import S3Store

__all__ = ["S3Store"]
