"""The journal asked by owner and operation: what is found, and that a backlog of others costs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lamfs.errors import RegistryError
from lamfs.model import ArtifactRecord, ContentHash, Revision
from lamfs.registry import process_id
from lamfs.registry.entries import Delete, Move, Put, Save, save_payload
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands

RECORD = ArtifactRecord(
    uid="s" * 20, key="a.csv", suffix=".csv", revision=Revision(ContentHash(3, "h" * 22, "md5", b"b" * 32), "a.csv", "")
)
BACKLOG = 5000
STEPS = 100
"""Instructions of SQLite's machine between two ticks."""


@pytest.fixture
def backlog(registry: Registry) -> Iterator[str]:
    """What another living process owes; its name."""
    owner = process_id(1)
    assert owner is not None
    with registry.db.transaction():
        registry.db.conn.executemany(
            "INSERT INTO journal(op, state, ino, uid, src, created_at, owner) VALUES('put', 'ready', ?, ?, ?, 1, ?)",
            [(1000 + number, f"uid{number}", f"src{number}", owner) for number in range(BACKLOG)],
        )
    yield owner
    for table in ("journal", "owed"):
        registry.db.execute(f"DELETE FROM {table}")


def test_what_is_owed_is_found_by_owner_and_operation(registry: Registry, backlog: str) -> None:
    journal = registry.journal
    assert not journal.saves()
    journal.add_move("m" * 20)
    entry_id = journal.add_save("s" * 20, "a.csv", save_payload(RECORD, base=None, mode=0o644))
    journal.add_delete("b.csv")
    assert journal.saves()
    assert journal.saves("s" * 20)
    assert not journal.saves("m" * 20)
    assert [len(journal.mine(kind)) for kind in (Move, Delete)] == [1, 1]
    assert [entry.id for entry in journal.mine(Save)] == [entry_id]
    assert journal.mine(Put) == []
    # A save of another process counts too, and so does one that nobody has.
    for owner in (backlog, None):
        registry.db.execute("UPDATE journal SET owner=? WHERE op='save'", (owner,))
        assert journal.saves("s" * 20)
        assert journal.mine(Save) == []


def test_only_what_dead_processes_owe_is_adopted(registry: Registry, backlog: str) -> None:
    journal = registry.journal
    for number, owner in enumerate(("00000000-boot:1:1", None, backlog, "zz:2:2")):
        journal.add_delete(f"{number}.csv")
        registry.db.execute("UPDATE owed SET owner=? WHERE object_key=?", (owner, f"{number}.csv"))
    assert journal.adopt(("move",)) == []
    assert [(entry.object_key, entry.owner) for entry in journal.adopt(("delete",))] == [
        ("0.csv", "00000000-boot:1:1"),
        ("1.csv", None),
        ("3.csv", "zz:2:2"),
    ]
    assert [entry.object_key for entry in journal.mine(Delete)] == ["0.csv", "1.csv", "3.csv"]


def test_a_backlog_of_others_is_not_read(registry: Registry, backlog: str) -> None:
    ticks = 0

    def tick() -> int:
        nonlocal ticks
        ticks += 1
        return 0

    journal = registry.journal
    registry.db.conn.set_progress_handler(tick, STEPS)
    try:
        assert not journal.saves()
        assert not journal.saves("uid7")
        assert journal.adopt(("save", "move", "delete", "abort", "put")) == []
        assert [journal.mine(kind) for kind in (Move, Delete, Save)] == [[], [], []]
        assert ticks * STEPS < BACKLOG
        assert len(journal.entries()) == BACKLOG
        assert ticks * STEPS > BACKLOG
    finally:
        registry.db.conn.set_progress_handler(None, 0)


def test_what_storage_never_takes_is_among_what_fails(registry: Registry) -> None:
    hands = Hands(registry)
    rows = {name: registry.journal.put_of(hands.create(name)) for name in ("waits", "large", "fine")}
    assert rows["waits"] is not None
    assert rows["large"] is not None
    registry.journal.refuse(rows["large"].id, "too large")
    registry.journal.failed(rows["waits"].id, "away", 5)
    count, found = registry.journal.failing(8)
    assert count == 2
    assert [(entry.id, entry.state) for entry in found] == [
        (rows["waits"].id, "ready"),
        (rows["large"].id, "refused"),
    ]


def test_each_kind_of_row_comes_back_as_what_it_is(registry: Registry, hands: Hands) -> None:
    journal = registry.journal
    ino = hands.create("f.csv")
    journal.set_base(ino, "3:abc")
    journal.add_save("s" * 20, "a.csv", save_payload(RECORD, base=("o", "e"), mode=0o600, foreign="f"))
    journal.add_move("m" * 20)
    journal.add_delete("b.csv", "etag", uid="d" * 20)
    journal.doubt_claims()
    put, save, move, delete = journal.entries()
    assert isinstance(put, Put)
    assert (put.ino, put.gen, put.state, put.base, put.key_is_virtual) == (ino, 1, "ready", "3:abc", True)
    assert isinstance(save, Save)
    assert (save.record, save.base, save.mode, save.foreign) == (RECORD, ("o", "e"), 0o600, "f")
    assert isinstance(move, Move)
    assert move.uid == "m" * 20
    assert isinstance(delete, Delete)
    assert (delete.object_key, delete.etag, delete.uid, delete.doubted) == ("b.csv", "etag", "d" * 20, True)
    assert [entry.op for entry in journal.entries()] == ["put", "save", "move", "delete"]
    assert [entry.about for entry in (save, move, delete)] == ["a.csv", "m" * 20, "b.csv"]
    for row in (save, move, delete):
        journal.done(row.id)


@pytest.mark.parametrize(("op", "payload"), [("evil", "{}"), ("save", "{}"), ("put", "[]")])
def test_a_row_that_lamfs_has_not_written_is_a_sentence(registry: Registry, op: str, payload: str) -> None:
    registry.db.execute(
        "INSERT INTO journal(op, state, ino, uid, src, created_at, payload) VALUES(?, 'ready', 7, 'u', 's', 1, ?)",
        (op, payload),
    )
    with pytest.raises(RegistryError, match=r"^(Row \d+ of the journal|The journal has a row)"):
        registry.journal.entries()
    registry.db.execute("DELETE FROM journal")
