"""What one run of the benchmark holds: the server, the proxy, the systems, the data, and what was measured.

A row is a function that measures one system once and returns numbers by name; rows are run interleaved, system after
system, repetition after repetition, so that a machine whose speed drifts is the same to all.
"""

from __future__ import annotations

import contextlib
import functools
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import processes
from tests.bench.proxy import Proxy
from tests.bench.systems import ALL, System
from tests.support.servers import MinistackServer, SeaweedServer, Server

MIB = 1 << 20
Numbers = dict[str, float]


@dataclass(frozen=True)
class Scale:
    """How much is moved. Sizes in bytes."""

    large: int = 1024 * MIB
    part: int = 64 * MIB
    small_files: int = 1000
    small: int = 4096
    reads: tuple[int, ...] = (100, 1000)
    listed: tuple[int, ...] = (1000, 10_000)
    source_files: int = 2000
    # Artifacts that are saved one after the other.
    saves: int = 1000
    # Files in a file system that holds nothing else, only with --scale huge.
    huge: tuple[int, ...] = ()


SCALES = {
    "full": Scale(),
    "huge": Scale(listed=(1000, 10_000, 100_000), huge=(10_000, 100_000, 1_000_000)),
    "tiny": Scale(32 * MIB, 4 * MIB, 50, 4096, (20,), (100,), 100, 20),
}


@dataclass(frozen=True)
class Row:
    """One row: ``number`` as in the report, which systems take part, and how often."""

    number: str
    title: str
    measure: Callable[[Bench, System], Numbers]
    # Variants that only differ in how they write take part.
    writes: bool = False
    # Names of the only systems that take part; none: all.
    only: tuple[str, ...] = ()
    # Whether the systems are mounted for it.
    mounted: bool = True


ROWS: list[Row] = []


def row(
    number: str,
    title: str,
    *,
    writes: bool = False,
    only: tuple[str, ...] = (),
    mounted: bool = True,
) -> Callable[[Callable[[Bench, System], Numbers]], Callable[[Bench, System], Numbers]]:
    """Register a row."""

    def register(measure: Callable[[Bench, System], Numbers]) -> Callable[[Bench, System], Numbers]:
        ROWS.append(Row(number, title, measure, writes, only, mounted))
        return measure

    return register


@dataclass
class Bench:
    """The run."""

    scale: Scale
    delay: float
    server_name: str
    names: list[str]
    base: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lamfs-b-", dir="/tmp")))
    # (row number, metric) -> system -> one number for each repetition
    results: dict[tuple[str, str], dict[str, list[float]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    repetition: int = 0

    def __post_init__(self) -> None:
        self._filled: dict[tuple[str, int], System] = {}
        rng = random.Random(1)
        self.source = memoryview(b"".join(rng.randbytes(MIB) for _ in range(self.scale.large // MIB)))
        # What is read comes here; touched once, so that no page fault is measured.
        self.buffer = memoryview(bytearray(self.scale.large))
        self.buffer[:] = self.source

    @contextlib.contextmanager
    def running(self) -> Iterator[list[System]]:
        """The server, the proxy and the systems, until the end of the block."""
        server = MinistackServer if self.server_name == "ministack" else SeaweedServer
        with contextlib.ExitStack() as self._stack:
            stack = self._stack
            self.server: Server = stack.enter_context(server(self.base / "server"))
            kinds = [kind for kind in ALL if kind.name in self.names]
            ports = [kind.name for kind in kinds] + ["boto3"]
            self.proxy = Proxy(self.base, self.server.port, ports, self.delay)
            stack.callback(self.proxy.close)
            yield [self._made(kind) for kind in kinds]

    def _made(self, kind: type[System], label: str = "") -> System:
        system = kind(self.base, self.proxy.url(kind.name), label)
        system.traffic = functools.partial(self.proxy.traffic, kind.name)
        self.server.create_bucket(system.bucket)
        self._stack.callback(system.close)
        system.create()
        system.mount()
        system.umount()
        return system

    def filled(self, system: System, count: int) -> System:
        """Another one of the same kind, not mounted, that holds ``count`` files, a thousand in a directory."""
        if (system.name, count) not in self._filled:
            other = self._made(type(system), f"-{count}")
            if not other.fill("filled", count):
                keys = [f"filled/d{number // 1000:04}/sample_{number % 1000:06}.csv" for number in range(count)]
                self.put_objects(other, keys)
            self._filled[system.name, count] = other
        return self._filled[system.name, count]

    def put_objects(self, system: System, keys: list[str]) -> None:
        """Straight into the bucket, for systems whose files are objects with the same names."""
        with self.server.client() as client, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda key: client.put_object(Bucket=system.bucket, Key=key, Body=b"x"), keys))

    def run(self, row: Row, systems: list[System], repetitions: int, say: Callable[[str], None]) -> None:
        """All repetitions of one row. A system that fails is noted, and left out of the rest of the row."""
        chosen = [s for s in systems if s.name in row.only]
        if not row.only:
            chosen = [s for s in systems if s.is_mount and (row.writes or not s.only_writes)]
        failed: set[str] = set()
        for self.repetition in range(repetitions):
            for system in chosen:
                if system.name in failed:
                    continue
                begin = time.monotonic()
                try:
                    if row.mounted:
                        system.mount()
                    numbers = row.measure(self, system)
                    if row.mounted and system.pids():
                        numbers["memory [MiB]"] = processes.memory(system.pids())
                    system.umount()
                except Exception as error:
                    failed.add(system.name)
                    self.failures.append(f"row {row.number}, {system.name}: {type(error).__name__}: {error}")
                    say(f"  {system.name}: FAILED: {error}\n{traceback.format_exc()}")
                    with contextlib.suppress(Exception):
                        system.umount()
                    continue
                for name, value in numbers.items():
                    self.results.setdefault((row.number, name), {}).setdefault(system.name, []).append(value)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
                say(f"  {system.name}: {shown}   ({time.monotonic() - begin:.1f} s)")
