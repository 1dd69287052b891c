"""Leaf hashes in the registry: they come and go with the content of an artifact, and never speak of other content."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from lamfs.hashing import hash_block, hash_leaves, zero_leaves
from lamfs.model import BLOCK_SIZE, LEAF_SIZE, ArtifactRecord, ContentHash, Revision
from lamfs.registry import Provenance, schema
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands, content_of

ONE, TWO, THREE = (os.urandom(2 * LEAF_SIZE) for _ in range(3))


def content(*blocks: bytes, hashed: set[int] | None = None) -> ContentHash:
    """Content of full blocks that are said to begin with these bytes; ``hashed``: whose leaves are known (all)."""
    wanted = range(len(blocks)) if hashed is None else sorted(hashed)
    leaves = {number: hash_leaves(blocks[number]) for number in wanted}
    return ContentHash(len(blocks) * BLOCK_SIZE, "x" * 22, "md5", b"".join(map(hash_block, blocks)), leaves)


def put(hands: Hands, ino: int, what: ContentHash, target: str = "o") -> ArtifactRecord:
    owed = hands.registry.journal.put_of(ino)
    assert owed is not None
    record = hands.registry.commits.put(ino, owed.gen, what, target, f"e{what.blocks.hex()}", Provenance()).record
    assert record is not None
    return record


def known(registry: Registry, record: ArtifactRecord) -> list[bytes | None]:
    return [registry.artifacts.leaves(record.revision, block) for block in range(record.revision.block_count())]


def rows(registry: Registry) -> int:
    return len(registry.db.all("SELECT block FROM leaf"))


def test_a_put_stores_them_and_a_record_does_not_carry_them(hands: Hands, registry: Registry) -> None:
    ino = hands.create("a")
    record = put(hands, ino, content(ONE, TWO))
    assert not record.revision.content.leaves
    assert known(registry, record) == [hash_leaves(ONE), hash_leaves(TWO)]
    assert registry.artifacts.leaves(Revision(content(TWO), "o", "e"), 0) is None, "of another block"
    assert registry.artifacts.leaves(Revision(content(ONE), "p", "e"), 0) is None, "of another object"
    holes = Revision(content(bytes(BLOCK_SIZE)), "p", "e")
    assert registry.artifacts.leaves(holes, 0) == zero_leaves(), "a hole needs no row"


def test_rows_of_blocks_that_did_not_change_stay(hands: Hands, registry: Registry) -> None:
    ino = hands.create("a")
    put(hands, ino, content(ONE, TWO, THREE))
    hands.rewrite("a")
    record = put(hands, ino, content(ONE, THREE, hashed={1}))
    assert known(registry, record) == [hash_leaves(ONE), hash_leaves(THREE)]
    assert rows(registry) == 2, "what was behind the new end has gone"
    hands.rewrite("a")
    record = put(hands, ino, content(TWO, THREE, hashed=set()))
    assert known(registry, record) == [None, hash_leaves(THREE)], "the row of other content is not believed"


def test_they_follow_a_file_that_is_renamed_over_another(hands: Hands, registry: Registry) -> None:
    put(hands, hands.create("a"), content(ONE, TWO, THREE), "o")
    put(hands, hands.create("b"), content(TWO, ONE), "p")
    hands.rename("b", "a")
    assert known(registry, hands.record("a")) == [hash_leaves(TWO), hash_leaves(ONE)]
    assert rows(registry) == 2


def test_they_stay_when_the_object_moves_and_go_with_the_artifact(hands: Hands, registry: Registry) -> None:
    record = put(hands, hands.create("a", virtual=False), content(ONE), "a")
    hands.rename("a", "b")
    hands.run_moves()
    record = hands.record("b")
    assert record.revision.object_key == "b"
    assert known(registry, record) == [hash_leaves(ONE)]
    hands.unlink("b")
    assert rows(registry) == 1, "in the trash"
    registry.names.purge(record.uid)
    assert rows(registry) == 0


def test_a_save_stores_them(registry: Registry) -> None:
    record = ArtifactRecord("u" * 20, "k", "", Revision(content(ONE), "", ""))
    entry, record_key, *_ = registry.commits.announce_save(record)
    record.revision = Revision(record.revision.content, record_key, "")
    saved = registry.commits.save(entry, record, "e", mode=0o644, uid=1, gid=1)
    assert known(registry, saved) == [hash_leaves(ONE)]


def test_a_registry_of_the_version_before(tmp_path: Path) -> None:
    path = tmp_path / "old.lndb"
    content = content_of(b"abc")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        schema.apply(conn, 2)
        conn.execute("INSERT INTO meta VALUES('schema_version', 2)")
        conn.execute("INSERT INTO storage VALUES(1, 'abcdefghijkl', ?, 's3://b', 's3', NULL, 1)", ("a" * 32,))
        conn.execute(
            "INSERT INTO artifact(uid, storage_id, key, suffix, size, hash, hash_type, blocks, object_key, etag, ino,"
            " created_at, updated_at) VALUES(?,1,'a','',3,?,?,?,'.lamindb/y','e',3,1,1)",
            ("u" * 20, content.hash, content.hash_type, content.blocks),
        )
    registry = Registry(path)
    record = registry.artifacts.by_key("a")
    assert record is not None
    assert record.revision.content == content
    assert known(registry, record) == [None]
    registry.close()
