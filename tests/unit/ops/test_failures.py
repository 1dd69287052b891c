"""Saves, replaces and deletes that fail or whose process dies at every step: the old revision or the new one, whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs.errors import PreconditionFailed, StorageUnavailable
from lamfs.keys import spool_name
from lamfs.ops import artifacts, fsck, mounts, recover, setup
from lamfs.ops import opened as opened_module
from lamfs.ops.instance import Instance
from lamfs.registry import process_id
from lamfs.registry.commits import Commits
from lamfs.storage.local import LocalStore
from lamfs.work import saves
from lamfs.work.conflicts import Conflicts
from tests.support.ops import BadStore, make_spool, write_spool
from tests.support.timed import timed

SLUG = "tester/store"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    setup.login("tester")
    setup.init(str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def instance(root: Path) -> Iterator[Instance]:
    with Instance.open(SLUG) as opened:
        yield opened


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def with_store(instance: Instance, **plan: list[str]) -> tuple[Instance, BadStore]:
    store = BadStore(instance.store, **plan)
    return Instance(instance.settings, store=store), store  # type: ignore[arg-type]


def read(instance: Instance, uid: str) -> str:
    return artifacts.cache(instance, artifacts.by_uid(instance, uid)).read_text()


def nothing_owed(instance: Instance) -> None:
    report = fsck.check(instance, data=True)
    assert report.problems == []
    assert instance.registry.journal.entries() == []


@pytest.mark.parametrize("virtual", [True, False])
def test_a_failed_upload_leaves_nothing(instance: Instance, tmp_path: Path, virtual: bool) -> None:
    bad, store = with_store(instance, put_file=["fail"])
    path = write(tmp_path / "a.txt", "bytes")
    with pytest.raises(StorageUnavailable, match="away"):
        artifacts.save(bad, path, key="a.txt", virtual=virtual)
    assert bad.registry.artifacts.count() == 0
    assert bad.registry.tree.resolve("a.txt") is None
    assert [name for name, _ in store.calls if name == "put_file"]
    nothing_owed(bad)
    record = artifacts.save(bad, path, key="a.txt", virtual=virtual)
    assert read(bad, record.uid) == "bytes"
    bad.close()


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_a_failed_replace_leaves_the_old_revision(
    instance: Instance, tmp_path: Path, virtual: bool, suffix: str
) -> None:
    record = artifacts.save(instance, write(tmp_path / "a.txt", "old"), key="d/a.txt", virtual=virtual)
    bad, _ = with_store(instance, put_file=["fail", "fail"])
    new = write(tmp_path / f"b{suffix}", "new bytes")
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            artifacts.replace(bad, record.uid, new)
        now = artifacts.by_uid(bad, record.uid)
        assert (now.revision, now.key, now.suffix) == (record.revision, "d/a.txt", ".txt")
        assert read(bad, record.uid) == "old"
        nothing_owed(bad)
    assert artifacts.replace(bad, record.uid, new).key == f"d/a{suffix}"
    assert read(bad, record.uid) == "new bytes"
    nothing_owed(bad)
    bad.close()


def test_a_lost_reply_is_a_save_all_the_same(instance: Instance, tmp_path: Path) -> None:
    bad, _ = with_store(instance, put_file=["lost", "lost"])
    record = artifacts.save(bad, write(tmp_path / "a.txt", "old"), key="a.txt")
    assert read(bad, record.uid) == "old"
    artifacts.replace(bad, record.uid, write(tmp_path / "b.txt", "new"))
    assert read(bad, record.uid) == "new"
    nothing_owed(bad)
    bad.close()


def test_while_storage_is_away_a_save_stays_undecided_and_is_decided_later(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened_module, "PROVEN_SECONDS", 1e9)
    record = artifacts.save(instance, write(tmp_path / "a.txt", "old"), key="a.txt")
    # The replace reaches storage, its reply does not, and then nothing answers.
    bad, store = with_store(instance, put_file=["lost"])
    bad.prove()  # storage is not asked again whose the lease is
    store.plan["head"] = ["fail"] * 3
    with pytest.raises(StorageUnavailable):
        artifacts.replace(bad, record.uid, write(tmp_path / "b.txt", "new"))
    assert [entry.op for entry in bad.registry.journal.entries()] == ["save"]
    store.plan["head"] = []
    assert read(bad, record.uid) == "old"
    recover.finish_saves(bad)
    recover.run_owed(bad)
    assert read(bad, record.uid) == "new"
    nothing_owed(bad)
    # An undecided save never comes after a later one.
    store.plan.update(put_file=["lost"], head=["fail"] * 3)
    with pytest.raises(StorageUnavailable):
        artifacts.replace(bad, record.uid, write(tmp_path / "c.txt", "undecided"))
    store.plan["head"] = []
    artifacts.replace(bad, record.uid, write(tmp_path / "d.txt", "last"))
    recover.finish_saves(bad)
    assert read(bad, record.uid) == "last"
    nothing_owed(bad)
    bad.close()


def test_a_failed_delete_of_the_stale_object_is_owed(instance: Instance, tmp_path: Path) -> None:
    record = artifacts.save(instance, write(tmp_path / "a.txt", "old"), key="a.txt")
    bad, _ = with_store(instance, delete=["fail"])
    now = artifacts.replace(bad, record.uid, write(tmp_path / "a.csv", "new"))
    assert now.key == "a.csv"
    assert bad.registry.journal.owed() == {"delete": 1}
    recover.run_owed(bad)
    nothing_owed(bad)
    assert not (Path(instance.settings.storage.root) / record.revision.object_key).exists()
    bad.close()


def in_child(function: object, *args: object) -> int:
    """Run in a child process of its own; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)  # type: ignore[operator]
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


STEPS = {
    "before the upload": {"put_file": ["die"]},
    "after the upload": {"put_file": ["die_after"]},
    "before the stale object goes": {"delete": ["die"]},
    "after the stale object went": {"delete": ["die_after"]},
}


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("suffix", [".txt", ".csv"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_during_a_replace(root: Path, tmp_path: Path, step: str, suffix: str, virtual: bool) -> None:
    with Instance.open(SLUG) as first:
        record = artifacts.save(first, write(tmp_path / "a.txt", "old"), key="d/a.txt", virtual=virtual)

    def replace() -> None:
        with Instance.open(SLUG) as opened:
            bad, _ = with_store(opened, **STEPS[step])
            artifacts.replace(bad, record.uid, write(tmp_path / f"b{suffix}", "new bytes"))

    code = in_child(replace)
    dies = "stale" not in step or virtual or suffix == ".csv"
    assert code == (9 if dies else 0)
    with Instance.open(SLUG) as opened:
        # What is there before anything is finished: the old revision, or the new one.
        assert read(opened, record.uid) in ("old", "new bytes")
        recover.finish_all(opened)
        now = artifacts.by_uid(opened, record.uid)
        new = step != "before the upload"
        assert read(opened, record.uid) == ("new bytes" if new else "old")
        assert now.key == (f"d/a{suffix}" if new else "d/a.txt")
        assert now.uid == record.uid
        nothing_owed(opened)
        objects = [item.key for item in opened.store.list() if not item.key.endswith(".lndb")]
        assert [key for key in objects if "_exclusion" not in key] == [now.revision.object_key]


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("step", ["before the upload", "after the upload"])
def test_killed_during_the_first_save(root: Path, tmp_path: Path, step: str, virtual: bool) -> None:
    def save() -> None:
        with Instance.open(SLUG) as opened:
            bad, _ = with_store(opened, **STEPS[step])
            artifacts.save(bad, write(tmp_path / "a.txt", "bytes"), key="d/a.txt", virtual=virtual)

    assert in_child(save) == 9
    with Instance.open(SLUG) as opened:
        assert opened.registry.artifacts.count() == 0
        assert not fsck.check(opened).clean
        assert recover.finish_saves(opened) == (step == "after the upload")
        assert opened.registry.artifacts.count() == (step == "after the upload")
        found = opened.registry.artifacts.by_key("d/a.txt")
        assert found is None or read(opened, found.uid) == "bytes"
        recover.run_owed(opened)
        nothing_owed(opened)


def test_a_dead_save_of_other_bytes_at_its_place_is_undone(root: Path, tmp_path: Path) -> None:
    """The process died before it stored; a foreign object at the real key is neither taken nor removed."""
    (root / "a.txt").write_text("somebody's")

    def save() -> None:
        with Instance.open(SLUG) as opened:
            bad, _ = with_store(opened, put_file=["die"])
            artifacts.save(bad, write(tmp_path / "a.txt", "bytes"), key="a.txt", virtual=False)

    assert in_child(save) == 9
    with Instance.open(SLUG) as opened:
        assert recover.finish_saves(opened) == 0
        recover.run_owed(opened)
        assert (root / "a.txt").read_text() == "somebody's"
        assert opened.registry.journal.entries() == []


def test_a_dead_replace_does_not_come_after_a_later_one(root: Path, tmp_path: Path) -> None:
    with Instance.open(SLUG) as first:
        record = artifacts.save(first, write(tmp_path / "a.txt", "old"), key="a.txt")

    def replace() -> None:
        with Instance.open(SLUG) as opened:
            bad, _ = with_store(opened, put_file=["die_after"])
            artifacts.replace(bad, record.uid, write(tmp_path / "b.txt", "dead"))

    assert in_child(replace) == 9
    with Instance.open(SLUG) as opened:
        artifacts.replace(opened, record.uid, write(tmp_path / "c.txt", "later"))
        recover.finish_all(opened)
        assert read(opened, record.uid) == "later"
        nothing_owed(opened)


def test_killed_between_purge_and_delete(root: Path, tmp_path: Path) -> None:
    with Instance.open(SLUG) as first:
        record = artifacts.save(first, write(tmp_path / "a.txt", "old"), key="a.txt")

    def purge() -> None:
        with Instance.open(SLUG) as opened:
            bad, _ = with_store(opened, delete=["die"])
            artifacts.purge(bad, artifacts.by_uid(bad, record.uid))

    assert in_child(purge) == 9
    assert (root / record.revision.object_key).exists()
    with Instance.open(SLUG) as opened:
        recover.run_owed(opened)
        assert not (root / record.revision.object_key).exists()
        nothing_owed(opened)


# -- puts of mounts that are gone -------------------------------------------------------------------------------------


def dead_mount_writes(key: str, text: str, *, ready: bool, spool: bool = True) -> None:
    """What a mount leaves that is killed after (or before) a file was closed."""

    def work() -> None:
        with Instance.open(SLUG) as opened:
            registry = opened.registry
            inode = registry.tree.resolve(key)
            if inode is None:
                parent, _, name = key.rpartition("/")
                directory = timed(registry).names.ensure_directory(parent, os.getuid(), os.getgid())
                inode, src = timed(registry).names.create_file(directory, name, 0o100644, os.getuid(), os.getgid())
            else:
                src = spool_name(inode.ino)
                timed(registry).journal.begin_put(inode.ino, src)
            make_spool(opened)
            if spool:
                write_spool(opened, src, text)
            if ready:
                timed(registry).journal.ready_put(inode.ino)
            os._exit(9)

    assert in_child(work) == 9


@pytest.mark.parametrize("ready", [True, False])
def test_puts_of_a_dead_mount_are_finished(root: Path, ready: bool) -> None:
    dead_mount_writes("d/a.txt", "from the mount", ready=ready)
    with Instance.open(SLUG) as opened:
        assert not fsck.check(opened).clean
        record = artifacts.find(opened, "d/a.txt")  # the put is finished for it
        assert read(opened, record.uid) == "from the mount"
        nothing_owed(opened)
        assert make_spool(opened).names() == []
    dead_mount_writes("d/a.txt", "second revision", ready=ready)
    with Instance.open(SLUG) as opened:
        assert read(opened, record.uid) == "second revision"
        nothing_owed(opened)


def test_bytes_in_the_spool_come_before_a_replace(root: Path, tmp_path: Path) -> None:
    """A replace by the API is newer than what a dead mount had still to store."""
    with Instance.open(SLUG) as first:
        record = artifacts.save(first, write(tmp_path / "a.txt", "old"), key="a.txt")
    dead_mount_writes("a.txt", "from the mount", ready=True)
    with Instance.open(SLUG) as opened:
        artifacts.replace(opened, record.uid, write(tmp_path / "b.txt", "from the API"))
        recover.finish_all(opened)
        assert read(opened, record.uid) == "from the API"
        nothing_owed(opened)


def test_a_missing_spool_file_is_said_and_the_old_revision_stays(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Instance.open(SLUG) as first:
        record = artifacts.save(first, write(tmp_path / "a.txt", "old"), key="a.txt")
    dead_mount_writes("a.txt", "", ready=True, spool=False)
    with Instance.open(SLUG) as opened:
        assert any("spool: the file" in text for text in fsck.check(opened).problems)
        caplog.clear()
        report = fsck.check(opened, repair=True)
        assert "'a.txt' is as it was stored last: its spool file" in caplog.text
        assert any("bytes of 'a.txt' was missing" in text for text in report.notes)
        assert read(opened, record.uid) == "old"
        nothing_owed(opened)
        assert fsck.check(opened).clean
        assert opened.registry.rescue.lost() == []


def test_cache_asks_a_live_mount(instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = artifacts.save(instance, write(tmp_path / "a.txt", "old"), key="a.txt")
    assert record.ino is not None
    src = spool_name(record.ino)
    timed(instance.registry).journal.begin_put(record.ino, src)
    timed(instance.registry).journal.ready_put(record.ino)
    write_spool(instance, src, "new")
    owner = process_id()
    assert owner is not None
    live = mounts.MountRecord(os.getpid(), owner, "/nowhere", SLUG, "/nowhere.sock", 0)
    monkeypatch.setattr(mounts, "live", lambda settings: [live])
    asked = []

    def request(mount: mounts.MountRecord, command: dict[str, object], **_: object) -> dict[str, object]:
        asked.append(command)
        if command["cmd"] == "sync":
            entry = instance.registry.journal.put_of(record.ino or 0)
            assert entry is not None
            recover.finish_put(instance, make_spool(instance), entry)
        return {"ok": True}

    monkeypatch.setattr(mounts, "request", request)
    assert read(instance, record.uid) == "new"
    assert asked[0] == {"cmd": "sync", "ino": record.ino}


def test_a_save_that_was_just_announced_is_nobody_elses(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread of the process that finishes interrupted saves at this moment must not take it for one: it would
    undo it, and delete its object."""
    others: list[threading.Thread] = []

    def meanwhile(work: Callable[[Instance], Any]) -> None:
        other = threading.Thread(target=work, args=(instance,))
        other.start()
        other.join(0.3)  # it may have to wait for us
        others.append(other)

    announce, put = Commits.announce_save, LocalStore.put_file

    def announce_and_look(self: Commits, *args: Any, **kwargs: Any) -> Any:
        found = announce(self, *args, **kwargs)
        meanwhile(recover.finish_saves)
        return found

    def put_and_look(self: LocalStore, *args: Any, **kwargs: Any) -> Any:
        found = put(self, *args, **kwargs)
        meanwhile(recover.run_owed)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Commits, "announce_save", announce_and_look)
        patch.setattr(LocalStore, "put_file", put_and_look)
        record = artifacts.save(instance, write(tmp_path / "a.txt", "bytes"), key="a.txt")
    for other in others:
        other.join(10)
    assert len(others) == 2
    assert read(instance, record.uid) == "bytes"
    nothing_owed(instance)


def test_a_replace_that_another_program_overtakes_looks_again(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a replace's look at the object and its announcement another program replaces the artifact, in place."""
    record = artifacts.save(instance, write(tmp_path / "a.txt", "old"), key="a.txt", virtual=False)
    find, others = Conflicts.find, iter(["theirs, first", "theirs, again"])

    async def overtaken(*args: Any, **how: Any) -> Any:
        answer = await find(*args, **how)
        text = next(others, None)
        if text is not None:
            with monkeypatch.context() as patch, Instance.open(SLUG) as other:
                patch.setattr(Conflicts, "find", find)
                artifacts.replace(other, record.uid, write(tmp_path / "b.txt", text))
        return answer

    monkeypatch.setattr(Conflicts, "find", overtaken)
    for text in ("mine", "mine, again"):
        artifacts.replace(instance, record.uid, write(tmp_path / "c.txt", text))
        assert read(instance, record.uid) == text
    assert next(others, None) is None
    assert artifacts.by_uid(instance, record.uid).number == 5
    assert instance.registry.artifacts.count() == 1
    nothing_owed(instance)


def test_a_replace_that_is_overtaken_all_the_time_ends(instance: Instance, tmp_path: Path) -> None:
    """Somebody else writes the object just before each try, wherever that goes: all of it is kept."""

    class Overtaking(BadStore):
        def put_file(self, key: str, path: str, **kwargs: Any) -> Any:
            write(Path(self.url(key)), f"somebody's {len(self.calls)}")
            return super().put_file(key, path, **kwargs)

    record = artifacts.save(instance, write(tmp_path / "a.txt", "old"), key="a.txt")
    store = Overtaking(instance.store)
    other = Instance(instance.settings, store=store)  # type: ignore[arg-type]
    with pytest.raises(PreconditionFailed):
        artifacts.replace(other, record.uid, write(tmp_path / "b.txt", "mine"))
    other.close()
    assert len([name for name, _ in store.calls if name == "put_file"]) == saves.TRIES
    assert not instance.registry.journal.saves()
    artifacts.replace(instance, record.uid, tmp_path / "b.txt")
    assert read(instance, record.uid) == "mine"
    assert instance.registry.journal.entries() == []
    stored = [instance.store.get(item.key) for item in instance.store.list(".lamindb/") if "/_" not in item.key]
    assert len([data for data in stored if data.startswith(b"somebody's")]) == saves.TRIES
