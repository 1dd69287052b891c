"""The mounts that are compared, each with a bucket of its own on the same S3 server. Used from one thread.

Every system is used with its own defaults, and with what makes a fair comparison: a local data cache for all, uploads
that begin at once (``rclone --vfs-write-back 0s``), and no reports home. JuiceFS is measured twice where files are
written: as it is (close returns when the bytes are in S3), and with ``--writeback`` (close returns when they are on the
local disk, as with lamfs and rclone).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from lamfs.storage.base import StorageConfig
from tests.bench import fill, processes
from tests.bench.proxy import Traffic
from tests.support import watchdog
from tests.support.mounts import MountedInstance
from tests.support.servers import ACCESS_KEY, SECRET_KEY

DEADLINE = 3600.0


class System:
    """One way to have files. ``path`` is where they are while it is mounted."""

    name: ClassVar[str]
    # Whether it is a file system on S3, and so a peer (or lamfs itself).
    remote: ClassVar[bool] = True
    # Only measured where files are written.
    only_writes: ClassVar[bool] = False
    # Whether it is a file system at all; else it takes part in the rows that name it.
    is_mount: ClassVar[bool] = True

    def __init__(self, base: Path, url: str, label: str = "") -> None:
        """``label``: what sets it apart from others of its kind."""
        self.label = label
        self.base = base / f"{self.name}{label}"
        self.base.mkdir()
        self.url = url
        self.path = self.base / "mnt"
        # What it has moved to and from S3 until now.
        self.traffic: Callable[[], Traffic] = lambda: Traffic(0, 0, 0, 0)
        # What the rows have prepared in it and may use again.
        self.prepared: set[str] = set()

    @classmethod
    def version(cls) -> str | None:
        """Version for the report; None when it is not installed."""
        raise NotImplementedError

    @property
    def bucket(self) -> str:
        """Its bucket."""
        return f"bench-{self.name}{self.label}"

    def create(self) -> None:
        """Make the (empty) file system."""

    def mount(self) -> None:
        """Mount, and return when the mount is there."""

    def umount(self) -> None:
        """Unmount in order: what it owes storage is stored."""

    def forget(self) -> None:
        """Remove all bytes that are kept locally of what is in S3. Not mounted."""

    def settle(self, written: int = 0) -> float:
        """Return when all that was written is in S3; the time.perf_counter() at which it was.

        ``written``: bytes of the files that were written or changed, for a system that does not tell how far it is.
        """
        return time.perf_counter()

    def pids(self) -> list[int]:
        """Its processes."""
        return []

    def fill(self, folder: str, count: int, per_directory: int | None = 1000) -> bool:
        """Make ``count`` files below ``folder``, a new directory of the root, without storing any. Not mounted.

        ``per_directory``: as in fill.py. False when it knows no way.
        """
        return False

    def close(self) -> None:
        """End everything, remove everything."""

    def remount(self, *, cold: bool) -> None:
        """Unmount and mount; cold: with nothing of the files kept locally."""
        self.umount()
        if cold:
            self.forget()
        self.mount()


class LocalDisk(System):
    """A folder of the local disk: what the others are measured against, and no peer."""

    name = "local"
    remote = False

    @classmethod
    def version(cls) -> str | None:
        found = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", "/tmp"], capture_output=True, text=True, check=False)
        return found.stdout.strip() or "?"

    def create(self) -> None:
        self.path.mkdir()

    def close(self) -> None:
        shutil.rmtree(self.base, ignore_errors=True)


class Lamfs(System):
    """lamfs from this checkout."""

    name = "lamfs"

    @classmethod
    def version(cls) -> str | None:
        root = Path(__file__).resolve().parents[2]
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        return found.stdout.strip() or "this checkout"

    def create(self) -> None:
        storage = StorageConfig(
            f"s3://{self.bucket}", endpoint_url=self.url, region="us-east-1", path_style=True, timeout=60.0
        )
        env = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1"}
        self.instance = MountedInstance(storage, env=env, seconds=DEADLINE)
        self.instance.__enter__()
        self.path = self.instance.path

    def mount(self) -> None:
        self.instance.extend(DEADLINE)
        self.instance.mount()

    def umount(self) -> None:
        if self.instance.mounted:
            self.instance.cli("umount", str(self.path), timeout=600)
            pid, self.instance.pid = self.instance.pid, 0
            processes.until(lambda: not Path(f"/proc/{pid}").exists() or not processes.name(pid), "lamfs has ended")

    def forget(self) -> None:
        shutil.rmtree(self.instance.cache_dir, ignore_errors=True)

    def settle(self, written: int = 0) -> float:
        self.instance.sync(timeout=600)
        return time.perf_counter()

    def pids(self) -> list[int]:
        return processes.family(self.instance.pid)

    def fill(self, folder: str, count: int, per_directory: int | None = 1000) -> bool:
        fill.fill_registry(self.instance.directory, count, per_directory, folder=folder)
        return True

    def close(self) -> None:
        self.instance.close()
        shutil.rmtree(self.base, ignore_errors=True)


class Peer(System):
    """A peer that runs in the foreground, as a child of the benchmark."""

    program: ClassVar[str]
    version_words: ClassVar[list[str]] = ["--version"]

    def __init__(self, base: Path, url: str, label: str = "") -> None:
        super().__init__(base, url, label)
        self.cache = self.base / "cache"
        self.log = self.base / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        # By this the watchdog knows the processes that it may end.
        self.env = {**os.environ, "LAMFS_DATA_DIR": str(self.base)}

    @classmethod
    def found(cls) -> str | None:
        """Path of the program: from .bench/venv, from beside the interpreter, from PATH."""
        root = Path(__file__).resolve().parents[2]
        places = os.pathsep.join([str(root / ".bench/venv/bin"), os.path.dirname(sys.executable), os.environ["PATH"]])
        return shutil.which(cls.program, path=places)

    @classmethod
    def version(cls) -> str | None:
        program = cls.found()
        if program is None:
            return None
        done = subprocess.run([program, *cls.version_words], capture_output=True, text=True, check=False)
        found = re.search(r"v?\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
        return found[0] if found else "?"

    def words(self) -> list[str]:
        """The command that mounts, in the foreground."""
        raise NotImplementedError

    def create(self) -> None:
        self.path.mkdir()
        self.cache.mkdir()
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(self.base), str(self.path)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )

    def mount(self) -> None:
        assert self._watchdog is not None
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(f"deadline {DEADLINE}\n".encode())
        self._watchdog.stdin.flush()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.words(), env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        process = self._process

        def there() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{self.name} did not mount: {self.log.read_text(errors='replace')[-800:]}")
            return watchdog.is_mounted(str(self.path))

        processes.until(there, f"{self.name} is mounted", 60)

    def umount(self) -> None:
        if self._process is None:
            return
        self.settle()
        for _ in range(200):
            if subprocess.run(["fusermount3", "-u", str(self.path)], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.05)
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def forget(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir()

    def pids(self) -> list[int]:
        return processes.family(self._process.pid) if self._process is not None else []

    def close(self) -> None:
        watchdog.clean_up(str(self.base), str(self.path))
        if self._watchdog is not None:
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog.wait(30)
        if self._process is not None:
            self._process.wait()
        if not watchdog.is_mounted(str(self.path)):
            shutil.rmtree(self.base, ignore_errors=True)


class JuiceFS(Peer):
    """JuiceFS with SQLite metadata."""

    name = "juicefs"
    program = "juicefs"
    options: ClassVar[list[str]] = []

    @property
    def meta(self) -> Path:
        """Its metadata database."""
        return self.base / "meta.db"

    def create(self) -> None:
        super().create()
        program = self.found()
        assert program is not None
        words = [program, "format", "--storage", "s3", "--bucket", f"{self.url}/{self.bucket}"]
        words += ["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY, f"sqlite3://{self.meta}", "bench"]
        processes.run(words, env=self.env)

    def words(self) -> list[str]:
        program = self.found()
        assert program is not None
        words = [program, "mount", f"sqlite3://{self.meta}", str(self.path), "--cache-dir", str(self.cache)]
        return [*words, "--no-usage-report", "--no-syslog", "--metrics", "127.0.0.1:0", *self.options]

    def fill(self, folder: str, count: int, per_directory: int | None = 1000) -> bool:
        fill.fill_juicefs(self.meta, count, per_directory, folder=folder)
        return True


class JuiceFSWriteback(JuiceFS):
    """JuiceFS with ``--writeback``: close does not wait for S3."""

    name = "juicefs-wb"
    options: ClassVar[list[str]] = ["--writeback"]
    only_writes = True

    def settle(self, written: int = 0) -> float:
        if self._process is not None:
            processes.until(lambda: not self._staged(), "JuiceFS has uploaded what it staged", 600)
        return time.perf_counter()

    def _staged(self) -> int:
        stats = (self.path / ".stats").read_text()
        return sum(
            int(float(found)) for found in re.findall(r"^juicefs_staging_blocks\S*\s+(\S+)$", stats, re.MULTILINE)
        )


class Rclone(Peer):
    """``rclone mount --vfs-cache-mode full``."""

    name = "rclone"
    program = "rclone"
    version_words: ClassVar[list[str]] = ["version"]

    def __init__(self, base: Path, url: str, label: str = "") -> None:
        super().__init__(base, url, label)
        self._sent = 0
        self.env |= {
            "RCLONE_CONFIG": "/dev/null",
            "RCLONE_S3_PROVIDER": "Other",
            "RCLONE_S3_ACCESS_KEY_ID": ACCESS_KEY,
            "RCLONE_S3_SECRET_ACCESS_KEY": SECRET_KEY,
            "RCLONE_S3_ENDPOINT": url,
            "RCLONE_S3_REGION": "us-east-1",
            "RCLONE_S3_FORCE_PATH_STYLE": "true",
        }

    def words(self) -> list[str]:
        program = self.found()
        assert program is not None
        words = [program, "mount", f":s3:{self.bucket}", str(self.path), "--cache-dir", str(self.cache)]
        return [*words, "--vfs-cache-mode", "full", "--vfs-write-back", "0s"]

    def settle(self, written: int = 0) -> float:
        """It hashes and uploads some time after close returned, and does not tell: done when it has sent as many bytes
        as were written since it was last done, and no request waits, for a while."""
        done, seen = time.perf_counter(), self.traffic()
        while self._process is not None:
            now, moved = time.perf_counter(), self.traffic()
            if moved != seen or moved.waiting:
                done, seen = now, moved
            elif moved.up - self._sent >= written and now > done + 0.5:
                break
            elif now > done + 60:
                raise TimeoutError("rclone has not uploaded all within 60 s of its last request")
            time.sleep(0.005)
        self._sent = seen.up
        return done


class S3fs(Peer):
    """s3fs-fuse with a local cache."""

    name = "s3fs"
    program = "s3fs"

    def create(self) -> None:
        super().create()
        password = self.base / "passwd"
        password.write_text(f"{ACCESS_KEY}:{SECRET_KEY}\n")
        password.chmod(0o600)

    def words(self) -> list[str]:
        program = self.found()
        assert program is not None
        words = [program, self.bucket, str(self.path), "-f", "-o", f"url={self.url}", "-o", "use_path_request_style"]
        return [*words, "-o", f"passwd_file={self.base}/passwd", "-o", f"use_cache={self.cache}"]


class LaminDB(System):
    """LaminDB's Python API, in an environment of its own."""

    name = "lamindb"
    remote = False
    is_mount = False

    @classmethod
    def found(cls) -> str | None:
        """Its Python interpreter."""
        python = Path(__file__).resolve().parents[2] / ".bench/lamindb/bin/python"
        return str(python) if python.exists() else None

    @classmethod
    def version(cls) -> str | None:
        python = cls.found()
        if python is None:
            return None
        code = "from importlib.metadata import version; print(version('lamindb'))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        return done.stdout.strip() or None

    def close(self) -> None:
        shutil.rmtree(self.base, ignore_errors=True)


class Passthrough(Peer):
    """pyfuse3's own example on the local disk: what pyfuse3 costs before any file system does anything."""

    name = "passthrough"
    program = "passthroughfs.py"
    remote = False

    @classmethod
    def found(cls) -> str | None:
        root = Path(__file__).resolve().parents[2]
        found = next(iter((root / ".bench").glob("pyfuse3-*/examples/passthroughfs.py")), None)
        return str(found) if found else None

    @classmethod
    def version(cls) -> str | None:
        found = cls.found()
        return Path(found).parents[1].name if found else None

    def create(self) -> None:
        super().create()
        (self.base / "source").mkdir()

    def words(self) -> list[str]:
        return [sys.executable, str(self.found()), str(self.base / "source"), str(self.path)]


ALL: list[type[System]] = [Lamfs, JuiceFS, JuiceFSWriteback, Rclone, S3fs, LaminDB, LocalDisk, Passthrough]
