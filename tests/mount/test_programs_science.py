"""Programs of data scientists in a real mount, on a local folder and on S3: how they write and lock their files."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lamfs.model import TRASH
from tests.mount.test_programs_tools import need
from tests.support.mounts import MountedInstance

NUMPY = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy
assert numpy.__file__.startswith(sys.argv[1] + "/"), numpy.__file__
matrix = numpy.random.default_rng(1).random((300, 300))
assert numpy.allclose(matrix @ numpy.linalg.inv(matrix), numpy.eye(300))
numpy.save(sys.argv[1] + "/matrix.npy", matrix)
mapped = numpy.load(sys.argv[1] + "/matrix.npy", mmap_mode="r+")
mapped[7] = 7
mapped.flush()
del mapped
assert numpy.load(sys.argv[1] + "/matrix.npy")[7].sum() == 2100
"""


def test_numpy_installed_by_pip(each_mount: MountedInstance, each_dir: Path) -> None:
    """A thousand files from pip, shared libraries that are mapped and run; the same from storage afterwards."""
    # The version that runs the tests: pip has it, or gets it as scripts/setup did.
    package = f"numpy=={version('numpy')}"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    each_mount.run([*pip, "--no-compile", "--target", "site", package], cwd=each_dir, timeout=100)
    # -I -S: nothing of the test's own environment is found.
    run = [sys.executable, "-I", "-S", "-c", NUMPY, str(each_dir / "site")]
    each_mount.run(run)
    assert list((each_dir / "site/numpy/__pycache__").glob("__init__.*.pyc"))
    each_mount.remount(empty_cache=True)
    each_mount.run(run)
    each_mount.run(["rm", "-rf", each_dir / "site"])
    each_mount.sync()
    assert each_mount.fsck() == []


DUCKDB = """
import os, sys, duckdb
folder = sys.argv[1]
# On a busy machine it would draw a progress bar on stdout.
base = duckdb.connect(f"{folder}/base.duckdb", config={"threads": 2})
base.execute("SET enable_progress_bar=false")
base.execute("CREATE TABLE t AS SELECT i, i % 97 AS k, 'text ' || (i % 1000) AS s FROM range(300_000) r(i)")
base.execute("CHECKPOINT")
base.execute("UPDATE t SET s = upper(s) WHERE k = 5")
base.execute("DELETE FROM t WHERE k = 6")
base.execute("CREATE INDEX by_i ON t(i)")
base.execute(f"COPY (SELECT * FROM t ORDER BY s, i DESC) TO '{folder}/sorted.parquet' (FORMAT parquet)")
base.execute(f"COPY t TO '{folder}/parts' (FORMAT parquet, PARTITION_BY (k))")
base.execute(f"COPY t TO '{folder}/t.csv.gz' (HEADER, COMPRESSION gzip)")
base.execute(f"EXPORT DATABASE '{folder}/export'")
# What does not fit in memory goes to files in the mount.
little = {"threads": 1, "memory_limit": "40MB", "temp_directory": f"{folder}/spill"}
with duckdb.connect(config=little) as large:
    large.execute("SET enable_progress_bar=false")
    large.execute("CREATE TABLE t AS SELECT i, 'text ' || i AS s FROM range(3_000_000) r(i)")
    assert sum(os.path.getsize(f"{folder}/spill/{name}") for name in os.listdir(f"{folder}/spill")) > 5_000_000
    found = large.execute("SELECT count(*), sum(i), max(s) FROM t").fetchone()
    assert found == (3_000_000, 3_000_000 * 2_999_999 // 2, "text 999999"), found
base.execute("BEGIN; INSERT INTO t SELECT 1_000_000 + i, 5, 'late' FROM range(1000) r(i); COMMIT")
assert os.path.getsize(f"{folder}/base.duckdb.wal") > 0
print("committed", flush=True)
sys.stdin.read()
"""
DUCKDB_AGAIN = """
import sys, duckdb
folder = sys.argv[1]
base = duckdb.connect(f"{folder}/base.duckdb")
facts = "SELECT count(*), sum(i), count(DISTINCT s), count(*) FILTER (s = 'late') FROM "
rows, total, texts, late = base.execute(facts + "t").fetchone()
assert late == 1000
sources = (f"'{folder}/sorted.parquet'", f"'{folder}/parts/**/*.parquet'", f"'{folder}/t.csv.gz'")
for source in sources:
    found = base.execute(facts + source).fetchone()
    assert found == (rows - 1000, total - sum(range(1_000_000, 1_001_000)), texts - 1, 0), (source, found)
other = duckdb.connect(":memory:")
other.execute(f"IMPORT DATABASE '{folder}/export'")
assert other.execute("SELECT count(*) FROM t").fetchone() == (rows - 1000,)
assert base.execute("SELECT s FROM t WHERE i = 1_000_500").fetchall() == [("late",)]
"""
DUCKDB_SECOND = "import sys, duckdb; duckdb.connect(sys.argv[1] + '/base.duckdb')"


def test_duckdb(each_mount: MountedInstance, each_dir: Path) -> None:
    """A killed process's transactions are in the log; two processes cannot have it open; files of other formats."""
    first = subprocess.Popen(
        [sys.executable, "-c", DUCKDB, each_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "committed\n"
        refused = each_mount.run([sys.executable, "-c", DUCKDB_SECOND, each_dir], check=False)
        assert "lock" in refused.stderr
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=30)
    key = f"{each_dir.name}/base.duckdb"
    uid = each_mount.stored_info(key)["uid"]
    each_mount.run([sys.executable, "-c", DUCKDB_AGAIN, each_dir])
    assert set(os.listdir(each_dir)) == {"base.duckdb", "sorted.parquet", "parts", "t.csv.gz", "export"}
    assert each_mount.stored_info(key)["uid"] == uid
    each_mount.remount(empty_cache=True)
    each_mount.run([sys.executable, "-c", DUCKDB_AGAIN, each_dir])
    assert each_mount.fsck() == []


HDF5 = """
import os, subprocess, sys, h5py, numpy
folder, file = sys.argv[1], sys.argv[1] + "/x.h5"
data = numpy.random.default_rng(2).integers(0, 1000, (1000, 300))
with h5py.File(file, "w") as base:
    base.create_dataset("raw", data=data)
    chunked = base.create_dataset("a/b", shape=(0, 300), maxshape=(None, 300), chunks=(64, 64), compression="gzip")
    for start in range(0, 1000, 100):
        chunked.resize(start + 100, axis=0)
        chunked[start : start + 100] = data[start : start + 100]
    base.attrs["unit"] = "größe"
    # As by default, the writer holds a lock on the file; HDF5 uses flock.
    opened = "import sys, h5py; h5py.File(sys.argv[1], sys.argv[2])"
    for mode in ("r", "r+"):
        refused = subprocess.run([sys.executable, "-c", opened, file, mode], capture_output=True, text=True)
        assert "BlockingIOError" in refused.stderr and "unable to lock file" in refused.stderr, refused
with h5py.File(file, "r") as one, h5py.File(file, "r") as two:
    subprocess.run([sys.executable, "-c", opened, file, "r"], check=True)
    assert (one["raw"][:] == two["a/b"][:]).all()
with h5py.File(file, "r+") as base:
    base["a/b"][500] = -1
    del base["raw"]
    base["copy"] = base["a/b"][:10]
with h5py.File(file, "r") as base:
    assert list(base) == ["a", "copy"] and base["a/b"][500].tolist() == [-1] * 300
    assert base.attrs["unit"] == "größe" and (base["a/b"][501:] == data[501:]).all()

# One process writes while another reads.
reader = '''
import sys, h5py
with h5py.File(sys.argv[1], "r", libver="latest", swmr=True) as base:
    values = base["values"]
    for line in sys.stdin:
        values.refresh()
        assert values[:].tolist() == list(range(int(line))), values[:]
        print("seen", flush=True)
'''
with h5py.File(folder + "/swmr.h5", "w", libver="latest") as base:
    values = base.create_dataset("values", shape=(0,), maxshape=(None,), dtype="i8", chunks=(16,))
    base.swmr_mode = True
    command = [sys.executable, "-c", reader, folder + "/swmr.h5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for count in range(20, 201, 20):
            values.resize(count, axis=0)
            values[count - 20 :] = range(count - 20, count)
            values.flush()
            process.stdin.write(f"{count}\\n")
            process.stdin.flush()
            assert process.stdout.readline() == "seen\\n"
        process.stdin.close()
    assert process.returncode == 0
"""
HDF5_AGAIN = """
import sys, h5py
with h5py.File(sys.argv[1] + "/x.h5", "r") as base, h5py.File(sys.argv[1] + "/swmr.h5", "r") as other:
    assert base["a/b"].shape == (1000, 300) and base["a/b"][500, 7] == -1
    assert other["values"][:].tolist() == list(range(200))
"""


def test_hdf5(each_mount: MountedInstance, each_dir: Path) -> None:
    """h5py with locking as it is by default, and with a reader beside the writer."""
    each_mount.run([sys.executable, "-c", HDF5, each_dir])
    each_mount.remount(empty_cache=True)
    each_mount.run([sys.executable, "-c", HDF5_AGAIN, each_dir])
    assert sorted(os.listdir(each_dir)) == ["swmr.h5", "x.h5"]


ZARR = """
import sys, numpy, zarr
folder = sys.argv[1]
data = numpy.random.default_rng(3).random((200, 120))
if sys.argv[2] == "write":
    root = zarr.create_group(folder + "/x.zarr", attributes={"unit": "m"})
    array = root.create_array("a/b", shape=data.shape, chunks=(20, 20), dtype=data.dtype)
    array[:] = 1
    array[:] = data  # Each chunk is replaced.
    array.resize((220, 120))
    array[200:] = 7
    array.attrs["changed"] = True
    root.create_array("gone", data=data, chunks=(50, 50))
    del root["gone"]
    root.create_array("sharded", data=data, chunks=(10, 10), shards=(100, 60))
    zarr.consolidate_metadata(root.store)
    old = zarr.create_array(folder + "/old.zarr", data=data, chunks=(50, 50), zarr_format=2)
    with zarr.storage.ZipStore(folder + "/x.zip", mode="w") as store:
        zarr.create_array(store, data=data, chunks=(50, 50))
root = zarr.open_group(folder + "/x.zarr", mode="r")
assert sorted(root.array_keys()) == ["sharded"] and dict(root.attrs) == {"unit": "m"}
assert (root["a/b"][:200] == data).all() and (root["a/b"][200:] == 7).all() and root["a/b"].attrs["changed"]
assert (root["sharded"][:] == data).all()
assert (zarr.open_array(folder + "/old.zarr", mode="r")[:] == data).all()
with zarr.storage.ZipStore(folder + "/x.zip", mode="r") as store:
    assert (zarr.open_array(store, mode="r")[:] == data).all()
"""
ZARR_CHANGE = """
import sys, numpy, zarr
array = zarr.open_array(sys.argv[1] + "/x.zarr/a/b", mode="r+")
array[0, 0] = array[0, 0]
array.attrs["other"] = 1
array[20:40, 20:40] = array[20:40, 20:40] + 0
"""


def test_zarr(each_mount: MountedInstance, each_dir: Path) -> None:
    """Many small files at once, each written beside and renamed: one artifact per chunk, and no other."""
    each_mount.run([sys.executable, "-c", ZARR, each_dir, "write"])
    names = {str(path.relative_to(each_mount.path)) for path in each_dir.rglob("*") if path.is_file()}
    assert len(names) > 66
    each_mount.sync()

    def artifacts() -> dict[str, str]:
        with each_mount.registry() as registry:
            return {
                record.key: record.uid
                for record in registry.artifacts.filter(visibility=None)
                if record.key is not None
                and record.key.startswith(f"{each_dir.name}/")
                and "/gone/" not in record.key
                # Removed because the name was there already: on a busy machine it may have been stored before.
                and not (record.key.endswith(".partial") and record.visibility == TRASH)
            }

    before = artifacts()
    assert set(before) == names
    each_mount.run([sys.executable, "-c", ZARR_CHANGE, each_dir])
    each_mount.sync()
    assert artifacts() == before
    each_mount.remount(empty_cache=True)
    each_mount.run([sys.executable, "-c", ZARR, each_dir, "read"])
    assert each_mount.fsck() == []


def test_samtools(each_mount: MountedInstance, each_dir: Path) -> None:
    """Sort with temporary files beside the output, index, and read at random; once more over its own input."""
    samtools = need("samtools")
    rng = random.Random(7)
    lengths = {"chr1": 200_000, "chr2": 90_000}
    genome = {name: "".join(rng.choices("ACGT", k=length)) for name, length in lengths.items()}
    (each_dir / "genome.fa").write_text("".join(f">{name}\n{text}\n" for name, text in genome.items()))
    lines = ["@HD\tVN:1.6\tSO:unsorted", *(f"@SQ\tSN:{name}\tLN:{length}" for name, length in lengths.items())]
    starts: dict[str, list[int]] = {name: [] for name in lengths}
    for number in range(30_000):
        name = rng.choice(("chr1", "chr2"))
        start = rng.randrange(1, lengths[name] - 100)
        starts[name].append(start)
        bases = genome[name][start - 1 : start + 79]
        lines.append(f"read{number}\t0\t{name}\t{start}\t60\t80M\t*\t0\t0\t{bases}\t{'I' * 80}")
    (each_dir / "x.sam").write_text("\n".join(lines) + "\n")

    def run(*words: str) -> str:
        return each_mount.run([samtools, *words], cwd=each_dir).stdout

    def check() -> None:
        run("quickcheck", "x.bam")
        assert [line.split("\t")[:3] for line in run("idxstats", "x.bam").splitlines()[:2]] == [
            [name, str(length), str(len(starts[name]))] for name, length in lengths.items()
        ]
        wanted = sorted(start for start in starts["chr2"] if 40_000 - 79 <= start <= 41_000)
        assert [int(line.split("\t")[3]) for line in run("view", "x.bam", "chr2:40000-41000").splitlines()] == wanted

    # So little memory that it needs temporary files.
    run("sort", "-m", "1M", "-@", "2", "-T", "temporary", "-o", "x.bam", "x.sam")
    run("index", "x.bam")
    check()
    uid = each_mount.stored_info(f"{each_dir.name}/x.bam")["uid"]
    run("sort", "-n", "-o", "x.bam", "x.bam")
    run("sort", "-o", "x.bam", "x.bam")
    run("index", "x.bam")
    run("faidx", "genome.fa")
    assert run("faidx", "genome.fa", "chr2:11-20").split()[1] == genome["chr2"][10:20]
    run("view", "-C", "-T", "genome.fa", "-o", "x.cram", "x.bam")
    run("index", "x.cram")
    assert run("view", "-c", "x.cram", "chr1").strip() == str(len(starts["chr1"]))
    names = ["genome.fa", "genome.fa.fai", "x.bam", "x.bam.bai", "x.cram", "x.cram.crai", "x.sam"]
    assert sorted(os.listdir(each_dir)) == names
    assert each_mount.stored_info(f"{each_dir.name}/x.bam")["uid"] == uid
    each_mount.remount(empty_cache=True)
    check()
    assert each_mount.fsck() == []


WRITER = """
import sqlite3, sys
base = sqlite3.connect(sys.argv[1], timeout=50, isolation_level=None)
base.execute("PRAGMA synchronous=" + sys.argv[3])
for number in range(30):
    base.execute("BEGIN IMMEDIATE")
    before = base.execute("SELECT count(*) FROM t").fetchone()[0]
    base.executemany("INSERT INTO t VALUES(?, ?)", [(sys.argv[2], number)] * 10)
    assert base.execute("SELECT count(*) FROM t").fetchone()[0] == before + 10
    base.execute("COMMIT")
"""
KILLED = """
import os, signal, sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
base.execute("PRAGMA cache_size=5")
base.execute("BEGIN IMMEDIATE")
base.execute("UPDATE t SET name = name || hex(randomblob(2000))")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_sqlite_of_several_processes(each_mount: MountedInstance, each_dir: Path, mode: str) -> None:
    """They wait for each other, and what one leaves that is killed in a transaction is rolled back by the next."""
    program, path = need("sqlite3"), each_dir / "base.db"
    each_mount.run([program, path, f"PRAGMA journal_mode={mode}; CREATE TABLE t(name TEXT, number INTEGER);"])
    levels = ("OFF", "OFF", "NORMAL", "OFF")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, str(number), level])
        for number, level in enumerate(levels)
    ]
    try:
        assert [writer.wait(60) for writer in writers] == [0] * 4
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    killed = each_mount.run([sys.executable, "-c", KILLED, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    rest = {"DELETE": {"base.db-journal"}, "WAL": {"base.db-wal", "base.db-shm"}}[mode]
    assert set(os.listdir(each_dir)) == {"base.db"} | rest
    counted = "SELECT count(*), count(DISTINCT name), max(length(name)) FROM t"
    said = each_mount.run([program, path, f"PRAGMA integrity_check; {counted};"]).stdout
    assert said.split() == ["ok", "1200|4|1"]
    each_mount.run([program, path, ".backup copy.db"], cwd=each_dir)
    each_mount.sync()
    each_mount.remount(empty_cache=True)
    for name in ("base.db", "copy.db"):
        with sqlite3.connect(each_dir / name) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert database.execute(counted).fetchone() == (1200, 4, 1)
        database.close()
