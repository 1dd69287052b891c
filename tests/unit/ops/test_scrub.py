"""Reading all of storage: found damage stays known, and an interrupted round goes on where it was."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.errors import Locked, StorageUnavailable
from lamfs.model import BLOCK_SIZE, ArtifactRecord, now_ns
from lamfs.ops import artifacts, damage, fsck, scrub, setup
from lamfs.ops.instance import Instance
from lamfs.storage import open_store
from lamfs.storage.base import UnfinishedUpload
from tests.support.ops import BadStore
from tests.support.timed import timed
from tests.support.transfer import make_bytes

BLOCKS = 5


class CountingStore(BadStore):
    """Counts which blocks are read; some objects cannot be; has unfinished uploads."""

    def __init__(self, store: object) -> None:
        super().__init__(store)  # type: ignore[arg-type]
        self.reads: Counter[tuple[str, int]] = Counter()
        self.away: set[str] = set()
        self.unfinished: list[UnfinishedUpload] = []
        self.busy = self.most = 0
        self._lock = threading.Lock()

    def get_view(self, key: str, view: memoryview, *, offset: int, etag: str | None = None) -> None:
        with self._lock:
            if not key.endswith(".lndb"):  # fsck looks at the registry's copy too
                self.reads[key, offset // BLOCK_SIZE] += 1
            self.busy += 1
            self.most = max(self.most, self.busy)
        try:
            if key in self.away:
                raise StorageUnavailable("The storage is away; try again.")
            self._store.get_view(key, view, offset=offset, etag=etag)
        finally:
            with self._lock:
                self.busy -= 1

    def uploads(self) -> Iterator[UnfinishedUpload]:
        return iter(self.unfinished)

    def abort_upload(self, key: str, upload_id: str) -> None:
        [found] = [upload for upload in self.unfinished if (upload.key, upload.id) == (key, upload_id)]
        self.unfinished.remove(found)


class Interrupting:
    """A watcher that interrupts after so many blocks."""

    def __init__(self, blocks: int = 1000) -> None:
        self.left = blocks
        self.began: tuple[int, int] | None = None
        self.told = 0

    def begin(self, done: int, total: int) -> None:
        self.began = (done, total)

    def add(self, count: int) -> None:
        self.told += count
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    settings = setup.init(str(tmp_path / "store"), "a")
    with Instance.open(settings.slug) as opened:
        pass
    with Instance(opened.settings, store=CountingStore(open_store(opened.settings.storage))) as opened:  # type: ignore[arg-type]
        yield opened


def store_of(instance: Instance) -> CountingStore:
    store = instance.store
    assert isinstance(store, CountingStore)
    return store


def save(instance: Instance, tmp_path: Path, key: str, data: bytes) -> ArtifactRecord:
    path = tmp_path / "file"
    path.write_bytes(data)
    return artifacts.save(instance, path, key=key)


def rot(instance: Instance, record: ArtifactRecord, block: int) -> None:
    """Change a byte of an object, and nothing that ``stat`` shows."""
    path = Path(instance.settings.storage.root) / record.revision.object_key
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(block * BLOCK_SIZE)
        byte = stream.read(1)
        stream.seek(block * BLOCK_SIZE)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_interrupted_round_goes_on_where_it_was(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "CHECKPOINT_BLOCKS", 2)
    monkeypatch.setattr("lamfs.pool.GRACE_SECONDS", 10.0)
    big = save(instance, tmp_path, "big", make_bytes(BLOCKS * BLOCK_SIZE))
    records = [save(instance, tmp_path, f"d/{number}", b"%d" % number) for number in range(6)]
    records.append(save(instance, tmp_path, "empty", b""))
    reads = store_of(instance).reads
    with pytest.raises(KeyboardInterrupt):
        fsck.check(instance, data=True, jobs=1, watcher=Interrupting(4))
    reads.clear()
    changed = artifacts.replace(instance, big.uid, _file(tmp_path, make_bytes(3 * BLOCK_SIZE, 2)))
    with pytest.raises(KeyboardInterrupt):
        fsck.check(instance, data=True, jobs=1, watcher=Interrupting(3 + 2))
    assert min(reads[changed.revision.object_key, block] for block in range(3)) == 1, "it has changed since"
    reads.clear()
    watcher = Interrupting()
    report = fsck.check(instance, data=True, jobs=3, watcher=watcher)
    assert report.problems == []
    assert [note for note in report.notes if "earlier check" in note] == [
        "data: 3 artifacts were found right by an earlier check that did not end, and not read again;"
        " --restart reads them too"
    ]
    assert set(reads) == {(record.revision.object_key, 0) for record in records[2:6]}
    assert set(reads.values()) == {1}
    assert watcher.began == (3 * BLOCK_SIZE + 2, 3 * BLOCK_SIZE + 6)
    assert (watcher.told, report.read_bytes) == (4, 4)
    reads.clear()
    fsck.check(instance, data=True)
    assert len(reads) == 3 + 6, "the round was over, and this is a new one"
    assert store_of(instance).most <= scrub.JOBS


def test_a_big_one_goes_on_in_the_middle_and_restart_does_not(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "CHECKPOINT_BLOCKS", 2)
    big = save(instance, tmp_path, "big", make_bytes(BLOCKS * BLOCK_SIZE)).revision.object_key
    reads = store_of(instance).reads
    for restart, again in ((False, {(big, 4)}), (True, {(big, block) for block in range(BLOCKS)})):
        with pytest.raises(KeyboardInterrupt):
            fsck.check(instance, data=True, jobs=1, watcher=Interrupting(4))
        with (instance.settings.directory / "scrub.log").open("ab") as stream:
            stream.write(bytes(24) + b"torn")  # a power cut
        reads.clear()
        assert fsck.check(instance, data=True, restart=restart).problems == []
        assert set(reads) == again


def _file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "other"
    path.write_bytes(data)
    return path


def test_damage_is_known_until_it_is_repaired(instance: Instance, tmp_path: Path) -> None:
    one, two, three, four = (
        save(instance, tmp_path, f"d/{number}", make_bytes(3 * BLOCK_SIZE, number)) for number in range(1, 5)
    )
    assert damage.known(instance) == []
    before = now_ns()
    for record, block in ((one, 0), (one, 2), (two, 1), (three, 2)):
        rot(instance, record, block)
    (Path(instance.settings.storage.root) / four.revision.object_key).unlink()
    report = fsck.check(instance, data=True)
    found = damage.known(instance)
    assert [entry.blocks for entry in found] == [(0, 2), (1,), (2,), ()]
    assert all(before <= entry.found_at <= now_ns() for entry in found)
    assert report.problems == [f"storage: {entry.sentence}" for entry in found]
    url = instance.store.url(one.revision.object_key)
    assert found[0].sentence == f"the object {url} of 'd/1' is damaged in blocks 0, 2 (artifact {one.uid})"
    assert found[3].what == "is gone"
    # known to a check that does not read, and to the next process
    with Instance.open(instance.settings.slug) as other:
        assert fsck.check(other).problems == report.problems
    artifacts.replace(instance, one.uid, _file(tmp_path, b"new"))
    artifacts.purge(instance, two)
    timed(instance.registry).names.rename(1, "d", 1, "moved")
    rot(instance, three, 2)
    assert [entry.key for entry in damage.known(instance)] == ["moved/3", "moved/4"]
    artifacts.purge(instance, four)
    assert fsck.check(instance, data=True).problems == []
    assert damage.known(instance) == []


def test_damage_found_before_an_interrupt_is_in_the_next_report(instance: Instance, tmp_path: Path) -> None:
    records = [save(instance, tmp_path, f"{number}", b"%d" % number) for number in range(5)]
    rot(instance, records[0], 0)
    with pytest.raises(KeyboardInterrupt):
        fsck.check(instance, data=True, jobs=1, watcher=Interrupting(3))
    assert len(damage.known(instance)) == 1
    shutil.copy(instance.settings.directory / "damage.json", tmp_path)
    report = fsck.check(instance, data=True)
    assert ["damaged in block 0" in text for text in report.problems] == [True]


def test_what_cannot_be_read_is_read_the_next_time(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [save(instance, tmp_path, f"{number}", b"%d" % number) for number in range(6)]
    store = store_of(instance)
    keys = [record.revision.object_key for record in records]
    store.away.add(keys[2])
    report = fsck.check(instance, data=True)
    assert report.problems == [
        f"storage: '2' (artifact {records[2].uid}) cannot be read: The storage is away; try again."
    ]
    assert damage.known(instance) == []
    store.reads.clear()
    store.away.clear()
    assert fsck.check(instance, data=True).problems == []
    assert set(store.reads) == {(keys[2], 0)}
    monkeypatch.setattr(scrub, "MOST_UNREAD", 3)
    store.away |= set(keys)
    store.reads.clear()
    with pytest.raises(StorageUnavailable):
        fsck.check(instance, data=True, jobs=1)
    assert len(store.reads) < 6


def test_one_at_a_time(instance: Instance, tmp_path: Path) -> None:
    log = scrub.Log(instance, restart=False)
    with pytest.raises(Locked, match="Another process is reading"):
        fsck.check(instance, data=True)
    log.close()
    assert fsck.check(instance, data=True).clean


def test_uploads_that_nobody_will_finish(instance: Instance, tmp_path: Path) -> None:
    store = store_of(instance)
    old = now_ns() - 25 * 3600 * 10**9
    store.unfinished = [
        UnfinishedUpload("a.bin", "1", old),
        UnfinishedUpload("young.bin", "2", now_ns() - 10**9),
        UnfinishedUpload("owed.bin", "3", old),
    ]
    timed(instance.registry).journal.add_delete("owed.bin")
    problems = fsck.check(instance).problems
    assert [text for text in problems if "upload" in text] == [
        f"storage: the upload to {store.url('a.bin')} of {_day(old)} was never finished, and its parts take room"
        "; 'lamfs fsck --purge-orphans' deletes them"
    ]
    store.plan["delete"] = ["fail", "fail"]
    assert not any("a.bin" in text for text in fsck.check(instance, repair=True).repaired)
    assert [upload.key for upload in store.unfinished] == ["a.bin", "young.bin", "owed.bin"]
    report = fsck.check(instance, purge=True)
    assert any("a.bin" in text for text in report.repaired)
    assert [upload.key for upload in store.unfinished] == ["young.bin", "owed.bin"]
    assert any("owed.bin" in text and "under way" in text for text in report.notes)


def _day(moment: int) -> str:
    from lamfs.model import iso

    return iso(moment)[:10]
