"""What lamfs itself writes into a registry, whatever its users do, is taken over as it is: nothing is found wrong."""

from __future__ import annotations

import contextlib
import random
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lamfs.errors import LamfsError
from lamfs.model import ArtifactRecord, Revision, new_uid
from lamfs.registry import intake, process_id
from lamfs.registry.rules import RETAINED, TABLES
from tests.support.timed import Registry
from tests.support.tree import check_tree
from tests.unit.registry.conftest import Hands, content_of

NAMES = [
    "a",
    "b.tar.gz",
    "é%_",
    "x.lndb",
    f"{'0' * 32}.lndb",
    "[*?",
    "\\",
    "a\nb",
    "\x7f\x1b[31m",
    "...",
    "\U0001f600" * 60,
]
BYTES = [b"", b"x", b"yy"]
OBJECTS = ["a//b", "a/", "./c", "é", "d/../", "q.lndb", f"e/{'0' * 32}.lndb", "b\nc", "\\", ".lamindb"]
KINDS = [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK]
CALLS = [
    "create", "store", "store", "rewrite", "mkdir", "symlink", "special", "rename", "exchange", "link", "unlink",
    "rmdir", "restore", "xattr", "attributes", "hold", "scratch", "in_place", "unnamed", "describe", "retain",
]  # fmt: skip


class Life:
    """Does what a mount, the Python API and other processes do."""

    def __init__(self, registry: Registry, seed: int) -> None:
        self.registry, self.hands, self.random = registry, Hands(registry), random.Random(seed)

    def draw(self, choices: Sequence[Any]) -> Any:
        return self.random.choice(choices)

    def path(self) -> str:
        """Where something may be, or come to be."""
        return "/".join(self.random.choices(NAMES, k=self.draw([1, 1, 2, 3])))

    def entry(self, *, only_files: bool = False) -> str:
        """A path that is there."""
        kind = f"i.mode & {0o170000} = {stat.S_IFREG}" if only_files else "i.ino > 2"
        rows = self.registry.db.all(f"SELECT i.ino FROM inode i JOIN dentry d USING(ino) WHERE {kind} AND d.parent<>2")
        path = self.registry.tree.path(self.draw(sorted({row[0] for row in rows}))) if rows else None
        return path or "nothing"

    def file(self) -> int:
        return self.hands.ino(self.entry(only_files=True))

    def create(self) -> None:
        self.hands.create(self.path(), virtual=self.draw([True, False]))

    def store(self) -> None:
        ino, data = self.file(), self.draw(BYTES)
        if self.registry.journal.put_of(ino) is not None:
            self.hands.store(ino, data)
            self.registry.tree.update(ino, size=len(data))

    def rewrite(self) -> None:
        self.hands.rewrite(self.entry(only_files=True))

    def mkdir(self) -> None:
        self.hands.mkdir(self.path())

    def symlink(self) -> None:
        target = self.draw([b"a", b"../../x", b"\xff\n", b"y" * 4095])
        self.registry.names.create(*self.hands.at(self.path()), stat.S_IFLNK | 0o777, 1, 1, target=target)

    def special(self) -> None:
        mode = self.draw(KINDS) | 0o7777
        self.registry.names.create(*self.hands.at(self.path()), mode, 1, 1, rdev=self.draw([0, 2**32 - 1]))

    def rename(self) -> None:
        self.hands.rename(self.entry(), self.path())

    def exchange(self) -> None:
        self.registry.names.exchange(*self.hands.at(self.entry()), *self.hands.at(self.entry()))

    def link(self) -> None:
        self.hands.link(self.entry(), self.path())

    def unlink(self) -> None:
        self.hands.unlink(self.entry())

    def rmdir(self) -> None:
        self.registry.names.rmdir(*self.hands.at(self.entry()))

    def restore(self) -> None:
        trashed = [record.uid for record in self.registry.artifacts.filter(visibility=-1)]
        if trashed:
            self.registry.names.restore(self.draw(sorted(trashed)))

    def xattr(self) -> None:
        name = self.draw(["user.é", "user." + "n" * 250, "trusted.x"])
        self.registry.tree.set_xattr(self.hands.ino(self.entry()), name, self.draw([b"", b"\0\xff", bytes(65536)]))

    def attributes(self) -> None:
        when = self.draw([-1, -(2**62), 2**62])
        self.registry.attributes.set_attributes(
            self.hands.ino(self.entry()), uid=2**32 - 1, gid=2**31, mtime_ns=when, atime_ns=when
        )

    def hold(self) -> None:
        """Another process stores the file, and this one writes it again."""
        ino = self.file()
        put = self.registry.journal.put_of(ino)
        if put is not None:
            self.registry.journal.set_target(put.id, self.registry.commits.put_target(put))
            self.registry.db.execute("UPDATE journal SET owner=? WHERE id=?", (process_id(1), put.id))
            self.registry.journal.begin_put(ino, f"{ino:x}-{'0' * 12}", base="5:abc")

    def scratch(self) -> None:
        ino = self.file()
        if self.registry.artifacts.by_ino(ino) is None:
            self.registry.journal.ready_put(ino, scratch=True)
            self.registry.tree.set_xattr(ino, "user.x", b"y")

    def in_place(self) -> None:
        """An object of a bucket is registered where it is, so that its key may have empty parts."""
        record = self.registry.artifacts.by_ino(self.file())
        key = self.draw(OBJECTS)
        if record is not None and "/../" not in f"/{key}/" and self.registry.artifacts.with_object(key) is None:
            self.registry.artifacts.set_object(record.uid, key, "etag")

    def unnamed(self) -> None:
        """An artifact without a key, which shows in .lamindb."""
        record = ArtifactRecord(new_uid(), None, "", Revision(content_of(b"x"), "", ""), description="d")
        entry, object_key, *_ = self.registry.commits.announce_save(record)
        record.revision = Revision(content_of(b"x"), object_key, "")
        self.registry.commits.save(entry, record, "etag", mode=0o644, uid=1, gid=1)

    def describe(self) -> None:
        record = self.registry.artifacts.by_ino(self.file())
        if record is not None:
            self.registry.artifacts.update(record.uid, description=self.draw(["\x1b[2J", "é" * 40_000]))

    def retain(self) -> None:
        record = self.registry.artifacts.by_ino(self.file())
        if record is not None:
            self.registry.db.set_meta(f"{RETAINED}{record.revision.object_key}", 1)


def rows_of(registry: Registry, table: str, unstored: str) -> list[tuple[Any, ...]]:
    """What of a table has to come over. The bytes of what is still to be stored are on the other machine."""
    where = {
        # Of a delete nobody can tell any more which object it meant, unless it says so.
        "owed": "op<>'delete' OR json_type(payload, '$.etag')='text'",
        "meta": f"key GLOB '{RETAINED}*'",
    }.get(table, "1")
    names = ", ".join(
        f"CASE WHEN ino IN ({unstored}) THEN 0 ELSE {name} END"
        if table == "inode" and name in ("size", "revision", "blocks", "pending")
        else name
        for name in TABLES.get(table, ("key", "value"))
    )
    return sorted(registry.db.all(f"SELECT {names} FROM {table} WHERE {where}"), key=repr)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_of_an_honest_registry_is_lost(tmp_path: Path, seed: int) -> None:
    with contextlib.ExitStack() as stack:
        folder = tmp_path
        registry = Registry(folder / "r.lndb", create=True)
        stack.callback(registry.close)
        registry.db.set_meta("slug", "ada/one")
        registry.people.ensure_storage("s3://bucket/prefix", "s3")
        life = Life(registry, seed)
        for call in ["mkdir", "create", *life.random.choices(CALLS, k=200)]:
            with contextlib.suppress(LamfsError, AssertionError):  # there is nothing to do that to
                getattr(life, call)()
        registry.db.snapshot(folder / "pushed.lndb")
        place = intake.Place("s3", "s3://bucket/prefix")
        taken = intake.take(
            folder / "pushed.lndb", "the registry", folder / "fresh.lndb", place, now=1, spare_uid="s" * 12
        )
        assert taken.findings == []
        fresh = Registry(folder / "fresh.lndb")
        stack.callback(fresh.close)
        puts = [row[0] for row in registry.db.all("SELECT ino FROM journal WHERE op='put'")]
        unstored = ", ".join(map(str, puts))
        for table in (*TABLES.keys() - {"journal"}, "meta"):
            assert rows_of(fresh, table, unstored) == rows_of(registry, table, unstored), table
        files = {f"file {ino} is no artifact and none is owed" for ino in puts}
        assert set(check_tree(fresh)) - files == set(check_tree(registry))
