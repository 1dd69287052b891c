"""Real mounts for tests: an instance with its own directories and storage, mounted as a user would mount it.

    with MountedInstance() as instance:                     # local storage; or MountedInstance(config, env=server.env)
        instance.mount(["xattr"])
        (instance.path / "a").write_bytes(b"x")
        instance.run(["cp", "-a", "/etc/hosts", "b"])       # in the mount, with a timeout
        instance.sync()
        instance.kill9(); instance.mount()
        instance.umount()

Fixtures: ``local_mount``, ``s3_mount`` and ``mount`` (both in turn) are new instances, mounted. ``instance`` (both in
turn) is not mounted yet. To save time, ``shared_mount`` is one local mount for a whole test file, and ``shared`` is an
empty directory in it. ``same`` runs a function there and in a plain directory, and compares the results. ``each_mount``
and ``each_dir`` are such a mount on a local folder, then on S3. After each test the daemon's log must not contain
records above INFO, except those declared with ``expect_log``.

A watchdog process detaches a mount whose test does not end, or whose test run has died. Nothing else can interrupt a
system call in a stuck mount.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from lamfs.model import StorageConfig, instance_id
from lamfs.ops import mounts as mount_records
from lamfs.registry import Registry
from tests.support import watchdog
from tests.support.servers import Server
from tests.support.spools import spool_of

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
OWNER = "testuser1"
START_SECONDS = 60.0
COMMAND_SECONDS = 60.0
TEST_SECONDS = 110.0
"""Seconds until the watchdog removes a mount: less than scripts/test allows for a test."""
BUCKET = "lamfs-tests"

Command = Sequence[str | os.PathLike[str]]


def wait_until(condition: Callable[[], T], what: str, *, seconds: float = 10.0, every: float = 0.01) -> T:
    """Poll until ``condition()`` is true, and return its value. Fails after ``seconds``, naming ``what``."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds} s still not: {what}")
        time.sleep(every)


def outcome(function: Callable[[], Any]) -> Any:
    """The result of a call: its value, or the name of its errno if it fails."""
    try:
        return function()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """Pids of the children of a process."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(word) for word in (task / "children").read_text().split()]
    return found


class MountedInstance:
    """One instance and its mount. Used from one thread. Everything it makes is below ``base``, a short path.

    ``storage``: of the instance (None: a folder below ``base``). ``env``: what its processes need besides their
    directories, such as S3 credentials. ``path`` is the mount point, as a Path that tests may use directly.
    """

    def __init__(
        self,
        storage: StorageConfig | None = None,
        *,
        env: dict[str, str] | None = None,
        name: str = "one",
        seconds: float = TEST_SECONDS,
    ) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="lamfs-m-", dir="/tmp"))
        self.base.chmod(0o755)
        self.storage = storage or StorageConfig(str(self.base / "store"))
        self.slug = f"{OWNER}/{name}"
        self.path = self.base / "mnt"
        self.path.mkdir()
        self.data_dir = self.base / "data"
        self.cache_dir = self.base / "cache"
        self.directory = self.data_dir / instance_id(self.slug).hex
        self.seconds = seconds
        # Modules are compiled once, like those of an installed lamfs, and not again for each command and daemon.
        unwanted = ("AWS_", "LAMFS_", "PYTHONDONTWRITEBYTECODE")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
        self.env = {
            **inherited,
            "LAMFS_CONFIG_DIR": str(self.base / "config"),
            "LAMFS_DATA_DIR": str(self.data_dir),
            "LAMFS_CACHE_DIR": str(self.cache_dir),
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        self.pid = 0
        self._expected: list[re.Pattern[str]] = []
        self._log_seen = 0
        self._words: list[str] = []
        self._read_only = False
        self._watchdog: subprocess.Popen[bytes] | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(self.data_dir), str(self.path)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
        self.extend(self.seconds)
        try:
            self.init()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.mounted:
                self.fusermount()
        finally:
            self.close()

    def extend(self, seconds: float) -> None:
        """Let the watchdog act only ``seconds`` from now."""
        assert self._watchdog is not None
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(f"deadline {seconds}\n".encode())
        self._watchdog.stdin.flush()

    def close(self) -> None:
        """Kill what is still running, detach the mount, and remove everything below ``base``."""
        watchdog.clean_up(str(self.data_dir), str(self.path))
        if self._watchdog is not None:
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog.wait(30)
            self._watchdog = None
        if watchdog.is_mounted(str(self.path)):
            raise AssertionError(f"{self.path} cannot be unmounted; nothing below {self.base} is removed")
        shutil.rmtree(self.base, ignore_errors=True)

    def init(self) -> None:
        """``lamfs login`` and ``lamfs init``, in one process."""
        config = self.storage
        self.python(
            "import json, sys\n"
            "from lamfs.ops import setup\n"
            "arguments = json.loads(sys.argv[1])\n"
            f"setup.login({OWNER!r}, say=print)\n"
            "setup.init(say=print, **arguments)\n",
            json.dumps(
                {
                    "storage": config.root,
                    "name": self.slug.partition("/")[2],
                    "endpoint_url": config.endpoint_url,
                    "region": config.region,
                    "path_style": config.path_style,
                }
            ),
        )

    # -- the mount ----------------------------------------------------------------------------------------------

    def mount(self, words: Sequence[str] = (), *, read_only: bool = False, env: dict[str, str] | None = None) -> None:
        """``lamfs mount`` with these ``-o`` words. Returns when the mount is there. ``env``: only for this daemon."""
        assert not self.mounted
        self._words, self._read_only = list(words), read_only
        command = ["mount", str(self.path)]
        if words:
            command += ["-o", ",".join(words)]
        if read_only:
            command += ["--read-only"]
        self.cli(*command, env=env)
        record = self.record()
        self.pid = record.pid

    @property
    def mounted(self) -> bool:
        """Whether something is mounted at ``path``."""
        return watchdog.is_mounted(str(self.path))

    def record(self) -> mount_records.MountRecord:
        """The mount's record, as the CLI finds it."""
        for file in (self.directory / "mounts").glob("[0-9]*.json"):
            try:
                data = json.loads(file.read_text())
            except ValueError:  # an earlier record, cut by a power cut: the CLI ignores it too
                continue
            if data["mountpoint"] == str(self.path):
                return mount_records.MountRecord(**data)
        raise AssertionError(f"no record of a mount at {self.path}\n{self.log()}")

    def request(self, command: str, *, timeout: float = COMMAND_SECONDS) -> dict[str, Any]:
        """Send the daemon a command over its control socket. Returns the reply. Raises LamfsError."""
        return mount_records.request(self.record(), {"cmd": command}, timeout=timeout)

    def sync(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """Return when no work is pending. Raises LamfsError if something cannot be stored."""
        self.request("sync", timeout=timeout)

    def status(self) -> dict[str, Any]:
        """The daemon's status."""
        status: dict[str, Any] = self.request("status")["status"]
        return status

    def umount(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """``lamfs umount``: drains, unmounts, and waits for the end of the daemon."""
        self.cli("umount", str(self.path), timeout=timeout)
        assert not self.mounted
        self._gone(timeout)

    def fusermount(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """``fusermount3 -u``, then wait for the end of the daemon: like ``umount``, without the time of the CLI."""
        subprocess.run(["fusermount3", "-u", str(self.path)], check=True, capture_output=True, timeout=timeout)
        self._gone(timeout)

    def term(self, *, timeout: float = COMMAND_SECONDS) -> None:
        """SIGTERM to the daemon, which drains and ends. Waits for its end."""
        os.kill(self.pid, signal.SIGTERM)
        self._gone(timeout)
        wait_until(lambda: not self.mounted, "the mount is gone", seconds=10)

    def kill9(self, *, detach: bool = True) -> None:
        """SIGKILL of daemon and mover, like a power cut for both. Then the dead mount is detached, if asked."""
        for pid in (self.pid, *children(self.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._gone(10.0)
        wait_until(
            lambda: not [pid for pid in watchdog.processes_of(str(self.data_dir)) if is_alive(pid)],
            "all processes of the mount have ended",
        )
        # The kernel ends the connection after the process, when its last descriptor is closed. Until then a call gets
        # ECONNABORTED, or waits.
        wait_until(lambda: not self.mounted or self._is_dead(), "the kernel says that the mount is dead")
        if not detach:
            return
        if self.mounted:
            subprocess.run(["fusermount3", "-uz", str(self.path)], check=False, capture_output=True, timeout=10)
        wait_until(lambda: not self.mounted, "the dead mount is detached")

    def _is_dead(self) -> bool:
        try:
            os.statvfs(self.path)  # the kernel always asks the daemon for this
        except OSError as exc:
            return exc.errno == errno.ENOTCONN
        return False

    def _gone(self, seconds: float) -> None:
        pid, self.pid = self.pid, 0
        wait_until(lambda: not is_alive(pid), f"the daemon {pid} has ended", seconds=seconds)

    def remount(self, words: Sequence[str] | None = None, *, empty_cache: bool = False) -> None:
        """Unmount and mount again, with the same words unless others are given. ``empty_cache``: without any cached
        block."""
        self.umount()
        if empty_cache:
            shutil.rmtree(self.cache_dir, ignore_errors=True)
        self.mount(self._words if words is None else words, read_only=self._read_only)

    # -- using it -----------------------------------------------------------------------------------------------

    def run(
        self,
        command: Command,
        *,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float = COMMAND_SECONDS,
        check: bool = True,
        input: str | None = None,
        env: dict[str, str] | None = None,
        user: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the mount (``cwd`` is relative to it). Fails with its output if it fails or is too slow.

        A program that hangs in the mount cannot be killed: then the whole mount is removed, which ends it.
        """
        process = subprocess.Popen(
            [os.fspath(word) for word in command],
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.path / (cwd or "."),
            env={**self.env, "LC_ALL": "C.UTF-8", **(env or {})},
            text=True,
            errors="surrogateescape",
            user=user,
            group=user,
            extra_groups=[] if user is not None else None,
        )
        try:
            output, problems = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            log = self.log()
            watchdog.clean_up(str(self.data_dir), str(self.path))
            process.communicate()
            raise AssertionError(f"{command} did not end within {timeout} s\n{log}") from None
        if check and process.returncode:
            raise AssertionError(f"{command} ended with {process.returncode}\n{output}{problems}\n{self.log()}")
        return subprocess.CompletedProcess(process.args, process.returncode, output, problems)

    def python(self, code: str, *arguments: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run Python code outside the mount, in the instance's environment. Returns what it printed."""
        return self.run([sys.executable, "-c", code, *arguments], cwd="/", timeout=timeout).stdout

    def cli(
        self, *words: str, timeout: float = START_SECONDS, check: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command ``lamfs`` in the instance's environment, outside the mount."""
        return self.run([sys.executable, "-m", "lamfs", *words], cwd="/", timeout=timeout, check=check, env=env)

    def info(self, key: str) -> dict[str, Any]:
        """The artifact's record, read through the mount."""
        record: dict[str, Any] = json.loads((self.path / ".lamfs" / "info" / key).read_bytes())
        return record

    def stored_info(self, key: str) -> dict[str, Any]:
        """The artifact's record once everything is stored."""
        self.sync()
        return self.info(key)

    @contextlib.contextmanager
    def registry(self) -> Iterator[Registry]:
        """The instance's registry, for reading."""
        registry = Registry(self.directory / "registry.lndb")
        try:
            yield registry
        finally:
            registry.close()

    def fsck(self, *, timeout: float = COMMAND_SECONDS) -> list[str]:
        """The problems that ``lamfs fsck`` reports; empty if there are none."""
        done = self.cli("fsck", "--json", timeout=timeout, check=False)
        try:
            report = json.loads(done.stdout)
        except ValueError:
            raise AssertionError(f"lamfs fsck gave no report ({done.returncode})\n{done.stdout}{done.stderr}") from None
        assert report["clean"] == (done.returncode == 0) == (not report["problems"]), report
        problems: list[str] = report["problems"]
        return problems

    @property
    def spool(self) -> Path:
        """The spool folder."""
        return spool_of(self.slug, self.storage, self.data_dir)

    def spooled(self) -> list[str]:
        """Names of the spool files."""
        return sorted(path.name for path in self.spool.iterdir() if path.is_file())

    # -- the log ------------------------------------------------------------------------------------------------

    def log(self) -> str:
        """The daemon's log."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "mount.log").read_text(errors="replace")
        return ""

    def expect_log(self, *patterns: str) -> None:
        """Records above INFO that match one of these (re.search) do not make the test fail."""
        self._expected += [re.compile(pattern) for pattern in patterns]

    def check_log(self) -> None:
        """Fail if the log has a record above INFO, or a line that is not a record, since the last check."""
        log = self.log()
        new, self._log_seen = log[self._log_seen :], len(log)
        bad = [record for record in log_records(new) if not any(found.search(record) for found in self._expected)]
        assert not bad, "the daemon's log holds:\n" + "\n".join(bad[:20])


_RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ (\w+) ")


def log_records(text: str) -> list[str]:
    """The records of a log above INFO, with the lines that follow them. Includes lines before the first record."""
    found: list[str] = []
    quiet = False
    for line in text.splitlines():
        head = _RECORD.match(line)
        if head is not None:
            quiet = head.group(1) in ("INFO", "DEBUG")
            if not quiet:
                found.append(line)
        elif not found or quiet:
            # No INFO record of lamfs has a second line: this comes from a program that writes to stderr.
            found.append(line)
            quiet = False
        else:
            found[-1] += "\n" + line
    return found


# -- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fuse() -> None:
    """This machine can mount. Otherwise tests are skipped; in CI they fail."""
    missing = None
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        missing = "/dev/fuse is missing or cannot be opened"
    elif shutil.which("fusermount3") is None:
        missing = "fusermount3 is not installed"
    if missing is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{missing}: the mount tests cannot run")
        pytest.skip(missing)


@contextlib.contextmanager
def checked(instance: MountedInstance) -> Iterator[MountedInstance]:
    """An instance whose log is checked at the end, after it was unmounted without force."""
    with instance:
        yield instance
        if instance.mounted:
            instance.fusermount()
        instance.check_log()


@contextlib.contextmanager
def s3_instance(server: Server, **options: Any) -> Iterator[MountedInstance]:
    """An instance with its own root on an S3 server."""
    config = server.config(BUCKET, f"m{os.urandom(4).hex()}/root")
    with checked(MountedInstance(config, env=server.env, **options)) as instance:
        yield instance


@contextlib.contextmanager
def _instance(kind: str, request: pytest.FixtureRequest) -> Iterator[MountedInstance]:
    with contextlib.ExitStack() as stack:
        if kind == "s3":
            yield stack.enter_context(s3_instance(request.getfixturevalue("seaweed")))
        else:
            yield stack.enter_context(checked(MountedInstance()))


@pytest.fixture(params=["local", "s3"])
def instance(request: pytest.FixtureRequest, fuse: None) -> Iterator[MountedInstance]:
    """A new instance, not mounted; on a local folder and on S3."""
    with _instance(request.param, request) as found:
        yield found


@pytest.fixture
def mount(instance: MountedInstance) -> MountedInstance:
    """A new instance, mounted; on a local folder and on S3."""
    instance.mount()
    return instance


@pytest.fixture
def local_instance(request: pytest.FixtureRequest, fuse: None) -> Iterator[MountedInstance]:
    """A new instance on a local folder, not mounted."""
    with _instance("local", request) as found:
        yield found


@pytest.fixture
def local_mount(local_instance: MountedInstance) -> MountedInstance:
    """A new instance on a local folder, mounted."""
    local_instance.mount()
    return local_instance


@pytest.fixture
def s3_mount(request: pytest.FixtureRequest, fuse: None) -> Iterator[MountedInstance]:
    """A new instance on S3, mounted."""
    with _instance("s3", request) as found:
        found.mount()
        yield found


@pytest.fixture(scope="module")
def module_mount(fuse: None) -> Iterator[MountedInstance]:
    """One local mount for a file of tests. Use ``shared_mount``, which checks the log after each test."""
    with checked(MountedInstance()) as found:
        found.mount()
        yield found


@pytest.fixture(scope="module", params=["local", "s3"])
def each_module_mount(request: pytest.FixtureRequest, fuse: None) -> Iterator[MountedInstance]:
    """One mount per kind of storage for a file of tests. Use ``each_mount``."""
    with _instance(request.param, request) as found:
        found.mount()
        yield found


def _one_test(mount: MountedInstance) -> Iterator[MountedInstance]:
    if not mount.pid or not is_alive(mount.pid):
        pytest.fail("the mount of this file is gone: an earlier test has killed it")
    mount.extend(TEST_SECONDS)
    yield mount
    mount.check_log()


@pytest.fixture
def shared_mount(module_mount: MountedInstance) -> Iterator[MountedInstance]:
    """The file's mount. A test that needs a clean mount, or damages it, uses ``local_mount`` instead."""
    yield from _one_test(module_mount)


@pytest.fixture
def each_mount(each_module_mount: MountedInstance) -> Iterator[MountedInstance]:
    """The file's mount, on a local folder and on S3."""
    yield from _one_test(each_module_mount)


@pytest.fixture
def each_dir(each_mount: MountedInstance) -> Path:
    """An empty directory in the file's mount, on a local folder and on S3."""
    return Path(tempfile.mkdtemp(prefix="t", dir=each_mount.path))


@pytest.fixture
def shared(shared_mount: MountedInstance) -> Path:
    """An empty directory in the file's mount."""
    return Path(tempfile.mkdtemp(prefix="t", dir=shared_mount.path))


@pytest.fixture
def same(shared: Path, tmp_path: Path) -> Callable[[Callable[[Path], Any]], Any]:
    """``same(function)``: run it in an empty directory on a plain disk and in the mount. Both results must be equal."""
    plain = tmp_path / "plain"
    plain.mkdir()

    def compare(function: Callable[[Path], Any]) -> Any:
        wanted = outcome(lambda: function(plain))
        got = outcome(lambda: function(shared))
        assert got == wanted
        return wanted

    return compare
