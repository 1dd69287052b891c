"""The watchdog of one mounted instance: a process that removes a stuck mount. Run by mounts.py.

    python watchdog.py DATA_DIR MOUNTPOINT        a line ``deadline SECONDS`` on stdin sets the time to act

It acts when the deadline passes, or when the test run dies (end of file on stdin). It kills every process of the
instance by its pid, which ends all system calls that hang in the mount, and detaches the mount. It knows these
processes by LAMFS_DATA_DIR in their environment: a temporary directory that nobody else uses.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path


def processes_of(data_dir: str) -> list[int]:
    """Pids of processes that were started with this data directory in their environment."""
    wanted = f"LAMFS_DATA_DIR={data_dir}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def is_mounted(path: str) -> bool:
    """Whether something is mounted at ``path``. Reads the kernel's table, never the mount."""
    text = path.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    with open("/proc/self/mountinfo") as table:
        return any(line.split()[4] == text for line in table)


def clean_up(data_dir: str, mountpoint: str) -> None:
    """Kill the instance's processes and detach its mount."""
    for pid in processes_of(data_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for _ in range(50):
        if not is_mounted(mountpoint):
            return
        subprocess.run(["fusermount3", "-uz", mountpoint], check=False, capture_output=True, timeout=10)
        time.sleep(0.1)


def main(data_dir: str, mountpoint: str) -> None:
    """Wait for commands until the end of the test run."""
    deadline: float | None = None
    buffer = b""
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([0], [], [], left)
        if not ready:
            clean_up(data_dir, mountpoint)
            deadline = None
            continue
        data = os.read(0, 4096)
        if not data:
            clean_up(data_dir, mountpoint)
            return
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            deadline = time.monotonic() + float(line.split()[1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
