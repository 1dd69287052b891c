"""What the kernel says of processes: CPU, memory, mounts."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.support.mounts import children

TICKS = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and all below it; without fusermount, which is libfuse's and only waits."""
    found = [pid]
    for parent in found:
        found += children(parent)
    return [one for one in found if name(one) not in ("fusermount3", "fusermount")]


def name(pid: int) -> str:
    """The program's short name; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds (user and system) that the processes have used."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(words[11]) + int(words[12])) / TICKS
    return total


def memory(pids: Iterable[int]) -> float:
    """MiB of memory that the processes hold; what they share is divided among them (PSS)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss:\s*(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total / 1024


def drop_page_cache() -> None:
    """Forget all clean pages, dentries and inodes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def until(condition: Callable[[], bool], what: str, seconds: float = 300.0, every: float = 0.002) -> None:
    """Poll. Raises TimeoutError that names ``what``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s still not true: {what}")
        time.sleep(every)


def run(words: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None, seconds: float = 900) -> float:
    """Run a program with its output thrown away; the seconds it took. Raises RuntimeError with its last words."""
    begin = time.perf_counter()
    done = subprocess.run(
        words,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=seconds,
    )
    took = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words[:6])}: exit {done.returncode}: {done.stderr.decode(errors='replace')[-800:]}"
        )
    return took
