"""A registry on disk, and short words for what its tests do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.hashing import encode_digest, hash_block
from lamfs.keys import spool_name
from lamfs.model import ROOT_INO, ArtifactRecord, ContentHash
from lamfs.registry import Provenance
from tests.support.timed import Registry, timed


def content_of(data: bytes) -> ContentHash:
    """Hashes of bytes of one block at most."""
    return ContentHash(len(data), encode_digest(hashlib.md5(data).digest()), "md5", hash_block(data) if data else b"")


class Hands:
    """Does to a registry what a mount does, step by step, without any storage."""

    def __init__(self, registry: Registry) -> None:
        self.registry = timed(registry)

    def at(self, path: str) -> tuple[int, str]:
        """Directory inode and name of a path."""
        folder, _, name = path.rpartition("/")
        inode = self.registry.tree.resolve(folder)
        assert inode is not None, folder
        return inode.ino, name

    def ino(self, path: str) -> int:
        inode = self.registry.tree.resolve(path)
        assert inode is not None, path
        return inode.ino

    def create(self, path: str, *, virtual: bool = True) -> int:
        """A new file, closed, its upload owed."""
        inode, _ = self.registry.names.create_file(*self.at(path), 0o100644, 1, 1, key_is_virtual=virtual)
        self.registry.journal.ready_put(inode.ino)
        return inode.ino

    def rewrite(self, path: str) -> None:
        """An existing file is written again and closed."""
        ino = self.ino(path)
        self.registry.journal.begin_put(ino, spool_name(ino))
        self.registry.journal.ready_put(ino)

    def store(self, ino: int, data: bytes, etag: str | None = None) -> ArtifactRecord | None:
        """What the uploader does for the put of an inode."""
        entry = self.registry.journal.put_of(ino)
        assert entry is not None
        target = self.registry.commits.put_target(entry)
        self.registry.journal.set_target(entry.id, target)
        return self.registry.commits.put(
            ino, entry.gen, content_of(data), target, etag or hashlib.md5(data).hexdigest(), Provenance()
        ).record

    def save(self, path: str, data: bytes, *, virtual: bool = True) -> ArtifactRecord:
        """A new artifact."""
        record = self.store(self.create(path, virtual=virtual), data)
        assert record is not None
        return record

    def mkdir(self, path: str) -> int:
        return self.registry.names.create(*self.at(path), 0o040755, 1, 1).ino

    def rename(self, old: str, new: str, **options: bool) -> None:
        self.registry.names.rename(*self.at(old), *self.at(new), **options)

    def unlink(self, path: str) -> None:
        self.registry.names.unlink(*self.at(path))

    def link(self, old: str, new: str) -> None:
        self.registry.names.link(self.ino(old), *self.at(new))

    def record(self, path: str) -> ArtifactRecord:
        """The artifact whose bytes a path shows."""
        found = self.registry.artifacts.by_ino(self.ino(path))
        assert found is not None, path
        return found

    def deletes(self) -> list[str]:
        return [entry.object_key or "" for entry in self.registry.journal.entries() if entry.op == "delete"]

    def moves(self) -> list[str]:
        return [entry.uid or "" for entry in self.registry.journal.entries() if entry.op == "move"]

    def run_moves(self) -> list[tuple[str, str]]:
        """Relocate objects until nothing moves; what was copied where."""
        copied = []
        for _ in range(100):
            entries = [entry for entry in self.registry.journal.entries() if entry.op == "move"]
            if not entries:
                return copied
            for entry in entries:
                assert entry.uid is not None
                plan = self.registry.commits.move_plan(entry.uid)
                if plan is None:
                    if self.registry.commits.is_home(entry.uid):
                        self.registry.journal.done(entry.id)
                    continue
                before, target = plan
                self.registry.commits.begin_move(before.uid, target)
                copied.append((before.revision.object_key, target))
                assert self.registry.commits.moved(entry.id, before, target, before.revision.etag)
        raise AssertionError(f"moves never end: {self.registry.journal.entries()}")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """An empty registry with one storage."""
    registry = Registry(tmp_path / "registry.lndb", create=True)
    registry.people.ensure_storage("s3://bucket/prefix", "s3")
    yield registry
    registry.close()


@pytest.fixture
def hands(registry: Registry) -> Hands:
    return Hands(registry)


@pytest.fixture(autouse=True)
def _whole(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the tree is whole."""
    from tests.support.tree import check_tree

    if "registry" not in request.fixturenames:
        yield
        return
    registry = request.getfixturevalue("registry")
    yield
    assert check_tree(registry) == []
    assert registry.tree.get(ROOT_INO) is not None
