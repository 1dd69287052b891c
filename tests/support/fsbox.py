"""A file system without kernel and processes, which can be crashed at every step and started again.

    box = Box(folder, "s3")                      # or "local"; objects, registry and spool outlive a crash
    box.run(scenario, crash_at=17)               # scenario(user): True if it was crashed at the 17th step
    box.check(user)                              # start again with an empty cache, drain, compare everything
    box.run_alone(work, crash_at=17)             # work(instance): what CLI and API do while nothing is mounted

A *step* is a committed transaction of the registry, or the beginning or the end of a job of the mover: nothing that
survives a crash changes between two steps. ``Crash`` is not an Exception, so nothing in the product handles it.

``User`` makes system calls and keeps a model of the expected tree: after a crash each file may have the bytes of its
last acknowledged version or of any later one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import trio
import trio.testing

from lamfs import copying, hashing
from lamfs.cache.blocks import BlockCache
from lamfs.cache.index import CacheIndex
from lamfs.daemon.recovery import take_over
from lamfs.errors import (
    LamfsError,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
    UploadGone,
)
from lamfs.fs.context import Context, Policy
from lamfs.fs.filesystem import Changes, FileSystem
from lamfs.keys import is_in_place
from lamfs.model import BLOCK_SIZE, ROOT_INO, TRASH, ContentHash, ObjectMeta, Revision
from lamfs.ops import recover
from lamfs.prefetch.scheduler import Prefetcher
from lamfs.registry import Provenance, Registry, process_id
from lamfs.spool import SpoolFolder
from lamfs.storage.base import ObjectStat, PartStat, StorageConfig
from lamfs.storage.local import LocalStore
from lamfs.storage.stale import Meant
from lamfs.work.direct import DirectWorker
from lamfs.work.guard import Permit, anybody
from lamfs.work.uploader import Uploader
from tests.support.clock import jumping
from tests.support.timed import timed
from tests.support.tree import check_tree

T = TypeVar("T")

ROUNDS = 8
"""Moves that wait for each other are done after a few rounds."""


class Crash(BaseException):
    """The power is cut."""


@functools.lru_cache(maxsize=64)
def _md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@dataclass
class MemoryStore:
    """Objects in memory with the interface of a bucket. ETags are MD5, so equal bytes have equal ETags, as on S3.

    ``unfinished``: its uploads. ``made``: objects made from finished uploads. ``sent``: the number of each received
    part.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    unfinished: dict[str, tuple[str, dict[int, bytes]]] = field(default_factory=dict)
    begun: int = 0
    made: dict[str, tuple[list[str], str]] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    metas: dict[str, Any] = field(default_factory=dict)
    begun_with: dict[str, Any] = field(default_factory=dict)
    config: StorageConfig = StorageConfig("s3://bucket/prefix")  # noqa: RUF009
    kind: str = "s3"
    on_disk: bool = False
    imports_files: bool = False
    cache_name: str = "bucket/prefix"

    @property
    def parts(self) -> MemoryStore:
        return self

    def _stat(self, key: str, etag: str | None = None) -> ObjectStat:
        if key not in self.objects:
            raise ObjectMissing(f"no object '{key}'")
        found = _md5(self.objects[key])
        if etag not in (None, found):
            raise ObjectChanged(f"the object '{key}' changed")
        return ObjectStat(key, len(self.objects[key]), found, 0)

    def _require(self, key: str, nothing: bool, etag: str | None) -> None:
        if nothing and key in self.objects:
            raise PreconditionFailed(f"the object '{key}' is there")
        if etag is not None and (key not in self.objects or _md5(self.objects[key]) != etag):
            raise PreconditionFailed(f"the object '{key}' changed")

    def url(self, key: str) -> str:
        return f"s3://bucket/prefix/{key}"

    def open_local(self, key: str) -> int | None:
        return None

    def head(self, key: str) -> ObjectStat:
        return self._stat(key)

    def get(self, key: str, *, offset: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        self._stat(key, etag)
        data = self.objects[key]
        return data[offset:] if length is None else data[offset : offset + length]

    def get_into(self, key: str, fd: int, *, offset: int, length: int, etag: str | None = None) -> None:
        os.pwrite(fd, self.get(key, offset=offset, length=length, etag=etag), offset)

    def get_view(self, key: str, view: memoryview, *, offset: int, etag: str | None = None) -> None:
        view[:] = self.get(key, offset=offset, length=len(view), etag=etag)

    def put_file(
        self,
        key: str,
        path: str,
        *,
        consume: bool = False,
        progress: Any = None,
        meta: Any = None,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> ObjectStat:
        self._require(key, if_none_match, if_match)
        self.objects[key], self.metas[key] = Path(path).read_bytes(), meta
        return self._stat(key)

    def meta(self, key: str) -> Any:
        self._stat(key)
        return self.metas.get(key)

    def copy(
        self,
        src: str,
        dst: str,
        *,
        etag: str | None = None,
        size: int | None = None,
        meta: Any = None,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> ObjectStat:
        """As a bucket: the conditions are ignored."""
        self._stat(src, etag)
        self.objects[dst], self.metas[dst] = self.objects[src], meta
        return self._stat(dst)

    def delete(self, keys: Any) -> None:
        for key in keys:
            self.objects.pop(key, None)

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        return iter([self._stat(key) for key in self.objects if key.startswith(prefix)])

    # multipart uploads: MultipartStore

    def begin_upload(self, key: str, meta: Any = None) -> str:
        self.begun += 1
        self.unfinished[f"u{self.begun}"] = (key, {})
        self.begun_with[f"u{self.begun}"] = meta
        return f"u{self.begun}"

    def _parts(self, key: str, upload_id: str) -> dict[int, bytes]:
        found = self.unfinished.get(upload_id)
        if found is None or found[0] != key:
            raise UploadGone(f"no upload {upload_id} of '{key}'")
        return found[1]

    def send_part(
        self, key: str, upload_id: str, number: int, path: str, offset: int, length: int, progress: Any = None
    ) -> str:
        if progress is not None:
            progress(length // 2)
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), length, offset)
        assert len(data) == length
        return self._add(key, upload_id, number, data)

    def copy_part(
        self, key: str, upload_id: str, number: int, source: str, source_etag: str, offset: int, length: int
    ) -> str:
        return self._add(key, upload_id, number, self.get(source, offset=offset, length=length, etag=source_etag))

    def _add(self, key: str, upload_id: str, number: int, data: bytes) -> str:
        self._parts(key, upload_id)[number] = data
        self.sent.append(number)
        return _md5(data)

    def complete_upload(
        self,
        key: str,
        upload_id: str,
        etags: Sequence[str],
        *,
        if_none_match: bool = False,
        if_match: str | None = None,
    ) -> str:
        try:
            parts = self._parts(key, upload_id)
        except UploadGone:
            if key in self.objects and self.made.get(upload_id) == (list(etags), self._stat(key).etag):
                return self._stat(key).etag
            raise
        self._require(key, if_none_match, if_match)
        assert [_md5(parts[number]) for number in range(1, len(etags) + 1)] == list(etags)
        self.objects[key] = b"".join(parts[number] for number in range(1, len(etags) + 1))
        del self.unfinished[upload_id]
        self.metas[key] = self.begun_with[upload_id]
        self.made[upload_id] = (list(etags), self._stat(key).etag)
        return self._stat(key).etag

    def abort_upload(self, key: str, upload_id: str) -> None:
        self.unfinished.pop(upload_id, None)

    def list_parts(self, key: str, upload_id: str) -> Sequence[PartStat]:
        parts = self._parts(key, upload_id)
        return [PartStat(number, len(data), _md5(data)) for number, data in sorted(parts.items())]

    def uploads_of(self, key: str) -> Sequence[str]:
        return [upload_id for upload_id, found in self.unfinished.items() if found[0] == key]


class DirectMover(DirectWorker):
    """Does the Mover's jobs on the spot, in the trio loop. Each job that changes storage is between two steps.

    ``failing(op, key)`` may return an error for a job. It is raised before the job is done, or after, if ``late`` is
    set. ``hold`` names an op: its next job waits for ``release`` after it is done and before it is answered.
    ``hashed``: the starts of the hashed ranges, except for parts that are hashed while they are sent.
    """

    def __init__(self, box: Box) -> None:
        super().__init__(box.store)
        self._box = box
        self._sender = DirectWorker(box.store)
        self.failing = box.failing
        self.late = False
        self.hold: str | None = None
        self.hashed: list[int] = []
        self.held = trio.Event()
        self.release = trio.Event()

    async def _job(self, op: str, key: str, work: Callable[[], Awaitable[T]]) -> T:
        self._box.step(f"before {op}")
        await trio.lowlevel.checkpoint()
        error = self.failing(op, key)
        if error is not None and not self.late:
            raise error
        result = await work()
        if self.hold == op:
            self.hold = None
            self.held.set()
            await self.release.wait()
        if error is not None:
            raise error
        self._box.step(f"after {op}")
        await trio.lowlevel.checkpoint()
        return result

    async def put(self, path: str, key: str, **how: Any) -> ObjectStat:
        return await self._job("put", key, partial(super().put, path, key, **how))

    async def put_many(self, files: Sequence[Any]) -> list[ObjectStat | LamfsError]:
        found: list[ObjectStat | LamfsError] = []
        for file in files:
            try:
                found += await self._job("copy" if file[2] else "put", file[1], partial(super().put_many, [file]))
            except StorageUnavailable as error:
                return found + [error] * (len(files) - len(found))
            except LamfsError as error:
                found.append(error)
        return found

    async def copy(self, src: str, dst: str, **how: Any) -> ObjectStat:
        return await self._job("copy", dst, partial(super().copy, src, dst, **how))

    async def delete(self, meant: Meant) -> list[str]:
        return await self._job("delete", next(iter(meant)), partial(super().delete, meant))

    async def begin_upload(self, key: str, meta: Any = None) -> str:
        return await self._job("begin_upload", key, partial(super().begin_upload, key, meta))

    async def send_part(self, key: str, *args: Any, **how: Any) -> tuple[str, ContentHash | None]:
        return await self._job("send_part", key, partial(self._sender.send_part, key, *args, **how))

    async def copy_part(self, key: str, *args: Any) -> str:
        return await self._job("copy_part", key, partial(super().copy_part, key, *args))

    async def complete_upload(self, key: str, *args: Any) -> str:
        return await self._job("complete_upload", key, partial(super().complete_upload, key, *args))

    async def abort_upload(self, key: str, upload_id: str) -> None:
        await self._job("abort_upload", key, partial(super().abort_upload, key, upload_id))

    async def list_parts(self, key: str, upload_id: str) -> list[PartStat]:
        return await self._job("list_parts", key, partial(super().list_parts, key, upload_id))

    async def uploads_of(self, key: str) -> list[str]:
        return await self._job("uploads_of", key, partial(super().uploads_of, key))

    # Jobs that change nothing are not steps, but other tasks get their turn.

    async def hash(self, path: str, size: int | None = None, *args: Any, **how: Any) -> ContentHash:
        await trio.lowlevel.checkpoint()
        return await super().hash(path, size, *args, **how)

    async def hash_range(self, path: str, offset: int, length: int) -> ContentHash:
        await trio.lowlevel.checkpoint()
        self.hashed.append(offset)
        return await super().hash_range(path, offset, length)

    async def hash_ends(self, path: str, size: int) -> tuple[str, bytes]:
        await trio.lowlevel.checkpoint()
        return await super().hash_ends(path, size)

    async def meta(self, key: str) -> ObjectMeta | None:
        await trio.lowlevel.checkpoint()
        return await super().meta(key)

    async def head(self, key: str) -> ObjectStat:
        await trio.lowlevel.checkpoint()
        return await super().head(key)

    async def fetch(self, key: str, **how: Any) -> None:
        await trio.lowlevel.checkpoint()
        error = self.failing("fetch", key)
        if error is not None:
            raise error
        await super().fetch(key, **how)

    async def verify(self, path: str, *, offset: int, length: int, digest: bytes) -> bool:
        await trio.lowlevel.checkpoint()
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), length, offset)
        return len(data) == length and hashing.hash_block(data) == digest

    async def graft(self, src: str, dst: str, *, offset: int, length: int, digest: bytes) -> bool:
        if not await self.verify(src, offset=offset, length=length, digest=digest):
            return False
        with open(src, "rb") as source, open(dst, "r+b") as target:
            os.pwrite(target.fileno(), os.pread(source.fileno(), length, offset), offset)
        return True

    async def clone(self, src: str, dst: str) -> None:
        self._box.step("before clone")
        await trio.lowlevel.checkpoint()
        source = os.open(src, os.O_RDONLY)
        target = os.open(dst, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        copying.copy_fd(source, target)
        os.close(source)
        os.close(target)
        self._box.step("after clone")


class Stepped:
    """The storage of a box where nothing is mounted. Each change of it is between two steps."""

    CHANGES = frozenset({
        "put_file", "copy", "delete", "begin_upload", "send_part", "copy_part", "complete_upload", "abort_upload",
    })  # fmt: skip

    def __init__(self, box: Box) -> None:
        self._box = box

    @property
    def parts(self) -> Any:
        return None if self._box.store.parts is None else self

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._box.store, name)

        def change(*args: Any, **how: Any) -> Any:
            self._box.step(f"before {name}")
            result = found(*args, **how)
            self._box.step(f"after {name}")
            return result

        return change if name in self.CHANGES else found


class Box:
    """Storage, registry and spool of one instance, and the file system that runs on them."""

    lives = 0

    def __init__(self, base: Path, kind: str = "s3", *, real_keys: bool = False) -> None:
        self.base = base
        self.kind = kind
        self.policy = Policy(real_keys=real_keys, timeout=10.0)
        base.mkdir(parents=True, exist_ok=True)
        root = base / "store"
        self.store: Any = MemoryStore() if kind == "s3" else LocalStore(StorageConfig(str(root)))
        self.spool_place = (base, ("spool",)) if kind == "s3" else (root, (".lamindb", "_spool", "x"))
        self.spool = self.spool_place[0].joinpath(*self.spool_place[1])
        self.spool.mkdir(parents=True)
        self.cache_dir = base / "cache"
        self.permit: Permit = anybody
        self.failing: Callable[[str, str], LamfsError | None] = lambda op, key: None
        """The mover's ``failing`` at the beginning of a life: a mount starts pending work at once."""
        self.steps: list[str] = []
        self.crash_at = 0
        self.mounted, self.gone = True, False
        self.rewind: dict[str, bytes] | None = None
        self.clock = trio.testing.MockClock(autojump_threshold=0)
        """Time advances when no task can run, in one life after the other."""
        self.boot = (process_id() or "").split(":")[0]
        registry = Registry(base / "registry.lndb", create=True)
        timed(registry).people.ensure_storage(self.store.config.root, kind)
        registry.close()

    def step(self, name: str) -> None:
        """A step is reached; the ``crash_at``-th is the last."""
        self.live()
        self.steps.append(name)
        if len(self.steps) == self.crash_at:
            self.gone = not self.mounted
            raise Crash(name)

    def live(self) -> None:
        """Crash again if the box is gone already: otherwise code that handles every exception would go on."""
        if self.gone:
            raise Crash

    # -- life ---------------------------------------------------------------------------------------------------

    def _registry(self) -> Registry:
        registry = Registry(self.base / "registry.lndb")
        # Each life is its own process; for the next life, none of the earlier ones is alive.
        Box.lives += 1
        registry.journal.owner = f"{self.boot}:0:{Box.lives}"
        db = registry.db
        transaction, execute = db.transaction, db.execute

        @contextlib.contextmanager
        def stepped() -> Iterator[Any]:
            outermost = not db.conn.in_transaction
            if outermost:
                self.live()
                before = self._files()
            with transaction() as conn:
                yield conn
            if outermost:
                self._committed(before)

        def run(sql: str, params: Any = ()) -> Any:
            alone = not db.conn.in_transaction and not sql.lstrip().startswith(("SELECT", "PRAGMA"))
            if alone:
                self.live()
                before = self._files()
            cursor = execute(sql, params)
            if alone:
                if "RETURNING" in sql:
                    # The row is returned after the commit, which happens when the statement ends.
                    cursor = _Rows(cursor.fetchall())
                self._committed(before)
            return cursor

        db.transaction = stepped  # type: ignore[method-assign]
        db.execute = run  # type: ignore[method-assign,assignment]
        return registry

    def _files(self) -> tuple[list[tuple[int, int]], dict[str, bytes] | None]:
        """Of registry and work database, before something is committed: how their logs are; and, when the next step is
        the last, the work database itself."""
        logs = [self.base / f"{name}-wal" for name in ("registry.lndb", "work.db")]
        sizes = [(log.stat().st_size, log.stat().st_mtime_ns) if log.exists() else (0, 0) for log in logs]
        if len(self.steps) + 1 != self.crash_at:
            return sizes, None
        kept = [path for path in self.base.glob("work.db*") if path.name != "work.db-shm"]
        return sizes, {path.name: path.read_bytes() for path in kept}

    def _committed(self, before: tuple[list[tuple[int, int]], dict[str, bytes] | None]) -> None:
        """A transaction over both files is two commits: the registry's is the first."""
        if all(now != was for now, was in zip(self._files()[0], before[0], strict=True)):
            self.rewind = before[1]
            self.step("between the commits")
            self.rewind = None
        self.step("commit")

    def _crashed(self) -> None:
        """After a crash between two commits the second has not happened."""
        if self.rewind is not None:
            for path in self.base.glob("work.db*"):
                path.unlink()
            for name, data in self.rewind.items():
                (self.base / name).write_bytes(data)
            self.rewind = None

    @contextlib.asynccontextmanager
    async def living(self) -> Any:
        """A running file system. Yields it."""
        registry = self._registry()
        index = CacheIndex(self.cache_dir)
        mover: Any = DirectMover(self)
        spool = SpoolFolder.make(*self.spool_place)
        fs: FileSystem | None = None
        try:
            instance = self._instance(registry, self.store)
            recover.finish_saves(instance)
            take_over(instance, spool)
            uploader = Uploader(registry, self.store, mover, spool, Provenance(), permit=self.permit)
            cache = BlockCache(
                self.store,
                mover,
                index,
                self.cache_dir,
                limit_bytes=1 << 30,
                leaves=registry.artifacts.leaves,
            )
            fs = FileSystem(
                Context(registry, self.store, cache, Prefetcher(cache, blocks=0), mover, uploader, spool, self.policy)
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(cache.run)
                nursery.start_soon(uploader.run)
                await trio.testing.wait_all_tasks_blocked()  # the work at the start of a mount is done
                yield fs
                nursery.cancel_scope.cancel()
        finally:
            if fs is not None:
                for state in fs.context.states.values():
                    state.drop_spool()
            index.close()
            registry.close()
            self._crashed()
            spool.close()

    def _instance(self, registry: Registry, store: Any) -> Any:
        settings = SimpleNamespace(
            slug="x/y", mounts_dir=self.base / "mounts", directory=self.base, spool_place=self.spool_place
        )
        return SimpleNamespace(
            registry=registry, store=store, settings=settings, user=lambda: None, hold=lambda: None, prove=lambda: None
        )

    def run_alone(self, work: Callable[[Any], object], *, crash_at: int = 0) -> bool:
        """Do what the CLI, the API and recovery do, ``work(instance)``, while nothing is mounted. Returns whether it
        was crashed at the given step (0: never)."""
        self.steps, self.crash_at, self.mounted = [], crash_at, False
        registry = self._registry()
        try:
            work(self._instance(registry, Stepped(self)))
        except Crash:
            return True
        finally:
            self.crash_at, self.gone, self.mounted = 0, False, True
            registry.close()
            self._crashed()
        return False

    def finish_alone(self, *, crash_at: int = 0) -> bool:
        """Store, move and delete all pending work while nothing is mounted. Returns whether it was crashed."""

        def finish(instance: Any) -> None:
            for _ in range(ROUNDS):
                if instance.registry.journal.entries():
                    recover.finish_all(instance)

        return self.run_alone(finish, crash_at=crash_at)

    def run(self, scenario: Callable[[User], Awaitable[None]], user: User, *, crash_at: int = 0) -> bool:
        """Do a scenario. Returns whether it was crashed at the given step (0: never)."""
        self.steps, self.crash_at = [], crash_at

        async def main() -> None:
            async with self.living() as fs:
                user.attach(fs)
                with trio.fail_after(3600):
                    await scenario(user)

        try:
            with jumping(self.clock):
                trio.run(main, clock=self.clock)
        except BaseException as error:
            crashes = error.split(Crash) if isinstance(error, BaseExceptionGroup) else None
            if not (isinstance(error, Crash) or (crashes and crashes[0] is not None and crashes[1] is None)):
                raise
            user.crashed()
            return True
        finally:
            self.crash_at = 0
        user.forget_handles()
        return False

    def check(self, user: User) -> None:
        """Start again with an empty cache, finish all pending work, and compare tree, bytes, registry and storage."""
        shutil.rmtree(self.cache_dir, ignore_errors=True)
        problems: list[str] = []

        async def look(again: User) -> None:
            await again.compare()
            await again.sync()
            await again.compare()
            problems.extend(self.problems(again.fs.context.registry))

        self.run(look, user)
        assert not problems, problems

    def problems(self, registry: Registry) -> list[str]:
        """What is wrong with registry, storage and spool when no work is pending."""
        found = check_tree(registry)
        found += [f"journal: {entry}" for entry in registry.journal.entries()]
        found += [f"spool: {path.name}" for path in self.spool.iterdir()]
        objects = {stat.key for stat in self.store.list()}
        wanted: dict[str, str] = {}
        for record in registry.artifacts.filter(visibility=None):
            key = record.revision.object_key
            if key in wanted:
                found.append(f"object {key} is of {wanted[key]} and of {record.uid}")
            wanted[key] = record.uid
            try:
                data = self.store.get(key, etag=record.revision.etag)
            except StorageError as error:
                found.append(f"object of {record.key} ({record.uid}): {error}")
                continue
            blocks = b"".join(hashing.hash_block(data[at : at + BLOCK_SIZE]) for at in range(0, len(data), BLOCK_SIZE))
            if blocks != record.revision.content.blocks or len(data) != record.size:
                found.append(f"object {key} of {record.key}: {data[:40]!r} is not what was saved")
            right = is_in_place(key, record.uid, record.suffix, record.key, record.key_is_virtual)
            if not right and record.visibility != TRASH:
                found.append(f"object of {record.key} is at {key}")
        found += [f"object {key} is nobody's" for key in sorted(objects - wanted.keys())]
        found += [f"upload {upload}" for upload in getattr(self.store, "unfinished", {})]
        found += [f"record of an upload: {row}" for row in registry.db.all("SELECT * FROM upload")]
        found += [f"record of a part: {row}" for row in registry.db.all("SELECT journal_id, number FROM part")]
        return found


class _Rows:
    """Fetched rows with the interface of a cursor."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def fetchone(self) -> Any:
        return self._rows[0] if self._rows else None

    def fetchall(self) -> list[Any]:
        return self._rows


@dataclass(eq=False)
class Node:
    """A regular file of the model: its content now, and its possible contents after a crash."""

    data: bytes = b""
    since: list[bytes] = field(default_factory=list)

    @contextlib.contextmanager
    def becoming(self, data: bytes) -> Iterator[None]:
        """The call in the body changes the bytes, unless it fails."""
        old = self.data
        self.since.append(old)
        self.data = data
        try:
            yield
        except LamfsError:
            self.data = old
            raise

    def acknowledged(self) -> None:
        self.since.clear()

    def may_be(self, data: bytes) -> bool:
        return data == self.data or data in self.since


@dataclass(eq=False)
class Open:
    """An open handle of the model."""

    number: int
    node: Node
    fino: int
    writable: bool


class User:
    """Makes system calls on a FileSystem, as a kernel would, and on the model. Paths have no leading slash.

    ``tree``: the expected tree; None stands for a directory. ``maybe``: another possible tree, if the call that makes
    the difference did not return.
    """

    def __init__(self) -> None:
        self.tree: dict[str, Node | None] = {}
        self.maybe: dict[str, Node | None] | None = None
        self.handles: list[Open] = []
        self.fs: FileSystem = None  # type: ignore[assignment]

    def attach(self, fs: FileSystem) -> None:
        self.fs = fs
        self.handles = []

    @property
    def mover(self) -> DirectMover:
        mover: Any = self.fs.context.mover
        assert isinstance(mover, DirectMover)
        return mover

    def crashed(self) -> None:
        """Forget the handles. Any version of what they wrote is possible now."""
        self.handles = []

    def forget_handles(self) -> None:
        self.handles = []

    # -- looking ------------------------------------------------------------------------------------------------

    def find(self, path: str) -> int:
        """FUSE inode of a path. Raises FileNotFoundError."""
        fino = ROOT_INO
        for name in path.split("/") if path else ():
            found = self.fs.lookup(fino, name.encode())
            if found is None:
                raise FileNotFoundError(path)
            fino = found[0]
        return fino

    def _at(self, path: str) -> tuple[int, bytes]:
        folder, _, name = path.rpartition("/")
        return self.find(folder), name.encode()

    async def read(self, path: str) -> bytes:
        """All bytes of a file."""
        fino = self.find(path)
        handle = await self.fs.open(fino, os.O_RDONLY)
        try:
            size = self.fs.getattr(fino).size
            data = bytes(await self.fs.read(handle, 0, size + 10))
            assert len(data) == size, f"{path}: {len(data)} bytes, stat says {size}"
            return data
        finally:
            self.fs.release(handle)

    async def actual(self) -> dict[str, bytes | None]:
        """Everything in the tree."""
        found: dict[str, bytes | None] = {}

        async def walk(fino: int, prefix: str) -> None:
            for _, name, child, inode in list(self.fs.entries(fino, 0)):
                if name in (b".", b"..") or (fino == ROOT_INO and name == b".lamindb"):
                    continue
                path = prefix + name.decode()
                if stat.S_ISDIR(inode.mode):
                    found[path] = None
                    await walk(child, path + "/")
                else:
                    found[path] = await self.read(path)

        await walk(ROOT_INO, "")
        return found

    async def compare(self) -> None:
        """Compare the tree with the model. If the model allows a choice, the actual tree is the truth from now on."""
        actual = await self.actual()
        wrong = []
        for tree in (self.tree, self.maybe):
            if tree is None:
                continue
            wrong = _differences(tree, actual)
            if not wrong:
                self.tree, self.maybe = tree, None
                for path, node in tree.items():
                    if node is not None:
                        node.data = actual[path] or b""
                        node.since.clear()
                return
        raise AssertionError("; ".join(wrong))

    # -- calls --------------------------------------------------------------------------------------------------

    async def sync(self) -> None:
        """Wait until no work is pending."""
        with trio.move_on_after(60):  # a retry may be 8 s away, and the machine busy
            await self.fs.sync_all()
            return
        registry = self.fs.context.registry
        artifacts = [
            f"{record.uid} {record.key} v{record.visibility} in {record.revision.object_key}"
            for record in registry.artifacts.filter(visibility=None)
        ]
        raise AssertionError(f"still owed: {registry.journal.entries()}\nartifacts: {artifacts}")

    @contextlib.contextmanager
    def _changing(self, tree: dict[str, Node | None]) -> Iterator[None]:
        """The call in the body turns the tree into another. If it does not return, either tree is possible."""
        self.maybe = tree
        try:
            yield
        except OSError:
            self.maybe = None
            raise
        except LamfsError:
            self.maybe = None
            raise
        self.tree, self.maybe = tree, None

    async def create(self, path: str) -> Open:
        node = Node()
        with self._changing({**self.tree, path: node}):
            parent, name = self._at(path)
            number, fino, _ = self.fs.files.create(parent, name, 0o644, os.O_RDWR, 0, 0)
        opened = Open(number, node, fino, True)
        self.handles.append(opened)
        return opened

    async def open(self, path: str, flags: int = os.O_RDWR) -> Open:
        node = self.tree[path]
        assert node is not None
        fino = self.find(path)
        with node.becoming(b"" if flags & os.O_TRUNC else node.data):
            number = await self.fs.open(fino, flags)
        opened = Open(number, node, fino, flags & os.O_ACCMODE != os.O_RDONLY)
        self.handles.append(opened)
        return opened

    async def pwrite(self, opened: Open, data: bytes, offset: int) -> None:
        if not data:
            return  # the kernel does not pass an empty write on
        old = opened.node.data
        with opened.node.becoming(old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]):
            await self.fs.files.write(opened.number, offset, data)

    async def ftruncate(self, opened: Open, size: int) -> None:
        with opened.node.becoming(opened.node.data[:size].ljust(size, b"\0")):
            await self.fs.setattr(opened.fino, Changes(size=size))

    async def pread(self, opened: Open) -> None:
        """Compare what a handle reads with the model."""
        data = bytes(await self.fs.read(opened.number, 0, len(opened.node.data) + 10))
        assert data == opened.node.data, (data[:60], opened.node.data[:60])

    async def fsync(self, opened: Open) -> None:
        await self.fs.fsync(opened.number)
        opened.node.acknowledged()

    async def close(self, opened: Open) -> None:
        self.handles.remove(opened)
        await self.fs.flush(opened.number)
        if opened.writable:
            opened.node.acknowledged()
        self.fs.release(opened.number)

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file as ``cp`` and shells do."""
        opened = await (self.open(path, os.O_RDWR | os.O_TRUNC) if path in self.tree else self.create(path))
        if data:
            await self.pwrite(opened, data, 0)
        await self.close(opened)

    async def rename(self, old: str, new: str) -> None:
        """rename(2), also over an existing file."""
        if self.tree[old] is self.tree.get(new, ...) and self.tree[old] is not None:
            tree = self.tree
        else:
            tree = {path: node for path, node in self.tree.items() if path != old and not path.startswith(old + "/")}
            tree |= {
                new + path[len(old) :]: node
                for path, node in self.tree.items()
                if path == old or path.startswith(old + "/")
            }
        with self._changing(tree):
            timed(self.fs).names.rename(*self._at(old), *self._at(new), 0)

    async def link(self, old: str, new: str) -> None:
        with self._changing({**self.tree, new: self.tree[old]}):
            timed(self.fs).names.link(self.find(old), *self._at(new))

    async def unlink(self, path: str) -> None:
        with self._changing({name: node for name, node in self.tree.items() if name != path}):
            timed(self.fs).names.unlink(*self._at(path))

    async def mkdir(self, path: str) -> None:
        with self._changing({**self.tree, path: None}):
            self.fs.names.make(*self._at(path), stat.S_IFDIR | 0o755, 0, 0)

    async def rmdir(self, path: str) -> None:
        with self._changing({name: node for name, node in self.tree.items() if name != path}):
            timed(self.fs).names.rmdir(*self._at(path))

    def revision(self, path: str) -> Revision:
        """The stored revision of the artifact at a path."""
        record = self.fs.context.registry.artifacts.by_uid(self.uid(path))
        assert record is not None
        return record.revision

    def uid(self, path: str) -> str:
        """uid of the artifact at a path."""
        record = self.fs.context.registry.artifacts.by_key(path)
        assert record is not None, f"no artifact at {path}"
        return record.uid


def _differences(tree: dict[str, Node | None], actual: dict[str, bytes | None]) -> list[str]:
    wrong = [f"{path} is missing" for path in tree.keys() - actual.keys()]
    wrong += [f"{path} should not be there" for path in actual.keys() - tree.keys()]
    for path in tree.keys() & actual.keys():
        node, data = tree[path], actual[path]
        if (node is None) != (data is None):
            wrong.append(f"{path} is of another kind")
        elif node is not None and data is not None and not node.may_be(data):
            wrong.append(f"{path} holds {data[:40]!r} ({len(data)}), not {node.data[:40]!r} ({len(node.data)})")
    return wrong


def no_entry(problem: OSError) -> bool:
    return problem.errno == errno.ENOENT
