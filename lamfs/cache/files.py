"""Complete files in the cache, for the API and the CLI: what ``artifact.cache()`` returns. Synchronous, any thread.

It shares paths and index with running mounts: neither fetches what the other one has fetched. A CacheIndex belongs to
one thread, so callers bring their own.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from lamfs import config, copying
from lamfs.cache import sparse
from lamfs.cache.index import TEMPORARY, CacheIndex
from lamfs.errors import DamagedData, ObjectChanged, StorageError
from lamfs.hashing import hash_block
from lamfs.model import BLOCK_SIZE, Revision
from lamfs.mover import buffers
from lamfs.mover.fetching import fetch_right
from lamfs.pool import Pool
from lamfs.storage.base import ObjectStore, Progress
from lamfs.storage.local import etag_of

log = logging.getLogger(__name__)


def cache_path(cache_dir: Path, store: ObjectStore, object_key: str) -> Path:
    """The cache path of an object, whether or not the file exists."""
    return cache_dir / sparse.relative_path(store, object_key)


def cache_file(
    store: ObjectStore,
    index: CacheIndex,
    cache_dir: Path,
    revision: Revision,
    *,
    progress: Progress | None = None,
    workers: int = 8,
    pool: Pool | None = None,
) -> Path:
    """Make the complete, verified file of a revision at its cache path, and return the path.

    Only blocks that are missing or wrong are fetched, by the threads of ``pool``, which may be shared, or by up to
    ``workers`` of its own. A file that lamfs completed and nobody has touched since is returned at once. ``progress``
    is called in this thread with numbers of bytes; they add up to the size, unless the file is returned at once. Raises
    ObjectChanged, ObjectMissing, DamagedData, StorageUnavailable, StorageFull. Blocks fetched before the error stay for
    the next call.
    """
    path = sparse.relative_path(store, revision.object_key)
    full = cache_dir / path
    if sparse.is_sealed(index, cache_dir, path, revision):
        index.touch(path)
        return full
    for last in (False, False, True):
        if store.on_disk:
            _copy_in(store, index, cache_dir, path, revision, progress)
        else:
            _fetch_in(store, index, cache_dir, path, revision, progress, workers, pool)
        if sparse.is_sealed(index, cache_dir, path, revision):
            break
        progress = None  # reported already; somebody deleted the cache, or replaced the file, meanwhile
        if last and not _right(full, revision):
            raise StorageError(f"The cache file {full} vanishes again and again; is something cleaning that folder?")
    return full


def evict(index: CacheIndex, cache_dir: Path, paths: Iterable[str | Path]) -> int:
    """Delete cached files, given by absolute path or relative to the cache directory. Returns the bytes of disk freed.

    A file that a mount has open stays readable there, and uses its space until the mount closes it.
    """
    freed = 0
    for path in paths:
        given = Path(path)
        relative = given.relative_to(cache_dir) if given.is_absolute() else given
        if ".." not in relative.parts and relative.parts:
            freed += sparse.remove(index, cache_dir, relative.as_posix())
    return freed


def _fetch_in(
    store: ObjectStore,
    index: CacheIndex,
    cache_dir: Path,
    path: str,
    revision: Revision,
    progress: Progress | None,
    workers: int,
    pool: Pool | None,
) -> None:
    """Complete the sparse file of an object in a bucket, in place: a mount may be filling the same file."""
    opened = sparse.open_file(index, cache_dir, path, revision)
    fd = opened.fd
    if any(opened.present):
        index.touch(path)  # a mount that evicts meanwhile should choose another file
    several = revision.block_count() > 1

    def bring(block: int) -> int:
        return _bring(store, fd, revision, block, bool(opened.present[block]), cache_dir / path)

    def brought(block: int) -> None:
        if several and not opened.present[block]:
            index.mark(path, sparse.tag(revision), (block,), ino=opened.ino)
        if progress is not None:
            progress(_span(revision, block)[1])

    try:
        _spread(bring, brought, range(revision.block_count()), workers, pool)
        with index.together():
            if not several:
                index.mark(path, sparse.tag(revision), range(revision.block_count()), ino=opened.ino)
            sparse.seal(index, path, revision, fd)
            index.touch(path)
    finally:
        os.close(fd)


def _spread(
    bring: Callable[[int], int], brought: Callable[[int], None], blocks: range, workers: int, pool: Pool | None
) -> None:
    """Run bring() for each block in threads, and brought() in this one as they finish. The first error stops it.

    Always waits for the few that have started: they write to the descriptor.
    """
    if pool is not None:
        with contextlib.closing(pool.unordered(bring, blocks)) as done:
            for _, future in done:
                brought(future.result())
    elif len(blocks) <= 1 or workers <= 1:
        try:
            for block in blocks:
                brought(bring(block))
        finally:
            buffers.own().drop()
    else:
        with Pool(min(workers, len(blocks)), "cache-file") as own:
            _spread(bring, brought, blocks, workers, own)


def _bring(store: ObjectStore, fd: int, revision: Revision, block: int, present: bool, full: Path) -> int:
    offset, length = _span(revision, block)
    digest = revision.content.block(block)
    if present:
        try:
            data = os.pread(fd, length, offset)
        except OSError:
            data = b""
        if len(data) == length and hash_block(data) == digest:
            return block
        log.warning("Block %d of the cache file %s is damaged; fetching it again.", block, full)
    with buffers.own().view(length) as view:
        key, etag = revision.object_key, revision.etag
        if not fetch_right(store, key, etag, offset, view, lambda data: hash_block(data) == digest):
            raise _damaged(store, revision, block)
        try:
            copying.write_full(fd, view, offset)
        except OSError as error:
            raise sparse.cache_error(error, full) from error
    return block


def _copy_in(
    store: ObjectStore, index: CacheIndex, cache_dir: Path, path: str, revision: Revision, progress: Progress | None
) -> None:
    """Reflink or copy an object of a local folder to the cache. It gets its name when it is complete and checked."""
    full = cache_dir / path
    src = store.open_local(revision.object_key)
    assert src is not None
    dst = -1
    temporary = f"{os.path.dirname(path)}/{TEMPORARY}{config.temporary_name()}"
    partial = os.path.join(cache_dir, temporary)
    try:
        if etag_of(os.fstat(src)) != revision.etag:
            raise _changed(store.url(revision.object_key))
        floor = 0
        try:
            sparse.make_parents(index, cache_dir, path)
            dst = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            ino = sparse.ino_of(os.fstat(dst))
            # With a row, a copy that is never finished is evicted some day.
            index.reset(temporary, sparse.tag(revision), revision.size, ino=ino, full=True)
            with contextlib.suppress(EOFError):  # the check reports that the object has changed
                copying.copy_fd(src, dst)
            _check_copy(store, src, dst, revision, progress)
            floor = sparse.make_way(index, cache_dir, path)
            os.rename(partial, full)
        except OSError as error:
            raise sparse.cache_error(error, full) from error
        with index.together():
            index.reset(path, sparse.tag(revision), revision.size, ino=ino, floor_ns=floor, full=True)
            sparse.seal(index, path, revision, dst)
            index.forget(temporary)
    except BaseException:
        if dst >= 0:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            index.forget(temporary)
        raise
    finally:
        os.close(src)
        if dst >= 0:
            os.close(dst)


def _check_copy(store: ObjectStore, src: int, dst: int, revision: Revision, progress: Progress | None) -> None:
    """Verify each block of a copy. Raises ObjectChanged when the source is being written to, else DamagedData."""
    for block in range(revision.block_count()):
        if not _block_is_right(dst, revision, block):
            if etag_of(os.fstat(src)) != revision.etag:
                raise _changed(store.url(revision.object_key))
            raise _damaged(store, revision, block)
        if progress is not None:
            progress(_span(revision, block)[1])


def _changed(name: str) -> ObjectChanged:
    return ObjectChanged(f"The object {name} is not the revision that was saved; look the artifact up again.")


def _right(full: Path, revision: Revision) -> bool:
    """Whether the file at a path is the revision, whatever the index says (it may be unusable)."""
    try:
        fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return os.fstat(fd).st_size == revision.size and all(
            _block_is_right(fd, revision, block) for block in range(revision.block_count())
        )
    finally:
        os.close(fd)


def _block_is_right(fd: int, revision: Revision, block: int) -> bool:
    offset, length = _span(revision, block)
    data = os.pread(fd, length, offset)
    return len(data) == length and hash_block(data) == revision.content.block(block)


def _span(revision: Revision, block: int) -> tuple[int, int]:
    offset = block * BLOCK_SIZE
    return offset, min(BLOCK_SIZE, revision.size - offset)


def _damaged(store: ObjectStore, revision: Revision, block: int) -> DamagedData:
    url = store.url(revision.object_key)
    log.error("Block %d of the object %s (ETag %s) is damaged in storage.", block, url, revision.etag)
    return DamagedData(
        f"The object {url} (ETag {revision.etag}) is damaged in block {block}: its bytes are not what was saved. "
        "Restore the object from a backup or replace the artifact."
    )
