"""lamfs as an ordinary user: mounts by way of fusermount3, default places, and nobody else looks in.

The interpreter, /dev/fuse and this checkout may be where only root can reach them. So root plays this on a stage: a
namespace of mounts and processes in which they are within reach, and which is gone when its first process ends, with
all mounts and processes in it. When the tests are run by an ordinary user, that user plays, and the parts of others
are left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import watchdog
from tests.support.mounts import ROOT, children

IS_ROOT = os.getuid() == 0
ALICE, BOB, CAROL = (12345, 12346, 12347) if IS_ROOT else (os.getuid(), -1, -1)
STAGE_SECONDS = 240
COMMAND_SECONDS = 30.0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can act as several users")

# Arguments: the stage's folder; numbers of the device; then pairs of a directory that others cannot enter, and a path
# below it that they need. These paths are bound to the stage, the directories covered, and the paths bound back.
SET_UP = """
stage=$1; major=$2; minor=$3; shift 3
# Mounts of other tests would live on here when they are unmounted there, and their daemons with them.
while read -r _ _ _ _ path rest; do
    case $rest in *" - fuse."*) umount -l "$path" ;; esac
done < <(tac /proc/self/mountinfo)
mount -t tmpfs -o mode=755 lamfs-test "$stage/ns"
mknod "$stage/ns/fuse" c "$major" "$minor"
chmod 666 "$stage/ns/fuse"
mount --bind "$stage/ns/fuse" /dev/fuse
for name in fuse.conf passwd; do mount --bind "$stage/$name" "/etc/$name"; done
closed=(); paths=()
while [ $# -gt 0 ]; do closed+=("$1"); paths+=("$2"); shift 2; done
for i in "${!paths[@]}"; do
    mkdir "$stage/ns/$i"
    mount --bind "${paths[i]}" "$stage/ns/$i"
done
for i in "${!closed[@]}"; do
    case " ${closed[*]:0:i} " in *" ${closed[i]} "*) continue ;; esac
    mount -t tmpfs -o mode=755 lamfs-test "${closed[i]}"
done
for i in "${!paths[@]}"; do
    mkdir -p "${paths[i]}"
    mount --bind "$stage/ns/$i" "${paths[i]}"
done
echo ready
timeout "$seconds" cat || :
"""


def closed_parents(paths: list[str]) -> list[str]:
    """The topmost parent of each path that others cannot enter, and the path; in one list."""
    found: list[str] = []
    for path in dict.fromkeys(os.path.realpath(path) for path in paths):
        for parent in reversed(Path(path).parents):
            if not parent.stat().st_mode & stat.S_IXOTH:
                found += [str(parent), path]
                break
    return found


class Person:
    """Somebody with a home of their own, and nothing of lamfs in the environment."""

    def __init__(self, stage: Stage, uid: int, name: str) -> None:
        self.stage = stage
        self.uid = uid
        self.home = stage.base / name
        if not self.home.exists():
            self.home.mkdir(mode=0o700)
            if IS_ROOT:
                os.chown(self.home, uid, uid)
        self.mountpoint = self.home / "data"
        self.data_dir = self.home / ".local/share/lamfs"
        self.env = {"HOME": str(self.home), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)}

    def run(self, *words: object, code: int = 0) -> str:
        """Run a program, which has to end with ``code``; what it printed (on stderr, when ``code`` is not 0)."""
        return self.stage.run(self, [str(word) for word in words], code)

    def lamfs(self, *words: object, code: int = 0) -> str:
        """Run ``lamfs``."""
        return self.run(sys.executable, "-m", "lamfs", *words, code=code)

    def evaluate(self, *calls: str) -> list[str]:
        """What Python expressions give, or the name of the errno; ``top`` is alice's mount point."""
        program = (
            "import errno, os, sys\n"
            "top = sys.argv[1]\n"
            "for call in sys.argv[2:]:\n"
            "    try: print(repr(eval(call)))\n"
            "    except OSError as error: print(errno.errorcode[error.errno])\n"
        )
        return self.run(sys.executable, "-I", "-S", "-c", program, self.stage.top, *calls).splitlines()

    def mounts(self) -> list[dict[str, Any]]:
        """The mounts that ``lamfs status`` knows of; their pids are those of the stage."""
        mounts: list[dict[str, Any]] = json.loads(self.lamfs("status", "--json"))["mounts"]
        return mounts

    def owned(self) -> dict[str, str]:
        """Type, mode and owner of everything in the home but for the mount, by path."""
        found = {}
        for folder, names, files in os.walk(self.home):
            if Path(folder) == self.home:
                names.remove("data")
            for name in (*names, *files):
                info = os.lstat(os.path.join(folder, name))
                kind = "folder" if stat.S_ISDIR(info.st_mode) else "file"
                path = os.path.relpath(os.path.join(folder, name), self.home)
                found[path] = f"{kind} {stat.S_IMODE(info.st_mode):04o} {info.st_uid}"
        return found


class Stage:
    """Where the persons are. ``base`` is a folder of its own that everybody may enter; used from one thread."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="lamfs-u-", dir="/tmp"))
        self.base.chmod(0o755)
        self.top = ""
        self.conf = self.base / "fuse.conf"
        self.conf.touch()
        # fusermount3 wants to know the name of whoever mounts.
        names = [f"{name}:x:{uid}:{uid}::/nonexistent:/bin/sh\n" for name, uid in (("alice", ALICE), ("bob", BOB))]
        (self.base / "passwd").write_text(Path("/etc/passwd").read_text() + "".join(names))
        self._people: list[Person] = []
        self._holder: subprocess.Popen[bytes] | None = None
        self._first = 0
        if IS_ROOT:
            self._set_up()

    def _set_up(self) -> None:
        (self.base / "ns").mkdir()
        script = f"set -eu; seconds={STAGE_SECONDS}\n{SET_UP}"
        device = os.stat("/dev/fuse").st_rdev
        numbers = [str(os.major(device)), str(os.minor(device))]
        behind = closed_parents([sys.base_prefix, sys.prefix, str(ROOT)])
        # Its end of stdin is the end of this process too: then the first process of the namespace ends, and all others.
        self._holder = subprocess.Popen(
            [
                "unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc",
                "bash", "-c", script, "bash", str(self.base), *numbers, *behind,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline()
        if said != b"ready\n":
            self.close()
            pytest.fail("the namespace could not be set up; its commands have said why on stderr")
        (self._first,) = children(self._holder.pid)

    def person(self, uid: int) -> Person:
        """Somebody who has not used lamfs yet."""
        person = Person(self, uid, f"home{len(self._people)}")
        self._people.append(person)
        return person

    def run(self, person: Person, words: list[str], code: int) -> str:
        env = person.env
        if IS_ROOT:
            ids = ["--setuid", str(person.uid), "--setgid", str(person.uid)]
            words = ["nsenter", "--target", str(self._first), "--mount", "--pid", *ids, *words]
        else:
            # The default place, named for the sake of whoever has to find the processes.
            env = {**env, "LAMFS_DATA_DIR": str(person.data_dir)}
        # A careless umask: what is to be closed to others must not depend on it.
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd="/", env=env, umask=0, text=True,
        )  # fmt: skip
        try:
            output, problems = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            self.close()
            process.kill()
            process.communicate()
            raise AssertionError(f"{words} did not end within {COMMAND_SECONDS} s") from None
        assert process.returncode == code, f"{words} ended with {process.returncode}\n{output}{problems}"
        assert "Traceback" not in output + problems
        return problems if code else output

    def close(self) -> None:
        """End everything that runs here, which takes the mounts away, and remove the files."""
        if not IS_ROOT:
            for person in self._people:
                watchdog.clean_up(str(person.data_dir), str(person.mountpoint))
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            try:
                self._holder.wait(10)
            except subprocess.TimeoutExpired:
                self._holder.kill()  # and with it, by --kill-child, the first process
                self._holder.wait(10)
            assert self._holder.stdout is not None
            self._holder.stdout.close()
            self._holder = None
        shutil.rmtree(self.base, ignore_errors=True)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """One stage for all tests; each has persons of its own."""
    if shutil.which("fusermount3") is None or not os.path.exists("/dev/fuse"):
        text = "/dev/fuse or fusermount3 is missing"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    stage = Stage()
    try:
        yield stage
    finally:
        stage.close()


@pytest.fixture
def alice(stage: Stage) -> Iterator[Person]:
    """Somebody who has not used lamfs yet. Their mount is unmounted in the end, and its log holds no surprise."""
    alice = stage.person(ALICE)
    stage.top = str(alice.mountpoint)
    stage.conf.write_text("")
    yield alice
    if alice.mounts():
        alice.lamfs("umount", alice.mountpoint)
    for log in alice.data_dir.glob("*/mount.log"):
        assert not re.search("Traceback|unexpected", log.read_text()), log.read_text()


def check(person: Person, cases: Mapping[str, object]) -> None:
    """Each expression gives, for this person, this value or errno."""
    got = person.evaluate(*cases)
    wanted = [value if isinstance(value, str) and value.startswith("E") else repr(value) for value in cases.values()]
    assert dict(zip(cases, got, strict=True)) == dict(zip(cases, wanted, strict=True))


def test_the_first_day(alice: Person) -> None:
    """One command makes the default instance and mounts it; files can be used, and are there after the next mount."""
    said = alice.lamfs("mount", "~/data")
    assert f"is mounted at {alice.mountpoint}" in said
    check(
        alice,
        {
            "os.getuid()": ALICE,
            "os.listdir(top)": [],
            "open(top + '/a.csv', 'w').write('1,2')": 3,
            "os.mkdir(top + '/d', 0o750)": None,
            "os.rename(top + '/a.csv', top + '/d/b.csv')": None,
            "open(top + '/d/b.csv', 'a').write('3')": 1,
            "open(top + '/d/b.csv').read()": "1,23",
            "os.chmod(top + '/d/b.csv', 0o640)": None,
            "oct(os.stat(top + '/d/b.csv').st_mode)": "0o100640",
            "oct(os.stat(top + '/d').st_mode)": "0o40750",
            "[os.stat(top + path).st_uid for path in ('', '/d', '/d/b.csv')]": [ALICE] * 3,
            "os.symlink('d/b.csv', top + '/link')": None,
            "open(top + '/link').read()": "1,23",
            "open(top + '/gone', 'w').write('x')": 1,
            "os.unlink(top + '/gone')": None,
            "os.chmod(top + '/d/b.csv', 0o400)": None,
            "open(top + '/d/b.csv', 'a')": "EACCES",
            "os.chmod(top + '/d/b.csv', 0o600)": None,
            f"os.chown(top + '/d/b.csv', {ALICE}, -1)": None,
            f"os.chown(top + '/d/b.csv', {ALICE + 1}, -1)": "EPERM",
            "os.chown(top + '/d/b.csv', 0, 0)": "EPERM",
            "os.chown(top + '/d/b.csv', -1, 54321)": "EPERM",
            "os.chown(top + '/d/b.csv', -1, os.getgid())": None,
        },
    )
    alice.lamfs("sync", alice.mountpoint)
    info = json.loads(alice.lamfs("info", "--json", alice.mountpoint / "d/b.csv"))
    assert (info["key"], info["size"]) == ("d/b.csv", 4)
    assert alice.lamfs("ls") == "d/b.csv\n"
    assert f"{info['created_by']}/default at {alice.mountpoint}" in alice.lamfs("status")
    # Nothing that lamfs has made can be looked at by others; while it is mounted, and later.
    for _ in range(2):
        owned = alice.owned()
        assert {".config/lamfs", ".cache/lamfs", ".local/share/lamfs/storage/.lamindb"} < owned.keys()
        assert set(owned.values()) == {f"folder 0700 {ALICE}", f"file 0600 {ALICE}"}, owned
        if alice.mounts():
            alice.lamfs("umount", alice.mountpoint)
    assert "clean" in alice.lamfs("fsck", "--data")
    alice.lamfs("mount", alice.mountpoint)
    check(alice, {"sorted(os.listdir(top))": ["d", "link"], "open(top + '/link').read()": "1,23"})


def test_killed_and_mounted_again(alice: Person) -> None:
    """An instance of one's own, whose daemon is killed: the next mount is as any other."""
    store = alice.home / "store"
    alice.lamfs("login", "somebody1")
    alice.lamfs("init", "--storage", store, "--name", "screens")
    alice.lamfs("mount", alice.mountpoint, "-o", "real_keys")
    check(alice, {"open(top + '/stored', 'w').write('1')": 1})
    alice.lamfs("sync", alice.mountpoint)
    check(alice, {"open(top + '/owed', 'w').write('two')": 3})
    alice.run("kill", "-9", alice.mounts()[0]["pid"])
    alice.lamfs("mount", alice.mountpoint, "-o", "real_keys")
    check(alice, {"open(top + '/stored').read()": "1", "open(top + '/owed').read()": "two"})
    alice.lamfs("umount", alice.mountpoint)
    assert alice.run("cat", store / "owed") == "two"
    assert set(alice.owned().values()) == {f"folder 0700 {ALICE}", f"file 0600 {ALICE}"}


LOOKING = {
    "os.listdir(top)": "EACCES",
    "os.stat(top)": "EACCES",
    "open(top + '/open').read()": "EACCES",
    "open(top + '/new', 'w')": "EACCES",
    "os.unlink(top + '/open')": "EACCES",
}


@needs_root
def test_nobody_else_looks_in(alice: Person, stage: Stage) -> None:
    """Neither another user nor root, whatever the modes; and nobody else unmounts it."""
    alice.lamfs("mount", alice.mountpoint)
    alice.home.chmod(0o755)
    check(alice, {"open(top + '/open', 'w').write('x')": 1, "os.chmod(top + '/open', 0o666)": None})
    check(alice, {"os.chmod(top, 0o777)": None})
    bob = stage.person(BOB)
    check(bob, LOOKING)
    check(stage.person(0), LOOKING)
    for words in (["umount"], ["umount", "--force"]):
        assert "was mounted by another user" in bob.lamfs(*words, alice.mountpoint, code=1)
    assert "not in a living mount" in bob.lamfs("sync", alice.mountpoint, code=1)
    check(alice, {"os.listdir(top)": ["open"]})


@needs_root
def test_others_are_let_in_only_by_leave_of_the_system(alice: Person, stage: Stage) -> None:
    """``allow_other`` needs user_allow_other in /etc/fuse.conf; then the modes decide."""
    assert "user_allow_other in /etc/fuse.conf" in alice.lamfs("mount", alice.mountpoint, "-o", "allow_other", code=1)
    assert alice.mounts() == []
    stage.conf.write_text("user_allow_other\n")
    alice.lamfs("mount", alice.mountpoint, "-o", "allow_other")
    alice.home.chmod(0o755)
    check(
        alice,
        {
            "os.chmod(top, 0o755)": None,
            "open(top + '/open', 'w').write('x')": 1,
            "os.chmod(top + '/open', 0o644)": None,
            "open(top + '/closed', 'w').write('x')": 1,
            "os.chmod(top + '/closed', 0o600)": None,
        },
    )
    bob = stage.person(BOB)
    check(
        bob,
        {
            "sorted(os.listdir(top))": ["closed", "open"],
            "open(top + '/open').read()": "x",
            "open(top + '/open', 'a')": "EACCES",
            "open(top + '/closed')": "EACCES",
            "open(top + '/new', 'w')": "EACCES",
            "os.chmod(top + '/open', 0o666)": "EPERM",
            f"os.chown(top + '/open', {BOB}, -1)": "EPERM",
            "os.unlink(top + '/open')": "EACCES",
        },
    )
    assert "was mounted by another user" in bob.lamfs("umount", alice.mountpoint, code=1)


def share(alice: Person, stage: Stage) -> None:
    """A mount that others can get to, with files of several modes in it; not mounted yet."""
    stage.conf.write_text("user_allow_other\n")
    alice.home.chmod(0o711)
    alice.lamfs("mount", alice.mountpoint)
    check(alice, {"os.chmod(top, 0o775)": None, "os.mkdir(top + '/shut', 0o700)": None})
    for name, mode in (("f", 0o664), ("closed", 0o600), ("wide", 0o666), ("shut/f", 0o644)):
        check(alice, {f"open(top + '/{name}', 'w').write('x')": 1, f"os.chmod(top + '/{name}', {mode})": None})
    alice.lamfs("umount", alice.mountpoint)


@needs_root
def test_control_files_are_as_closed_as_the_files(alice: Person, stage: Stage) -> None:
    share(alice, stage)
    info, numbers = (
        "top + '/.lamfs/info/",
        ("len(open(top + '/.lamfs/stats').read()) > 99", "os.stat(top + '/.lamfs/stats').st_uid"),
    )
    own = {
        f"'uid' in open({info}f').read()": True,
        f"'uid' in open({info}closed').read()": True,
        f"os.listdir({info}shut')": ["f"],
        numbers[0]: True,
        numbers[1]: ALICE,
    }
    closed = {f"'uid' in open({info}closed').read()": "EACCES", f"os.listdir({info}shut')": "EACCES"}
    alice.lamfs("mount", "-o", "allow_other", alice.mountpoint)
    bob, root = stage.person(BOB), stage.person(0)
    check(alice, own)
    check(root, own)
    check(bob, {**own, **closed, numbers[0]: "EACCES"})
    alice.lamfs("umount", alice.mountpoint)
    alice.lamfs("mount", "-o", "allow_other,public_stats", alice.mountpoint)
    check(bob, {**own, **closed})
    alice.lamfs("umount", alice.mountpoint)
    # Who is shown to own everything has the records too, but the numbers stay with the user that mounted.
    alice.lamfs("mount", "-o", f"allow_other,uid={BOB}", alice.mountpoint)
    check(bob, {**own, numbers[0]: "EACCES"})
    check(alice, {**own, **closed})


READ_F, WRITE_F, WRITE_WIDE = (
    "open(top + '/f').read()", "open(top + '/f', 'a').write('')", "open(top + '/wide', 'a').write('')",
)  # fmt: skip
READ_CLOSED, MAKE, LOOK = "open(top + '/closed').read()", "open(top + '/new', 'w').write('12')", "len(os.listdir(top))"
SHARED: dict[str, dict[str, dict[str, object]]] = {
    "allow_other": {
        "bob": {READ_F: "x", WRITE_F: "EACCES", WRITE_WIDE: 0, READ_CLOSED: "EACCES", MAKE: "EACCES"},
        "alice": {READ_F: "x", WRITE_F: 0, READ_CLOSED: "x", MAKE: 2},
    },
    "allow_other,umask=022": {
        "bob": {READ_F: "x", WRITE_F: "EACCES", WRITE_WIDE: "EACCES", READ_CLOSED: "EACCES", MAKE: "EACCES"},
        "alice": {READ_F: "x", WRITE_F: 0, WRITE_WIDE: 0, READ_CLOSED: "x", MAKE: 2},
    },
    "allow_other,gid=1500,umask=007": {
        "bob": {READ_F: "x", WRITE_F: 0, WRITE_WIDE: 0, READ_CLOSED: "EACCES", MAKE: 2},
        "alice": {READ_F: "x", WRITE_F: 0, READ_CLOSED: "x", "open(top + '/new')": "EACCES"},
        "carol": {LOOK: "EACCES", READ_F: "EACCES", WRITE_WIDE: "EACCES", MAKE: "EACCES"},
    },
    "allow_other,uid=1500": {
        "bob": {READ_F: "x", WRITE_F: 0, READ_CLOSED: "x", MAKE: 2},
        "alice": {READ_F: "x", WRITE_F: 0, READ_CLOSED: "EACCES"},
        "carol": {READ_F: "x", WRITE_F: "EACCES", READ_CLOSED: "EACCES"},
    },
}  # fmt: skip
"""Words after -o as README.md's table has them, and what users may do then; 1500 is bob."""


@needs_root
@pytest.mark.parametrize("words", SHARED)
def test_the_ways_to_share_a_mount(alice: Person, stage: Stage, words: str) -> None:
    share(alice, stage)
    people = {"alice": alice, "bob": stage.person(BOB), "carol": stage.person(CAROL)}
    alice.lamfs("mount", "-o", words.replace("1500", str(BOB)), alice.mountpoint)
    for name, cases in SHARED[words].items():
        check(people[name], cases)
    alice.lamfs("sync", alice.mountpoint)
    record = json.loads(alice.lamfs("info", "--json", "new"))
    assert record["created_by"] == json.loads(alice.lamfs("info", "--json", "f"))["created_by"]
    alice.lamfs("umount", alice.mountpoint)
    # What was shown has changed nothing: the owner is the user that wrote.
    alice.lamfs("mount", alice.mountpoint)
    writer = BOB if SHARED[words]["bob"][MAKE] == 2 else ALICE
    check(
        alice,
        {
            "os.stat(top + '/new').st_uid": writer,
            "[oct(os.stat(top + name).st_mode & 0o777) for name in ('/f', '/wide', '')]": ["0o664", "0o666", "0o775"],
            "os.stat(top + '/f').st_gid": ALICE,
        },
    )


def test_readme_names_the_ways_to_share() -> None:
    found = re.findall(r"^\| `lamfs mount -o (\S+) ~/data` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert found == list(SHARED)


@needs_root
def test_a_mount_point_of_somebody_else(alice: Person, stage: Stage) -> None:
    place = stage.base / "of-root"
    place.mkdir(mode=0o755)
    problem = alice.lamfs("mount", place, code=1)
    assert str(place) in problem
    assert "that you own the folder" in problem
    assert "cannot be made (Permission denied)" in alice.lamfs("mount", place / "below", code=1)
    assert alice.mounts() == []


@needs_root
def test_a_living_mount_of_somebody_else_is_no_dead_one(alice: Person, stage: Stage) -> None:
    """Who finds no record of a mount among their own must not take it for one that has lost its daemon."""
    alice.lamfs("mount", alice.mountpoint)
    alice.home.chmod(0o755)
    for person in (stage.person(BOB), stage.person(0)):
        assert "lost its daemon" not in person.lamfs("mount", alice.mountpoint, code=1)
    check(alice, {"open(top + '/f', 'w').write('x')": 1})
