"""The quick way to wait for the kernel: nobody else starves, the lock is never lost, and all ends as with trio."""

from __future__ import annotations

import os
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


class Answers:
    """The requests that workers have answered, in this order. A request "q" is answered when ``slow`` is set."""

    def __init__(self) -> None:
        self.given: list[bytes] = []
        self.slow = trio.Event()
        self._more = trio.Event()

    def add(self, request: bytes) -> None:
        self.given.append(request)
        self._more.set()

    async def until(self, count: int) -> None:
        """Return when there are so many."""
        while len(self.given) < count:
            self._more = trio.Event()
            await self._more.wait()


async def serve(shim: Waiting, fd: int, answers: Answers, take: Callable[[int, int], bytes] = os.read) -> None:
    """As pyfuse3's workers do: wait with the lock, answer without it."""
    names = shim.namespace()
    lock = names.Lock()
    while True:
        async with lock:
            await names.lowlevel.wait_readable(fd)
        request = take(fd, 1)
        if request == b"q":
            await answers.slow.wait()
        answers.add(request)


async def test_a_request_wakes_a_worker_and_so_does_what_other_tasks_wait_for(pipe: tuple[int, int]) -> None:
    shim, answers = waiting(), Answers()
    send, receive = trio.open_memory_channel[int](0)

    def from_a_thread() -> None:
        for number in range(50):
            trio.from_thread.run(send.send, number)
            os.write(pipe[1], b"x")
        trio.from_thread.run(send.aclose)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(serve, shim, pipe[0], answers)
            nursery.start_soon(trio.to_thread.run_sync, from_a_thread)
            assert [number async for number in receive] == list(range(50))
            await answers.until(50)
            nursery.cancel_scope.cancel()


async def test_other_tasks_have_their_turn_while_requests_pour_in(pipe: tuple[int, int]) -> None:
    shim, answers = waiting(), Answers()
    os.write(pipe[1], b"x")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                # There is a request each time that a worker looks.
                nursery.start_soon(serve, shim, pipe[0], answers, lambda fd, size: b"x")
            for _ in range(50):
                await trio.lowlevel.checkpoint()
            assert len(answers.given) > 50, "many requests are answered for each turn of another task"
            nursery.cancel_scope.cancel()


async def test_a_worker_that_waits_for_something_else_leaves_the_lock_to_the_next(pipe: tuple[int, int]) -> None:
    shim, answers = waiting(), Answers()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(serve, shim, pipe[0], answers)
            await trio.testing.wait_all_tasks_blocked()
            os.write(pipe[1], b"qx")
            await answers.until(1)
            answers.slow.set()
            await answers.until(2)
            assert answers.given == [b"x", b"q"]
            nursery.cancel_scope.cancel()


async def test_a_cancelled_wait_gives_the_lock_back(pipe: tuple[int, int]) -> None:
    shim, answers = waiting(), Answers()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            doomed = trio.CancelScope()

            async def first() -> None:
                with doomed:
                    await serve(shim, pipe[0], Answers())

            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(serve, shim, pipe[0], answers)
            nursery.start_soon(serve, shim, pipe[0], answers)
            await trio.testing.wait_all_tasks_blocked()
            doomed.cancel()
            os.write(pipe[1], b"x")
            await answers.until(1)
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
                    await trio.lowlevel.checkpoint()
                inside -= 1
            if step % 4 == 0:
                await trio.lowlevel.checkpoint()

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
