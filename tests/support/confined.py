"""A machine with a home full of secrets. strace watches what the commands that it runs reach.

    with Machine() as machine:
        done = machine.lamfs("connect", str(store), allow=[store])
        assert done.code in (0, 1, 2)
        assert machine.strayed() == []          # opened for writing, renamed, linked, removed … outside its folders
        assert machine.harmed() == []

A command's own folders are those that LAMFS_*_DIR name, the mount point, and those in ``allow``. Other paths that a
program may reach are in ``ELSEWHERE``, with the reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import pytest

from tests.support import watchdog
from tests.support.mounts import ROOT, wait_until

SECONDS = 20.0
"""Longest time that a command may take, whatever its input."""
MEMORY_MIB = 300
MARKER = b"TheSecretOfThisTest"
SECRETS = {
    ".ssh/id_rsa": b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
    ".ssh/authorized_keys": b"ssh-ed25519 AAAA\n",
    ".bashrc": b"# my shell\n",
    "Documents/letter.txt": b"Dear\n",
    "Documents/deep/er/notes.txt": b"notes\n",
}
ELSEWHERE = re.compile(
    r"/dev/(null|fuse|tty)"
    r"|/proc/(self|thread-self|\d+)/\w+"  # the name of a process
    r"|/sys/devices/virtual/bdi/[0-9:]+/read_ahead_kb"  # of the mount itself
    r"|/memfd:[\w-]+( ?\(deleted\))?"  # memory
    r"|/run/mount/(utab|\.utab|utab\.\w+)"  # fusermount3
)

# Where the paths are in each system call: (argument of the directory or None, argument of the path). An int: a
# descriptor. For opened files the kernel's own answer is used, which is the path behind all links.
_ONE, _TWO = ((None, 0),), ((None, 0), (None, 1))
_AT, _AT_TWO = ((0, 1),), ((0, 1), (2, 3))
CALLS: dict[str, tuple[tuple[int | None, int], ...] | int] = {
    "open": (), "openat": (), "openat2": (), "creat": (),
    "rename": _TWO, "renameat": _AT_TWO, "renameat2": _AT_TWO, "link": _TWO, "linkat": _AT_TWO,
    "symlink": ((None, 1),), "symlinkat": ((1, 2),), "unlink": _ONE, "unlinkat": _AT, "rmdir": _ONE,
    "mkdir": _ONE, "mkdirat": _AT, "mknod": _ONE, "mknodat": _AT, "truncate": _ONE, "ftruncate": 0,
    "chmod": _ONE, "fchmod": 0, "fchmodat": _AT, "fchmodat2": _AT,
    "chown": _ONE, "lchown": _ONE, "fchown": 0, "fchownat": _AT,
    "utime": _ONE, "utimes": _ONE, "futimesat": _AT, "utimensat": _AT,
    "setxattr": _ONE, "lsetxattr": _ONE, "fsetxattr": 0, "removexattr": _ONE, "lremovexattr": _ONE, "fremovexattr": 0,
    "bind": (),
}  # fmt: skip
_PROCESS = re.compile(r"/proc/\d+/(cwd|root)")
_WRITES = re.compile(r"\bO_(WRONLY|RDWR|CREAT|TRUNC|APPEND|TMPFILE)\b")
_LINE = re.compile(r"(\d+) +(.*)", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+|\?)(<((?:[^<>\\]|\\.)*)>)?(.*)", re.DOTALL)
_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|<(?:[^<>\\]|\\.)*>|[\[{(]|[\]})]|,|[^"<>\[\](){},]+|.', re.DOTALL)
_FD = re.compile(r"(-?\w+)(?:<((?:[^<>\\]|\\.)*)>)?")
_ESCAPE = re.compile(rb"\\(x[0-9a-f]{2}|[0-7]{1,3}|.)", re.DOTALL)
_PLAIN = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"v": b"\v", b"f": b"\f"}


class Ended(NamedTuple):
    """How a command ended. ``mib``: its peak memory."""

    words: tuple[str, ...]
    code: int
    output: bytes
    problems: bytes
    seconds: float
    mib: float


@pytest.fixture(scope="session")
def strace() -> None:
    """This machine can trace system calls. Otherwise tests are skipped; in CI they fail."""
    if os.getuid() != 0:
        pytest.skip("fusermount3 has no rights of its own while it is traced, so only root can watch a mount")
    missing = None
    if shutil.which("strace") is None:
        missing = "strace is not installed (apt-get install strace)"
    else:
        tried = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True, timeout=30)
        if tried.returncode:
            missing = f"strace may not trace here ({tried.stderr.strip()[:200]}); containers: --cap-add SYS_PTRACE"
    if missing is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)


_MEASURED = """
import os, signal, sys
pid = os.fork()
if not pid:
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as stream:
    stream.write(str(usage.ru_maxrss))
code = os.waitstatus_to_exitcode(status)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
"""A small process that starts a program, and writes the program's peak memory (KiB) into a file. Linux counts the
memory of the parent in the program's own ru_maxrss, and a test run may have had more than is allowed here."""


class Machine:
    """A machine below ``base``: a home with secrets, lamfs's folders in it, and a mount point.

    One thread. A watchdog removes its mount if the test does not.
    """

    def __init__(self, *, env: dict[str, str] | None = None, seconds: float = 100.0) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="lamfs-c-", dir="/tmp"))
        self.home = self.base / "home"
        self.mountpoint = self.home / "data"
        self.data_dir = self.home / ".local/share/lamfs"
        self.cache_dir = self.home / ".cache/lamfs"
        self.config_dir = self.home / ".config/lamfs"
        self.own = [self.mountpoint, self.data_dir, self.cache_dir, self.config_dir]
        for folder in self.own:
            folder.mkdir(parents=True, mode=0o700)
        for name, text in SECRETS.items():
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text + MARKER + b" " + name.encode() + b"\n")
            path.chmod(0o600)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "LAMFS_", "XDG_", "PYTHON"))}
        self.env = {
            **inherited,
            "HOME": str(self.home),
            "LAMFS_CONFIG_DIR": str(self.config_dir),
            "LAMFS_DATA_DIR": str(self.data_dir),
            "LAMFS_CACHE_DIR": str(self.cache_dir),
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONSAFEPATH": "1",  # like the installed command: nothing is imported from the home
            **(env or {}),
        }
        self.seconds = seconds
        self.said = b""
        """Everything that commands printed."""
        self.peak = 0.0
        """Peak memory (MiB) of any process so far."""
        self._before = self.picture()
        self._traces: list[tuple[Path, list[Path]]] = []
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(self.data_dir), str(self.mountpoint)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(f"deadline {self.seconds}\n".encode())
        self._watchdog.stdin.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watchdog.clean_up(str(self.data_dir), str(self.mountpoint))
        if self._watchdog is not None:
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog.wait(30)
        if watchdog.is_mounted(str(self.mountpoint)):
            raise AssertionError(f"{self.mountpoint} cannot be unmounted; nothing below {self.base} is removed")
        shutil.rmtree(self.base, ignore_errors=True)

    # -- commands -----------------------------------------------------------------------------------------------

    def lamfs(self, *words: str, allow: Iterable[Path] = (), seconds: float = SECONDS) -> Ended:
        """Run ``lamfs`` in the home, and watch it. Fails if it takes longer than ``seconds``."""
        return self.run([sys.executable, "-m", "lamfs", *words], allow=allow, watched=True, limit=seconds)

    def run(
        self, words: list[str], *, allow: Iterable[Path] = (), watched: bool = False, limit: float = SECONDS
    ) -> Ended:
        """Run a program in the home. Fails if it takes longer than ``limit`` seconds."""
        command = words
        if watched:
            trace = self.base / f"trace-{len(self._traces)}"
            self._traces.append((trace, [*self.own, *allow]))
            calls = ",".join(f"?{name}" for name in (*CALLS, "chdir", "fchdir"))
            # -DD: strace runs beside the program, which stays its parent's child, and goes on with the program's
            # daemons.
            command = ["strace", "-DD", "-f", "-y", "--seccomp-bpf", "-s", "8192", "-o", str(trace)]
            command += ["-e", f"trace={calls}", *words]
        memory = self.base / "memory"
        begin = time.monotonic()
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as problems:
            # In files: a daemon's strace keeps its standard output as long as the daemon lives.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _MEASURED, str(memory), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=problems,
                cwd=self.home,
                env=self.env,
            )
            code = self._ended(process, words, limit)
            seconds = time.monotonic() - begin
            output.seek(0)
            problems.seek(0)
            mib = int(memory.read_text()) / 1024
            done = Ended(tuple(words[-3:]), code, output.read(), problems.read(), seconds, mib)
        self.said += done.output + done.problems
        self.peak = max(self.peak, mib)
        return done

    def _ended(self, process: subprocess.Popen[bytes], words: list[str], limit: float) -> int:
        """Wait for the process. Returns its exit code."""
        deadline = time.monotonic() + limit
        delay = 0.005
        while True:
            code = process.poll()
            if code is not None:
                return code
            if time.monotonic() > deadline:
                process.kill()
                watchdog.clean_up(str(self.data_dir), str(self.mountpoint))
                process.wait()
                raise AssertionError(f"{' '.join(words)} did not end within {limit} s\n{self.logs()[-3000:]}")
            time.sleep(delay)
            delay = min(delay * 1.5, 0.05)

    def note_daemons(self) -> None:
        """Count the memory of background processes. Called before they end."""
        for pid in watchdog.processes_of(str(self.data_dir)):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        self.peak = max(self.peak, int(line.split()[1]) / 1024)

    def end_daemons(self) -> None:
        """End background processes, but not the strace that watches them."""
        for pid in watchdog.processes_of(str(self.data_dir)):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text() != "strace\n":
                    os.kill(pid, signal.SIGKILL)

    # -- what was reached ---------------------------------------------------------------------------------------

    def strayed(self, *forbidden: Path) -> list[str]:
        """Calls of watched commands so far that changed something outside their folders, or that opened something in
        the home or in ``forbidden`` for reading. Waits until all processes have ended."""
        traces, self._traces = self._traces, []
        found = []
        for path, allowed in traces:
            wait_until(lambda path=path: _is_whole(path), f"strace has written {path}", seconds=SECONDS)  # type: ignore[misc]
            for name, touched, line in touches(path, str(self.home)):
                if _inside(touched, allowed) or ELSEWHERE.fullmatch(touched):
                    continue
                if name != "read" or _inside(touched, [self.home, *forbidden]):
                    found.append(line)
            path.unlink()
        return found

    def picture(self) -> dict[str, tuple[object, ...]]:
        """Everything in the home that does not belong to lamfs, with its content and times."""
        found: dict[str, tuple[object, ...]] = {}
        skipped = {str(folder) for folder in self.own}
        for top, folders, files in os.walk(self.home):
            folders[:] = [name for name in folders if f"{top}/{name}" not in skipped]
            for name in (*folders, *files):
                path = Path(top, name)
                info = path.lstat()
                data = path.read_bytes() if path.is_file() else None
                found[str(path.relative_to(self.home))] = (
                    info.st_ino, info.st_mode, info.st_uid, info.st_nlink, info.st_mtime_ns, info.st_ctime_ns, data,
                )  # fmt: skip
        return found

    def harmed(self) -> list[str]:
        """What has changed in the home."""
        now = self.picture()
        return sorted(name for name in {*now, *self._before} if now.get(name) != self._before.get(name))

    def leaks(self, *folders: Path) -> list[str]:
        """Where a secret's text is found: in what commands printed, in lamfs's own folders, and in ``folders``."""
        found = ["what was printed"] if MARKER in self.said else []
        for folder in (self.data_dir, self.cache_dir, self.config_dir, *folders):
            for path in _files(folder):
                if path.stat().st_size < 1 << 30 and MARKER in path.read_bytes():
                    found.append(str(path))
        return found

    def logs(self) -> str:
        """All logs, and everything that was printed."""
        texts = [self.said.decode(errors="replace")]
        texts += [path.read_text(errors="replace") for path in sorted(self.data_dir.rglob("*.log"))]
        return "\n".join(texts)


def _files(folder: Path) -> Iterator[Path]:
    for top, _, names in os.walk(folder):
        for name in names:
            path = Path(top, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _inside(path: str, folders: Iterable[Path]) -> bool:
    return any(path == str(folder) or path.startswith(f"{folder}/") for folder in folders)


def _is_whole(path: Path) -> bool:
    """Whether every process in a trace has ended."""
    running: dict[str, bool] = {}
    for line in path.read_text(errors="replace").splitlines():
        pid, _, rest = line.partition(" ")
        running[pid] = not rest.lstrip().startswith("+++ ")
    return bool(running) and not any(running.values())


# -- reading what strace wrote ----------------------------------------------------------------------------------------


def touches(trace: Path, cwd: str) -> Iterator[tuple[str, str, str]]:
    """What was reached: call (``read`` for a file opened for reading), path, line. Failed calls are left out. A
    relative path counts as below every directory that any process worked in."""
    directories = {cwd}
    opened_by: dict[tuple[str | None, str], str] = {}
    for pid, line in _whole_lines(trace):
        parsed = _CALL.fullmatch(line)
        if parsed is None:
            continue
        name, text, result, _, opened, _ = parsed.groups()
        if result.startswith("-"):
            continue
        arguments = _split(text)
        if name in ("chdir", "fchdir"):
            where = _string(arguments[0]) if name == "chdir" else _of_fd(arguments[0])
            directories |= {os.path.join(known, where) for known in list(directories)}
        elif name in ("open", "openat", "openat2", "creat"):
            writes = name == "creat" or _WRITES.search(" ".join(arguments[1:]))
            assert opened is not None, line
            path = _unescaped(opened)
            if "O_DIRECTORY" in text or "O_PATH" in text:
                opened_by[pid, result] = opened_by[None, result] = path
            if "O_PATH" in text and _PROCESS.fullmatch(_string(arguments[1])):
                continue  # a process's cwd or root; what is reached through it is seen then
            yield name if writes else "read", path, line
        elif name == "bind":
            found = re.search(r'sun_path="((?:[^"\\]|\\.)*)"', text)
            if found is not None:
                yield from ((name, path, line) for path in _absolute(_unescaped(found.group(1)), directories))
        elif name in CALLS:
            where_to = CALLS[name]
            if isinstance(where_to, int):
                yield name, _of_fd(arguments[where_to]), line
                continue
            for folder, number in where_to:
                if arguments[number] == "NULL":  # utimensat of a descriptor
                    yield name, _of_fd(arguments[folder or 0]), line
                    continue
                path = _through_proc(_string(arguments[number]), opened_by)
                known = directories if folder is None else {_of_fd(arguments[folder])}
                for whole in _absolute(path, known):
                    # For an existing file: where its folder really is.
                    yield name, os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole)), line


def _through_proc(path: str, opened_by: dict[tuple[str | None, str], str]) -> str:
    """The real path of a path that begins at an open directory of a process."""
    matched = re.fullmatch(r"/proc/(\d+)/fd/(\d+)/(.*)", path, re.DOTALL)
    if matched is None:
        return path
    pid, fd, rest = matched.groups()
    # A process may have inherited it from its parent, with the same number.
    folder = opened_by.get((pid, fd)) or opened_by.get((None, fd))
    return path if folder is None else f"{folder}/{rest}"


def _whole_lines(trace: Path) -> Iterator[tuple[str, str]]:
    """Process and call. Calls that others interrupted are joined."""
    begun: dict[str, str] = {}
    for raw in trace.read_text(errors="surrogateescape").split("\n"):
        matched = _LINE.fullmatch(raw)
        if matched is None:
            continue
        pid, line = matched.groups()
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        resumed = re.match(r"<\.\.\. \w+ resumed>", line)
        yield pid, begun.pop(pid) + line[resumed.end() :] if resumed and pid in begun else line


def _split(text: str) -> list[str]:
    """The arguments of a call."""
    found, depth = [""], 0
    for piece in _PIECE.findall(text):
        if piece == "," and depth == 0:
            found.append("")
            continue
        depth += (piece in "[{(") - (piece in "]})") if len(piece) == 1 else 0
        found[-1] += piece
    return [piece.strip() for piece in found]


def _unescaped(text: str) -> str:
    def one(match: re.Match[bytes]) -> bytes:
        code = match.group(1)
        if code[:1] == b"x":
            return bytes([int(code[1:], 16)])
        if code[:1].isdigit():
            return bytes([int(code, 8)])
        return _PLAIN.get(code, code)

    return os.fsdecode(_ESCAPE.sub(one, os.fsencode(text)))


def _string(argument: str) -> str:
    assert argument.startswith('"'), argument
    return _unescaped(argument[1 : argument.rindex('"')])


def _of_fd(argument: str) -> str:
    matched = _FD.match(argument)
    assert matched is not None, argument
    return _unescaped(matched.group(2) or f"descriptor {argument}").removesuffix(" (deleted)")


def _absolute(path: str, directories: Iterable[str]) -> list[str]:
    return [os.path.normpath(os.path.join(directory, path)) for directory in directories]
