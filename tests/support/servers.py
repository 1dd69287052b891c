"""Real S3 servers for tests, each a child process of the test run, only on 127.0.0.1.

    with SeaweedServer(folder) as server:
        server.create_bucket("b")
        config = server.config("b", "some/prefix")      # -> StorageConfig; put server.env into the environment
        server.pause(); server.resume(); server.kill(); server.restart()

servers_fixtures.py has pytest fixtures for them. The kernel kills the servers when the test run ends, even by SIGKILL
(prctl PR_SET_PDEATHSIG, set by a small launcher that then becomes the server: no code runs between fork and exec in a
process with threads). Nothing is ever killed by name.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest

from lamfs.storage.base import StorageConfig

ACCESS_KEY = "lamfs-test"
SECRET_KEY = "lamfs-test-secret"
READY_SECONDS = 30.0

_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    raise SystemExit("the test run is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_program(name: str) -> str:
    """Path of a server program, from the environment that runs the tests or from PATH.

    If it is missing, the test is skipped. With CI=true the test fails, because everything must be tested there.
    """
    here = os.path.dirname(sys.executable)
    found = shutil.which(name, path=here) or shutil.which(name)
    if found is None:
        text = f"the program '{name}' is not installed; install the test requirements"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    return found


def free_ports(count: int) -> list[int]:
    """Unused ports of 127.0.0.1, below the range from which the kernel assigns client ports.

    They very probably stay free between two starts of a server. A port from bind(0) does not.
    """
    ports: list[int] = []
    for port in random.sample(range(12000, 32000), 4000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


class Server:
    """One server process. Used from one thread. ``env``: what a client needs in its environment."""

    name: ClassVar[str]
    program: ClassVar[str]
    port_count: ClassVar[int] = 1
    honours_conditions: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = find_program(self.program)
        self.log = folder / "server.log"
        self.ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.env = self.env_for(ACCESS_KEY, SECRET_KEY)

    @staticmethod
    def env_for(access_key: str, secret_key: str) -> dict[str, str]:
        """The environment for a client with these credentials."""
        return {
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    # differences between the servers

    def arguments(self) -> list[str]:
        """Arguments of the command line."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """The server's own environment, added to the inherited one."""
        return {}

    # life

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def port(self) -> int:
        """The port of the S3 API."""
        return self.ports[0]

    @property
    def endpoint_url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start on new ports and wait until the S3 API answers. If a port was taken, other ports are tried."""
        for attempt in range(3):
            self.ports = free_ports(self.port_count)
            try:
                self._launch()
            except RuntimeError:
                if attempt == 2:
                    raise
            else:
                return

    def restart(self) -> None:
        """Start again on the same ports and data, after kill() or stop()."""
        assert self._process is None, "stop or kill the server first"
        self._launch()

    def _launch(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= self.environment()
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), self.path]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*launcher, *self.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether the S3 API answers a request (an unsigned one: any status below 500 counts)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End the server normally, then by force."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self.kill()

    def kill(self) -> None:
        """SIGKILL, like a power cut."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for port in self.ports:
            # SeaweedFS leaves a socket in /tmp for each of its gRPC ports, and the place cannot be configured.
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def pause(self) -> None:
        """SIGSTOP: the kernel accepts connections, but nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + READY_SECONDS
        while any(
            task.read_text().rpartition(")")[2].split()[0] != "T"
            for task in Path(f"/proc/{self.pid}/task").glob("*/stat")
        ):
            assert time.monotonic() < deadline, "the server does not stop"  # its threads finish their time slices first
            time.sleep(0.001)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def ensure_running(self) -> None:
        """Undo pause() and kill()."""
        if self._process is None:
            self.restart()
        else:
            self.resume()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # using it

    @contextlib.contextmanager
    def client(self, env: dict[str, str] | None = None) -> Iterator[Any]:
        """A plain boto3 client, for tests that bypass lamfs."""
        import boto3
        from botocore.config import Config

        env = env or self.env
        client = boto3.session.Session(
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            region_name=env["AWS_DEFAULT_REGION"],
        ).client("s3", endpoint_url=self.endpoint_url, config=Config(s3={"addressing_style": "path"}))
        try:
            yield client
        finally:
            client.close()

    def create_bucket(self, name: str) -> None:
        """Make a bucket, unless it exists."""
        with self.client() as client:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=name)

    def config(self, bucket: str, prefix: str = "", *, timeout: float = 20.0) -> StorageConfig:
        """The settings with which lamfs reaches ``bucket/prefix`` on this server."""
        root = f"s3://{bucket}/{prefix}".rstrip("/")
        return StorageConfig(root, endpoint_url=self.endpoint_url, region="us-east-1", path_style=True, timeout=timeout)


class SeaweedServer(Server):
    """SeaweedFS in one process, with its data in ``folder``. Identities: ``env`` is the administrator, ``reader_env``
    may read and list, ``nobody_env`` may do nothing."""

    name = "seaweedfs"
    program = "weed"
    port_count = 10

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reader_env = self.env_for("lamfs-reader", "lamfs-reader-secret")
        self.nobody_env = self.env_for("lamfs-nobody", "lamfs-nobody-secret")

    def arguments(self) -> list[str]:
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        identities = [
            ("admin", self.env, ["Admin", "Read", "Write", "List", "Tagging"]),
            ("reader", self.reader_env, ["Read", "List"]),
            ("nobody", self.nobody_env, ["Read:a-bucket-that-is-not-there"]),
        ]
        config = self.folder / "identities.json"
        config.write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": name,
                            "credentials": [
                                {"accessKey": env["AWS_ACCESS_KEY_ID"], "secretKey": env["AWS_SECRET_ACCESS_KEY"]}
                            ],
                            "actions": actions,
                        }
                        for name, env, actions in identities
                    ]
                }
            )
        )
        names = (
            "s3.port",
            "s3.port.grpc",
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "admin.port",
            "admin.port.grpc",
        )
        return [
            "mini",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            # a missing bucket must stay missing
            "-s3.autoCreateBucket=false",
            f"-s3.config={config}",
            f"-filer.localSocket={self.folder}/f.sock",
            f"-s3.localSocket={self.folder}/s.sock",
            *(f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)),
        ]


class MinistackServer(Server):
    """ministack: S3 in memory. kill() loses everything."""

    name = "ministack"
    program = "ministack"

    def arguments(self) -> list[str]:
        return []

    def environment(self) -> dict[str, str]:
        return {"GATEWAY_PORT": str(self.port), "BIND_HOST": "127.0.0.1", "SERVICES": "s3,iam,sts"}


class RcloneServer(Server):
    """``rclone serve s3`` over a folder. It ignores conditional requests: the negative case."""

    name = "rclone"
    program = "rclone"
    honours_conditions = False

    def arguments(self) -> list[str]:
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        return [
            "serve",
            "s3",
            str(data),
            f"--addr=127.0.0.1:{self.port}",
            f"--auth-key={ACCESS_KEY},{SECRET_KEY}",
            f"--config={self.folder}/rclone.conf",
            "--vfs-cache-mode=off",
        ]
