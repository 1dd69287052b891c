"""Names through a real mount, compared with a plain disk: unlink, rename, directories, links, long and odd names."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, outcome, wait_until

Same = Callable[[Callable[[Path], Any]], Any]

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
AT_FDCWD = -100
libc = ctypes.CDLL(None, use_errno=True)


def put(path: Path, data: bytes = b"x") -> Path:
    path.write_bytes(data)
    return path


def rename2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2)."""
    if libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def tree(where: Path) -> list[Any]:
    """Everything below a directory: name, kind, content or target."""
    found: list[Any] = []
    for folder, folders, files in os.walk(where):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = Path(folder) / name
            what: Any = None
            if path.is_symlink():
                what = os.readlink(path)
            elif path.is_file():
                what = path.read_bytes()
            found.append((str(path.relative_to(where)), oct(stat.S_IFMT(path.lstat().st_mode)), what))
    return sorted(found)


# -- unlinked and renamed while open ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True], ids=["being written", "stored"])
def test_an_unlinked_file_lives_on_for_who_has_it_open(same: Same, stored: bool) -> None:
    def run(where: Path) -> Any:
        path = where / "f"
        fd = os.open(path, os.O_CREAT | os.O_RDWR)
        os.write(fd, b"content")
        if stored:
            os.fsync(fd)
        os.unlink(path)
        results = [outcome(lambda: path.stat().st_size), os.fstat(fd).st_nlink, os.pread(fd, 100, 0)]
        os.pwrite(fd, b" goes on", 7)
        results += [os.pread(fd, 100, 0), os.fstat(fd).st_size]
        os.ftruncate(fd, 4)
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(1, 2))
        results += [os.pread(fd, 100, 0), oct(os.fstat(fd).st_mode), os.fstat(fd).st_mtime_ns]
        # A new file of that name is another file.
        put(path, b"other")
        os.pwrite(fd, b"mine", 0)
        results += [path.read_bytes(), os.pread(fd, 100, 0)]
        os.fsync(fd)
        results.append(
            outcome(lambda: os.link(f"/proc/self/fd/{fd}", where / "back", follow_symlinks=True)) is not None
        )
        os.close(fd)
        return results, path.read_bytes(), sorted(os.listdir(where))[-1:]

    same(run)


def test_an_unlinked_file_read_through_two_handles(same: Same) -> None:
    def run(where: Path) -> Any:
        put(where / "f", b"one two three")
        reader, writer = os.open(where / "f", os.O_RDONLY), os.open(where / "f", os.O_RDWR)
        os.unlink(where / "f")
        os.pwrite(writer, b"ONE", 0)
        seen = [os.pread(reader, 100, 0)]
        os.close(writer)
        seen.append(os.pread(reader, 100, 0))
        # Opened again through /proc, as some programs do.
        again = os.open(f"/proc/self/fd/{reader}", os.O_RDONLY)
        seen.append(os.read(again, 100))
        os.close(again)
        os.close(reader)
        return seen, os.listdir(where)

    same(run)


def test_nothing_is_left_of_unlinked_files(local_mount: MountedInstance) -> None:
    """Their spool files go, and nothing is owed."""
    for stored in (False, True):
        fd = os.open(local_mount.path / "f", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"content")
        if stored:
            os.fsync(fd)
        os.unlink(local_mount.path / "f")
        os.write(fd, b" more")
        os.close(fd)
    (local_mount.path / "g").write_bytes(b"kept")
    local_mount.sync()
    wait_until(lambda: not local_mount.spooled(), "the spool is empty")
    assert local_mount.status()["owed_rows"] == 0
    local_mount.umount()
    assert local_mount.fsck() == []


@pytest.mark.parametrize("stored", [False, True], ids=["being written", "stored"])
def test_an_open_file_can_be_renamed(same: Same, stored: bool) -> None:
    def run(where: Path) -> Any:
        (where / "d").mkdir()
        fd = os.open(where / "f", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"one ")
        if stored:
            os.fsync(fd)
        os.rename(where / "f", where / "d/g")
        os.write(fd, b"two ")
        seen = [(where / "d/g").read_bytes()]
        os.rename(where / "d", where / "e")
        os.write(fd, b"three")
        seen.append((where / "e/g").read_bytes())
        os.close(fd)
        return seen, tree(where)

    same(run)


def test_open_files_renamed_over_keep_their_bytes(same: Same) -> None:
    def run(where: Path) -> Any:
        put(where / "target", b"old content")
        put(where / "source", b"new")
        old = os.open(where / "target", os.O_RDWR)
        new = os.open(where / "source", os.O_RDWR)
        os.rename(where / "source", where / "target")
        os.pwrite(old, b"OLD", 0)
        os.pwrite(new, b"NEW bytes", 0)
        seen = [os.pread(old, 100, 0), os.pread(new, 100, 0), (where / "target").read_bytes()]
        seen.append((os.fstat(old).st_nlink, os.fstat(new).st_nlink))
        os.close(old)
        os.close(new)
        return seen, tree(where)

    same(run)


def test_a_directory_that_is_removed_while_open(same: Same) -> None:
    def run(where: Path) -> Any:
        (where / "d").mkdir()
        fd = os.open(where / "d", os.O_RDONLY)
        (where / "d").rmdir()
        results = [
            outcome(lambda: os.listdir(fd)),
            os.fstat(fd).st_nlink,
            outcome(lambda: os.close(os.open("new", os.O_CREAT | os.O_RDWR, dir_fd=fd))),
            outcome(lambda: os.mkdir("new", dir_fd=fd)),
            outcome(lambda: os.symlink("x", "new", dir_fd=fd)),
            outcome(lambda: os.stat("..", dir_fd=fd).st_mode),
            outcome(lambda: os.stat("nothing", dir_fd=fd)),
        ]
        os.fsync(fd)
        os.close(fd)
        return results[0], results[1], results[2:5], results[6]

    same(run)


def test_a_directory_that_is_renamed_while_open(same: Same) -> None:
    def run(where: Path) -> Any:
        (where / "d/inner").mkdir(parents=True)
        (where / "other").mkdir()
        put(where / "d/f", b"file")
        fd = os.open(where / "d", os.O_RDONLY)
        os.rename(where / "d", where / "other/e")
        put_fd = os.open("new", os.O_CREAT | os.O_RDWR, dir_fd=fd)
        os.write(put_fd, b"made in the renamed one")
        os.close(put_fd)
        os.unlink("f", dir_fd=fd)
        seen = sorted(os.listdir(fd))
        same_parent = os.stat("..", dir_fd=fd).st_ino == (where / "other").stat().st_ino
        os.close(fd)
        return seen, same_parent, tree(where)

    same(run)


CWD = """
import os, sys
os.chdir(sys.argv[1]); os.mkdir("d"); os.chdir("d")
os.rename("../d", "../e")
open("file", "w").write("made from inside")
print(os.path.basename(os.getcwd()), os.listdir("."), os.listdir(".."))
os.unlink("file"); os.rmdir("../e")
def outcome(function, *arguments):
    try: return function(*arguments)
    except OSError as error: return error.errno
print(outcome(os.getcwd), outcome(os.listdir, "."), outcome(os.mkdir, "x"), outcome(os.stat, "x"))
os.chdir(sys.argv[1])
print(os.listdir("."))
"""


def test_the_working_directory_renamed_and_removed(same: Same) -> None:
    def run(where: Path) -> Any:
        command = [sys.executable, "-I", "-S", "-c", CWD, str(where)]
        return subprocess.run(command, check=True, timeout=30, capture_output=True, text=True).stdout

    same(run)


# -- rename -----------------------------------------------------------------------------------------------------------

KINDS = (
    "missing",
    "file",
    "other file",
    "link to it",
    "dir",
    "other dir",
    "full dir",
    "symlink",
    "dangling",
    "fifo",
    "dir/below",
    "file/below",
)


def furnish(where: Path) -> None:
    put(where / "file", b"file")
    put(where / "other file", b"other")
    os.link(where / "file", where / "link to it")
    (where / "dir").mkdir()
    (where / "other dir").mkdir()
    (where / "full dir").mkdir()
    put(where / "full dir/f", b"in it")
    (where / "symlink").symlink_to("file")
    (where / "dangling").symlink_to("nothing")
    os.mkfifo(where / "fifo")


@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE], ids=["rename", "noreplace"])
def test_rename_of_every_kind_over_every_kind(same: Same, flags: int) -> None:
    def run(where: Path) -> Any:
        results = {}
        for number, (old, new) in enumerate(itertools.product(KINDS, KINDS)):
            inner = where / str(number)
            inner.mkdir()
            furnish(inner)
            results[old, new] = (outcome(lambda i=inner, o=old, n=new: rename2(i / o, i / n, flags)), tree(inner))
            shutil.rmtree(inner)
        return results

    same(run)


def test_rename_into_itself_and_other_impossible_ones(same: Same) -> None:
    def run(where: Path) -> Any:
        (where / "a/b/c").mkdir(parents=True)
        put(where / "f")
        attempts = [
            ("a", "a/b"),
            ("a", "a/b/c/d"),
            ("a", "a"),
            ("f", "f"),
            ("a/b/c", "a"),
            ("f", "a/missing/f"),
            ("a/.", "x"),
            ("a/..", "x"),
            ("f", "."),
            ("f", "a/."),
            ("f/", "x"),
            ("f", "x/"),
            ("a/", "y/"),
        ]
        results = [outcome(lambda o=old, n=new: os.rename(f"{where}/{o}", f"{where}/{n}")) for old, new in attempts]
        results.append(outcome(lambda: rename2(where / "f", where / "g", 1 << 7)))
        return results, tree(where)

    same(run)


def test_two_names_are_exchanged(same: Same) -> None:
    def run(where: Path) -> Any:
        (where / "d/in/deep").mkdir(parents=True)
        (where / "e").mkdir()
        put(where / "a", b"of a")
        put(where / "d/b", b"of b")
        put(where / "d/in/f", b"of f")
        os.symlink("nowhere", where / "link")
        os.link(where / "a", where / "hard")
        results = []
        with open(where / "a") as open_a:
            for one, two in [
                ("a", "d/b"), ("d/in", "e"), ("e", "link"), ("a", "a"), ("a", "hard"), ("d/b", "hard"), ("d", "a"),
                ("a", "a/in"), ("a/in", "a"), ("a/b", "a"), ("a", "missing"), ("missing", "a"), ("a", "a/missing"),
            ]:  # fmt: skip
                results.append(outcome(lambda o=one, t=two: rename2(where / o, where / t, RENAME_EXCHANGE)))
                results.append(tree(where))
            results.append(open_a.read())
        results.append(sorted((str(p.relative_to(where)), p.lstat().st_nlink) for p in where.rglob("*")))
        results.append(where.stat().st_nlink)
        results.append(outcome(lambda: rename2(where / "a", where / "hard", RENAME_EXCHANGE | RENAME_NOREPLACE)))
        return results

    same(run)


def test_rename_between_directories_keeps_the_link_counts_right(same: Same) -> None:
    def run(where: Path) -> Any:
        (where / "a/x/y").mkdir(parents=True)
        (where / "b/x").mkdir(parents=True)
        counts = []

        def count() -> None:
            counts.append({str(p.relative_to(where)): p.stat().st_nlink for p in sorted(where.rglob("*"))})
            counts.append({".": where.stat().st_nlink})

        count()
        os.rename(where / "a/x", where / "b/z")
        count()
        os.rename(where / "b/z", where / "b/x")
        count()
        (where / "b/x/y").rmdir()
        count()
        os.rename(where / "b", where / "a/b")
        count()
        return counts

    same(run)


# -- directories ------------------------------------------------------------------------------------------------------


def test_making_and_removing_directories_and_nodes(same: Same) -> None:
    def run(where: Path) -> Any:
        furnish(where)
        results: dict[Any, Any] = {}
        for name in (*KINDS, ".", "..", "dir/.", "full dir/..", "dir/", "file/", "missing/", "symlink/", "a" * 256, ""):
            path = f"{where}/{name}" if name else ""
            results["mkdir", name] = outcome(lambda p=path: os.mkdir(p))
            results["mknod", name] = outcome(lambda p=path: os.mknod(p, 0o644 | stat.S_IFREG))
            results["mkfifo", name] = outcome(lambda p=path: os.mkfifo(p))
            results["symlink", name] = outcome(lambda p=path: os.symlink("target", p))
            results["link", name] = outcome(lambda p=path: os.link(where / "other file", p))
        for name in (*KINDS, ".", "dir/.", "full dir/..", "other dir/", "file/", "symlink/", ""):
            path = f"{where}/{name}" if name else ""
            results["rmdir", name] = outcome(lambda p=path: os.rmdir(p))
            results["unlink", name] = outcome(lambda p=path: os.unlink(p))
            results["readlink", name] = outcome(lambda p=path: os.readlink(p))
        return results, tree(where)

    same(run)


def test_readdir_gives_dots_kinds_and_inode_numbers(shared: Path) -> None:
    furnish(shared)
    found = {entry.name: entry for entry in os.scandir(shared)}
    assert sorted(found) == sorted(os.listdir(shared))
    for name, entry in found.items():
        info = (shared / name).lstat()
        assert entry.inode() == info.st_ino, name
        assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(info.st_mode)
        assert entry.is_symlink() == stat.S_ISLNK(info.st_mode)
    listed = subprocess.run(["ls", "-ai", shared], capture_output=True, text=True, check=True, timeout=30).stdout.split(
        "\n"
    )
    numbers = {line.split(maxsplit=1)[1]: int(line.split()[0]) for line in listed if line}
    assert numbers["."] == shared.stat().st_ino
    assert numbers[".."] == shared.parent.stat().st_ino


def test_a_large_directory_while_it_is_emptied(shared: Path) -> None:
    """5,000 entries: every one that stays all the time is listed once, and rm -rf's way of deleting finds all."""
    names = [f"file {number:05d}" for number in range(5000)]
    # Links are entries as good as any, and made five times as fast.
    put(shared / names[1])
    for name in names[:1] + names[2:]:
        (shared / name).mkdir() if name.endswith("00") else os.link(shared / names[1], shared / name)
    assert sorted(os.listdir(shared)) == names
    seen = []
    with os.scandir(shared) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 2 == 0 and not entry.is_dir():
                os.unlink(entry.path)
    assert len(seen) == len(set(seen))
    left = set(os.listdir(shared))
    assert left <= set(seen)
    assert sorted(seen) == names
    with os.scandir(shared) as entries:
        for entry in entries:
            os.rmdir(entry.path) if entry.is_dir() else os.unlink(entry.path)
    assert os.listdir(shared) == []


def test_entries_made_while_a_directory_is_listed_do_no_harm(shared: Path) -> None:
    for number in range(500):
        os.mknod(shared / f"old{number}")
    seen = []
    with os.scandir(shared) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number < 300:
                os.mknod(shared / f"new{number}")
    assert len(seen) == len(set(seen))
    assert {f"old{number}" for number in range(500)} <= set(seen)


class Dirent(ctypes.Structure):
    """struct dirent of glibc on 64 bits."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


def test_telldir_and_seekdir_come_back_to_the_same_place(shared: Path) -> None:
    for number in range(1000):
        os.mknod(shared / f"{number:04d}")
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.POINTER(Dirent)
    libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(libc.opendir(os.fsencode(shared)))
    places: list[int] = []
    names: list[bytes] = []
    while True:
        places.append(libc.telldir(stream))
        entry = libc.readdir(stream)
        if not entry:
            break
        names.append(entry.contents.d_name)
    assert len(names) == 1002
    for index in (500, 3, 999, 0, 1001, 130):
        libc.seekdir(stream, ctypes.c_long(places[index]))
        assert libc.readdir(stream).contents.d_name == names[index]
    os.unlink(shared / names[600].decode())
    libc.seekdir(stream, ctypes.c_long(places[600]))
    assert libc.readdir(stream).contents.d_name == names[601]
    libc.rewinddir(stream)
    assert libc.readdir(stream).contents.d_name == names[0]
    libc.closedir(stream)


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_of_255_bytes_and_no_more(same: Same) -> None:
    def run(where: Path) -> Any:
        results: list[Any] = []
        for name in ("a" * 255, "a" * 256, "é" * 127, "é" * 128, "語" * 85, "語" * 86):
            path = where / name
            results.append(outcome(lambda p=path: p.write_bytes(b"x")))
            results.append(outcome(lambda p=path: p.stat().st_size))
            results.append(outcome(lambda p=path: os.rename(p, where / "short")))
            results.append(outcome(lambda p=path: os.rename(where / "short", p)))
            results.append(outcome(lambda p=path: p.unlink()))
            results.append(outcome(lambda p=path: p.mkdir()))
            results.append(outcome(lambda p=path: p.rmdir()))
            results.append(outcome(lambda p=path: p.symlink_to("x")))
            results.append(outcome(lambda p=path: os.readlink(p)))
        return results

    same(run)


def test_odd_names_are_kept_as_they_are(same: Same) -> None:
    names = [
        " ",
        "  two",
        "trailing ",
        "tab\t",
        "new\nline",
        "quote'\"",
        "back\\slash",
        "*",
        "?",
        "[a]",
        "%41",
        "~",
        "-rf",
        "...",
        ".hidden",
        "a:b",
        "a|b",
        "#",
        "é",
        "e\u0301",
        "😀",
        "\u202e",
        "\x01",
        "\x7f",
        "CON",
        "nul",
        "x" * 200,
        "lndb.lndb",
        "_exclusion",
    ]

    def run(where: Path) -> Any:
        for name in names:
            put(where / name, name.encode())
        (where / "d").mkdir()
        for name in names:
            os.rename(where / name, where / "d" / name)
        return sorted(os.listdir(where / "d")), [(where / "d" / name).read_bytes() for name in names]

    same(run)


def test_names_that_are_not_utf8_are_refused_with_eilseq(shared: Path) -> None:
    bad = os.fsencode(shared) + b"/caf\xe9"
    put(shared / "f")
    for call in (
        lambda: os.close(os.open(bad, os.O_CREAT | os.O_WRONLY)),
        lambda: os.mkdir(bad),
        lambda: os.symlink(b"x", bad),
        lambda: os.mkfifo(bad),
        lambda: os.link(os.fsencode(shared / "f"), bad),
        lambda: os.rename(os.fsencode(shared / "f"), bad),
    ):
        assert outcome(call) == "EILSEQ"
    for call in (
        lambda: os.stat(bad),
        lambda: os.unlink(bad),
        lambda: os.rmdir(bad),
        lambda: os.rename(bad, bad + b"x"),
    ):
        assert outcome(call) == "ENOENT"
    assert os.listdir(shared) == ["f"]


def test_deep_trees_by_relative_names(same: Same) -> None:
    """A call takes paths of 4096 bytes; with openat(2) a program gets below them."""

    def run(where: Path) -> Any:
        fd = os.open(where, os.O_RDONLY)
        try:
            for _ in range(40):
                os.mkdir("d" * 200, dir_fd=fd)
                below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
                os.close(fd)
                fd = below
            os.close(os.open("file", os.O_CREAT | os.O_RDWR, dir_fd=fd))
            os.link("file", "link", src_dir_fd=fd, dst_dir_fd=fd)
            os.rename("file", "f" * 250, src_dir_fd=fd, dst_dir_fd=fd)
            os.fsync(fd)
            found = sorted(os.listdir(fd))
        finally:
            os.close(fd)
        shutil.rmtree(where / ("d" * 200))
        return found, os.listdir(where)

    same(run)


def test_a_deep_file_is_an_artifact(shared: Path, shared_mount: MountedInstance) -> None:
    fd = os.open(shared, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("e" * 200, dir_fd=fd)
        below = os.open("e" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    file = os.open("file.csv", os.O_CREAT | os.O_RDWR, dir_fd=fd)
    os.write(file, b"deep")
    os.fsync(file)
    os.close(file)
    os.close(fd)
    os.rename(shared / ("e" * 200), shared / "e")
    key = "/".join([shared.name, "e", *["e" * 200] * 29, "file.csv"])
    with shared_mount.registry() as registry:
        record = registry.artifacts.by_key(key)
    assert record is not None
    assert record.size == 4


def test_a_name_that_is_always_there_is_always_listed(shared: Path) -> None:
    """rename(2): of a name that is renamed over "there will be no point at which another process will find it
    missing"; also not one that reads the directory at the same time."""
    for number in range(400):
        put(shared / f"file {number:03}")
    for number in range(5):
        with os.scandir(shared) as entries:
            seen = [next(entries).name for _ in range(200 + number)]
            # A temporary file that the reader has passed replaces one that it has not come to yet.
            temporary = next(name for name in seen if name != "last")
            target = (set(os.listdir(shared)) - set(seen)).pop()
            os.rename(shared / temporary, shared / target)
            seen += [entry.name for entry in entries]
        assert target in seen


# -- links and other kinds --------------------------------------------------------------------------------------------


def test_hard_links_are_one_file(same: Same) -> None:
    def run(where: Path) -> Any:
        (where / "d").mkdir()
        put(where / "a", b"one")
        os.link(where / "a", where / "d/b")
        results: list[Any] = [(where / "a").stat().st_nlink, (where / "a").samefile(where / "d/b")]
        put(where / "d/b", b"changed through b")
        results.append((where / "a").read_bytes())
        (where / "a").chmod(0o600)
        results.append(oct((where / "d/b").stat().st_mode))
        with open(where / "a", "ab", buffering=0) as file:
            file.write(b" and a")
            os.link(where / "a", where / "c")
            results.append((where / "c").read_bytes())
            os.unlink(where / "a")
            file.write(b" unlinked")
            results += [(where / "d/b").read_bytes(), os.fstat(file.fileno()).st_nlink]
        results.append(outcome(lambda: os.link(where / "d", where / "e")))
        results.append(outcome(lambda: os.link(where / "c", where / "d/b")))
        results.append(outcome(lambda: os.rename(where / "c", where / "d/b")))
        results.append((where / "d/b").stat().st_nlink)
        os.unlink(where / "c")
        results.append(((where / "d/b").stat().st_nlink, (where / "d/b").read_bytes()))
        return results, tree(where)

    same(run)


def test_hard_links_survive_a_remount(local_mount: MountedInstance) -> None:
    top = local_mount.path
    put(top / "a", b"content")
    os.link(top / "a", top / "b")
    os.unlink(top / "a")
    os.link(top / "b", top / "c")
    local_mount.remount(empty_cache=True)
    assert (top / "b").samefile(top / "c")
    assert (top / "b").stat().st_nlink == 2
    assert (top / "c").read_bytes() == b"content"
    put(top / "c", b"other")
    assert (top / "b").read_bytes() == b"other"
    local_mount.umount()
    assert local_mount.fsck() == []


def test_symlinks(same: Same) -> None:
    def run(where: Path) -> Any:
        put(where / "f", b"target")
        (where / "d").mkdir()
        targets = ["f", "d", "missing", "../up", "/etc/hostname", "x" * 4000, "with space", "é", "s0"]
        results: list[Any] = []
        for number, target in enumerate(targets):
            link = where / f"s{number}"
            link.symlink_to(target)
            info = link.lstat()
            results.append((os.readlink(link), info.st_size, oct(info.st_mode), info.st_nlink))
        results.append(outcome(lambda: os.symlink("x" * 5000, where / "long")))
        results.append(outcome(lambda: os.symlink("", where / "empty")))
        results.append((where / "s0").read_bytes())
        results.append(outcome(lambda: (where / "s8").read_bytes()))
        put(where / "s2", b"written through a dangling link")
        results.append((where / "missing").read_bytes())
        put(where / "s1/inside", b"y")
        os.utime(where / "s0", ns=(3, 4), follow_symlinks=False)
        results.append(((where / "s0").lstat().st_mtime_ns, (where / "f").stat().st_mtime_ns > 4))
        os.chown(where / "s0", 7, 8, follow_symlinks=False)
        results.append(((where / "s0").lstat().st_uid, (where / "f").stat().st_uid))
        os.rename(where / "s0", where / "d/moved")
        os.link(where / "s2", where / "hard", follow_symlinks=False)
        return results, tree(where)

    same(run)


def test_a_symlink_target_need_not_be_utf8(shared: Path) -> None:
    os.symlink(b"caf\xe9", os.fsencode(shared / "link"))
    assert os.readlink(os.fsencode(shared / "link")) == b"caf\xe9"


def test_fifos_and_sockets_are_meeting_places(shared: Path) -> None:
    os.mkfifo(shared / "fifo", 0o600)
    assert stat.S_ISFIFO((shared / "fifo").stat().st_mode)
    reader = subprocess.Popen(["cat", shared / "fifo"], stdout=subprocess.PIPE)
    (shared / "fifo").write_bytes(b"through the fifo")
    assert reader.communicate(timeout=20)[0] == b"through the fifo"
    code = (
        "import os, socket, sys\n"
        "os.chdir(sys.argv[1])\n"
        "server = socket.socket(socket.AF_UNIX); server.bind('s'); server.listen()\n"
        "client = socket.socket(socket.AF_UNIX); client.connect('s'); client.sendall(b'hello')\n"
        "print(server.accept()[0].recv(10))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, shared], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "b'hello'\n"
    assert stat.S_ISSOCK((shared / "s").stat().st_mode)
    shutil.rmtree(shared)


# -- attributes -------------------------------------------------------------------------------------------------------


def test_modes_owners_and_times(same: Same) -> None:
    def run(where: Path) -> Any:
        furnish(where)
        results: list[Any] = []
        for name in ("file", "dir", "fifo", "symlink"):
            path = where / name
            for mode in (0o000, 0o777, 0o4755, 0o2755, 0o1777, 0o7777):
                path.chmod(mode)
                results.append(oct(path.stat().st_mode))
            for uid, gid in ((1, 2), (-1, 3), (4, -1), (-1, -1), (2**32 - 2, 2**31), (0, 0)):
                os.chown(path, uid, gid)
                results.append((path.stat().st_uid, path.stat().st_gid, oct(path.stat().st_mode)))
            for times in (
                (0, 0),
                (1, 999_999_999),
                (-1_000_000_001, 2**33 * 10**9 + 5),
                (1_700_000_000_000_000_001, 3),
            ):
                os.utime(path, ns=times)
                results.append((path.stat().st_atime_ns, path.stat().st_mtime_ns))
        results.append(outcome(lambda: (where / "missing").chmod(0o600)))
        results.append(outcome(lambda: os.utime(where / "missing")))
        return results

    same(run)


def test_chown_and_writes_take_the_set_id_bits_away(same: Same) -> None:
    def run(where: Path) -> Any:
        path = put(where / "f")
        path.chmod(0o6777)
        os.chown(path, 5, 5)
        after_chown = oct(path.stat().st_mode)
        path.chmod(0o6777)
        code = "import os, sys; fd = os.open(sys.argv[1], os.O_WRONLY); os.write(fd, b'x')"
        # Seen by another user, the directories on the way must be open.
        command = [
            "setpriv",
            "--reuid=0",
            "--bounding-set=-all",
            "--inh-caps=-all",
            sys.executable,
            "-I",
            "-S",
            "-c",
            code,
            str(path),
        ]
        subprocess.run(command, check=True, timeout=30)
        return after_chown, oct(path.stat().st_mode)

    same(run)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("mode", [0o4755, 0o2775, 0o6777, 0o755])
def test_emptying_a_file_takes_the_set_id_bits_away(local_instance: MountedInstance, mode: int) -> None:
    """open(2) with O_TRUNC by an ordinary user: as any change of the content."""
    local_instance.mount(["allow_other"])
    local_instance.path.chmod(0o777)
    program = (
        "import os, sys\n"
        "os.setgroups([]); os.setresgid(5, 5, 5); os.setresuid(5, 5, 5)\n"
        "path, mode = sys.argv[1], int(sys.argv[2])\n"
        "os.close(os.open(path, os.O_CREAT | os.O_WRONLY)); os.chmod(path, mode)\n"
        "file = os.open(path, os.O_RDWR | os.O_TRUNC)\n"
        "print(oct(os.fstat(file).st_mode), oct(os.stat(path).st_mode))\n"
    )
    path = local_instance.path / "f"
    done = local_instance.run([sys.executable, "-I", "-S", "-c", program, path, str(mode)], cwd="/")
    wanted = oct(stat.S_IFREG | mode & 0o777)
    assert done.stdout.split() == [wanted, wanted]
    path.chmod(mode)
    os.close(os.open(path, os.O_RDWR | os.O_TRUNC))
    assert path.stat().st_mode == stat.S_IFREG | mode, "root keeps them"


def test_touch_now_is_now(same: Same) -> None:
    def run(where: Path) -> Any:
        path = put(where / "f")
        os.utime(path, ns=(1, 1))
        os.utime(path)
        now = (where / "f").stat()
        put(where / "g")
        other = (where / "g").stat()
        return abs(now.st_mtime_ns - other.st_mtime_ns) < 5e9, abs(now.st_atime_ns - other.st_mtime_ns) < 5e9

    same(run)


def test_directory_times_change_with_their_entries(same: Same) -> None:
    def run(where: Path) -> Any:
        results = []
        (where / "a").mkdir()
        (where / "b").mkdir()
        put(where / "a/old")

        def moved(action: Callable[[], Any]) -> None:
            for name in ("a", "b"):
                os.utime(where / name, ns=(1, 1))
            action()
            results.append([(where / name).stat().st_mtime_ns > 1 for name in ("a", "b")])

        moved(lambda: put(where / "a/f"))
        moved(lambda: put(where / "a/f", b"again"))
        moved(lambda: os.rename(where / "a/f", where / "b/f"))
        moved(lambda: os.link(where / "b/f", where / "a/g"))
        moved(lambda: os.unlink(where / "a/g"))
        moved(lambda: (where / "a/d").mkdir())
        moved(lambda: (where / "a/d").rmdir())
        moved(lambda: (where / "a/s").symlink_to("x"))
        moved(lambda: os.mkfifo(where / "a/p"))
        moved(lambda: (where / "a/old").chmod(0o600))
        return results

    same(run)


def test_statvfs(shared: Path, shared_mount: MountedInstance) -> None:
    of_mount, of_storage = os.statvfs(shared), os.statvfs(shared_mount.storage.root)
    assert of_mount.f_frsize == of_storage.f_frsize
    assert of_mount.f_blocks == of_storage.f_blocks
    assert abs(of_mount.f_bavail - of_storage.f_bavail) * of_mount.f_frsize < 1 << 30
    assert of_mount.f_namemax == 255
    assert of_mount.f_files >= of_mount.f_ffree > 0


def test_statvfs_of_a_bucket_has_room(s3_mount: MountedInstance) -> None:
    space = os.statvfs(s3_mount.path)
    assert space.f_bavail * space.f_frsize >= 1 << 49
    assert s3_mount.run(["df", "-P", "."]).stdout.count("lamfs") >= 1


def test_inode_numbers_are_stable_and_differ(shared: Path) -> None:
    put(shared / "a")
    put(shared / "b")
    before = (shared / "a").stat().st_ino
    assert before != (shared / "b").stat().st_ino
    os.rename(shared / "a", shared / "c")
    put(shared / "c", b"new content")
    assert (shared / "c").stat().st_ino == before
    assert errno.errorcode[errno.ENOENT] == outcome((shared / "a").stat)
