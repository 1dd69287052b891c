"""A state machine does the same system calls in a mount and in a plain folder: everything that can be seen is equal.

Results, errors, bytes, attributes and whole trees are compared, and which times each call moves. The mount is taken
down and mounted again in between, also by kill -9 and with an empty cache, and ``lamfs fsck`` looks at the end.

LAMFS_SOAK: how many times as many steps as usual (scripts/soak). LAMFS_SEED: other calls. LAMFS_SHRINK: look for a
shorter sequence of calls when one fails, which takes minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support import syscalls
from tests.support.mounts import MountedInstance, checked, s3_instance
from tests.support.servers import Server
from tests.support.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, outcome
from tests.support.tree import check_tree

SOAK = int(os.environ.get("LAMFS_SOAK", "1"))
SEED = int(os.environ.get("LAMFS_SEED", "1"))
SECONDS = 110.0 * SOAK
STEPS_OF_EXAMPLE = 60
EXAMPLES = 9
"""Examples of a run of Hypothesis. From the tenth on, most are an earlier one with a part of it done twice."""
PARTS = {"local": [2400, 2400, 2400], "s3": [1500, 1500]}
"""Steps of each test, by the kind of storage."""
OPEN_MAX = 12
REMOUNT_ODDS = 40
USER = 1000

# Few names, so that calls meet. Some are scratch, some are what a backup of another name is called.
FILES = ["a", "b.csv", "c.tar.gz", "é", "a~", "b.csv.bak", ".a.swp"]
FOLDERS = ["d", "g", "d/e", "g/d"]
ODD = ["", ".", "d/..", "a/", "d/", "d/.", "d/new/", "no/a", "a/a", "n" * 255, "n" * 256, "d/" + "é" * 127, "e" * 4100]
ANY = st.sampled_from(
    FILES * 6 + FOLDERS * 3 + [f"{folder}/{name}" for folder in FOLDERS for name in FILES] + ["d/e/d"] + ODD
)
THERE = st.runner().flatmap(lambda machine: st.sampled_from(machine.there()))
PATHS = st.one_of(ANY, THERE, THERE)
TARGETS = st.sampled_from(["a", "b.csv", "d", "../a", "e", "e/a", "d/e", "nowhere", "/nowhere", "", ".", "x" * 4095])
KEPT_NAMES = st.sampled_from(["{}~", "{}.bak", "{}.orig", "#{}#", "{}.tmp", "d/{}~"])
SIZES = st.sampled_from([0, 1, 1, 100, 4096, 5000, 70_000, 300_000])
OFFSETS = st.sampled_from([0, 0, 1, 99, 4095, 4096, 8192, 100_000, 4 << 20])
MODES = st.sampled_from([0o644, 0o600, 0o666, 0o400, 0o755, 0o700, 0o4755, 0o2755, 0o2644, 0o2775, 0o1777, 0o000])
OWNERS = st.sampled_from([0, USER, 1001, -1])
NUMBERS = st.integers(0, OPEN_MAX - 1)
ACCESS = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR, os.O_RDWR])
FLAGS = st.sampled_from(
    [
        0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_TRUNC, os.O_TRUNC, os.O_APPEND, os.O_CREAT | os.O_APPEND,
        os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_EXCL | os.O_APPEND, os.O_TRUNC | os.O_APPEND, os.O_NOFOLLOW,
        os.O_CREAT | os.O_NOFOLLOW, os.O_DIRECTORY, os.O_DIRECTORY | os.O_NOFOLLOW, os.O_CREAT | os.O_DIRECTORY,
        os.O_SYNC | os.O_CREAT, os.O_DSYNC, os.O_PATH, os.O_PATH | os.O_NOFOLLOW, os.O_CREAT | os.O_SYNC | os.O_APPEND,
    ]
)  # fmt: skip
KINDS = st.sampled_from([stat.S_IFREG, 0, stat.S_IFIFO, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
# KNOWN: "user." (nothing after the dot) is EINVAL on a disk; lamfs takes it.
XATTRS = st.sampled_from(["user.a", "user.b", "user.long." + "x" * 200, "user.é", "nothing.a", "user." + "x" * 251])
DAY = 86_400 * syscalls.SECOND
TIMES = [
    0, 1, -1, -DAY * 365 - 1, -DAY * 365 * 60 - 999_999_999, 1_000_000_000_123_456_789, 2**31 * syscalls.SECOND - 1,
    2**31 * syscalls.SECOND + 1, 2**32 * syscalls.SECOND + 7, DAY * 365 * 250 + 1,
]  # fmt: skip
"""From 1909 to 2219; on both sides of the epoch and of what 32 bits hold."""


@dataclasses.dataclass(eq=False)
class Handle:
    """A descriptor in each place."""

    fds: list[int]
    text: str


@dataclasses.dataclass(eq=False)
class Mapping:
    """A mapping of one file in each place, with descriptors that say how long the file is."""

    maps: list[mmap.mmap]
    fds: list[int]
    shared: bool
    writable: bool


@dataclasses.dataclass
class Arena:
    """A plain folder and a mount, for the machines of one test. ``done``: the calls of the present machine."""

    instance: MountedInstance
    words: list[str]
    plain: str
    with_xattrs: bool
    plain_counts: bool
    times: list[int]
    steps: int = 0
    calls: int = 0
    machines: int = 0
    remounts: int = 0
    stat: Any = dataclasses.field(default_factory=__import__("collections").Counter)
    done: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] | None = None
    """The calls of the first machine that failed."""


class MountMachine(RuleBasedStateMachine):
    """``roots``, and all lists of two: the plain folder first, then the mount. Subclasses have an arena."""

    arena: ClassVar[Arena]

    def __init__(self) -> None:
        super().__init__()
        arena = self.arena
        arena.machines += 1
        arena.done = []
        name = f"x{arena.machines}"
        # One more folder around, for symlinks that lead up.
        self.around = [f"{arena.plain}/{name}", f"{arena.instance.path}/{name}"]
        self.roots = [f"{around}/w" for around in self.around]
        self.handles: list[Handle] = []
        self.mappings: list[Mapping] = []
        self.failed = False
        self.begun = False
        self.user = 0
        self.watching = False
        self.count = 0
        self.mapped: set[int] = set()
        self.old_mask = os.umask(0o022)
        for root in self.roots:
            os.makedirs(root)

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.let_go()
                self.compare()
        finally:
            os.umask(self.old_mask)
            for mapping in self.mappings:
                for fd in mapping.fds:
                    os.close(fd)
            for handle in self.handles:
                for fd in handle.fds:
                    with contextlib.suppress(OSError):
                        os.close(fd)
        if not self.failed:
            for around in self.around:
                shutil.rmtree(around)

    # -- both places --------------------------------------------------------------------------------------------

    def fail(self, problem: str) -> None:
        self.failed = True
        if self.arena.failed is None or "LAMFS_SHRINK" in os.environ:
            self.arena.failed = self.arena.done
        raise AssertionError(problem)

    def both(self, text: str, call: Callable[[int], Any]) -> list[Any]:
        """Do a call in both places; what it gave there."""
        arena = self.arena
        arena.done.append(text)
        arena.calls += 1
        results = []
        for place in range(2):
            with syscalls.acting_as(self.user):
                results.append(outcome(functools.partial(call, place)))
        arena.done[-1] += f" = {syscalls.brief(results[0])}"
        arena.stat[text.split()[0], results[0] if isinstance(results[0], str) else "ok"] += 1
        return results

    def same(self, text: str, call: Callable[[int], Any], *paths: str, fds: list[int] | None = None) -> Any:
        """Do a call in both places, with equal outcomes. It may change what is at these paths and descriptors."""
        with self.watched(text, paths, fds):
            wanted, got = self.both(text, call)
            if wanted != got:
                self.fail(f"{text}: {syscalls.brief(got)}, on the plain disk {syscalls.brief(wanted)}")
        for path in paths:
            self.look(path)
        return wanted

    def shape(self, status: os.stat_result, *, mapped: bool) -> dict[str, Any]:
        shape = syscalls.shape(status)
        if stat.S_ISDIR(status.st_mode) and not self.arena.plain_counts:
            del shape["nlink"]
        if mapped:
            del shape["mtime"]
        return shape

    def look(self, path: str) -> None:
        """The attributes of what is at a path are equal."""
        found = [outcome(lambda root=root: os.lstat(f"{root}/{path}")) for root in self.roots]
        if all(isinstance(status, os.stat_result) for status in found):
            mapped = found[0].st_ino in self.mapped
            found = [self.shape(status, mapped=mapped) for status in found]
        if found[0] != found[1]:
            self.fail(f"lstat {path}: {found[1]}, on the plain disk {found[0]}")

    # -- which times a call moves -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watched(self, text: str, paths: tuple[str, ...], fds: list[int] | None) -> Iterator[None]:
        """The call inside of the block moves the same times, of files and of the directories they are in."""
        if not self.watching or not (paths or fds):
            yield
            return
        with contextlib.ExitStack() as stack:
            # What goes through a FIFO never comes to a file system in user space: its times stay as they are.
            quiet = fds is None or self.is_mapped(fds[0]) or stat.S_ISFIFO(os.fstat(fds[0]).st_mode)
            objects = {} if fds is None or quiet else {"the file": fds}
            for path in sorted({*paths, *(os.path.dirname(path.rstrip("/")) or "." for path in paths)}):
                pair = []
                for root in self.roots:
                    with contextlib.suppress(OSError):
                        pair.append(os.open(f"{root}/{path}", os.O_PATH | os.O_NOFOLLOW))
                        stack.callback(os.close, pair[-1])
                if len(pair) == 2 and not self.is_mapped(pair[0]):
                    objects[path] = pair
            before = {path: [os.fstat(fd) for fd in pair] for path, pair in objects.items()}
            syscalls.next_tick()
            yield
            moved: list[dict[str, Any]] = [
                {path: self.moved(before[path][place], os.fstat(pair[place])) for path, pair in objects.items()}
                for place in range(2)
            ]
        if moved[0] != moved[1]:
            self.fail(f"what is changed by {text}:\n" + "\n".join(syscalls.differences(*moved)))

    def is_mapped(self, fd: int) -> bool:
        """Whether a mapping of this file of the plain folder was written to: its times are the kernel's then."""
        return os.fstat(fd).st_ino in self.mapped

    def moved(self, before: os.stat_result, after: os.stat_result) -> dict[str, Any]:
        return {
            "mtime": before.st_mtime_ns != after.st_mtime_ns,
            "ctime": before.st_ctime_ns != after.st_ctime_ns,
            "nlink": after.st_nlink - before.st_nlink,
            "size": None if stat.S_ISDIR(after.st_mode) else after.st_size,
            "mode": syscalls.mode_of(after),
        }

    # -- the whole ----------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """The two trees are equal, and open files are the files they were."""
        if not self.begun:
            return
        self.arena.done.append("-- compare")
        trees = [syscalls.whole_tree(around, with_xattrs=self.arena.with_xattrs) for around in self.around]
        if self.mapped:
            for path in trees[0].keys() & trees[1].keys():
                if os.lstat(f"{self.around[0]}/{path}").st_ino in self.mapped:
                    for tree in trees:
                        tree[path].pop("mtime")
        if not self.arena.plain_counts:
            for tree in trees:
                for item in tree.values():
                    if item["mode"].startswith("0o4"):
                        del item["nlink"]
        if trees[0] != trees[1]:
            self.fail("the trees differ:\n" + "\n".join(syscalls.differences(*trees)))

    def let_go(self) -> None:
        """Close everything."""
        while self.mappings:
            self.unmap(0)
        while self.handles:
            self.close(0)

    def data(self, size: int) -> bytes:
        """Bytes that no other call has written."""
        self.count += 1
        return random.Random(self.count).randbytes(size)

    def keep(self, text: str, results: list[Any]) -> Handle | None:
        """A new descriptor in both places, or the same error."""
        if isinstance(results[0], int) and isinstance(results[1], int):
            handle = Handle(results, text)
            self.handles.append(handle)
            if len(self.handles) > OPEN_MAX:
                self.close(0)
            return handle
        if results[0] != results[1]:
            self.fail(f"{text}: {results[1]}, on the plain disk {results[0]}")
        return None

    def on(self, text: str, number: int, call: Callable[[int], Any]) -> Any:
        """Do a call on one of the handles."""
        handle = self.handles[number % len(self.handles)]
        return self.same(f"{text} [{handle.text}]", lambda place: call(handle.fds[place]), fds=handle.fds)

    def is_device(self, path: str) -> bool:
        """Whether it would open a device: a mount has none (nodev)."""
        with contextlib.suppress(OSError):
            mode = os.stat(f"{self.roots[0]}/{path}").st_mode
            return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        return False

    def there(self) -> list[str]:
        """Paths of what there is."""
        root = self.roots[0]
        found = [
            os.path.relpath(os.path.join(folder, name), root)
            for folder, folders, files in os.walk(root)
            for name in (*folders, *files)
        ]
        return sorted(found) or ["a"]

    # -- life ---------------------------------------------------------------------------------------------------

    @invariant()
    def counted(self) -> None:
        """Invariants are looked at after each step."""
        if self.begun:
            self.arena.steps += 1

    @initialize(
        salt=st.integers(0, 1 << 32),
        umask=st.sampled_from([0o022, 0o077, 0o002, 0]),
        watching=st.sampled_from([False, False, True]),
        user=st.sampled_from([0, 0, USER]),
    )
    def begin(self, salt: int, umask: int, watching: bool, user: int) -> None:
        # The first example is always the simplest one, the same call again and again: that does not count.
        self.begun = salt != 0
        os.umask(umask)
        self.watching = watching
        self.arena.done.append(f"-- machine {self.arena.machines}: umask {umask:o}, user {user}")
        if os.geteuid() == 0:
            self.user = user
        for root in self.roots:
            os.chmod(root, 0o777)
            if os.geteuid() == 0:
                os.chown(root, user, user)
            with syscalls.acting_as(self.user):
                os.makedirs(f"{root}/d/e")
                os.mkdir(f"{root}/g")
                # What is made in there gets its group.
                os.chmod(f"{root}/g", 0o2775)
                for name, size in (("a", 5000), ("d/b.csv", 100_000), ("g/a", 0)):
                    with open(f"{root}/{name}", "wb") as file:
                        file.write(b"0123456789" * (size // 10))
            if os.geteuid() == 0:
                os.chown(f"{root}/g", -1, 1001)
        for path, flags in (
            ("a", os.O_RDWR),
            ("d/b.csv", os.O_RDWR | os.O_APPEND),
            ("d", os.O_RDONLY),
            ("g/a", os.O_RDWR),
        ):
            self.reopen(path, flags)

    @rule(chance=st.sampled_from(range(REMOUNT_ODDS)), empty=st.booleans())
    def remount(self, chance: int, empty: bool) -> None:
        """The mount is gone and comes back; seldom, for that takes seconds."""
        if chance > 2:
            return
        instance = self.arena.instance
        self.let_go()
        self.compare()
        times = self.times_of_all()
        self.arena.done.append(f"-- remount {chance} {empty}")
        if chance == 0:
            instance.kill9()
        elif chance == 1:
            instance.term()
        else:
            instance.umount()
        if empty:
            shutil.rmtree(instance.cache_dir, ignore_errors=True)
        instance.mount(self.arena.words)
        self.arena.remounts += 1
        self.compare()
        if self.times_of_all() != times:
            self.fail("a remount has changed times")

    def times_of_all(self) -> dict[str, tuple[int, int]]:
        """mtime and ctime of everything in the mount."""
        found = {}
        for folder, folders, files in os.walk(self.around[1]):
            for name in (*folders, *files):
                status = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (status.st_mtime_ns, status.st_ctime_ns)
        return found

    @rule()
    def tree(self) -> None:
        self.compare()

    # -- names --------------------------------------------------------------------------------------------------

    @rule(path=PATHS, access=ACCESS, flags=FLAGS, mode=MODES)
    def open(self, path: str, access: int, flags: int, mode: int) -> None:
        if self.is_device(path):
            return
        # A FIFO would wait for its other end.
        flags |= access | os.O_NONBLOCK
        text = f"open {path} {flags:o} {mode:o}"
        with self.watched(text, (path,), None):
            results = self.both(text, lambda place: os.open(f"{self.roots[place]}/{path}", flags, mode))
        self.keep(text, results)
        self.look(path)

    @rule(path=THERE, flags=st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_APPEND]))
    def reopen(self, path: str, flags: int) -> None:
        self.open(path, 0, flags, 0)

    @rule(old=PATHS, new=PATHS, flags=st.sampled_from([0, 0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, 3]))
    def rename(self, old: str, new: str, flags: int) -> None:
        def call(place: int) -> None:
            syscalls.rename2(f"{self.roots[place]}/{old}", f"{self.roots[place]}/{new}", flags)

        self.same(f"rename {old} {new} {flags}", call, old, new)

    @rule(old=PATHS, new=PATHS, follow=st.booleans())
    def link(self, old: str, new: str, follow: bool) -> None:
        def call(place: int) -> None:
            os.link(f"{self.roots[place]}/{old}", f"{self.roots[place]}/{new}", follow_symlinks=follow)

        self.same(f"link {old} {new} {follow}", call, old, new)

    @rule(to=TARGETS, path=PATHS)
    def symlink(self, to: str, path: str) -> None:
        self.same(f"symlink {to} {path}", lambda place: os.symlink(to, f"{self.roots[place]}/{path}"), path)

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.same(f"unlink {path}", lambda place: os.unlink(f"{self.roots[place]}/{path}"), path)

    @rule(path=PATHS, mode=MODES)
    def mkdir(self, path: str, mode: int) -> None:
        self.same(f"mkdir {path} {mode:o}", lambda place: os.mkdir(f"{self.roots[place]}/{path}", mode), path)

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        self.same(f"rmdir {path}", lambda place: os.rmdir(f"{self.roots[place]}/{path}"), path)

    @rule(path=PATHS, kind=KINDS, mode=MODES)
    def mknod(self, path: str, kind: int, mode: int) -> None:
        device = os.makedev(1, 3) if stat.S_ISCHR(kind) else os.makedev(7, 300) if stat.S_ISBLK(kind) else 0
        text = f"mknod {path} {kind | mode:o}"
        self.same(text, lambda place: os.mknod(f"{self.roots[place]}/{path}", kind | mode, device), path)

    @rule(name=st.sampled_from(["a", "b.csv", "d/b.csv", "g/a"]), kept=KEPT_NAMES, size=SIZES, mode=MODES)
    def save_with_backup(self, name: str, kept: str, size: int, mode: int) -> None:
        """As emacs and ``sed -i.bak`` save: the old content goes aside, the new one is a new file."""
        folder, _, base = name.rpartition("/")
        aside = (folder + "/" if folder else "") + kept.format(base)
        data = self.data(size)
        self.same(
            f"rename {name} {aside}",
            lambda place: os.rename(f"{self.roots[place]}/{name}", f"{self.roots[place]}/{aside}"),
            name,
            aside,
        )
        self.same(f"save {name}", lambda place: self.written(f"{self.roots[place]}/{name}", data, mode), name)

    @rule(name=PATHS, temporary=st.sampled_from(["{}.tmp", ".{}.Xy12", "tmp", "{}~"]), size=SIZES, mode=MODES)
    def save_by_rename(self, name: str, temporary: str, size: int, mode: int) -> None:
        """As vim, rsync and pandas save: a new file is renamed over the old one."""
        folder, _, base = name.rpartition("/")
        other = (folder + "/" if folder else "") + temporary.format(base)
        if self.is_device(other):
            return
        data = self.data(size)
        self.same(f"write {other}", lambda place: self.written(f"{self.roots[place]}/{other}", data, mode), other)
        self.same(
            f"rename {other} {name}",
            lambda place: os.rename(f"{self.roots[place]}/{other}", f"{self.roots[place]}/{name}"),
            other,
            name,
        )

    def written(self, path: str, data: bytes, mode: int) -> int:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, mode)
        try:
            return os.write(fd, data)
        finally:
            os.close(fd)

    # -- attributes ---------------------------------------------------------------------------------------------

    @rule(path=PATHS, mode=MODES)
    def chmod(self, path: str, mode: int) -> None:
        self.same(f"chmod {path} {mode:o}", lambda place: os.chmod(f"{self.roots[place]}/{path}", mode), path)

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, mode=MODES)
    def fchmod(self, number: int, mode: int) -> None:
        self.on(f"fchmod {mode:o}", number, lambda fd: os.fchmod(fd, mode))

    @rule(path=PATHS, uid=OWNERS, gid=OWNERS, follow=st.booleans())
    def chown(self, path: str, uid: int, gid: int, follow: bool) -> None:
        if uid == gid == -1:
            return  # whether this moves ctime is left to the file system
        self.same(
            f"chown {path} {uid} {gid} {follow}",
            lambda place: os.chown(f"{self.roots[place]}/{path}", uid, gid, follow_symlinks=follow),
            path,
        )

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, uid=OWNERS, gid=OWNERS)
    def fchown(self, number: int, uid: int, gid: int) -> None:
        if uid == gid == -1:
            return
        self.on(f"fchown {uid} {gid}", number, lambda fd: os.fchown(fd, uid, gid))

    @rule(
        path=PATHS, atime=st.integers(-2, len(TIMES) - 1), mtime=st.integers(-2, len(TIMES) - 1), follow=st.booleans()
    )
    def utimens(self, path: str, atime: int, mtime: int, follow: bool) -> None:
        times = [self.time(atime), self.time(mtime)]

        def call(place: int) -> tuple[Any, ...]:
            where = f"{self.roots[place]}/{path}"
            syscalls.utimens(where, *times, follow=follow)
            status = os.stat(where, follow_symlinks=follow)
            return "set", syscalls.far(status.st_atime_ns) if atime != -1 else None

        result = self.same(f"utimens {path} {times} {follow}", call, path)
        if isinstance(result, tuple) and atime >= 0:
            assert result[1] == times[0]

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, atime=st.integers(-2, len(TIMES) - 1), mtime=st.integers(-2, len(TIMES) - 1))
    def futimens(self, number: int, atime: int, mtime: int) -> None:
        times = [self.time(atime), self.time(mtime)]
        self.on(f"futimens {times}", number, lambda fd: syscalls.utimens(fd, *times))

    def time(self, number: int) -> int | str:
        return ("now", "omit")[number + 2] if number < 0 else self.arena.times[number % len(self.arena.times)]

    @rule(
        path=PATHS, mode=st.sampled_from([os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK]), follow=st.booleans()
    )
    def access(self, path: str, mode: int, follow: bool) -> None:
        self.same(
            f"access {path} {mode} {follow}",
            lambda place: os.access(f"{self.roots[place]}/{path}", mode, follow_symlinks=follow),
            path,
        )

    @rule(path=PATHS)
    def listdir(self, path: str) -> None:
        self.same(f"listdir {path}", lambda place: sorted(os.listdir(f"{self.roots[place]}/{path}")))

    @rule(path=PATHS)
    def readlink(self, path: str) -> None:
        self.same(f"readlink {path}", lambda place: os.readlink(f"{self.roots[place]}/{path}"))

    @precondition(lambda self: self.arena.with_xattrs)
    @rule(
        path=PATHS,
        name=XATTRS,
        size=st.sampled_from([0, 5, 300]),
        flags=st.sampled_from([0, 1, 2]),
        follow=st.booleans(),
    )
    def setxattr(self, path: str, name: str, size: int, flags: int, follow: bool) -> None:
        data = self.data(size)
        self.same(
            f"setxattr {path} {name} {size} {flags} {follow}",
            lambda place: os.setxattr(f"{self.roots[place]}/{path}", name, data, flags, follow_symlinks=follow),
            path,
        )

    @precondition(lambda self: self.arena.with_xattrs)
    @rule(path=PATHS, name=XATTRS, follow=st.booleans())
    def removexattr(self, path: str, name: str, follow: bool) -> None:
        self.same(
            f"removexattr {path} {name} {follow}",
            lambda place: os.removexattr(f"{self.roots[place]}/{path}", name, follow_symlinks=follow),
            path,
        )

    @precondition(lambda self: self.arena.with_xattrs)
    @rule(path=PATHS, name=XATTRS, follow=st.booleans())
    def getxattr(self, path: str, name: str, follow: bool) -> None:
        def call(place: int) -> tuple[Any, Any]:
            where = f"{self.roots[place]}/{path}"
            return syscalls.xattrs(where, follow=follow), outcome(
                lambda: os.getxattr(where, name, follow_symlinks=follow)
            )

        self.same(f"getxattr {path} {name} {follow}", call)

    @precondition(lambda self: self.arena.with_xattrs and self.handles)
    @rule(number=NUMBERS, name=XATTRS, size=st.sampled_from([0, 5, 300]), flags=st.sampled_from([0, 1, 2]))
    def fsetxattr(self, number: int, name: str, size: int, flags: int) -> None:
        # KNOWN: an attribute that is given to a file without a name stays in the registry when the file is gone.
        if os.fstat(self.handles[number % len(self.handles)].fds[0]).st_nlink == 0:
            return
        data = self.data(size)
        self.on(f"fsetxattr {name} {size} {flags}", number, lambda fd: os.setxattr(fd, name, data, flags))
        self.on("flistxattr", number, syscalls.xattrs)
        self.on(f"fremovexattr {name}", number, lambda fd: os.removexattr(fd, name) if flags == 2 else None)

    # -- bytes --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, size=SIZES, offset=OFFSETS)
    def pwrite(self, number: int, size: int, offset: int) -> None:
        data = self.data(size)
        self.on(f"pwrite {size} at {offset}", number, lambda fd: os.pwrite(fd, data, offset))

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, offset=OFFSETS)
    def pread(self, number: int, offset: int) -> None:
        self.on(f"pread {offset}", number, lambda fd: os.pread(fd, 200_000, offset))

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, size=SIZES)
    def write(self, number: int, size: int) -> None:
        data = self.data(size)
        self.on(f"write {size}", number, lambda fd: os.write(fd, data))

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, size=SIZES)
    def read(self, number: int, size: int) -> None:
        self.on(f"read {size}", number, lambda fd: os.read(fd, size))

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, offset=st.sampled_from([0, 1, 5000, -1, -200]), whence=st.sampled_from([0, 1, 2, 3, 4]))
    def lseek(self, number: int, offset: int, whence: int) -> None:
        def call(fd: int) -> int | None:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                return None  # offsets in directories are the file system's own
            if whence in (os.SEEK_DATA, os.SEEK_HOLE) and 0 <= offset < status.st_size:
                return None  # lamfs shows no holes
            return os.lseek(fd, offset, whence)

        self.on(f"lseek {offset} {whence}", number, call)

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, size=st.one_of(OFFSETS, st.just(-1)))
    def ftruncate(self, number: int, size: int) -> None:
        self.on(f"ftruncate {size}", number, lambda fd: os.ftruncate(fd, size))

    @rule(path=PATHS, size=st.one_of(OFFSETS, st.just(-1)))
    def truncate(self, path: str, size: int) -> None:
        self.same(f"truncate {path} {size}", lambda place: os.truncate(f"{self.roots[place]}/{path}", size), path)

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, other=NUMBERS, size=SIZES, start=OFFSETS, to=OFFSETS)
    def copy_file_range(self, number: int, other: int, size: int, start: int, to: int) -> None:
        source, target = (self.handles[index % len(self.handles)] for index in (number, other))
        self.same(
            f"copy_file_range {size} {start} {to} [{source.text}] [{target.text}]",
            lambda place: os.copy_file_range(source.fds[place], target.fds[place], size, start, to),
            fds=target.fds,
        )

    @rule(path=PATHS, size=st.sampled_from([4096, 8192, 65536]), page=st.integers(0, 20), create=st.booleans())
    def direct(self, path: str, size: int, page: int, create: bool) -> None:
        """Whole pages past the page cache, from aligned memory."""
        if self.is_device(path):
            return
        data = self.data(size)

        def call(place: int) -> tuple[Any, ...]:
            flags = os.O_RDWR | os.O_DIRECT | os.O_NONBLOCK | (os.O_CREAT if create else 0)
            fd = os.open(f"{self.roots[place]}/{path}", flags, 0o644)
            try:
                with mmap.mmap(-1, size) as memory:
                    memory[:] = data
                    written = os.pwritev(fd, [memory], page * 4096)
                    memory[:] = bytes(size)
                    count = os.preadv(fd, [memory], page // 2 * 4096)
                    return written, count, memory[:count]
            finally:
                os.close(fd)

        self.same(f"direct {path} {size} at page {page}", call, path)

    @rule(path=PATHS)
    def read_all(self, path: str) -> None:
        if self.is_device(path):
            return

        def call(place: int) -> bytes:
            fd = os.open(f"{self.roots[place]}/{path}", os.O_RDONLY | os.O_NONBLOCK)
            try:
                return b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
            finally:
                os.close(fd)

        self.same(f"read {path}", call)

    # -- handles ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, data_only=st.booleans())
    def fsync(self, number: int, data_only: bool) -> None:
        self.on("fdatasync" if data_only else "fsync", number, os.fdatasync if data_only else os.fsync)

    @rule(path=st.sampled_from([".", "d", "g", "d/e"]))
    def fsync_folder(self, path: str) -> None:
        def call(place: int) -> None:
            fd = os.open(f"{self.roots[place]}/{path}", os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        self.same(f"fsync folder {path}", call)

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS)
    def fstat(self, number: int) -> None:
        handle = self.handles[number % len(self.handles)]
        status = [os.fstat(fd) for fd in handle.fds]
        found = [self.shape(s, mapped=self.is_mapped(handle.fds[0])) for s in status]
        if found[0] != found[1]:
            self.fail(f"fstat [{handle.text}]: {found[1]}, on the plain disk {found[0]}")
        # Which other handles are of the same file.
        wanted, got = (
            [os.fstat(other.fds[place]).st_ino == status[place].st_ino for other in self.handles] for place in range(2)
        )
        if wanted != got:
            self.fail(f"the same files as [{handle.text}]: {got}, on the plain disk {wanted}")

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS)
    def dup(self, number: int) -> None:
        handle = self.handles[number % len(self.handles)]
        self.keep(f"dup [{handle.text}]", [os.dup(fd) for fd in handle.fds])

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS)
    def close_one(self, number: int) -> None:
        self.close(number % len(self.handles))

    @precondition(lambda self: len(self.handles) > 3)
    @rule(numbers=st.lists(NUMBERS, min_size=3, max_size=6))
    def close_some(self, numbers: list[int]) -> None:
        for number in numbers:
            if self.handles:
                self.close(number % len(self.handles))

    def close(self, number: int) -> None:
        handle = self.handles.pop(number)
        self.same(f"close [{handle.text}]", lambda place: os.close(handle.fds[place]))

    @precondition(lambda self: self.handles)
    @rule(number=NUMBERS, name=st.sampled_from(["a", "b.csv", "e", "."]), what=st.integers(0, 5))
    def at_folder(self, number: int, name: str, what: int) -> None:
        """Calls that take a directory handle, whose directory may have been renamed or removed."""

        def call(fd: int) -> Any:
            if what == 0:
                os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644, dir_fd=fd))
            elif what == 1:
                os.mkdir(name, dir_fd=fd)
            elif what == 2:
                os.unlink(name, dir_fd=fd)
            elif what == 3:
                os.rmdir(name, dir_fd=fd)
            elif what == 4:
                return sorted(os.listdir(fd))
            return syscalls.shape(os.stat(name, dir_fd=fd))

        self.on(f"at {what} {name}", number, call)

    # -- mappings -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.handles and len(self.mappings) < 4)
    @rule(number=NUMBERS, shared=st.booleans(), writable=st.booleans())
    def map(self, number: int, shared: bool, writable: bool) -> None:
        handle = self.handles[number % len(self.handles)]
        status = os.fstat(handle.fds[0])
        size = min(status.st_size, 20_000)
        if not size or not stat.S_ISREG(status.st_mode):
            return
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        text = f"mmap {size} {shared} {writable} [{handle.text}]"
        results = self.both(text, lambda place: mmap.mmap(handle.fds[place], size, flags=flags, prot=access))
        if all(isinstance(result, mmap.mmap) for result in results):
            self.mappings.append(Mapping(results, [os.dup(fd) for fd in handle.fds], shared, writable))
        elif results[0] != results[1]:
            self.fail(f"{text}: {results[1]}, on the plain disk {results[0]}")

    @precondition(lambda self: self.mappings)
    @rule(number=NUMBERS, offset=st.sampled_from([0, 1, 99, 4000, 4096, 8000]), size=st.sampled_from([1, 100, 5000]))
    def map_write(self, number: int, offset: int, size: int) -> None:
        mapping = self.mappings[number % len(self.mappings)]
        if not mapping.writable:
            return
        data = self.data(size)
        if mapping.shared:
            # The kernel tells lamfs of these writes when it writes pages back, and that is when mtime moves.
            self.mapped.add(os.fstat(mapping.fds[0]).st_ino)

        def call(place: int) -> int:
            there = mapping.maps[place]
            # What is behind the end of the file must not be written: it may or may not be there when the file grows.
            end = min(len(there), os.fstat(mapping.fds[place]).st_size, offset + size)
            if end <= offset:
                return 0
            self.populate(there, offset, end, mmap_write=True)
            there[offset:end] = data[: end - offset]
            return end - offset

        self.same(f"mapping {number} write {size} at {offset}", call)

    @precondition(lambda self: self.mappings)
    @rule(number=NUMBERS)
    def map_read(self, number: int) -> None:
        mapping = self.mappings[number % len(self.mappings)]

        def call(place: int) -> bytes:
            there = mapping.maps[place]
            end = min(len(there), os.fstat(mapping.fds[place]).st_size)
            if not end:
                return b""
            self.populate(there, 0, end, mmap_write=False)
            return there[:end]

        self.same(f"mapping {number} read", call)

    def populate(self, there: mmap.mmap, start: int, end: int, *, mmap_write: bool) -> None:
        """Fault pages in, so that what cannot be had is an error and no SIGBUS."""
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        there.madvise(23 if mmap_write else 22, page, end - page)

    @precondition(lambda self: self.mappings)
    @rule(number=NUMBERS)
    def msync(self, number: int) -> None:
        mapping = self.mappings[number % len(self.mappings)]
        self.same(f"mapping {number} msync", lambda place: mapping.maps[place].flush())

    @precondition(lambda self: self.mappings)
    @rule(number=NUMBERS)
    def munmap(self, number: int) -> None:
        self.unmap(number % len(self.mappings))

    def unmap(self, number: int) -> None:
        mapping = self.mappings.pop(number)
        self.same(f"mapping {number} munmap", lambda place: mapping.maps[place].close())
        for fd in mapping.fds:
            os.close(fd)


@contextlib.contextmanager
def arena_of(kind: str, request: pytest.FixtureRequest) -> Iterator[Arena]:
    """A plain folder beside a mount."""
    with contextlib.ExitStack() as stack:
        if kind == "s3":
            server: Server = request.getfixturevalue("seaweed")
            instance = stack.enter_context(s3_instance(server, seconds=SECONDS))
            # The moving process is killed with the daemon, in the middle of what it does.
            instance.expect_log("could not", "moving process")
        else:
            instance = stack.enter_context(checked(MountedInstance(seconds=SECONDS)))
        plain = str(instance.base / "plain")
        os.mkdir(plain)
        with_xattrs = syscalls.keeps_xattrs(plain)
        words = ["xattr"] if with_xattrs else []
        instance.mount(words)
        instance.path.chmod(0o755)
        yield Arena(
            instance,
            words,
            plain,
            with_xattrs,
            syscalls.counts_folders(plain),
            syscalls.keeps_times(plain, TIMES),
        )


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind in PARTS for part in range(len(PARTS[kind]))])
def test_machine(kind: str, part: int, request: pytest.FixtureRequest, fuse: None) -> None:
    steps = PARTS[kind][part] * SOAK
    with arena_of(kind, request) as arena:
        begin = time.monotonic()
        try:
            drive(arena, f"{SEED} {kind} {part}", steps)
        except BaseException as error:
            calls = "\n".join((arena.failed or arena.done)[-200:])
            error.add_note(f"{calls}\nseed {SEED}\n{arena.instance.log()[-3000:]}")
            raise
        instance = arena.instance
        print(f"{arena.steps} steps, {arena.calls} calls, {arena.machines} machines, {arena.remounts} remounts")
        for k, v in sorted(arena.stat.items()):
            print(k, v)
        print(f"{time.monotonic() - begin:.0f} s")
        assert arena.steps >= steps
        instance.sync()
        assert instance.spooled() == []
        assert instance.fsck() == []
        with instance.registry() as registry:
            assert check_tree(registry) == []
            assert registry.journal.entries() == []


def drive(arena: Arena, name: str, steps: int) -> None:
    """Let machines do so many steps."""
    turn = 0
    while arena.steps < steps:
        machine = type("Machine", (MountMachine,), {"arena": arena})
        run_state_machine_as_test(
            seed(random.Random(f"{name} {turn}").getrandbits(32))(machine),
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS_OF_EXAMPLE,
                phases=[Phase.generate, Phase.shrink] if "LAMFS_SHRINK" in os.environ else [Phase.generate],
                deadline=None,
                database=None,
                print_blob=False,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
        turn += 1


def test_steps_are_enough() -> None:
    """What scripts/test is to do."""
    assert sum(sum(parts) for parts in PARTS.values()) >= 10_000
