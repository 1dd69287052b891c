"""Storage in an S3 bucket. Nothing outside of this package knows botocore. Inside, only boto.py, bounded.py,
direct.py and errors.py do; boto.py is imported when it is needed."""

from __future__ import annotations

from lamfs.storage.s3.store import S3Store

__all__ = ["S3Store"]
