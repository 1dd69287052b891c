"""What survives a power cut before the next step: one sync for all who wait, none when there is nothing new."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio

from lamfs.errors import RegistryError
from lamfs.registry import Registry
from lamfs.work import durable
from lamfs.work.durable import LogSync, beside
from tests.support.timed import timed


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The syncs of a registry's log; each is done all the same."""
    done: list[Path] = []
    sync_log = durable.sync_log

    def note(path: Path) -> None:
        done.append(path)
        sync_log(path)

    monkeypatch.setattr(durable, "sync_log", note)
    return done


def test_a_sync_only_when_something_was_committed(tmp_path: Path, syncs: list[Path]) -> None:
    with closing(Registry(tmp_path / "r", create=True)) as ours, closing(Registry(tmp_path / "r")) as others:

        async def main() -> None:
            wait = LogSync(ours.db)
            await wait()
            assert len(syncs) == 1
            await wait()
            assert len(syncs) == 1
            for number, registry in enumerate((ours, others, ours), 2):
                timed(registry).journal.add_delete(f"k{number}")
                await wait()
                assert len(syncs) == number
                await wait()
                assert len(syncs) == number

        trio.run(main)


def test_what_is_committed_after_a_sync_within_its_transaction(tmp_path: Path, syncs: list[Path]) -> None:
    with closing(Registry(tmp_path / "r", create=True)) as registry:

        async def main() -> None:
            wait = LogSync(registry.db)
            with registry.db.transaction():
                timed(registry).journal.add_delete("k")
                await wait()
            assert len(syncs) == 1
            await wait()
            assert len(syncs) == 2
            await wait()
            assert len(syncs) == 2

        trio.run(main)


def test_one_sync_for_all_who_wait(tmp_path: Path, syncs: list[Path]) -> None:
    with closing(Registry(tmp_path / "r", create=True)) as registry:

        async def main() -> None:
            wait = LogSync(registry.db)
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    timed(registry).journal.add_delete("k")
                    nursery.start_soon(wait)
            assert len(syncs) == 1

        trio.run(main)


def test_a_sync_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: list[Path]) -> None:
    with closing(Registry(tmp_path / "r", create=True)) as registry:

        async def main() -> None:
            wait = LogSync(registry.db)

            def fail(path: Path) -> None:
                raise RegistryError("no space")

            with monkeypatch.context() as patched:
                patched.setattr(durable, "sync_log", fail)
                for _ in range(2):
                    with pytest.raises(RegistryError):
                        await wait()
            assert not syncs
            await wait()
            assert len(syncs) == 1

        trio.run(main)


@pytest.mark.parametrize(("first", "second"), [("", ""), ("one", ""), ("", "two"), ("one", "two")])
def test_beside_does_both(first: str, second: str) -> None:
    ended: list[str] = []

    def work(name: str, error: str, *, ticks: int) -> Callable[[], object]:
        async def run() -> str:
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            ended.append(name)
            if error:
                raise OSError(error)
            return name

        return run

    async def main() -> str:
        return await beside(work("a", first, ticks=1), work("b", second, ticks=5))  # type: ignore[arg-type]

    if first or second:
        with pytest.raises(OSError, match=f"^{first or second}$"):
            trio.run(main)
    else:
        assert trio.run(main) == "a"
    assert ended == ["a", "b"]
