"""The daemon's side of the mover: starting it, giving it jobs, restarting it. The trio loop only.

A job is one line out and one line back. Lines leave through one outbox, never from a task that could be cancelled in
the middle of one. A path ``/proc/<our pid>/fd/<n>`` names a duplicate of the descriptor from call to answer: ``n`` may
be closed and reused while the job waits in the mover's queue.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import trio

from lamfs import jsonlines
from lamfs.errors import LamfsError, StorageError, TransferDied
from lamfs.model import ContentHash, ObjectMeta, Revision
from lamfs.mover import beats, jobs
from lamfs.mover.jobs import Message
from lamfs.mover.parts import PartJobs
from lamfs.mover.process import END_TIMEOUT, Forked, duplicate, end, environment
from lamfs.storage.base import ANYTHING, ObjectStat, Over, StorageConfig
from lamfs.storage.stale import Meant

log = logging.getLogger(__name__)

Progress = Callable[[int], None]
Then = Callable[[LamfsError | None], None]

BACKOFF = (0.05, 5.0)
"""Seconds before the first and before any later restart; doubled in between."""
STEADY = 10.0
"""Seconds of life after which the backoff starts again from its beginning."""


class _Job:
    """A job without an answer yet. ``fds`` are ours to close when it has one."""

    __slots__ = ("beat", "done", "error", "fds", "op", "progress", "result", "then")

    def __init__(self, op: str, fds: list[int], progress: Progress | None, then: Then | None = None) -> None:
        self.op = op
        self.fds = fds
        self.progress = progress
        self.then = then
        """Called instead of setting ``done``; must not raise."""
        self.beat = beats.current()
        self.done = trio.Event()
        self.result: Any = None
        self.error: LamfsError | None = None

    def finish(self) -> None:
        for fd in self.fds:
            os.close(fd)
        if self.then is None:
            self.done.set()
        else:
            self.then(self.error)


class Mover(PartJobs):
    """Owns the mover process; restarts it when it dies (bounded backoff). The trio loop only.

    All job methods raise what the store raised, or TransferDied: the process ended, and the job may or may not have
    been done. It may be given again at once, and then waits for the restart. Cancelling a call drops its answer.
    """

    def __init__(self, config: StorageConfig, first: tuple[Forked, socket.socket] | None = None) -> None:
        """``first``: the first process and its socket, if it runs already."""
        self.config = config
        self._first = first
        self.pid: int | None = None
        """Process id of the mover; None while there is none."""
        self.restarts = 0
        """Number of restarts."""
        self.patience = END_TIMEOUT
        """Seconds that it may take to end when it is no longer needed."""
        self._sock: socket.socket | None = None
        self._running = False
        self._up = trio.Event()
        self._wake = trio.Event()
        self._outbox = bytearray()
        self._jobs: dict[int, _Job] = {}
        self._last_id = 0

    # ---- the process

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep one mover alive until cancelled; then end it, and kill it if it does not end.

        Raises StorageError when the first start fails.
        """
        self._running = True
        delay = BACKOFF[0]
        first = True
        try:
            while True:
                born = trio.current_time()
                try:
                    process, sock = await self._spawn()
                except OSError as error:
                    if first:
                        raise StorageError(f"The moving process cannot be started: {error}.") from error
                    log.error("The moving process cannot be started: %s. Trying again in %.1f s.", error, delay)
                else:
                    await self._attend(process, sock, task_status if first else trio.TASK_STATUS_IGNORED)
                    if trio.current_time() - born > STEADY:
                        delay = BACKOFF[0]
                    log.error(
                        "The moving process %d ended with status %s; starting another in %.2f s.",
                        process.pid,
                        process.returncode,
                        delay,
                    )
                first = False
                await trio.sleep(delay)
                delay = min(2 * delay, BACKOFF[1])
                self.restarts += 1
        finally:
            self._running = False
            self._up.set()  # wake those who wait for a restart: there will be none

    async def _spawn(self) -> tuple[trio.Process | Forked, socket.socket]:
        if self._first is not None:
            first, self._first = self._first, None
            first[1].setblocking(False)
            return first
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-m", "lamfs.mover.server", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    # "-m" puts the working directory first in sys.path: a user's json.py must not be found there
                    cwd="/",
                    env=environment(),
                )
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        return process, ours

    async def _attend(
        self, process: trio.Process | Forked, sock: socket.socket, task_status: trio.TaskStatus[None]
    ) -> None:
        """Serve one process until its socket ends, or until cancelled. The process has ended when this returns."""
        self._outbox = bytearray()
        self._sock, self.pid = sock, process.pid
        self._post(jsonlines.encode(jobs.pack_config(self.config)))
        self._up.set()
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_loop, sock)
                await self._read_loop(sock)
                nursery.cancel_scope.cancel()
        finally:
            self._sock, self.pid, self._up = None, None, trio.Event()
            sock.close()
            with trio.CancelScope(shield=True):
                await end(process, self.patience)
            self._fail_all(process.returncode)

    def _fail_all(self, status: int | None) -> None:
        left, self._jobs = self._jobs, {}
        for job in left.values():
            job.error = TransferDied(
                f"The process that moves bytes ended (status {status}) during a '{job.op}' job; give the job again."
            )
            job.finish()

    async def _read_loop(self, sock: socket.socket) -> None:
        lines = jsonlines.Lines()
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                data = sock.recv(1 << 18)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            for line in lines.feed(data):
                try:
                    self._answer(jsonlines.decode(line))
                except (ValueError, KeyError):
                    log.exception("The moving process wrote what is no answer; ending it.")
                    return

    def _answer(self, message: Message) -> None:
        ident = message["id"]
        job = self._jobs[ident]
        moved = message.get("progress")
        if job.beat is not None and ("ok" in message or "alive" in message or (moved or 0) > 0):
            job.beat()
        if moved and job.progress is not None:
            try:
                job.progress(moved)
            except Exception:
                log.exception("A progress callback failed.")
        if "ok" in message:
            job.result = message["ok"]
        elif "error" in message:
            job.error = jobs.unpack_error(message["error"])
        else:
            return
        del self._jobs[ident]
        job.finish()

    # ---- sending

    def _post(self, line: bytes) -> None:
        """Send a line, or as much of it as the socket takes now. The send loop sends the rest."""
        sock = self._sock
        assert sock is not None
        sent = 0
        if not self._outbox:
            try:
                sent = sock.send(line)
            except BlockingIOError:
                pass
            except OSError:
                return  # it is dying: the read loop will see it and fail the jobs
        if sent < len(line):
            self._outbox += line[sent:]
            self._wake.set()

    async def _send_loop(self, sock: socket.socket) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._outbox:
                await trio.lowlevel.wait_writable(sock)
                try:
                    with memoryview(self._outbox) as view:
                        sent = sock.send(view[: 1 << 18])
                except BlockingIOError:
                    continue
                except OSError:
                    return
                del self._outbox[:sent]

    async def _ready(self) -> None:
        """Wait until there is a process that takes jobs."""
        while self._sock is None:
            if not self._running:
                raise TransferDied("The process that moves bytes is not running: the mount is being ended.")
            await self._up.wait()

    async def _call(self, op: str, message: Message, *, paths: tuple[str, ...] = (), progress: Any = None) -> Any:
        fds: list[int] = []
        try:
            for name in paths:
                message[name] = duplicate(message[name], fds)
            await self._ready()
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self._last_id = ident = self._last_id + 1
        message["id"], message["op"] = ident, op
        if progress is not None:
            message["progress"] = True
        job = self._jobs[ident] = _Job(op, fds, progress)
        if job.beat is not None:
            message["alive"] = True
        self._post(jsonlines.encode(message))
        try:
            await job.done.wait()
        except trio.Cancelled:
            job.progress = None
            if ident in self._jobs and self._sock is not None:
                self._post(jsonlines.encode({"cancel": ident}))
            raise
        if job.error is not None:
            raise job.error
        return job.result

    # ---- the jobs

    async def hash(
        self,
        path: str,
        size: int | None = None,
        progress: Progress | None = None,
        *,
        bulk: bool = False,
        known: Mapping[int, bytes] | None = None,
        head: bytes | None = None,
        ends: str | None = None,
    ) -> ContentHash:
        """Hash the first ``size`` bytes (None: all) of a file. StorageError with the errno of open or read.

        ``bulk``: it takes long, and the jobs of other files must not wait for it. See hashing.hash_fd for the rest.
        """
        message: Message = {"path": path, "size": size, "bulk": bulk, "ends": ends}
        if head is not None:
            message["head"] = jobs.pack_bytes(head)
        if known:
            message["known"] = [list(known), jobs.pack_bytes(b"".join(known.values()))]
        reply = await self._call("hash", message, paths=("path",), progress=progress)
        return jobs.unpack_content(reply)

    async def put(
        self,
        path: str,
        key: str,
        *,
        consume: bool = False,
        progress: Progress | None = None,
        meta: ObjectMeta | None = None,
        over: Over = ANYTHING,
    ) -> ObjectStat:
        """Store a file under ``key``: ObjectStore.put_file. ``progress`` gets byte counts, about 10 a second."""
        message = {"path": path, "key": key, "consume": consume, "meta": jobs.pack_meta(meta), "over": list(over)}
        return jobs.unpack_stat(await self._call("put", message, paths=("path",), progress=progress))

    async def put_many(
        self, files: Sequence[tuple[str, str, Revision | None, ObjectMeta | None]]
    ) -> list[ObjectStat | LamfsError]:
        """Store small files one by one. Returns the object or the error of each.

        Each file is given as path, key, an object that may be copied instead, and the metadata to store with it.
        """
        packed = [
            [path, key, twin and [twin.object_key, twin.etag, twin.size], jobs.pack_meta(meta)]
            for path, key, twin, meta in files
        ]
        reply = await self._call("put_many", {"files": packed})
        return [jobs.unpack_error(each) if isinstance(each, dict) else jobs.unpack_stat(each) for each in reply]

    async def put_bytes(
        self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        """Store a small object, perhaps conditionally: ObjectStore.put_bytes. Never waits behind transfers."""
        message = {
            "key": key,
            "data": jobs.pack_bytes(data),
            "if_none_match": if_none_match,
            "if_match": if_match,
        }
        return jobs.unpack_stat(await self._call("put_bytes", message))

    async def copy(
        self,
        src: str,
        dst: str,
        *,
        etag: str | None = None,
        size: int | None = None,
        meta: ObjectMeta | None = None,
        over: Over = ANYTHING,
    ) -> ObjectStat:
        """Copy an object within the storage: ObjectStore.copy."""
        message = {"src": src, "dst": dst, "etag": etag, "size": size, "meta": jobs.pack_meta(meta), "over": list(over)}
        return jobs.unpack_stat(await self._call("copy", message))

    async def delete(self, meant: Meant) -> list[str]:
        """Delete objects: stale.delete_meant."""
        wanted = {key: None if etags is None else sorted(etags) for key, etags in meant.items()}
        left: list[str] = await self._call("delete", {"meant": wanted})
        return left

    async def head(self, key: str) -> ObjectStat:
        """Stat one object. Raises ObjectMissing."""
        return jobs.unpack_stat(await self._call("head", {"key": key}))

    async def meta(self, key: str) -> ObjectMeta | None:
        """ObjectStore.meta."""
        return jobs.unpack_meta(await self._call("meta", {"key": key}))

    async def get(self, key: str, *, length: int, etag: str | None = None) -> bytes:
        """The first ``length`` bytes of an object at most, through the socket. Raises ObjectMissing, ObjectChanged."""
        return jobs.unpack_bytes(await self._call("get", {"key": key, "length": length, "etag": etag}))

    async def fetch(
        self,
        key: str,
        *,
        etag: str,
        offset: int,
        length: int,
        path: str,
        digest: bytes | None,
        leaves: bytes | None = None,
    ) -> None:
        """Write a range of the object's revision ``etag`` into the file at ``path``, at the same offset.

        With ``digest`` (BLAKE3 of the range) or ``leaves`` (the hashes of its leaves, the first of which begins at
        ``offset``) the bytes are checked before they are written. Raises ObjectChanged, ObjectMissing,
        StorageUnavailable, and DamagedData when a second GET also gives wrong bytes.
        """
        await self._call("fetch", jobs.fetch(key, etag, offset, length, path, digest, leaves), paths=("path",))

    async def fetch_stretch(
        self,
        key: str,
        *,
        etag: str,
        offset: int,
        blocks: Sequence[tuple[int, bytes]],
        path: str,
        came: Callable[[int], None],
    ) -> None:
        """As ``fetch``, of consecutive ``blocks`` from ``offset`` on by one GET; each is given as length and BLAKE3.

        ``came`` is called with the number of further blocks that are in the file. Raises as fetch; DamagedData at the
        first wrong bytes.
        """
        packed = [[length, digest.hex()] for length, digest in blocks]
        message = {"key": key, "etag": etag, "offset": offset, "blocks": packed, "path": path}
        await self._call("fetch_stretch", message, paths=("path",), progress=came)

    async def fetch_files(
        self, files: Sequence[jobs.WholeFile], arrived: Callable[[int, LamfsError | None], None]
    ) -> None:
        """Fetch small objects whole, each as ``fetch`` does. The jobs are sent together. Returns when all have ended.

        ``arrived`` is called once for each, with its number and, if it could not be fetched, the error.
        """
        await self._ready()
        left = len(files)
        last = trio.Event()

        def then(number: int, error: LamfsError | None) -> None:
            nonlocal left
            left -= 1
            try:
                arrived(number, error)
            except Exception:
                log.exception("A file has come, but could not be taken.")
            if not left:
                last.set()

        lines = []
        given: dict[int, _Job] = {}
        for number, file in enumerate(files):
            fds: list[int] = []
            try:
                path = duplicate(file.path, fds)
            except StorageError as error:
                then(number, error)
                continue
            self._last_id = ident = self._last_id + 1
            message = jobs.fetch(file.key, file.etag, 0, file.length, path, file.digest, None)
            message["id"], message["op"] = ident, "fetch"
            given[ident] = self._jobs[ident] = job = _Job("fetch", fds, None, partial(then, number))
            if job.beat is not None:
                message["alive"] = True
            lines.append(jsonlines.encode(message))
        self._post(b"".join(lines))
        try:
            await last.wait()
        except trio.Cancelled:
            for ident, job in given.items():
                job.then = None
                if ident in self._jobs and self._sock is not None:
                    self._post(jsonlines.encode({"cancel": ident}))
            raise

    async def verify(self, path: str, *, offset: int, length: int, digest: bytes) -> bool:
        """Whether a range of a local file has this BLAKE3. False also when the file is too short."""
        message = {"path": path, "offset": offset, "length": length, "digest": digest.hex()}
        return bool(await self._call("verify", message, paths=("path",)))

    async def graft(self, src: str, dst: str, *, offset: int, length: int, digest: bytes) -> bool:
        """Copy a range of a local file into another one, at the same offset. False: it does not have this BLAKE3."""
        message = {"src": src, "dst": dst, "offset": offset, "length": length, "digest": digest.hex()}
        return bool(await self._call("graft", message, paths=("src", "dst")))

    async def clone(self, src: str, dst: str) -> None:
        """Make the new file ``dst`` (mode 0600) with the bytes and holes of ``src``, by reflink where that works.

        Raises StorageError with EEXIST when ``dst`` exists, StorageFull without space (``dst`` is then removed).
        """
        await self._call("clone", {"src": src, "dst": dst}, paths=("src",))

    async def visit(self, path: str) -> None:
        """Look at a path in our own mount, which this process must not do itself. Raises StorageError."""
        await self._call("visit", {"path": path})
