"""Finding out what a bucket can do before anybody relies on it: at `init` and at `mount`.

Runs in the caller's thread, with a few threads of its own for the race. Leaves no object behind.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lamfs import config
from lamfs.errors import (
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageForbidden,
    StorageReadOnly,
    StorageUnavailable,
)
from lamfs.keys import PROBE_PREFIX
from lamfs.storage.base import Capabilities, ObjectStore, Over
from lamfs.storage.s3.calls import S3, Content
from lamfs.storage.s3.client import Connection
from lamfs.storage.s3.errors import NOT_IMPLEMENTED, code_of

RACERS = 5
ROUNDS = 4
"""A server that first checks and then writes shows 2 to 4 winners in most rounds of such a race, and passes every
sequential probe (seen with Swift)."""
STAGGER = 0.02
"""Seconds between the starts of two rounds. Rounds overlap, because a server may let losers wait for a second
(SeaweedFS). But one round must not separate the writers of another."""

_WRONG_ETAG = "0123456789abcdef0123456789abcdef"

_NOT_EXCLUSIVE = (
    "The server of {url} lets several writers create one object at once (If-None-Match on PUT does not work), so the"
    " lock of an instance does not exclude: two machines could write at once, and the later one wins. Use the instance"
    " from one machine at a time."
)
_NOT_REPLACE_GUARDED = (
    "The server of {url} ignores the condition If-Match on PUT, so renewing or taking over the lock of an instance can"
    " overwrite another machine's lock: two machines could write at once. Use the instance from one machine at a time."
)
_NOT_READ_GUARDED = (
    "The server of {url} ignores the condition If-Match on GET, so lamfs compares the ETag of each reply instead: that"
    " is as safe, but reading an object that somebody else replaced costs a useless transfer."
)


def check_bucket(store: ObjectStore, connection: Connection, *, write: bool, exclusive: bool = False) -> Capabilities:
    """The check of ObjectStore. Without ``write`` only reading is tried, and the write capabilities count as unproven.

    With ``exclusive`` there is no race, because an earlier one was won. Raises StorageMissing, StorageForbidden,
    StorageReadOnly or StorageUnavailable, naming the bucket.
    """
    url = store.url("").rstrip("/")
    base = f"{connection.prefix}/" if connection.prefix else ""
    found = connection.call(lambda s3: s3.objects(base, most=1), f"list {url}").entries
    if not write:
        guarded = not found or _read_is_guarded(connection, found[0].key, found[0].etag)
        return Capabilities(
            create_exclusive=False,
            replace_guarded=False,
            read_guarded=guarded,
            warnings=() if guarded else (_NOT_READ_GUARDED.format(url=url),),
        )
    probe = PROBE_PREFIX + config.temporary_name()
    keys = [probe] + [f"{probe}-{number}" for number in range(0 if exclusive else ROUNDS)]
    try:
        etag = _first_write(store, probe, url)
        exclusive = exclusive or _race(store, keys[1:])
        read_guarded = _read_is_guarded(connection, base + probe, etag)
        replace_guarded = _replace_is_guarded(connection, base + probe, etag)
    except BaseException:
        with contextlib.suppress(StorageError):
            store.delete(keys)
        raise
    try:
        store.delete(keys)
    except StorageForbidden as error:
        raise StorageForbidden(
            f"The bucket of {url} lets these credentials write but not delete; allow s3:DeleteObject. The objects"
            f" '{probe}*' are left there. ({error})"
        ) from error
    missing = (
        (exclusive, _NOT_EXCLUSIVE),
        (replace_guarded, _NOT_REPLACE_GUARDED),
        (read_guarded, _NOT_READ_GUARDED),
    )
    return Capabilities(
        create_exclusive=exclusive,
        replace_guarded=replace_guarded,
        read_guarded=read_guarded,
        warnings=tuple(text.format(url=url) for there, text in missing if not there),
    )


def _first_write(store: ObjectStore, key: str, url: str) -> str:
    try:
        return store.put_bytes(key, b"lamfs looks what this storage can do").etag
    except StorageError as error:
        if isinstance(error, StorageForbidden) or code_of(error) in NOT_IMPLEMENTED:
            raise StorageReadOnly(
                f"The bucket of {url} can be read but not written with these credentials ({error}) Allow s3:PutObject"
                " and s3:DeleteObject, or mount with --read-only."
            ) from error
        raise


def _race(store: ObjectStore, keys: list[str]) -> bool:
    """Whether each of ``keys`` gets exactly one creator when RACERS threads try at the same time."""
    patience = store.config.timeout * 2
    ready = threading.Barrier(RACERS * len(keys))
    starts = [threading.Barrier(RACERS) for _ in keys]
    winners = [0] * len(keys)
    count = threading.Lock()

    def racer(number: int) -> None:
        try:
            with contextlib.suppress(ObjectMissing):
                store.head(keys[number])  # opens this thread's connection, so that the race is one of writes
            ready.wait(patience)
            time.sleep(STAGGER * number)
            starts[number].wait(patience)
            with contextlib.suppress(PreconditionFailed):
                store.put_bytes(keys[number], secrets.token_bytes(16), if_none_match=True)
                with count:
                    winners[number] += 1
        except BaseException:
            for barrier in (ready, *starts):
                barrier.abort()
            raise

    with ThreadPoolExecutor(RACERS * len(keys), "lamfs-probe") as pool:
        futures = [pool.submit(racer, number) for number in range(len(keys)) for _ in range(RACERS)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    reasons = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if reasons and all(code_of(error) in NOT_IMPLEMENTED for error in reasons):
        return False
    if reasons:
        raise reasons[0]
    if errors:
        raise StorageUnavailable(f"The server of {store.url('')} answers too slowly to be checked; try again later.")
    return winners == [1] * len(keys)


def _replace_is_guarded(connection: Connection, key: str, etag: str) -> bool:
    """Whether PUT fails with a wrong ETag and succeeds with the right one."""
    what = f"store s3://{connection.bucket}/{key}"
    try:
        connection.call(lambda s3: s3.put(key, b"wrong", 5, over=Over(_WRONG_ETAG)), what)
    except ObjectChanged:
        pass
    except StorageError as error:
        if code_of(error) in NOT_IMPLEMENTED:
            return False
        raise
    else:
        return False
    try:
        connection.call(lambda s3: s3.put(key, b"right", 5, over=Over(etag)), what)
    except ObjectChanged:
        return False
    return True


def _read_is_guarded(connection: Connection, key: str, etag: str) -> bool:
    """Whether GET fails with a wrong ETag and succeeds with the right one."""
    what = f"read s3://{connection.bucket}/{key}"
    for asked, expected in ((_WRONG_ETAG, False), (etag, True)):
        try:
            connection.call(partial(_get, key=key, etag=asked), what).body.close()
            answered = True
        except ObjectChanged:
            answered = False
        except StorageError as error:
            if code_of(error) in NOT_IMPLEMENTED:
                return False
            raise
        if answered != expected:
            return False
    return True


def _get(s3: S3, key: str, etag: str) -> Content:
    return s3.get(key, if_match=etag)
