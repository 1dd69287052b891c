"""Storages that were made to reach a home, and what their owner gets: nothing. Real mounts, and the commands of a user.

Each attack has worked against some version of lamfs. A machine of its own connects to the crafted storage and goes one
way, watched by strace (tests/support/confined.py). Of the parts there are tests elsewhere: links in a storage folder
(test_links.py, test_linked_objects.py), the spool (test_spool.py), locks (test_odd_locks.py), replies
(test_hostile.py), and random registries (test_untrusted_registry.py).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamfs import hashing
from lamfs.keys import spool_name
from lamfs.model import StorageConfig, instance_id
from lamfs.registry.artifacts import NOW
from tests.support import crafted
from tests.support.confined import MARKER, MEMORY_MIB, SECONDS, Ended, Machine
from tests.support.crafted import KEPT, REGISTRY, SLUG, VICTIMS, Good
from tests.support.hostile import HostileServer, reply
from tests.support.proxy import FaultProxy
from tests.support.servers import Server
from tests.support.servers_fixtures import BUCKET
from tests.support.spools import spool_of

pytestmark = pytest.mark.usefixtures("fuse", "strace")

OTHER_USER = 12345
GONE = "00000000-0000-0000-0000-000000000000:4711:1"
"""A process of another machine."""
VICTIM = list(VICTIMS)
AS_OTHER = """
import os, sys
uid = int(sys.argv[1])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
for path in sys.argv[2:]:
    try: print(repr(open(path, "rb").read()))
    except OSError as error: print(error)
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as found:
        yield found
        found.note_daemons()
        found.end_daemons()
        assert found.strayed() == []
        assert found.harmed() == []
        assert found.leaks(store_of(found)) == []
        assert "Traceback" not in found.logs()
        assert found.peak < MEMORY_MIB


def store_of(machine: Machine) -> Path:
    return machine.base / "store"


def put(good: Good, machine: Machine, attack: Callable[[sqlite3.Connection, Machine], None]) -> Path:
    """The storage folder of an instance in whose registry somebody has made changes; returns the folder."""

    def change(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as conn:
            attack(conn, machine)
            conn.commit()

    good.put_into(StorageConfig(str(store_of(machine))), change)
    return store_of(machine)


def lamfs(machine: Machine, *words: str, code: int | None = 0, seconds: float = SECONDS) -> Ended:
    """Run a command; ``code``: how it has to end, None: with 0, 1 or 2."""
    done = machine.lamfs(*words, allow=[store_of(machine)], seconds=seconds)
    text = (done.output + done.problems).decode(errors="replace")
    assert done.code in ((0, 1, 2) if code is None else (code,)), f"{words} ended with {done.code}\n{text}"
    assert "Traceback" not in text
    assert "should not have happened" not in text
    return done


def ino_of(conn: sqlite3.Connection, key: str) -> int:
    return int(conn.execute("SELECT ino FROM artifact WHERE key=?", (key,)).fetchone()[0])


# -- the journal ------------------------------------------------------------------------------------------------------


def wants_the_home(conn: sqlite3.Connection, machine: Machine) -> None:
    """Rows that tell to store, to show, to write over and to remove files of the home. The journal is not in the
    registry, but somebody may put one there, and say which spool files have the bytes of inodes."""
    home = machine.home
    spool = spool_of(SLUG, StorageConfig(str(store_of(machine))), machine.data_dir)
    key = f"{home}/.ssh/id_rsa"
    conn.execute(
        "CREATE TABLE journal(id INTEGER PRIMARY KEY AUTOINCREMENT, op TEXT, state TEXT, ino INTEGER, uid TEXT,"
        " object_key TEXT, src TEXT, gen INTEGER DEFAULT 0, attempts INTEGER DEFAULT 0, error TEXT,"
        " next_at INTEGER DEFAULT 0, created_at INTEGER, owner TEXT, payload TEXT DEFAULT '{}')"
    )
    for turn, (name, src, state) in enumerate(
        (
            (VICTIM[0], key, "ready"),
            (VICTIM[1], os.path.relpath(key, spool), "ready"),
            (VICTIM[2], key, "open"),
            (VICTIM[3], f"{home}/new", "ready"),
            (VICTIM[4], f"{spool_name(9)}/../../../../../../../../../../..{key}", "ready"),
            (VICTIM[6], f"{home}/.bashrc", "ready"),
            (VICTIM[7], f"{home}/Documents/letter.txt", "ready"),
        )
    ):
        ino = ino_of(conn, name)
        owner = (GONE, None, "nobody:1:1")[turn % 3]
        conn.execute(
            "INSERT INTO journal(op, state, ino, src, owner, created_at) VALUES('put', ?, ?, ?, ?, 1)",
            (state, ino, src, owner),
        )
        conn.execute(
            "UPDATE inode SET size=?, pending=? WHERE ino=?",
            (os.path.getsize(key), f"{'0' * 12}:{src}:{'u' * 20}", ino),
        )
    for object_key in (key, "../home/.ssh/id_rsa", "x/../../home/.bashrc"):
        for payload in ("{}", '{"etag": "e"}'):
            conn.execute(
                "INSERT INTO owed(op, object_key, owner, created_at, payload) VALUES('delete', ?, ?, 1, ?)",
                (object_key, GONE, payload),
            )
    row = f"INSERT INTO owed(op, object_key, created_at) SELECT 'delete', '{key}', 1 FROM inode"
    conn.execute(f"CREATE TRIGGER back AFTER DELETE ON owed BEGIN {row} WHERE ino=1; END")
    conn.execute(f"CREATE TRIGGER again AFTER UPDATE ON inode BEGIN {row} WHERE ino=NEW.ino; END")


def as_stored(machine: Machine) -> None:
    """Through the mount every file is as it is in storage."""
    for key, data in {**KEPT, **VICTIMS}.items():
        done = machine.run(["cat", str(machine.mountpoint / key)])
        assert (done.output, done.problems) == (data, b""), key


def by_a_mount(machine: Machine) -> None:
    lamfs(machine, "mount", str(machine.mountpoint))
    as_stored(machine)
    for name in VICTIM[:8]:
        path = machine.mountpoint / name
        with path.open("r+b") as file:
            file.write(b"X")  # the first byte: the rest of the file stays below it
        path.rename(path.with_suffix(".moved"))
    lamfs(machine, "sync", str(machine.mountpoint))
    for name in VICTIM[:8]:
        path = (machine.mountpoint / name).with_suffix(".moved")
        assert path.read_bytes() == b"X" + VICTIMS[name][1:]
        path.unlink()
    lamfs(machine, "umount", str(machine.mountpoint))


def by_a_mount_to_read(machine: Machine) -> None:
    lamfs(machine, "mount", "--read-only", str(machine.mountpoint))
    as_stored(machine)
    lamfs(machine, "umount", str(machine.mountpoint))


def by_cache(machine: Machine) -> None:
    said = lamfs(machine, "cache", *KEPT, *VICTIMS).output.decode().splitlines()
    assert [Path(line).read_bytes() for line in said] == [*KEPT.values(), *VICTIMS.values()]


def by_close(machine: Machine) -> None:
    lamfs(machine, "close")


def by_fsck(machine: Machine) -> None:
    lamfs(machine, "fsck", code=None)
    lamfs(machine, "fsck", "--repair", code=None)
    lamfs(machine, "fsck", "--data")


def by_delete(machine: Machine) -> None:
    lamfs(machine, "delete", "--yes", *VICTIM[:8])
    lamfs(machine, "delete", "--yes", "--permanent", *VICTIM[8:12])
    lamfs(machine, "delete-instance", "--force", SLUG)


WAYS = [by_a_mount, by_a_mount_to_read, by_cache, by_close, by_fsck, by_delete]


@pytest.mark.parametrize("way", WAYS, ids=lambda it: it.__name__)
def test_a_journal_reaches_no_file_of_the_home(good: Good, machine: Machine, way: Callable[[Machine], None]) -> None:
    store = put(good, machine, wants_the_home)
    lamfs(machine, "connect", str(store))
    way(machine)


def test_a_shared_mount_shows_others_no_file_of_whoever_mounts(good: Good, machine: Machine) -> None:
    """One that others may enter, so that they would read by it what they may not read."""
    for folder in (machine.base, machine.home, machine.mountpoint):
        folder.chmod(0o755)
    store = put(good, machine, wants_the_home)
    lamfs(machine, "connect", str(store))
    lamfs(machine, "mount", "--read-only", "-o", "allow_other", str(machine.mountpoint))
    paths = [str(machine.home / ".ssh/id_rsa"), *(str(machine.mountpoint / name) for name in VICTIM)]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", AS_OTHER, str(OTHER_USER), *paths],
        capture_output=True, text=True, timeout=30, cwd="/",
    )  # fmt: skip
    refused, *shown = done.stdout.splitlines()
    assert os.strerror(errno.EACCES) in refused
    assert shown == [repr(VICTIMS[name]) for name in VICTIM]
    lamfs(machine, "umount", str(machine.mountpoint))


# -- links in the folder ----------------------------------------------------------------------------------------------


def takes_links(conn: sqlite3.Connection, machine: Machine) -> None:
    """An artifact whose object is a link to a secret, and says its very hash; and one that is to be moved into a folder
    which is a link to ~/.ssh."""
    content = hashing.hash_file(machine.home / ".ssh/id_rsa")
    conn.execute(
        "UPDATE revision SET size=?, hash=?, hash_type=?, blocks=?"
        " WHERE id=(SELECT revision_id FROM artifact WHERE key=?)",
        (content.size, content.hash, content.hash_type, content.blocks, VICTIM[0]),
    )
    conn.execute("UPDATE inode SET size=? WHERE ino=?", (content.size, ino_of(conn, VICTIM[0])))
    conn.execute(
        "INSERT INTO inode(ino, mode, uid, gid, nlink, atime_ns, mtime_ns, ctime_ns) VALUES(9000, ?, 0, 0, 2, 1, 1, 1)",
        (stat.S_IFDIR | 0o755,),
    )
    conn.execute("INSERT INTO dentry(parent, name, ino) VALUES(1, 'keys', 9000)")
    ino = ino_of(conn, VICTIM[1])
    conn.execute("UPDATE dentry SET parent=9000, name='authorized_keys' WHERE ino=?", (ino,))
    conn.execute("UPDATE artifact SET key='keys/authorized_keys', key_is_virtual=0, suffix='' WHERE ino=?", (ino,))
    (uid,) = conn.execute("SELECT uid FROM artifact WHERE ino=?", (ino,)).fetchone()
    conn.execute("INSERT INTO owed(op, uid, owner, created_at) VALUES('move', ?, ?, 1)", (uid, GONE))
    conn.execute(
        "INSERT INTO owed(op, object_key, owner, created_at, payload) VALUES('delete', 'keys/id_rsa', ?, 1, ?)",
        (GONE, '{"etag": "e"}'),
    )


def put_links(good: Good, machine: Machine) -> Path:
    keys: list[str] = []

    def attack(conn: sqlite3.Connection, machine: Machine) -> None:
        takes_links(conn, machine)
        keys.extend(conn.execute(f"SELECT object_key FROM {NOW} WHERE key=?", (VICTIM[0],)).fetchone())

    store = put(good, machine, attack)
    (store / "keys").symlink_to(machine.home / ".ssh")
    (store / keys[0]).unlink()
    (store / keys[0]).symlink_to(machine.home / ".ssh/id_rsa")
    return store


@pytest.mark.parametrize("command", ["mount", "cache", "fsck", "close"])
def test_links_in_a_storage_lead_nowhere(good: Good, machine: Machine, command: str) -> None:
    store = put_links(good, machine)
    lamfs(machine, "connect", str(store))
    if command == "mount":
        lamfs(machine, "mount", str(machine.mountpoint))
        done = machine.run(["cat", str(machine.mountpoint / VICTIM[0])])
        assert (done.code, done.output) == (1, b"")
        with (machine.mountpoint / VICTIM[0]).open("r+b", buffering=0) as file, pytest.raises(OSError):
            file.write(b"X")
        for key, data in KEPT.items():
            assert (machine.mountpoint / key).read_bytes() == data
        # What is owed cannot be done as long as the link is there: the mount goes by force, and its daemon tries on.
        lamfs(machine, "umount", "--force", "--timeout", "2", str(machine.mountpoint), code=None)
        machine.end_daemons()
    elif command == "cache":
        lamfs(machine, "cache", VICTIM[0], code=1)
        lamfs(machine, "cache", "kept/0.txt")
    elif command == "fsck":
        lamfs(machine, "fsck", code=1)
        lamfs(machine, "fsck", "--repair", code=1)
        lamfs(machine, "fsck", "--data", code=1)
    else:
        lamfs(machine, "close", code=None)


@pytest.mark.parametrize("place", [".lamindb/_spool", "own", "common", ".lamindb"])
def test_a_spool_folder_that_is_a_link_to_documents(good: Good, machine: Machine, place: str) -> None:
    store = put(good, machine, wants_the_home)
    used = place != "common"  # nothing is in that but what older versions have left
    if place == "own":
        place = str(spool_of(SLUG, StorageConfig(str(store)), machine.data_dir).relative_to(store))
    elif place == "common":
        place = f".lamindb/_spool/{instance_id(SLUG).hex}"
    (store / place).parent.mkdir(exist_ok=True)
    if place == ".lamindb":
        (store / place).rename(store / "objects")
    (store / place).symlink_to(machine.home / "Documents")
    if lamfs(machine, "connect", str(store), code=None).code == 0:
        lamfs(machine, "mount", str(machine.mountpoint), code=1 if used else None)
        lamfs(machine, "umount", str(machine.mountpoint), code=None)
        lamfs(machine, "mount", "--read-only", str(machine.mountpoint), code=None)
        with contextlib.suppress(OSError):
            (machine.mountpoint / "kept/0.txt").read_bytes()
        lamfs(machine, "umount", str(machine.mountpoint), code=None)
        for words in (["fsck"], ["fsck", "--repair"], ["cache", "**"], ["close"], ["delete-instance", "--force", SLUG]):
            lamfs(machine, *words, code=None)


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_storage_with_a_known_name_takes_nothing_from_the_other(good: Good, machine: Machine) -> None:
    """Connecting to the second is refused; what is saved and closed then goes to the first, and the second stays."""
    first = put(good, machine, lambda *_: None)
    lamfs(machine, "connect", str(first))
    second = machine.base / "second"
    good.put_into(
        StorageConfig(str(second)), lambda path: crafted.run_sql(path, "UPDATE storage SET uid='abcdefghijkl'")
    )
    before = {path: path.read_bytes() for path in second.rglob("*") if path.is_file()}
    said = lamfs(machine, "connect", str(second), code=2).problems.decode()
    assert f"'{SLUG}' in {first}" in said
    assert "--name" in said
    (machine.cache_dir / "mine").write_text("mine")
    lamfs(machine, "save", str(machine.cache_dir / "mine"), "--key", "mine")
    lamfs(machine, "close")
    assert {path: path.read_bytes() for path in second.rglob("*") if path.is_file()} == before
    with contextlib.closing(sqlite3.connect(first / REGISTRY)) as conn:
        assert conn.execute("SELECT count(*) FROM artifact WHERE key='mine'").fetchone() == (1,)


def test_a_bucket_does_not_say_how_a_known_instance_is_reached(good: Good, seaweed: Server) -> None:
    config = seaweed.config(BUCKET, f"u{os.urandom(4).hex()}/root")
    with pytest.MonkeyPatch.context() as patch, Machine(env=seaweed.env) as machine, FaultProxy(seaweed.port) as proxy:
        for name, value in seaweed.env.items():
            patch.setenv(name, value)
        good.put_into(config, lambda path: None)
        words = ["--path-style", "--region", str(config.region)]
        lamfs(machine, "connect", config.root, *words, "--endpoint-url", str(config.endpoint_url))
        lamfs(machine, "close")
        said = lamfs(machine, "connect", config.root, *words, "--endpoint-url", proxy.url, code=2).problems.decode()
        assert "--name" in said
        known = json.loads(lamfs(machine, "instances", "--json").output)
        assert [one["slug"] for one in known] == [SLUG]
        settings = [path.read_text() for path in (machine.config_dir / "instances").iterdir()]
        assert all(str(config.endpoint_url) in text and proxy.url not in text for text in settings)
        lamfs(machine, "connect", config.root, *words, "--endpoint-url", proxy.url, "--name", "other")
        lamfs(machine, "close")
        assert machine.strayed() == []
        assert machine.harmed() == []


# -- replies ----------------------------------------------------------------------------------------------------------

_OK = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
_KEY = b"<Contents><Key>root/%s</Key><Size>9</Size><ETag>e</ETag></Contents>"
REPLIES: dict[str, Callable[[str, str], object]] = {
    "XML without end": lambda *_: itertools.chain([_OK, b"<ListBucketResult>"], itertools.repeat(b"<a>" * 20_000)),
    "headers without end": lambda *_: itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"x: y\r\n" * 5000)),
    "a registry of many TB": lambda method, _: (
        reply(b"<ListBucketResult>" + _KEY % REGISTRY.encode() + b"</ListBucketResult>")
        if method == "GET"
        else reply(b"", content_length=str(1 << 50), etag='"e"')
    ),
    "entities": lambda *_: reply(b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x><Key>&a;</Key></x>'),
    "odd keys": lambda *_: reply(
        b"<ListBucketResult><EncodingType>url</EncodingType>"
        + b"".join(_KEY % key for key in (b"%00.lndb", b"..%2F..%2Fx", b"%1B%5B31m", b"0" * 32 + b".lndb", b"%FF"))
        + b"</ListBucketResult>"
    ),
    "redirects": lambda *_: reply(b"", "307 Moved", location="http://127.0.0.1:1/elsewhere"),
    "no HTTP": lambda *_: [b"\x00\xff\r\n" * 1000],
    "the same, always": lambda *_: reply(b"{" * 50_000, etag='"e"', last_modified="Thu, 01 Jan 1970 00:00:00 GMT"),
}


SLOW = ("headers without end", "no HTTP")
"""What is asked again for a while: it may be a server that is just starting."""


@pytest.mark.parametrize("name", REPLIES)
def test_a_server_that_answers_anything(machine: Machine, name: str) -> None:
    machine.env |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    with HostileServer(REPLIES[name]) as server:  # type: ignore[arg-type]
        words = ["s3://bucket/root", "--endpoint-url", server.url, "--path-style", "--region", "us-east-1"]
        ways = [words, [SLUG, "--storage", *words]]
        for way in ways[: 1 if name in SLOW else 2]:
            done = lamfs(machine, "connect", *way, code=None, seconds=60)
            assert done.code != 0
            assert done.problems.decode().count("\n") < 10
        assert server.requests
    assert b"root:x:" not in machine.said
    assert MARKER not in machine.said
    assert json.loads(lamfs(machine, "instances", "--json").output) == []
