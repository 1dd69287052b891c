"""Rows 1 to 5, 13 and 14: large files."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench import processes
from tests.bench.bench import MIB, Bench, Numbers, row
from tests.bench.systems import System

LARGE = "large"


def write_file(path: Path, data: memoryview) -> None:
    """Write in pieces of 1 MiB, and close."""
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), MIB):
            piece = data[start : start + MIB]
            written = 0
            while written < len(piece):
                written += file.write(piece[written:])


def read_file(path: Path, buffer: memoryview) -> tuple[float, float]:
    """Read in pieces of 1 MiB; seconds until the first, and in all."""
    begin = time.perf_counter()
    first = 0.0
    with open(path, "rb", buffering=0) as file:
        at = 0
        while count := file.readinto(buffer[at : at + MIB]):
            at += count
            first = first or time.perf_counter() - begin
    took = time.perf_counter() - begin
    assert at == len(buffer), f"{path} has {at} bytes, not {len(buffer)}"
    return first, took


def have_large(bench: Bench, system: System) -> Path:
    """The large file, in S3."""
    path = system.path / LARGE
    if LARGE not in system.prepared:
        write_file(path, bench.source)
        system.settle(bench.scale.large)
        system.prepared.add(LARGE)
    return path


def check(bench: Bench, what: str, written: memoryview | None = None) -> None:
    """What was read last is what was written (None: the large file)."""
    assert bench.buffer == (written or bench.source), f"{what}: the bytes are not those that were written"
    bench.buffer[:MIB] = bytes(MIB)


def never_seen(bench: Bench) -> memoryview:
    """As many bytes as in the large file, which differ from it and from those of other repetitions in each MiB: who
    finds out that storage has them already would not send them."""
    data = memoryview(bytearray(bench.source))
    for start in range(0, len(data), MIB):
        data[start : start + 8] = (bench.repetition + 1).to_bytes(8, "big")
    return data


@row("1", "write 1 GiB", writes=True)
def write_large(bench: Bench, system: System) -> Numbers:
    """Until close returns, until the bytes are in S3."""
    path = system.path / f"written-{bench.repetition}"
    data = never_seen(bench)
    before = processes.cpu_seconds(system.pids())
    begin = time.perf_counter()
    write_file(path, data)
    numbers = {"to close [s]": time.perf_counter() - begin}
    if system.remote:
        numbers["in S3 [s]"] = system.settle(bench.scale.large) - begin
        numbers["daemon CPU [s]"] = processes.cpu_seconds(system.pids()) - before
    read_file(path, bench.buffer)
    check(bench, f"{system.name}, written", data)
    path.unlink()
    system.settle()
    return numbers


@row("2", "read 1 GiB cold")
def read_cold(bench: Bench, system: System) -> Numbers:
    """With nothing of the file kept locally."""
    path = have_large(bench, system)
    system.remount(cold=True)
    if not system.remote:
        processes.drop_page_cache()
    before = processes.cpu_seconds(system.pids())
    first, took = read_file(path, bench.buffer)
    numbers = {"total [s]": took, "first MiB [ms]": first * 1000}
    if system.pids():
        numbers["daemon CPU [s]"] = processes.cpu_seconds(system.pids()) - before
    check(bench, f"{system.name}, cold")
    if system.name == "lamfs":
        numbers["boto3: ranged GETs by 8 threads [s]"] = read_boto3(bench, system)
    return numbers


def plain_boto3(bench: Bench, system: System) -> Callable[[int, int], bytes]:
    """How plain boto3 gets the bytes from the first to the last one of the large file, from the same server."""
    import boto3
    from botocore.config import Config

    config = Config(s3={"addressing_style": "path"}, max_pool_connections=8)
    env = bench.server.env
    client = boto3.client(
        "s3",
        endpoint_url=bench.proxy.url("boto3"),
        config=config,
        region_name="us-east-1",
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )
    if "boto3" not in system.prepared:
        bench.server.create_bucket("bench-boto3")
        client.upload_fileobj(io.BytesIO(bench.source), "bench-boto3", LARGE)
        system.prepared.add("boto3")

    def get(first: int, last: int) -> bytes:
        return client.get_object(Bucket="bench-boto3", Key=LARGE, Range=f"bytes={first}-{last}")["Body"].read()

    return get


def read_boto3(bench: Bench, system: System) -> float:
    """What ranged GETs of 8 MiB by eight threads of plain boto3 take for as many bytes."""
    get_range = plain_boto3(bench, system)

    def get(at: int) -> None:
        last = min(at + 8 * MIB, bench.scale.large) - 1
        bench.buffer[at : last + 1] = get_range(at, last)

    with ThreadPoolExecutor(8) as pool:
        begin = time.perf_counter()
        list(pool.map(get, range(0, bench.scale.large, 8 * MIB)))
        took = time.perf_counter() - begin
    check(bench, "boto3")
    return took


@row("3", "read 1 GiB from the disk cache")
def read_disk_cache(bench: Bench, system: System) -> Numbers:
    """After a remount, with the page cache dropped."""
    path = have_large(bench, system)
    read_file(path, bench.buffer)
    system.remount(cold=False)
    processes.drop_page_cache()
    _, took = read_file(path, bench.buffer)
    check(bench, f"{system.name}, from the disk cache")
    return {"total [s]": took}


@row("4", "read 1 GiB warm")
def read_warm(bench: Bench, system: System) -> Numbers:
    """Read before, and nothing dropped since."""
    path = have_large(bench, system)
    read_file(path, bench.buffer)
    _, took = read_file(path, bench.buffer)
    check(bench, f"{system.name}, warm")
    return {"total [s]": took}


@row("5", "random 4 KiB reads of 1 GiB")
def read_random(bench: Bench, system: System) -> Numbers:
    """Cold, then the same reads again."""
    have_large(bench, system)
    numbers: Numbers = {}
    for count in bench.scale.reads:
        system.remount(cold=True)
        path = system.path / LARGE
        path.stat()
        rng = random.Random(count + bench.repetition)
        places = [rng.randrange(bench.scale.large // 4096) * 4096 for _ in range(count)]
        before = system.traffic() if system.remote else None
        for state in ("cold", "warm"):
            times = []
            with open(path, "rb", buffering=0) as file:
                for place in places:
                    begin = time.perf_counter()
                    data = os.pread(file.fileno(), 4096, place)
                    times.append(time.perf_counter() - begin)
                    assert data == bench.source[place : place + 4096], f"{system.name}: wrong bytes at {place}"
            if state == "cold" and before is not None:
                moved = system.traffic() - before
                numbers[f"{count} cold, fetched a read [KiB]"] = moved.down / count / 1024
                if bench.delay:
                    numbers[f"{count} cold, round trips a read"] = sum(times) / count / bench.delay
                numbers[f"{count} cold, requests [n]"] = moved.requests
            times.sort()
            numbers[f"{count} {state}, total [s]"] = sum(times)
            numbers[f"{count} {state}, p50 [ms]"] = times[len(times) // 2] * 1000
            numbers[f"{count} {state}, p99 [ms]"] = times[int(len(times) * 0.99)] * 1000
    if system.name == "lamfs":
        get = plain_boto3(bench, system)
        get(0, 4095)
        begin = time.perf_counter()
        for place in places[:100]:
            assert get(place, place + 4095) == bench.source[place : place + 4096]
        took = time.perf_counter() - begin
        numbers["boto3: a ranged GET of 4 KiB [ms]"] = took / len(places[:100]) * 1000
        if bench.delay:
            numbers["boto3: round trips a read"] = took / len(places[:100]) / bench.delay
    return numbers


# A process of its own for each: Python's lock would make one program of four.
WORKER = """
import sys
read, write, size, other = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[5].encode()
data = open(sys.argv[4], "rb").read(size)
print("ready", flush=True)
sys.stdin.readline()
with open(write, "wb", buffering=0) as target, open(read, "rb", buffering=0) as source:
    for at in range(0, size, 1 << 20):
        target.write(other + data[at + len(other):at + (1 << 20)])
        assert source.read(1 << 20) == data[at:at + (1 << 20)]
"""


@row("13", "four processes, each reads a cold 64 MiB and writes another", writes=True)
def four_processes(bench: Bench, system: System) -> Numbers:
    """All four at once, until the last has closed."""
    data = bench.source[: bench.scale.part]
    plain = bench.base / "part"
    plain.write_bytes(data)
    if "four" not in system.prepared:
        for number in range(4):
            write_file(system.path / f"four-{number}", data)
        system.settle(4 * bench.scale.part)
        system.prepared.add("four")
    system.remount(cold=True)
    workers = []
    for number in range(4):
        words = [str(system.path / f"four-{number}"), str(system.path / f"new-{number}"), str(len(data)), str(plain)]
        words.append(f"{system.name} {bench.repetition} {number}")  # bytes that storage has not seen
        workers.append(
            subprocess.Popen(
                [sys.executable, "-I", "-c", WORKER, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    begin = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=600)
        assert worker.returncode == 0, f"{system.name}: a process failed"
    numbers = {"to close [s]": time.perf_counter() - begin}
    if system.remote:
        numbers["in S3 [s]"] = system.settle(4 * bench.scale.part) - begin
    for number in range(4):
        (system.path / f"new-{number}").unlink()
    system.settle()
    return numbers


@row("14", "change 1 GiB that is only in S3", writes=True)
def patch(bench: Bench, system: System) -> Numbers:
    """1 MiB more at its end; other 4 KiB in its middle."""
    path = have_large(bench, system)
    system.prepared.discard(LARGE)
    if path.stat().st_size != bench.scale.large:
        os.truncate(path, bench.scale.large)
        system.settle()
    numbers: Numbers = {}
    middle = bench.scale.large // 2 + 12_288
    for what, place, data in (
        ("append 1 MiB", bench.scale.large, os.urandom(MIB)),
        ("change 4 KiB", middle, os.urandom(4096)),
    ):
        system.remount(cold=True)
        if not system.remote:
            processes.drop_page_cache()
        before = system.traffic() if system.remote else None
        begin = time.perf_counter()
        with open(path, "r+b", buffering=0) as file:
            file.seek(place)
            file.write(data)
        numbers[f"{what}, to close [s]"] = time.perf_counter() - begin
        if before is not None:
            numbers[f"{what}, in S3 [s]"] = system.settle(bench.scale.large) - begin
            moved = system.traffic() - before
            numbers[f"{what}, moved [MiB]"] = (moved.up + moved.down) / MIB
        system.remount(cold=True)
        with open(path, "rb", buffering=0) as file:
            for at, wanted in (
                (place, data),
                (0, bench.source[:4096]),
                (place - 8192, bench.source[place - 8192 : place]),
            ):
                assert os.pread(file.fileno(), len(wanted), at) == wanted, f"{system.name}: wrong bytes at {at}"
    with open(path, "r+b", buffering=0) as file:
        file.seek(middle)
        file.write(bench.source[middle : middle + 4096])
    os.truncate(path, bench.scale.large)
    system.settle(bench.scale.large)
    system.prepared.add(LARGE)
    return numbers
