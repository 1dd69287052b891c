"""The harness itself: it knows bytes again, and sees what is lost, mixed or unnamed. test_smoke.py is a short run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import oracle, recovery
from tests.chaos.content import CHUNK, PAGE, Piece, Ranges, Version, explain, stream_bytes
from tests.chaos.model import Doubt, Excuse, File, Model, Plan, Stage
from tests.chaos.oracle import Found, Scan
from tests.chaos.world import Log, Result, Violation


def chunks(data: bytes) -> Iterable[bytes]:
    return (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))


def content(version: Version) -> bytes:
    return b"".join(version.chunks())


def file(version: Version, name: str = "a", *, stored: bool = False) -> File:
    return File(version, frozenset({name}), "A", stored)


# -- content ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_same_from_wherever_it_is_read() -> None:
    whole = stream_bytes(7, 0, 3 * PAGE + 5)
    assert len(set(whole)) == 256
    for start, end in ((0, 1), (5, PAGE), (PAGE - 3, PAGE + 3), (2 * PAGE, 3 * PAGE + 5)):
        assert stream_bytes(7, start, end) == whole[start:end]
    assert stream_bytes(8, 0, 3 * PAGE + 5) != whole


def test_versions_are_what_the_system_calls_leave() -> None:
    plain = bytearray(stream_bytes(1, 0, 10_000))
    version = Version.whole(10_000, 1)
    for start, end, stream in ((100, 200, 2), (5000, 9000, 3), (9_900, 12_000, 4), (20_000, 20_001, 5)):
        plain += bytes(max(0, end - len(plain)))
        plain[start:end] = stream_bytes(stream, start, end)
        version = version.written(start, end, stream)
    assert content(version) == plain
    assert content(version.cut(150)) == plain[:150]
    assert content(version.cut(25_000)) == plain + bytes(25_000 - len(plain))


def test_pages_say_which_version_they_are_of() -> None:
    old = Version.whole(5 * PAGE + 7, 1)
    new = old.written(2 * PAGE - 50, 3 * PAGE + 50, 2)
    torn = content(old)[: 2 * PAGE] + content(new)[2 * PAGE :]
    found = explain(chunks(torn), [old, new])
    assert found.garbage == []
    assert content(Version(found.pieces)) == torn
    spoilt = bytearray(torn)
    spoilt[PAGE + 9] ^= 1
    assert explain(chunks(bytes(spoilt)), [old, new]).garbage == [(PAGE, 2 * PAGE)]
    assert explain(chunks(content(Version.whole(PAGE, 3))), [old, new]).garbage == [(0, PAGE)]
    # What was written alone, with holes around it.
    change = bytearray(5 * PAGE + 7)
    change[2 * PAGE - 50 : 3 * PAGE + 50] = stream_bytes(2, 2 * PAGE - 50, 3 * PAGE + 50)
    found = explain(chunks(bytes(change)), [old, new])
    assert found.garbage == []
    assert content(Version(found.pieces)) == change
    change[2 * PAGE - 20] ^= 1
    assert explain(chunks(bytes(change)), [old, new]).garbage == [(PAGE, 2 * PAGE)]


def test_what_was_found_in_parts_is_found() -> None:
    version = Version.whole(100, 1).written(50, 60, 2)
    ranges = Ranges()
    ranges.add([Piece(0, 30, 1), Piece(55, 60, 2)])
    assert ranges.missing(version) == [Piece(30, 50, 1), Piece(50, 55, 2), Piece(60, 100, 1)]
    ranges.add([Piece(20, 100, 1), Piece(40, 56, 2)])
    assert ranges.missing(version) == []


# -- promises ---------------------------------------------------------------------------------------------------------


def test_a_doubt_begins_with_the_last_promise_and_knows_nothing_of_storage() -> None:
    old, new = Version.whole(10, 1), Version.whole(20, 2)
    stages = [Stage({"a": file(old)}), Stage({"a": file(new, stored=True)}), Stage({"a": file(new, stored=True)})]
    plan = Plan("overwrite a", stages, {"do": "write"}, torn={"a": [old, new]})
    before, *after = plan.doubt(0).stages
    assert before.matches({"a": old.digest})
    assert all(stage.matches({"a": new.digest}) for stage in after)
    assert [stage.paths["a"].stored for stage in after if stage.paths["a"]] == [False, False]
    assert plan.doubt(0).torn
    assert not plan.doubt(1).torn
    assert not any(stage.matches({"a": old.digest}) for stage in plan.doubt(1).stages)


# -- the oracle, with a world that is only said to be there -----------------------------------------------------------


class World:
    """A scan as it is told, and a log."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = Log(folder / "log", loud=False)
        self.world, self.name = self, "A"
        self.model = Model()
        self.tree: dict[str, Found] = {}
        self.unreadable: dict[str, str] = {}
        self.trash: list[Found] = []
        monkeypatch.setattr(oracle, "SEEN_SECONDS", 0.0)
        self.gone: set[str] = set()
        monkeypatch.setattr(oracle, "_gone", lambda _: self.gone)
        monkeypatch.setattr(oracle, "scan", lambda *_: Scan(self.tree, self.unreadable, self.trash))

    def version(self, size: int = 10_000, stream: int = 1) -> Version:
        return self.model.know(Version.whole(size, stream))

    def show(self, path: str, version: Version, **fields: Any) -> None:
        self.tree[path] = Found(version, list(version.pieces), **fields)

    def somewhere(self, claims: list[File], excuses: Iterable[Excuse] = ()) -> None:
        oracle.check_somewhere(self, None, self.model, claims, excuses)  # type: ignore[arg-type]

    def exact(self) -> None:
        oracle.check_exact(self, None, self.model)  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    found = World(tmp_path, monkeypatch)
    yield found
    found.log.close()


def broken(kind: str) -> Any:
    return pytest.raises(Violation, match=f"^{kind}")


def test_what_is_exact(world: World) -> None:
    version, other = world.version(), world.version(stream=2)
    world.model.tree["a"] = file(version)
    with broken("lost"):
        world.exact()
    world.show("b", version)
    with broken("lost: .*its bytes are at"):
        world.exact()
    world.tree.clear()
    world.show("a", other)
    with broken("lost: .*holds another version"):
        world.exact()
    world.show("a", version)
    world.exact()
    world.show("b", other)
    with broken("wrong: .*should not be there"):
        world.exact()
    del world.tree["b"]
    world.model.trash.append(file(other, stored=True))
    with broken("lost: .*trash"):
        world.exact()
    world.trash.append(Found(other, list(other.pieces)))
    world.exact()


def test_bytes_may_be_anywhere_after_damage_but_they_must_be(world: World) -> None:
    version = world.version()
    with broken("lost: .*bytes 0-10000 are nowhere"):
        world.somewhere([file(version)])
    world.show("lost+found/x", version.cut(6000), known=False)
    with broken("lost: .*bytes 6000-10000 are nowhere"):
        world.somewhere([file(version)])
    rest = Version(version.pieces)
    world.trash.append(Found(rest, [Piece(6000, 10_000, 1)], known=False))
    world.somewhere([file(version)])
    assert set(world.model.tree) == {"lost+found/x"}


def test_an_excuse_costs_its_pieces_and_a_word(world: World) -> None:
    version = world.version()
    excuse = Excuse(file(version), "its object was removed", (Piece(4000, 10_000, 1),))
    with broken("lost: .*bytes 0-4000 are nowhere .*costs less"):
        world.somewhere([file(version, "lost.csv")], [excuse])
    world.show("b", version.cut(4000), known=False)
    world.log.heard("'b' is cut")
    with broken("unnamed: .*lost.csv"):
        world.somewhere([file(version, "lost.csv")], [excuse])
    world.log.heard("the object of 'lost.csv' is gone")
    world.somewhere([file(version, "lost.csv")], [excuse])
    world.log.forget()
    with broken("unnamed"):
        world.somewhere([file(version, "lost.csv")], [excuse])


def test_a_mixture_and_what_cannot_be_read_are_named(world: World) -> None:
    version = world.version()
    world.show("a", Version((), digest="0" * 64), known=False, garbage=[(0, 4096)])
    world.show("b", version)
    with broken("mixture"):
        world.somewhere([file(version)])
    world.log.heard("damage in a")
    world.somewhere([file(version)])
    world.log.forget()
    del world.tree["a"]
    world.unreadable["c.csv"] = "EIO"
    with broken("unnamed: .*c.csv"):
        world.somewhere([file(version)])
    world.log.heard("c.csv is damaged")
    world.somewhere([file(version)])
    assert world.model.broken == {"c.csv"}
    world.exact()


def test_what_only_a_cache_has_may_be_read_and_may_not(world: World) -> None:
    kept, deleted = world.version(), world.version(stream=2)
    world.show("a", kept)
    world.show("b", deleted)
    world.gone = {"a", "b"}
    world.somewhere([file(kept)])
    assert world.model.broken == {"b"}
    world.exact()
    del world.tree["b"]
    world.unreadable["b"] = "EIO"
    world.exact()
    del world.tree["a"]
    with broken("lost"):
        world.exact()


def test_old_or_new_and_a_page_of_each_only_where_it_was_written_in_place() -> None:
    old, new = Version.whole(3 * PAGE, 1), Version.whole(3 * PAGE, 2)

    class Mount:
        machine = type("Machine", (), {"name": "A"})
        data = content(old)[:PAGE] + content(new)[PAGE:]

        def do(self, step: dict[str, Any]) -> dict[str, Any]:
            from blake3 import blake3

            from tests.chaos.content import explanation_to_json, version_from

            if step["do"] == "digest":
                return {"files": {"a": [len(self.data), blake3(self.data).hexdigest()]}}
            return explanation_to_json(explain(chunks(self.data), [version_from(each) for each in step["versions"]]))

    stages = [Stage({"a": file(old)}), Stage({"a": file(new)})]
    model = Model()
    oracle.resolve(model, Mount(), [Doubt("a write", stages, {"a": [old, new]})])  # type: ignore[arg-type]
    assert content(model.tree["a"].version) == Mount.data
    oracle.SEEN_SECONDS, kept = 0.0, oracle.SEEN_SECONDS
    try:
        with broken("mixture"):
            oracle.resolve(model, Mount(), [Doubt("a rename", stages)])  # type: ignore[arg-type]
    finally:
        oracle.SEEN_SECONDS = kept


# -- recovery, with a machine that is only said to be there -----------------------------------------------------------


class LateMachine:
    """A machine whose registry has a bad page that is met when something is to be stored, or it itself at the end:
    by the command ``late``."""

    name = "A"

    def __init__(self, log: list[str], late: str = "sync") -> None:
        self.late = late
        self.world = self.storage = self
        self.log, self.whole = log, False
        self.mounts = [self]
        self.path, self.mounted, self.daemon, self.knows = Path("/mnt"), False, 1, True

    def running(self) -> None: ...
    def stop_worker(self) -> None: ...
    def hear_logs(self) -> None: ...
    def stalled(self) -> bool:
        return False

    def complain(self, kind: str, text: str) -> None:
        raise Violation(kind, text)

    def cli(self, *words: str) -> Result:
        self.log.append(words[0])
        good = self.whole or words[0] != self.late
        wrong = "/mnt is unmounted, but the registry was not stored: it is damaged (…); 'lamfs connect --restore' helps"
        said = (
            "problem: storage: the object s3://b/.lamindb/x of 'a' is gone (artifact x)\n" if words[0] == "fsck" else ""
        )
        return Result(words, int(not good), said if good else wrong, False)

    def json(self, *words: str) -> None: ...

    def mount(self, mount: LateMachine) -> Result:
        self.mounted = True
        return self.cli("mount")

    def umount(self, mount: LateMachine, *words: str, seconds: float) -> Result:
        self.mounted = False
        return self.cli("umount")

    def connect(self, *words: str) -> Result:
        self.whole = self.whole or "--restore" in words
        return self.cli("connect", *words)


@pytest.mark.parametrize("late", ["sync", "umount"])
def test_a_registry_that_is_found_damaged_late_is_restored_as_it_says(
    monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    monkeypatch.setattr(recovery, "try_repairs", lambda *_, **__: None)
    log: list[str] = []
    machine = LateMachine(log, late)
    assert recovery.recover(machine, random.Random(1))  # type: ignore[arg-type]  # an object is gone, fsck says
    assert log[:4] == ["mount", "sync", "umount", "connect"]
    assert machine.whole
    with broken("hang" if late == "sync" else "refused"):
        recovery.recover(LateMachine([], late), random.Random(1), restore=False)  # type: ignore[arg-type]
