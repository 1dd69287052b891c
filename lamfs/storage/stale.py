"""Deleting objects that are stale, and only those: what is at their keys by now may be another one. Any thread.

That nothing needs an object was decided some time ago, perhaps by a registry that knew less than there is. So each is
looked at first. No storage deletes on a condition that all servers know: what somebody stores between the look and the
deletion is not seen.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping

from lamfs.errors import ObjectMissing, StorageError
from lamfs.model import AUTO_KEY_PREFIX
from lamfs.pool import Pool
from lamfs.storage.base import ObjectStore

JOBS = 8
"""Objects that are looked at at a time."""
Meant = Mapping[str, Collection[str] | None]
"""Object keys, and the ETags that what is there may have to be deleted; None: whatever lamfs has stored there. Under
``.lamindb/`` it stores everything; elsewhere, what says so of itself (storage/meta.py)."""


def delete_meant(store: ObjectStore, meant: Meant) -> list[str]:
    """Delete the objects that are meant; ones that are gone are no error. Returns the keys of others, which stay.

    Raises storage errors; then any number of them are deleted.
    """
    asked = [key for key, etags in meant.items() if etags is not None or not key.startswith(AUTO_KEY_PREFIX)]
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
        return key.startswith(AUTO_KEY_PREFIX) or store.meta(key) is not None
    except StorageError as error:
        # Behind a link, or under a name that cannot be, there is no object; deleting it does nothing.
        if isinstance(error, ObjectMissing) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return True
        raise
