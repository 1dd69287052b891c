"""When closed spool files have their turn to be sealed."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio
import trio.abc
import trio.testing

from lamfs.work import sealing


class Sealed(sealing.Sealing):
    """Notes whose turn it was, and when."""

    def __init__(self) -> None:
        registry = cast(Any, self)
        registry.seals = registry.journal = registry
        registry.owner = ""
        super().__init__(registry, registry, registry, lambda ino, src: False, lambda ino: False)
        self.turns: list[tuple[int, float]] = []

    def unsealed(self, owner: str) -> list[tuple[int, str]]:
        return []

    async def _seal(self, turn: sealing._Turn) -> None:
        self.turns.append((turn.ino, trio.current_time()))


class Steps(trio.abc.Instrument):
    """Counts how often a task goes on."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += "Sealing.run" in task.name


def run(scenario: Any, *instruments: trio.abc.Instrument) -> Sealed:
    sealed = Sealed()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sealed.run)
            await trio.testing.wait_all_tasks_blocked()
            await scenario(sealed)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.0), instruments=instruments)
    return sealed


def test_each_has_its_turn_some_time_after_its_last_close() -> None:
    async def scenario(sealed: Sealed) -> None:
        for ino in (1, 2, 1, 3):
            sealed.closed(ino)
            await trio.sleep(0.5)
        sealed._ask(4, 0.1, late=True)
        await trio.sleep(10)
        sealed.closed(5)
        await trio.sleep(10)

    sealed = run(scenario)
    began = sealed.turns[0][1] - 2.1
    assert [(ino, pytest.approx(at)) for ino, at in sealed.turns] == [
        (4, began + 2.1),
        (2, began + 0.5 + sealing.AFTER),
        (1, began + 1.0 + sealing.AFTER),
        (3, began + 1.5 + sealing.AFTER),
        (5, began + 12.0 + sealing.AFTER),
    ]


def test_a_close_does_not_wake_who_waits_for_an_earlier_one() -> None:
    """A program that makes a thousand files a second has the loop for itself."""
    steps = Steps()

    async def scenario(sealed: Sealed) -> None:
        for ino in range(1000):
            sealed.closed(ino)
            await trio.sleep(0.001)
        assert not sealed.turns

    run(scenario, steps)
    assert steps.count < 10
