"""Threads: bounded, lazy, and quick to stop."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from itertools import count

import pytest

from lamfs.pool import Pool


def test_everything_is_done_by_no_more_threads_than_there_may_be() -> None:
    busy, most = 0, 0
    lock, together = threading.Lock(), threading.Barrier(3)

    def work(number: int) -> int:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        if number < 3:
            together.wait(10)  # with one thread less it would not come to its end
        with lock:
            busy -= 1
        return number * number

    ended: list[int] = []
    with Pool(3, "test", leave=lambda: ended.append(1)) as pool:
        found = {item: future.result() for item, future in pool.unordered(work, range(50))}
    assert found == {number: number * number for number in range(50)}
    assert most == 3
    assert len(ended) == 3


def test_no_more_is_taken_than_can_soon_be_done() -> None:
    taken = []

    def numbers() -> object:
        for number in count():
            taken.append(number)
            yield number

    with Pool(2, "test") as pool, closing(pool.unordered(lambda number: number, numbers())) as done:  # type: ignore[arg-type]
        for _ in range(10):
            next(done)
    assert len(taken) <= 10 + 2 * 2


def test_an_exception_cancels_what_has_not_begun_and_waits_for_what_has() -> None:
    begun, ended = [], []
    gate = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError("no")
        gate.wait(10)
        ended.append(number)

    def run() -> None:
        with Pool(2, "test") as pool, closing(pool.unordered(work, range(100))) as done:
            for _, future in done:
                threading.Timer(0.05, gate.set).start()
                future.result()

    with pytest.raises(ValueError):
        run()
    assert sorted(begun)[1:] == sorted(ended)
    assert len(begun) < 6


def test_a_call_that_never_ends_does_not_hold_up_who_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamfs.pool.GRACE_SECONDS", 0.1)
    gate, waits = threading.Event(), threading.Event()

    def hang(_: int) -> None:
        waits.set()
        gate.wait(30)

    def run() -> None:
        with Pool(2, "outer") as outer, Pool(1, "inner") as inner:

            def see(number: int) -> None:
                for _, future in inner.unordered(hang, [number]):
                    future.result()

            done = outer.unordered(see, range(9), abandon=True)
            threading.Thread(target=lambda: next(done, None), daemon=True).start()
            assert waits.wait(10)
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert time.monotonic() - began < 5
    gate.set()
