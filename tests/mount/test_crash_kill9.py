"""kill -9 of the daemon, of the mover, of both: what close or fsync acknowledged is there after the next mount."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import LamfsError
from lamfs.hashing import hash_block
from lamfs.model import BLOCK_SIZE
from lamfs.ops import fsck
from lamfs.ops.instance import Instance
from tests.support.mounts import MountedInstance, children, is_alive, s3_instance, wait_until
from tests.support.servers import Server
from tests.support.tree import check_tree

CRASHING = str(Path(__file__).resolve().parents[1] / "support" / "crashing")


def crash_at(point: str) -> dict[str, str]:
    """Environment of a daemon that kills itself at a point (tests/support/crashing/sitecustomize.py)."""
    return {
        "PYTHONPATH": f"{CRASHING}{os.pathsep}{Path(__file__).resolve().parents[2]}",
        "LAMFS_TEST_CRASH": point,
    }


def until_dead(instance: MountedInstance) -> None:
    """Wait until the daemon has killed itself, and clean up after it."""
    pid = instance.pid
    what = f"the daemon has died where it should\n{instance.log()}"
    wait_until(lambda: not is_alive(pid), what, seconds=20)
    instance.kill9()


def remount_empty(instance: MountedInstance, words: list[str] | None = None) -> None:
    """The next mount, of a machine without a cache."""
    shutil.rmtree(instance.cache_dir, ignore_errors=True)
    instance.mount(words or [])


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_of(root: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(path.relative_to(root)): digest(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and not str(path.relative_to(root)).startswith(".lamindb/")
    }


def check_stored(instance: MountedInstance) -> None:
    """Nothing is owed; registry and storage agree, byte for byte; fsck says so too."""
    instance.sync()
    assert instance.spooled() == []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in instance.env.items():
            if name.startswith(("LAMFS_", "AWS_")):
                patch.setenv(name, value)
        with Instance.open(instance.slug) as opened:
            assert opened.registry.journal.entries() == []
            assert check_tree(opened.registry) == []
            assert storage_problems(opened) == []
            assert fsck.check(opened).problems == []


def storage_problems(instance: Instance) -> list[str]:
    """Objects whose bytes are not those of their artifact, and objects of nobody."""
    problems, keys = [], set()
    for record in instance.registry.artifacts.filter(visibility=None):
        data = instance.store.get(record.revision.object_key, etag=record.revision.etag)
        if b"".join(hash_block(data[at : at + BLOCK_SIZE]) for at in range(0, len(data), BLOCK_SIZE)) != (
            record.revision.content.blocks
        ):
            problems.append(f"{record.key}: other bytes")
        keys.add(record.revision.object_key)
    left = {found.key for found in instance.store.list()} - keys
    return problems + [key for key in left if "/_exclusion/" not in key and not key.endswith(".lndb")]


def on(*kinds: str) -> pytest.MarkDecorator:
    """The storages of a test; all of them in scripts/soak."""
    return pytest.mark.parametrize("fragile", ["local", "s3"] if "LAMFS_SOAK" in os.environ else kinds, indirect=True)


@pytest.fixture
def fragile(request: pytest.FixtureRequest, fuse: None) -> Iterator[MountedInstance]:
    """An instance whose mounts die: warnings in its log are expected."""
    if request.param == "local":
        with MountedInstance() as instance:
            yield instance
    else:
        server: Server = request.getfixturevalue("seaweed")
        with s3_instance(server) as instance:
            instance.expect_log(".")
            yield instance


@contextlib.contextmanager
def dying(instance: MountedInstance) -> Iterator[None]:
    """The daemon dies in the body, and errors are what comes of that."""
    with contextlib.suppress(OSError, LamfsError):
        yield
    until_dead(instance)


class Expected:
    """What each file may hold: the last acknowledged bytes, or what a call that did not return was to make of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, set[bytes | None]] = {}

    def write(self, name: str, data: bytes) -> None:
        self.files.setdefault(name, {None}).update((b"", data))
        (self.root / name).write_bytes(data)
        self.files[name] = {data}

    def rename(self, old: str, new: str) -> None:
        data = (self.root / old).read_bytes()
        self.files[old] = {data}
        self.files.setdefault(new, {None}).add(data)
        self.files[old].add(None)
        os.rename(self.root / old, self.root / new)
        self.files[old], self.files[new] = {None}, {data}

    def edit_and_fsync(self, name: str, data: bytes) -> None:
        old = (self.root / name).read_bytes()
        self.files[name].add(data + old[len(data) :])
        with open(self.root / name, "r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self.files[name].discard(old)

    def check(self) -> None:
        for name, allowed in self.files.items():
            path = self.root / name
            data = path.read_bytes() if path.exists() else None
            assert data in allowed, (name, None if data is None else (len(data), data[:40]))


POINTS = [
    "put.before:2", "put.after:0", "commit.before:1", "commit.after:2", "delete.after:0", "put.after:3",
    "copy.before:0", "copy.after:1", "moved.after:0", "acknowledge.before:2", "acknowledge.after:1", "create.after:2",
]  # fmt: skip


# tests/unit/fs/test_crashes.py ends at every single step, on S3 too, in one process.
@on("local")
@pytest.mark.parametrize("part", [0, 1, 2])
def test_killed_at(part: int, fragile: MountedInstance) -> None:
    """Some lives each: files are made, replaced, renamed, edited; each life ends at another point of the work."""
    instance = fragile
    instance.extend(200)
    words = ["real_keys"]
    expected = Expected(instance.path)
    instance.mount(words)
    for number in range(5):
        expected.write(f"old{number}.csv", b"old %d" % number * 1000)
    instance.fusermount()
    for life, point in enumerate(POINTS[part::3]):
        instance.mount(words, env=crash_at(point))
        uid = instance.info("old1.csv")["uid"]
        edited = False
        with dying(instance):
            for number in range(4):
                expected.write(f"new{life}-{number}.txt", f"new {point}".encode() * 2000)
            expected.write("old0.csv", point.encode())
            expected.write("tmp", b"edited" + point.encode())
            expected.rename("tmp", "old1.csv")
            edited = True
            for number in (2, 3):
                expected.rename(f"old{number}.csv", f"moved{number}.txt")
            expected.edit_and_fsync("old4.csv", point.encode())
            instance.sync()
            for name in ("moved2.txt", "moved3.txt", "late"):
                expected.write(name, name.encode())
                expected.write(name, name.encode() * 2)
            instance.sync()
        remount_empty(instance, words)
        expected.check()
        check_stored(instance)
        expected.check()
        if edited:
            assert instance.info("old1.csv")["uid"] == uid
        for number in range(5):
            expected.write(f"old{number}.csv", f"old {number} after {point}".encode() * 100)
        instance.fusermount()


@on("local")
def test_killed_while_the_registry_is_pushed(fragile: MountedInstance) -> None:
    """The last step of an unmount."""
    instance = fragile
    instance.mount(env=crash_at("snapshot.before:0"))
    (instance.path / "a").write_bytes(b"bytes")
    subprocess.run(["fusermount3", "-u", str(instance.path)], check=True, timeout=20)
    until_dead(instance)
    remount_empty(instance)
    assert (instance.path / "a").read_bytes() == b"bytes"
    check_stored(instance)
    instance.fusermount()


class Work:
    """A program at work in the mount, in a thread that may be left hanging; the mount is killed under it."""

    def __init__(self, instance: MountedInstance, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def end(self) -> None:
        self.process.wait(30)


def counted(instance: MountedInstance, count: int) -> bool:
    """Whether the registry knows at least so many regular files."""
    with instance.registry() as registry:
        row = registry.db.one("SELECT count(*) FROM inode WHERE mode & 61440 = 32768")
        assert row is not None
        return int(row[0]) >= count


def make_source(folder: Path, count: int) -> dict[str, str]:
    rng = random.Random(5)
    for number in range(count):
        path = folder / f"d{number % 20}" / f"f{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randint(0, 3000)))
    return tree_of(folder)


FILES = 2000


def some(instance: MountedInstance) -> int:
    """How many files a test takes; a server answers more slowly than a folder."""
    return FILES if instance.storage.root.startswith("/") else FILES // 3


@on("local")
def test_killed_during_tar(fragile: MountedInstance, tmp_path: Path) -> None:
    """Files that tar had closed are whole; no other is there but the one it was writing; a second tar completes it."""
    instance = fragile
    count = some(instance)
    source = tmp_path / "source"
    wanted = make_source(source, count)
    archive = tmp_path / "a.tar"
    subprocess.run(["tar", "cf", archive, "-C", source, "."], check=True)
    instance.mount()
    work = Work(instance, ["tar", "xf", str(archive), "-C", str(instance.path)])
    wait_until(lambda: counted(instance, count // 2), "half of the files are there", seconds=60)
    instance.kill9()
    work.end()
    remount_empty(instance)
    found = tree_of(instance.path)
    wrong = [name for name, value in found.items() if wanted.get(name) != value]
    assert len(found) >= count // 2
    assert len(wrong) <= 1, wrong
    check_stored(instance)
    assert tree_of(instance.path) == found
    instance.run(["tar", "xf", str(archive)])
    instance.umount()
    remount_empty(instance)
    assert tree_of(instance.path) == wanted
    check_stored(instance)
    instance.fusermount()


@on("s3")
def test_killed_during_rm(fragile: MountedInstance, tmp_path: Path) -> None:
    """What rm had not reached is whole, and what it had removed stays in the trash."""
    instance = fragile
    count = some(instance) // 2
    source = tmp_path / "source"
    wanted = make_source(source, count)
    instance.mount(["real_keys"])
    instance.run(["cp", "-r", str(source), "tree"])
    work = Work(instance, ["rm", "-rf", str(instance.path / "tree")])
    wait_until(lambda: not counted_names(instance, count - 100), "some files are gone", seconds=60)
    instance.kill9()
    work.end()
    remount_empty(instance, ["real_keys"])
    found = tree_of(instance.path / "tree") if (instance.path / "tree").exists() else {}
    assert all(wanted[name] == value for name, value in found.items())
    check_stored(instance)
    assert (tree_of(instance.path / "tree") if found else {}) == found
    instance.run(["rm", "-rf", "tree"])
    assert list(instance.path.iterdir()) == []
    check_stored(instance)
    instance.fusermount()


def counted_names(instance: MountedInstance, count: int) -> bool:
    """Whether at least so many names of files are left."""
    with instance.registry() as registry:
        row = registry.db.one("SELECT count(*) FROM dentry d JOIN inode i USING(ino) WHERE i.mode & 61440 = 32768")
        assert row is not None
        return int(row[0]) >= count


@on("local")
def test_killed_during_moves_of_a_directory(fragile: MountedInstance, tmp_path: Path) -> None:
    """mv of a directory of real keys is one transaction; its objects follow, also in another life."""
    instance = fragile
    count = some(instance) // 2
    source = tmp_path / "source"
    wanted = make_source(source, count)
    instance.mount(["real_keys"])
    instance.run(["cp", "-r", str(source), "tree"])
    instance.sync()
    os.rename(instance.path / "tree", instance.path / "forest")
    wait_until(lambda: 0 < moves(instance) < count - 50, "some objects have moved", seconds=60)
    instance.kill9()
    remount_empty(instance, ["real_keys"])
    assert tree_of(instance.path / "forest") == wanted
    os.rename(instance.path / "forest", instance.path / "tree")
    wait_until(lambda: moves(instance) < count - 50, "some objects have moved back", seconds=60)
    instance.kill9()
    remount_empty(instance, ["real_keys"])
    check_stored(instance)
    assert tree_of(instance.path / "tree") == wanted
    with instance.registry() as registry:
        assert all(record.key == record.revision.object_key for record in registry.artifacts.filter())
    instance.fusermount()


def moves(instance: MountedInstance) -> int:
    with instance.registry() as registry:
        return registry.journal.owed().get("move", 0)


@on("s3")
def test_killed_during_a_large_copy(fragile: MountedInstance, tmp_path: Path) -> None:
    """128 MiB: killed while it is written, while it is uploaded, and the mover alone while it is uploaded."""
    instance = fragile
    source = tmp_path / "large"
    with open(source, "wb") as file:
        for number in range(128):
            file.write(random.Random(number).randbytes(1 << 20))
    wanted = digest(source)
    instance.mount()
    work = Work(instance, ["cp", str(source), str(instance.path / "large")])
    wait_until(lambda: spooled_bytes(instance) > 30 << 20, "a part is written", seconds=60)
    instance.kill9()
    work.end()
    remount_empty(instance)
    size = (instance.path / "large").stat().st_size
    with open(instance.path / "large", "rb") as part, open(source, "rb") as whole:
        while data := part.read(1 << 20):
            assert data == whole.read(len(data))
    assert size >= 30 << 20
    shutil.copy(source, instance.path / "large")
    for pid in children(instance.pid):
        os.kill(pid, signal.SIGKILL)
    instance.sync()
    assert digest(instance.path / "large") == wanted
    shutil.copy(source, instance.path / "second")
    with open(instance.path / "second", "r+b") as file:
        file.write(b"not the same")
    changed = digest(instance.path / "second")
    instance.kill9()
    remount_empty(instance)
    assert digest(instance.path / "large") == wanted
    assert digest(instance.path / "second") == changed
    check_stored(instance)
    instance.fusermount()


def spooled_bytes(instance: MountedInstance) -> int:
    total = 0
    for path in instance.spool.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@on("local", "s3")
def test_mover_killed_again_and_again(fragile: MountedInstance) -> None:
    """The process that moves bytes dies a dozen times while files are written, read, renamed and removed."""
    instance = fragile
    instance.expect_log("moving process", "could not")
    instance.mount(["real_keys"])
    stop = threading.Event()

    def strike() -> None:
        rng = random.Random(3)
        for _ in range(12):
            for pid in children(instance.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            stop.wait(rng.uniform(0.02, 0.3))

    killer = threading.Thread(target=strike)
    killer.start()
    wanted: dict[str, bytes] = {}
    rng = random.Random(4)
    number = 0
    while killer.is_alive() or number < 100:
        name = f"f{rng.randint(0, 20)}"
        match rng.randint(0, 4):
            case 0 | 1:
                data = rng.randbytes(rng.choice([0, 10, 100_000]))
                (instance.path / name).write_bytes(data)
                wanted[name] = data
            case 2 if wanted:
                old = rng.choice(sorted(wanted))
                os.rename(instance.path / old, instance.path / name)
                wanted[name] = wanted.pop(old)
            case 3 if wanted:
                old = rng.choice(sorted(wanted))
                assert (instance.path / old).read_bytes() == wanted[old]
            case 4 if len(wanted) > 5:
                old = rng.choice(sorted(wanted))
                os.unlink(instance.path / old)
                del wanted[old]
        number += 1
    killer.join()
    instance.umount()
    remount_empty(instance, ["real_keys"])
    assert {path.name: path.read_bytes() for path in instance.path.iterdir()} == wanted
    check_stored(instance)
    instance.fusermount()
