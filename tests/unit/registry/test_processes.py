"""Several processes and threads on one registry: nobody sees "database is locked", and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lamfs.registry.db import Database
from tests.support.timed import Registry
from tests.support.tree import check_tree
from tests.unit.registry.conftest import Hands

ROUNDS = 30
"""Registries that are created, each by two processes together."""

WRITER = """
import random, sys, time
from pathlib import Path
from lamfs.errors import FsError
from lamfs.registry import sync_log
from tests.support.timed import Registry
from tests.unit.registry.conftest import Hands

name, count = sys.argv[2], int(sys.argv[3])
registry = Registry(Path(sys.argv[1]))
hands = Hands(registry)
rng = random.Random(name)
hands.mkdir(name)
for number in range(count):
    hands.save(f"{name}/{number}", b"%d" % number, virtual=rng.random() < 0.5)
    if rng.random() < 0.3:
        hands.rename(f"{name}/{number}", f"{name}/m{number}")
    elif rng.random() < 0.2:
        hands.unlink(f"{name}/{number}")
    if number % 10 == 0:
        hands.rename(name, name + "-") if registry.tree.resolve(name + "-") is None else None
        hands.rename(name + "-", name)
        registry.journal.adopt()
        registry.changes.trim()
    if number % 25 == 0:
        sync_log(registry.path)
print(hands.registry.artifacts.count() > 0)
"""


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    """Four writers and a snapshot taker."""
    path = tmp_path / "r.lndb"
    registry = Registry(path, create=True)
    registry.people.ensure_storage("s3://bucket/prefix", "s3")
    count = 120
    root = Path(__file__).resolve().parents[3]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), f"w{number}", str(count)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    snapshots = 0
    while any(writer.poll() is None for writer in writers):
        registry.db.snapshot(tmp_path / "copy.lndb")
        copy = Registry(tmp_path / "copy.lndb")
        assert check_tree(copy) == []
        copy.close()
        snapshots += 1
    for writer in writers:
        out, err = writer.communicate()
        assert writer.returncode == 0, err
        assert out == "True\n"
    assert snapshots
    assert check_tree(registry) == []
    assert registry.artifacts.count() + registry.artifacts.count(trash=True) == 4 * count
    row = registry.db.one("SELECT count(*), max(seq) FROM change")
    assert row is not None
    assert row[0] == row[1]
    registry.close()


def test_processes_that_create_at_once(tmp_path: Path) -> None:
    """The migrations run once, whoever comes first."""
    path = tmp_path / "r.lndb"
    code = (
        "import sys; from pathlib import Path; from lamfs.registry import Registry\n"
        "Registry(Path(sys.argv[1]), create=True)"
    )
    makers = [subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE) for _ in range(4)]
    for maker in makers:
        _, err = maker.communicate()
        assert maker.returncode == 0, err.decode()
    registry = Registry(path)
    assert check_tree(registry) == []
    registry.close()


def test_a_reader_keeps_its_view_while_others_write(tmp_path: Path) -> None:
    """And a change of another connection is told by data_version."""
    path = tmp_path / "r.lndb"
    registry = Registry(path, create=True)
    registry.people.ensure_storage("s3://bucket/prefix", "s3")
    version = registry.db.data_version()
    Hands(registry).save("mine", b"1")
    assert registry.db.data_version() == version
    seen: list[int] = []

    def other() -> None:
        second = Registry(path)
        Hands(second).save("theirs", b"2")
        seen.append(second.artifacts.count())
        second.close()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [2]
    assert registry.db.data_version() != version
    registry.close()


def test_a_writer_waits_for_another(tmp_path: Path) -> None:
    """A transaction that is open elsewhere delays, it does not fail."""
    path = tmp_path / "r.lndb"
    registry = Registry(path, create=True)
    began, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        database = Database(path)
        with database.transaction():
            database.set_meta("slow", 1)
            began.set()
            go_on.wait(10)
        database.close()

    thread = threading.Thread(target=slow)
    thread.start()
    assert began.wait(10)
    threading.Timer(0.3, go_on.set).start()
    registry.db.set_meta("quick", 2)
    thread.join()
    assert registry.db.get_meta("slow") == 1
    assert registry.db.get_meta("quick") == 2
    registry.close()


def test_killed_in_a_transaction(tmp_path: Path) -> None:
    """A process that dies in the middle of one leaves nothing of it, and no lock."""
    path = tmp_path / "r.lndb"
    registry = Registry(path, create=True)
    registry.people.ensure_storage("s3://bucket/prefix", "s3")
    code = (
        "import os, sys; from pathlib import Path; from tests.support.timed import Registry\n"
        "from tests.unit.registry.conftest import Hands\n"
        "registry = Registry(Path(sys.argv[1])); hands = Hands(registry)\n"
        "hands.save('whole', b'1')\n"
        "with registry.db.transaction():\n"
        "    hands.save('half', b'2'); hands.rename('half', 'whole'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).resolve().parents[3], check=False)
    assert done.returncode == -9
    assert check_tree(registry) == []
    assert [record.key for record in registry.artifacts.filter()] == ["whole"]
    Hands(registry).save("next", b"3")
    registry.close()


@pytest.mark.parametrize("size", [100, 5000])
def test_a_damaged_file_is_said_so(size: int, tmp_path: Path) -> None:
    from lamfs.errors import RegistryError

    path = tmp_path / "r.lndb"
    Registry(path, create=True).close()
    path.write_bytes(b"\xff" * size)
    with pytest.raises(RegistryError, match="damaged"):
        Registry(path)


CREATOR = """
import sys
from pathlib import Path
from lamfs.registry import Registry

for line in sys.stdin:
    try:
        registry = Registry(Path(line.strip()), create=True)
        registry.db.set_meta(sys.argv[1], 1)
        registry.close()
        print("made", flush=True)
    except Exception as error:
        print(repr(error), flush=True)
"""


def test_processes_that_create_one_registry_at_once(tmp_path: Path) -> None:
    """One of them got "database is locked" at once, when it gave the new file its write-ahead log."""
    root = Path(__file__).resolve().parents[3]
    names = ("one", "two")
    creators = [
        subprocess.Popen(
            [sys.executable, "-c", CREATOR, name], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in names
    ]
    try:
        for number in range(ROUNDS):
            path = tmp_path / str(number) / "registry.lndb"
            path.parent.mkdir()
            for creator in creators:
                assert creator.stdin is not None
                creator.stdin.write(f"{path}\n")
                creator.stdin.flush()
            for creator in creators:
                assert creator.stdout is not None
                assert creator.stdout.readline() == "made\n", f"round {number}"
            registry = Registry(path)
            assert [registry.db.get_meta(name) for name in names] == [1, 1]
            assert not registry.replay.is_needed()
            registry.close()
            assert sorted(each.name for each in path.parent.iterdir()) == ["registry.lndb", "work.db"]
    finally:
        for creator in creators:
            creator.communicate(timeout=60)
