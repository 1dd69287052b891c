"""The moving process, for real: started, given jobs, killed, cancelled, ended. Storage is a local folder."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from lamfs import hashing
from lamfs.daemon.lock import LockByMover
from lamfs.errors import (
    DamagedData,
    LamfsError,
    Locked,
    ObjectChanged,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageFull,
    TransferDied,
)
from lamfs.model import BLOCK_SIZE, ContentHash, Revision, instance_id
from lamfs.mover import process
from lamfs.mover.client import Mover
from lamfs.mover.jobs import WholeFile
from lamfs.ops import lock
from lamfs.storage import open_store
from lamfs.storage.base import StorageConfig
from tests.support.transfer import content_of, fds_on, gone, make_bytes, running_mover, until


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    (tmp_path / "root").mkdir()
    return StorageConfig(str(tmp_path / "root"))


@pytest.fixture
async def mover(config: StorageConfig) -> AsyncIterator[Mover]:
    async with running_mover(config) as mover:
        yield mover


class Stuck:
    """Jobs that hang: hashing or verifying a FIFO waits for a writer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[str] = []

    def path(self) -> str:
        path = str(self.folder / f"fifo{len(self.paths)}")
        os.mkfifo(path)
        self.paths.append(path)
        return path

    def release(self) -> None:
        for path in self.paths:
            with contextlib.suppress(OSError):  # ENXIO: nobody waits there
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    async def drain(self, mover: Mover) -> None:
        """Release until the mover owes no answer: a job that had not begun yet is not released by one go."""
        with trio.fail_after(20):
            while mover._jobs:
                self.release()
                await trio.sleep(0.01)


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Stuck]:
    stuck = Stuck(tmp_path)
    yield stuck
    stuck.release()


async def test_each_job_does_what_the_store_does(mover: Mover, config: StorageConfig, tmp_path: Path) -> None:
    data = make_bytes(3 * BLOCK_SIZE + 5)
    file = tmp_path / "file"
    file.write_bytes(data)
    content = await mover.hash(str(file))
    assert content == hashing.hash_file(file)
    assert content == content_of(data)
    assert (await mover.hash(str(file), size=7)).hash == content_of(data[:7]).hash

    put = await mover.put(str(file), "a/b.bin")
    assert (put.key, put.size) == ("a/b.bin", len(data))
    assert file.exists()
    assert await mover.head("a/b.bin") == put
    copied = await mover.copy("a/b.bin", "c", etag=put.etag)
    assert open_store(config).get("c") == data
    other = {"a/b.bin": ["another"], "never-there": ["x"]}
    assert await mover.delete(other) == ["a/b.bin"], "it is not the one that is meant"
    assert await mover.head("a/b.bin") == put
    assert await mover.delete({"a/b.bin": [put.etag, "another"], "never-there": None}) == []
    with pytest.raises(ObjectMissing):
        await mover.head("a/b.bin")

    target = tmp_path / "target"
    target.write_bytes(bytes(len(data)))
    fd = os.open(target, os.O_RDWR)
    path = f"/proc/{os.getpid()}/fd/{fd}"
    for block in (3, 1):
        offset = block * BLOCK_SIZE
        length = min(BLOCK_SIZE, len(data) - offset)
        digest = content.block(block)
        await mover.fetch("c", etag=copied.etag, offset=offset, length=length, path=path, digest=digest)
        assert await mover.verify(path, offset=offset, length=length, digest=digest)
    assert not await mover.verify(path, offset=0, length=BLOCK_SIZE, digest=content.block(0))
    assert not await mover.verify(path, offset=3 * BLOCK_SIZE, length=BLOCK_SIZE, digest=content.block(3))  # too short
    await mover.fetch("c", etag=copied.etag, offset=10, length=20, path=path, digest=None)
    os.close(fd)
    expected = bytearray(len(data))
    expected[10:30] = data[10:30]
    expected[BLOCK_SIZE : 2 * BLOCK_SIZE] = data[BLOCK_SIZE : 2 * BLOCK_SIZE]
    expected[3 * BLOCK_SIZE :] = data[3 * BLOCK_SIZE :]
    assert target.read_bytes() == expected

    await mover.put_bytes("lock", b"me", if_none_match=True)
    assert await mover.get("lock", length=1 << 24) == b"me"
    with pytest.raises(PreconditionFailed):
        await mover.put_bytes("lock", b"you", if_none_match=True)
    pushed = await mover.put(str(file), "snapshot")
    assert pushed.size == len(data)
    await mover.put(str(file), "taken", consume=True)
    assert open_store(config).get("taken") == data


async def test_the_lock_of_an_instance_is_taken_through_it(mover: Mover, config: StorageConfig) -> None:
    store = LockByMover(mover, open_store(config).url)
    here, there = (
        lock.Lease(store, instance_id("a/b"), lock.Holder("me", "host", machine), slug="a/b")
        for machine in ("this", "another")
    )
    assert await trio.to_thread.run_sync(here.peek) is None
    _, ours = await trio.to_thread.run_sync(here.acquire)
    assert not ours
    state, ours = await trio.to_thread.run_sync(here.acquire)
    assert ours
    assert await trio.to_thread.run_sync(there.peek) == state
    with pytest.raises(Locked):
        await trio.to_thread.run_sync(there.acquire)
    await trio.to_thread.run_sync(here.release)
    assert await trio.to_thread.run_sync(there.peek) is None


async def test_a_look_at_the_lock_ends_when_nobody_waits_for_it(mover: Mover, config: StorageConfig) -> None:
    assert mover.pid is not None
    os.kill(mover.pid, signal.SIGSTOP)
    lease = lock.Lease(LockByMover(mover, str), instance_id("a/b"), lock.Holder("me", "host", "this"))
    with pytest.raises(trio.TooSlowError), trio.fail_after(0.1):
        await trio.to_thread.run_sync(lease.peek)
    os.kill(mover.pid, signal.SIGCONT)


async def test_errors_arrive_as_what_they_were(mover: Mover, config: StorageConfig, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere") as missing:
        await mover.hash(str(tmp_path / "nowhere"))
    assert missing.value.errno == errno.ENOENT
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(StorageError, match="shorter"):
        await mover.hash(str(tmp_path / "short"), size=10)

    data = make_bytes(1000)
    stored = await mover.put_bytes("x", data)
    target = tmp_path / "target"
    target.write_bytes(bytes(1000))
    fetch = {"offset": 0, "length": 1000, "path": str(target)}
    with pytest.raises(ObjectChanged) as changed:
        await mover.fetch("x", etag="other", digest=hashing.hash_block(data), **fetch)
    assert changed.value.errno == errno.ESTALE
    with pytest.raises(DamagedData, match="damaged"):
        await mover.fetch("x", etag=stored.etag, digest=hashing.hash_block(b"something else"), **fetch)
    assert target.read_bytes() == bytes(1000), "wrong bytes must not be written"


async def test_a_storage_that_cannot_be_opened_answers_each_job(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    async with running_mover(StorageConfig("not/absolute")) as mover:
        for _ in range(2):
            with pytest.raises(LamfsError, match="not/absolute"):
                await mover.head("x")
        assert (await mover.hash(str(file))).size == 3
        assert mover.restarts == 0


async def test_stuck_writes_hold_up_neither_reads_nor_the_lease(mover: Mover, tmp_path: Path, stuck: Stuck) -> None:
    await mover.put_bytes("x", b"abc")
    order: list[str] = []
    async with trio.open_nursery() as nursery:

        async def hang() -> None:
            await mover.hash(stuck.path())
            order.append("hash")

        for _ in range(20):
            nursery.start_soon(hang)
        await until(lambda: len(stuck.paths) == 20)
        with trio.fail_after(10):
            assert await mover.get("x", length=1 << 24) == b"abc"
            await mover.put_bytes("lock", b"renewed")
        order.append("read")
        stuck.release()
        await stuck.drain(mover)
    assert order[0] == "read"


async def test_killed_in_the_middle_of_a_job(mover: Mover, tmp_path: Path, stuck: Stuck) -> None:
    await mover.put_bytes("x", b"abc")
    with (tmp_path / "file").open("w+b") as file:
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        for _ in range(2):
            pid = mover.pid
            assert pid is not None
            answers: list[str] = []

            async def job(answers: list[str] = answers) -> None:
                with pytest.raises(TransferDied):
                    await mover.hash(stuck.path())
                answers.append("died")

            async def held(answers: list[str] = answers) -> None:  # waits behind the others, with a descriptor held
                with pytest.raises(TransferDied):
                    await mover.hash(path)
                answers.append("died")

            async with trio.open_nursery() as nursery:
                for _ in range(11):
                    nursery.start_soon(job)
                await until(lambda: len(mover._jobs) == 11)
                nursery.start_soon(held)
                await until(lambda: len(mover._jobs) == 12)
                os.kill(pid, signal.SIGKILL)
                with trio.fail_after(10):
                    while len(answers) < 12:
                        await trio.sleep(0.01)
            with trio.fail_after(10):
                assert await mover.get("x", length=1 << 24) == b"abc"
            assert mover.pid != pid
            assert gone(pid)
            assert fds_on(file.name) == 1, "the duplicate of the dead job is closed"
        assert mover.restarts == 2


async def test_jobs_given_while_it_is_down_wait_for_the_restart(mover: Mover) -> None:
    await mover.put_bytes("x", b"abc")
    pid = mover.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: mover.pid is None)
    with trio.fail_after(10):
        assert await mover.get("x", length=1 << 24) == b"abc"


async def test_a_cancelled_job_leaves_nothing_behind(mover: Mover, tmp_path: Path, stuck: Stuck) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    with file.open("rb") as opened:
        path = f"/proc/{os.getpid()}/fd/{opened.fileno()}"
        fifos = [stuck.path() for _ in range(8)]
        async with trio.open_nursery() as nursery:
            for fifo in fifos:
                nursery.start_soon(mover.hash, fifo)
            await until(lambda: len(mover._jobs) == 8)
            with trio.move_on_after(0.05) as scope:
                await mover.hash(path)  # waits behind the eight
            assert scope.cancelled_caught
            assert fds_on(file) == 2, "the descriptor is held until the mover has answered"
            nursery.cancel_scope.cancel()
    await stuck.drain(mover)
    assert fds_on(file) == 0
    assert (await mover.hash(str(file))).size == 3


async def test_a_descriptor_that_is_closed_and_used_again_is_not_confused(
    mover: Mover, tmp_path: Path, stuck: Stuck
) -> None:
    (tmp_path / "right").write_bytes(b"right")
    (tmp_path / "wrong").write_bytes(b"wrong bytes")
    got: list[int] = []
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(mover.hash, stuck.path())
        await until(lambda: len(mover._jobs) == 8)
        fd = os.open(tmp_path / "right", os.O_RDONLY)

        async def job() -> None:
            got.append((await mover.hash(f"/proc/{os.getpid()}/fd/{fd}")).size)

        nursery.start_soon(job)
        await until(lambda: len(mover._jobs) == 9)
        os.close(fd)
        again = os.open(tmp_path / "wrong", os.O_RDONLY)
        assert again == fd
        await stuck.drain(mover)
        os.close(again)
    assert got == [5]


async def test_full_socket_buffers_both_ways(mover: Mover) -> None:
    """Far more bytes in flight, in both directions at once, than two socket buffers hold."""
    data = make_bytes(300_000)
    await mover.put_bytes("big", data)
    done = 0

    async def job(number: int) -> None:
        nonlocal done
        await mover.put_bytes(f"copy{number}", data)
        assert await mover.get("big", length=1 << 24) == data
        assert await mover.get(f"copy{number}", length=1 << 24) == data
        done += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(job, number)
                nursery.start_soon(partial(mover.get, "big", length=1 << 24))
    assert done == 60


async def test_progress_adds_up_and_is_throttled(mover: Mover, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as stream:
        stream.truncate(200 << 20)
    moved: list[int] = []
    begun = time.monotonic()
    await mover.hash(str(file), progress=moved.append)
    assert sum(moved) == 200 << 20
    assert len(moved) <= (time.monotonic() - begun) * 10 + 2
    moved.clear()
    file.write_bytes(b"abc")
    await mover.put(str(file), "x", progress=moved.append)
    assert moved == [3]


async def test_a_failing_progress_callback_harms_nobody(mover: Mover, tmp_path: Path) -> None:
    def fail(count: int) -> None:
        raise RuntimeError("no")

    (tmp_path / "file").write_bytes(b"abc")
    assert (await mover.put(str(tmp_path / "file"), "x", progress=fail)).size == 3


async def test_clone_keeps_bytes_and_holes(mover: Mover, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("w+b") as stream:
        stream.truncate(64 << 20)
        for offset in (0, 20 << 20, (40 << 20) + 123):
            os.pwrite(stream.fileno(), make_bytes(100_000, offset), offset)
        stream.truncate((64 << 20) + 7)
        path = f"/proc/{os.getpid()}/fd/{stream.fileno()}"
        os.unlink(source)  # it names the open file all the same
        await mover.clone(path, str(target))
        stream.seek(0)
        assert target.read_bytes() == stream.read()
    assert target.stat().st_blocks * 512 < 2 << 20
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with pytest.raises(StorageError) as there:
        await mover.clone(str(target), str(target))
    assert there.value.errno == errno.EEXIST


async def test_signals_of_a_terminal_do_not_end_it(mover: Mover) -> None:
    await mover.put_bytes("x", b"abc")  # it is up
    pid = mover.pid
    assert pid is not None
    assert os.getsid(pid) == pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert await mover.get("x", length=1 << 24) == b"abc"
    assert mover.pid == pid


async def test_stopping_does_not_wait_for_stuck_jobs(config: StorageConfig, tmp_path: Path, stuck: Stuck) -> None:
    mover = Mover(config)
    with trio.fail_after(process.END_TIMEOUT):
        async with trio.open_nursery() as nursery:
            await nursery.start(mover.run)
            pid = mover.pid
            assert pid is not None
            nursery.start_soon(mover.hash, stuck.path())
            await until(lambda: len(mover._jobs) == 1)
            nursery.cancel_scope.cancel()
    assert gone(pid)
    assert mover.pid is None
    with pytest.raises(TransferDied):
        await mover.get("x", length=1 << 24)


async def test_stopping_kills_a_process_that_does_not_end(
    config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "END_TIMEOUT", 0.2)
    mover = Mover(config)
    async with trio.open_nursery() as nursery:
        await nursery.start(mover.run)
        pid = mover.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        nursery.cancel_scope.cancel()
    assert gone(pid)


async def test_it_ends_when_the_daemon_is_killed(config: StorageConfig, tmp_path: Path) -> None:
    script = (
        "import sys, trio\n"
        "from lamfs.storage.base import StorageConfig\n"
        "from lamfs.mover.client import Mover\n"
        "async def main():\n"
        "    mover = Mover(StorageConfig(sys.argv[1]))\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        await nursery.start(mover.run)\n"
        "        await mover.put_bytes('x', b'abc')\n"
        "        print(mover.pid, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, config.root], stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        pid = int(await trio.to_thread.run_sync(daemon.stdout.readline))
        assert not gone(pid)
        daemon.kill()
    await until(lambda: gone(pid))


async def test_a_mover_that_cannot_start_is_said_so(config: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StorageError, match="cannot be started"):
        await Mover(config).run()


async def test_blocks_that_follow_each_other_are_fetched_by_one_get(
    mover: Mover, config: StorageConfig, tmp_path: Path
) -> None:
    data = make_bytes(4 * BLOCK_SIZE + 5)
    file, target = tmp_path / "in", tmp_path / "out"
    file.write_bytes(data)
    stat, content = open_store(config).put_file("k", str(file)), content_of(data)
    blocks = [
        (min(BLOCK_SIZE, len(data) - at), content.block(at // BLOCK_SIZE)) for at in range(0, len(data), BLOCK_SIZE)
    ]
    came: list[int] = []

    async def fetch(first: int, wanted: list[tuple[int, bytes]], path: str) -> None:
        came.clear()
        await mover.fetch_stretch(
            "k", etag=stat.etag, offset=first * BLOCK_SIZE, blocks=wanted, path=path, came=came.append
        )

    target.write_bytes(bytes(len(data)))
    await fetch(1, blocks[1:], str(target))
    assert (sum(came), target.read_bytes()) == (4, bytes(BLOCK_SIZE) + data[BLOCK_SIZE:])

    target.write_bytes(bytes(len(data)))
    with pytest.raises(DamagedData, match=f"bytes {BLOCK_SIZE} to {2 * BLOCK_SIZE}"):
        await fetch(0, [blocks[0], (BLOCK_SIZE, b"x" * 32), blocks[2]], str(target))
    assert (sum(came), target.read_bytes()) == (1, data[:BLOCK_SIZE] + bytes(len(data) - BLOCK_SIZE)), "and no more"

    with pytest.raises(StorageFull):
        await fetch(0, blocks, "/dev/full")
    open_store(config).put_bytes("k", b"other")
    with pytest.raises(ObjectChanged):
        await fetch(0, blocks, str(target))
    assert not came


async def test_many_small_files_are_fetched_at_once(mover: Mover, config: StorageConfig, tmp_path: Path) -> None:
    store, files = open_store(config), []
    for number in range(40):
        data = make_bytes(100 + number)
        (tmp_path / "in").write_bytes(data)
        stat = store.put_file(f"k{number}", str(tmp_path / "in"))
        target = tmp_path / f"out{number}"
        target.touch()
        files.append(WholeFile(f"k{number}", stat.etag, len(data), str(target), content_of(data).block(0)))
    files[3] = files[3]._replace(key="gone")
    files[5] = files[5]._replace(digest=b"x" * 32)
    files[7] = files[7]._replace(path=f"/proc/{os.getpid()}/fd/99999")
    arrived: dict[int, LamfsError | None] = {}
    await mover.fetch_files(files, lambda number, error: arrived.update({number: error}))
    assert sorted(arrived) == list(range(40))
    failed = {number: type(error) for number, error in arrived.items() if error is not None}
    assert failed == {3: ObjectMissing, 5: DamagedData, 7: StorageError}
    assert all(
        Path(files[number].path).read_bytes() == make_bytes(100 + number) for number in set(arrived) - set(failed)
    )
    mover_pid = mover.pid
    assert mover_pid is not None
    os.kill(mover_pid, signal.SIGSTOP)
    arrived.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mover.fetch_files, files[:3], lambda number, error: arrived.update({number: error}))
        await trio.testing.wait_all_tasks_blocked()
        os.kill(mover_pid, signal.SIGKILL)
    assert {number: type(error) for number, error in arrived.items()} == dict.fromkeys(range(3), TransferDied)


async def test_one_of_many_small_files_that_cannot_be_stored(
    mover: Mover, config: StorageConfig, tmp_path: Path
) -> None:
    """Each file has an answer of its own, in the order in which they were given. What storage has is copied there."""
    store = open_store(config)
    content = ContentHash(1, "", "md5", b"")
    there = Revision(content, "twin", store.put_bytes("twin", b"its bytes are taken").etag)
    twins = {2: there, 3: dataclasses.replace(there, etag="another")}
    files: list[tuple[str, str, Revision | None, None]] = []
    for number in range(4):
        file = tmp_path / f"f{number}"
        if number != 1:
            file.write_bytes(b"%d" % number)
        files.append((str(file), f"a/{number}", twins.get(number), None))
    found = await mover.put_many(files)
    assert [type(each).__name__ for each in found] == ["ObjectStat", "StorageError", "ObjectStat", "ObjectStat"]
    assert isinstance(found[1], StorageError)
    assert found[1].errno == errno.ENOENT
    for number, data in ((0, b"0"), (2, b"its bytes are taken"), (3, b"3")):
        assert store.get(f"a/{number}") == data
        assert store.head(f"a/{number}") == found[number]
