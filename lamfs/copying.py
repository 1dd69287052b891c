"""Copying the bytes of one local file into another without reading holes. Plain functions, any thread, blocking.

A reflink (FICLONE: btrfs, XFS, bcachefs) shares the extents; otherwise copy_file_range lets the kernel move the data;
otherwise pread and pwrite.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator

FICLONE = 0x40049409
"""``ioctl(dst, FICLONE, src)``: linux/fs.h."""

_CHUNK = 4 << 20
_KERNEL_CHUNK = 64 << 20
"""Bytes that the kernel is asked to copy at a time: between two of them the caller is told."""
_WRITE_OUT = 1 | 2 | 4
"""``SYNC_FILE_RANGE_WAIT_BEFORE``, ``_WRITE`` and ``_WAIT_AFTER``: linux/fs.h."""
WRITE_CHUNK = 512 << 10
"""Bytes per pwrite. One of 2 MiB or more makes the page cache take huge pages. In a virtual machine that gives free
memory back to its host (virtio-balloon's free page reporting) the host must find those anew: 2.3 s of CPU per GiB
written instead of 0.2."""
_NOT_HERE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})

_OPEN_FILE = re.compile("/proc/(?:self|[0-9]+)/fd/[0-9]+")
_IN_OPEN_FOLDER = re.compile(f"{_OPEN_FILE.pattern}/[^/]+")


@contextlib.contextmanager
def opened(path: str, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A descriptor for the time of the block. Raises OSError; ELOOP when ``path`` is a link, unless it is that of an
    open file, ``/proc/<pid>/fd/<number>``."""
    follow = 0 if _OPEN_FILE.fullmatch(path) else os.O_NOFOLLOW
    fd = os.open(path, flags | follow | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def open_source(path: str, flags: int = os.O_RDONLY) -> int:
    """Descriptor of a file that is to be stored. Raises OSError.

    A path of the user's own may be a link, as for cp(1). A spool file, which is named by way of its open folder, is
    none: ELOOP.
    """
    return os.open(path, flags | os.O_CLOEXEC | (os.O_NOFOLLOW if _IN_OPEN_FOLDER.fullmatch(path) else 0))


def shown(text: str) -> str:
    """A message for people, in which paths by way of a process's open file or folder are its own ones."""

    def own(match: re.Match[str]) -> str:
        try:
            return os.readlink(match[0])
        except OSError:
            return match[0]

    return _OPEN_FILE.sub(own, text)


def copy_fd(src: int, dst: int, progress: Callable[[int], None] = lambda count: None) -> int:
    """Make ``dst`` (empty, open for writing) hold what ``src`` holds now; holes stay holes. Returns the size in bytes.

    ``progress`` gets byte counts now and then. Raises OSError; ``dst`` may then hold a part.
    """
    size = os.fstat(src).st_size
    try:
        fcntl.ioctl(dst, FICLONE, src)
        return size
    except OSError:
        pass  # another file system, or one without reflinks
    os.ftruncate(dst, size)
    offset = 0
    while offset < size:
        try:
            start = os.lseek(src, offset, os.SEEK_DATA)
            end = min(os.lseek(src, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            start, end = offset, size  # a file system that knows no holes
        if start >= size:
            break
        _copy_range(src, dst, start, end, progress)
        offset = end
    return size


def _copy_range(src: int, dst: int, start: int, end: int, progress: Callable[[int], None]) -> None:
    offset = start
    while offset < end:
        try:
            moved = os.copy_file_range(src, dst, min(_KERNEL_CHUNK, end - offset), offset, offset)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            break
        if moved == 0:  # some kernels answer 0 where they cannot
            break
        offset += moved
        progress(moved)
    while offset < end:
        data = os.pread(src, min(_CHUNK, end - offset), offset)
        if not data:
            return  # the source shrank meanwhile; whoever compares hashes will see it
        write_full(dst, data, offset)
        offset += len(data)
        progress(len(data))


def write_out(fd: int, progress: Callable[[], None]) -> None:
    """Have the bytes of a file written to its disk, and ``progress`` called behind each piece: the fsync(2) that has to
    follow then takes no long time of which nothing is heard. What goes wrong, that will say."""
    size = os.fstat(fd).st_size
    if size <= _KERNEL_CHUNK:
        return
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    for offset in range(0, size, _KERNEL_CHUNK):
        if call(fd, offset, _KERNEL_CHUNK, _WRITE_OUT) != 0:
            return
        progress()


def write_full(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite all of ``data`` at ``offset``, in pieces of WRITE_CHUNK. Raises OSError as pwrite does."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[:WRITE_CHUNK], offset)
        view, offset = view[done:], offset + done


class Scratch:
    """A file in memory and the same bytes as a buffer: what is written to ``fd`` can be hashed without a copy.

    One thread uses it. Its pages stay, so that each block does not pay for 4 MiB of page faults: that costs more than
    fetching them from a near server.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        """Bytes."""
        self.fd = os.memfd_create("lamfs-scratch", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    def view(self, length: int) -> memoryview:
        """The first ``length`` bytes; to be released before the Scratch is."""
        return memoryview(self._map)[:length]

    def close(self) -> None:
        """Give the memory back; also happens when the thread that owns it ends."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_map"):
            self.close()


_local = threading.local()


def scratch(size: int) -> Scratch:
    """This thread's Scratch of at least ``size`` bytes, with whatever it held before; it lives until drop_scratch, or
    as long as the thread. Raises OSError.
    """
    found: Scratch | None = getattr(_local, "scratch", None)
    if found is None or found.size < size:
        drop_scratch()
        found = _local.scratch = Scratch(size)
    return found


def drop_scratch() -> None:
    """Close this thread's Scratch, if it has one: for threads that go on to live without it."""
    found: Scratch | None = _local.__dict__.pop("scratch", None)
    if found is not None:
        found.close()
