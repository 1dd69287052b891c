"""What other users see of a mount that lets them in: ``.lamfs`` and extended attributes are as closed as the files.

Root mounts, and a child becomes somebody else. test_ordinary_user.py has mounts of ordinary users.
"""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import pytest

from tests.support.mounts import MountedInstance, outcome

ALICE, BOB, GROUP = 12345, 12346, 12400
OPENS = 18_000
MIB = 1 << 20

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as several users")

PROGRAM = """
import errno, json, mmap, os, sys
uid, groups, top = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
os.setgroups(groups); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
kept = {}
def read(path): return open(top + '/' + path, 'rb').read().decode()
def key(path): return json.loads(read('.lamfs/info/' + path))['key']
def names(path): return sorted(os.listdir(top + '/' + path))
def mode(path): return oct(os.stat(top + '/' + path).st_mode & 0o777)
def keep(name, path, flags=0): kept[name] = os.open(top + '/' + path, flags)
for line in sys.stdin:
    try: print(json.dumps(eval(line)), flush=True)
    except OSError as error: print(json.dumps(errno.errorcode[error.errno]), flush=True)
"""


class Other:
    """A process of another user that stays, with what it has opened, and evaluates expressions (see PROGRAM)."""

    def __init__(self, mount: MountedInstance, uid: int, *groups: int) -> None:
        # The interpreter may lie where other users cannot look: it becomes another user when it runs already.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PROGRAM, str(uid), json.dumps(groups), str(mount.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=20)

    def evaluate(self, call: str) -> object:
        """What an expression gives, as JSON has it, or the name of the errno."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(call, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"{call} raised something else"
        value: object = json.loads(line)
        return value

    def check(self, cases: Mapping[str, object]) -> None:
        """Each expression gives this value or errno."""
        assert {call: self.evaluate(call) for call in cases} == dict(cases)


def give(path: Path, mode: int, uid: int = ALICE, data: bytes | None = b"x") -> Path:
    """A file (a directory when ``data`` is None) of a user, who is the only one in the group."""
    if data is None:
        path.mkdir()
    else:
        path.write_bytes(data)
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


@pytest.fixture
def shared(local_instance: MountedInstance) -> Iterator[MountedInstance]:
    """A mount that lets others in, with things of alice's in it."""
    local_instance.mount(["allow_other"])
    fill(local_instance.path)
    return local_instance


def fill(top: Path) -> None:
    top.chmod(0o755)
    give(top / "open", 0o644)
    give(top / "closed", 0o600)
    give(top / "none", 0o000)
    give(top / "public", 0o755, data=None)
    give(top / "public/in", 0o644)
    give(top / "private", 0o700, data=None)
    give(top / "private/in", 0o644)
    give(top / "pass", 0o711, data=None)
    give(top / "pass/in", 0o644)
    (top / "link").symlink_to("private/in")
    os.link(top / "private/in", top / "public/hard")


EVERYBODY = {
    "key('open')": "open",
    "names('.lamfs')": ["info", "metrics", "stats"],
    "names('.lamfs/info')": ["closed", "none", "open", "pass", "private", "public"],
    "names('.lamfs/info/public')": ["hard", "in"],
    "key('public/in')": "public/in",
    "key('pass/in')": "pass/in",
    "mode('.lamfs')": "0o555",
    "mode('.lamfs/info')": "0o555",
    "mode('.lamfs/info/open')": "0o444",
    "mode('.lamfs/info/closed')": "0o400",
    "mode('.lamfs/info/none')": "0o0",
    "mode('.lamfs/info/private')": "0o500",
    "mode('.lamfs/stats')": "0o400",
    "os.stat(top + '/.lamfs/info/closed').st_uid": ALICE,
    "os.stat(top + '/.lamfs/info/private').st_gid": ALICE,
    "os.stat(top + '/.lamfs/stats').st_uid": 0,
    "keep('w', '.lamfs/info/open', os.O_RDWR)": "EACCES",
    "key('link')": "ENOENT",
}
NOBODY_ELSE = ("key('closed')", "names('.lamfs/info/private')", "key('private/in')", "names('.lamfs/info/pass')")
NUMBERS = ("len(read('.lamfs/stats')) > 500", "len(read('.lamfs/metrics')) > 500")


def test_what_one_may_not_read_has_no_record_to_read(shared: MountedInstance) -> None:
    shared.sync()
    with Other(shared, BOB) as bob:
        bob.check(EVERYBODY)
        bob.check(dict.fromkeys((*NOBODY_ELSE, *NUMBERS, "key('none')"), "EACCES"))
        # Not by another way either: a name below it, a path that leaves it again, or its attributes.
        bob.check(
            {
                "mode('.lamfs/info/private/in')": "EACCES",
                "names('.lamfs/info/private/../private')": "EACCES",
                "key('private/../open')": "EACCES",
                "keep('p', '.lamfs/info/private', os.O_PATH)": None,
                "os.listdir(kept['p'])": "EBADF",
                "os.stat('in', dir_fd=kept['p']) and 1": "EACCES",
                "keep('c', '.lamfs/info/closed', os.O_PATH)": None,
                "os.open('/proc/self/fd/%d' % kept['c'], os.O_RDONLY)": "EACCES",
                "os.chmod(top + '/.lamfs/info/closed', 0o777)": "EPERM",
                "os.chmod(top + '/.lamfs/stats', 0o777)": "EPERM",
            }
        )
    with Other(shared, ALICE) as alice:
        alice.check({call: value for call, value in EVERYBODY.items() if call != "key('none')"})
        alice.check(
            {
                "key('closed')": "closed",
                "names('.lamfs/info/private')": ["in"],
                "key('private/in')": "private/in",
                "names('.lamfs/info/pass')": ["in"],
                "key('none')": "EACCES",
                NUMBERS[0]: "EACCES",
                NUMBERS[1]: "EACCES",
            }
        )
    # Root is the user that mounted here, and may read all.
    assert shared.info("none")["key"] == "none"
    assert os.listdir(shared.path / ".lamfs/info/private") == ["in"]
    assert "pid: " in (shared.path / ".lamfs/stats").read_text()
    listed = shared.run(["ls", "-lRn", ".lamfs/"]).stdout
    assert f"-r-------- 1 {ALICE} {ALICE}" in listed
    assert f"dr-x------ 2 {ALICE} {ALICE}" in listed
    assert "-r-------- 1 0 0" in listed
    assert shared.run(["find", ".lamfs/", "-perm", "/222"]).stdout == ""


def test_a_change_of_mode_or_owner_counts_at_once(shared: MountedInstance) -> None:
    top = shared.path
    with Other(shared, BOB) as bob:
        for closed in (0o600, 0o000):
            bob.check({"key('open')": "open", "names('.lamfs/info/public')": ["hard", "in"]})
            (top / "open").chmod(closed)
            (top / "public").chmod(closed)
            bob.check({"key('open')": "EACCES", "names('.lamfs/info/public')": "EACCES", "key('public/in')": "EACCES"})
            (top / "open").chmod(0o644)
            (top / "public").chmod(0o755)
        os.chown(top / "closed", BOB, BOB)
        bob.check({"key('closed')": "closed"})
        # Also of a file that is being written, whose mode the registry does not have yet.
        with (top / "open").open("r+b", buffering=0) as file:
            file.write(b"y")
            os.fchmod(file.fileno(), 0o600)
            bob.check({"key('open')": "EACCES"})
        bob.check({"key('open')": "EACCES"})
        top.chmod(0o700)
        bob.check({"names('.lamfs')": "EACCES", "mode('.lamfs/info')": "EACCES"})


def test_what_is_open_stays_open_as_with_any_file(shared: MountedInstance) -> None:
    """Who has opened a directory or a file may go on with it, and gets nowhere from there."""
    top = shared.path
    with Other(shared, BOB) as bob:
        bob.check(
            {
                "keep('d', '.lamfs/info/public', os.O_DIRECTORY)": None,
                "keep('f', '.lamfs/info/open')": None,
                "keep('real', 'public', os.O_DIRECTORY)": None,
            }
        )
        (top / "public").chmod(0o700)
        (top / "open").chmod(0o600)
        for kept in ("d", "real"):
            bob.check(
                {
                    f"sorted(os.listdir(kept['{kept}']))": ["hard", "in"],
                    f"os.stat('in', dir_fd=kept['{kept}']) and 1": "EACCES",
                    f"os.open('in', 0, dir_fd=kept['{kept}'])": "EACCES",
                }
            )
        bob.check({"json.loads(os.read(kept['f'], 10000))['key']": "open"})


def test_names_that_change_their_meaning(shared: MountedInstance) -> None:
    """Records go with the file, not with the name: replaced, removed, moved, linked."""
    top = shared.path
    with Other(shared, BOB) as bob:
        bob.check({"key('open')": "open", "keep('before', '.lamfs/info/open')": None})
        give(top / "secret", 0o600, data=b"secret")
        os.rename(top / "secret", top / "open")
        bob.check({"key('open')": "EACCES", "mode('.lamfs/info/open')": "0o400"})
        shared.sync()
        bob.check({"os.read(kept['before'], 10000) and 1": "ESTALE"})
        bob.check({"key('public/in')": "public/in"})
        os.rename(top / "public/in", top / "private/moved")
        bob.check({"key('public/in')": "ENOENT", "key('private/moved')": "EACCES"})
        os.unlink(top / "open")
        bob.check({"key('open')": "ENOENT"})
        give(top / "open", 0o600)
        bob.check({"key('open')": "EACCES"})
        # A hard link in a directory that is open: the file itself may be read there, and so may its record.
        bob.check({"read('public/hard')": "x", "key('public/hard')": "private/in"})
        (top / "private/in").chmod(0o600)
        bob.check({"read('public/hard')": "EACCES", "key('public/hard')": "EACCES"})


def test_public_stats_are_for_everybody(local_instance: MountedInstance) -> None:
    local_instance.mount(["allow_other", "public_stats"])
    fill(local_instance.path)
    local_instance.sync()
    numbers = ("mode('.lamfs/stats')", "mode('.lamfs/metrics')")
    with Other(local_instance, BOB) as bob:
        bob.check({**dict.fromkeys(NUMBERS, True), **dict.fromkeys(numbers, "0o444")})
        bob.check(dict.fromkeys(NOBODY_ELSE, "EACCES"))


def test_owner_and_mask_that_are_shown_count_for_records_too(local_instance: MountedInstance) -> None:
    """``-o uid=`` gives that user the files and their records, but not the numbers of the mount."""
    local_instance.mount()
    top = local_instance.path
    fill(top)
    (top / "closed").chmod(0o640)
    top.chmod(0o777)
    local_instance.remount(["allow_other", f"uid={BOB}", f"gid={GROUP}", "umask=027"])
    for name in ("closed", "private", "public/in", "pass", "."):
        real, told = (top / name).stat(), (top / ".lamfs/info" / name).stat()
        assert (told.st_uid, told.st_gid) == (real.st_uid, real.st_gid) == (BOB, GROUP)
        assert told.st_mode == real.st_mode & ~(0o222 if stat.S_ISDIR(real.st_mode) else 0o333)
    with Other(local_instance, BOB) as bob, Other(local_instance, ALICE, GROUP) as alice:
        bob.check({"read('closed')": "x", "key('closed')": "closed", "names('.lamfs/info/private')": ["in"]})
        bob.check(dict.fromkeys(NUMBERS, "EACCES"))
        alice.check({"read('closed')": "x", "key('closed')": "closed", "read('private/in')": "EACCES"})
        alice.check({"key('private/in')": "EACCES", **dict.fromkeys(NUMBERS, "EACCES")})
        with Other(local_instance, ALICE) as nobody:  # whose file it is in the registry
            nobody.check({"read('open')": "EACCES", "key('open')": "EACCES", "names('.lamfs')": "EACCES"})
    for name, mode in (("stats", 0o400), ("metrics", 0o400), ("", 0o555)):
        shown = (top / ".lamfs" / name).stat()
        assert (shown.st_uid, shown.st_gid, stat.S_IMODE(shown.st_mode)) == (0, os.getgid(), mode)
    with os.scandir(top / ".lamfs") as entries:
        assert {entry.name: entry.stat().st_uid for entry in entries} == {"info": BOB, "stats": 0, "metrics": 0}


def test_artifacts_without_a_name(shared: MountedInstance) -> None:
    """Those in ``.lamindb`` are as open as the directory says."""
    shared.python(
        "import lamfs as ln, sys\n"
        "open(sys.argv[1], 'w').write('x')\n"
        "ln.Artifact(sys.argv[1], description='nameless').save()\n",
        str(shared.base / "nameless.txt"),
    )
    (name,) = os.listdir(shared.path / ".lamindb")
    with Other(shared, BOB) as bob:
        bob.check({f"key('.lamindb/{name}')": None, "names('.lamfs/info/.lamindb')": [name]})
        (shared.path / ".lamindb").chmod(0o700)
        bob.check({f"key('.lamindb/{name}')": "EACCES", "names('.lamfs/info/.lamindb')": "EACCES"})


def test_extended_attributes_are_as_closed_as_the_file(local_instance: MountedInstance) -> None:
    local_instance.mount(["allow_other", "xattr"])
    fill(local_instance.path)
    local_instance.sync()
    for name in ("open", "closed", "private"):
        os.setxattr(local_instance.path / name, "user.mine", b"1")
    calls = {
        f"os.{call}(top + '/{name}', 'user.{attribute}'{value}) and 1": "EACCES"
        for name in ("closed", "private", "private/in")
        for call, attribute, value in (
            ("getxattr", "lamfs.uid", ""),
            ("getxattr", "lamfs.storage_path", ""),
            ("getxattr", "mine", ""),
            ("setxattr", "lamfs.description", ", b'x'"),
            ("removexattr", "mine", ""),
        )
    }
    with Other(local_instance, BOB) as bob:
        bob.check(calls)
        bob.check({"len(os.getxattr(top + '/open', 'user.lamfs.uid'))": 20})
        bob.check({"os.setxattr(top + '/open', 'user.lamfs.description', b'x')": "EACCES"})
        for name in ("stats", "info/open", "info/closed"):
            bob.check({f"os.getxattr(top + '/.lamfs/{name}', 'trusted.x') and 1": "ENODATA"})
    with Other(local_instance, ALICE) as alice:
        alice.check({"len(os.getxattr(top + '/closed', 'user.lamfs.uid'))": 20})


# -- programs and memory ----------------------------------------------------------------------------------------------


def test_programs_read_records_whole(local_mount: MountedInstance, tmp_path: Path) -> None:
    top = local_mount.path
    (top / "f").write_bytes(b"x" * 100)
    local_mount.sync()
    path = top / ".lamfs/info/f"
    wanted = path.read_bytes()
    assert json.loads(wanted)["size"] == 100
    assert path.stat().st_size == len(wanted)
    local_mount.run(["cp", path, tmp_path / "copy"])
    assert (tmp_path / "copy").read_bytes() == wanted
    local_mount.run(["dd", f"if={path}", f"of={tmp_path / 'pieces'}", "bs=7", "status=none"])
    assert (tmp_path / "pieces").read_bytes() == wanted
    assert local_mount.run(["tail", "-c", "20", path]).stdout.encode() == wanted[-20:]
    assert local_mount.run(["head", "-n", "3", path]).stdout.encode() == b"".join(wanted.splitlines(True)[:3])
    program = (
        "import mmap, os, sys; f = open(sys.argv[1], 'rb'); print(len(mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE)))"
    )
    assert local_mount.run([sys.executable, "-c", program, path]).stdout == f"{len(wanted)}\n"
    with path.open("rb", buffering=0) as file:
        for offset in (0, 50, len(wanted) - 1, len(wanted), len(wanted) + 9, 3):
            assert os.pread(file.fileno(), 20, offset) == wanted[offset : offset + 20]
    # bash goes back to the end of each line that it has read: the lines are those of one content.
    lines = local_mount.run(["sh", "-c", 'while IFS= read -r line; do echo "$line"; done < .lamfs/info/f']).stdout
    assert lines.encode() == wanted


def proportional(pid: int) -> int:
    """PSS of a process, in bytes."""
    line = next(line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("reads", [0, 10, 1 << 17], ids=["opened", "begun", "whole"])
def test_very_many_opens_take_little_memory(local_mount: MountedInstance, reads: int) -> None:
    """Whether or not something is read, whether or not it is closed."""
    local_mount.extend(300.0)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    path = os.fspath(local_mount.path / ".lamfs/metrics")
    batch = min(OPENS, before[1] - 500)
    with open(path, "rb") as file:
        file.read()
    begin = proportional(local_mount.pid)
    handles: list[int] = []
    try:
        for _ in range(OPENS):
            if len(handles) == batch:
                os.close(handles.pop())
            handles.append(os.open(path, os.O_RDONLY))
            if reads:
                assert os.read(handles[-1], reads)
        held = proportional(local_mount.pid) - begin
    finally:
        for fd in handles:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert held < 6 * MIB
    assert outcome(lambda: Path(path).read_bytes()[:7]) == b"# HELP "
    assert proportional(local_mount.pid) - begin < 6 * MIB
