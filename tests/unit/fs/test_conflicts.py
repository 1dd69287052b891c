"""Somebody else changes an object that is about to be stored over: both are kept, and it is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from lamfs.errors import LeaseLost, ObjectChanged, ObjectMissing, StorageUnavailable
from lamfs.keys import conflict_name
from lamfs.model import ObjectMeta
from lamfs.registry.entries import Delete
from lamfs.work import guard
from tests.support.fsbox import Box, User
from tests.support.timed import timed
from tests.unit.fs.conftest import MakeBox

FOREIGN = b"by somebody else"


def overwrite(box: Box, key: str) -> None:
    """What another program does in the bucket, or in the folder."""
    if box.kind == "s3":
        box.store.objects[key] = FOREIGN
        box.store.metas.pop(key, None)
    else:
        path = Path(box.store.url(key))
        path.unlink(missing_ok=True)
        path.write_bytes(FOREIGN)


def next_object(user: User, name: str) -> str:
    """The object key that the next revision of a file gets."""
    record = user.fs.context.registry.artifacts.by_key(name)
    assert record is not None
    if not record.key_is_virtual:
        return record.revision.object_key
    return f".lamindb/{record.uid}.{record.number + 1}{record.suffix}"


async def both(user: User, name: str, mine: bytes) -> None:
    """The other's bytes have the name, ours the one beside it; and the uploader says so."""
    assert await user.read(name) == FOREIGN
    found = [path for path in await user.actual() if "(conflict " in path]
    assert len(found) == 1
    assert found[0].startswith(name.removesuffix(".csv") + " (conflict 20")
    assert found[0].endswith(").csv")
    assert await user.read(found[0]) == mine
    [failure] = {failure.error for failure in user.fs.context.uploader.failures}
    assert found[0] in failure


@pytest.mark.parametrize("real_keys", [False, True])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_an_object_that_was_changed_meanwhile(make_box: MakeBox, kind: str, real_keys: bool) -> None:
    box = make_box(kind, real_keys=real_keys)

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        uid = user.uid("a.csv")
        overwrite(box, next_object(user, "a.csv"))
        await user.write_file("a.csv", b"mine, longer")
        await user.sync()
        await both(user, "a.csv", b"mine, longer")
        assert user.uid("a.csv") == uid
        assert box.problems(user.fs.context.registry) == []

    box.run(scenario, User())


def damage_in_place(box: Box, key: str, damaged: bytes) -> None:
    """What a bad disk or ``dd`` does: other bytes, while all that the object says of itself stays."""
    if box.kind == "s3":
        box.store.objects[key] = damaged
    else:
        Path(box.store.url(key)).write_bytes(damaged)


@pytest.mark.parametrize("how", ["by fsync", "in a part"])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_damage_of_the_stored_revision_is_no_conflict(
    make_box: MakeBox, caplog: pytest.LogCaptureFixture, kind: str, how: str
) -> None:
    """At a real key what is written replaces the content as ever; the damaged bytes are kept aside, and the log says
    it."""
    box = make_box(kind, real_keys=True)

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        registry = user.fs.context.registry
        uid, key = user.uid("a.csv"), user.revision("a.csv").object_key
        if how == "in a part":
            opened = await user.open("a.csv", os.O_RDWR)
            await user.pwrite(opened, b"mine, longer", 0)
            damage_in_place(box, key, b"fXrst")
            await user.close(opened)
        else:
            damage_in_place(box, key, b"fXrst")
            opened = await user.open("a.csv", os.O_RDWR | os.O_TRUNC)
            await user.pwrite(opened, b"mine, longer", 0)
            await user.fsync(opened)
            await user.close(opened)
        await user.sync()
        assert not user.fs.context.uploader.failures
        assert await user.read("a.csv") == b"mine, longer"
        assert await user.read("lost+found/a (revision 1).csv") == b"fXrst"
        assert sorted(await user.actual()) == ["a.csv", "lost+found", "lost+found/a (revision 1).csv"]
        assert user.uid("a.csv") == uid
        kept = registry.artifacts.by_key("lost+found/a (revision 1).csv")
        assert kept is not None
        assert "its bytes are not those that were stored" in (kept.description or "")
        assert box.problems(registry) == []
        text = caplog.text
        assert key in text
        assert "was damaged: its bytes were not those of revision 1" in text

    box.run(scenario, User())


@pytest.mark.parametrize("when", ["before it is sent", "while it is sent"])
@pytest.mark.parametrize("size", [12, 65 << 20])
@pytest.mark.parametrize("real_keys", [False, True])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_an_object_that_is_changed_while_a_put_is_on_its_way(
    make_box: MakeBox, kind: str, real_keys: bool, size: int, when: str
) -> None:
    """A machine that slept in the middle of an upload goes on, though another one has stored something since."""
    box = make_box(kind, real_keys=real_keys)
    mine = b"x" * size
    last = "complete_upload" if kind == "s3" and size > 1 << 20 else "put"
    keys: list[str] = []
    asked = 0

    async def permit(fresh: bool) -> None:
        nonlocal asked
        asked += fresh
        if when == "before it is sent" and asked == (2 if real_keys else 1) and keys:
            overwrite(box, keys.pop())

    def other(op: str, key: str) -> None:
        if when == "while it is sent" and op == last and key in keys:
            overwrite(box, keys.pop())

    box.permit = permit

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        keys.append(next_object(user, "a.csv"))
        user.mover.failing = other
        await user.write_file("a.csv", mine)
        await user.sync()
        assert keys == []
        assert await user.read("a.csv") == FOREIGN
        (found,) = [path for path in await user.actual() if "(conflict " in path]
        assert await user.read(found) == mine
        assert box.problems(user.fs.context.registry) == []

    box.run(scenario, User())


@pytest.mark.parametrize("late", [False, True])
def test_a_small_replacement_asks_storage_once(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """The look for a conflict counts for a moment: the replacement itself has the ETag. After that it is looked again,
    since there are servers that do not compare it."""
    box = make_box("s3", real_keys=True)
    heads: list[str] = []
    head = box.store.head
    box.store.head = lambda key: (heads.append(key), head(key))[1]
    if late:
        monkeypatch.setattr(guard, "LOOKED_SECONDS", 0.0)

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        heads.clear()
        await user.write_file("a.csv", b"second!")
        await user.sync()
        assert len(heads) == (2 if late else 1)

    box.run(scenario, User())


def test_the_next_revision_of_a_virtual_key_is_sent_without_a_look(make_box: MakeBox) -> None:
    """Nothing is at its object, and storage itself refuses if there is."""
    box = make_box("s3")
    asked: list[str] = []
    for name in ("head", "put_file"):
        work = getattr(box.store, name)
        setattr(box.store, name, lambda *a, _name=name, _work=work, **how: (asked.append(_name), _work(*a, **how))[1])

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        asked.clear()
        opened = await user.open("a.csv", os.O_RDWR | os.O_TRUNC)
        await user.pwrite(opened, b"second", 0)
        await user.fsync(opened)
        assert asked[:1] == ["put_file"]
        await user.close(opened)
        await user.sync()
        assert len(box.store.objects) == 1

    box.run(scenario, User())


def test_the_cache_lets_go_of_a_revision_whose_object_is_deleted(make_box: MakeBox) -> None:
    """And who has it open reads on."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        assert await user.read("a.csv") == b"first"
        first = user.revision("a.csv").object_key
        opened = await user.open("a.csv", os.O_RDONLY)
        assert (box.cache_dir / box.store.cache_name / first).exists()
        timed(user.fs.context.registry).names.purge(user.uid("a.csv"))
        await user.sync()
        assert first not in box.store.objects
        assert not (box.cache_dir / box.store.cache_name / first).exists()
        assert await user.fs.read(opened.number, 0, 10) == b"first"
        user.fs.release(opened.number)

    box.run(scenario, User())


def test_what_is_left_of_an_earlier_revision_that_somebody_else_has_changed_stays(make_box: MakeBox) -> None:
    """Nothing is written over it, and only what lamfs has stored is deleted: fsck gives it a name."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        first = user.revision("a.csv").object_key
        overwrite(box, first)
        await user.write_file("a.csv", b"second")
        await user.sync()
        assert not user.fs.context.uploader.failures
        assert await user.read("a.csv") == b"second"
        assert box.store.objects[first] == FOREIGN

    box.run(scenario, User())


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_a_file_whose_object_is_gone_can_be_written(make_box: MakeBox, kind: str) -> None:
    box = make_box(kind)

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        box.store.delete([user.fs.context.registry.artifacts.by_key("a.csv").revision.object_key])  # type: ignore[union-attr]
        await user.write_file("a.csv", b"second!")
        await user.sync()
        assert list(user.fs.context.uploader.failures) == []

    box.run(scenario, User())


@pytest.mark.parametrize("what", ["replaced", "deleted"])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_nothing_is_replaced_or_deleted_once_the_lease_is_lost(make_box: MakeBox, kind: str, what: str) -> None:
    """It is lost when the job has begun already: what open files still need of the object is fetched first."""
    box = make_box(kind)
    asked = 0

    async def permit(fresh: bool) -> None:
        nonlocal asked
        asked += fresh
        if asked > 1:
            raise LeaseLost("another machine has it")

    box.permit = permit

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        context = user.fs.context
        record = context.registry.artifacts.by_key("a.csv")
        assert record is not None
        if what == "replaced":
            await user.write_file("a.csv", b"second")
        else:
            timed(context.registry).names.purge(record.uid)
            context.uploader.notify()
        with trio.fail_after(20):
            while not context.uploader.failures:
                await trio.sleep(0.01)
        assert "another machine has it" in context.uploader.failures[0].error
        assert box.store.get(record.revision.object_key) == b"first"

    box.run(scenario, User())


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_what_an_artifact_had_before_is_not_replaced_once_the_lease_is_lost(make_box: MakeBox, kind: str) -> None:
    """A file was renamed over it, and its object is still where it was: another machine's registry tells of that."""
    box = make_box(kind)
    lost = False

    async def permit(fresh: bool) -> None:
        if fresh and lost:
            raise LeaseLost("another machine has it")

    box.permit = permit

    async def scenario(user: User) -> None:
        nonlocal lost
        await user.write_file("a.csv", b"first")
        await user.write_file("a.csv.part", b"second")
        await user.sync()
        context, home = user.fs.context, user.revision("a.csv").object_key
        lost = True
        await user.rename("a.csv.part", "a.csv")
        await user.write_file("a.csv", b"third")
        with trio.fail_after(20):
            while not any(failure.what.startswith("put ") for failure in context.uploader.failures):
                assert box.store.get(home) == b"first"
                await trio.sleep(0.01)
        assert box.store.get(home) == b"first"

    box.run(scenario, User())


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_an_object_that_was_claimed_before_another_machine_had_the_lease(make_box: MakeBox, kind: str) -> None:
    """A put that has begun takes what is in its object for its own, but not after that."""
    box = make_box(kind)
    away = True

    async def scenario(user: User) -> None:
        nonlocal away
        await user.write_file("a.csv", b"first")
        await user.sync()
        context = user.fs.context
        key = next_object(user, "a.csv")
        user.mover.failing = lambda op, _: StorageUnavailable("away") if away and op == "put" else None
        await user.write_file("a.csv", b"mine")
        with trio.fail_after(20):
            while not context.uploader.failures:
                await trio.sleep(0.01)
        context.uploader.failures.clear()
        context.registry.journal.doubt_claims()
        overwrite(box, key)
        away = False
        await user.sync()
        await both(user, "a.csv", b"mine")

    box.run(scenario, User())


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_an_object_that_nobody_has_registered(make_box: MakeBox, kind: str) -> None:
    """A new file with a real key does not replace what is in the bucket already."""
    box = make_box(kind, real_keys=True)

    async def scenario(user: User) -> None:
        overwrite(box, "a.csv")
        await user.write_file("a.csv", b"mine")
        await user.sync()
        await both(user, "a.csv", b"mine")
        assert box.problems(user.fs.context.registry) == []

    box.run(scenario, User())


def objects(box: Box) -> dict[str, bytes]:
    """What is in storage."""
    if box.kind == "s3":
        return dict(box.store.objects)
    root = Path(box.store.url("")).resolve()
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_relative_to(root / ".lamindb" / "_spool")
    }


def forget_meta(box: Box, key: str) -> None:
    """Have an object say nothing of itself, as where the storage keeps no such thing."""
    if box.kind == "s3":
        box.store.metas.pop(key)
    else:
        os.removexattr(box.store.url(key), "user.lamfs")


def start_over(user: User) -> None:
    """Failures that were meant are no failures; what failed is tried again now."""
    user.mover.failing = lambda op, key: None
    user.fs.context.uploader.failures.clear()


async def failed(user: User) -> None:
    with trio.fail_after(20):
        while not user.fs.context.uploader.failures:
            await trio.sleep(0.01)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_a_claim_of_a_real_key_does_not_make_what_is_there_ours(make_box: MakeBox, kind: str, stored: bool) -> None:
    """A put failed before it stored anything; then another program stores something at its key."""
    box = make_box(kind, real_keys=True)

    async def scenario(user: User) -> None:
        if stored:
            await user.write_file("a.csv", b"first")
            await user.sync()
        user.mover.failing = lambda op, _: StorageUnavailable("away") if op == "put" else None
        await user.write_file("a.csv", b"mine")
        await failed(user)
        assert user.fs.context.registry.journal.is_claimed("a.csv")
        overwrite(box, "a.csv")
        start_over(user)
        await user.sync()
        await both(user, "a.csv", b"mine")
        assert not user.fs.context.registry.journal.is_claimed("a.csv")
        assert box.problems(user.fs.context.registry) == []
        # And whoever deletes the file deletes what it shows.
        timed(user.fs.context.registry).names.purge(user.uid("a.csv"))
        await user.sync()
        assert "a.csv" not in objects(box)

    box.run(scenario, User())


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_what_a_put_has_stored_itself_is_no_conflict(make_box: MakeBox, kind: str, metadata: bool) -> None:
    """The reply was lost. Where objects cannot say whose they are, their bytes tell it."""
    box = make_box(kind, real_keys=True)

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        user.mover.late = True
        user.mover.failing = lambda op, _: StorageUnavailable("away") if op == "put" else None
        await user.write_file("a.csv", b"mine")
        await failed(user)
        assert objects(box) == {"a.csv": b"mine"}
        if not metadata:
            forget_meta(box, "a.csv")
        start_over(user)
        await user.sync()
        assert await user.actual() == {"a.csv": b"mine"}
        assert not user.fs.context.uploader.failures

    box.run(scenario, User())


def test_a_spool_file_that_a_folder_cannot_take_is_removed_once_it_is_stored(make_box: MakeBox) -> None:
    """A process died when the file had its name in the storage folder, and still that in the spool."""
    box = make_box("local", real_keys=True)

    async def scenario(user: User) -> None:
        user.mover.failing = lambda op, _: StorageUnavailable("away") if op == "put" else None
        await user.write_file("a.csv", b"mine")
        await failed(user)
        (src,) = box.spool.iterdir()
        os.setxattr(src, "user.lamfs", b"0123456789abcdefABCD 1 - =a.csv")
        os.link(src, box.store.url("a.csv"))
        start_over(user)
        await user.sync()
        assert await user.actual() == {"a.csv": b"mine"}
        assert list(box.spool.iterdir()) == []

    box.run(scenario, User())


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_what_a_delete_does_not_know_stays(make_box: MakeBox, kind: str) -> None:
    """A file is deleted whose put claimed its key and stored nothing; another program has stored something there."""
    box = make_box(kind, real_keys=True)

    async def scenario(user: User) -> None:
        user.mover.failing = lambda op, _: StorageUnavailable("away") if op == "put" else None
        await user.write_file("a.csv", b"mine")
        await failed(user)
        overwrite(box, "a.csv")
        await user.unlink("a.csv")
        start_over(user)
        await user.sync()
        assert objects(box) == {"a.csv": FOREIGN}

    box.run(scenario, User())


def test_fsync_says_it(make_box: MakeBox) -> None:
    box = make_box("s3")

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        overwrite(box, next_object(user, "a.csv"))
        opened = await user.open("a.csv", os.O_RDWR | os.O_TRUNC)
        await user.pwrite(opened, b"mine", 0)
        with pytest.raises(ObjectChanged, match="Somebody else"):
            await user.fsync(opened)
        await user.pread(opened)
        await user.close(opened)
        await user.sync()
        await both(user, "a.csv", b"mine")
        assert box.problems(user.fs.context.registry) == []

    box.run(scenario, User())


def test_what_an_upload_that_was_overtaken_has_written_is_no_conflict(make_box: MakeBox) -> None:
    """A file with an upload of its own is renamed over one whose upload has just reached the object."""
    box = make_box("s3")

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        user.mover.hold = "put"
        await user.write_file("a.csv", b"second")
        await user.mover.held.wait()
        await user.write_file("b.csv", b"third")
        entry = user.fs.context.registry.journal.put_of(user.find("b.csv"))
        assert entry is not None
        user.fs.context.registry.journal.set_target(entry.id, "k")
        await user.rename("b.csv", "a.csv")
        user.mover.release.set()
        await user.sync()
        await user.compare()
        assert not user.fs.context.uploader.failures

    box.run(scenario, User())


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_a_rename_does_not_move_an_object_over_another(make_box: MakeBox, kind: str) -> None:
    """What is at the new key already is no artifact's: it stays, and so does the object, wherever that is."""
    box = make_box(kind, real_keys=True)

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"mine")
        await user.sync()
        overwrite(box, "b.csv")
        await user.rename("a.csv", "b.csv")
        await user.sync()
        assert box.store.get("b.csv") == FOREIGN
        assert await user.read("b.csv") == b"mine"
        record = user.fs.context.registry.artifacts.by_key("b.csv")
        assert record is not None
        assert record.revision.object_key == "a.csv"
        assert user.fs.context.registry.journal.entries() == []

    box.run(scenario, User())


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_a_delete_does_not_hit_another_object(make_box: MakeBox, kind: str) -> None:
    box = make_box(kind)

    async def scenario(user: User) -> None:
        for name in ("a.csv", "b.csv", "c.csv"):
            await user.write_file(name, name.encode())
        await user.sync()
        registry = user.fs.context.registry
        keys = {}
        for name in ("a.csv", "b.csv", "c.csv"):
            record = registry.artifacts.by_key(name)
            assert record is not None
            keys[name] = record.revision.object_key
            if name == "b.csv":
                overwrite(box, record.revision.object_key)
            timed(registry).names.purge(record.uid)
        user.fs.context.uploader.notify()
        await user.sync()
        assert registry.journal.entries() == []
        assert box.store.get(keys["b.csv"]) == FOREIGN
        for name in ("a.csv", "c.csv"):
            with pytest.raises(ObjectMissing):
                box.store.head(keys[name])

    box.run(scenario, User())


def test_names() -> None:
    assert conflict_name("a.tar.gz", "x") == "a (conflict x).tar.gz"
    assert conflict_name("Makefile", "x") == "Makefile (conflict x)"
    long = conflict_name("ä" * 126 + ".csv", "2026-01-01 00.00.00")
    assert len(long.encode()) <= 255
    assert long.endswith("(conflict 2026-01-01 00.00.00).csv")


@pytest.mark.parametrize("first", ["move", "delete"])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_the_copy_that_a_forgotten_move_has_made_is_kept(make_box: MakeBox, kind: str, first: str) -> None:
    """The registry has lost that an object was moved: the deletion of the copy, owed until that was noted, does not hit
    what is all that is left, and the move is struck off."""
    box = make_box(kind)

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        registry = user.fs.context.registry
        before = registry.artifacts.by_key("a.csv")
        assert before is not None
        await user.rename("a.csv", "a.txt")
        await user.sync()
        now = registry.artifacts.by_key("a.txt")
        assert now is not None
        assert now.revision.object_key != before.revision.object_key
        registry.artifacts.set_object(before.uid, before.revision.object_key, before.revision.etag)
        if first == "move":
            timed(registry).journal.add_move(before.uid)
        timed(registry).commits.begin_move(before.uid, now.revision.object_key)
        await user.sync()
        assert box.store.get(now.revision.object_key) == b"first"
        timed(registry).journal.add_move(before.uid)
        await user.sync()
        assert box.store.get(now.revision.object_key) == b"first"
        assert registry.journal.entries() == []

    box.run(scenario, User())


@pytest.mark.parametrize("size", [12, 65 << 20])
@pytest.mark.parametrize("kind", ["s3", "local"])
def test_a_new_file_does_not_replace_what_comes_to_its_key_while_it_is_sent(
    make_box: MakeBox, kind: str, size: int
) -> None:
    """Nothing was there when it was looked at for the last time; sending it takes long."""
    box = make_box(kind, real_keys=True)
    mine = b"x" * size
    last = "complete_upload" if kind == "s3" and size > 1 << 20 else "put"
    keys = ["a.csv"]

    def other(op: str, key: str) -> None:
        if op == last and key in keys:
            overwrite(box, keys.pop())

    async def scenario(user: User) -> None:
        user.mover.failing = other
        await user.write_file("a.csv", mine)
        await user.sync()
        assert keys == []
        assert await user.read("a.csv") == FOREIGN
        (found,) = [path for path in await user.actual() if "(conflict " in path]
        assert await user.read(found) == mine
        assert box.problems(user.fs.context.registry) == []

    box.run(scenario, User())


@pytest.mark.parametrize("theirs", [True, False])
def test_a_delete_that_another_machine_may_have_overtaken(make_box: MakeBox, theirs: bool) -> None:
    """Equal bytes have the same ETag in a bucket: the object says whether it is the one that was meant."""
    box = make_box("s3", real_keys=True)

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"first")
        await user.sync()
        context = user.fs.context
        timed(context.registry).names.purge(user.uid("a.csv"))
        context.registry.journal.doubt_claims()
        if theirs:
            box.store.metas["a.csv"] = ObjectMeta("0123456789abcdefABCD", "a.csv", 1, None)
        await user.sync()
        assert objects(box) == ({"a.csv": b"first"} if theirs else {})

    box.run(scenario, User())


def test_the_copy_that_a_move_is_making_is_not_looked_at(make_box: MakeBox, caplog: pytest.LogCaptureFixture) -> None:
    """Its deletion is owed until the copy is known. Meanwhile the original may go, and the copy is no leftover."""
    box = make_box("s3")
    asked: list[str] = []
    head = box.store.head

    async def scenario(user: User) -> None:
        await user.write_file("a", b"first")
        await user.sync()
        user.mover.hold = "copy"
        await user.rename("a", "a.csv")
        await user.mover.held.wait()
        box.store.head = lambda key: (asked.append(key), head(key))[1]
        (owed,) = user.fs.context.registry.journal.mine(Delete)
        await user.fs.context.uploader._moves.delete([owed])
        assert asked == []
        user.mover.release.set()
        await user.sync()
        assert await user.read("a.csv") == b"first"
        assert box.problems(user.fs.context.registry) == []

    box.run(scenario, User())
    assert "is not the one that was to be deleted" not in caplog.text


def test_a_move_does_not_replace_what_comes_to_its_place_while_it_is_copied(make_box: MakeBox) -> None:
    """In a folder, where copying takes long."""
    box = make_box("local", real_keys=True)
    keys = ["b.csv"]

    def other(op: str, key: str) -> None:
        if op == "copy" and key in keys:
            overwrite(box, keys.pop())

    async def scenario(user: User) -> None:
        await user.write_file("a.csv", b"mine")
        await user.sync()
        user.mover.failing = other
        await user.rename("a.csv", "b.csv")
        await user.sync()
        assert keys == []
        assert await user.read("b.csv") == b"mine"
        assert objects(box) == {"a.csv": b"mine", "b.csv": FOREIGN}
        assert user.fs.context.registry.journal.entries() == []

    box.run(scenario, User())
