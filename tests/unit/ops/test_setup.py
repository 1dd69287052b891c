"""Instances and machines: init, lease, snapshot, connect, close, delete. One data directory is one machine."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from lamfs import config
from lamfs.daemon.recovery import take_over
from lamfs.errors import (
    InvalidArgument,
    LamfsError,
    LeaseLost,
    Locked,
    NotEmpty,
    NotSetUp,
    PreconditionFailed,
    StorageForbidden,
    StorageMissing,
    StorageUnavailable,
    TooLarge,
)
from lamfs.model import instance_id
from lamfs.ops import artifacts, fsck, in_use, lock, mounts, recover, setup, snapshot, spools
from lamfs.ops.instance import Instance
from lamfs.registry import process_id
from lamfs.storage import StorageConfig, open_store
from lamfs.work.steps import Steps
from tests.support.ops import machine, write_spool
from tests.support.timed import timed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def save(slug: str, tmp_path: Path, key: str, text: str) -> str:
    with Instance.open(slug) as opened:
        return artifacts.save(opened, write(tmp_path / "file", text), key=key).uid


def read(slug: str, key: str) -> str:
    with Instance.open(slug) as opened:
        return artifacts.cache(opened, artifacts.find(opened, key)).read_text()


def test_login() -> None:
    told: list[str] = []
    user = setup.login("ada@example.com", say=told.append)
    assert (user.handle, user.email) == ("ada", "ada@example.com")
    assert told == [f"logged in with handle ada, email ada@example.com, uid {user.uid}"]
    setup.login("bob")
    again = setup.login("ada")
    assert again == user
    assert config.current_user() == user
    for bad in ("", "a/b", "-a", "a b", "a" * 65, "ä"):
        with pytest.raises(InvalidArgument):
            setup.login(bad)


def test_init_makes_private_files_of_known_names(root: Path) -> None:
    setup.login("testuser1")
    settings = setup.init(str(root.with_name("test-add-replace-stage")))
    assert settings.slug == "testuser1/test-add-replace-stage"
    assert settings.id.hex == "0102f680066a569da6f32766b07a9f5d"
    assert config.current_slug() == settings.slug
    for variable in ("LAMFS_CONFIG_DIR", "LAMFS_DATA_DIR"):
        folder = Path(os.environ[variable])
        for path in [folder, *folder.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    with Instance.open() as opened:
        assert snapshot.exists(opened)
        assert opened.registry.db.get_meta("slug") == settings.slug
        state = opened.lease().peek()
        assert state is not None
        assert (state.handle, state.machine) == ("testuser1", config.machine_token())
        assert not snapshot.push(opened)  # nothing has changed since
        assert fsck.check(opened).problems == []


def test_init_twice_is_connect_and_another_storage_is_refused(root: Path, tmp_path: Path) -> None:
    first = setup.init(str(root), "name")
    uid = save(first.slug, tmp_path, "a.txt", "a")
    assert setup.init(str(root), "name") == first
    with Instance.open(first.slug) as opened:
        assert artifacts.find(opened, "a.txt").uid == uid
    with pytest.raises(InvalidArgument, match="exists with the storage"):
        setup.init(str(tmp_path / "other"), "name")
    for bad in ("gs://bucket", "/", "", "s3://"):
        with pytest.raises(InvalidArgument):
            setup.init(bad, "another")


def test_a_folder_that_cannot_be_written_is_said_at_init(tmp_path: Path) -> None:
    with pytest.raises(StorageForbidden, match=r"/proc/lamfs cannot be made"):
        setup.init("/proc/lamfs", "name")


def test_the_default_instance(tmp_path: Path) -> None:
    settings = setup.ensure_default()
    assert settings.slug == f"{config.current_user().handle}/default"
    assert settings.storage.root == str(config.data_dir() / "storage")
    assert setup.ensure_default() == settings


# -- two machines -----------------------------------------------------------------------------------------------------


def test_another_machine_waits_for_close_and_then_has_everything(root: Path, tmp_path: Path) -> None:
    setup.login("ada")
    slug = setup.init(str(root), "shared").slug
    uid = save(slug, tmp_path, "a.txt", "from one")
    with machine(tmp_path / "two"):
        setup.login("bob")
        with pytest.raises(Locked, match=r"'ada/shared' is locked by ada on .* run 'lamfs close' there"):
            setup.connect(str(root))
        assert config.list_instances() == []
    told: list[str] = []
    setup.close(slug, say=told.append)
    assert told == [f"updating & unlocking cloud SQLite '{root}/{instance_id(slug).hex}.lndb' of instance '{slug}'"]
    assert config.current_slug() is None
    with machine(tmp_path / "two"):
        assert setup.connect(str(root)).slug == slug
        assert read(slug, "a.txt") == "from one"
        save(slug, tmp_path, "b.txt", "from two")
        with Instance.open(slug) as opened:
            assert artifacts.find(opened, "a.txt").uid == uid
    with Instance.open(slug) as opened, pytest.raises(Locked, match="locked by bob"):
        artifacts.save(opened, write(tmp_path / "file", "x"), key="c.txt")
    with machine(tmp_path / "two"):
        setup.close(slug)
    # What the other machine pushed is taken over before anything is changed here.
    save(slug, tmp_path, "c.txt", "from one again")
    with Instance.open(slug) as opened:
        assert sorted(record.key or "" for record in opened.registry.artifacts.filter()) == ["a.txt", "b.txt", "c.txt"]
        assert fsck.check(opened, data=True).problems == []
    setup.connect(slug)
    setup.close(slug)


def expire(slug: str) -> None:
    """The lease runs out."""
    with Instance.open(slug) as opened:
        lease = opened.lease()
        body = json.loads(opened.store.get(lease.key))
        del body["seconds"]  # as in locks of older versions, of which this is all that is known
        body["until"] = 1.0
        opened.store.put_bytes(lease.key, json.dumps(body).encode())


def test_a_lease_that_ran_out_is_taken_over_and_the_old_holder_must_decide(root: Path, tmp_path: Path) -> None:
    slug = setup.init(str(root), "shared", "team").slug
    save(slug, tmp_path, "lost.txt", "never pushed")
    expire(slug)
    with machine(tmp_path / "two"):
        setup.connect("team/shared", storage=str(root))
        save(slug, tmp_path, "b.txt", "from two")
        setup.close(slug)
    os.unlink(config.load_instance(slug).directory / "lease.json")
    with Instance.open(slug) as opened:
        with pytest.raises(Locked, match=r"changed on another machine, and here as well.*lamfs connect team/shared"):
            artifacts.save(opened, write(tmp_path / "file", "x"), key="c.txt")
        assert opened.lease().peek() is None
    setup.connect(slug, restore=True)
    assert read(slug, "b.txt") == "from two"
    with Instance.open(slug) as opened:
        assert [record.key for record in opened.registry.artifacts.filter()] == ["b.txt"]
    assert list(config.load_instance(slug).directory.glob("registry.2*.lndb"))


def test_restore_replaces_a_damaged_registry(root: Path, tmp_path: Path) -> None:
    settings = setup.init(str(root), "shared")
    save(settings.slug, tmp_path, "a.txt", "a")
    with Instance.open(settings.slug) as opened:
        snapshot.push(opened)
    settings.registry_path.write_bytes(b"damaged" * 1000)
    setup.connect(settings.slug, restore=True)
    assert read(settings.slug, "a.txt") == "a"


def test_several_instances_in_one_storage(root: Path, tmp_path: Path) -> None:
    one = setup.init(str(root), "one", "team")
    two = setup.init(str(root), "two", "team")
    save("team/one", tmp_path, "a.txt", "1")
    save("team/two", tmp_path, "a.txt", "2")
    for name in ("one", "two"):
        with Instance.open(f"team/{name}") as opened:
            # The objects of the other are not called stray, and not repaired away.
            assert fsck.check(opened, repair=True).problems == []
    assert (read("team/one", "a.txt"), read("team/two", "a.txt")) == ("1", "2")
    setup.close("team/one")
    setup.close("team/two")
    with machine(tmp_path / "two"):
        with pytest.raises(InvalidArgument, match="holds the instances team/one, team/two"):
            setup.connect(str(root))
        assert setup.connect("team/two", storage=str(root)).id == two.id
        with pytest.raises(NotSetUp, match="no registry"):
            setup.connect("team/three", storage=str(root))
    assert one.id != two.id
    with pytest.raises(NotSetUp, match="no registry in"):
        setup.connect(str(write(tmp_path / "x", "").parent))


def test_names(root: Path, tmp_path: Path) -> None:
    setup.login("ada")
    setup.init(str(root), "mine", "bob")
    assert config.load_instance("mine").slug == "bob/mine"
    setup.init(str(tmp_path / "other"), "mine")
    assert config.load_instance("mine").slug == "ada/mine"
    assert [known.slug for known in config.list_instances()] == ["ada/mine", "bob/mine"]
    with pytest.raises(NotSetUp, match="'lamfs instances' lists them"):
        config.load_instance("ada/nothing")


# -- the lease --------------------------------------------------------------------------------------------------------


def pass_time(monkeypatch: pytest.MonkeyPatch, lease: lock.Lease, seconds: float) -> None:
    """To ``lease``, every lock was written so many seconds before it was."""
    age = lock.Lease._age
    monkeypatch.setattr(lease, "_age", lambda found: age(lease, found) + seconds)


def a_lease(root: Path, who: str) -> lock.Lease:
    root.mkdir(exist_ok=True)
    store = open_store(StorageConfig(str(root)))
    return lock.Lease(store, instance_id("a/b"), lock.Holder(who, "host", f"machine of {who}"), slug="a/b")


def test_one_of_many_gets_the_lease(root: Path) -> None:
    results: list[str] = []
    barrier = threading.Barrier(8)

    def run(who: str) -> None:
        lease = a_lease(root, who)
        barrier.wait()
        try:
            lease.acquire()
            results.append(who)
        except Locked:
            pass

    threads = [threading.Thread(target=run, args=(f"user{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1
    state = a_lease(root, "x").peek()
    assert state is not None
    assert state.handle == results[0]


def test_lease_renewed_released_and_taken_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ada, bob = a_lease(root, "ada"), a_lease(root, "bob")
    first, ours = ada.acquire()
    assert not ours
    again, ours = ada.acquire()
    assert ours
    assert (again.since, again.token != first.token, again.until >= first.until) == (first.since, True, True)
    bob.release()  # not bob's: nothing happens
    with pytest.raises(Locked):
        bob.acquire()
    with monkeypatch.context() as patched:
        # A clock that is wrong steals no lease.
        patched.setattr(lock.time, "time", lambda: again.until + 1000)
        with pytest.raises(Locked):
            bob.acquire()
    pass_time(monkeypatch, bob, lock.LEASE_SECONDS)
    with pytest.raises(Locked):
        bob.acquire()
    pass_time(monkeypatch, bob, lock.LEASE_SECONDS + lock.MARGIN)
    taken = bob.acquire()[0]
    assert (taken.handle, taken.fence) == ("bob", again.fence + 1)
    with pytest.raises(Locked):
        ada.acquire()
    with pytest.raises(LeaseLost, match="bob on host has it now"):
        ada.renew(again.fence, 60)
    with pytest.raises(LeaseLost):
        ada.prove(again.fence, ada.etag)
    bob.prove(taken.fence, bob.etag)
    bob.release()
    assert ada.peek() is None
    with pytest.raises(LeaseLost, match="nobody has it now"):
        bob.prove(taken.fence, bob.etag)
    back = ada.acquire()[0]
    assert (back.handle, back.fence) == ("ada", taken.fence + 1)
    with pytest.raises(LeaseLost, match="has taken it anew"):
        ada.renew(again.fence, 60)
    assert not list(root.glob(".lamindb/_exclusion/*.*"))


def test_a_takeover_that_loses_the_race(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking at a lease that ran out and taking it, somebody else takes it."""
    bob = a_lease(root, "bob")
    eve = a_lease(root, "eve")
    store = bob._store
    put = store.put_bytes

    def put_late(key: str, data: bytes, **conditions: object) -> object:
        monkeypatch.setattr(store, "put_bytes", put)
        eve.acquire()
        with pytest.raises(PreconditionFailed):
            put(key, data, **conditions)  # type: ignore[arg-type]
        raise PreconditionFailed("late")

    monkeypatch.setattr(store, "put_bytes", put_late)
    with pytest.raises(Locked, match="locked by eve"):
        bob.acquire()


def test_a_damaged_lock_counts_as_run_out(root: Path) -> None:
    lease = a_lease(root, "ada")
    lease._store.put_bytes(lease.key, b"\0\xff no JSON")
    assert lease.acquire()[0].handle == "ada"


def test_the_lease_is_renewed_by_the_next_change_after_an_hour(root: Path, tmp_path: Path) -> None:
    settings = setup.init(str(root), "a")
    path = settings.directory / "lease.json"
    before = path.read_text()
    save(settings.slug, tmp_path, "a.txt", "a")
    assert path.read_text() == before
    data = json.loads(before)
    for changes in ({"at": data["at"] - lock.RENEW_AFTER - 1}, {"at": data["at"] + 1000}, {"boot": "an earlier one"}):
        config.write_json(path, data | changes)
        save(settings.slug, tmp_path, "b.txt", str(changes))
        assert json.loads(path.read_text())["at"] > data["at"]
        assert json.loads(path.read_text())["boot"] == data["boot"]


def test_where_another_instance_was_wanted_and_refused_no_default_one_is_made(root: Path, tmp_path: Path) -> None:
    with machine(tmp_path / "one"):
        setup.login("ada")
        setup.init(str(root), "screens")
    setup.login("bob")
    with pytest.raises(Locked):
        setup.connect(str(root))
    with pytest.raises(NotSetUp, match=f"'lamfs connect ada/screens --storage {root}' was refused"):
        setup.ensure_default()
    assert config.list_instances() == []
    with machine(tmp_path / "one"):
        setup.close("ada/screens")
    setup.connect("ada/screens", storage=str(root))
    setup.close("ada/screens")
    assert setup.ensure_default().slug == "bob/default"


# -- refusals ---------------------------------------------------------------------------------------------------------


def fake_mount(slug: str, mountpoint: str) -> Path:
    settings = config.load_instance(slug)
    owner = process_id()
    assert owner is not None
    record = mounts.MountRecord(os.getpid(), owner, mountpoint, slug, "/nowhere.sock", 1)
    return mounts.write(settings.mounts_dir, record)


def test_a_mounted_instance_is_neither_closed_nor_deleted(root: Path) -> None:
    slug = setup.init(str(root), "a").slug
    record = fake_mount(slug, "/mnt/somewhere")
    for refused in (lambda: setup.close(slug), lambda: setup.delete(slug, force=True)):
        with pytest.raises(Locked, match=r"mounted at /mnt/somewhere.*lamfs umount"):
            refused()
    record.unlink()
    setup.delete(slug)
    assert config.current_slug() is None


def test_what_is_in_use_is_not_deleted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_use, "ALONE_SECONDS", 0.0)
    slug = setup.init(str(root), "a").slug
    with Instance.open(slug):
        with pytest.raises(Locked, match="in use by another program"):
            setup.delete(slug)
    assert [known.slug for known in config.list_instances()] == [slug]
    setup.delete(slug)


def test_delete_counts_the_trash_and_leaves_foreign_objects(root: Path, tmp_path: Path) -> None:
    settings = setup.init(str(root), "a")
    slug = settings.slug
    save(slug, tmp_path, "a.txt", "a")
    (root / "foreign.txt").write_text("not lamfs's")
    with Instance.open(slug) as opened:
        record = artifacts.trash(opened, artifacts.find(opened, "a.txt"))
        path = artifacts.cache(opened, record)
    with pytest.raises(NotEmpty, match="1 artifact"):
        setup.delete(slug)
    told: list[str] = []
    setup.delete(slug, force=True, say=told.append)
    assert told[0].startswith(f"the objects of 1 artifact remain in {root}, not referenced via an artifact; ")
    assert (root / record.revision.object_key).read_text() == "a"
    assert (root / "foreign.txt").exists()
    assert not path.exists()
    assert not settings.directory.exists()
    assert not list(root.glob("*.lndb"))
    assert not list((root / ".lamindb").glob("_exclusion/*"))


def test_processes_beside_each_other(root: Path, tmp_path: Path) -> None:
    """Many programs save into one registry at once: nobody is locked out, nothing is lost."""
    slug = setup.init(str(root), "a").slug
    code = (
        "import sys, pathlib\n"
        "from lamfs.ops import artifacts\n"
        "from lamfs.ops.instance import Instance\n"
        "folder, slug, who = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
        "with Instance.open(slug) as opened:\n"
        "    for n in range(15):\n"
        "        path = folder / f'{who}-{n}'\n"
        "        path.write_text(f'{who} {n}')\n"
        "        artifacts.save(opened, path, key=f'd{n % 3}/{who}-{n}')\n"
        "        if n == 7:\n"
        "            artifacts.replace(opened, artifacts.find(opened, 'shared').uid, path)\n"
    )
    uid = save(slug, tmp_path, "shared", "x")
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), slug, who], stderr=subprocess.PIPE, text=True)
        for who in ("p", "q", "r", "s")
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, errors
    with Instance.open(slug) as opened:
        assert opened.registry.artifacts.count() == 61
        assert artifacts.find(opened, "shared").uid == uid
        report = fsck.check(opened, data=True)
        assert (report.problems, report.repaired) == ([], [])
        assert opened.registry.journal.entries() == []
    assert read(slug, "shared") in {f"{who} 7" for who in "pqrs"}


def test_a_folder_in_the_place_of_the_storage_is_not_written_to(root: Path, tmp_path: Path) -> None:
    """The storage's disk is not mounted: an empty folder lies there."""
    settings = setup.init(str(root), name="one")
    save(settings.slug, tmp_path, "a", "one")
    away = tmp_path / "away"
    root.rename(away)
    root.mkdir()
    with pytest.raises(StorageMissing, match="Mount its disk"):
        save(settings.slug, tmp_path, "b", "two")
    assert list(root.rglob("*")) == []
    root.rmdir()
    away.rename(root)
    save(settings.slug, tmp_path, "b", "two")
    assert read(settings.slug, "b") == "two"


# -- what storage does not have ---------------------------------------------------------------------------------------


def owe(slug: str, key: str, text: str, *, scratch: bool = False) -> Path:
    """A new file that a mount which was killed has left in this machine's spool: its path there."""
    with Instance.open(slug) as opened:
        inode, src = timed(opened.registry).names.create_file(1, key, 0o100644, 0, 0)
        timed(opened.registry).journal.ready_put(inode.ino, scratch=scratch)
        opened.registry.db.execute("UPDATE journal SET owner='x:1:1' WHERE src=?", (src,))
        opened.registry.tree.update(inode.ino, size=len(text))
        return write_spool(opened, src, text)


def refuse_to_store(monkeypatch: pytest.MonkeyPatch, error: LamfsError) -> None:
    async def refuse(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(Steps, "put", refuse)


def put_aside_in(directory: Path) -> list[str]:
    """First words of what was put aside; a work database goes with its registry."""
    return sorted(path.name.partition(".")[0] for path in directory.iterdir() if ".work.db" not in path.name)


def test_delete_stores_first_what_is_owed(root: Path, tmp_path: Path) -> None:
    slug = setup.init(str(root), "a").slug
    save(slug, tmp_path, "a.txt", "a")
    path = owe(slug, "b.txt", "only here")
    with pytest.raises(NotEmpty):
        setup.delete(slug)
    assert path.read_text() == "only here"
    told: list[str] = []
    setup.delete(slug, force=True, say=told.append)
    stored = sorted(file.read_text() for file in (root / ".lamindb").iterdir() if file.is_file())
    assert stored == ["a", "only here"]
    assert told[0].startswith(f"the objects of 2 artifacts remain in {root}, not referenced via an artifact; ")


def test_what_delete_cannot_store_stays_in_the_spool_and_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = setup.init(str(root), "a")
    slug = settings.slug
    save(slug, tmp_path, "a.txt", "a")
    path = owe(slug, "b.txt", "only here")
    scratch = owe(slug, ".b.swp", "scratch", scratch=True)
    told: list[str] = []
    with monkeypatch.context() as patch:
        refuse_to_store(patch, StorageForbidden("no."))
        setup.delete(slug, force=True, say=told.append)
    assert (path.read_text(), scratch.read_text()) == ("only here", "scratch")
    said = "\n".join(told)
    assert f"the bytes of 2 files that are not in storage are left in {path.parent}" in said
    assert f"'b.txt' (9 bytes): {path}" in said
    assert f"'.b.swp' (7 bytes): {scratch}" in said
    assert f"the objects of 1 artifact remain in {root}" in said
    assert put_aside_in(settings.directory) == ["registry"]
    assert [known.slug for known in config.list_instances()] == []
    # A new instance of this name has them: its first mount finds them, and knows what they were.
    setup.init(str(root), "a", new=True)
    with Instance.open(slug) as opened:
        with spools.make(opened.settings, opened.registry) as spool:
            take_over(opened, spool)
        recover.finish_all(opened)
        found = {str(one.key): artifacts.cache(opened, one).read_text() for one in opened.registry.artifacts.filter()}
    assert sorted(found.values()) == ["only here", "scratch"]
    assert any("/b (" in key for key in found)


def test_a_delete_while_storage_is_away_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slug = setup.init(str(root), "a").slug
    path = owe(slug, "b.txt", "only here")
    with monkeypatch.context() as patch:
        refuse_to_store(patch, StorageUnavailable("It is away; try again."))
        with pytest.raises(StorageUnavailable):
            setup.delete(slug, force=True)
    assert path.read_text() == "only here"
    setup.close(slug)
    assert read(slug, "b.txt") == "only here"


def test_scratch_files_with_bytes_are_not_deleted_silently(root: Path) -> None:
    settings = setup.init(str(root), "a")
    path = owe(settings.slug, ".b.swp", "x", scratch=True)
    with pytest.raises(
        NotEmpty, match=r"'\.b\.swp' is on this machine only, with 1 byte: 'lamfs scratch' lists such names.*--force"
    ):
        setup.delete(settings.slug)
    told: list[str] = []
    setup.delete(settings.slug, force=True, say=told.append)
    assert path.read_text() == "x"
    assert any(str(path) in text for text in told)


def test_a_spool_of_a_registry_that_cannot_be_read_is_left(root: Path) -> None:
    settings = setup.init(str(root), "a")
    path = owe(settings.slug, "b.txt", "only here")
    settings.registry_path.write_bytes(b"rubbish")
    for suffix in ("-wal", "-shm"):
        Path(f"{settings.registry_path}{suffix}").unlink(missing_ok=True)
    told: list[str] = []
    setup.delete(settings.slug, force=True, say=told.append)
    assert path.read_text() == "only here"
    assert any(str(path) in text for text in told)
    assert put_aside_in(settings.directory) == ["registry"]


def test_the_bytes_of_a_bucket_s_instance_stay_in_the_data_directory(
    seaweed_config: StorageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = seaweed_config
    settings = setup.init(
        where.root, "a", endpoint_url=where.endpoint_url, region=where.region, path_style=where.path_style
    )
    path = owe(settings.slug, "b.txt", "only here")
    (settings.directory / "spool.20250101T000000.abcd").mkdir()
    told: list[str] = []
    with monkeypatch.context() as patch:
        refuse_to_store(patch, TooLarge("It is too large."))
        setup.delete(settings.slug, force=True, say=told.append)
    assert path.read_text() == "only here"
    assert any(str(path) in text for text in told)
    assert put_aside_in(settings.directory) == ["registry", "spool"]
    # What storage takes is stored, and nothing stays here.
    settings = setup.init(
        where.root, "c", endpoint_url=where.endpoint_url, region=where.region, path_style=where.path_style, new=True
    )
    owe(settings.slug, "b.txt", "only here, too")
    setup.delete(settings.slug, force=True)
    assert not settings.directory.exists()
    with contextlib.closing(open_store(where)) as store:
        assert b"only here, too" in {store.get(one.key, length=one.size) for one in store.list()}
