"""cloudpathlib's client for a bucket, configured as the S3 store is. Thread-safe; stateless.

Users get path objects from it (``ln.settings.storage / key``); lamfs itself does not move bytes this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamfs.model import StorageConfig

if TYPE_CHECKING:
    from cloudpathlib import S3Client


def make_client(config: StorageConfig) -> S3Client:
    """A client that reaches a storage's endpoint with its profile, region and addressing style."""
    from boto3.session import Session
    from cloudpathlib import S3Client

    session = Session(profile_name=config.profile, region_name=config.region)
    return S3Client(
        boto3_session=session,
        endpoint_url=config.endpoint_url,
        addressing_style="path" if config.path_style else None,
    )
