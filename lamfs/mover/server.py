"""The mover of a mount: S3, hashing and copying happen here.

The first one is a fork of the daemon, later ones are ``python -m lamfs.mover.server FD``.

The main thread reads jobs and never writes to the socket, so the daemon can always send, whatever the workers do.
Workers answer under one lock. So a daemon that is slow to read stalls workers but never the reading of jobs, and two
full socket buffers cannot wait for each other. Reads, writes, parts of large files and control jobs have their own
pools.

The process ends as soon as the socket does, in the middle of whatever it does: the journal knows what is pending, and
every job may be cut off at any point. Signals of a terminal are ignored; the daemon decides.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

from lamfs import copying, hashing, jsonlines
from lamfs.errors import InvalidArgument, LamfsError, StorageError
from lamfs.mover import fetching, jobs
from lamfs.mover.become import become_mover, give_memory_back
from lamfs.mover.buffers import Buffers
from lamfs.mover.jobs import Message
from lamfs.mover.storing import SmallFiles
from lamfs.storage import open_store, signs
from lamfs.storage.base import Over
from lamfs.storage.stale import delete_meant

if TYPE_CHECKING:
    from lamfs.storage.base import MultipartStore, ObjectStore

log = logging.getLogger("lamfs.mover")

READ_THREADS = 32
"""A read that stalls holds a thread for as long as storage may take to answer. Other reads must find a free one."""
WRITE_THREADS = 8
PART_THREADS = 8
HASH_THREADS = 8
BULK_THREADS = 4
CONTROL_THREADS = 2
PROGRESS_SECONDS = 0.1
"""Seconds between two progress messages of one job, at least."""

IDLE_SECONDS = 2.0
"""Seconds without a job after which memory is freed."""


class _Cancelled(Exception):
    """Nobody waits for this job any more."""


class _Job:
    """One job: its message, its pool, whether it has started, and whether somebody still waits.

    Made by the main thread, run by one worker.
    """

    __slots__ = ("_lock", "_said", "_sent", "_server", "begun", "cancelled", "message", "moved", "pool")

    def __init__(self, server: Server, message: Message) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._sent = self._said = time.monotonic()
        self.message = message
        self.pool = server.pool_of(message)
        self.begun = False
        self.cancelled = False
        self.moved = 0
        """Bytes moved that no message has reported yet."""

    def progress(self) -> Callable[[int], None] | None:
        """The progress callback for a store."""
        if self.message.get("progress"):
            return self._moved
        return self.alive if self.message.get("alive") else None

    def _moved(self, count: int) -> None:
        with self._lock:
            self.moved += count
            now = time.monotonic()
            if now - self._sent < PROGRESS_SECONDS:
                return
            told, self.moved, self._sent = self.moved, 0, now
        if not self._server.send({"id": self.message["id"], "progress": told}, wait=False):
            with self._lock:
                self.moved += told

    def alive(self, count: int = 0) -> None:
        """Something was done for the job: report it now and then, also to jobs that wait in the queue behind it."""
        self.say_alive()
        self._server.went_on(self.pool)

    def say_alive(self) -> None:
        """Report that the job, or its queue, makes progress, if somebody waits for that."""
        now = time.monotonic()
        if self.message.get("alive") and now - self._said >= PROGRESS_SECONDS:
            self._said = now
            self._server.send({"id": self.message["id"], "alive": 1}, wait=False)

    def went_on(self) -> None:
        """Called between two files of a job."""
        self.stop_if_cancelled()
        self.alive()

    def stop_if_cancelled(self) -> None:
        """Called between two things that a job does."""
        if self.cancelled:
            raise _Cancelled

    def hashed(self, count: int) -> None:
        """Progress of hashing, which can be cancelled between blocks."""
        self.stop_if_cancelled()
        if self.message.get("progress"):
            self._moved(count)
        self.alive()


class Server:
    """Reads jobs from the socket, runs them in pools, answers. The main thread owns it."""

    def __init__(self, sock: socket.socket, store: ObjectStore | None = None) -> None:
        """``store``: used if it is the one that the daemon names."""
        self._sock = sock
        self._send_lock = threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._reads = ThreadPoolExecutor(READ_THREADS, "reads")
        self._writes = ThreadPoolExecutor(WRITE_THREADS, "writes")
        self._parts = ThreadPoolExecutor(PART_THREADS, "parts")
        self._hashes = ThreadPoolExecutor(HASH_THREADS, "hashes")
        self._bulk = ThreadPoolExecutor(BULK_THREADS, "bulk")
        self._control = ThreadPoolExecutor(CONTROL_THREADS, "control")
        self._store = store
        self._store_error: LamfsError | None = None
        self.buffers = Buffers()
        self.small = SmallFiles()
        self._went_on: dict[ThreadPoolExecutor, float] = {}
        self._used = False
        """Whether there was a job since memory was freed."""

    def run(self) -> None:
        """Serve until the socket ends. Raises OSError when it breaks otherwise."""
        lines = jsonlines.Lines()
        configured = False
        while data := self._receive():
            for line in lines.feed(data):
                if configured:
                    self._accept(jsonlines.decode(line))
                else:
                    self._configure(jsonlines.decode(line))
                    configured = True

    def _receive(self) -> bytes:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while self._used and not poll.poll(IDLE_SECONDS * 1000):
            if not self._jobs:
                self._used = False
                self.buffers.drop()
                give_memory_back()
        return self._sock.recv(1 << 18)

    def _configure(self, message: Message) -> None:
        try:
            config = jobs.unpack_config(message)
            if self._store is None or self._store.config != config:
                self._store = open_store(config)
        except Exception as error:
            log.exception("The storage could not be opened.")
            self._store_error = jobs.translate(error, f"opening the storage {message.get('root')}")
        gc.freeze()
        gc.enable()
        if self._store is not None:
            self._control.submit(self._prepare, self._store)

    def _prepare(self, store: ObjectStore) -> None:
        store.prepare()
        gc.freeze()

    def _accept(self, message: Message) -> None:
        if "cancel" in message:
            if found := self._jobs.get(message["cancel"]):
                found.cancelled = True
            return
        job = _Job(self, message)
        self._jobs[message["id"]] = job
        self._used = True
        job.pool.submit(self._work, job)

    def pool_of(self, message: Message) -> ThreadPoolExecutor:
        """The pool of a job."""
        op = message["op"]
        if op in jobs.READS:
            return self._reads
        if op in jobs.CONTROL:
            return self._control
        if op in jobs.HASHES:
            return self._bulk if message.get("bulk") else self._hashes
        return self._parts if op in jobs.PARTS else self._writes

    def went_on(self, pool: ThreadPoolExecutor) -> None:
        """A job makes progress: the jobs that wait for its pool are alive too. Any worker."""
        now = time.monotonic()
        if now - self._went_on.get(pool, 0.0) >= PROGRESS_SECONDS:
            self._went_on[pool] = now
            for job in list(self._jobs.values()):
                if job.pool is pool and not job.begun:
                    job.say_alive()

    def _work(self, job: _Job) -> None:
        message = job.message
        reply: Message = {"id": message["id"]}
        job.begun = True
        try:
            if job.cancelled:
                raise _Cancelled
            handler = _HANDLERS.get(message["op"])
            if handler is None:
                raise InvalidArgument(f"The moving process knows no job '{message['op']}'.")
            with signs.told(job.alive):
                reply["ok"] = handler(self, job)
        except _Cancelled:
            reply["error"] = jobs.pack_error(StorageError("The job was cancelled."))
        except BaseException as error:
            known = jobs.translate(error, jobs.describe(message))
            if not isinstance(error, (LamfsError, OSError, EOFError)):
                log.exception("%s failed unexpectedly.", jobs.describe(message))
            reply["error"] = jobs.pack_error(known)
            reply["error"]["message"] = copying.shown(str(known))
        del self._jobs[message["id"]]
        if job.moved:
            reply["progress"] = job.moved
        self.send(reply)
        if "ok" in reply:
            self.went_on(job.pool)

    def send(self, message: Message, *, wait: bool = True) -> bool:
        """Send one message. With ``wait=False``, give up (False) when another thread is sending."""
        line = jsonlines.encode(message)
        if not self._send_lock.acquire(blocking=wait):
            return False
        try:
            self._sock.sendall(line)
        except OSError:
            pass  # the daemon is gone: the main thread sees the end of the socket and ends the process
        finally:
            self._send_lock.release()
        return True

    @property
    def store(self) -> ObjectStore:
        """The storage. Raises the error that kept it from being opened."""
        if self._store is None:
            assert self._store_error is not None
            raise jobs.again(self._store_error)
        return self._store

    @property
    def parts(self) -> MultipartStore:
        """The storage, if it has multipart uploads. Raises the error that kept it from being opened."""
        parts = self.store.parts
        if parts is None:
            raise InvalidArgument("This storage takes objects as a whole only.")
        return parts


def _hash(server: Server, job: _Job) -> Any:
    with copying.opened(job.message["path"], os.O_RDONLY) as fd:
        size = job.message.get("size")
        numbers, packed = job.message.get("known", ((), ""))
        digests = jobs.unpack_bytes(packed)
        known = {number: digests[32 * at : 32 * at + 32] for at, number in enumerate(numbers)}
        size = os.fstat(fd).st_size if size is None else size
        head, ends = job.message.get("head"), job.message.get("ends")
        head = None if head is None else jobs.unpack_bytes(head)
        return jobs.pack_content(hashing.hash_fd(fd, size, job.hashed, known=known, head=head, ends=ends))


def _put(server: Server, job: _Job) -> Any:
    m = job.message
    return jobs.pack_stat(
        server.store.put_file(
            m["key"],
            m["path"],
            consume=m.get("consume", False),
            progress=job.progress(),
            meta=jobs.unpack_meta(m.get("meta")),
            **Over(*m["over"])._asdict(),
        )
    )


def _put_many(server: Server, job: _Job) -> Any:
    files = [(path, key, twin, jobs.unpack_meta(meta)) for path, key, twin, meta in job.message["files"]]
    found = server.small.put_many(server.store, files, job.went_on, job.alive)
    return [jobs.pack_error(each) if isinstance(each, LamfsError) else jobs.pack_stat(each) for each in found]


def _put_bytes(server: Server, job: _Job) -> Any:
    m = job.message
    data = jobs.unpack_bytes(m["data"])
    return jobs.pack_stat(
        server.store.put_bytes(m["key"], data, if_none_match=m["if_none_match"], if_match=m["if_match"])
    )


def _copy(server: Server, job: _Job) -> Any:
    m = job.message
    meta = jobs.unpack_meta(m.get("meta"))
    how = Over(*m["over"])._asdict()
    return jobs.pack_stat(server.store.copy(m["src"], m["dst"], etag=m["etag"], size=m["size"], meta=meta, **how))


def _delete(server: Server, job: _Job) -> Any:
    return delete_meant(server.store, job.message["meant"])


def _head(server: Server, job: _Job) -> Any:
    return jobs.pack_stat(server.store.head(job.message["key"]))


def _meta(server: Server, job: _Job) -> Any:
    return jobs.pack_meta(server.store.meta(job.message["key"]))


def _get(server: Server, job: _Job) -> Any:
    m = job.message
    return jobs.pack_bytes(server.store.get(m["key"], length=m["length"], etag=m["etag"]))


def _fetch(server: Server, job: _Job) -> Any:
    with copying.opened(job.message["path"], os.O_WRONLY) as fd:
        fetching.fetch(server.store, server.buffers, job.message, fd)


def _fetch_stretch(server: Server, job: _Job) -> Any:
    def came() -> None:
        server.send({"id": job.message["id"], "progress": 1})

    with copying.opened(job.message["path"], os.O_WRONLY) as fd:
        fetching.fetch_stretch(server.store, server.buffers, job.message, fd, came)


def _verify(server: Server, job: _Job) -> Any:
    m = job.message
    with copying.opened(m["path"], os.O_RDONLY) as fd, server.buffers.view(m["length"]) as data:
        return _read_right(fd, data, m["offset"], m["digest"])


def _read_right(fd: int, data: memoryview, offset: int, digest: str) -> bool:
    """Read a range of a file into ``data``. Returns whether it is there and has this BLAKE3.

    The kernel does not read ahead: bytes behind the range would get into its memory without being hashed.
    """
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    done = 0
    while done < len(data):
        with data[done:] as rest:
            got = os.preadv(fd, [rest], offset + done)
        if got == 0:
            return False
        done += got
    return hashing.hash_block(data) == bytes.fromhex(digest)


def _graft(server: Server, job: _Job) -> Any:
    m = job.message
    with copying.opened(m["src"], os.O_RDONLY) as src, copying.opened(m["dst"], os.O_WRONLY) as dst:
        with server.buffers.view(m["length"]) as data:
            if not _read_right(src, data, m["offset"], m["digest"]):
                return False
            copying.write_full(dst, data, m["offset"])
            return True


def _clone(server: Server, job: _Job) -> Any:
    src, dst = job.message["src"], job.message["dst"]
    with copying.opened(src, os.O_RDONLY) as source:
        with copying.opened(dst, os.O_RDWR | os.O_CREAT | os.O_EXCL) as target:
            try:
                with contextlib.suppress(EOFError):  # truncated meanwhile; whoever compares hashes sees it
                    copying.copy_fd(source, target, job.alive)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(dst)
                raise


def _begin_upload(server: Server, job: _Job) -> Any:
    return server.parts.begin_upload(job.message["key"], jobs.unpack_meta(job.message.get("meta")))


def _send_part(server: Server, job: _Job) -> Any:
    m = job.message
    # Hash first: then the bytes are in memory when they are sent.
    hashes = _hash_range(server, job) if m["hashed"] else None
    return hashes, server.parts.send_part(
        m["key"], m["upload_id"], m["number"], m["path"], m["offset"], m["length"], job.progress()
    )


def _hash_range(server: Server, job: _Job) -> Any:
    with copying.opened(job.message["path"], os.O_RDONLY) as fd:
        return jobs.pack_content(hashing.hash_range(fd, job.message["offset"], job.message["length"], job.alive))


def _hash_ends(server: Server, job: _Job) -> Any:
    with copying.opened(job.message["path"], os.O_RDONLY) as fd:
        ends, head = hashing.hash_ends(fd, job.message["size"], job.alive)
        return ends, jobs.pack_bytes(head)


def _copy_part(server: Server, job: _Job) -> Any:
    m = job.message
    return server.parts.copy_part(
        m["key"], m["upload_id"], m["number"], m["source"], m["etag"], m["offset"], m["length"]
    )


def _complete_upload(server: Server, job: _Job) -> Any:
    m = job.message
    return server.parts.complete_upload(m["key"], m["upload_id"], m["etags"], **Over(*m["over"])._asdict())


def _abort_upload(server: Server, job: _Job) -> Any:
    server.store.abort_upload(job.message["key"], job.message["upload_id"])


def _list_parts(server: Server, job: _Job) -> Any:
    found = server.parts.list_parts(job.message["key"], job.message["upload_id"])
    return [[part.number, part.size, part.etag] for part in found]


def _uploads_of(server: Server, job: _Job) -> Any:
    parts = server.store.parts  # a folder has none: what a registry says of its uploads is done
    return [] if parts is None else parts.uploads_of(job.message["key"])


def _visit(server: Server, job: _Job) -> Any:
    os.stat(job.message["path"])


_HANDLERS: dict[str, Callable[[Server, _Job], Any]] = {
    "hash": _hash,
    "put": _put,
    "put_many": _put_many,
    "put_bytes": _put_bytes,
    "copy": _copy,
    "delete": _delete,
    "head": _head,
    "meta": _meta,
    "get": _get,
    "fetch": _fetch,
    "fetch_stretch": _fetch_stretch,
    "verify": _verify,
    "clone": _clone,
    "graft": _graft,
    "begin_upload": _begin_upload,
    "send_part": _send_part,
    "copy_part": _copy_part,
    "hash_range": _hash_range,
    "hash_ends": _hash_ends,
    "complete_upload": _complete_upload,
    "abort_upload": _abort_upload,
    "list_parts": _list_parts,
    "uploads_of": _uploads_of,
    "visit": _visit,
}


def serve(sock: socket.socket, store: ObjectStore | None = None) -> NoReturn:
    """Serve the socket, then end the process without waiting for anything. ``store``: one that is open already."""
    status = 0
    try:
        Server(sock, store).run()
    except ConnectionError:
        pass
    except BaseException:
        log.exception("The moving process fails; the daemon starts another.")
        status = 1
    os._exit(status)  # not sys.exit, which waits for transfers that nobody wants any more


def main() -> None:
    """Serve the socket whose file descriptor is the only argument."""
    become_mover()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
