"""The block cache of a mount: open revisions, their cache files, and eviction. The trio loop only.

For a bucket, revisions are sparse files in the cache directory. For a local folder they are the storage's own files,
which are verified but never copied. The mover moves and checks bytes; nothing here blocks for long.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import trio

from lamfs.cache import holes, imports, sparse
from lamfs.cache.batch import Batch, Failed, make_files
from lamfs.cache.bits import REGION_BLOCKS
from lamfs.cache.blockfile import BlockFile
from lamfs.cache.eviction import Evictor
from lamfs.cache.fetches import Fetches, LeafHashes
from lamfs.cache.index import CacheIndex
from lamfs.cache.moving import BlockMover
from lamfs.cache.states import ABSENT, PRESENT, VERIFIED
from lamfs.errors import LamfsError, ObjectChanged, ObjectMissing, StorageError, StorageFull, StorageMissing
from lamfs.model import BLOCK_SIZE, ContentHash, Revision
from lamfs.storage.base import ObjectStore
from lamfs.storage.local import etag_of

__all__ = ["BlockCache", "BlockFile"]

log = logging.getLogger(__name__)

IDLE_FILES = 256
"""Files without a user that stay open. The least recently used are closed first."""
REMEMBERED = 16384
"""Closed files whose verified blocks this process remembers ..."""
REMEMBERED_BLOCKS = 256
"""... if they have no more blocks than this: some MB of memory at most."""
HOUSEKEEPING_SECONDS = 2.0
"""Seconds between two looks at the size of the cache, at least."""
ROOM = 256 << 20
"""Bytes that are evicted when the disk is full."""
AHEAD_NS = 2_000_000_000
"""Nanoseconds for which fetched bytes count as younger than bytes that were read."""
FULL_SHIFT = 6
"""Prefetched files may use this part (a 64th) of the limit when the cache is full."""
BIG = 64 << 20
"""Bytes. Freeing the extents of a larger unlinked file takes long enough to need a thread."""


class BlockCache:
    """Open revisions by (object key, ETag), the fetches of their blocks, and the cache directory's size."""

    def __init__(
        self,
        store: ObjectStore,
        mover: BlockMover,
        index: CacheIndex,
        cache_dir: Path,
        *,
        limit_bytes: int,
        leaves: LeafHashes | None = None,
        free_bytes: int | None = 0,
    ) -> None:
        self.limit_bytes = limit_bytes
        """Bytes in the cache directory. Above that, the least recently used files and regions are evicted."""
        self._store = store
        self._mover = mover
        self._index = index
        self._dir = cache_dir
        self._local = store.on_disk
        self._files: dict[str, dict[str, BlockFile]] = {}
        self._idle: OrderedDict[BlockFile, None] = OrderedDict()
        self._remembered: OrderedDict[tuple[str, str], tuple[tuple[int, int], ContentHash, bytearray]] = OrderedDict()
        self._touched: dict[str, int] = {}
        self._work = trio.Event()
        self._urgent = trio.Event()
        self._fresh = 0
        self._hits = 0
        self.fetches = Fetches(
            store,
            mover,
            index,
            seal_bytes=limit_bytes,
            leaves=leaves,
            unref=self._unref,
            make_room=self._make_room,
            grown=self._has_grown,
        )
        self._evictor = Evictor(index, cache_dir, free_bytes=free_bytes, find=self._used_at, unlink=self._unlink)

    @property
    def on_storage_damage(self) -> Callable[[Revision, int], None]:
        """Called with each block in storage that is not what was saved. By default it writes a log line."""
        return self.fetches.on_storage_damage

    @on_storage_damage.setter
    def on_storage_damage(self, told: Callable[[Revision, int], None]) -> None:
        self.fetches.on_storage_damage = told

    @property
    def fetched_bytes(self) -> int:
        """Bytes that have come from storage."""
        return self.fetches.fetched

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch blocks and keep the cache within its limit until cancelled. Readers get TransferDied after that."""
        try:
            async with trio.open_nursery() as nursery:
                self.fetches.nursery = nursery
                task_status.started()
                if not self._local and not self._index.swept(self._store.cache_name):
                    nursery.start_soon(self._sweep)
                while True:
                    await self._work.wait()
                    self._work, self._urgent, self._fresh = trio.Event(), trio.Event(), 0
                    await self._keep_house()
                    with trio.move_on_after(HOUSEKEEPING_SECONDS):
                        await self._urgent.wait()
        finally:
            self.fetches.stop()
            self._flush()
            for file in list(self._idle):
                self._detach(file)

    @property
    def is_local(self) -> bool:
        """Whether blocks are read from the storage's own files. Then nothing is copied to the cache directory."""
        return self._local

    def look(self) -> None:
        """Another process may have evicted files: close the idle ones here, so that their space is freed."""
        self._work.set()

    def stats(self) -> dict[str, int]:
        """hits (reads served at once), misses (blocks fetched), fetched_bytes, damaged (blocks), cached_bytes."""
        hits = self._hits + sum(file.hits for etags in self._files.values() for file in etags.values())
        return {
            "hits": hits,
            "misses": self.fetches.misses,
            "fetched_bytes": self.fetches.fetched,
            "damaged": self.fetches.damaged,
            "cached_bytes": self._index.total_bytes(),
        }

    # ---- open files

    def open(self, revision: Revision) -> BlockFile:
        """A reference to the shared file of a revision. Nothing is fetched yet.

        Raises StorageError when the cache directory cannot be used. For a local storage it raises ObjectMissing, and
        ObjectChanged when the file is not the revision.
        """
        file = self._files.get(revision.object_key, {}).get(revision.etag)
        if file is not None and not file.revision.content.same_bytes(revision.content):
            self.drop(revision.object_key)  # equal ETags for different bytes: do not use the same inode
            file = None
        elif file is not None and self._local and etag_of(os.fstat(file.fd())) != revision.etag:
            self._detach(file)
            file = None
        if file is None:
            try:
                file = self._make(revision)
            except StorageError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._idle:
                    raise
                for idle in list(self._idle):
                    self._detach(idle)
                file = self._make(revision)
            self._insert(file)
        else:
            self._idle.pop(file, None)
        file.refs += 1
        if file.path is not None:
            self._touched[file.path] = time.time_ns()
            self._work.set()
        return file

    def is_open(self, revision: Revision | None) -> bool:
        """Whether the file of a revision is open here, used or idle."""
        return revision is not None and revision.etag in self._files.get(revision.object_key, ())

    def _make(self, revision: Revision) -> BlockFile:
        if self._local:
            file = self._open_storage_file(revision)
        else:
            path = sparse.relative_path(self._store, revision.object_key)
            try:
                opened = sparse.open_file(self._index, self._dir, path, revision)
            except StorageFull:
                self._work.set()
                return self._homeless(revision, path)
            file = BlockFile(self.fetches, revision, opened.fd, opened.ino, path, opened.present, opened.partial)
        memo = self._remembered.pop((revision.object_key, revision.etag), None)
        if memo is not None and memo[1].same_bytes(revision.content) and memo[0] == file.identity():
            for block, state in enumerate(memo[2]):
                if state == VERIFIED and file.state[block] == PRESENT:
                    file.verified(block)
        return file

    def _homeless(self, revision: Revision, path: str) -> BlockFile:
        """A file of which nothing is kept, because the cache's disk is full."""
        fd = os.memfd_create("lamfs-homeless", os.MFD_CLOEXEC)
        file = BlockFile(self.fetches, revision, fd, 0, path, bytearray(revision.block_count()))
        file.homeless = True
        return file

    def _open_storage_file(self, revision: Revision) -> BlockFile:
        key = revision.object_key
        try:
            fd = self._store.open_local(key)
        except StorageMissing as error:
            raise ObjectMissing(str(error)) from error
        assert fd is not None
        found = os.fstat(fd)
        if etag_of(found) != revision.etag:
            os.close(fd)
            name = self._store.url(key)
            raise ObjectChanged(f"The object {name} is not the revision that was saved; look the artifact up again.")
        return BlockFile(self.fetches, revision, fd, found.st_ino, None, bytearray([PRESENT]) * revision.block_count())

    def _insert(self, file: BlockFile) -> None:
        etags = self._files.setdefault(file.revision.object_key, {})
        for other in list(etags.values()):
            if other.refs == 0:  # an older revision
                self._detach(other)
        self._files.setdefault(file.revision.object_key, {})[file.revision.etag] = file

    def _unref(self, file: BlockFile) -> None:
        """Drop one reference. A file without references stays open among the idle ones for a while."""
        file.refs -= 1
        if file.refs:
            return
        file.kept.clear()
        self._flush_regions(file)
        partial = (
            file.path is not None
            and len(file.recent) > 1
            and not (file.whole() and file.revision.size <= self.limit_bytes)
        )
        if (
            self.fetches.nursery is None
            or partial  # an open file keeps other processes from evicting its regions
            or file.homeless
            or self._files.get(file.revision.object_key, {}).get(file.revision.etag) is not file
        ):
            self._detach(file)
            return
        self._idle[file] = None
        if len(self._idle) > IDLE_FILES:
            self._detach(next(iter(self._idle)))

    def _detach(self, file: BlockFile) -> None:
        """Make a file unreachable. It is closed when it has no users."""
        key, etag = file.revision.object_key, file.revision.etag
        etags = self._files.get(key)
        if etags is not None and etags.get(etag) is file:
            del etags[etag]
            if not etags:
                del self._files[key]
        self._idle.pop(file, None)
        if file.refs or file.fd() < 0:
            return
        if len(file.state) <= REMEMBERED_BLOCKS and VERIFIED in file.state:
            self._remembered[key, etag] = (file.identity(), file.revision.content, file.state)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        self._hits += file.hits
        self._close_fd(file.shut(), file.revision.size)

    def _close_fd(self, fd: int, size: int) -> None:
        if size > REGION_BLOCKS * BLOCK_SIZE:
            holes.let_go(fd)
        if size >= BIG and self.fetches.nursery is not None:  # perhaps the last reference to an unlinked file
            self.fetches.nursery.start_soon(_close_in_thread, fd)
        else:
            os.close(fd)

    # ---- whole files

    def spare_bytes(self) -> int:
        """Bytes that prefetched files may use: the rest of the cache or, when it is full, a small part of it."""
        return max(self.limit_bytes - self._index.total_bytes(), self.limit_bytes >> FULL_SHIFT)

    def uncached(self, revisions: Sequence[Revision]) -> list[Revision]:
        """The revisions that are neither open here nor completely cached."""
        wanted = {
            sparse.relative_path(self._store, revision.object_key): revision
            for revision in revisions
            if not self.is_open(revision)
        }
        if wanted:
            for path in self._index.complete_of({path: sparse.tag(revision) for path, revision in wanted.items()}):
                del wanted[path]
        return list(wanted.values())

    def start_batch(self, chosen: Sequence[tuple[Revision, Failed]]) -> int:
        """Prefetch files of one block, in one batch. Returns the number of fetches that it started.

        Each revision comes with a function that is called when the file cannot be fetched. A file that is open by now
        is skipped.
        """
        assert self.fetches.nursery is not None
        closed = [each for each in chosen if not self.is_open(each[0])]
        files = make_files(self.fetches, self._store, self._index, self._dir, closed, self._insert)
        if files:
            self.fetches.nursery.start_soon(Batch(self.fetches, self._index, files).run, self._mover)
        return len(files)

    def importing(self) -> contextlib.AbstractContextManager[None]:
        """A context for several ``import_file``: the index writes them together."""
        return contextlib.nullcontext() if self._local else self._index.together()

    def import_file(self, fd: int, spool_path: str, revision: Revision, missing: Collection[int] = ()) -> bool:
        """Rename a spool file to the cache path of ``revision``, whose content it has but for ``missing`` blocks.

        Missing blocks are copied in the background from the cache file that was there before, if that has them. Returns
        False, and changes nothing, when the file cannot be renamed (another file system, local storage, another file).
        """
        if self._local:
            return False
        path = sparse.relative_path(self._store, revision.object_key)
        imported = imports.import_file(self._index, self._dir, path, fd, spool_path, revision, missing)
        if imported is None:
            return False
        if imported.fd < 0:
            return True
        old = self._files.get(revision.object_key, {}).get(revision.etag)
        if old is not None:
            self._detach(old)
        file = BlockFile(self.fetches, revision, imported.fd, imported.ino, path, imported.state)
        self._insert(file)
        file.refs += 1
        donor = imported.donor
        if donor is not None and self.fetches.nursery is not None:
            self.fetches.nursery.start_soon(self._graft, file, donor)
        else:
            self._unref(file)
            if donor is not None:
                os.close(donor.fd)
        self._work.set()
        return True

    async def _graft(self, file: BlockFile, donor: sparse.Opened) -> None:
        """Copy the blocks that a revision shares with its predecessor from the predecessor's cache file."""
        try:
            for block in range(min(len(donor.present), len(file.state))):
                if donor.present[block] and file.state[block] == ABSENT and block not in file.fetches:
                    await self.fetches.graft(file, block, donor.fd)
        except LamfsError as error:
            log.debug("Blocks of '%s' stay behind: %s", file.revision.object_key, error)
        finally:
            os.close(donor.fd)
            self._unref(file)

    def drop(self, object_key: str) -> None:
        """Forget the cached file of an object that is deleted or replaced. Open BlockFiles stay readable."""
        for file in list(self._files.get(object_key, {}).values()):
            self._detach(file)
        path = sparse.relative_path(self._store, object_key)
        if os.path.lexists(self._dir / path) or self._index.row(path) is not None:
            self._unlink(path)

    def _unlink(self, path: str) -> None:
        self._touched.pop(path, None)
        try:
            fd = os.open(self._dir / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            fd = -1
        sparse.remove(self._index, self._dir, path)
        if fd >= 0:  # the extents are freed with the last descriptor, in a thread if they are many
            self._close_fd(fd, os.fstat(fd).st_size)

    # ---- housekeeping

    async def _sweep(self) -> None:
        """Remove what a lost index has left behind: the limit does not count it."""

        def work() -> None:
            index = CacheIndex(self._dir)  # an instance belongs to one thread
            try:
                removed = sparse.sweep(index, self._dir, self._store.cache_name)
                index.swept(self._store.cache_name, done=True)
            finally:
                index.close()
            if removed:
                log.info("%d stray files were removed from the cache.", removed)

        await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    def _has_grown(self, length: int) -> None:
        self._fresh += length
        self._work.set()
        if self._fresh > max(self.limit_bytes >> 4, 4 * BLOCK_SIZE):
            self._urgent.set()

    async def _keep_house(self) -> None:
        self._flush()
        self._close_unlinked()
        await self._evictor.down_to(self.limit_bytes)
        shortage = self._evictor.shortage()
        if shortage > 0:
            await self._evictor.down_to(self._index.total_bytes() - shortage)
            shortage = self._evictor.shortage()
        self.fetches.tight = shortage > 0
        if shortage > 0 and self._index.total_bytes():
            self._work.set()  # files that are in use may be evicted later

    async def _make_room(self) -> None:
        """The cache's disk is full: evict some of the cache, or all that can go."""
        self._flush()
        await self._evictor.down_to(self._index.total_bytes() - max(ROOM, self._evictor.shortage()))

    def _flush(self) -> None:
        """Tell the index what was used."""
        for etags in self._files.values():
            for file in etags.values():
                self._flush_regions(file)
        if self._touched:
            touched, self._touched = self._touched, {}
            self._index.touch(touched)

    def _flush_regions(self, file: BlockFile) -> None:
        if file.path is not None and 1 in file.recent:
            self._touched[file.path] = time.time_ns()
            if len(file.recent) > 1:
                # Slightly in the past: what was prefetched must outlive what the reader has read.
                used = time.time_ns() - AHEAD_NS
                self._index.touch_regions(file.path, [n for n, read in enumerate(file.recent) if read], used)
            file.recent = bytearray(len(file.recent))

    def _close_unlinked(self) -> None:
        """Close idle files that somebody deleted, so that their space is freed."""
        for file in list(self._idle):
            if os.fstat(file.fd()).st_nlink == 0:
                self._detach(file)

    async def make_room(self) -> bool:
        """Evict some of the cache because somebody else needs the disk. False: nothing more can go."""
        before = 0 if self._local else self._index.total_bytes()
        if before:
            await self._make_room()
        return before > 0 and self._index.total_bytes() < before

    def _used_at(self, path: str) -> list[BlockFile]:
        """The files in use here that are, or were, at a cache path. Idle ones are closed."""
        prefix = self._store.cache_name + "/"
        if self._local or not path.startswith(prefix):
            return []
        files = list(self._files.get(path[len(prefix) :], {}).values())
        for file in files:
            if not file.refs:
                self._detach(file)
        return [file for file in files if file.refs]


async def _close_in_thread(fd: int) -> None:
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(os.close, fd)
