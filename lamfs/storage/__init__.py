"""Storage: where objects are. Use ``open_store`` to get a store; the root decides which kind it is.

The modules of a kind of storage are imported when the first one is opened, and HTTP, TLS and XML when the first request
is sent: so ``import lamfs`` stays quick, and a mount's first process, which needs only names of objects, stays small.
"""

from __future__ import annotations

from lamfs.storage.base import Capabilities, ObjectStat, ObjectStore, StorageConfig
from lamfs.storage.root import is_s3, parse_root

__all__ = ["Capabilities", "ObjectStat", "ObjectStore", "StorageConfig", "open_store", "parse_root"]


def open_store(config: StorageConfig) -> ObjectStore:
    """The store of a root in the normal form of ``parse_root``. Cheap: nothing is connected or checked yet.

    Close it when done. Raises InvalidArgument for a root that is not in normal form.
    """
    if is_s3(config.root):
        from lamfs.storage.s3 import S3Store

        return S3Store(config)
    from lamfs.storage.local import LocalStore

    return LocalStore(config)
