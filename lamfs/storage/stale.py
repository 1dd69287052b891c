"""Deleting stale objects, and only those: another object may be at their keys by now. Any thread.

The decision that nothing needs an object was made some time ago, perhaps by a registry that did not know everything. So
each object is looked at first. There is no conditional delete that all servers know: what somebody stores between the
look and the deletion is not noticed.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping

from lamfs.errors import ObjectMissing, StorageError
from lamfs.keys import is_private
from lamfs.pool import Pool
from lamfs.storage.base import ObjectStore

JOBS = 8
"""Objects that are looked at at the same time."""
Meant = Mapping[str, Collection[str] | None]
"""Object keys, and the ETags with which an object may be deleted; None: whatever lamfs has stored there.

Below ``.lamindb/`` lamfs stores everything; elsewhere, the objects with its metadata (storage/meta.py).
"""


def delete_meant(store: ObjectStore, meant: Meant) -> list[str]:
    """Delete the objects that are meant; it is no error if some are gone. Returns the keys of other objects, which
    stay.

    Raises storage errors; by then some of them may be deleted.
    """
    asked = [key for key, etags in meant.items() if etags is not None or not is_private(key)]
    left = set()
    if len(asked) == 1:
        left = {key for key in asked if not _is_meant(store, key, meant[key])}
    elif asked:
        with Pool(min(JOBS, len(asked)), "lamfs-stale") as pool:
            for key, future in pool.unordered(lambda key: _is_meant(store, key, meant[key]), asked):
                if not future.result():
                    left.add(key)
    keys = [key for key in meant if key not in left]
    if keys:
        store.delete(keys)
    return sorted(left)


def _is_meant(store: ObjectStore, key: str, etags: Collection[str] | None) -> bool:
    try:
        if etags is not None:
            return store.head(key).etag in etags
        return is_private(key) or store.meta(key) is not None
    except StorageError as error:
        # Behind a link, or with an impossible name, there is no object, and nothing to delete.
        if isinstance(error, ObjectMissing) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return True
        raise
