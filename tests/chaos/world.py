"""Machines, their mounts and processes, and the storage they share. Used from one thread.

Everything lies below one folder, ``World.base``. A machine is a set of directories (settings, data, cache) of its own:
to lamfs that is another machine. No path in a mount is touched here (worker.py does that, in a process of its own), and
only processes that were started here are ended: those whose environment names the machine's own data directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from blake3 import blake3

from lamfs.model import StorageConfig, instance_id
from tests.support import watchdog
from tests.support.mounts import children, is_alive, log_records
from tests.support.servers import SeaweedServer
from tests.support.spools import spool_of

ROOT = Path(__file__).resolve().parents[2]
OWNER, NAME = "tester", "one"
SLUG = f"{OWNER}/{NAME}"
BUCKET = "chaos"
COMMAND_SECONDS = 150.0
STEP_SECONDS = 150.0
"""How long a command, a call in a mount may take; whatever takes longer hangs."""
MOUNT_TIMEOUT = 60
"""The mounts' own limit (-o timeout)."""
HEX = instance_id(SLUG).hex
_OBJECT = re.compile(r"\.lamindb/[0-9A-Za-z]{20}[^/]*")
_TELLING = frozenset({"mount", "umount", "fsck", "status", "connect", "sync", "close", "init"})
"""Commands that say what is lost. What 'lamfs ls' lists is not named by that, but for the trash."""
_BAD = re.compile(r"Traceback \(most recent call last\)|should not have happened|unexpected error")


class Violation(Exception):
    """A promise was broken. ``kind``: lost, mixture, unnamed, hang, traceback, refused, wrong."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Result(NamedTuple):
    """How a command ended. ``code`` is negative when a signal ended it; ``hung``: it was ended by the time limit."""

    words: tuple[str, ...]
    code: int
    output: str
    hung: bool

    @property
    def good(self) -> bool:
        """Whether it did what it was asked."""
        return self.code == 0

    def __str__(self) -> str:
        return f"'lamfs {' '.join(self.words)}' ended with {self.code}: {self.output[-1500:]}"


class Log:
    """All that is done, as JSON lines in a file, and what was said since ``forget``."""

    def __init__(self, path: Path, *, loud: bool) -> None:
        self._file = path.open("a")
        self._loud = loud
        self._began = time.monotonic()
        self.step = 0
        self._said: list[str] = []

    def write(self, event: str, **fields: Any) -> None:
        """A line of the log."""
        line = {"t": round(time.monotonic() - self._began, 3), "step": self.step, "event": event, **fields}
        text = json.dumps(line, default=str)
        self._file.write(text + "\n")
        self._file.flush()
        if self._loud:
            print(text[:400], flush=True)

    def heard(self, text: str) -> None:
        """Something that lamfs said."""
        self._said.append(text)

    def named(self, words: Sequence[str]) -> bool:
        """Whether one of these was said since ``forget``."""
        return any(word in text for text in self._said for word in words)

    def forget(self) -> None:
        """What was said so far names nothing that is lost from now on."""
        self._said.clear()

    def close(self) -> None:
        self._file.close()


# -- storage ----------------------------------------------------------------------------------------------------------


class Storage:
    """A root that machines share, looked at past lamfs."""

    kind: str
    root: str
    env: dict[str, str]

    def options(self) -> list[str]:
        """What 'lamfs init' and 'connect' need to reach it."""
        return []

    def keys(self) -> list[str]:
        """All object keys."""
        raise NotImplementedError

    def get(self, key: str) -> bytes:
        """The bytes of an object. Raises FileNotFoundError."""
        raise NotImplementedError

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        raise NotImplementedError

    def delete(self, key: str) -> None:
        """Remove an object."""
        raise NotImplementedError

    def digest(self, key: str) -> str | None:
        """BLAKE3 of an object; None: there is none."""
        try:
            return blake3(self.get(key)).hexdigest()
        except FileNotFoundError:
            return None

    def objects(self) -> list[str]:
        """Keys of artifacts' objects."""
        return [key for key in self.keys() if _OBJECT.fullmatch(key)]

    @property
    def lock_key(self) -> str:
        return f".lamindb/_exclusion/{HEX}"

    @property
    def registry_key(self) -> str:
        return f"{HEX}.lndb"

    def start(self) -> None:
        """Make it."""

    def running(self) -> None:
        """See to it that it answers."""

    def stalled(self) -> bool:
        """Whether it takes nothing from anybody any more, by a fault of its own; then it is started again."""
        return False

    def stop(self) -> None:
        """The end."""


class FolderStorage(Storage):
    """A folder."""

    kind = "folder"

    def __init__(self, base: Path) -> None:
        self.root = str(base / "store")
        self.env = {}

    def keys(self) -> list[str]:
        top = Path(self.root)
        return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file() and not path.is_symlink())

    def get(self, key: str) -> bytes:
        return (Path(self.root) / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        path = Path(self.root) / key
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_bytes(data)
        temporary.chmod(0o600)
        temporary.rename(path)

    def delete(self, key: str) -> None:
        (Path(self.root) / key).unlink()


class S3Storage(Storage):
    """A prefix of a bucket on a SeaweedFS server of its own."""

    kind = "s3"

    def __init__(self, base: Path) -> None:
        self.server = SeaweedServer(base / "server")
        self.root = f"s3://{BUCKET}/root"
        self.env = self.server.env
        self.restarts = 0
        self._digests: dict[tuple[str, str], str] = {}

    def start(self) -> None:
        self.server.start()
        self.server.create_bucket(BUCKET)

    def options(self) -> list[str]:
        return ["--endpoint-url", self.server.endpoint_url, "--region", "us-east-1", "--path-style"]

    def running(self) -> None:
        self.server.ensure_running()
        # After kill -9 the S3 port answers before what is behind it does. And after some requests whose clients were
        # killed SeaweedFS takes no more uploads, from anybody: that is not what is tested here.
        for _ in range(3):
            if wait_until(self._takes_uploads, 20, every=0.1):
                return
            self.restarts += 1
            self.server.kill()
            self.server.restart()
        raise RuntimeError("the S3 server takes no uploads")

    def stalled(self) -> bool:
        if self._takes_uploads():
            return False
        self.running()
        return True

    def _takes_uploads(self) -> bool:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        session = boto3.session.Session(
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region_name=self.env["AWS_DEFAULT_REGION"],
        )
        limits = Config(
            s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 1}
        )
        client = session.client("s3", endpoint_url=self.server.endpoint_url, config=limits)
        try:
            client.put_object(Bucket=BUCKET, Key="probe", Body=bytes(1 << 20))
            return True
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        with self.server.client() as client:
            yield client

    def keys(self) -> list[str]:
        with self._client() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="root/")
            return sorted(item["Key"][5:] for page in pages for item in page.get("Contents", ()))

    def get(self, key: str) -> bytes:
        with self._client() as client:
            try:
                return bytes(client.get_object(Bucket=BUCKET, Key=f"root/{key}")["Body"].read())
            except client.exceptions.NoSuchKey:
                raise FileNotFoundError(key) from None

    def digest(self, key: str) -> str | None:
        with self._client() as client:
            try:
                etag = client.head_object(Bucket=BUCKET, Key=f"root/{key}")["ETag"]
            except client.exceptions.ClientError:
                return None
        if (key, etag) not in self._digests:
            found = super().digest(key)
            if found is None:
                return None
            self._digests[key, etag] = found
        return self._digests[key, etag]

    def put(self, key: str, data: bytes) -> None:
        with self._client() as client:
            client.put_object(Bucket=BUCKET, Key=f"root/{key}", Body=data)

    def delete(self, key: str) -> None:
        with self._client() as client:
            client.delete_object(Bucket=BUCKET, Key=f"root/{key}")

    def stop(self) -> None:
        self.server.stop()


# -- mounts -----------------------------------------------------------------------------------------------------------


class Mount:
    """One mountpoint of a machine, the worker that uses it, and its watchdog."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine = machine
        self.path = machine.base / f"mnt{number}"
        self.path.mkdir()
        self.mounted = False
        """Whether it is meant to be there."""
        self._worker: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(machine.data_dir), str(self.path)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
        self.extend()

    def extend(self) -> None:
        """The watchdog waits for another step."""
        assert self._watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(f"deadline {3 * STEP_SECONDS}\n".encode())
            self._watchdog.stdin.flush()

    def __str__(self) -> str:
        return f"{self.machine.name}/{self.path.name}"

    # -- the worker ---------------------------------------------------------------------------------------------

    def begin(self, step: dict[str, Any]) -> None:
        """Give the worker a step."""
        self.machine.world.extend()
        if self._worker is None or self._worker.poll() is not None:
            self._buffer = b""
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.worker", str(self.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self.machine.env,
                cwd=ROOT,
            )
        assert self._worker.stdin is not None
        self.machine.world.log.write("step", mount=str(self), **{k: v for k, v in step.items() if k != "versions"})
        self._worker.stdin.write(json.dumps(step).encode() + b"\n")
        self._worker.stdin.flush()

    def end(self, *, seconds: float = STEP_SECONDS) -> tuple[list[str], dict[str, Any]]:
        """What a step acknowledged, and how it ended. Raises Violation when it hangs."""
        acks: list[str] = []
        deadline = time.monotonic() + seconds
        assert self._worker is not None
        assert self._worker.stdout is not None
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                reply = json.loads(line)
                if reply.get("done"):
                    short = {name: value for name, value in reply.items() if name not in ("files", "pieces")}
                    self.machine.world.log.write("reply", mount=str(self), acks=acks, **short)
                    return acks, reply
                acks.append(reply["ack"])
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._worker.stdout], [], [], left)[0]:
                self.stop_worker()
                raise Violation("hang", f"a call in {self} did not end within {seconds:.0f} s; acknowledged: {acks}")
            data = os.read(self._worker.stdout.fileno(), 1 << 20)
            if not data:
                code = self.stop_worker()
                self.machine.world.log.write("reply", mount=str(self), acks=acks, worker=code)
                return acks, {"done": True, "error": "KILLED", "at": "?", "text": f"the worker ended ({code})"}
            self._buffer += data

    def do(self, step: dict[str, Any]) -> dict[str, Any]:
        """A step that has to succeed, of those that only look. Raises Violation."""
        self.begin(step)
        reply = self.end()[1]
        if reply["error"] is not None:
            raise Violation("wrong", f"{step['do']} in {self}: {reply['error']} ({reply.get('text')})")
        return reply

    @property
    def worker_pid(self) -> int | None:
        """The pid of the worker, if it runs."""
        return None if self._worker is None or self._worker.poll() is not None else self._worker.pid

    def stop_worker(self) -> int | None:
        """End the worker; a stuck one by taking the mount away."""
        if self._worker is None:
            return None
        worker, self._worker = self._worker, None
        worker.kill()
        try:
            code = worker.wait(10)
        except subprocess.TimeoutExpired:
            watchdog.clean_up(str(self.machine.data_dir), str(self.path))
            code = worker.wait(30)
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        return code

    # -- the daemon ---------------------------------------------------------------------------------------------

    @property
    def daemon(self) -> int | None:
        """The pid of its living daemon."""
        for file in (self.machine.directory / "mounts").glob("[0-9]*.json"):
            with contextlib.suppress(ValueError, OSError, KeyError):
                record = json.loads(file.read_text())
                if record["mountpoint"] == str(self.path) and is_alive(record["pid"]):
                    return int(record["pid"])
        return None

    def close(self) -> None:
        """Leave nothing behind."""
        self.stop_worker()
        watchdog.clean_up(str(self.machine.data_dir), str(self.path))
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        try:
            self._watchdog.wait(60)
        except subprocess.TimeoutExpired:
            self._watchdog.kill()


class Machine:
    """Directories of its own, up to two mounts, and the commands that are given there."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.base = world.base / name
        self.base.mkdir()
        self.data_dir = self.base / "data"
        self.cache_dir = self.base / "cache"
        self.directory = self.data_dir / HEX
        unwanted = ("AWS_", "LAMFS_", "PYTHONDONTWRITEBYTECODE")
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(unwanted)},
            "LAMFS_CONFIG_DIR": str(self.base / "config"),
            "LAMFS_DATA_DIR": str(self.data_dir),
            "LAMFS_CACHE_DIR": str(self.cache_dir),
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "LC_ALL": "C.UTF-8",
            **world.storage.env,
        }
        self.mounts = [Mount(self, 1), Mount(self, 2)]
        self.words = [f"timeout={MOUNT_TIMEOUT}"]
        self._log_seen = 0

    @property
    def work_path(self) -> Path:
        """Its work database."""
        return self.directory / "work.db"

    @property
    def registry_path(self) -> Path:
        """The working copy."""
        return self.directory / "registry.lndb"

    @property
    def spool(self) -> Path:
        """The spool folder."""
        return spool_of(SLUG, StorageConfig(self.world.storage.root), self.data_dir)

    @property
    def active(self) -> list[Mount]:
        """Mounts that are meant to be there."""
        return [mount for mount in self.mounts if mount.mounted]

    # -- commands -----------------------------------------------------------------------------------------------

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Begin a command; for who kills it. ``finish`` waits for it."""
        self.world.extend()
        return subprocess.Popen(
            [sys.executable, "-m", "lamfs", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.env,
            cwd="/",
            text=True,
            errors="replace",
        )

    def finish(
        self, process: subprocess.Popen[str], words: tuple[str, ...], *, seconds: float = COMMAND_SECONDS
    ) -> Result:
        """Wait for a command; note what it said. Raises Violation for a traceback."""
        hung = False
        try:
            output = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            hung = True
            process.kill()
            try:
                output = process.communicate(timeout=10)[0]
            except subprocess.TimeoutExpired:
                for mount in self.mounts:
                    watchdog.clean_up(str(self.data_dir), str(mount.path))
                output = process.communicate()[0]
        result = Result(words, process.returncode, output, hung)
        self.world.log.write("lamfs", machine=self.name, words=words, code=result.code, hung=hung, said=output[-3000:])
        if words[0] in _TELLING or "--trash" in words:
            self.world.log.heard(output)
        if _BAD.search(output):
            self.world.complain("traceback", str(result))
        return result

    def cli(self, *words: str, seconds: float = COMMAND_SECONDS) -> Result:
        """A command, from beginning to end."""
        return self.finish(self.start(*words), words, seconds=seconds)

    def must(self, *words: str, seconds: float = COMMAND_SECONDS) -> Result:
        """A command that has to succeed. Raises Violation."""
        result = self.cli(*words, seconds=seconds)
        if not result.good:
            raise Violation("hang" if result.hung else "refused", f"on {self.name}: {result}")
        return result

    def json(self, *words: str) -> Any:
        """What a command prints as JSON, whatever its exit code; None: nothing that is JSON."""
        result = self.cli(*words, "--json")
        start = min((at for at in (result.output.find("{"), result.output.find("[")) if at >= 0), default=-1)
        with contextlib.suppress(ValueError):
            return json.JSONDecoder().raw_decode(result.output[start:])[0]
        return None

    def init(self) -> None:
        """Make the instance here."""
        self.must("init", "--storage", self.world.storage.root, "--name", NAME, *self.world.storage.options())

    @property
    def knows(self) -> bool:
        """Whether the instance is among this machine's settings."""
        return (self.base / "config" / "instances" / f"{HEX}.json").exists()

    def connect(self, *words: str) -> Result:
        """``lamfs connect``, as is right for a machine that knows the instance or not."""
        if self.knows:
            return self.cli("connect", SLUG, *words)
        storage = self.world.storage
        return self.cli("connect", storage.root, *storage.options(), *words)

    # -- mounts -------------------------------------------------------------------------------------------------

    def mount(self, mount: Mount, *, read_only: bool = False) -> Result:
        """``lamfs mount``."""
        words = ["mount", str(mount.path), "--instance", SLUG, "-o", ",".join(self.words)]
        result = self.cli(*words, *(["--read-only"] if read_only else []))
        mount.mounted = result.good
        return result

    def umount(self, mount: Mount, *words: str, seconds: float = COMMAND_SECONDS) -> Result:
        """``lamfs umount``."""
        result = self.cli("umount", *words, str(mount.path), seconds=seconds)
        if result.good or f"{mount.path} is unmounted" in result.output:  # though not all went well then
            mount.mounted = False
        return result

    def kill_daemons(self, mounts: Sequence[Mount] | None = None, *, what: str = "both") -> list[int]:
        """SIGKILL to the daemons of these mounts, their movers, or both, by pid."""
        killed = []
        for mount in self.active if mounts is None else mounts:
            daemon = mount.daemon
            if daemon is None:
                continue
            below = children(daemon)
            killed += {"daemon": [daemon], "mover": below, "both": [daemon, *below]}[what]
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.world.log.write("kill", machine=self.name, what=what, pids=killed)
        wait_until(lambda: not any(is_alive(pid) for pid in killed), 20)
        return killed

    def signal_daemons(self, number: int) -> None:
        """A signal to all daemons and movers of this machine."""
        for mount in self.active:
            daemon = mount.daemon
            for pid in () if daemon is None else (daemon, *children(daemon)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.world.log.write("signal", machine=self.name, number=number)

    def no_daemon(self) -> None:
        """Whatever lamfs process runs here ends now, as at a power cut (the disk keeps what was written)."""
        self.kill_daemons(self.mounts)
        for pid in watchdog.processes_of(str(self.data_dir)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in watchdog.processes_of(str(self.data_dir))), 20)
        for mount in self.mounts:
            mount.stop_worker()

    def hear_logs(self) -> None:
        """Take note of what the daemons have logged since. Complains of tracebacks."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.directory / "mount.log").read_text(errors="replace")
            new, self._log_seen = text[self._log_seen :], len(text)
            for record in log_records(new):
                self.world.log.heard(record)
            if _BAD.search(new):
                at = max(_BAD.search(new).start() - 300, 0)  # type: ignore[union-attr]
                self.world.complain("traceback", f"the log of {self.name} holds: {new[at : at + 3000]}")

    def vanish(self) -> None:
        """The machine is gone for good, with its disk."""
        self.no_daemon()
        for mount in self.mounts:
            watchdog.clean_up(str(self.data_dir), str(mount.path))
            mount.mounted = False
        for name in ("config", "data", "cache"):
            shutil.rmtree(self.base / name, ignore_errors=True)
        self.world.log.write("vanish", machine=self.name)
        self.cli("login", OWNER)

    def close(self) -> None:
        """Leave nothing running or mounted."""
        for mount in self.mounts:
            mount.close()


# -- all of it --------------------------------------------------------------------------------------------------------


class World:
    """A storage and the machines that use it; removed at the end unless ``keep`` was called."""

    def __init__(self, storage: str, *, loud: bool = False) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="lamfs-chaos-", dir="/tmp"))
        self.base.chmod(0o755)
        self.log = Log(self.base / "log.jsonl", loud=loud)
        self.storage: Storage = FolderStorage(self.base) if storage == "folder" else S3Storage(self.base)
        self.machines: dict[str, Machine] = {}
        self.complaints: list[Violation] = []
        """What was seen on the way that must not be, and does not keep the round from going on."""
        self._keep = False

    def machine(self, name: str) -> Machine:
        """A machine, made when it is first named."""
        if name not in self.machines:
            self.machines[name] = Machine(self, name)
            self.machines[name].must("login", OWNER)
        return self.machines[name]

    def extend(self) -> None:
        """Something is done: no watchdog strikes for a while."""
        for machine in self.machines.values():
            for mount in machine.mounts:
                mount.extend()

    def complain(self, kind: str, text: str) -> None:
        """A promise was broken, and it is worth looking on."""
        self.log.write("complaint", kind=kind, text=text)
        self.complaints.append(Violation(kind, text))

    def check(self) -> None:
        """Raise the first complaint."""
        for machine in self.machines.values():
            machine.hear_logs()
        if self.complaints:
            raise self.complaints[0]

    def keep(self) -> None:
        """Leave the files where they are, for whoever looks into a failure."""
        self._keep = True

    def __enter__(self) -> Self:
        try:
            self.storage.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines.values():
            machine.close()
        self.storage.stop()
        self.log.close()
        left = [m.path for one in self.machines.values() for m in one.mounts if watchdog.is_mounted(str(m.path))]
        if left:
            raise AssertionError(f"{left} cannot be unmounted; nothing below {self.base} is removed")
        if not self._keep:
            shutil.rmtree(self.base, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float, *, every: float = 0.02) -> bool:
    """Poll until a condition holds; whether it does before the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def pick(rng: random.Random, weights: dict[str, float]) -> str:
    """One of the names, by weight."""
    names = list(weights)
    return rng.choices(names, [weights[name] for name in names])[0]


__all__ = ["SLUG", "Machine", "Mount", "Result", "Storage", "Violation", "World", "pick", "wait_until"]
