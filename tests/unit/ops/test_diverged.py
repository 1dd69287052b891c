"""Two machines went on with one instance: the registry of one is used, and what only the other has is kept."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lamfs import config
from lamfs.errors import LamfsError, LeaseLost
from lamfs.model import ROOT_INO, ArtifactRecord, Revision, new_uid
from lamfs.ops import artifacts, diverged, fsck, held, lock, recover, setup, snapshot, working_copy
from lamfs.ops import opened as opened_module
from lamfs.ops.instance import Instance
from lamfs.registry import Registry
from lamfs.storage import StorageConfig, open_store
from lamfs.work import direct
from tests.support.ops import machine, write_spool
from tests.support.timed import timed

SLUG = "ada/shared"


def save(tmp_path: Path, key: str, text: str) -> str:
    (tmp_path / "file").write_text(text)
    with Instance.open(SLUG) as opened:
        return artifacts.save(opened, tmp_path / "file", key=key).uid


def read(key: str) -> str:
    with Instance.open(SLUG) as opened:
        return artifacts.cache(opened, artifacts.find(opened, key)).read_text()


def keys() -> list[str]:
    with Instance.open(SLUG) as opened:
        return sorted(record.key or "" for record in opened.registry.artifacts.filter())


def run_out(root: Path) -> None:
    """The lease has run out: its lock is one of an older version, of 1970."""
    store = open_store(StorageConfig(str(root)))
    lease = lock.Lease(store, config.load_instance(SLUG).id, lock.Holder("", "", ""))
    state = lease.peek()
    assert state is not None
    body = lock.json.dumps(state._replace(seconds=0.0, until=1.0)._asdict()).encode()
    store.put_bytes(lease.key, body)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A storage that two machines went on with. This one is the first, and was overtaken."""
    root = tmp_path / "store"
    setup.login("ada")
    setup.init(str(root), "shared")
    save(tmp_path, "common.txt", "both")
    save(tmp_path, "twice.txt", "first")
    with Instance.open(SLUG) as opened:
        snapshot.push(opened)
    save(tmp_path, "mine.txt", "only here")
    save(tmp_path, "twice.txt", "second, from here")
    run_out(root)
    with machine(tmp_path / "two"):
        setup.login("ada")
        setup.connect(str(root))
        save(tmp_path, "theirs.txt", "of the other one")
        setup.close(SLUG)
    return root


def test_an_overtaken_machine_changes_nothing_in_storage(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened_module, "PROVEN_SECONDS", 0.0)
    registry = root / f"{config.load_instance(SLUG).id.hex}.lndb"
    before, number = registry.read_bytes(), registry.stat().st_ino
    with Instance.open(SLUG) as opened:
        record = artifacts.find(opened, "common.txt")
        with pytest.raises(LeaseLost, match="has lost the lock of 'ada/shared'"):
            artifacts.purge(opened, record)
    assert (root / record.revision.object_key).read_text() == "both"
    with pytest.raises(LamfsError):
        setup.close(SLUG)
    assert (registry.read_bytes(), registry.stat().st_ino) == (before, number)
    with Instance.open(SLUG) as opened, pytest.raises(LeaseLost):
        snapshot.push(opened)
    assert (registry.read_bytes(), registry.stat().st_ino) == (before, number)


def check(root: Path) -> None:
    """The other machine's registry is used, and everything of this one has a name."""
    found = keys()
    assert {"common.txt", "theirs.txt", "twice.txt"} <= set(found)
    (mine,) = (key for key in found if key.endswith("/mine.txt"))
    assert mine.startswith("lost+found/")
    assert (read(mine), read("theirs.txt"), read("twice.txt")) == ("only here", "of the other one", "second, from here")
    with Instance.open(SLUG) as opened:
        assert fsck.check(opened, data=True).problems == []
    settings = config.load_instance(SLUG)
    kept = diverged.known(settings)
    assert len(kept) == 1
    assert len(kept[0]["brought_back"]) == 2
    assert kept[0]["left"] == []
    working_copy.keep_newest(settings.directory, snapshot.OVERTAKEN)
    old = Registry(Path(kept[0]["registry"]))
    assert old.artifacts.by_key("mine.txt") is not None
    old.close()
    setup.close(SLUG)


def test_what_another_machine_has_stored_and_did_not_live_to_tell_is_kept(tmp_path: Path) -> None:
    """A put had begun here before another machine took over, replaced the same object, and died: its registry was never
    stored, so nothing but the object tells of it."""
    root = tmp_path / "store"
    setup.login("ada")
    setup.init(str(root), "shared")
    save(tmp_path, "a.txt", "first")
    with Instance.open(SLUG) as opened:
        snapshot.push(opened)
        registry, record = opened.registry, artifacts.find(opened, "a.txt")
        assert record.ino is not None
        timed(registry).journal.begin_put(record.ino, "5-aaaaaaaaaaaa")
        timed(registry).journal.ready_put(record.ino)
        entry = registry.journal.put_of(record.ino)
        assert entry is not None
        assert registry.journal.claim_target(entry.id, record.revision.object_key)
        registry.db.execute("UPDATE journal SET owner='x:1:1' WHERE id=?", (entry.id,))
        registry.tree.update(record.ino, size=4)
        write_spool(opened, "5-aaaaaaaaaaaa", "mine")
    run_out(root)
    with machine(tmp_path / "two"):
        setup.login("ada")
        setup.connect(str(root))
        save(tmp_path, "a.txt", "theirs")
    run_out(root)
    setup.connect(SLUG)
    with Instance.open(SLUG) as opened:
        for _ in range(4):
            recover.finish_all(opened)
    (beside,) = [key for key in keys() if key != "a.txt"]
    assert (read("a.txt"), read(beside)) == ("theirs", "mine")


@pytest.mark.parametrize("deleted", [False, True])
def test_an_object_of_another_machine_is_not_deleted_for_what_a_put_may_have_left(
    tmp_path: Path, deleted: bool
) -> None:
    """A put had begun here, of a file that was renamed or deleted, before or after another machine stored something at
    its place and died, with its registry not stored."""
    root = tmp_path / "store"
    setup.login("ada")
    setup.init(str(root), "shared")
    save(tmp_path, "a.txt", "first")
    with Instance.open(SLUG) as opened:
        snapshot.push(opened)
        registry = opened.registry
        if deleted:
            inode, _ = timed(registry).names.create_file(ROOT_INO, "x.txt", 0o100644, 0, 0, key_is_virtual=False)
            timed(registry).journal.ready_put(inode.ino)
            entry = registry.journal.put_of(inode.ino)
            assert entry is not None
            assert registry.journal.claim_target(entry.id, "x.txt")
        else:
            timed(registry).journal.add_delete("x.txt")
        registry.db.execute("UPDATE journal SET owner='x:1:1'")
    run_out(root)
    with machine(tmp_path / "two"):
        setup.login("ada")
        setup.connect(str(root))
        (tmp_path / "theirs").write_text("theirs")
        with Instance.open(SLUG) as opened:
            artifacts.save(opened, tmp_path / "theirs", key="x.txt", virtual=False)
    assert (root / "x.txt").read_text() == "theirs"
    run_out(root)
    setup.connect(SLUG)
    with Instance.open(SLUG) as opened:
        if deleted:
            opened.registry.db.execute("UPDATE journal SET owner=?", (opened.registry.journal.owner,))
            timed(opened.registry).names.unlink(ROOT_INO, "x.txt")
        for _ in range(4):
            recover.finish_all(opened)
        assert not opened.registry.journal.owed()
    assert (root / "x.txt").read_text() == "theirs"


def test_what_only_this_machine_has_is_kept(root: Path) -> None:
    setup.connect(SLUG)
    with Instance.open(SLUG) as opened:
        recover.finish_all(opened)
    check(root)


@pytest.mark.parametrize("theirs", ["theirs", "mine"], ids=["other bytes", "the same bytes"])
def test_what_this_machine_wrote_into_an_object_that_another_one_names_is_kept(
    root: Path, tmp_path: Path, theirs: str
) -> None:
    """It was on its way when the lease was lost, and arrived after the other machine had stored a file of that key."""
    (tmp_path / "theirs").write_text(theirs)
    with machine(tmp_path / "two"):
        setup.connect(str(root))
        with Instance.open(SLUG) as opened:
            other = artifacts.save(opened, tmp_path / "theirs", key="x.txt", virtual=False)
        setup.close(SLUG)
    (tmp_path / "mine").write_text("mine")
    with Instance.open(SLUG) as opened:
        opened.store.put_file("x.txt", str(tmp_path / "mine"))
        content, etag = direct.hash_object(opened.store, "x.txt")
        assert etag != other.revision.etag
        mine = ArtifactRecord(
            uid=new_uid(), key="x.txt", suffix=".txt", revision=Revision(content, "x.txt", etag), key_is_virtual=False
        )
        timed(opened.registry).commits.save(0, mine, etag, mode=0o644, uid=os.getuid(), gid=os.getgid())
    setup.connect(SLUG)
    (kept,) = diverged.known(config.load_instance(SLUG))
    if theirs == "mine":
        assert read("x.txt") == "mine"
        return
    (place,) = [key for key in keys() if key.startswith("lost+found/") and key.endswith("/x.txt")]
    assert read(place) == "mine"
    assert any(place in text for text in kept["brought_back"])
    assert any(f"'x.txt' (uid {other.uid})" in text for text in kept["left"])
    with Instance.open(SLUG) as opened:
        for _ in range(3):
            recover.finish_all(opened)
        assert any("'x.txt' is gone" in text for text in fsck.check(opened, repair=True).problems)
    assert read(place) == "mine"


@pytest.mark.parametrize(
    ("owner", "name"),
    [(snapshot, "catch_up"), (snapshot, "fetch"), (diverged, "bring_back"), (working_copy, "put_aside"),
     (working_copy, "fsync_folder"), (held, "write")],
)  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_in_a_take_over_is_gone_on_from(root: Path, owner: object, name: str, when: str) -> None:
    function = getattr(owner, name)

    def killed(*args: object, **named: object) -> None:
        if when == "after":
            function(*args, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            setattr(owner, name, killed)
            setup.connect(SLUG)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    setup.connect(SLUG)
    found = keys()
    assert [key for key in found if key.endswith("/mine.txt")]
    assert read("theirs.txt") == "of the other one"
    setup.close(SLUG)
    with Instance.open(SLUG) as opened:
        assert fsck.check(opened, data=True).problems == []
