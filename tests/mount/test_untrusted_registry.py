"""Whatever is in a registry that comes from storage: nothing outside of lamfs's own folders is reached.

A good instance, its registry mutated, and another machine that does with it what people do: connect, ls, mount, look at
everything, unmount, cache, fsck, close. Each command is a process of its own that strace watches (confined.py). In the
home of that machine are secrets. crafted.py has the mutations.

LAMFS_SOAK: how many times as many mutations as usual (scripts/soak). LAMFS_SEED: other ones. LAMFS_SHRINK: look for
a shorter list of mutations with which a failed test fails as well.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from lamfs.model import StorageConfig
from lamfs.registry.db import SCHEMA_VERSION
from lamfs.storage import open_store
from tests.support import crafted
from tests.support.confined import MARKER, MEMORY_MIB, SECRETS, Machine
from tests.support.crafted import KEPT, Cell, Good, Owed, Row
from tests.support.servers import Server
from tests.support.servers_fixtures import BUCKET

pytestmark = pytest.mark.usefixtures("fuse", "strace")

SOAK = int(os.environ.get("LAMFS_SOAK", "0"))
SEED = int(os.environ.get("LAMFS_SEED", "1"))
COLUMNS = crafted.columns()
READ = 100_000
"""Bytes of each file that are read: some say that they have very many."""

# The home is another one for each machine, so here it has a name.
VALUES = st.sampled_from(crafted.values("{home}/.ssh/id_rsa"))
TURNS = st.integers(0, 1000)
OWED = st.builds(
    Owed,
    op=st.sampled_from(crafted.OPS),
    machine=st.sampled_from(crafted.MACHINES),
    src=VALUES,
    object_key=VALUES,
    payload=VALUES,
    turn=TURNS,
)
ROWS = st.builds(
    lambda place, how, turn: Row(place[0], how, place[1], turn),
    st.sampled_from(COLUMNS),
    st.sampled_from(crafted.HOWS),
    TURNS,
)
CELLS = st.tuples(*(st.builds(Cell, st.just(table), st.just(column), VALUES, TURNS) for table, column in COLUMNS))
"""Something for every column of every table, each mostly in another row."""


def examples(count: int, **more: int) -> Callable[[Any], Any]:
    """So many examples, times LAMFS_SOAK, that depend on LAMFS_SEED alone."""

    def decorate(test: Any) -> Any:
        return seed(SEED)(
            settings(
                max_examples=count * SOAK if SOAK else more.get("quick", count),
                phases=[Phase.generate],
                deadline=None,
                database=None,
                print_blob=False,
                verbosity=Verbosity.quiet,  # check_rows() names the mutations
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            )(test)
        )

    return decorate


# -- where the registry is, and what is done with it ------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


class Place:
    """Where an example is put: a folder, or a root on an S3 server, and the machine that connects to it."""

    def __init__(self, machine: Machine, server: Server | None) -> None:
        self.machine = machine
        self.folder = machine.base / "store"
        self.config = StorageConfig(str(self.folder))
        self.words = ["connect", str(self.folder)]
        self.allow = [self.folder]
        if server is not None:
            self.config = server.config(BUCKET, f"u{secrets.token_hex(4)}/root")
            self.words = ["connect", self.config.root, "--endpoint-url", str(self.config.endpoint_url), "--path-style"]
            self.words += ["--region", str(self.config.region)]
            self.allow = []

    def craft(self, good: Good, change: Callable[[Path], object]) -> None:
        """Put the crafted registry there, and the objects."""
        good.put_into(self.config, change)

    def objects(self) -> Iterator[tuple[str, bytes]]:
        """What is in the storage."""
        with contextlib.closing(open_store(self.config)) as store:
            for found in list(store.list("")):
                if found.size < 1 << 30:
                    yield found.key, store.get(found.key)


@contextlib.contextmanager
def place_of(server: Server | None) -> Iterator[Place]:
    with Machine(env=server.env if server is not None else None, seconds=180) as machine:
        yield Place(machine, server)


def go_through(place: Place, *, taken: bool | None) -> None:
    """Do everything, and look at what it has done. ``taken``: whether the registry is to be taken over."""
    machine = place.machine
    kept: dict[str, bytes] = {}

    def lamfs(*words: str) -> int:
        done = machine.lamfs(*words, allow=place.allow)
        text = (done.output + done.problems).decode(errors="replace")
        assert done.code in (0, 1, 2), f"{words} ended with {done.code}\n{text}"
        assert "Traceback" not in text, f"{words}\n{text}"
        assert "should not have happened" not in text, f"{words}\n{text}\n{machine.logs()}"
        return done.code

    connected = lamfs(*place.words) == 0
    assert taken in (None, connected), f"connected: {connected}\n{machine.logs()}"
    if connected:
        lamfs("ls", "-l")
        uids = re.findall(r'"uid": "(\w{20})"', machine.lamfs("ls", "--json", allow=place.allow).output.decode())
        if lamfs("mount", str(machine.mountpoint)) == 0:
            kept = look_around(machine)
            lamfs("umount", str(machine.mountpoint))
        for words in (["cache", "--paths", "**"], ["cache", *uids[:60]], ["fsck"], ["fsck", "--repair"], ["close"]):
            lamfs(*words)
    else:
        assert lamfs("ls") != 0
        assert lamfs("mount", str(machine.mountpoint), "--instance", crafted.SLUG) != 0
    assert machine.strayed() == []
    assert machine.harmed() == []
    assert machine.leaks(place.folder) == []
    assert [key for key, data in place.objects() if MARKER in data] == []
    logs = machine.logs()
    assert "Traceback" not in logs
    assert machine.peak < MEMORY_MIB
    if taken:
        assert kept == KEPT, logs


def look_around(machine: Machine) -> dict[str, bytes]:
    """``ls -lR`` of the mount, and the beginning of every file; what is in those that nobody has touched."""
    listed = machine.run(["ls", "-lR", str(machine.mountpoint)])
    assert listed.code in (0, 1), listed
    names = machine.run(["find", str(machine.mountpoint), "-type", "f", "-print0"]).output.split(b"\0")[:-1]
    paths = [os.fsdecode(name) for name in names]
    if paths:
        # What cannot be read says so. The rest is kept by run(), to look for secrets in it.
        machine.run(["head", "-q", "-c", str(READ), "--", *paths])
    machine.note_daemons()
    found = {}
    for key in KEPT:
        done = machine.run(["cat", str(machine.mountpoint / key)])
        found[key] = done.output
    return found


def noted(error: BaseException, *about: object) -> None:
    error.add_note(f"LAMFS_SEED={SEED}\n" + "\n".join(str(thing) for thing in about))


def with_home(one: Cell | Row | Owed, machine: Machine) -> Cell | Row | Owed:
    """A mutation in whose values the home is that of a machine."""

    def changed(value: Any) -> Any:
        old, new = "{home}/.ssh", f"{machine.home}/.ssh"
        if isinstance(value, str):
            return value.replace(old, new).replace(f"../{old}", f"..{new}")
        if isinstance(value, bytes) and not isinstance(value, crafted.Utf8):
            return value.replace(old.encode(), new.encode())
        return value

    return type(one)(**{name: changed(value) for name, value in vars(one).items()})


# -- rows -------------------------------------------------------------------------------------------------------------


def check_rows(good: Good, server: Server | None, mutations: list[Cell | Row | Owed], stale: bool) -> None:
    """Go through a registry with these mutations, in which only the rows that were mutated may be harmed."""
    try:
        try_rows(good, server, mutations, stale)
    except Exception as error:
        if "LAMFS_SHRINK" in os.environ:
            mutations = shrunk(mutations, lambda fewer: try_rows(good, server, fewer, stale))
        noted(error, f"stale indexes: {stale}", *mutations)
        raise


def try_rows(good: Good, server: Server | None, mutations: list[Cell | Row | Owed], stale: bool) -> None:
    with place_of(server) as place:
        here = [with_home(one, place.machine) for one in mutations]
        place.craft(good, lambda path: crafted.mutate_rows(path, here, stale=stale))
        go_through(place, taken=True)


def shrunk(mutations: list[Any], attempt: Callable[[list[Any]], None]) -> list[Any]:
    """Fewer mutations with which an attempt fails as well: halves, quarters … of them are left out."""
    size = len(mutations)
    while size > 1:
        size = (size + 1) // 2
        for begin in range(0, len(mutations), size):
            fewer = mutations[:begin] + mutations[begin + size :]
            try:
                attempt(fewer)
            except Exception:
                mutations = fewer
                break
        else:
            continue
        size = min(size * 2, len(mutations))
    return mutations


@examples(10, quick=3)
@given(cells=CELLS, rows=st.lists(ROWS, max_size=12), owed=st.lists(OWED, min_size=8, max_size=30), stale=st.booleans())
def test_rows_in_a_folder(good: Good, cells: Any, rows: Any, owed: Any, stale: bool) -> None:
    check_rows(good, None, [*cells, *owed, *rows], stale)


@examples(5, quick=2)
@given(cells=CELLS, rows=st.lists(ROWS, max_size=12), owed=st.lists(OWED, min_size=8, max_size=30), stale=st.booleans())
def test_rows_in_a_bucket(good: Good, seaweed: Server, cells: Any, rows: Any, owed: Any, stale: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweed.env.items():
            patch.setenv(name, value)
        check_rows(good, seaweed, [*cells, *owed, *rows], stale)


@examples(10, quick=2)
@given(one=st.one_of(*(st.builds(Cell, st.just(t), st.just(c), VALUES, TURNS) for t, c in COLUMNS), ROWS, OWED))
def test_one_row(good: Good, one: Any) -> None:
    check_rows(good, None, [one], False)


# -- what SQLite would run --------------------------------------------------------------------------------------------


def check(good: Good, change: Callable[[Path], object], about: str, *, taken: bool | None) -> None:
    with place_of(None) as place:
        try:
            place.craft(good, change)
            go_through(place, taken=taken)
        except BaseException as error:
            noted(error, about)
            raise


def beside(name: str) -> Callable[[Path], object]:
    return lambda path: crafted.run_sql(path, crafted.BESIDE[name].replace("{secret}", "/etc/passwd"))


def test_everything_beside_the_tables_at_once(good: Good) -> None:
    """But for what cannot be in one file with the others."""

    def change(path: Path) -> None:
        for name in crafted.BESIDE:
            with contextlib.suppress(Exception):
                beside(name)(path)

    check(good, change, "all", taken=True)


@pytest.mark.parametrize("name", crafted.BESIDE if SOAK else random.Random(SEED).sample(list(crafted.BESIDE), 1))
def test_what_is_beside_the_tables(good: Good, name: str) -> None:
    check(good, beside(name), name, taken=True)


INSTEAD = [(table, kind) for table in sorted({table for table, _ in COLUMNS}) for kind in crafted.INSTEAD]


@pytest.mark.parametrize("kind", crafted.INSTEAD)
def test_what_is_in_the_place_of_a_table(good: Good, kind: str) -> None:
    tables = [table for table in sorted({table for table, _ in COLUMNS}) if not table.startswith(("_", "sqlite_"))]
    for table in tables if SOAK else random.Random(f"{SEED} {kind}").sample(tables, 1):
        check(good, lambda path: crafted.instead(path, table, crafted.INSTEAD[kind]), f"{kind}: {table}", taken=False)  # noqa: B023


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", crafted.FILES, ids=lambda it: it.__name__)
def test_files(good: Good, change: Callable[[Path, random.Random], None]) -> None:
    for turn in range(10 * SOAK or 1):
        name = f"{SEED} {change.__name__} {turn}"
        check(good, lambda path: change(path, random.Random(name)), name, taken=None)  # noqa: B023


OLD = range(1, SCHEMA_VERSION)


@pytest.mark.parametrize("version", OLD if SOAK else random.Random(SEED).sample(OLD, 1))
def test_older_versions(good: Good, version: int) -> None:
    check(good, lambda path: crafted.of_version(path, version), str(version), taken=True)


def test_the_watch_sees_what_is_done(strace: None) -> None:
    """That the tests above can fail at all."""
    with Machine() as machine:
        code = (
            "import os, socket; home = os.environ['HOME'];"
            "open(home + '/.bashrc', 'a').close(); os.mkdir('new'); os.rename('new', 'newer'); os.rmdir('newer');"
            "open(home + '/.ssh/id_rsa').read(); os.symlink('/etc', 'l'); os.unlink('l');"
            "fd = os.open('Documents', os.O_RDONLY); os.mkdir('n\\n', dir_fd=fd); os.rmdir('n\\n', dir_fd=fd);"
            "os.utime('.bashrc'); os.chmod('Documents', 0o700); os.link('.bashrc', 'data/x');"
            "s = socket.socket(socket.AF_UNIX); s.bind('sock'); os.unlink('sock');"
            "open('data/fine', 'w').close(); open('/dev/null', 'w').close(); print(open('.ssh/id_rsa').read())"
        )
        import sys

        machine.run([sys.executable, "-I", "-S", "-c", code], watched=True)
        strayed = machine.strayed()
        for word in ("O_APPEND", "mkdir(", "rename(", "rmdir(", "id_rsa", "symlink(", "n\\n", "utimensat(", "chmod(",
                     "link(", "sun_path"):  # fmt: skip
            assert any(word in line for line in strayed), (word, strayed)
        assert not any("fine" in line or "/dev/null" in line for line in strayed)
        assert machine.harmed() == [".bashrc", "Documents"]
        (machine.data_dir / "log").write_bytes(MARKER)
        assert machine.leaks() == ["what was printed", str(machine.data_dir / "log")]
        assert set(SECRETS) <= set(machine.picture())
