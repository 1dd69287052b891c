"""Path objects of storage: pathlib.Path for a local folder, cloudpathlib's S3Path for a bucket. Any thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamfs.model import StorageConfig

if TYPE_CHECKING:
    from cloudpathlib import S3Client, S3Path

_guard = threading.Lock()
_clients: dict[StorageConfig, Any] = {}


def storage_path(config: StorageConfig, key: str = "") -> Path | S3Path:
    """The path object of an object, or of the storage's root: ``/``, ``.exists()``, ``.unlink()``, ``.suffix`` …"""
    root = config.root
    if not root.startswith("s3://"):
        return Path(root, key) if key else Path(root)
    client = _client(config)
    path: S3Path = client.CloudPath(f"{root}/{key}" if key else root)
    return path


def _client(config: StorageConfig) -> S3Client:
    """One client per storage, with the same access as lamfs's own."""
    with _guard:
        found = _clients.get(config)
        if found is None:
            from lamfs.storage.cloudpath import make_client

            found = _clients[config] = make_client(config)
        client: S3Client = found
        return client


def object_path(config: StorageConfig, key: str) -> Path | S3Path:
    """As storage_path, for the object of an artifact: in a bucket it can be read, but not written."""
    path = storage_path(config, key)
    if isinstance(path, Path):
        return path
    from lamfs.api.readonly import ObjectPath

    return ObjectPath(str(path), client=path.client)
