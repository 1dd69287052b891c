"""Ordinary programs in a real mount, on a local folder and on S3: what they made is what they would make on a disk."""

from __future__ import annotations

import filecmp
import hashlib
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, wait_until


def need(program: str) -> str:
    """The path of a program that scripts/setup installs; outside of CI its tests are skipped without it."""
    found = shutil.which(program)
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"the program '{program}' is not installed")
        pytest.skip(f"the program '{program}' is not installed")
    return found


def plant(folder: Path, files: int = 60, seed: int = 1) -> Path:
    """A tree with files of many sizes, directories, links, modes, owners and times."""
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(files):
        below = folder / f"dir {number % 7}" / f"é{number % 3}"
        below.mkdir(parents=True, exist_ok=True)
        path = below / f"file {number}.dat"
        path.write_bytes(rng.randbytes(rng.choice((0, 1, 100, 4096, 30_000, 200_000))))
        path.chmod(rng.choice((0o644, 0o600, 0o755, 0o444)))
        os.utime(path, ns=(rng.randrange(10**18), rng.randrange(10**18)))
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("dir 0")
    (folder / "dangling").symlink_to("nowhere")
    os.link(folder / "dir 1/é1/file 1.dat", folder / "hard")
    with open(folder / "sparse", "wb") as file:
        file.truncate(3_000_000)
        file.seek(1_000_000)
        file.write(b"island")
    os.utime(folder / "empty", ns=(1, 10**17))
    return folder


def portrait(folder: Path, *, times: bool = True) -> dict[str, Any]:
    """Everything of a tree that a copy has to keep."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        kind = stat.S_IFMT(info.st_mode)
        what: Any = None
        if stat.S_ISREG(kind):
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(kind):
            what = os.readlink(path)
        links = info.st_nlink if not stat.S_ISDIR(kind) else 0
        mtime = info.st_mtime_ns if times else 0
        found[str(path.relative_to(folder))] = (oct(info.st_mode), info.st_uid, info.st_gid, links, mtime, what)
    return found


def test_cp_a_in_and_out(each_mount: MountedInstance, each_dir: Path, tmp_path: Path) -> None:
    original = portrait(plant(tmp_path / "in"))
    each_mount.run(["cp", "-a", tmp_path / "in", each_dir / "x"])
    assert portrait(each_dir / "x") == original
    each_mount.run(["cp", "-a", each_dir / "x", each_dir / "y"])
    each_mount.sync()
    assert portrait(each_dir / "y") == original
    each_mount.run(["cp", "-a", each_dir / "y", tmp_path / "out"])
    assert portrait(tmp_path / "out") == original


def test_mv_within_into_and_out_of_the_mount(each_mount: MountedInstance, each_dir: Path, tmp_path: Path) -> None:
    original = portrait(plant(tmp_path / "in", files=20))
    each_mount.run(["mv", tmp_path / "in", each_dir / "x"])
    assert not (tmp_path / "in").exists()
    (each_dir / "deep").mkdir()
    each_mount.run(["mv", each_dir / "x", each_dir / "deep/y"])
    assert portrait(each_dir / "deep/y") == original
    each_mount.run(["mv", each_dir / "deep/y", tmp_path / "out"])
    assert portrait(tmp_path / "out") == original
    assert os.listdir(each_dir / "deep") == []


def test_dd(each_mount: MountedInstance, each_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(2).randbytes(9_000_000))
    each_mount.run(["dd", f"if={source}", f"of={each_dir}/a", "bs=1M", "conv=fsync"])
    assert filecmp.cmp(source, each_dir / "a", shallow=False)
    each_mount.run(["dd", f"if={source}", f"of={each_dir}/a", "bs=1000", "count=7", "seek=3000", "conv=notrunc"])
    expected = bytearray(source.read_bytes())
    expected[3_000_000:3_007_000] = expected[:7000]
    assert (each_dir / "a").read_bytes() == expected
    each_mount.run(["dd", f"if={each_dir}/a", f"of={tmp_path}/b", "bs=4096", "iflag=direct"])
    assert (tmp_path / "b").read_bytes() == expected
    each_mount.run(["dd", "if=/dev/zero", f"of={each_dir}/z", "bs=1M", "count=4", "oflag=direct"])
    assert (each_dir / "z").read_bytes() == bytes(4 << 20)


def test_sed_in_place_keeps_the_artifact(each_mount: MountedInstance, each_dir: Path) -> None:
    key = f"{each_dir.name}/text"
    (each_dir / "text").write_text("one\ntwo\n")
    uid = each_mount.stored_info(key)["uid"]
    each_mount.run(["sed", "-i", "s/two/zwei/", each_dir / "text"])
    assert (each_dir / "text").read_text() == "one\nzwei\n"
    assert each_mount.stored_info(key)["uid"] == uid
    each_mount.run(["sed", "-i.bak", "s/one/eins/", each_dir / "text"])
    assert (each_dir / "text.bak").read_text() == "one\nzwei\n"
    assert (each_dir / "text").read_text() == "eins\nzwei\n"
    assert sorted(os.listdir(each_dir)) == ["text", "text.bak"]


def test_tar_in_out_and_compare(each_mount: MountedInstance, each_dir: Path, tmp_path: Path) -> None:
    original = portrait(plant(tmp_path / "in"))
    each_mount.run(["tar", "--format=posix", "-cf", each_dir / "a.tar", "-C", tmp_path, "in"])
    (each_dir / "x").mkdir()
    each_mount.run(["tar", "xpf", each_dir / "a.tar", "-C", each_dir / "x"])
    assert portrait(each_dir / "x/in") == original
    assert each_mount.run(["tar", "df", each_dir / "a.tar", "-C", each_dir / "x"]).stdout == ""
    each_mount.run(["tar", "--format=posix", "-czf", tmp_path / "b.tgz", "-C", each_dir / "x", "in"])
    (tmp_path / "out").mkdir()
    each_mount.run(["tar", "xpf", tmp_path / "b.tgz", "-C", tmp_path / "out"])
    assert portrait(tmp_path / "out/in") == original
    with tarfile.open(each_dir / "a.tar") as archive:
        assert len(archive.getnames()) == len(original) + 1


def test_rsync_transfers_nothing_the_second_time(each_mount: MountedInstance, each_dir: Path, tmp_path: Path) -> None:
    rsync = need("rsync")
    original = portrait(plant(tmp_path / "in"))
    # Without a window of -1 it takes times within the same second for equal.
    command = [rsync, "-aH", "--modify-window=-1", "--itemize-changes", f"{tmp_path}/in/", f"{each_dir}/x/"]
    assert each_mount.run(command).stdout.count(">f") >= 60
    assert portrait(each_dir / "x") == original
    assert each_mount.run(command).stdout == ""
    each_mount.sync()
    assert each_mount.run([*command[:3], "--checksum", *command[3:]]).stdout == ""
    # One file changes, one goes, one comes: rsync's temporary files end as replacements of the same artifact.
    key = f"{each_dir.name}/x/dir 3/é0/file 3.dat"
    before = each_mount.info(key)
    (tmp_path / "in/dir 3/é0/file 3.dat").chmod(0o644)
    (tmp_path / "in/dir 3/é0/file 3.dat").write_bytes(b"changed")
    (tmp_path / "in/dir 4/é1/file 4.dat").unlink()
    (tmp_path / "in/new").write_bytes(b"new")
    said = each_mount.run([*command[:3], "--delete", *command[3:]]).stdout
    assert said.count(">f") == 2
    assert said.count("*deleting") == 1
    assert portrait(each_dir / "x") == portrait(tmp_path / "in")
    after = each_mount.stored_info(key)
    assert (after["uid"], after["size"]) == (before["uid"], 7)
    assert after["hash"] != before["hash"]
    (each_dir / "x/dir 5/é2/file 5.dat").write_bytes(b"to be mended in place" * 9000)
    each_mount.run([*command[:3], "--inplace", "--no-whole-file", "--checksum", *command[4:]])
    each_mount.run([rsync, "-aH", "--modify-window=-1", f"{each_dir}/x/", f"{tmp_path}/out/"])
    assert portrait(tmp_path / "out") == portrait(tmp_path / "in")


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_sqlite(each_mount: MountedInstance, each_dir: Path, mode: str) -> None:
    path = each_dir / "base.db"
    database = sqlite3.connect(path, isolation_level=None)
    assert database.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode.lower(),)
    database.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, text TEXT)")
    for _ in range(5):
        database.execute("BEGIN IMMEDIATE")
        database.executemany("INSERT INTO t(text) VALUES(?)", [(f"row {number}",) for number in range(500)])
        database.execute("COMMIT")
    other = sqlite3.connect(path, isolation_level=None)
    assert other.execute("SELECT count(*) FROM t").fetchone() == (2500,)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        database.execute("PRAGMA busy_timeout=0").execute("BEGIN IMMEDIATE")
    other.execute("DELETE FROM t WHERE id % 2")
    other.execute("ROLLBACK")
    other.close()
    database.execute("UPDATE t SET text = upper(text)")
    database.execute("VACUUM")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    each_mount.sync()
    reopened = sqlite3.connect(path)
    assert reopened.execute("SELECT count(*), max(text) FROM t").fetchone() == (2500, "ROW 99")
    assert reopened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    reopened.close()
    assert os.listdir(each_dir) == ["base.db"]


PANDAS = """
import sys, pandas
count = 100_000
names = [f"row {i % 100}" for i in range(count)]
frame = pandas.DataFrame({"n": range(count), "x": [i / 7 for i in range(count)], "s": names})
frame.to_parquet(sys.argv[1] + "/frame.parquet")
frame.to_csv(sys.argv[1] + "/frame.csv.gz", index=False)
assert pandas.read_parquet(sys.argv[1] + "/frame.parquet").equals(frame)
assert pandas.read_parquet(sys.argv[1] + "/frame.parquet", columns=["n"], filters=[("n", ">", 99_990)]).shape == (9, 1)
assert pandas.read_csv(sys.argv[1] + "/frame.csv.gz").equals(frame)
frame[:-1].to_parquet(sys.argv[1] + "/frame.parquet", partition_cols=None)
import pyarrow.dataset, pyarrow.parquet
assert pyarrow.parquet.read_metadata(sys.argv[1] + "/frame.parquet").num_rows == 99_999
table = pyarrow.parquet.read_table(sys.argv[1] + "/frame.parquet", memory_map=True)
pyarrow.dataset.write_dataset(table, sys.argv[1] + "/parts", format="parquet", partitioning=["s"], max_partitions=200)
assert pyarrow.dataset.dataset(sys.argv[1] + "/parts", partitioning=["s"]).count_rows() == 99_999
"""


def test_pandas_and_pyarrow(each_mount: MountedInstance, each_dir: Path) -> None:
    each_mount.python(PANDAS, str(each_dir), timeout=100)
    record = each_mount.stored_info(f"{each_dir.name}/frame.parquet")
    assert record["suffix"] == ".parquet"
    assert each_mount.info(f"{each_dir.name}/frame.csv.gz")["suffix"] == ".csv.gz"
    assert len(os.listdir(each_dir / "parts")) == 100


def test_vim_saves_in_all_its_ways(each_mount: MountedInstance, each_dir: Path) -> None:
    vim = need("vim")
    key = f"{each_dir.name}/notes.txt"
    path = each_dir / "notes.txt"
    path.write_text("first\n")
    path.chmod(0o640)
    uid = each_mount.stored_info(key)["uid"]
    text = "first\n"
    for settings in (
        "backupcopy=no",
        "backupcopy=yes",
        "backupcopy=auto",
        "nobackup nowritebackup",
        "backup patchmode=.orig",
    ):
        word = settings.split()[0].replace("=", "-")
        command = [vim, "-es", "-u", "NONE", "-i", "NONE", "-c", f"set {settings} backupskip= noswapfile"]
        each_mount.run([*command, "-c", f"$put ='{word}'", "-c", "wq", path])
        text += f"{word}\n"
        assert path.read_text() == text
        record = each_mount.stored_info(key)
        assert (record["uid"], record["size"]) == (uid, len(text)), settings
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    # With a swap file beside it, as by default.
    each_mount.run(
        [vim, "-es", "-u", "NONE", "-i", "NONE", "-c", "set swapfile dir=.", "-c", "$put ='end'", "-c", "wq", path],
        cwd=each_dir,
    )
    assert path.read_text() == text + "end\n"
    assert sorted(os.listdir(each_dir)) == ["notes.txt", "notes.txt.orig"]


def test_sort_find_and_other_small_tools(each_mount: MountedInstance, each_dir: Path) -> None:
    rng = random.Random(4)
    lines = [f"{rng.random():.9f}" for _ in range(20_000)]
    path = each_dir / "numbers"
    path.write_text("".join(f"{line}\n" for line in lines))
    each_mount.run(["sort", "-o", path, path])
    assert path.read_text().split() == sorted(lines)
    each_mount.run(
        ["sort", "-r", "--buffer-size=100K", "--temporary-directory=.", "-o", "down", "numbers"], cwd=each_dir
    )
    assert (each_dir / "down").read_text().split() == sorted(lines, reverse=True)
    each_mount.run(["split", "-l", "5000", "numbers", "part."], cwd=each_dir)
    each_mount.run(
        ["sh", "-c", "cat part.* | cmp - numbers && cat part.* > whole && rm part.* && gzip -k whole"], cwd=each_dir
    )
    each_mount.run(
        ["sh", "-c", "gunzip -c whole.gz | cmp - numbers && echo more >> whole && tail -n 1 whole | tee -a log"],
        cwd=each_dir,
    )
    assert (each_dir / "log").read_text() == "more\n"
    found = each_mount.run(["find", ".", "-type", "f", "-newer", "numbers", "-size", "-2k"], cwd=each_dir).stdout
    assert found == "./log\n"
    each_mount.run(["truncate", "-s", "100", "whole"], cwd=each_dir)
    each_mount.run(["shred", "-n", "1", "-u", "log"], cwd=each_dir)
    each_mount.run(["install", "-m", "0711", "numbers", "installed"], cwd=each_dir)
    assert stat.S_IMODE((each_dir / "installed").stat().st_mode) == 0o711
    each_mount.run(["find", ".", "-name", "*.gz", "-delete"], cwd=each_dir)
    assert sorted(os.listdir(each_dir)) == ["down", "installed", "numbers", "whole"]


def test_zip(each_mount: MountedInstance, each_dir: Path, tmp_path: Path) -> None:
    plant(tmp_path / "in", files=20)
    (tmp_path / "in/dangling").unlink()
    with zipfile.ZipFile(each_dir / "a.zip", "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for path in sorted((tmp_path / "in").rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    with zipfile.ZipFile(each_dir / "a.zip", "a") as archive:
        archive.writestr("added", "later")
    with zipfile.ZipFile(each_dir / "a.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(each_dir / "out")
    for path in (tmp_path / "in").rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert (each_dir / "out/in" / path.relative_to(tmp_path / "in")).read_bytes() == path.read_bytes()
    assert (each_dir / "out/added").read_text() == "later"


# -- saving, as programs do it ----------------------------------------------------------------------------------------


def save_by_rename(path: Path, data: bytes) -> None:
    """Write a temporary file beside it, make it durable, rename it over (most editors and libraries)."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def save_by_quick_rename(path: Path, data: bytes) -> None:
    """The same without waiting for anything."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_with_renamed_backup(path: Path, data: bytes) -> None:
    """Move the old file aside, write anew, remove the old one (vim). The name is free for a moment."""
    backup = path.with_name(f"{path.name}~")
    os.rename(path, backup)
    path.write_bytes(data)
    os.unlink(backup)


def save_with_linked_backup(path: Path, data: bytes) -> None:
    """Keep the old file by a second name until the new one is there."""
    backup = path.with_name(f"{path.name}~")
    os.link(path, backup)
    save_by_quick_rename(path, data)
    os.unlink(backup)


def save_in_place(path: Path, data: bytes) -> None:
    """Open with O_TRUNC and write."""
    path.write_bytes(data)


def save_over_without_truncating(path: Path, data: bytes) -> None:
    """Write over the old bytes, then cut."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


def save_by_rename_of_an_open_file(path: Path, data: bytes) -> None:
    """Rename first, write on, close last."""
    temporary = path.with_name(f"{path.name}.part")
    with open(temporary, "wb", buffering=0) as file:
        file.write(data[:5])
        os.rename(temporary, path)
        file.write(data[5:])


SAVES = (
    save_by_rename,
    save_by_quick_rename,
    save_with_renamed_backup,
    save_with_linked_backup,
    save_in_place,
    save_over_without_truncating,
    save_by_rename_of_an_open_file,
)
DESCRIBE = """
import sys
from lamfs.ops import artifacts
from lamfs.ops.instance import Instance
with Instance.open() as instance:
    print(artifacts.save(instance, sys.argv[1], key=sys.argv[2], description=sys.argv[3]).uid)
"""


@pytest.mark.parametrize("save", SAVES)
def test_a_save_replaces_the_content_of_the_artifact(
    each_mount: MountedInstance, each_dir: Path, tmp_path: Path, save: Any
) -> None:
    """Same uid, description and author; another hash; equal content changes nothing."""
    key = f"{each_dir.name}/table.csv"
    path = each_dir / "table.csv"
    (tmp_path / "table.csv").write_bytes(b"first,content\n")
    each_mount.python(DESCRIBE, str(tmp_path / "table.csv"), key, "described by hand")
    wait_until(path.exists, "what was saved shows", seconds=2)
    before = each_mount.info(key)
    assert before["description"] == "described by hand"
    save(path, b"second,content\n")
    assert path.read_bytes() == b"second,content\n"
    after = each_mount.stored_info(key)
    assert after["hash"] != before["hash"]
    assert after["updated_at"] > before["updated_at"]
    for field in ("uid", "description", "created_at", "created_by", "key"):
        assert after[field] == before[field], field
    assert after["size"] == 15
    assert path.read_bytes() == b"second,content\n"
    # The same bytes once more: nothing happens to the artifact.
    save(path, b"second,content\n")
    again = each_mount.stored_info(key)
    assert again == after
    assert path.read_bytes() == b"second,content\n"
    assert os.listdir(each_dir) == ["table.csv"]


def test_a_file_moved_aside_for_good_keeps_its_uid(each_mount: MountedInstance, each_dir: Path) -> None:
    """``mv`` changes the key; a new file of the old name is a new artifact, and what is removed goes to the trash."""
    (each_dir / "a").write_bytes(b"old")
    uid = each_mount.stored_info(f"{each_dir.name}/a")["uid"]
    os.rename(each_dir / "a", each_dir / "kept a")
    (each_dir / "a").write_bytes(b"new")
    assert each_mount.stored_info(f"{each_dir.name}/kept a")["uid"] == uid
    assert each_mount.info(f"{each_dir.name}/a")["uid"] != uid
    os.rename(each_dir / "kept a", each_dir / "other")
    os.unlink(each_dir / "other")
    each_mount.sync()
    with each_mount.registry() as registry:
        trashed = registry.artifacts.by_uid(uid)
        assert trashed is not None
        assert trashed.visibility == -1


def test_a_copy_is_a_second_artifact(each_mount: MountedInstance, each_dir: Path) -> None:
    """docs/SEMANTICS.md, "Copies"."""
    data = random.Random(5).randbytes(300_000)
    (each_dir / "one.bin").write_bytes(data)
    each_mount.sync()
    each_mount.run(["cp", "one.bin", "two.bin"], cwd=each_dir)
    one, two = (each_mount.stored_info(f"{each_dir.name}/{name}.bin") for name in ("one", "two"))
    assert one["uid"] != two["uid"]
    assert one["storage_path"] != two["storage_path"]
    assert one["hash"] == two["hash"]
    (each_dir / "one.bin").write_bytes(b"other")
    each_mount.sync()
    assert (each_dir / "two.bin").read_bytes() == data
    (each_dir / "one.bin").unlink()
    each_mount.sync()
    assert (each_dir / "two.bin").read_bytes() == data


def test_everything_is_there_after_a_remount_with_an_empty_cache(mount: MountedInstance, tmp_path: Path) -> None:
    original = portrait(plant(tmp_path / "in"))
    mount.run(["cp", "-a", tmp_path / "in", "x"])
    mount.remount(empty_cache=True)
    assert portrait(mount.path / "x") == original
    mount.remount(empty_cache=False)
    assert portrait(mount.path / "x") == original
    mount.umount()
    assert mount.fsck() == []
    assert mount.spooled() == []


def test_nothing_a_shell_can_do_is_left_running(each_mount: MountedInstance, each_dir: Path) -> None:
    """Eight shells at once on the same few files: nothing fails that would not on a disk, and the daemon lives."""
    script = (
        "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo $1 $i >> log; echo $1 > f$((i%4));"
        " cat f$((i%4)) >/dev/null 2>&1;"
        " cp f$((i%4)) c$1 2>/dev/null; mv c$1 f$(((i+1)%4)) 2>/dev/null; ls -l >/dev/null 2>&1; done; true"
    )
    shells = [
        subprocess.Popen(["sh", "-c", script, "sh", str(number)], cwd=each_dir, stderr=subprocess.PIPE)
        for number in range(8)
    ]
    for shell in shells:
        assert shell.communicate(timeout=90)[1] == b""
        assert shell.returncode == 0
    lines = (each_dir / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{number} {i}" for number in range(8) for i in range(1, 41))
    for number in range(4):
        assert (each_dir / f"f{number}").read_text().strip() in list("01234567")
    each_mount.sync()
