"""The quick way to wait for the kernel: nobody else starves, the lock is never lost, and all ends as with trio."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator

import pyfuse3
import pytest
import trio

from lamfs.fuse import loop
from lamfs.fuse.loop import ReadLock, Turns, Waiting, quick_loop


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A descriptor that is readable when the other one was written to: the kernel's."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def waiting() -> Waiting:
    turns = Turns()
    trio.lowlevel.add_instrument(turns)
    events = loop._events()
    assert events is not None
    return Waiting(turns, events)


async def serve(shim: Waiting, fd: int, answered: list[float], take: Callable[[int, int], bytes] = os.read) -> None:
    """As pyfuse3's workers do: wait with the lock, answer without it."""
    names = shim.namespace()
    lock = names.Lock()
    while True:
        async with lock:
            await names.lowlevel.wait_readable(fd)
        if take(fd, 1) == b"q":
            await trio.sleep(0.02)
        answered.append(time.monotonic())


async def test_a_request_wakes_a_worker_and_so_does_what_other_tasks_wait_for(pipe: tuple[int, int]) -> None:
    shim, answered = waiting(), list[float]()
    send, receive = trio.open_memory_channel[int](0)

    def from_a_thread() -> None:
        for number in range(50):
            trio.from_thread.run(send.send, number)
            os.write(pipe[1], b"x")
        trio.from_thread.run(send.aclose)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(serve, shim, pipe[0], answered)
            nursery.start_soon(trio.to_thread.run_sync, from_a_thread)
            assert [number async for number in receive] == list(range(50))
            while len(answered) < 50:
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()


async def test_other_tasks_have_their_turn_while_requests_pour_in(pipe: tuple[int, int]) -> None:
    shim, answered = waiting(), list[float]()
    ticks: list[float] = []
    os.write(pipe[1], b"x")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                # There is a request each time that a worker looks.
                nursery.start_soon(serve, shim, pipe[0], answered, lambda fd, size: b"x")
            for _ in range(50):
                await trio.sleep(0)
                ticks.append(time.monotonic())
            assert len(answered) > 50, "many requests are answered for each turn of another task"
            assert sorted(later - sooner for sooner, later in itertools.pairwise(ticks))[25] < 0.02
            nursery.cancel_scope.cancel()


async def test_a_worker_that_waits_for_something_else_leaves_the_lock_to_the_next(pipe: tuple[int, int]) -> None:
    shim, answered = waiting(), list[float]()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(serve, shim, pipe[0], answered)
            await trio.testing.wait_all_tasks_blocked()
            os.write(pipe[1], b"qx")
            begun = time.monotonic()
            while len(answered) < 2:
                await trio.sleep(0.001)
            assert answered[0] - begun < 0.02 <= answered[1] - begun
            nursery.cancel_scope.cancel()


async def test_a_cancelled_wait_gives_the_lock_back(pipe: tuple[int, int]) -> None:
    shim, answered = waiting(), list[float]()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            doomed = trio.CancelScope()

            async def first() -> None:
                with doomed:
                    await serve(shim, pipe[0], [])

            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(serve, shim, pipe[0], answered)
            nursery.start_soon(serve, shim, pipe[0], answered)
            await trio.testing.wait_all_tasks_blocked()
            doomed.cancel()
            os.write(pipe[1], b"x")
            while not answered:
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()


async def test_closing_the_session_ends_who_waits(pipe: tuple[int, int]) -> None:
    shim, ended = waiting(), list[str]()
    names = shim.namespace()

    async def worker() -> None:
        lock = names.Lock()
        try:
            async with lock:
                if not ended:
                    await names.lowlevel.wait_readable(pipe[0])
        except names.ClosedResourceError:
            ended.append("closed")
        else:
            ended.append("next")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(worker)
            await trio.testing.wait_all_tasks_blocked()
            names.lowlevel.notify_closing(pipe[0])
    assert ended == ["next", "next", "closed"] or ended == ["closed", "next", "next"]


async def test_the_lock_excludes() -> None:
    lock, inside, most = ReadLock(), 0, 0

    async def worker() -> None:
        nonlocal inside, most
        for step in range(20):
            async with lock:
                inside += 1
                most = max(most, inside)
                if step % 3:
                    await trio.sleep(0)
                inside -= 1
            if step % 4 == 0:
                await trio.sleep(0)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(worker)
    assert most == 1
    assert not lock.is_awaited


async def test_it_is_there_inside_the_block_and_only_for_the_version_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with quick_loop() as quick:
        assert quick
        assert vars(pyfuse3)["trio"] is not trio
    assert vars(pyfuse3)["trio"] is trio
    monkeypatch.setattr(loop, "KNOWN", "3.5.1")
    with quick_loop() as quick:
        assert not quick
        assert vars(pyfuse3)["trio"] is trio
    monkeypatch.undo()
    monkeypatch.setenv("LAMFS_LOOP", "trio")
    with quick_loop() as quick:
        assert not quick
