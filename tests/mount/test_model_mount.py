"""The same random system calls on the mount and on a plain folder: results, errors, bytes and attributes are the same.

LAMFS_SOAK: how many times as many calls as usual (scripts/soak).
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, s3_instance
from tests.support.servers import Server
from tests.support.tree import check_tree

CALLS = 1200
SOAK = int(os.environ.get("LAMFS_SOAK", "1"))
NAMES = ["a", "b.csv", "c.tar.gz", "D", "é"]
FLAGS = [
    os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_APPEND | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_RDWR | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC,
]  # fmt: skip


class Pair:
    """A plain folder and a mount, in step. ``handles``: descriptor there, descriptor here."""

    def __init__(self, plain: Path, mount: Path, rng: random.Random) -> None:
        self.plain = plain
        self.mount = mount
        self.rng = rng
        self.handles: list[tuple[int, int]] = []
        self.done: list[str] = []

    def both(self, text: str, call: Callable[[Path], Any]) -> tuple[Any, Any]:
        """Do a call in both places; the outcomes have to be equal, or one of descriptors."""
        self.done.append(text)
        results: list[Any] = []
        for root in (self.plain, self.mount):
            try:
                results.append(call(root))
            except OSError as error:
                results.append(errno.errorcode.get(error.errno or 0, str(error)))
        self.done[-1] += f" = {str(results[0])[:60]}"
        return results[0], results[1]

    def same(self, text: str, call: Callable[[Path], Any]) -> None:
        wanted, got = self.both(text, call)
        assert got == wanted, f"{text}: {str(got)[:200]}, on a plain disk {str(wanted)[:200]}"

    def on_handles(self, text: str, handle: tuple[int, int], call: Callable[[int], Any]) -> None:
        here = dict(zip((self.plain, self.mount), handle, strict=True))
        self.same(f"{text} {handle[1]}", lambda root: call(here[root]))

    def path(self) -> str:
        return "/".join(self.rng.choice(NAMES) for _ in range(self.rng.choice([1, 1, 2, 2, 3])))

    def one(self) -> None:
        """One random call."""
        rng = self.rng
        path, other = self.path(), self.path()
        data = rng.randbytes(rng.choice([0, 1, 100, 5000, 70_000]))
        offset = rng.choice([0, 1, 99, 4096, 100_000])
        handle = rng.choice(self.handles) if self.handles else None
        choice = rng.randint(0, 33)
        if choice < 5:
            flags, mode = rng.choice(FLAGS), rng.choice([0o644, 0o600, 0o666])
            wanted, got = self.both(f"open {path} {flags:o}", lambda root: os.open(root / path, flags, mode))
            if isinstance(wanted, int) and isinstance(got, int):
                self.handles.append((wanted, got))
                if len(self.handles) > 12:
                    self.close(rng.choice(self.handles))
            else:
                assert wanted == got, f"open {path} {flags:o}: {got}, on a plain disk {wanted}"
        elif choice < 9 and handle is not None:
            self.on_handles(f"pwrite {len(data)} at {offset} of", handle, lambda fd: os.pwrite(fd, data, offset))
        elif choice < 11 and handle is not None:
            self.on_handles("pread", handle, lambda fd: os.pread(fd, 200_000, offset))
        elif choice == 11 and handle is not None:
            self.on_handles("write", handle, lambda fd: os.write(fd, data))
        elif choice == 12 and handle is not None:
            self.on_handles(f"ftruncate {offset}", handle, lambda fd: os.ftruncate(fd, offset))
        elif choice == 13 and handle is not None:
            self.on_handles("fsync", handle, os.fsync)
        elif choice == 14 and handle is not None:
            self.on_handles("fstat", handle, lambda fd: attributes(os.fstat(fd)))
        elif choice < 18 and handle is not None:
            self.close(handle)
        elif choice < 21:
            self.same(f"rename {path} {other}", lambda root: os.rename(root / path, root / other))
        elif choice < 23:
            self.same(f"mkdir {path}", lambda root: os.mkdir(root / path))
        elif choice == 23:
            self.same(f"rmdir {path}", lambda root: os.rmdir(root / path))
        elif choice < 26:
            self.same(f"unlink {path}", lambda root: os.unlink(root / path))
        elif choice == 26:
            self.same(f"link {path} {other}", lambda root: os.link(root / path, root / other))
        elif choice == 27:
            self.same(f"symlink {other} {path}", lambda root: os.symlink(other, root / path))
        elif choice == 28:
            self.same(f"truncate {path} {offset}", lambda root: os.truncate(root / path, offset))
        elif choice == 29:
            mode = rng.choice([0o644, 0o600, 0o755, 0o700])
            self.same(f"chmod {path} {mode:o}", lambda root: os.chmod(root / path, mode))
        elif choice == 30:
            when = (rng.randrange(1 << 60), rng.randrange(1 << 60))
            self.same(f"utimens {path}", lambda root: os.utime(root / path, ns=when))
            self.same("mtime", lambda root: os.stat(root / path).st_mtime_ns)
        elif choice == 31:
            self.same(f"listdir {path}", lambda root: sorted(os.listdir(root / path)))
        elif choice == 32:
            self.same(f"lstat {path}", lambda root: attributes(os.lstat(root / path)))
        else:
            self.same(f"read {path}", lambda root: (root / path).read_bytes())

    def close(self, handle: tuple[int, int]) -> None:
        self.handles.remove(handle)
        self.on_handles("close", handle, os.close)

    def close_all(self) -> None:
        for handle in list(self.handles):
            self.close(handle)

    def compare(self) -> None:
        """The two trees are equal."""
        self.same("tree", whole_tree)


def attributes(status: os.stat_result) -> tuple[int, ...]:
    """What both places must agree on."""
    directory = stat.S_ISDIR(status.st_mode)
    return status.st_mode, 0 if directory else status.st_nlink, 0 if directory else status.st_size, status.st_uid


def whole_tree(root: Path) -> dict[str, Any]:
    """Everything below a folder."""
    found: dict[str, Any] = {}
    for folder, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(folder) / name
            key = str(path.relative_to(root))
            if key.startswith(".lamindb"):
                continue
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
            target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else None
            found[key] = (attributes(status), content, target)
    return found


@pytest.fixture
def modelled(request: pytest.FixtureRequest, fuse: None) -> Iterator[MountedInstance]:
    """An instance that may be killed."""
    with contextlib.ExitStack() as stack:
        if request.param == "local":
            yield stack.enter_context(MountedInstance(seconds=110.0 * SOAK))
        else:
            server: Server = request.getfixturevalue("seaweed")
            instance = stack.enter_context(s3_instance(server, seconds=110.0 * SOAK))
            instance.expect_log("could not", "moving process")
            yield instance


PLACES = [("local", []), ("s3", ["real_keys"]), ("local", ["real_keys"]), ("s3", [])]


@pytest.mark.parametrize(
    ("modelled", "words"), PLACES if "LAMFS_SOAK" in os.environ else PLACES[:2], indirect=["modelled"]
)
def test_random_calls(words: list[str], modelled: MountedInstance, tmp_path: Path) -> None:
    """Four lives of an instance: one ends by lamfs umount, one by SIGTERM, one by kill -9; each with an empty cache."""
    instance = modelled
    seed = int(os.environ.get("LAMFS_SEED", "1"))
    rng = random.Random(f"{seed} {words}")
    plain = tmp_path / "plain"
    plain.mkdir()
    pair = Pair(plain, instance.path, rng)
    old_mask = os.umask(0o022)
    try:
        for life in range(4 * SOAK):
            instance.mount(words)
            pair.compare()
            for _ in range(CALLS // 4):
                pair.one()
            if life % 4 == 0:
                pair.close_all()
                pair.compare()
                instance.umount()
            elif life % 4 == 1:
                instance.kill9()
                for here, there in pair.handles:
                    os.close(here)
                    with contextlib.suppress(OSError):
                        os.close(there)
                pair.handles.clear()
            else:
                pair.close_all()
                instance.term()
            pair.done.append("-- next life")
            shutil.rmtree(instance.cache_dir, ignore_errors=True)
        instance.mount(words)
        pair.compare()
        instance.sync()
        assert instance.spooled() == []
        assert instance.fsck() == []
        with instance.registry() as registry:
            assert check_tree(registry) == []
            assert registry.journal.entries() == []
        instance.fusermount()
    except BaseException as error:
        error.add_note("\n".join(pair.done[-150:]) + f"\nseed {seed}\n{instance.log()[-3000:]}")
        raise
    finally:
        os.umask(old_mask)
