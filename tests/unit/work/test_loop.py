"""How the steps of storage work wait in a mount."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from lamfs.registry import Registry
from lamfs.spool import SpoolFolder
from lamfs.work.loop import LoopWaits


def test_two_puts_of_one_file_can_be_abandoned_and_end_in_any_order(tmp_path: Path) -> None:
    """A second mount has taken the file over and given it back, while the first put of it is still at work."""

    async def main() -> None:
        waits = LoopWaits(registry, spool)
        ended: list[str] = []

        async def put(name: str, end: trio.Event) -> None:
            if await waits.unless_abandoned(7, lambda: wait(end)) is None:
                name += " abandoned"
            ended.append(name)

        async def wait(end: trio.Event) -> str:
            await end.wait()
            return "done"

        first, second, never = trio.Event(), trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            for name, end in (("one", first), ("two", second), ("three", never)):
                nursery.start_soon(put, name, end)
                await trio.testing.wait_all_tasks_blocked()
            for end in (first, second):
                end.set()
                await trio.testing.wait_all_tasks_blocked()
                assert waits.may_abandon(7)
            waits.abandon(7)
        assert ended == ["one", "two", "three abandoned"]
        assert not waits.may_abandon(7)

    registry = Registry(tmp_path / "r.lndb", create=True)
    try:
        with SpoolFolder.make(tmp_path, ("spool",)) as spool:
            trio.run(main)
    finally:
        registry.close()
