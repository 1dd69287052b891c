"""Rows 6 to 12 and 15: many files, and their names."""

from __future__ import annotations

import functools
import io
import os
import random
import shutil
import statistics
import subprocess
import sysconfig
import tarfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from tests.bench import processes
from tests.bench.bench import Bench, Numbers, row
from tests.bench.systems import JuiceFS, Lamfs, System

MANY = 10_000
"""Files that are made one by one, or as objects."""
OBJECTS = ("rclone", "s3fs")
"""Systems whose files are objects of the same names."""


def timed(work: Callable[[], object]) -> float:
    """Seconds that it took."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def small_name(number: int) -> str:
    """Names whose order is that of their numbers."""
    return f"sample_{number:06}.csv"


def small_data(bench: Bench, number: int) -> memoryview:
    """Contents that differ, from those of other repetitions too."""
    size = bench.scale.small
    start = (bench.repetition * bench.scale.small_files + number) * size
    return bench.source[start : start + size]


def create_small(bench: Bench, folder: Path) -> None:
    """The small files, one after the other."""
    for number in range(bench.scale.small_files):
        with open(folder / small_name(number), "wb", buffering=0) as file:
            file.write(small_data(bench, number))


def read_small(bench: Bench, folder: Path, order: list[int]) -> None:
    """Read them and compare."""
    for number in order:
        with open(folder / small_name(number), "rb", buffering=0) as file:
            data = file.read(1 << 20)
        assert data == small_data(bench, number), f"{folder}: wrong bytes in {small_name(number)}"


@row("6", "1,000 files of 4 KiB", writes=True)
def small_files(bench: Bench, system: System) -> Numbers:
    """Created, then read cold in order and in random order."""
    folder = system.path / f"small-{bench.repetition}"
    folder.mkdir()
    begin = time.perf_counter()
    create_small(bench, folder)
    numbers = {"create, to close [s]": time.perf_counter() - begin}
    if system.remote:
        numbers["create, in S3 [s]"] = system.settle(bench.scale.small_files * bench.scale.small) - begin
    order = list(range(bench.scale.small_files))
    shuffled = random.Random(bench.repetition).sample(order, len(order))
    for what, chosen in (("in the order of ls", order), ("in random order", shuffled)):
        system.remount(cold=True)
        if not system.remote:
            processes.drop_page_cache()
        before = system.traffic() if system.remote else None
        begin = time.perf_counter()
        found = sorted(os.listdir(folder))
        assert found == [small_name(number) for number in order], f"{system.name}: other names"
        read_small(bench, folder, chosen)
        numbers[f"read cold {what} [s]"] = time.perf_counter() - begin
        if before is not None:
            numbers[f"read cold {what}, requests [n]"] = (system.traffic() - before).requests
    numbers["read warm [s]"] = timed(lambda: read_small(bench, folder, order))
    shutil.rmtree(folder)
    system.settle()
    return numbers


def fill(bench: Bench, system: System, count: int) -> Path:
    """A directory of ``count`` small files, in S3."""
    folder = system.path / f"list-{count}"
    if folder.name not in system.prepared:
        if system.name in OBJECTS:
            folder.mkdir()
            bench.put_objects(system, [f"{folder.name}/{small_name(number)}" for number in range(count)])
        elif count > MANY and isinstance(system, Lamfs | JuiceFS):
            system.umount()
            system.fill(folder.name, count, None)
            system.mount()
            assert len(os.listdir(folder)) == count
        else:
            folder.mkdir()
            for number in range(count):
                (folder / small_name(number)).write_bytes(b"x")
            system.settle()
        system.prepared.add(folder.name)
    return folder


@row("7", "stat and ls -l")
def listing(bench: Bench, system: System) -> Numbers:
    """Cold: just mounted, with nothing in the kernel's caches; warm: the same again."""
    numbers: Numbers = {}
    folder = fill(bench, system, bench.scale.listed[0])
    names = [folder / small_name(number) for number in range(bench.scale.listed[0])]
    system.remount(cold=True)
    processes.drop_page_cache()
    for state in ("cold", "warm"):
        numbers[f"stat of {len(names):,}, {state} [s]"] = timed(lambda: [os.stat(name) for name in names])
    for count in bench.scale.listed:
        if count > MANY and system.name in OBJECTS:
            continue
        folder = fill(bench, system, count)
        system.remount(cold=True)
        processes.drop_page_cache()
        before = system.traffic() if system.remote else None
        for state in ("cold", "warm"):
            numbers[f"ls -l of {count:,}, {state} [s]"] = processes.run(["ls", "-l", str(folder)])
        if before is not None:
            numbers[f"ls -l of {count:,}, requests [n]"] = (system.traffic() - before).requests
    return numbers


def source_tree(bench: Bench) -> tuple[Path, Path, Path]:
    """The source tree that is unpacked (from Python's own library), as folder, as tar file and as git repository."""
    tree, tar, repository = bench.base / "tree", bench.base / "tree.tar", bench.base / "tree.git"
    if not tar.exists():
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in stdlib.rglob("*") if p.suffix in (".py", ".txt", ".h", ".c") and p.is_file())
        with tarfile.open(tar, "w") as archive:
            for path in [p for p in files if "site-packages" not in p.parts][: bench.scale.source_files]:
                data = path.read_bytes()
                member = tarfile.TarInfo(f"src/{path.relative_to(stdlib)}")
                member.size, member.mode, member.mtime = len(data), 0o644, 1_700_000_000
                archive.addfile(member, io.BytesIO(data))
        tree.mkdir()
        processes.run(["tar", "xf", str(tar), "-C", str(tree)])
        git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@example.org", "-C", str(tree / "src")]
        processes.run([*git, "init", "-q"])
        processes.run([*git, "add", "-A"])
        processes.run([*git, "commit", "-q", "-m", "tree"])
        processes.run(["git", "clone", "-q", "--bare", str(tree / "src"), str(repository)])
        shutil.rmtree(tree / "src" / ".git")
    return tree, tar, repository


@row("8", "untar 2,000 files; git clone; git status", writes=True)
def untar(bench: Bench, system: System) -> Numbers:
    """And row 9: rm -rf of both."""
    tree, tar, repository = source_tree(bench)
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    folder = system.path / f"untar-{bench.repetition}"
    folder.mkdir()
    begin = time.perf_counter()
    numbers = {"untar [s]": processes.run(["tar", "xf", str(tar), "-C", str(folder)])}
    if system.remote:
        numbers["untar, in S3 [s]"] = system.settle(size) - begin
    processes.run(["diff", "-r", str(tree / "src"), str(folder / "src")])
    clone = folder / "clone"
    numbers["git clone [s]"] = processes.run(["git", "clone", "-q", str(repository), str(clone)])
    git = ["git", "-c", f"safe.directory={clone}", "-C", str(clone), "status", "--porcelain"]
    # Git reads again what was written in the second before its index was: of a quick clone, much.
    numbers["git status [s]"] = processes.run(git)
    numbers["git status, again [s]"] = processes.run(git)
    dirty = subprocess.run(git, capture_output=True, check=True, timeout=600).stdout
    assert dirty == b"", f"{system.name}: {dirty[:200]!r}"
    system.settle()
    numbers["rm -rf of the tree (row 9) [s]"] = processes.run(["rm", "-rf", str(folder / "src")])
    numbers["rm -rf of the clone (row 9) [s]"] = processes.run(["rm", "-rf", str(folder)])
    assert not folder.exists()
    system.settle()
    return numbers


@row("10", "rename a directory")
def rename(bench: Bench, system: System) -> Numbers:
    """Until rename() returns, the median of five; the directory holds files that are in S3."""
    numbers: Numbers = {}
    for count in bench.scale.listed:
        if count > 1000 and system.name in OBJECTS:
            continue
        folder = fill(bench, system, count)
        names = [folder, *(system.path / f"renamed-{count}-{number}" for number in range(4)), folder]
        took = []
        for old, new in pairwise(names):
            os.listdir(old)
            took.append(timed(functools.partial(old.rename, new)) * 1000)
            assert len(os.listdir(new)) == count
        numbers[f"{count:,} files [ms]"] = statistics.median(took)
        system.settle()
    return numbers


@row("11", "mount to first ls")
def mount(bench: Bench, system: System) -> Numbers:
    """Until `ls` of the root has ended; the file system holds the files of row 7. With --scale huge also one that holds
    nothing but so many files, a thousand in a directory; rclone and s3fs only the fewest, which have to be objects."""
    if not system.remote and not system.pids():
        return {}
    for count in bench.scale.listed[:2] if system.remote else ():
        fill(bench, system, count)
    system.umount()
    begin = time.perf_counter()
    system.mount()
    processes.run(["ls", str(system.path)])
    numbers = {f"{sum(bench.scale.listed[:2]):,} files [s]": time.perf_counter() - begin}
    for count in bench.scale.huge:
        if not system.remote or (count > MANY and system.name in OBJECTS):
            continue
        other = bench.filled(system, count)
        processes.drop_page_cache()
        begin = time.perf_counter()
        other.mount()
        processes.run(["ls", str(other.path)])
        numbers[f"{count:,} files, nothing else [s]"] = time.perf_counter() - begin
        numbers[f"{count:,} files, nothing else, memory [MiB]"] = processes.memory(other.pids())
        listed = len(os.listdir(other.path / f"filled/d{count // 1000 - 1:04}"))
        assert listed == 1000, f"{system.name}: {listed} files in the last directory"
        other.umount()
    return numbers


@row("15", "bring files into the local cache")
def cache(bench: Bench, system: System) -> Numbers:
    """`lamfs cache`, `juicefs warmup`; for others, eight `cat` at once."""
    if not system.remote:
        return {}
    many, large = system.path / "cache-many", system.path / "cache-large"
    if "cache" not in system.prepared:
        many.mkdir()
        create_small(bench, many)
        large.mkdir()
        for number in range(10):
            (large / f"part-{number}").write_bytes(bench.source[: bench.scale.part])
        system.settle(10 * bench.scale.part)
        system.prepared.add("cache")
    numbers: Numbers = {}
    for what, folder in ((f"{bench.scale.small_files:,} small", many), ("10 large", large)):
        system.remount(cold=True)
        if isinstance(system, Lamfs):
            numbers[f"{what} [s]"] = timed(lambda: system.instance.cli("cache", str(folder), timeout=600))  # noqa: B023
        elif isinstance(system, JuiceFS):
            numbers[f"{what} [s]"] = processes.run([str(system.found()), "warmup", str(folder)], env=system.env)
        else:
            script = f"find {folder} -type f -print0 | xargs -0 -n 1 -P 8 cat"
            numbers[f"{what} [s]"] = processes.run(["sh", "-c", script])
    return numbers
