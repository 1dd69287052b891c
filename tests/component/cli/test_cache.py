"""``lamfs cache``: many files at once, over a link that is slow or breaks, and out of the cache again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from lamfs.cli import main
from lamfs.model import BLOCK_SIZE, StorageConfig
from lamfs.ops import artifacts, caching
from lamfs.ops.instance import Instance
from tests.component.cli.test_s3 import options
from tests.support.commands import ROOT, quick, quick_json
from tests.support.mounts import wait_until
from tests.support.proxy import FaultProxy
from tests.support.transfer import make_bytes


@pytest.fixture
def link(seaweed_config: StorageConfig, seaweed_proxy: FaultProxy) -> FaultProxy:
    """The link to the storage of the current instance, which is on S3."""
    quick("login", "testuser1")
    config = StorageConfig(seaweed_config.root, seaweed_proxy.url, seaweed_config.region)
    quick("init", "--storage", config.root, "--name", "far", *options(config))
    return seaweed_proxy


def save(tmp_path: Path, files: dict[str, bytes]) -> None:
    """Save artifacts under keys."""
    with Instance.open() as instance:
        for key, data in files.items():
            (tmp_path / "file").write_bytes(data)
            artifacts.save(instance, tmp_path / "file", key=key)


def gets(link: FaultProxy) -> Counter[tuple[str, str | None]]:
    """How often each range of each artifact's object was fetched."""
    return Counter(
        (head.path, head.get("Range"))
        for head in link.requests
        if head.method == "GET" and "/.lamindb/" in head.path and "/_exclusion/" not in head.path
    )


def cached() -> list[Path]:
    """All files in the cache."""
    found = Path(os.environ["LAMFS_CACHE_DIR"]).rglob("*")
    return sorted(path for path in found if path.is_file() and not path.name.startswith("index.db"))


def test_a_directory_a_pattern_errors_and_back(link: FaultProxy, tmp_path: Path) -> None:
    files = {f"d/e/{number}.txt": b"%d" % number for number in range(20)}
    files |= {"d/big.bin": make_bytes(2 * BLOCK_SIZE + 5), "other.txt": b"other"}
    save(tmp_path, files)
    assert quick("cache", "d/**/*1*.txt") == "11 files (21 B) in the cache, 11 (21 B) of them new\n"
    assert quick("cache", "--jobs", "4", "d/") == "21 files (8.0 MiB) in the cache, 10 (8.0 MiB) of them new\n"
    paths = quick("cache", "--paths", "d").splitlines()
    assert [Path(path).read_bytes() for path in paths] == [files[key] for key in sorted(files) if key != "other.txt"]
    assert sum(gets(link).values()) == 23
    assert quick("cache", "other.txt", "d/e/*.txt").splitlines()[0] in map(str, cached())
    freed = quick("cache", "--evict", "d/e", "never.txt", code=1)
    assert "There is no artifact 'never.txt'" in freed
    assert len(cached()) == 2
    assert quick("cache", "--evict", "**") == "2 files evicted, 8.0 MiB freed\n"
    assert cached() == []
    assert quick_json("status")["cache"]["bytes"] == 0
    # an error of one leaves the others alone
    save(tmp_path, {"x/a": b"aaaa", "x/b": b"bbbb", "x/c": b"cccc"})
    with Instance.open() as instance:
        lost = artifacts.find(instance, "x/b").revision.object_key
        instance.store.delete([lost])
    done = CliRunner().invoke(main, ["cache", "--paths", "x", "nothing/*"])
    assert done.exit_code == 1
    assert [Path(line).read_bytes() for line in done.stdout.splitlines()] == [b"aaaa", b"cccc"]
    assert "x/b: " in done.stderr
    assert "No key matches 'nothing/*'" in done.stderr
    assert "1 file could not be cached, 2 could" in done.stderr


def test_many_at_once(link: FaultProxy, tmp_path: Path) -> None:
    save(tmp_path, {f"d/{number}": b"%d" % number if number else b"" for number in range(64)})
    link.add("delay", method="GET", path=".lamindb", count=None, seconds=0.1)
    began = time.monotonic()
    assert quick("cache", "--jobs", "32", "d") == "64 files (117 B) in the cache, 64 (117 B) of them new\n"
    assert time.monotonic() - began < 64 * 0.1 / 2
    assert len(cached()) == 64
    assert quick("cache", "d") == "64 files (117 B) in the cache, 0 (0 B) of them new\n"
    link.clear()
    # two processes fetch the same
    data = make_bytes(5 * BLOCK_SIZE)
    save(tmp_path, {"two/big": data, "two/small": b"small"})
    with Instance.open() as one, Instance.open() as two, ThreadPoolExecutor(2) as threads:
        records = caching.select(one, "two/*").records

        def fill(instance: Instance) -> list[bytes]:
            with instance:
                found = {each.record.key: each.path for each in caching.fill(instance, records)}
            return [path.read_bytes() for _, path in sorted(found.items()) if path is not None]  # type: ignore[type-var]

        assert list(threads.map(fill, (one, two))) == [[data, b"small"]] * 2
    link.requests.clear()
    quick("cache", "two/*")
    assert not gets(link)
    # evicted while it is fetched
    quick("cache", "--evict", "two")
    link.add("delay", method="GET", path=".lamindb", count=5, seconds=0.05)
    with Instance.open() as instance:
        record = artifacts.find(instance, "two/big")
        evicted = []

        def meanwhile(_: int) -> None:
            if len(evicted) < 2:
                with Instance.open() as other:
                    evicted.append(caching.evict(other, [record]))

        path = artifacts.cache(instance, record, meanwhile)
        assert path.read_bytes() == data
        assert evicted[0][0] == 1


def test_a_folder_needs_no_cache(tmp_path: Path) -> None:
    quick("login", "testuser1")
    quick("init", "--storage", tmp_path / "store")
    save(tmp_path, {"d/a": b"a"})
    assert "mounts read it as it is" in quick("cache", "d")
    assert cached() == []
    assert Path(quick("cache", "d/a").strip()).read_bytes() == b"a"
    assert quick("cache", "--evict", "d/a").startswith("1 file evicted, ")


def test_killed_in_the_middle_it_goes_on_from_there(link: FaultProxy, tmp_path: Path) -> None:
    blocks = 12
    data = make_bytes(blocks * BLOCK_SIZE)
    save(tmp_path, {"big": data})
    link.add("delay", method="GET", path=".lamindb", count=None, seconds=0.2)
    for end in (signal.SIGKILL, signal.SIGINT):
        before = link_marks()
        process = subprocess.Popen(
            [sys.executable, "-m", "lamfs", "cache", "--jobs", "2", "big"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        wait_until(lambda before=before: link_marks() >= before + 2, "two blocks have come", seconds=30)  # type: ignore[misc]
        process.send_signal(end)
        _, said = process.communicate(timeout=30)
        assert process.returncode == (130 if end == signal.SIGINT else -end), said
    assert b"interrupted" in said
    marked = link_marks()
    assert 4 <= marked < blocks
    link.clear()
    link.requests.clear()
    assert Path(quick("cache", "big").strip()).read_bytes() == data
    assert sum(gets(link).values()) == blocks - marked


def link_marks() -> int:
    """Whole blocks that the index knows of."""
    with Instance.open() as instance:
        return instance.cache_index.total_bytes() // BLOCK_SIZE


def test_a_path_is_printed_as_it_is_for_programs(tmp_path: Path) -> None:
    """A key may hold anything but NUL; what reads the path opens the file by it."""
    key = "a\x1b[31m b\tc\\d.txt"
    quick("init", "--storage", str(tmp_path / "store"))
    save(tmp_path, {key: b"text"})
    assert Path(quick("cache", key).removesuffix("\n")).read_text() == "text"
