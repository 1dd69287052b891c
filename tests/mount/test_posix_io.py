"""Bytes of regular files through a real mount, compared with a plain disk: open modes, writes, truncation, mmap."""

from __future__ import annotations

import errno
import fcntl
import mmap
import multiprocessing
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, outcome

Same = Callable[[Callable[[Path], Any]], Any]


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def opened(path: str, flags: int, what: Callable[[int], Any], mode: int = 0o644) -> Any:
    """What ``what(fd)`` gives, or the errno of open or of it."""

    def use() -> Any:
        fd = os.open(path, flags, mode)
        try:
            return what(fd)
        finally:
            os.close(fd)

    return outcome(use)


OPEN_FLAGS = {
    "read": os.O_RDONLY,
    "write": os.O_WRONLY,
    "both": os.O_RDWR,
    "create": os.O_WRONLY | os.O_CREAT,
    "exclusive": os.O_RDWR | os.O_CREAT | os.O_EXCL,
    "truncate": os.O_RDWR | os.O_TRUNC,
    "create and truncate": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "truncate for reading": os.O_RDONLY | os.O_TRUNC,
    "append": os.O_RDWR | os.O_APPEND,
    "create and append": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "directory": os.O_RDONLY | os.O_DIRECTORY,
    "no symlinks": os.O_RDONLY | os.O_NOFOLLOW,
    "path only": os.O_PATH,
}


@pytest.mark.parametrize("flags", OPEN_FLAGS.values(), ids=OPEN_FLAGS)
def test_open_read_and_write_of_every_kind_of_file(same: Same, flags: int) -> None:
    def use(fd: int) -> Any:
        return (
            outcome(lambda: os.pwrite(fd, b"xyz", 2)),
            outcome(lambda: os.pread(fd, 100, 0)),
            stat.S_IFMT(os.fstat(fd).st_mode),
            # The size of a directory is every file system's own affair.
            os.fstat(fd).st_size if stat.S_ISREG(os.fstat(fd).st_mode) else None,
        )

    def run(where: Path) -> Any:
        put(where / "file", b"0123456789")
        put(where / "empty", b"")
        (where / "dir").mkdir()
        (where / "link").symlink_to("file")
        (where / "dangling").symlink_to("nothing")
        (where / "loop").symlink_to("loop")
        names = (
            "file",
            "empty",
            "dir",
            "link",
            "dangling",
            "loop",
            "missing",
            "file/below",
            "missing/below",
            "link/",
            "dir/",
        )
        results = {name: opened(f"{where}/{name}", flags, use) for name in names}
        after = {
            entry: (where / entry).read_bytes() for entry in sorted(os.listdir(where)) if (where / entry).is_file()
        }
        return results, after

    same(run)


def test_the_mode_given_to_open_is_cut_by_the_umask(same: Same) -> None:
    def run(where: Path) -> Any:
        modes = []
        for mask in (0o022, 0o077, 0o000, 0o777):
            before = os.umask(mask)
            try:
                fd = os.open(where / f"f{mask:o}", os.O_CREAT | os.O_RDWR, 0o6777)
                # A file that may not be read or written can still be by whoever made it.
                os.write(fd, b"x")
                modes.append((oct(os.fstat(fd).st_mode), os.pread(fd, 1, 0)))
                os.close(fd)
                os.mkdir(where / f"d{mask:o}", 0o1777)
                modes.append(oct((where / f"d{mask:o}").stat().st_mode))
                os.mknod(where / f"n{mask:o}", 0o666)
                modes.append(oct((where / f"n{mask:o}").stat().st_mode))
            finally:
                os.umask(before)
        return modes

    same(run)


def test_random_writes_reads_and_truncations(same: Same) -> None:
    """2,000 operations on one file, and what each returned, must be those of a plain disk."""

    def run(where: Path) -> Any:
        rng = random.Random(42)
        results: list[Any] = []
        fds = [os.open(where / "f", os.O_CREAT | os.O_RDWR) for _ in range(3)]
        for step in range(2000):
            fd = rng.choice(fds)
            what = rng.random()
            offset = rng.randrange(300_000)
            if what < 0.45:
                data = rng.randbytes(rng.choice((1, 10, 4096, 5000, 70_000)))
                results.append(os.pwrite(fd, data, offset))
            elif what < 0.8:
                results.append(hash(os.pread(fd, rng.choice((1, 4096, 100_000)), offset)))
            elif what < 0.86:
                os.ftruncate(fd, rng.randrange(400_000))
            elif what < 0.9:
                os.truncate(where / "f", rng.randrange(400_000))
            elif what < 0.94:
                os.lseek(fd, 0, os.SEEK_END)
                results.append(os.write(fd, b"tail"))
            elif what < 0.97:
                results.append((where / "f").stat().st_size)
            else:
                # A new handle in the middle of it all, which closes (and so acknowledges) the other's bytes too.
                results.append(hash((where / "f").read_bytes()))
            if step % 500 == 499:
                os.fsync(fd)
        for fd in fds:
            os.close(fd)
        return results, (where / "f").read_bytes()

    same(run)


@pytest.mark.parametrize("stored", [False, True], ids=["being written", "stored"])
def test_truncate_up_and_down(same: Same, stored: bool) -> None:
    def run(where: Path) -> Any:
        path = where / "f"
        results = []
        for new in (0, 1, 4095, 4096, 4097, 100_000, 9_000_000):
            put(path, b"abc" * 2000)
            if stored:
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            os.truncate(path, new)
            data = path.read_bytes()
            results.append((path.stat().st_size, hash(data)))
        results.append(outcome(lambda: os.truncate(path, -1)))
        results.append(outcome(lambda: os.truncate(where, 0)))
        results.append(outcome(lambda: os.truncate(where / "missing", 0)))
        read_only = os.open(path, os.O_RDONLY)
        results.append(outcome(lambda: os.ftruncate(read_only, 0)))
        os.close(read_only)
        # Shrink and grow: what was cut off must not come back.
        put(path, b"x" * 10_000)
        os.truncate(path, 10)
        os.truncate(path, 10_000)
        results.append(hash(path.read_bytes()))
        return results

    same(run)


def test_sparse_files_read_as_zeros(same: Same) -> None:
    def run(where: Path) -> Any:
        with open(where / "sparse", "wb") as file:
            file.seek(200 << 20)
            file.write(b"end")
        with open(where / "sparse", "rb") as file:
            parts = [os.pread(file.fileno(), 8192, offset) for offset in (0, 100 << 20, (200 << 20) - 4096)]
        return (where / "sparse").stat().st_size, parts

    same(run)


def test_a_write_beyond_the_largest_size_is_refused(shared: Path) -> None:
    fd = os.open(shared / "f", os.O_CREAT | os.O_RDWR)
    assert outcome(lambda: os.pwrite(fd, b"xx", (1 << 63) - 2)) in ("EFBIG", "EINVAL", "ENOSPC")
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_appending_handles_write_at_the_end_whatever_others_do(same: Same) -> None:
    def run(where: Path) -> Any:
        put(where / "f", b"start ")
        first = os.open(where / "f", os.O_WRONLY | os.O_APPEND)
        second = os.open(where / "f", os.O_RDWR | os.O_APPEND)
        plain = os.open(where / "f", os.O_RDWR)
        os.write(first, b"one ")
        os.write(second, b"two ")
        os.lseek(first, 0, os.SEEK_SET)
        os.write(first, b"three ")
        os.pwrite(plain, b"S", 0)
        os.ftruncate(plain, 10)
        os.write(second, b"four")
        seen = os.pread(second, 100, 0)
        for fd in (first, second, plain):
            os.close(fd)
        return seen, (where / "f").read_bytes()

    same(run)


def _append(path: str, word: str, count: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in range(count):
        os.write(fd, f"{word} {number:06d}\n".encode())
    os.close(fd)


def test_two_processes_appending_lose_no_line(shared: Path) -> None:
    path = str(shared / "log")
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(path, word, 500)) for word in ("alpha", "omega")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    lines = Path(path).read_text().splitlines()
    assert sorted(lines) == sorted(f"{word} {number:06d}" for word in ("alpha", "omega") for number in range(500))


def test_a_file_can_be_read_while_it_is_written(same: Same) -> None:
    def run(where: Path) -> Any:
        seen = []
        with open(where / "f", "wb", buffering=0) as writer, open(where / "f", "rb", buffering=0) as reader:
            for number in range(50):
                writer.write(b"%04d" % number)
                seen.append(reader.read(100))
                seen.append(os.fstat(reader.fileno()).st_size)
                if number == 20:
                    os.fsync(writer.fileno())
                if number == 30:
                    # A third handle comes and goes.
                    seen.append((where / "f").read_bytes())
        return seen, (where / "f").read_bytes()

    same(run)


def test_reading_goes_on_while_a_stored_file_is_rewritten(same: Same) -> None:
    def run(where: Path) -> Any:
        path = put(where / "f", b"old " * 10_000)
        reader = os.open(path, os.O_RDONLY)
        os.fsync(reader)
        first = os.pread(reader, 8, 0)
        writer = os.open(path, os.O_RDWR)
        os.pwrite(writer, b"NEW ", 4)
        second = os.pread(reader, 12, 0)
        os.close(writer)
        os.fsync(reader)
        third = os.pread(reader, 12, 0)
        os.close(reader)
        return first, second, third, hash(path.read_bytes())

    same(run)


def test_truncating_on_open_shows_to_other_handles_at_once(same: Same) -> None:
    def run(where: Path) -> Any:
        path = put(where / "f", b"long content")
        reader = os.open(path, os.O_RDONLY)
        writer = os.open(path, os.O_WRONLY | os.O_TRUNC)
        seen = [os.pread(reader, 100, 0), os.fstat(reader).st_size]
        os.write(writer, b"new")
        seen += [os.pread(reader, 100, 0), path.stat().st_size]
        os.close(writer)
        os.close(reader)
        return seen, path.read_bytes()

    same(run)


@pytest.mark.parametrize("stored", [False, True], ids=["being written", "stored"])
def test_shared_memory_maps_write_the_file(same: Same, stored: bool) -> None:
    def run(where: Path) -> Any:
        path = put(where / "f", bytes(50_000))
        with open(path, "r+b") as file:
            if stored:
                os.fsync(file.fileno())
            with mmap.mmap(file.fileno(), 50_000) as memory:
                memory[10:15] = b"hello"
                memory[40_000:40_005] = b"world"
                memory.flush()
                between = path.read_bytes()
                memory[20_000:20_003] = b"two"
        after = path.read_bytes()
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            mapped = memory[20_000:20_003]
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as memory:
            memory[0:3] = b"not"
        return hash(between), hash(after), mapped, hash(path.read_bytes())

    same(run)


def test_bytes_of_a_memory_map_are_there_after_a_remount(local_mount: MountedInstance) -> None:
    """Pages that are dirty when the file is closed are written before close() is acknowledged."""
    path = put(local_mount.path / "f", bytes(20_000))
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 20_000)
    memory[5000:5004] = b"late"
    memory.close()
    local_mount.sync()
    assert path.read_bytes()[5000:5004] == b"late"
    local_mount.remount(empty_cache=True)
    assert path.read_bytes()[4999:5005] == b"\0late\0"


def test_direct_io(same: Same) -> None:
    def run(where: Path) -> Any:
        fd = os.open(where / "f", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, 1 << 20) as aligned:
            aligned[:] = bytes(range(256)) * 4096
            written = os.pwrite(fd, aligned, 0)
            os.pwrite(fd, memoryview(aligned)[:4096], 2 << 20)
        with mmap.mmap(-1, 8192) as into:
            count = os.preadv(fd, [into], 4096)
            seen = hash(into[:])
            end = os.preadv(fd, [into], 2 << 20)
        os.close(fd)
        return written, count, seen, end, hash((where / "f").read_bytes())

    same(run)


def test_fsync_of_everything_that_can_be_synced(same: Same) -> None:
    def run(where: Path) -> Any:
        fd = os.open(where / "f", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"data")
        os.fsync(fd)
        os.write(fd, b" more")
        os.fdatasync(fd)
        os.fsync(fd)
        directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.fdatasync(directory)
        os.close(directory)
        os.close(fd)
        fd = os.open(where / "f", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        os.sync()
        return (where / "f").read_bytes()

    same(run)


def test_fsync_means_stored_and_registered(shared: Path, shared_mount: MountedInstance) -> None:
    """Not only on the local disk."""
    fd = os.open(shared / "f", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"durable")
    os.fsync(fd)
    key = f"{shared.name}/f"
    with shared_mount.registry() as registry:
        record = registry.artifacts.by_key(key)
        assert record is not None
        assert record.revision.size == 7
        assert (Path(shared_mount.storage.root) / record.revision.object_key).read_bytes() == b"durable"
    os.write(fd, b" and more")
    os.fsync(fd)
    with shared_mount.registry() as registry:
        again = registry.artifacts.by_key(key)
        assert again is not None
        assert (again.uid, again.revision.size) == (record.uid, 16)
        assert (Path(shared_mount.storage.root) / again.revision.object_key).read_bytes() == b"durable and more"
    os.close(fd)


def test_dup_and_close_of_one_of_two_descriptors(same: Same) -> None:
    def run(where: Path) -> Any:
        fd = os.open(where / "f", os.O_CREAT | os.O_RDWR)
        other = os.dup(fd)
        os.write(fd, b"one ")
        os.close(fd)
        os.write(other, b"two")
        seen = os.pread(other, 100, 0)
        size = (where / "f").stat().st_size
        os.close(other)
        return seen, size, (where / "f").read_bytes()

    same(run)


def test_a_descriptor_inherited_by_a_child_goes_on_writing(same: Same) -> None:
    def run(where: Path) -> Any:
        fd = os.open(where / "f", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"parent ")
        code = f"import os; os.write({fd}, b'child ')"
        subprocess.run([sys.executable, "-I", "-S", "-c", code], pass_fds=[fd], check=True, timeout=30)
        os.write(fd, b"parent again")
        os.close(fd)
        return (where / "f").read_bytes()

    same(run)


def test_several_handles_see_one_file(same: Same) -> None:
    def run(where: Path) -> Any:
        handles = [os.open(where / "f", os.O_CREAT | os.O_RDWR) for _ in range(20)]
        for number, fd in enumerate(handles):
            os.pwrite(fd, b"%02d" % number, number * 2)
        seen = {os.pread(fd, 100, 0) for fd in handles}
        for fd in handles[::2]:
            os.close(fd)
        seen |= {os.pread(fd, 100, 0) for fd in handles[1::2]}
        for fd in handles[1::2]:
            os.close(fd)
        return seen, (where / "f").read_bytes()

    same(run)


def test_locks_of_both_kinds(same: Same) -> None:
    def run(where: Path) -> Any:
        one, two = (os.open(where / "f", os.O_CREAT | os.O_RDWR) for _ in range(2))
        fcntl.flock(one, fcntl.LOCK_EX)
        results = [outcome(lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB))]
        fcntl.flock(one, fcntl.LOCK_UN)
        results.append(outcome(lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)))
        fcntl.lockf(one, fcntl.LOCK_EX, 10, 0)
        fd = f"os.open({str(where / 'f')!r}, os.O_RDWR)"
        code = f"import fcntl, os; fcntl.lockf({fd}, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 5)"
        child = subprocess.run([sys.executable, "-I", "-S", "-c", code], timeout=30, check=False, capture_output=True)
        results.append(child.returncode)
        os.close(one)
        os.close(two)
        return results

    assert same(run)[0] == "EAGAIN"


def test_copy_file_range_fallocate_and_seek_for_holes(shared: Path) -> None:
    """Not every one of these is there; what answers must do what it says."""
    put(shared / "a", b"0123456789" * 1000)
    source, target = os.open(shared / "a", os.O_RDONLY), os.open(shared / "b", os.O_CREAT | os.O_RDWR)
    done = 0
    while done < 10_000:
        done += os.copy_file_range(source, target, 10_000 - done)
    assert (shared / "b").read_bytes() == (shared / "a").read_bytes()
    os.posix_fallocate(target, 0, 20_000)
    assert os.fstat(target).st_size == 20_000
    assert (shared / "b").read_bytes() == b"0123456789" * 1000 + bytes(10_000)
    assert os.lseek(target, 0, os.SEEK_DATA) == 0
    assert os.lseek(target, 0, os.SEEK_HOLE) in (10_000, 12_288, 20_000)
    assert os.sendfile(target, source, 0, 100) == 100
    os.close(source)
    os.close(target)


def test_times_after_writes_and_reads(same: Same) -> None:
    def run(where: Path) -> Any:
        path = put(where / "f", b"x")
        os.utime(path, ns=(1_000_000_001, 2_000_000_002))
        results: list[Any] = [(path.stat().st_atime_ns, path.stat().st_mtime_ns)]
        before = path.stat()
        with open(path, "ab") as file:
            file.write(b"y")
        after = path.stat()
        results.append((after.st_mtime_ns > before.st_mtime_ns, after.st_ctime_ns > before.st_ctime_ns))
        os.utime(path, ns=(5, 7))
        results.append((path.stat().st_atime_ns, path.stat().st_mtime_ns))
        # Setting times while it is open for writing, with bytes not yet acknowledged (cp -p, tar, rsync do).
        with open(path, "wb", buffering=0) as file:
            file.write(b"content")
            os.utime(file.fileno(), ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
        results.append((path.stat().st_atime_ns, path.stat().st_mtime_ns))
        before = path.stat()
        path.chmod(0o600)
        results.append((path.stat().st_mtime_ns == before.st_mtime_ns, path.stat().st_ctime_ns > before.st_ctime_ns))
        os.truncate(path, 3)
        results.append(path.stat().st_mtime_ns > before.st_mtime_ns)
        before = path.stat()
        os.rename(path, where / "g")
        results.append((where / "g").stat().st_mtime_ns == before.st_mtime_ns)
        return results

    same(run)


def test_set_times_survive_storing_and_a_remount(local_mount: MountedInstance) -> None:
    path = put(local_mount.path / "f", b"content")
    os.utime(path, ns=(11_000_000_001, 22_000_000_002))
    path.chmod(0o640)
    os.chown(path, 1234, 4321)
    local_mount.sync()
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (11_000_000_001, 22_000_000_002)
    before = path.stat()
    local_mount.remount()
    after = path.stat()
    for field in (
        "st_mode",
        "st_uid",
        "st_gid",
        "st_size",
        "st_nlink",
        "st_atime_ns",
        "st_mtime_ns",
        "st_ctime_ns",
        "st_ino",
    ):
        assert getattr(after, field) == getattr(before, field), field


def test_stat_says_the_blocks_and_the_block_size(shared: Path) -> None:
    info = put(shared / "f", b"x" * 10_000).stat()
    assert (info.st_size, info.st_blocks, info.st_blksize) == (10_000, 24, 4096)


@pytest.mark.parametrize("stored", [False, True])
def test_holes_take_no_blocks(shared: Path, shared_mount: MountedInstance, stored: bool) -> None:
    path = shared / "sparse"
    with open(path, "wb") as file:
        file.truncate(50 << 20)
        file.seek(10 << 20)
        file.write(b"x" * 100_000)
        file.flush()
        assert 100_000 // 512 <= os.fstat(file.fileno()).st_blocks < 1000
    if stored:
        shared_mount.sync()
    assert 100_000 // 512 <= path.stat().st_blocks < 1000
    os.truncate(path, 100 << 20)
    assert path.stat().st_blocks < 1000


def test_reading_a_directory_or_writing_one_is_refused(same: Same) -> None:
    def run(where: Path) -> Any:
        fd = os.open(where, os.O_RDONLY)
        try:
            return outcome(lambda: os.read(fd, 10)), outcome(lambda: os.write(fd, b"x"))
        finally:
            os.close(fd)

    assert same(run) == ("EISDIR", "EBADF")


def test_errno_names_are_not_made_up() -> None:
    """``outcome`` must tell errors apart, or no comparison here means anything."""

    def fail() -> None:
        raise OSError(errno.ENOENT, "no")

    assert outcome(fail) == "ENOENT"
    assert outcome(lambda: 3) == 3
