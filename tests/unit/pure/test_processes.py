"""Names of temporary files say whose they are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lamfs import processes
from lamfs.processes import find_mark, is_alive, mark, process_id, state_of

MACHINE = "0123456789ab"


def test_a_name_of_this_process() -> None:
    one, two = mark(MACHINE), mark(MACHINE)
    assert one != two
    found = find_mark(f".push-{one}.lndb-wal")
    assert found is not None
    assert (found.machine, found.pid) == (MACHINE, os.getpid())
    assert state_of(one, MACHINE) == "alive"
    assert state_of(one, "ba9876543210") == "elsewhere"


def test_a_name_of_a_dead_process() -> None:
    made = subprocess.run(
        [sys.executable, "-c", f"from lamfs.processes import mark; print(mark({MACHINE!r}))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert state_of(made, MACHINE) == "dead"


def test_a_child_of_a_fork_has_names_of_its_own() -> None:
    reading, writing = os.pipe()
    mark(MACHINE)
    pid = os.fork()
    if pid == 0:
        os.write(writing, mark(MACHINE).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    name = os.read(reading, 200).decode()
    os.close(reading)
    os.close(writing)
    found = find_mark(name)
    assert found is not None
    assert found.pid == pid
    assert state_of(name, MACHINE) == "dead"


def test_what_cannot_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_mark(mark(MACHINE))
    assert found is not None
    tail = f"{found.pid}-{found.started}-00000000"
    assert state_of(f"{MACHINE}-{found.boot}-{found.namespace + 1}-{tail}", MACHINE) == "elsewhere", "a container's"
    assert state_of(f"{MACHINE}-deadbeef-{found.namespace}-{tail}", MACHINE) == "dead", "before this boot"
    assert state_of(f"{MACHINE}-{found.boot}-{found.namespace}-{found.pid}-1-00000000", MACHINE) == "dead", "pid reused"
    for name in ("", "old", "../x", "a" * 5000, "\udcff"):
        assert state_of(name, MACHINE) == "elsewhere"
    assert is_alive(process_id())
    processes._here.cache_clear()
