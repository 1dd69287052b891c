"""A bounded number of threads for blocking work, such as fetching blocks. A Pool may be used from any thread.

Unlike those of concurrent.futures' executor, its threads are daemons, so that an interrupted program ends even if a
server does not answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

GRACE_SECONDS = 3.0
"""After an exception: time for running calls to end, before they are left alone."""


class _Task(Generic[R]):
    """One call, and where its result goes."""

    __slots__ = ("_call", "future")

    def __init__(self, call: Callable[[], R]) -> None:
        self._call = call
        self.future: Future[R] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._call()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Pool:
    """``threads`` threads, started as they are needed. Context manager: waits for them to end. After an exception,
    calls that have not begun are cancelled. Running calls get GRACE_SECONDS, and then are left to the background."""

    def __init__(self, threads: int, name: str, *, leave: Callable[[], None] | None = None) -> None:
        self.threads = threads
        """Most calls at a time."""
        self._name = name
        self._leave = leave
        """Called by each thread as it ends."""
        self._tasks: SimpleQueue[_Task[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._started: list[threading.Thread] = []
        self._unfinished = 0
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = kind is not None
        for _ in self._started:
            self._tasks.put(None)
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in self._started:
            thread.join(None if kind is None else max(0.0, deadline - time.monotonic()))

    def unordered(
        self, call: Callable[[T], R], items: Iterable[T], *, abandon: bool = False
    ) -> Generator[tuple[T, Future[R]], None, None]:
        """``call`` each item in the threads. Yields items with their finished futures, as they finish.

        Items are taken as threads become free, two for each thread, so there may be any number of items. If the caller
        stops iterating, or there is an exception, calls that have not begun are cancelled. Running calls are waited
        for, unless ``abandon``.
        """
        finished: SimpleQueue[Future[R]] = SimpleQueue()
        waiting: dict[Future[R], T] = {}
        try:
            for item in items:
                if len(waiting) >= 2 * self.threads:
                    future = finished.get()
                    yield waiting.pop(future), future
                task = _Task(_bind(call, item))
                waiting[task.future] = item
                task.future.add_done_callback(finished.put)
                self._give(task)
            while waiting:
                future = finished.get()
                yield waiting.pop(future), future
        finally:
            begun = [future for future in waiting if not future.cancel()]
            if not abandon:
                wait(begun)

    def _give(self, task: _Task[Any]) -> None:
        with self._lock:
            self._unfinished += 1
            if len(self._started) < min(self._unfinished, self.threads):
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._started)}", daemon=True)
                self._started.append(thread)
                thread.start()
        self._tasks.put(task)

    def _run(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                break
            if self._stopped:
                task.future.cancel()
            task.run()
            del task
            with self._lock:
                self._unfinished -= 1
        if self._leave is not None:
            self._leave()


def _bind(call: Callable[[T], R], item: T) -> Callable[[], R]:
    return lambda: call(item)
