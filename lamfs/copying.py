"""Copying the bytes of one local file into another without reading holes. Plain functions, any thread, blocking.

A reflink (FICLONE: btrfs, XFS, bcachefs) shares the extents. Otherwise copy_file_range lets the kernel move the data.
Otherwise pread and pwrite do it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator

FICLONE = 0x40049409
"""``ioctl(dst, FICLONE, src)``: linux/fs.h."""

COPY_CHUNK = 4 << 20
"""Bytes per copy_file_range or read. The progress is reported after each."""
_WRITE_OUT_CHUNK = 64 << 20
"""Bytes that the kernel is asked to write out at a time. The progress is reported after each."""
_WRITE_OUT = 1 | 2 | 4
"""``SYNC_FILE_RANGE_WAIT_BEFORE``, ``_WRITE`` and ``_WAIT_AFTER``: linux/fs.h."""
WRITE_CHUNK = 512 << 10
"""Bytes per pwrite. One of 2 MiB or more makes the page cache use huge pages. A virtual machine may give free memory
back to its host (virtio-balloon's free page reporting), and then the host must find those pages anew: 2.3 s of CPU per
GiB written instead of 0.2."""
_NO_RANGE_COPY = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF, errno.ETXTBSY, errno.EIO}
)
"""copy_file_range refuses: another kind of file system, an old kernel, a seccomp filter, or procfs. A real EIO occurs
again in the plain read."""

_OPEN_FILE = re.compile("/proc/(?:self|[0-9]+)/fd/[0-9]+")
_IN_OPEN_FOLDER = re.compile(f"{_OPEN_FILE.pattern}/[^/]+")


def path_of(fd: int) -> str:
    """The path by which a job names a file that is open in this process."""
    return f"/proc/{os.getpid()}/fd/{fd}"


@contextlib.contextmanager
def opened(path: str, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A descriptor for the time of the block. Raises OSError; ELOOP if ``path`` is a link, unless it is the path of an
    open file, ``/proc/<pid>/fd/<number>``."""
    follow = 0 if _OPEN_FILE.fullmatch(path) else os.O_NOFOLLOW
    fd = os.open(path, flags | follow | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def open_source(path: str, flags: int = os.O_RDONLY) -> int:
    """Descriptor of a file that is to be stored. Raises OSError.

    A user's own path may be a link, as for cp(1). A spool file, which is named through its open folder, must not be
    one: ELOOP.
    """
    return os.open(path, flags | os.O_CLOEXEC | (os.O_NOFOLLOW if _IN_OPEN_FOLDER.fullmatch(path) else 0))


def shown(text: str) -> str:
    """A message for people: paths through an open file or folder of a process are replaced by their real paths."""

    def own(match: re.Match[str]) -> str:
        try:
            return os.readlink(match[0])
        except OSError:
            return match[0]

    return _OPEN_FILE.sub(own, text)


def copy_fd(source: int, target: int, progress: Callable[[int], None] = lambda count: None) -> int:
    """Copy the present content of ``source`` to ``target`` (empty, open for writing). Holes stay holes. Returns the
    size in bytes.

    ``progress`` gets byte counts that add up to the size, from this thread. Moves the file offset of ``source``. Raises
    OSError, and EOFError if ``source`` becomes shorter meanwhile; then ``target`` has a part, followed by zeros.
    """
    size = os.fstat(source).st_size
    if _clone(source, target):
        if size:
            progress(size)
        return size
    os.ftruncate(target, size)
    position = 0
    in_kernel = True
    while position < size:
        start, end = _next_extent(source, position, size)
        if start > position:
            progress(start - position)
        position = start
        while position < end:
            want = min(COPY_CHUNK, end - position)
            done = _copy_in_kernel(source, target, position, want) if in_kernel else 0
            if done == 0:  # some kernels return 0 if they cannot copy
                in_kernel = False
                done = _copy_through(source, target, position, want)
            position += done
            progress(done)
    return size


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False  # another file system, or one without reflinks
    return True


def _next_extent(fd: int, position: int, size: int) -> tuple[int, int]:
    """Bounds of the next data at or after ``position``. ``(size, size)`` if only a hole follows."""
    try:
        start = os.lseek(fd, position, os.SEEK_DATA)
        end = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO and os.fstat(fd).st_size >= size:
            return size, size
        return position, size  # no such seek here, or the file is shorter: the copy finds out
    return min(start, size), min(end, size)


def _copy_in_kernel(source: int, target: int, position: int, want: int) -> int:
    try:
        return os.copy_file_range(source, target, want, position, position)
    except OSError as error:
        if error.errno not in _NO_RANGE_COPY:
            raise
        return 0


def _copy_through(source: int, target: int, position: int, want: int) -> int:
    data = os.pread(source, want, position)
    if not data:
        raise EOFError(f"the file ended at byte {position}")
    write_full(target, data, position)
    return len(data)


def write_out(fd: int, progress: Callable[[], None]) -> None:
    """Write the bytes of a file to its disk, and call ``progress`` after each piece. So the fsync(2) that has to follow
    takes no long time without a sign of life. Errors are left to that fsync."""
    size = os.fstat(fd).st_size
    if size <= _WRITE_OUT_CHUNK:
        return
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    for offset in range(0, size, _WRITE_OUT_CHUNK):
        if call(fd, offset, _WRITE_OUT_CHUNK, _WRITE_OUT) != 0:
            return
        progress()


def write_full(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite all of ``data`` at ``offset``, in pieces of WRITE_CHUNK. Raises OSError like pwrite."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[:WRITE_CHUNK], offset)
        view, offset = view[done:], offset + done
