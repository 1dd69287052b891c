"""A mount and a notebook on the same instance at the same time: what one does, the other sees within a second.

The notebook is a Python process of its own that is told line by line what to do.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, outcome, wait_until

SHOWS = 10.0
"""Seconds after which a change made on one side counts as not shown on the other. It takes a fraction of a second, but
how long is nothing that a test should fail for on a busy machine."""

_LOOP = """
import json, sys, traceback
import lamfs as ln
names = {"ln": ln}
for line in sys.stdin:
    try:
        exec(json.loads(line), names)
        reply = {"value": names.pop("value", None)}
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    print("reply " + json.dumps(reply, default=str), flush=True)
"""


class Notebook:
    """A Python process with ``import lamfs as ln``."""

    def __init__(self, mount: MountedInstance) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=mount.env,
            cwd=mount.base,
        )

    def do(self, code: str, *, timeout: float = 30.0) -> Any:
        """Execute code there; what it left in ``value``. Fails with its traceback."""
        reply = self.attempt(code, timeout=timeout)
        assert "error" not in reply, reply["trace"]
        return reply["value"]

    def attempt(self, code: str, *, timeout: float = 30.0) -> dict[str, Any]:
        """Execute code there; its value or error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(code).encode() + b"\n")
        self._process.stdin.flush()
        while select.select([self._process.stdout], [], [], timeout)[0]:
            line = self._process.stdout.readline()
            if not line:
                break
            if line.startswith(b"reply "):
                reply: dict[str, Any] = json.loads(line[6:])
                return reply
        raise AssertionError(f"the notebook gave no answer to {code!r}")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def notebook_of(each_module_mount: MountedInstance) -> Iterator[Notebook]:
    notebook = Notebook(each_module_mount)
    yield notebook
    notebook.close()


@pytest.fixture
def notebook(each_mount: MountedInstance, notebook_of: Notebook, tmp_path: Path) -> Notebook:
    notebook_of.do(f"import os; os.chdir({str(tmp_path)!r})")
    return notebook_of


def shows(condition: Callable[[], Any], what: str) -> None:
    wait_until(lambda: outcome(condition) is True, what, seconds=SHOWS, every=0.005)


def save(notebook: Notebook, folder: Path, key: str, content: bytes, description: str = "from the notebook") -> str:
    """``ln.Artifact(...).save()``; its uid."""
    source = folder / f"source{Path(key).suffix}"
    source.write_bytes(content)
    value = notebook.do(f"value = ln.Artifact({str(source)!r}, key={key!r}, description={description!r}).save().uid")
    return str(value)


def replace(notebook: Notebook, folder: Path, uid: str, content: bytes, suffix: str) -> None:
    """``artifact.replace(...); artifact.save()``."""
    source = folder / f"replacement{suffix}"
    source.write_bytes(content)
    notebook.do(f"artifact = ln.Artifact.get({uid!r}); artifact.replace({str(source)!r}); artifact.save()")


# -- the notebook acts, the mount shows -------------------------------------------------------------------------------


def test_a_save_shows_in_the_mount(
    notebook: Notebook, each_dir: Path, tmp_path: Path, each_mount: MountedInstance
) -> None:
    path = each_dir / "new/deep/data.csv"
    # The kernel remembers that there is nothing: that has to go.
    assert not path.exists()
    assert not (each_dir / "new").exists()
    assert os.listdir(each_dir) == []
    uid = save(notebook, tmp_path, f"{each_dir.name}/new/deep/data.csv", b"1,2\n")
    shows(lambda: path.read_bytes() == b"1,2\n", "the new artifact")
    shows(lambda: os.listdir(each_dir) == ["new"], "the new directory in a listing")
    assert path.stat().st_size == 4
    record = each_mount.info(f"{each_dir.name}/new/deep/data.csv")
    assert (record["uid"], record["description"]) == (uid, "from the notebook")


def test_a_replacement_shows_in_the_mount(notebook: Notebook, each_dir: Path, tmp_path: Path) -> None:
    path = each_dir / "data.csv"
    uid = save(notebook, tmp_path, f"{each_dir.name}/data.csv", b"short\n")
    shows(lambda: path.read_bytes() == b"short\n", "the first content")
    for number, size in enumerate((300_000, 3, 9_000_000, 4096)):
        content = os.urandom(size)
        assert path.stat().st_size >= 0
        replace(notebook, tmp_path, uid, content, ".csv")
        shows(lambda s=size: path.stat().st_size == s, f"the size of content {number}")
        assert path.read_bytes() == content
        assert path.stat().st_size == size
        assert len(os.listdir(each_dir)) == 1


def test_who_reads_during_replacements_gets_one_whole_revision(
    notebook: Notebook, each_dir: Path, tmp_path: Path
) -> None:
    """Old or new, never a mixture; also the size fits the bytes."""
    path = each_dir / "data.bin"
    revisions = [bytes([65 + number]) * (1_000_000 + number * 137) for number in range(8)]
    uid = save(notebook, tmp_path, f"{each_dir.name}/data.bin", revisions[0])
    shows(lambda: path.stat().st_size == len(revisions[0]), "the first content")
    done = threading.Event()
    wrong: list[str] = []
    seen: set[int] = set()
    errors: list[str] = []

    def reader() -> None:
        while not done.is_set():
            try:
                with open(path, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    data = file.read()
            except OSError as error:
                errors.append(str(error))
                continue
            letter = data[:1]
            if data != letter * len(data) or not letter or len(data) != 1_000_000 + (letter[0] - 65) * 137:
                wrong.append(f"{len(data)} bytes beginning with {letter!r}")
            elif size != len(data):
                wrong.append(f"fstat said {size}, there were {len(data)}")
            else:
                seen.add(letter[0] - 65)

    threads = [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 8):
            replace(notebook, tmp_path, uid, revisions[number], ".bin")
            wait_until(lambda n=number: n in seen, f"a reader has seen revision {number}", seconds=SHOWS)
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not wrong
    assert seen >= set(range(1, 8))
    assert not errors


def test_open_handles_keep_the_old_revision(notebook: Notebook, each_dir: Path, tmp_path: Path) -> None:
    path = each_dir / "data.bin"
    old, new = os.urandom(9_000_000), os.urandom(5_000_000)
    uid = save(notebook, tmp_path, f"{each_dir.name}/data.bin", old)
    shows(lambda: path.stat().st_size == len(old), "the first content")
    with open(path, "rb") as file:
        assert file.read(10) == old[:10]
        replace(notebook, tmp_path, uid, new, ".bin")
        shows(lambda: path.stat().st_size == len(new), "the new content")
        # On S3 the bytes that nobody had read yet are gone with the object: then it is ESTALE, and never new bytes.
        rest = outcome(lambda: os.pread(file.fileno(), len(old), 8_000_000))
        if rest == "ESTALE":
            rest = b""
        assert old[8_000_000:].startswith(rest)
        after = outcome(lambda: os.pread(file.fileno(), 10, 8_000_000 + len(rest)))
        assert after == b"" if len(rest) == 1_000_000 else "ESTALE"
        assert os.pread(file.fileno(), 10, 0) == old[:10]
        assert path.read_bytes() == new
    assert path.read_bytes() == new


def test_open_handles_keep_the_old_revision_after_a_delete(notebook: Notebook, each_dir: Path, tmp_path: Path) -> None:
    path = each_dir / "data.bin"
    old = os.urandom(3_000_000)
    uid = save(notebook, tmp_path, f"{each_dir.name}/data.bin", old)
    shows(lambda: path.stat().st_size == len(old), "the content")
    with open(path, "rb") as file:
        notebook.do(f"ln.Artifact.get({uid!r}).delete()")
        shows(lambda: not path.exists(), "the removal")
        assert file.read() == old


def test_delete_and_restore_show_in_the_mount(notebook: Notebook, each_dir: Path, tmp_path: Path) -> None:
    path = each_dir / "data.csv"
    uid = save(notebook, tmp_path, f"{each_dir.name}/data.csv", b"kept\n")
    shows(path.exists, "the artifact")
    notebook.do(f"ln.Artifact.get({uid!r}).delete()")
    shows(lambda: not path.exists(), "the removal")
    shows(lambda: os.listdir(each_dir) == [], "the removal in a listing")
    notebook.do(f"ln.Artifact.get({uid!r}).restore()")
    shows(lambda: path.read_bytes() == b"kept\n", "the restored artifact")
    notebook.do(f"ln.Artifact.get({uid!r}).delete(permanent=True)")
    shows(lambda: not path.exists(), "the deletion for good")
    assert "error" in notebook.attempt(f"ln.Artifact.get({uid!r})")


def test_a_restored_file_is_not_the_deleted_one_that_is_still_open(
    notebook: Notebook, each_mount: MountedInstance, each_dir: Path, tmp_path: Path
) -> None:
    """What is written to it by its name is stored, and not left to the program that has the deleted one open."""
    path = each_dir / "data.csv"
    uid = save(notebook, tmp_path, f"{each_dir.name}/data.csv", b"kept\n")
    shows(path.exists, "the artifact")
    with open(path, "r+b", buffering=0) as old:
        os.unlink(path)
        old.write(b"mine!")
        notebook.do(f"ln.Artifact.get({uid!r}).restore()")
        shows(path.exists, "the restored artifact")
        assert path.read_bytes() == b"kept\n"
        with open(path, "r+b") as new:
            new.write(b"anew!")
        each_mount.sync()
        assert path.read_bytes() == b"anew!"
        old.seek(0)
        assert old.read() == b"mine!"
        with pytest.raises(OSError, match="Stale"):
            old.write(b"more")
    assert notebook.do(f"value = open(ln.Artifact.get({uid!r}).cache()).read()") == "anew!"


def test_a_new_suffix_shows_as_a_new_name(notebook: Notebook, each_dir: Path, tmp_path: Path) -> None:
    uid = save(notebook, tmp_path, f"{each_dir.name}/iris.csv", b"a,b\n")
    shows((each_dir / "iris.csv").exists, "the artifact")
    replace(notebook, tmp_path, uid, b"a b\n", ".data")
    shows(lambda: (each_dir / "iris.data").read_bytes() == b"a b\n", "the new name")
    shows(lambda: not (each_dir / "iris.csv").exists(), "the old name gone")
    assert os.listdir(each_dir) == ["iris.data"]


def test_a_new_key_shows_as_a_new_name(
    notebook: Notebook, each_dir: Path, tmp_path: Path, each_mount: MountedInstance
) -> None:
    uid = save(notebook, tmp_path, f"{each_dir.name}/iris.csv", b"a,b\n")
    old, new = each_dir / "iris.csv", each_dir / "new/deep/iris.csv"
    shows(lambda: old.read_bytes() == b"a,b\n", "the artifact")
    inode = old.stat().st_ino
    assert not new.exists()
    rename = "artifact = ln.Artifact.get({uid!r}); artifact.key = {key!r}; artifact.save()"
    with old.open("rb") as file:
        notebook.do(rename.format(uid=uid, key=f"{each_dir.name}/new/deep/iris.csv"))
        shows(lambda: new.read_bytes() == b"a,b\n", "the new name")
        shows(lambda: not old.exists(), "the old name gone")
        assert file.read() == b"a,b\n"
    assert new.stat().st_ino == inode
    assert os.listdir(each_dir) == ["new"]
    assert each_mount.info(f"{each_dir.name}/new/deep/iris.csv")["uid"] == uid
    # What the mount is writing goes to the artifact under its new name.
    with new.open("ab") as file:
        file.write(b"1,2\n")
        notebook.do(rename.format(uid=uid, key=f"{each_dir.name}/again.csv"))
        shows((each_dir / "again.csv").exists, "the third name")
    each_mount.sync()
    assert (each_dir / "again.csv").read_bytes() == b"a,b\n1,2\n"
    assert notebook.do(f"value = ln.Artifact.get({uid!r}); value = (value.key, value.size)") == [
        f"{each_dir.name}/again.csv",
        8,
    ]


def test_a_save_over_a_file_that_the_mount_has_written(
    notebook: Notebook, each_dir: Path, tmp_path: Path, each_mount: MountedInstance
) -> None:
    path = each_dir / "shared.csv"
    path.write_bytes(b"from the mount\n")
    uid = each_mount.stored_info(f"{each_dir.name}/shared.csv")["uid"]
    replace(notebook, tmp_path, uid, b"from the notebook\n", ".csv")
    shows(lambda: path.read_bytes() == b"from the notebook\n", "the notebook's content")
    path.write_bytes(b"from the mount again\n")
    each_mount.sync()
    assert notebook.do(f"value = ln.Artifact.get({uid!r}).cache().read_text()") == "from the mount again\n"
    assert path.read_bytes() == b"from the mount again\n"


# -- the mount acts, the notebook sees --------------------------------------------------------------------------------


def test_what_the_mount_does_shows_in_the_notebook(
    notebook: Notebook, each_dir: Path, each_mount: MountedInstance
) -> None:
    key = f"{each_dir.name}/table.csv"

    def record() -> dict[str, Any]:
        value: dict[str, Any] = notebook.do(
            f"a = ln.Artifact.filter(key={key!r}).one_or_none()\n"
            "value = None if a is None else dict(uid=a.uid, size=a.size, hash=a.hash, text=a.cache().read_text())"
        )
        return value

    assert record() is None
    (each_dir / "table.csv").write_text("one\n")
    each_mount.sync()
    first = record()
    assert (first["size"], first["text"]) == (4, "one\n")
    (each_dir / "table.csv").write_text("two, longer\n")
    each_mount.sync()
    second = record()
    assert (second["uid"], second["size"], second["text"]) == (first["uid"], 12, "two, longer\n")
    os.rename(each_dir / "table.csv", each_dir / "moved.csv")
    assert record() is None
    key = f"{each_dir.name}/moved.csv"
    assert record()["uid"] == first["uid"]
    os.unlink(each_dir / "moved.csv")
    assert notebook.do(f"value = ln.Artifact.get({first['uid']!r}).visibility") == -1
    notebook.do(f"ln.Artifact.get({first['uid']!r}).restore()")
    shows(lambda: (each_dir / "moved.csv").read_text() == "two, longer\n", "the restored file")


def test_a_path_in_the_mount_names_the_artifact(each_mount: MountedInstance, each_dir: Path) -> None:
    (each_dir / "f.csv").write_text("x\n")
    record = each_mount.stored_info(f"{each_dir.name}/f.csv")
    said = json.loads(each_mount.cli("info", str(each_dir / "f.csv"), "--json").stdout)
    assert (said["uid"], said["hash"]) == (record["uid"], record["hash"])


def test_both_sides_work_at_once_and_nobody_is_told_of_locks(
    notebook: Notebook, each_dir: Path, tmp_path: Path, each_mount: MountedInstance
) -> None:
    """No "database is locked", on either side; everything both made is there."""
    done = threading.Event()
    problems: list[str] = []
    made = 0

    def write() -> None:
        nonlocal made
        while not done.is_set():
            try:
                (each_dir / f"mount {made}").write_bytes(b"%d" % made)
                os.rename(each_dir / f"mount {made}", each_dir / f"mounted {made}")
                made += 1
            except OSError as error:
                problems.append(str(error))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(15):
            save(notebook, tmp_path, f"{each_dir.name}/notebook {number}.csv", b"%d\n" % number)
    finally:
        done.set()
        writer.join(60)
    assert not problems
    each_mount.sync()
    names = {f"notebook {number}.csv" for number in range(15)} | {f"mounted {number}" for number in range(made)}
    wait_until(lambda: set(os.listdir(each_dir)) == names, "all of both", seconds=SHOWS)
    assert made > 5


# -- two mounts -------------------------------------------------------------------------------------------------------


def test_two_mounts_of_one_instance(mount: MountedInstance) -> None:
    other = mount.base / "other"
    other.mkdir()
    mount.cli("mount", str(other))
    try:
        for here, there, number in ((mount.path, other, 1), (other, mount.path, 2)):
            name = f"file {number}"
            assert not (there / name).exists()
            (here / name).write_bytes(b"made")
            shows(lambda t=there, n=name: (t / n).read_bytes() == b"made", "a new file")
            (here / name).write_bytes(b"changed, longer")
            shows(lambda t=there, n=name: (t / n).read_bytes() == b"changed, longer", "a changed file")
            (here / name).chmod(0o600)
            shows(lambda t=there, n=name: (t / n).stat().st_mode == 0o100600, "a changed mode")
            (there / name).write_bytes(b"changed from the other side")
            shows(lambda h=here, n=name: (h / n).read_bytes() == b"changed from the other side", "a change back")
            (here / f"dir {number}").mkdir()
            os.rename(here / name, here / f"dir {number}" / "moved")
            shows(lambda t=there, n=number: os.listdir(t / f"dir {n}") == ["moved"], "a renamed file")
            shows(lambda t=there, n=name: not (t / n).exists(), "the old name gone")
            (there / f"dir {number}" / "moved").unlink()
            shows(lambda h=here, n=number: os.listdir(h / f"dir {n}") == [], "a removed file")
            (there / f"dir {number}").rmdir()
            shows(lambda h=here, n=number: not (h / f"dir {n}").exists(), "a removed directory")
    finally:
        mount.cli("umount", str(other))
    mount.umount()
    assert mount.fsck() == []
