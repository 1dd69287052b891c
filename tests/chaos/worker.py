"""The only program of a chaos run that touches a mount: one step per line of JSON on stdin, its replies on stdout.

    {"do": "write", "path": "a/b", "pieces": [[0, 5, 7]], "how": "create"}
    {"ack": "closed"}                        each promise as soon as it is given
    {"done": true, "error": null, "at": "close", ...}

Paths are below the mount. Its root is opened for each step and must be that of another file system: what a dead daemon
has left as an ordinary folder is ENOTCONN here, and nothing is ever written to it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

from blake3 import blake3

from tests.chaos.content import CHUNK, Version, explain, explanation_to_json, stream_bytes, version_from

Step = dict[str, Any]


class Worker:
    """Runs the steps of one mount. ``at``: the call that is under way."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = mountpoint
        self._open: dict[str, int] = {}
        self._root = -1
        self.at = "open"

    def run(self, step: Step) -> dict[str, Any]:
        """One step; what it found. Raises OSError."""
        self.at = "root"
        self._root = os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if os.fstat(self._root).st_dev == os.stat(os.path.dirname(self._mountpoint)).st_dev:
                raise OSError(errno.ENOTCONN, "nothing is mounted here")
            self.at = str(step["do"])
            found: dict[str, Any] | None = getattr(self, f"do_{step['do']}")(step)
            return found or {}
        finally:
            os.close(self._root)

    def _ack(self, what: str) -> None:
        tell({"ack": what})

    # -- changes ------------------------------------------------------------------------------------------------

    def do_write(self, step: Step) -> None:
        """A whole file: ``how`` is create, truncate, or atomic (a temporary file, renamed over the other)."""
        path, how = step["path"], step["how"]
        target = step["temporary"] if how == "atomic" else path
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if how == "truncate" else os.O_EXCL)
        self.at = "open"
        fd = os.open(target, flags, 0o644, dir_fd=self._root)
        self._fill(fd, version_from(step["pieces"]), step)
        if how == "atomic":
            self.at = "rename"
            os.rename(target, path, src_dir_fd=self._root, dst_dir_fd=self._root)
            self._ack("renamed")

    def _fill(self, fd: int, version: Version, step: Step) -> None:
        with self._writing(fd, step):
            for chunk in version.chunks():
                write_all(fd, chunk)

    @contextlib.contextmanager
    def _writing(self, fd: int, step: Step) -> Iterator[None]:
        """What is written inside of the block is synced, if the step says so, and then the file is closed."""
        try:
            self.at = "write"
            yield
            if step.get("fsync"):
                self.at = "fsync"
                os.fsync(fd)
                self._ack("fsynced")
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        self.at = "close"
        os.close(fd)
        self._ack("closed")

    def do_patch(self, step: Step) -> None:
        """Change parts of a file in place: ``writes``, then ``size`` when it is given."""
        self.at = "open"
        fd = os.open(step["path"], os.O_RDWR, dir_fd=self._root)
        with self._writing(fd, step):
            for start, end, stream in step["writes"]:
                for at in range(start, end, CHUNK):
                    stop = min(at + CHUNK, end)
                    write_all(fd, stream_bytes(stream, at, stop), at)
            if step.get("size") is not None:
                self.at = "truncate"
                os.ftruncate(fd, step["size"])

    def do_rename(self, step: Step) -> None:
        os.rename(step["path"], step["to"], src_dir_fd=self._root, dst_dir_fd=self._root)
        self._ack("renamed")

    def do_unlink(self, step: Step) -> None:
        os.unlink(step["path"], dir_fd=self._root)
        self._ack("unlinked")

    def do_mkdir(self, step: Step) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(step["path"], dir_fd=self._root)

    # -- handles that stay open ---------------------------------------------------------------------------------

    def do_hold(self, step: Step) -> None:
        """Open a file, and keep it open under the name ``handle``."""
        flags = os.O_RDWR | (os.O_TRUNC if step.get("truncate") else 0)
        self._open[step["handle"]] = os.open(step["path"], flags, dir_fd=self._root)

    def do_put(self, step: Step) -> None:
        """Write a piece into an open file."""
        start, end, stream = step["piece"]
        for at in range(start, end, CHUNK):
            write_all(self._open[step["handle"]], stream_bytes(stream, at, min(at + CHUNK, end)), at)

    def do_let(self, step: Step) -> None:
        """Close an open file."""
        self.at = "close"
        os.close(self._open.pop(step["handle"]))
        self._ack("closed")

    # -- looking ------------------------------------------------------------------------------------------------

    def do_digest(self, step: Step) -> dict[str, Any]:
        """The digests of some files; null for what is not there, and the name of the error for what cannot be read."""
        return {"files": {path: self._look(path, drop=bool(step.get("drop"))) for path in step["paths"]}}

    def _look(self, path: str, *, drop: bool = False) -> Any:
        try:
            fd = os.open(path, os.O_RDONLY, dir_fd=self._root)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "?")
        try:
            if drop:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return "not a file"
            hasher, size = blake3(), 0
            for chunk in chunks(fd):
                hasher.update(chunk)
                size += len(chunk)
            return [size, hasher.hexdigest()]
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "?")
        finally:
            os.close(fd)

    def do_scan(self, step: Step) -> dict[str, Any]:
        """Every file of the tree, as ``digest`` has it."""
        found = {}
        for base, folders, names in os.walk(self._mountpoint, onerror=refuse):
            folders.sort()
            below = os.path.relpath(base, self._mountpoint)
            for name in sorted(names):
                path = name if below == "." else f"{below}/{name}"
                found[path] = self._look(path, drop=bool(step.get("drop")))
        return {"files": found}

    def do_explain(self, step: Step) -> dict[str, Any]:
        """Which versions the pages of a file are of. ``outside``: an absolute path, past the mount."""
        versions = [version_from(listed) for listed in step["versions"]]
        outside = step.get("outside")
        fd = os.open(outside, os.O_RDONLY) if outside else os.open(step["path"], os.O_RDONLY, dir_fd=self._root)
        try:
            return explanation_to_json(explain(chunks(fd), versions))
        finally:
            os.close(fd)


def refuse(error: OSError) -> None:
    """A folder that cannot be listed is a failure."""
    raise error


def chunks(fd: int) -> Iterator[bytes]:
    """The bytes of a file, CHUNK at a time."""
    at = 0
    while True:
        parts = bytearray()
        while len(parts) < CHUNK and (data := os.pread(fd, CHUNK - len(parts), at + len(parts))):
            parts += data
        if not parts:
            return
        yield bytes(parts)
        at += len(parts)


def write_all(fd: int, data: bytes, offset: int | None = None) -> None:
    """write(2), or pwrite(2) at an offset, until all is written."""
    view = memoryview(data)
    while view:
        count = os.write(fd, view) if offset is None else os.pwrite(fd, view, offset)
        view = view[count:]
        offset = None if offset is None else offset + count


def tell(reply: dict[str, Any]) -> None:
    """A line on stdout."""
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def main(mountpoint: str) -> None:
    """Run steps until the end of stdin."""
    worker = Worker(mountpoint)
    for line in sys.stdin:
        try:
            tell({"done": True, "error": None, **worker.run(json.loads(line))})
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "?")
            tell({"done": True, "error": name, "at": worker.at, "text": str(error)})


if __name__ == "__main__":
    main(sys.argv[1])
