"""Random calls on a registry against a plain model of a POSIX tree and of the artifacts in it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lamfs.errors import AlreadyExists, FsError, InvalidName
from lamfs.model import ROOT_INO, TRASH
from lamfs.registry import artifacts
from tests.support.timed import Registry
from tests.support.tree import check_tree
from tests.unit.registry.conftest import Hands, content_of

PATHS = st.lists(st.sampled_from(["a", "b.csv", "a0", "é%_"]), min_size=1, max_size=3).map("/".join)
BYTES = st.sampled_from([b"", b"x", b"yy"])


class File:
    """A regular file of the model. ``uid``: of its artifact, once it is stored."""

    def __init__(self) -> None:
        self.uid: str | None = None
        self.data: bytes | None = None


class RegistryMachine(RuleBasedStateMachine):
    """``tree``: path to File, or to None for a directory. ``owed``: files closed and not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="lamfs-r", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.registry = Registry(Path(self.folder) / "r.lndb", create=True)
        self.registry.people.ensure_storage("s3://bucket/prefix", "s3")
        self.hands = Hands(self.registry)
        self.tree: dict[str, File | None] = {}
        self.trash: dict[str, bytes] = {}

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.folder)

    # -- the model ----------------------------------------------------------------------------------------------

    def parent_is_there(self, path: str) -> bool:
        folder = path.rpartition("/")[0]
        return folder == "" or (folder in self.tree and self.tree[folder] is None)

    def names_of(self, file: File) -> list[str]:
        return [path for path, other in self.tree.items() if other is file]

    def below(self, path: str) -> list[str]:
        return [other for other in self.tree if other.startswith(path + "/")]

    def drop(self, path: str) -> None:
        file = self.tree.pop(path)
        if file is not None and not self.names_of(file) and file.uid is not None:
            assert file.data is not None
            self.trash[file.uid] = file.data

    def at(self, path: str) -> tuple[int, str]:
        return self.hands.at(path)

    # -- calls --------------------------------------------------------------------------------------------------

    @rule(path=PATHS, virtual=st.booleans())
    def create(self, path: str, virtual: bool) -> None:
        if not self.parent_is_there(path):
            return
        if path in self.tree:
            with pytest.raises(FsError):
                self.hands.create(path)
            return
        self.hands.create(path, virtual=virtual)
        self.tree[path] = File()

    @rule(path=PATHS)
    def mkdir(self, path: str) -> None:
        if not self.parent_is_there(path):
            return
        if path in self.tree:
            with pytest.raises(FsError):
                self.hands.mkdir(path)
            return
        self.hands.mkdir(path)
        self.tree[path] = None

    def files(self) -> list[str]:
        return [path for path, file in self.tree.items() if file is not None]

    @precondition(lambda self: self.files())
    @rule(data=st.data(), content=BYTES)
    def store(self, data: Any, content: bytes) -> None:
        """A file is written again (or for the first time), closed and stored."""
        file = self.tree[data.draw(st.sampled_from(self.files()))]
        assert file is not None
        path = self.names_of(file)[0]
        ino = self.hands.ino(path)
        if self.registry.journal.put_of(ino) is None:
            self.hands.rewrite(path)
        record = self.hands.store(ino, content)
        assert record is not None
        self.registry.tree.update(ino, size=len(content))
        assert file.uid in (None, record.uid), "the uid has changed"
        file.uid, file.data = record.uid, content

    @precondition(lambda self: self.tree)
    @rule(data=st.data(), new=PATHS, noreplace=st.booleans())
    def rename(self, data: Any, new: str, noreplace: bool) -> None:
        old = data.draw(st.sampled_from(sorted(self.tree)))
        if not self.parent_is_there(new) or new.startswith(old + "/"):
            return
        source, there = self.tree[old], new in self.tree
        target = self.tree.get(new)
        refused = (
            (there and noreplace)
            or (there and old != new and (source is None) != (target is None))
            or (there and old != new and target is None and bool(self.below(new)))
        )
        if refused:
            with pytest.raises(FsError):
                self.hands.rename(old, new, noreplace=noreplace)
            return
        self.hands.rename(old, new, noreplace=noreplace)
        if old == new or (there and source is not None and source is target):
            return
        if source is None:
            moved = {path: self.tree.pop(path) for path in [old, *self.below(old)]}
            self.tree.pop(new, None)
            self.tree.update({new + path[len(old) :]: file for path, file in moved.items()})
            return
        del self.tree[old]
        if target is not None:
            heir = target.uid is not None and len(self.names_of(target)) == 1
            if heir:
                # The artifact stays, with the bytes of the file that was renamed over it.
                del self.tree[new]
                source.uid = target.uid
                if source.data is None:
                    source.data = target.data
            else:
                self.drop(new)
        self.tree[new] = source

    @precondition(lambda self: self.files())
    @rule(data=st.data(), new=PATHS)
    def link(self, data: Any, new: str) -> None:
        old = data.draw(st.sampled_from(self.files()))
        if new in self.tree or not self.parent_is_there(new):
            return
        self.hands.link(old, new)
        self.tree[new] = self.tree[old]

    @precondition(lambda self: self.files())
    @rule(data=st.data())
    def unlink(self, data: Any) -> None:
        path = data.draw(st.sampled_from(self.files()))
        self.hands.unlink(path)
        self.drop(path)

    @precondition(lambda self: self.tree)
    @rule(data=st.data())
    def rmdir(self, data: Any) -> None:
        path = data.draw(st.sampled_from(sorted(self.tree)))
        if self.tree[path] is not None or self.below(path):
            with pytest.raises(FsError):
                self.registry.names.rmdir(*self.at(path))
            return
        self.registry.names.rmdir(*self.at(path))
        del self.tree[path]

    @precondition(lambda self: self.trash)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        uid = data.draw(st.sampled_from(list(self.trash)))
        try:
            record = self.registry.names.restore(uid)
        except (AlreadyExists, InvalidName):
            return
        assert record.key is not None
        parts = record.key.split("/")
        for count in range(1, len(parts)):
            self.tree.setdefault("/".join(parts[:count]), None)
        assert record.key not in self.tree
        file = self.tree[record.key] = File()
        file.uid, file.data = uid, self.trash.pop(uid)

    @precondition(lambda self: self.trash)
    @rule(data=st.data())
    def purge(self, data: Any) -> None:
        uid = data.draw(st.sampled_from(list(self.trash)))
        self.registry.names.purge(uid)
        del self.trash[uid]

    @rule()
    def move(self) -> None:
        """All relocations come to an end, and everything is where it belongs."""
        for entry in self.registry.journal.entries():
            if entry.op == "delete":
                self.registry.journal.done(entry.id)
        for entry in self.registry.journal.entries():
            if entry.op == "put" and entry.object_key is not None:
                return  # a file that is being stored may hold a place
        self.hands.run_moves()
        for record in self.registry.artifacts.filter():
            assert self.registry.commits.is_home(record.uid)

    # -- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def tree_is_whole(self) -> None:
        assert check_tree(self.registry) == []

    @invariant()
    def tree_is_the_models(self) -> None:
        found: dict[str, int | None] = {}

        def walk(ino: int, prefix: str) -> None:
            for entry in self.registry.tree.entries(ino):
                if ino == ROOT_INO and entry.name == ".lamindb":
                    continue
                directory = entry.inode.mode & 0o170000 == 0o040000
                found[prefix + entry.name] = None if directory else entry.inode.ino
                if directory:
                    walk(entry.inode.ino, prefix + entry.name + "/")

        walk(ROOT_INO, "")
        assert found.keys() == self.tree.keys()
        inos: dict[int, File] = {}
        for path, ino in found.items():
            file = self.tree[path]
            assert (ino is None) == (file is None)
            if ino is None or file is None:
                continue
            assert inos.setdefault(ino, file) is file
            record = self.registry.artifacts.by_ino(ino)
            if record is None:
                assert file.uid is None
            else:
                assert record.uid == file.uid
                assert file.data is not None
                owed = self.registry.journal.put_of(ino)
                assert owed is not None or record.revision.content.same_bytes(content_of(file.data))

    @invariant()
    def trash_is_the_models(self) -> None:
        found = {record.uid for record in self.registry.artifacts.filter(visibility=TRASH)}
        assert found == self.trash.keys()

    @invariant()
    def no_two_artifacts_share_an_object(self) -> None:
        rows = self.registry.db.all("SELECT object_key FROM revision GROUP BY object_key HAVING count(*) > 1")
        assert rows == []
        stale = self.registry.db.all(
            "SELECT j.object_key FROM journal j JOIN revision r USING(object_key) WHERE j.op='delete'"
        )
        # Owed from before, and struck off when its turn comes: only what is in use now matters, see Steps.delete.
        assert all(self.registry.artifacts.with_object(row[0]) is not None for row in stale)


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class LateKeysMachine(RegistryMachine):
    """The same, where keys follow a renamed directory only when they have to, or one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.few, artifacts.FEW = artifacts.FEW, 0
        for folder in ("a", "a/a0", "é%_"):
            self.hands.mkdir(folder)
            self.tree[folder] = None
            for name in ("a", "b.csv"):
                path = f"{folder}/{name}"
                if path not in self.tree and path != "a/a0":
                    self.create(path, virtual=True)
                    file, record = self.tree[path], self.hands.store(self.hands.ino(path), b"x")
                    assert file is not None
                    assert record is not None
                    self.registry.tree.update(self.hands.ino(path), size=1)
                    file.uid, file.data = record.uid, b"x"

    def teardown(self) -> None:
        artifacts.FEW = self.few
        super().teardown()

    def is_settled(self) -> bool:
        return self.registry.db.one("SELECT 1 FROM rekey") is None

    @rule(number=st.integers(0, 9), new=PATHS)
    def rename_directory(self, number: int, new: str) -> None:
        folders = sorted(path for path, file in self.tree.items() if file is None)
        if folders:
            self.rename(SimpleNamespace(draw=lambda _: folders[number % len(folders)]), new, False)

    @rule(limit=st.sampled_from([1, 2, None]))
    def settle(self, limit: int | None) -> None:
        assert self.registry.artifacts.settle(limit) != self.is_settled()

    @invariant()
    def keys_are_those_of_the_tree(self) -> None:
        for (ino,) in self.registry.db.all("SELECT ino FROM artifact WHERE visibility > -1 AND key IS NOT NULL"):
            record = self.registry.artifacts.by_ino(ino)
            assert record is not None
            assert record.key == self.registry.tree.path(ino)

    @invariant()
    def tree_is_whole(self) -> None:
        if self.is_settled():
            super().tree_is_whole()

    @invariant()
    def trash_is_the_models(self) -> None:
        if self.is_settled():
            super().trash_is_the_models()


TestLateKeysMachine = LateKeysMachine.TestCase
TestLateKeysMachine.settings = settings(TestRegistryMachine.settings, max_examples=30)
